"""`soulsmith dpo`: preference-tune a model on chosen/rejected pairs."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from flax import nnx

from soul.console import progress
from soul.files import sha256_json, write_atomic
from training import losses, preflight
from training.data import Packed, load_rows, pair
from training.optim import OptimConfig
from training.programs import Programs, plain_logprobs
from training.run import TrainConfig, identity_of, setup, train


@dataclass(frozen=True)
class Config:
    """Preference-tune a model on chosen/rejected pairs; the result is OUT/dpo."""

    out: Path
    """Run directory."""
    model: str | None = None
    """A model's name or directory; without one, OUT/sft."""
    data: tuple[Path, ...] = ()
    """Parquet files of pairs; without any, OUT/data/preference.parquet."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round."""
    nll: float = 0.0
    """Weight of the chosen branch's mean NLL beside the preference loss: keeps its likelihood from falling."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(batch_rows=2, optim=OptimConfig(lr=1e-5, warmup=0.1))
    )


def main(config: Config) -> int:
    rows = load_rows(config.data or (config.out / "data" / "preference.parquet",), "preference")
    this = setup(config.model or str(config.out / "sft"), config.train, config.out, "dpo")
    preflight.check_rows(this.template, rows)
    items = [pair(this.template, row) for row in rows]
    for item in items:
        preflight.check_pair(this.template, item, this.vocab_size)
    packed = Packed.build(items, config.train.length, config.train.batch_rows, config.train.seed)
    preflight.summary(packed, this.template, "DPO", this.steps(packed))
    settings = {"beta": config.beta, "smoothing": config.smoothing, "nll": config.nll}
    graph, params = nnx.split(this.loaded.model)
    programs = Programs(plain_logprobs(graph), losses.dpo(config.beta, config.smoothing, config.nll), fused=False)
    needed = sorted({packed.block_of(k) for k in range(this.steps(packed) * config.train.accumulate)})
    reference = reference_logprobs(this.directory, packed, needed, programs, params, identity_of(this, packed, settings))

    def batch(k: int) -> dict:
        number = packed.block_of(k)
        return packed.block(number) | {"reference": reference[number]}

    check_first_batch(programs, params, batch(0), config)
    return train(this.job(packed, programs, batch, settings, {"stage": "dpo", "soul_hash": rows[0]["soul_hash"]}))


def reference_logprobs(directory: Path, packed: Packed, needed: list[int], programs: Programs, params, identity: dict) -> np.ndarray:
    """log p of the supervised tokens of the `needed` blocks under the starting weights, blocks × N, by the program that training uses.

    Kept in `directory` under a key of weights, data, template, arithmetic and packing; a block that is not known yet is NaN there.
    """
    settings = {name: identity["settings"][name] for name in ("length", "batch_rows", "seed", "compute")}
    key = sha256_json({**identity, "settings": settings, "jax": jax.__version__, "device": jax.devices()[0].device_kind})
    path = directory / f"reference-{key[:16]}.npy"
    out = np.full((len(packed.blocks), packed.supervised), np.nan, np.float32)
    if path.exists():
        known = np.load(path, allow_pickle=False)
        if known.shape == out.shape and known.dtype == out.dtype:
            out = known
    if missing := [number for number in needed if np.isnan(out[number, 0])]:
        with progress("reference", len(missing), "batches") as show:
            for done, number in enumerate(missing):
                show(done)
                out[number] = programs.forward(params, None, jax.device_put(packed.block(number)))[0]
            show(len(missing))
        file = io.BytesIO()
        np.save(file, out, allow_pickle=False)
        write_atomic(path, file.getvalue())
    return out


def check_first_batch(programs: Programs, params, batch: dict, config: Config) -> None:
    """Policy and reference are the same weights before the first step: refuse (UserError) unless the loss says so."""
    known = {name: value for name, value in batch.items() if name != "reference"}
    logp_n, _ = programs.forward(params, None, jax.device_put(known))
    margins = losses.margins(logp_n, batch, config.beta)
    preflight.check_step_zero(np.asarray(margins), np.asarray(losses.sigmoid(margins, config.smoothing)))
