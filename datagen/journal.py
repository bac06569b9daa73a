"""The journal: one SQLite file per run directory, and the only authority on what was asked, answered and finished.

An answer is committed before it is used, so a kill at any byte costs at most the calls in flight. Commits are grouped
(5 ms at least) because one fsync serves every answer that is waiting; texts of 200 characters and more are stored once, by
hash, since every request of a run repeats the SOUL. One process writes: the run directory is locked.
"""

import asyncio
import errno
import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datagen.wire import Answer, Request, Verdict
from soul.errors import UserError
from soul.files import canonical_json, disk_error, sha256_json

VERSION = 2
SCHEMAS = {  # user_version -> what makes the next one of it; old data stays
    0: """
CREATE TABLE blobs (hash TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (
    key TEXT PRIMARY KEY, stage TEXT, row_id TEXT, base_url TEXT, replicate INTEGER, request TEXT, status INTEGER, response TEXT,
    outcome TEXT, final INTEGER, usage TEXT, cost REAL, model TEXT, provider TEXT, attempts INTEGER, created REAL);
CREATE TABLE rows (row_id TEXT, run TEXT, status TEXT, result TEXT, created REAL, PRIMARY KEY (row_id, run)) WITHOUT ROWID;
CREATE TABLE plan (ordinal INTEGER PRIMARY KEY, row_id TEXT UNIQUE);
""",
    1: """
ALTER TABLE calls ADD COLUMN served TEXT;
ALTER TABLE calls ADD COLUMN charged REAL;
UPDATE calls SET charged = cost;
CREATE TABLE flying (id INTEGER PRIMARY KEY, stage TEXT, usd REAL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
""",
}
COMMIT_WINDOW_S = 0.005
BLOB_CHARS = 200


@dataclass(frozen=True)
class Row:
    """A finished row: `results` are [kind, row] pairs as the recipe returned them."""

    row_id: str
    status: str
    results: list


class Journal:
    """Opens (and creates) `directory/journal.sqlite` and holds the directory's lock until `close`. Raises UserError when
    another process holds the run directory, the disk is full, or the file is no journal."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.path = self.directory / "journal.sqlite"
        self._lock = _lock(self.directory)
        self._waiter: asyncio.Future | None = None
        self._then: list[Callable[[], None]] = []
        self._took = 0.0
        self._stored = lru_cache(64)(self._store)
        try:
            with self._guard():
                self._db = sqlite3.connect(self.path, timeout=10)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._migrate()
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

    def record(self, request: Request, answer: Answer, verdict: Verdict, *, stage: str, row_id: str, charged: float | None = None,
               flight: int | None = None) -> None:  # fmt: skip
        """Write one attempt down (not yet durable). Attempts and known costs of one key add up over retries and runs. `charged`
        is its share of the budget in USD: its cost, or what was reserved where that is unknown; `flight` what `sending` gave."""
        usage = json.dumps(verdict.usage) if verdict.usage else None
        body = answer.body if verdict.final else answer.body[:2000]
        charged = verdict.cost if charged is None else charged
        values = (
            request.key, stage, row_id, request.base_url, request.replicate, self._pack(request.body), answer.status, body, verdict.outcome,
            verdict.final, usage, verdict.cost, verdict.model, verdict.provider, 0 if verdict.free else 1, time.time(), verdict.served, charged,
        )  # fmt: skip
        with self._guard():
            self._db.execute(
                f"""INSERT INTO calls VALUES ({",".join("?" * len(values))}) ON CONFLICT (key) DO UPDATE SET
                    status = excluded.status, response = excluded.response, outcome = excluded.outcome, final = excluded.final,
                    usage = excluded.usage, model = excluded.model, provider = excluded.provider, attempts = attempts + excluded.attempts,
                    served = excluded.served, cost = coalesce(cost + excluded.cost, cost, excluded.cost),
                    charged = coalesce(charged + excluded.charged, charged, excluded.charged)""",
                values,
            )
            if flight is not None:
                self._db.execute("DELETE FROM flying WHERE id = ?", (flight,))

    def sending(self, stage: str, usd: float) -> int:
        """Note that a call which may cost up to `usd` goes out: one that a kill cuts off stays in `spent`, it may be billed."""
        flight = self._do("INSERT INTO flying (stage, usd) VALUES (?, ?)", stage, usd).lastrowid
        self.soon()
        return flight

    def spent(self) -> float:
        """What the calls of this directory have been charged so far, in USD: over all runs, those in flight or cut off too."""
        return self._one("SELECT (SELECT total(charged) FROM calls) + (SELECT total(usd) FROM flying)")[0]

    def request(self, key: str) -> Request | None:
        """The request behind `key`, exactly as it was sent."""
        found = self._one("SELECT base_url, request, replicate FROM calls WHERE key = ?", key)
        return Request(found[0], self._unpack(found[1]), found[2]) if found else None

    def ledger(self) -> list[dict]:
        """Calls, attempts, tokens and money (USD) by stage, model, provider, served route and outcome ("unanswered": in flight, or
        cut off by a kill). `cost` is what was told, None where nothing was; `charged` adds what had to be assumed: the `spent`."""
        with self._guard():
            cursor = self._db.execute(
                """SELECT stage, model, provider, served, outcome, count(*) AS calls, sum(attempts) AS attempts, sum(cost) AS cost,
                          count(cost) AS priced, sum(charged) AS charged, sum(json_extract(usage, '$.prompt_tokens')) AS prompt_tokens,
                          sum(json_extract(usage, '$.completion_tokens')) AS completion_tokens
                   FROM calls GROUP BY stage, model, provider, served, outcome
                   UNION ALL SELECT stage, NULL, NULL, NULL, 'unanswered', count(*), count(*), NULL, 0, sum(usd), NULL, NULL
                   FROM flying GROUP BY stage ORDER BY 1, 2, 3, 4, 5"""
            )
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, values, strict=True)) for values in cursor]

    # --- facts

    def note(self, key: str, value: object) -> None:
        """Keep a fact of the run directory as JSON; it is durable on return."""
        self._do("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, canonical_json(value))
        self.commit()

    def noted(self, key: str) -> object:
        """The fact kept under `key`, or None."""
        found = self._one("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0]) if found else None

    # --- rows

    def plan(self, row_ids: Iterable[str]) -> int:
        """Replace the list of rows this run is about, in seed order; gives how many were there twice."""
        with self._guard():
            self._db.execute("DELETE FROM plan")
            counted = 0
            self._db.executemany(
                "INSERT OR IGNORE INTO plan VALUES (?, ?)", ((counted := n, row_id) for n, row_id in enumerate(row_ids, 1))
            )
            self._db.commit()
        return counted - self.planned()

    def planned(self) -> int:
        return self._one("SELECT count(*) FROM plan")[0]

    def row(self, row_id: str, run: str) -> Row | None:
        found = self._one("SELECT row_id, status, result FROM rows WHERE row_id = ? AND run = ?", row_id, run)
        return Row(found[0], found[1], json.loads(found[2])) if found else None

    def finish(self, row_id: str, run: str, status: str, results: list) -> None:
        """Write a finished row down (not yet durable)."""
        self._do("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", row_id, run, status, canonical_json(results), time.time())

    def reopen_failed(self, run: str) -> int:
        """Open the rows of `run` whose calls failed, and the requests that were refused for good; gives the rows' number."""
        self._do("UPDATE calls SET final = 0 WHERE outcome = 'permanent'")
        return self._reopen(run, "failed")

    def redo_truncated(self, run: str) -> int:
        """Open the rows of `run` that had an answer cut at max_tokens; gives their number. Their calls replay, and
        `Policy.redo_truncated` has the engine ask those that were cut again, with more tokens."""
        return self._reopen(run, "truncated")

    def _reopen(self, run: str, status: str) -> int:
        count = self._do("DELETE FROM rows WHERE run = ? AND status = ?", run, status).rowcount
        self.commit()
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

    async def durable(self, then: Callable[[], None] = lambda: None) -> None:
        """Return once everything written so far is on disk; calls that wait together share one commit. `then` is called right
        at the commit (unless it fails), before anyone who waits goes on: leases that end there let the next calls be sent
        before the rows of a whole burst of answers are finished."""
        self._then.append(then)
        await asyncio.shield(self.soon())

    def soon(self) -> asyncio.Future:
        """See to it that what was written so far is on disk soon; the future says when."""
        if self._waiter is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self._waiter.add_done_callback(lambda done: done.exception())  # it need not be awaited
            loop.call_later(max(COMMIT_WINDOW_S, min(0.5, 4 * self._took)), self._flush, loop.time)
        return self._waiter

    def _flush(self, clock: Callable[[], float]) -> None:
        waiter, self._waiter, start = self._waiter, None, clock()
        then, self._then = self._then, []
        try:
            self.commit()
        except UserError as error:
            waiter.set_exception(error)
        else:
            for call in then:
                call()
            waiter.set_result(None)
        self._took = clock() - start  # on a slow disk commits get rarer, so that they never take more than a fifth of the time

    def commit(self) -> None:
        with self._guard():
            self._db.commit()

    # --- inside

    def _do(self, query: str, *values: object) -> sqlite3.Cursor:
        with self._guard():
            return self._db.execute(query, values)

    def _one(self, query: str, *values: object) -> tuple | None:
        return self._do(query, *values).fetchone()

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise UserError("was written by a newer soulsmith", where=self.path, fix="Update soulsmith, or choose another --out.")
        if version < VERSION:
            steps = "".join(SCHEMAS[n] for n in range(version, VERSION))
            self._db.executescript(f"BEGIN; {steps} PRAGMA user_version = {VERSION}; COMMIT;")

    def _pack(self, body: str) -> str:
        data = json.loads(body)
        for place, name in _long(data):
            kind, text = ("blob", place[name]) if isinstance(place[name], str) else ("json", canonical_json(place[name]))
            if len(text) >= BLOB_CHARS:
                place[name] = {kind: self._stored(text)}
        return canonical_json(data)

    def _unpack(self, packed: str) -> str:
        data = json.loads(packed)
        for place, name in _long(data):
            if isinstance(place[name], dict) and (hashed := place[name].get("blob") or place[name].get("json")):
                text = self._one("SELECT text FROM blobs WHERE hash = ?", hashed)[0]
                place[name] = text if "blob" in place[name] else json.loads(text)
        return canonical_json(data)

    def _store(self, text: str) -> str:
        digest = sha256_json(text)
        self._do("INSERT OR IGNORE INTO blobs VALUES (?, ?)", digest, text)
        return digest

    @contextmanager
    def _guard(self):
        try:
            yield
        except sqlite3.Error as error:
            self._stored.cache_clear()  # what was stored may have been rolled back
            code = getattr(error, "sqlite_errorname", "") or ""
            if code.startswith("SQLITE_FULL") or (code.startswith("SQLITE_IOERR") and shutil.disk_usage(self.directory).free < 1 << 20):
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


def _long(data: dict) -> list[tuple[dict, str]]:
    """The places of a body that hold long texts which calls share."""
    contents = [(message, "content") for message in data.get("messages", ()) if "content" in message]
    return contents + [(data, name) for name in ("tools", "response_format") if name in data]
