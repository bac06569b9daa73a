"""Context distillation of a character: the teacher answers with the SOUL in context, the student without it.

After OpenCharacterTraining (arXiv:2511.01689): chosen is the teacher in character, rejected the student's own plain answer,
so the pair is on-policy on the side that has to lose its habits. Without a student both sides are the teacher's, and the
pair differs in the SOUL alone.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from datagen.critique import ask_judge
from datagen.engine import Recipe
from datagen.prompting import Prompts
from datagen.recipes.common import Take, Workings
from datagen.seeds import Seed
from soul.spec import Soul


@dataclass(frozen=True)
class Distill:
    judge: bool = False
    """Where the checks do not tell the two answers apart, let the judge decide; without any check it always does."""
    judge_tokens: int = 512
    """Longest verdict, in tokens."""


def distill(options: Distill, soul: Soul, prompts: Prompts) -> Recipe:
    """The recipe for one SOUL: an sft row of the teacher's answer, and a pair where the student's breaks more."""

    async def recipe(seed: Seed, call: Callable) -> list:
        work = Workings(soul, prompts, seed, call)
        told, plain = await asyncio.gather(
            work.ask("distill", work.opening(with_soul=True)), work.ask("student", work.opening(with_soul=False), role="student")
        )
        own, why = work.take(told)
        if own is None:
            return work.rejected(f"distill: {why}")
        if own.failed:
            return work.rejected(work.failing(own), own)
        other, why = work.take(plain)
        pair = await _pair(work, options, own, other) if other else work.no_pair(f"student: {why}")
        return [work.sft(own), *pair]

    return recipe


async def _pair(work: Workings, options: Distill, own: Take, other: Take) -> list:
    if other.text == own.final:
        return work.no_pair("the answers are equal")
    if other.broken:
        return [work.pair(own, other.text, other.broken)]
    if not options.judge and work.soul.verified:
        return work.no_pair("the checks do not tell the answers apart")
    winner, why, steps = await ask_judge(
        work.call, work.prompts, max_tokens=options.judge_tokens, replies=(own.final, other.text), soul=work.soul.text, request=work.request
    )
    work.trail += steps
    return [work.pair(own, other.text, set())] if winner == 0 else work.no_pair(why or "judge: prefers the student")
