"""The engine: one coroutine per row, `recipe(seed, call)`, over the journal.

    call = key -> journal hit? -> admission (lease) -> budget reservation -> send -> classify -> journal -> Reply

Seeds are streamed through a bounded number of workers, so memory does not grow with them. A retry gives its lease back
and rejoins the queue by the time when it is due. Rate limits and an unreachable server spend no attempt; they slow
everybody down, and a circuit breaker bounds the time without any answer. Stopping, for whatever reason, lets the calls
in flight end and be kept.
"""

import asyncio
import contextlib
import gc
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from datagen.admission import Admission
from datagen.budget import Budget, Spent, charge, most_tokens, most_usd
from datagen.journal import Journal
from datagen.seeds import Seed
from datagen.service import Policy, Service
from datagen.teachers import Teacher
from datagen.wire import Answer, Request, Verdict, classify
from soul.errors import UserError

BROKEN = 10  # recipe errors in a row: the recipe is wrong, not the rows
SOON = 0.2  # of a backoff before the first retry: most failures are one call's own, and waiting for the last one is what a run's end costs


@dataclass(frozen=True)
class Reply(Verdict):
    """What a recipe gets: the verdict on the answer (a part of it when `outcome` is "truncated") to the request of that key."""

    key: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


Recipe = Callable[[Seed, Callable[..., Awaitable[Reply]]], Awaitable[list]]


class Stopped(BaseException):
    """Raised out of `call` when the run is draining; not an Exception, so that no recipe swallows it."""


@dataclass
class _Row:
    """What the calls of one row have shown so far."""

    id: str
    served: set[str] = field(default_factory=set)
    failed: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class _Ask:
    service: Service
    request: Request
    stage: str
    row_id: str
    prompt_tokens: int  # at most
    max_tokens: int


class Engine:
    """Runs recipes against the teachers of a run: `teacher`, and `others` by role; a role without one falls back to `teacher`.
    Teachers are opened before their first request; closing them is the caller's.

    `run_id` names everything but the seed that decides a row (SOUL, prompts, recipe, teachers, sampling): a row finished
    under the same name is not computed again, and one finished under another is, from the journal where calls agree.
    """

    def __init__(self, teacher: Teacher, journal: Journal, run_id: str, sampling: dict, policy: Policy | None = None, *,
                 others: dict[str, Teacher] | None = None, budget: Budget | None = None,
                 clock=time.monotonic, wall=time.time, sleep=asyncio.sleep):  # fmt: skip
        self.journal, self.run_id, self.sampling, self.budget = journal, run_id, sampling, budget
        self.policy = policy = policy or Policy()
        self._clock, self._wall = clock, wall
        services, self._by_role = {}, {}  # two roles of one teacher are one service
        for role, each in {"teacher": teacher, **(others or {})}.items():
            if each not in services:
                pace = (policy.concurrency, policy.rpm, policy.tpm) if role == "teacher" else (each.concurrency,)
                services[each] = Service(role, each, Admission(*pace, clock=clock, sleep=sleep), policy, clock, self.fail)
            self._by_role[role] = services[each]
        self._all: list[Service] = list(services.values())
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.spent = journal.spent()  # USD, over all runs of the directory
        self.fatal: UserError | None = None
        self.interrupted = False
        self._stop = asyncio.Event()
        self._flying: dict[str, asyncio.Task] = {}
        self._workers: list[asyncio.Task] = []
        self._broken, self._unpriced = 0, False
        self._told: tuple = (0.0, "", False)
        self._on_progress: Callable[[], None] = lambda: None

    # --- rows

    async def run(self, seeds: Iterable[Seed], recipe: Recipe, on_progress: Callable[[], None] = lambda: None) -> bool:
        """Compute every row; True when all are finished, False after an interrupt. Raises UserError when going on cannot help
        (key, credit, model, breaker, budget, disk); all that was answered is kept."""
        stream, loop = iter(seeds), asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread
            loop.add_signal_handler(signal.SIGINT, self.interrupt)
        self._on_progress = on_progress
        thresholds = gc.get_threshold()
        gc.freeze()  # a call leaves few cycles: looking for them in all that was imported took a tenth of the time
        gc.set_threshold(20_000, 20, 20)
        try:
            # two rows for each lease: while one is checked or waits out a backoff, another one can ask
            rows = 2 * sum(service.admission.most for service in self._all)
            self._workers = [asyncio.create_task(self._work(stream, recipe)) for _ in range(rows)]
            results = await asyncio.gather(*self._workers, return_exceptions=True)
            await asyncio.gather(*self._flying.values(), return_exceptions=True)
        finally:
            self._halt()
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(signal.SIGINT)
            self.journal.commit()
            self._on_progress()
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
        self._halt()
        self._tell()

    def fail(self, error: UserError) -> None:
        self.fatal = self.fatal or error
        self._halt()

    def snapshot(self) -> dict:
        """Where the run stands, for a live view; by role where each teacher has its own."""
        return {
            "rows": self.counts["rows"], "accepted": self.counts["accepted"], "rejected": self.counts["rejected"],
            "already_finished": self.counts["already finished"], "sent": self.counts["sent"], "replayed": self.counts["replayed"],
            "in_flight": {service.role: service.admission.in_flight for service in self._all},
            "limit": {service.role: service.admission.limit for service in self._all},
            "served": {service.role: service.served for service in self._all},
            "spent_usd": None if self._unpriced and not self.spent else self.spent, "limit_usd": self.budget and self.budget.limit_usd,
            "outcomes": dict(self.outcomes), "trouble": self.trouble,
        }  # fmt: skip

    @property
    def trouble(self) -> str:
        """Why calls are failing just now; empty while they are not."""
        return next((service.trouble for service in self._all if service.trouble), "")

    def _tell(self) -> None:
        """Progress, at most ten times a second: a view costs more than a row. News is told at once."""
        now, trouble = self._clock(), self.trouble
        if now - self._told[0] >= 0.1 or self._told[1:] != (trouble, self.interrupted):
            self._told = (now, trouble, self.interrupted)
            self._on_progress()

    def _halt(self) -> None:
        self._stop.set()
        for service in self._all:
            service.close()
        if self.budget:
            self.budget.close()

    async def _work(self, stream, recipe: Recipe) -> None:
        try:
            for seed in stream:
                if self._stop.is_set():
                    return
                await self._row(seed, recipe)
                self._tell()
        except UserError as error:
            self.fail(error)
        except Exception:
            self._halt()
            raise

    async def _row(self, seed: Seed, recipe: Recipe) -> None:
        if done := self.journal.row(seed.id, self.run_id):
            results = done.results
            self.counts["already finished"] += 1
        else:
            row = _Row(seed.id)
            try:
                results = await recipe(seed, partial(self.call, row))
                self._finish(row, results)
                self._broken = 0
            except UserError:
                raise
            except Exception as error:  # of the recipe, or a result that is no JSON
                self._broken += 1
                if self._broken >= BROKEN:
                    raise
                row.failed, why = True, f"error: {type(error).__name__}: {error}"[:300]
                told = {"id": seed.id, "source": seed.source, "messages": seed.messages, "accepted": False, "reason": why}
                self._finish(row, results := [["rejected", told]])
        self.counts["rows"] += 1
        self.counts["accepted" if _accepted(results) else "rejected"] += 1

    def _finish(self, row: _Row, results: list) -> None:
        served = {"served": sorted(row.served)} if row.served else {}
        results = [[kind, values | served] for kind, values in results]
        status = "failed" if row.failed and not _accepted(results) else "truncated" if row.truncated else "finished"
        self.journal.finish(row.id, self.run_id, status, results)
        self.journal.soon()  # no need to wait: a row that is lost is computed again from its calls

    # --- calls

    async def call(self, row: _Row, stage: str, messages: list[dict], *, role: str = "teacher", replicate: int = 0,
                   temperature: float | None = None, top_p: float | None = None, max_tokens: int | None = None,
                   schema: dict | None = None, logprobs: bool = False, tools: list[dict] | None = None) -> Reply:  # fmt: skip
        """Ask the role's teacher, or the journal. Always gives a Reply; the recipe decides what a bad outcome means for its row."""
        service = self._by_role.get(role) or self._by_role["teacher"]
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        wishes = {"schema": schema, "logprobs": logprobs or None, "tools": tools}
        body = self.sampling | {name: value for name, value in (given | wishes).items() if value is not None}

        def ask(tokens: int) -> _Ask:
            request = service.teacher.request(messages, replicate=replicate, **body | {"max_tokens": tokens})
            return _Ask(service, request, stage, row.id, most_tokens(request, messages), tokens)

        try:
            await self._ready(service)
            verdict = await self._shared(asked := ask(body["max_tokens"]))
            if verdict.outcome == "truncated" and verdict.reasoning and not verdict.text:
                # the reasoning ate the budget: once more with room for the answer, where the model has it
                try:
                    asked = ask(4 * asked.max_tokens)
                except UserError:
                    pass
                else:
                    verdict = await self._shared(asked)
            if verdict.outcome == "truncated" and asked.max_tokens < (self.policy.redo_truncated or 0):
                verdict = await self._shared(asked := ask(self.policy.redo_truncated))
        except UserError as error:  # of the teacher or the disk: about the run, not about this row
            if isinstance(error, Spent):
                self.outcomes["budget"] += 1
            self.fail(error)
            raise Stopped from error
        row.failed |= verdict.outcome in ("transient", "permanent", "empty")
        row.truncated |= verdict.outcome == "truncated"
        if verdict.outcome in ("ok", "truncated") and verdict.served:
            row.served.add(verdict.served)
        return Reply(**vars(verdict), key=asked.request.key)

    async def _ready(self, service: Service) -> None:
        """Open the teacher before its first request: not for a run that has nothing to ask."""
        if service.opened is None:
            service.opened = asyncio.ensure_future(service.open(priced=self.budget is not None))
        if not service.opened.done():
            await asyncio.wait({service.opened})
        if service.opened.cancelled():
            raise Stopped
        service.opened.result()

    async def _shared(self, ask: _Ask) -> Verdict:
        """One answer for one key, also when two rows ask for it at the same time."""
        key = ask.request.key
        flying = self._flying.get(key)
        if flying is None:
            flying = self._flying[key] = asyncio.ensure_future(self._answer(ask))
            flying.add_done_callback(lambda _: self._flying.pop(key, None))
        return await asyncio.shield(flying)

    async def _answer(self, ask: _Ask) -> Verdict:
        if kept := self.journal.reply(ask.request.key):
            self.counts["replayed"] += 1
            verdict = self._read(kept, ask)
        else:
            verdict = await self._try(ask)
        self._check_route(ask.service, verdict)
        return verdict

    async def _try(self, ask: _Ask) -> Verdict:
        spent, due = 0, None
        while True:
            verdict = await self._attempt(ask, due)
            spent += not verdict.free
            if verdict.final or spent >= self.policy.attempts:
                return verdict
            backoff = ask.service.backoff(spent, ask.request.key) * (SOON if spent == 1 else 1.0)
            wait = 0.0 if verdict.free else min(verdict.retry_after or backoff, self.policy.longest_wait)
            due = self._clock() + wait

    async def _attempt(self, ask: _Ask, due: float | None) -> Verdict:
        """Send once, and write the answer down before its lease ends: so no more is ever at risk than may be in flight."""
        service, verdict, held, flight = ask.service, None, None, None
        lease = await service.admission.admit(ask.prompt_tokens + ask.max_tokens, due)
        if lease is None:
            raise Stopped
        price = service.teacher.price
        cost = most = most_usd(price, ask.prompt_tokens, ask.max_tokens) if price else None

        def release() -> None:
            nonlocal lease
            if lease is not None:
                lease = service.admission.release(lease, ok=_good(verdict), tokens=_tokens(verdict))

        try:
            if self.budget:
                held = await self.budget.reserve(most)
                if held is None:
                    raise Stopped
                flight = self.journal.sending(ask.stage, most)
            self.counts["sent"] += 1
            answer = await self._send(service, ask.request)
            verdict = self._read(answer, ask)
            cost = charge(answer, verdict, most)
            self.spent += cost or 0.0
            self._unpriced |= cost is None
            self.outcomes[verdict.outcome] += 1
            self.journal.record(ask.request, answer, verdict, stage=ask.stage, row_id=ask.row_id, charged=cost, flight=flight)
            service.judge(verdict, lease)
            if verdict.final:
                await self.journal.durable(release)
            return verdict
        except UserError as error:  # before the lease goes to the next call
            self.fail(error)
            raise
        finally:
            if held is not None:
                self.budget.settle(held, cost)
            release()
            if not _good(verdict):
                self._tell()

    def _read(self, answer: Answer, ask: _Ask) -> Verdict:
        verdict = classify(answer, now=self._wall(), asked=ask.request)
        level = getattr(ask.service.teacher, "quantization", {}).get(verdict.provider)  # answers never say it
        return replace(verdict, quantization=level) if level else verdict

    async def _send(self, service: Service, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self.policy.deadline if service.teacher.deadline else None):
                return await service.teacher.send(request)
        except TimeoutError:
            return Answer(0, f"no whole answer within {self.policy.deadline:g} s")

    # --- what answers say about the service

    def _check_route(self, service: Service, verdict: Verdict) -> None:
        """Stop when the router changes model or provider between the rows of one dataset: it would be two teachers' work."""
        if self.policy.allow_mixed or not verdict.served or verdict.outcome not in ("ok", "truncated"):
            return
        name = f"served:{self.run_id}:{service.role}"
        service.served = service.served or self.journal.noted(name)
        if service.served is None:
            service.served = verdict.served
            self.journal.note(name, verdict.served)
        if verdict.served != service.served:
            what = f"answers came from {service.served} and now from {verdict.served}; {self.counts['rows']} rows are done"
            fix = "Pin one provider with --provider, or take both with --allow-mixed."
            raise UserError(what, where=service.teacher.name, fix=fix)


def _accepted(results: list) -> bool:
    return any(kind != "rejected" for kind, _ in results)


def _good(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.outcome not in ("rate_limited", "transient")


def _tokens(verdict: Verdict | None) -> int | None:
    """What an answer says that it took, of a limit on tokens per minute."""
    usage = (verdict and verdict.usage) or {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return sum(counts) if all(isinstance(count, int) for count in counts) else None
