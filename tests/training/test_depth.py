import math

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.transformer import param_table
from soul.errors import UserError
from training import losses
from training.data import as_batch
from training.depth import dial, fresh, parameters, scaling_params, shape


def test_the_shape_follows_from_the_depth():
    known = {d: shape(d, 32768, 512) for d in (1, 4, 6, 12, 20)}
    assert {d: (c.d_model, c.n_heads, c.d_head, c.d_ff) for d, c in known.items()} == {
        1: (128, 1, 128, 320), 4: (256, 2, 128, 704), 6: (384, 3, 128, 1024), 12: (768, 6, 128, 2048), 20: (1280, 10, 128, 3392)}  # fmt: skip
    assert all(ModelConfig.from_hf(c.to_hf()) == c and c.to_hf()["architectures"] == ["Qwen3ForCausalLM"] for c in known.values())
    assert shape(4, 8191, 512).vocab_size == 8192 and shape(4, 8193, 512).vocab_size == 8256
    assert shape(4, 8192, 512, kv_heads=1).n_kv_heads == 1
    with pytest.raises(UserError, match="cannot share 3"):
        shape(4, 8192, 512, kv_heads=3)


def test_a_horizon_counts_the_parameters_that_multiply():
    config = shape(4, 8192, 512, kv_heads=2, d_head=64)
    d, f = 256, 704
    blocks = 4 * (2 * d * d + 2 * d * 128 + 3 * d * f)
    assert scaling_params(config) == blocks + 8192 * d
    assert (
        parameters(config) == sum(math.prod(spec.shape) for spec in param_table(config)) == blocks + 2 * 8192 * d + 4 * (2 * d + 2 * 64) + d
    )
    tied = shape(4, 8192, 512, tied=True, d_head=64)
    assert scaling_params(tied) == 4 * (4 * d * d + 3 * d * f) + 8192 * d == parameters(tied) - 4 * (2 * d + 2 * 64) - d


def test_the_laws_give_the_reference_back_at_its_depth_and_scale_from_there():
    """nanochat's at depth 12: 2^19 tokens a step, rates .02, .3 and .008."""
    at = dial(12, 32768, length=2048, batch_rows=32)
    assert at.batch_tokens == 2**19 and (at.batch_rows, at.accumulate) == (32, 8)
    assert (at.rates.matrix, at.rates.embed, at.rates.head) == pytest.approx((0.02, 0.3, 0.008))
    assert at.rates.decay == pytest.approx(0.28, rel=1e-3) and at.tokens == pytest.approx(8 * scaling_params(at.model), rel=1e-3)
    assert dial(12, 32768, length=2048, batch_rows=32, tokens=64 * at.tokens).batch_tokens == 2**21
    deep = dial(20, 32768, length=2048, batch_rows=32)
    assert deep.batch_tokens == 2**20 and deep.rates.matrix == pytest.approx(0.02 * 2**0.5)
    assert deep.rates.embed == pytest.approx(0.3 * 2**0.5 * (768 / 1280) ** 0.5)
    assert deep.rates.decay == pytest.approx(0.28 * 2**0.5 * at.tokens / deep.tokens, rel=1e-3)


@pytest.mark.parametrize("tokens, batch, steps", [(1e5, 2048, 49), (6e6, 8192, 732), (1e8, 2**17, 763)])
def test_a_short_horizon_keeps_enough_steps(tokens, batch, steps):
    plan = dial(4, 8192, tokens=tokens)
    assert (plan.batch_tokens, plan.steps, plan.rates.matrix) == (batch, steps, 0.02) and plan.rates.decay <= 0.28


def test_what_is_asked_for_is_given():
    assert dial(4, 8192, steps=7).steps == 7
    plan = dial(4, 8192, batch_tokens=3 * 4096, batch_rows=8)
    assert (plan.batch_tokens, plan.batch_rows, plan.accumulate) == (12288, 8, 3)
    assert dial(4, 8192, batch_tokens=1024).batch_rows == 2
    assert dial(4, 8192, ratio=4).tokens == pytest.approx(dial(4, 8192).tokens / 2, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_starts_at_ln_v_and_by_the_seed(tied):
    config = shape(2, 512, 32, tied=tied)
    model = fresh(config, 3, "fp32")
    rows = np.random.default_rng(0).integers(0, 512, (4, 33))
    graph, params = nnx.split(model)
    logp_n = jax.jit(lambda params, batch: losses.token_logprobs(graph, params, batch))(params, as_batch(rows, 4))
    assert -float(logp_n.mean()) == pytest.approx(math.log(512), abs=0.08)
    known = {spec.path[-1]: leaf for spec, leaf in zip(param_table(config), leaves(config, model))}
    assert not np.any(known["wo"]) and not np.any(known["w_down"]) and np.all(np.asarray(known["final_norm"]) == 1)
    assert np.std(known["wq"]) == pytest.approx(128**-0.5, rel=0.02) and np.std(known["embed"]) == pytest.approx(
        0.02 if tied else 0.8, rel=0.02
    )
    same, other = fresh(config, 3, "fp32"), fresh(config, 4, "fp32")
    assert np.array_equal(model.layers[1].wq[...], same.layers[1].wq[...])
    assert not np.array_equal(model.layers[1].wq[...], other.layers[1].wq[...])
    assert (
        len({leaf.tobytes() for leaf in map(np.asarray, (model.layers[0].wq[...], model.layers[1].wq[...], model.layers[0].wk[...]))}) == 3
    )


def leaves(config, model):
    """Parameters in the order of the table."""
    for spec in param_table(config):
        node = model.layers[spec.path[1]] if spec.path[0] == "layers" else model
        yield jax.device_get(getattr(node, spec.path[-1])[...])
