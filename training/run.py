"""What the commands `sft` and `dpo` share: settings, loading, resuming, the loop, saving."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import checkpoint, ops
from model.load import Loaded, load_model, save_model
from soul.console import console
from soul.errors import UserError
from soul.files import read_json, write_json
from soul.template import Template
from training import preflight
from training.data import Packed, Pair
from training.fit import FitConfig, Hooks, Programs, TrainState, fit
from training.optim import OptimConfig, adamw, schedule


@dataclass(frozen=True)
class TrainConfig:
    """Settings of every kind of training."""

    length: int = 512
    """Tokens per packed row. Longer rows of data are dropped and counted."""
    batch_rows: int = 4
    """Packed rows per micro-batch (for pairs: of each branch)."""
    accumulate: int = 1
    """Micro-batches per step."""
    epochs: float = 1.0
    max_tokens: int | None = None
    """Stop after about so many tokens, and fit the learning rate's way down to that."""
    seed: int = 0
    compute: str = "auto"
    """How products are taken: auto, fp32 or bf16 (weights and optimizer are always fp32)."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints, each three times the weights (1.6 GB for 135M); the newest is kept."""
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class Setup:
    """A loaded base and where its training goes: OUT/sft or OUT/dpo."""

    loaded: Loaded
    template: Template
    config: TrainConfig
    directory: Path
    command: str

    @property
    def vocab_size(self) -> int:
        return self.loaded.config.vocab_size

    def steps(self, packed: Packed) -> int:
        """Optimizer steps for the epochs asked, or fewer where `max_tokens` says so."""
        per_step = self.config.accumulate * packed.tokens / len(packed.blocks)
        wanted = self.config.epochs * packed.tokens
        tokens = min(wanted, self.config.max_tokens or wanted)
        return max(1, round(tokens / per_step))


def setup(model: str, config: TrainConfig, out: Path, stage: str) -> Setup:
    """Load the base and check its template. Raises UserError where it doesn't fit."""
    ops.enable_compile_cache()
    loaded = load_model(model, dtype=jnp.float32, compute=config.compute)
    if loaded.meta.get("steps", 0) > loaded.meta.get("step", 0):
        raise UserError(f"is at step {loaded.meta['step']} of {loaded.meta['steps']}", where=loaded.path, fix="Finish its training first.")
    template = Template(loaded.tokenizer)
    preflight.check_template(template, loaded.config.vocab_size)
    if config.length > loaded.config.max_len:
        raise UserError(f"--length {config.length} is more than the model's {loaded.config.max_len}")
    return Setup(loaded, template, config, out / stage, f"soulsmith {stage} --config {out / stage}.json")


def weights_hash(params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf))
    return digest.hexdigest()


def data_hash(packed: Packed) -> str:
    """Over ids and masks in order: what is trained, whatever file it came from."""
    digest = hashlib.sha256()
    for item in packed.items:
        for branch in (item.chosen, item.rejected) if isinstance(item, Pair) else (item,):
            digest.update(np.int64(len(branch)).tobytes() + branch.ids.tobytes() + branch.mask.tobytes())
    return digest.hexdigest()


def train(this: Setup, packed: Packed, programs: Programs, batches: Callable[[int], dict], identity: dict, meta: dict) -> int:
    """Train, or go on with a run that was stopped; afterwards `directory` is a model that `load_model` reads. Gives the exit code.

    Raises:
        UserError: when the directory holds a run with another `identity`: its checkpoint must not be gone on with.
    """
    config, steps, out = this.config, this.steps(packed), this.directory
    _check_identity(out, identity | {"steps": steps})
    if (start := checkpoint.latest(out) or 0) >= steps:
        console.print(f"{out} is already trained ({steps} steps)")
        return 0
    graph, params = nnx.split(this.loaded.model)
    optimizer = adamw(config.optim, steps)
    state = TrainState(params, jax.jit(optimizer.init)(params))
    meta = this.loaded.meta | meta | {"steps": steps, "identity": identity}
    checkpoint.describe(out, this.loaded.config, this.loaded.tokenizer, meta)
    if start:
        start, items = checkpoint.restore(out, vars(state))
        state = TrainState(**items)
        console.print(f"going on at step {start} of {steps}")
    rate, limits = schedule(config.optim, steps), FitConfig(steps, config.accumulate, config.checkpoint_minutes)
    hooks = Hooks(
        save=lambda step, now: checkpoint.save(out, step, vars(now), keep=1),
        metrics=out / "metrics.jsonl", rate=lambda step: float(rate(step)), title=out.name)  # fmt: skip
    state, step = fit(programs, optimizer, state, batches, limits, hooks, start=start)
    if step < steps:
        console.print(f"stopped at step {step} of {steps}. Go on with: {this.command}")
        return 130
    save_model(out, nnx.merge(graph, state.params), this.loaded.tokenizer, meta, step=steps)
    console.print(f"model: {out}")
    return 0


def _check_identity(directory: Path, identity: dict) -> None:
    path = directory / "identity.json"
    if path.exists():
        before = read_json(path)
        if changed := sorted(key for key in identity | before if identity.get(key) != before.get(key)):
            raise UserError(
                f"holds a run with other {', '.join(changed)}", where=directory, fix="Choose another --out, or delete that directory."
            )
    write_json(path, identity)


def identity_of(this: Setup, packed: Packed, more: dict) -> dict:
    settings = asdict(this.config) | {"compute": this.loaded.model.compute}
    del settings["checkpoint_minutes"]
    _, params = nnx.split(this.loaded.model)
    return {"settings": settings | more, "data": data_hash(packed), "weights": weights_hash(params), "template": this.template.hash}
