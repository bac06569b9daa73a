import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TEMPLATE, sft_rows

from soul import conversation as c
from soul.errors import UserError
from soul.rows import write_rows
from training.data import Example, example
from training.mixture import Part, Source, beginning, build, conversations, hold_out, prompt_key, read_mixture, repeated, times


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_sources_and_paths_are_relative_to_it(tmp_path):
    path = written(
        tmp_path / "mix.yaml",
        "- data: data/sft.parquet\n  epochs: 3\n- {data: hf:HuggingFaceTB/smoltalk:all:train, weight: .3, rows: 1000}\n",
    )
    mine, general = read_mixture(path)
    assert mine == Source(str(tmp_path / "data/sft.parquet"), epochs=3) and mine.name == "sft"
    assert general == Source("hf:HuggingFaceTB/smoltalk:all:train", weight=0.3, rows=1000) and general.name == "HuggingFaceTB/smoltalk"
    as_json = written(tmp_path / "mix.json", json.dumps([{"data": "/a.parquet", "max_length": 9, "response": "code"}]))
    assert read_mixture(as_json) == [Source("/a.parquet", max_length=9, response="code")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must be a list"),
        ("data: a.parquet", "must be a list"),
        ("- a.parquet", "entry 1: has no `data`"),
        ("- data: a\n- {epochs: 2}", "entry 2: has no `data`"),
        ("- data: a\n  wieght: 2", "entry 1: unknown key 'wieght'.*weight"),
        ("- data: a\n  weight: heavy", "entry 1: weight must be a number, not 'heavy'"),
        ("- data: a\n  weight: true", "weight must be a number"),
        ("- data: a\n  weight: .nan", "weight must be above 0"),
        ("- data: a\n  epochs: 0", "epochs must be above 0"),
        ("- data: a\n  rows: 2.5", "rows must be a number"),
        ("- data: 7", "data must be text, not 7"),
        ("- data: ' '", "data must not be empty"),
        ("- data: a\n  epochs: 1\n  weight: 1", "both epochs and weight"),
        ("- data: a\n  - b: [", r"mix\.yaml:2: is not YAML"),
        ("- !!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, why):
    with pytest.raises(UserError, match=why):
        read_mixture(written(tmp_path / "mix.yaml", text))


INSTRUCT = {"instruction": "add", "input": "1, 2", "output": "3"}
SAID = [c.user("add\n\n1, 2"), c.assistant("3")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (INSTRUCT, SAID),
        ({"prompt": "add\n\n1, 2", "response": "3"}, SAID),
        ({"question": "add\n\n1, 2", "answer": "3", "input": ""}, SAID),
        ({"prompt": SAID[:1], "completion": SAID[1:]}, SAID),
        ({"system": "be short", "prompt": "hi", "completion": "ho"}, [c.system("be short"), c.user("hi"), c.assistant("ho")]),
        ({"messages": SAID, "prompt": "kept out"}, SAID),
    ],
)
def test_columns_become_messages(tmp_path, row, messages):
    for path in (written(tmp_path / "a.json", json.dumps([row])), written(tmp_path / "b.jsonl", json.dumps(row) + "\n\n")):
        rows, unusable = conversations(Source(str(path)))
        assert [row["messages"] for row in rows] == [messages] and not unusable
        assert rows[0]["template_hash"] == "" and str(path) in rows[0]["id"]


def test_columns_may_be_named(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({"messages": SAID, "task": "hi", "code": "ho", "data": "x"}))
    rows, _ = conversations(Source(str(path), instruction="task", response="code", input="data"))
    assert rows[0]["messages"] == [c.user("hi\n\nx"), c.assistant("ho")]


def test_rows_of_parquet_keep_their_calls_and_hashes(tmp_path):
    write_rows(tmp_path / "s.parquet", [row | {"template_hash": "t", "soul_hash": "s"} for row in sft_rows(3)], "sft")
    rows, _ = conversations(Source(str(tmp_path / "s.parquet"), rows=2))
    assert rows == [row | {"template_hash": "t", "soul_hash": "s"} for row in sft_rows(2)]


def test_a_row_without_request_or_reply_is_left_out_and_many_are_refused(tmp_path):
    good, bad = [INSTRUCT] * 30, [{**INSTRUCT, "output": "  "}, {**INSTRUCT, "instruction": None}]
    rows, unusable = conversations(Source(str(written(tmp_path / "a.json", json.dumps(good + bad)))))
    assert len(rows) == 30 and unusable == {"no reply": 1, "no request": 1}
    with pytest.raises(UserError, match="2 of 4 rows have no request or no reply"):
        conversations(Source(str(written(tmp_path / "a.json", json.dumps(good[:2] + bad)))))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "x", "is none of"),
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl:1: a row must be an object, not list"),
        ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "neither `messages` nor a column for the response.*soulsmith dpo"),
        ("a.jsonl", '{"text": "a"}', "no column|neither `messages` nor a column for the instruction; it has text"),
        ("a.jsonl", '{"prompt": 3, "response": "b"}', "a column must be text, not int"),
        ("a.jsonl", '{"messages": [{"content": "b"}]}', r"is not a list of \{role, content\}"),
        ("a.jsonl", '{"messages": "hello"}', r"is not a list of \{role, content\}"),
        ("a.parquet", "junk", "is not a readable Parquet file"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, name, text, why):
    with pytest.raises(UserError, match=why):
        conversations(Source(str(written(tmp_path / name, text))))
    with pytest.raises(UserError, match="no such file"):
        conversations(Source(str(tmp_path / "none.json")))
    with pytest.raises(UserError, match="no column 'code'"):
        conversations(Source(str(written(tmp_path / "ok.jsonl", '{"prompt": "a", "response": "b"}')), response="code"))


def test_a_dataset_of_the_hub_is_read_like_a_file(tmp_path):
    """A local folder goes through the same library call."""
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.Table.from_pylist([INSTRUCT] * 3), tmp_path / "folder" / "train.parquet")
    rows, _ = conversations(Source(f"hf:{tmp_path / 'folder'}", rows=2))
    assert [row["messages"] for row in rows] == [SAID] * 2
    with pytest.raises(UserError, match="cannot be read"):
        conversations(Source(f"hf:{tmp_path / 'folder'}:nosuchsplit"))


def examples(n, size=10, first=0):
    """Sequences with prompts of their own, half of each trained."""
    return [Example(np.arange(size) + 1000 * (first + i), (np.arange(size) >= size // 2).astype(np.int32), str(i)) for i in range(n)]


def test_a_held_out_share_is_of_the_tokens_but_never_too_much():
    items = examples(1000)
    assert len(hold_out(items, 0.01, 0, 0)) == 10
    assert len(hold_out(items, 0.01, 500, 0)) == 50  # a batch's worth at least …
    assert len(hold_out(items[:40], 0.01, 500, 0)) == 4  # … but no more than a tenth of the rows
    assert hold_out(items[:19], 0.5, 500, 0) == [] == hold_out(items, 0.0, 500, 0)
    chosen = {item.row for item in hold_out(items, 0.01, 0, 0)}
    assert chosen == {item.row for item in hold_out(items[::-1], 0.01, 0, 0)}  # whatever the order of the rows
    assert chosen != {item.row for item in hold_out(items, 0.01, 0, 1)}


def test_answers_to_one_prompt_stay_together_and_are_not_trained_on_elsewhere():
    rows = [[c.user(f"q{i}"), c.assistant(reply)] for i in range(40) for reply in ("yes", "no")]
    items = [example(TEMPLATE, messages, str(i)) for i, messages in enumerate(rows)]
    mine, other = build([(Source("mine"), items, Counter()), (Source("other"), items[::2], Counter())], 99, 0.05, 0, 0)
    held = {prompt_key(item, 0) for part in (mine, other) for item in part.held_out}
    assert len(mine.held_out) == 2 * len({prompt_key(item, 0) for item in mine.held_out}) > 0
    assert not held & {prompt_key(item, 0) for part in (mine, other) for item in part.train}
    assert len(other.train) + len(other.held_out) + other.left_out["held out elsewhere"] == 40


def test_a_source_that_is_one_prompt_is_not_held_out_whole():
    rows = [example(TEMPLATE, [c.user("go on"), c.assistant("x" * i)]) for i in range(1, 50)]
    assert hold_out(rows, 0.01, 100, 0) == []


def test_weights_are_shares_of_the_trained_tokens():
    mine, general, more = Source("a", epochs=2), Source("b", weight=0.25), Source("c", weight=0.5)
    used = times([mine, general, more], [100, 1000, 50])
    assert used[0] == 2 and np.allclose(np.array(used) * [100, 1000, 50] / 800, [0.25, 0.25, 0.5])
    assert times([Source("a"), mine], [5, 7]) == [1.0, 2]
    both = times([Source("a", weight=1), Source("b", weight=3)], [100, 600])  # all weighed: the scarcest is used once
    assert np.allclose(both, [1, 0.5])
    with pytest.raises(UserError, match=r"add up to 1\.25"):
        times([mine, Source("b", weight=1.25)], [1, 1])
    with pytest.raises(UserError, match="b: has a weight but no rows"):
        times([mine, Source("b", weight=0.5)], [1, 0])


@given(st.integers(1, 50), st.floats(0.0, 4.0), st.integers(0, 9))
def test_every_row_is_used_as_often_as_any_other_but_for_once(n, number, seed):
    rng = np.random.default_rng(seed)
    items = [Example(np.arange(size), np.ones(size, np.int32), str(i)) for i, size in enumerate(rng.integers(1, 40, n))]
    used = repeated(items, number, seed)
    times_used = Counter(item.row for item in used)
    assert all(times_used[item.row] in (int(number), int(number) + 1) for item in items)
    assert abs(sum(map(len, used)) - number * sum(map(len, items))) <= 20  # half of the longest row
    assert [item.row for item in used] == [item.row for item in repeated(items, number, seed)]


def test_a_beginning_reaches_the_tokens_asked():
    items = examples(9, 10)
    assert [len(beginning(items, n)) for n in (1, 10, 11, 85, 1000)] == [1, 1, 2, 9, 9] and beginning([], 5) == []


def test_over_length_rows_are_dropped_and_counted_per_source():
    short, long = examples(30, 10), examples(3, 40, first=100)
    mine, other = Source("x/mine.json"), Source("y/mine.json", max_length=20)
    encoded = [(mine, short + long, Counter()), (other, short + long, Counter({"no reply": 2})), (Source("empty.json"), [], Counter())]
    parts = build(encoded, 50, 0.0, 0, 0)
    assert [part.left_out for part in parts] == [{}, {"longer than 20": 3, "no reply": 2}, {}]
    assert [(part.name, part.rows, len(part.train)) for part in parts] == [
        ("x/mine.json", 33, 33),
        ("y/mine.json", 35, 30),
        ("empty", 0, 0),
    ]
    assert parts[2] == Part("empty", 0, 1.0, [], [])
    with pytest.raises(UserError, match=r"m\.json: all 3 rows are longer than 20"):
        build([(Source("m.json"), long, Counter())], 20, 0.0, 0, 0)
