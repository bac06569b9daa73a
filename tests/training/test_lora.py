import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import CONFIG, TEMPLATE, decoder, random_examples, same

from model.config import ModelConfig
from model.transformer import Decoder
from soul.errors import UserError
from training import lora, losses
from training.data import Packed
from training.optim import OptimConfig, adamw
from training.programs import Programs, plain_logprobs

CONTROL = sorted(TEMPLATE.id.values())
BATCH = Packed.build(random_examples(0, 6, 32), 32, 4, 0).batch(0)


@pytest.fixture(scope="module")
def base():
    return decoder()


@pytest.fixture(scope="module")
def adapted(base):
    return lora.trained(base, 4, CONTROL, seed=0)


def moved(adapted, scale=0.1):
    """The adapters after a step in some direction."""
    leaves, tree = jax.tree.flatten(adapted.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_it_starts_as_the_base_in_every_bit(base, adapted):
    graph, params = nnx.split(base)
    assert same(adapted.merge(adapted.params), params)
    ours = jax.jit(adapted.logprobs)(adapted.params, adapted.frozen, BATCH)
    assert jnp.array_equal(ours, jax.jit(plain_logprobs(graph))(params, None, BATCH))


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_is_the_adapted_one(tied):
    model = Decoder(ModelConfig(**{**vars(CONFIG), "tied": tied, "qkv_bias": not tied}), nnx.Rngs(0), compute="fp32")
    adapted = lora.trained(model, 4, CONTROL, seed=0)
    params = moved(adapted)
    merged = adapted.merge(params)
    assert not same(merged, nnx.state(model)) and jax.tree.structure(merged) == jax.tree.structure(nnx.state(model))
    ours = adapted.logprobs(params, adapted.frozen, BATCH)
    plain = losses.token_logprobs(nnx.graphdef(model), merged, BATCH)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(ours - losses.token_logprobs(nnx.graphdef(model), nnx.state(model), BATCH))).max() > 0.1


def test_only_adapters_and_control_rows_are_trained(base, adapted):
    params, programs = moved(adapted), Programs(adapted.logprobs, losses.nll)
    _, grads = programs.gradients(params, adapted.frozen, BATCH)
    assert {key for part in grads.values() for key in part} == {"a", "b", "rows"} and len(grads) == 2 * 7 + 1
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, adapted.frozen, adamw(OptimConfig(), 10).init(params))]
    assert sizes[1] == sum(x.size for x in jax.tree.leaves(nnx.state(base)))
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert sizes[0] == 2 * sum(4 * (d + f) for d, f in widths) + len(CONTROL) * 32
    assert 2 * sizes[0] <= sizes[2] < 2 * sizes[0] + 8
    merged = adapted.merge(params)
    changed = np.flatnonzero(np.abs(np.asarray(merged["embed"][...] - base.embed[...])).max(1))
    assert list(changed) == CONTROL and same(merged["final_norm"], base.final_norm)


def test_a_gradient_is_that_of_the_merged_matrix_seen_through_the_adapter(base, adapted):
    """d/dA = scale · (d/dW) Bᵀ, d/dB = scale · Aᵀ (d/dW), and d/drows are the rows of d/dembed."""
    params, graph = moved(adapted), nnx.graphdef(base)
    _, grads = Programs(adapted.logprobs, losses.nll).gradients(params, adapted.frozen, BATCH)
    _, whole = Programs(plain_logprobs(graph), losses.nll).gradients(adapted.merge(params), None, BATCH)
    dw, part, made = whole["layers"][1]["w_down"][...], params["layers_1_w_down"], grads["layers_1_w_down"]
    np.testing.assert_allclose(made["a"], lora.ALPHA / 4 * dw @ part["b"].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made["b"], lora.ALPHA / 4 * part["a"].T @ dw, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads["embed"]["rows"], whole["embed"][...][np.array(CONTROL)], rtol=1e-4, atol=1e-4)


def test_rank_0_trains_everything_and_a_rank_that_is_no_lower_is_refused(base):
    everything = lora.trained(base, 0, CONTROL, seed=0)
    assert everything.frozen is None and same(everything.merge(everything.params), nnx.state(base))
    for rank in (-1, 32):
        with pytest.raises(UserError, match=f"--lora {rank} must be between 1 and 31"):
            lora.trained(base, rank, CONTROL, seed=0)
