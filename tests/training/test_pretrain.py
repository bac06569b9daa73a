"""`soulsmith pretrain` on a corpus that is made up here: a pulse, resuming, the horizon by the clock, documents, bits per byte."""

import itertools
import json
import math
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import same, tokenizer

from model import checkpoint
from model.load import load_model
from soul.errors import UserError
from soul.rows import write_rows
from training import pretrain
from training.data import as_batch
from training.fit import bits_per_byte, read_evals, read_metrics
from training.pretrain import Config, Mixed

LENGTH = 64


class FakeCorpus:
    """The contract of training.corpus.Corpus over text that repeats."""

    def __init__(self, length=LENGTH):
        self.tokenizer, self.length, self.hash, self.tokenizer_hash = tokenizer(), length, "data", "tokenizer"
        self.token_bytes = np.array([1] * 256 + [0] * (self.tokenizer.vocab_size - 256), np.int32)
        ids = self.tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 60)
        bos, n = self.tokenizer.special["<|bos|>"], len(ids) // length
        self.table = np.insert(np.array(ids[: n * length], np.int32).reshape(n, length), 0, bos, axis=1)
        self.rows, self.tokens, self.validation = n, n * (length + 1), {"fox": self.table[:5], "none": self.table[:0]}

    def batch(self, k, rows, seed):
        return as_batch(self.table[(np.arange(rows) + k * rows + seed) % self.rows], rows)


@pytest.fixture(autouse=True)
def corpus(monkeypatch):
    monkeypatch.setattr(pretrain.Corpus, "open", lambda directory, length: FakeCorpus(length))


def config(out, **more):
    settings = {"depth": 1, "length": LENGTH, "batch_rows": 2, "batch_tokens": 4 * LENGTH, "steps": 12, "compute": "fp32", **more}
    return Config(out=out, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Corpus, "open", lambda directory, length: FakeCorpus(length))
        assert pretrain.main(config(out)) == 0
    return out


def test_pretrain_has_a_pulse_and_leaves_a_model_with_results(trained):
    lines = read_metrics(trained / "pretrain" / "metrics.jsonl")
    assert len(lines) == 12 and lines[0]["tokens"] == 4 * LENGTH
    assert lines[0]["loss"] == pytest.approx(math.log(320), abs=0.05) and lines[-1]["loss"] < lines[0]["loss"] - 0.3
    bpb = [line["eval"]["bpb fox"] for line in read_evals(trained / "pretrain" / "metrics.jsonl") if "bpb fox" in line["eval"]]
    assert len(bpb) == 12 and bpb[-1] < bpb[0]
    loaded = load_model(trained)
    assert (loaded.meta["stage"], loaded.meta["step"], loaded.config.qk_norm, loaded.config.vocab_size % 64) == ("pretrain", 12, True, 0)
    results = json.loads((trained / "pretrain" / "results.json").read_text())
    assert results["bpb"] == {"fox": bpb[-1]} and results["tokens"] == 12 * 4 * LENGTH and results["tokens_per_s"] > 0
    assert results["params"] == sum(p.size for p in jax.tree.leaves(nnx.state(loaded.model)))
    assert (trained / "pretrain" / "samples.md").read_text().count("def fibonacci") == 2
    assert (trained / "pretrain" / "checkpoints" / "12" / "opt_state").is_dir()  # for SFT to start from


def test_a_finished_run_writes_results_that_are_missing_and_trains_no_more(trained):
    (trained / "pretrain" / "results.json").rename(trained / "kept.json")
    assert pretrain.main(config(trained)) == 0
    assert (trained / "pretrain" / "results.json").read_text() == (trained / "kept.json").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
    batch = FakeCorpus.batch

    def stop(self, k, rows, seed):
        if k == 8:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, k, rows, seed)

    monkeypatch.setattr(FakeCorpus, "batch", stop)
    assert pretrain.main(config(tmp_path)) == 130 and checkpoint.latest(tmp_path / "pretrain") == 5
    monkeypatch.setattr(FakeCorpus, "batch", batch)
    assert pretrain.main(config(tmp_path)) == 0
    assert same(*(nnx.state(load_model(path).model) for path in (trained, tmp_path)))


def ticking(seconds):
    ticks = itertools.count()
    return lambda: seconds * next(ticks)


def test_minutes_set_the_horizon_once(tmp_path, monkeypatch):
    """Every look at the clock is a second later: gradient, update and eval take one each, so a step of two micro-batches takes three."""
    asked = config(tmp_path, steps=None, minutes=1.0)
    seen = []
    monkeypatch.setattr(pretrain, "train", lambda job: seen.append(job) or 1)
    pretrain.main(asked, ticking(1.0))
    # one gradient and one eval read 128 tokens; 10 evals of 320 tokens take 25 s of the 60, and 35 / 3 is 11
    assert seen[0].steps == 11
    pretrain.main(asked, ticking(9.0))
    assert seen[1].steps == 11 and seen[1].identity == seen[0].identity
    pretrain.main(replace(asked, minutes=2.0), ticking(1.0))
    assert seen[2].steps == 31
    (tmp_path / "pretrain" / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="another horizon"):
        pretrain.main(asked, ticking(1.0))


def docs(path, n=40):
    write_rows(path, [{"id": f"d{i}", "text": f"document {i} says: be kind. " * 5} for i in range(n)], "docs")
    return path


def test_documents_take_their_share_of_rows_and_a_batch_stays_a_pure_function(tmp_path):
    corpus = FakeCorpus()
    extra = pretrain.documents(docs(tmp_path / "docs.parquet", 20), corpus)
    assert extra.shape[1] == LENGTH + 1 and len(extra) > 20 and np.all(extra[:, 0] == corpus.tokenizer.special["<|bos|>"])
    assert b"be kind" in corpus.tokenizer.decode_bytes(extra[3].tolist())
    mixed = Mixed(corpus, extra, 0.3, 5)
    known = {row.tobytes(): n for n, row in enumerate(extra)}
    used = []
    for k in range(50):
        batch, plain = mixed(k, 4), corpus.batch(k, 4, 5)
        rows = np.concatenate([batch["ids"], batch["targets"].reshape(4, -1)[:, -1:]], axis=1)
        theirs = [row.tobytes() in known for row in rows]
        used += [known[row.tobytes()] for row in rows if row.tobytes() in known]
        assert np.array_equal(batch["ids"][:, 1:], batch["targets"].reshape(4, -1)[:, :-1])
        assert all(np.array_equal(a, b) for a, b, other in zip(batch["ids"], plain["ids"], theirs) if not other)
    assert len(used) == 60 > len(extra) and sorted(used[: len(extra)]) == [*range(len(extra))]  # an epoch meets each once
    again = mixed(7, 4)
    assert all(np.array_equal(again[name], mixed(7, 4)[name]) for name in again)
    bare = Mixed(corpus, extra[:0], 0.3, 5)(3, 4)
    assert all(np.array_equal(bare[name], corpus.batch(3, 4, 5)[name]) for name in bare)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"steps": 3, "minutes": 1.0}, "both set the horizon"),
        ({"depth": 0}, "--depth must be more than 0"),
        ({"midtrain_share": 1.5}, "--midtrain-share"),
        ({"depth": 2, "kv_heads": 3}, "cannot share 3"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        pretrain.main(config(tmp_path, **changed))
    assert not (tmp_path / "pretrain").exists()


def test_files_that_are_no_documents_are_refused(tmp_path):
    write_rows(tmp_path / "sft.parquet", [{"id": "a", "messages": []}], "sft")
    with pytest.raises(UserError, match="holds no documents"):
        pretrain.main(config(tmp_path, midtrain=tmp_path / "sft.parquet"))
    with pytest.raises(UserError, match="fewer than"):
        pretrain.main(config(tmp_path, midtrain=docs(tmp_path / "few.parquet", 0 + 1), length=256))


class Uniform:
    """A model to which every one of 4 tokens is as likely."""

    def scores(self, params, frozen, batches):
        return (np.full(len(batch["targets"]), -math.log(4), np.float32) for batch in batches)


def test_bits_per_byte_counts_bytes_and_no_control_tokens():
    rows = np.array([[9, 1, 2, 3, 0], [1, 1, 1, 0, 0]], np.int32)  # 3 is a control token, 0 has 2 bytes
    token_bytes = np.array([2, 1, 3, 0], np.int32)
    batches = [as_batch(rows, 4)]  # two rows are padding
    assert batches[0]["weights"].sum() == 8 and batches[0]["ids"].shape == (4, 4)
    assert bits_per_byte(Uniform(), None, batches, token_bytes) == pytest.approx(7 * 2 / (1 + 3 + 2 + 1 + 1 + 2 + 2))
    assert bits_per_byte(Uniform(), None, [as_batch(rows[:, 3:] * 0 + 3, 2)], token_bytes) == math.inf
