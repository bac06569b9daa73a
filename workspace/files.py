"""Read and Edit.

Lines end at \\n or \\r\\n and nowhere else (str.splitlines also breaks at form feeds and U+2028, which would shift the
numbers away from grep's and the editor's).
"""

import difflib
import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from soul.files import disk_error
from workspace.paths import PROTECTED, ToolError, folder_of, missing, open_inside, relative, resolve

MAX_FILE_BYTES = 2_000_000
MAX_LINE_CHARS = 400
DEFAULT_LIMIT = 200
LISTED_NAMES = 20
CONTEXT_LINES = 2
FOOTER_CHARS = 80
WINDOW_LINES = 40
NEAREST_LINES = 6
BOM = "\ufeff"


# --- bytes


def load(root: Path, real: Path) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file. Never blocks on a FIFO or device, never follows a symlink. Raises ToolError: missing (with
    near names), a directory (with its listing), not a regular file, too large, unreadable."""
    name = relative(root, real)
    try:
        handle = open_inside(root, real, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise missing(root, real) from None
    except OSError:
        raise ToolError(f"{name} cannot be opened") from None
    try:
        info = os.fstat(handle)
        if stat.S_ISDIR(info.st_mode):
            raise ToolError(f"{name} is a directory: {_listing(handle)}")
        if not stat.S_ISREG(info.st_mode):
            raise ToolError(f"{name} is not a regular file")
        if info.st_size > MAX_FILE_BYTES:
            raise ToolError(f"{name} is too large ({info.st_size} bytes, at most {MAX_FILE_BYTES})")
        with open(handle, "rb", closefd=False) as file:
            return file.read(), info
    finally:
        os.close(handle)


def decode(name: str, data: bytes) -> str:
    """The text of `data`, byte-order mark included."""
    if b"\0" in data:
        raise ToolError(f"{name} is a binary file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ToolError(f"{name} is not UTF-8 text") from None


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _listing(folder: int) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder) if not entry.name.startswith("."))
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return (", ".join(names[:LISTED_NAMES]) or "empty") + more


# --- Read


def lines_of(text: str) -> list[str]:
    lines = text.removeprefix(BOM).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def clip_line(line: str, most: int = MAX_LINE_CHARS) -> str:
    return line if len(line) <= most else f"{line[:most]} [{len(line) - most} more characters]"


def numbered(lines: list[str], first: int) -> list[str]:
    return [f"{number:>5}→{clip_line(line)}" for number, line in enumerate(lines, first)]


def fitting(lines: list[str], budget: int) -> list[str]:
    """The first of `lines` that `budget` characters hold with a footer; one at least."""
    ends = accumulate(len(line) + 1 for line in lines)
    return lines[:1] + [line for line, end in list(zip(lines, ends))[1:] if end <= budget - FOOTER_CHARS]


def read(root: Path, seen: dict[Path, str], args: dict[str, str], budget: int) -> str:
    """The Read tool: numbered lines from `offset`, at most `limit` lines and about `budget` characters."""
    real = resolve(root, args["file_path"])
    data, _ = load(root, real)
    name = relative(root, real)
    lines = lines_of(decode(name, data))
    offset, limit = int(args.get("offset", 1)), int(args.get("limit", DEFAULT_LIMIT))
    if offset < 1 or limit < 1:
        raise ToolError("offset and limit begin at 1")
    if offset > max(1, len(lines)):
        raise ToolError(f"{name} has only {len(lines)} lines")
    seen[real] = digest(data)
    if not lines:
        return "(empty file)"
    shown = fitting(numbered(lines[offset - 1 : offset - 1 + limit], offset), budget)
    last = offset + len(shown) - 1
    more = f"; continue with offset={last + 1}" if last < len(lines) else ""
    return "\n".join([*shown, f"[lines {offset}-{last} of {len(lines)}{more}]"] if more or offset > 1 else shown)


# --- Edit


@dataclass(frozen=True)
class Change:
    """What an Edit would do: computed for the permission prompt, and again to run, from the file as it then is. `mode` is
    None for a new file."""

    real: Path
    before: bytes
    after: bytes
    mode: int | None
    result: str


def edit(root: Path, seen: dict[Path, str], args: dict[str, str]) -> str:
    """The Edit tool: apply the change atomically; the new content counts as read."""
    change = plan_edit(root, seen, args)

    name, temporary = relative(root, change.real), f".{secrets.token_hex(8)}.tmp"
    try:
        with folder_of(root, change.real, create=True) as folder:
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
                with open(handle, "wb") as file:
                    file.write(change.after)
                    file.flush()
                    if change.mode is not None:
                        os.fchmod(handle, change.mode)
                    os.fsync(handle)
                if plan_edit(root, seen, args) != change:  # swapped or written to meanwhile
                    raise ToolError(f"{name} changed since it was read; read it again")
                os.replace(temporary, change.real.name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
    except OSError as error:
        raise ToolError(f"{name} cannot be written: {disk_error(error, change.real).what}") from None
    seen[change.real] = digest(change.after)
    return change.result


def plan_edit(root: Path, seen: dict[Path, str], args: dict[str, str]) -> Change:
    """The change that an Edit asks for, without making it. Raises ToolError for every reason not to."""
    real = resolve(root, args["file_path"])
    name, new = relative(root, real), args["new_string"]
    if PROTECTED in map(str.casefold, real.relative_to(root).parts):
        raise ToolError(f"{name} is git's own; Edit does not change it")
    try:
        new.encode("utf-8")
    except UnicodeEncodeError:
        raise ToolError("new_string is not valid text") from None
    if "old_string" not in args:
        if os.path.lexists(real):
            raise ToolError(f"{name} exists; give old_string to change it")
        return Change(real, b"", new.encode("utf-8"), None, f"created {name} ({len(lines_of(new))} lines)")
    data, info = load(root, real)
    if info.st_nlink > 1:
        raise ToolError(f"{name} has hard links; Edit would break them")
    if not info.st_mode & 0o222:
        raise ToolError(f"{name} is read-only")
    if real not in seen:
        raise ToolError(f"read {name} before editing it")
    if seen[real] != digest(data):
        raise ToolError(f"{name} changed since it was read; read it again")
    text, result = _substitute(name, decode(name, data), args)
    return Change(real, data, text.encode("utf-8"), stat.S_IMODE(info.st_mode), result)


def _substitute(name: str, text: str, args: dict[str, str]) -> tuple[str, str]:
    """`text` with old_string replaced, and the result that is shown."""
    old, new = args["old_string"], args["new_string"]
    if not old:
        raise ToolError("old_string is empty; leave it out to create a file")
    if old == new:
        raise ToolError("old_string and new_string are the same")
    pattern = re.escape(old)
    if "\r\n" in text:
        pattern = r"\r?\n".join(map(re.escape, old.replace("\r\n", "\n").split("\n")))
    # overlapping occurrences count: `aa` in `aaa` is ambiguous, though a plain search finds it once
    starts = [match.start() for match in re.finditer(f"(?={pattern})", text)]
    everywhere = args.get("replace_all", "false").strip().lower() == "true"
    if not starts:
        raise ToolError(_no_match(name, text, old, new))
    if len(starts) > 1 and not everywhere:
        at = ", ".join(str(_line_at(text, start)) for start in starts[:10])
        count = f"old_string occurs {len(starts)} times in {name} (lines {at})"
        raise ToolError(f"{count}; add lines to make it unique, or set replace_all")
    if text.count("\r\n") * 2 > text.count("\n"):
        new = new.replace("\r\n", "\n").replace("\n", "\r\n")
    changed, count = re.subn(pattern, lambda _: new, text)  # a function: `\1` or `$&` in new_string stays text
    if text.endswith("\n") and changed.strip(BOM) and not changed.endswith("\n"):
        changed += "\r\n" if text.endswith("\r\n") else "\n"
    first = _line_at(text, starts[0])
    head = f"edited {name}" + (f" ({count} replacements)" if everywhere else "")
    return changed, f"{head}\n{_window(changed, first, first + new.removesuffix(chr(10)).count(chr(10)))}".rstrip("\n")


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _window(text: str, first: int, last: int) -> str:
    lines = lines_of(text)
    start, end = max(1, first - CONTEXT_LINES), min(len(lines), last + CONTEXT_LINES)
    shown = "\n".join(numbered(lines[start - 1 : min(end, start + WINDOW_LINES - 1)], start))
    return shown if end - start < WINDOW_LINES else f"{shown}\n[{end - start - WINDOW_LINES + 1} more lines]"


# --- why old_string was not found


def _no_match(name: str, text: str, old: str, new: str) -> str:
    """The error of a failed match: the cause where it is certain, and the nearest lines as Read shows them."""
    lines, wanted = lines_of(text), old.removesuffix("\n").split("\n")
    start, same = _nearest([_squeeze(line) for line in lines], [_squeeze(line) for line in wanted])
    near = lines[start : start + len(wanted)] if start is not None else []
    cause = _cause(text, old, new, list(zip(wanted, near, strict=False)) if same else [])
    message = f"old_string not found in {name}" + (f"; {cause}" if cause else "")
    return "\n".join([f"{message}; nearest lines:", *numbered(near[:NEAREST_LINES], start + 1)]) if near else message


def _nearest(lines: list[str], wanted: list[str]) -> tuple[int | None, bool]:
    """The line where `wanted` should have matched, and whether nothing but white space differs there. Else it is found
    by the longest wanted line, at a bounded cost: 5,000 lines of 200 characters are compared at most."""
    for index in range(len(lines) - len(wanted) + 1):
        if lines[index : index + len(wanted)] == wanted:
            return index, True
    anchor = max(range(len(wanted)), key=lambda index: len(wanted[index]))
    candidates = [line[:200] for line in lines[:5000]]
    close = difflib.get_close_matches(wanted[anchor][:200], [line for line in candidates if line], n=1, cutoff=0.6)
    return (max(0, candidates.index(close[0]) - anchor), False) if close else (None, False)


def _squeeze(line: str) -> str:
    return "".join(line.split())


def _cause(text: str, old: str, new: str, pairs: list[tuple[str, str]]) -> str:
    """Why `old` is not in `text`, or ""; `pairs` are (wanted, actual) lines that differ in white space only."""
    unprefixed = re.sub(r"(?m)^ *\d+→", "", old)
    if unprefixed != old and unprefixed in text:
        return "leave out the line numbers"
    if r"\n" in old and old.replace(r"\n", "\n") in text:
        return "use real line breaks instead of \\n"
    if "\r" in old and old.replace("\r\n", "\n") in text:
        return "the file has no carriage returns"
    if pairs and all(wanted.rstrip() == actual.rstrip() for wanted, actual in pairs):
        return "trailing spaces differ"
    if pairs and any(("\t" in wanted) != ("\t" in actual) for wanted, actual in pairs):
        return "tabs and spaces differ"
    if pairs:
        return "spaces differ"
    return "new_string is already there" if len(new.strip()) >= 8 and new in text else ""
