"""Muon against a plain NumPy float64 reference that is written from the papers, with matrices as they store them: (out, in)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_model import decoder

from training.muon import MuonState, Rates, kinds, muon, muon_adamw, orthogonal

SHAPES = {"tall": (24, 8), "wide": (8, 20), "square": (12, 12)}  # ours: (in, out)
COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


class Reference:
    """One matrix W (out, in), one step at a time."""

    def __init__(self, w_oi, beta2=0.9):
        self.w, self.buffer, self.second, self.beta2 = w_oi, np.zeros_like(w_oi), 0.0, beta2

    def step(self, g, rate, m, decay):
        out, into = self.w.shape
        self.buffer = m * self.buffer + (1 - m) * g
        x = m * self.buffer + (1 - m) * g
        rows = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.maximum(rows, 1e-12) * np.linalg.norm(x) / np.sqrt(out)
        x = x / (1.01 * np.linalg.norm(x) + 1e-12)
        for a, b, c in COEFFICIENTS:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        x = x * np.sqrt(min(out, into)) / max(np.linalg.norm(x), 1e-12)
        squares = (x**2).mean(axis=1 if out >= into else 0, keepdims=True)
        self.second = self.beta2 * self.second + (1 - self.beta2) * squares
        adapted = x / np.sqrt(np.maximum(self.second, 1e-10))
        x = adapted * np.linalg.norm(x) / max(np.linalg.norm(adapted), 1e-12)
        self.w = self.w - rate * np.sqrt(max(1, out / into)) * (x + decay * self.w * (x * self.w >= 0))


def matrices(seed, copies=1):
    rng = np.random.default_rng(seed)
    return {f"{name}{i}": rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items() for i in range(copies)}


def constant(value):
    return lambda step: jnp.float32(value)


RATE, MOMENTUM, DECAY = constant(0.1), constant(0.9), constant(0.3)


def run(params, gradients, rate=RATE, momentum=MOMENTUM, decay=DECAY):
    transform = muon(rate, momentum, decay)
    params, state = jax.tree.map(jnp.asarray, params), transform.init(params)
    for grads in gradients:
        updates, state = jax.jit(transform.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_four_steps_agree_with_the_reference():
    params, gradients = matrices(0, 2), [matrices(seed, 2) for seed in range(1, 5)]

    def moves(step):  # every schedule moves
        return jnp.asarray(step, jnp.float32)

    got, state = run(params, gradients, lambda s: 0.1 / (1 + moves(s)), lambda s: 0.8 + 0.03 * moves(s), lambda s: 0.5 - 0.1 * moves(s))
    assert state.count == 4
    for name, w in params.items():
        reference = Reference(w.T.astype(np.float64))
        for step, grads in enumerate(gradients):
            reference.step(grads[name].T.astype(np.float64), 0.1 / (1 + step), 0.8 + 0.03 * step, 0.5 - 0.1 * step)
        assert np.abs(reference.w - w.T).max() > 0.05
        np.testing.assert_allclose(got[name].T, reference.w, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("compute, band", [("fp32", (0.85, 1.15)), ("bf16", (0.8, 1.2))])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_singular_values_come_to_one_whatever_the_scale_of_the_gradient(shape, compute, band):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((shape[0], 64)))
    right, _ = np.linalg.qr(rng.standard_normal((shape[1], 64)))
    g = (left * np.geomspace(1, 1e-2, 64)) @ right.T  # condition number 100
    for scale in (1.0, 1e-6):
        x = np.asarray(jax.jit(orthogonal, static_argnums=1)(jnp.asarray(scale * g[None], jnp.float32), compute))[0]
        values = np.linalg.svd(x, compute_uv=False)
        assert band[0] < values.min() and values.max() < band[1]


def test_a_zero_gradient_moves_nothing_but_the_decay():
    params = matrices(0)
    got, state = run(params, [jax.tree.map(np.zeros_like, params)] * 2, decay=constant(0.0))
    assert all(np.array_equal(got[name], params[name]) for name in params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_step_does_not_depend_on_the_scale_of_the_loss():
    params, grads = matrices(0), matrices(1)
    one, _ = run(params, [grads])
    small, _ = run(params, [jax.tree.map(lambda g: g * np.float32(1e-7), grads)])
    for name in params:
        np.testing.assert_allclose(one[name], small[name], atol=1e-5)


def test_weight_decay_only_pulls_where_the_step_pulls_too():
    params, grads = matrices(0), matrices(1)
    still, decayed = (run(params, [grads], decay=constant(d))[0] for d in (0.0, 0.5))
    for name, w in params.items():
        along = (w - still[name]) * w >= 0
        pulled = np.asarray(still[name] - decayed[name])
        assert np.all(pulled[~along] == 0) and 0.2 < along.mean() < 0.8
        scale = 0.1 * np.sqrt(max(1, w.shape[1] / w.shape[0]))
        np.testing.assert_allclose(pulled[along], 0.5 * scale * w[along], atol=1e-6)


def test_a_matrix_moves_the_same_alone_and_stacked_in_any_order():
    params, grads = matrices(0, 3), matrices(1, 3)
    whole, _ = run(params, [grads])
    for name in ("tall0", "wide1", "square2"):
        alone, _ = run({name: params[name]}, [{name: grads[name]}])
        np.testing.assert_allclose(alone[name], whole[name], atol=1e-6)
    backwards = dict(reversed(params.items()))
    renamed = {f"{99 - n:02d}{name}": name for n, name in enumerate(backwards)}
    other, _ = run({new: params[old] for new, old in renamed.items()}, [{new: grads[old] for new, old in renamed.items()}])
    for new, old in renamed.items():
        np.testing.assert_allclose(other[new], whole[old], atol=1e-6)


def test_the_second_moment_keeps_one_number_along_the_longer_axis():
    state = muon(*[constant(0.1)] * 3).init(matrices(0))
    assert isinstance(state, MuonState)
    assert {name: v.shape for name, v in state.second.items()} == {"tall0": (24, 1), "wide0": (1, 20), "square0": (1, 12)}


def test_every_parameter_falls_under_its_rule():
    params = nnx.split(decoder())[1]
    kind = nnx.to_pure_dict(kinds(params))
    found = kind["embed"], kind["final_norm"], kind["layers"][1]["attn_norm"], kind["layers"][0]["wq"]
    assert found == ("embed", "gain", "gain", "matrix")
    optimizer = muon_adamw(Rates(0.02, 0.3, 0.008, 0.01, decay=0.1), 20)
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam takes a float to the power of its int32 count
        updates, _ = jax.jit(optimizer.update)(grads, state, params)
    moved = nnx.to_pure_dict(updates)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))
    for name, rate in (("embed", 0.3), ("final_norm", 0.01)):  # Adam's first step is the rate, half of it in a warm-up of two steps
        assert np.abs(moved[name]).max() == pytest.approx(rate / 2, rel=0.01)


@pytest.mark.parametrize("steps", [1, 3, 20, 400, 3000])
def test_rates_rise_stay_and_fall_to_their_last_share(steps):
    rates = Rates(1.0, 1.0, 1.0, 1.0)
    curve = np.array([float(rates.curve(steps)(n)) for n in range(steps)])
    assert curve.min() > 0 and curve.max() <= 1 and np.all(np.diff(np.sign(np.diff(curve).round(9))) <= 0)
    if steps >= 20:
        assert curve.max() == 1 and curve[-1] == pytest.approx(0.05 + 0.95 / (0.65 * steps), abs=1e-5)
        assert curve[0] == pytest.approx(1 / min(40, steps // 10), abs=1e-6)
    momentum = np.array([float(rates.momentum(steps)(n)) for n in range(steps)])
    assert momentum[0] == pytest.approx(0.85, abs=0.08) and momentum.max() <= 0.97 + 1e-6 and momentum.min() >= 0.85 - 1e-6
    if steps == 3000:
        assert momentum.max() == pytest.approx(0.97) and momentum[-1] == pytest.approx(0.90, abs=1e-4)
