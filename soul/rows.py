"""Dataset rows: the Parquet files that are the contract between rooms.

`sft` and `rejected` rows carry `messages`; `preference` rows carry `prompt`, `chosen` and `rejected`, each a list of
messages (the last two hold only what follows the prompt); `docs` rows carry `text`, a document to pretrain on. Every kind
shares the provenance columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from soul.errors import UserError
from soul.files import atomic_path

KINDS = ("sft", "preference", "rejected", "docs")


@cache
def columns(kind: str) -> dict:
    """The Arrow type of each column of `kind`."""
    return {field.name: field.type for field in schema(kind)}


@cache
def schema(kind: str):
    """The Arrow schema of `kind`; `arguments` is a JSON string, `files` the workspace that a rollout starts from."""
    import pyarrow as pa

    text = pa.string()
    function = pa.struct([("name", text), ("arguments", text)])
    messages = pa.list_(
        pa.struct([("role", text), ("content", text), ("tool_calls", pa.list_(pa.struct([("type", text), ("function", function)])))])
    )
    place = [("message_index", pa.int32()), ("start", pa.int32()), ("end", pa.int32())]
    check = pa.struct([("principle", text), ("check", text), ("ok", pa.bool_()), *place, ("why", text)])
    bodies = {"preference": [("prompt", messages), ("chosen", messages), ("rejected", messages)], "docs": [("text", text)]}
    common = [
        ("source", text),
        ("soul_hash", text),
        ("template_hash", text),
        ("principles", pa.list_(text)),
        ("checks", pa.list_(check)),
        ("trail", pa.list_(pa.struct([("stage", text), ("text", text), ("key", text)]))),
        ("accepted", pa.bool_()),
        ("reason", text),
        ("served", pa.list_(text)),
        ("files", pa.list_(pa.struct([("path", text), ("content", text)]))),
    ]
    return pa.schema([("id", text), *bodies.get(kind, [("messages", messages)]), *common], metadata={"soulsmith": kind})


_DEFAULTS = {
    "source": "",
    "soul_hash": "",
    "template_hash": "",
    "principles": [],
    "checks": [],
    "trail": [],
    "accepted": True,
    "reason": "",
    "served": [],
    "files": [],
}


def write_rows(path: str | Path, rows: list[dict], kind: str) -> None:
    """Write `rows` atomically; columns that a row leaves out take their defaults, unknown ones raise ValueError."""
    with row_writer(path, kind) as write:
        write(rows)


@contextmanager
def row_writer(path: str | Path, kind: str) -> Iterator[Callable[[list[dict]], None]]:
    """Like `write_rows`, for more rows than memory holds: each call of what it yields writes a row group. The file appears at the end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape = schema(kind)

    def write(rows: list[dict]) -> None:
        for row in rows:
            if unknown := set(row) - set(shape.names):
                raise ValueError(f"row {row.get('id')!r} has columns that {kind} rows do not have: {', '.join(sorted(unknown))}")
        file.write_table(pa.Table.from_pylist([_DEFAULTS | row for row in rows], schema=shape))

    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, shape, compression="zstd") as file:
        yield write


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a Parquet file written by `write_rows`, or of any chat-format Parquet file (missing columns take defaults).

    Raises:
        UserError: for a missing file, one that is not Parquet, or one without `messages`, `prompt`/`chosen`/`rejected` or `text`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", where=path)
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"is not a readable Parquet file ({str(error).splitlines()[0][:80]})", where=path) from None
    columns = set(rows[0]) if rows else {"messages"}
    if not any(wanted <= columns for wanted in ({"messages"}, {"prompt", "chosen", "rejected"}, {"id", "text"})):
        raise UserError("has neither a `messages` column nor `prompt`, `chosen` and `rejected`, nor `id` and `text`", where=path)
    return [_DEFAULTS | {key: _clean(key, value) for key, value in row.items() if value is not None} for row in rows]


def kind_of(rows: list[dict]) -> str:
    columns = rows[0] if rows else ()
    return next((kind for kind, column in (("preference", "chosen"), ("docs", "text")) if column in columns), "sft")


def _clean(key: str, value: object) -> object:
    """Arrow fills an absent `tool_calls` with None: take it out again, so a row reads back as it was written."""
    if key not in ("messages", "prompt", "chosen", "rejected"):
        return value
    return [{k: v for k, v in message.items() if v is not None and not (k == "tool_calls" and not v)} for message in value]
