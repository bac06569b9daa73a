"""One coroutine per row over the journal: retries, limits, stops, resume."""

import asyncio
import json
import tracemalloc

import pytest
from fake_teacher import Clock, FakeTeacher, answer, completion, in_virtual_time, loop_time

from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.seeds import Seed
from datagen.service import BARREN
from datagen.wire import Answer
from soul.errors import UserError

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64}
FOUR = Policy(concurrency=4)
LIMIT = {"error": {"code": 429, "message": "slow down"}}


def seeds(count):
    for n in range(count):
        yield Seed(f"row{n}", [{"role": "user", "content": f"q{n}"}], f"s:{n}", f"s:{n}")


async def one_call(seed, call):
    reply = await call("draft", seed.messages)
    messages = [*seed.messages, {"role": "assistant", "content": reply.text}]
    return [["sft" if reply.ok else "rejected", {"id": seed.id, "messages": messages, "reason": "" if reply.ok else reply.outcome}]]


def run(folder, teacher, count=8, recipe=one_call, policy=FOUR, run_id="run", clock=None, prepare=None):
    """(finished?, engine, journal rows); raises what the engine raises."""
    clock = clock or Clock()
    journal = Journal(folder)

    async def go():
        engine = Engine(teacher, journal, run_id, SAMPLING, policy, clock=clock, wall=clock, sleep=clock.sleep)
        if prepare:
            prepare(engine)
        return await engine.run(seeds(count), recipe), engine

    try:
        journal.plan(f"row{n}" for n in range(count))
        done, engine = asyncio.run(go())
        return done, engine, {row.row_id: (row.status, row.results) for row in journal.rows(run_id)}
    finally:
        journal.close()


def outcomes(rows):
    return sorted({results[0][1]["reason"] or "ok" for _, results in rows.values()})


def test_rows_are_computed_once_and_a_rerun_sends_nothing(tmp_path):
    teacher = FakeTeacher()
    done, engine, rows = run(tmp_path, teacher)
    assert done and len(rows) == 8 and len(teacher.sent) == 8 and engine.counts["accepted"] == 8
    again = FakeTeacher()
    _, engine, same = run(tmp_path, again)
    assert again.sent == [] and same == rows and engine.counts["already finished"] == 8


def test_a_changed_recipe_replays_the_calls_it_shares(tmp_path):
    run(tmp_path, FakeTeacher())
    teacher = FakeTeacher()

    async def two_calls(seed, call):
        await call("draft", seed.messages)
        return await one_call(seed, lambda stage, messages: call(stage, messages, replicate=1))

    _, engine, rows = run(tmp_path, teacher, recipe=two_calls, run_id="other")
    assert len(rows) == 8 and len(teacher.sent) == 8 and engine.counts["replayed"] == 8


def test_attempts_are_byte_identical_and_bounded(tmp_path):
    teacher = FakeTeacher(lambda body, n: answer("", 500) if n < 3 else "fine")
    _, _, rows = run(tmp_path, teacher, count=3)
    assert outcomes(rows) == ["ok"] and len(teacher.sent) == 9 and len(set(teacher.sent)) == 3
    teacher = FakeTeacher(lambda body, n: answer(completion("")) if body["messages"][0]["content"] == "q1" else "fine")
    _, _engine, rows = run(tmp_path / "b", teacher, count=3)
    assert rows["row1"][0] == "failed" and outcomes(rows) == ["empty", "ok"] and len(teacher.sent) == 2 + Policy.attempts


def test_failed_rows_stay_failed_until_reopened(tmp_path):
    run(
        tmp_path,
        FakeTeacher(
            lambda body, n: (
                answer({"error": {"code": 400, "message": "too long"}}, 400) if body["messages"][0]["content"] == "q1" else "fine"
            )
        ),
    )
    teacher = FakeTeacher()
    assert outcomes(run(tmp_path, teacher)[2]) == ["ok", "permanent"] and teacher.sent == []
    journal = Journal(tmp_path)
    assert journal.reopen_failed("run") == 1
    journal.close()
    assert outcomes(run(tmp_path, teacher)[2]) == ["ok"] and len(teacher.sent) == 1


def test_rate_limits_wait_as_told_cost_no_attempt_and_close_the_gate_once(tmp_path):
    clock = Clock()
    teacher = FakeTeacher(lambda body, n: answer(LIMIT, 429, retry_after="20") if n <= 7 else "fine")
    start = clock.now
    _, _engine, rows = run(tmp_path, teacher, count=1, clock=clock)
    assert outcomes(rows) == ["ok"] and clock.now - start == pytest.approx(140)
    assert Journal(tmp_path).ledger()[0]["attempts"] == 1


def test_a_burst_without_a_time_doubles_the_wait_once(tmp_path):
    clock, start = Clock(), Clock().now
    teacher = FakeTeacher(lambda body, n: answer(LIMIT, 429) if n == 1 else "fine")
    run(tmp_path, teacher, count=4, clock=clock)
    assert 0.5 <= clock.now - start < 8


def test_an_interrupt_stops_rows_that_make_no_call(tmp_path):
    engines = []

    async def recipe(seed, call):
        if seed.id == "row5":
            engines[0].interrupt()
        return []

    done, _, rows = run(tmp_path, FakeTeacher(), count=50, recipe=recipe, prepare=engines.append)
    assert not done and len(rows) < 20


def test_a_burst_of_limits_waits_once(tmp_path):
    clock, start = Clock(), Clock().now
    teacher = FakeTeacher(lambda body, n: answer(LIMIT, 429, retry_after="20") if n == 1 else "fine")
    run(tmp_path, teacher, count=4, clock=clock)
    assert clock.now - start < 100 and engine_sends(teacher) == 8


def engine_sends(teacher):
    return len(teacher.sent)


@pytest.mark.parametrize(
    "said, message",
    [
        (answer(LIMIT, 429, retry_after="3600"), "asks to wait 3,600 s.*slow down.*concurrency"),
        (answer(LIMIT, 429), "has not answered for .*slow down"),
        (Answer(0, "cannot connect", reached=False), "has not answered for 6.. s.*cannot connect.*Check that http://fake/v1 is up"),
        (answer({"error": {"code": 401, "message": "no such key"}}, 401), "refuses to go on: 401: no such key. Check the API key"),
        (answer({"error": {"code": 402, "message": "can only afford 2666"}}, 402), "can only afford 2666"),
        (answer({"error": {"code": 404, "message": "no model"}}, 404), "no model. Check the model's name"),
    ],
)
def test_what_cannot_get_better_stops_the_run_and_a_later_run_goes_on(tmp_path, said, message):
    teacher = FakeTeacher(lambda body, n: said if body["messages"][0]["content"] != "q0" else "fine")
    with pytest.raises(UserError, match=message):
        run(tmp_path, teacher, count=30)
    teacher = FakeTeacher()
    done, _engine, rows = run(tmp_path, teacher, count=30)
    assert done and outcomes(rows) == ["ok"]
    assert not any('"q0"' in body for body in teacher.sent)  # what was answered is not asked again


def test_a_server_that_was_never_there_is_given_up_sooner_and_the_trouble_is_shown(tmp_path):
    clock, start, engines = Clock(), Clock().now, []
    with pytest.raises(UserError, match="cannot connect"):
        run(tmp_path, FakeTeacher(lambda body, n: Answer(0, "cannot connect", reached=False)), clock=clock, prepare=engines.append)
    assert 60 < clock.now - start < 300 and engines[0].trouble == "cannot connect"


def test_requests_that_are_all_refused_stop_the_run(tmp_path):
    teacher = FakeTeacher(lambda body, n: answer({"error": {"code": 400, "message": "top_p must be an int"}}, 400))
    with pytest.raises(UserError, match="top_p must be an int"):
        run(tmp_path, teacher, count=200)
    assert len(teacher.sent) < BARREN + 10


def test_calls_in_flight_are_kept_when_another_one_stops_the_run(tmp_path):
    async def slow(body, n):
        await asyncio.sleep(0.05)
        return "late"

    teacher = FakeTeacher(lambda body, n: answer("", 401) if body["messages"][0]["content"] == "q0" else slow(body, n))
    with pytest.raises(UserError):
        run(tmp_path, teacher, count=3)
    journal = Journal(tmp_path)
    assert sum(entry["calls"] for entry in journal.ledger() if entry["outcome"] == "ok") == 2
    journal.close()


def test_first_interrupt_drains_and_the_next_run_finishes(tmp_path):
    held = []

    async def reply(body, n):
        held.append(body)
        if len(held) == 3:
            held_engine[0].interrupt()
        await asyncio.sleep(0.01)
        return "fine"

    held_engine = []
    teacher = FakeTeacher(reply)
    done, _, rows = run(tmp_path, teacher, count=20, prepare=held_engine.append)
    assert not done and len(teacher.sent) <= 4 and len(rows) == len(teacher.sent)
    rest = FakeTeacher()
    done, _engine, rows = run(tmp_path, rest, count=20)
    assert done and len(rows) == 20 and len(rest.sent) == 20 - len(teacher.sent)


def test_second_interrupt_stops_at_once(tmp_path):
    engines = []

    async def for_ever(body, n):
        asyncio.get_running_loop().call_soon(engines[0].interrupt)
        await asyncio.Event().wait()

    done, _engine, rows = run(tmp_path, FakeTeacher(for_ever), count=5, prepare=engines.append)
    assert not done and rows == {}


def test_deadline_covers_a_trickle(tmp_path):
    async def never(body, n):
        await asyncio.Event().wait()

    _, engine, rows = run(tmp_path, FakeTeacher(never), count=1, policy=Policy(concurrency=1, deadline=0.01, attempts=2))
    assert outcomes(rows) == ["transient"] and engine.counts["sent"] == 2


def test_concurrency_is_bounded_and_seeds_are_streamed(tmp_path):
    flying, most, drawn = [0], [0], []

    async def reply(body, n):
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        await asyncio.sleep(0.001)
        flying[0] -= 1
        assert len(drawn) - len(finished) <= 2 * 4 + 1
        return "fine"

    finished = []

    async def recipe(seed, call):
        drawn.append(seed.id)
        rows = await one_call(seed, call)
        finished.append(seed.id)
        return rows

    run(tmp_path, FakeTeacher(reply), count=60, recipe=recipe)
    assert most[0] == 4


def test_equal_requests_at_the_same_time_are_sent_once(tmp_path):
    async def recipe(seed, call):
        replies = await asyncio.gather(*(call("draft", [{"role": "user", "content": "same"}]) for _ in range(3)))
        return [["sft", {"id": seed.id, "messages": [], "reason": "", "trail": [{"text": r.text} for r in replies]}]]

    teacher = FakeTeacher()
    run(tmp_path, teacher, recipe=recipe)
    assert len(teacher.sent) == 1


def test_reasoning_that_eats_the_budget_gets_more_room_once(tmp_path):
    def reply(body, n):
        cut = answer({"choices": [{"message": {"content": "", "reasoning": "hmm"}, "finish_reason": "length"}]})
        return cut if body["max_tokens"] == 64 else "fine"

    teacher = FakeTeacher(reply)
    _, _, rows = run(tmp_path, teacher, count=1)
    assert outcomes(rows) == ["ok"] and [json.loads(body)["max_tokens"] for body in teacher.sent] == [64, 256]


def test_a_row_that_breaks_the_recipe_is_rejected_and_a_broken_recipe_stops(tmp_path):
    async def recipe(seed, call):
        if seed.id == "row3":
            raise KeyError("oops")
        return await one_call(seed, call)

    _, _, rows = run(tmp_path, FakeTeacher(), recipe=recipe)
    assert rows["row3"][0] == "failed" and "KeyError: 'oops'" in rows["row3"][1][0][1]["reason"] and len(rows) == 8

    async def broken(seed, call):
        raise KeyError("always")

    with pytest.raises(KeyError, match="always"):
        run(tmp_path / "b", FakeTeacher(), count=100, recipe=broken)


@pytest.mark.parametrize("result", [[["sft", {"x": {1}}]], [["sft", {"x": float("nan")}]], [["sft", {"x": "\ud800"}]], "no rows", None])
def test_a_result_that_cannot_be_kept_is_a_failed_row(tmp_path, result):
    async def recipe(seed, call):
        return result if seed.id == "row3" else await one_call(seed, call)

    _, _, rows = run(tmp_path, FakeTeacher(), recipe=recipe)
    assert rows["row3"][0] == "failed" and rows["row3"][1][0][1]["reason"].startswith("error: ") and len(rows) == 8


def test_half_characters_from_a_teacher_harm_nobody(tmp_path):
    half = "\ud800"
    said = answer(completion(f"half {half}", model=f"m{half}", provider=f"p{half}"))
    _, _, rows = run(tmp_path, FakeTeacher(lambda body, n: said), policy=Policy(concurrency=4, allow_mixed=True))
    assert len(rows) == 8


def test_full_disk_stops_the_run_with_one_line(tmp_path):
    def fill(engine):
        engine.journal._db.execute(f"PRAGMA max_page_count = {engine.journal._one('PRAGMA page_count')[0] + 2}")

    with pytest.raises(UserError, match="the disk is full"):
        run(tmp_path, FakeTeacher(lambda body, n: "x" * 3000), count=50, prepare=fill)


def in_virtual_run(folder, teacher, count, policy, prepare=lambda engine: None):
    """(engine, virtual seconds); the journal does not wait for the disk."""
    journal = Journal(folder)
    journal._db.execute("PRAGMA synchronous = OFF")
    clocks = {"clock": loop_time, "wall": loop_time}

    async def go():
        engine = Engine(teacher, journal, "run", SAMPLING, policy, **clocks)
        prepare(engine)
        assert await engine.run(seeds(count), one_call)
        return engine, loop_time()

    try:
        return in_virtual_time(go())
    finally:
        journal.close()


def test_one_failure_in_a_hundred_costs_next_to_no_time(tmp_path):
    """10,000 rows because that is where a serial tail of retries shows (it would take 100 s here): about 4 s."""
    total = [0.0]

    async def reply(body, n):
        number = int(body["messages"][0]["content"][1:])
        seconds = 0.5 + (number * 7919 % 1000) / 1000
        total[0] += seconds
        await asyncio.sleep(seconds)
        return answer("", 500) if number % 100 == 0 and n == 1 else "fine"

    engine, wall = in_virtual_run(tmp_path, FakeTeacher(reply), 10_000, Policy(concurrency=100))
    assert engine.outcomes == {"ok": 10_000, "transient": 100}
    assert wall < 1.1 * total[0] / 100


def test_rows_that_back_off_leave_their_slots_to_others(tmp_path):
    """Half of the first calls fail and wait 10 to 30 s; the other rows are done meanwhile."""

    async def reply(body, n):
        await asyncio.sleep(1)
        return answer("", 500) if int(body["messages"][0]["content"][1:]) % 2 and n == 1 else "fine"

    _, wall = in_virtual_run(tmp_path, FakeTeacher(reply), 16, Policy(concurrency=8, backoff=20.0))
    assert wall < 35


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(tmp_path):
    times = []

    async def reply(body, n):
        times.append(loop_time())
        return answer("", 503, retry_after="30") if len(times) == 1 else "fine"

    in_virtual_run(tmp_path, FakeTeacher(reply), 12, Policy(concurrency=1))
    assert times[0] < 1 and min(times[1:]) == pytest.approx(30, abs=0.1)


def test_requests_a_minute_are_bounded(tmp_path):
    times = []

    async def reply(body, n):
        times.append(loop_time())
        return "fine"

    _, wall = in_virtual_run(tmp_path, FakeTeacher(reply), 300, Policy(concurrency=50, rpm=100))
    assert max(sum(start <= t < start + 59 for t in times) for start in times) <= 100 and wall < 190


def test_a_call_that_can_never_fit_the_tokens_a_minute_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="--tpm allows 150 a minute"):
        run(tmp_path, FakeTeacher(), policy=Policy(concurrency=4, tpm=150))


def test_the_snapshot_shows_where_the_run_stands(tmp_path):
    engines, seen = [], []

    async def reply(body, n):
        await asyncio.sleep(1)
        seen.append(engines[0].snapshot())
        return answer(LIMIT, 429) if len(seen) == 1 else answer(completion("")) if '"q3"' in json.dumps(body) else "fine"

    engine, _ = in_virtual_run(tmp_path, FakeTeacher(reply), 12, Policy(concurrency=4, attempts=2), engines.append)
    assert seen[0]["in_flight"] == {"teacher": 4} and seen[-1]["limit"] == {"teacher": 3} and seen[1]["limit"] == {"teacher": 3}
    last = engine.snapshot()
    assert {name: last[name] for name in ("rows", "accepted", "rejected", "already_finished", "sent", "replayed", "in_flight", "trouble")} == {
        "rows": 12, "accepted": 11, "rejected": 1, "already_finished": 0, "sent": 14, "replayed": 0, "in_flight": {"teacher": 0}, "trouble": "",
    }  # fmt: skip
    assert last["outcomes"] == {"ok": 11, "empty": 2, "rate_limited": 1} and last["spent_usd"] == pytest.approx(0.013)
    json.dumps(last)


def test_progress_is_told_ten_times_a_second_and_at_the_end(tmp_path):
    told, clock = [], Clock()
    journal = Journal(tmp_path)
    engine = Engine(FakeTeacher(), journal, "run", SAMPLING, FOUR, clock=clock, sleep=clock.sleep)

    async def recipe(seed, call):
        clock.now += 0.02
        return await one_call(seed, call)

    asyncio.run(engine.run(seeds(100), recipe, lambda: told.append(engine.counts["rows"])))
    journal.close()
    assert told[-1] == 100 and 15 <= len(told) <= 25


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """The peak of 1,600 rows is that of 400: seeds are streamed, and nothing is kept by row."""

    class Quiet(FakeTeacher):
        async def send(self, request):
            await asyncio.sleep(0.1)
            return answer(completion("fine"))

    peaks = []
    for count in (100, 400, 1600):  # the first fills caches
        tracemalloc.start()
        in_virtual_run(tmp_path / str(count), Quiet(), count, Policy(concurrency=16))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]
