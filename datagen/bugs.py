"""Bugs that are proven: a function that runs by itself, a line of it changed, and a call that then gives something else.

Which calls those are is found by running both versions in the sandbox (probe.py), a whole pool at once. The rollouts run a command
again that fails before the fix, or shows the wrong value, and passes after it. Without a sandbox there are none.
"""

import ast
import doctest
import itertools
import json
import os
import random
import re
import shlex
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from datagen.code_changes import BUGS, Change, Unsuitable
from datagen.code_seeds import Function, by_module, parse
from datagen.phrases import ask
from datagen.tasks import Pool, Step, Task, edit_step, grep_step, place, read_part, read_step
from workspace.sandbox import Sandbox
from workspace.tools import make_workspace

NO_SANDBOX = "no sandbox to prove a fix in"
MAX_FUNCTIONS, MAX_MUTANTS, MAX_CALLS, MAX_VALUE = 300, 24, 25, 36
NUMBERS = ("0", "1", "2", "3", "7", "10", "12", "31", "64", "100", "1900", "2024")
STRINGS = ("''", "'a'", "'b'", "'abc'", "'Hello'", "'hello world'", "'a,b'", "'x=1'", "'42'", "'a/b.txt'", "'<b>'", "'A'")
LISTS = ("[]", "[1]", "[1, 2, 3]", "[3, 1, 2]", "[2, 2, 5]", "['b', 'a']", "['x', 'y', 'x']")
# of the first argument, and of the others; a function that takes a list and a number is about lists, so the order counts
FAMILIES = ((LISTS, LISTS), (LISTS, NUMBERS[:5]), (STRINGS, STRINGS), (STRINGS, NUMBERS[:5]), (NUMBERS, NUMBERS))
MAX_SHOWN = 300  # characters of a file whose failing tests are shown too: a rollout from code must be short
LONG_FILE = 14  # lines; in a longer one the function is searched for, and only it is read


@dataclass(frozen=True)
class Bug:
    """`change.code` is the file with the bug. `wrong`: (call, what it should give, what it gives); `right`: calls, and what they give,
    with and without it. `slip` takes the place of the wrong line in a repair that does not help with the first of `wrong`, or is ""."""

    function: Function
    change: Change
    wrong: tuple[tuple[str, str, str], ...]
    right: tuple[tuple[str, str], ...]
    slip: str = ""


def calls_for(function: Function) -> list[list[str]]:
    """Calls with plain values for the arguments that have no default: the docstring's examples, and of each family some."""
    node = parse(function.source).body[0]
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    calls = [[source for example in examples if is_call(source := example.source.strip(), function.name)]]
    arity = len(node.args.args) - len(node.args.defaults)
    for first, rest in FAMILIES if arity > 1 else FAMILIES[::2]:
        made = [f"{function.name}({', '.join(args)})" for args in itertools.product(first, *[rest] * (arity - 1))]
        calls.append(random.Random(f"calls:{function.id}").sample(made, min(len(made), MAX_CALLS)))
    return calls


def is_call(source: str, name: str) -> bool:
    """Whether it is one call of that function, and so can be written behind a `lambda`."""
    with suppress(SyntaxError, ValueError):
        node = ast.parse(source, mode="eval").body
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and "\n" not in source
    return False


def mutants(function: Function) -> list[Change]:
    """Changes whose `code` is the whole small file with the bug."""
    found: dict[str, Change] = {}
    for number in range(MAX_MUTANTS):
        rng = random.Random(f"bug:{function.id}:{number}")
        with suppress(Unsuitable):
            made = rng.choice(BUGS)(rng, function.source)
            code = function.alone.replace(function.source, made.code)
            if code != function.alone and code.count(made.old) == 1 and code.replace(made.old, made.new) == function.alone:
                found.setdefault(code, replace(made, code=code))
    return list(found.values())


def proven(functions: list[Function]) -> list[Bug]:
    """The bugs that show, none where the functions can't be run. Raises Unsuitable without a sandbox."""
    if Sandbox.detect().kind == "none":
        raise Unsuitable(NO_SANDBOX)
    chosen = [(function, calls_for(function), mutants(function)) for function in functions[:MAX_FUNCTIONS]]
    cases, files = [], {"probe.py": Path(__file__).with_name("probe.py").read_text(encoding="utf-8")}
    for number, (function, calls, found) in enumerate(chosen):
        each = [*itertools.chain(*calls)]
        tail = f"\n\nCALLS = [{', '.join(f'lambda: {call}' for call in each)}]\n"
        codes = {f"case_{number}_{version}": code for version, code in enumerate([function.alone, *(made.code for made in found)])}
        files |= {f"{module}.py": code + tail for module, code in codes.items()}
        cases.append({"calls": len(each), "codes": [*codes]})
    files["cases.json"] = json.dumps(cases)
    with tempfile.TemporaryDirectory(prefix="soulsmith-") as directory:
        workspace = make_workspace(files, directory)
        workspace.run("Bash", {"command": f"{shlex.quote(os.path.realpath(sys.executable))} probe.py", "timeout": "120"})
        try:
            results = json.loads((workspace.root / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
    return [bug for case, outcomes in zip(chosen, results, strict=True) for bug in bugs_in(*case, *outcomes)]


def bugs_in(function: Function, families: list[list[str]], found: list[Change], good: list[str], *bad: list[str]) -> list[Bug]:
    """The bugs of one function, from what its calls give in the right version and in the wrong ones."""
    calls, start, fit = [*itertools.chain(*families)], 0, []
    for number, family in enumerate(families):
        fit = [i for i in range(start, start + len(family)) if presentable(good[i])]
        if len({good[i] for i in fit}) > 1 or (fit and not number):  # what always gives the same is not what it is meant for
            break
        start, fit = start + len(family), []
    bugs = []
    for made, outcomes in zip(found, bad, strict=True):
        wrong, slip = [i for i in fit if outcomes[i] != good[i] and 0 < len(outcomes[i]) <= MAX_VALUE], ""
        for other, others in zip(found, bad, strict=True):
            failing = [i for i in wrong if others[i] != good[i]]
            if other.new == made.new and other.old != made.old and other.old not in made.code and failing:
                wrong, slip = list(dict.fromkeys([*failing, *wrong])), other.old
                break
        shown = tuple((calls[i], good[i], outcomes[i]) for i in wrong)
        same = tuple((calls[i], good[i]) for i in fit if outcomes[i] == good[i])
        bugs += [Bug(function, made, shown, same, slip)] if shown else []
    return bugs


def presentable(value: str) -> bool:
    """Whether people would write it; text in brackets is a list that was taken for text."""
    return len(value) <= MAX_VALUE and not re.search(r"^(None|''|!.*)?$|\\|^' | '$|^['\"]\[|\.\d{6}", value)


# ---- the task


def fix(rng: random.Random, pool: Pool) -> Task:
    """The person says what is wrong, never where: a call and its result, a test that fails, or examples in the docstring."""
    if pool.bugs is None:
        pool.bugs = by_module(proven(pool.alone))
    bug = pool.draw(rng, pool.bugs)
    name, stem = bug.function.name, Path(place(rng, bug.function.module.path)).stem
    if stem in sys.stdlib_module_names:  # its file would stand in the way of the module
        stem = rng.choice([f"{stem}_tools", f"my_{stem}", f"{stem}_utils"])
    text, files, before, after = bug.change.code, {}, "exit code: 1", "(no output)"
    path, form = f"{stem}.py", rng.choice(["call", "test", "doctest"]) if len(text) < MAX_SHOWN else "call"
    slipped = form == "test" and bug.slip and rng.random() < 0.5
    call, want, got = bug.wrong[0] if slipped else rng.choice(bug.wrong[:8])
    if form == "call":
        program = f"from {stem} import {name}; print({call})"
        if set('"$`\\!') & set(program):
            raise Unsuitable("a call that a shell would change")
        command, before, after = f'python3 -c "{program}"', printed(got), printed(want)
    else:
        examples = [*rng.sample(bug.right, min(len(bug.right), rng.randint(0, 2))), (call, want)]
        if form == "test":
            checks = "".join(f"assert {one} == {value}\n" for one, value in examples)
            files, after = {f"test_{stem}.py": f'from {stem} import {name}\n\n{checks}print("ok")\n'}, "ok"
            command = f"python3 test_{stem}.py"
        else:
            text, command = with_examples(bug.function, text, examples), f"python3 -m doctest {path}"
    slots = {"name": name, "file": path, "test": f"test_{stem}.py", "call": call, "want": want, "new": bug.change.said, "command": command}
    slots["gives"] = f"raises `{got[1:]}`" if got[0] == "!" else f"gives `{got}`"
    request = ask(rng, f"fix_{form}", **slots)
    failing = Step("run" if form != "call" else "reproduce", "Bash", {"command": command}, before)
    passing = replace(failing, situation="confirm", expect=after)
    blind = slipped and (path in request or name in request)  # one failure is enough to read
    first = [failing] if (form != "call" and not blind) or rng.random() < 0.3 else []
    repair = [edit_step(path, bug.change.old, bug.change.new, "mend")]
    if slipped:
        repair = [edit_step(path, bug.change.old, bug.slip, "mend"), replace(failing, situation="confirm"),
                  edit_step(path, bug.slip, bug.change.new, "unfixed")]  # fmt: skip
    steps = (*first, *looks(bug.function, path, text, path in request), *repair, passing, Step("fixed" if form == "call" else "passing"))
    kind, final = "recover_test" if slipped else f"fix_{form}", {path: text.replace(bug.change.old, bug.change.new)}
    return Task(kind, bug.function.module.name, request, files | {path: text}, steps, slots, final, (bug.change.new,))


def printed(value: str) -> str:
    """What `print` shows of a value's `repr`; of an exception, its name."""
    return value[1:] if value[0] == "!" else str(ast.literal_eval(value))


def definition(text: str, name: str) -> ast.FunctionDef:
    return next(node for node in parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)


def looks(function: Function, path: str, text: str, told: bool) -> list[Step]:
    """How the function comes to be read: a search where the file is not told or long, and then that part of a long one."""
    node, long = definition(text, function.name), text.count("\n") > LONG_FILE
    here = replace(function, line=node.lineno, end_line=node.end_lineno)
    search = [grep_step(here, path, scoped=told)] if long or not told else []
    return [*search, read_part(here, path, most=text.count("\n")) if long else read_step(path)]


def with_examples(function: Function, text: str, examples: list[tuple[str, str]]) -> str:
    """The file with these examples in the function's docstring, if that has none of its own."""
    node = definition(text, function.name)
    first, lines, has = node.body[0], text.splitlines(), ast.get_docstring(node)
    if has and ">>>" in has:
        return text
    told = [line for call, value in examples for line in (f"    >>> {call}", f"    {value}")]
    head = [f'    """{function.doc}.', ""] if function.doc else ['    """']
    return "\n".join([*lines[: first.lineno - 1], *head, *told, '    """', *lines[first.end_lineno if has else first.lineno - 1 :]]) + "\n"
