"""The engine: one coroutine per row, `recipe(seed, call)`, over the journal.

    call = key -> journal hit? -> gate -> slot -> send -> classify -> journal -> reply

Seeds are streamed through a fixed number of workers, so memory does not grow with them. A retry gives its slot back
while it waits. Rate limits and an unreachable server spend no attempt; they close a gate for everyone, and a circuit
breaker bounds the time without any answer. Stopping, for whatever reason, lets the calls in flight end and be kept.
"""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

from datagen.journal import Journal
from datagen.seeds import Seed
from datagen.teachers import Teacher
from datagen.wire import Answer, Request, Verdict, classify
from soul.errors import UserError

BARREN = 20  # refusals of the request itself, in a row and before any success: the request is wrong, not the rows
BROKEN = 10  # recipe errors in a row: the recipe is wrong, not the rows


@dataclass(frozen=True)
class Policy:
    """How calls are tried. None of it changes what is asked, so none of it is in a key."""

    concurrency: int = 32
    attempts: int = 5
    deadline: float | None = 300.0
    backoff: float = 1.0
    longest_backoff: float = 60.0
    longest_wait: float = 900.0
    breaker: float = 600.0  # seconds without any answer
    patience: float = 60.0  # the same for a server that was never there


@dataclass(frozen=True)
class Reply:
    """What a recipe gets. `text` is the answer only (never reasoning), possibly partial when `outcome` is "truncated"."""

    text: str
    key: str
    outcome: str
    finish: str | None = None
    usage: dict | None = None
    model: str | None = None
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


Recipe = Callable[[Seed, Callable[..., Awaitable[Reply]]], Awaitable[list]]


class Stopped(BaseException):
    """Raised out of `call` when the run is draining; not an Exception, so that no recipe swallows it."""


class Engine:
    """Runs recipes against one teacher. `clock`, `wall` and `sleep` are injected by tests.

    `run_id` names everything but the seed that decides a row (SOUL, prompts, recipe, teacher, sampling): a row finished
    under the same name is not computed again, and one finished under another is, from the journal where calls agree.
    """

    def __init__(self, teacher: Teacher, journal: Journal, run_id: str, sampling: dict, policy: Policy = Policy(), *,
                 clock=time.monotonic, wall=time.time, sleep=asyncio.sleep):  # fmt: skip
        self.teacher, self.journal, self.run_id, self.sampling, self.policy = teacher, journal, run_id, sampling, policy
        self._clock, self._wall, self._sleep = clock, wall, sleep
        self.counts: Counter[str] = Counter()
        self.fatal: UserError | None = None
        self.trouble = ""  # why calls are failing just now
        self._failed_rows: set[str] = set()
        self.interrupted = False
        self._stop, self._slots = asyncio.Event(), asyncio.Semaphore(policy.concurrency)
        self._flying: dict[str, asyncio.Task] = {}
        self._workers: list[asyncio.Task] = []
        self._gate, self._cuts, self._failing_since = 0.0, 0, None
        self._on_progress: Callable[[], None] = lambda: None
        self._barren, self._broken = 0, 0

    # --- rows

    async def run(self, seeds: Iterable[Seed], recipe: Recipe, on_progress: Callable[[], None] = lambda: None) -> bool:
        """Compute every row; True when all are finished, False after an interrupt.

        Raises:
            UserError: when going on cannot help (key, credit, model, breaker, disk); all that was answered is kept.
        """
        stream = iter(seeds)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            loop.add_signal_handler(signal.SIGINT, self.interrupt)
        self._on_progress = on_progress
        try:
            # twice the slots: while one row is being checked or waits out a backoff, another one can ask
            self._workers = [asyncio.create_task(self._work(stream, recipe)) for _ in range(2 * self.policy.concurrency)]
            results = await asyncio.gather(*self._workers, return_exceptions=True)
            await asyncio.gather(*self._flying.values(), return_exceptions=True)
        finally:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(signal.SIGINT)
            self.journal.commit()
        if self.fatal:
            raise self.fatal
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (Stopped, asyncio.CancelledError)):
                raise result
        return not self.interrupted

    def interrupt(self) -> None:
        """First: drain, the calls in flight end and are kept. Second: stop at once."""
        if self.interrupted:
            for task in (*self._workers, *self._flying.values()):
                task.cancel()
        self.interrupted = True
        self._stop.set()
        self._on_progress()

    def fail(self, error: UserError) -> None:
        self.fatal = self.fatal or error
        self._stop.set()

    async def _work(self, stream, recipe: Recipe) -> None:
        try:
            for seed in stream:
                if self._stop.is_set():
                    return
                await self._row(seed, recipe)
                self._on_progress()
        except UserError as error:
            self.fail(error)
        except Exception:
            self._stop.set()
            raise

    async def _row(self, seed: Seed, recipe: Recipe) -> None:
        done = self.journal.row(seed.id, self.run_id)
        if done is None:
            try:
                results = await recipe(seed, partial(self.call, seed.id))
                self._broken = 0
            except UserError:
                raise
            except Exception as error:
                self._broken += 1
                if self._broken >= BROKEN:
                    raise
                self._failed_rows.add(seed.id)
                why = f"error: {type(error).__name__}: {error}"[:300]
                row = {"id": seed.id, "source": seed.source, "messages": seed.messages, "accepted": False, "reason": why}
                results = [["rejected", row]]
            status = "failed" if seed.id in self._failed_rows and not _accepted(results) else "finished"
            self._failed_rows.discard(seed.id)
            self.journal.finish(seed.id, self.run_id, status, results)
            await self.journal.durable()
        else:
            results = done.results
            self.counts["already finished"] += 1
        self.counts["rows"] += 1
        self.counts["accepted" if _accepted(results) else "rejected"] += 1

    # --- calls

    async def call(self, row_id: str, stage: str, messages: list[dict], *, replicate: int = 0, temperature: float | None = None,
                   top_p: float | None = None, max_tokens: int | None = None) -> Reply:  # fmt: skip
        """Ask the teacher, or the journal. Always gives a Reply; the recipe decides what a bad outcome means for its row."""
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        sampling = self.sampling | {name: value for name, value in given.items() if value is not None}
        request = self.teacher.request(messages, replicate=replicate, **sampling)
        verdict = await self._shared(request, stage, row_id)
        if verdict.outcome == "truncated" and verdict.reasoning and not verdict.text:
            # the reasoning ate the budget: once more with room for the answer
            request = self.teacher.request(messages, replicate=replicate, **sampling | {"max_tokens": 4 * sampling["max_tokens"]})
            verdict = await self._shared(request, stage, row_id)
        if verdict.outcome in ("transient", "permanent", "empty"):
            self._failed_rows.add(row_id)
        return Reply(verdict.text, request.key, verdict.outcome, verdict.finish, verdict.usage, verdict.model, verdict.why)

    async def _shared(self, request: Request, stage: str, row_id: str) -> Verdict:
        """One answer for one key, also when two rows ask for it at the same time."""
        flying = self._flying.get(request.key)
        if flying is None:
            flying = self._flying[request.key] = asyncio.ensure_future(self._ask(request, stage, row_id))
            flying.add_done_callback(lambda _: self._flying.pop(request.key, None))
        return await asyncio.shield(flying)

    async def _ask(self, request: Request, stage: str, row_id: str) -> Verdict:
        if kept := self.journal.reply(request.key):
            self.counts["replayed"] += 1
            return classify(kept, now=self._wall())
        spent = 0
        while True:
            verdict = await self._attempt(request, stage, row_id)
            self._judge_service(verdict)
            spent += not verdict.free
            if verdict.final or spent >= self.policy.attempts:
                return verdict
            if not verdict.free:
                await self._pause(min(verdict.retry_after or self._backoff(spent, request.key), self.policy.longest_wait))

    async def _attempt(self, request: Request, stage: str, row_id: str) -> Verdict:
        """Send once, and write the answer down before its slot is free: so no more is ever at risk than may be in flight."""
        while True:
            while (closed := self._gate - self._clock()) > 0:
                await self._pause(closed)
            async with self._slots:
                if self._stop.is_set():
                    raise Stopped
                if self._gate > self._clock():  # closed while this call waited for its slot
                    continue
                self.counts["sent"] += 1
                answer = await self._send(request)
                verdict = classify(answer, now=self._wall())
                self.counts[verdict.outcome] += 1
                self.journal.record(request, answer, verdict, stage=stage, row_id=row_id)
                if verdict.final:
                    await self.journal.durable()
                return verdict

    async def _send(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self.policy.deadline if self.teacher.deadline else None):
                return await self.teacher.send(request)
        except TimeoutError:
            return Answer(0, f"no whole answer within {self.policy.deadline:g} s")

    def _judge_service(self, verdict: Verdict) -> None:
        """What one answer says about the service: open or close the gate, or stop the run."""
        now = self._clock()
        if verdict.stops:
            self.fail(UserError(f"the teacher refuses to go on: {verdict.why}", where=self.teacher.name, fix=verdict.fix))
            raise Stopped
        self._barren = self._barren + 1 if verdict.outcome == "permanent" else 0
        if self._barren >= BARREN and not self.counts["ok"]:
            self.fail(UserError(f"the teacher refused {BARREN} requests in a row: {verdict.why}", where=self.teacher.name, fix=verdict.fix))
            raise Stopped
        if verdict.outcome not in ("rate_limited", "transient"):
            self._failing_since, self._cuts, self.trouble = None, 0, ""
            return
        self.trouble = verdict.why
        self._on_progress()
        if self._failing_since is None:
            self._failing_since = now
        if verdict.free:
            if self._gate <= now:  # a burst of refusals closes the gate once
                self._cuts += 1
            wait = self._backoff(self._cuts) if verdict.retry_after is None else verdict.retry_after
            self._gate = max(self._gate, now + wait)
            if wait > self.policy.longest_wait:
                self._give_up(f"asks to wait {wait:,.0f} s", verdict)
        never = not verdict.reached and not self.counts["ok"]
        if now - self._failing_since > (self.policy.patience if never else self.policy.breaker):
            self._give_up(f"has not answered for {now - self._failing_since:,.0f} s", verdict)

    def _give_up(self, what: str, verdict: Verdict) -> None:
        fix = f"Check that {self.teacher.base_url} is up, then run the same command again."
        if verdict.outcome == "rate_limited":
            fix = "Lower --concurrency, raise the account's limit, or run the same command later."
        self.fail(UserError(f"the teacher {what}; the last answer was: {verdict.why}", where=self.teacher.name, fix=fix))
        raise Stopped

    def _backoff(self, tries: int, key: str = "8000") -> float:
        """Doubling, spread to ±50 % by the key, so that calls that failed together do not come back together."""
        spread = 0.5 + int(key[:4], 16) / 0x10000
        return min(self.policy.longest_backoff, self.policy.backoff * 2 ** max(0, tries - 1)) * spread

    async def _pause(self, seconds: float) -> None:
        sleeper, stop = asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({sleeper, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeper.cancel()
            stop.cancel()
        if self._stop.is_set():
            raise Stopped


def _accepted(results: list) -> bool:
    return any(kind != "rejected" for kind, _ in results)
