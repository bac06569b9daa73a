"""Who may send and when, in virtual time: limits that follow the teacher, gates, rates, retries before new work."""

import asyncio

import pytest
from fake_teacher import in_virtual_time, loop_time
from hypothesis import given
from hypothesis import strategies as st

from datagen.admission import GROW, Admission
from soul.errors import UserError


def admission(most=8, **more):
    return Admission(most, clock=loop_time, **more)


async def leases(admission, count):
    return [await asyncio.wait_for(admission.admit(), 1) for _ in range(count)]


def test_no_more_than_the_limit_are_in_flight():
    async def go():
        gate, most = admission(5), 0

        async def one():
            nonlocal most
            lease = await gate.admit()
            most = max(most, gate.in_flight)
            await asyncio.sleep(1)
            gate.release(lease, ok=True)

        await asyncio.gather(*(one() for _ in range(50)))
        return most, loop_time(), gate.in_flight

    assert in_virtual_time(go()) == (5, pytest.approx(10), 0)


def test_a_burst_cuts_once_and_leases_of_an_older_limit_never_cut_again():
    async def go():
        gate = admission(16)
        old = await leases(gate, 16)
        assert [gate.cut(lease) for lease in old[:10]] == [True] + [False] * 9
        assert gate.limit == 12
        for lease in old:
            gate.release(lease)
        new = await leases(gate, 1)
        for lease in old:
            assert not gate.cut(lease)
        assert gate.cut(new[0]) and gate.limit == 9
        while gate.limit > 1:
            assert gate.cut((await leases(gate, 1))[0])
            gate.in_flight = 0
        gate.cut((await leases(gate, 1))[0])
        assert gate.limit == 1  # never nobody

    in_virtual_time(go())


def test_successes_raise_the_limit_up_to_what_was_asked_for():
    async def go():
        gate, needed = admission(64), []
        gate.limit = 1
        while gate.limit < 64:
            before, count = gate.limit, 0
            while gate.limit == before:
                gate.release(*(await leases(gate, 1)), ok=True)
                count += 1
            needed.append(count)
        assert needed == [min(limit, GROW) for limit in range(1, 64)]
        for _ in range(100):
            gate.release(*(await leases(gate, 1)), ok=True)
        assert gate.limit == 64

    in_virtual_time(go())


def test_the_limit_settles_where_the_server_refuses():
    """A server that takes 10 at a time and is asked for 64: once the limit is down there are few refusals, and it is busy."""

    async def go():
        gate, flying, refused, late, served = admission(64), 0, 0, 0, 0

        async def one():
            nonlocal flying, refused, late, served
            due = None
            while True:
                lease = await gate.admit(due=due)
                flying += 1
                fine = flying <= 10
                await asyncio.sleep(1 if fine else 0.01)
                flying -= 1
                if fine:
                    served += 1
                    return gate.release(lease, ok=True)
                refused += 1
                late += served > 200
                gate.cut(lease)
                gate.release(lease)
                due = loop_time()

        await asyncio.gather(*(one() for _ in range(2000)))
        return refused, late, loop_time()

    refused, late, wall = in_virtual_time(go())
    assert wall < 2000 / 10 / 0.9 and refused < 250 and late < 20


def test_a_gate_holds_everybody_until_the_moment_and_the_later_of_two_counts():
    async def go():
        gate, times = admission(4), []
        gate.shut_until(20)
        gate.shut_until(7)

        async def one():
            gate.release(await gate.admit())
            times.append(loop_time())

        await asyncio.gather(*(one() for _ in range(6)))
        return times

    assert in_virtual_time(go()) == [20] * 6


def test_a_retry_goes_before_new_work_when_it_is_due_and_not_before():
    async def go():
        gate, order = admission(1), []

        async def one(name, due=None):
            lease = await gate.admit(due=due)
            order.append((name, loop_time()))
            await asyncio.sleep(1)
            gate.release(lease)

        await asyncio.gather(one("a"), one("b"), one("c"), one("retry", due=0.5), one("late", due=10), one("d"))
        return order

    assert in_virtual_time(go()) == [("a", 0), ("retry", 1), ("b", 2), ("c", 3), ("d", 4), ("late", 10)]


@pytest.mark.parametrize("rpm", [1, 7, 60, 90, 1000])
def test_no_minute_sees_more_requests_than_rpm_and_the_rate_is_used(rpm):
    async def go():
        gate, times = admission(500, rpm=rpm), []
        for _ in range(3 * rpm):
            gate.release(await gate.admit())
            times.append(loop_time())
        return times

    times = in_virtual_time(go())
    assert max(sum(start <= t < start + 60 - 1e-6 for t in times) for start in times) <= rpm
    assert times[-1] <= 3 * 60 * 1.05 + 1


def test_tokens_per_minute_are_kept_and_what_was_not_used_comes_back():
    async def go(used):
        gate, times = admission(50, tpm=6000), []
        for _ in range(60):
            gate.release(await gate.admit(400), tokens=used)
            times.append(loop_time())
        return times[-1]

    assert in_virtual_time(go(400)) == pytest.approx(60 * 400 / 6000 * 60, rel=0.1)
    assert in_virtual_time(go(None)) == pytest.approx(60 * 400 / 6000 * 60, rel=0.1)
    assert in_virtual_time(go(100)) == pytest.approx(60 * 100 / 6000 * 60, rel=0.2)


def test_a_call_that_can_never_fit_is_an_error():
    async def go():
        await admission(4, tpm=1000).admit(1001)

    with pytest.raises(UserError, match="1,001 tokens, and --tpm allows 1,000 a minute"):
        in_virtual_time(go())


def test_who_waits_at_the_end_is_let_go_without_a_lease():
    async def go():
        gate = admission(1)
        await gate.admit()
        waiting = [asyncio.ensure_future(gate.admit(due=due)) for due in (None, 5.0, 500.0)]
        await asyncio.sleep(0)
        gate.close()
        return await asyncio.gather(*waiting, gate.admit())

    assert in_virtual_time(go()) == [None] * 4


def test_hold_stops_everything_until_resume():
    async def go():
        gate = admission(4)
        [before] = await leases(gate, 1)
        gate.hold()
        asyncio.get_running_loop().call_later(30, gate.resume)
        after = await gate.admit(due=1.0)
        assert loop_time() == 30 and not gate.cut(before) and gate.cut(after)

    in_virtual_time(go())


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.sampled_from(["ok", "limit", "error"]), st.integers(0, 50), st.booleans()), min_size=1, max_size=40
    )
)
def test_whatever_happens_everybody_gets_through_and_limits_hold(calls):
    async def go():
        gate = admission(6, rpm=300, tpm=5000)

        async def one(seconds, outcome, tokens, retry):
            lease = await gate.admit(tokens, due=1.0 if retry else None)
            assert 1 <= gate.in_flight <= 6
            await asyncio.sleep(seconds)
            if outcome == "limit":
                gate.cut(lease)
                gate.shut_until(loop_time() + 2)
            gate.release(lease, ok=outcome == "ok", tokens=tokens // 2)
            assert 1 <= gate.limit <= 6

        await asyncio.gather(*(one(*call) for call in calls))
        return gate.in_flight

    assert in_virtual_time(go()) == 0
