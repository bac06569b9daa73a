"""Reversible changes of a line or two in a short function: the file holds one side, the request asks for the other."""

import ast
import random
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from datagen.code_seeds import parse

STALE = ("Do something.", "To be written.", "Helper.", "See the manual.", "Old version.", "Work in progress.", "Placeholder.")
NEW_NAMES = ("_{}", "{}_impl", "old_{}", "legacy_{}", "{}_v2", "base_{}", "simple_{}", "raw_{}")
# right -> wrong; read from the left, so each right side must not be a part of another match on its line
MUTATIONS = (
    ("==", "!="), ("!=", "=="), ("<=", ">="), (">=", "<="), (" < ", " > "), (" > ", " < "), (" + ", " - "), (" - ", " + "), (" * ", " + "),
    (" and ", " or "), (" or ", " and "), ("return True", "return False"), ("return False", "return True"), (" not in ", " in "),
    (" is not None", " is None"), (" is None", " is not None"), ("if not ", "if "), ("[-1]", "[0]"), ("min(", "max("), ("max(", "min("),
)  # fmt: skip
OFF_BY_ONE = (
    ("<=", "<"), (">=", ">"), (" < ", " <= "), (" > ", " >= "), ("[0]", "[1]"), ("[1:]", "[2:]"), ("[:-1]", "[:-2]"), ("[1]", "[0]"),
    (" + 1", ""), (" - 1", ""), ("range(1, ", "range("), ("[-1]", "[-2]"),
)  # fmt: skip


class Unsuitable(Exception):
    """This draw makes no sensible task; the reason is counted."""


@dataclass(frozen=True)
class Change:
    """`code` is the function before; its lines `old` become `new`. `slots` fill the request, `said` the closing remark."""

    wording: str
    code: str
    old: str
    new: str
    slots: dict[str, str]
    said: str


def change(rng: random.Random, code: str, name: str, doc: str) -> Change:
    """One change of `code`, a function with a one-line head and a one-line docstring. Raises Unsuitable when none fits."""
    makers = (rename, default, docstring, *BUGS)
    for maker in rng.sample(makers, len(makers)):
        with suppress(Unsuitable):
            made = maker(rng, code, name, doc)
            if made.code.count(made.old) == 1:
                return made
    raise Unsuitable("nothing to change")


def rename(rng: random.Random, code: str, name: str, _: str) -> Change:
    if len(re.findall(rf"\b{name}\b", code)) != 1:
        raise Unsuitable("function calls itself")
    head, new = code.split("\n", 1)[0], re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # camelCase
    new = rng.choice(NEW_NAMES).format(name) if new in code else new
    return Change("rename", code, head, head.replace(f"def {name}(", f"def {new}("), {"new": new}, f"def {new}")


def default(rng: random.Random, code: str, *_: str) -> Change:
    head = code.split("\n", 1)[0]
    choices = re.findall(r"\b(\w+)=(True|False|\d+)(?=[,)])", head)
    if not choices:
        raise Unsuitable("no constant default")
    arg, old = rng.choice(choices)
    new = {"True": "False", "False": "True"}.get(old) or str(int(old) + (10 if int(old) > 9 else 1))
    line = re.sub(rf"\b{arg}={re.escape(old)}(?=[,)])", f"{arg}={new}", head, count=1)
    return Change("default", code, head, line, {"arg": arg, "old": old, "new": new}, f"{arg}={new}")


def operator(rng: random.Random, code: str, *_: str) -> Change:
    """The file holds a mutant of the real line; the request asks for the real one."""
    return mutated(rng, code, "operator", MUTATIONS)


def off_by_one(rng: random.Random, code: str, *_: str) -> Change:
    return mutated(rng, code, "off_by_one", OFF_BY_ONE)


def mutated(rng: random.Random, code: str, wording: str, mutations: tuple[tuple[str, str], ...]) -> Change:
    lines = code.splitlines()
    first = body_of(code)[0].lineno - 1
    places = [
        (i, right, wrong) for i, line in enumerate(lines[first:], first) for right, wrong in mutations
        if line.count(right) == 1 and not (right in (" + ", " * ") and {"'", '"'} & {*line})  # no one subtracts a string
    ]  # fmt: skip
    if not places:
        raise Unsuitable("nothing to mutate")
    i, right, wrong = rng.choice(places)
    return replaced(wording, lines, i, i + 1, [lines[i].replace(right, wrong)])


def guard(rng: random.Random, code: str, *_: str) -> Change:
    """The file lacks an early exit: an `if` of two lines."""
    lines = code.splitlines()
    exits = [
        node for node, later in pairwise(body_of(code))
        if isinstance(node, ast.If) and not node.orelse and node.end_lineno == node.lineno + 1 < later.lineno
        and isinstance(node.body[0], ast.Return | ast.Raise)
    ]  # fmt: skip
    if not exits:
        raise Unsuitable("no early exit")
    node = rng.choice(exits)
    made = replaced("guard", lines, node.lineno - 1, node.end_lineno + 1, [lines[node.end_lineno]])
    cond, act = ast.unparse(node.test), ast.unparse(node.body[0])
    return replace(made, slots=made.slots | {"cond": cond, "act": act}, said=f"if {cond}: {act}")


def missing_return(rng: random.Random, code: str, *_: str) -> Change:
    """The file computes the result, and forgets to return it."""
    last, lines = body_of(code)[-1], code.splitlines()
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Call | ast.BinOp) or last.lineno != last.end_lineno:
        raise Unsuitable("no result at the end")
    bare = lines[last.lineno - 1].replace("return ", "", 1)
    return replaced("missing_return", lines, last.lineno - 1, last.lineno, [bare])


def body_of(code: str) -> list[ast.stmt]:
    """The statements of a function after its docstring. Raises Unsuitable when there is nothing but that."""
    node = parse(code).body[0]
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or body[0].lineno == node.lineno:
        raise Unsuitable("no body")
    return body


def replaced(wording: str, lines: list[str], start: int, end: int, wrong: list[str]) -> Change:
    """The change back: `wrong` stands in the file in place of lines `start` to `end`."""
    good, bad = "\n".join(lines[start:end]), "\n".join(wrong)
    before = "\n".join([*lines[:start], *wrong, *lines[end:]]) + "\n"
    return Change(wording, before, bad, good, {"old": bad.strip(), "new": good.strip()}, good.strip())


def docstring(rng: random.Random, code: str, _: str, doc: str) -> Change:
    lines = code.splitlines()
    stale = f'    """{rng.choice(STALE)}"""'
    before = "\n".join([lines[0], stale, *lines[2:]]) + "\n"
    return Change("docstring", before, stale, lines[1], {"new": f"{doc}."}, "")


BUGS = (operator, off_by_one, guard, missing_return)
