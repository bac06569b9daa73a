"""From the journal to a dataset: three Parquet files, stats.json and a card. The same journal gives the same bytes."""

from collections import Counter
from pathlib import Path
from statistics import mean, median

from datagen.card import card
from datagen.journal import Journal
from soul.files import write_atomic, write_json
from soul.rows import KINDS, write_rows
from soul.spec import Soul


def export(journal: Journal, run_id: str, folder: Path, soul: Soul, facts: dict) -> dict:
    """Write `folder`/{sft,preference,rejected}.parquet, stats.json and README.md, rows in seed order; gives the stats.

    `facts` (teacher, command, hashes …) go into stats and card as they are.
    """
    rows: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for finished in journal.rows(run_id):
        for kind, row in finished.results:
            rows[kind].append(row)
    stats = facts | {"seeds": journal.planned()} | summary(rows, soul) | {"ledger": journal.ledger()}
    priced = [entry["cost"] for entry in stats["ledger"] if entry["cost"] is not None]
    stats["cost_usd"] = round(sum(priced), 6) if priced else None
    for kind in KINDS:
        write_rows(folder / f"{kind}.parquet", rows[kind], kind)
    write_json(folder / "stats.json", stats)
    write_atomic(folder / "README.md", card(stats, soul))
    return stats


def summary(rows: dict[str, list[dict]], soul: Soul) -> dict:
    """Yields, reasons of rejection, what each principle saw, lengths in words, and how often each step was taken."""
    accepted = [*rows["sft"], *rows["rejected"]]
    blocked = Counter(name for row in rows["rejected"] for name in row["reason"].partition(": ")[2].split(", "))
    touched = Counter(name for row in rows["sft"] for name in row["principles"])
    pairs = Counter(name for row in rows["preference"] for name in row["principles"])
    steps = [step for row in accepted for step in row.get("trail", ())]
    repaired = Counter(name for step in steps if step["stage"] == "repair" for name in step["text"].split(", "))
    principles = {
        p.id: {"checks": [str(call) for call in p.checks], "broken_on_the_way": touched[p.id], "repaired": repaired[p.id],
               "pairs": pairs[p.id], "blocked": blocked[p.id]}
        for p in soul.principles
    }  # fmt: skip
    return {
        "rows": {kind: len(rows[kind]) for kind in KINDS},
        "reasons": dict(Counter(row["reason"].partition(" (")[0] for row in rows["rejected"]).most_common()),
        "principles": principles,
        "stages": dict(sorted(Counter(step["stage"] for step in steps).items())),
        "words": {
            "sft": _lengths([row["messages"][-1]["content"] for row in rows["sft"]]),
            "chosen": _lengths([row["chosen"][-1]["content"] for row in rows["preference"]]),
            "rejected": _lengths([row["rejected"][-1]["content"] for row in rows["preference"]]),
        },
    }


def _lengths(texts: list[str]) -> dict | None:
    counts = [len(text.split()) for text in texts]
    return {"mean": round(mean(counts), 1), "median": median(counts), "max": max(counts)} if counts else None
