"""Grep: a deterministic search in ripgrep's output format, in Python so that every machine gives the same bytes."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

from workspace.files import clip_line, fitting, lines_of, load
from workspace.paths import ToolError, missing, relative, resolve, walk

MAX_FILES = 5000
MAX_TOTAL_BYTES = 50_000_000
MAX_OUTPUT_LINES = 100
SEARCHED_CHARS = 1000  # of each line; also bounds a quadratic pattern
CHILD_SECONDS = 10
SHOWN_LINE_CHARS = 250

_CHILD = """import sys, json, re
pattern, files = json.load(sys.stdin)
search = re.compile(pattern).search
json.dump([[index for index, line in enumerate(lines) if search(line)] for lines in files], sys.stdout)"""


def grep(root: Path, args: dict[str, str], budget: int) -> str:
    """The Grep tool: `file:line:text`, `file-line-text` for context, `--` between groups; files in path order.

    Hidden and binary files, junk directories, symlinks and files over 2 MB are passed over.
    """
    mode = args.get("mode", "content")
    if mode not in ("content", "files", "count"):
        raise ToolError("mode must be content, files or count")
    try:
        with warnings.catch_warnings(action="ignore"):  # `[[a]` is legal, and warned about
            re.compile(args["pattern"])
    except (re.error, RecursionError, OverflowError) as error:
        raise ToolError(f"invalid pattern: {getattr(error, 'msg', 'too complex')}") from None
    names, files = _texts(root, resolve(root, args.get("path", ".")))
    hits = _matching(args["pattern"], files)
    before, after = int(args.get("-B", 0)), int(args.get("-A", 0))
    found = [(name, lines, at) for name, lines, at in zip(names, files, hits, strict=True) if at]
    if mode == "files":
        output = [name for name, _, _ in found]
    elif mode == "count":
        output = [f"{name}:{len(at)}" for name, _, at in found]
    else:
        output = [line for name, lines, at in found for line in _groups(name, lines, at, before, after)]
        output = output[1:] if before or after else output  # every group opens with --, the first too
    if not output:
        return "no matches found"
    kept = fitting(output[:MAX_OUTPUT_LINES], budget)
    left = len(output) - len(kept)
    return "\n".join([*kept, f"[{left} more lines; narrow the pattern or the path]"] if left else kept)


def _texts(root: Path, top: Path) -> tuple[list[str], list[list[str]]]:
    """Names and lines of the text files to search."""
    if not top.exists():
        raise missing(root, top)
    names, files, total = [], [], 0
    for real in walk(root, top) if top.is_dir() else [top]:
        try:
            data, _ = load(root, real)
        except ToolError:
            if real == top:
                raise
            continue
        total += len(data)
        if len(names) == MAX_FILES or total > MAX_TOTAL_BYTES:
            raise ToolError("too many files; give a narrower path")
        if b"\0" not in data:
            names.append(relative(root, real))
            files.append(lines_of(data.decode("utf-8", "replace")))
    return names, files


def _matching(pattern: str, files: list[list[str]]) -> list[list[int]]:
    """Indices of the matching lines of each file.

    Python's `re` backtracks and cannot be interrupted: `(a+)+b` takes longer than the universe. A pattern with at most
    one operator that could backtrack runs here; any other runs in a child process (about 25 ms) that can be killed.
    """
    files = [[line[:SEARCHED_CHARS] for line in lines] for lines in files]
    if len(re.findall(r"[*+?{|]", pattern)) <= 1 and not re.search(r"\)[*+?{]|\\[1-9]", pattern):
        search = re.compile(pattern).search
        return [[index for index, line in enumerate(lines) if search(line)] for lines in files]
    try:
        argv, task = [sys.executable, "-I", "-S", "-c", _CHILD], json.dumps([pattern, files])
        child = subprocess.run(argv, input=task, capture_output=True, text=True, timeout=CHILD_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise ToolError("the pattern takes too long; simplify it") from None
    except subprocess.CalledProcessError:
        raise ToolError("the pattern is too complex") from None
    return json.loads(child.stdout)


def _groups(name: str, lines: list[str], at: list[int], before: int, after: int):
    """Output lines of one file; groups of context that touch are one."""
    matched, shown = set(at), -1
    for index in at:
        start = max(shown + 1, index - before)
        if (before or after) and (shown < 0 or start > shown + 1):
            yield "--"
        for number in range(start, min(len(lines), index + after + 1)):
            mark = ":" if number in matched else "-"
            yield f"{name}{mark}{number + 1}{mark}{clip_line(lines[number], SHOWN_LINE_CHARS)}"
            shown = number
