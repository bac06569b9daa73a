"""The workspace: the four tools, really executed, inside one directory."""

import difflib
from pathlib import Path

from soul.errors import UserError
from soul.files import sound
from soul.tools import problem
from workspace.bash import bash, environment
from workspace.files import edit, plan_edit, read
from workspace.grep import grep
from workspace.paths import PROTECTED, ToolError
from workspace.sandbox import Sandbox, require_sandbox

__all__ = ["REJECTED", "Sandbox", "Workspace", "clip", "make_workspace", "require_sandbox"]

REJECTED = "rejected by user"


class Workspace:
    """One directory and what has been read in it. The same calls on the same files give the same bytes anywhere.

    `bash_timeout`: seconds a command may run when the call names none. `max_result_chars`: about the most that one result may
    hold. `env`: additions to the environment of commands. `sandbox`: what confines them; None is the strongest that this machine
    has, or none where it has none (say so: `Sandbox.detect().describe()`; `require_sandbox` refuses); `Sandbox("none")` turns it off."""

    def __init__(
        self, root: str | Path, *, bash_timeout: int = 30, max_result_chars: int = 8000,
        env: dict[str, str] | None = None, sandbox: Sandbox | None = None,
    ):  # fmt: skip
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError("is not a directory", where=root)
        self.bash_timeout, self.max_result_chars = bash_timeout, max_result_chars
        self.env, self.sandbox = environment(self.root, env), sandbox
        self.seen: dict[Path, str] = {}
        repository = self.root / PROTECTED
        self.keep = [repository] if repository.exists() else []  # one that a command makes is the command's

    def run(self, name: str, args: dict[str, str]) -> str:
        """Execute one call. Whatever the call, it never raises: what went wrong is the result, and begins `error: `."""
        try:
            if fault := problem(name, args):
                raise ToolError(fault)
            if name == "Read":
                text = read(self.root, self.seen, args, self.max_result_chars)
            elif name == "Edit":
                text = edit(self.root, self.seen, args)
            elif name == "Grep":
                text = grep(self.root, args, self.max_result_chars)
            else:
                self.sandbox = self.sandbox or Sandbox.detect()
                text = bash(self.root, args, self.env, self.bash_timeout, self.sandbox, list(filter(Path.exists, self.keep)))
        except ToolError as error:
            text = f"error: {error}"
        except OSError as error:
            text = f"error: {name} failed: {error.strerror or 'operating system error'}"
        return clip(sound(text), self.max_result_chars)

    def preview(self, args: dict[str, str]) -> str:
        """What an Edit would change, as a unified diff; the error it would give when it would fail."""
        try:
            if fault := problem("Edit", args):
                raise ToolError(fault)
            change = plan_edit(self.root, self.seen, args)
        except (ToolError, OSError) as error:
            return f"error: {error}"
        before, after = (data.decode("utf-8").split("\n") for data in (change.before, change.after))
        return "\n".join(difflib.unified_diff(before if change.before else [], after, "before", "after", lineterm=""))


def make_workspace(files: dict[str, str], root: str | Path, **options) -> Workspace:
    """A workspace in `root` that holds `files`, byte for byte. Raises UserError for a name that leads outside."""
    for name, text in files.items():
        path = Path(root, name).resolve()
        if not path.is_relative_to(Path(root).resolve()):
            raise UserError("lies outside its workspace", where=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return Workspace(root, **options)


def clip(text: str, most: int) -> str:
    """`text` without its middle when it is over `most` characters: errors stand at the end, context at the start."""
    if len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-(most // 2) :]
    return f"{head}\n[{len(text) - len(head) - len(tail)} characters elided]\n{tail}"
