"""Untrusted text made safe to look at: nothing may hide in it, reorder it, or fill the page."""

import re
import unicodedata

from soul.console import visible as show_controls


def visible(text: object, limit: int = 4000) -> str:
    """`text` with control, direction and invisible characters spelled out, clipped to `limit` characters with a note.

    ESC becomes ␛ and U+202E becomes <U+202E>. HTML is not escaped here: the template does that.
    """
    full = str(text)
    shown = re.sub(r"[^\x00-\x7f]", _spell, show_controls(full[:limit]))
    return shown if len(full) <= limit else f"{shown}\n… [{len(full):,} characters, {limit:,} shown]"


def _spell(match: re.Match) -> str:
    char = match.group()
    # zero-width and tag characters, line and paragraph separators: nothing a reader could see
    return f"<U+{ord(char):04X}>" if unicodedata.category(char) in ("Cf", "Zl", "Zp") else char


def one_line(text: object, limit: int = 200) -> str:
    full = str(text)
    flat = " ".join(full[: 4 * limit].split())
    return visible(flat if len(flat) <= limit and len(full) <= 4 * limit else flat[: limit - 1] + "…", limit)
