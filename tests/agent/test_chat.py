import io
import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from agent import chat
from agent.loop import Status
from agent.terminal import EXPLAINED, Terminal
from soul.conversation import assistant, tool_call
from soul.errors import UserError
from soul.template import SPECIAL_TOKENS, Template


class Bytes:
    """A tokenizer of single bytes: every character beyond ASCII spans several tokens."""

    special = {token: 256 + n for n, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


TEMPLATE = Template(Bytes())


def reply_ids(message):
    prompt = TEMPLATE.encode([], prompt=True).ids
    return TEMPLATE.encode([message]).ids[len(prompt) :]


class Sampler:
    """Streams what the test scripted, and notes how it was asked."""

    script: list
    asked: list

    def __init__(self, model, tokenizer, *, max_len, batch):
        self.max_len = max_len

    def stream(self, prompt, **how):
        self.asked.append((list(prompt), how))
        for token in self.script.pop(0)[: how["max_new"]]:
            if token == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                yield token


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Replaces model loading by a script; gives (script, asked, meta, lines typed)."""
    model = tmp_path / "run"
    model.mkdir()
    meta: dict = {}
    loaded = types.SimpleNamespace(model=None, tokenizer=Bytes(), config=types.SimpleNamespace(max_len=4096), meta=meta, path=model)
    monkeypatch.setitem(sys.modules, "model.load", types.SimpleNamespace(load_model=lambda name: loaded))
    sampler = type("Scripted", (Sampler,), {"script": [], "asked": []})
    monkeypatch.setitem(sys.modules, "model.sampler", types.SimpleNamespace(Sampler=sampler))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    typed: list = []

    def read_line(prompt):
        line = typed.pop(0) if typed else EOFError
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(chat, "_read_line", read_line)
    config = chat.Config(model=str(model), root=tmp_path / "work")
    return types.SimpleNamespace(script=sampler.script, asked=sampler.asked, meta=meta, typed=typed, config=config, path=model)


def replace(config, **changes):
    import dataclasses

    return dataclasses.replace(config, **changes)


def transcript(scripted, number=1):
    return [json.loads(line) for line in (scripted.path / f"transcripts/{number:04}.jsonl").read_text().splitlines()]


def test_one_prompt_edits_a_file_and_leaves_a_transcript(scripted, capsys):
    (scripted.config.root / "a.py").write_text("x = 1\n")
    replies = [
        assistant("let me see é→", tool_call("Read", file_path="a.py")),
        assistant("", tool_call("Edit", file_path="a.py", old_string="x = 1", new_string="x = 'é→ <|tool_arg|>'")),
        assistant("done ☺"),
    ]
    scripted.script += map(reply_ids, replies)
    assert chat.main(replace(scripted.config, prompt="change x", yes=True)) == 0
    assert (scripted.config.root / "a.py").read_text() == "x = 'é→ <|tool_arg|>'\n"
    out, err = capsys.readouterr()
    assert out == "let me see é→\ndone ☺\n"
    assert err.count("allowed without asking (--yes)") == 2
    events = transcript(scripted)
    assert [event["event"] for event in events] == [
        "config", "user", "reply", "call", "result", "reply", "call", "result", "reply", "status",
    ]  # fmt: skip
    assert events[0]["template_hash"] == TEMPLATE.hash
    assert events[0]["temperature"] == 0.2
    assert [event["ids"] for event in events if event["event"] == "reply"] == list(map(reply_ids, replies))
    assert events[-1]["status"] == "answered"


def test_each_step_sees_the_template_s_own_prompt_and_a_new_seed(scripted):
    scripted.script += [reply_ids(assistant("", tool_call("Read", file_path="a"))), reply_ids(assistant("no file"))]
    chat.main(replace(scripted.config, prompt="hi", yes=True, seed=5))
    (first, how), (second, how_too) = scripted.asked
    assert first == TEMPLATE.encode([{"role": "user", "content": "hi"}], prompt=True).ids
    assert second[: len(first)] == first
    assert (how["seed"], how_too["seed"]) == (5, 6)
    assert how["stop_ids"] == TEMPLATE.stop_ids


def test_without_a_terminal_every_call_is_denied(scripted):
    scripted.script += [reply_ids(assistant("", tool_call("Bash", command="touch x"))), reply_ids(assistant("fine"))]
    assert chat.main(replace(scripted.config, prompt="hi")) == 0
    assert list(scripted.config.root.iterdir()) == []
    assert [event["text"] for event in transcript(scripted) if event["event"] == "result"] == ["rejected by user"]


def test_malformed_replies_are_drawn_hotter_and_end_in_exit_code_1(scripted):
    scripted.script += [[*b"x", TEMPLATE.id["<|tool_arg|>"], TEMPLATE.id["<|assistant_end|>"]] for _ in range(3)]
    assert chat.main(replace(scripted.config, prompt="hi")) == 1
    assert [how["temperature"] for _, how in scripted.asked] == pytest.approx([0.2, 0.6, 1.0])
    assert transcript(scripted)[-1]["status"] == "malformed"


def test_reply_cut_in_the_middle_of_a_character(scripted, capsys):
    scripted.script.append(list("aé".encode())[:2])
    assert chat.main(replace(scripted.config, prompt="hi")) == 1
    assert capsys.readouterr().out == "a\n"
    assert transcript(scripted)[-1]["status"] == "cut"


def test_call_cut_by_max_new_is_malformed_and_never_runs(scripted):
    ids = reply_ids(assistant("", tool_call("Bash", command="touch x; touch y")))
    scripted.script += [ids] * 3
    assert chat.main(replace(scripted.config, prompt="hi", yes=True, max_new=len(ids) - 5)) == 1
    assert transcript(scripted)[-1]["status"] == "malformed"
    assert list(scripted.config.root.iterdir()) == []


def test_context_full(scripted):
    assert chat.main(replace(scripted.config, prompt="x" * 4000)) == 1
    assert scripted.asked == []
    assert transcript(scripted)[-1]["status"] == "context_full"


def test_long_results_are_cut_to_a_quarter_of_the_context(scripted):
    (scripted.config.root / "a").write_text("→" * 3000)
    scripted.script += [reply_ids(assistant("", tool_call("Bash", command="cat a; exit 1"))), reply_ids(assistant("ok"))]
    chat.main(replace(scripted.config, prompt="hi", yes=True))
    (result,) = [event["text"] for event in transcript(scripted) if event["event"] == "result"]
    assert len(result.encode()) <= 1024 + 16
    assert result.endswith("→\nexit code: 1")
    assert "characters elided]" in result


def test_conversation_commands(scripted, capsys):
    scripted.script += [reply_ids(assistant("one")), reply_ids(assistant("two")), reply_ids(assistant("three"))]
    scripted.typed += ["", "a", "b", "/help", "/reset", "c", "/quit", "never"]
    assert chat.main(scripted.config) == 0
    prompts = [len(prompt) for prompt, _ in scripted.asked]
    assert prompts[1] > prompts[0] == prompts[2]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert [event["event"] for event in transcript(scripted)].count("reset") == 1
    seeds = [how["seed"] for _, how in scripted.asked]
    assert len(set(seeds)) == 3


def test_ctrl_c_stops_the_reply_and_the_second_one_leaves(scripted):
    scripted.script += [[*b"endless", "ctrl-c", *b" talk", 300]]
    scripted.typed += ["go", KeyboardInterrupt, "never"]
    before = signal.getsignal(signal.SIGINT)
    assert chat.main(scripted.config) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert transcript(scripted)[-1] == {"event": "status", "status": "interrupted"}


def test_ctrl_c_at_the_prompt_warns_first(scripted):
    scripted.script.append(reply_ids(assistant("hi")))
    scripted.typed += [KeyboardInterrupt, "still here", KeyboardInterrupt, KeyboardInterrupt, "never"]
    assert chat.main(scripted.config) == 0
    assert len(scripted.asked) == 1
    assert scripted.typed == ["never"]


def test_transcripts_are_numbered_and_never_overwritten(scripted, tmp_path):
    for _ in range(2):
        chat.main(scripted.config)
    assert sorted(path.name for path in (scripted.path / "transcripts").iterdir()) == ["0001.jsonl", "0002.jsonl"]
    with pytest.raises(UserError, match="exists already"):
        chat.main(replace(scripted.config, transcript=scripted.path / "transcripts/0001.jsonl"))


def test_no_key_reaches_the_transcript(scripted, monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-canary")
    scripted.script += [reply_ids(assistant("", tool_call("Bash", command="env; echo $OPENROUTER_API_KEY"))), reply_ids(assistant("ok"))]
    chat.main(replace(scripted.config, prompt="hi", yes=True))
    assert "canary" not in json.dumps(transcript(scripted))


@pytest.mark.parametrize("changes,words", [
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new": 4000}, "leaves no room"),
    ({"root": Path("/nonexistent")}, "not a directory"), ({"transcript": Path("/proc/nope/x.jsonl")}, "/proc/nope"),
])  # fmt: skip
def test_bad_settings_are_one_clear_line(scripted, changes, words):
    with pytest.raises(UserError, match=words):
        chat.main(replace(scripted.config, **changes))


def test_a_model_of_another_template_is_refused(scripted):
    scripted.meta["template_hash"] = "0" * 64
    with pytest.raises(UserError, match="another template"):
        chat.main(replace(scripted.config, prompt="hi"))


def test_terminal_shows_escapes_instead_of_obeying_them():
    words, notes = io.StringIO(), io.StringIO()
    terminal = Terminal(Console(file=words, force_terminal=True), Console(file=notes, force_terminal=True, width=100))
    terminal.text("a\x1b]0;owned\x07[/bold] ")
    terminal.event("result", {"text": "\x1b[2J[red]x[/red]\n" + "line\n" * 50, "approved": True})
    assert "\x1b]" not in words.getvalue()
    assert "␛]0;owned␇[/bold]" in words.getvalue()
    assert "\x1b[2J" not in notes.getvalue()
    assert "[red]x[/red]" in notes.getvalue()
    assert "[40 more lines]" in notes.getvalue()


def test_every_status_that_is_no_answer_is_explained():
    assert set(EXPLAINED) == set(Status) - {Status.answered}
