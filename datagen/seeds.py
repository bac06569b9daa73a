"""Seeds: what the teacher is asked to answer. JSON Lines, Parquet, or text with one request a line.

A row has `messages` (a conversation; trailing assistant turns are dropped), or `prompt`, or an instruction column with
an optional `input`. A row's id is the hash of its messages, so reordering or appending seeds recomputes nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soul import conversation
from soul.errors import UserError
from soul.files import read_text, sha256_json

COLUMNS = ("prompt", "instruction", "question", "query", "request")


@dataclass(frozen=True)
class Seed:
    """One request: `messages` end with the user's turn; `where` is file:line for errors, `source` goes into the dataset."""

    id: str
    messages: list[dict]
    source: str
    where: str


def read_seeds(path: str | Path, limit: int | None = None) -> Iterator[Seed]:
    """Stream the seeds of a .jsonl, .parquet or .txt file.

    Raises:
        UserError: naming file and line (or row) of the first row that cannot be used.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet, ".txt": _lines}
    if not path.exists():
        raise UserError("no such file", where=path)
    if path.suffix not in readers:
        raise UserError(f"seeds must be one of {', '.join(readers)}", where=path)
    for count, (where, row) in enumerate(readers[path.suffix](path)):
        if limit is not None and count >= limit:
            return
        yield _seed(row, where, path.name)


def _seed(row: object, where: str, file: str) -> Seed:
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
    return Seed(sha256_json(messages)[:16], messages, source or f"{file}:{where.rpartition(':')[2]}", where)


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


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    # split on \n only: U+2028 and friends are legal inside JSON strings
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"is not JSON: {getattr(error, 'msg', error)}", where=f"{path}:{number}") from None


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line.strip()}


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"is not a readable Parquet file ({str(error).splitlines()[0][:80]})", where=path) from None
