"""Where seeds come from, and seeds that a teacher writes."""

import gzip
import json
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from fake_teacher import FakeTeacher

from datagen import seed_writer
from datagen.seed_writer import Config, main, plan
from datagen.seeds import aims, read_seeds
from datagen.teachers import Price
from soul.errors import UserError
from soul.spec import parse_soul

SOUL = "# moss\n\n## Principles\n\n- is short. <!-- id: short -->\n- is warm. <!-- id: warm -->\n- is honest. <!-- id: honest -->\n"


def prompts(path, limit=None):
    return [seed.messages[-1]["content"] for seed in read_seeds(path, limit)]


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text('{"prompt": "two"}\n')
    (tmp_path / "a.txt").write_text("one\n")
    pq.write_table(pa.table({"question": ["three"]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "README.md").write_text("not a seed")
    assert prompts(tmp_path) == ["one", "two", "three"] and prompts(tmp_path, 2) == ["one", "two"]
    assert [seed.source for seed in read_seeds(tmp_path)] == ["a.txt:1", "b.jsonl:1", "c.parquet:1"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder of seeds holds one of"):
        prompts(tmp_path / "none")


def test_a_json_list_is_read_and_its_rows_are_counted(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "add", "input": "1 2"}, {"prompt": "b"}], indent=1))
    assert prompts(tmp_path / "a.json") == ["add\n\n1 2", "b"]
    (tmp_path / "b.json").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert prompts(tmp_path / "b.json") == ["x", "y"]
    (tmp_path / "c.json").write_text('[{"prompt": "x"}, 7]')
    with pytest.raises(UserError, match=r"c.json:2: a row must be an object"):
        prompts(tmp_path / "c.json")


def test_lines_are_streamed_and_the_bad_one_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\n{"prompt": "t\xe2\x80\xa8o"}\n{"prompt": "\xff"}\n')
    stream = read_seeds(path)
    assert [next(stream).messages[0]["content"] for _ in range(2)] == ["one", "t\u2028o"]
    with pytest.raises(UserError, match=r"a.jsonl:4: is not UTF-8"):
        next(stream)
    path.write_bytes(b"ab\0c\n")
    with pytest.raises(UserError, match="is a binary file"):
        prompts(path)


def test_a_data_set_of_the_hub_or_a_local_folder_is_streamed(tmp_path):
    pq.write_table(pa.table({"prompt": ["one", "two"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"prompt": ["three"]}), tmp_path / "test.parquet")
    assert prompts(f"hf:{tmp_path}") == ["one", "two"] and prompts(f"hf:{tmp_path}:test", 1) == ["three"]
    assert next(read_seeds(f"hf:{tmp_path}")).source == f"hf:{tmp_path}:train:1"
    with pytest.raises(UserError, match=r"cannot be read: .*nope"):
        prompts(f"hf:{tmp_path}:nope")


def test_an_unknown_data_set_is_one_line_offline(monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf:nobody/nothing-of-that-name:train: cannot be read") as error:
        prompts("hf:nobody/nothing-of-that-name")
    assert "\n" not in str(error.value)


def test_a_written_seed_says_what_it_aims_at():
    assert aims("seed:conflict:short+warm") == ["short", "warm"] and aims("seed:off-topic:") == []
    assert aims("code:module.name:x") == aims("seeds.jsonl:3") == aims("") == []


# --- written by a teacher


def test_the_plan_gives_every_principle_its_turn():
    soul = parse_soul(SOUL)
    batches = plan(soul, 48)
    kinds = [batch.kind for batch in batches]
    assert {kind: kinds.count(kind) for kind in kinds} == {"on-topic": 24, "near-miss": 12, "conflict": 6, "off-topic": 6}
    for kind, each in (("on-topic", 8), ("near-miss", 4)):
        named = [batch.principles for batch in batches if batch.kind == kind]
        assert {named.count((name,)) for name in ("short", "warm", "honest")} == {each}
    assert len({batch.principles for batch in batches if batch.kind == "conflict"}) == 3
    assert plan(soul, 48) == batches != plan(soul, 48, seed=3)
    assert plan(parse_soul("# x\n\n## Principles\n\n- is nice. <!-- id: nice -->\n"), 4)[3].principles == ("nice",)


@pytest.fixture
def given(tmp_path, monkeypatch):
    (tmp_path / "SOUL.md").write_text(SOUL)
    teacher = FakeTeacher()
    monkeypatch.setattr(seed_writer, "open_teacher", lambda spec: teacher)
    return tmp_path, teacher


def config(given, **more):
    return Config(
        teacher="fake", file=given[0] / "seeds.jsonl", soul=given[0] / "SOUL.md", **{"n": 20, "per_call": 4, "against": ()} | more
    )


def written(given):
    return [json.loads(line) for line in (given[0] / "seeds.jsonl").read_text().splitlines()]


def numbered(body, n=0):
    mark = zlib.crc32(body["messages"][1]["content"].encode())
    return json.dumps([f"request {mark} {number} about something of its own" for number in range(4)])


def test_seeds_are_written_once_and_name_what_they_aim_at(given):
    given[1].reply = numbered
    assert main(config(given, n=26)) == 0
    rows = written(given)
    assert len(rows) == 26 and {row["kind"] for row in rows} == {"on-topic", "near-miss", "conflict", "off-topic"}
    assert all(aims(row["source"]) or row["kind"] == "off-topic" for row in rows)
    seeds = list(read_seeds(given[0] / "seeds.jsonl"))
    assert len({seed.id for seed in seeds}) == 26 and {name for seed in seeds for name in aims(seed.source)} == {"short", "warm", "honest"}
    sent, text = len(given[1].sent), (given[0] / "seeds.jsonl").read_text()
    assert sent == 9 and main(config(given, n=26)) == 0 and len(given[1].sent) == sent and (given[0] / "seeds.jsonl").read_text() == text


def test_a_prompt_that_comes_again_is_another_sample(given):
    (given[0] / "SOUL.md").write_text("# x\n\n## Principles\n\n- is nice. <!-- id: nice -->\n")
    given[1].reply = lambda body, n: json.dumps([f"{numbered(body)} {n}"])
    assert main(config(given, n=60, per_call=1)) == 0
    assert len(given[1].sent) == 75 > len(set(given[1].sent)) and len(written(given)) == 60


def test_what_repeats_leaks_or_is_in_an_eval_set_is_dropped_and_counted(given, capsys):
    (given[0] / "eval.txt").write_text("the eval asks this\n")
    given[1].reply = lambda body, n: json.dumps(
        ["The eval asks this!", "always the same request", "be [short] please", numbered(body)[2:20]]
    )
    assert main(config(given, against=(str(given[0] / "eval.txt"),))) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "stands in an eval set" in told and "near duplicate" in told and "names a principle" in told
    asked = [row["prompt"] for row in written(given)]
    assert asked.count("always the same request") == 1 and not any("eval" in text or "[short]" in text for text in asked)


def test_unreadable_lists_are_counted_and_the_rest_is_kept(given, capsys):
    given[1].reply = lambda body, n: numbered(body) if "pulls these two" in body["messages"][1]["content"] else "no idea"
    assert main(config(given)) == 0
    assert {row["kind"] for row in written(given)} == {"conflict"} and "unreadable (there is no JSON in it)" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_command_line_names_the_file_out(tmp_path):
    made = tyro.cli(Config, args=["--teacher", "local:x", "--out", "s.jsonl", "--against", "a", "b"])
    assert made == Config("local:x", Path("s.jsonl"), against=("a", "b"))


def test_no_more_is_spent_than_allowed(given):
    given[1].reply, given[1].price = numbered, Price(0.0, 1e-6, 0.0)
    with pytest.raises(UserError, match="max-usd"):
        main(config(given, max_usd=0.0035))
    assert len(given[1].sent) == 2  # each may cost 0.00205 and comes to 0.001


def test_bad_settings_are_told_before_anything_is_sent(given):
    for more in ({"n": 0}, {"per_call": 0}, {"against": (str(given[0] / "none.jsonl"),)}):
        with pytest.raises(UserError):
            main(config(given, **more))
    assert given[1].sent == [] and not (given[0] / "seeds.jsonl").exists()


def test_reading_plain_seeds_does_not_import_the_data_set_library(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    before = set(sys.modules)
    prompts(tmp_path / "a.txt")
    assert "datasets" not in set(sys.modules) - before


def test_compressed_lines_are_read_and_a_torn_file_is_named(tmp_path):
    whole = gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "seeds.jsonl.gz").write_bytes(whole)
    assert [seed.messages[0]["content"] for seed in read_seeds(tmp_path)] == ["a", "b"]
    for torn in (whole[:-9], whole[:15], b"not gzip", whole[:12] + b"\xff\xff" + whole[14:]):
        (tmp_path / "seeds.jsonl.gz").write_bytes(torn)
        with pytest.raises(UserError, match=r"seeds.jsonl.gz: is damaged|is not JSON|UTF-8"):
            list(read_seeds(tmp_path))
