"""Rollouts of two requests: one workspace, each call true in it, and neither request in the other's way."""

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from datagen.code_changes import Unsuitable
from datagen.code_seeds import read_code, split
from datagen.convert import collect, identity
from datagen.from_code import KINDS, Pool, add, edit, explain, find, run, turns
from datagen.phrases import TALK, Voice
from datagen.rollouts import execute, judged, preference, speak
from datagen.talk import AFTER, BEFORE, talk
from datagen.tasks import joined
from soul.conversation import assistant, calls_of, tool_call, user, validate
from soul.spec import load_soul, run_checks


@pytest.fixture(scope="module")
def pool():
    return Pool(split(read_code("stdlib"))[0])


@pytest.fixture(scope="module")
def voice():
    return Voice(load_soul("soul/SOUL.md"))


def drawn(make, pool, n=60, **more):
    for seed in range(n):
        with suppress(Unsuitable):
            yield make(random.Random(seed), pool, **more)


def test_two_requests_are_answered_one_after_the_other(pool, voice):
    seen = set()
    for number, task in enumerate(drawn(turns, pool, 80)):
        messages, _ = speak(task, execute(task), voice, random.Random(number))
        assert validate(messages) == [] and run_checks(voice.soul, messages) == []
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        assert len(asked) == 2 and asked[0] == 0 and messages[0]["content"] == task.request
        assert messages[asked[1] - 1]["role"] == "assistant" and not calls_of(messages[asked[1] - 1])
        first, second = messages[: asked[1]], messages[asked[1] :]
        assert task.steps[0].situation not in ("thanked", "parted") and task.steps[-1].situation != "greeted"
        seen.add(tuple("work" if any(calls_of(message) for message in part) else "talk" for part in (first, second)))
        assert judged(task, messages, voice, random.Random(0)) == ("", None)  # a pair about the call is of one request
        assert (pair := preference(task, messages, voice, random.Random(0))) is None or pair[0] == messages[: len(pair[0])]
    assert seen == {("work", "talk"), ("talk", "work"), ("work", "work"), ("talk", "talk")} and turns in KINDS


def test_what_is_said_fits_its_place(pool):
    assert {task.steps[0].situation for task in drawn(talk, pool, among=BEFORE)} >= {"greeted", "tools"}
    after = {task.steps[0].situation for task in drawn(talk, pool, among=AFTER)}
    assert "thanked" in after and "greeted" not in after and after <= TALK - {"told"}


def test_slots_and_files_of_both_are_kept_apart(pool):
    first, second = next(drawn(add, pool)), next(drawn(explain, pool))
    both = joined(first, second)
    assert [step.slots["file"] for step in both.steps] == [first.slots["file"]] * 3 + [second.slots["file"]] * 3
    assert both.steps[2].reply == second.request and both.files == first.files | second.files and both.final == first.final
    assert list(both.files) == sorted(both.files) and both.must_contain == first.must_contain and both.source == first.source
    assert joined(talk(random.Random(0)), first).source == first.source


def test_requests_that_would_disturb_each_other_are_not_joined(pool):
    one, other = next(drawn(edit, pool)), next(drawn(find, pool))
    path = next(iter(one.files))
    with pytest.raises(Unsuitable, match="of that name"):
        joined(one, replace(other, files={**other.files, f"elsewhere/{path.rpartition('/')[2]}": ""}))
    for first, second in ((one, other), (other, one)):
        with pytest.raises(Unsuitable, match="find the other's"):
            joined(first, replace(second, files={"found.py": f"def {first.slots['name']}():\n    pass\n"}))
    listed = next(task for task in drawn(run, pool) if task.kind == "run_list")
    for pair in ((listed, one), (one, listed)):
        with pytest.raises(Unsuitable, match="find the other's"):
            joined(*pair)
    assert joined(listed, talk(random.Random(0), among=AFTER)).steps[-2].reply


def test_a_greeting_may_come_again_with_another_reply_but_not_a_request_for_work():
    def row(*messages):
        return {"messages": list(messages), "reason": "talk"}

    call = tool_call("Grep", pattern="def f")
    rows = [row(user("hi"), assistant(reply)) for reply in ("hello.", "hey.", "hello.")]
    rows += [row(user("find f"), assistant(reply, call)) for reply in ("looking.", "a search.")]
    done, _, stats = collect([("talk", "", one, None) for one in rows], 9)
    assert done == [rows[0], rows[1], rows[3]] and stats["dropped"] == {"talk: duplicate request": 2}
    assert identity(rows[0]["messages"]) != identity(rows[1]["messages"])
