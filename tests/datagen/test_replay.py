"""Replay: the rollouts of every converter give the same bytes again, and a row that lies is named."""

import random

import pytest
from test_convert_data import items

from datagen.code_seeds import read_code
from datagen.convert import build_rollouts, convert_rows
from datagen.replay import Config, main
from soul import rows
from soul.conversation import assistant, tool, tool_call, user
from soul.errors import UserError
from soul.spec import load_soul
from workspace.tools import REJECTED


def row(result: str, **columns) -> dict:
    messages = [user("read it"), assistant("reading.", tool_call("Read", file_path="a.py")), tool(result), assistant("done.")]
    return {"id": "r-1", "messages": messages, "files": [{"path": "a.py", "content": "x = 1\n"}]} | columns


def written(tmp_path, *found) -> Config:
    rows.write_rows(tmp_path / "rollouts.parquet", list(found), "sft")
    return Config(tmp_path / "rollouts.parquet", workers=1)


def test_a_sample_of_every_converter_replays(tmp_path, capsys):
    soul = load_soul("soul/SOUL.md")
    from_code, pairs, _ = build_rollouts(soul, read_code("package:email"), 60, seed=4)
    from_data, more, _ = convert_rows(soul, random.Random(1).sample(items(), 40), 0, seed=4)
    (tmp_path / "data").mkdir()
    rows.write_rows(tmp_path / "data/rollouts.parquet", from_code + from_data, "sft")
    rows.write_rows(tmp_path / "data/rollouts_preference.parquet", pairs + more, "preference")
    assert main(Config(tmp_path, workers=1)) == 0
    assert "all the same" in capsys.readouterr().out


def test_a_false_result_is_named_with_its_row_its_call_and_the_difference(tmp_path, capsys):
    assert main(written(tmp_path, row("    1→x = 1"), row("    1→x = 2", id="r-2"))) == 1
    shown = capsys.readouterr().out
    assert "row r-2: Read" in shown and "-    1→x = 2" in shown and "+    1→x = 1" in shown
    assert "r-1" not in shown and "1 rows differ" in shown


def test_a_call_that_the_person_refused_is_not_made(tmp_path):
    messages = [user("go"), assistant("going.", tool_call("Edit", file_path="b.py", new_string="x")), tool(REJECTED), assistant("fine."),
                user("look"), assistant("looking.", tool_call("Read", file_path="b.py")), tool("error: b.py does not exist; did you mean a.py?"), assistant("gone.")]  # fmt: skip
    assert main(written(tmp_path, row("", messages=messages))) == 0


def test_calls_that_are_none_and_sets_without_calls(tmp_path, capsys):
    bad = {"type": "function", "function": {"name": "Read", "arguments": "not json"}}
    messages = [user("go"), {"role": "assistant", "content": "ok.", "tool_calls": [bad]}, tool("x"), assistant("done.")]
    assert main(written(tmp_path, row("", messages=messages))) == 1
    assert "is not a call" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no tool call"):
        main(written(tmp_path, row("", messages=[user("hi"), assistant("hello.")])))


def test_rows_that_lead_out_of_their_workspace_are_refused(tmp_path):
    with pytest.raises(UserError, match="outside"):
        main(written(tmp_path, row("", files=[{"path": "../a.py", "content": "x"}])))
