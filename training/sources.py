"""Documents to train on: local files, the Hugging Face hub, and what a Python installation brings along.

A source is a preset, `hf:NAME[:CONFIG][:SPLIT][@COLUMN]`, or a file or folder of .parquet, .jsonl(.gz), .txt, .md, .rst, .py; `=W` at its end weighs it.
Rows are untrusted: what is not text is skipped and counted. Files come in the order of their paths' hashes, so any part of the stream holds a bit of
everything, and every machine agrees on it.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import chain, islice
from pathlib import Path

from soul.errors import UserError
from soul.files import disk_error
from soul.records import file_rows, hub_rows

TEXT, ROWS = (".txt", ".md", ".rst", ".py"), (".jsonl", ".ndjson", ".jsonl.gz", ".parquet")
COLUMNS = ("text", "content")
SPLITS = ("train", "validation", "valid", "test")
PERMISSIVE = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0")
PIECE = 1 << 15  # characters of a document, when a source is one text file
HELD_OUT, SMALL, VALIDATION_BYTES = 32, 128, 2_000_000  # one document in 32; a source of fewer than 128; held-out bytes of a source
DEFAULT = ("python-docs", "python-code")
PRESETS = {  # name: (where it is read, licence)
    "python-code": ("the .py files of this Python's standard library", "PSF-2.0"),
    "python-docs": ("its docstrings and language reference, and the READMEs of installed packages", "PSF-2.0; as each package says"),
    "fineweb-edu": ("hf:HuggingFaceFW/fineweb-edu:sample-10BT:train@text", "ODC-By-1.0"),
    "code": ("hf:codeparrot/codeparrot-clean:train@content", f"of each row, only {', '.join(PERMISSIVE)}"),
}


@dataclass(frozen=True)
class Document:
    """`text` is not empty and encodes as UTF-8 in `size` bytes; `id` is a path, or the hash of the content. `held_out`: for validation."""

    source: str
    text: str
    id: str
    size: int
    held_out: bool = False


@dataclass(frozen=True)
class Source:
    """Where documents come from; `weight` is its share of the bytes (None: read whole), `column` that of its rows' text."""

    name: str
    spec: str
    licence: str
    weight: float | None = None
    column: str | None = None

    @property
    def place(self) -> str:
        """The spec, or what it stands for where it is a preset."""
        return PRESETS[self.spec][0] if self.spec in PRESETS else self.spec


def parse_sources(specs: Sequence[str], column: str | None = None) -> list[Source]:
    """Sources of `PRESET|hf:…|PATH[=WEIGHT]`. Raises UserError for what is unknown or missing, and when only some are weighed."""
    sources = [_source(spec, column) for spec in specs]
    if twice := [name for name, n in Counter(source.name for source in sources).items() if n > 1]:
        raise UserError(f"two sources are called {twice[0]!r}", fix="Give one of them another file name.")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError("some sources have a weight and some have none", fix="Write SRC=WEIGHT for all of them, or for none.")
    return sources


def _source(spec: str, column: str | None) -> Source:
    place, weight = spec, None
    if "=" in spec and not Path(spec).exists():
        place, _, number = spec.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"a weight must be a number above 0, not {number!r}", where=spec)
    if place in PRESETS:
        return Source(place, place, PRESETS[place][1], weight, column)
    if place.startswith("hf:"):
        return Source(place[3:].partition("@")[0].partition(":")[0].rpartition("/")[2], place, "see the data set's page", weight, column)
    if not Path(place).exists():
        raise UserError("no such file or source", where=place, fix=f"Give a file, a folder, hf:NAME or one of {', '.join(PRESETS)}.")
    return Source(Path(place).resolve().name.partition(".")[0] or "data", place, "not stated", weight, column)


def mixture(sources: Sequence[Source], limit: int, counts: Counter) -> Iterator[Document]:
    """Documents of all sources, at most about `limit` bytes, each time from the source that is furthest behind its share.

    Without weights every source is read to its end. With weights the stream ends when any source does, so that the shares hold; nothing is repeated.
    Exact duplicates are dropped. `counts` gets the number of "duplicates", and of documents for each reason why they were skipped.
    """
    streams = [documents(source, counts) for source in sources]
    taken, seen, total = dict.fromkeys(range(len(sources)), 0.0), set(), 0
    while taken and total < limit:
        at = min(taken, key=lambda i: (taken[i], i))
        if (document := next(streams[at], None)) is None:
            if sources[at].weight is not None:
                return
            del taken[at]
            continue
        key = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        if key in seen:
            counts["duplicates"] += 1
            continue
        seen.add(key)
        taken[at] += document.size / (sources[at].weight or 1.0)
        total += document.size
        yield document


def documents(source: Source, counts: Counter) -> Iterator[Document]:
    """Every usable document of one source. Raises UserError when it cannot be read, or gives none.

    One document in `HELD_OUT` is held out, by the hash of its id; of a source of fewer than `SMALL`, the three with the lowest hashes.
    """
    usable = _usable(source, counts)
    first = list(islice(usable, SMALL))
    if not first:
        why = ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "it is empty"
        raise UserError(f"holds no document that can be used ({why})", where=source.spec, fix="--column names the rows' column of text.")
    limit = 1 / HELD_OUT if len(first) == SMALL else sorted(_chance(document.id) for document in first)[min(3, len(first) // 4)]
    held = 0
    for document in chain(first, usable):
        held_out = _chance(document.id) < limit and held < VALIDATION_BYTES
        held += document.size * held_out
        yield replace(document, held_out=held_out)


def _chance(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()) / 2**64


def _usable(source: Source, counts: Counter) -> Iterator[Document]:
    for name, text in _texts(source):
        try:
            data = text.encode() if isinstance(text, str) and text.strip() else b""
            problem = "with NUL" if b"\0" in data else "" if data else "without text, or of another licence"
        except UnicodeEncodeError:
            problem = "not UTF-8"
        if problem:
            counts[problem] += 1
        else:
            yield Document(source.name, text, name or hashlib.blake2b(data, digest_size=16).hexdigest(), len(data))


def _texts(source: Source) -> Iterator[tuple[str, object]]:
    """(id, text) of everything in the source; an empty id stands for the hash of the text."""
    root = Path(source.spec)
    columns = [source.column] if source.column else COLUMNS
    if source.spec == "python-code":
        yield from ((name, _decoded(path)) for name, path in _standard_library())
    elif source.spec == "python-docs":
        yield from _python_docs()
    elif source.place.startswith("hf:"):
        place, _, column = source.place.removeprefix("hf:").partition("@")
        columns = [column] if column and not source.column else columns
        name, *parts = place.split(":")  # a lone part is a split when it is called like one
        split = parts.pop() if parts and (len(parts) == 2 or parts[0].partition("[")[0] in SPLITS) else "train"
        yield from (("", _cell(row, columns, source.spec == "code")) for _, row in hub_rows(name, *parts, split=split, where=source.place))
    elif root.is_file() and root.name.endswith(TEXT):
        text = _decoded(root)
        yield from ((f"{root.name}#{at}", text[at : at + PIECE]) for at in range(0, len(text), PIECE))
    else:
        files = _files(root, TEXT + ROWS) if root.is_dir() else [(root.name, root)] if root.name.endswith(ROWS) else []
        if not files:
            raise UserError(f"{'holds' if root.is_dir() else 'is'} none of {', '.join(TEXT + ROWS)}", where=root)
        for name, path in files:
            if path.name.endswith(TEXT):
                yield name, _decoded(path)
            else:
                yield from (("", _cell(row, columns)) for _, row in file_rows(path, columns))


def _files(root: Path, endings: tuple[str, ...], without: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """(path below root, file) without hidden ones, ordered by the path's hash."""
    found = ((path.relative_to(root), path) for path in root.rglob("*") if path.name.endswith(endings) and path.is_file())
    kept = [(str(name), path) for name, path in found if not any(part.startswith(".") or part in without for part in name.parts)]
    return sorted(kept, key=lambda pair: _chance(pair[0]))


def _decoded(path: Path) -> str:
    """A file's text; bytes that are not UTF-8 become lone surrogates, for which it is then skipped."""
    try:
        return path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise disk_error(error, path) from error


def _cell(row: object, columns: Sequence[str], permissive: bool = False) -> object:
    if not isinstance(row, dict) or (permissive and row.get("license") not in PERMISSIVE):
        return None
    return next((row[column] for column in columns if row.get(column) is not None), None)


# --- what a Python installation brings along


def _standard_library() -> list[tuple[str, Path]]:
    # pydoc_data is the language reference in a dictionary: read as prose below
    return _files(Path(sysconfig.get_path("stdlib")), (".py",), ("site-packages", "dist-packages", "pydoc_data"))


def _python_docs() -> Iterator[tuple[str, str | None]]:
    """Language reference, docstrings (a module's under the id of its file, so that both are held out or neither), and packages' READMEs."""
    from pydoc_data.topics import topics

    yield from ((f"reference/{name}", text) for name, text in sorted(topics.items()))
    for name, path in _standard_library():
        if not {"test", "tests", "idle_test"} & set(Path(name).parts) and len(text := _docstrings(name, path)) > 200:
            yield name, text
    for package in sorted(metadata.distributions(), key=lambda package: package.name or ""):
        yield f"{package.name}/README", (package.read_text("METADATA") or "").partition("\n\n")[2]


def _docstrings(name: str, path: Path) -> str:
    """A module's name and docstring, then each public class's and function's under its dotted name."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the library has files that are meant to be broken
        return ""

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        if text := ast.get_docstring(node):
            yield f"{prefix}\n\n{text}\n"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                yield from walk(child, f"{prefix}.{child.name}")

    return "\n".join(walk(tree, name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")))
