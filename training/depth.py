"""One dial: from the depth follow width, heads, batch, learning rates, weight decay and how long to train."""

import math
from dataclasses import dataclass

import jax
from jax.nn.initializers import normal, ones, zeros

from model.config import ModelConfig
from model.load import build
from model.transformer import Decoder, param_table
from training.muon import Rates

REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # where nanochat's rates, decay and batch were measured
FEWEST_STEPS, FEWEST_TOKENS = 500, 2**11  # a short run wants steps more than a large batch; below 2,048 tokens a step is mostly the update


@dataclass(frozen=True)
class Plan:
    """What a depth means. `rates` already fit this batch and this horizon."""

    model: ModelConfig
    length: int
    batch_rows: int
    """Rows per micro-batch."""
    accumulate: int
    """Micro-batches per step."""
    steps: int
    rates: Rates

    @property
    def batch_tokens(self) -> int:
        return self.length * self.batch_rows * self.accumulate

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


def shape(
    depth: int, vocab_size: int, length: int, kv_heads: int | None = None, d_head: int | None = None, tied: bool = False
) -> ModelConfig:
    """A decoder of the Qwen3 family: 64 wide per layer (in steps of 128), an MLP of 8/3 the width, rows of the vocabulary to a multiple of 64.

    Heads are 128 wide, as nanochat's: half as many scores as with 64 (depth 4 on 2 CPU cores: gradients in 1.36 s instead of 1.51).
    UserError when `kv_heads` does not divide the heads.
    """
    d_model = -(-64 * depth // 128) * 128
    d_head = d_head or 128
    heads = d_model // d_head
    return ModelConfig(
        vocab_size=-(-vocab_size // 64) * 64, d_model=d_model, n_layers=depth, n_heads=heads, n_kv_heads=kv_heads or heads, d_head=d_head,
        d_ff=round(8 * d_model / 3 / 64) * 64, rope_theta=100_000.0, norm_eps=1e-6, qk_norm=True, tied=tied, max_len=length)  # fmt: skip


def parameters(model: ModelConfig) -> int:
    return sum(math.prod(spec.shape) for spec in param_table(model))


def scaling_params(model: ModelConfig) -> int:
    """Parameters of the matrices and the head: what a horizon is a multiple of. An embedding that is only looked up does not count."""
    specs = param_table(model)
    return sum(math.prod(spec.shape) for spec in specs if spec.path[-1][0] == "w" or spec.path[-1] == ("embed" if model.tied else "head"))


def dial(depth: int, vocab_size: int, *, length: int = 512, batch_rows: int = 16, ratio: float = 8.0, tokens: float | None = None,
         steps: int | None = None, batch_tokens: int | None = None, **model) -> Plan:  # fmt: skip
    """The plan of a depth. `model` are options of `shape`; `tokens` or `steps` set another horizon than `ratio` × scaling parameters.

    Laws (nanochat's, tuned at depth 12): batch 2^19 × (tokens / tokens at depth 12)^.383 (Power Lines, arXiv 2505.13738), to a power of two,
    but at least 500 steps; AdamW's rates × √(batch / 2^19) × (width / 768)^-½; weight decay so that rate · decay · steps stays (2405.13698), but no
    more than at depth 12. Muon's rate grows with √batch above 2^19 and does not shrink below: a matrix's step has the same length however noisy the
    gradient, and a short run wants it (600 steps of 2,048 tokens, depth 2, bits per byte of Python: .00125 as the law says 2.546, .005 2.399,
    .01 2.308, .02 2.232, .04 2.222).
    """
    config = shape(depth, vocab_size, length, **model)
    reference = ratio * scaling_params(shape(REFERENCE_DEPTH, vocab_size, length))
    horizon = tokens or ratio * scaling_params(config)
    if batch_tokens is None:
        law = REFERENCE_BATCH * (horizon / reference) ** 0.383
        batch_tokens = max(FEWEST_TOKENS, 2 ** min(round(math.log2(law)), math.floor(math.log2(horizon / FEWEST_STEPS))))
    rows = min(batch_rows, max(1, batch_tokens // length))
    accumulate = max(1, round(batch_tokens / (rows * length)))
    batch = rows * accumulate * length
    steps = steps or max(1, round(horizon / batch))
    by_batch = math.sqrt(batch / REFERENCE_BATCH)
    small = by_batch * (config.d_model / 768) ** -0.5  # on AdamW's rates
    matrix = 0.02 * max(1.0, by_batch)
    decay = 0.28 * min(1.0, 0.02 / matrix * reference / REFERENCE_BATCH / steps)
    rates = Rates(matrix=matrix, embed=0.3 * small, head=0.008 * small, gain=0.02, decay=decay)
    return Plan(config, length, rows, accumulate, steps, rates)


def fresh(config: ModelConfig, seed: int, compute: str = "auto") -> Decoder:
    """A decoder to pretrain: matrices uniform of deviation 1/√D, those that write to the residual stream zero, a head that starts near ln V.

    The embedding alone fills the stream at first, so its deviation is near one (a tied one serves as the head too and starts small).
    """
    wide = (3 / config.d_model) ** 0.5
    starts = {"embed": normal(0.02 if config.tied else 0.8), "head": normal(0.001), "wo": zeros, "w_down": zeros}

    def draw(key, spec):
        if (name := spec.path[-1]) in starts:
            return starts[name](key, spec.shape)
        return jax.random.uniform(key, spec.shape, minval=-wide, maxval=wide) if len(spec.shape) == 2 else ones(key, spec.shape)

    key = jax.random.key(seed)
    return build(config, {spec.path: draw(jax.random.fold_in(key, n), spec) for n, spec in enumerate(param_table(config))}, compute=compute)
