"""Documents: what is read, what is skipped, in which order, and what is held out."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soul.errors import UserError
from training import sources
from training.sources import _docstrings, _source, documents, mixture, parse_sources


def read(*specs, limit=10**9, column=None):
    counts = Counter()
    return list(mixture(parse_sources([str(spec) for spec in specs], column), limit, counts)), counts


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_every_format_gives_the_same_texts(tmp_path):
    rows = [{"text": f"number {i} is ça\r\n"} for i in range(9)]
    files = [jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl.gz", tmp_path / "c.parquet", tmp_path / "d"]
    files[1].write_bytes(gzip.compress(files[0].read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), files[2])
    files[3].mkdir()
    for i, row in enumerate(rows):
        (files[3] / f"{i}.txt").write_bytes(row["text"].encode())
    expected = [row["text"] for row in rows]
    for file in files:
        found, counts = read(file)
        assert sorted(d.text for d in found) == expected and not counts
        assert all(d.size == len(d.text.encode()) and d.source == file.name[0] for d in found)


def test_a_folder_is_read_in_the_order_of_hashes_and_without_hidden_files(tmp_path):
    for i in range(40):
        (tmp_path / f"p{i // 20}").mkdir(exist_ok=True)
        (tmp_path / f"p{i // 20}" / f"{i:02}.py").write_text(f"x = {i}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    found, _ = read(tmp_path)
    assert len(found) == 40 and [d.id for d in found] != sorted(d.id for d in found)
    assert {d.id[:2] for d in found[:10]} == {"p0", "p1"}  # a prefix has something of both packages
    assert read(tmp_path)[0] == found


def test_untrusted_rows_are_skipped_and_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = ["fine", 5, None, ["x"], "a\0b", "\ud800", "  \n", "fine", "also fine"]
    file.write_text("\n".join([*(json.dumps({"text": t}) for t in texts), "[]", '"text"', json.dumps({"other": "x"})]))
    found, counts = read(file)
    assert [d.text for d in found] == ["fine", "also fine"]
    assert counts == {"without text, or of another licence": 7, "with NUL": 1, "not UTF-8": 1, "duplicates": 1}
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"no document that can be used \(1 not UTF-8\)"):
        read(tmp_path / "latin.txt")


def test_column(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "body": "b"}, {"content": "c", "body": "d"}])
    assert [d.text for d in read(file)[0]] == ["a", "c"]
    assert [d.text for d in read(file, column="body")[0]] == ["b", "d"]
    pq.write_table(pa.Table.from_pylist([{"n": 1, "body": "b"}]), tmp_path / "t.parquet")
    assert [d.text for d in read(tmp_path / "t.parquet", column="body")[0]] == ["b"]
    for path in (file, tmp_path / "t.parquet"):
        with pytest.raises(UserError, match="--column"):
            read(path, column="missing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', r"a.jsonl:1: is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: is not JSON"),
        ("a.parquet", b"PAR1 no", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], "is damaged"),
        ("a.jsonl.gz", b"not gzip", "is damaged"),
        ("a.txt", b"", "no document"),
        ("a.png", b"x", "is none of"),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_specs_that_mean_nothing_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b=2").mkdir()
    (tmp_path / "b=2" / "x.txt").write_text("y")
    assert parse_sources([str(tmp_path / "b=2")])[0].weight is None  # a path that exists is a path
    for specs, message in (
        (["nowhere"], "no such file or source"),
        ([f"{tmp_path}/a.txt=0"], "above 0"),
        ([f"{tmp_path}/a.txt=nan"], "above 0"),
        ([f"{tmp_path}/a.txt=1", f"{tmp_path}/b=2"], "some sources have a weight"),
        ([f"{tmp_path}/a.txt"] * 2, "two sources"),
        ([str(tmp_path)], None),
    ):
        if message:
            with pytest.raises(UserError, match=message):
                parse_sources(specs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none of"):
        read(tmp_path / "empty")


def test_weights_are_shares_of_the_bytes_and_the_mixture_ends_with_a_source(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [{"text": f"{i:010}"} for i in range(1000)])
    two = jsonl(tmp_path / "two.jsonl", [{"text": f"{i:020}"} for i in range(200)])
    found, _ = read(f"{one}=3", f"{two}=1")
    sizes = Counter()
    for n, document in enumerate(found):
        sizes[document.source] += document.size
        if n > 30:  # at every moment, not only at the end
            assert abs(sizes["one"] / sum(sizes.values()) - 0.75) < 0.06
    assert sizes["one"] == 10_000 and abs(sizes["two"] - 10_000 / 3) <= 20
    whole, _ = read(one, two)
    assert Counter(d.source for d in whole) == {"one": 1000, "two": 200}
    assert sum(d.size for d in read(one, two, limit=500)[0]) in range(500, 520)


def test_one_in_32_is_held_out_by_content_and_small_sources_still_give_some(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(2000)]
    held = {d.text for d in read(jsonl(tmp_path / "a.jsonl", rows))[0] if d.held_out}
    assert 30 < len(held) < 100
    again = {d.text for d in read(jsonl(tmp_path / "b.jsonl", rows[::-1] + [{"text": "new"}]))[0] if d.held_out}
    assert again - {"new"} == held
    few = read(jsonl(tmp_path / "c.jsonl", rows[:20]))[0]
    assert sum(d.held_out for d in few) == 3
    assert not any(d.held_out for d in read(jsonl(tmp_path / "d.jsonl", rows[:1]))[0])


def test_what_is_held_out_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "VALIDATION_BYTES", 100)
    found, _ = read(jsonl(tmp_path / "a.jsonl", [{"text": f"document {i:03}"} for i in range(999)]))
    assert sum(d.size for d in found if d.held_out) in range(100, 113)


def test_one_text_file_is_cut_into_documents_that_join_to_it(tmp_path):
    text = "".join(f"line {i} ça\r\n" for i in range(20_000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    found = list(documents(_source(str(tmp_path / "book.txt"), None), Counter()))
    assert len(found) > 5 and "".join(d.text for d in found) == text
    assert 1 <= sum(d.held_out for d in found) <= 3


def test_the_presets_of_the_installation_are_code_and_prose():
    code, _ = read("python-code", limit=2_000_000)
    assert all(d.id.endswith(".py") for d in code) and not any("site-packages" in d.id for d in code)
    docs, _ = read("python-docs", limit=600_000)
    assert {"reference/lambda", "reference/with"} <= {d.id for d in docs}


def test_docstrings_are_prose_under_their_names(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        '"""Top.\n\n    More."""\nclass A:\n    """Is A."""\n    def f(self):\n        """Does f."""\n    def _g(self):\n        """Hidden."""\n'
    )
    assert _docstrings("pkg/m.py", file) == "pkg.m\n\nTop.\n\nMore.\n\npkg.m.A\n\nIs A.\n\npkg.m.A.f\n\nDoes f.\n"
    file.write_text("def broken(:")
    assert _docstrings("pkg/m.py", file) == ""


def test_the_hub_is_streamed_and_its_errors_are_one_line(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, *config, split, streaming):
        asked.append((name, *config, split, streaming))
        return iter([{"content": "x = 1", "license": "mit"}, {"content": "y = 2", "license": "gpl-3.0"}, {"text": "z"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [d.text for d in read("hf:a/set")[0]] == ["x = 1", "y = 2", "z"]
    assert [d.text for d in read("hf:a/set:cfg@content")[0]] == ["x = 1", "y = 2"]
    assert [d.text for d in read("code")[0]] == ["x = 1"]
    read("hf:a/set:test"), read("hf:a/set:cfg:test"), read("fineweb-edu")
    assert asked == [
        ("a/set", "train", True), ("a/set", "cfg", "train", True), ("codeparrot/codeparrot-clean", "train", True),
        ("a/set", "test", True), ("a/set", "cfg", "test", True), ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True),
    ]  # fmt: skip
    assert [d.text for d in read("hf:a/code")[0]] == ["x = 1", "y = 2", "z"]  # the preset asks for licences, not a set of its name
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network\nmore")))
    with pytest.raises(UserError, match="no network") as error:
        read("hf:a/set")
    assert "\n" not in str(error.value)
