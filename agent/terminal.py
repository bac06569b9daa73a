"""What the person sees of a turn. Everything a model or a tool wrote passes through `soul.console.plain`."""

from rich.console import Console

from agent.loop import INTERRUPTED, Status
from soul.console import console, output, plain

RESULT_LINES = 12
EXPLAINED = {
    Status.cut: "the reply reached --max-new",
    Status.steps: "the turn reached --max-steps",
    Status.malformed: "the model wrote no reply that can be parsed",
    Status.repeated: "the model made the same call three times",
    Status.rejected: "two calls were refused",
    Status.context_full: "the context is full; /reset starts anew",
    Status.interrupted: "interrupted",
}


class Terminal:
    """Prints events: the model's words on stdout, everything about them on stderr."""

    def __init__(self, words: Console = output, notes: Console = console):
        self.words, self.notes, self.mid_line = words, notes, False

    def text(self, piece: str) -> None:
        """A piece of the model's text, in whole characters, as it is generated."""
        if piece:
            self.words.print(plain(piece), end="", soft_wrap=True)
            self.mid_line = not piece.endswith("\n")

    def note(self, text: object, style: str = "dim") -> None:
        if self.mid_line:
            self.words.print()
            self.mid_line = False
        self.notes.print(plain(text, style) if isinstance(text, str) else text, soft_wrap=True)

    def event(self, kind: str, data: dict) -> None:
        if kind == "reply" and not data["usable"]:
            self.note(f"not a well-formed reply ({'; '.join(data['problems'][:2])})", "yellow")
        elif kind == "result":
            text, lines = data["text"], data["text"].split("\n")
            shown = "\n".join(f"  {line}" for line in lines[:RESULT_LINES])
            more = f"\n  [{len(lines) - RESULT_LINES} more lines]" if len(lines) > RESULT_LINES else ""
            self.note(shown + more, "red" if text.startswith("error: ") and text != INTERRUPTED else "dim")
        elif kind == "status":
            status = Status(data["status"])
            self.note(f"[{status}: {EXPLAINED[status]}]" if status in EXPLAINED else "", "yellow")
