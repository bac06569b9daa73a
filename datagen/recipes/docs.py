"""Documents about the SOUL for midtraining: domains (the seeds) x document types x ideas, one document for each.

After "Model Spec Midtraining" (arXiv:2605.02087): text that explains why somebody acts as they do, read before any tuning,
carries further than rules. Rows are plain `text`; the plan asks for particular situations and reasons.
"""

import asyncio
import random
from dataclasses import dataclass

from datagen.critique import LIST_SCHEMA, Unreadable, parse_list
from datagen.recipes.common import Options, Workings
from datagen.seeds import aims
from soul.errors import UserError
from soul.spec import Soul

TYPES = ("blog post", "forum thread", "design memo", "interview", "textbook section", "diary entry", "news report", "FAQ", "story", "email")


@dataclass(frozen=True)
class Docs(Options):
    types: int = 3
    """Types of document per domain, drawn by seed."""
    ideas: int = 2
    """Documents of each type."""
    principles: int = 3
    """Principles that a document is about, drawn by seed, where the domain is not aimed at some."""
    min_words: int = 80
    """Shorter documents are rejected."""
    doc_tokens: int = 2048
    """Longest document, in tokens; longer ones are cut off and rejected."""
    seed: int = 0
    """Seed of the draws."""

    def check(self, soul: Soul) -> None:
        if not 1 <= self.types <= len(TYPES) or self.ideas < 1:
            raise UserError(f"--docs.types lies between 1 and {len(TYPES)}, and --docs.ideas begins at 1")


async def docs(work: Workings, options: Docs) -> list:
    """A row for each document; it is kept when it is whole, long enough and names the agent."""
    rng = random.Random(f"{options.seed}:{work.seed.id}")
    types = rng.sample(TYPES, options.types)
    ids = list(work.principles)
    drawn = [name for name in aims(work.seed.source) if name in ids] or rng.sample(ids, min(options.principles, len(ids)))
    rows = await asyncio.gather(*(_plan(work.fresh(), options, type_, drawn) for type_ in types))
    return [row for some in rows for row in some]


async def _plan(work: Workings, options: Docs, type_: str, drawn: list[str]) -> list:
    told = {"soul": work.soul.text, "name": work.soul.name, "type": type_, "domain": work.request}
    about = [{"text": work.principles[name].text} for name in drawn]
    prompt = work.prompts.render("ideas", principles=about, n=options.ideas, **told)
    reply = await work.ask("ideas", prompt, max_tokens=200 * options.ideas, schema=LIST_SCHEMA)
    name = type_.replace(" ", "-")
    try:
        ideas = parse_list(reply.text)[: options.ideas]
    except Unreadable:
        return work.rejected(f"ideas: {'unreadable' if reply.ok else reply.outcome}", id=f"{work.seed.id}-{name}")
    jobs = [_document(work, options, told, idea, f"{work.seed.id}-{name}-{number}", set(drawn)) for number, idea in enumerate(ideas)]
    return list(await asyncio.gather(*jobs))


async def _document(work: Workings, options: Docs, told: dict, idea: str, id: str, drawn: set[str]) -> list:
    reply = await work.call("document", work.prompts.render("document", idea=idea, **told), max_tokens=options.doc_tokens)
    text = reply.text.strip()
    trail = [*work.trail, {"stage": "idea", "text": idea, "key": ""}, {"stage": "document", "text": "", "key": reply.key}]
    why = work.fault(reply) or ("too short" if len(text.split()) < options.min_words else "")
    why = why or ("" if told["name"].casefold() in text.casefold() else "does not name the agent")
    row = work.row(drawn, id=id, source=f"docs:{told['type']}", trail=trail)
    if why:
        return ["rejected", row | {"messages": work.said(text), "accepted": False, "reason": f"document: {why}"}]
    return ["docs", row | {"text": text}]
