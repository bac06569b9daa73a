"""Instruct and edit data sets as rollouts: what is taken from a row, that the edits are exact, and that every result is true."""

import ast
import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datagen import bugs, convert, from_code, mistakes
from datagen.code_changes import Unsuitable
from datagen.convert import Config, convert_rows, main
from datagen.edits import enclosing, follows, hunks, occurrences, subject, task_of, touched
from datagen.instruct import (
    Columns,
    Item,
    Mixture,
    code_given,
    file_name,
    main_name,
    read_items,
    small_project,
    text_of,
)
from datagen.python_text import python_in, with_data, without_comments
from datagen.replay import replay
from datagen.rollouts import ABOUT_CALLS, WRONG_CALLS, execute, perform, scratch
from soul import conversation, rows
from soul.errors import UserError
from soul.spec import load_soul, parse_soul, run_checks
from workspace.tools import REJECTED, Sandbox

TOOLS = frozenset({"Read", "Edit", "Grep", "Bash"})
VERBS = ("sort", "count", "merge", "filter", "reverse", "sum", "join", "split", "check", "find")
NOUNS = ("items", "words", "lines", "numbers", "users", "orders", "pages", "points")


def function(name: str, noun: str, extra: str = "") -> str:
    head = f'def {name}({noun}, limit=10):\n    """Give {noun} up to a limit."""\n    kept = []\n    for item in {noun}:\n'
    return f"{head}{extra}        if item is None:\n            continue\n        kept.append(item)\n    return kept[:limit]\n"


def long_file(noun: str) -> str:
    """Over sixty lines, with the same lines in each function."""
    return "import os\n\n\n" + "\n\n".join(function(f"{verb}_{noun}", noun) for verb in VERBS)


def items() -> list[Item]:
    """Rows of every sort that the converters know."""
    made = []
    for number, (verb, noun) in enumerate((verb, noun) for verb in VERBS for noun in NOUNS):
        name, code = f"{verb}_{noun}", function(f"{verb}_{noun}", noun)
        sort = number % 5
        if sort == 0:
            made.append(Item(number, "made", f"Write a function to {verb} {noun}.", "", code))
        elif sort == 1:
            text = f"Here you go:\n\n```python\n{code}\nprint({name}([1, 2]))\n```\nIt prints the list."
            made.append(Item(number, "made", f"Create a Python script that can {verb} {noun}.", "[1, 2]", text))
        elif sort == 2:
            made.append(
                Item(
                    number,
                    "made",
                    f"Fix the bug in the following code, which should {verb} {noun}.",
                    code.replace("continue", "break"),
                    code,
                )
            )
        elif sort == 3:
            before = long_file(noun)
            after = before.replace("import os\n", "").replace(
                code, function(name, noun, "        item = item or None\n").replace("limit]", "limit + 1]")
            )
            made.append(
                Item(number, "made", f"Count missing {noun} twice in {verb} (#12)", before=before, after=after, path=f"pkg/{noun}.py")
            )
        else:
            made.append(
                Item(number, "made", "fix tests", before=code, after=code.replace("limit=10", "limit=20"), path=f"{noun}.py", symbol=name)
            )
    return made


@pytest.fixture(scope="module", params=["soul/SOUL.md", "soul/examples/plain.md"], ids=["moss", "plain"])
def built(request):
    soul = load_soul(request.param)
    return soul, *convert_rows(soul, items(), 0, seed=2, mixture=Mixture(TOOLS, bash=0.1, mistakes=0.5))


def test_nearly_every_row_becomes_a_rollout_that_keeps_the_soul(built):
    soul, done, _, stats = built
    assert len(done) >= 0.95 * len(items()), stats
    assert {kind.partition("_")[0] for kind in stats["kinds"]} == {"solution", "modify", "edit"}
    assert sum("recover" in kind for kind in stats["kinds"]) >= 4, stats["kinds"]
    for row in done:
        assert conversation.validate(row["messages"]) == [] and run_checks(soul, row["messages"]) == []
        assert row["messages"][-1]["role"] == "assistant" and not conversation.calls_of(row["messages"][-1])
        assert row["source"] == "dataset:made" and row["soul_hash"] == soul.hash


def test_every_result_replays_and_the_last_file_is_the_one_that_was_asked_for(built):
    wanted = {item.index: item.after or python_in(item.response) for item in items()}
    for row in built[1]:
        calls, difference = replay(row)
        assert calls and not difference
        with scratch({file["path"]: file["content"] for file in row["files"]}) as workspace:
            refused = {i + 1 for i, message in enumerate(row["messages"]) if message["content"] != REJECTED}
            for i, message in enumerate(row["messages"]):
                for name, args in conversation.named_calls(message):
                    if i + 2 in refused:
                        workspace.run(name, args)
            texts = [path.read_text() for path in workspace.root.rglob("*.py")]
        code = wanted[int(row["id"].rpartition("-")[2])]
        assert any(text == code or text.endswith(f"\n\n\n{code}") for text in texts), row["id"]


def test_a_pair_about_the_call_fails_where_it_stands(built):
    soul, done, pairs, stats = built
    files = {row["id"]: {file["path"]: file["content"] for file in row["files"]} for row in done}
    assert set(stats["judged"]) <= WRONG_CALLS and len(stats["judged"]) >= 4
    for pair in (pair for pair in pairs if pair["reason"] in WRONG_CALLS):
        faults = {check["check"] for check in pair["checks"] if not check["ok"]}
        assert faults <= ABOUT_CALLS and run_checks(soul, [*pair["prompt"], *pair["chosen"]]) == []
        with scratch(files[pair["id"]]) as workspace:
            for message in pair["prompt"]:
                for name, args in conversation.named_calls(message):
                    workspace.run(name, args)
            rejected = conversation.named_calls(pair["rejected"][0])
            assert bool(rejected) == (pair["reason"] != "claimed_done")
            assert all(workspace.run(name, args).startswith("error: ") for name, args in rejected), pair["reason"]


def test_two_workers_give_the_same_bytes_as_one(tmp_path):
    soul, digests = load_soul("soul/SOUL.md"), []
    for workers in (1, 2):
        made = convert_rows(soul, items()[:40], 0, seed=7, workers=workers)
        convert.write(tmp_path / str(workers), soul, "made", *made)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / str(workers) / "data").iterdir())])
    assert digests[0] == digests[1] and len(digests[0]) == 4


# ---- edits

LINES = st.lists(st.sampled_from(["", "a", "b", "    a", "x = 1", "return a", "aa"]), max_size=14)


@settings(max_examples=300, deadline=None)
@given(LINES, LINES)
def test_hunks_lead_from_any_text_to_any_other(before, after):
    before, after = "\n".join(before) + "\n", "\n".join(after) + "\n"
    assume(before.strip())
    text = before
    try:
        for hunk in hunks(before, after):
            assert occurrences(text, hunk.old) == 1
            text = text.replace(hunk.old, hunk.new, 1)
        assert text == after
    except Unsuitable:
        assert not text.strip()  # blank lines alone hold no edit


def test_old_strings_are_no_longer_than_they_need_to_be():
    found = list(hunks("a = 1\nb = 2\nc = 3\n", "a = 1\nb = 4\nc = 3\n"))
    assert [(hunk.line, hunk.old, hunk.new) for hunk in found] == [(2, "b = 2", "b = 4")]
    text = function("one", "items") + "\n\n" + function("two", "items")
    (hunk,) = hunks(text, text[::-1].replace("eunitnoc", "kaerb", 1)[::-1])
    assert hunk.narrow == "            continue" and occurrences(text, hunk.narrow) == 2 and "def two" in hunk.old


def test_the_innermost_definition_is_searched_for():
    text = "import os\n\n\nclass A:\n    x = 1\n\n    def f(self):\n        return 1\n\n    y = 2\n"
    assert [enclosing(text, line) for line in (1, 4, 5, 8, 10)] == [("", ""), ("class", "A"), ("class", "A"), ("def", "f"), ("class", "A")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Fixed extraction of titles (closes #123)", "fix extraction of titles"),
        ("[youtube] Add support for clips", "add support for clips"),
        ("remove unused imports in a.py", "remove unused imports"),
        ("fix tests", ""), ("wip", ""), ("Some thoughts", ""), ("update return value and added autocommit)", ""),
    ],
)  # fmt: skip
def test_a_commit_message_becomes_a_request_or_nothing(message, said):
    assert subject(message, "pkg/a.py") == said


def test_a_message_of_the_files_name_and_little_else_says_nothing():
    for message in ("Update Guess the number.py", "fix guess-the-number.py 1 errors", "Add files via upload", "fix the function"):
        assert subject(message, "games/guess_the_number.py") == ""
    assert subject("fix guess_the_number for negative input", "games/guess_the_number.py")


@pytest.mark.parametrize(
    ("what", "new", "enough"),
    [
        ("use https for the url", 'url = "https://a.org/"', True),
        ("fix the url", 'url = "http://a.org/v1/73a9021"', False),  # nobody knows these digits
        ("update the url", 'url = "http://elsewhere.org/"', False),
        ("update the url to elsewhere.org", 'url = "http://elsewhere.org/"', True),
        ("remove the path", 'url = ""', True),
        ("fix the url", "shared, hidden, remote, parsed, joined = split(url)", False),
        ("add more urls", "shared, hidden, remote, parsed, joined = split(url)", True),
    ],
)
def test_words_alone_are_a_request_only_where_the_edit_follows_from_them(what, new, enough):
    before = 'def split(url):\n    return url\n\n\nurl = "http://a.org/"\n'
    after = before.replace('url = "http://a.org/"', new)
    assert follows(what, before, list(hunks(before, after))) is enough
    item = Item(0, "made", what, before=before, after=after, path="a.py")
    for seed in range(20):
        task = task_of(random.Random(seed), item, [], Mixture(TOOLS, bash=0.0), lambda code: True)
        assert enough or new in task.request, task.request


def test_a_search_is_for_what_the_request_names_or_quotes():
    before = long_file("items")
    after = before.replace("continue", "break", 5)[::-1].replace("kaerb", "eunitnoc", 4)[::-1]  # in merge_items alone
    said: dict[str, set] = {}
    for seed in range(60):
        for message in ("stop at the first None in the loop", "wip"):
            item = Item(0, "made", message, before=before, after=after, path="pkg/items.py", symbol="count_items")
            task = task_of(random.Random(seed), item, [], Mixture(TOOLS, bash=0.0), lambda code: True)
            first = task.steps[0]
            named, patched = "count_items" in task.request.partition("```")[0], "```diff" in task.request
            said.setdefault("named" if named else "patched" if patched else "file", set()).add((first.tool, first.args.get("pattern", "")))
            assert patched is ("offset" in first.args)  # a patch has line numbers
    assert said == {"named": {("Grep", "def count_items")}, "patched": {("Read", "")}, "file": {("Read", "")}}
    item = replace(item, after=before.replace("import os", "import sys"), symbol="")
    for seed in range(9):
        task = task_of(random.Random(seed), item, [], Mixture(TOOLS, bash=0.0), lambda code: True)
        assert task.steps[0].args["pattern"] == "import os"


def test_a_closing_names_a_definition_only_where_all_of_the_change_is_in_it():
    text = function("one", "items") + "\n\n" + function("two", "items")
    for after, names in [
        (text.replace("limit=10", "limit=20", 1), {"one"}),
        (text.replace("limit=10", "limit=20"), {"one", "two"}),
        (text.replace("def two", "def three"), {"two", "three"}),
        ("import os\n" + text, {""}),
    ]:
        assert touched(text, after) == names
    item = Item(0, "made", "remove the obsolete function two", before=text, after=function("one", "items"), path="a.py")
    task = task_of(random.Random(1), item, [], Mixture(TOOLS, bash=0.0), lambda code: True)
    assert task.steps[-1].situation == "reworked" and task.slots["name"] == "a"


def test_a_path_that_could_reach_a_shell_is_not_taken():
    for path in ("a; rm -rf x.py", "../a.py", "-c.py", "$(x).py"):
        item = Item(0, "made", "rename the thing to another", before="a = 1\n", after="a = 2\n", path=path)
        try:
            task = task_of(random.Random(1), item, [], Mixture(TOOLS, bash=1.0), lambda code: True)
        except Unsuitable:
            continue
        assert not set(";$( ") & set(task.slots["file"]) and ".." not in task.slots["file"], task.slots["file"]


# ---- what is taken from a row


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f():\n    return 1", "def f():\n    return 1\n"),
        ("Sure:\n```python\nx = f()\n```\nand\n```py\ndef f():\n    return 1\n```", "def f():\n    return 1\n"),
        ("```js\nlet x = 1\n```", ""), ("```\nprint(1)\n```", "print(1)\n"), ("5", ""), ("non-negative", ""), ("x <- c(1)\ny <-", ""),
        ("You can do this:\n\ndef f():\n    return 1\n\nIt returns one.", "def f():\n    return 1\n"),
        ("    x = [1]\n    print(x)", "x = [1]\nprint(x)\n"), ("", ""), ("```python\ndef f(:\n```", ""),
    ],
)  # fmt: skip
def test_the_code_of_a_response(text, code):
    assert python_in(text) == code


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader_of_code(text):
    code = python_in(text)
    assert not code or ast.parse(code)
    assert code_given(Item(0, "made", text))[0] is not None and file_name(text, code).endswith(".py")


def test_names_of_files():
    assert file_name("save it in tools/net.py please", "x = 1") == "tools/net.py"
    assert file_name("", "def helper():\n    pass\n\n\nclass HTTPServer:\n    pass\n") == "http_server.py"
    assert file_name("", "import json\n\n\ndef json():\n    pass\n") == "json_tools.py"
    assert file_name("Print the multiplication table of seven", "print(7)") == "multiplication_table.py"
    assert file_name("Please create a loop that prints out the even numbers. However, skip 4", "print(2)") == "even_numbers.py"
    assert file_name("Edit the following code so that it works", "squares = []\n") == "squares.py"
    assert file_name("", "def get_permutations_without_duplicates():\n    pass\n") == "get_permutations.py"
    assert file_name("", "def validate_IPv4():\n    pass\n") == "validate_ipv4.py"
    assert main_name("write load()", "def load():\n    pass\n\n\ndef save():\n    pass\n") == "load"
    assert main_name("count the primes", "def count():\n    return is_prime()\n\n\ndef is_prime():\n    pass\n") == "count"
    assert main_name("zigzag through a tree", "class Node:\n    pass\n\n\ndef zigzag():\n    pass\n") == "zigzag"


def test_what_a_request_brings_is_changed_or_used_or_left_in_it():
    values, loop = "squares = []\n", "for n in range(3):\n    squares.append(n)\n"
    assert code_given(Item(0, "m", f"Use a comprehension.\n{values}{loop}")) == (values + loop, "Use a comprehension.\n")
    assert code_given(Item(0, "m", "Edit the given code to add 4.", "a = [1]"))[0] == "a = [1]\n"
    for request, context in [("Sort the list.", "a = [1]"), ("Translate it to Python", "function f() {\n  return 1;\n}"),
                             ("Write a class", "a = A()\na.run()"), (f"Loop.\n# Erroneous Code\n{loop}", "")]:  # fmt: skip
        assert code_given(Item(0, "m", request, context)) == ("", "")
    code = "import re\n\n\ndef f(a):\n    return a\n\n\n"
    assert with_data(f"{code}print(f(a))\n", "a = [1]") == f"{code}a = [1]\nprint(f(a))\n"
    for kept in (f"{code}a = 2\nprint(f(a))\n", code, f"{code}print(list(f(1)))\n"):
        assert with_data(kept, "list = [1]" if "list" in kept else "a = [1]") == kept


def test_a_project_has_what_responses_define_and_not_what_they_run():
    made = "import re\n\n\ndef load():\n    return re\n"
    assert small_project([Item(0, "m", "q", "", f"{made}\n\n# Try it:\nprint(load())\n")]) == [("load.py", made)]


def test_comments_go_only_where_the_program_stays_the_same():
    assert without_comments("# a\nx = 1\n# b\ny = '''\n# c\n'''\n") == "x = 1\ny = '''\n# c\n'''\n"
    assert without_comments("x = (\n") == "x = (\n"
    kept = "# a\nx = '''\n\n\n\n\ny'''\n"  # the blank lines are a part of the string
    assert without_comments(kept) == kept


def test_a_soul_that_wants_few_comments_gets_few():
    soul = load_soul("soul/SOUL.md")
    code = "# one\nx = 1\n# two\ny = 2\n# three\nprint(x + y)\n"
    done, _, _ = convert_rows(soul, [Item(0, "made", "Add two numbers in Python.", "", code)], 0, mixture=Mixture(TOOLS, mistakes=0.0))
    (made,) = [args["new_string"] for message in done[0]["messages"] for name, args in conversation.named_calls(message) if name == "Edit"]
    assert "#" not in made and ast.dump(ast.parse(made)) == ast.dump(ast.parse(code))


def test_rows_in_another_language_or_without_code_are_counted():
    soul = load_soul("soul/SOUL.md")
    found = [Item(0, "m", "Say hello in JavaScript", "", 'console.log("hello")'), Item(1, "m", "How many legs?", "", "8"),
             Item(2, "m", "Explain it", "", "It is a list of names.")]  # fmt: skip
    assert not convert_rows(soul, [Item(3, "m", "Explain how a loop works in Python", "", "for i in range(3):\n    print(i)\n")], 0)[0]
    done, _, stats = convert_rows(soul, found, 0)
    assert not done and sum(stats["dropped"].values()) == 3 and convert.yielded(stats)["python"] == 0


# ---- recoveries


@pytest.mark.parametrize(
    "make", [m for m in mistakes.RECOVERIES if m not in (mistakes.misspelt, mistakes.endless)], ids=lambda make: make.__name__
)
def test_each_recovery_is_made_and_runs_as_planned(make):
    project, outcomes = small_project(items()), []
    for item in items():
        rng = random.Random(item.index)
        task = task_of(
            rng,
            item,
            project,
            Mixture(TOOLS, bash=1.0 if make.__name__ in ("slip", "misspelled") and item.index < 12 else 0.0),
            lambda code: True,
        )
        if made := make(rng, task):
            assert "recover" in made.kind and len(made.steps) > len(task.steps) and not mistakes.wrong_calls(rng, made)
            results = execute(made)
            assert any(text == REJECTED or text.startswith("error: ") or "exit code" in text for text in results)
            outcomes.append(made)
        if len(outcomes) == 3:
            break
    assert outcomes, make.__name__


COUNTING = """def numbers(limit):
    found, at = [], 0
    while at < limit:
        found.append(at)
        at += 1
    return found


print(numbers(3))
"""


@pytest.mark.parametrize(
    ("make", "failure", "wrong"),
    [(mistakes.misspelt, "NameError", "print(n"), (mistakes.endless, "timed out after 1 s", "found.append(at)\n    return")],
)
def test_a_program_that_fails_is_mended_and_runs(make, failure, wrong):
    item = Item(0, "made", "Write a script that counts", "", COUNTING)
    task = task_of(random.Random(1), item, [], Mixture(TOOLS, bash=1.0, run=True), lambda code: True)
    made = make(random.Random(2), task)
    broken, *_, repair = (step.args for step in made.steps if step.tool == "Edit")
    assert wrong in broken["new_string"] and broken["new_string"].replace(repair["old_string"], repair["new_string"]) == COUNTING
    results = execute(made)
    assert failure in results[1] and results[-1] == "[0, 1, 2]"
    assert make(random.Random(2), replace(task, steps=task.steps[:1] + task.steps[-1:])) is None  # not run: nobody would notice


def test_a_wrong_call_that_works_is_no_pair():
    task = next(t for i in items() if (t := task_of(random.Random(3), i, [], Mixture(TOOLS, bash=0.0), lambda code: True)).kind == "edit")
    for _, place, wrong in mistakes.wrong_calls(random.Random(1), task):
        with scratch(task.files) as workspace:
            assert not wrong.tool or perform(workspace, (*task.steps[:place], wrong))[-1].startswith("error: ")


# ---- the command


def test_the_command_reads_files_by_their_columns(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"q": i.request, "a": i.response}) + "\n" for i in items() if i.response and not i.context))
    columns = Columns(instruction="q", response="a")
    assert main(Config(out=tmp_path / "run", dataset=(str(data),), columns=columns, n=10)) == 0
    done = rows.read_rows(tmp_path / "run/data/rollouts.parquet")
    assert len(done) == 10 and {row["source"] for row in done} == {"dataset:mine"}
    card = (tmp_path / "run/data/rollouts.md").read_text()
    assert "| mine" not in card and f"| {data} | 10 | 10 | 10 | 1.0 |" in card
    with pytest.raises(UserError, match="not known which holds what"):
        main(Config(out=tmp_path / "run", dataset=(str(data),), n=10))
    with pytest.raises(UserError, match="no column 'b'"):
        main(Config(out=tmp_path / "run", dataset=(str(data),), columns=Columns("q", response="b"), n=10))


def test_rows_of_two_files_of_one_name_have_names_of_their_own(tmp_path):
    files = [tmp_path / part / "train.jsonl" for part in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("".join(json.dumps({"prompt": i.request, "response": i.response}) + "\n" for i in items() if i.response))
    assert main(Config(out=tmp_path / "run", dataset=tuple(map(str, files)), n=5)) == 0
    done = rows.read_rows(tmp_path / "run/data/rollouts.parquet")
    assert len({row["id"] for row in done}) == len(done) == 10
    assert {row["id"].rpartition("-0-")[0] for row in done} == {"train", "train-2"}


def test_the_command_says_what_it_cannot_make_without_a_sandbox(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sandbox, "detect", staticmethod(lambda: Sandbox("none", why="no Landlock here")))
    monkeypatch.setattr("datagen.convert.KINDS", {bugs.fix: (1, set()), from_code.find: (1, set())})
    assert main(Config(out=tmp_path / "run", n=5)) == 0
    assert "no fix_… rollouts: no sandbox to prove a fix in (no Landlock here)" in capsys.readouterr().out.replace("\n", " ")


def test_presets_know_conversations_and_edits(tmp_path):
    chat = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x = 1"}]
    chat.write_text(json.dumps({"id": "1", "prompt": "q", "messages": talk}) + "\n")
    assert next(read_items(str(chat), Columns())).response == "x = 1"
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps({"subject": "s", "old_contents": "a", "new_contents": "b", "old_file": "p.py", "repos": "r/s,t/u"}) + "\n")
    item = next(read_items(str(edits), Columns()))
    assert (item.before, item.after, item.path, item.source) == ("a", "b", "p.py", "edits:r/s")


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        main(Config(out=tmp_path / "run", dataset=(str(tmp_path / "gone.jsonl"),)))
    with pytest.raises(UserError, match="shares from 0 to 1"):
        main(Config(out=tmp_path / "run", dataset=("x/y",), bash=2.0))


def test_code_is_run_where_that_was_asked_for_and_only_code_that_prints_the_same():
    soul, mixture = load_soul("soul/SOUL.md"), Mixture(TOOLS, bash=1.0, run=True, mistakes=0.0)
    silent = ["print(1)  # Output: 2\n", "for n in ():\n    print(n)\n"]
    codes = ["print(6 * 7)\n", "import time\n\nprint(time.time())\n", "print(object())\n", *silent]
    found = [Item(n, "m", f"Print something {n} times.", "", code) for n, code in enumerate(codes)]
    done, _, stats = convert_rows(soul, found, 0, mixture=mixture)
    commands = [
        args["command"] for row in done for message in row["messages"] for name, args in conversation.named_calls(message) if name == "Bash"
    ]
    assert [command.split()[1] for command in commands if "python3" in command] == ["something.py", *["-m"] * 4], stats
    assert any(message["content"] == "42" for message in done[0]["messages"])


def test_nothing_in_a_row_ends_the_run():
    soul = load_soul("soul/SOUL.md")
    deep, names = "x = " + "-" * 3000 + "1\n", "a" * 300
    found = [Item(0, "m", "q", "", deep), Item(1, "m", f"save it as {names}.py", "", "x = 1\n"), Item(2, "m", "q", "", "x = '\0'\n"),
             Item(3, "m", "q" * 70_000, "", "x = 1\n"), Item(4, "m", "r", before="a\0\n", after="b\n", path=f"{names}.py"),
             Item(5, "m", "add a thing here", before=text_of("\ud800\n"), after="b\n", path="a.py"), Item(6, "m", "s", before="\n", after="b\n")]  # fmt: skip
    done, _, stats = convert_rows(soul, found, 0)
    assert stats["attempts"] == 7 and len(done) <= 2


def test_rows_over_the_limit_are_dropped_and_counted():
    soul = parse_soul("# Free\n\n## Principles\n\n- is kind.\n")
    _, _, stats = convert_rows(soul, items()[:5], 0, most=50)
    assert stats["rollouts"] == 0 and all(name.endswith("too long") for name in stats["dropped"])


REAL = Path(os.environ.get("SOULSMITH_REAL_DATA", ""))  # a folder with the sets below; they are not ours to ship


@pytest.mark.skipif(not (REAL / "codealpaca_python.json").is_file(), reason="SOULSMITH_REAL_DATA names no folder with the data sets")
def test_real_rows_reach_the_yields_that_are_promised():
    soul = load_soul("soul/SOUL.md")
    for name, least in (("codealpaca_python.json", 0.85), ("evol_codealpaca.json", 0.85)):
        _, _, stats = convert_rows(soul, list(read_items(str(REAL / name), Columns()))[:150], 0)
        assert convert.yielded(stats)["yield"] >= least, stats
