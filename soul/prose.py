"""Which characters of a reply are prose, and where its words and sentences are.

A check on the voice must not fire on `README.md`, a URL or a block of code, and a repair must not touch them. `mask`
blanks them and keeps every offset, so a span found in the masked text is a span of the reply.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

CODE = "\ufffc"  # OBJECT REPLACEMENT CHARACTER: no letter, no space, no punctuation

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})([^\n]*)")
_LINE = re.compile(r"[^\n]+\n?|\n")
_TICKS = re.compile(r"`+")
_TOKEN = re.compile(r"[!-~]+")  # runs of printable ASCII: dashes, curly quotes and CJK text end an identifier
_OPEN, _CLOSE = "([{<\"'*_~#>,", ".,;:!?)]}>\"'*_~"
_EXTENSION = (
    "py|pyi|md|txt|rst|json|jsonl|ya?ml|toml|cfg|ini|env|lock|js|jsx|ts|tsx|html?|css|c|h|cc|cpp|hpp|rs|go|java|kt|rb|php|sh|sql|csv|tsv|xml"
    "|ipynb|gguf|parquet|safetensors|log|png|jpe?g|svg|pdf|zip|gz|whl|so|exe|j2|diff|patch"
)
_IDENTIFIER = re.compile(
    rf"""(?:https?|ftp|file)://|www\.|mailto:                  # a URL
    | [$@]\w | [A-Za-z]:\\ | --?[A-Za-z][\w-]*(?:=|$)          # a variable, a decorator, a Windows path, a flag
    | [\w./~-]*\w\.(?:{_EXTENSION})(?::\d+)?$                  # a file
    | \w+=\S | [A-Za-z_]\w*(?:\.[A-Za-z_]\w*){{2,}}$           # an assignment, a.dotted.Name
    | \d[\d.,]*[A-Za-z]{{1,3}}$                                # 98MB, 1.5B""",
    re.VERBOSE,
)
_INNER = re.compile(r"[A-Za-z0-9]_[A-Za-z0-9]|[a-z][A-Z]|[A-Z]{2}[a-z]|\w\(\)")  # snake_case, camelCase, HTTPServer, call()
_CONSTANT = re.compile(r"(?<=[a-z,] )(?:None|True|False)\b(?! of)")

_CHUNK = re.compile(r"\S+")
_LETTER = re.compile(r"\w")
_BREAK = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!^\d)(?<!\n\d)[.!?…]+[\"')\]’”*_]*(?=\s|$)|[。！？]+"
    r"|\n[ \t]*\n\s*|\n(?=[ \t]*(?:[-*+>]|\#{1,6}|\d{1,3}[.)])[ \t])"
)


@dataclass(frozen=True)
class Fence:
    """A fenced code block: `text[start:end]` with its fences, `text[code_start:code_end]` without."""

    start: int
    end: int
    code_start: int
    code_end: int
    language: str


def fences(text: str) -> list[Fence]:
    """The fenced code blocks of `text`; one that is never closed reaches to the end, as in CommonMark."""
    found, opening = [], None
    for line in _LINE.finditer(text):
        match = _FENCE.match(line.group())
        if not match:
            continue
        mark, info = match[1], match[2].strip()
        if opening is None:
            if not (mark[0] == "`" and "`" in info):
                opening = (mark, line.start(), line.end(), info)
        elif mark[0] == opening[0][0] and len(mark) >= len(opening[0]) and not info:
            found.append(Fence(opening[1], line.end(), opening[2], line.start(), opening[3]))
            opening = None
    if opening:
        found.append(Fence(opening[1], len(text), opening[2], len(text), opening[3]))
    return found


def _code_spans(text: str) -> list[tuple[int, int]]:
    """Inline code: a run of backticks up to the next run of the same length, within one paragraph."""
    spans, offset = [], 0
    for paragraph in re.split(r"(\n\n)", text):
        runs = [(match.start() + offset, match.end() + offset) for match in _TICKS.finditer(paragraph)]
        following: dict[int, int] = {}
        closer = [0] * len(runs)
        for i in reversed(range(len(runs))):
            width = runs[i][1] - runs[i][0]
            closer[i], following[width] = following.get(width, 0), i
        i = 0
        while i < len(runs):
            if closer[i]:
                spans.append((runs[i][0], runs[closer[i]][1]))
            i = (closer[i] or i) + 1
        offset += len(paragraph)
    return spans


def is_code(token: str) -> bool:
    """Is this run of characters a path, URL, flag or identifier rather than a word? `README.md` and `HTTPServer` are,
    `Hello` and `JSON` are not; one ambiguous slash ("yes/No") is not a path."""
    if token.startswith("__") or token.endswith("()"):
        return True
    core = token.lstrip(_OPEN).rstrip(_CLOSE).removesuffix("'s")
    if _IDENTIFIER.match(core) or _INNER.search(core) or "\\" in core:
        return True
    if "/" in core and (core.startswith(("/", "./", "../", "~/")) or core.endswith("/") or core.count("/") > 1):
        return True
    return core.isalnum() and any(map(str.isdigit, core)) and any(map(str.isupper, core))


def _blank(text: str, spans: list[tuple[int, int]], filler: str) -> str:
    parts, last = [], 0
    for start, end in spans:
        parts += [text[last:start], filler * (end - start)]
        last = end
    return "".join([*parts, text[last:]])


@lru_cache(maxsize=256)
def mask(text: str) -> str:
    """`text` with code blanked, at equal length: fenced blocks become newlines (they end a sentence), inline code, paths,
    URLs, flags and identifiers become `CODE`. Linear in the length of `text`."""
    text = _blank(text, [(fence.start, fence.end) for fence in fences(text)], "\n")
    text = _blank(text, _code_spans(text), CODE)
    text = _TOKEN.sub(_mask_token, text)
    return _CONSTANT.sub(lambda match: CODE * len(match.group()), text)


def _mask_token(match: re.Match) -> str:
    token = match.group()
    if not is_code(token):
        return token
    end = len(token if token.endswith("()") else token.rstrip(_CLOSE))
    start = min(end, len(token) - len(token.lstrip("([{<\"'")))
    return token[:start] + CODE * (end - start) + token[end:]


def words(prose: str) -> list[tuple[int, int]]:
    """Spans of the words of masked text: what stands between spaces and has a letter or digit (code counts as none)."""
    return [match.span() for match in _CHUNK.finditer(prose) if _LETTER.search(match.group())]


@lru_cache(maxsize=256)
def sentences(prose: str) -> tuple[tuple[int, int], ...]:
    """Spans of the sentences of masked text: they end at . ! ? … before a space, at a blank line, and before a list item,
    heading or quotation. Stretches without a letter or digit are none."""
    edges = [0, *(match.end() for match in _BREAK.finditer(prose)), len(prose)]
    spans = []
    for start, end in pairwise(edges):
        piece = prose[start:end]
        if _LETTER.search(piece):
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return tuple(spans)
