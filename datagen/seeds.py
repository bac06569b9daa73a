"""Seeds: what the teacher is asked to answer, from files, a folder of files or a Hugging Face data set.

A row has `messages` (a conversation; trailing assistant turns are dropped), or `prompt`, or an instruction column with
an optional `input`. A row's id is the hash of its messages, so reordering or appending seeds recomputes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from soul import conversation
from soul.errors import UserError
from soul.files import disk_error, sha256_json
from soul.records import file_rows, hub_rows

COLUMNS = ("prompt", "instruction", "question", "query", "request")


@dataclass(frozen=True)
class Seed:
    """One request: `messages` end with the user's turn; `where` is file:line for errors, `source` goes into the dataset."""

    id: str
    messages: list[dict]
    source: str
    where: str


def read_seeds(path: str | Path, limit: int | None = None) -> Iterator[Seed]:
    """Stream the seeds of a .jsonl, .jsonl.gz, .parquet or .txt file, of all such files in a folder, or of `hf:NAME[:SPLIT]`.
    Raises UserError, naming file and line (or row) of the first row that cannot be used."""
    for where, row in islice(read_rows(path), None if limit is None else max(0, limit)):
        yield _seed(row, where)


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(where, row) of any file that seeds can come from, rows as they are. Raises UserError."""
    if str(path).startswith("hf:"):
        name, _, split = str(path)[3:].partition(":")
        yield from hub_rows(name, split=split or "train", where=f"hf:{name}:{split or 'train'}")
        return
    path = Path(path)
    if not path.exists():
        raise UserError("no such file", where=path)
    files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if suffix(file) in READERS and not file.is_dir()]
    if not files:
        raise UserError(f"{'a folder of seeds holds' if path.is_dir() else 'seeds must be'} one of {', '.join(READERS)}", where=path)
    for file in files:
        yield from READERS[suffix(file)](file)


def suffix(path: Path) -> str:
    """The end of the name that tells what the file is; two parts of one that is compressed."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def aims(source: str) -> list[str]:
    """The principles that a written seed was aimed at, from its source `seed:KIND:ID+ID`; [] for any other."""
    parts = source.split(":")
    return [name for name in parts[2].split("+") if name] if parts[0] == "seed" and len(parts) == 3 else []


def _seed(row: object, where: str) -> Seed:
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, not {type(row).__name__}", where=where)
    messages = _messages(row, where)
    if problems := conversation.validate(messages):
        raise UserError(problems[0], where=where)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise UserError("has no request to answer: the last turn must be the user's, and not empty", where=where)
    source = row.get("source") if isinstance(row.get("source"), str) else None
    return Seed(sha256_json(messages)[:16], messages, source or (where if where.startswith("hf:") else where.rpartition("/")[2]), where)


def _messages(row: dict, where: str) -> list[dict]:
    if row.get("messages") is not None:
        try:
            return conversation.canonical(row["messages"])
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError("`messages` is not a list of {role, content}", where=where) from None
    for column in COLUMNS:
        if row.get(column) is not None:
            text = row[column]
            if not isinstance(text, str):
                raise UserError(f"`{column}` must be text, not {type(text).__name__}", where=where)
            if row.get("input"):
                text = f"{text}\n\n{row['input']}"
            before = [conversation.system(row["system"])] if isinstance(row.get("system"), str) and row["system"] else []
            return [*before, conversation.user(text)]
    raise UserError(f"has neither `messages` nor any of {', '.join(COLUMNS)}", where=where)


def _text(path: Path) -> Iterator[tuple[str, dict]]:
    """Lines that are not blank, stripped, as prompts."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise UserError("is a binary file, not text", where=path)
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield f"{path}:{number}", {"prompt": text}
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", where=f"{path}:{number}", fix="Save the file as UTF-8.") from None
    except OSError as error:
        raise disk_error(error, path) from error


READERS = dict.fromkeys((".jsonl", ".jsonl.gz", ".json", ".ndjson", ".parquet"), file_rows) | {".txt": _text}
