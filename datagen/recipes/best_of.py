"""n answers to one request: the best against one that it beat. Checks decide first, the judge only between what they leave equal."""

import asyncio
from dataclasses import dataclass

from datagen.recipes.common import Options, Take, Workings, because
from soul.errors import UserError
from soul.spec import Soul


@dataclass(frozen=True)
class BestOf(Options):
    n: int = 4
    """Answers per request."""
    soul: bool = True
    """Sample with the SOUL in context; without it, few answers pass the checks."""
    judge: bool = True
    """Let the judge choose among the answers that the checks leave equal: two calls for each but the first."""
    judge_tokens: int = 512
    """Longest verdict, in tokens."""

    def check(self, soul: Soul) -> None:
        if self.n < 2:
            raise UserError("--best-of.n begins at 2")
        if not (self.judge or soul.verified):
            what = "no principle has a check, so without the judge nothing could choose"
            raise UserError(what, where=soul.path, fix="Leave the judge on.")


async def best_of(work: Workings, options: BestOf) -> list:
    """An sft row of the best answer, and a pair."""
    opening = work.opening(options.soul)
    replies = await asyncio.gather(*(work.ask("sample", opening, replicate=number) for number in range(options.n)))
    taken = [work.take(reply) for reply in replies]
    takes = sorted((take for take, _ in taken if take), key=_faults)  # stable: equals stay in the order of their numbers
    if not takes:
        return work.rejected(f"sample: {taken[-1][1]}")
    if takes[0].failed:
        return work.rejected(because(takes[0].failed), takes[0])
    best, beaten = await _champion(work, options, [take for take in takes if _faults(take) == _faults(takes[0])])
    worst = takes[-1]
    if len(worst.broken) > len(best.broken) and worst.text != best.final:
        return [work.sft(best), work.pair(best, worst.text, worst.broken)]
    pair = [work.pair(best, beaten.final)] if beaten else work.no_pair(_why(work, takes))
    return [work.sft(best), *pair]


def _faults(take: Take) -> tuple[int, int]:
    return len(take.failed), len(take.broken)


async def _champion(work: Workings, options: BestOf, equals: list[Take]) -> tuple[Take, Take | None]:
    """The answer that no later one beat, and the last one that it won against; a tie or a disagreement moves nothing."""
    best, beaten = equals[0], None
    for challenger in equals[1:] if options.judge else ():
        winner, why = await work.judge(best.final, challenger.final, max_tokens=options.judge_tokens)
        if winner is None:
            work.note("undecided", why)
        else:
            best, beaten = (best, challenger) if winner == 0 else (challenger, best)
    return best, beaten


def _why(work: Workings, takes: list[Take]) -> str:
    undecided = [step["text"] for step in work.trail if step["stage"] == "undecided"]
    return undecided[-1] if undecided else "only one answer" if len(takes) == 1 else "the checks do not tell the answers apart"
