"""The decoder's arithmetic: products, norm, RoPE, and log-probabilities that never hold full logits."""

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
    x, w = jnp.ones((64, 128)), jnp.ones((128, 256))
    try:
        jax.block_until_ready(jax.jit(jax.grad(lambda x, w: matmul(matmul(x, w, "bf16"), w, "bf16", True).sum(), (0, 1)))(x, w))
    except jax.errors.JaxRuntimeError as error:
        log.warning("bf16 products do not run here, using fp32: %s", str(error).splitlines()[0])
        return False
    return True


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


def token_logprobs(x_nd, head_vd, targets_n, compute: str = "fp32", chunk: int = 256) -> jax.Array:
    """log p(target) per row, fp32, from hidden states and the V×D head; logits exist for `chunk` rows at a time, also backward."""
    n = x_nd.shape[0]
    chunk = min(chunk, n)
    x = jnp.pad(x_nd, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, x_nd.shape[1])
    targets = jnp.pad(targets_n, (0, -n % chunk)).reshape(-1, chunk)
    return _logprobs(x, head_vd, targets, compute).reshape(-1)[:n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(x_icd, head_vd, targets_ic, compute):
    return _logprobs_fwd(x_icd, head_vd, targets_ic, compute)[0]


def _logprobs_fwd(x_icd, head_vd, targets_ic, compute):
    kind = BF16 if compute == "bf16" else F32
    x, head = x_icd.astype(kind), head_vd.astype(kind)

    def one(part):
        logits_cv = _dot(part[0], head, 1, 1)
        return jnp.take_along_axis(logits_cv, part[1][:, None], axis=1)[:, 0], jax.nn.logsumexp(logits_cv, axis=1)

    hit_ic, lse_ic = lax.map(one, (x, targets_ic))
    return hit_ic - lse_ic, (x, head_vd, targets_ic, lse_ic, jnp.zeros((), x_icd.dtype))


def _logprobs_bwd(compute, kept, g_ic):
    """One pass per chunk: logits again, their gradient g·(1[target] - p), and from it both products."""
    x_icd, head_vd, targets_ic, lse_ic, like_x = kept
    head = head_vd.astype(x_icd.dtype)
    vocab = jnp.arange(head.shape[0], dtype=targets_ic.dtype)[None]

    def one(dhead_vd, part):
        x, target, lse, g = part
        p_cv = jnp.exp(_dot(x, head, 1, 1) - lse[:, None])
        d_cv = (g[:, None] * ((vocab == target[:, None]).astype(F32) - p_cv)).astype(x.dtype)
        return dhead_vd + _dot(_row_major(d_cv.T), x, 1, 0), _dot(d_cv, head, 1, 0)

    dhead_vd, dx_icd = lax.scan(one, jnp.zeros(head.shape, F32), (x_icd, targets_ic, lse_ic, g_ic))
    return dx_icd.astype(like_x.dtype), dhead_vd.astype(head_vd.dtype), None


_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)
