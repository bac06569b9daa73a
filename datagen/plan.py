"""`soulsmith plan`: what a run will cost and how long it takes, from a pilot of a few of its rows; and what an edit touches.

The pilot's rows are rows of the run itself, kept in its journal: `soulsmith generate` with the same settings doesn't ask again.
`soulsmith rollouts --pilot` prices its scenarios in the same way.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Annotated

import tyro

from datagen import since
from datagen.generate import Config as Generate
from datagen.generate import Session, command, compute, plan_rows, prepare
from datagen.journal import Journal
from datagen.seeds import Seed
from datagen.since import Past, RowCost
from soul.console import console, output, plain
from soul.files import sha256_json, write_json

SURE = 0.9  # of the intervals


@dataclass(frozen=True)
class Config:
    """Price a run before it starts. Takes the settings of `generate`; with --since, also says which rows an edit of the SOUL touches."""

    run: Annotated[Generate, tyro.conf.arg(name="")]
    pilot: int = 20
    """Rows to compute now, drawn from all of them; 0 asks nothing and only counts."""


def total(sample: list[float], rows: int) -> dict[str, float]:
    """What `rows` more rows come to (value, low, high), by a sample of such rows: the predictive interval of a sum, with Student's t.

    The mean is uncertain by sd/√n and the rows still to come scatter by sd·√rows; a lone sample tells no spread.
    """
    from scipy.stats import t

    centre, n, half = mean(sample) * rows, len(sample), 0.0
    if n > 1 and rows:
        half = t.ppf((1 + SURE) / 2, n - 1) * stdev(sample) * sqrt(rows * rows / n + rows)
    return {"value": centre, "low": max(0.0, centre - half), "high": centre + half}


def draw(ids: list[str], n: int) -> set[str]:
    """n of the ids, spread by hash: the first rows of a file are often of one kind."""
    return set(sorted(ids, key=lambda row_id: sha256_json(["pilot", row_id]))[:n])


def main(config: Config) -> int:
    session = prepare(config.run)
    with closing(Journal(config.run.out)) as journal:
        plan_rows(session, journal)
        ids, again = session.ids, None
        if config.run.since:
            ids, again = _touched(session, ids)
        if not price(session, journal, session.seeds(), ids, config.pilot, touched=again):
            return 130
    output.print(plain(f"then: {command(config.run)}"))
    return 0


def price(session: Session, journal: Journal, seeds: Iterable[Seed], ids: list[str], pilot: int, **facts) -> bool:
    """Compute `pilot` of the rows `ids`, and tell what the rest will take, also in OUT/plan.json, with `facts`. False after Ctrl-C."""
    chosen, seconds = draw(ids, pilot), {}
    some = (seed for seed in seeds if seed.id in chosen)
    if chosen and not asyncio.run(compute(session, journal, some, "pilot", len(chosen), timed(session.recipe, seconds))):
        console.print("stopped; the pilot's answers are kept")
        return False
    with closing(Past(session.config.out)) as past:
        costs = past.costs()
    open_rows = sum(journal.row(row_id, session.run_id) is None for row_id in ids)
    sample = [costs[row_id] for row_id in ids if row_id in costs]
    told = forecast(sample, list(seconds.values()), open_rows, session.config.concurrency or session.teachers["teacher"].concurrency)
    write_json(session.config.out / "plan.json", {"rows": len(ids), "open": open_rows, **facts, **told})
    for text in lines(told, len(ids), open_rows, len(sample)):
        output.print(plain(text))
    return True


def timed(recipe: Callable, seconds: dict[str, float], clock=time.monotonic) -> Callable:
    """`recipe`, noting how long each row takes."""

    async def observed(seed, call):
        began = clock()
        results = await recipe(seed, call)
        seconds[seed.id] = clock() - began
        return results

    return observed


def forecast(sample: list[RowCost], seconds: list[float], rows: int, concurrency: int) -> dict:
    """Estimates for `rows` rows still open, as plain values: usd, prompt_tokens, completion_tokens, minutes; None where unknown."""
    told: dict = dict.fromkeys(("usd", "prompt_tokens", "completion_tokens", "minutes"))
    if sample:
        if all(cost.usd is not None for cost in sample):
            told["usd"] = total([cost.usd for cost in sample], rows)
        for name in ("prompt_tokens", "completion_tokens"):
            told[name] = total([getattr(cost, name) for cost in sample], rows)
    if seconds and rows:
        parallel = 60 * min(concurrency, rows)
        told["minutes"] = {name: value / parallel for name, value in total(seconds, rows).items()}
    return told


def lines(told: dict, rows: int, open_rows: int, sampled: int) -> list[str]:
    """What a person reads."""
    shown = [f"{rows:,} rows, {open_rows:,} still to make; estimates from {sampled:,} rows, {SURE:.0%} intervals"]
    forms = {"usd": "${:,.2f}", "prompt_tokens": "{:,.0f}", "completion_tokens": "{:,.0f}", "minutes": "{:,.1f}"}
    for name, form in forms.items():
        if found := told[name]:
            value, low, high = (form.format(found[part]) for part in ("value", "low", "high"))
            label = "cost" if name == "usd" else name.replace("_", " ")
            shown.append(f"  {label:<18} {value}  [{low} to {high}]")
        elif name == "usd" and sampled:
            shown.append("  cost               unknown: this teacher tells no price (give --price IN OUT, in USD per million tokens)")
    return shown


def _touched(session: Session, ids: list[str]) -> tuple[list[str], dict[str, str]]:
    """The rows to make again under the edited SOUL, of those planned, with reasons; and it prints them."""
    with closing(Past(session.config.since)) as past:
        since.check_same_setup(past.run["setup"], session.setup, session.config.since)
        edit = since.edit_of(past.run["soul"], session.soul)
        kept, again = since.split(past.rows(), edit, session.soul)
        spent = past.costs()
    stand = set(kept)
    todo = {row_id: again.get(row_id, "new") for row_id in ids if row_id not in stand}
    output.print(plain(f"since {session.config.since}: {edit}"))
    output.print(plain(f"{len(ids) - len(todo):,} rows stand, {len(todo):,} are to be made again"))
    for text in since.counted(todo):
        output.print(plain(f"  {text}"))
    known = [spent[row_id].usd for row_id in todo if row_id in spent]
    if known and None not in known:
        output.print(plain(f"  they cost ${sum(known):,.4f} the first time"))
    return list(todo), todo
