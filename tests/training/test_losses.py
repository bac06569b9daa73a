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


BATCH = pair_batch()
POLICY, REFERENCE = (-np.random.default_rng(i).exponential(1.0, len(BATCH["at"])).astype(np.float32) for i in (0, 1))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def closed_form(loss: losses.Preference, policy, reference, batch) -> list[float]:
    """Each pair's loss in float64, as the papers write it."""
    out, policy, beta = [], policy.astype(float), loss.beta
    for p in np.flatnonzero(batch["real"]):
        c, r = batch["branch"] == p, batch["branch"] == p + len(batch["real"])
        ratio = policy - reference
        by_sum, by_mean = ratio[c].sum() - ratio[r].sum(), ratio[c].mean() - ratio[r].mean()
        if loss.kind == "ipo":
            value = (by_mean - 1 / (2 * beta)) ** 2
        elif loss.kind == "apo_zero":
            value = 1 - 1 / (1 + np.exp(-beta * ratio[c].sum())) + 1 / (1 + np.exp(-beta * ratio[r].sum()))
        else:
            simpo = policy[c].mean() - policy[r].mean()
            margin = {"sigmoid": beta * by_sum, "sigmoid_norm": beta * by_mean, "simpo": beta * simpo - loss.gamma}[loss.kind]
            value = -(1 - loss.smoothing) * log_sigmoid(margin) - loss.smoothing * log_sigmoid(-margin)
        out.append(value - loss.alpha * policy[c].mean())
    return out


LOSSES = [
    *(losses.Preference(kind, beta, alpha=alpha) for kind in ("sigmoid", "ipo", "sigmoid_norm", "apo_zero") for beta, alpha in ((0.3, 0.0), (2.0, 0.5))),
    losses.Preference("sigmoid", 0.3, smoothing=0.1, alpha=1.0), losses.Preference("sigmoid_norm", 5.0, smoothing=0.2),
    losses.Preference("simpo", 2.0, gamma=1.0), losses.Preference("simpo", 2.5, smoothing=0.1, gamma=0.3, alpha=0.2),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.beta}-{loss.smoothing}-{loss.alpha}")
def test_every_loss_equals_its_closed_form(loss):
    batch = BATCH | ({"reference": REFERENCE} if loss.needs_reference else {})
    total, (count, sums) = loss(jnp.asarray(POLICY), batch)
    assert float(count) == 5
    assert float(total / count) == pytest.approx(np.mean(closed_form(loss, POLICY, REFERENCE, BATCH)), rel=2e-6)
    chosen = [BATCH["branch"] == p for p in range(5)]
    assert float(sums["chosen_logp"]) == pytest.approx(sum(POLICY[c].sum() for c in chosen), rel=1e-5)
    assert float(sums["chosen_length"]) == sum(c.sum() for c in chosen)
    if loss.needs_reference:
        assert float(sums["chosen_shift"]) == pytest.approx(sum((POLICY - REFERENCE)[c].sum() for c in chosen), rel=1e-4)


def test_a_mean_over_pairs_is_no_mean_of_means():
    """Micro-batches with 4 pairs and 1: sums and counts add up."""
    loss, total, count, each = losses.Preference("ipo", 0.3), 0.0, 0.0, []
    for batch in (pair_batch(4), pair_batch(1)):
        policy = -0.01 * batch["targets"].astype(np.float32)
        more, (pairs, _) = loss(jnp.asarray(policy), batch | {"reference": REFERENCE[: len(policy)]})
        total, count = total + float(more), count + float(pairs)
        each += closed_form(loss, policy, REFERENCE[: len(policy)], batch)
    assert count == 5 and total / count == pytest.approx(np.mean(each), rel=1e-5)
    assert abs((np.mean(each[:4]) + each[4]) / 2 - np.mean(each)) > 1e-3


@pytest.mark.parametrize("loss", LOSSES[::3], ids=lambda loss: loss.kind)
def test_empty_slots_and_padding_count_nothing(loss):
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(5)], 64, 1, 0)
    block = next(block for n in range(len(packed.blocks)) if (block := packed.block(n))["real"].min() == 0)
    dirty = np.where(block["branch"] < 2 * packed.pairs, POLICY, 1e4).astype(np.float32)
    total, (count, _) = loss(jnp.asarray(dirty), block | {"reference": REFERENCE})
    assert float(count) == block["real"].sum() < packed.pairs
    assert float(total) == pytest.approx(sum(closed_form(loss, POLICY, REFERENCE, block)), rel=2e-6)


def test_a_tie_counts_one_half():
    batch = pair_batch(4)
    reference = np.zeros(len(batch["at"]), np.float32)
    policy = np.zeros_like(reference)
    policy[np.flatnonzero(batch["branch"] == 0)[0]] = 1.0  # pair 0 right
    policy[np.flatnonzero(batch["branch"] == 1)[0]] = -1.0  # pair 1 wrong, pairs 2 and 3 tie
    _, (count, sums) = losses.Preference()(jnp.asarray(policy), batch | {"reference": reference})
    assert float(sums["accuracy"] / count) == 0.5
    _, (count, sums) = losses.Preference()(jnp.zeros_like(policy), batch | {"reference": reference})
    assert float(sums["accuracy"]) == 2.0


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.needs_reference], ids=str)
def test_equal_weights_give_the_known_loss_in_every_bit(split, loss):
    graph, params = split
    programs, batch = Programs(plain_logprobs(graph), loss, fused=False), pair_batch(9)
    reference, _ = programs.forward(params, None, batch)
    again, _ = programs.forward(params, None, batch)
    won, lost = loss.scores(again, batch | {"reference": reference})
    assert (np.asarray(won) == 0).all() and (np.asarray(lost) == 0).all()
    assert (np.asarray(loss.per_pair(won, lost)) == loss.at_zero()).all()
    known = {"ipo": 1 / (4 * loss.beta**2), "apo_zero": 1.0}.get(loss.kind, np.log(2))
    assert loss.at_zero() == pytest.approx(known, rel=1e-6) and loss.at_zero().dtype == np.float32


def test_large_margins_stay_finite():
    won = jnp.asarray([-1e4, 1e4, 0.0], jnp.float32)
    for loss in LOSSES:
        value, slopes = jax.value_and_grad(lambda w, l, of=loss.per_pair: of(w, l).sum(), (0, 1))(won, -won)
        assert np.isfinite(value) and np.isfinite(slopes).all()
