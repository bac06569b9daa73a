"""Reading and writing files so that nothing is ever half there."""

import errno
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from soul.errors import UserError


def home() -> Path:
    """The model cache: $SOULSMITH_HOME, else ~/.cache/soulsmith."""
    return Path(os.environ.get("SOULSMITH_HOME") or Path.home() / ".cache" / "soulsmith")


def sound(text: str) -> str:
    """`text` with "?" for lone surrogates: JSON can spell them, and terminals deliver them, but neither a request nor a file can hold them."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path in the same directory; on success it is fsynced and renamed over `path`, on failure removed.
    Raises UserError when the disk is full or the directory cannot be written."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)  # mkstemp's 0600 would make every output private
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write `data` so that a reader, or a crash at any moment, sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def disk_error(error: OSError, path: str | Path) -> UserError:
    """Say what an operating-system error means for the person who started the command."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("the disk is full", where=path, fix="Free some space and run the same command again; finished work is kept.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError("permission denied", where=path, fix="Choose a directory that you can write to.")
    what = {errno.ENOENT: "no such file", errno.EISDIR: "is a directory, not a file"}.get(error.errno)
    return UserError(what or error.strerror or str(error), where=path)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises UserError for a missing file, a directory, a binary file,
    or bytes that are not UTF-8 (naming the line)."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise disk_error(error, path) from error
    if b"\0" in data:
        raise UserError("is a binary file, not text", where=path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError("is not UTF-8 text", where=f"{path}:{line}", fix="Save the file as UTF-8.") from None


def read_json(path: str | Path) -> object:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"is not valid JSON: {error.msg}", where=f"{path}:{error.lineno}") from None


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, no escapes of non-ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()
