"""Context distillation of a character: the teacher answers with the SOUL in context, the student without it.

After OpenCharacterTraining (arXiv:2511.01689): chosen is the teacher in character, rejected the student's own plain answer,
so the pair is on-policy on the side that has to lose its habits. Without a student both sides are the teacher's, and the
pair differs in the SOUL alone.
"""

import asyncio
from dataclasses import dataclass

from datagen.recipes.common import Options, Take, Workings, because


@dataclass(frozen=True)
class Distill(Options):
    judge: bool = False
    """Where the checks do not tell the two answers apart, let the judge decide; without any check it always does."""
    judge_tokens: int = 512
    """Longest verdict, in tokens."""


async def distill(work: Workings, options: Distill) -> list:
    """An sft row of the teacher's answer, and a pair where the student's breaks more."""
    told, plain = await asyncio.gather(
        work.ask("distill", work.opening(with_soul=True)), work.ask("student", work.opening(with_soul=False), role="student")
    )
    own, why = work.take(told)
    if own is None:
        return work.rejected(f"distill: {why}")
    if own.failed:
        return work.rejected(because(own.failed), own)
    other, why = work.take(plain)
    pair = await _pair(work, options, own, other) if other else work.no_pair(f"student: {why}")
    return [work.sft(own), *pair]


async def _pair(work: Workings, options: Distill, own: Take, other: Take) -> list:
    if other.text == own.final:
        return work.no_pair("the answers are equal")
    if other.broken:
        return [work.pair(own, other.text, other.broken)]
    if not options.judge and work.soul.verified:
        return work.no_pair("the checks do not tell the answers apart")
    winner, why = await work.judge(own.final, other.text, max_tokens=options.judge_tokens)
    return [work.pair(own, other.text)] if winner == 0 else work.no_pair(why or "judge: prefers the student")
