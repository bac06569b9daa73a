"""Prices before they are paid."""

import asyncio
import json
import random
import threading
from dataclasses import replace

import pytest

from datagen.chaos import Chaos
from datagen.chaos import Config as ChaosConfig
from datagen.generate import Config as Generate
from datagen.generate import main as generate
from datagen.plan import Config, draw, forecast, lines, total
from datagen.plan import main as plan
from datagen.recipes.critique_revise import CritiqueRevise
from datagen.since import RowCost
from soul.errors import UserError
from soul.rows import read_rows

SOUL = """# moss

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose; repair: yes -->
- is brief. <!-- id: short; check: max_words(200) -->
"""


@pytest.fixture
def served():
    """A chaos server without faults, in a thread of its own."""
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    chaos = Chaos(ChaosConfig())

    async def serve():
        async with chaos:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    yield chaos
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def test_the_interval_of_a_sum_covers_it_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(600):
        cost = [rng.lognormvariate(0, 0.5) for _ in range(220)]
        found = total(cost[:20], 200)
        hits += found["low"] <= sum(cost[20:]) <= found["high"]
    assert 0.85 < hits / 600 < 0.94  # asked: 0.90; a sample of 20 skewed costs gives a little less


def test_a_total_of_nothing_and_of_one():
    assert total([2.0, 4.0], 0) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert total([2.0], 10) == {"value": 20.0, "low": 20.0, "high": 20.0}


def test_unknown_cost_is_not_nothing():
    told = forecast([RowCost(2, None, 100, 50), RowCost(2, 0.1, 100, 50)], [1.0, 1.0], 100, 10)
    assert told["usd"] is None and told["prompt_tokens"]["value"] == 10_000
    assert told["minutes"]["value"] == pytest.approx(100 / 10 / 60)
    assert any("cost               unknown" in text for text in lines(told, 120, 100, 2))
    assert any("$5.00" in text for text in lines(forecast([RowCost(1, 0.05, 1, 1)] * 3, [], 100, 8), 100, 100, 3))


def test_the_pilot_is_spread_and_the_same_each_time():
    ids = [f"row-{n}" for n in range(1000)]
    drawn = draw(ids, 20)
    assert drawn == draw(list(reversed(ids)), 20) and len(drawn) == 20
    assert max(int(row_id[4:]) for row_id in drawn) > 500 > min(int(row_id[4:]) for row_id in drawn)
    assert draw(ids[:5], 20) == set(ids[:5])


# ---- the commands, end to end, against a server in this process


@pytest.fixture
def given(tmp_path):
    (tmp_path / "SOUL.md").write_text(SOUL)
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(60)))
    return tmp_path


def settings(given, served, out="run", **more):
    return Generate(
        seeds=given / "seeds.jsonl", teacher=f"{served.url}#chaos", out=given / out, soul=given / "SOUL.md", concurrency=8,
        critique_revise=CritiqueRevise(critic="checks", rounds=1), **({"price": (1.0, 2.0)} | more),
    )  # fmt: skip


def test_a_pilot_prices_the_run_and_its_rows_are_not_asked_again(given, served, capsys):
    assert plan(Config(settings(given, served), pilot=10)) == 0
    told = json.loads((given / "run/plan.json").read_text())
    assert told["rows"] == 60 and told["open"] == 50 and told["usd"]["low"] < told["usd"]["value"] < told["usd"]["high"]
    assert "60 rows, 50 still to make" in capsys.readouterr().out
    assert generate(settings(given, served)) == 0
    stats = json.loads((given / "run/data/stats.json").read_text())
    assert served.counts["repeats"] == 0  # nothing was paid twice
    rest = stats["cost_usd"] - told["usd"]["value"] / 50 * 10
    assert told["usd"]["low"] * 0.9 < rest < told["usd"]["high"] * 1.1


def test_the_limit_holds_and_the_run_goes_on_under_a_higher_one(given, served):
    with pytest.raises(UserError, match="max-usd"):
        generate(settings(given, served, max_usd=0.004))
    assert served.usd <= 0.004
    status = json.loads((given / "run/status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["rows"] < 60 and status["spent_usd"] <= 0.004
    assert generate(settings(given, served, max_usd=1.0)) == 0
    assert len(read_rows(given / "run/data/sft.parquet")) + len(read_rows(given / "run/data/rejected.parquet")) == 60
    assert served.counts["repeats"] == 0
    assert json.loads((given / "run/status.json").read_text())["state"] == "done"


def test_a_limit_needs_a_price(given, served):
    with pytest.raises(UserError, match="price"):
        generate(replace(settings(given, served, max_usd=1.0), price=None))
    assert served.counts["requests"] == 0


def test_an_edit_of_the_soul_keeps_what_it_does_not_touch(given, served, capsys):
    generate(settings(given, served))
    before, asked = {row["id"]: row for row in read_rows(given / "run/data/sft.parquet")}, served.counts["requests"]
    (given / "SOUL.md").write_text(SOUL.replace("max_words(200)", "max_words(35)"))
    again = settings(given, served, "next", since=given / "run")
    assert plan(Config(again, pilot=0)) == 0
    assert "changed: short" in capsys.readouterr().out
    touched = json.loads((given / "next/plan.json").read_text())["touched"]
    assert touched and set(touched) < set(before) and served.counts["requests"] == asked
    generate(again)
    assert served.counts["requests"] - asked <= 2 * len(touched)
    rows = read_rows(given / "next/data/sft.parquet") + read_rows(given / "next/data/rejected.parquet")
    kept = {row["id"] for row in rows if row["trail"][-1]["stage"] == "kept"}
    assert kept == set(before) - set(touched) and len(rows) == 60
    assert all(before[row["id"]]["messages"] == row["messages"] for row in rows if row["id"] in kept)
    with pytest.raises(UserError, match="another teacher"):
        plan(Config(replace(again, teacher="local:smollm2-135m", concurrency=None), pilot=0))
