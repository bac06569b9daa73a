"""`soulsmith seeds`: the teacher writes requests aimed at each principle of a SOUL.

On-topic (it matters), near-miss (it only seems to), conflict (two principles pull apart) and off-topic (control). Calls go
through the engine and a journal beside the file, so stopping loses nothing and no call is paid for twice.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, combinations, cycle, islice, zip_longest
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from datagen.budget import Budget
from datagen.critique import LIST_SCHEMA, Unreadable, parse_list, recites
from datagen.dedup import clean, texts
from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.seeds import Seed
from datagen.teachers import Teacher, open_teacher
from datagen.wire import WIRE_VERSION
from soul import conversation
from soul.console import console, plain, progress
from soul.errors import UserError
from soul.files import sha256_json, write_atomic
from soul.spec import Soul, load_soul

CYCLE = ("on-topic", "near-miss", "on-topic", "conflict", "on-topic", "near-miss", "on-topic", "off-topic")
SPARE = 1.25  # asked for, since some are dropped


@dataclass(frozen=True)
class Config:
    """Have a teacher write requests that put each principle of a SOUL to the test; writes OUT as JSON Lines for generate."""

    teacher: str
    """As in generate."""
    file: Annotated[Path, tyro.conf.arg(name="out")]
    """The .jsonl file to write; the journal lies beside it, and the same command again goes on from it."""
    soul: Path = Path("soul/SOUL.md")
    n: int = 200
    """Requests wanted; a quarter more is asked for, since repeated ones are dropped."""
    per_call: int = 8
    """Requests per call: more is cheaper, and more alike."""
    against: tuple[str, ...] = ("held-out",)
    """Files of eval sets, and `held-out` for our own: what shares 13 words in a row with them is dropped."""
    prompts: Path | None = None
    """A folder of templates that replace the built-in ones of the same name."""
    temperature: float = 1.0
    max_tokens: int = 2048
    max_usd: float | None = None
    """Never spend more than this."""
    concurrency: int | None = None
    seed: int = 0
    """Seed of the order of principles."""


class Batch(NamedTuple):
    kind: str
    principles: tuple[str, ...]
    number: int


def plan(soul: Soul, count: int, seed: int = 0) -> list[Batch]:
    """`count` batches: of every eight, four on-topic, two near-miss, one conflict and one control. Principles take turns, for
    near-misses from the other end, so that a short plan reaches more of them."""
    names = [principle.id for principle in soul.principles]
    random.Random(seed).shuffle(names)
    pairs = list(combinations(names, 2))
    random.Random(seed + 1).shuffle(pairs)
    single = [(name,) for name in names]
    turns = {"on-topic": cycle(single), "near-miss": cycle(single[::-1]), "conflict": cycle(pairs or single), "off-topic": cycle([()])}
    return [Batch(kind, next(turns[kind]), number) for number, kind in zip(range(count), cycle(CYCLE))]


def main(config: Config) -> int:
    """Run the command. Raises UserError for bad settings, and as the engine does."""
    if config.n < 1 or config.per_call < 1:
        raise UserError("--n and --per-call begin at 1")
    soul, prompts, against = load_soul(config.soul), Prompts(config.prompts), list(texts(config.against))
    batches = {sha256_json(batch)[:16]: batch for batch in plan(soul, -int(-config.n * SPARE // config.per_call), config.seed)}
    teacher = open_teacher(config.teacher)
    with closing(Journal(config.file.with_suffix(".journal"))) as journal:
        journal.plan(batches)
        sampling = {"temperature": config.temperature, "top_p": 1.0, "max_tokens": config.max_tokens}
        run_id = sha256_json([WIRE_VERSION, soul.hash, prompts.hash, config.per_call, teacher.base_url, teacher.name, sampling])
        policy = Policy(concurrency=config.concurrency or teacher.concurrency)
        budget = None if config.max_usd is None else Budget(config.max_usd, journal.spent())
        engine = Engine(teacher, journal, run_id, sampling, policy, budget=budget)
        done = asyncio.run(_ask(engine, teacher, soul, prompts, batches, config.per_call))
        _write(config, soul, [row.results for row in journal.rows(run_id)], against)
    if not done:
        console.print("stopped; the same command goes on from here")
    return 0 if done else 130


async def _ask(engine: Engine, teacher: Teacher, soul: Soul, prompts: Prompts, batches: dict[str, Batch], per_call: int) -> bool:
    async def write(seed: Seed, call) -> list:
        kind, names, number = batches[seed.id]
        asked = {"kind": kind, "principles": [soul.principle(name).text for name in names], "n": per_call, "number": number}
        reply = await call("seeds", prompts.render("seeds", soul=soul.text, **asked), replicate=number, schema=LIST_SCHEMA)
        head = {"id": seed.id, "source": seed.source, "principles": list(names)}
        try:
            return [["sft", head | {"messages": [conversation.user(text)]}] for text in parse_list(reply.text)]
        except Unreadable as problem:
            why = str(problem) if reply.ok else reply.outcome
            return [["rejected", head | {"messages": seed.messages, "accepted": False, "reason": why}]]

    sources = ((id, f"seed:{batch.kind}:{'+'.join(batch.principles)}") for id, batch in batches.items())
    seeds = (Seed(id, [conversation.user(source)], source, source) for id, source in sources)
    try:
        with progress("seeds", len(batches), "calls") as update:
            return await engine.run(seeds, write, lambda: update(engine.counts["rows"], engine.trouble))
    finally:
        await teacher.close()


def _write(config: Config, soul: Soul, results: list[list], against: list[str]) -> None:
    dropped = Counter(f"unreadable ({row['reason']})" for some in results for kind, row in some if kind == "rejected")
    kept = islice(clean(_usable(results, soul, dropped), against, dropped=dropped), config.n)
    rows = [{"prompt": seed.messages[0]["content"], "source": seed.source, "kind": seed.source.split(":")[1]} for seed in kept]
    write_atomic(config.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.print(plain(f"{len(rows)} requests in {config.file}" + "".join(f"; {count} × {why}" for why, count in dropped.items())))


def _usable(results: list[list], soul: Soul, dropped: Counter) -> Iterator[Seed]:
    """Written requests, one of each batch in turn, so that a cut at n takes from all batches alike."""
    ids = [principle.id for principle in soul.principles]
    for row in filter(None, chain(*zip_longest(*([row for kind, row in some if kind == "sft"] for some in results)))):
        if recites(row["messages"][0]["content"], ids):
            dropped["names a principle"] += 1
        else:
            yield Seed("", row["messages"], row["source"], row["source"])
