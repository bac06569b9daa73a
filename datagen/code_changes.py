"""Reversible changes of one line in a short function: the file holds one side, the request asks for the other."""

import random
import re
from contextlib import suppress
from dataclasses import dataclass

STALE = ("Do something.", "To be written.", "Helper.", "See the manual.", "Old version.", "Work in progress.", "Placeholder.")
NEW_NAMES = ("{}_value", "{}_item", "do_{}", "my_{}", "{}_all", "{}_fast", "safe_{}", "{}2", "{}_from")
# right -> wrong; read from the left, so each right side must not be a part of another match on its line
MUTATIONS = (
    ("==", "!="), ("!=", "=="), ("<=", "<"), (">=", ">"), (" < ", " <= "), (" > ", " >= "), (" + ", " - "), (" - ", " + "),
    (" and ", " or "), (" or ", " and "), ("return True", "return False"), ("return False", "return True"), (" not in ", " in "),
    (" is not None", " is None"), (" is None", " is not None"), ("if not ", "if "), ("[0]", "[1]"), ("[1:]", "[:1]"), ("[-1]", "[0]"),
)  # fmt: skip


class Unsuitable(Exception):
    """This draw makes no sensible task; the reason is counted."""


@dataclass(frozen=True)
class Change:
    """`code` is the function before; its line `old` becomes `new`. `slots` fill the request, `said` the closing remark."""

    wording: str
    code: str
    old: str
    new: str
    slots: dict[str, str]
    said: str


def change(rng: random.Random, code: str, name: str, doc: str) -> Change:
    """One change of `code`, a function with a one-line head and a one-line docstring. Raises Unsuitable when none fits."""
    makers = (rename, default, operator, docstring)
    for maker in rng.sample(makers, len(makers)):
        with suppress(Unsuitable):
            made = maker(rng, code, name, doc)
            if made.code.count(made.old) == 1:
                return made
    raise Unsuitable("nothing to change")


def rename(rng: random.Random, code: str, name: str, _: str) -> Change:
    if len(re.findall(rf"\b{name}\b", code)) != 1:
        raise Unsuitable("function calls itself")
    head, new = code.split("\n", 1)[0], rng.choice(NEW_NAMES).format(name)
    return Change("rename", code, head, head.replace(f"def {name}(", f"def {new}("), {"new": new}, f"def {new}")


def default(rng: random.Random, code: str, *_: str) -> Change:
    head = code.split("\n", 1)[0]
    choices = re.findall(r"\b(\w+)=(None|True|False|\d+|'\w+')(?=[,)])", head)
    if not choices:
        raise Unsuitable("no constant default")
    arg, old = rng.choice(choices)
    new = {"True": "False", "False": "True", "None": rng.choice(["0", "False"])}.get(old)
    new = new or (str(int(old) + rng.randint(1, 9)) if old.isdigit() else "None")
    line = re.sub(rf"\b{arg}={re.escape(old)}(?=[,)])", f"{arg}={new}", head, count=1)
    return Change("default", code, head, line, {"arg": arg, "old": old, "new": new}, f"{arg}={new}")


def operator(rng: random.Random, code: str, *_: str) -> Change:
    """The file holds a mutant of the real line; the request asks for the real one."""
    lines = code.splitlines()
    places = [(i, right, wrong) for i, line in enumerate(lines[2:], 2) for right, wrong in MUTATIONS if line.count(right) == 1]
    if not places:
        raise Unsuitable("nothing to mutate")
    i, right, wrong = rng.choice(places)
    good, bad = lines[i], lines[i].replace(right, wrong)
    before = "\n".join([*lines[:i], bad, *lines[i + 1 :]]) + "\n"
    return Change("operator", before, bad, good, {"old": bad.strip(), "new": good.strip()}, good.strip())


def docstring(rng: random.Random, code: str, _: str, doc: str) -> Change:
    lines = code.splitlines()
    stale = f'    """{rng.choice(STALE)}"""'
    before = "\n".join([lines[0], stale, *lines[2:]]) + "\n"
    return Change("docstring", before, stale, lines[1], {"new": f"{doc}."}, "")
