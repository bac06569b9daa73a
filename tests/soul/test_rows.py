import pytest
from hypothesis import given
from hypothesis import strategies as st

from soul import conversation as c
from soul import rows
from soul.errors import UserError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.sampled_from(["Read", "Edit", "Grep", "Bash"])
messages = st.lists(
    st.one_of(
        st.builds(c.user, text),
        st.builds(lambda t, n, a: c.assistant(t, c.call_from(n, a)), text, names, st.dictionaries(text, text, max_size=3)),
        st.builds(c.assistant, text),
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(messages, min_size=1, max_size=4))
def test_parquet_round_trip_is_exact_across_tools(tmp_path, conversations):
    path = tmp_path / "sft.parquet"
    rows.write_rows(path, [{"id": str(n), "messages": m} for n, m in enumerate(conversations)], "sft")
    assert [row["messages"] for row in rows.read_rows(path)] == conversations


def test_preference_rows_and_provenance_round_trip(tmp_path):
    row = {
        "id": "a", "source": "code:json", "soul_hash": "s", "template_hash": "t", "principles": ["lowercase"],
        "checks": [{"principle": "lowercase", "check": "lowercase_prose", "ok": False, "message_index": 1, "start": 0, "end": 3, "why": "x"}],
        "trail": [{"stage": "draft", "text": "Hi", "key": "k"}], "accepted": True, "reason": "", "files": [{"path": "a.py", "content": "x\r\n"}],
        "served": ["m@p"],
        "prompt": [c.user("hi")], "chosen": [c.assistant("hey")], "rejected": [c.assistant("Hi")],
    }  # fmt: skip
    rows.write_rows(tmp_path / "p.parquet", [row], "preference")
    (back,) = rows.read_rows(tmp_path / "p.parquet")
    assert back == row and rows.kind_of([back]) == "preference"


def test_many_rows_are_written_in_groups_and_documents_have_text(tmp_path):
    import pyarrow.parquet as pq

    with rows.row_writer(tmp_path / "d.parquet", "docs") as write:
        for part in range(3):
            write([{"id": f"{part}-{n}", "text": "a soul"} for n in range(4)])
        assert not (tmp_path / "d.parquet").exists()
    back = rows.read_rows(tmp_path / "d.parquet")
    assert len(back) == 12 and rows.kind_of(back) == "docs" and back[5]["text"] == "a soul"
    assert pq.ParquetFile(tmp_path / "d.parquet").num_row_groups == 3


def test_unknown_columns_are_refused_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(ValueError, match="mesages"):
        rows.write_rows(tmp_path / "x.parquet", [{"id": "a", "mesages": []}], "sft")
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        rows.read_rows(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        rows.read_rows(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "plain.parquet")
    with pytest.raises(UserError, match="neither a `messages` column"):
        rows.read_rows(tmp_path / "plain.parquet")


def test_foreign_rows_become_canonical():
    foreign = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "Read", "arguments": {"file_path": "a", "offset": 4, "limit": None}}}
            ],
        }
    ]
    (message,) = c.canonical(foreign)
    assert message == c.assistant("", c.tool_call("Read", file_path="a", offset="4"))
    assert c.canonical([{"role": "user", "content": "x", "tool_calls": []}]) == [c.user("x")]
