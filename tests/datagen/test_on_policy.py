import json
from types import SimpleNamespace

import pytest

from datagen import on_policy
from datagen.on_policy import MISSING, NEEDLESS, Config, balanced, choose, judge, main
from soul.conversation import assistant, calls_of, tool, tool_call, user
from soul.errors import UserError
from soul.rows import write_rows
from soul.spec import parse_soul
from training.data import load_rows

SOUL = parse_soul("# S\n## principles\n- writes prose in lowercase. <!-- check: lowercase_prose -->\n")
CALL = tool_call("Grep", pattern="def load")
FIND = {
    "id": "a",
    "source": "code",
    "files": [],
    "messages": [user("find load"), assistant("looking.", CALL)],
}
TALK = {"id": "b", "source": "code", "files": [], "messages": [user("hi"), assistant("hi.")]}


def replied(message: dict, *problems: str) -> SimpleNamespace:
    return SimpleNamespace(messages=[message], problems=list(problems))


def test_a_needless_call_loses_to_the_answer():
    verdict, pair = judge(TALK, replied(assistant("i'll grep for hi.", CALL)), True, SOUL)
    assert verdict == pair["reason"] == "needless_call" and pair["principles"] == [] and pair["soul_hash"] == SOUL.hash
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([user("hi")], [assistant("hi.")], [assistant("i'll grep for hi.", CALL)])


def test_telling_without_a_look_loses_to_the_call():
    verdict, pair = judge(FIND, replied(assistant("It loads.")), True, SOUL)
    assert verdict == pair["reason"] == "told_without_looking" and pair["principles"] == [SOUL.principles[0].id]
    assert pair["chosen"] == [assistant("looking.", CALL)] and pair["rejected"] == [assistant("It loads.")]


@pytest.mark.parametrize("row, reply, problems, finished, verdict", [
    (TALK, assistant("hello."), (), True, "agreed"),
    (FIND, assistant("hm.", tool_call("Read", file_path="load")), (), True, "agreed"),  # which call is another question
    (TALK, assistant("i'll grep", CALL), (), False, "unreadable"),
    (FIND, assistant(" "), (), True, "unreadable"),
    (TALK, assistant("i'll grep", CALL), ("text after a call",), True, "unreadable"),
    (TALK | {"messages": [user("hi"), assistant("Hi.")]}, assistant("i'll grep", CALL), (), True, "needless_call, but the rollout breaks the SOUL"),
])  # fmt: skip
def test_what_makes_no_pair(row, reply, problems, finished, verdict):
    assert judge(row, replied(reply, *problems), finished, SOUL) == (verdict, None)


@pytest.mark.parametrize("n, calling, silent, wanted", [(10, 20, 20, 6), (10, 3, 20, 3), (10, 20, 2, 8), (10, 2, 3, 2), (1, 5, 5, 1)])
def test_three_in_five_prompts_need_a_call(n, calling, silent, wanted):
    rows = [FIND | {"id": f"f{i}"} for i in range(calling)] + [TALK | {"id": f"t{i}"} for i in range(silent)]
    chosen = choose(rows, n, seed=3)
    assert sum(bool(calls_of(row["messages"][1])) for row in chosen) == wanted and len(chosen) == min(n, calling + silent)
    assert len({row["id"] for row in chosen}) == len(chosen) and chosen == choose(rows, n, seed=3)
    assert n == 1 or chosen != choose(rows, n, seed=4)
    assert not 1 < n < len(rows) or {row["id"] for row in chosen} != {row["id"] for row in choose(rows, n, seed=4)}


def test_a_request_is_drawn_from_those_of_a_conversation():
    whole = [
        user("hi"),
        assistant("hi."),
        user("find load"),
        assistant("looking.", CALL),
        tool("x"),
        assistant("there."),
        user("thanks"),
        assistant("ok."),
    ]
    found = {len(choose([TALK | {"messages": whole}], 1, seed)[0]["messages"]) for seed in range(40)}
    assert found == {2, 4, 8}  # up to each first reply, and never to what follows a result
    verdict, pair = judge(TALK | {"messages": whole}, replied(assistant("i'll read.", CALL)), True, SOUL)
    assert verdict == "needless_call" and pair["prompt"] == whole[:-1] and pair["chosen"] == whole[-1:]


@pytest.mark.parametrize("needless, missing, kept", [(12, 3, (9, 3)), (4, 3, (4, 3)), (1, 9, (1, 3)), (5, 0, (3, 0)), (0, 0, (0, 0))])
def test_neither_error_outweighs_the_other(needless, missing, kept):
    pairs = [{"id": i, "reason": reason} for i, reason in enumerate([NEEDLESS] * needless + [MISSING] * missing)]
    found = balanced(pairs)
    assert tuple(sum(pair["reason"] == reason for pair in found) for reason in (NEEDLESS, MISSING)) == kept
    assert found == [pair for pair in pairs if pair in found]


@pytest.mark.parametrize("needless, missing, kept", [(12, 3, (12, 12)), (1, 9, (6, 9)), (5, 0, (5, 5)), (4, 4, (4, 4)), (40, 1, (33, 11))])
def test_what_the_models_own_pairs_lack_is_filled_with_those_of_convert(needless, missing, kept):
    pairs = [{"id": i, "reason": reason} for i, reason in enumerate([NEEDLESS] * needless + [MISSING] * missing)]
    spare = [{"id": f"s{i}", "reason": reason} for i, reason in enumerate([MISSING, "add", NEEDLESS] * 10) if reason != NEEDLESS or i < 15]
    found = balanced(pairs, spare)
    assert tuple(sum(pair["reason"] == reason for pair in found) for reason in (NEEDLESS, MISSING)) == kept
    assert len(found) == sum(kept) == len({pair["id"] for pair in found})


def test_rows_without_a_request_are_no_prompts(tmp_path):
    with pytest.raises(UserError, match="no rollout has a request and a reply"):
        choose([{"messages": [assistant("hi.")]}, {"prompt": []}], 4, 0)
    broken = {"type": "function", "function": {"name": "Grep", "arguments": "[]"}}
    with pytest.raises(UserError, match="row c: message 1, call 0"):
        choose([FIND | {"id": "c", "messages": [user("a"), assistant("b", broken), tool("x"), assistant("there.")]}], 4, 0)
    with pytest.raises(UserError, match="--n, --max-new and --batch begin at 1"):
        main(Config(out=tmp_path, n=0))
    write_rows(tmp_path / "data/rollouts.parquet", [TALK], "sft")
    with pytest.raises(UserError, match="no model"):
        main(Config(out=tmp_path))


def test_the_command_writes_pairs_that_dpo_can_read(tmp_path, monkeypatch):
    own = [assistant("i'll grep.", CALL), assistant("it loads."), assistant("hello.")]
    rows = [TALK, FIND, TALK | {"id": "c"}]
    write_rows(tmp_path / "data/rollouts.parquet", rows, "sft")
    monkeypatch.setattr(
        on_policy, "replies", lambda asked, config: [(row, replied(own[rows.index(named(rows, row))]), True) for row in asked]
    )
    assert main(Config(out=tmp_path)) == 0
    pairs = {pair["id"]: pair for pair in load_rows([tmp_path / "data/on_policy_preference.parquet"], "preference")}
    assert set(pairs) == {"own-a", "own-b"} and pairs["own-a"]["rejected"] == [own[1]] and pairs["own-b"]["chosen"] == TALK["messages"][1:]
    stats = json.loads((tmp_path / "data/on_policy_stats.json").read_text())
    assert stats == {"asked": 3, "pairs": 2, "of_convert": 0, "verdicts": {"agreed": 1, "needless_call": 1, "told_without_looking": 1}}

    made = [pairs["own-a"] | {"id": f"made-{i}", "reason": reason} for i, reason in enumerate([NEEDLESS, MISSING, "add"])]
    write_rows(tmp_path / "data/rollouts_preference.parquet", made, "preference")
    monkeypatch.setattr(on_policy, "replies", lambda asked, config: [(row, replied(own[0]), True) for row in asked if row["id"] != "b"])
    assert main(Config(out=tmp_path)) == 0
    pairs = load_rows([tmp_path / "data/on_policy_preference.parquet"], "preference")
    assert sorted(pair["id"] for pair in pairs) == ["made-1", "own-c"]
    assert json.loads((tmp_path / "data/on_policy_stats.json").read_text())["of_convert"] == 1


def named(rows: list[dict], like: dict) -> dict:
    return next(row for row in rows if row["id"] == like["id"])
