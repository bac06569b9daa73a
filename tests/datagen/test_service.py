"""Teachers in their roles: opened once, one route, a budget, servers that die and come back."""

import asyncio
import contextlib
import itertools
import json
import sqlite3
from collections import Counter

import pytest
from fake_teacher import Clock, FakeTeacher, answer, completion, in_virtual_time, loop_time
from test_engine import SAMPLING, one_call, seeds

from datagen.budget import Budget
from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.service import RECOVERIES
from datagen.teachers import Price
from datagen.wire import Answer
from soul.errors import UserError

GONE, BROKE = Answer(0, "cannot connect", reached=False), Answer(0, "the connection broke")


def run(folder, teacher, count=12, recipe=one_call, limit_usd=None, run_id="run", policy=None, **more):
    """(engine, rows by id) of a run in virtual time; raises what the engine raises."""
    journal = Journal(folder)
    journal.plan(f"row{n}" for n in range(count))
    engines = []

    async def go():
        budget = None if limit_usd is None else Budget(limit_usd, journal.spent())
        given = {"budget": budget, "clock": loop_time, "wall": loop_time, "sleep": asyncio.sleep} | more
        engines.append(Engine(teacher, journal, run_id, SAMPLING, policy or Policy(concurrency=4), **given))
        run.engine = engines[0]
        try:
            return await engines[0].run(seeds(count), recipe)
        finally:
            run.ended = loop_time()

    try:
        in_virtual_time(go())
    finally:
        rows = {row.row_id: (row.status, row.results) for row in journal.rows(run_id)}
        journal.close()
    return engines[0], rows


def kept(folder):
    journal = Journal(folder)
    try:
        calls = Counter()
        for entry in journal.ledger():
            calls[entry["outcome"]] += entry["calls"]
        return calls, journal.spent()
    finally:
        journal.close()


# --- roles and routes


async def three_roles(seed, call):
    draft = await call("draft", seed.messages, role="student")
    score = await call("judge", [{"role": "user", "content": draft.text}], role="judge", logprobs=True)
    again = await call("revise", [{"role": "user", "content": score.text}], role="no such role", schema={"type": "object"})
    return [["sft", {"id": seed.id, "messages": [{"role": "assistant", "content": again.text}]}]]


def test_each_role_asks_its_own_teacher_with_its_own_admission(tmp_path):
    made = {name: FakeTeacher(lambda body, n, name=name: name, name=name, concurrency=2) for name in ("t", "s", "j")}
    engine, rows = run(tmp_path, made["t"], recipe=three_roles, others={"student": made["s"], "judge": made["j"]})
    assert {name: len(teacher.sent) for name, teacher in made.items()} == {"t": 1, "s": 12, "j": 1}  # equal requests share
    assert '"logprobs":true' in made["j"].sent[0] and '"schema"' in made["t"].sent[0] and '"schema"' not in made["s"].sent[0]
    assert engine.snapshot()["limit"] == {"teacher": 4, "student": 2, "judge": 2}
    assert rows["row0"][1][0][1]["served"] == ["fake-1"]


def test_one_teacher_in_two_roles_has_one_admission_and_is_opened_once(tmp_path):
    teacher = Opened()
    engine, _ = run(tmp_path, teacher, recipe=three_roles, others={"teacher": teacher, "judge": teacher, "student": teacher})
    assert teacher.opened == 1 and engine.snapshot()["limit"] == {"teacher": 4}


def routed(body, n):
    other = body["messages"][0]["content"] == "q9"
    return answer(completion("fine", provider="B" if other else "A"))


def test_a_second_route_stops_the_run_is_kept_and_not_used(tmp_path):
    told = r"answers came from fake-1@A and now from fake-1@B; \d+ rows are done. Pin one provider with --provider, .*--allow-mixed"
    with pytest.raises(UserError, match=told):
        run(tmp_path, FakeTeacher(routed))
    calls, _ = kept(tmp_path)
    teacher = FakeTeacher(routed)
    with pytest.raises(UserError, match=told):  # the same again costs nothing for that row
        run(tmp_path, teacher)
    assert not any('"q9"' in body for body in teacher.sent) and calls["ok"] >= 8
    engine, rows = run(tmp_path, FakeTeacher(routed), policy=Policy(concurrency=4, allow_mixed=True))
    assert rows["row9"][1][0][1]["served"] == ["fake-1@B"] and len(rows) == 12 and engine.outcomes["ok"] <= 4


def test_another_teacher_in_the_same_directory_has_its_own_route(tmp_path):
    run(tmp_path, FakeTeacher(lambda body, n: answer(completion("x", provider="A"))))
    _, rows = run(tmp_path, FakeTeacher(lambda body, n: answer(completion("x", provider="B")), name="other"), run_id="other run")
    assert len(rows) == 12


def test_rows_say_the_quantization_that_the_teacher_knows_of_its_providers(tmp_path):
    said = answer(completion("x", provider="A"))
    _, rows = run(tmp_path, FakeTeacher(lambda body, n: said, quantization={"A": "fp8"}))
    assert rows["row0"][1][0][1]["served"] == ["fake-1@A (fp8)"]
    _, rows = run(tmp_path, teacher := FakeTeacher(lambda body, n: said, quantization={"A": "fp8"}), run_id="again")
    assert rows["row0"][1][0][1]["served"] == ["fake-1@A (fp8)"] and not teacher.sent  # from the journal, too


# --- opening


class Opened(FakeTeacher):
    opened, error = 0, None

    async def open(self):
        self.opened += 1
        await asyncio.sleep(3)
        if self.error:
            raise UserError(self.error)
        self.price = Price(0.001, 0.001, 0.0)

    def request(self, messages, **more):
        assert self.price, "asked for a request before it was open"
        return super().request(messages, **more)


def test_a_teacher_is_opened_once_before_its_first_request_and_not_for_a_finished_run(tmp_path):
    teacher, idle = Opened(), Opened()
    run(tmp_path, teacher, limit_usd=100.0)
    run(tmp_path, idle, limit_usd=100.0)
    assert teacher.opened == 1 and idle.opened == 0


def test_what_opening_finds_wrong_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="the key is invalid"):
        run(tmp_path, Opened(error="the key is invalid"))
    with pytest.raises(UserError, match=r"price is unknown, so no budget can be kept. Give --price"):
        run(tmp_path, FakeTeacher(), limit_usd=1.0)


def test_an_interrupt_does_not_wait_for_a_server_that_starts(tmp_path):
    class Slow(FakeTeacher):
        async def open(self):
            asyncio.get_running_loop().call_later(5, run.engine.interrupt)
            await asyncio.sleep(3600)

    teacher = Slow()
    run(tmp_path, teacher)
    assert teacher.sent == [] and run.ended < 10


# --- money


def paid(cost, seconds=1.0):
    async def reply(body, n):
        await asyncio.sleep(seconds)
        return answer(completion("fine", usage={"prompt_tokens": 7, "completion_tokens": 5} | ({} if cost is None else {"cost": cost})))

    return reply


def priced(reply):
    return FakeTeacher(reply, price=Price(0.0, 0.3 / 64, 0.0))  # a call may cost 0.30


def test_a_budget_is_never_passed_and_the_next_run_goes_on_with_what_is_left(tmp_path):
    wide, teacher = Policy(concurrency=64), priced(paid(0.1))
    with pytest.raises(UserError, match=r"\$0.8000 of \$1.00 is spent, and the next call may cost \$0.3000. Raise --max-usd"):
        run(tmp_path, teacher, 200, limit_usd=1.0, policy=wide)
    calls, spent = kept(tmp_path)
    assert calls == {"ok": 8} and spent == pytest.approx(0.8) and run.engine.outcomes["budget"] > 0
    with pytest.raises(UserError, match="Raise --max-usd"):
        run(tmp_path, priced(paid(0.1)), 200, limit_usd=1.0, policy=wide)
    assert kept(tmp_path)[0] == {"ok": 8}
    engine, rows = run(tmp_path, priced(paid(0.1)), 20, limit_usd=2.5, policy=wide)
    assert len(rows) == 20 and {status for status, _ in rows.values()} == {"finished"} and engine.spent == pytest.approx(2.0)


def test_unknown_costs_stay_reserved_and_failures_are_free(tmp_path):
    with pytest.raises(UserError, match=r"\$0.9000 of \$1.00"):
        run(tmp_path, priced(paid(None)), 20, limit_usd=1.0)
    assert kept(tmp_path) == ({"ok": 3}, pytest.approx(0.9))
    limited = priced(lambda body, n: answer({"error": {"code": 500, "message": "x"}}, 500) if n == 1 else answer(completion("fine")))
    engine, rows = run(tmp_path / "b", limited, 12, limit_usd=1.0)
    assert len(rows) == 12 and engine.spent == pytest.approx(0.012)


def test_a_call_that_a_kill_cut_off_counts_as_spent(tmp_path):
    journal = Journal(tmp_path)

    async def cut_off():
        journal.sending("draft", 0.3)
        await journal.durable()

    asyncio.run(cut_off())
    journal.close()
    assert kept(tmp_path) == ({"unanswered": 1}, 0.3)
    with pytest.raises(UserError, match=r"\$0.9000 of \$1.00"):
        run(tmp_path, priced(paid(None)), 20, limit_usd=1.0)


def test_what_is_in_flight_is_on_disk_and_gone_when_it_is_answered(tmp_path):
    seen = []

    async def reply(body, n):
        await asyncio.sleep(1)
        with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as other:
            seen.append(other.execute("SELECT total(usd) FROM flying").fetchone()[0])
        return answer(completion("fine"))

    run(tmp_path, priced(reply), 8, limit_usd=100.0)
    assert seen[0] == pytest.approx(4 * 0.3) and kept(tmp_path) == ({"ok": 8}, pytest.approx(0.008))


def test_unknown_is_not_zero_in_the_live_view(tmp_path):
    engine, _ = run(tmp_path, FakeTeacher(paid(None)))
    assert engine.snapshot()["spent_usd"] is None
    engine, _ = run(tmp_path / "b", FakeTeacher(paid(0.5)))
    assert engine.snapshot()["spent_usd"] == 6.0


# --- servers that die


class Mortal(FakeTeacher):
    """Dies at the sends in `deaths`: what is in flight breaks, and nobody is there until `recover` has taken 120 s."""

    def __init__(self, *deaths, error=None):
        super().__init__()
        self.deaths, self.up, self.recovered, self.error = deaths, True, [], error

    async def send(self, request):
        self.sent.append(request.body)
        self.up &= len(self.sent) not in self.deaths
        if not self.up:
            return GONE
        await asyncio.sleep(1)
        return answer(completion("fine")) if self.up else BROKE

    async def recover(self):
        assert not self.up
        await asyncio.sleep(120)
        if self.error:
            raise UserError(self.error)
        self.up = True
        self.recovered.append(loop_time())


def test_a_server_that_dies_in_flight_is_brought_back_once_and_no_row_fails(tmp_path):
    teacher = Mortal(10, 30)
    engine, rows = run(tmp_path, teacher, 40, policy=Policy(concurrency=8, breaker=60.0))
    assert len(teacher.recovered) == 2 and len(rows) == 40
    assert all(status == "finished" and results[0][0] == "sft" for status, results in rows.values())
    assert len(teacher.sent) <= 40 + 2 * 2 * 8 and engine.trouble == ""  # nothing was sent while nobody was there


def test_who_learns_late_that_the_server_was_gone_does_not_have_it_restarted_again(tmp_path):
    class Late(Mortal):
        async def send(self, request):
            gone = await super().send(request) is GONE
            await asyncio.sleep(200 if gone and len(self.sent) % 2 else 0)
            return GONE if gone else answer(completion("fine"))

        async def recover(self):
            await asyncio.sleep(120)
            self.up = True
            self.recovered.append(loop_time())

    teacher = Late(3)
    teacher.deaths = (3, 4)
    _, rows = run(tmp_path, teacher, 8)
    assert len(teacher.recovered) == 1 and {status for status, _ in rows.values()} == {"finished"}


def test_the_start_of_a_server_is_not_silence_to_the_breaker(tmp_path):
    class Warming(Mortal):
        async def send(self, request):
            said = await super().send(request)
            return answer("", 500) if self.recovered and loop_time() < self.recovered[0] + 1.1 else said

    _, rows = run(tmp_path, Warming(10), 20, policy=Policy(concurrency=4, breaker=60.0))
    assert {status for status, _ in rows.values()} == {"finished"}


def test_refusals_of_one_burst_that_come_late_do_not_close_the_gate_again(tmp_path):
    times = []

    async def reply(body, n):
        times.append(loop_time())
        if len(times) > 4:
            return "fine"
        await asyncio.sleep(1 + 0.5 * len(times))
        return answer({"error": {"code": 429, "message": "slow down"}}, 429)

    run(tmp_path, FakeTeacher(reply), 4)
    assert times[4] == pytest.approx(1.5 + 1)  # the first refusal, and a backoff of one second


def test_refusals_without_a_time_wait_twice_as_long_each_time(tmp_path):
    times = []

    def reply(body, n):
        times.append(loop_time())
        return answer({"error": {"code": 429, "message": "slow down"}}, 429) if len(times) < 5 else "fine"

    run(tmp_path, FakeTeacher(reply), 1)
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [1, 2, 4, 8]


def test_a_server_that_cannot_be_brought_back_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="vLLM died twice"):
        run(tmp_path, Mortal(10, error="vLLM died twice"), 40)
    assert kept(tmp_path)[0]["ok"] >= 4


def test_a_server_that_does_not_stay_up_is_given_up(tmp_path):
    class Flapping(Mortal):
        async def send(self, request):
            self.up = False
            return await super().send(request)

    teacher = Flapping()
    with pytest.raises(UserError, match=r"does not stay up.*cannot connect"):
        run(tmp_path, teacher)
    assert len(teacher.recovered) == RECOVERIES


def test_an_interrupt_does_not_wait_for_a_recovery(tmp_path):
    class Hung(Mortal):
        async def recover(self):
            asyncio.get_running_loop().call_later(1, run.engine.interrupt)
            await asyncio.Event().wait()

    run(tmp_path, Hung(5), 40)
    assert run.ended < 10 and kept(tmp_path)[0]["ok"] == 4


# --- answers that were cut


def test_only_rows_with_a_cut_answer_are_asked_again_with_more_tokens(tmp_path):
    def reply(body, n):
        long = body["messages"][0]["content"] in ("q3", "q5")
        return answer(completion("half", finish="length")) if long and body["max_tokens"] < 200 else "whole"

    _, rows = run(tmp_path, FakeTeacher(reply))
    assert [row for row, (status, _) in rows.items() if status == "truncated"] == ["row3", "row5"]
    journal = Journal(tmp_path)
    assert journal.redo_truncated("run") == 2
    journal.close()
    teacher = FakeTeacher(reply)
    _, rows = run(tmp_path, teacher, policy=Policy(concurrency=4, redo_truncated=256))
    assert [json.loads(body)["max_tokens"] for body in teacher.sent] == [256, 256]
    assert {status for status, _ in rows.values()} == {"finished"} and rows["row3"][1][0][1]["messages"][-1]["content"] == "whole"


def test_reasoning_that_eats_more_than_the_model_has_stays_cut(tmp_path):
    class Small(FakeTeacher):
        def request(self, messages, *, max_tokens, **more):
            if max_tokens > 100:
                raise UserError("a reply of that length cannot fit")
            return super().request(messages, max_tokens=max_tokens, **more)

    cut = answer({"model": "m", "choices": [{"message": {"content": "", "reasoning": "hmm"}, "finish_reason": "length"}]})
    _, rows = run(tmp_path, Small(lambda body, n: cut), 2)
    assert {status for status, _ in rows.values()} == {"truncated"}
    with pytest.raises(UserError, match="cannot fit"):
        run(tmp_path / "b", Small(), policy=Policy(redo_truncated=1), recipe=too_long)


async def too_long(seed, call):
    await call("draft", seed.messages, max_tokens=1000)
    return []


def test_the_clock_of_the_tests_still_goes_by_sleeping(tmp_path):
    clock = Clock()
    run(tmp_path, FakeTeacher(lambda body, n: answer("", 500) if n == 1 else "fine"), 1, clock=clock, sleep=clock.sleep)
    assert clock.slept and clock.slept[0] < 2
