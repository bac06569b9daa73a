"""From the journal to a dataset: Parquet files, stats.json and a card. The same journal gives the same bytes.

Rows are streamed from the journal's cursor into row groups, so 100,000 of them take no more memory than 2,000.
"""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from datagen.card import card
from datagen.hygiene import Hygiene
from datagen.journal import Journal
from datagen.seeds import aims
from soul.files import write_atomic, write_json
from soul.rows import KINDS, row_writer
from soul.spec import Soul

GROUP = 2_000  # rows of a row group


def export(journal: Journal, run_id: str, folder: Path, soul: Soul, facts: dict) -> dict:
    """Write `folder`/{sft,preference,rejected}.parquet (docs.parquet if there are any), stats.json and README.md, rows in seed
    order; gives the stats. `facts` (teacher, command, hashes …) go into stats and card as they are."""
    tally, waiting = Tally(soul), {kind: [] for kind in KINDS}
    with ExitStack() as files:
        write = {kind: files.enter_context(row_writer(folder / f"{kind}.parquet", kind)) for kind in KINDS}
        for finished in journal.rows(run_id):
            tally.add(finished.results)
            for kind, row in finished.results:
                waiting[kind].append(row)
                if len(waiting[kind]) == GROUP:
                    write[kind](waiting[kind])
                    waiting[kind] = []
        for kind, rest in waiting.items():
            if rest:
                write[kind](rest)
    if not tally.rows["docs"]:
        (folder / "docs.parquet").unlink(missing_ok=True)
    stats = facts | {"seeds": journal.planned()} | tally.summary() | {"ledger": journal.ledger()}
    priced = [entry["cost"] for entry in stats["ledger"] if entry["cost"] is not None]
    stats["cost_usd"] = round(sum(priced), 6) if priced else None
    write_json(folder / "stats.json", stats)
    write_atomic(folder / "README.md", card(stats, soul))
    return stats


class Tally:
    """Counts over the results of seeds, one at a time; a row may lack every column but its text."""

    def __init__(self, soul: Soul):
        self.soul, self.hygiene = soul, Hygiene(soul)
        self.rows, self.reasons, self.no_pair, self.stages, self.served, self.seen = (Counter() for _ in range(6))
        self.principles = {name: Counter() for name in ("broken_on_the_way", "repaired", "pairs", "blocked", "aimed")}
        self.lengths = {name: Counter() for name in ("sft", "chosen", "rejected", "docs")}

    def add(self, results: list) -> None:
        """What one seed came to."""
        for kind, row in results:
            names = row.get("principles") or ()
            self.rows[kind] += 1
            self.served.update(row.get("served") or ())
            if kind != "rejected":
                self.seen.update([*names, *aims(row.get("source") or "")])
            if kind == "sft":
                self.principles["broken_on_the_way"].update(names)
                self._length("sft", row["messages"][-1]["content"])
            elif kind == "preference":
                self.principles["pairs"].update(names)
                self.hygiene.add(row)
                for side in ("chosen", "rejected"):
                    self._length(side, row[side][-1]["content"])
            elif kind == "docs":
                self._length("docs", row["text"])
            else:
                reason = row.get("reason") or "no reason given"
                self.reasons[reason.partition(" (")[0]] += 1
                self.principles["blocked"].update(reason.partition(": ")[2].split(", "))
        self.principles["aimed"].update({name for _, row in results for name in aims(row.get("source") or "")})
        self._steps(results)

    def _steps(self, results: list) -> None:
        """Rows of one seed may share their trail, or a part of it: each call counts once."""
        trails = {str(trail): trail for _, row in results if (trail := row.get("trail"))}
        steps = [step for trail in trails.values() for step in trail]
        called = {step["key"]: step for step in steps if step.get("key")}
        for step in [*called.values(), *(step for step in steps if not step.get("key"))]:
            self.stages[step["stage"]] += 1
            if step["stage"] == "no-pair":
                self.no_pair[step["text"]] += 1
            elif step["stage"] == "repair":
                self.principles["repaired"].update(step["text"].split(", "))

    def _length(self, name: str, text: str) -> None:
        self.lengths[name][len(text.split())] += 1

    def summary(self) -> dict:
        """Yields, reasons, what each principle saw, lengths in words, how often each step was taken, and pair hygiene."""
        principles = {
            p.id: {"checks": [str(call) for call in p.checks]} | {name: counts[p.id] for name, counts in self.principles.items()}
            for p in self.soul.principles
        }
        hygiene = self.hygiene.report()
        return {
            "rows": {kind: self.rows[kind] for kind in KINDS if self.rows[kind] or kind != "docs"},
            "reasons": dict(self.reasons.most_common()),
            "no_pair": dict(self.no_pair.most_common()),
            "principles": principles,
            "gaps": [p.id for p in self.soul.principles if not self.seen[p.id]],
            "stages": dict(sorted(self.stages.items())),
            "served": dict(self.served.most_common()),
            "words": {name: lengths for name in self.lengths if (lengths := _lengths(self.lengths[name])) or name != "docs"},
            "hygiene": hygiene,
            "warnings": hygiene["warnings"] if hygiene else [],
        }


def _lengths(counts: Counter) -> dict | None:
    """Mean, median (the lower one) and greatest of counted lengths."""
    if not (total := counts.total()):
        return None
    left, middle = (total + 1) // 2, 0
    for middle in sorted(counts):
        if (left := left - counts[middle]) <= 0:
            break
    return {"mean": round(sum(n * count for n, count in counts.items()) / total, 1), "median": middle, "max": max(counts)}
