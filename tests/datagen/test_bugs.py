"""Proven bugs: what is lifted out of a module, that wrong and right really differ when they run, and the rollouts about them."""

import ast
import random
from dataclasses import replace

import pytest

from datagen import bugs
from datagen.bugs import fix, presentable, proven, with_examples
from datagen.code_changes import BUGS, Unsuitable, default, guard, missing_return, off_by_one, operator, rename
from datagen.code_seeds import by_module, read_code
from datagen.from_code import timed_out
from datagen.rollouts import execute, perform, scratch
from datagen.tasks import Pool
from workspace.sandbox import Sandbox

SHAPES = '''"""Shapes."""
import math
import os

UNIT = 2


def area(width, height=3):
    """Give the area of a rectangle.

    >>> area(4)
    12
    """
    if width < 0:
        return 0
    return width * height


def doubled(items):
    return scaled(items) + scaled(items[1:])


def scaled(items):
    return [item * UNIT for item in items]


def listed(path):
    return os.listdir(path)


def waits(n):
    while n > 1:
        n += 1
    return n


def slow(n):
    for _ in range(10**12):
        n += 1
    return n + 1


def same(n):
    return 1 + 2


class Box:
    def open(self, n):
        return n + 1
'''


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "shapes.py").write_text(SHAPES)
    pool = Pool(read_code(str(folder)))
    pool.bugs = by_module(proven(pool.alone))
    return pool


def test_what_stands_alone_brings_what_it_needs_and_no_more(pool):
    found = {function.name: function.alone for function in pool.alone}
    assert set(found) == {"area", "doubled", "scaled", "slow", "same"}
    assert found["scaled"] == "UNIT = 2\n\n\ndef scaled(items):\n    return [item * UNIT for item in items]\n"
    assert [node.name for node in ast.parse(found["doubled"]).body[1:]] == ["doubled", "scaled"]
    assert all(">>>" not in text or "area(4)" in text for text in found.values())


def test_a_bug_is_one_that_shows_when_it_runs(pool):
    found = [bug for group in pool.bugs.values() for bug in group]
    assert {bug.function.name for bug in found} == {"area", "doubled", "scaled"}  # one never ends, one gives the same whatever it gets
    assert any(bug.wrong[0][0] == "area(4)" for bug in found)  # the docstring's own example
    for bug in found:
        right, wrong = {}, {}
        exec(bug.function.alone, right)
        exec(bug.change.code, wrong)
        assert bug.change.code.replace(bug.change.old, bug.change.new) == bug.function.alone
        for call, want, got in bug.wrong:
            assert repr(eval(call, right)) == want
            try:
                assert repr(eval(call, wrong)) == got != want
            except Exception as error:
                assert got == f"!{type(error).__name__}"
        assert all(repr(eval(call, wrong)) == want for call, want in bug.right)


def tasks(pool, n=60):
    for seed in range(n):
        try:
            yield fix(random.Random(seed), pool)
        except Unsuitable:
            continue


def test_the_command_fails_before_the_fix_and_passes_after_it(pool):
    kinds = {}
    for task in tasks(pool):
        kinds.setdefault(task.kind, task)
    assert set(kinds) == {"fix_call", "fix_test", "fix_doctest", "recover_test"}
    for task in kinds.values():
        results = execute(task)
        last = next(step for step in reversed(task.steps) if step.tool)
        assert last.tool == "Bash" and last.expect in results[-1] and "exit code" not in results[-1]
        with scratch(task.files, task.steps) as workspace:
            before = workspace.run("Bash", last.args)
        assert before != results[-1] and (task.kind == "fix_call" or "exit code: 1" in before)
        assert task.kind != "recover_test" or sum("exit code: 1" in result for result in results) >= 1
        edits = [step for step in task.steps if step.tool == "Edit"]
        assert len(edits) == 1 + (task.kind == "recover_test")
        assert all(edit.args["old_string"].strip() not in task.request for edit in edits)  # what is wrong is told, not where
        unfixed = replace(task, steps=tuple(step for step in task.steps if step.tool != "Edit"))
        with pytest.raises(Unsuitable):
            execute(unfixed)


def test_without_a_sandbox_none_are_made(pool, monkeypatch):
    monkeypatch.setattr(Sandbox, "detect", staticmethod(lambda: Sandbox("none")))
    with pytest.raises(Unsuitable, match="no sandbox"):
        fix(random.Random(1), Pool([function for group in pool.documented.values() for function in group]))


def test_a_probe_that_ends_badly_leaves_none(pool, monkeypatch):
    monkeypatch.setattr(bugs, "calls_for", lambda function: [["__import__('os')._exit(0)"]])
    assert proven(pool.alone) == []


def test_the_changes_of_a_function():
    code = "def f(a, b):\n    if not a:\n        return b\n    c = a[0] + b\n    return c * 2\n"
    made = {make: make(random.Random(2), code, "f", "") for make in BUGS}
    for change in made.values():
        assert change.code != code and change.code.count(change.old) == 1 and change.code.replace(change.old, change.new) == code
    assert made[guard].code == "def f(a, b):\n    c = a[0] + b\n    return c * 2\n"
    assert made[guard].slots["cond"] == "not a" and made[guard].slots["act"] == "return b"
    assert made[missing_return].code.endswith("\n    c * 2\n")
    assert "a[1]" in made[off_by_one].code and made[operator].slots["new"] in code
    for make, other in (
        (guard, "def f(a):\n    return a + 1\n"),
        (missing_return, "def f(a):\n    a += 1\n"),
        (operator, "def f(a): return a + 1\n"),
    ):
        with pytest.raises(Unsuitable):
            make(random.Random(1), other, "f", "")


def test_changes_are_such_as_people_make():
    for number in range(40):
        rng = random.Random(number)
        with pytest.raises(Unsuitable):
            operator(rng, "def f(a):\n    return a + '!'\n")
        with pytest.raises(Unsuitable):
            default(rng, "def f(a=None, b='x'):\n    return a\n")
        assert {default(rng, f"def f(a={old}):\n    return a\n").slots["new"] for old in ("True", "0", "70")} == {"False", "1", "80"}
        assert rename(rng, "def getItem(a):\n    return a\n", "getItem", "").slots["new"] == "get_item"
        assert rename(rng, "def getItem(a):\n    return get_item(a)\n", "getItem", "").slots["new"] != "get_item"
    assert presentable("'a'") and presentable("[1]") and not presentable("'[1]'") and not presentable("''")


def test_examples_go_into_the_docstring_or_make_one(pool):
    doubled = next(function for function in pool.alone if function.name == "doubled")
    text = with_examples(doubled, doubled.alone, [("doubled([1])", "[2]")])
    assert ast.get_docstring(next(n for n in ast.parse(text).body if getattr(n, "name", "") == "doubled")) == ">>> doubled([1])\n[2]"
    documented = replace(doubled, doc="Double it")
    text = with_examples(
        documented, text.replace('"""\n    >>> doubled([1])\n    [2]\n    """', '"""Double it."""'), [("doubled([])", "[]")]
    )
    assert '"""Double it.\n\n    >>> doubled([])\n    []\n    """' in text


def test_a_program_that_waits_is_stopped_and_run_the_other_way(pool):
    task = timed_out(random.Random(1), pool)
    results = execute(task)
    assert results[0] == "timed out after 1 s" and results[-1] == task.slots["output"]


def test_what_a_stopped_command_printed_first_is_not_recorded(pool):
    task = timed_out(random.Random(1), pool)
    noisy = {path: text.replace("import sys\n", 'import sys\nprint("hello")\n') for path, text in task.files.items()}
    with scratch(noisy, task.steps) as workspace, pytest.raises(Unsuitable, match="before its time is up"):
        perform(workspace, task.steps)
