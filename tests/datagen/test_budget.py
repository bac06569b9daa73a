"""The limit on money is hard: at any concurrency, over any costs, known or not."""

import asyncio
from decimal import Decimal

import pytest
from fake_teacher import answer, completion, in_virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st

from datagen.budget import Budget, Spent, charge, most_tokens, most_usd
from datagen.teachers import Price
from datagen.wire import Answer, classify, make_request


async def spend(budget, calls):
    """Every call reserves, takes its time, settles for its cost; gives what was paid and how many could not be."""
    paid, refused = Decimal(0), 0

    async def one(most, cost, seconds):
        nonlocal paid, refused
        try:
            held = await budget.reserve(most)
        except Spent:
            refused += 1
            return
        assert budget.spent + budget.reserved <= budget.limit_usd + 1e-12
        await asyncio.sleep(seconds)
        paid += Decimal(cost)
        budget.settle(held, cost)
        assert budget.spent + budget.reserved <= budget.limit_usd + 1e-12

    await asyncio.gather(*(one(*call) for call in calls))
    return paid, refused


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_a_limit_of_one_dollar_is_never_passed_64_wide(random):
    most = [random.choice([0.3, 0.05, random.uniform(0, 0.3)]) for _ in range(64)]
    calls = [(usd, usd * random.choice([0, 1, random.random()]), random.uniform(0, 2)) for usd in most]
    budget = Budget(1.0)
    paid, refused = in_virtual_time(spend(budget, calls))
    assert paid <= 1 and budget.spent == pytest.approx(float(paid)) and budget.reserved == 0
    if not refused:
        assert paid == sum(Decimal(cost) for _, cost, _ in calls)


def test_a_call_that_does_not_fit_waits_for_others_to_settle_for_less():
    budget = Budget(1.0)
    paid, refused = in_virtual_time(spend(budget, [(0.3, 0.01, 1.0)] * 64))
    assert refused == 0 and paid == pytest.approx(Decimal("0.64"))


def test_unknown_cost_is_not_zero_and_spent_money_counts_from_the_start():
    budget = Budget(1.0, spent=0.65)
    paid, refused = in_virtual_time(spend(budget, [(0.3, 0.3, 1.0)] * 3))
    assert paid == pytest.approx(Decimal("0.3")) and refused == 2
    with pytest.raises(Spent, match=r"\$0.9500 of \$1.00 is spent, and the next call may cost \$0.3000. Raise --max-usd"):
        in_virtual_time(budget.reserve(0.3))
    assert in_virtual_time(budget.reserve(0.0)) == 0  # what is free goes on


def test_a_bill_above_its_bound_makes_later_reservations_grow():
    budget = Budget(1.0)
    assert in_virtual_time(spend(budget, [(0.1, 0.2, 0)]))[1] == 0
    assert in_virtual_time(budget.reserve(0.1)) == 2 * 10**11


def test_close_lets_who_waits_go():
    async def go():
        budget = Budget(1.0)
        await budget.reserve(0.9)
        waiting = asyncio.ensure_future(budget.reserve(0.9))
        await asyncio.sleep(0)
        budget.close()
        return await waiting, await budget.reserve(0.01)

    assert in_virtual_time(go()) == (None, None)


@given(st.text(), st.text())
def test_the_bound_on_a_prompt_is_its_bytes_and_the_templates_words(system, user):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    bound = most_tokens(make_request("http://a/v1", {"messages": messages}), messages)
    assert bound >= len((system + user).encode()) + 16 * 2


def test_the_bound_on_a_call_is_prompt_and_completion_and_request():
    assert most_usd(Price(1e-6, 2e-6, 0.001), 1000, 500) == pytest.approx(0.003)


@pytest.mark.parametrize(
    "said, charged",
    [
        (answer(completion("x")), 0.001),
        (answer(completion("x", usage={"prompt_tokens": 3})), 0.5),  # unknown: what was reserved
        (answer({"error": {"code": 500, "message": "x"}}, 500), 0.0),
        (answer({"error": {"code": 429, "message": "x"}}, 429), 0.0),
        (Answer(0, "cannot connect", reached=False), 0.0),
        (Answer(0, "no whole answer within 300 s"), 0.5),  # it may have been billed
    ],
)
def test_what_an_attempt_is_charged(said, charged):
    verdict = classify(said, now=0)
    assert charge(said, verdict, 0.5) == charged
    assert charge(said, verdict, None) == (None if charged == 0.5 else charged)
