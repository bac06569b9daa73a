"""Scenarios: what a rollout is about (domain x language x difficulty x trouble), and reading what a teacher makes of one.

Scenarios are drawn from a shuffled product, so no two are alike and the first n of a larger draw are the same. Teachers write
plain blocks, `=== NAME` and then the text, since files inside JSON come back with broken escapes.
"""

import itertools
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import yaml

from datagen.seeds import Seed
from soul import conversation
from soul.errors import UserError
from soul.files import canonical_json, read_text, sha256_json

MAX_FILE_CHARS, MAX_PROJECT_CHARS, MAX_ACCEPT_CHARS = 20_000, 80_000, 8_000
MAX_FILES = 16
_BLOCK = re.compile(r"^={3,}[ \t]+(\S[^\n]*?)(?:[ \t]+={3,})?[ \t]*\n", re.M)
_FENCED = re.compile(r"\s*```[^\n`]*\n(.*\n)```\s*", re.S)
_NAME = re.compile(r"\w[\w.-]{0,60}(?:/\w[\w.-]{0,60}){0,3}", re.ASCII)


class Unusable(ValueError):
    """What a teacher wrote cannot be used; the message says why."""


@dataclass(frozen=True)
class Scenario:
    """One rollout to be: `talk` are the kinds of what the user brings up later, `refuse` the call that is not permitted
    ([tool, which one]; [] = none), for `reason`."""

    domain: str
    language: str
    difficulty: str
    trouble: str
    person: str
    talk: list[str]
    refuse: list
    reason: str
    files: int

    @property
    def seed(self) -> Seed:
        """The engine's seed: its message is the scenario, so that a row can be made from it alone."""
        said = [conversation.user(canonical_json(asdict(self)))]
        source = f"scenario:{self.language}:{self.difficulty}:{self.trouble}"
        return Seed(sha256_json(said)[:16], said, source, source)

    @property
    def fails(self) -> bool:
        """Whether the acceptance command must fail before the work."""
        return table()["troubles"][self.trouble]["fails"]

    @property
    def told(self) -> dict:
        """What templates are told: the words for the difficulty, the trouble, and each later turn."""
        known = table()
        words = {"trouble": known["troubles"][self.trouble]["says"], "difficulty": known["difficulties"][self.difficulty]["says"]}
        turns = [f"{kind}: {known['kinds'][kind]}" for kind in self.talk]
        return {"domain": self.domain, "language": self.language, "person": self.person, "files": self.files, "turns": turns} | words


@dataclass(frozen=True)
class Script:
    """What the user will say and want: the first request, what each later turn brings up, and when the work is done."""

    request: str
    turns: tuple[str, ...]
    done: str


@dataclass(frozen=True)
class Project:
    """`files` as the agent finds them, and the Bash commands of which all must succeed when the work is done (the agent
    never sees them)."""

    files: dict[str, str]
    accept: str


@cache
def table() -> dict:
    return yaml.safe_load(read_text(Path(__file__).with_name("scenarios.yaml")))


def from_seed(seed: Seed) -> Scenario:
    return Scenario(**json.loads(seed.messages[0]["content"]))


def languages(wanted: Iterable[str] = ()) -> list[str]:
    """Those of `wanted` (default: of all) whose program is installed. Raises UserError for one that is unknown or missing."""
    known = {name.casefold(): (name, program) for name, program in table()["languages"].items()}
    for name in wanted:
        if name.casefold() not in known:
            raise UserError(f"no language {name!r}", fix=f"The languages are {', '.join(table()['languages'])}.")
        if not shutil.which(known[name.casefold()][1]):
            raise UserError(f"{name} needs {known[name.casefold()][1]}, which is not installed")
    chosen = [known[name.casefold()] for name in wanted] or list(known.values())
    return [name for name, program in chosen if shutil.which(program)]


def scenarios(domains: Iterable[str], spoken: list[str], difficulties: Iterable[str], n: int, seed: int = 0) -> Iterator[Scenario]:
    """n scenarios, the same for the same arguments. Raises UserError when there are not as many, or for an unknown difficulty."""
    known, difficulties = table(), list(difficulties) or list(table()["difficulties"])
    if unknown := [name for name in difficulties if name not in known["difficulties"]]:
        raise UserError(f"no difficulty {unknown[0]!r}", fix=f"There are {', '.join(known['difficulties'])}.")
    product = list(itertools.product(dict.fromkeys(domains), spoken, dict.fromkeys(difficulties), known["troubles"]))
    if n > len(product):
        raise UserError(f"there are only {len(product):,} different scenarios", fix="Add domains, languages or difficulties.")
    random.Random(seed).shuffle(product)
    for chosen in product[:n]:
        rng = random.Random(f"scenario:{seed}:{chosen}")
        few, many = known["difficulties"][chosen[2]]["files"]
        drawn = {"talk": rng.choice(known["talks"]), "refuse": rng.choice(known["refusals"]), "reason": rng.choice(known["reasons"])}
        yield Scenario(*chosen, person=rng.choice(known["people"]), files=rng.randint(few, many), **drawn)


# --- what the teacher writes


def read_script(text: str, turns: int, prompt: str = "") -> Script:
    """Blocks `request`, `turn 1` …, `done`. Raises Unusable, also for one that only repeats the prompt, as small teachers do."""
    blocks = _blocks(text)
    names = ["request", *(f"turn {number}" for number in range(1, turns + 1)), "done"]
    if missing := [name for name in names if not blocks.get(name, "").strip()]:
        raise Unusable(f"no {missing[0]}")
    if repeated := [name for name in names if len(blocks[name]) > 20 and blocks[name].strip() in prompt]:
        raise Unusable(f"{repeated[0]} repeats the prompt")
    request, *later, done = (blocks[name].strip() for name in names)
    return Script(request, tuple(later), done)


def read_project(text: str) -> Project:
    """A block for each file, and `accept`. Raises Unusable for names that are not plain relative paths, and over the limits."""
    blocks = _blocks(text)
    accept = blocks.pop("accept", "").strip()
    if not accept or len(accept) > MAX_ACCEPT_CHARS:
        raise Unusable("its acceptance command is too long" if accept else "no acceptance command")
    if not 2 <= len(blocks) <= MAX_FILES:
        raise Unusable(f"{len(blocks)} files; 2 to {MAX_FILES} are allowed")
    if max(map(len, blocks.values())) > MAX_FILE_CHARS or sum(map(len, blocks.values())) > MAX_PROJECT_CHARS:
        raise Unusable("its files are too long")
    if bad := next((name for name in blocks if not _NAME.fullmatch(name)), ""):
        raise Unusable(f"{bad[:60]!r} is no plain file name")
    folders = {str(parent).casefold() for name in blocks for parent in Path(name).parents}
    if len({name.casefold() for name in blocks}) < len(blocks) or any(name.casefold() in folders for name in blocks):
        raise Unusable("two of its names collide")
    if any("\0" in body for body in blocks.values()) or "\0" in accept:
        raise Unusable("it is not text")
    return Project(blocks, accept)


def _blocks(text: str) -> dict[str, str]:
    """The text under each `=== NAME` line, without a fence around it; what stands before the first is dropped."""
    _, *parts = _BLOCK.split(text.replace("\r\n", "\n") + "\n")
    blocks: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        name = name.strip("`*: ")
        if name in blocks:
            raise Unusable(f"two blocks are called {name[:60]!r}")
        fenced = _FENCED.fullmatch(body)
        blocks[name] = (fenced[1] if fenced else body.strip("\n") + "\n") if body.strip() else ""
    return blocks
