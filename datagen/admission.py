"""Who may send, and when: every teacher has one Admission, and every call in flight holds a lease of it.

The number of leases follows the teacher: additive increase, multiplicative decrease (Jacobson and Karels, 1988; the stamped
leases are those of NVIDIA's DataDesigner). A lease knows the epoch it was given in and a cut begins a new one, so a burst
of refusals to calls that were sent together cuts once. A retry joins the same queue with the time when it is due, and
goes before new calls then.
"""

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from soul.errors import UserError

CUT = 0.75
# successes that raise the limit by one: a window's worth while it is small, so that 1 -> 2 takes one answer and not 25;
# never more than 25, so that a limit of 256 is back after a cut in 6 windows and not in 64
GROW = 25
# windows without a refusal, just below the limit that was refused last, before it is tried again: every try that fails
# closes the gate for everybody, which costs more than the last lease brings
PROBE = 20


class Bucket:
    """At most `per_minute` units in any 60 s, as long as none takes more than a second's worth; a bigger one waits until
    it fits and may pass the mark by its own size. Evenly paced: a full minute's burst is what servers refuse."""

    def __init__(self, per_minute: float, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._burst = max(1.0, per_minute / 60)
        self._rate = (per_minute - self._burst + 1) / 60
        self._level, self._at = self._burst, clock()

    def wait(self, units: float) -> float:
        """Seconds until `units` may be taken; 0.0 when they may be now."""
        now = self._clock()
        brim = max(self._burst, units, self._level)  # what was given back may lie above the burst
        self._level, self._at = min(brim, self._level + (now - self._at) * self._rate), now
        wait = (units - self._level) / self._rate
        return wait if wait > 1e-6 else 0.0  # a rest of rounding is no reason to sleep

    def take(self, units: float) -> None:
        self._level -= units


@dataclass(frozen=True)
class Lease:
    epoch: int
    tokens: int


class Admission:
    """`most` leases at once, `rpm` requests and `tpm` tokens a minute. Deterministic for a given `clock` and `sleep`.
    `admit` gives a lease, `release` takes it back with what became of it; `cut`, `shut_until` and `hold` slow everybody down."""

    def __init__(self, most: int, rpm: float | None = None, tpm: float | None = None, *, clock=time.monotonic, sleep=asyncio.sleep):
        self.most = self.limit = most
        self.in_flight, self.epoch = 0, 0
        self._clock, self._sleep = clock, sleep
        self._requests, self._tokens = (Bucket(rate, clock) if rate else None for rate in (rpm, tpm))
        self._good, self._refused, self._gate, self._held, self._closed = 0, 0, 0.0, False, False
        self._order = count()
        self._ready: list[tuple] = []  # (0 a retry or 1 new, order, tokens, future)
        self._later: list[tuple] = []  # (due, order, tokens, future)
        self._timer: tuple[float, asyncio.Future] | None = None

    async def admit(self, tokens: int = 0, due: float | None = None) -> Lease | None:
        """Wait for a lease; `due` is the time from which a retry may go. None when the admission was closed meanwhile.
        Raises UserError when `tokens` can never fit the tokens per minute."""
        if self._tokens and tokens > self._tokens.per_minute:
            what = f"one call may take {tokens:,} tokens, and --tpm allows {self._tokens.per_minute:,.0f} a minute"
            raise UserError(what, fix="Raise --tpm, or lower --max-tokens.")
        future = asyncio.get_running_loop().create_future()
        heap, first = (self._ready, 1) if due is None else (self._later, due)
        heapq.heappush(heap, (first, next(self._order), tokens, future))
        self._pump()
        return await future

    def release(self, lease: Lease, *, ok: bool = False, tokens: int | None = None) -> None:
        """End a lease: an answer that is `ok` counts towards growth, `tokens` (when known) replaces the estimate."""
        self.in_flight -= 1
        if ok:
            self._good += 1
            probes = self.limit + 1 == self._refused
            if self._good >= (PROBE * self.limit if probes else min(GROW, self.limit)):
                self._good, self.limit = 0, min(self.most, self.limit + 1)
                self._refused = 0 if probes else self._refused
        if self._tokens and tokens is not None:
            self._tokens.take(tokens - lease.tokens)
        self._pump()

    def cut(self, lease: Lease) -> bool:
        """The teacher refused this call for its rate; False when calls of the lease's epoch were cut for it already."""
        if lease.epoch != self.epoch:
            return False
        self.epoch += 1
        self._refused = self.limit
        self._good, self.limit = 0, max(1, int(self.limit * CUT))
        return True

    @property
    def shut(self) -> bool:
        return self._gate > self._clock()

    def shut_until(self, moment: float) -> None:
        """Admit nobody before `moment`."""
        self._gate = max(self._gate, moment)

    def hold(self) -> None:
        """Admit nobody until `resume`."""
        self._held = True

    def resume(self, moment: float = 0.0) -> None:
        """Go on in a new epoch, from `moment` on."""
        self._held, self._gate = False, moment
        self.epoch += 1
        self._pump()

    def close(self) -> None:
        """Let everybody who waits go without a lease, now and from now on."""
        self._closed = True
        if self._timer:
            self._timer[1].cancel()
        self._pump()

    def _pump(self) -> None:
        if self._closed:
            for *_, future in (*self._ready, *self._later):
                if not future.done():
                    future.set_result(None)
            self._ready, self._later = [], []
            return
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            _, order, tokens, future = heapq.heappop(self._later)
            heapq.heappush(self._ready, (0, order, tokens, future))
        times = [self._later[0][0]] if self._later else []
        while self._ready and self.in_flight < self.limit and not self._held:
            *_, tokens, future = self._ready[0]
            if future.done():  # cancelled
                heapq.heappop(self._ready)
                continue
            takes = [(bucket, units) for bucket, units in ((self._requests, 1), (self._tokens, tokens)) if bucket]
            if wait := max(0.0, self._gate - now, *(bucket.wait(units) for bucket, units in takes)):
                times.append(now + wait)
                break
            heapq.heappop(self._ready)
            self.in_flight += 1
            for bucket, units in takes:
                bucket.take(units)
            future.set_result(Lease(self.epoch, tokens))
        if times:
            self._wake_at(min(times))

    def _wake_at(self, moment: float) -> None:
        """One sleeper for everybody who waits for a time."""
        if self._timer and not self._timer[1].done():
            if self._timer[0] <= moment:
                return
            self._timer[1].cancel()

        async def wake() -> None:
            await self._sleep(max(0.0, moment - self._clock()))
            self._timer = None
            self._pump()

        self._timer = (moment, asyncio.ensure_future(wake()))
