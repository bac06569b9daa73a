"""The markdown of a SOUL.md: which of its blocks are principles and which are the voice. Knows nothing of checks."""

import re
from dataclasses import dataclass

from soul.prose import fences

HIDDEN = "\0"  # stands for each character of a comment, newlines too, so that offsets stay true
_SECTION = re.compile(
    r"\b(?:principles?|rules?|values?|style|voice|tone|behaviou?rs?|tools?|habits?|manners|working|guidelines?)\b", re.IGNORECASE
)
_HEADING = re.compile(r"[ ]{0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$")
_BULLET = re.compile(r"([ \t]*)(?:[-*+]|\d{1,3}[.)])[ \t]+(?=\S)")
_RULE = re.compile(r"[ ]{0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$")


@dataclass
class Block:
    """A heading (depth = level), top-level bullet (depth = indent), paragraph or code block: body[start:end]."""

    kind: str
    depth: int
    start: int
    end: int
    text: str = ""

    def extend(self, text: str, end: int, joint: str) -> None:
        self.text, self.end = f"{self.text}{joint}{text}" if self.text else text, end

    @property
    def shown(self) -> str:
        return self.text.replace(HIDDEN, "").strip()


def _joint(text: str, mark: str) -> str:
    return " " if text.rstrip(HIDDEN + " ")[-1:] in tuple(".:;!?…") else mark + " "


def blocks(hidden: str) -> list[Block]:
    """Split markdown whose comments are HIDDEN; a line that is only a comment belongs to the block right above it."""
    code, found, gap = fences(hidden), [], True
    for match in re.finditer(r"[^\n]+\n?|\n", hidden):
        line, (start, end) = match.group().rstrip(), match.span()
        last = found[-1] if found else Block("", 0, 0, 0)
        shown = line.replace(HIDDEN, "").rstrip()
        head, bullet = _HEADING.match(shown), _BULLET.match(line)
        if any(fence.start <= start < fence.end for fence in code):
            if last.kind != "code" or last.end != start:
                found.append(Block("code", 0, start, end))
            found[-1].extend(line, end, "\n")
        elif not line or _RULE.match(line):
            gap = True
            continue
        elif head:
            found.append(Block("heading", len(head[1]), start, end, head[2]))
        elif bullet and last.kind == "bullet" and len(bullet[1]) > last.depth + 1:
            last.extend(line[bullet.end() :], end, _joint(last.text, ";"))
        elif bullet:
            found.append(Block("bullet", len(bullet[1]), start, end, line[bullet.end() :]))
        elif not gap and (last.kind in ("bullet", "paragraph") or (last.kind == "heading" and not shown)):
            last.extend(line.strip(), end, "\n")
        elif last.kind == "bullet" and line[0] in " \t":
            last.extend(line.strip(), end, " ")
        else:
            found.append(Block("paragraph", 0, start, end, line.strip()))
        gap = False
    return found


def read(hidden: str) -> tuple[str, str, list[tuple[str, Block]]]:
    """(title, voice, [(section, principle)]) of a SOUL.md's markdown, by the rules in spec.py."""
    parts = blocks(hidden)
    title, voice, found = _sort(parts, everywhere=False)
    return (title, voice, found) if found else _sort(parts, everywhere=True)


def _sort(parts: list[Block], everywhere: bool) -> tuple[str, str, list[tuple[str, Block]]]:
    title, voice, found, last_of_heading = "", [], [], None
    section, depth, heading = "Principles" if everywhere else "", 0, None
    for before, block in zip([None, *parts], parts, strict=False):
        shown = block.shown
        own = heading is not None and any(principle is heading for _, principle in found)
        if block.kind == "heading" and block.depth == 1 and not title:
            title = shown
        elif block.kind == "heading" and section and not everywhere and block.depth > depth:
            heading = block
        elif block.kind == "heading":
            opens = everywhere or _SECTION.search(shown)
            section, depth, heading = (shown, block.depth, None) if opens else ("", 0, None)
            voice += [] if opens else [f"{'#' * block.depth} {shown}"]
        elif block.kind == "bullet" and section:
            found.append((heading.shown if heading and not own else section, block))
        elif block.kind == "paragraph" and shown and heading and (before is heading or (own and before is last_of_heading)):
            if not own:
                heading.text = heading.shown
                found.append((section, heading))
            last_of_heading = block
            heading.extend(block.text, block.end, _joint(heading.text, "" if own else ":"))
        elif shown:
            voice.append(f"- {shown}" if block.kind == "bullet" else shown)
    return title, "\n\n".join(voice), found
