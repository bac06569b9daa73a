"""Causal grouped-query attention within segments: blockwise on CPU, by cuDNN, splash attention or XLA on an accelerator.

Shape suffixes as in transformer.py, and G = H/K query heads per kv head.
"""

import functools
import logging
import math
from dataclasses import fields

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# queries (backward: keys) per block on CPU: scores stay in cache (a SmolLM2 layer at 4 × 512, forward + backward, 30 ms; einsum 112)
BLOCK = 128
HIDDEN = -1e30  # finite, so that a row never computes inf - inf
log = logging.getLogger(__name__)


def attention(q_bthk, k_bskh, v_bskh, segments_bt=None, compute: str = "fp32") -> jax.Array:
    """Causal attention -> B×T×H×h in fp32; query head j reads kv head j // G. `segments_bt`: runs of equal ids see only themselves."""
    kind = jnp.bfloat16 if compute == "bf16" else jnp.float32
    if jax.default_backend() == "cpu":
        return _attend(q_bthk, k_bskh, v_bskh, segment_starts(q_bthk.shape[:2], segments_bt), kind)
    fast = fast_attention(jax.default_backend(), q_bthk.shape[3], segments_bt is not None) if kind == jnp.bfloat16 else None
    if q_bthk.shape[1] % UNITS.get(fast, 1):
        fast = None
    q, k, v = (x.astype(kind) for x in (q_bthk, k_bskh, v_bskh))
    return (fast or by_xla)(q, k, v, segments_bt).astype(jnp.float32)


def by_xla(q_bthk, k_bskh, v_bskh, segments_bt):
    """All scores at once: what every accelerator can do."""
    with jax.default_matmul_precision("highest" if q_bthk.dtype == jnp.float32 else None):
        return jax.nn.dot_product_attention(q_bthk, k_bskh, v_bskh, mask=_same(segments_bt), is_causal=True, implementation="xla")


def by_cudnn(q_bthk, k_bskh, v_bskh, segments_bt):
    """cuDNN's flash attention, by name: jax never chooses it by itself. Segments go in as a bias, T×T a row."""

    def attend(q, k, v, segments):
        return jax.nn.dot_product_attention(q, k, v, mask=_same(segments), is_causal=True, implementation="cudnn")

    return _by_heads(attend, q_bthk, k_bskh, v_bskh, segments_bt)


def by_splash(q_bthk, k_bskh, v_bskh, segments_bt):
    """The Pallas kernel for TPUs that ships with jax: no score leaves the chip, and masked blocks are not computed."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # only TPUs need Pallas

    def attend(q, k, v, segments):
        t, heads, h = q.shape[1:]
        size = next(n for n in (512, 256, 128) if t % n == 0)
        sizes = dict.fromkeys((field.name for field in fields(splash.BlockSizes) if field.name.startswith("block")), size)
        mask = splash.MultiHeadMask([splash.CausalMask((t, t))] * heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=splash.BlockSizes(**sizes))
        q, k, v = ((x * h**-0.5 if x is q else x).swapaxes(1, 2) for x in (q, k, v))
        if segments is None:
            return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(q, k, v, segments).swapaxes(1, 2)

    return _by_heads(attend, q_bthk, k_bskh, v_bskh, segments_bt)


FAST = {"gpu": by_cudnn, "tpu": by_splash}
UNITS = {by_cudnn: 2, by_splash: 128}  # rows of other lengths are left to XLA (cuDNN's: only with segments, in training)


def _by_heads(attend, q, k, v, segments):
    """`attend` where XLA may still split a shard's work (the mesh's `tensor`) takes each device's heads: no kernel can be split by XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    split = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    free = tuple(name for name, size, kind in split if kind == AxisType.Auto and size > 1)
    if not free:
        return attend(q, k, v, segments)
    heads = P(None, None, free if k.shape[2] % math.prod(mesh.shape[name] for name in free) == 0 else None)
    spread = jax.shard_map(attend, in_specs=(heads, heads, heads, P()), out_specs=heads, axis_names=set(free), check_vma=False)
    return spread(q, k, v, segments)


def _same(segments_bt):
    """Which pairs of positions share a segment, B×1×T×T."""
    return None if segments_bt is None else segments_bt[:, None, :, None] == segments_bt[:, None, None, :]


@functools.cache
def fast_attention(backend: str, d_head: int, masked: bool):
    """The accelerator's kernel, if it runs here and agrees with XLA, forward and backward, on a small input; None, said loudly, if not.

    A kernel that drops the segments would train on and be wrong (as MaxText's did, its issue 4476), so it is tried with them.
    """
    if not (fast := FAST.get(backend)):
        return None
    try:
        with jax.ensure_compile_time_eval():  # the first to ask is a model that is being traced
            q, k, v, g = (jax.random.normal(key, (1, 256, 4, d_head), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
            segments_bt = (jnp.arange(256)[None] < 100).astype(jnp.int32) if masked else None

            def results(attend):
                out, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments_bt), q, k[:, :, :2], v[:, :, :2])
                return out, *pullback(g)

            pairs = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(results(fast), results(by_xla), strict=True)]
            gap = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
        problem = None if gap < 0.05 else f"it differs from XLA by {gap:.0%}"
    except Exception as error:  # the failures of kernels have no common type
        problem = str(error).splitlines()[0]
    if problem:
        what = f"{fast.__name__.removeprefix('by_')} attention{' within segments' if masked else ''}"
        log.warning("%s is off, training will be slower and take more memory: %s", what, problem)
    return None if problem else fast


def segment_starts(shape, segments_bt=None) -> jax.Array:
    """Where the run of equal segment ids that holds each position begins."""
    if segments_bt is None:
        return jnp.zeros(shape, jnp.int32)
    at_bt = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    new_bt = jnp.pad(segments_bt[:, 1:] != segments_bt[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(new_bt, at_bt, 0), axis=1)


def _dot(a, b, axis_b):
    """Products of stacks in fp32, a's last axis with `axis_b` of b: the forms that are fast on CPU have no transposed left operand."""
    return lax.dot_general(a, b, (((2,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _blocks(t):
    """At most 8: more would cost compile time (30 layers at 4 blocks 7 s, at 8 blocks 15 s)."""
    size = max(BLOCK, -(-t // 8))
    return [(lo, min(lo + size, t)) for lo in range(0, t, size)]


def _to_groups(x_bth, kv_heads):
    """B,T,H,… -> B,K,TG,…: the rows that read one kv head."""
    b, t, heads, *h = x_bth.shape
    return jnp.moveaxis(x_bth.reshape(b, t, kv_heads, heads // kv_heads, *h), 2, 1).reshape(b, kv_heads, -1, *h)


def _from_groups(x_bkn, t):
    b, k, _, *h = x_bkn.shape
    return jnp.moveaxis(x_bkn.reshape(b, k, t, -1, *h), 1, 2).reshape(b, t, -1, *h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_bthk, k_bskh, v_bskh, first_bt, kind):
    """Backward recomputes the scores (FlashAttention, arXiv 2205.14135), so none are stored. Rows of the batch go one after the other."""
    return _forward(q_bthk, k_bskh, v_bskh, first_bt, kind)[0]


def _forward(q_bthk, k_bskh, v_bskh, first_bt, kind):
    t, groups = q_bthk.shape[1], q_bthk.shape[2] // k_bskh.shape[2]
    q_bknh = _to_groups((q_bthk * q_bthk.shape[3] ** -0.5).astype(kind), k_bskh.shape[2])
    k_bksh, v_bksh = (x.astype(kind).transpose(0, 2, 1, 3) for x in (k_bskh, v_bskh))

    def row(part):
        """Block by block of queries, with the keys before its end; later keys are never computed."""
        q_knh, k_ksh, v_ksh, first_t = part
        outs, sums = [], []
        for lo, hi in _blocks(t):
            s_kns = _dot(q_knh[:, lo * groups : hi * groups], k_ksh[:, :hi], 2)
            s_kns = jnp.where(jnp.repeat(_seen(first_t, lo, hi, 0, hi), groups, axis=0)[None], s_kns, HIDDEN)
            top = s_kns.max(-1, keepdims=True)
            p_kns = jnp.exp(s_kns - top)
            z = p_kns.sum(-1, keepdims=True)
            outs.append(_dot(p_kns.astype(kind), v_ksh[:, :hi], 1) / z)
            sums.append((top + jnp.log(z))[..., 0])
        return jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=1)

    out_bknh, lse_bkn = lax.map(row, (q_bknh, k_bksh, v_bksh, first_bt))
    out_bthk = _from_groups(out_bknh, t)
    return out_bthk, (q_bknh, k_bksh, v_bksh, first_bt, out_bthk, lse_bkn)


def _seen(first_t, lo, hi, start, stop):
    """Which of the keys start:stop each query of lo:hi sees."""
    at_t1, key_1s = jnp.arange(lo, hi, dtype=jnp.int32)[:, None], jnp.arange(start, stop, dtype=jnp.int32)[None]
    return (key_1s <= at_t1) & (key_1s >= first_t[lo:hi, None])


def _backward(kind, kept, d_bthk):
    q_bknh, k_bksh, v_bksh, first_bt, out_bthk, lse_bkn = kept
    (_, t, heads, h), kv_heads = d_bthk.shape, k_bksh.shape[1]
    groups = heads // kv_heads
    delta_bkn = _to_groups((out_bthk * d_bthk).sum(-1), kv_heads)

    def row(part):
        """Block by block of keys, with the queries from its start. Scores are S×N here: all five products are then of the fast form."""
        q_knh, k_ksh, v_ksh, first_t, lse_kn, delta_kn, d_knh = part
        k_khs = lax.optimization_barrier(k_ksh.swapaxes(1, 2))
        dq_khn, dk, dv = jnp.zeros((kv_heads, h, t * groups), jnp.float32), [], []
        for lo, hi in _blocks(t):
            q, d, lse, delta = (x[:, lo * groups :] for x in (q_knh, d_knh, lse_kn, delta_kn))
            seen_sn = jnp.repeat(_seen(first_t, lo, t, lo, hi).T, groups, axis=1)
            p_ksn = jnp.exp(jnp.where(seen_sn[None], _dot(k_ksh[:, lo:hi], q, 2), HIDDEN) - lse[:, None])
            ds_ksn = (p_ksn * (_dot(v_ksh[:, lo:hi], d, 2) - delta[:, None])).astype(kind)
            dv.append(_dot(p_ksn.astype(kind), d, 1))
            dk.append(_dot(ds_ksn, q, 1))
            dq_khn = dq_khn.at[:, :, lo * groups :].add(_dot(k_khs[:, :, lo:hi], ds_ksn, 1))
        return dq_khn.swapaxes(1, 2), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)

    d_bknh = _to_groups(d_bthk.astype(kind), kv_heads)
    dq_bknh, dk_bksh, dv_bksh = lax.map(row, (q_bknh, k_bksh, v_bksh, first_bt, lse_bkn, delta_bkn, d_bknh))
    return _from_groups(dq_bknh * h**-0.5, t), dk_bksh.transpose(0, 2, 1, 3), dv_bksh.transpose(0, 2, 1, 3), None


_attend.defvjp(_forward, _backward)
