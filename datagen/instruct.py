"""Instruct data sets as tasks: the Python in a response, a name for its file, and a request that asks for it.

Rows are untrusted: their code is parsed, never imported. What a row becomes depends on (seed, row) alone.
"""

import ast
import difflib
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from datagen.code_changes import Unsuitable
from datagen.code_seeds import HARMLESS, parse, tree_of
from datagen.phrases import PHRASES, VERBS, fill, pick
from datagen.python_text import CODE_LINE, DEFINITIONS, QUIET, defined, is_python, python_in, tidy, trimmed, with_data, without_comments
from datagen.seeds import READERS, read_rows, suffix
from datagen.tasks import Step, Task, edit_step, quoted_name, read_step
from soul.errors import UserError
from soul.files import sound
from soul.prose import fences

MAX_APPENDED_LINES = 30
COLLECTIONS = ("utils.py", "helpers.py", "common.py", "snippets.py", "exercises.py", "lib/utils.py", "src/helpers.py", "lib/common.py")
NO_PYTHON, FOREIGN = "no Python in the response", "the request is about another language"
NAMED_FILE = re.compile(r"(?<![\w/.~-])((?:\w[\w-]{0,40}/){0,3}\w[\w-]{0,40}\.py)\b")
OTHER_LANGUAGE = re.compile(
    r"\b(?:java(?:script)?|typescript|node(?:\.?js)?|php|ruby|rails|perl|html|css|sql|mysql|bash|shell|powershell|swift|kotlin|scala|rust"
    r"|golang|haskell|matlab|jquery|react|vue|angular)\b|\bc(?:\+\+|#)|\bin (?:c|r|go)\b(?! python)",
    re.I,
)
INLINE_CODE = re.compile(  # with the values before it
    r"^(?:\w+ = .*\n\s*){0,20}(?:def \w+\(|class \w+.*:|import \w|from [\w.]+ import |(?:for|while|if)\b.*:$)", re.M
)
CODE_SPOKEN_OF = re.compile(r"\b(?:following|given|existing|provided|below|this) (?:python )?(?:code|program|script|snippet)\b", re.I)
FOREIGN_CODE = re.compile(r"^[ \t]*(?:\}|#include\b|(?:function|var|let|const|public|int)\b.*[{;])", re.M)
ASKS_WORDS = re.compile(
    r"(?:explain|describe|discuss|why)\b|what(?:'s| is| are) the (?:purpose|use|concept|differences?|syntax|meaning|advantages?)\b", re.I
)
CREATES = re.compile(r"(?:how (?:would|can|could|do) (?:you|i|we|one) )?(?:write|create|implement|design|develop|construct|build)\b", re.I)
MISLEADS = re.compile(r"misdirect|err\w{3,8}s (?:piece|code|reference)|incorrect code", re.I)  # code that is there to be avoided
TOLD_OUTPUT = re.compile(
    r"# *(?:expected output|outputs?|prints):? +(.+)|print\([^#\n]{0,200}# *([\d\[({'\"].*|True|False)$|^ *(?:expected )?output: *\n?(.+)$",
    re.I | re.M,
)
HERE = "⟨here⟩"  # in a request, for code that was taken out of its middle
REFERENCE = re.compile(
    r"\b(?:the|this|that|a|an)? ?(?:following|given|provided|existing|above|below)(?: (?:snippet|piece|block) of)?(?: python)? "
    r"(code|function|program|script|class|method|statement|loop|algorithm|snippet)(?: (?:snippet|block|below|above))?"
    r"|\b(?:the|this|that)(?: python)? (code|function|program|script|class|method|snippet)"
    r"(?: (?:snippet|block|below|above|given below))?(?= |[.:,?]|$)",
    re.I,
)
NO_DATA = re.compile(r"(?:not applicable|none|n/?a|<?no ?input>?|-)\.?", re.I)
VERB_FORMS = {
    form
    for verb in VERBS | set(PHRASES["commit_verbs"].split())
    for form in (verb, f"{verb}s", f"{verb}es", f"{verb}d", f"{verb}ed", f"{verb.removesuffix('e')}ing")
}
DULL = VERB_FORMS | set(PHRASES["filler"].split())


@dataclass(frozen=True)
class Columns:
    """The names of a data set's columns; "" for one that it does not have. A solution has a response, an edit before and after."""

    instruction: str = ""
    """The request, or the commit's message."""
    input: str = ""
    """What belongs to the request: data, or the code to change."""
    response: str = ""
    """The answer: text, or a list of messages of which the last counts."""
    before: str = ""
    """The file before an edit."""
    after: str = ""
    """The file after it."""
    path: str = ""
    symbol: str = ""
    """The function or class that is edited."""
    origin: str = ""
    """Where the row is from, e.g. its repository; it goes into the row's `source`."""

    def named(self) -> list[str]:
        return [name for field in fields(self) if (name := getattr(self, field.name))]


PRESETS = {
    "allenai/tulu-3-sft-personas-code": Columns("prompt", response="messages"),
    "bigcode/self-oss-instruct-sc2-exec-filter-50k": Columns("instruction", response="response"),
    "theblackcat102/evol-codealpaca-v1": Columns("instruction", response="output"),
    "sahil2801/CodeAlpaca-20k": Columns("instruction", "input", "output"),
    "bigcode/commitpackft": Columns("subject", before="old_contents", after="new_contents", path="old_file", origin="repos"),
}
# tried in this order on a data set without a preset: the first of which it has every column
SHAPES = (
    Columns("instruction", before="old", after="new", path="path", symbol="symbol", origin="repo"),
    Columns("instruction", before="old", after="new", path="path", origin="repo"),
    PRESETS["bigcode/commitpackft"], PRESETS["sahil2801/CodeAlpaca-20k"], Columns("instruction", "input", "response"),
    *PRESETS.values(), Columns("prompt", response="response"), Columns("prompt", response="code"),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One row of a data set, in the words of `Columns`."""

    index: int
    source: str
    request: str
    context: str = ""
    response: str = ""
    before: str = ""
    after: str = ""
    path: str = ""
    symbol: str = ""


@dataclass(frozen=True)
class Mixture:
    """How rows become tasks: the tools that there are, and shares of one. `run` lets a Bash step run a row's own code."""

    tools: frozenset[str]
    bash: float = 0.15
    run: bool = False
    mistakes: float = 0.15


Project = Sequence[tuple[str, str]]  # (name, text) of small files that can lie beside the one that a task is about


def read_items(dataset: str, given: Columns) -> Iterator[Item]:
    """The rows of a file, a folder, or a data set on the Hub. Raises UserError for one whose columns are not known."""
    local, columns = Path(dataset).exists() or suffix(Path(dataset)) in READERS, given
    for index, (where, row) in enumerate(read_rows(dataset if local else f"hf:{dataset}")):
        if not isinstance(row, dict):
            raise UserError(f"a row must be an object, not {type(row).__name__}", where=where)
        if index == 0:
            columns = columns_of(dataset, row, given)
        texts = [text_of(row.get(getattr(columns, name))) for name in ("instruction", "input", "response", "before", "after")]
        path, symbol, origin = (str(row.get(column) or "") if column else "" for column in (columns.path, columns.symbol, columns.origin))
        source = ":".join(part for part in (Path(dataset).name.partition(".")[0] if local else dataset, origin.split(",")[0]) if part)
        yield Item(index, source, *texts, path, symbol)


def columns_of(dataset: str, row: dict, given: Columns) -> Columns:
    shapes = [PRESETS[dataset]] if dataset in PRESETS else SHAPES
    columns = given if given.named() else next((shape for shape in shapes if set(shape.named()) <= set(row)), Columns())
    sides = columns.response or (columns.before and columns.after)
    if missing := [name for name in columns.named() if name not in row]:
        raise UserError(f"has no column {missing[0]!r}; it has {', '.join(map(str, row))}", where=dataset)
    if not columns.instruction or not sides:
        fix = "Name them: --columns.instruction COL --columns.response COL (or --columns.before COL --columns.after COL)."
        raise UserError(f"has the columns {', '.join(map(str, row))}: not known which holds what", where=dataset, fix=fix)
    return columns


def text_of(value: object) -> str:
    """A column's text; of a conversation, the last message's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return sound(value) if isinstance(value, str) else ""


# ---- names


def main_name(request: str, code: str) -> str:
    """The function or class that the code is about: one that the request names, else, of those that the others don't use
    and that share a word with it, the first class or the last function."""
    names = [name for name in defined(code) if name != "main"]
    asked = [name for name in names if re.search(rf"\b{name}\b", request)]
    tree = tree_of(code) if len(names) > 1 else None
    parts = [(part.name, node) for part in tree.body if isinstance(part, DEFINITIONS) for node in ast.walk(part)] if tree else ()
    helpers = {node.id for name, node in parts if isinstance(node, ast.Name) and node.id != name}
    names = [name for name in names if name not in helpers] or names
    said = set(telling(request)) if len(names) > 1 else ()
    names = [name for name in names if not said.isdisjoint(snake(name).split("_"))] or names if said else names
    classes = [name for name in names if re.search(rf"^class {name}\b", code, re.M)]
    return (asked or classes or names[::-1] or [""])[0]


def snake(name: str) -> str:
    return re.sub(r"(?<=[A-Z0-9])(?=[A-Z][a-z]{2})|(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_")


def telling(request: str) -> list[str]:
    """The words of a request's first sentence that say what it is about: no filler, no verb in any form."""
    words = re.findall(r"[a-z]{3,}", re.split(r"\n|[.?!] ", request.strip())[0].lower())
    return [word for word in words if word not in DULL and not word.endswith("ly")]


def file_name(request: str, code: str) -> str:
    """The file that the request names, else one after what the code defines or the request is about."""
    if named := NAMED_FILE.search(request):
        return named[1]
    name, words = snake(main_name(request, code)), telling(request)
    value = re.search(r"^((?!my_|num|arr|list|data)[a-z]\w{3,}) = ", code, re.M)
    about = name and (len(defined(code)) < 3 or not set(name.split("_")).isdisjoint(words))  # of many functions the last tells little
    parts = (name * bool(about) or "_".join(dict.fromkeys(words[:2])) or name or (snake(value[1]) if value else "script")).split("_")
    while len("_".join(parts)) > 28 and len(parts) > 1:
        parts.pop()
        while len(parts) > 1 and (len(parts[-1]) < 3 or parts[-1] in ("and", "for", "from", "the", "with", "without")):
            parts.pop()
    stem = "_".join(parts)[:28]
    # a file that shadows a module breaks whatever imports that
    shadows = stem in sys.stdlib_module_names or re.search(rf"^\s*(?:import|from) {re.escape(stem)}\b", code, re.M)
    return f"{stem}_tools.py" if shadows else f"{stem}.py"


def small_project(items: Sequence[Item], most: int = 60) -> list[tuple[str, str]]:
    """Files to lie beside others, from short responses that define something, up to where they run it."""
    files: dict[str, str] = {}
    for item in items:
        code = python_in(item.response or item.before)
        tree = tree_of(code) if len(code) <= 2000 else None
        if tree and (runs := next((node.lineno for node in tree.body if not isinstance(node, QUIET)), 0)):
            code = re.sub(r"(?:\n *(?:#.*)?)+\Z", "\n", "".join(code.splitlines(keepends=True)[: runs - 1]))
        if tree and defined(code) and len(code) <= 900:
            files.setdefault(Path(file_name("", code)).name, code)
        if len(files) == most:
            break
    return list(files.items())


def neighbours(rng: random.Random, project: Project, path: str, code: str, most: int) -> dict[str, str]:
    """Up to `most` files of the project that share no name with `code`, in the folder of `path`."""
    names, folder = set(defined(code)), Path(path).parent
    fit = [(name, text) for name, text in project if name != Path(path).name and not names & set(defined(text))]
    return {(folder / name).as_posix(): text for name, text in rng.sample(fit, min(len(fit), rng.randint(1, most)))}


# ---- requests


def worded(rng: random.Random, request: str, data: str = "") -> str:
    """A request with its data, now and then in the way that people type."""
    text, data = request.strip(), data.strip()
    if data and not NO_DATA.fullmatch(data) and data not in text:
        text += f"\n{data}"
    if rng.random() < 0.35 and re.match(r"[A-Z][a-z]+ ", text):
        text = text[0].lower() + text[1:]
        text = text if "\n" in text else text.removesuffix(".")
    return text


def python_of(item: Item) -> str:
    """The Python of the row's response. Raises Unsuitable where there is none, or where the request asks for another language."""
    code = python_in(item.response)
    if not code:
        raise Unsuitable(NO_PYTHON)
    asked = f"{item.request}\n{item.context}"
    if "```py" not in item.response.lower() and OTHER_LANGUAGE.search(asked) and "python" not in asked.lower():
        raise Unsuitable(FOREIGN)
    return trimmed(code)


def code_given(item: Item) -> tuple[str, str]:
    """(code, the rest of the request) of a request that brings code: in its input, in a fenced block or at its end. The code need
    not parse, for it may be there to be mended. ("", "") for one without, or with data only."""
    blocks, inline = fences(item.request), INLINE_CODE.search(item.request)
    if item.context.strip():
        code, prose = tidy(item.context), item.request
        code = max((tidy(code[fence.code_start : fence.code_end]) for fence in fences(code)), key=len, default=code)
    elif blocks:
        fence = max(blocks, key=lambda fence: fence.end - fence.start)
        code, rest = tidy(item.request[fence.code_start : fence.code_end]), item.request[fence.end :]
        prose = item.request[: fence.start] + (f"{HERE}\n{rest}" if rest.strip() else "")
    elif inline:
        code, prose = tidy(item.request[inline.start() :]), item.request[: inline.start()]
        code = code if code.count("\n") > 1 and tree_of(code) else ""
    else:
        return "", ""
    tree = tree_of(code)
    data = tree and all(isinstance(n, (ast.Assign, ast.Expr)) and not any(isinstance(x, ast.Call) for x in ast.walk(n)) for n in tree.body)
    data = not CODE_SPOKEN_OF.search(prose) if data else not tree and FOREIGN_CODE.search(code)
    data = data or MISLEADS.search(item.request) or (CREATES.match(prose.strip()) and not defined(code))
    return (code, prose) if (CODE_LINE.search(code) or is_python(code)) and not data and prose.strip() else ("", "")


def about_file(rng: random.Random, prose: str, path: str) -> str:
    """The request of an instruct row, with its code moved into the file that it now speaks of."""
    text = worded(rng, prose.strip(" :\n")).replace(HERE, f"(it's in {path})").rstrip(" :\n")
    if path in text:
        return text
    if re.search(r"\b(?:of|for|to|with|in|from|on)$", text):
        return f"{text} the code in {path}"
    referred = REFERENCE.search(text)
    if referred and rng.random() < 0.8:
        start, end = referred.span(1 if referred[1] else 2)
        before = text[: referred.start()].rstrip()
        return f"{before} the {text[start:end].lower()} in {path}{text[referred.end() :]}".strip()
    return fill(pick(rng, "modify"), {"request": text, "file": path})


def is_change(before: str, after: str) -> bool:
    """Whether `after` is `before` with changes, and not something new: it has a definition of the same name, or many of its lines."""
    if set(re.findall(r"^(?:def|class) (\w+)", before, re.M)) & set(re.findall(r"^(?:def|class) (\w+)", after, re.M)):
        return True
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in (before, after)]
    if difflib.SequenceMatcher(None, *lines, autojunk=False).ratio() >= 0.2:
        return True
    return len(before) + len(after) < 1500 and difflib.SequenceMatcher(None, before, after, autojunk=False).ratio() >= 0.45


# ---- solutions


def solution(rng: random.Random, item: Item, project: Project, mixture: Mixture, admits: Callable[[str], bool]) -> Task:
    """The response's code as a new file, in an empty project or beside others, or at the end of a file that is there.
    Code that the SOUL does not admit (for its comments) goes in without them."""
    code = with_data(python_of(item), item.context)
    if ASKS_WORDS.match(item.request.strip()):
        raise Unsuitable("asks for words, not for code")
    code = code if admits(code) else without_comments(code)
    request, name = worded(rng, item.request, item.context), main_name(item.request, code)
    draw, named = rng.random(), NAMED_FILE.search(item.request)
    if draw < 0.25 and project and not named and (task := appended(rng, item, request, code, project)):
        return checked(rng, task, code, mixture)
    path = file_name(item.request, code)
    beside, told = draw < 0.6 and project, not named and rng.random() < 0.6
    if not named and (beside or told):  # in an empty project no one makes up a folder
        path = rng.choice(["", "", "", "src/", "app/"]) + path
    files = neighbours(rng, project, path, code, 3) if beside else {}
    if told or not (named or re.search(r"\b(?:program|script|module|file)\b", request)):  # else an answer without a file would do
        request = fill(pick(rng, "put" if told else "anywhere"), {"request": request, "file": path})
    slots = {"name": name or Path(path).stem, "file": path}
    steps = (Step("create", "Edit", {"file_path": path, "new_string": code}, f"created {path}"), Step("created" if name else "scripted"))
    if name and files and "Grep" in mixture.tools:
        word = "class" if re.search(rf"^class {name}\b", code, re.M) else "def"
        steps = (Step("unused", "Grep", {"pattern": f"{word} {name}"}, "no matches found"), *steps)
    elif files and "Bash" in mixture.tools and rng.random() < mixture.bash:
        steps = (Step("look", "Bash", {"command": "ls"}, min(files).partition("/")[0]), *steps)
    task = Task(f"solution_{'beside' if files else 'new'}", item.source, request, dict(sorted(files.items())), steps, slots, {path: code})
    return checked(rng, task, code, mixture)


def appended(rng: random.Random, item: Item, request: str, code: str, project: Project) -> Task | None:
    """The code at the end of one of the project's files; None for code that would not stand there."""
    tree, name = tree_of(code), main_name(item.request, code)
    if not name or code.count("\n") > MAX_APPENDED_LINES or not all(isinstance(node, DEFINITIONS) for node in tree.body):
        return None
    found = list(neighbours(rng, project, "", code, 1).items())
    if not found:
        return None
    path, text = rng.choice(COLLECTIONS), found[0][1].rstrip("\n")  # no one puts a second thing into fibonacci.py
    lines, start = text.split("\n"), -1
    while text.count("\n".join(lines[start:])) > 1:
        start -= 1
    end, more = "\n".join(lines[start:]), "\n\n\n" + code.rstrip("\n")
    request = fill(pick(rng, "extend"), {"request": request, "file": path, "name": quoted_name(rng, name)})
    steps = (read_step(path), edit_step(path, end, end + more), Step("added"))
    final = {path: f"{text}{more}\n"}
    return Task("solution_append", item.source, request, {path: f"{text}\n"}, steps, {"name": name, "file": path}, final)


# ---- trying it out


def prints_the_same(code: str) -> bool:
    """Whether running `code` shows something, the same each time as far as its text tells."""
    tree = parse(code)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    shows = any(not isinstance(node, DEFINITIONS) and "print(" in ast.unparse(node) for node in tree.body)
    uneven = re.search(r"\b(?:input|open|id|exit|quit|eval|exec|set|hash)\(|\b__import__|\bwhile True\b", code)
    return shows and not uneven and {name.partition(".")[0] for name in modules} <= HARMLESS


def checked(rng: random.Random, task: Task, code: str, mixture: Mixture) -> Task:
    """The task, in a share of cases with a look at whether it works: its own output where that may be run, else that it compiles."""
    if "Bash" not in mixture.tools or rng.random() >= mixture.bash:
        return task
    path, run = task.slots["file"], mixture.run and task.kind != "solution_append" and prints_the_same(code)
    command = f"python3 {path}" if run else f"python3 -m py_compile {path}"
    told = TOLD_OUTPUT.search(f"{code}\n{task.request}") if run else None  # what shows something else than it should is not tried
    expect = told[told.lastindex].strip(" '\"`.") if told else "" if run else "(no output)"
    bash = Step("try" if run else "verify", "Bash", {"command": command}, expect)
    steps = (*task.steps[:-1], bash, Step("ran" if run else "compiled"))
    return replace(task, kind=f"{task.kind}_{'run' if run else 'compile'}", steps=steps, slots=task.slots | {"command": command})
