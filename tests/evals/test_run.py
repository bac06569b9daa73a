import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from evals.judge import judge_call, judge_soul, parse_chat_reply
from evals.prompts import Prompt, chat_prompt, from_rows, held_out, overlap, set_hash
from evals.run import Config, contestants, evaluate, print_table
from evals.work import LATER, LOOP_TOKENS, THANKS, first_result, run_loops, solved
from model.sampler import Completion
from soul.conversation import assistant, tool_call, user
from soul.errors import UserError
from soul.rows import write_rows
from soul.spec import parse_soul
from soul.template import SPECIAL_TOKENS, Template

SOUL = parse_soul(
    """---
name: pip
version: "1"
---
## Principles

- writes prose in lowercase. <!-- id: lowercase; check: lowercase_prose -->
- keeps answers short. <!-- id: short; check: max_words(10) -->
- is warm.
"""
)


class Bytes:
    special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    base_special = {"<|im_start|>": 300, "<|im_end|>": 301}

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)

    def decode(self, ids):
        return self.decode_bytes(ids).decode()


class Script:
    """A sampler that says what it is told, in order."""

    def __init__(self, *replies, finish="stop"):
        self.replies, self.finish = replies, finish

    def generate(self, prompts, *, on_done, **_):
        template = Template(Bytes())
        start = len(template.encode([], prompt=True).ids)
        done = [
            Completion(template.encode([reply]).ids[start:] if isinstance(reply, dict) else list(reply.encode()), self.finish)
            for reply in self.replies
        ]
        for i, completion in enumerate(done):
            on_done(i, completion)
        return done


FILES = {"a.py": "def load():\n    return 1\n"}
VERIFY = {"file": "a.py", "must_contain": ["return 2"]}
PROMPTS = [
    Prompt("t0", "edit", [user("make load return 2")], True, FILES, VERIFY),
    Prompt("t1", "talk", [user("what is json.load?")], False),
]


def run(tmp_path, *replies, template="soulsmith", **how):
    (tmp_path / "weights").write_bytes(b"w")
    loaded = SimpleNamespace(tokenizer=Bytes(), meta={}, path=tmp_path / "weights")
    return evaluate(loaded, Script(*replies, **how), PROMPTS, SOUL, template=template, name="sft", config=Config(out=tmp_path))


def values(result, group):
    return {name: (cell["k"], cell["n"]) for name, cell in result["shares"][group].items()}


def test_a_good_contestant(tmp_path):
    result = run(tmp_path, assistant("reading it first.", tool_call("Read", file_path="a.py")), assistant("it reads json from a file."))
    assert values(result, "tools")["valid"] == (1, 1) and values(result, "tools")["no needless call"] == (1, 1)
    assert values(result, "adherence") == {"lowercase": (2, 2), "short": (2, 2), "all at once": (2, 2)}
    assert values(result, "work") == {"runs": (1, 1)}
    assert result["items"][0]["result"].startswith("    1→def load")
    assert [p["text"] for p in result["unverified"]] == ["is warm."]
    assert json.loads(json.dumps(result))["eval_set_hash"] == set_hash(PROMPTS)
    print_table([result])


def test_silence_and_shouting_are_counted_as_failures(tmp_path):
    result = run(tmp_path, assistant("", tool_call("Read", file_path="b.py")), assistant("Sure! I Can Help."))
    assert values(result, "adherence") == {"lowercase": (0, 2), "short": (1, 2), "all at once": (0, 2)}
    assert values(result, "tools")["valid"] == (1, 1) and values(result, "work") == {"runs": (0, 1)}
    assert result["empty"] == 1 and result["cut"] == 0


def test_a_principle_is_judged_only_where_it_can_be_broken():
    checks = {"a": "explain_before_act", "b": "no_question_in_final_turn", "c": "read_before_edit"}
    soul = parse_soul("\n".join(f"- {name}. <!-- id: {name}; check: {check} -->" for name, check in checks.items()))
    read, edit = tool_call("Read", file_path="a.py"), tool_call("Edit", file_path="a.py", old_string="x", new_string="y")
    assert judge_soul(soul, [user("go")], assistant("reading.", read)) == {"a": True, "c": True}
    assert judge_soul(soul, [user("go")], assistant("editing.", edit)) == {"a": True, "c": False}
    assert judge_soul(soul, [user("go")], assistant("shall i?")) == {"b": False}
    for silence in ("", " \n", "`a.py`.", "```python\nprint('Hello there')\n```"):
        assert judge_soul(soul, [user("go")], assistant(silence, read)) == {"a": False, "c": False}, silence


def test_a_reply_with_control_tokens_out_of_place_is_none(tmp_path):
    class Soup(Script):
        def generate(self, prompts, **_):
            return [Completion([*b"system", Bytes.special["<|tool_val|>"], *b"system"], "length") for _ in prompts]

    (tmp_path / "weights").write_bytes(b"w")
    loaded = SimpleNamespace(tokenizer=Bytes(), meta={}, path=tmp_path / "weights")
    result = evaluate(loaded, Soup(), PROMPTS, SOUL, template="soulsmith", name="base", config=Config(out=tmp_path))
    assert values(result, "adherence") == {"lowercase": (0, 2), "short": (0, 2), "all at once": (0, 2)}


def test_a_cut_reply_is_judged_on_what_it_said(tmp_path):
    result = run(tmp_path, assistant("reading it first.", tool_call("Read", file_path="a.py")), assistant("it reads"), finish="length")
    assert values(result, "tools")["ends after the call"] == (0, 1) and values(result, "work") == {"runs": (0, 1)}
    assert values(result, "adherence")["lowercase"] == (2, 2)
    assert result["cut"] == 2


def test_a_base_model_in_its_own_template(tmp_path):
    call = '{"name": "Read", "arguments": {"file_path": "a.py"}}'
    result = run(tmp_path, f"let me look.\n{call}\nThe file says…", "it reads json.", template="chatml")
    assert values(result, "tools")["valid"] == (1, 1) and values(result, "work") == {"runs": (1, 1)}
    assert values(result, "adherence")["all at once"] == (2, 2)


def test_the_fair_instruction_keeps_the_soul_it_states():
    told, *shown, last = chat_prompt(SOUL, PROMPTS[0].messages)
    assert "keeps answers short." in told["content"] and "<!--" not in told["content"] and last == PROMPTS[0].messages[0]
    assert all(f"- {name}(" in told["content"] for name in SOUL.tools)
    replies = [parse_chat_reply(m["content"]) for m in shown if m["role"] == "assistant"]
    assert [judge_call(m, faults, finished=True)["valid"] for m, faults in replies] == [False, True, True]
    assert all(all(judge_soul(SOUL, [], m).values()) for m, _ in replies)


def test_the_example_is_worded_for_the_soul():
    formal = parse_soul("- capitals. <!-- check: sentence_case -->")
    assert chat_prompt(formal, [])[4]["content"].startswith("I will look for it.\n{")
    assert chat_prompt(SOUL, [])[4]["content"].startswith("looking for it.\n{")


def test_no_model_command_runs_on_the_measuring_machine(tmp_path):
    marker = tmp_path / "ran"
    assert first_result(PROMPTS[0], [("Bash", {"command": f"touch {marker}"})]).startswith("error: not executed")
    assert not marker.exists()
    assert first_result(PROMPTS[0], []).startswith("error: ")
    assert first_result(PROMPTS[0], [("Bash", {"command": "wc -l a.py"})]).startswith("2 a.py")
    for command in ("ls; touch x", "cat ../x", "cat /etc/hosts", "python3 -c 1", "ls\ntouch x", "python3 a.py x"):
        assert first_result(PROMPTS[0], [("Bash", {"command": command})]).startswith("error: not executed"), command


class StepScript:
    """A sampler for loops: each request is answered by what stands in the script for the number of turns it has seen."""

    max_len = 4096

    def __init__(self, *replies):
        self.replies, self.queue = replies, []

    def submit(self, request):
        self.queue.append(request)
        return len(self.queue) - 1

    def step(self):
        template = Template(Bytes())
        start = len(template.encode([], prompt=True).ids)
        done = []
        for handle, request in enumerate(self.queue):
            if request is not None:
                turn = list(request.prompt).count(template.id["<|assistant_start|>"]) - 1
                done.append((handle, Completion(template.encode([self.replies[turn]]).ids[start:], "stop")))
                self.queue[handle] = None
        return done


def test_the_loop_does_the_work_and_is_refused_the_shell(tmp_path):
    edit = tool_call("Edit", file_path="a.py", old_string="return 1", new_string="return 2")
    bash = tool_call("Bash", command=f"touch {tmp_path}/ran")
    thanked = assistant("any time.")
    script = StepScript(
        assistant("reading.", tool_call("Read", file_path="a.py")), assistant("now.", edit, bash), assistant("done."), thanked
    )
    good = run_loops(Bytes(), script, PROMPTS[:1] * 3, temperature=0.0, seed=0, what="work")
    assert [(loop["done"], loop["status"]) for loop in good] == [(True, "answered")] * 3
    assert not (tmp_path / "ran").exists()
    assert [loop["columns"] for loop in good] == [{LATER[0]: True}] * 3  # no next request: the others' files have the same names
    assert all(loop["later"] == [user(words), thanked] for loop, words in zip(good, THANKS, strict=True))
    idle = run_loops(Bytes(), StepScript(assistant("done."), thanked), PROMPTS[:1], temperature=0.0, seed=0, what="work")
    assert [loop["done"] for loop in idle] == [False]


@pytest.mark.parametrize(
    ("replies", "columns"),
    [
        (["any time.", ("Read", "b.py")], {LATER[0]: True, LATER[1]: True}),
        (["any time.", ("Read", "c.py")], {LATER[0]: True, LATER[1]: False}),
        (["any time.", "done."], {LATER[0]: True, LATER[1]: False}),
        ([("Read", "a.py"), "fine.", ("Read", "b.py")], {LATER[0]: False, LATER[1]: True}),
    ],
)
def test_after_a_task_the_conversation_goes_on(replies, columns):
    other = replace(
        PROMPTS[0], id="b", messages=[user("and b.py?")], files={"b.py": "x = 1\n"}, verify={"file": "b.py", "must_contain": []}
    )
    said = [
        assistant("hm.", tool_call(reply[0], file_path=reply[1])) if isinstance(reply, tuple) else assistant(reply) for reply in replies
    ]
    script = StepScript(assistant("done."), *said, assistant("no."), assistant("no."))
    first, second = run_loops(Bytes(), script, [PROMPTS[0], other], temperature=0.0, seed=0, what="work")
    assert first["columns"] == columns and user("and b.py?") in first["later"] and user(PROMPTS[0].text) in second["later"]
    script.max_len = len(Template(Bytes()).encode(PROMPTS[0].messages, prompt=True).ids) + LOOP_TOKENS
    assert run_loops(Bytes(), script, PROMPTS[:1], temperature=0.0, seed=0, what="work")[0]["columns"] == {}


@pytest.mark.parametrize(
    ("files", "done"),
    [
        ({"a.py": "def load():\n    return 2\n"}, True),
        ({"a.py": "def load():\n    # two\n    return 2\n"}, True),
        (FILES, False),
        ({"a.py": "def load(:\n    return 2\n"}, False),
        ({"a.py": "def load():\n    return 2\n", "b.py": ""}, False),
        ({}, False),
    ],
)
def test_a_task_is_judged_by_its_files(tmp_path, files, done):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert solved(PROMPTS[0], tmp_path) == done


def test_held_out_prompts_are_repeatable_and_mixed():
    prompts = held_out(12, source="package:email")
    assert len(prompts) == 12 and len({p.id for p in prompts}) == 12
    assert sum(p.needs_tool for p in prompts) == 8 and sum(bool(p.verify) for p in prompts) >= 4
    assert {p.kind for p in prompts if not p.needs_tool} == {"about code", "question", "small talk"}
    assert set_hash(prompts) == set_hash(held_out(12, source="package:email")) != set_hash(held_out(12, 1, "package:email"))


def test_overlap_finds_copies_and_long_runs():
    words = " ".join(f"w{i}" for i in range(20))
    prompts = [Prompt(str(i), "x", [user(text)], False) for i, text in enumerate(["Make  it so", words, " ".join(words.split()[8:])])]
    rows = [{"messages": [user("make it SO"), assistant(f"well, {words}")]}, {"prompt": [user("x")], "chosen": [assistant("y")]}]
    assert overlap(prompts, rows) == {"exact": 1, "grams": 1, "n": 3}


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "rollouts.parquet"
    rows = [
        {
            "id": "a",
            "messages": [user("look"), assistant("ok.", tool_call("Read", file_path="a.py"))],
            "files": [{"path": "a.py", "content": "1\n"}],
        }
    ]
    write_rows(path, [*rows, {"id": "b", "messages": [user("hi"), assistant("hey")]}], "sft")
    first, second = from_rows(path, 10)
    assert first.needs_tool and first.files == {"a.py": "1\n"} and not second.needs_tool
    write_rows(path, [{"id": "a", "messages": [assistant("hey")]}], "sft")
    with pytest.raises(UserError, match="row 1"):
        from_rows(path, 10)


def test_contestants_of_a_model(tmp_path):
    (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
    assert contestants(tmp_path / "sft", {"base", "base chat"}) == [("sft", "soulsmith")]
    assert contestants(tmp_path / "sft", {"sft"}) == [("sft 2", "soulsmith")]
    assert contestants(tmp_path, set()) == [("base", "soulsmith"), ("base chat", "chatml")]
    assert contestants(tmp_path, {"base"}) == [("base 2", "soulsmith"), ("base 2 chat", "chatml")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_sampler_that_stops_leaves_no_loop_waiting(error):
    class Stops(StepScript):
        def step(self):
            raise error

    with pytest.raises(error):
        run_loops(Bytes(), Stops(assistant("done.")), PROMPTS[:1] * 3, temperature=0.0, seed=0, what="work")
