"""Muon for matrices, AdamW for embeddings, head and gains: the optimizer of pretraining, as optax transformations.

Muon (Jordan 2024) steps along the orthogonal factor of the momentum. With it, as in nanochat's optimizer: row equilibration (MuonEq,
arXiv 2603.28254), Polar Express (2505.16932), the exact norm restored (Muon+, 2602.21545), NorMuon's second moment (2510.05491) and cautious weight decay.

Our matrices are (in, out); papers and nanochat store (out, in). What they call a row, one output's weights, is a column here.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from model import ops

F32 = jnp.float32
TINY = 1e-12  # below any gradient that matters: the direction must not depend on the scale of the loss

POLAR_EXPRESS = (  # five steps of p(x) = ax + bx³ + cx⁵ (safety factor 2 %, cushion 2)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonState(NamedTuple):
    """`momentum` and `second` have the tree of the parameters; `second` is (1, out), or (in, 1) where there are more inputs than outputs."""

    count: jax.Array
    momentum: Any
    second: Any


def orthogonal(x_kio: jax.Array, compute: str = "fp32") -> jax.Array:
    """The nearest semi-orthogonal matrix of each of K, to about 1 %: singular values go to 1. Zero stays zero.

    On CPU one matrix after the other, whose products then stay in cache: at depth 6 that took 0.48 -> 0.32 s, with what `_polar` says.
    """
    polar = partial(_polar, kind=jnp.bfloat16 if compute == "bf16" else F32)
    return lax.map(polar, x_kio) if jax.default_backend() == "cpu" else jax.vmap(polar)(x_kio)


def _polar(x_io: jax.Array, kind) -> jax.Array:
    """Works on the wide form, so that the product X Xᵀ is the small one and no left operand is transposed; a tall matrix is written out anew
    for it, or XLA would keep it as it lies and take each product the slow way (on 1,024 × 384 at 130 instead of 350 GFLOP/s)."""
    tall = x_io.shape[0] > x_io.shape[1]
    x_mn = ops.row_major(x_io.T) if tall else x_io
    x_mn = x_mn / (1.01 * _norm(x_mn) + TINY)
    for a, b, c in POLAR_EXPRESS:
        square_mm = ops.dot(x_mn.astype(kind), x_mn.astype(kind), 1, 1)
        poly_mm = b * square_mm + c * ops.dot(square_mm.astype(kind), square_mm.astype(kind), 1, 0)
        x_mn = a * x_mn + ops.dot(poly_mm.astype(kind), x_mn.astype(kind), 1, 0)
    return ops.row_major(x_mn).T if tall else x_mn


def _norm(x, axis=(-2, -1)):
    return jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))


def direction(g_kio, second, beta2: float, compute: str) -> tuple[jax.Array, jax.Array]:
    """Momentum of K matrices of one shape -> their step (Frobenius norm √min(in, out)) and the new second moment."""
    _, rows, columns = g_kio.shape
    g_kio = g_kio * (_norm(g_kio) / math.sqrt(columns) / jnp.maximum(_norm(g_kio, -2), TINY))  # every output counts the same
    x_kio = orthogonal(g_kio, compute)
    x_kio = x_kio * (math.sqrt(min(rows, columns)) / jnp.maximum(_norm(x_kio), TINY))
    mean = jnp.mean(x_kio * x_kio, axis=_averaged(rows, columns) + 1, keepdims=True)
    second = beta2 * second + (1 - beta2) * mean
    scaled = x_kio * lax.rsqrt(jnp.maximum(second, 1e-10))
    return scaled * (_norm(x_kio) / jnp.maximum(_norm(scaled), TINY)), second


def _averaged(rows: int, columns: int) -> int:
    """The axis over which NorMuon takes its mean: the shorter one, so that it keeps a number per output, or per input where those are more."""
    return 0 if columns >= rows else 1


def muon(rate: optax.Schedule, momentum: optax.Schedule, decay: optax.Schedule, beta2: float = 0.9, compute: str = "fp32"):
    """Muon for a tree of matrices (in, out), as an optax transformation; `update` needs the parameters.

    A step is rate × √max(1, out/in) × (direction + decay × p where both have the same sign). Matrices of one shape are stacked and done at
    once. Schedules take the step's number. `compute` "bf16" takes the products of Polar Express as bf16 × bf16 → fp32.
    """

    def init(params):
        def narrow(p):
            return jnp.zeros([1 if axis == _averaged(*p.shape) else n for axis, n in enumerate(p.shape)], F32)

        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape, F32), params), jax.tree.map(narrow, params))

    def update(grads, state, params=None):
        lr, m, wd = (jnp.asarray(schedule(state.count), F32) for schedule in (rate, momentum, decay))
        momenta = jax.tree.map(lambda old, g: m * old + (1 - m) * g.astype(F32), state.momentum, grads)
        looks = jax.tree.map(lambda new, g: m * new + (1 - m) * g.astype(F32), momenta, grads)  # Nesterov
        (x, tree), p, v = jax.tree.flatten(looks), jax.tree.leaves(params), jax.tree.leaves(state.second)
        shapes = defaultdict(list)
        for n, leaf in enumerate(x):
            shapes[leaf.shape].append(n)
        for (rows, columns), numbers in shapes.items():
            step_kio, second = direction(jnp.stack([x[n] for n in numbers]), jnp.stack([v[n] for n in numbers]), beta2, compute)
            scaled = lr * math.sqrt(max(1, columns / rows))
            for n, step, new in zip(numbers, step_kio, second, strict=True):
                held = p[n].astype(F32)
                cautious = jnp.where(step * held >= 0, held, 0)
                x[n], v[n] = (-scaled * (step + wd * cautious)).astype(p[n].dtype), new
        return tree.unflatten(x), MuonState(state.count + 1, momenta, tree.unflatten(v))

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Rates:
    """Highest learning rates by kind of parameter, Muon's weight decay, and how the rates move over a run."""

    matrix: float
    embed: float
    head: float
    gain: float
    decay: float = 0.0
    warmup: int = 40
    """Steps of linear warm-up; at most a tenth of the run."""
    warmdown: float = 0.65
    """Share of the steps, the last, over which every rate falls linearly to `final` of its highest."""
    final: float = 0.05

    def curve(self, steps: int) -> optax.Schedule:
        """The factor on every rate at step 0, 1, … of `steps`; the first is not zero."""
        up, down = max(1, min(self.warmup, steps // 10)), self.warmdown * steps

        def factor(step):
            step = jnp.asarray(step, F32)
            falling = self.final + (1 - self.final) * (steps - step) / max(down, 1.0)
            return jnp.clip(jnp.minimum((step + 1) / up, falling), 0.0, 1.0)

        return factor

    def momentum(self, steps: int) -> optax.Schedule:
        """Muon's: .85 to .97 over 400 steps, and down to .90 while the rates fall."""
        down = max(self.warmdown * steps, 1.0)

        def value(step):
            step = jnp.asarray(step, F32)
            return jnp.minimum(0.85 + 0.12 * step / 400, 0.97 - 0.07 * jnp.clip((step - steps + down) / down, 0.0, 1.0))

        return value


def kinds(params) -> Any:
    """The tree of "embed", "head", "gain" (vectors) and "matrix" that says which rule a parameter falls under."""

    def kind(path, leaf):
        name = next((key.key for key in path if getattr(key, "key", None) in ("embed", "head")), None)
        return name or ("matrix" if leaf.ndim == 2 else "gain")

    return jax.tree_util.tree_map_with_path(kind, params)


def muon_adamw(rates: Rates, steps: int, compute: str = "fp32") -> optax.GradientTransformation:
    """Muon on matrices and AdamW on the rest, over `steps` steps; betas and small decays are nanochat's."""
    curve = rates.curve(steps)

    def adamw(rate, b1, b2, decay):
        return optax.adamw(lambda step: rate * curve(step), b1=b1, b2=b2, eps=1e-10, weight_decay=decay)

    def decay(step):
        return rates.decay * 0.5 * (1 + jnp.cos(jnp.pi * jnp.asarray(step, F32) / steps))

    return optax.partition(
        {
            "matrix": muon(lambda step: rates.matrix * curve(step), rates.momentum(steps), decay, compute=compute),
            "embed": adamw(rates.embed, 0.8, 0.995, 0.001),
            "head": adamw(rates.head, 0.8, 0.96, 0.01),
            "gain": adamw(rates.gain, 0.8, 0.95, 0.0),
        },
        kinds,
    )
