"""Containment: every path that a model names resolves to something inside the workspace, or to an error.

The check is on the real path, so `..`, absolute paths and symlinks are all one case, and a file to be created is held
against the real path of its parent. What is then opened is reached from the root step by step and never through a symlink, so
that nobody who swaps a file or a directory between the check and the open leads a tool outside. Names that a file system
holds equal (`Readme`, `README`) are two paths here: what was read under the one must be read again before an edit of the other.
"""

import difflib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

SHOWN_CHARS = 80
PROTECTED = ".git"  # a hook or an alias that a tool writes there would run as the person, outside every sandbox
JUNK = {"__pycache__", "node_modules", "site-packages", "venv"}


class ToolError(Exception):
    """A tool's refusal; the text follows `error: ` in the result. Models are trained on these words: they are fixed."""


def resolve(root: Path, path: str) -> Path:
    """The real path of `path`, relative to or absolute inside `root` (itself a real path); it need not exist.
    Raises ToolError for an empty path, a NUL, a symlink loop, or anything that leads outside the workspace."""
    if not path:
        raise ToolError("the path is empty")
    if "\0" in path:
        raise ToolError("the path has a NUL character")
    try:
        real = Path(os.path.realpath(os.path.join(root, path)))
    except ValueError:
        raise ToolError(f"{shown(path)} is not a valid path") from None
    if path.startswith("~") or not real.is_relative_to(root):
        raise ToolError(f"{shown(path)} is outside the workspace")
    # in a symlink loop realpath gives up half-way and appends the rest unchecked: `loop/../out/x` would pass
    if any(os.path.islink(part) for part in (real, *real.parents)):
        raise ToolError(f"{shown(path)} is a symlink loop")
    return real


@contextmanager
def folder_of(root: Path, real: Path, *, create: bool = False) -> Iterator[int]:
    """A descriptor of the directory that `real`, which `resolve` gave, lies in. Raises OSError where a part of the way is missing
    (unless `create`) or, by now, a symlink."""
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, flags)
    try:
        for part in real.relative_to(root).parts[:-1]:
            if create:
                _make_folder(part, folder)
            below = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def _make_folder(name: str, folder: int) -> None:
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise


def open_inside(root: Path, real: Path, flags: int) -> int:
    """A descriptor of `real` itself, reached in the same way."""
    with folder_of(root, real) as folder:
        return os.open("." if real == root else real.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def relative(root: Path, real: Path) -> str:
    """How results name a file: relative to the workspace, so that a rollout gives the same bytes in any directory."""
    return shown(real.relative_to(root).as_posix())


def shown(path: str) -> str:
    return path if len(path) <= SHOWN_CHARS else path[:SHOWN_CHARS] + "…"


def missing(root: Path, real: Path) -> ToolError:
    """The error for a path that does not exist, with up to three names that look like it (of the first 2,000 files)."""
    here, names = relative(root, real), [relative(root, file) for file in islice(walk(root, root), 2000)]
    near = [name for name in names if os.path.basename(name) == real.name]
    near += [name for name in difflib.get_close_matches(here, names, n=3, cutoff=0.6) if name not in near]
    return ToolError(f"{here} does not exist" + (f"; did you mean {', '.join(near[:3])}?" if near else ""))


def walk(root: Path, top: Path):
    """Yield the regular files below `top` in path order, passing over hidden names, junk directories and symlinks."""
    try:
        handle = open_inside(root, top, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        entries = sorted(os.scandir(handle), key=lambda entry: entry.name)
        kinds = [(entry.name, entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)) for entry in entries]
    finally:
        os.close(handle)
    for name, is_file, is_folder in kinds:
        if name.startswith("."):
            continue
        if is_file:
            yield top / name
        elif is_folder and name not in JUNK:
            yield from walk(root, top / name)
