"""The journal: one SQLite file per run directory, and the only authority on what was asked, answered and finished.

An answer is committed before it is used, so a kill at any byte costs at most the calls in flight. Commits are grouped
(5 ms) because one fsync serves every answer that is waiting; texts of 200 characters and more are stored once, by
hash, since every request of a run repeats the SOUL. One process writes: the run directory is locked.
"""

import asyncio
import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datagen.wire import Answer, Request, Verdict
from soul.errors import UserError
from soul.files import canonical_json, disk_error, sha256_json

SCHEMA = """
CREATE TABLE IF NOT EXISTS blobs (hash TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, stage TEXT, row_id TEXT, base_url TEXT, replicate INTEGER, request TEXT, status INTEGER, response TEXT,
    outcome TEXT, final INTEGER, usage TEXT, cost REAL, model TEXT, provider TEXT, attempts INTEGER, created REAL);
CREATE TABLE IF NOT EXISTS rows (row_id TEXT, run TEXT, status TEXT, result TEXT, created REAL, PRIMARY KEY (row_id, run)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS plan (ordinal INTEGER PRIMARY KEY, row_id TEXT UNIQUE);
PRAGMA user_version = 1;
"""
COMMIT_WINDOW_S = 0.005
BLOB_CHARS = 200


@dataclass(frozen=True)
class Row:
    """A finished row: `results` are [kind, row] pairs as the recipe returned them."""

    row_id: str
    status: str
    results: list


class Journal:
    """Opens (and creates) `directory/journal.sqlite` and holds the directory's lock until `close`.

    Raises:
        UserError: when another process holds the run directory, the disk is full, or the file is no journal.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.path = self.directory / "journal.sqlite"
        self._lock = _lock(self.directory)
        self._waiter: asyncio.Future | None = None
        try:
            with self._guard():
                self._db = sqlite3.connect(self.path, timeout=10)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                    self._db.executescript(SCHEMA)
        except UserError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        try:
            with self._guard():
                self._db.commit()
                self._db.close()
        finally:
            os.close(self._lock)

    # --- calls

    def reply(self, key: str) -> Answer | None:
        """The final answer kept for `key`; None when it must be asked."""
        found = self._one("SELECT status, response FROM calls WHERE key = ? AND final", key)
        return Answer(*found) if found else None

    def record(self, request: Request, answer: Answer, verdict: Verdict, *, stage: str, row_id: str) -> None:
        """Write one attempt down (not yet durable). Attempts and known costs of one key add up over retries and runs."""
        usage = json.dumps(verdict.usage) if verdict.usage else None
        body = answer.body if verdict.final else answer.body[:2000]
        values = (
            request.key, stage, row_id, request.base_url, request.replicate, self._pack(request.body), answer.status, body, verdict.outcome,
            verdict.final, usage, verdict.cost, verdict.model, verdict.provider, 0 if verdict.free else 1, time.time(),
        )  # fmt: skip
        with self._guard():
            self._db.execute(
                f"""INSERT INTO calls VALUES ({",".join("?" * len(values))}) ON CONFLICT (key) DO UPDATE SET
                    status = excluded.status, response = excluded.response, outcome = excluded.outcome, final = excluded.final,
                    usage = excluded.usage, model = excluded.model, provider = excluded.provider, attempts = attempts + excluded.attempts,
                    cost = CASE WHEN cost IS NULL THEN excluded.cost ELSE cost + coalesce(excluded.cost, 0) END""",
                values,
            )

    def request(self, key: str) -> Request | None:
        """The request behind `key`, exactly as it was sent."""
        found = self._one("SELECT base_url, request, replicate FROM calls WHERE key = ?", key)
        return Request(found[0], self._unpack(found[1]), found[2]) if found else None

    def ledger(self) -> list[dict]:
        """Calls, attempts, tokens and cost by stage, model, provider and outcome. `cost` is None where none was told."""
        with self._guard():
            cursor = self._db.execute(
                """SELECT stage, model, provider, outcome, count(*) AS calls, sum(attempts) AS attempts, sum(cost) AS cost,
                          count(cost) AS priced, sum(json_extract(usage, '$.prompt_tokens')) AS prompt_tokens,
                          sum(json_extract(usage, '$.completion_tokens')) AS completion_tokens
                   FROM calls GROUP BY stage, model, provider, outcome ORDER BY stage, model, provider, outcome"""
            )
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, values, strict=True)) for values in cursor]

    # --- rows

    def plan(self, row_ids: Iterable[str]) -> int:
        """Replace the list of rows this run is about, in seed order; gives how many were there twice."""
        with self._guard():
            self._db.execute("DELETE FROM plan")
            twice = 0
            for ordinal, row_id in enumerate(row_ids):
                twice += 1 - self._db.execute("INSERT OR IGNORE INTO plan VALUES (?, ?)", (ordinal, row_id)).rowcount
            self._db.commit()
        return twice

    def planned(self) -> int:
        return self._one("SELECT count(*) FROM plan")[0]

    def row(self, row_id: str, run: str) -> Row | None:
        found = self._one("SELECT row_id, status, result FROM rows WHERE row_id = ? AND run = ?", row_id, run)
        return Row(found[0], found[1], json.loads(found[2])) if found else None

    def finish(self, row_id: str, run: str, status: str, results: list) -> None:
        """Write a finished row down (not yet durable)."""
        with self._guard():
            values = (row_id, run, status, canonical_json(results), time.time())
            self._db.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", values)

    def reopen_failed(self, run: str) -> int:
        """Open the rows of `run` whose calls failed, and the requests that were refused for good; gives the rows' number."""
        with self._guard():
            count = self._db.execute("DELETE FROM rows WHERE run = ? AND status = 'failed'", (run,)).rowcount
            self._db.execute("UPDATE calls SET final = 0 WHERE outcome = 'permanent'")
            self._db.commit()
            return count

    def rows(self, run: str) -> Iterator[Row]:
        """Finished rows of `run` that are in the plan, in seed order."""
        with self._guard():
            cursor = self._db.execute(
                "SELECT rows.row_id, status, result FROM plan JOIN rows USING (row_id) WHERE run = ? ORDER BY ordinal", (run,)
            )
            for row_id, status, result in cursor:
                yield Row(row_id, status, json.loads(result))

    # --- durability

    async def durable(self) -> None:
        """Return once everything written so far is on disk; calls that wait together share one commit."""
        if self._waiter is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            loop.call_later(COMMIT_WINDOW_S, self._flush)
        await asyncio.shield(self._waiter)

    def _flush(self) -> None:
        waiter, self._waiter = self._waiter, None
        try:
            self.commit()
        except UserError as error:
            waiter.set_exception(error)
        else:
            waiter.set_result(None)

    def commit(self) -> None:
        with self._guard():
            self._db.commit()

    # --- inside

    def _one(self, query: str, *values: object) -> tuple | None:
        with self._guard():
            return self._db.execute(query, values).fetchone()

    def _pack(self, body: str) -> str:
        data = json.loads(body)
        for message in data.get("messages", ()):
            text = message.get("content")
            if isinstance(text, str) and len(text) >= BLOB_CHARS:
                digest = sha256_json(text)
                with self._guard():
                    self._db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, text))
                message["content"] = {"blob": digest}
        return canonical_json(data)

    def _unpack(self, packed: str) -> str:
        data = json.loads(packed)
        for message in data.get("messages", ()):
            if isinstance(message.get("content"), dict) and "blob" in message["content"]:
                message["content"] = self._one("SELECT text FROM blobs WHERE hash = ?", message["content"]["blob"])[0]
        return canonical_json(data)

    @contextmanager
    def _guard(self):
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "") or ""
            if code.startswith("SQLITE_FULL") or (code.startswith("SQLITE_IOERR") and _disk_is_full(self.directory)):
                raise disk_error(OSError(errno.ENOSPC, "full"), self.path) from error
            if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
                raise UserError(f"is not a readable journal ({error})", where=self.path, fix="Move it away to start over.") from error
            raise UserError(f"the journal cannot be used: {error}", where=self.path) from error


def _lock(directory: Path) -> int:
    """Take the run directory for this process; the lock goes with the process, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / "journal.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(error, directory) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        what = f"another process (pid {holder}) is working in this run directory"
        raise UserError(what, where=directory, fix="Wait for it, or choose another --out.") from None
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle


def _disk_is_full(directory: Path) -> bool:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize < 1 << 20
