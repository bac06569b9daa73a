"""`soulsmith sft`: fine-tune a model on conversations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from flax import nnx

from training import losses, preflight
from training.data import Packed, example, load_rows
from training.programs import Programs, plain_logprobs
from training.run import TrainConfig, setup, train


@dataclass(frozen=True)
class Config:
    """Fine-tune a model on conversations; the result is OUT/sft."""

    out: Path
    """Run directory."""
    model: str = "smollm2-135m"
    """A model's name, a Hugging Face directory, or a directory that training wrote."""
    data: tuple[Path, ...] = ()
    """Parquet files of conversations; without any, OUT/data/sft.parquet."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(config: Config) -> int:
    rows = load_rows(config.data or (config.out / "data" / "sft.parquet",), "sft")
    this = setup(config.model, config.train, config.out, "sft")
    preflight.check_rows(this.template, rows)
    items = [example(this.template, row["messages"], row["id"]) for row in rows]
    for item in items:
        preflight.check_example(this.template, item, this.vocab_size)
    packed = Packed.build(items, config.train.length, config.train.batch_rows, config.train.seed)
    preflight.summary(packed, this.template, "SFT", this.steps(packed))
    graph, _ = nnx.split(this.loaded.model)
    meta = {"stage": "sft", "soul_hash": rows[0]["soul_hash"]}
    return train(this.job(packed, Programs(plain_logprobs(graph), losses.nll), packed.batch, {}, meta))
