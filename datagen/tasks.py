"""What a task is, its commonest steps, and the functions to draw from."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from datagen.code_changes import Unsuitable
from datagen.code_seeds import Function, brief, by_module, outside, parse, third_person

MAX_BRIEF_LINES = 9
MAX_BRIEF_CHARS = 360
MAX_LISTED_CHARS = 9_000
READ_LIMIT = 12


@dataclass(frozen=True)
class Step:
    """A remark of that situation, `body` after it and, unless it closes, the call that it announces. `expect` must be in its result.
    `reply`: what the person says next, to the result or to the remark that closes; `narrow`: of an old_string the part that changes, which may not be unique."""

    situation: str
    tool: str = ""
    args: dict[str, str] = field(default_factory=dict)
    expect: str = ""
    slots: dict[str, str] = field(default_factory=dict)
    rejected: bool = False
    body: str = ""
    reply: str = ""
    narrow: str = ""


@dataclass(frozen=True)
class Task:
    """`slots` fill every remark; `final` is the expected text of each file that changes."""

    kind: str
    source: str
    request: str
    files: dict[str, str]
    steps: tuple[Step, ...]
    slots: dict[str, str]
    final: dict[str, str] = field(default_factory=dict)
    must_contain: tuple[str, ...] = ()


def joined(first: Task, second: Task) -> Task:
    """Both requests in one conversation and one workspace. Raises Unsuitable where one's files would change what the other finds."""
    for one, other in ((first, second), (second, first)):
        theirs, name = other.files | other.final, one.slots.get("name")
        if {Path(path).name for path in one.files | one.final} & {Path(path).name for path in theirs}:
            raise Unsuitable("both have a file of that name")
        listed = one.kind == "run_list" and theirs
        if listed or (one.files and name and any(name in text for text in theirs.values())):
            raise Unsuitable("one would find the other's")
    spoken = [replace(step, slots=task.slots | step.slots) for task in (first, second) for step in task.steps]
    spoken[len(first.steps) - 1] = replace(spoken[len(first.steps) - 1], reply=second.request)
    files, final, told = first.files | second.files, first.final | second.final, (*first.must_contain, *second.must_contain)
    source = first.source if first.files else second.source
    return Task("turns", source, first.request, dict(sorted(files.items())), tuple(spoken), {}, final, told)


@dataclass(frozen=True)
class Snippet:
    """A short function as it stands in the small files that rollouts edit, the imports it needs, and what it needs besides."""

    function: Function
    code: str
    imports: tuple[str, ...] = ()
    missing: frozenset[str] = frozenset()

    @property
    def head(self) -> str:
        return self.code.split("\n", 1)[0]


class Pool:
    """Functions sorted for drawing: by module first, so that a module of forty functions isn't drawn forty times as often."""

    def __init__(self, functions: Sequence[Function]):
        self.documented = by_module(f for f in functions if third_person(f.doc))
        documented = [f for group in self.documented.values() for f in group]
        self.listed = by_module(f for f in documented if len(f.module.text) <= MAX_LISTED_CHARS)
        snippets = [snippet(f, code) for f in documented if not f.is_method and (code := suitable(f))]
        ready = [one for one in snippets if not one.missing]
        self.short, self.ready, known = by_module(snippets), by_module(ready), {one.function.id: one for one in ready}
        self.whole = by_module(known.get(f.id) or Snippet(f, f.alone) for f in documented if f.id in known or f.alone)
        self.alone = [f for f in functions if f.alone]
        self.bugs: dict[str, list] | None = None  # what can be proven of `alone`, when it is first asked for

    def draw(self, rng: random.Random, groups: dict[str, list]):
        if not groups:
            raise Unsuitable("no fitting function in this code")
        return rng.choice(groups[rng.choice(list(groups))])

    def pair(self, rng: random.Random, groups: dict[str, list[Snippet]] | None = None) -> tuple[Snippet, Snippet]:
        """Two different short functions, of one module where it has two; the first of these groups."""
        first = self.draw(rng, self.short if groups is None else groups)
        others = [snippet for snippet in self.short[first.function.module.name] if snippet.function.name != first.function.name]
        second = rng.choice(others) if others else self.draw(rng, self.short)
        if second.function.name == first.function.name:
            raise Unsuitable("one function only")
        return first, second


def snippet(function: Function, code: str) -> Snippet:
    names = outside(code)
    imports = {line: line.split()[-1].partition(".")[0] for line in function.module.imports}
    return Snippet(function, code, tuple(line for line, name in imports.items() if name in names), frozenset(names - {*imports.values()}))


def suitable(function: Function) -> str:
    """The brief source of a function fit for a small file: a one-line head, few lines, all of them ASCII, no abstract one; else ""."""
    code = brief(function)
    lines = code.splitlines()
    fits = len(lines) <= MAX_BRIEF_LINES and len(code) <= MAX_BRIEF_CHARS and max(map(len, lines)) <= 100 and len(lines) >= 3
    head_ends = parse(code).body[0].body[0].lineno == 2
    return code if fits and head_ends and code.isascii() and not re.search(r"[\t#]|NotImplementedError", code) else ""


def small_file(*codes: str, imports: Sequence[str] = ()) -> str:
    head = ["\n".join(sorted({*imports})) + "\n"] if imports else []
    return "\n\n".join([*head, *codes])


def quoted_name(rng: random.Random, name: str) -> str:
    return rng.choice([name, name, f"`{name}`", f"{name}()"])


def place(rng: random.Random, module_path: str) -> str:
    """Where a module's file lies in the made-up project: its own path or name, sometimes below a source directory."""
    path = Path(module_path)
    name = path.name if path.name != "__init__.py" else f"{path.parent.name or 'main'}.py"
    return rng.choice(["", "", "", "src/", "lib/", "app/"]) + rng.choice([name, name, (path.parent / name).as_posix()])


def home(rng: random.Random, first: Snippet, second: Snippet) -> str:
    """Where two functions lie: in the module they share, or where all sorts of functions are kept."""
    own = first.function.module.name == second.function.module.name
    return place(rng, first.function.module.path if own else rng.choice(["utils.py", "helpers.py", "common.py", "misc.py"]))


# ---- steps


def grep_step(function: Function, path: str, situation: str = "search", scoped: bool = False) -> Step:
    args = {"pattern": f"def {function.name}"} | ({"path": path} if scoped else {})
    return Step(situation, "Grep", args, expect=f"{path}:{function.line}:")


def read_part(function: Function, path: str, most: int = READ_LIMIT) -> Step:
    limit = min(most, function.end_line - function.line + 1)
    return Step("read_part", "Read", {"file_path": path, "offset": str(function.line), "limit": str(limit)}, expect=f"{function.line:>5}→")


def read_step(path: str) -> Step:
    return Step("read", "Read", {"file_path": path}, expect="    1→")


def edit_step(path: str, old: str, new: str, situation: str = "edit") -> Step:
    return Step(situation, "Edit", {"file_path": path, "old_string": old, "new_string": new}, expect=f"edited {path}")
