"""What people ask and what the agent remarks, without a teacher: small phrase templates, styled and checked by the SOUL.

The words are in phrases.yaml. A remark is an opener and a core, in one of a few registers. `Voice` fills each with sample
words, runs the SOUL's checks over it, and keeps what passes; so any SOUL.md gets remarks of its own, or a clear count of
the rows it has none for.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from soul.conversation import assistant, tool_call, user
from soul.spec import Soul, repair, run_checks

PHRASES = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
REQUESTS, REMARKS, VERBS = PHRASES["requests"], PHRASES["remarks"], frozenset(PHRASES["verbs"].split())

SMALL_TALK: dict[str, str] = PHRASES["small_talk"]  # kind of request -> the situation of the remark it gets
TALK = frozenset(SMALL_TALK.values()) | {"told"}
FINAL, SOBER = TALK | set(PHRASES["final"].split()), frozenset(PHRASES["sober"].split())
NO_FRAME, OPENED, SAMPLE = tuple(PHRASES["no_frame"]), tuple(PHRASES["opened"]), PHRASES["sample"]
TYPO_SHARE = 0.08
PLAIN_SHARE = 0.75  # of the remarks have no opener


def fill(template: str, slots: dict[str, str]) -> str:
    """Replaces {name} marks in one pass, so braces inside a slot's own text are never read as marks."""
    return re.sub(r"\{(\w+)\}", lambda mark: slots[mark[1]], template)


def ask(rng: random.Random, kind: str, **slots: str) -> str:
    """A request of that kind in one of many wordings: framed, formal, terse, or with a typing slip. Slots stay as they are."""
    text = rng.choice(REQUESTS[kind])
    if not text.endswith(("?", ":")) and not text.startswith(NO_FRAME):
        frame = rng.choice(PHRASES["frames"])
        if "?" not in frame or not re.search(r"[.;:] ", text):  # two sentences are no question
            text = frame.format(text)
    return fill(typed(rng, text), slots)


def typed(rng: random.Random, text: str) -> str:
    """As somebody may type it: with a capital, without its question mark, or with a slip in one word."""
    if rng.random() < 0.35:
        text = re.sub(r"\bi\b", "I", text[:1].upper() + text[1:])
        text += "" if text[-1] in '?!.:"' else rng.choice(["", "."])
    elif text.endswith("?") and rng.random() < 0.3:
        text = text[:-1]
    words = text.split(" ")
    plain = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
    if plain and rng.random() < TYPO_SHARE:
        i, cut = rng.choice(plain), rng.randint(1, 3)
        words[i] = words[i][:cut] + words[i][cut + 1] + words[i][cut] + words[i][cut + 2 :]
    return " ".join(words)


def pick(rng: random.Random, kind: str) -> str:
    """A wording of that kind as it stands: for requests whose text is given, which `ask` would frame."""
    return rng.choice(REQUESTS[kind])


# ---- registers: how a neutral core (lowercase, contracted) is said


def outside_code(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if i % 2 else change(part) for i, part in enumerate(re.split(r"(`[^`]*`)", text)))


def sentence_case(text: str) -> str:
    text = outside_code(text, lambda prose: re.sub(r"\bi\b", "I", prose))
    return re.sub(r"(^|[.!?] )([a-z])", lambda mark: mark[1] + mark[2].upper(), text)


def reword(words: dict[str, str]) -> Callable[[str], str]:
    pattern = re.compile(r"(?<![\w'{])(" + "|".join(map(re.escape, words)) + r")(?![\w'}])")
    return lambda text: outside_code(text, lambda prose: pattern.sub(lambda mark: words[mark[1]], prose))


expand, swash = reword(PHRASES["expansions"]), reword(PHRASES["pirate"])
# the order decides between registers that a SOUL accepts equally
MANNERS: dict[str, Callable[[str], str]] = {
    "plain": sentence_case,
    "formal": lambda text: sentence_case(expand(text)),
    "goofy": str,
    "pirate": lambda text: sentence_case(swash(text)),
}
MISALIGNED = ("plain", "plain", "formal", "formal", "goofy", "pirate")


def openers_of(register: str, situation: str) -> list[str]:
    moment = "sober" if situation in SOBER else "talk" if situation in TALK else "close" if situation in FINAL else "act"
    return PHRASES["registers"][register][moment]


def demanded(soul: Soul, check: str) -> list[str]:
    """The phrases that checks of that name ask for."""
    return [phrase for principle in soul.principles for call in principle.checks if call.name == check for phrase in call.params["phrases"]]


class Voice:
    """The remarks that a SOUL's checks let through: `pools[situation]` is (register, openers, cores), the lists possibly empty.

    One register is kept for the whole SOUL, the one of which most passes unrepaired, so that a dataset has one voice;
    situations in which it has nothing take what passes in another, then what passes after the SOUL's own repairs.
    """

    def __init__(self, soul: Soul):
        self.soul = soul
        tools = [f"`{tool}`" for tool in soul.tools]
        self.own = {"soul": soul.name, "tools": " and ".join(filter(None, [", ".join(tools[:-1]), *tools[-1:]]))}
        openings, self.endings, words = (demanded(soul, f"require_{what}") for what in ("opening", "ending", "phrase"))
        self.openings = [f"{phrase}, " for phrase in (*openings, *words, *(f"{a}, {b}" for a in openings for b in words))]
        pools = {register: {situation: self._pool(register, situation) for situation in REMARKS} for register in MANNERS}

        def fit(register: str) -> float:
            own = [opener in openers for what, (_, openers, _) in pools[register].items() for opener in openers_of(register, what)]
            return sum(len(cores) for _, _, cores in pools[register].values()) * sum(own) / len(own)

        order = sorted(MANNERS, key=fit, reverse=True)
        self.pools = {}
        for situation in REMARKS:
            pool = next((pools[register][situation] for register in order if pools[register][situation][2]), None)
            self.pools[situation] = pool or self._pool(order[0], situation, repaired=True)

    def _pool(self, register: str, situation: str, repaired: bool = False) -> tuple[str, list[str], list[str]]:
        # "" stays a choice where the SOUL demands words of the final message only; so does an opener that has the words
        openers, manner = (*openers_of(register, situation), *self.openings), MANNERS[register]

        def passes(template: str) -> bool:
            text = fill(manner(template), self.own | SAMPLE)
            if repaired:
                text = repair(self.soul, [assistant(text)])[0][0]["content"]
            # alone, in the place where that situation stands in a rollout
            reply = assistant(text) if situation in FINAL else assistant(text, tool_call("Grep", pattern="def load_items"))
            return not run_checks(self.soul, [user("find load_items"), reply])

        cores = [core for core in REMARKS[situation] if self.soul.tools or "{tools}" not in core]
        if situation in FINAL:
            cores = [ended for core in cores for ended in self._ended(core)]
        best = max(openers, key=lambda opener: sum(passes(opener + core) for core in cores[:4]))
        cores = [core for core in cores if passes(best + core)]
        return register, [opener for opener in openers if cores and passes(opener + cores[0])], cores

    def _ended(self, core: str) -> list[str]:
        """The core with each of the endings that the SOUL demands; itself where it demands none."""
        joints = [(f" {ending}." if ending[0].isupper() else f", {ending}.") for ending in self.endings]
        return [core.rstrip(".") + "." * joint.startswith(" ") + joint for joint in joints] or [core]

    def say(self, rng: random.Random, situation: str, slots: dict[str, str]) -> str | None:
        """A remark for that situation, or None when the SOUL lets none through. A slot `core` is what it says in place of a phrase."""
        register, openers, cores = self.pools[situation]
        if not openers:
            return None
        cores = self._ended(slots["core"]) if "core" in slots else cores
        opener, core = "" if "" in openers and rng.random() < PLAIN_SHARE else rng.choice(openers), rng.choice(cores)
        opener = "" if "" in openers and core.startswith(OPENED) else opener
        return fill(MANNERS[register](opener + core), self.own | slots)

    def misaligned(self, rng: random.Random, situation: str, slots: dict[str, str], tries: int = 24) -> Iterator[str]:
        """Remarks with the same content in other voices, with and without pleasantries; the caller keeps those that break the SOUL."""
        other = PHRASES["misaligned"]
        for _ in range(tries):
            register = rng.choice(MISALIGNED)
            text = MANNERS[register](
                rng.choice(["", rng.choice(openers_of(register, situation))]) + (slots.get("core") or rng.choice(REMARKS[situation]))
            )
            opening, ending = (rng.choice(["", rng.choice(words)]) for words in (other["openings"], other["endings"]))
            yield rng.choice(other["terse"]) if rng.random() < 0.2 else fill(opening + text + ending, self.own | slots)
