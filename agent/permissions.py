"""Permission: nothing runs that a person has not seen and allowed, or that `--yes` did not allow for them."""

from collections.abc import Callable
from dataclasses import dataclass

from soul.console import plain
from workspace.tools import Workspace

DIFF_LINES = 200


@dataclass(frozen=True)
class Permission:
    """Asks before every call of every tool. Only `y` or `yes` allows; Enter, end of input and anything else deny."""

    workspace: Workspace
    show: Callable[[object], None]  # prints a rich Text
    read_line: Callable[[str], str]  # raises EOFError at the end of input
    interactive: bool  # False when no person is there (not a terminal): then every call is denied without asking
    yes: bool = False  # allow every call, saying so each time

    def __call__(self, name: str, args: dict[str, str]) -> bool:
        self.show(plain(describe(self.workspace, name, args)))
        if self.yes:
            self.show(plain("allowed without asking (--yes)", style="bold red"))
            return True
        if not self.interactive:
            self.show(plain("denied: there is no terminal to ask at (--yes allows every call)", style="bold red"))
            return False
        try:
            return self.read_line("allow? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False


def describe(workspace: Workspace, name: str, args: dict[str, str]) -> str:
    """What a call would do: a command in full, an edit as a diff, anything else as its arguments.

    Every line is indented and every argument quoted, so that no value can pass for a prompt or for another line.
    """
    if name == "Bash":
        rest = {key: value for key, value in args.items() if key != "command"}
        body = "\n  > ".join(args["command"].split("\n"))
        return f"{_head(name, rest)}\n  $ {body}"
    if name == "Edit":
        lines = workspace.preview(args).split("\n")
        more = [f"[{len(lines) - DIFF_LINES} more lines of the diff are not shown]"] if len(lines) > DIFF_LINES else []
        rest = {key: value for key, value in args.items() if key in ("file_path", "replace_all")}
        return "\n  ".join([_head(name, rest), *lines[:DIFF_LINES], *more])
    return _head(name, args)


def _head(name: str, args: dict[str, str]) -> str:
    return " ".join([name, *(f"{key}={value!r}" for key, value in args.items())])
