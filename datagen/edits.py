"""Edits as tasks: two sides of a file become hunks, and hunks become Edit calls whose old_string occurs once.

The sides come from a data set of edits, or from an instruct row with code in the request and in the response. The calls
take the first side to the second, byte for byte, or the row is dropped.
"""

import builtins
import difflib
import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from datagen.code_changes import Unsuitable
from datagen.code_seeds import tree_of
from datagen.instruct import Item, Mixture, Project, about_file, checked, code_given, file_name, is_change, neighbours, python_of, solution
from datagen.phrases import PHRASES, VERBS, fill, pick
from datagen.python_text import trimmed
from datagen.tasks import Step, Task, edit_step, read_step

LONG_FILE = 60  # lines; of a longer one only the part around the change is read, where the request leads there
MARGIN = 6
MAX_PATCH_CHARS = 2500
MAX_ROW_CHARS = 60_000  # of one text: comparing two is quadratic
MAX_PATH_CHARS = 120
SAFE_PATH = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")  # it goes into a shell command
DEFINITION = re.compile(r"([ \t]*)(?:async )?(def|class) (\w+)")
NOISE = re.compile(
    r"\s*(?:\((?:closes?|closed|fix(?:es|ed)?|refs?|see|issue|pr|thanks|#)[^)]*(?:\)|$)|\s\((?:#?\d+|\d+/\d+)\)"
    r"|[.,;:]?\s*(?:closes|fixes|refs|issue|thanks|ticket|gh-)\s*:?\s*#?\d+.*|,?\s*#\d+|\[(?:ci skip|skip ci)\])",
    re.I,
)
PREFIX = re.compile(r"^\s*(?:\[[^\]]*\]|\* |[\w/.]+:(?= ))\s*", re.I)
VAGUE = re.compile(
    r"(?:add(?:ed)?|fix(?:ed|es)?|updated?|clean(?:ed)?(?: ?up)?|improved?|changed?|minor|small|some|more|misc|wip|oops|typos?"
    r"|address(?:ed)?|apply|format(?:ted)?|lint|black|pep ?8|flake8|mypy|refactor(?:ed|ing)?|tweak(?:ed|s)?|correct(?:ed)?|release|bump"
    r"|merge|revert|another|bug ?fix)"
    r"(?: +(?:the|a|an|it|this|some|more|up|for|in|of|with|small|minor|broken|failing|flaky|black|code|review|comments?|docs?|docstrings?"
    r"|doctests?|documentation|tests?|testcases?|cases?|typos?|bugs?|errors?|issues?|warnings?|lint\w*|format\w*|styles?|imports?"
    r"|whitespace|extraction|regex|build|ci|version|changes|stuff|things|suggestions|fix(?:es)?|description|cosmetics?|files?|via|upload|repository|repo"
    r"|python|functions?|methods?|variables?|scripts?|algorithm|again|clean|and|&|logic|extractor|modernize))*\W*",
    re.I,
)
# parts of a name, so that `video_id` tells `videoId`; what needs no telling
PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
PLAIN = frozenset(word.lower() for word in (*keyword.kwlist, *dir(builtins), "self", "args", "kwargs", "cls"))
PAST, LEFT_OPEN, EDIT_VERBS = PHRASES["past"], PHRASES["left_open"], VERBS | frozenset(PHRASES["commit_verbs"].split())
ASKS = re.compile(
    r"^(?:what|why|which|how does|explain|describe|suggest|identify|find the output|predict)\b"
    r"|\band (?:explain|describe|suggest|tell)\b|\boutput of\b",
    re.I | re.M,
)


@dataclass(frozen=True)
class Hunk:
    """One Edit: `old` occurs once in the file as it then is, from line `line` (from 1); `narrow` is the part of it that changes."""

    line: int
    old: str
    new: str
    narrow: str


def hunks(before: str, after: str) -> Iterator[Hunk]:
    """The edits that turn `before` into `after`, from the top; each is widened by whole lines until its old_string is unique."""
    tail = "\n" if before.endswith("\n") and after.endswith("\n") else ""
    if tail:  # the empty line after the last one is none to match or to take along
        before, after = before[:-1], after[:-1]
    lines, target, shift = before.split("\n"), after.split("\n"), 0
    for start, end, first, last in changed(lines.copy(), target):
        start, end = start + shift, end + shift
        low, high = start, end
        if start == end or first == last:  # an insertion needs a neighbour to hold on to, and a deleted line takes its line break along
            low, high = (low - 1, high) if low else (low, high + 1)
        narrow, up = "\n".join(lines[low:high]), True
        text = "\n".join(lines) + tail
        while (not narrow.strip() and high - low < len(lines)) or occurrences(text, "\n".join(lines[low:high])) != 1:
            if high - low == len(lines):
                raise Unsuitable("nothing to hold an edit on to")
            low, high, up = (low - 1, high, False) if low and (up or high >= len(lines)) else (low, high + 1, True)
            narrow = narrow if narrow.strip() else "\n".join(lines[low:high])
        old, new = lines[low:high], [*lines[low:start], *target[first:last], *lines[end:high]]
        yield Hunk(low + 1, "\n".join(old), "\n".join(new), narrow)
        lines[low:high] = new
        shift += len(new) - len(old)


def changed(before: list[str], after: list[str]) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of lines that differ, (start, end) before and after; ranges with one equal line between them are one."""
    ranges: list[list[int]] = []
    for tag, *here in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if ranges and here[0] - ranges[-1][1] <= 1:
            ranges[-1][1], ranges[-1][3] = here[1], here[3]
        else:
            ranges.append(here)
    yield from (tuple(found) for found in ranges)


def occurrences(text: str, part: str) -> int:
    """How often `part` stands in `text`, counted up to 2; overlaps count, as they do for Edit."""
    at = text.find(part) if part else -1
    return 2 if not part or (at >= 0 and text.find(part, at + 1) >= 0) else int(at >= 0)


def enclosing(text: str, line: int) -> tuple[str, str]:
    """(`def` or `class`, name) of the innermost definition around line `line` (from 1), or ("", ""); `text` need not parse."""
    lines = text.split("\n")
    depth = next((len(row) - len(row.lstrip()) for row in lines[line - 1 :] if row.strip()), 0)
    for number in range(min(line, len(lines)) - 1, -1, -1):
        found = DEFINITION.match(lines[number])
        if found and (len(found[1]) < depth or number == line - 1):
            return found[2], found[3]
        if lines[number].strip():
            depth = min(depth, len(lines[number]) - len(lines[number].lstrip()))
    return "", ""


# ---- requests


def subject(message: str, path: str) -> str:
    """What a commit's first line asks for, as an imperative: without ticket numbers, prefixes, past tense and the file's name;
    "" when it says little."""
    text = NOISE.sub("", PREFIX.sub("", message.strip().split("\n")[0][:200])).strip(" .,:;-!?")
    text = re.split(r"(?<=\w)[.!;] |\s{2,}", text)[0].strip()
    text = text[: text.rfind("(")].rstrip() if text.count("(") > text.count(")") else text
    text = re.sub(rf" (?:in|of|from|to|for) `?(?:[\w/]*/)?{re.escape(Path(path).name).replace('_', '[_ ]')}`?(?=\W|$)", "", text)
    text = re.sub(r"\b(\w+) \1\b", r"\1", re.sub(r"(?: (?:in|for|of|to|from|see|and|with|by|addresses|as|on|cf))+$", "", text, flags=re.I))
    first, _, rest = text.partition(" ")
    verb = PAST.get(first.lower(), first.lower())
    stem, bare = (re.sub(r"\.py\b|[\W_]+", "", text.lower()) for text in (Path(path).stem, rest))
    told = (
        re.match(r"(?:do(?:n't| not)|fix to)\b", text, re.I)
        or (len(stem) > 2 and stem in bare and len(bare) - len(stem) < 8)  # the file's name and little else
        or re.search(r"\b(?:added|fixed|removed|changed|updated)\b", rest)
        or text.count("(") != text.count(")")
        or VAGUE.fullmatch(text)
    )
    return f"{verb} {rest}" if verb in EDIT_VERBS and len(rest.split()) >= 2 and not told else ""


def parts(text: str) -> set[str]:
    return set(map(str.lower, PARTS.findall(text)))


def follows(what: str, before: str, found: list[Hunk]) -> bool:
    """Whether the new lines can be written from the file and these words: no number that neither has, and few such words."""
    lines = {line for hunk in found for line in hunk.new.split("\n") if line not in hunk.old.split("\n")}
    new = {word for word in parts("\n".join(lines)) - parts(f"{before} {what}") - PLAIN if len(word) > 2}
    return not any(map(str.isdigit, new)) and len(new) <= LEFT_OPEN.get(what.partition(" ")[0], 4)


def edit_request(rng: random.Random, what: str, name: str, path: str, before: str, after: str, found: list[Hunk]) -> str:
    """A request from which the edit follows: the commit's words where they say what to do, else the lines or the patch as well."""
    slots = {"what": what, "file": path, "name": name}
    old, new = (text.strip() for text in (found[0].narrow, found[0].new))
    one_line = found[0].narrow == found[0].old and "\n" not in old + new and "`" not in old + new and len(old + new) < 160
    exact = len(found) == 1 and one_line and old and new and old != new
    patch = "\n".join(list(difflib.unified_diff(before.splitlines(), after.splitlines(), "", "", lineterm="", n=1))[2:])
    too_long, full = len(patch) > MAX_PATCH_CHARS or "```" in patch, bool(what) and follows(what, before, found)
    if (full and (rng.random() < 0.8 or not exact)) or (what and too_long):
        return fill(pick(rng, "edit_symbol" if name and rng.random() < 0.5 else "edit_file"), slots)
    kind = ("quote" if exact else "patch") + "_for" * bool(what and rng.random() < 0.8)
    if exact:
        return fill(pick(rng, kind), slots | {"old": old, "new": new})
    if too_long:
        raise Unsuitable("the message says too little")
    return f"{fill(pick(rng, kind), slots)}\n```diff\n{patch}\n```"


# ---- tasks


def shortened(rng: random.Random, path: str) -> str:
    """A path of a repository as it is, or its last parts: as if the project were smaller."""
    parts = path.split("/")
    return "/".join(parts[rng.choice([0, 0, -3, -2, -1 if parts[-1] != "__init__.py" else -2]) :] if len(parts) > 3 else parts)


def edit(rng: random.Random, item: Item, project: Project, mixture: Mixture) -> Task:
    """A row of a data set of edits. Raises Unsuitable for one that changes nothing, or that the tools can't write."""
    before, after = item.before, item.after
    if "\r" in before + after:
        raise Unsuitable("carriage returns")
    if not before.strip() or not after.strip() or before == after:
        raise Unsuitable("nothing to edit")
    if before.endswith("\n") and not after.endswith("\n"):  # the tools end a file with a line break where it had one
        after += "\n"
    path = shortened(rng, re.sub(r"[^\w./-]+", "_", item.path)) if item.path else file_name("", before)
    found = list(hunks(before, after))
    what = subject(item.request, path)
    name = item.symbol.rpartition(".")[2] if re.fullmatch(r"[\w.]+", item.symbol) else enclosing(before, found[0].line)[1]
    told = name.startswith("__") or name not in heads(before) or re.search(rf"\b{name}\b", what)
    request = edit_request(rng, what, "" if told else name, path, before, after, found)
    return change_task(rng, "edit", item, request, path, (before, after), found, project, mixture)


def modification(rng: random.Random, item: Item, before: str, prose: str, project: Project, mixture: Mixture) -> Task:
    """An instruct row whose request brings the code that its response changes."""
    before, after = trimmed(before), python_of(item)
    if before == after:
        raise Unsuitable("nothing to edit")
    if ASKS.search(prose):
        raise Unsuitable("asks for words, not for an edit")
    path = file_name(item.request, before if tree_of(before) else after)
    found = list(hunks(before, after))
    request = about_file(rng, prose, path)
    return change_task(rng, "modify", item, request, path, (before, after), found, project, mixture)


def change_task(rng, kind: str, item: Item, request: str, path: str, texts: tuple[str, str], found: list[Hunk], project, mixture) -> Task:
    """Search where that helps, read what is needed, edit, now and then see whether it compiles, and say so."""
    before, after = texts
    if not SAFE_PATH.fullmatch(path) or len(path) > MAX_PATH_CHARS:
        raise Unsuitable("a path that no one would type")
    prose, patched, _ = request.partition("```diff")
    shown, long = path in prose, before.count("\n") > LONG_FILE
    pattern, head, name = sought(prose, before, found[0])
    others = neighbours(rng, project, path, before, 2) if project and rng.random() < (0.3 if shown else 0.7) else {}
    files = dict(sorted({**others, path: before}.items()))
    steps: list[Step] = []
    if pattern and "Grep" in mixture.tools and not patched and (long or not shown or rng.random() < 0.5):
        args = {"pattern": pattern} | ({"path": path} if shown else {})
        steps.append(Step("search", "Grep", args, f"{path}:{head}:", {"name": name}))
    elif not shown:
        raise Unsuitable("nothing to search for")
    near = steps and head <= found[0].line <= head + 2 * LONG_FILE
    steps += readings(path, found, long and (found[0].line if patched else head if near else 0))
    names = touched(before, after)
    one = len(names) == 1 and re.fullmatch(r"(?!__)\w+", name := names.pop()) and re.search(rf"(?:def|class) {name}\b", after)
    slots = {"name": name if one else Path(path).stem, "file": path}
    task = Task(kind, item.source, request, files, (*steps, Step("changed" if one else "reworked")), slots, {path: after})
    return checked(rng, task, "", replace(mixture, run=False)) if path.endswith(".py") else task


def sought(prose: str, before: str, hunk: Hunk) -> tuple[str, int, str]:
    """What a request gives to search for, as (pattern, its line, how it's called): the line that it quotes, or of the definitions
    that it names the nearest; ("", 0, "") where it gives nothing."""
    line = hunk.narrow.strip()
    if f"`{line}`" in prose:
        piece = max(re.findall(r"[\w ,;:=<>'\"/#@%&!-]+", line), key=len, default="").strip()
        return (piece, hunk.line, piece) if len(piece) > 5 and occurrences(before, piece) == 1 else ("", 0, "")
    text = re.sub(r"`[^`\n]*[^\w`\n][^`\n]*`", " ", prose)
    spoken = r"(?:`|\b(?:in|at|it's|see|function|method|class) )"  # before `run` and the like, which are words as well
    named = [
        (at > hunk.line, abs(hunk.line - at), f"{word} {name}", at, name)
        for name, (word, at) in heads(before).items()
        if re.search(rf"{spoken if name.isalpha() and name.islower() else '(?<![/.-])'}\b{name}\b(?!\.py|[/-])", text)
    ]
    return min(named)[2:] if named else ("", 0, "")


def heads(text: str) -> dict[str, tuple[str, int]]:
    """name -> (`def` or `class`, line) of what is defined once."""
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if head := DEFINITION.match(line):
            found[head[3]] = ("", 0) if head[3] in found else (head[2], number)
    return {name: at for name, at in found.items() if at[1]}


def touched(before: str, after: str) -> set[str]:
    """Names of the innermost definitions that changed lines are in, on either side."""
    ranges = list(changed(before.split("\n"), after.split("\n")))
    old = {enclosing(before, start + 1)[1] for start, end, _, _ in ranges if end > start}
    return old | {enclosing(after, first + 1)[1] for _, _, first, last in ranges if last > first}


def readings(path: str, found: list[Hunk], head: int) -> Iterator[Step]:
    """Read and Edit by turns: the whole file once, or, with the line of a definition, from there what lies around the next edits."""
    seen = 0
    for number, hunk in enumerate(found):
        if not head and not number:
            yield read_step(path)
        elif head and hunk.line + hunk.old.count("\n") > seen:
            first, last = max(1, hunk.line - MARGIN), hunk.line + hunk.old.count("\n") + MARGIN
            first = min(first, head) if not number and first - head < LONG_FILE else first
            for later in found[number + 1 :]:
                if later.line - last < 20 and later.line - first < 60:
                    last = max(last, later.line + later.old.count("\n") + MARGIN)
            args = {"file_path": path, "offset": str(first), "limit": str(last - first + 1)}
            yield Step("read_on" if number else "read_part", "Read", args, f"{first:>5}→")
            seen = last
        seen += hunk.new.count("\n") - hunk.old.count("\n")
        yield replace(edit_step(path, hunk.old, hunk.new, "next_edit" if number else "edit"), narrow=hunk.narrow)


def task_of(rng: random.Random, item: Item, project: Project, mixture: Mixture, admits: Callable[[str], bool]) -> Task:
    """What a row of any data set is good for: an edit, a modification, or a solution. Raises Unsuitable."""
    if max(map(len, (item.request, item.context, item.response, item.before, item.after))) > MAX_ROW_CHARS:
        raise Unsuitable("too long")
    if item.before or item.after:
        return edit(rng, item, project, mixture)
    before, prose = code_given(item)
    if before and is_change(before, python_of(item)):
        return modification(rng, item, before, prose, project, mixture)
    return solution(rng, item, project, mixture, admits)
