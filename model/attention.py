"""Causal grouped-query attention within segments: blockwise on CPU, cuDNN or XLA on an accelerator.

Shape suffixes as in transformer.py, and G = H/K query heads per kv head.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64  # queries per block on CPU: 64 keeps scores in cache (43 ms a SmolLM2 layer at 4 × 512 forward + backward; einsum 112)
HIDDEN = -1e30  # finite, so that a row never computes inf - inf
log = logging.getLogger(__name__)


def attention(q_bthk, k_bskh, v_bskh, segments_bt=None, compute: str = "fp32") -> jax.Array:
    """Causal attention -> B×T×H×h in fp32; query head j reads kv head j // G. `segments_bt`: runs of equal ids see only themselves."""
    kind = jnp.bfloat16 if compute == "bf16" else jnp.float32
    if jax.default_backend() == "cpu":
        b, t, heads, h = q_bthk.shape
        q_bktgh = (q_bthk * h**-0.5).reshape(b, t, k_bskh.shape[2], -1, h).transpose(0, 2, 1, 3, 4)
        k_bksh, v_bksh = k_bskh.transpose(0, 2, 1, 3), v_bskh.transpose(0, 2, 1, 3)
        first_bt = segment_starts(q_bthk.shape[:2], segments_bt)
        out = lax.map(lambda row: _blockwise(*row, kind), (q_bktgh, k_bksh, v_bksh, first_bt))
        return out.transpose(0, 2, 1, 3, 4).reshape(b, t, heads, h)
    q, k, v = (x.astype(kind) for x in (q_bthk, k_bskh, v_bskh))
    if segments_bt is None:
        fast = kind == jnp.bfloat16 and cudnn_works(q.shape[-1])
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fast else "xla")
    else:  # an explicit mask leaves cuDNN's fast path, and a fast path that drops segments would be silently wrong
        same_btt = segments_bt[:, None, :, None] == segments_bt[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=same_btt, is_causal=True, implementation="xla")
    return out.astype(jnp.float32)


@functools.cache
def cudnn_works(d_head: int) -> bool:
    """Whether cuDNN attention runs here and agrees with XLA on a small input; says so loudly when not."""
    q = jax.random.normal(jax.random.key(0), (1, 128, 4, d_head), jnp.bfloat16)
    try:
        fast, slow = (jax.nn.dot_product_attention(q, q[:, :, :2], q[:, :, 2:], is_causal=True, implementation=i) for i in ("cudnn", "xla"))
        gap = float(jnp.abs(fast - slow).max())
        problem = None if gap < 0.05 else f"it differs from XLA by {gap:.3g}"
    except Exception as error:  # cuDNN's failures have no common type
        problem = str(error).splitlines()[0]
    if problem:
        log.warning("cuDNN attention is off, training will be slower: %s", problem)
    return problem is None


def segment_starts(shape, segments_bt=None) -> jax.Array:
    """Where the run of equal segment ids that holds each position begins."""
    if segments_bt is None:
        return jnp.zeros(shape, jnp.int32)
    at_bt = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    new_bt = jnp.pad(segments_bt[:, 1:] != segments_bt[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(new_bt, at_bt, 0), axis=1)


def _dot(a, b, axis_a, axis_b, kind):
    """Product per kv head in fp32, contracting axis_a with axis_b."""
    return lax.dot_general(a.astype(kind), b.astype(kind), (((axis_a,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _blocks(t):
    """Query blocks, at most 8: more would cost compile time (30 layers at 4 blocks 7 s, at 8 blocks 15 s)."""
    size = max(BLOCK, -(-t // 8))
    return [(lo, min(lo + size, t)) for lo in range(0, t, size)]


def _scores(q_ktgh, k_ksh, first_t, lo, hi, kind):
    """Scores K,t,G,S of queries lo:hi with the keys before hi; later keys are never computed."""
    n, _, g, h = q_ktgh.shape
    s = _dot(q_ktgh[:, lo:hi].reshape(n, -1, h), k_ksh[:, :hi], 2, 2, kind).reshape(n, hi - lo, g, hi)
    key = jnp.arange(hi, dtype=jnp.int32)[None]
    seen_ts = (key <= jnp.arange(lo, hi, dtype=jnp.int32)[:, None]) & (key >= first_t[lo:hi, None])
    return jnp.where(seen_ts[None, :, None], s, HIDDEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q_ktgh, k_ksh, v_ksh, first_t, kind):
    """One row of the batch -> K,T,G,h. Backward recomputes the scores (FlashAttention, arXiv 2205.14135), so none are stored."""
    return _forward(q_ktgh, k_ksh, v_ksh, first_t, kind)[0]


def _forward(q_ktgh, k_ksh, v_ksh, first_t, kind):
    n, t, g, h = q_ktgh.shape
    q_ktgh, k_ksh, v_ksh = (x.astype(kind) for x in (q_ktgh, k_ksh, v_ksh))  # once, not per block
    outs, sums = [], []
    for lo, hi in _blocks(t):
        s = _scores(q_ktgh, k_ksh, first_t, lo, hi, kind)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        z = p.sum(-1, keepdims=True)
        outs.append(_dot(p.reshape(n, -1, hi), v_ksh[:, :hi], 2, 1, kind).reshape(n, hi - lo, g, h) / z)
        sums.append(top + jnp.log(z))
    out, lse = jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=1)
    return out, (q_ktgh, k_ksh, v_ksh, first_t, out, lse)


def _backward(kind, kept, d_ktgh):
    q, k, v, first_t, out, lse = kept
    n, t, g, h = q.shape
    delta = (out * d_ktgh).sum(-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for lo, hi in _blocks(t):
        p = jnp.exp(_scores(q, k, first_t, lo, hi, kind) - lse[:, lo:hi])
        d, qs = (x[:, lo:hi].reshape(n, -1, h) for x in (d_ktgh, q))
        dp = _dot(d, v[:, :hi], 2, 2, kind).reshape(p.shape)
        ds = (p * (dp - delta[:, lo:hi])).reshape(n, -1, hi)
        dq.append(_dot(ds, k[:, :hi], 2, 1, kind).reshape(n, hi - lo, g, h))
        dv = dv.at[:, :hi].add(_dot(p.reshape(n, -1, hi), d, 1, 1, kind))
        dk = dk.at[:, :hi].add(_dot(ds, qs, 1, 1, kind))
    return jnp.concatenate(dq, axis=1), dk, dv, None


_blockwise.defvjp(_forward, _backward)
