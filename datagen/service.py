"""A teacher in its role: opened before its first request, judged by its answers, brought back when nobody is there.

Everything that cannot get better by waiting is raised as UserError; the engine stops the run with it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from datagen.admission import Admission, Lease
from datagen.teachers import Teacher
from datagen.wire import Verdict
from soul.errors import UserError

BARREN = 20  # refusals of the request itself, in a row and before any success: the request is wrong, not the rows
RECOVERIES = 5  # in a row, without an answer in between: the server does not stay up


@dataclass(frozen=True)
class Policy:
    """How calls are tried. None of it is in a key; times are in seconds."""

    concurrency: int = 32
    attempts: int = 5
    deadline: float | None = 300.0
    backoff: float = 1.0
    longest_backoff: float = 60.0
    longest_wait: float = 900.0
    breaker: float = 600.0  # without any answer
    patience: float = 60.0  # the same for a server that was never there
    rpm: float | None = None  # of the role "teacher", like `concurrency`
    tpm: float | None = None
    allow_mixed: bool = False  # answers of several routes in one run
    redo_truncated: int | None = None  # max_tokens with which an answer that was cut below it is asked for again


class Service:
    """`fail` is told of an error that no call can be told of. `served` is the route that the run is pinned to."""

    def __init__(self, role: str, teacher: Teacher, admission: Admission, policy: Policy, clock: Callable, fail: Callable):
        self.role, self.teacher, self.admission = role, teacher, admission
        self._policy, self._clock, self._fail = policy, clock, fail
        self.opened: asyncio.Task | None = None
        self.recovery: asyncio.Task | None = None
        self.served: str | None = None
        self.trouble = ""  # why calls are failing just now
        self._failing_since: float | None = None
        self._barren = self._bursts = self._recoveries = 0
        self._answered = False

    async def open(self, priced: bool) -> None:
        if hasattr(self.teacher, "open"):
            await self.teacher.open()
        if priced and self.teacher.price is None:
            raise UserError("its price is unknown, so no budget can be kept", where=self.teacher.name, fix="Give --price IN OUT.")

    def close(self) -> None:
        self.admission.close()
        for task in (self.opened, self.recovery):
            if task:
                task.cancel()

    def judge(self, verdict: Verdict, lease: Lease) -> None:
        """Go on, slow down or wait for the server. Raises UserError when nothing of this helps: key, credit, model, only
        refusals, too long a wait, nobody there."""
        if verdict.stops:
            raise UserError(f"the {self.role} refuses to go on: {verdict.why}", where=self.teacher.name, fix=verdict.fix)
        self._barren = self._barren + 1 if verdict.outcome == "permanent" else 0
        self._answered |= verdict.outcome == "ok"
        if self._barren >= BARREN and not self._answered:
            raise UserError(f"the {self.role} refused {BARREN} requests in a row: {verdict.why}", where=self.teacher.name, fix=verdict.fix)
        if verdict.outcome not in ("rate_limited", "transient"):
            self._failing_since, self._bursts, self._recoveries, self.trouble = None, 0, 0, ""
            return
        now, self.trouble = self._clock(), verdict.why
        if self._failing_since is None:
            self._failing_since = now
        if not verdict.reached and hasattr(self.teacher, "recover"):
            self._recover(verdict, lease)
        elif verdict.free or verdict.retry_after:
            self._slow_down(verdict, lease)
        failing = 0.0 if self.recovery else now - self._failing_since
        if failing > (self._policy.breaker if verdict.reached or self._answered else self._policy.patience):
            raise self._hopeless(f"has not answered for {failing:,.0f} s", verdict)

    def backoff(self, tries: int, key: str = "8000") -> float:
        """Doubling, spread to ±50 % by the key, so that calls that failed together do not come back together."""
        spread = 0.5 + int(key[:4], 16) / 0x10000
        return min(self._policy.longest_backoff, self._policy.backoff * 2 ** max(0, tries - 1)) * spread

    def _slow_down(self, verdict: Verdict, lease: Lease) -> None:
        """Close the gate for everybody: once for a burst, unless the teacher says for how long."""
        first = self.admission.cut(lease) if verdict.outcome == "rate_limited" else not self.admission.shut
        self._bursts += first
        wait = verdict.retry_after or self.backoff(self._bursts)
        if wait > self._policy.longest_wait and verdict.free:
            raise self._hopeless(f"asks to wait {wait:,.0f} s", verdict)
        if first or verdict.retry_after:
            self.admission.shut_until(self._clock() + min(wait, self._policy.longest_wait))

    def _recover(self, verdict: Verdict, lease: Lease) -> None:
        """Have the teacher see to its server, once for all the calls that found nobody there."""
        if self.recovery or lease.epoch != self.admission.epoch:
            return
        self._recoveries += 1
        if self._recoveries > RECOVERIES:
            raise self._hopeless("does not stay up", verdict)
        self.admission.hold()
        self.recovery = asyncio.ensure_future(self._recovering())

    async def _recovering(self) -> None:
        start = self._clock()
        try:
            await self.teacher.recover()
        except UserError as error:
            self._fail(error)
            return
        finally:
            self.recovery = None
        now = self._clock()
        if self._failing_since is not None:
            self._failing_since += now - start  # the breaker counts silence, not the start of a server
        self.admission.resume(now + self.backoff(self._recoveries - 1) if self._recoveries > 1 else 0.0)

    def _hopeless(self, what: str, verdict: Verdict) -> UserError:
        fix = f"Check that {self.teacher.base_url} is up, then run the same command again."
        if verdict.outcome == "rate_limited":
            fix = "Lower --concurrency or --rpm, raise the account's limit, or run the same command later."
        return UserError(f"the {self.role} {what}; the last answer was: {verdict.why}", where=self.teacher.name, fix=fix)
