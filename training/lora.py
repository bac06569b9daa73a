"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W stays as it is, A and B of W + (α/r)·A·B are trained.

Every attention and MLP matrix has one. The rows of our control tokens in the embedding (and in an untied head) are trained too, as a dense
difference: on an imported base they start as noisy copies of other rows, and no adapter of a layer could tell them apart.

A forward pass merges first and then runs the Decoder as it is, fused parts and all; so what is exported has the bits that were trained. It
saves the gradients, moments and checkpoints of the frozen weights, not the product that forms a gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.transformer import Decoder, param_table
from soul.errors import UserError
from training.losses import token_logprobs, token_nll
from training.programs import Logprobs, plain_logprobs, plain_nll

ALPHA = 32.0  # the scale is ALPHA / rank; under Adam another one does what another learning rate does, so it is no setting


@dataclass(frozen=True)
class Trained:
    """What of a model is trained: `params`, beside `frozen`; `logprobs` and `total` are those of Programs, and `merge(params)` gives the
    weights of the plain Decoder to export."""

    params: Any
    frozen: Any
    logprobs: Logprobs
    total: Callable
    merge: Callable[[Any], Any]


def trained(base: Decoder, rank: int, control: Sequence[int], seed: int) -> Trained:
    """All weights of `base` for rank 0; otherwise its adapters, and the rows of the `control` ids.
    Raises UserError for a rank that is negative or no lower than the model is wide.
    """
    graph, params = nnx.split(base)
    if rank == 0:
        return Trained(params, None, plain_logprobs(graph), plain_nll(graph), lambda params: params)
    if not 0 < rank < base.config.d_model:
        raise UserError(f"--lora {rank} must be between 1 and {base.config.d_model - 1}: the model is {base.config.d_model} wide")
    ids = tuple(control)
    return Trained(
        params=add(base.config, rank, ids, jax.random.key(seed)),
        frozen=params,
        logprobs=lambda adapters, frozen, batch: token_logprobs(graph, merge(adapters, frozen, ids), batch),
        total=lambda adapters, frozen, batch: token_nll(graph, merge(adapters, frozen, ids), batch),
        merge=lambda adapters: jax.jit(merge, static_argnums=2)(adapters, params, ids),
    )


def add(config: ModelConfig, rank: int, control: Sequence[int], key: jax.Array) -> dict:
    """Fresh adapters by parameter: a_dr Kaiming-uniform as in PEFT (±1/√d) and b_rf zero, or `rows`, n×D zero. They change nothing yet."""
    adapters = {}
    for n, spec in enumerate(param_table(config)):
        name = "_".join(map(str, spec.path))
        if "vocab" in spec.axes:
            adapters[name] = {"rows": jnp.zeros((len(control), config.d_model), jnp.float32)}
        elif len(spec.shape) == 2:
            d, f = spec.shape
            a_dr = jax.random.uniform(jax.random.fold_in(key, n), (d, rank), jnp.float32, -(d**-0.5), d**-0.5)
            adapters[name] = {"a": a_dr, "b": jnp.zeros((rank, f), jnp.float32)}
    return adapters


def merge(adapters: dict, base: Any, control: Sequence[int]) -> Any:
    """The base's parameters with the adapters worked in; same tree, shapes and dtypes."""

    def one(path, w):
        match adapters.get("_".join(str(key.key) for key in path[:-1])):
            case {"rows": rows_nd}:
                return w.at[jnp.array(control)].add(rows_nd.astype(w.dtype))
            case {"a": a_dr, "b": b_rf}:
                return (w + ALPHA / a_dr.shape[1] * jnp.matmul(a_dr, b_rf, precision="highest")).astype(w.dtype)
        return w

    return jax.tree_util.tree_map_with_path(one, base)
