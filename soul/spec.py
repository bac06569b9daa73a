"""SOUL.md: plain markdown that says who the agent is, read into principles with machine checks.

YAML front matter (name, version, tools, defaults) is optional. A heading that names principles, rules, values, style,
voice, tone, behaviour, tools, habits, manners, working or guidelines opens a section in which every top-level bullet is
a principle (nested bullets are part of its text), and so is every deeper heading that is followed by a paragraph; a
deeper heading that is followed by bullets only groups them. A file with no such section has its bullets read as
principles. Everything else is the voice. An HTML comment annotates the principle that it stands in or right under:

    - keeps answers short. <!-- id: short; check: max_words(80); check: max_sentences(6); repair: yes -->

`repair: yes` holds for every check of the comment that has a repair; `note:` is for people. A principle without an id
gets one from its first words, so an edit of the text renames it: give ids to principles that are measured over time.
"""

import ast
import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from soul import tools
from soul.checks import CHECKS
from soul.conflicts import conflicts
from soul.errors import UserError
from soul.files import read_text, sha256_json
from soul.markdown import HIDDEN, Block, read
from soul.prose import fences
from soul.registry import Violation
from soul.repairs import REPAIRS, check_table, repair, run_checks

__all__ = ["CheckCall", "Principle", "Soul", "Violation", "check_table", "conflicts", "load_soul", "parse_soul", "repair", "run_checks"]

MAX_SIZE, MAX_FRONT = 262_144, 8_192  # characters: a SOUL goes into prompts, so a larger file is a mistake
_ANNOTATION = re.compile(r"\s*([a-z_]+)\s*:")
_FIELD = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^;])+""")
_KEYS = ("name", "version", "tools", "defaults")


@dataclass(frozen=True)
class CheckCall:
    """One check with its parameters, as annotated; `repair` says that its repair may be applied."""

    name: str
    params: dict
    repair: bool
    line: int

    def __str__(self) -> str:
        items = [item for value in self.params.values() for item in (value if isinstance(value, list) else [value])]
        shown = [str(item) if isinstance(item, int | float) else f'"{item}"' for item in items]
        return self.name + (f"({', '.join(shown)})" if shown else "")


@dataclass(frozen=True)
class Principle:
    """One principle. `hash` covers id, text and checks: rows that touch it are stale when it changes."""

    id: str
    text: str
    section: str
    line: int
    checks: tuple[CheckCall, ...]
    hash: str


@dataclass(frozen=True)
class Soul:
    """A parsed SOUL.md. `text` is what teachers and prompts are shown: name, voice, and each principle after its [id], so
    that a critic can cite it. `voice_hash` covers all but the principles; `hash` everything; `version` is a label only."""

    name: str
    version: str
    voice: str
    principles: tuple[Principle, ...]
    tools: tuple[str, ...]
    defaults: dict
    text: str
    path: str
    hash: str
    voice_hash: str

    def principle(self, id: str) -> Principle:
        return next(principle for principle in self.principles if principle.id == id)

    @property
    def verified(self) -> tuple[Principle, ...]:
        return tuple(principle for principle in self.principles if principle.checks)

    @property
    def unverified(self) -> tuple[Principle, ...]:
        return tuple(principle for principle in self.principles if not principle.checks)


def load_soul(path: str | Path) -> Soul:
    """Read a SOUL.md; UserError as in `parse_soul`, or when the file is missing, binary or not UTF-8."""
    return parse_soul(read_text(path), str(path))


def parse_soul(text: str, path: str = "SOUL.md") -> Soul:
    """Parse the text of a SOUL.md. Raises UserError, naming file and line, for broken front matter, an unknown or wrongly called
    check, an unknown annotation key, a duplicate or malformed id, an unclosed comment, an empty file, or one without principles."""
    text = re.sub(r"\r\n?", "\n", text.removeprefix("\ufeff"))
    if not text.strip():
        raise UserError("is empty", where=path, fix="Write a name, a voice and a list of principles, or copy soul/SOUL.md.")
    if "\0" in text or len(text) > MAX_SIZE:
        raise UserError("is binary" if "\0" in text else f"is longer than {MAX_SIZE:,} characters", where=path)
    front, body_start = _front_matter(text, path)
    body = re.sub(r"[^\n]", " ", text[:body_start]) + text[body_start:]
    hidden, notes = _notes(body, path)
    title, voice, found = read(hidden)
    if not found:
        raise UserError("no principle found", where=path, fix="Put bullets under a heading such as '## Principles'.")
    principles = _principles(found, notes, body, path)
    name = front.get("name") or title or Path(path).stem
    version = front.get("version", "")
    shared = {"name": name, "tools": front["tools"], "defaults": front["defaults"], "voice": voice}
    everything = shared | {"version": version, "principles": [[principle.section, principle.hash] for principle in principles]}
    return Soul(
        name, version, voice, principles, tuple(front["tools"]), front["defaults"],
        text=_as_told(name, voice, principles), path=path, hash=sha256_json(everything), voice_hash=sha256_json(shared),
    )  # fmt: skip


def _as_told(name: str, voice: str, principles: tuple[Principle, ...]) -> str:
    parts, section = [f"# {name}", voice], None
    for principle in principles:
        if principle.section != section:
            section = principle.section
            parts.append(f"## {section}\n")
        parts[-1] += f"\n- [{principle.id}] {principle.text}"
    return "\n\n".join(part.replace("\n\n-", "\n-") for part in parts if part) + "\n"


# --- front matter


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (they make a billion laughs) and without duplicate keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("has an alias, which is not allowed here", self.peek_event().start_mark.line)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise yaml.YAMLError(f"has the key {key.value!r:.40} twice", key.start_mark.line)
                seen.add(str(key.value))
        return node


def _front_matter(text: str, path: str) -> tuple[dict, int]:
    """({name, version, tools, defaults}, where the body begins). Scalars are taken as written: `name: yes` is "yes"."""
    settings = {"tools": list(tools.TOOLS), "defaults": {}}
    if not re.match(r"---[ \t]*\n", text):
        return settings, 0
    close = re.search(r"^(?:---|\.\.\.)[ \t]*$", text[4:], re.MULTILINE)
    if not close or close.start() > MAX_FRONT:
        raise UserError("the front matter has no closing ---", where=f"{path}:1", fix="Put a line of three dashes after it.")
    source = text[text.index("\n") + 1 : 4 + close.start()]
    if "\t" in source and (tab := re.search(r"^ *\t", source, re.MULTILINE)):
        line = source.count("\n", 0, tab.start()) + 2
        raise UserError("the front matter is indented with a tab", where=f"{path}:{line}", fix="Use spaces.")
    try:
        loader = _Loader(source)
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError("is not a list of `key: value`", 0)
        for key, value in node.value if node else ():
            settings[str(key.value)] = _setting(loader, key, value)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        own = len(error.args) == 2 and isinstance(error.args[1], int)
        line = error.args[1] if own else mark.line if mark else source.count("\n", 0, getattr(error, "position", 0))
        what = error.args[0] if own else f"is not valid YAML ({getattr(error, 'problem', None) or getattr(error, 'reason', 'too deep')})"
        raise UserError(f"the front matter {what}", where=f"{path}:{line + 2}") from None
    return settings, 4 + close.end()


def _setting(loader: _Loader, key: yaml.Node, value: yaml.Node) -> object:
    line, name = value.start_mark.line, str(key.value)
    if name not in _KEYS:
        raise yaml.YAMLError(f"has an unknown key {name!r:.40}; it may have {', '.join(_KEYS)}", key.start_mark.line)
    plain = isinstance(value, yaml.ScalarNode) and re.fullmatch(r"tag:yaml\.org,2002:\w+", value.tag)
    if name in ("name", "version"):
        if not plain or not value.value.strip():
            raise yaml.YAMLError(f"needs text for {name}", line)
        return value.value.strip()
    if name == "tools":
        listed = isinstance(value, yaml.SequenceNode)
        items = [str(item.value) for item in value.value] if listed else re.split(r"[\s,]+", str(value.value).strip())
        if unknown := [item for item in items if item not in tools.TOOLS]:
            raise yaml.YAMLError(f"names an unknown tool {str(unknown[0])!r:.40}; the tools are {', '.join(tools.TOOLS)}", line)
        return items
    if not isinstance(value, yaml.MappingNode) or any(not isinstance(item, yaml.ScalarNode) for _, item in value.value):
        raise yaml.YAMLError("needs `key: value` lines under defaults", line)
    defaults = {str(item_key.value): loader.construct_object(item) for item_key, item in value.value}
    for name, item in defaults.items():
        if not isinstance(item, str | int | float) or (isinstance(item, float) and not math.isfinite(item)):
            raise yaml.YAMLError(f"needs text or a number for {name!r:.40}", line)
    return defaults


# --- principles and their annotations


@dataclass(frozen=True)
class _Note:
    """An annotation comment, read."""

    offset: int
    id: str
    checks: tuple[CheckCall, ...]


def _at(path: str, body: str, offset: int) -> str:
    return f"{path}:{body.count(chr(10), 0, offset) + 1}"


def _notes(body: str, path: str) -> tuple[str, list[_Note]]:
    """`body` with its comments hidden at equal length, and the annotations among them. Code may spell `<!--` freely."""
    code, hidden, notes, at = fences(body), [], [], 0
    copied = 0
    while (start := body.find("<!--", at)) >= 0:
        inside = next((fence for fence in code if fence.start <= start < fence.end), None)
        if inside or body.count("`", body.rfind("\n", 0, start) + 1, start) % 2:
            at = inside.end if inside else start + 4
            continue
        end = body.find("-->", start + 4)
        if end < 0:
            raise UserError("a comment is not closed", where=_at(path, body, start), fix="End it with -->.")
        if _ANNOTATION.match(body, start + 4, end):
            notes.append(_note(body, start + 4, end, path))
        at = end + 3
        hidden += [body[copied:start], HIDDEN * (at - start)]
        copied = at
    return "".join([*hidden, body[copied:]]), notes


def _note(body: str, start: int, end: int, path: str) -> _Note:
    given, wants_repair, calls = "", None, []
    for part in _FIELD.finditer(body, start, end):
        where = _at(path, body, part.start() + len(part.group()) - len(part.group().lstrip()))
        key, _, value = (piece.strip() for piece in part.group().partition(":"))
        if not key and not value:
            continue
        if key not in ("id", "check", "repair", "note"):
            raise UserError(f"unknown annotation key {key!r:.40}", where=where, fix="The keys are id, check, repair and note.")
        if key == "id" and not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", value):
            raise UserError(f"the id {value!r:.70} is not made of a-z, 0-9, - and _", where=where)
        if key == "repair" and value not in ("yes", "no"):
            raise UserError(f"repair is yes or no, not {value!r:.40}", where=where)
        given = value if key == "id" else given
        wants_repair = (value == "yes", where) if key == "repair" else wants_repair
        calls += [(*_check_call(value, where), int(where.rpartition(":")[2]))] if key == "check" else []
    if wants_repair and wants_repair[0] and not any(name in REPAIRS for name, _, _ in calls):
        raise UserError("repair: yes, but no check here has a repair", where=wants_repair[1], fix=f"Those with one: {', '.join(REPAIRS)}.")
    repairs = bool(wants_repair and wants_repair[0])
    return _Note(start, given, tuple(CheckCall(name, params, repairs and name in REPAIRS, line) for name, params, line in calls))


def _check_call(source: str, where: str) -> tuple[str, dict]:
    """(name, parameters) of `name` or `name(literal, ...)`; only literals are read, nothing is evaluated."""
    try:
        tree = ast.parse(source[:4000], mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = call.func.id
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        fix = 'Write it like max_words(80) or forbid("as an ai").'
        raise UserError(f"cannot read the check {source!r:.60}", where=where, fix=fix) from None
    if name not in CHECKS:
        near = difflib.get_close_matches(name, CHECKS, n=3, cutoff=0.5)
        fix = f"Did you mean {' or '.join(near)}?" if near else f"The checks are {', '.join(sorted(CHECKS))}."
        raise UserError(f"unknown check {name!r:.60}", where=where, fix=fix)
    try:
        return name, CHECKS[name].bind(args, kwargs)
    except ValueError as error:
        raise UserError(str(error), where=where) from None


def _principles(found: list[tuple[str, Block]], notes: list[_Note], body: str, path: str) -> tuple[Principle, ...]:
    mine = [[note for note in notes if block.start <= note.offset < block.end] for _, block in found]
    if stray := {note.offset for note in notes} - {note.offset for some in mine for note in some}:
        fix = "Put it at the end of the principle's line."
        raise UserError("this annotation belongs to no principle", where=_at(path, body, min(stray)), fix=fix)
    ids: dict[str, int] = {}
    for note in (note for some in mine for note in some if note.id):
        where = _at(path, body, note.offset)
        if note.id in ids:
            raise UserError(f"the id {note.id!r} is already used in line {ids[note.id]}", where=where, fix="Give each its own.")
        ids[note.id] = int(where.rpartition(":")[2])
    principles = []
    for (section, block), some in zip(found, mine, strict=True):
        text, line = " ".join(block.text.replace(HIDDEN, " ").split()), body.count("\n", 0, block.start) + 1
        if not text:
            raise UserError("a principle without text", where=f"{path}:{line}")
        id = next((note.id for note in some if note.id), "") or _slug(text, line, ids)
        ids.setdefault(id, line)
        checks = tuple(call for note in some for call in note.checks)
        content = [id, text, [[call.name, call.params, call.repair] for call in checks]]
        principles.append(Principle(id, text, section, line, checks, sha256_json(content)))
    return tuple(principles)


def _slug(text: str, line: int, taken: dict[str, int]) -> str:
    slug = "-".join(re.findall(r"\w+", text.lower().replace("'", "").replace("’", ""))[:5])[:40].strip("-_") or f"principle-{line}"
    return next(name for n in range(1, len(taken) + 2) if (name := slug if n == 1 else f"{slug}-{n}") not in taken)
