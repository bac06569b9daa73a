"""`soulsmith dpo`: preference-tune a model on chosen/rejected pairs."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from soul.console import console, plain, progress
from soul.errors import UserError
from soul.files import sha256_json, write_atomic
from soul.template import Template
from training import preflight
from training.data import Packed, Pair, load_rows, pair, unframed
from training.fit import Eval, TrainState, read_metrics
from training.ledger import Sights, displacement, ledger, report, slots
from training.lora import Trained, trained
from training.losses import BETAS, SMOOTHED, Preference, by_branch
from training.mesh import Layout
from training.mixture import hold_out, prompt_key
from training.optim import OptimConfig
from training.programs import Logprobs, Programs
from training.run import TrainConfig, data_hash, identity_of, setup, train

FEW = 40  # pairs, of which none are held out
CHECKS = 5  # how often the guard looks
SCORED = 16  # a held-out batch is scored (twice) for so many trained ones: a sixteenth of the forward passes


@dataclass(frozen=True)
class Config:
    """Preference-tune a model on chosen/rejected pairs; the result is OUT/dpo."""

    out: Path
    """Run directory."""
    model: str | None = None
    """A model's name or directory; without one, OUT/sft."""
    data: tuple[Path, ...] = ()
    """Parquet files of pairs; without any, OUT/data/preference.parquet."""
    loss: Literal["sigmoid", "ipo", "sigmoid_norm", "simpo", "apo_zero"] = "sigmoid"
    beta: float | None = None
    """How strongly the policy is held to the reference; without one, the loss's usual: 0.1, for sigmoid_norm 5, for simpo 2."""
    smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round (sigmoid, sigmoid_norm, simpo)."""
    gamma: float | None = None
    """simpo's target margin; without one, β/2."""
    nll: float = 0.0
    """Weight of the chosen branch's mean NLL beside the preference loss: keeps its likelihood from falling."""
    frame: bool = False
    """Also hold the control tokens of rejected replies (starts and ends of calls and turns) against them, as plain DPO does."""
    guard: Literal["warn", "stop"] = "warn"
    """What to do when chosen replies grow less likely while accuracy rises."""
    validation: float = 0.05
    """Share of the tokens held out, of at most a tenth of the pairs; of fewer than 40 pairs, none."""
    ledger_pairs: int = 32
    """How many pairs, those with the lowest margins, are scored again after training for the ledger."""
    lora: int = 0
    """Rank of adapters to train instead of all weights; they are merged at the end."""
    preflight: bool = False
    """Only check the data and show what would be trained."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(batch_rows=2, optim=OptimConfig(lr=1e-5, warmup=0.1))
    )


def main(config: Config) -> int:
    preference = preference_of(config)
    rows = load_rows(config.data or (config.out / "data" / "preference.parquet",), "preference")
    this = setup(config.model or str(config.out / "sft"), config.train, config.out, "dpo")
    preflight.check_rows(this.template, rows)
    items = [pair(this.template, row) for row in rows]
    for item in items:
        preflight.check_pair(this.template, item, this.vocab_size)
    items = items if config.frame else [unframed(this.template, item) for item in items]
    packed, held = packs(items, config)
    steps = this.steps(packed)
    preflight.summary(packed, this.template, "DPO", steps)
    if config.preflight:
        console.print("nothing is wrong; nothing was trained (--preflight)")
        return 0
    settings = asdict(preference) | {"lora": config.lora, "frame": config.frame, "held": data_hash(held) if held else ""}
    part = trained(this.loaded.model, config.lora, sorted(this.template.id.values()), config.train.seed)
    run = Run(part, preference, packed, held, this.directory, steps * config.train.accumulate, this.layout)
    run.prepare(identity_of(this, packed, settings))
    evals = (run.guard(steps, config.guard), run.ending(config.ledger_pairs, this.template))
    meta = {"stage": "dpo", "soul_hash": rows[0]["soul_hash"]}
    code = train(this.job(
        packed, run.programs, run.batch, settings, meta, params=part.params, frozen=part.frozen, merge=part.merge, evals=evals))  # fmt: skip
    run.sights.flush()
    return code


def preference_of(config: Config) -> Preference:
    """The loss that the settings name. Raises UserError for one that it does not have, or out of range."""
    beta = BETAS[config.loss] if config.beta is None else config.beta
    gamma = config.gamma if config.gamma is not None else beta / 2 if config.loss == "simpo" else 0.0
    for wrong, what in (
        (not 0 < beta < np.inf, f"--beta {beta} must be above 0"),
        (not 0 <= config.smoothing < 0.5, f"--smoothing {config.smoothing} must be at least 0 and below 0.5"),
        (config.smoothing and config.loss not in SMOOTHED, f"--loss {config.loss} has no --smoothing"),
        (gamma and config.loss != "simpo", f"--loss {config.loss} has no --gamma"),
        (not 0 <= config.nll < np.inf, f"--nll {config.nll} must be at least 0"),
        (not 0 <= config.validation <= 0.5, f"--validation {config.validation} must be between 0 and 0.5"),
    ):
        if wrong:
            raise UserError(what)
    return Preference(config.loss, beta, config.smoothing, config.nll, gamma)


def packs(items: list[Pair], config: Config) -> tuple[Packed, Packed | None]:
    """Pairs to train on, and those held out: all pairs of a prompt or none. Both fit the same compiled program."""
    t = config.train
    usable = [item.chosen for item in items if len(item) <= t.length]
    keys = {prompt_key(item, t.seed) for item in hold_out(usable, config.validation, 0, t.seed)} if len(usable) >= FEW else set()
    kept, out = ([item for item in items if (prompt_key(item.chosen, t.seed) in keys) == side] for side in (False, True))
    packed = Packed.build(kept, t.length, t.batch_rows, t.seed)
    if not any(len(item) <= t.length for item in out):
        return packed, None
    held = Packed.build(out, t.length, t.batch_rows, t.seed, packed.supervised)
    return Packed.build(kept, t.length, t.batch_rows, t.seed, held.supervised), held


class Watched(Programs):
    """Programs that show each training step's log-probs to `sights`: the ledger's history costs no forward pass of its own."""

    def __init__(self, logprobs: Logprobs, loss: Preference, sights: Sights, layout: Layout):
        super().__init__(logprobs, loss, fused=False, layout=layout)
        self.sights = sights

    def gradients(self, params, frozen, batch: dict):
        logp_n, pullback = self.forward(params, frozen, inputs(batch))
        value, g_n = self.loss(logp_n, batch)
        self.sights.add(lambda: self.layout.fetch(logp_n))
        return value, self.backward(params, pullback, g_n)


class Run:
    """One preference tuning: its programs, its blocks (those to train on, then those held out) and what the starting weights say of them."""

    def __init__(self, part: Trained, preference: Preference, packed: Packed, held: Packed | None, directory: Path, batches: int,
                 layout: Layout):  # fmt: skip
        self.part, self.preference, self.packed, self.held, self.directory = part, preference, packed, held, directory
        self.batches = batches
        self.sights = Sights(self.file("margins.jsonl"), packed, lambda number, logp_n: self.per_pair(number, logp_n)[:, 0])
        self.programs = Watched(part.logprobs, preference, self.sights, layout)
        n = len(packed.blocks)
        self.held_blocks = range(n, n + (min(len(held.blocks), -(-batches // SCORED)) if held else 0))
        self.start_n: np.ndarray
        """Blocks × N: the starting weights' log p of each supervised token, NaN where nothing needs it."""

    def file(self, name: str) -> Path:
        """A file of the run; of several processes, each but the first writes its own."""
        stem, kind = name.split(".")
        return self.directory / (f"{stem}-{process}.{kind}" if (process := jax.process_index()) else name)

    def prepare(self, identity: dict) -> None:
        """Compute what the starting weights say. Raises UserError where the first loss would not be that of equal weights."""
        trained_on = {self.packed.block_of(k) for k in range(self.batches)} if self.preference.needs_reference else ()
        self.start_n = reference_logprobs(self, [*sorted(trained_on), *self.held_blocks], identity)
        if self.preference.needs_reference:
            check_step_zero(self, self.packed.block_of(0))

    def block(self, number: int) -> dict[str, np.ndarray]:
        n = len(self.packed.blocks)
        return self.packed.block(number) if number < n else self.held.block(number - n)

    def with_reference(self, number: int) -> dict[str, np.ndarray]:
        return self.block(number) | ({"reference": self.start_n[number]} if self.preference.needs_reference else {})

    def batch(self, k: int) -> dict[str, np.ndarray]:
        if self.sights.next is None:
            self.sights.next = k - k % self.programs.layout.shards  # the first of those that run at once, of which this process has some
        return self.with_reference(self.packed.block_of(k))

    def logprobs(self, params: Any, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(block, log p of its supervised tokens), by the program that training uses."""
        frozen, at_once = self.programs.layout.put(self.part.frozen), self.programs.layout.shards
        for at in range(0, len(numbers), at_once):
            some = numbers[at : at + at_once]
            yield from zip(some, self.programs.scores(params, frozen, [inputs(self.block(n)) for n in some]))

    def per_pair(self, number: int, logp_n: np.ndarray) -> np.ndarray:
        """Pairs × (margin, log p of chosen, log p of rejected) of a block; log p is the mean per token."""
        block = self.with_reference(number)
        won, lost = self.preference.scores(logp_n, block)
        means = (s / jnp.maximum(n, 1) for s, n in zip(by_branch(logp_n, block), by_branch(block["weights"], block)))
        return np.stack([won - lost, *means], 1)[block["real"] > 0]

    def guard(self, steps: int, action: str) -> Eval:
        """Watches the likelihood of chosen replies; says when it first falls and at the end, or stops (UserError) if `action` is "stop"."""
        every, said = max(1, steps // CHECKS), False

        def look(step: int, state: TrainState) -> dict[str, float]:
            nonlocal said
            found = displacement(read_metrics(self.file("metrics.jsonl")), every)
            if found["displaced"]:
                what = (
                    f"chosen replies are {-found['shift']:.2f} nats per token less likely than before, at accuracy {found['accuracy']:.2f}"
                )
                fix = f"Train with --nll {max(0.2, 2 * self.preference.alpha):g}, or a higher --beta, in another --out."
                if action == "stop":
                    raise UserError(what, where=f"step {step}", fix=fix)
                if not said or step == steps:
                    console.print(plain(f"{what}: rejected replies are unlearned more than chosen ones are learned. {fix}", "yellow"))
                said = True
            return found

        return Eval(look, every)

    def ending(self, ledger_pairs: int, template: Template) -> Eval:
        """After the last step: the held-out pairs before and after, and the ledger."""

        def end(step: int, state: TrainState) -> dict[str, float]:
            pairs, seen = self.packed.items, self.sights.read()
            worst = self.worst({i: margins[-1] for i, margins in seen.items()}, ledger_pairs)
            scored = {n: self.per_pair(n, logp_n) for n, logp_n in self.logprobs(state.params, [*self.held_blocks, *worst])}
            after = {i: float(row[0]) for n in worst for i, row in zip(slots(self.packed, n), scored[n])}
            known = [n for n in range(len(self.packed.blocks)) if not np.isnan(self.start_n[n, 0])]
            start = {i: row[1:] for n in known for i, row in zip(slots(self.packed, n), self.per_pair(n, self.start_n[n]))}
            counts = report(self.file("pairs.jsonl"), ledger(pairs, seen, after, start), pairs, template)
            return self.held_out([scored[n] for n in self.held_blocks]) | counts

        return Eval(end)

    def worst(self, last: dict[int, float], count: int) -> list[int]:
        """Blocks with the lowest margins, so many that they hold about `count` pairs."""
        block_of = {i: n for n in range(len(self.packed.blocks)) for i in slots(self.packed, n)}
        found: dict[int, int] = {}
        for i in sorted(last, key=lambda i: (last[i], i)):
            if sum(found.values()) < count:
                found[block_of[i]] = len(slots(self.packed, block_of[i]))
        return list(found)

    def held_out(self, scored: list[np.ndarray]) -> dict[str, float]:
        """`prefers`: share of held-out pairs whose chosen reply is the likelier per token. (By margin the start is a tie by definition.)"""
        if not scored:
            return {}
        before, after = np.concatenate([self.per_pair(n, self.start_n[n]) for n in self.held_blocks]), np.concatenate(scored)
        prefers = [float(np.mean(part[:, 1] > part[:, 2])) for part in (before, after)]
        accuracy = float(np.mean((np.sign(after[:, 0]) + 1) / 2))
        return {"held_out": float(len(after)), "held_out_accuracy": accuracy, "prefers_before": prefers[0], "prefers": prefers[1]}


def inputs(batch: dict) -> dict:
    """What of a batch the model sees. Only that goes to the forward, so that one executable serves reference, policy and evals."""
    return {name: batch[name] for name in ("ids", "positions", "segments", "at", "targets")}


def reference_logprobs(run: Run, needed: Sequence[int], identity: dict) -> np.ndarray:
    """log p of the supervised tokens of the `needed` blocks under the starting weights, blocks × N, by the program that training uses.

    Kept in the run's directory under a key of weights, data, template, arithmetic and packing; a block that is not known yet is NaN there.
    """
    settings = {name: identity["settings"][name] for name in ("length", "batch_rows", "packing", "seed", "compute", "lora", "held")}
    mesh = dict(run.programs.layout.mesh.shape) if run.programs.layout.mesh else {}
    key = sha256_json({**identity, "settings": settings, "jax": jax.__version__, "device": jax.devices()[0].device_kind, "mesh": mesh})
    path = run.file(f"reference-{key[:16]}.npy")
    out = np.full((run.held_blocks.stop, run.packed.supervised), np.nan, np.float32)
    if path.exists():
        known = np.load(path, allow_pickle=False)
        if known.shape == out.shape and known.dtype == out.dtype:
            out = known
    if missing := [number for number in needed if np.isnan(out[number, 0])]:
        with progress("reference", len(missing), "batches") as show:
            for done, (number, logp_n) in enumerate(run.logprobs(run.programs.layout.put(run.part.params), missing)):
                show(done)
                out[number] = logp_n
            show(len(missing))
        file = io.BytesIO()
        np.save(file, out, allow_pickle=False)
        write_atomic(path, file.getvalue())
    return out


def check_step_zero(run: Run, number: int) -> None:
    """Policy and reference are the same weights before the first step: every margin of a block is 0 and every loss the known one, in every bit.

    Raises:
        UserError: when they are not, so the reference log-probs are not this model's on these rows.
    """
    ((_, logp_n),) = run.logprobs(run.programs.layout.put(run.part.params), [number])
    won, lost = run.preference.scores(logp_n, run.with_reference(number))
    per_pair, known = np.asarray(run.preference.per_pair(won, lost)), run.preference.at_zero()
    if np.any(won != 0) or np.any(lost != 0) or np.any(per_pair != known):
        name = {"ipo": "1/(4β²)", "apo_zero": "1"}.get(run.preference.kind, "ln 2")
        raise UserError(f"step-0 DPO loss is {per_pair.mean():.7f}, not {name} = {known:.7f} (largest margin {np.abs(won - lost).max():.3g})",
                        where="preflight", fix="Delete reference-*.npy in the run's dpo directory and run again.")  # fmt: skip
