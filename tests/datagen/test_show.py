import io

import pytest
from rich.console import Console

from datagen import show
from soul import rows
from soul.conversation import assistant, tool, tool_call, user
from soul.errors import UserError

CHECK = {"principle": "lowercase", "check": "lowercase_prose", "ok": False, "message_index": 1, "start": 0, "end": 5, "why": "upper case"}
TALK = [
    user("add \x1b[31mred\x1b[0m [/bold]"),
    assistant("Hello there", tool_call("Edit", file_path="a.py", new_string="x\ny")),
    tool("created a.py"),
    assistant("done."),
]


def sft(number, **more):
    checks = [CHECK, CHECK | {"principle": "short", "ok": True}]
    return {"id": f"row-{number}", "messages": TALK, "source": "code:m", "checks": checks} | more


def shown(path, n=5, seed=0):
    text = io.StringIO()
    show.show(path, n, seed, Console(file=text, width=100, force_terminal=False))
    return text.getvalue()


def test_a_row_shows_its_history_calls_and_checks(tmp_path):
    trail = [{"stage": stage, "text": f"the {stage}", "key": ""} for stage in ("draft", "critique", "revise")]
    rows.write_rows(tmp_path / "a.parquet", [sft(1, trail=trail, files=[{"path": "b.py", "content": ""}])], "sft")
    text = shown(tmp_path / "a.parquet")
    for part in ("the draft", "the critique", "the revise", "Edit", "file_path: a.py", "created a.py", "passed: short", "b.py", "'Hello'"):
        assert part in text
    assert text.index("the draft") < text.index("the critique") < text.index("the revise") < text.index("created a.py")


def test_untrusted_text_is_shown_and_never_obeyed(tmp_path):
    rows.write_rows(tmp_path / "a.parquet", [sft(1, reason="\x1b]0;title\x07")], "sft")
    text = shown(tmp_path / "a.parquet")
    assert "\x1b" not in text and "\x07" not in text and "␛[31mred" in text and "[/bold]" in text


def test_a_pair_shows_both_sides(tmp_path):
    pair = {"id": "p", "prompt": TALK[:1], "chosen": [assistant("good one")], "rejected": [assistant("Hello there")], "checks": [CHECK]}
    rows.write_rows(tmp_path / "p.parquet", [pair], "preference")
    text = shown(tmp_path / "p.parquet")
    assert text.index("chosen") < text.index("good one") < text.index("rejected") < text.index("Hello there")
    assert "lowercase_prose" in text and "'Hello'" in text


def test_a_document_shows_its_text_and_who_served_it(tmp_path):
    doc = {"id": "d", "text": "moss is brief.", "source": "docs:FAQ", "served": ["m@p"], "principles": ["short"]}
    rows.write_rows(tmp_path / "data/docs.parquet", [doc], "docs")
    assert [path.stem for path in show.files_of(tmp_path, False)] == ["docs"]
    text = shown(tmp_path / "data/docs.parquet")
    assert "moss is brief." in text and "docs:FAQ" in text and "served by: m@p" in text and "1 docs rows" in " ".join(text.split())


def test_n_and_seed_choose_the_rows(tmp_path):
    rows.write_rows(tmp_path / "a.parquet", [sft(number) for number in range(30)], "sft")
    text = shown(tmp_path / "a.parquet", n=4, seed=1)
    assert text == shown(tmp_path / "a.parquet", n=4, seed=1) != shown(tmp_path / "a.parquet", n=4, seed=2)
    assert text.count("row-") == 4
    assert shown(tmp_path / "a.parquet", n=99).count("row-") == 30


def test_a_run_directory_shows_its_files_and_its_rejected_rows(tmp_path, capsys):
    rows.write_rows(tmp_path / "data/sft.parquet", [sft("kept")], "sft")
    rows.write_rows(tmp_path / "data/rejected.parquet", [sft("lost", accepted=False, reason="too many words")], "rejected")
    assert [path.stem for path in show.files_of(tmp_path, False)] == ["sft"]
    assert show.main(show.Config(tmp_path, rejected=True)) == 0
    text = capsys.readouterr().out
    assert "row-lost" in text and "NOT ACCEPTED" in text and "too many words" in text and "row-kept" not in text


def test_what_cannot_be_shown_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    bad = (tmp_path, tmp_path / "x.parquet", tmp_path / "none.parquet")
    for config in (*map(show.Config, bad), show.Config(tmp_path, n=0)):
        with pytest.raises(UserError) as error:
            show.main(config)
        assert "\n" not in str(error.value)
