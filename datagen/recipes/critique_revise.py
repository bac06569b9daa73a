"""generate -> (check, critique, revise) × n -> verify: the recipe of Constitutional AI's first stage, held to a SOUL.

The draft is written without the SOUL by default. A good teacher that has the SOUL in context rarely breaks it, so drafts
and finals would agree and give no pairs; a plain draft is what the student would say, and its revision answers the same
request with the same content, so a pair differs in what the SOUL asks for and in little else.
"""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Literal

from datagen.critique import Finding, ask_critic, gives_itself_away, refuses, strays
from datagen.recipes.common import Options, Take, Workings
from soul.errors import UserError
from soul.spec import Soul


@dataclass(frozen=True)
class CritiqueRevise(Options):
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

    def check(self, soul: Soul) -> None:
        if self.critic == "checks" and not soul.verified:
            what = "no principle has a check, so with --critique-revise.critic checks nothing would be verified"
            raise UserError(what, where=soul.path, fix="Use --critique-revise.critic teacher.")


@dataclass
class Version(Take):
    """One wording of the reply, and what is wrong with it."""

    cut: bool = False  # at max_tokens: never exported as an answer, nor half of a pair
    findings: list[Finding] = field(default_factory=list)
    judged: bool | None = None  # None: not yet; False: the critique was unreadable

    @property
    def violations(self) -> list[dict]:
        """The first violation of each check that `final` fails."""
        first = {(check["principle"], check["check"]): check for check in reversed(self.checks) if not check["ok"]}
        return list(reversed(first.values()))

    @property
    def faults(self) -> int:
        return len(self.violations) + len(self.findings) + self.cut

    @property
    def broken(self) -> set[str]:
        """Principles that the text as written breaks, by check or critic."""
        return super().broken | {finding.principle for finding in self.findings}

    def why_not(self) -> str:
        if self.cut:
            return "draft: truncated"
        names = {"checks": self.failed, "critic": {finding.principle for finding in self.findings}}
        return next((f"{who}: {', '.join(sorted(found))}" for who, found in names.items() if found), "critique: unreadable")


async def critique_revise(work: Workings, options: CritiqueRevise) -> list:
    return await _Row(work, options).run()


class _Row(Workings):
    def __init__(self, work: Workings, options: CritiqueRevise):
        super().__init__(work.soul, work.prompts, work.seed, work.call)
        self.options, self.drafted = options, ""

    async def run(self) -> list:
        drafts, why = await self.drafts()
        if not drafts:
            return self.rejected(f"draft: {why}")
        self.drafted = "\n".join(draft.text for draft in drafts)
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

    def clean(self, version: Version) -> bool:
        return not version.faults and (version.judged is not False or self.options.on_failed_critique == "accept")

    # --- steps

    async def drafts(self) -> tuple[list[Version], str]:
        """The drafts that can go on, and why the last of the others cannot."""
        prompt = self.opening(self.options.draft_soul)
        replies = await asyncio.gather(*(self.call("draft", prompt, replicate=number) for number in range(self.options.samples)))
        drafts, why = [], ""
        for reply in replies:
            self.note("draft", reply.text, reply.key)
            outcome = "refused" if refuses(reply.text) else reply.outcome
            if reply.text.strip() and outcome in ("ok", "truncated"):
                drafts.append(self.version(reply.text, cut=outcome == "truncated"))
            else:
                why = f"{outcome} ({reply.why})" if reply.why else outcome
        return drafts, why

    def version(self, text: str, cut: bool = False) -> Version:
        version = Version(**vars(self.checked(text.strip())), cut=cut)
        self.note_repair(version.repaired)
        return version

    async def critique(self, version: Version, number: int) -> None:
        if self.options.critic == "checks" or version.judged is not None or version.cut:
            return
        chosen = list(self.principles)
        if 0 < self.options.principles < len(chosen):
            chosen = random.Random(f"{self.options.seed}:{self.seed.id}:{number}").sample(chosen, self.options.principles)
        findings, step = await ask_critic(
            self.call, self.prompts, max_tokens=self.options.critic_tokens, soul=self.soul.text, request=self.request, reply=version.final,
            known=[{"principle": check["principle"], "why": check["why"]} for check in version.violations], principles=chosen,
        )  # fmt: skip
        version.findings, version.judged = findings or [], findings is not None
        self.trail.append(step)

    async def revise(self, version: Version, number: int) -> Version | None:
        """A new version, or None when the teacher's reply cannot pass as a first reply; the trail says why."""
        prompt = self.prompts.render("revise", soul=self.soul.text, request=self.request, reply=version.final, faults=self.told(version))
        reply = await self.call("revise", prompt, replicate=number)
        leak = gives_itself_away(reply.text, self.request, self.principles)
        if not leak and strays(reply.text, self.request, self.drafted):
            leak = "strays"
        fault = reply.outcome if not reply.ok else "refused" if refuses(reply.text) else leak
        self.note(f"revise-{fault.replace(' ', '-')}" if fault else "revise", reply.text, reply.key)
        return None if fault else self.version(reply.text)

    def told(self, version: Version) -> list[dict]:
        """The faults of a version as the reviser reads them: what checks found, what the critic found, and a cut."""
        faults = [{"principle": "the reply must be whole", "quote": "", "why": "it is too long and was cut off"}] if version.cut else []
        for check in version.violations:
            quote = version.final[check["start"] : check["end"]] if check["end"] - check["start"] <= 80 else ""
            faults.append({"principle": self.principles[check["principle"]].text, "quote": quote, "why": check["why"]})
        return faults + [{"principle": self.principles[f.principle].text, "quote": f.quote, "why": f.why} for f in version.findings]

    # --- rows

    def results(self, drafts: list[Version], versions: list[Version], last: Version) -> list:
        kept = [last] if self.clean(last) else []
        if self.options.keep == "all":
            kept = [version for version in versions if self.clean(version) or (version is not versions[0] and not version.failed)]
        if not kept:
            return self.rejected(last.why_not(), last, broken_by(versions))
        rows = []
        for number, version in enumerate(kept):
            name = self.seed.id + f"-{number}" * (len(kept) > 1)
            so_far = broken_by(versions[: versions.index(version) + 1])
            rows.append(["sft", self.row(so_far, id=name, messages=self.said(version.final), checks=version.checks)])
        return [*rows, *self.paired(drafts, versions[0], last)]

    def paired(self, drafts: list[Version], first: Version, last: Version) -> list:
        """The draft that broke most against the clean final; no pair unless they differ on a principle."""
        if not self.clean(last):
            return self.no_pair("the last version still has faults")
        worst = max((draft for draft in drafts if not draft.cut), key=lambda draft: (len(draft.broken), draft is first), default=None)
        if worst is None or not worst.broken:
            return self.no_pair("every draft was cut off" if worst is None else "no fault in any draft")
        if worst.text == last.final:
            return self.no_pair("the revision equals the draft")
        return [self.pair(last, worst.text, worst.broken)]


def broken_by(versions: list[Version]) -> set[str]:
    return set().union(*(version.broken for version in versions))
