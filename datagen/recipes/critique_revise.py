"""generate -> (check, critique, revise) × n -> verify: the recipe of Constitutional AI's first stage, held to a SOUL.

The draft is written without the SOUL by default. A good teacher that has the SOUL in context rarely breaks it, so drafts
and finals would agree and give no pairs; a plain draft is what the student would say, and its revision answers the same
request with the same content, so a pair differs in what the SOUL asks for and in little else.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from datagen.critique import Finding, Unreadable, gives_itself_away, parse_critique, refuses
from datagen.engine import Recipe, Reply
from datagen.prompting import Prompts
from datagen.seeds import Seed
from soul import conversation
from soul.errors import UserError
from soul.spec import Soul, check_table, repair

CUT_OFF = Finding("", "", "it is too long and was cut off")


@dataclass(frozen=True)
class CritiqueRevise:
    rounds: int = 2
    """Revisions at most; a reply without faults is not revised."""
    principles: int = 0
    """Principles the critic judges in each round, drawn by seed; 0 = all of them."""
    keep: Literal["last", "all", "best"] = "last"
    """last: revise the latest version and keep the one that ends clean; best: always revise the version with the fewest
    faults; all: keep every revision that passes the checks (as the paper does)."""
    samples: int = 1
    """Drafts per request; the one with the fewest faults goes on, the one with the most is the pair's other side."""
    draft_soul: bool = False
    """Write the draft with the SOUL in context: fewer revisions, but fewer pairs."""
    critic: Literal["teacher", "checks"] = "teacher"
    """Who finds faults: the checks and then the teacher, or the checks alone (for teachers too small to judge)."""
    on_failed_critique: Literal["accept", "reject"] = "accept"
    """What an unreadable critique does to a reply that passes all checks; an accepted one is marked in its trail."""
    critic_tokens: int = 1024
    """Longest critique, in tokens."""
    seed: int = 0
    """Seed of the draws of principles."""


@dataclass
class Version:
    """One wording of the reply: `text` as the teacher wrote it, `final` after repairs, each with its table of checks."""

    text: str
    final: str
    raw_checks: list[dict]
    checks: list[dict]
    fault: str = ""  # structural: such a text is never exported as an answer, nor half of a pair
    findings: list[Finding] = field(default_factory=list)
    judged: bool | None = None  # None: not yet; False: the critique was unreadable

    @property
    def failed(self) -> list[dict]:
        """The first violation of each check that `final` fails."""
        first: dict[tuple, dict] = {}
        for check in self.checks:
            if not check["ok"]:
                first.setdefault((check["principle"], check["check"]), check)
        return list(first.values())

    @property
    def faults(self) -> int:
        return len(self.failed) + len(self.findings) + bool(self.fault)


def critique_revise(options: CritiqueRevise, soul: Soul, prompts: Prompts) -> Recipe:
    """The recipe for one SOUL.

    Raises:
        UserError: when neither a check nor the critic could find a fault.
    """
    if options.critic == "checks" and not any(principle.checks for principle in soul.principles):
        raise UserError("no principle has a check, so with --recipe.critic checks nothing would be verified", where=soul.path, fix="Use --recipe.critic teacher.")

    async def recipe(seed: Seed, call: Callable) -> list:
        return await _Row(options, soul, prompts, seed, call).run()

    return recipe


class _Row:
    def __init__(self, options: CritiqueRevise, soul: Soul, prompts: Prompts, seed: Seed, call: Callable):
        self.options, self.soul, self.prompts, self.seed, self.call = options, soul, prompts, seed, call
        self.history, _ = repair(soul, seed.messages)
        self.request = transcript(self.history)
        self.trail: list[dict] = []
        self.principle = {principle.id: principle for principle in soul.principles}

    async def run(self) -> list:
        drafts, why = await self.drafts()
        if not drafts:
            return [["rejected", self.row([], messages=self.history, accepted=False, reason=f"draft: {why}")]]
        versions = [min(drafts, key=lambda draft: draft.faults)]
        for number in range(self.options.rounds):
            await self.critique(versions[-1], number)
            if self.clean(versions[-1]):
                break
            if revision := await self.revise(self.current(versions), number):
                versions.append(revision)
        await self.critique(versions[-1], self.options.rounds)
        return self.results(drafts, versions, self.current(versions))

    def current(self, versions: list[Version]) -> Version:
        return min(reversed(versions), key=lambda version: version.faults) if self.options.keep == "best" else versions[-1]

    # --- steps

    async def drafts(self) -> tuple[list[Version], str]:
        prompt = self.prompts.render("generate", soul=self.soul.text if self.options.draft_soul else "")
        replies = await asyncio.gather(*(self.call("draft", joined(prompt, self.history), replicate=n) for n in range(self.options.samples)))
        drafts, why = [], ""
        for reply in replies:
            self.note("draft", reply.text, reply.key)
            fault = "refused" if refuses(reply.text) else reply.outcome
            if reply.text.strip() and fault in ("ok", "truncated"):
                drafts.append(self.version(reply.text, "" if fault == "ok" else fault))
            else:
                why = fault if not reply.why else f"{fault} ({reply.why})"
        return drafts, why

    def version(self, text: str, fault: str = "") -> Version:
        before = [*self.history, conversation.assistant(text.strip())]
        after, repaired = repair(self.soul, before)
        if repaired:
            self.note("repair", ", ".join(repaired))
        return Version(text.strip(), after[-1]["content"], check_table(self.soul, before), check_table(self.soul, after), fault)

    async def critique(self, version: Version, number: int) -> None:
        """Ask the critic about `version`, once; broken JSON gets one repair round."""
        if self.options.critic == "checks" or version.judged is not None or version.fault:
            return
        chosen = self.drawn(number)
        known = [{"principle": check["principle"], "why": check["why"]} for check in version.failed]
        prompt = self.prompts.render("critique", soul=self.soul.text, request=self.request, reply=version.final, known=known,
                                     principles=[{"id": p.id, "text": p.text} for p in chosen])  # fmt: skip
        reply, stage = await self.ask_critic("critique", prompt), "critique"
        for chance in (1, 0):
            try:
                version.findings = parse_critique(reply.text, version.final, [p.id for p in chosen])
                version.judged = True
                break
            except Unreadable as problem:
                version.judged, stage = False, "critique-unreadable"
                if not chance or not reply.text:
                    break
                prompt = self.prompts.render("repair_json", text=reply.text, problem=str(problem))
                reply, stage = await self.ask_critic("repair_json", prompt), "critique-repaired"
        self.note(stage if version.judged else "critique-unreadable", reply.text, reply.key)

    async def ask_critic(self, stage: str, prompt: list[dict]) -> Reply:
        return await self.call(stage, prompt, temperature=0.0, max_tokens=self.options.critic_tokens)

    def drawn(self, number: int) -> list:
        everything, count = list(self.soul.principles), self.options.principles
        if not 0 < count < len(everything):
            return everything
        return random.Random(f"{self.options.seed}:{self.seed.id}:{number}").sample(everything, count)

    async def revise(self, version: Version, number: int) -> Version | None:
        faults = [self.told(finding) for finding in self.findings(version)]
        prompt = self.prompts.render("revise", soul=self.soul.text, request=self.request, reply=version.final, faults=faults)
        reply = await self.call("revise", prompt, replicate=number)
        fault = reply.outcome if not reply.ok else "refused" if refuses(reply.text) else gives_itself_away(reply.text, self.request)
        self.note(f"revise-{fault.replace(' ', '-')}" if fault else "revise", reply.text, reply.key)
        return None if fault or not reply.text.strip() else self.version(reply.text)

    # --- judgements

    def findings(self, version: Version) -> list[Finding]:
        text = version.final
        checked = [Finding(c["principle"], text[c["start"] : c["end"]] if c["end"] - c["start"] <= 80 else "", c["why"]) for c in version.failed]
        return [*checked, *version.findings, *([CUT_OFF] if version.fault else [])]

    def told(self, finding: Finding) -> dict:
        principle = self.principle.get(finding.principle)
        return {"principle": principle.text if principle else "the reply must be whole", "quote": finding.quote, "why": finding.why}

    def clean(self, version: Version) -> bool:
        return not version.faults and (version.judged is not False or self.options.on_failed_critique == "accept")

    def why_not(self, version: Version) -> str:
        if version.fault:
            return f"draft: {version.fault}"
        if version.failed:
            return f"checks: {', '.join(sorted({check['principle'] for check in version.failed}))}"
        if version.findings:
            return f"critic: {', '.join(sorted({finding.principle for finding in version.findings}))}"
        return "critique: unreadable"

    # --- rows

    def results(self, drafts: list[Version], versions: list[Version], last: Version) -> list:
        if self.options.keep == "all":
            kept = [v for v in versions if self.clean(v) or (v is not versions[0] and not v.failed)]
        else:
            kept = [last] if self.clean(last) else []
        if not kept:
            return [["rejected", self.row([*versions, last], messages=self.said(last.final), accepted=False, reason=self.why_not(last))]]
        rows = []
        for number, version in enumerate(kept):
            rows.append(["sft", self.row(versions[: versions.index(version) + 1], id=self.seed.id + f"-{number}" * (len(kept) > 1), messages=self.said(version.final))])
        if self.clean(last) and (pair := self.pair(drafts, versions[0], last)):
            rows.append(["preference", pair])
        return rows

    def pair(self, drafts: list[Version], first: Version, last: Version) -> dict | None:
        """The draft that broke most against the clean final; None unless they differ on a principle."""
        whole = [draft for draft in drafts if not draft.fault]
        worst = max(whole, key=lambda draft: (len(broken(draft)), draft is first), default=None)
        if worst is None or not broken(worst) or worst.text == last.final:
            return None
        sides = {"chosen": [conversation.assistant(last.final)], "rejected": [conversation.assistant(worst.text)]}
        return self.row([last], prompt=self.history, **sides, principles=self.in_order(broken(worst)))

    def row(self, versions: list[Version], **columns) -> dict:
        """A row whose checks are those of the last of `versions`, and whose principles are those broken on the way."""
        touched = set().union(*map(broken, versions))
        return {
            "id": self.seed.id, "source": self.seed.source, "soul_hash": self.soul.hash, "principles": self.in_order(touched),
            "checks": versions[-1].checks if versions else [], "trail": self.trail, "accepted": True, "reason": "",
        } | columns  # fmt: skip

    def said(self, text: str) -> list[dict]:
        return [*self.history, conversation.assistant(text)]

    def in_order(self, principles: set[str]) -> list[str]:
        return [principle.id for principle in self.soul.principles if principle.id in principles]

    def note(self, stage: str, text: str, key: str = "") -> None:
        self.trail.append({"stage": stage, "text": text, "key": key})


def broken(version: Version) -> set[str]:
    """Principles that the text as written breaks, by check or critic."""
    return {check["principle"] for check in version.raw_checks if not check["ok"]} | {finding.principle for finding in version.findings}


def joined(prompt: list[dict], history: list[dict]) -> list[dict]:
    """`prompt`, then the conversation; two system messages become one, since some routes accept no second."""
    if prompt and history and prompt[0]["role"] == history[0]["role"] == "system":
        return [conversation.system(f"{prompt[0]['content']}\n\n{history[0]['content']}"), *prompt[1:], *history[1:]]
    return [*prompt, *history]


def transcript(messages: list[dict]) -> str:
    """The request as a teacher reads it: the user's text alone, or the whole conversation when there is more."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
