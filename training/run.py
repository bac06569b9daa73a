"""What the commands `pretrain`, `sft` and `dpo` share: settings, loading, resuming, the loop, saving."""

import hashlib
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from model import checkpoint, ops
from model.checkpoint import Saver
from model.config import ModelConfig
from model.load import Loaded, load_model
from model.tokenizer import Tokenizer
from soul.console import console
from soul.errors import UserError
from soul.files import read_json, write_json
from soul.template import Template
from training import preflight
from training.data import PACKING, Packed
from training.fit import Eval, Loop, TrainState, fit
from training.mesh import Layout, join, make_mesh
from training.optim import OptimConfig, adamw, schedule
from training.programs import Programs

UNTRAINED = ("checkpoint_minutes", "checkpoint_steps", "keep", "keep_every", "mesh")  # settings that the trained bits don't depend on


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
    """Minutes between checkpoints, each three times the weights (1.6 GB for 135M)."""
    checkpoint_steps: int = 0
    """Steps between checkpoints, beside the minutes; 0: by the clock only."""
    keep: int = 2
    """How many of the newest checkpoints stay while training goes on: the older one is for when the newest is damaged."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay for good; 0: none."""
    mesh: str = "auto"
    """Devices: auto, or sizes such as data=2,fsdp=4."""
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class Job:
    """One training, whatever its stage: what `train` needs to start it, go on with it and save what came out.

    `params` is what is trained and `frozen` what is not (None, or the base under adapters); `merge(params)` gives the weights of the model
    to save. `warm(opt_state)` may replace the fresh optimizer state.
    """

    directory: Path
    steps: int
    batches: Callable[[int], dict]
    programs: Programs
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    params: Any
    identity: dict
    """What makes this run this run: a directory that holds another one is refused."""
    model: ModelConfig
    tokenizer: Tokenizer
    meta: dict
    config: TrainConfig
    frozen: Any = None
    merge: Callable[[Any], Any] = lambda params: params
    warm: Callable[[Any], Any] = lambda opt_state: opt_state
    evals: tuple[Eval, ...] = ()
    keep_optimizer: bool = False
    """Keep the optimizer's state beside the final weights, for a next stage to start from."""


@dataclass(frozen=True)
class Setup:
    """A loaded base and where its training goes: OUT/sft or OUT/dpo."""

    loaded: Loaded
    template: Template
    config: TrainConfig
    directory: Path
    layout: Layout

    @property
    def vocab_size(self) -> int:
        return self.loaded.config.vocab_size

    def job(self, packed: Packed, programs: Programs, batches: Callable[[int], dict], settings: dict, meta: dict, **more: Any) -> Job:
        """The training of this base, by AdamW unless `more` says otherwise; it names `params`."""
        steps, config = self.steps(packed), self.config
        return Job(**{
            "directory": self.directory, "steps": steps, "batches": batches, "programs": programs, "optimizer": adamw(config.optim, steps),
            "rate": schedule(config.optim, steps), "identity": identity_of(self, packed, settings), "model": self.loaded.config,
            "tokenizer": self.loaded.tokenizer, "meta": self.loaded.meta | meta, "config": config, **more})  # fmt: skip

    def steps(self, packed: Packed) -> int:
        """Optimizer steps for the epochs asked, or fewer where `max_tokens` says so."""
        per_step = self.config.accumulate * packed.tokens / len(packed.blocks)
        wanted = self.config.epochs * packed.tokens
        tokens = min(wanted, self.config.max_tokens or wanted)
        return max(1, round(tokens / per_step))


def setup(model: str, config: TrainConfig, out: Path, stage: str) -> Setup:
    """Load the base and check its template. Raises UserError where it doesn't fit."""
    ops.enable_compile_cache()
    join()
    loaded = load_model(model, dtype=jnp.float32, compute=config.compute)
    if loaded.meta.get("steps", 0) > loaded.meta.get("step", 0):
        raise UserError(f"is at step {loaded.meta['step']} of {loaded.meta['steps']}", where=loaded.path, fix="Finish its training first.")
    template = Template(loaded.tokenizer)
    preflight.check_template(template, loaded.config.vocab_size)
    if config.length > loaded.config.max_len:
        raise UserError(f"--length {config.length} is more than the model's {loaded.config.max_len}")
    state_bytes = 16 * sum(p.size for p in jax.tree.leaves(nnx.split(loaded.model)[1]))  # fp32 weights, gradients, two moments
    layout = Layout(make_mesh(config.mesh, accumulate=config.accumulate, state_bytes=state_bytes), loaded.config)
    return Setup(loaded, template, config, out / stage, layout)


def data_hash(packed: Packed) -> str:
    """Over ids and masks in order: what is trained, whatever file it came from."""
    digest = hashlib.sha256()
    for item in packed.items:
        for branch in item.branches:
            digest.update(np.int64(len(branch)).tobytes() + branch.ids.tobytes() + branch.mask.tobytes())
    return digest.hexdigest()


def train(job: Job) -> int:
    """Train, or go on with a run that was stopped; afterwards `directory` is a model that `load_model` reads. Gives the exit code.
    Raises UserError when the directory holds a run with another `identity`: its checkpoint must not be gone on with.
    """
    config, steps, out = job.config, job.steps, job.directory
    weights = "params" if job.frozen is None else "adapters"  # adapters alone are no model that load_model could read
    _check_identity(out, job.identity | {"steps": steps})
    if (start := checkpoint.latest(out) or 0) >= steps:
        console.print(f"{out} is already trained ({steps} steps)")
        return 0
    layout = job.programs.layout
    params, frozen = layout.put(job.params), layout.put(job.frozen)
    state = TrainState(params, layout.put(job.warm(layout.init(job.optimizer.init, params))))
    checkpoint.describe(out, job.model, job.tokenizer, job.meta | {"steps": steps, "identity": job.identity})
    if start:
        start, items = checkpoint.restore(out, {weights: state.params, "opt_state": state.opt_state})
        state = TrainState(items[weights], items["opt_state"])
        console.print(f"going on at step {start} of {steps}")
    with Saver(out, config.keep, config.keep_every) as saver:
        loop = Loop(
            steps, save=lambda step, now: saver.save(step, {weights: now.params, "opt_state": now.opt_state}),
            metrics=out / (f"metrics-{jax.process_index()}.jsonl" if jax.process_index() else "metrics.jsonl"),
            accumulate=config.accumulate, checkpoint_minutes=config.checkpoint_minutes, checkpoint_steps=config.checkpoint_steps,
            rate=lambda step: float(job.rate(step)), title=out.name,
            evals=(*job.evals, Eval(lambda step, state: {"peak_gb": peak_bytes() / 1e9})))  # fmt: skip
        state, step = fit(job.programs, job.optimizer, state, job.batches, loop, start=start, frozen=frozen)
    if step < steps:
        console.print(f"stopped at step {step} of {steps}. Go on with: soulsmith {out.name} --config {out}.json")
        return 130
    final = state.params if job.frozen is None else layout.put(job.merge(layout.whole(state.params)))
    kept = {"opt_state": state.opt_state} if job.keep_optimizer else {}
    checkpoint.save(out, steps, {"params": final} | kept, keep=1, keep_every=config.keep_every)
    console.print(f"model: {out}")
    return 0


def peak_bytes() -> int:
    """The most memory this process has had: of the first accelerator, or resident on the host."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check_identity(directory: Path, identity: dict) -> None:
    path = directory / "identity.json"
    if path.exists():
        before = read_json(path)
        if changed := sorted(key for key in identity | before if identity.get(key) != before.get(key)):
            what = f"holds a run with other {', '.join(changed)}"
            raise UserError(what, where=directory, fix="Choose another --out, or delete that directory.")
    write_json(path, identity)


def identity_of(this: Setup, packed: Packed, more: dict) -> dict:
    settings = {name: value for name, value in asdict(this.config).items() if name not in UNTRAINED}
    settings |= {"compute": this.loaded.model.compute, "packing": PACKING}
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.split(this.loaded.model)[1]):
        weights.update(np.asarray(leaf))
    return {"settings": settings | more, "data": data_hash(packed), "weights": weights.hexdigest(), "template": this.template.hash}
