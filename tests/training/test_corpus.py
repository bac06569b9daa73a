"""The corpus: packing loses nothing, batches are a pure function of (seed, k), and an interrupted build ends as if it had not been."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from soul import files
from soul.errors import UserError
from training import corpus, data_cmd
from training.corpus import Corpus, pack
from training.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = {f"{i:03}.txt": f"{i} file: " + " ".join(f"word{(i * j) % 91}" for j in range(5 + i * 7 % 240)) + " ça 😀\r\n" for i in range(300)}


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(2, 40))
def test_every_row_is_full_and_no_token_is_used_twice_or_lost(lengths, capacity):
    starts = np.cumsum([0, *lengths]).tolist()
    pieces, rows = pack(starts, capacity)
    assert rows[0] == 0 and rows[-1] == len(pieces)
    for a, b in pairwise(rows):
        assert sum(count + 1 for _, count in pieces[a:b]) == capacity  # each piece with its bos: so a row begins with one
    used = np.zeros(starts[-1], int)
    for start, count in pieces:
        document = np.searchsorted(starts, start, side="right") - 1
        assert start + count <= starts[document + 1]
        used[start : start + count] += 1
    assert used.max(initial=0) <= 1
    assert (used == 0).sum() < capacity  # no more than the row that could not be filled


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_documents_that_fit_are_cut_only_to_fill_a_row(lengths):
    starts = np.cumsum([0, *lengths]).tolist()
    pieces, rows = pack(starts, 31)
    last = {rows[n + 1] - 1 for n in range(len(rows) - 1)}
    for n, (start, count) in enumerate(pieces):
        assert n in last or start + count in starts  # what ends inside a document ends its row


def test_the_largest_that_fits_goes_first():
    # of 3, 6, 4 and 2 tokens, each with its bos: 7 + 1 (a bos alone), then 5 + 3; 3 tokens are left over
    assert pack([0, 3, 9, 13, 15], 8) == ([(3, 6), (9, 0), (9, 4), (13, 2)], [0, 2, 4])
    assert pack([0, 20, 23], 8) == ([(0, 7), (7, 7), (14, 6), (20, 0)], [0, 1, 2, 4])  # long ones fill rows of their own first


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (root / name).write_bytes(text.encode())
    (root / "copy.txt").write_bytes(TEXTS["000.txt"].encode())
    (root / "nul.txt").write_bytes(b"a\0b")
    return root


def config(texts, out, **more):
    return data_cmd.Config(out, data=(str(texts),), vocab_size=400, **more)


@pytest.fixture(scope="module")
def built(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cmd, "SHARD_BYTES", 40_000)
        assert data_cmd.main(config(texts, out)) == 0
    return out


def contents(directory, pattern="*"):
    return {path.name: path.read_bytes() for path in sorted(directory.glob(pattern)) if not path.name.startswith("rows-")}


def test_every_document_comes_back_byte_for_byte(built):
    c = Corpus.open(built, 64)
    assert len(c.shards) > 2 and c.shards[0].ids.dtype == np.uint16
    found = [c.tokenizer.decode(s.ids[a:b].tolist()) for s in c.shards for a, b in zip(s.starts[:-1], s.starts[1:])]
    held = [c.tokenizer.decode(ids.tolist()) for documents in c.held_out.values() for ids in documents]
    assert sorted(found + held) == sorted(TEXTS.values()) and 3 <= len(held) < 40
    assert c.bytes == sum(len(text.encode()) for text in found) == sum(int(c.token_bytes[s.ids].sum()) for s in c.shards)


def test_the_card_counts(built):
    card = json.loads((built / "card.json").read_text())
    assert card["skipped"] == {"duplicates": 1, "with NUL": 1} and card["vocab_size"] == Tokenizer.load(built).vocab_size
    (source,) = card["sources"].values()
    assert source["tokens"] == card["tokens"] == sum(shard["tokens"] for shard in card["shards"].values())
    assert "not stated" in (built / "README.md").read_text() and card["hash"] in (built / "README.md").read_text()


def test_batches_are_rows_of_an_epoch_and_a_pure_function_of_seed_and_k(built):
    c, again = Corpus.open(built, 64), Corpus.open(built, 64)
    bos = c.tokenizer.special["<|bos|>"]
    later = again.batch(9, 4, seed=3)
    batches = [c.batch(k, 4, seed=3) for k in range(10)]
    assert all(np.array_equal(batches[9][key], later[key]) for key in later)
    assert {key: (value.shape, value.dtype.name) for key, value in later.items()} == {
        "ids": ((4, 64), "int32"), "targets": ((256,), "int32"), "weights": ((256,), "float32")
    }  # fmt: skip
    assert (later["ids"][:, 0] == bos).all() and (later["weights"] == 1).all()
    assert (later["ids"][:, 1:] == later["targets"].reshape(4, 64)[:, :-1]).all()
    assert not np.array_equal(c.batch(0, 4, seed=4)["ids"], batches[0]["ids"])
    one, two = ([c.batch(k, 1, seed=3)["ids"].tobytes() for k in range(e * c.rows, (e + 1) * c.rows)] for e in (0, 1))
    assert sorted(one) == sorted(two) and one != two  # the same rows, in another order
    assert [row.tobytes() for batch in batches for row in batch["ids"]] == one[:40]  # whatever the rows per batch


def test_rows_hold_every_token_of_the_training_shards(built):
    c = Corpus.open(built, 64)
    counts = np.zeros(c.tokenizer.vocab_size, int)
    for k in range(c.rows):
        batch = c.batch(k, 1, 0)
        np.add.at(counts, [*batch["ids"][0], batch["targets"][-1]], 1)
    counts[c.tokenizer.special["<|bos|>"]] = 0
    lost = sum(np.bincount(s.ids, minlength=len(counts)) for s in c.shards) - counts
    assert lost.min() >= 0 and lost.sum() < 65 * len(c.shards)


def test_validation_holds_other_documents_than_training(built):
    c = Corpus.open(built, 64)
    (rows,) = c.validation.values()
    tokens = sum(map(len, next(iter(c.held_out.values()))))
    text = rows[rows != c.tokenizer.special["<|bos|>"]]
    assert rows.shape[1] == 65 and rows.dtype == np.int32 and tokens - 65 < len(text) <= tokens


def test_the_index_is_built_once_per_length_and_kept(built, monkeypatch):
    first = Corpus.open(built, 32)
    monkeypatch.setattr(corpus, "pack", lambda *_: pytest.fail("packed again"))
    again = Corpus.open(built, 32)
    assert np.array_equal(first.pieces, again.pieces)
    with pytest.raises(pytest.fail.Exception):
        Corpus.open(built, 33)


def test_a_given_tokenizer_is_used(texts, built, tmp_path):
    assert data_cmd.main(data_cmd.Config(tmp_path, data=(str(texts),), tokenizer=str(built))) == 0
    assert Corpus.open(tmp_path, 64).tokenizer_hash == Corpus.open(built, 64).tokenizer_hash


def test_a_finished_build_does_nothing_again(texts, built, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(data_cmd, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("encoded again"))
    assert data_cmd.main(config(texts, built)) == 0 and contents(built) == before


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_build_that_is_stopped_goes_on_to_the_same_files(texts, built, tmp_path, monkeypatch, after):
    monkeypatch.setattr(data_cmd, "SHARD_BYTES", 40_000)
    calls, encode = [], Tokenizer.encode_batch

    def stop(self, batch):
        calls.append(batch)
        if len(calls) > after:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(data_cmd, "BATCH_BYTES", 10_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenizer, "encode_batch", stop)
        data_cmd.main(config(texts, tmp_path))
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(UserError, match="no finished data"):
        Corpus.open(tmp_path, 64)
    assert data_cmd.main(config(texts, tmp_path)) == 0
    assert contents(tmp_path) == contents(built)


def test_kill_9_during_a_write_leaves_nothing_half_written(texts, built, tmp_path):
    """In a process of its own that dies inside the write of the second shard's ids."""
    script = f"""
import os, signal, sys
from pathlib import Path
from training import corpus, data_cmd
data_cmd.SHARD_BYTES = 40_000
write = Path.write_bytes
def killed(path, data):
    if "shard-00001.ids" in path.name:
        write(path, bytes(data)[:50])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, data)
Path.write_bytes = killed
data_cmd.main(data_cmd.Config(Path({str(tmp_path)!r}), data=({str(texts)!r},), vocab_size=400))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert list(tmp_path.glob(".*.tmp")) and (tmp_path / "shard-00000.json").exists() and not (tmp_path / "shard-00001.ids.npy").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cmd, "SHARD_BYTES", 40_000)
        assert data_cmd.main(config(texts, tmp_path)) == 0
    assert contents(tmp_path) == contents(built) and not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_is_one_clear_line_and_what_was_finished_is_kept(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(data_cmd, "SHARD_BYTES", 40_000)
    write = Path.write_bytes

    def full(path, data):
        if "shard-00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        data_cmd.main(config(texts, tmp_path))
    assert (tmp_path / "shard-00000.json").exists() and not list(tmp_path.glob(".*.tmp"))


def test_bad_rows_are_told_before_anything_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2"):
        data_cmd.main(config(tmp_path / "rows.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_settings_other_sources_and_foreign_directories_are_refused(texts, built, tmp_path, monkeypatch):
    monkeypatch.setattr(data_cmd, "SHARD_BYTES", 40_000)
    with pytest.raises(UserError, match="made with other settings"):
        data_cmd.main(config(texts, built, max_bytes=1000))
    mine, out = shutil.copytree(texts, tmp_path / "texts"), tmp_path / "out"
    assert data_cmd.main(config(mine, out)) == 0
    (mine / "002.txt").write_text("changed")
    with pytest.raises(UserError, match="sources have changed"):
        data_cmd.main(config(mine, out))
    (out / "build.json").unlink()
    with pytest.raises(UserError, match="a tokenizer of something else"):
        data_cmd.main(config(mine, out))


def test_damaged_directories_are_one_clear_line(built, tmp_path):
    def broken(name, change):
        copy = tmp_path / name
        shutil.copytree(built, copy)
        change(copy)
        return copy

    def edit_card(copy, **values):
        files.write_json(copy / "card.json", json.loads((copy / "card.json").read_text()) | values)

    cases = {
        "missing": (lambda d: (d / "shard-00000.ids.npy").unlink(), "missing or damaged"),
        "short": (lambda d: (d / "shard-00000.ids.npy").write_bytes((d / "shard-00000.ids.npy").read_bytes()[:100]), "missing or damaged"),
        "pickle": (lambda d: np.save(d / "shard-00000.ids.npy", np.array([{}], object), allow_pickle=True), "missing or damaged"),
        "fewer": (lambda d: np.save(d / "shard-00000.ids.npy", np.zeros(9, np.uint16)), "holds 9 tokens"),
        "keys": (lambda d: (d / "card.json").write_text("[]"), "is damaged"),
        "format": (lambda d: edit_card(d, format=99), "not made with the tokenizer"),
        "tokenizer": (lambda d: train_tokenizer(["another"], 300).save(d / "tokenizer.json"), "not made with the tokenizer"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(UserError, match=message):
            Corpus.open(broken(name, change), 64)
    with pytest.raises(UserError, match="fewer than"):
        Corpus.open(built, 1 << 15)
    copy = broken("ids", lambda d: None)
    ids = np.load(copy / "shard-00000.ids.npy")
    np.save(copy / "shard-00000.ids.npy", np.full_like(ids, 999))
    c = Corpus.open(copy, 64)
    with pytest.raises(UserError, match="id 999"):
        c.batch(0, c.rows, 0)


def test_large_vocabularies_use_four_bytes(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Tokenizer,
        "__init__",
        (lambda init: lambda self, *a, **k: (init(self, *a, **k), setattr(self, "vocab_size", 70_000))[0])(Tokenizer.__init__),
    )
    assert data_cmd.main(config(texts, tmp_path)) == 0
    assert Corpus.open(tmp_path, 64).shards[0].ids.dtype == np.uint32
