"""Constitutional AI as in the paper (arXiv:2212.08073): revisions of all steps for tuning, and AI preferences as soft labels.

Each critique-revision step draws one principle by seed; every revision is an sft row. Then two plain answers (the student's,
if there is one) are compared under drawn principles, and the average is the label: a step of the trail, as JSON.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from datagen.critique import gives_itself_away, strays
from datagen.engine import Recipe
from datagen.prompting import Prompts
from datagen.recipes.common import Workings
from datagen.recipes.soft_labels import prefer
from datagen.seeds import Seed
from soul.spec import Soul


@dataclass(frozen=True)
class Cai:
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


def cai(options: Cai, soul: Soul, prompts: Prompts) -> Recipe:
    """The recipe for one SOUL. The paper keeps revisions that still break a principle, and so does this: see their `checks`."""

    async def recipe(seed: Seed, call: Callable) -> list:
        work, rng = Workings(soul, prompts, seed, call), random.Random(f"{options.seed}:{seed.id}")
        opening, answers = work.opening(with_soul=False), 2 if options.judgements else 1
        replies = await asyncio.gather(*(work.ask("answer", opening, role="student", replicate=n) for n in range(answers)))
        first, why = work.take(replies[0])
        if first is None:
            return work.rejected(f"answer: {why}")
        rows = await _revise(work, options, rng, first.text)
        if options.judgements:
            rows += await prefer(
                work, rng, first, work.take(replies[1])[0], options.judgements, options.critic_tokens if options.think else 0
            )
        return rows or work.rejected("no revision and no pair", first)

    return recipe


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
