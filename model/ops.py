"""The decoder's arithmetic: products, norm, RoPE, attention, and log-probabilities that never hold full logits."""

import functools
import os
import platform

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from soul.files import home

BF16, F32 = jnp.bfloat16, jnp.float32


def enable_compile_cache() -> None:
    """Keep compiled programs under the model cache: a 30-layer step compiles once per machine, not once per command."""
    jax.config.update("jax_compilation_cache_dir", str(home() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def resolve_compute(compute: str = "auto") -> str:
    """"auto" becomes "bf16" where the hardware multiplies bf16 faster, else "fp32".

    Decided by CPU flags and not by a stopwatch: a resumed run must choose the same on the same machine, however busy it is.
    """
    if compute in ("fp32", "bf16"):
        return compute
    if compute != "auto":
        raise ValueError(f"compute must be auto, fp32 or bf16, not {compute!r}")
    if jax.default_backend() != "cpu":
        return "bf16"
    if platform.system() == "Linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            flags = next((line.split() for line in f if line.startswith("flags")), [])
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bf16"
    return "fp32"


def _dot(a, b, ca, cb):
    return lax.dot_general(a, b, (((ca,), (cb,)), ((), ())), preferred_element_type=F32)


def _row_major(a):
    """On CPU a transposed left operand leaves the fast path (155 against 319 GFLOP/s here): write it out first."""
    return with_layout_constraint(a, Layout((0, 1))) if jax.default_backend() == "cpu" else a


def matmul(x, w, compute: str = "fp32", transpose: bool = False) -> jax.Array:
    """x_...d @ w_df (or w_fd with `transpose`) -> fp32. With compute "bf16" all three products are bf16 × bf16 → fp32."""
    y = _matmul(x.reshape(-1, x.shape[-1]), w, compute, transpose)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, compute, transpose):
    kind = BF16 if compute == "bf16" else F32
    return _dot(x.astype(kind), w.astype(kind), 1, 1 if transpose else 0)


def _matmul_fwd(x, w, compute, transpose):
    return _matmul(x, w, compute, transpose), (x.astype(BF16 if compute == "bf16" else F32), w, jnp.zeros((), x.dtype))


def _matmul_bwd(compute, transpose, kept, g):
    x, w, like_x = kept
    kind = x.dtype
    g = g.astype(kind)
    dx = _dot(g, w.astype(kind), 1, 0 if transpose else 1)
    a, b = (g, x) if transpose else (x, g)
    dw = _dot(_row_major(a.T), b, 1, 0) if kind == BF16 else _dot(a, b, 0, 0)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def rms_norm(x, gain, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis, computed in fp32, returned in x's dtype."""
    x32 = x.astype(F32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain.astype(F32).reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)


def segment_positions(shape, segments_bt=None) -> jax.Array:
    """Positions that restart at 0 wherever the segment id changes."""
    at_bt = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    if segments_bt is None:
        return at_bt
    new_bt = jnp.pad(segments_bt[:, 1:] != segments_bt[:, :-1], ((0, 0), (1, 0)))
    return at_bt - lax.cummax(jnp.where(new_bt, at_bt, 0), axis=1)


def rope_table(positions_bt, d_head: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each B×T×1×(h/2) in fp32."""
    freq_h = theta ** (-jnp.arange(0, d_head, 2, dtype=F32) / d_head)
    angle = positions_bt.astype(F32)[:, :, None, None] * freq_h[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rope(x_bthk, table) -> jax.Array:
    """Rotate the halves of each head, Hugging Face convention (element i pairs with i + h/2)."""
    cos, sin = table
    a, b = jnp.split(x_bthk.astype(F32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_bthk.dtype)


def attention(q_bthk, k_bskh, v_bskh, segments_bt=None, compute: str = "fp32") -> jax.Array:
    """Causal grouped-query attention within equal segments -> B×T×H×h. Query head j reads kv head j // (H/K)."""
    b, t, heads, d_head = q_bthk.shape
    kv = k_bskh.shape[2]
    q = q_bthk.reshape(b, t, kv, heads // kv, d_head) * d_head ** -0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_bskh, preferred_element_type=F32)
    mask = jnp.tril(jnp.ones((t, t), bool))[None]
    if segments_bt is not None:
        mask = mask & (segments_bt[:, :, None] == segments_bt[:, None, :])
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", p, v_bskh).reshape(b, t, heads, d_head)


def token_logprobs(x_nd, head_vd, targets_n, compute: str = "fp32", chunk: int = 256) -> jax.Array:
    """log p(target) per row, fp32, from hidden states and the V×D head; logits exist for `chunk` rows at a time."""
    n = x_nd.shape[0]
    pad = -n % chunk
    x = jnp.pad(x_nd, ((0, pad), (0, 0))).reshape(-1, chunk, x_nd.shape[1])
    t = jnp.pad(targets_n, (0, pad)).reshape(-1, chunk)
    return lax.map(jax.checkpoint(lambda c: _chunk_logprobs(c[0], head_vd, c[1], compute)), (x, t)).reshape(-1)[:n]


def _chunk_logprobs(x_cd, head_vd, targets_c, compute):
    logits_cv = matmul(x_cd, head_vd, compute, True)
    hit = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=1)[:, 0]
    return hit - jax.nn.logsumexp(logits_cv, axis=1)
