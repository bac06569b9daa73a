import pytest

from agent.loop import INTERRUPTED, MAX_REJECTIONS, SAME_CALL, TRIES, ContextFull, Reply, Status, run_turn
from soul import conversation
from soul.conversation import assistant, tool_call, user
from workspace.tools import REJECTED, Workspace


class Script:
    """A `generate` that says what it was told to say; the last line again when there is no more."""

    def __init__(self, *replies):
        self.replies, self.seen = list(replies), []

    def __call__(self, messages, *, seed, attempt):
        self.seen.append((list(messages), seed, attempt))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, type) and issubclass(reply, BaseException):
            raise reply
        return reply if isinstance(reply, Reply) else Reply(reply)


def call(name, /, **args):
    return assistant("", tool_call(name, **args))


def bad(problem="<|assistant_end|> is missing"):
    return Reply(assistant("x"), (problem,))


@pytest.fixture
def ws(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    return Workspace(tmp_path)


def run(ws, *replies, ask=lambda name, args: True, **more):
    script = replies[0] if isinstance(replies[0], Script) else Script(*replies)
    messages, status = run_turn([user("hi")], generate=script, workspace=ws, ask=ask, **more)
    assert conversation.validate(messages) == []
    return messages, status


def results(messages):
    return [message["content"] for message in messages if message["role"] == "tool"]


def test_a_model_asked_to_add_a_function_edits_the_real_file(ws):
    old = "    return 1\n"
    script = Script(
        assistant("looking at it first", tool_call("Read", file_path="a.py")),
        assistant("adding it", tool_call("Edit", file_path="a.py", old_string=old, new_string=f"{old}\n\ndef g():\n    return 2\n")),
        assistant("", tool_call("Bash", command="python3 -c 'import a; print(a.g())'")),
        assistant("done, g() gives 2"),
    )
    messages, status = run_turn([user("add a function g that returns 2")], generate=script, workspace=ws, ask=lambda *_: True)
    assert status == Status.answered
    assert (ws.root / "a.py").read_text() == "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert results(messages)[0] == "    1→def f():\n    2→    return 1"
    assert results(messages)[2] == "2"
    assert [message["role"] for message in messages] == ["user"] + ["assistant", "tool"] * 3 + ["assistant"]
    assert script.seen[1][0] == messages[:3], "the model sees its call and the result"


def test_input_messages_are_not_changed(ws):
    before = [user("hi")]
    run_turn(before, generate=Script(assistant("ho")), workspace=ws, ask=lambda *_: True)
    assert before == [user("hi")]


def test_every_draw_has_its_own_seed(ws):
    script = Script(bad(), bad(), call("Read", file_path="a.py"), bad(), assistant("done"))
    assert run(ws, script, seed=7)[1] == Status.answered
    assert [seed for _, seed, _ in script.seen] == [7, 8, 9, 10, 11]
    assert [attempt for *_, attempt in script.seen] == [0, 1, 2, 0, 1]


def test_malformed_replies_end_in_a_status_and_leave_nothing_behind(ws):
    script = Script(bad())
    messages, status = run(ws, script)
    assert (messages, status, len(script.seen)) == ([user("hi")], Status.malformed, TRIES)


@pytest.mark.parametrize("name,args,result", [
    ("Glob", {"pattern": "*"}, "error: unknown tool Glob; the tools are Read, Edit, Grep, Bash"),
    ("Read", {}, "error: Read needs file_path"),
    ("Read", {"file_path": "a.py", "offset": "x"}, "error: Read: offset must be a whole number"),
])  # fmt: skip
def test_wrong_calls_get_a_result_and_nobody_is_asked(ws, name, args, result):
    from soul import tools

    reply = Reply(call(name, **args), (tools.problem(name, args),))
    messages, status = run(ws, reply, assistant("oh"), ask=lambda *_: pytest.fail("asked"))
    assert (results(messages), status) == ([result], Status.answered)


def test_text_cut_by_max_new_is_kept_but_a_cut_call_is_not(ws):
    messages, status = run(ws, Reply(assistant("and then"), ("<|assistant_end|> is missing",), cut=True))
    assert (messages[-1]["content"], status) == ("and then", Status.cut)
    cut_call = Reply(call("Bash", command="rm"), ("call of Bash has no <|tool_call_end|>",))
    assert run(ws, cut_call, ask=lambda *_: pytest.fail("asked"))[1] == Status.malformed


def test_identical_call_is_corrected_once_and_then_ends_the_turn(ws):
    asked = []
    messages, status = run(ws, call("Read", file_path="a.py"), ask=lambda *given: asked.append(given) or True)
    assert status == Status.repeated
    assert results(messages)[1:] == [SAME_CALL, SAME_CALL]
    assert len(asked) == 1


def test_a_call_may_be_repeated_after_an_edit(ws):
    read = call("Read", file_path="a.py")
    edit = call("Edit", file_path="a.py", old_string="1", new_string="2")
    test = call("Bash", command="cat a.py")
    messages, status = run(ws, read, test, edit, test, read, assistant("done"))
    assert status == Status.answered
    assert SAME_CALL not in results(messages)


def test_a_cycle_of_edits_ends(ws):
    there = call("Edit", file_path="a.py", old_string="1", new_string="2")
    back = call("Edit", file_path="a.py", old_string="2", new_string="1")
    ws.run("Read", {"file_path": "a.py"})
    messages, status = run(ws, there, back, there, back, there, back)
    assert status == Status.repeated
    assert results(messages)[2:] == [SAME_CALL] * 3


def test_steps_are_capped(ws):
    script = Script(*(call("Bash", command=f"echo {n}") for n in range(20)))
    messages, status = run(ws, script, max_steps=5)
    assert (status, len(script.seen), len(messages)) == (Status.steps, 5, 11)


def test_rejection_is_told_to_the_model_in_fixed_words(ws):
    messages, status = run(ws, call("Bash", command="touch x"), assistant("all right"), ask=lambda *_: False)
    assert (results(messages), status) == (["rejected by user"], Status.answered)
    assert REJECTED == "rejected by user"
    assert not (ws.root / "x").exists()


def test_rejections_end_the_turn(ws):
    messages, status = run(ws, *(call("Bash", command=f"touch x{n}") for n in range(9)), ask=lambda *_: False)
    assert (results(messages), status) == ([REJECTED] * MAX_REJECTIONS, Status.rejected)


def test_what_was_approved_is_what_runs(ws):
    def ask(name, args):
        args["command"] = "touch evil"
        return True

    run(ws, call("Bash", command="touch good"), assistant("done"), ask=ask)
    assert (ws.root / "good").exists()
    assert not (ws.root / "evil").exists()


def test_context_full_is_a_status(ws):
    messages, status = run(ws, call("Read", file_path="a.py"), ContextFull)
    assert status == Status.context_full
    assert len(results(messages)) == 1


def test_results_are_shortened_before_they_enter_the_context(ws):
    messages, _ = run(ws, call("Read", file_path="a.py"), assistant("done"), shorten=lambda text: text[:5])
    assert results(messages) == ["    1"]


def test_interruption_while_generating_asking_and_running(ws, monkeypatch):
    assert run(ws, KeyboardInterrupt) == ([user("hi")], Status.interrupted)

    def interrupt(*_):
        raise KeyboardInterrupt

    two = assistant("", tool_call("Read", file_path="a.py"), tool_call("Read", file_path="b.py"))
    messages, status = run(ws, two, ask=interrupt)
    assert (results(messages), status) == ([INTERRUPTED, INTERRUPTED], Status.interrupted)
    monkeypatch.setattr(ws, "run", interrupt)
    messages, status = run(ws, two)
    assert (results(messages), status) == ([INTERRUPTED, INTERRUPTED], Status.interrupted)


def test_several_calls_of_one_reply_each_get_a_result(ws):
    two = assistant("", tool_call("Read", file_path="a.py"), tool_call("Grep", pattern="return"))
    messages, _ = run(ws, two, assistant("done"))
    assert results(messages) == ["    1→def f():\n    2→    return 1", "a.py:2:    return 1"]


def test_events_tell_the_whole_story(ws):
    events = []
    run(ws, bad(), call("Read", file_path="a.py"), assistant("done"), on_event=lambda kind, data: events.append((kind, data)))
    assert [kind for kind, _ in events] == ["reply", "reply", "call", "result", "reply", "status"]
    assert [data["usable"] for kind, data in events if kind == "reply"] == [False, True, True]
    assert events[-1][1] == {"status": "answered"}
