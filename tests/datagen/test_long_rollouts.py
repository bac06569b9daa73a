"""Rollouts against a scripted teacher, through the real engine, journal and tools; only the teacher is not real."""

import asyncio
import json
from dataclasses import replace

import pytest
from fake_teacher import FakeTeacher, answer, completion
from hypothesis import given
from hypothesis import strategies as st

import soulsmith
from datagen import long_rollouts as command
from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.long_rollouts import Config, read_gold, rollouts
from datagen.playing import Play, difference
from datagen.prompting import Prompts
from datagen.protocol import joined_native, joined_text, split_calls, written
from datagen.scenarios import Scenario
from datagen.tool_calls import BadCall
from soul import conversation
from soul.conversation import assistant, tool, tool_call, user
from soul.errors import UserError
from soul.files import canonical_json
from soul.rows import read_rows
from soul.spec import parse_soul, run_checks
from workspace.tools import REJECTED, make_workspace, require_sandbox

SOUL = parse_soul(
    """# moss

a small helper.

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose -->
- keeps it short. <!-- id: short; check: max_words(12) -->
- never shouts. <!-- id: calm; check: no_exclamation; repair: yes -->
- sounds warm. <!-- id: warm -->
- asks nothing in the end. <!-- id: end; check: no_question_in_final_turn -->
- speaks first. <!-- id: first; check: explain_before_act; check: one_call_per_turn; check: read_before_edit -->
"""
)
SCENARIO = Scenario("greetings", "Bash", "easy", "wrong result", "a hurried professional", ["change"], ["Edit", 1], "wants a reason", 2)
SCRIPT = "=== request\nit says bye, not hello\n=== turn 1\nmake it hi\n=== done\ngreet.sh Ann prints hi Ann\n"
PROJECT = '=== greet.sh\necho "bye $1"\n=== README\ngreets\n=== accept\n[ "$(bash greet.sh Ann)" = "hi Ann" ]\n'
READ = tool_call("Read", file_path="greet.sh")
HELLO = tool_call("Edit", file_path="greet.sh", old_string="bye", new_string="hello")
HI = tool_call("Edit", file_path="greet.sh", old_string="hello", new_string="hi")
RUN = tool_call("Bash", command="bash greet.sh Ann")
AGENT = [
    assistant("i'll read it.", READ),
    assistant("it says bye, so i'll change that.", HELLO),  # refused
    assistant("you said no. what would you rather?"),
    assistant("i'll make it hello.", HELLO),
    assistant("i'll run it.", RUN),
    assistant("it says hello now."),
    assistant("i'll make it hi.", HI),
    assistant("i'll run that.", RUN),
    assistant("it says hi now."),
]
STAGES = {
    "You plan": "scenario", "You write small": "project", "You play the user": "person", "in a terminal": "agent", "only your next": "remark",
    "You review": "critique",
}  # fmt: skip


class Cast:
    """Answers by stage; the agent's n-th message is that of the script, in the form that was asked for."""

    def __init__(self, agent=AGENT, **parts):
        self.agent, self.log = agent, []
        self.parts = {"scenario": SCRIPT, "project": PROJECT, "person": "go on, that's why.", "critique": '[{"verdict": "ok"}]'} | parts

    def __call__(self, body, n):
        messages = body["messages"]
        stage = next(name for words, name in STAGES.items() if words in messages[0]["content"])
        stage = "repair-call" if "It cannot be used:" in messages[-1]["content"] else stage
        self.log.append(stage)
        if stage in self.parts:
            said = self.parts[stage]
            return said(messages) if callable(said) else said
        said = self.agent[sum(message["role"] == "assistant" for message in messages)]
        if isinstance(said, dict) and "tools" in body:
            return answer({"model": "fake-1", "choices": [{"message": said, "finish_reason": "tool_calls"}]})
        return said if isinstance(said, str) else written(said)


def play(tmp_path, cast, *, scenario=SCENARIO, soul=SOUL, teacher=None, **options):
    """(results, engine) of one rollout."""
    teacher = teacher or FakeTeacher(cast)
    recipe = rollouts(Play(**{"calls": "text"} | options), soul, Prompts(), [], require_sandbox(True))
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64}
    journal = Journal(tmp_path / "run")
    engine = Engine(teacher, journal, "r", sampling, Policy(attempts=1))
    try:
        asyncio.run(engine.run([scenario.seed], recipe))
        return journal.row(scenario.seed.id, "r").results, engine
    finally:
        journal.close()


def only(results, kind="sft"):
    return [row for other, row in results if other == kind]


def why(tmp_path, cast, **more):
    [[kind, row]], _ = play(tmp_path, cast, **more)
    assert kind == "rejected" and row["accepted"] is False
    return row["reason"]


def files(row):
    return {file["path"]: file["content"] for file in row["files"]}


# --- the whole play


@pytest.mark.parametrize("calls", ["text", "native"])
def test_a_rollout_is_played_refused_changed_and_accepted(tmp_path, calls):
    cast = Cast()
    results, engine = play(tmp_path, cast, calls=calls)
    [row] = only(results)
    assert [kind for kind, _ in results] == ["sft"] and row["served"] == ["fake-1"]
    said = row["messages"]
    assert [m["role"][0] for m in said] == list("uatatauatatauatata")
    assert said[0]["content"] == "it says bye, not hello" and said[-1]["content"] == "it says hi now."
    assert [m["content"] for m in said if m["role"] == "tool"][1] == REJECTED
    assert said[10]["content"] == "hello Ann" and said[14]["content"].startswith("edited greet.sh")
    assert [m for m in said if m["role"] == "assistant"] == AGENT  # a question in the middle of the talk is fine
    assert files(row) == {"greet.sh": 'echo "bye $1"\n', "README": "greets\n"}
    assert not run_checks(SOUL, said) and all(check["ok"] for check in row["checks"])
    assert cast.log.count("agent") == 9 and cast.log.count("person") == 2 and cast.log[-1] == "critique"
    assert len({step["key"] for step in row["trail"]}) == engine.counts["sent"] == len(cast.log)
    assert "small helper" not in json.dumps(said)


def test_what_the_user_is_told_of_the_refusal_and_of_the_change(tmp_path):
    teacher = FakeTeacher(Cast())
    play(tmp_path, None, teacher=teacher)
    told = [m["messages"][-1]["content"] for m in map(json.loads, teacher.sent) if "You play the user" in m["messages"][0]["content"]]
    assert "did not permit this call" in told[0] and '"new_string": "hello"' in told[0] and "wants a reason" in told[0]
    assert "Now bring this up (change): make it hi" in told[1]


def test_killed_after_every_call_it_goes_on_and_ends_the_same(tmp_path):
    """Each life replays what the ones before it asked, runs the tools again, asks one thing more and dies."""
    [whole], engine = [only(r) for r in [play(tmp_path / "whole", Cast())[0]]], None
    cast, lives, asked = Cast(), 0, []
    while True:
        left = iter([True])

        def reply(body, n, left=left):
            if not next(left, False):
                raise UserError("killed")
            return cast(body, n)

        teacher = FakeTeacher(reply)
        try:
            results, engine = play(tmp_path / "lives", None, teacher=teacher)
            asked += teacher.sent
            break
        except UserError:
            asked.append(teacher.sent[0])
            lives += 1
    assert canonical_json(only(results)) == canonical_json(whole)
    assert lives == 13 and len(asked) == len(set(asked)) == 14  # nothing was asked for twice
    assert engine.counts["replayed"] == 13


def test_every_recorded_call_repeats_from_the_files_of_the_row(tmp_path):
    [row] = only(play(tmp_path, Cast())[0])
    assert difference(row["messages"], make_workspace(files(row), tmp_path)) == ""
    (tmp_path / "again").mkdir()
    changed = files(row) | {"greet.sh": 'echo "bye, $1"\n'}
    assert (
        difference(row["messages"], make_workspace(changed, tmp_path / "again")) == "Read gives another result when it runs again (call 1)"
    )


def test_results_that_do_not_repeat_are_no_data(tmp_path):
    agent = [*AGENT[:8], assistant("one more.", tool_call("Bash", command="echo $RANDOM$RANDOM")), AGENT[8]]
    assert why(tmp_path, Cast(agent)) == "Bash gives another result when it runs again (call 7)"


# --- calls that are not sound


BROKEN = "i'll read it.\n<tool_call>\n{'name': 'Read'}\n</tool_call>"


def test_a_broken_call_is_mended_once(tmp_path):
    cast = Cast([BROKEN, *AGENT[1:]], **{"repair-call": written(AGENT[0])})
    [row] = only(play(tmp_path, cast)[0])
    assert row["messages"][1] == AGENT[0] and cast.log.count("repair-call") == 1
    assert why(tmp_path / "b", Cast([BROKEN], **{"repair-call": BROKEN})).startswith("agent: the call is not JSON")


def test_two_calls_at_once_break_the_soul_before_they_are_run(tmp_path):
    both = assistant("i'll do both.", READ, RUN)
    told = []
    cast = Cast([both, *AGENT[1:]], **{"repair-call": lambda messages: told.append(messages[-1]["content"]) or written(AGENT[0])})
    assert only(play(tmp_path, cast)[0])
    assert "speaks first. (2 calls in one message)" in told[0] and '"command": "bash greet.sh Ann"' in told[0]


def test_a_message_that_cites_a_rule_is_written_again(tmp_path):
    cast = Cast([assistant("as [short] says, i'll read it.", READ), *AGENT[1:]], **{"repair-call": written(AGENT[0])})
    assert only(play(tmp_path, cast)[0])[0]["messages"][1] == AGENT[0]


def test_unknown_tools_and_wrong_arguments_get_the_real_error(tmp_path):
    odd = [assistant("i'll look.", tool_call("List", path=".")), assistant("hm.", tool_call("Read", file_path="greet.sh", offset="x"))]
    lost = assistant("maybe here.", tool_call("Read", file_path="greeet.sh"))
    [row] = only(play(tmp_path, Cast([*odd, lost, *AGENT]))[0])
    results = [m["content"] for m in row["messages"] if m["role"] == "tool"]
    assert results[0].startswith("error: unknown tool List") and results[1] == "error: Read: offset must be a whole number"
    assert results[2] == "error: greeet.sh does not exist; did you mean greet.sh?"


def test_a_tool_that_the_soul_does_not_have_is_never_run(tmp_path):
    soul = replace(SOUL, tools=("Read", "Edit"))
    cast = Cast(AGENT, **{"repair-call": written(AGENT[4])})
    assert why(tmp_path, cast, soul=soul) == "agent: there is no tool Bash"


def test_going_in_circles_and_never_ending_are_told(tmp_path):
    assert why(tmp_path, Cast([AGENT[0]] * 9)) == "agent: goes round in circles"
    assert why(tmp_path / "b", Cast([*AGENT[:2], AGENT[1]])) == "agent: repeats a call that was refused"
    assert why(tmp_path / "c", Cast(), steps=2) == "agent: no end of its turn"
    assert why(tmp_path / "d", Cast(), context=100) == "too long"


def test_the_same_call_may_come_again_when_something_has_changed_or_the_user_has_spoken(tmp_path):
    calm = replace(SCENARIO, refuse=[])
    again = [AGENT[0], RUN, HELLO, RUN, HI, RUN, "done now.", "it is hi."]
    agent = [assistant("i'll try.", one) if one in (RUN, HELLO, HI) else assistant(one) if isinstance(one, str) else one for one in again]
    assert len(only(play(tmp_path, Cast(agent), scenario=calm)[0])) == 1
    asking = replace(calm, talk=["question", "question", "change"])
    script = SCRIPT.replace("=== turn 1\nmake it hi", "=== turn 1\nhm\n=== turn 2\nwhat\n=== turn 3\nmake it hi")
    look = [AGENT[0], assistant("it says bye.")]
    agent = [*look, *look, *look, AGENT[0], AGENT[3], AGENT[6], AGENT[8]]
    assert len(only(play(tmp_path / "b", Cast(agent, scenario=script), scenario=asking)[0])) == 1


# --- the SOUL


def test_a_message_that_breaks_a_check_is_said_again_and_makes_a_pair(tmp_path):
    loud = assistant("i will now make it say Hello.", HELLO)
    told = []
    cast = Cast([*AGENT[:3], loud, *AGENT[4:]], remark=lambda messages: told.append(messages[-1]["content"]) or "i'll make it hello.")
    results, _ = play(tmp_path, cast)
    [row], [pair] = only(results), only(results, "preference")
    assert [m for m in row["messages"] if m["role"] == "assistant"] == AGENT and row["principles"] == ["lower"]
    assert pair["chosen"] == [AGENT[3]] and pair["rejected"] == [loud] and pair["prompt"] == row["messages"][:7]
    assert pair["principles"] == ["lower"] and pair["files"] == row["files"] and pair["id"] == row["id"] + "-7"
    assert "writes in lowercase." in told[0] and '"Hello"' in told[0] and '"new_string": "hello"' in told[0]


def test_a_program_repairs_what_it_can_and_nobody_is_asked(tmp_path):
    cast = Cast([assistant("i'll read it!", READ), *AGENT[1:]])
    results, _ = play(tmp_path, cast)
    assert only(results)[0]["messages"][1] == AGENT[0] and "remark" not in cast.log
    assert only(results, "preference")[0]["rejected"] == [assistant("i'll read it!", READ)]


def test_what_stays_wrong_is_rejected_with_its_principle(tmp_path):
    loud = [assistant("I'll Read It.", READ)]
    assert why(tmp_path, Cast(loud, remark="Still Loud.")) == "checks: lower"
    assert why(tmp_path / "b", Cast(loud, remark="sorry, here's my revised reply: i'll read it.")) == "checks: lower"
    hasty = [assistant("i'll change it.", HELLO)]
    assert why(tmp_path / "c", Cast(hasty, **{"repair-call": written(hasty[0])})).startswith("agent: speaks first. (edits greet.sh")


def test_an_edit_that_fails_ends_it_at_once_where_the_soul_forbids_it(tmp_path):
    soul = parse_soul("# moss\n\na helper.\n\n## Principles\n\n- edits well. <!-- id: sure; check: unique_old_string -->\n")
    lost = assistant("i'll change it.", tool_call("Edit", file_path="greet.sh", old_string="nothing", new_string="x"))
    cast = Cast([AGENT[0], lost, AGENT[2]])
    assert why(tmp_path, cast, soul=soul, scenario=replace(SCENARIO, refuse=[])) == "checks: sure" and cast.log.count("agent") == 2


def test_an_edit_that_fails_and_is_put_right_is_kept_where_the_soul_allows_one(tmp_path):
    soul = parse_soul("# moss\n\na helper.\n\n## Principles\n\n- edits well. <!-- id: sure; check: max_failed_edits(1) -->\n")
    lost = assistant("i'll change it.", tool_call("Edit", file_path="greet.sh", old_string="goodbye", new_string="hello"))
    scene = {"soul": soul, "scenario": replace(SCENARIO, refuse=[])}
    [row] = only(play(tmp_path, Cast([AGENT[0], lost, *AGENT[3:]]), **scene)[0])
    assert row["messages"][4]["content"].startswith("error: old_string not found") and row["messages"][6]["content"].startswith("edited")
    assert why(tmp_path / "b", Cast([AGENT[0], lost, lost]), **scene) == "checks: sure"
    assert why(tmp_path / "c", Cast([AGENT[0], lost, assistant("that's that.")]), **scene) == "checks: sure"


def test_the_last_message_is_held_to_what_only_a_last_one_must_keep(tmp_path):
    asking = [*AGENT[:8], assistant("shall i go on? it says hi now."), AGENT[8]]
    cast = Cast(asking, remark="it says hi now.")
    results, _ = play(tmp_path, cast)
    assert only(results)[0]["messages"][-1] == AGENT[8] and only(results, "preference")[0]["principles"] == ["end"]


def test_a_question_of_the_agent_is_answered(tmp_path):
    cast = Cast([*AGENT[:5], assistant("is hello right?"), AGENT[5], *AGENT[6:]])
    results, _ = play(tmp_path, cast)
    assert len(only(results)) == 1 and cast.log.count("person") == 3


def test_the_critic_has_a_message_said_again(tmp_path):
    finding = json.dumps([{"principle": "warm", "quote": "it says hello now.", "why": "cold", "verdict": "violates"}])
    results, _ = play(tmp_path, Cast(critique=finding, remark="there, it says hello now, friend."))
    [row], [pair] = only(results), only(results, "preference")
    assert row["messages"][11]["content"] == "there, it says hello now, friend." and pair["principles"] == ["warm"]
    assert pair["rejected"][0]["content"] == "it says hello now." and pair["prompt"] == row["messages"][:11]
    assert why(tmp_path / "b", Cast(critique=finding, remark="WARM AND LOUD.")) == "critic: warm"
    nowhere = finding.replace("it says hello now.", "")
    [row] = only(play(tmp_path / "c", Cast(critique=nowhere))[0])
    assert row["trail"][-1] == {"stage": "critique-without-place", "text": "warm: cold", "key": ""}
    assert "critique" not in (cast := Cast(), play(tmp_path / "d", cast, critic=False))[0].log


# --- acceptance


def test_what_is_not_done_or_was_done_before_is_no_data(tmp_path):
    [[_, row]], _ = play(tmp_path, Cast([*AGENT[:6], AGENT[5]]))
    assert row["reason"] == "acceptance fails (exit code: 1)" and row["messages"][-1] == AGENT[5] and files(row)["README"] == "greets\n"
    done = PROJECT.replace("bye", "hi")
    assert why(tmp_path / "b", Cast(project=done)) == "accepts from the start"
    tidy = replace(SCENARIO, trouble="clean-up", talk=[], refuse=[])
    cast = Cast([AGENT[0], assistant("all is tidy.")], project=done, scenario=SCRIPT.replace("=== turn 1\nmake it hi\n", ""))
    assert len(only(play(tmp_path / "c", cast, scenario=tidy)[0])) == 1


def test_the_agent_cannot_pass_by_changing_how_it_is_tested(tmp_path):
    cheat = assistant("i'll end it.", tool_call("Bash", command="printf 'echo accepted\\n' > accept; printf 'echo accepted' > greet.sh"))
    assert why(tmp_path, Cast([*AGENT[:6], cheat, assistant("done now.")])).startswith("acceptance fails")


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("scenario", "no idea", "scenario: no request"),
        ("scenario", SCRIPT.replace("it says bye, not hello", "count.py says 3 for my data.txt"), "scenario: request repeats the prompt"),
        ("project", "=== a\nx\n=== accept\ntrue\n", "project: 1 files; 2 to 16 are allowed"),
        ("project", answer(completion("=== a", finish="length")), "project: truncated (cut at max_tokens)"),
        ("person", answer({"error": {"code": 400, "message": "no"}}, 400), "person: permanent"),
        ("person", "<tool_call>", "person: calls a tool"),
    ],
)
def test_other_parts_that_fail_say_where(tmp_path, part, text, reason):
    assert why(tmp_path, Cast(**{part: text})) == reason


# --- the protocol


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{}</tool_call>", "a call is"),
        ('<tool_call>{"name": "Read", "arguments": {}, "id": 1}</tool_call>', "a call is"),
        ('<tool_call>["Read"]</tool_call>', "a call is"),
        ('<tool_call>{"name": "Read", "arguments": "x"}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "Read", "arguments": {}}', "missing after the call"),
        ('<tool_call>{"name": "Read", "arguments": {}}</tool_call> the file says', "something stands after"),
        ("hello</tool_call>", "without"),
        ("<tool_call>" + "[" * 100_000, "not JSON"),
    ],
)
def test_a_call_in_text_is_read_strictly(text, reason):
    with pytest.raises(BadCall, match=reason):
        split_calls(text)


@given(st.text(max_size=40), st.lists(st.dictionaries(st.text(max_size=8), st.text(max_size=30), max_size=3), max_size=2))
def test_what_is_written_is_read_again(text, calls):
    text = text.replace("<tool_call>", "").replace("</tool_call>", "").strip()
    message = assistant(text, *(conversation.call_from("Edit", args) for args in calls))
    assert split_calls(written(message)) == (text, conversation.calls_of(message))


def test_conversations_as_teachers_with_and_without_tools_see_them():
    said = [user("go"), assistant("both.", READ, RUN), tool("1"), tool("2"), assistant("ok."), user("more"), user("note")]
    shown = joined_text([conversation.system("be moss")], said)
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert shown[3]["content"] == "<tool_response>\n1\n</tool_response>\n\n<tool_response>\n2\n</tool_response>"
    native = joined_native([conversation.system("be moss")], said)
    ids = [call["id"] for call in native[2]["tool_calls"]]
    assert ids == [m["tool_call_id"] for m in native if m["role"] == "tool"] and set(map(len, ids)) == {9}
    assert "id" not in READ and native[-1] == user("more\n\nnote")


# --- the command


def test_the_command_makes_a_dataset_and_goes_on_for_nothing(tmp_path, monkeypatch):
    from datagen import generate

    (tmp_path / "SOUL.md").write_text(
        "# moss\n\na helper.\n\n## Principles\n\n- writes in lowercase. <!-- id: lower; check: lowercase_prose -->\n"
    )
    (tmp_path / "gold.jsonl").write_text(json.dumps({"messages": [user("hm"), assistant("a gold answer")]}) + "\n")
    monkeypatch.setattr(command, "scenarios", lambda *args: [SCENARIO, replace(SCENARIO, domain="other")])
    teachers = []

    def opened(spec, **routes):
        teachers.append(FakeTeacher(Cast()))
        return teachers[-1]

    monkeypatch.setattr(generate, "open_teacher", opened)
    config = Config(
        teacher="local:x", out=tmp_path / "run", soul=tmp_path / "SOUL.md", gold=tmp_path / "gold.jsonl", languages=("bash",),
        allow_unsafe=True, n=2,
    )  # fmt: skip
    monkeypatch.setitem(soulsmith.COMMANDS, "rollouts", ("datagen.long_rollouts", ""))
    assert command.main(replace(config, pilot=1)) == 0 and not (tmp_path / "run/data").exists()
    priced = json.loads((tmp_path / "run/plan.json").read_text())
    assert (priced["rows"], priced["open"]) == (2, 1) and priced["prompt_tokens"]["value"] > 0
    piloted = teachers.pop()
    assert soulsmith.run_command("rollouts", config) == 0
    assert teachers[0].sent and not set(teachers[0].sent) & set(piloted.sent)  # nothing is paid twice
    assert len(read_rows(tmp_path / "run/data/sft.parquet")) == 2
    assert "assistant: a gold answer" in "".join(piloted.sent)
    saved = soulsmith.config_from_json(Config, json.loads((tmp_path / "run/rollouts.json").read_text()), "saved")
    assert saved == config and command.main(saved) == 0 and teachers[1].sent == []
    run_ids = {command.prepare(replace(config, **other))[0].run_id for other in ({}, {"play": Play(rounds=1)}, {"gold": None})}
    assert len(run_ids) == 3  # whatever decides a row makes another run of it
    assert f"soulsmith rollouts --config {tmp_path / 'run/rollouts.json'}" in (tmp_path / "run/data/README.md").read_text()


def test_gold_that_is_no_conversation_is_one_clear_line(tmp_path):
    path = tmp_path / "gold.jsonl"
    for bad, reason in (("{}", "is no conversation"), ('{"messages": [{"role": "x", "content": ""}]}', "role must be one of")):
        path.write_text(bad + "\n")
        with pytest.raises(UserError, match=reason) as caught:
            read_gold(path)
        assert f"{path}:1" in str(caught.value)
    assert read_gold(None) == []
