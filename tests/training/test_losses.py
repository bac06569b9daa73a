import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import TEMPLATE, decoder, preference_rows, random_examples

from training import losses
from training.data import Packed, pair
from training.programs import Programs, plain_logprobs


@pytest.fixture(scope="module")
def split():
    return nnx.split(decoder())


def mean_and_grads(value, grads):
    total, (count, _) = value
    return float(total / count), jax.tree.map(lambda g: np.asarray(g / count), grads)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


def test_packed_equals_unpacked(split):
    graph, params = split
    programs = Programs(plain_logprobs(graph), losses.nll)
    examples = random_examples(1, 12, 32)
    packed = Packed.build(examples, 64, 16, 0)
    alone = [Packed.build([e], 64, 1, 0) for e in examples]
    assert packed.rows < len(examples)
    loss, grads = mean_and_grads(*programs.gradients(params, None, packed.batch(0)))
    alone_loss, alone_grads = mean_and_grads(*programs.accumulated(params, None, [p.batch(0) for p in alone]))
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    assert_close(grads, alone_grads)


def test_accumulation_equals_the_big_batch(split):
    """Micro-batches with very different numbers of trained tokens: a mean of means would be far off."""
    graph, params = split
    programs = Programs(plain_logprobs(graph), losses.nll)
    short, long = random_examples(2, 2, 8), random_examples(3, 2, 60)
    big = Packed.build(short + long, 64, 4, 0).batch(0)
    micro = [Packed.build(part, 64, 4, 0).batch(0) for part in (short, long)]
    loss, grads = mean_and_grads(*programs.gradients(params, None, big))
    parts_loss, parts_grads = mean_and_grads(*programs.accumulated(params, None, micro))
    assert loss == pytest.approx(parts_loss, rel=1e-6)
    assert_close(grads, parts_grads)
    means = [float(v[0] / v[1][0]) for v, _ in (programs.gradients(params, None, m) for m in micro)]
    assert abs(np.mean(means) - loss) > 1e-4


def pair_batch(n=5):
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(n)], 64, 8, 0)
    return packed.batch(0)


def numpy_dpo(policy, reference, batch, beta, smoothing, alpha):
    out = []
    for p in np.flatnonzero(batch["real"]):
        chosen, rejected = batch["branch"] == p, batch["branch"] == p + len(batch["real"])
        m = beta * ((policy - reference)[chosen].sum() - (policy - reference)[rejected].sum())
        out.append(-(1 - smoothing) * -np.log1p(np.exp(-m)) - smoothing * -np.log1p(np.exp(m)) - alpha * policy[chosen].mean())
    return np.mean(out)


@pytest.mark.parametrize(("smoothing", "alpha"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.2, 1.0)])
def test_dpo_equals_numpy(smoothing, alpha):
    batch, rng = pair_batch(), np.random.default_rng(0)
    policy, reference = (-rng.exponential(1.0, len(batch["at"])).astype(np.float32) for _ in range(2))
    total, (count, sums) = losses.dpo(0.3, smoothing, alpha)(jnp.asarray(policy), batch | {"reference": reference})
    assert float(count) == 5
    assert float(total / count) == pytest.approx(
        numpy_dpo(policy.astype(float), reference.astype(float), batch, 0.3, smoothing, alpha), rel=1e-5
    )
    chosen = [policy[batch["branch"] == p].sum() for p in range(5)]
    assert float(sums["chosen_logp"] / count) == pytest.approx(np.mean(chosen), rel=1e-5)
    assert float(sums["chosen_length"]) == sum((batch["branch"] == p).sum() for p in range(5))


def test_a_tie_counts_one_half():
    batch = pair_batch(4)
    reference = np.zeros(len(batch["at"]), np.float32)
    policy = np.zeros_like(reference)
    policy[np.flatnonzero(batch["branch"] == 0)[0]] = 1.0  # pair 0 right
    policy[np.flatnonzero(batch["branch"] == 1)[0]] = -1.0  # pair 1 wrong, pairs 2 and 3 tie
    _, (count, sums) = losses.dpo(0.1)(jnp.asarray(policy), batch | {"reference": reference})
    assert float(sums["accuracy"] / count) == 0.5
    _, (count, sums) = losses.dpo(0.1)(jnp.zeros_like(policy), batch | {"reference": reference})
    assert float(sums["accuracy"]) == 2.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37])
def test_equal_weights_give_exactly_ln_2(split, smoothing):
    graph, params = split
    programs, batch = Programs(plain_logprobs(graph), losses.dpo(0.1, smoothing), fused=False), pair_batch(9)
    reference, _ = programs.forward(params, None, batch)
    again, _ = programs.forward(params, None, batch)
    margin = losses.margins(again, batch | {"reference": reference}, 0.1)
    assert (np.asarray(margin) == 0).all()
    assert (np.asarray(losses.sigmoid(margin, smoothing)) == np.float32(np.log(2))).all()


def test_large_margins_stay_finite():
    margin = jnp.asarray([-1e4, 1e4], jnp.float32)
    value, slope = jax.value_and_grad(lambda m: losses.sigmoid(m, 0.1).sum())(margin)
    assert np.isfinite(value) and np.isfinite(slope).all()
