"""AI feedback as soft labels (Constitutional AI, arXiv:2212.08073): P(A preferred) from the log-probabilities of two letters.

Averaged over both orders, because judges prefer a place. After a chain of thought the probabilities are over-confident, so
there each label is clamped to 0.4-0.6, as in the paper.
"""

import asyncio
import json
import math
import random
import re

from datagen.engine import Reply
from datagen.recipes.common import Take, Workings

CLAMP = (0.4, 0.6)


async def prefer(work: Workings, rng: random.Random, first: Take, second: Take | None, judgements: int, think_tokens: int) -> list:
    """A pair of the texts that the judge saw, or none where the label is one half. Its principles are those that agree with it;
    `judgements` of them are drawn."""
    if second is None or second.final == first.final:
        return work.no_pair("the answers are equal" if second else "no second answer")
    drawn = rng.sample(work.soul.principles, min(judgements, len(work.soul.principles)))
    compared = await asyncio.gather(*(compare(work, principle.text, (first.final, second.final), think_tokens) for principle in drawn))
    labels = {principle.id: label for principle, (label, _) in zip(drawn, compared, strict=True)}
    given = [label for label in labels.values() if label is not None]
    label = round(sum(given) / len(given), 6) if given else None
    work.trail += [step for _, steps in compared for step in steps]
    work.note("label", json.dumps({"p": label, "principles": labels}))
    if label is None or label == 0.5:
        return work.no_pair("judge: unreadable" if label is None else "judge: tie")
    agree = {name for name, p in labels.items() if p is not None and (p - 0.5) * (label - 0.5) > 0}
    chosen, rejected = (first, second) if label > 0.5 else (second, first)
    return [work.pair(chosen, rejected.final, agree)]


async def compare(work: Workings, principle: str, replies: tuple[str, str], think_tokens: int = 0) -> tuple[float | None, list[dict]]:
    """(P(the first reply is preferred) under one principle, trail steps); None when neither order had a reading.

    `think_tokens` > 0 has the judge reason first, at that length at most.
    """
    asked = await asyncio.gather(*(_asked(work, principle, replies, first, think_tokens) for first in (0, 1)))
    given = [p for p, _ in asked if p is not None]
    p = sum(given) / len(given) if given else None
    return p if p is None or not think_tokens else min(max(p, CLAMP[0]), CLAMP[1]), [step for _, step in asked]


async def _asked(work: Workings, principle: str, replies: tuple[str, str], first: int, think_tokens: int) -> tuple[float | None, dict]:
    told = {"principle": principle, "request": work.request, "reply_a": replies[first], "reply_b": replies[1 - first]}
    thoughts, sampling = "", {"role": "judge", "temperature": 0.0}
    if think_tokens:
        prompt = work.prompts.render("compare", think=True, thoughts="", **told)
        thoughts = (await work.call("think", prompt, max_tokens=think_tokens, **sampling)).text
    prompt = work.prompts.render("compare", think=False, thoughts=thoughts, **told)
    reply = await work.call("compare", prompt, max_tokens=8, logprobs=True, **sampling)
    p, step = probability_of_a(reply), {"stage": "compare", "text": reply.text, "key": reply.key}
    return p if p is None or first == 0 else 1 - p, step


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
