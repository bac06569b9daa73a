"""The decoder of the Llama/Qwen family as flax.nnx modules, from one table of parameters.

Shape suffixes: B batch, T query time, S key time, D model width, F mlp width, H query heads, K kv heads, h head width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal, ones, zeros

from model import ops
from model.attention import attention, segment_starts
from model.config import ModelConfig


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: where it lives in Decoder, its shape, its start, and its name and orientation in a Hugging Face checkpoint."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    init: Initializer
    hf: str
    transpose: bool  # Hugging Face stores linear weights (out, in); ours are (in, out)
    axes: tuple[str, ...]  # logical axes, for sharding rules


def param_table(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The single source for init, import, export and sharding."""
    c, rows = config, []
    d, q, kv = c.d_model, c.n_heads * c.d_head, c.n_kv_heads * c.d_head

    def add(path, shape, axes, hf, init, transpose=False):
        rows.append(ParamSpec(path, shape, init, hf + (".bias" if path[-1][0] == "b" else ".weight"), transpose, axes))

    add(("embed",), (c.vocab_size, d), ("vocab", "embed"), "model.embed_tokens", normal(0.02))
    for i in range(c.n_layers):
        layer, hf = ("layers", i), f"model.layers.{i}."
        into, out = normal(0.02), normal(0.02 / (2 * c.n_layers) ** 0.5)  # residual branches add up 2L times (GPT-2)
        add((*layer, "attn_norm"), (d,), ("embed",), hf + "input_layernorm", ones)
        for name, width, axis in (("q", q, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
            add((*layer, "w" + name), (d, width), ("embed", axis), hf + f"self_attn.{name}_proj", into, True)
            if c.qkv_bias:
                add((*layer, "b" + name), (width,), (axis,), hf + f"self_attn.{name}_proj", zeros)
        if c.qk_norm:
            add((*layer, "q_norm"), (c.d_head,), ("head",), hf + "self_attn.q_norm", ones)
            add((*layer, "k_norm"), (c.d_head,), ("head",), hf + "self_attn.k_norm", ones)
        add((*layer, "wo"), (q, d), ("heads", "embed"), hf + "self_attn.o_proj", out, True)
        add((*layer, "mlp_norm"), (d,), ("embed",), hf + "post_attention_layernorm", ones)
        add((*layer, "w_gate"), (d, c.d_ff), ("embed", "mlp"), hf + "mlp.gate_proj", into, True)
        add((*layer, "w_up"), (d, c.d_ff), ("embed", "mlp"), hf + "mlp.up_proj", into, True)
        add((*layer, "w_down"), (c.d_ff, d), ("mlp", "embed"), hf + "mlp.down_proj", out, True)
    add(("final_norm",), (d,), ("embed",), "model.norm", ones)
    if not c.tied:
        add(("head",), (c.vocab_size, d), ("vocab", "embed"), "lm_head", normal(0.02))
    return tuple(rows)


class Layer(nnx.Module):
    """Holds one block's parameters; Decoder fills it from the table."""


class Decoder(nnx.Module):
    """Causal decoder. `dtype` is how weights are stored, `compute` ("auto", "fp32", "bf16") how products are taken.

    `nnx.split`/`nnx.merge` give the functional form for training; `nnx.eval_shape(lambda: Decoder(config))` an abstract one.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None = None, dtype=jnp.float32, compute: str = "auto"):
        self.config, self.compute = config, ops.resolve_compute(compute)
        self.layers = nnx.List([Layer() for _ in range(config.n_layers)])
        key = (rngs or nnx.Rngs(0)).params()
        for n, spec in enumerate(param_table(config)):
            node = self.layers[spec.path[1]] if spec.path[0] == "layers" else self
            setattr(node, spec.path[-1], nnx.Param(spec.init(jax.random.fold_in(key, n), spec.shape, dtype)))

    def hidden(self, ids_bt, positions_bt=None, segments_bt=None, attend: Callable | None = None, x_btd=None) -> jax.Array:
        """Final-norm hidden states x_btd. Attention is causal and stays within equal `segments_bt` (None: one segment).

        Positions default to the offset within the segment. `attend(layer_index, q_bthk, k_bskh, v_bskh)` replaces the attention
        (the sampler passes one that reads and writes its cache), `x_btd` the lookup of the embeddings.
        """
        c = self.config
        if positions_bt is None:
            positions_bt = jnp.arange(ids_bt.shape[1], dtype=jnp.int32)[None] - segment_starts(ids_bt.shape, segments_bt)
        if attend is None:

            def attend(_, q, k, v):
                return attention(q, k, v, segments_bt, compute=self.compute)

        rotate = ops.rope_table(positions_bt, c.d_head, c.rope_theta)
        x_btd = self.embed[...][ids_bt].astype(jnp.float32) if x_btd is None else x_btd
        for i, layer in enumerate(self.layers):
            h_btd = ops.rms_norm(x_btd, layer.attn_norm[...], c.norm_eps)
            x_btd = x_btd + self._product(attend(i, *self._qkv(layer, h_btd, rotate)).reshape(*ids_bt.shape, -1), layer.wo)
            h_btd = ops.rms_norm(x_btd, layer.mlp_norm[...], c.norm_eps)
            x_btd = x_btd + ops.swiglu(h_btd, layer.w_gate[...], layer.w_up[...], layer.w_down[...], self.compute)
        return ops.rms_norm(x_btd, self.final_norm[...], c.norm_eps)

    def _product(self, x, w):
        return ops.matmul(x, w[...], self.compute)

    def _qkv(self, layer, h_btd, rotate):
        c, out = self.config, []
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
            y = self._product(h_btd, getattr(layer, "w" + name))
            if c.qkv_bias:
                y = y + getattr(layer, "b" + name)[...].astype(y.dtype)[None, None]
            y = y.reshape(*y.shape[:-1], heads, c.d_head)
            if c.qk_norm and name != "v":
                y = ops.rms_norm(y, getattr(layer, name + "_norm")[...], c.norm_eps)
            out.append(y if name == "v" else ops.rope(y, rotate))
        return out

    def head_vd(self) -> jax.Array:
        """The output matrix, V×D: the embedding when tied."""
        return (self.embed if self.config.tied else self.head)[...]

    def logits(self, x) -> jax.Array:
        """fp32 logits of hidden states with any leading axes. Training should use ops.token_logprobs instead."""
        return ops.matmul(x, self.head_vd(), self.compute, True)
