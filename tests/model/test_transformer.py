import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import ops
from model.config import ModelConfig
from model.transformer import Decoder, param_table
from soul.errors import UserError

TINY = ModelConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=48, rope_theta=1e4, max_len=256)


def decoder(seed=0, **changes):
    """A tiny decoder whose weights are large enough for attention to matter and whose gains and biases are not at their start."""
    model = Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(seed), compute="fp32")
    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return nnx.merge(
        graph,
        jax.tree.unflatten(
            tree, [x * 8 if x.ndim > 1 else x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        ),
    )


@nnx.jit
def hidden(model, ids):
    return model.hidden(ids)


@nnx.jit
def logits(model, ids):
    return model.logits(model.hidden(ids))


def tokens(*shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True, "tied": False, "d_head": 16}])
def test_the_past_does_not_see_the_future(changes):
    model, ids = decoder(**changes), tokens(2, 12)
    changed = ids.at[:, 7].set((ids[:, 7] + 1) % TINY.vocab_size)
    a, b = hidden(model, ids), hidden(model, changed)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max(axis=-1).min() > 1e-3


def test_packed_rows_give_the_loss_and_gradients_of_separate_rows():
    first, second = tokens(1, 9, seed=2), tokens(1, 6, seed=3)
    packed, segments = jnp.concatenate([first, second], axis=1), jnp.asarray([[1] * 9 + [2] * 6])
    graph, params = nnx.split(decoder())

    def loss(params, *rows):
        model, total = nnx.merge(graph, params), jnp.zeros(())
        for ids, segments in rows:
            x = model.hidden(ids, segments_bt=segments)
            keep = jnp.ones(ids.shape) if segments is None else (segments == jnp.roll(segments, -1, axis=1)).astype(jnp.float32)
            keep = keep.at[:, -1].set(0)
            logp = ops.token_logprobs(x[0], model.head_vd(), jnp.roll(ids[0], -1), "fp32")
            total = total - (logp * keep[0]).sum()
        return total

    one, two = (jax.jit(jax.value_and_grad(loss))(params, *rows) for rows in (((packed, segments),), ((first, None), (second, None))))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-4)


def test_positions_restart_with_each_segment():
    model, ids, segments = decoder(), tokens(1, 8), jnp.asarray([[4] * 5 + [2] * 3])
    given = nnx.jit(lambda m, *a: m.hidden(*a))
    np.testing.assert_array_equal(given(model, ids, None, segments), given(model, ids, jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2]]), segments))


def test_grouped_heads_equal_repeated_kv_heads():
    few = decoder()
    many = Decoder(dataclasses.replace(TINY, n_kv_heads=4), compute="fp32")
    params = nnx.state(few)
    target = nnx.to_pure_dict(nnx.split(many)[1])
    for path, value in nnx.to_flat_state(params):
        value = value[...]
        if path[-1] in ("wk", "wv"):
            value = jnp.repeat(value.reshape(32, 2, 8), 2, axis=1).reshape(32, 32)
        node = target
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
    abstract = nnx.split(many)[1]
    nnx.replace_by_pure_dict(abstract, target)
    nnx.update(many, abstract)
    ids = tokens(2, 10)
    np.testing.assert_allclose(hidden(few, ids), hidden(many, ids), atol=1e-5)


def test_the_table_is_the_model():
    for changes in ({}, {"qkv_bias": True}, {"qk_norm": True, "tied": False}):
        config = dataclasses.replace(TINY, **changes)
        flat = {path: value.shape for path, value in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda c=config: Decoder(c))))}
        table = param_table(config)
        assert flat == {spec.path: spec.shape for spec in table}
        assert len({spec.hf for spec in table}) == len(table)
        assert all(len(spec.axes) == len(spec.shape) for spec in table)


def test_init_depends_on_the_seed_and_weights_take_the_asked_dtype():
    a, b, c = Decoder(TINY), Decoder(TINY, rngs=nnx.Rngs(0)), Decoder(TINY, rngs=nnx.Rngs(1), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(a.embed[...], b.embed[...])
    assert c.embed[...].dtype == jnp.bfloat16 and not np.allclose(a.embed[...], c.embed[...].astype(jnp.float32))
    assert logits(a, tokens(1, 3)).shape == (1, 3, 128)


def test_bf16_products_stay_near_fp32():
    exact, ids = decoder(), tokens(2, 20)
    params = nnx.state(exact)
    fast = Decoder(TINY, compute="bf16")
    nnx.update(fast, params)
    gap = np.abs(logits(exact, ids) - logits(fast, ids)).max()
    assert 0 < gap < 0.05 * np.abs(logits(exact, ids)).max()


SMOL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_bias": False,
}


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, {}),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096}, {"qkv_bias": True}),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}, {"qk_norm": True, "d_head": 128}),
    ],
)
def test_config_from_and_to_hugging_face(changes, wanted):
    config = ModelConfig.from_hf({**SMOL, **changes})
    assert config == dataclasses.replace(ModelConfig(), **wanted)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"]},
        {"architectures": None},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"partial_rotary_factor": 0.5},
        {"num_key_value_heads": 2},
        {"hidden_size": None},
    ],
)
def test_a_config_that_would_not_be_exact_is_refused(changes):
    with pytest.raises(UserError):
        ModelConfig.from_hf({k: v for k, v in {**SMOL, **changes}.items() if (k, v) != ("hidden_size", None)})


def test_a_combination_without_an_architecture_is_not_exported():
    with pytest.raises(UserError, match="both"):
        ModelConfig(qkv_bias=True, qk_norm=True).to_hf()
