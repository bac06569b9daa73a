import json
from dataclasses import replace
from itertools import count

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import CONFIG, model_dir, preference_rows, sft_rows, tokenizer

from model.transformer import Decoder
from soul.errors import UserError
from soul.files import read_json
from soul.rows import write_rows
from training import losses, planner
from training.lora import trained
from training.planner import Config, Probe, extrapolate, flops_per_token, items_of, measure, settings, stages
from training.programs import Programs

TINY = dict(length=64, batch_rows=2)


def ticking(step: float = 1.0):
    """A clock on which every look costs `step` seconds."""
    ticks = count()
    return lambda: next(ticks) * step


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setattr(planner, "PROBES", (1, 2))  # what compiles fast


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture
def run(tmp_path):
    write_rows(tmp_path / "data" / "sft.parquet", sft_rows(12), "sft")
    write_rows(tmp_path / "data" / "preference.parquet", preference_rows(12), "preference")
    return tmp_path


def stage(model, name="sft", layers=None, **more):
    found = stages(Config(model=model, stages=(name,), **TINY))[0]
    return replace(found, model=replace(CONFIG, n_layers=layers) if layers else found.model, **more)


def linear(self, batch, clock):
    return np.array([0.1 + 0.02 * self.layers, 0.03, 0.05 + 0.01 * self.layers, 0.0])


def test_command_plans_both_stages_of_a_run_and_saves_the_plan(run, model, capsys):
    assert planner.main(Config(out=run, model=model, **TINY), ticking()) == 0
    saved = read_json(run / "training_plan.json")
    assert [s["stage"] for s in saved["stages"]] == ["sft", "dpo"]
    for plan in saved["stages"]:
        assert plan["fits"] and plan["rows"] == 2 and plan["params"] == 27296 and plan["mfu"] > 0 and plan["hours"] > 0
        assert plan["peak_bytes"] < plan["available_bytes"]
    assert "sft" in capsys.readouterr().out


def test_tokens_are_those_that_training_would_see(run, model):
    sft, dpo = stages(Config(out=run, model=model, length=128, batch_rows=2))
    assert sft.tokens == sum(
        map(len, items_of(settings(Config(out=run, length=128), "sft"), CONFIG, planner.Template(planner.described(model)[1])))
    )
    batch, per_batch = sft.batch(2)
    assert 0 < per_batch <= 2 * 128 and batch["ids"].shape == (2, 128)
    assert dpo.batch(2)[0]["ids"].shape == (4, 128)  # both branches


def test_saved_settings_of_the_stage_are_used(run, model):
    (run / "sft.json").write_text(json.dumps({"out": str(run), "train": {"length": 128, "accumulate": 3, "max_tokens": 500}}))
    sft = stages(Config(out=run, model=model, stages=("sft",), batch_rows=1))[0]
    assert (sft.batch(1)[0]["ids"].shape, sft.rows, sft.accumulate, sft.tokens) == ((1, 128), 1, 3, 500)


def test_time_is_extrapolated_in_layers_and_a_step_is_counted_whole(model, monkeypatch):
    monkeypatch.setattr(Probe, "seconds", linear)
    plan = measure(stage(model, layers=30, accumulate=2, tokens=10_000), 0, 1e12, 0.0, ticking())
    step = 2 * (0.1 + 0.02 * 30) + 0.03 + (0.05 + 0.01 * 30)
    assert plan.step_s == pytest.approx(step)
    assert plan.tokens_per_s == pytest.approx(2 * 128 / step) and plan.hours == pytest.approx(10_000 / plan.tokens_per_s / 3600)


def test_a_model_no_deeper_than_the_probes_is_measured_as_it_is(model, monkeypatch):
    monkeypatch.setattr(planner, "PROBES", (4, 8))
    monkeypatch.setattr(Probe, "seconds", linear)
    plan = measure(stage(model), 0, 1e12, 0.0, ticking())
    assert plan.step_s == pytest.approx(0.1 + 0.02 * 2 + 0.05 + 0.01 * 2)


def test_the_reference_pass_of_dpo_is_in_its_hours(model, monkeypatch):
    monkeypatch.setattr(Probe, "seconds", lambda self, batch, clock: np.array([1.0, 0.0, 0.0, 0.5]))
    plan = measure(stage(model, "dpo", tokens=256_000), 0, 1e12, 0.0, ticking())
    assert plan.tokens_per_s == 256 and plan.hours * 3600 == pytest.approx(1000 + 500)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_memory_at_more_layers_is_what_the_compiler_plans_there(model, name):
    found = stage(model, name, layers=6)
    probes = [Probe(found, layers) for layers in (1, 3)]
    batch, _ = found.batch(2)
    predicted = extrapolate(probes, [probe.memory(batch) for probe in probes], 6)
    assert predicted == pytest.approx(Probe(found, 6).memory(batch), rel=0.02)


def test_the_program_that_is_measured_is_the_one_that_training_runs(model):
    found = stage(model)
    probe, (batch, _) = Probe(found, 2), found.batch(2)
    part = trained(Decoder(CONFIG, nnx.Rngs(0), compute=found.compute), 0, (), 0)
    programs = Programs(part.logprobs, losses.nll, total=part.total)  # as sft has it
    texts = [p.whole.lower(part.params, None, batch).as_text() for p in (probe.programs, programs)]
    assert texts[0] == texts[1]


def test_state_bytes_are_weights_and_two_moments(model):
    found = stage(model)
    state, grads, *_ = Probe(found, 2).memory(found.batch(2)[0])
    assert grads == 4 * 27296 and state == 3 * grads + 2 * 4  # and the counts of Adam and the schedule


def test_seconds_are_kept(model):
    looks = []
    clock = ticking(0.5)

    def watched():
        looks.append(clock())
        return looks[-1]

    found, per_round = stage(model), 2 * 6  # two probes, three programs with a look before and after each
    measure(found, 0, 1e12, 30.0, watched)
    assert 30.0 <= looks[-1] <= 30.0 + 0.5 * (per_round + 1)
    looks.clear()
    measure(found, 0, 1e12, 0.0, watched)  # no time left: still two rounds after the one that compiles
    assert len(looks) == 3 * per_round + 1


def test_micro_batch_halves_until_it_fits(model, monkeypatch):
    monkeypatch.setattr(Probe, "seconds", linear)
    monkeypatch.setattr(planner, "resident", lambda: 0)
    monkeypatch.setattr(planner, "CODE", 0)
    found = stage(model, rows=16)
    whole = measure(found, 0, 1e12, 0.0, ticking())
    assert (whole.rows, whole.accumulate) == (16, 1)
    monkeypatch.setattr(planner, "available", lambda: whole.peak_bytes // 2)
    less = measure(found, 0, 1e12, 0.0, ticking())
    assert (
        less.fits and 1 <= less.rows < 16 and less.rows * less.accumulate == 16 and less.peak_bytes <= planner.FULL * whole.peak_bytes / 2
    )
    monkeypatch.setattr(planner, "available", lambda: 1000)
    none = measure(found, 0, 1e12, 0.0, ticking())
    assert not none.fits and none.rows == 1 and none.tokens_per_s is None and none.hours is None


def test_flops_of_a_token():
    batch = {"ids": np.zeros((2, 9), np.int32), "weights": np.ones(18, np.float32)}
    q, kv, ff = 32 * 32, 32 * 16, 32 * 64
    by_hand = 6 * 2 * (2 * q + 2 * kv + 3 * ff) + 6 * 272 * 32 + 2 * 12 * 4 * 8 * 5  # keys seen: 1 … 9, 5 on average
    assert flops_per_token(CONFIG, batch, 18) == by_hand
    packed = {"positions": np.array([[0, 1, 2, 0, 1, 0]]), "segments": np.array([[1, 1, 1, 2, 2, 0]]), "weights": np.zeros(4)}
    assert flops_per_token(CONFIG, packed, 5) == pytest.approx(6 * 2 * (2 * q + 2 * kv + 3 * ff) + 2 * 12 * 4 * 8 * (1 + 2 + 3 + 1 + 2) / 5)


def test_pretraining_is_planned_by_the_dial(monkeypatch):
    monkeypatch.setattr(Probe, "seconds", linear)
    pretrain, sft, _ = stages(Config(depth=2, vocab_size=300, length=32, batch_rows=2, tokens=50_000))
    assert set(pretrain.batch(2)[0]) == {"ids", "targets", "weights"} and pretrain.tokens == pytest.approx(50_000, rel=0.1)
    assert sft.model == pretrain.model and sft.model.n_layers == 2
    plan = measure(pretrain, 0, 1e12, 0.0, ticking())
    assert plan.fits and plan.accumulate == pretrain.accumulate and plan.hours > 0


def test_a_corpus_says_the_vocabulary_and_lets_the_data_be_read(run):
    tokenizer().save(run / "corpus/tokenizer.json")  # 270 ids, padded to 320
    sft = stages(Config(out=run, depth=2, stages=("sft",), **TINY))[0]
    assert sft.model.vocab_size == 320 and sft.tokens < 1e5


def test_adapters_need_less_than_all_weights(run, model):
    (run / "sft.json").write_text(json.dumps({"out": str(run), "lora": 4}))
    whole, adapters = stage(model), stages(Config(out=run, model=model, stages=("sft",), **TINY))[0]
    full, low = (Probe(s, 2).memory(s.batch(2)[0]) for s in (whole, adapters))
    assert low[1] < full[1] / 2 and low[0] < 0.7 * full[0]


def test_known_accelerators_have_their_published_peak(monkeypatch):
    for kind, tflops in (("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", 165), ("TPU v5 lite", 197), ("TPU v5p", 459)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [type("Device", (), {"device_kind": kind})])
        assert planner.peak_flops("bf16", ticking()) == tflops * 1e12


def test_own_peak_is_the_best_product():
    assert planner.peak_flops("fp32", ticking(0.25), 64) == 2 * 64**3 / 0.25


def test_bad_settings_are_one_line(run, model):
    with pytest.raises(UserError, match="depth"):
        stages(Config(stages=("pretrain",)))
    with pytest.raises(UserError, match="--length"):
        stages(Config(length=0))
    with pytest.raises(UserError, match="no model"):
        stages(Config(model="no-such-model"))
    (run / "sft.json").write_text('{"out": "x", "bogus": 1}')
    with pytest.raises(UserError, match="bogus"):
        stages(Config(out=run, model=model))
