"""What a person sees: text that cannot lie, and progress with rate and time left.

Tool results, teacher replies and model output may carry rich markup, terminal escapes or bidirectional overrides.
`console.print(text)` raises on `[/bold]`, and `markup=False` still passes raw escapes; so untrusted text always goes
through `plain`.
"""

import re
import sys
import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# a log file has no width: a path or a command broken over two lines cannot be copied
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 240)
output = Console(highlight=False, width=None if sys.stdout.isatty() else 240)

LOG_EVERY = 30.0  # seconds

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_HIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with every control character, escape and bidirectional override shown instead of obeyed."""

    def show(match: re.Match) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"

    return _HIDDEN.sub(show, text.replace("\r\n", "\n"))


def plain(text: str, style: str = "") -> Text:
    """`text` as a rich Text: no markup is read from it, no escape gets through."""
    return Text(visible(text), style=style)


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "rows"):
    """Progress on stderr: yields `update(completed, note="")`. Shows count, rate per second, elapsed and time left.

    Where stderr is not a terminal (a log file), a plain line every half minute stands in for the bar.
    """
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(description, total=total, rate="", note="")
        start, said, ended = {}, time.monotonic(), False

        def update(completed: float, note: str = "") -> None:
            nonlocal said, ended
            now = time.monotonic()
            base, began = start.setdefault("at", (completed, now))  # what was there before a resume must not count as speed
            rate = (completed - base) / (now - began) if now > began else 0.0
            shown = f"{rate:,.1f} {unit}/s" if rate else ""
            bar.update(task, completed=completed, rate=shown, note=visible(note))
            if not console.is_terminal and (now - said >= LOG_EVERY or (completed == total and not ended)):
                said, ended = now, completed == total
                left = f"{(total - completed) / rate / 60:.1f} min left" if rate and total and completed < total else ""
                console.print(plain("  ".join(part for part in (f"{description} {completed:,}/{total or '?'}", shown, left, note) if part)))

        yield update
