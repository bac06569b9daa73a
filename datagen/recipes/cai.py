"""Constitutional AI as in the paper (arXiv:2212.08073): revisions of all steps for tuning, and AI preferences as soft labels.

Each critique-revision step draws one principle by seed; every revision is an sft row. Then two plain answers (the student's,
if there is one) are compared under drawn principles by the log-probabilities of two letters, in both orders, because judges
prefer a place; the average is the label: a step of the trail, as JSON. After a chain of thought the probabilities are
over-confident, so there each label is clamped to 0.4-0.6.
"""

import asyncio
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from datagen.critique import gives_itself_away, strays
from datagen.engine import Reply
from datagen.recipes.common import Options, Take, Workings

CLAMP = (0.4, 0.6)


@dataclass(frozen=True)
class Cai(Options):
    revisions: int = 4
    """Critique-revision steps, each by one drawn principle and each an sft row."""
    judgements: int = 4
    """Principles that the two answers are compared under, drawn by seed; 0 = no preferences."""
    think: bool = False
    """Let the judge reason before each comparison; labels are then clamped to 0.4-0.6."""
    critic_tokens: int = 512
    """Longest critique or chain of thought, in tokens."""
    seed: int = 0
    """Seed of the draws of principles."""


async def cai(work: Workings, options: Cai) -> list:
    """The rows. The paper keeps revisions that still break a principle, and so does this: see their `checks`."""
    rng = random.Random(f"{options.seed}:{work.seed.id}")
    opening, answers = work.opening(with_soul=False), 2 if options.judgements else 1
    replies = await asyncio.gather(*(work.ask("answer", opening, role="student", replicate=n) for n in range(answers)))
    first, why = work.take(replies[0])
    if first is None:
        return work.rejected(f"answer: {why}")
    rows = await _revise(work, options, rng, first.text)
    if options.judgements:
        rows += await _prefer(work, options, rng, first, work.take(replies[1])[0])
    return rows or work.rejected("no revision and no pair", first)


async def _revise(work: Workings, options: Cai, rng: random.Random, text: str) -> list:
    """An sft row for each revision that can pass as a first reply; a step whose revision cannot is passed over."""
    rows, drafted = [], text
    for number in range(options.revisions):
        principle = rng.choice(work.soul.principles)
        told = {"principle": principle.text, "request": work.request, "reply": text}
        critique = await work.ask("critique", work.prompts.render("cai_critique", **told), max_tokens=options.critic_tokens)
        reply = await work.ask("revise", work.prompts.render("cai_revise", critique=critique.text, **told), replicate=number)
        take, why = work.take(reply)
        why = why or gives_itself_away(reply.text, work.request, work.principles) or "strays" * strays(reply.text, work.request, drafted)
        if why or take.text == text:
            work.note("revise-left-out", why or "the revision equals the reply")
            continue
        text = take.text
        rows.append(["sft", work.sft(take)[1] | {"id": f"{work.seed.id}-{number}", "principles": [principle.id]}])
    return rows


async def _prefer(work: Workings, options: Cai, rng: random.Random, first: Take, second: Take | None) -> list:
    """A pair of the texts that the judge saw, or none where the label is one half. Its principles are those that agree with it."""
    if second is None or second.final == first.final:
        return work.no_pair("the answers are equal" if second else "no second answer")
    drawn = rng.sample(work.soul.principles, min(options.judgements, len(work.soul.principles)))
    compared = await asyncio.gather(*(_compare(work, options, principle.text, (first.final, second.final)) for principle in drawn))
    labels = {principle.id: label for principle, (label, _) in zip(drawn, compared, strict=True)}
    label = _average(labels.values())
    label = None if label is None else round(label, 6)
    work.trail += [step for _, steps in compared for step in steps]
    work.note("label", json.dumps({"p": label, "principles": labels}))
    if label is None or label == 0.5:
        return work.no_pair("judge: unreadable" if label is None else "judge: tie")
    agree = {name for name, p in labels.items() if p is not None and (p - 0.5) * (label - 0.5) > 0}
    chosen, rejected = (first, second) if label > 0.5 else (second, first)
    return [work.pair(chosen, rejected.final, agree)]


async def _compare(work: Workings, options: Cai, principle: str, replies: tuple[str, str]) -> tuple[float | None, list[dict]]:
    """(P(the first reply is preferred) under one principle, trail steps); None when neither order had a reading."""
    asked = await asyncio.gather(*(_asked(work, options, principle, replies, first) for first in (0, 1)))
    p = _average(p for p, _ in asked)
    return p if p is None or not options.think else min(max(p, CLAMP[0]), CLAMP[1]), [step for _, step in asked]


async def _asked(work: Workings, options: Cai, principle: str, replies: tuple[str, str], first: int) -> tuple[float | None, dict]:
    told = {"principle": principle, "request": work.request, "reply_a": replies[first], "reply_b": replies[1 - first]}
    thoughts, sampling = "", {"role": "judge", "temperature": 0.0}
    if options.think:
        prompt = work.prompts.render("compare", think=True, thoughts="", **told)
        thoughts = (await work.call("think", prompt, max_tokens=options.critic_tokens, **sampling)).text
    prompt = work.prompts.render("compare", think=False, thoughts=thoughts, **told)
    reply = await work.call("compare", prompt, max_tokens=8, logprobs=True, **sampling)
    p, step = probability_of_a(reply), {"stage": "compare", "text": reply.text, "key": reply.key}
    return p if p is None or first == 0 else 1 - p, step


def _average(given: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None when none is."""
    known = [p for p in given if p is not None]
    return sum(known) / len(known) if known else None


def probability_of_a(reply: Reply) -> float | None:
    """P(A) against P(B) from the first token's alternatives; without them, 1 or 0 from the letter said; None: neither."""
    mass = {"A": 0.0, "B": 0.0}
    for token, logprob in (reply.logprobs or {}).items():
        if (letter := token.strip(" (\n*").upper()) in mass:
            mass[letter] += math.exp(logprob)
    if total := sum(mass.values()):
        return mass["A"] / total
    said = re.match(r"\W*(?:(?:reply|answer|option)\W*)?([AB])\b", reply.text, re.I)
    return None if said is None else float(said[1].upper() == "A")
