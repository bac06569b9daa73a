"""The decoder's arithmetic: products, norm, RoPE, and log-probabilities without full logits."""

import functools
import logging
import os
import platform

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from soul.files import home

BF16, F32 = jnp.bfloat16, jnp.float32
KEPT = 1 << 28  # bytes of the logits' gradient that a forward may keep for its backward
log = logging.getLogger(__name__)


def enable_compile_cache() -> None:
    """Keep compiled programs under the model cache: a 30-layer step compiles once per machine, not once per command."""
    jax.config.update("jax_compilation_cache_dir", str(home() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def resolve_compute(compute: str = "auto") -> str:
    """ "auto" becomes "bf16" where the hardware multiplies bf16 faster, else "fp32".

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
        if ("avx512_bf16" in flags or "amx_bf16" in flags) and _bf16_runs():
            return "bf16"
    return "fp32"


def _bf16_runs() -> bool:
    """XLA may compile a bf16 × bf16 → fp32 product and only fail when it runs ("UNIMPLEMENTED ... DotThunk"): try all three forms."""
    try:
        with jax.ensure_compile_time_eval():  # the first to ask may be a model that is being traced
            x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
            jax.block_until_ready(jax.jit(jax.grad(lambda x, w: matmul(matmul(x, w, "bf16"), w, "bf16", True).sum(), (0, 1)))(x, w))
    except jax.errors.JaxRuntimeError as error:
        log.warning("bf16 products do not run here, using fp32: %s", str(error).splitlines()[0])
        return False
    return True


def dot(a, b, ca, cb, out=F32):
    """The product over axis `ca` of a matrix and `cb` of another, summed in fp32 whatever they are."""
    return lax.dot_general(a, b, (((ca,), (cb,)), ((), ())), exact(a), out)


def exact(a):
    """The precision that keeps fp32 operands as they are: without it a GPU rounds them to TF32 and a TPU to bf16."""
    return lax.Precision.HIGHEST if a.dtype == F32 else None


def activation(a, b, ca, cb):
    """A product whose rows are tokens, in fp32 on CPU; on an accelerator rounded to the operands' type, which halves what a step writes and reads."""
    return dot(a, b, ca, cb, F32 if jax.default_backend() == "cpu" else a.dtype).astype(F32)


def row_major(a):
    """On CPU a transposed left operand leaves the fast path (155 against 319 GFLOP/s here): write it out first."""
    return with_layout_constraint(a, Layout((0, 1))) if jax.default_backend() == "cpu" else a


def _transposed(a):
    """a.T of a product; without the barrier XLA folds it into the product, into a form that CPU cannot run (UNIMPLEMENTED … DotThunk)."""
    return lax.optimization_barrier(a).T


def matmul(x, w, compute: str = "fp32", transpose: bool = False) -> jax.Array:
    """x_...d @ w_df (or, unrounded, w_fd with `transpose`: logits) -> fp32. With compute "bf16" all three products are of bf16."""
    y = _matmul(x.reshape(-1, x.shape[-1]), w, compute, transpose)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, compute, transpose):
    kind = BF16 if compute == "bf16" else F32
    return dot(x.astype(kind), w.astype(kind), 1, 1) if transpose else activation(x.astype(kind), w.astype(kind), 1, 0)


def _matmul_fwd(x, w, compute, transpose):
    return _matmul(x, w, compute, transpose), (x.astype(BF16 if compute == "bf16" else F32), w, jnp.zeros((), x.dtype))


def _matmul_bwd(compute, transpose, kept, g):
    x, w, like_x = kept
    kind = x.dtype
    g = g.astype(kind)
    dx = activation(g, w.astype(kind), 1, 0 if transpose else 1)
    a, b = (g, x) if transpose else (x, g)
    return dx.astype(like_x.dtype), _weight_grad(a, b).astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def rms_norm(x, gain, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last axis, computed in fp32, returned in x's dtype."""
    x32 = x.astype(F32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain.astype(F32).reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)


def rope_table(positions_bt, d_head: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """What `rope` multiplies a head and its swapped halves by: (cos, cos) and (-sin, sin), each B×T×1×h in fp32.

    The barrier keeps XLA from computing them again inside every layer's fusions."""
    freq_h = theta ** (-jnp.arange(0, d_head, 2, dtype=F32) / d_head)
    angle = positions_bt.astype(F32)[:, :, None, None] * freq_h[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return lax.optimization_barrier((jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)))


@jax.custom_vjp
def rope(x_bthk, table) -> jax.Array:
    """Rotate the halves of each head, Hugging Face convention (element i pairs with i + h/2). The backward is the rotation by the opposite angle.

    On CPU the barrier keeps the swapped halves a copy of their own: XLA works a concatenation into its neighbours element by element there
    (padding the halves and adding them avoids that, too, but took 685 instead of 640 ms for 4 × 512 tokens at depth 6).
    """
    cos, sin = table
    x32 = x_bthk.astype(F32)
    swapped = jnp.concatenate(jnp.split(x32, 2, axis=-1)[::-1], axis=-1)
    swapped = lax.optimization_barrier(swapped) if jax.default_backend() == "cpu" else swapped
    return (x32 * cos + swapped * sin).astype(x_bthk.dtype)


rope.defvjp(lambda x, table: (rope(x, table), table), lambda table, g: (rope(g, (table[0], -table[1])), None))


def token_logprobs(x_nd, head_vd, targets_n, compute: str = "fp32", chunk: int | None = None) -> jax.Array:
    """log p(target) per row, fp32, from hidden states and the V×D head; logits exist for `chunk` rows at a time, also backward."""
    n = x_nd.shape[0]
    chunk = min(chunk or (256 if jax.default_backend() == "cpu" else 4096), n)  # on a GPU each chunk adds to D×V in its memory
    x = jnp.pad(x_nd, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, x_nd.shape[1])
    targets = jnp.pad(targets_n, (0, -n % chunk)).reshape(-1, chunk)
    return _logprobs(x, head_vd, targets, compute).reshape(-1)[:n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(x_icd, head_vd, targets_ic, compute):
    return _logprobs_fwd(x_icd, head_vd, targets_ic, compute)[0]


def _logprobs_fwd(x_icd, head_vd, targets_ic, compute):
    kind = BF16 if compute == "bf16" else F32
    x, head = x_icd.astype(kind), head_vd.astype(kind)
    keep = targets_ic.size * head.shape[0] * x.dtype.itemsize <= KEPT

    def one(part):
        logits_cv = dot(part[0], head, 1, 1)
        lse_c = jax.nn.logsumexp(logits_cv, axis=1)
        miss_cv = _miss(logits_cv, part[1], lse_c).astype(kind) if keep else None
        return jnp.take_along_axis(logits_cv, part[1][:, None], axis=1)[:, 0], lse_c, miss_cv

    hit_ic, lse_ic, miss_icv = lax.map(one, (x, targets_ic))
    return hit_ic - lse_ic, (x, head_vd, targets_ic, lse_ic, miss_icv, jnp.zeros((), x_icd.dtype))


def _miss(logits_cv, target_c, lse_c):
    """1[target] - p, the gradient of log p by the logits. It is kept and not p: rounded to bf16, p = .998 would leave nothing, or double."""
    vocab = jnp.arange(logits_cv.shape[1], dtype=target_c.dtype)[None]
    return (vocab == target_c[:, None]).astype(F32) - jnp.exp(logits_cv - lse_c[:, None])


def _logprobs_bwd(compute, kept, g_ic):
    """One pass per chunk: the logits' gradient (kept, or from the logits again), and from it both products."""
    x_icd, head_vd, targets_ic, lse_ic, miss_icv, like_x = kept
    head = head_vd.astype(x_icd.dtype)

    def one(dhead_dv, part):
        x, target, lse, g, miss_cv = part
        miss_cv = _miss(dot(x, head, 1, 1), target, lse) if miss_cv is None else miss_cv.astype(F32)
        d_cv = (g[:, None] * miss_cv).astype(x.dtype)
        # D×V, so that the operand to be written out row-major is the small one
        return dhead_dv + dot(row_major(x.T), d_cv, 1, 0), dot(d_cv, head, 1, 0)

    dhead_dv, dx_icd = lax.scan(one, jnp.zeros(head.shape[::-1], F32), (x_icd, targets_ic, lse_ic, g_ic, miss_icv))
    return dx_icd.astype(like_x.dtype), _transposed(dhead_dv).astype(head_vd.dtype), None


_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)


def nll(x_nd, head_vd, targets_n, weights_n, compute: str = "fp32") -> jax.Array:
    """Sum of -weight × log p(target), fp32: loss, softmax and both gradients in one pass over chunks, so logits are computed once and
    never kept. Against `token_logprobs` under a loss: three products for four (79 against 101 ms at 2,048 × 256 × 8,192 here)."""
    n = x_nd.shape[0]
    chunk = min(512 if jax.default_backend() == "cpu" else 8192, n)  # a chunk of logits should stay in a CPU's cache
    x = jnp.pad(x_nd, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, x_nd.shape[1])
    targets, weights = (jnp.pad(a, (0, -n % chunk)).reshape(-1, chunk) for a in (targets_n, weights_n))
    return _nll(x, head_vd, targets, weights, compute)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(x_icd, head_vd, targets_ic, weights_ic, compute):
    return -jnp.sum(_logprobs(x_icd, head_vd, targets_ic, compute) * weights_ic)


def _nll_fwd(x_icd, head_vd, targets_ic, weights_ic, compute):
    kind = BF16 if compute == "bf16" else F32
    head = head_vd.astype(kind)
    vocab = jnp.arange(head.shape[0], dtype=targets_ic.dtype)[None]

    def one(carry, part):
        total, dhead_dv = carry
        x, target, weight = part
        logits_cv = dot(x, head, 1, 1)
        lse = jax.nn.logsumexp(logits_cv, axis=1, keepdims=True)
        hit = jnp.take_along_axis(logits_cv, target[:, None], axis=1)
        d_cv = (weight[:, None] * (jnp.exp(logits_cv - lse) - (vocab == target[:, None]).astype(F32))).astype(kind)
        return (total + jnp.sum(weight * (lse - hit)[:, 0]), dhead_dv + dot(row_major(x.T), d_cv, 1, 0)), dot(d_cv, head, 1, 0)

    start = jnp.zeros((), F32), jnp.zeros(head.shape[::-1], F32)
    (total, dhead_dv), dx_icd = lax.scan(one, start, (x_icd.astype(kind), targets_ic, weights_ic))
    return total, (dx_icd, _transposed(dhead_dv), jnp.zeros((), x_icd.dtype), jnp.zeros((), head_vd.dtype))


def _nll_bwd(_, kept, g):
    dx_icd, dhead_vd, like_x, like_head = kept
    return (g * dx_icd).astype(like_x.dtype), (g * dhead_vd).astype(like_head.dtype), None, None


_nll.defvjp(_nll_fwd, _nll_bwd)


def swiglu(x, w_gate, w_up, w_down, compute: str = "fp32") -> jax.Array:
    """(silu(x @ w_gate) * (x @ w_up)) @ w_down over the last axis -> fp32; what backward needs is kept in bf16 where products are."""
    return _swiglu(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down, compute).reshape(*x.shape[:-1], w_down.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swiglu(x_nd, w_gate, w_up, w_down, compute):
    return _swiglu_fwd(x_nd, w_gate, w_up, w_down, compute)[0]


def _swiglu_fwd(x_nd, w_gate, w_up, w_down, compute):
    kind = BF16 if compute == "bf16" else F32
    x = x_nd.astype(kind)
    g_nf, u_nf = activation(x, w_gate.astype(kind), 1, 0), activation(x, w_up.astype(kind), 1, 0)
    a_nf = (jax.nn.silu(g_nf) * u_nf).astype(kind)
    kept = x, w_gate, w_up, w_down, g_nf.astype(kind), u_nf.astype(kind), jnp.zeros((), x_nd.dtype)
    return activation(a_nf, w_down.astype(kind), 1, 0), kept


def _swiglu_bwd(compute, kept, dy_nd):
    x, w_gate, w_up, w_down, g_nf, u_nf, like_x = kept
    kind = x.dtype
    dy, g, u = dy_nd.astype(kind), g_nf.astype(F32), u_nf.astype(F32)
    da_nf, s = activation(dy, w_down.astype(kind), 1, 1), jax.nn.sigmoid(g)
    dg, du = (da_nf * u * s * (1 + g * (1 - s))).astype(kind), (da_nf * g * s).astype(kind)
    dx = activation(dg, w_gate.astype(kind), 1, 1) + activation(du, w_up.astype(kind), 1, 1)
    weights = (_weight_grad(x, dg), _weight_grad(x, du), _weight_grad((g * s * u).astype(kind), dy))
    return dx.astype(like_x.dtype), *(dw.astype(w.dtype) for dw, w in zip(weights, (w_gate, w_up, w_down), strict=True))


def _weight_grad(x_nd, dy_nf):
    return dot(row_major(x_nd.T), dy_nf, 1, 0) if x_nd.dtype == BF16 else dot(x_nd, dy_nf, 0, 0)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
