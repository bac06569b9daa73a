"""Containment: every path that a model names resolves to something inside the workspace, or to an error.

The check is on the real path, so `..`, absolute paths and symlinks are all one case, and a file to be created is held
against the real path of its parent. Not covered: another process that swaps a directory between the check and the open
(tools run one at a time, and Bash leaves no process behind).
"""

import difflib
import os
from itertools import islice
from pathlib import Path

SHOWN_CHARS = 80
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


def relative(root: Path, real: Path) -> str:
    """How results name a file: relative to the workspace, so that a rollout gives the same bytes in any directory."""
    return shown(real.relative_to(root).as_posix())


def shown(path: str) -> str:
    return path if len(path) <= SHOWN_CHARS else path[:SHOWN_CHARS] + "…"


def missing(root: Path, real: Path) -> ToolError:
    """The error for a path that does not exist, with up to three names that look like it (of the first 2,000 files)."""
    here, names = relative(root, real), [relative(root, file) for file in islice(walk(root), 2000)]
    near = [name for name in names if os.path.basename(name) == real.name]
    near += [name for name in difflib.get_close_matches(here, names, n=3, cutoff=0.6) if name not in near]
    return ToolError(f"{here} does not exist" + (f"; did you mean {', '.join(near[:3])}?" if near else ""))


def walk(top: Path):
    """Yield the regular files below `top` in path order, passing over hidden names, junk directories and symlinks."""
    try:
        entries = sorted(os.scandir(top), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False) and entry.name not in JUNK:
            yield from walk(Path(entry.path))
