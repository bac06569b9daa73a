"""A run directory's journal, read from outside: no lock is taken, and another process may be writing it."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datagen.journal import Row
from soul.errors import UserError


@dataclass(frozen=True)
class RowCost:
    """What the calls of one row came to; `usd` is None where any of them told no price."""

    calls: int
    usd: float | None
    prompt_tokens: int
    completion_tokens: int


class Past:
    """Raises UserError when `directory` holds no journal of a run."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / "journal.sqlite"
        if not path.is_file():
            raise UserError("holds no run", where=directory, fix="Give the --out of an earlier `soulsmith generate`.")
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        self.run = self.noted("run")
        if self.run is None:
            raise UserError("its journal was written by a version that kept no run facts", where=directory, fix="Generate it again.")

    def close(self) -> None:
        self._db.close()

    def noted(self, key: str):
        try:
            found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
        return json.loads(found[0]) if found else None

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
