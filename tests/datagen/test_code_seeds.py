import ast
import random
import re
import sysconfig
from pathlib import Path

import pytest

from datagen.code_seeds import (
    brief,
    chat_seeds,
    first_sentence,
    imperative,
    imports_of,
    is_held_out,
    outside,
    read_code,
    split,
    third_person,
)
from datagen.phrases import REQUESTS, ask
from soul.errors import UserError

TWO = '''"""A module."""
import os


def joined(parts, sep="/"):
    """Join the parts with a separator.

    More words that nobody needs.
    """

    return sep.join(parts)


def _private():
    """Return nothing of interest here."""


class Box:
    """A box."""

    def open(self):
        """Open the box and return what is in it."""
        return self.content

    @property
    def size(self):
        """Return the size of the box."""


def bare():
    return 1
'''


@pytest.fixture(scope="module")
def stdlib():
    return read_code("stdlib")


def test_extracts_public_documented_functions_with_their_place(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "two.py").write_text(TWO)
    (tmp_path / "pkg" / "broken.py").write_text("def f(:\n")
    (tmp_path / "pkg" / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "two.py").write_text(TWO)
    functions = read_code(str(tmp_path))
    assert [function.id for function in functions] == ["pkg.two.joined", "pkg.two.Box.open"]
    joined, method = functions
    assert (joined.args, joined.doc, joined.line, joined.end_line) == ("parts, sep='/'", "Join the parts with a separator", 5, 11)
    assert method.name == "open" and method.is_method and method.source.startswith("def open(self):\n    ")
    assert brief(joined) == 'def joined(parts, sep="/"):\n    """Join the parts with a separator."""\n    return sep.join(parts)\n'


def test_the_order_is_stable_and_every_line_number_is_true(stdlib):
    assert read_code("package:json") == read_code("package:json")
    assert len(stdlib) > 1000
    for function in stdlib:
        line = function.module.text.splitlines()[function.line - 1]
        assert re.match(rf"\s*def {function.name} ?\(", line), function.id


def test_long_modules_are_cut_between_statements(stdlib):
    parts = {function.module.path: [] for function in stdlib}
    for module in {function.module for function in stdlib}:
        ast.parse(module.text)
        parts[module.path].append(module)
    assert sum(len(texts) > 1 for texts in parts.values()) > 10
    whole = (Path(sysconfig.get_path("stdlib"), "textwrap.py")).read_text()
    assert all(module.text.strip() in whole for module in parts["textwrap.py"])


def test_brief_sources_parse(stdlib):
    for function in (function for function in stdlib if function.doc):
        tree = ast.parse(brief(function))
        assert ast.get_docstring(tree.body[0]) or '"""' in function.source


def test_train_and_held_out_share_no_module(stdlib):
    train, held_out = split(stdlib)
    assert len(train) + len(held_out) == len(stdlib)
    assert not {function.module.name for function in train} & {function.module.name for function in held_out}
    assert 0.1 < len({function.module.name for function in held_out}) / len({function.module.name for function in stdlib}) < 0.35
    # the split is a fact about names: it must not move between versions
    assert is_held_out("shlex") and not is_held_out("textwrap")


@pytest.mark.parametrize(
    ("doc", "command", "statement"),
    [
        ("Return True if s is lowercase", "return `True` if s is lowercase", "returns `True` if s is lowercase"),
        ("Returns the path", "return the path", "returns the path"),
        ("Copies data from src to dst", "copy data from src to dst", "copies data from src to dst"),
        ("Pushes the item", "push the item", "pushes the item"),
        ("Display a page", "display a page", "displays a page"),
        ("Read a file and parse its XML parts", "read a file and parse its XML parts", "reads a file and parses its XML parts"),
        ("Get the key, return None without one", "get the key, return `None` without one", "gets the key, returns `None` without one"),
        ("Set sys.modules['a'] to None", "set `sys.modules['a']` to `None`", "sets `sys.modules['a']` to `None`"),
        ("An iterator over parts", "", ""),
        ("Return", "", ""),
    ],
)
def test_docstrings_become_words_in_a_sentence(doc, command, statement):
    assert (imperative(doc), third_person(doc)) == (command, statement)


def test_first_sentence_takes_plain_sentences_only():
    assert first_sentence("Return a list.  Then more.\n\nEven more.") == "Return a list"
    assert first_sentence("Split a path\nat its end.") == "Split a path at its end"
    assert first_sentence("f(x) -> y") == first_sentence("See <b>this</b> page now") == first_sentence("") == ""
    assert first_sentence("Does the server know it?") == first_sentence("Return the version, e.g. 1.0 or 2.") == ""
    assert first_sentence("Send `data' to the server.") == ""


def test_what_a_function_takes_from_around_it():
    code = "def f(a, b=LIMIT):\n    import os\n    global seen\n    seen = a\n    c = [g(x) for x in a if len(x)]\n    return os.sep + f(c) + re.sub(a, b, c)\n"
    assert outside(code) == {"LIMIT", "g", "re", "seen"}
    assert outside("def f():\n    nonlocal a\n") == {"?"}
    assert outside(f"import re\nfrom x import g\nLIMIT = seen = 2\n{code}") == set()
    assert imports_of(ast.parse("import a.b, c as d\nfrom e import f as g, h\nfrom . import i\n").body) == (
        "from e import f as g", "from e import h", "import a.b", "import c as d",
    )  # fmt: skip


def test_two_sentences_are_not_asked_as_one_question():
    slots = {mark: mark for mark in ("name", "file", "doc", "sig", "new", "old")}
    for kind in ("add", "docstring", "off_by_one"):
        for seed in range(200):
            text = ask(random.Random(seed), kind, **slots)
            assert not (text.endswith("?") and re.search("[.;:] ", text)), text


def test_chat_seeds_are_varied_and_depend_on_the_seed_alone(stdlib):
    train, _ = split(stdlib)
    seeds = chat_seeds(train, 120, seed=3)
    assert seeds == chat_seeds(train, 120, seed=3) != chat_seeds(train, 120, seed=4)
    assert chat_seeds([], 5) == []  # code without a docstring that begins with a verb
    assert len({row["prompt"] for row in seeds}) == 120
    assert len({row["source"] for row in seeds}) > 40
    assert {"id", "prompt", "source"} == set(seeds[0])


def test_requests_fill_every_mark_and_leave_slots_alone():
    slots = {
        mark: f"<{{{mark}}}>"
        for mark in (
            "name",
            "file",
            "doc",
            "sig",
            "new",
            "old",
            "arg",
            "id",
            "request",
            "what",
            "path",
            "command",
            "cond",
            "act",
            "call",
            "want",
            "gives",
            "test",
        )
    }
    for kind, templates in REQUESTS.items():
        assert len(templates) == len(set(templates))
        for seed in range(60):
            text = ask(random.Random(seed), kind, **slots)
            for mark in slots.values():
                text = text.replace(mark, "")
            assert "{" not in text and text.strip(), (kind, text)


def test_bad_sources_are_one_line_errors(tmp_path):
    for source in (str(tmp_path / "none"), str(tmp_path), "package:no_such_package_at_all", "package:sys"):
        with pytest.raises(UserError) as error:
            read_code(source)
        assert "\n" not in str(error.value)


def test_an_installed_package_is_read_by_name():
    names = {function.module.name for function in read_code("package:json")}
    assert "json.decoder" in names
