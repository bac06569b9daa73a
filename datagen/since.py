"""An earlier run, read from its journal, and what an edit of SOUL.md touches in it, so that the rest can be kept.

A principle with checks is judged by its checks, so an edit of it touches the rows in which it was broken on the way and
those whose final now fails; one that only a critic can judge touches every row in which a critic judged it. Name, voice and
tools are in every prompt and decide every word, so a change there touches everything.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datagen.journal import Row
from soul.errors import UserError
from soul.spec import Soul, run_checks


@dataclass(frozen=True)
class RowCost:
    """What the calls of one row came to; `usd` is None where any of them told no price."""

    calls: int
    usd: float | None
    prompt_tokens: int
    completion_tokens: int


class Past:
    """A run directory's journal, read from outside: no lock is taken, and another process may be writing it. `run` are the
    facts noted for it. Raises UserError when `directory` holds no journal of a run."""

    def __init__(self, directory: str | Path):
        path = Path(directory) / "journal.sqlite"
        if not path.is_file():
            raise UserError("holds no run", where=directory, fix="Give the --out of an earlier `soulsmith generate`.")
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            found = self._db.execute("SELECT value FROM meta WHERE key = 'run'").fetchone()
        except sqlite3.Error:
            found = None
        if found is None:
            raise UserError("its journal was written by a version that kept no run facts", where=directory, fix="Generate it again.")
        self.run = json.loads(found[0])

    def close(self) -> None:
        self._db.close()

    def rows(self) -> Iterator[Row]:
        """Finished rows of the directory's latest run."""
        query = "SELECT row_id, status, result FROM rows WHERE run = ? ORDER BY row_id"
        for row_id, status, result in self._db.execute(query, (self.run["id"],)):
            yield Row(row_id, status, json.loads(result))

    def costs(self) -> dict[str, RowCost]:
        """By row; a call that two rows share counts for the one that asked first."""
        query = """SELECT row_id, count(*), CASE WHEN count(cost) = count(*) THEN sum(cost) END,
                          total(json_extract(usage, '$.prompt_tokens')), total(json_extract(usage, '$.completion_tokens'))
                   FROM calls WHERE final GROUP BY row_id"""
        return {row[0]: RowCost(row[1], row[2], int(row[3]), int(row[4])) for row in self._db.execute(query)}


@dataclass(frozen=True)
class Edit:
    """The ids of principles that differ between two versions of a SOUL."""

    voice: bool
    changed: frozenset[str]
    added: frozenset[str]
    removed: frozenset[str]

    def __str__(self) -> str:
        parts = ["voice, name or tools changed"] if self.voice else []
        named = {"changed": self.changed, "added": self.added, "removed": self.removed}
        parts += [f"{what}: {', '.join(sorted(ids))}" for what, ids in named.items() if ids]
        return "; ".join(parts) or "nothing changed"


def soul_facts(soul: Soul) -> dict:
    """What a later edit is compared with; kept in the journal of every run."""
    return {"hash": soul.hash, "voice": soul.voice_hash, "principles": {principle.id: principle.hash for principle in soul.principles}}


def edit_of(before: dict, soul: Soul) -> Edit:
    """How `soul` differs from the SOUL of an earlier run, given by its `soul_facts`."""
    old, new = before["principles"], soul_facts(soul)["principles"]
    return Edit(
        before["voice"] != soul.voice_hash,
        frozenset(name for name in old.keys() & new.keys() if old[name] != new[name]),
        frozenset(new.keys() - old.keys()), frozenset(old.keys() - new.keys()),
    )  # fmt: skip


def touched(row: Row, edit: Edit, soul: Soul) -> str:
    """Why a finished row must be made again under the edited SOUL, or "" when it stands."""
    if edit.voice:
        return "voice"
    if row.status != "finished":
        return "not finished"
    results = [result for _, result in row.results]
    involved = {name for result in results for name in result.get("principles", ())}
    involved |= {name for result in results for name in str(result.get("reason", "")).partition(": ")[2].split(", ")}
    if hit := sorted(involved & (edit.changed | edit.removed)):
        return f"revised for {hit[0]}"
    fresh = edit.changed | edit.added
    finals = [result["messages"] for result in results if result.get("messages")]
    finals += [[*result["prompt"], *result["chosen"]] for result in results if result.get("chosen")]
    if broken := sorted({fault.principle for messages in finals for fault in run_checks(soul, messages)} & fresh):
        return f"now fails {broken[0]}"
    critiques = [step["text"] for result in results for step in result.get("trail", ()) if step["stage"].startswith("critique")]
    unverified = fresh & {principle.id for principle in soul.unverified}
    judged = sorted(name for name in unverified if critiques and (name in edit.added or any(f'"{name}"' in text for text in critiques)))
    return f"critic must judge {judged[0]}" if judged else ""


def split(rows: Iterable[Row], edit: Edit, soul: Soul) -> tuple[list[str], dict[str, str]]:
    """(ids of the rows that stand, why each of the others does not)."""
    kept, again = [], {}
    for row in rows:
        if why := touched(row, edit, soul):
            again[row.row_id] = why
        else:
            kept.append(row.row_id)
    return kept, again


def counted(again: dict[str, str]) -> list[str]:
    return [f"{count:,} rows: {why}" for why, count in Counter(again.values()).most_common()]


def check_same_setup(before: dict, now: dict, where: object) -> None:
    """Raises UserError unless the earlier run differs from this one in its SOUL alone."""
    if changed := sorted(name for name in now if before.get(name) != now[name]):
        fix = "Keep rows only under the same settings, or leave --since out and generate all of them."
        raise UserError(f"that run was made with another {', '.join(changed)}", where=where, fix=fix)


def marked(row: Row, run: object, soul_hash: str) -> list:
    """The results of a kept row, each with a step in its trail that says where it came from."""
    step = {"stage": "kept", "text": f"from {run}, made under SOUL {soul_hash[:12]}", "key": ""}
    return [[kind, result | {"trail": [*result.get("trail", ()), step]}] for kind, result in row.results]
