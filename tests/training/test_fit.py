import json
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import decoder, random_examples, same

from training import losses
from training.data import Packed
from training.fit import Eval, Loop, TrainState, fit, read_evals, read_metrics
from training.optim import OptimConfig, adamw, decayed, schedule
from training.programs import Programs, plain_logprobs

STEPS = 6


class Clock:
    """Ten seconds pass between any two looks."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 10.0
        return self.now


@pytest.fixture(scope="module")
def trained():
    return Trained()


class Trained:
    """One compiled tiny model; `run` trains fresh parameters from `start`."""

    def __init__(self):
        self.graph, _ = nnx.split(decoder())
        self.programs = Programs(plain_logprobs(self.graph), losses.nll)
        self.packed = Packed.build(random_examples(0, 30, 32), 32, 2, 5)
        self.optimizer = adamw(OptimConfig(lr=1e-2), STEPS)

    def fresh(self):
        params = nnx.split(decoder())[1]
        return TrainState(params, self.optimizer.init(params))

    def run(self, tmp_path, state=None, start=0, batches=None, **limits):
        saved = {}
        loop = Loop(STEPS, lambda step, state: saved.update({step: copy(state)}), tmp_path / "metrics.jsonl", 2, clock=Clock(), **limits)
        state, step = fit(self.programs, self.optimizer, state or self.fresh(), batches or self.packed.batch, loop, start=start)
        return state, step, saved


def copy(state):
    return jax.tree.map(lambda x: x.copy(), state)  # the loop donates its state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_has_the_bits_of_an_uninterrupted_one(trained, tmp_path, number):
    whole, _, _ = trained.run(tmp_path / "a")

    def stop_at_step_2(k):
        if k == 4:
            signal.raise_signal(number)
        return trained.packed.batch(k)

    before = signal.getsignal(number)
    _, step, saved = trained.run(tmp_path / "b", batches=stop_at_step_2)
    assert step == 3 and list(saved) == [3] and signal.getsignal(number) == before
    resumed, step, _ = trained.run(tmp_path / "b", state=saved[3], start=3)
    assert step == STEPS and same(resumed, whole)
    lines = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl")]


def test_a_crash_loses_only_steps_after_the_last_checkpoint(trained, tmp_path):
    class PowerCut(Exception):
        pass

    def cut_at_step_4(k):
        if k == 8:
            raise PowerCut
        return trained.packed.batch(k)

    saved = {}
    loop = Loop(STEPS, lambda step, state: saved.update({step: copy(state)}), tmp_path / "metrics.jsonl", 2, 0.5, clock=Clock())
    with pytest.raises(PowerCut):
        fit(trained.programs, trained.optimizer, trained.fresh(), cut_at_step_4, loop)
    last = max(saved)
    assert 0 < last <= 4
    resumed, _, _ = trained.run(tmp_path, state=saved[last], start=last)
    assert same(resumed, trained.run(tmp_path / "whole")[0])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(STEPS))


def test_checkpoints_come_by_the_clock(trained, tmp_path):
    _, _, often = trained.run(tmp_path / "a", checkpoint_minutes=0.0)
    _, _, never = trained.run(tmp_path / "b", checkpoint_minutes=1e9)
    assert list(often) == list(range(1, STEPS)) and never == {}  # the end is saved by the caller


def test_lines_of_steps_that_are_done_again_are_replaced(trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": -1.0}) + "\n" for n in range(5)))
    trained.run(tmp_path, start=3)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS)) and [line["loss"] == -1.0 for line in lines] == [True] * 3 + [False] * 3


def test_metrics_say_what_happened(trained, tmp_path):
    trained.run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    batches = [trained.packed.batch(0), trained.packed.batch(1)]
    assert lines[0]["tokens"] == sum(int((b["segments"] > 0).sum()) for b in batches)
    assert lines[0]["supervised"] == sum(int(b["weights"].sum()) for b in batches)
    assert lines[0]["tokens_per_s"] > 0 and lines[0]["grad_norm"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    (_, (count, _)), grads = trained.programs.accumulated(trained.fresh().params, None, batches)
    mean_norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads))) / float(count)
    assert lines[0]["grad_norm"] == pytest.approx(mean_norm, rel=1e-5)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + '\n{"step": 1, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]


def test_a_loss_that_is_not_a_number_stops_the_run(trained, tmp_path):
    state = trained.fresh()
    broken = TrainState(jax.tree.map(lambda x: x * np.float32(np.nan), state.params), state.opt_state)
    with pytest.raises(FloatingPointError, match="step 0"):
        trained.run(tmp_path, state=broken)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 200])
def test_the_schedule_rises_then_falls_and_never_wastes_a_step(steps):
    rate = schedule(OptimConfig(lr=1.0, warmup=0.1), steps)
    rates = [float(rate(i)) for i in range(steps)]
    assert min(rates) > 0 and max(rates) == 1.0
    top = rates.index(1.0)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert steps == 1 or float(rate(steps)) == pytest.approx(0.0, abs=1e-7)


def test_weight_decay_leaves_norms_and_embeddings_alone(trained):
    params = nnx.split(decoder())[1]
    mask = nnx.to_pure_dict(decayed(params))
    assert not mask["embed"] and not mask["final_norm"] and not mask["layers"][0]["attn_norm"]
    assert mask["layers"][0]["wq"] and mask["layers"][1]["w_down"]


def test_evals_run_on_the_way_and_at_the_end_and_a_resumed_run_does_not_repeat_them(trained, tmp_path):
    evals = (Eval(lambda step, _: {"twice": 2.0 * step}, every=2), Eval(lambda step, _: {"last": float(step)}))

    def run(**more):
        saved = {}
        loop = Loop(STEPS, lambda step, state: saved.update({step: copy(state)}), tmp_path / "metrics.jsonl", 2, 1e9, 4, evals=evals,
                    clock=Clock())  # fmt: skip
        fit(trained.programs, trained.optimizer, batches=trained.packed.batch, loop=loop, **more)
        return saved

    saved = run(state=trained.fresh())
    want = [(2, {"twice": 4.0}), (4, {"twice": 8.0}), (6, {"twice": 12.0}), (6, {"last": 6.0})]
    assert [(line["step"], line["eval"]) for line in read_evals(tmp_path / "metrics.jsonl")] == want
    assert list(saved) == [4] and len(read_metrics(tmp_path / "metrics.jsonl")) == STEPS
    run(state=saved[4], start=4)
    assert [(line["step"], line["eval"]) for line in read_evals(tmp_path / "metrics.jsonl")] == want


def test_the_fused_program_and_its_parts_agree(trained):
    parts = Programs(plain_logprobs(trained.graph), losses.nll, fused=False)
    params, batch = trained.fresh().params, trained.packed.batch(0)
    (one, _), whole = trained.programs.gradients(params, None, batch)
    (two, _), split = parts.gradients(params, None, batch)
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
