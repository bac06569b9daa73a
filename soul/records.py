"""Rows that others made, in files and on the Hugging Face hub: streamed, with the place of each, and every fault named by file and line."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from soul.errors import UserError
from soul.files import disk_error

LONGEST_ROW = 1 << 26  # bytes of one line of JSON


def file_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, object]]:
    """(where, row) of a .parquet file (with those of `columns` that it has), of JSON Lines (.gz too), or of a .json file that is one list."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = str(path)
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                wanted = columns and [name for name in columns if name in file.schema_arrow.names]
                rows = (row for batch in file.iter_batches(batch_size=256, columns=wanted) for row in batch.to_pylist())
                yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
        elif path.suffix == ".json" and (rows := _one_list(path)) is not None:
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
        else:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW), b""), 1):
                    where = f"{path}:{number}"
                    if b"\0" in line:
                        raise UserError("is a binary file, not text", where=path)
                    if line.strip():
                        yield where, json.loads(line)
    except pa.ArrowException as error:
        raise UserError(f"is damaged, or is not a readable Parquet file ({str(error).splitlines()[0][:80]})", where=path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"is damaged ({error})", where=path) from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", where=where, fix="Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {getattr(error, 'msg', error)}", where=where) from None
    except OSError as error:
        raise disk_error(error, path) from error


def _one_list(path: Path) -> list | None:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # JSON Lines are often called .json
    return rows if isinstance(rows, list) else None


def hub_rows(name: str, *config: str, split: str, where: str) -> Iterator[tuple[str, object]]:
    """(where, row) of a data set of the hub or of a local folder."""
    import datasets

    try:
        rows = datasets.load_dataset(name, *config, split=split, streaming=True)
        yield from ((f"{where}:{number}", row) for number, row in enumerate(rows, 1))
    except Exception as error:  # the library raises of its own, of the network's and of each format's kind
        why = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise UserError(f"cannot be read: {why}", where=where, fix="Local .parquet or .jsonl files work without a network.") from None


def json_lines(path: Path) -> list[dict]:
    """The lines of a log, if it is there. What a run that was killed left of a line is left out."""
    lines = []
    for text in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
