"""`soulsmith sft`: fine-tune a model on conversations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from textwrap import indent
from typing import Annotated, Literal

import jax
import optax
import tyro

from model import checkpoint
from model.load import Loaded, load_model
from model.sampler import Sampler
from soul.console import console, plain
from soul.errors import UserError
from soul.files import write_atomic
from soul.template import Template
from training import lora, losses, mixture, preflight
from training.data import Example, Packed, example
from training.fit import Eval, TrainState, bits_per_byte
from training.mixture import Part, Source
from training.muon import MuonState, Rates, muon_adamw
from training.programs import Programs
from training.run import Setup, TrainConfig, setup, train
from training.tokenizer import token_bytes

EVALS = 4  # of the validation data in a run
SAMPLES, SAMPLE_TOKENS = 3, 64


@dataclass(frozen=True)
class Config:
    """Fine-tune a model on conversations; the result is OUT/sft."""

    out: Path
    """Run directory."""
    model: str = "smollm2-135m"
    """A model's name, a Hugging Face directory, or a directory that training wrote."""
    data: tuple[Path, ...] = ()
    """Files of conversations (Parquet or JSON), or hf:NAME; without any, OUT/data/sft.parquet."""
    mixture: Path | None = None
    """Instead of --data: a YAML file of sources with their weights."""
    validation: float = 0.01
    """Share of each source that is held out, at least a batch's worth; sources of fewer than 20 rows are trained on whole."""
    lora: int = 0
    """Rank of the adapters to train instead of the weights; 0 trains all weights."""
    warm_start: Literal["auto", "no"] = "auto"
    """auto: on a base that kept its pretraining optimizer (Muon), go on with it and its momenta; no: AdamW, as on any other base."""
    init_lr_frac: float = 0.8
    """Under a warm start, the share of pretraining's learning rates to begin with, at an equal batch; --optim is not used then."""
    preflight: bool = False
    """Check the data and show what would be trained, no more."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(config: Config) -> int:
    found = read(config)
    this = setup(config.model, config.train, config.out, "sft")
    parts = encode(this, found, config.validation)
    length, per_batch, seed = config.train.length, config.train.batch_rows, config.train.seed
    packed = Packed.build([item for part in parts for item in part.train], length, per_batch, seed)
    preflight.check_shares(packed.items)
    preflight.check_held_out(packed.items, [item for part in parts for item in part.held_out], seed)
    steps = this.steps(packed)
    preflight.summary(packed, this.template, "SFT", steps, parts)
    if config.preflight:
        console.print("nothing is wrong; nothing was trained (--preflight)")
        return 0
    model = lora.trained(this.loaded.model, config.lora, sorted(this.template.id.values()), seed)
    programs, frozen = Programs(model.logprobs, losses.nll, layout=this.layout, total=model.total), this.layout.put(model.frozen)
    meta = {"stage": "sft", "soul_hash": next((row["soul_hash"] for _, rows, _ in found for row in rows if row["soul_hash"]), "")}
    warm = warm_start(this, config, steps) if config.warm_start == "auto" and not config.lora else {}
    more = ({"lora": config.lora} if config.lora else {}) | ({"warm_start": config.init_lr_frac} if warm else {})
    code = train(this.job(
        packed, programs, packed.batch, more, meta | more, params=model.params, frozen=frozen, merge=model.merge,
        evals=evals(this, programs, frozen, parts, packed.supervised, steps, config.validation), **warm))  # fmt: skip
    if code == 0 and not (this.directory / "samples.md").exists():
        write_samples(load_model(this.directory, compute=config.train.compute), this.template, length, parts)
    return code


def read(config: Config) -> list[tuple[Source, list[dict], Counter]]:
    """Every source, its rows, and how many of it could not be used and why."""
    if config.mixture and config.data:
        raise UserError("--data and --mixture are two ways to say the same", fix="Give one of them.")
    paths = config.data or (config.out / "data" / "sft.parquet",)
    sources = mixture.read_mixture(config.mixture) if config.mixture else [Source(str(path)) for path in paths]
    found = [(source, *mixture.conversations(source)) for source in sources]
    if not any(rows for _, rows, _ in found):
        raise UserError("no rows to train on", where=", ".join(source.data for source in sources))
    return found


def encode(this: Setup, found: Sequence[tuple[Source, list[dict], Counter]], share: float) -> list[Part]:
    """Every row as tokens, checked, and the sources' parts. Raises UserError for a row that must not be trained on."""
    encoded, config = [], this.config
    for source, rows, unusable in found:
        preflight.check_rows(this.template, rows)
        items = [example(this.template, row["messages"], row["id"]) for row in rows]
        for item in items:
            preflight.check_example(this.template, item, this.vocab_size)
        encoded.append((source, items, unusable))
    return mixture.build(encoded, config.length, share, config.length * config.batch_rows, config.seed)


def warm_start(this: Setup, config: Config, steps: int) -> dict:
    """Muon and AdamW as in the base's pretraining, for a Job: the rates fall from a share of its own to 0 over the second half, without decay
    (nanochat), and with the root of the batch where that is smaller. Empty for a base that kept no optimizer state."""
    base, plan = this.loaded.path, this.loaded.meta.get("identity", {}).get("plan")
    if not plan or not (base / "checkpoints" / str(checkpoint.latest(base)) / "opt_state").is_dir():
        return {}
    batch = config.train.length * config.train.batch_rows * config.train.accumulate
    share = config.init_lr_frac * min(1.0, batch / (plan["length"] * plan["batch_rows"] * plan["accumulate"])) ** 0.5
    scaled = {name: share * plan["rates"][name] for name in ("matrix", "embed", "head", "gain")}
    rates = Rates(**scaled, decay=0.0, warmup=0, warmdown=0.5, final=0.0)
    console.print(f"going on with the optimizer of {base}, matrices from a rate of {rates.matrix:.2g} (--warm-start no: AdamW)")
    return {
        "optimizer": muon_adamw(rates, steps, this.loaded.model.compute), "rate": lambda step: rates.matrix * rates.curve(steps)(step),
        "warm": lambda fresh: warmed(fresh, checkpoint.restore(base, {"opt_state": fresh}, this.loaded.meta["step"])[1]["opt_state"]),
    }  # fmt: skip


def warmed(fresh, kept):
    """A kept optimizer state at the start of a new schedule. Adam's own count stays: its averages are full, and must not be corrected as if new."""

    def one(new, old):
        if isinstance(new, MuonState):
            return old._replace(count=new.count)
        return new if isinstance(new, optax.ScaleByScheduleState) else old

    return jax.tree.map(one, fresh, kept, is_leaf=lambda node: isinstance(node, (MuonState, optax.ScaleByScheduleState)))


def evals(this: Setup, programs: Programs, frozen, parts: Sequence[Part], supervised: int, steps: int, share: float) -> tuple[Eval, ...]:
    """Bits per byte of what is trained in each source's held-out rows; of many rows, those that make `share` of the run's tokens."""
    config, bytes_v = this.config, token_bytes(this.loaded.tokenizer)
    block, blocks = config.length * config.batch_rows, {}
    for part in parts:
        if shown := mixture.beginning(part.held_out, block * max(1.0, share * steps * config.accumulate)):
            packed = Packed.build(shown, config.length, config.batch_rows, config.seed, supervised)
            blocks[f"bpb {part.name}"] = [packed.block(n) for n in range(len(packed.blocks))]

    def run(step: int, state: TrainState) -> dict[str, float]:
        return {name: bits_per_byte(programs, state.params, batches, bytes_v, frozen) for name, batches in blocks.items()}

    return (Eval(run, -(-steps // EVALS)),) if blocks else ()


def write_samples(loaded: Loaded, template: Template, length: int, parts: Sequence[Part]) -> None:
    """Continue a few prompts, held out where there are any, greedily: to the terminal and OUT/sft/samples.md."""
    held_out = any(part.held_out for part in parts)
    rounds = zip_longest(*(part.held_out if held_out else part.train for part in parts))
    items: list[Example] = [item for item in chain.from_iterable(rounds) if item][:SAMPLES]
    prompts = [item.ids[: int(item.mask.argmax())].tolist() for item in items]
    sampler = Sampler(loaded.model, loaded.tokenizer, max_len=length + SAMPLE_TOKENS)
    made = sampler.generate(prompts, max_new=SAMPLE_TOKENS, stop_ids=template.stop_ids)
    text = f"# {'Held-out' if held_out else 'Training'} prompts, continued greedily for at most {SAMPLE_TOKENS} tokens\n"
    for item, ids, completion in zip(items, prompts, made, strict=True):
        prompt, reply = preflight.spelled(template, ids), preflight.spelled(template, completion.ids)
        console.print(plain(prompt[-240:], "dim"), plain(reply, "green"), sep="")
        text += f"\n## Row {item.row}\n\n" + indent(prompt, "    ") + "\n\nbecomes\n\n" + indent(reply, "    ") + "\n"
    write_atomic(loaded.path / "samples.md", text)
