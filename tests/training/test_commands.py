"""The commands end to end on a tiny model: a pulse, resuming, and refusing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tiny_model import model_dir, preference_rows, same, sft_rows

from model import checkpoint
from model.load import load_model
from soul.errors import UserError
from soul.rows import write_rows
from training import dpo, sft
from training.data import Packed
from training.fit import read_metrics
from training.optim import OptimConfig
from training.run import TrainConfig

SFT = TrainConfig(length=96, batch_rows=2, compute="fp32", optim=OptimConfig(lr=1e-2))
DPO = TrainConfig(length=64, batch_rows=1, compute="fp32", optim=OptimConfig(lr=1e-3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model and two data files."""
    path = tmp_path_factory.mktemp("base")
    model_dir(path / "model")
    write_rows(path / "sft.parquet", sft_rows(12), "sft")
    write_rows(path / "preference.parquet", preference_rows(9), "preference")
    return path


def sft_config(base, out, **train):
    return sft.Config(out=out, model=str(base / "model"), data=(base / "sft.parquet",), train=TrainConfig(**{**vars(SFT), **train}))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """An uninterrupted SFT run."""
    out = tmp_path_factory.mktemp("tuned")
    assert sft.main(sft_config(base, out)) == 0
    return out


def params(path):
    return nnx.split(load_model(path).model)[1]


def test_sft_has_a_pulse(base, tuned):
    lines = read_metrics(tuned / "sft" / "metrics.jsonl")
    assert len(lines) > 2 and lines[-1]["loss"] < lines[0]["loss"]
    loaded = load_model(tuned / "sft")
    assert loaded.meta["stage"] == "sft" and loaded.meta["step"] == loaded.meta["steps"] == len(lines)
    assert not same(nnx.split(loaded.model)[1], params(base / "model"))
    assert [p.name for p in (tuned / "sft" / "checkpoints").iterdir()] == [str(len(lines))]
    stamp = (tuned / "sft" / "checkpoints" / str(len(lines))).stat().st_mtime_ns
    assert sft.main(sft_config(base, tuned)) == 0  # already trained: nothing to do
    assert (tuned / "sft" / "checkpoints" / str(len(lines))).stat().st_mtime_ns == stamp


def test_dpo_has_a_pulse_and_starts_at_ln_2(base, tuned):
    config = dpo.Config(out=tuned, data=(base / "preference.parquet",), train=DPO)
    assert dpo.main(config) == 0
    lines = read_metrics(tuned / "dpo" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-7) and lines[0]["margin"] == 0.0 and lines[0]["accuracy"] == 0.5
    assert lines[-1]["margin"] > 0 and lines[-1]["accuracy"] == 1.0
    assert {"chosen_logp", "rejected_logp", "chosen_length", "rejected_length", "grad_norm"} <= set(lines[0])
    assert load_model(tuned).meta["stage"] == "dpo"


def test_dpo_refuses_a_reference_of_other_weights(base, tuned, tmp_path, monkeypatch):
    config = dpo.Config(out=tmp_path, model=str(tuned / "sft"), data=(base / "preference.parquet",), train=DPO)
    true = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a: np.nextafter(true(*a), np.float32(1)))
    with pytest.raises(UserError, match="not ln 2"):
        dpo.main(config)
    monkeypatch.undo()
    (kept,) = (tmp_path / "dpo").glob("reference-*.npy")
    stamp = kept.stat().st_mtime_ns
    assert dpo.main(config) == 0
    assert kept.stat().st_mtime_ns == stamp  # computed once


def test_only_blocks_that_will_be_trained_on_get_a_reference(base, tuned, tmp_path):
    train = TrainConfig(**{**vars(DPO), "max_tokens": 100})
    assert dpo.main(dpo.Config(out=tmp_path, model=str(tuned / "sft"), data=(base / "preference.parquet",), train=train)) == 0
    (kept,) = (tmp_path / "dpo").glob("reference-*.npy")
    computed = ~np.isnan(np.load(kept)[:, 0])
    assert 0 < computed.sum() == len(read_metrics(tmp_path / "dpo" / "metrics.jsonl")) < len(computed)


def test_an_interrupted_run_resumes_to_the_same_bits(base, tuned, tmp_path, monkeypatch, capsys):
    batch = Packed.batch

    def stop_at_2(self, k):
        if k == 2:
            signal.raise_signal(signal.SIGINT)
        return batch(self, k)

    monkeypatch.setattr(Packed, "batch", stop_at_2)
    assert sft.main(sft_config(base, tmp_path)) == 130
    assert f"soulsmith sft --config {tmp_path / 'sft'}.json" in capsys.readouterr().err.replace("\n", "")
    monkeypatch.undo()
    with pytest.raises(UserError, match="Finish its training first"):
        dpo.main(dpo.Config(out=tmp_path, data=(base / "preference.parquet",), train=DPO))
    with pytest.raises(UserError, match="other settings"):
        sft.main(sft_config(base, tmp_path, seed=1))
    monkeypatch.setattr("training.run.PACKING", "longest first")  # a version whose batches were others
    with pytest.raises(UserError, match="other settings"):
        sft.main(sft_config(base, tmp_path))
    monkeypatch.undo()
    assert sft.main(sft_config(base, tmp_path)) == 0
    assert same(params(tmp_path / "sft"), params(tuned / "sft"))


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {here!r}]
import conftest
from pathlib import Path
from test_commands import Packed, sft, sft_config
batch = Packed.batch
Packed.batch = lambda self, k: os.kill(os.getpid(), signal.SIGKILL) if k == 3 else batch(self, k)
sft.main(sft_config(Path({base!r}), Path({out!r}), checkpoint_minutes=0.0))
"""


def test_a_killed_run_resumes_to_the_same_bits(base, tuned, tmp_path, capsys):
    here = Path(__file__).parent
    code = KILLED.format(root=str(here.parent.parent), here=str(here), base=str(base), out=str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(here.parent)}  # tests/conftest.py sets JAX up as it is here
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    saved = checkpoint.latest(tmp_path / "sft")
    assert saved in (2, 3)  # the last one may still have been on its way
    assert sft.main(sft_config(base, tmp_path)) == 0
    assert f"going on at step {saved} of" in capsys.readouterr().err
    assert same(params(tmp_path / "sft"), params(tuned / "sft"))


def test_max_tokens_shortens_the_run(base, tmp_path):
    assert sft.main(sft_config(base, tmp_path, max_tokens=300)) == 0
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert 200 < sum(line["tokens"] for line in lines) < 450
    assert lines[-1]["lr"] < SFT.optim.lr


def test_what_does_not_fit_is_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(UserError, match="more than the model's 256"):
        sft.main(sft_config(base, tmp_path, length=512))
    with pytest.raises(UserError, match="no such file"):
        sft.main(sft.Config(out=tmp_path, model=str(base / "model")))
    with pytest.raises(UserError, match="longer than 8"):
        sft.main(sft_config(base, tmp_path, length=8))
    assert list(tmp_path.iterdir()) == []
