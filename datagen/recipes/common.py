"""What recipes share: one row in the making, and one reply held to the checks."""

from collections.abc import Callable
from dataclasses import dataclass

from datagen.critique import ask_judge, recites, refuses
from datagen.engine import Reply
from datagen.prompting import Prompts
from datagen.seeds import Seed
from soul import conversation
from soul.spec import Soul, check_table, repair


@dataclass
class Take:
    """One reply: `text` as the teacher wrote it, `final` after repairs, each with its table of checks."""

    text: str
    final: str
    raw_checks: list[dict]
    checks: list[dict]
    repaired: list[str]

    @property
    def broken(self) -> set[str]:
        """Principles that the text as written breaks."""
        return failing(self.raw_checks)

    @property
    def failed(self) -> set[str]:
        """Principles that are still broken after repairs."""
        return failing(self.checks)


class Options:
    """What a recipe can be told: the base of frozen dataclasses, whose field docstrings are the --help."""

    def check(self, soul: Soul) -> None:
        """Raises UserError for options with which nothing could be made."""


class Workings:
    """One row in the making: the request, the calls made for it, and rows with the columns that all of them have. The SOUL is
    in prompts only, so no row ever has it: context at generation, absent in training."""

    def __init__(self, soul: Soul, prompts: Prompts, seed: Seed, call: Callable):
        self.soul, self.prompts, self.seed, self.call = soul, prompts, seed, call
        self.history, _ = repair(soul, seed.messages)
        self.request = transcript(self.history)
        self.principles = {principle.id: principle for principle in soul.principles}
        self.trail: list[dict] = []

    def fresh(self) -> "Workings":
        """For another row of the same seed, with a trail of its own."""
        return Workings(self.soul, self.prompts, self.seed, self.call)

    async def ask(self, stage: str, messages: list[dict], **sampling) -> Reply:
        """The reply, with its step in the trail: in the order of asking, since that of answering changes from run to run."""
        step = {"stage": stage, "text": "", "key": ""}
        self.trail.append(step)
        reply = await self.call(stage, messages, **sampling)
        step |= {"text": reply.text, "key": reply.key}
        return reply

    def opening(self, with_soul: bool) -> list[dict]:
        """The conversation as a drafter sees it, with the SOUL before it or not."""
        return joined(self.prompts.render("generate", soul=self.soul.text if with_soul else ""), self.history)

    async def judge(self, *replies: str, max_tokens: int) -> tuple[int | None, str]:
        """Which of two replies is closer to the SOUL: (0 or 1, ""), or (None, why not)."""
        told = {"soul": self.soul.text, "request": self.request}
        winner, why, steps = await ask_judge(self.call, self.prompts, max_tokens=max_tokens, replies=replies, **told)
        self.trail += steps
        return winner, why

    def fault(self, reply: Reply) -> str:
        """Why the reply is no answer, "" when it is one."""
        if not reply.ok or not reply.text.strip():
            outcome = "empty" if reply.ok else reply.outcome
            return f"{outcome} ({reply.why})" if reply.why else outcome
        return "refused" if refuses(reply.text) else "recites the rules" if recites(reply.text, self.principles) else ""

    def take(self, reply: Reply) -> tuple[Take | None, str]:
        """The reply held to the checks, or None and why it is no answer."""
        why = self.fault(reply)
        return (None, why) if why else (self.checked(reply.text.strip()), "")

    def checked(self, text: str) -> Take:
        before = self.said(text)
        after, repaired = repair(self.soul, before)
        return Take(text, after[-1]["content"], check_table(self.soul, before), check_table(self.soul, after), repaired)

    def row(self, principles: set[str] = frozenset(), **columns) -> dict:
        """A row that touches `principles`."""
        touched = [name for name in self.principles if name in principles]
        head = {"id": self.seed.id, "source": self.seed.source, "soul_hash": self.soul.hash, "principles": touched, "trail": self.trail}
        return head | {"accepted": True, "reason": ""} | columns

    def sft(self, take: Take) -> list:
        self.note_repair(take.repaired)  # for what is kept only: the card counts it
        return ["sft", self.row(take.broken, messages=self.said(take.final), checks=take.checks)]

    def pair(self, chosen: Take, rejected: str, principles: set[str] = frozenset()) -> list:
        sides = {"chosen": [conversation.assistant(chosen.final)], "rejected": [conversation.assistant(rejected)]}
        return ["preference", self.row(principles, prompt=self.history, **sides, checks=chosen.checks)]

    def rejected(self, reason: str, take: Take | None = None, principles: set[str] = frozenset(), **columns) -> list:
        said, checks = (self.said(take.final), take.checks) if take else (self.history, [])
        return [["rejected", self.row(principles, messages=said, checks=checks, accepted=False, reason=reason, **columns)]]

    def no_pair(self, why: str) -> list:
        """No row, and a step in the trail that the card counts."""
        self.note("no-pair", why)
        return []

    def said(self, text: str) -> list[dict]:
        return [*self.history, conversation.assistant(text)]

    def note(self, stage: str, text: str, key: str = "") -> None:
        self.trail.append({"stage": stage, "text": text, "key": key})

    def note_repair(self, principles: list[str]) -> None:
        if principles:
            self.note("repair", ", ".join(principles))


def failing(checks: list[dict]) -> set[str]:
    """The principles that a table of checks says are broken."""
    return {check["principle"] for check in checks if not check["ok"]}


def because(principles: set[str]) -> str:
    """Why a row that breaks `principles` is not kept; "" when it breaks none."""
    return f"checks: {', '.join(sorted(principles))}" if principles else ""


def joined(prompt: list[dict], history: list[dict]) -> list[dict]:
    """`prompt`, then the conversation; two system messages become one, since some routes accept no second."""
    if prompt and history[0]["role"] == "system":
        return [conversation.system(f"{prompt[0]['content']}\n\n{history[0]['content']}"), *history[1:]]
    return [*prompt, *history]


def transcript(messages: list[dict]) -> str:
    """The request as a teacher reads it: the user's text alone, or the whole conversation when there is more."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
