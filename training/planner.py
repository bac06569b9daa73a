"""`soulsmith plan-train`: measure this machine for some seconds, then say what fits, how fast each stage will be, and how long it takes.

Real steps of the real width, vocabulary and batch are run with 4 and 8 layers, through the programs and optimizers of training, and time and memory
are extrapolated in the number of layers. The assumption is that every layer costs the same and that the rest is in both probes alike.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.table import Table

from model import checkpoint, ops
from model.config import ModelConfig
from model.load import find, read_base
from model.tokenizer import Tokenizer, adopt
from model.transformer import Decoder, param_table
from soul.console import output, progress
from soul.errors import UserError
from soul.files import read_json, write_json
from soul.machine import free_memory, resident
from soul.settings import config_from_json
from soul.template import SPECIAL_TOKENS, Template
from training import dpo, losses, preflight, pretrain, sft
from training.data import Example, Packed, Pair, as_batch, load_rows, pair
from training.depth import parameters
from training.fit import TrainState, updater
from training.lora import trained
from training.losses import Preference
from training.muon import muon_adamw
from training.optim import adamw
from training.programs import Programs

PROBES = (4, 8)  # layers. In the shape of SmolLM2-135M the first few cost a fifth less than later ones (cache, probably)
FULL = 0.9  # share of the available memory that a plan may fill
CODE = 22e6  # bytes that compiling a layer leaves behind in a process on CPU (0.66 GB for 30 layers)
PEAKS = {  # dense bf16 TFLOP/s as the makers publish them, by a piece of jax's device_kind; the first that matches
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6": 918,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Measure this machine and plan the stages of training: memory, speed, hours."""

    out: Path | None = None
    """Run directory: its data and settings are planned with, and the plan is saved there."""
    model: str = "smollm2-135m"
    """The model to tune."""
    depth: int | None = None
    """Plan for the model that `pretrain --depth` makes, instead of --model."""
    vocab_size: int = 32_768
    """Of --depth, where the run has no corpus yet."""
    stages: tuple[Literal["pretrain", "sft", "dpo"], ...] = ()
    """Which stages; without any, sft and dpo, and with --depth pretrain too."""
    length: int | None = None
    """Tokens per row; without it, as the stage's settings say."""
    batch_rows: int | None = None
    """Rows per micro-batch, if they fit; without it, as the stage's settings say."""
    tokens: int | None = None
    """Tokens to train on in each stage; without it, those of the run's data, and the dial's in pretraining."""
    share: float = 0.4
    """Supervised share of tokens in SFT and DPO where there is no data yet."""
    seconds: float = 20.0
    """How long to measure, compiling included."""


@dataclass(frozen=True)
class Stage:
    """What has to be known of a stage to measure it."""

    name: str
    model: ModelConfig
    optimizer: optax.GradientTransformation
    batch: Callable[[int], tuple[dict, float]]
    """rows -> a micro-batch, and how many real tokens such a one has on average."""
    rows: int
    accumulate: int
    tokens: float | None
    """All tokens to train on, where that is known."""
    compute: str
    lora: int = 0
    control: Sequence[int] = ()
    preference: Preference | None = None


@dataclass(frozen=True)
class Plan:
    """One stage as planned. What is not known, or not measured because nothing fits, is None."""

    stage: str
    params: int
    fits: bool
    peak_bytes: int
    available_bytes: int
    rows: int
    accumulate: int
    tokens: float | None
    step_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    hours: float | None = None


def main(config: Config, clock: Callable[[], float] = time.perf_counter) -> int:
    start = clock()
    ops.enable_compile_cache()
    wanted = stages(config)
    peak, base, plans = peak_flops(wanted[0].compute, clock), resident(), []
    with progress("measuring", len(wanted), "stages") as show:
        for n, stage in enumerate(wanted):
            show(n, stage.name)
            left = config.seconds - (clock() - start)
            plans.append(measure(stage, base, peak, clock() + left / (len(wanted) - n), clock))
        show(len(wanted))
    output.print(table(plans, peak))
    if config.out:
        saved = {"device": jax.devices()[0].device_kind, "peak_flops": peak, "stages": [asdict(plan) for plan in plans]}
        write_json(config.out / "training_plan.json", saved)
    return 0


# ---- what will be trained


def stages(config: Config) -> list[Stage]:
    """The stages asked for. Raises UserError where there is nothing to plan."""
    preflight.check_positive(config, "length", "batch_rows", "tokens", "depth", "vocab_size")
    if config.depth is None and "pretrain" in config.stages:
        raise UserError("pretraining is planned by its depth", fix="Give --depth.")
    names = config.stages or (("sft", "dpo") if config.depth is None else ("pretrain", "sft", "dpo"))
    if config.depth is None:
        model, tokenizer = described(config.model)
    else:
        corpus = (config.out or Path()) / "corpus"
        tokenizer = Tokenizer.load(corpus) if config.out and (corpus / "tokenizer.json").exists() else None
        config = replace(config, vocab_size=tokenizer.vocab_size if tokenizer else config.vocab_size)
        model = settings(config, "pretrain").plan(config.vocab_size).model
    return [pretraining(config) if name == "pretrain" else tuning(config, name, model, tokenizer) for name in names]


def settings(config: Config, name: str):
    """The Config of a stage: its defaults, what the run directory has saved of them, and what was asked for here."""
    module, out = {"pretrain": pretrain, "sft": sft, "dpo": dpo}[name], config.out or Path()
    path = out / f"{name}.json"
    command = config_from_json(module.Config, read_json(path), str(path)) if config.out and path.exists() else module.Config(out=out)
    asked = {key: value for key in ("length", "batch_rows") if (value := getattr(config, key))}
    return replace(command, depth=config.depth, **asked) if name == "pretrain" else replace(command, train=replace(command.train, **asked))


def described(name: str) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a model as training would load it, without its weights."""
    path = find(name)
    if (path / "checkpoints").is_dir():
        return checkpoint.read_description(path)[:2]
    config, tokenizer, _ = read_base(path)
    tokenizer = adopt(tokenizer)
    return replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)), tokenizer


def pretraining(config: Config) -> Stage:
    command = settings(config, "pretrain")
    plan = command.plan(config.vocab_size, **({"tokens": config.tokens} if config.tokens else {}))
    compute, rng = ops.resolve_compute(command.compute), np.random.default_rng(0)

    def batch(rows: int) -> tuple[dict, float]:
        return as_batch(rng.integers(0, config.vocab_size, (rows, plan.length + 1)), rows), rows * plan.length

    optimizer = muon_adamw(plan.rates, plan.steps, compute)
    return Stage("pretrain", plan.model, optimizer, batch, plan.batch_rows, plan.accumulate, plan.tokens, compute)


def tuning(config: Config, name: str, model: ModelConfig, tokenizer: Tokenizer | None) -> Stage:
    """SFT or DPO, on the run's own data where it has some."""
    command = settings(config, name)
    train, preference = command.train, dpo.preference_of(command) if name == "dpo" else None
    template = tokenizer and Template(tokenizer)
    found = items_of(command, model, template) if config.out and template else None
    items = found or random_items(name == "dpo", train.length, train.batch_rows, config.share, model.vocab_size)

    def batch(rows: int) -> tuple[dict, float]:
        packed = Packed.build(items, train.length, rows, train.seed)
        more = {"reference": np.full(packed.supervised, -10.0, np.float32)} if packed.paired else {}
        return packed.block(0) | more, packed.tokens / len(packed.blocks)

    tokens = min(train.epochs * Packed.build(items, train.length, 1, 0).tokens, train.max_tokens or np.inf) if found else train.max_tokens
    control = sorted(template.id.values()) if template else range(len(SPECIAL_TOKENS))
    return Stage(name, model, adamw(train.optim, 1000), batch, train.batch_rows, train.accumulate, config.tokens or tokens,
                 ops.resolve_compute(train.compute), command.lora, control, preference)  # fmt: skip


def items_of(command: sft.Config | dpo.Config, model: ModelConfig, template: Template) -> list | None:
    """The examples or pairs that a run would train on; None before there is data."""
    files = command.data or (command.out / "data" / ("sft.parquet" if isinstance(command, sft.Config) else "preference.parquet"),)
    if isinstance(command, dpo.Config):
        rows = load_rows(files, "preference") if all(path.exists() for path in files) else []
        return dpo.packs([pair(template, row) for row in rows], command)[0].items if rows else None
    if not (command.mixture or command.data or files[0].exists()):
        return None
    like = SimpleNamespace(template=template, vocab_size=model.vocab_size, config=command.train)
    return [item for part in sft.encode(like, sft.read(command), command.validation) for item in part.train]


def random_items(paired: bool, length: int, rows: int, share: float, vocab_size: int) -> list:
    """Examples or pairs that fill their rows."""
    rng = np.random.default_rng(0)

    def one() -> Example:
        mask = (rng.random(length) < share).astype(np.int32)
        mask[0] = 0
        return Example(rng.integers(0, vocab_size, length).astype(np.int32), mask)

    return [Pair(one(), one(), 1) if paired else one() for _ in range(rows)]


# ---- measuring


class Probe:
    """Steps of a stage at `layers` layers, with random weights."""

    def __init__(self, stage: Stage, layers: int):
        self.layers = layers
        base = Decoder(replace(stage.model, n_layers=layers), nnx.Rngs(0), compute=stage.compute)
        part = trained(base, stage.lora, stage.control, 0)
        self.programs = Programs(part.logprobs, stage.preference or losses.nll, fused=stage.preference is None, total=part.total)
        self.frozen, self.update = part.frozen, updater(stage.optimizer)
        self.state = TrainState(part.params, jax.jit(stage.optimizer.init)(part.params))

    def memory(self, batch: dict) -> np.ndarray:
        """Bytes of the state, of gradients, and at the peak of a gradient and of an update beside the state, as the compiler planned them."""
        p, params, frozen = self.programs, self.state.params, self.frozen
        value, grads = jax.eval_shape(p.gradients, params, frozen, batch)
        if p.fused:
            gradient = planned(p.whole, params, frozen, batch)
        else:
            logp, pullback = jax.eval_shape(p.forward, params, frozen, batch)
            gradient = max(planned(p.forward, params, frozen, batch), size(pullback) + planned(p.backward, params, pullback, logp))
        update = size(grads) + planned(self.update, self.state, grads, value)
        return np.array([size((self.state, frozen)), size(grads), gradient, update], float)

    def seconds(self, batch: dict, clock: Callable[[], float]) -> np.ndarray:
        """Of a gradient, of adding another one to it, of an update, and of a forward where a reference is needed."""

        def timed(function, *args):
            start = clock()
            result = jax.block_until_ready(function(*args))
            return result, clock() - start

        p, params = self.programs, self.state.params
        (value, grads), gradient_s = timed(p.gradients, params, self.frozen, batch)
        forward_s = 0.0 if p.fused else timed(p.forward, params, self.frozen, batch)[1]
        grads, add_s = timed(p.add, grads, jax.tree.map(jnp.copy, grads))
        (self.state, _), update_s = timed(self.update, self.state, grads, value)
        return np.array([gradient_s, add_s, update_s, forward_s])


def planned(program, *args) -> int:
    """Bytes that a program takes beside its arguments."""
    plan = program.lower(*args).compile().memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(stage: Stage, base: int, peak: float, deadline: float, clock: Callable[[], float]) -> Plan:
    """Find the micro-batch that fits, then time steps until the deadline, two at least. `base`: what the process takes without a model."""
    depth, rows = stage.model.n_layers, stage.rows
    probes = [Probe(stage, layers) for layers in sorted({min(layers, depth) for layers in PROBES})]
    on_cpu = jax.default_backend() == "cpu"
    limit, fixed = (available() + resident(), base + CODE * depth) if on_cpu else (available(), 0)
    while True:
        batch, tokens = stage.batch(rows)
        accumulate = stage.accumulate * -(-stage.rows // rows)
        state, grads, gradient, update = extrapolate(probes, [probe.memory(batch) for probe in probes], depth)
        active = max(gradient + (grads if accumulate > 1 else 0), update)
        need = fixed + state + size(batch) + active
        if (fits := need <= FULL * limit) or rows == 1:
            break
        most = min(rows - 1, rows * (FULL * limit - need + active) / active)  # as if all of it grew with the rows: errs on the small side
        rows = 2 ** int(np.log2(max(1, most)))
    plan = Plan(stage.name, parameters(stage.model), bool(fits), int(need), int(limit), rows, accumulate, stage.tokens)
    if not fits:
        return plan
    placed = jax.device_put(batch)
    gradient_s, add_s, update_s, forward_s = extrapolate(probes, sampled(probes, placed, deadline, clock), depth)
    step = accumulate * gradient_s + (accumulate - 1) * add_s + update_s
    speed = accumulate * tokens / step
    hours = stage.tokens and float(stage.tokens / speed + stage.tokens / tokens * forward_s) / 3600
    mfu = float(speed * flops_per_token(stage.model, batch, tokens) / peak)
    return replace(plan, step_s=float(step), tokens_per_s=float(speed), mfu=mfu, hours=hours)


def sampled(probes: list[Probe], batch: dict, deadline: float, clock: Callable[[], float]) -> list[np.ndarray]:
    """Median times of each probe; they take turns, so that a busy moment of the machine meets all of them."""
    for probe in probes:
        probe.seconds(batch, clock)  # the first is slower
    times = []
    while len(times) < 2 or clock() < deadline:
        times.append([probe.seconds(batch, clock) for probe in probes])
    return list(np.median(times, axis=0))


def extrapolate(probes: list[Probe], values: list[np.ndarray], depth: int) -> np.ndarray:
    """What `values` of the probes come to at `depth` layers; another layer never costs less than nothing."""
    low, high = probes[0].layers, probes[-1].layers
    return values[0] + np.maximum(0.0, values[-1] - values[0]) * ((depth - low) / max(1, high - low))


def flops_per_token(config: ModelConfig, batch: dict, tokens: float) -> float:
    """Model FLOPs of forward and backward per token: 6 for each weight of the layers' matrices, 6·V·D for each predicted token, and 12·L·H·h for
    each key that a token sees. So the masked half of causal attention, other segments and whatever is computed twice count for nothing."""
    weights = sum(int(np.prod(spec.shape)) for spec in param_table(config) if spec.path[0] == "layers" and len(spec.shape) == 2)
    seen = batch["positions"][batch["segments"] > 0].mean() + 1 if "segments" in batch else (batch["ids"].shape[1] + 1) / 2
    predicted = batch["weights"].sum() / tokens
    return 6 * weights + 6 * config.vocab_size * config.d_model * predicted + 12 * config.n_layers * config.n_heads * config.d_head * seen


# ---- the machine


def peak_flops(compute: str, clock: Callable[[], float], n: int = 1024) -> float:
    """FLOP/s that MFU is a share of: a known accelerator's published bf16 number, otherwise the best of 50 products n×n here."""
    if known := next((value for name, value in PEAKS.items() if name in jax.devices()[0].device_kind), None):
        return known * 1e12
    x, best = jnp.ones((n, n), jnp.bfloat16 if compute == "bf16" else jnp.float32), np.inf
    product = jax.jit(lambda a, b: ops.matmul(a, b, compute))
    jax.block_until_ready(product(x, x))
    for _ in range(50):
        start = clock()
        jax.block_until_ready(product(x, x))
        best = min(best, clock() - start)
    return 2 * n**3 / max(best, 1e-9)


def available() -> int:
    """Bytes that could be taken now: of the accelerator, or of the host."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else free_memory()


def table(plans: list[Plan], peak: float) -> Table:
    out = Table(title=f"{jax.devices()[0].device_kind}, at most {peak / 1e12:,.2f} TFLOP/s", title_justify="left")
    for name in ("stage", "parameters", "memory", "micro-batch", "tokens/s", "MFU", "hours"):
        out.add_column(name, justify="left" if name == "stage" else "right")
    for p in plans:
        need = f"{p.peak_bytes / 1e9:.1f} of {p.available_bytes / 1e9:.1f} GB"
        speed = (f"{p.tokens_per_s:,.0f}", f"{p.mfu:.0%}", f"{p.hours:.3g}" if p.hours else "–") if p.fits else ("does not fit", "", "")
        out.add_row(p.stage, f"{p.params / 1e6:,.1f} M", need, f"{p.rows} × {p.accumulate}", *speed)
    return out
