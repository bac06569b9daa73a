"""The journal keeps what was committed, whatever happens next."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
import tracemalloc

import pytest
from fake_teacher import answer, completion
from hypothesis import given, settings
from hypothesis import strategies as st

from datagen.journal import VERSION, Journal
from datagen.wire import classify, make_request
from soul.errors import UserError

SOUL = "you are a goblin. " * 40


def ask(n, text="hi"):
    return make_request(
        "http://a/v1", {"model": "m", "messages": [{"role": "system", "content": SOUL}, {"role": "user", "content": f"{text} {n}"}]}
    )


def put(journal, request, said):
    journal.record(request, said, classify(said, now=0), stage="draft", row_id="r")


OK, EMPTY, LIMIT = answer(completion("yes")), answer(completion("")), answer({"error": {"code": 429, "message": "x"}}, 429)


def test_final_answers_come_back_and_others_are_asked_again(tmp_path):
    journal = Journal(tmp_path)
    put(journal, ask(1), OK)
    put(journal, ask(2), EMPTY)
    assert journal.reply(ask(1).key).body == OK.body and journal.reply(ask(2).key) is None
    put(journal, ask(2), LIMIT)
    put(journal, ask(2), OK)
    [entry] = journal.ledger()
    assert entry["calls"] == 2 and entry["attempts"] == 3  # the rate limit spent none
    assert entry["cost"] == pytest.approx(0.003)  # an empty answer was paid for
    assert journal.request(ask(1).key) == ask(1)
    journal.close()


def test_the_soul_is_stored_once(tmp_path):
    journal = Journal(tmp_path)
    for n in range(50):
        put(journal, ask(n), OK)
    assert journal._one("SELECT count(*), sum(length(text)) FROM blobs") == (1, len(SOUL))
    journal.close()


def test_unknown_cost_is_not_zero(tmp_path):
    journal = Journal(tmp_path)
    put(journal, ask(1), answer(completion("yes", usage=None)))
    assert journal.ledger()[0]["cost"] is None
    journal.close()


def test_second_process_is_refused_and_named(tmp_path):
    journal = Journal(tmp_path)
    script = """if True:
        import sys
        from datagen.journal import Journal
        try:
            Journal(sys.argv[1])
        except Exception as error:
            print(error)
    """
    told = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout
    assert f"pid {os.getpid()}" in told and str(tmp_path) in told
    journal.close()
    Journal(tmp_path).close()


def test_full_disk_is_one_line_and_loses_nothing(tmp_path):
    journal = Journal(tmp_path)
    put(journal, ask(1), OK)
    journal.commit()
    journal._db.execute(f"PRAGMA max_page_count = {journal._one('PRAGMA page_count')[0] + 2}")
    with pytest.raises(UserError, match="the disk is full"):
        for n in range(2, 500):
            put(journal, ask(n, "x" * 150), OK)
    journal.close()
    journal = Journal(tmp_path)
    assert journal.reply(ask(1).key)
    journal.close()


def test_a_file_that_is_no_journal_is_refused_and_the_lock_given_back(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, " * 100)
    for _ in range(2):
        with pytest.raises(UserError, match="not a readable journal"):
            Journal(tmp_path)


def test_waiting_answers_share_one_commit(tmp_path):
    journal, commits = Journal(tmp_path), []
    commit = journal.commit
    journal.commit = lambda: (commits.append(1), commit())

    async def one(n):
        put(journal, ask(n), OK)
        await journal.durable()

    async def all_():
        await asyncio.gather(*map(one, range(100)))

    asyncio.run(all_())
    assert len(commits) == 1
    journal.close()


def test_what_ends_with_a_commit_comes_after_it_and_before_those_who_wait(tmp_path):
    journal, order = Journal(tmp_path), []
    commit = journal.commit
    journal.commit = lambda: (commit(), order.append("commit"))

    async def one(n):
        put(journal, ask(n), OK)
        await journal.durable(lambda: order.append(f"lease {n}"))
        order.append(f"row {n}")

    async def both():
        await asyncio.gather(one(1), one(2))
        await one(3)

    asyncio.run(both())
    assert order == ["commit", "lease 1", "lease 2", "row 1", "row 2", "commit", "lease 3", "row 3"]
    journal.close()


def test_a_commit_that_fails_ends_no_lease(tmp_path):
    journal, ended = Journal(tmp_path), []

    def full():
        raise UserError("the disk is full")

    async def one():
        put(journal, ask(1), OK)
        await journal.durable(lambda: ended.append(1))

    commit, journal.commit = journal.commit, full
    with pytest.raises(UserError, match="disk is full"):
        asyncio.run(one())
    assert not ended
    journal.commit = commit
    journal.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 4), st.sampled_from(["ok", "empty", "limit"])),
        st.tuples(st.just("finish"), st.integers(0, 4), st.sampled_from(["a", "b"])),
        st.tuples(st.just("commit"), st.just(0), st.just("")),
        st.tuples(st.just("kill"), st.just(0), st.just("")),
    ),
    max_size=25,
)


@settings(max_examples=25)
@given(STEPS)
def test_a_kill_costs_only_what_was_not_committed(tmp_path_factory, steps):
    """Random work with kills in between, against a model of what must be there."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    kept, rows, now_kept, now_rows = {}, {}, {}, {}
    said = {"ok": OK, "empty": EMPTY, "limit": LIMIT}
    for step, n, what in steps:
        if step == "put" and now_kept.get(n) != "ok":
            put(journal, ask(n), said[what])
            now_kept[n] = what
        elif step == "finish":
            journal.finish(f"row {n}", "run", what, [["sft", {"id": what}]])
            now_rows[n] = what
        elif step == "commit":
            journal.commit()
            kept, rows = dict(now_kept), dict(now_rows)
        elif step == "kill":
            journal._db.rollback()
            journal._db.close()
            os.close(journal._lock)
            journal, now_kept, now_rows = Journal(folder), dict(kept), dict(rows)
        for n in range(5):
            assert (journal.reply(ask(n).key) is not None) == (now_kept.get(n) == "ok")
            row = journal.row(f"row {n}", "run")
            assert (row.status if row else None) == now_rows.get(n)
    journal.close()


def test_kill_minus_nine_while_writing_leaves_every_committed_answer(tmp_path):
    """The child tells after each commit; what it told must be there after SIGKILL."""
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[2])
        from test_journal import *
        journal = Journal(sys.argv[1])
        for n in range(100000):
            put(journal, ask(n), OK)
            journal.commit()
            print(n, flush=True)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path, os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    last = [int(child.stdout.readline()) for _ in range(40)][-1]
    child.kill()
    rest = child.stdout.read().split()
    child.wait()
    child.stdout.close()
    last = int(rest[-1]) if rest else last
    journal = Journal(tmp_path)
    assert all(journal.reply(ask(n).key) for n in range(last + 1))
    journal.close()


def test_rows_come_in_the_order_of_the_plan(tmp_path):
    journal = Journal(tmp_path)
    assert journal.plan(["c", "a", "b", "a"]) == 1 and journal.planned() == 3
    for row in ("a", "b", "x"):
        journal.finish(row, "run", "finished", [])
    journal.finish("c", "other run", "finished", [])
    assert [row.row_id for row in journal.rows("run")] == ["a", "b"]
    journal.close()


def test_what_calls_share_is_stored_once_and_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path)
    tools = [{"type": "function", "function": {"name": "Read", "description": "reads a file. " * 40}}]
    parts = [{"type": "text", "text": "look at this. " * 40}]
    requests = [
        make_request("http://a/v1", {"messages": [{"role": "user", "content": content}, {"role": "assistant"}], "tools": tools, "n": n})
        for n, content in enumerate([SOUL, SOUL, parts, parts, None, "short"])
    ]
    for request in requests:
        put(journal, request, OK)
    assert journal._one("SELECT count(*) FROM blobs") == (3,)
    assert [journal.request(request.key) for request in requests] == requests
    journal.close()


V1 = """
CREATE TABLE blobs (hash TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (
    key TEXT PRIMARY KEY, stage TEXT, row_id TEXT, base_url TEXT, replicate INTEGER, request TEXT, status INTEGER, response TEXT,
    outcome TEXT, final INTEGER, usage TEXT, cost REAL, model TEXT, provider TEXT, attempts INTEGER, created REAL);
CREATE TABLE rows (row_id TEXT, run TEXT, status TEXT, result TEXT, created REAL, PRIMARY KEY (row_id, run)) WITHOUT ROWID;
CREATE TABLE plan (ordinal INTEGER PRIMARY KEY, row_id TEXT UNIQUE);
INSERT INTO calls VALUES ('k', 'draft', 'r', 'http://a/v1', 0, '{}', 200, '{"x":1}', 'ok', 1, '{"prompt_tokens": 3}', 0.5, 'm', 'P', 1, 0.0);
INSERT INTO rows VALUES ('r', 'run', 'finished', '[["sft",{"id":"r"}]]', 0.0);
INSERT INTO plan VALUES (0, 'r');
PRAGMA user_version = 1;
"""


def test_a_journal_of_version_1_is_taken_over_with_its_data(tmp_path):
    old = sqlite3.connect(tmp_path / "journal.sqlite")
    old.executescript(V1)
    old.close()
    for spent in (0.5, 0.501):
        journal = Journal(tmp_path)
        assert journal.reply("k").body == '{"x":1}' and journal.spent() == spent and journal.noted("run") is None
        assert [row.results for row in journal.rows("run")] == [[["sft", {"id": "r"}]]]
        put(journal, ask(1), OK)
        assert journal._one("PRAGMA user_version") == (VERSION,)
        journal.close()


def test_a_newer_journal_is_refused(tmp_path):
    Journal(tmp_path).close()
    newer = sqlite3.connect(tmp_path / "journal.sqlite")
    newer.execute(f"PRAGMA user_version = {VERSION + 1}")
    newer.close()
    for _ in range(2):
        with pytest.raises(UserError, match="written by a newer soulsmith"):
            Journal(tmp_path)


def test_facts_are_kept(tmp_path):
    journal = Journal(tmp_path)
    journal.note("run", {"soul": "über", "prices": [1e-6, None]})
    journal.note("run", {"soul": "über", "prices": [2e-6, None]})
    journal._db.rollback()  # nothing is left to lose
    assert journal.noted("run") == {"soul": "über", "prices": [2e-6, None]} and journal.noted("other") is None
    journal.close()


def test_the_ledger_sums_to_what_was_spent(tmp_path):
    journal = Journal(tmp_path)

    async def go():
        for n, (said, stage, charged) in enumerate(
            [(OK, "draft", None), (OK, "draft", None), (answer(completion("x", usage=None)), "judge", 0.3), (EMPTY, "judge", 0.002)]
        ):
            flight = journal.sending(stage, 1.0)
            journal.record(ask(n), said, classify(said, now=0), stage=stage, row_id="r", charged=charged, flight=flight)
        flight = journal.sending("judge", 0.2)
        journal.record(ask(3), EMPTY, classify(EMPTY, now=0), stage="judge", row_id="r", charged=0.001, flight=flight)
        journal.sending("revise", 0.25)

    asyncio.run(go())
    ledger = journal.ledger()
    by_stage = {stage: sum(entry["charged"] for entry in ledger if entry["stage"] == stage) for stage in ("draft", "judge", "revise")}
    assert by_stage == pytest.approx({"draft": 0.002, "judge": 0.303, "revise": 0.25})
    assert journal.spent() == pytest.approx(sum(by_stage.values())) == sum(entry["charged"] for entry in ledger)
    assert sum(entry["cost"] or 0 for entry in ledger) == pytest.approx(0.004)  # what was told
    assert sum(entry["calls"] for entry in ledger) == 5 and {entry["served"] for entry in ledger} == {"fake-1", None}
    journal.close()


def test_a_long_plan_is_streamed(tmp_path):
    journal = Journal(tmp_path)
    assert journal.plan(iter(())) == 0 and journal.planned() == 0
    tracemalloc.start()
    assert journal.plan(f"row {n % 49_999}" for n in range(50_000)) == 1
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    assert journal.planned() == 49_999
    journal.close()
