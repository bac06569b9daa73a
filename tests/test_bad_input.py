"""A person's mistake gives one line that names the place, exit code 2, and loses nothing."""

import fcntl

import pytest

import soulsmith

GOOD = "# s\n\n## principles\n- is brief. <!-- check: max_words(9) -->\n"
SOULS = {
    "broken YAML": (b"---\nname: [x\n---\n# s\n", "SOUL.md:"),
    "unknown check": (GOOD.replace("max_words", "max_wordz").encode(), "SOUL.md:4: "),
    "bad parameter": (GOOD.replace("(9)", "(many)").encode(), "SOUL.md:4: "),
    "duplicate id": (b"# s\n\n## principles\n- a. <!-- id: x -->\n- b. <!-- id: x -->\n", "SOUL.md:5: "),
    "empty": (b"", "SOUL.md"),
    "binary": (b"\x7fELF\0\0", "SOUL.md: is a binary file"),
    "not UTF-8": (b"# s\n\xff\xfe", "SOUL.md:2: "),
    "python object": (b"---\nname: !!python/object/apply:os.getcwd []\n---\n# s\n", "SOUL.md:"),
}


def refused(capsys, *argv) -> str:
    assert soulsmith.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("case", SOULS)
def test_a_bad_soul_names_file_and_line(case, tmp_path, capsys):
    content, place = SOULS[case]
    (tmp_path / "SOUL.md").write_bytes(content)
    assert place in refused(capsys, "soul", "check", tmp_path / "SOUL.md")
    out = tmp_path / "run"
    assert place in refused(capsys, "quickstart", "--soul", tmp_path / "SOUL.md", "--out", out)
    assert not out.exists()


def generate(tmp_path, capsys, seeds='{"prompt": "hi"}\n', teacher="local:smollm2-135m", out="run"):
    (tmp_path / "SOUL.md").write_text(GOOD)
    (tmp_path / "seeds.jsonl").write_text(seeds)
    argv = ["--soul", tmp_path / "SOUL.md", "--seeds", tmp_path / "seeds.jsonl", "--teacher", teacher, "--out", tmp_path / out]
    return refused(capsys, "generate", *argv)


@pytest.mark.parametrize("row", ['{"prompt": 3}', "{", "[]", '{"text": "x"}', '{"prompt": ""}'])
def test_a_bad_seed_row_names_its_line(row, tmp_path, capsys):
    assert "seeds.jsonl:2: " in generate(tmp_path, capsys, seeds=f'{{"prompt": "hi"}}\n{row}\n') and not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher", ["gpt", "http://127.0.0.1:1/v1", "openai:", "ftp://x#y", "local:no-such-model"])
def test_an_unknown_teacher_is_refused_before_anything_is_made(teacher, tmp_path, capsys):
    generate(tmp_path, capsys, teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    assert "OPENROUTER_API_KEY" in generate(tmp_path, capsys, teacher="openrouter:some/model")


def test_a_second_process_on_one_run_directory_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "journal.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "run" in generate(tmp_path, capsys)


@pytest.mark.parametrize(
    "argv",
    [["report", "{}"], ["show", "{}"], ["chat", "--model", "{}"], ["sft", "--out", "{}"], ["eval", "--model", "{}", "--out", "{}/e"]],
)
def test_a_path_that_is_not_there(argv, tmp_path, capsys):
    refused(capsys, *[part.format(tmp_path / "none") for part in argv])


def test_an_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    generate(tmp_path, capsys, out="out")
    assert (tmp_path / "out").read_text() == "precious"
