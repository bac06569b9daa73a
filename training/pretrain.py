"""`soulsmith pretrain`: train a model from scratch on a corpus."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import ops
from model.load import Loaded, load_model
from model.sampler import Sampler
from soul.console import console, visible
from soul.errors import UserError
from soul.files import read_json, sha256_json, write_atomic, write_json
from soul.rows import kind_of, read_rows
from soul.template import Template
from training import losses, preflight
from training.corpus import Corpus, packed
from training.data import as_batch, permutation
from training.depth import Plan, dial, fresh, parameters, scaling_params
from training.fit import Eval, TrainState, bits_per_byte, read_evals, read_metrics, updater
from training.mesh import Layout, join, make_mesh
from training.muon import muon_adamw
from training.programs import Programs, plain_logprobs, plain_nll
from training.run import Job, TrainConfig, train

EVALS = 10  # in a run, the last one after the last step
SAMPLE_TOKENS = 64
PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    "The capital of France is",
    "Once upon a time",
)
DIAL = ("length", "batch_rows", "ratio", "steps", "batch_tokens", "kv_heads", "d_head", "tied")  # settings that are arguments of `dial`


@dataclass(frozen=True)
class Config:
    """Pretrain a model from scratch; the result is OUT/pretrain."""

    out: Path
    """Run directory."""
    data: Path | None = None
    """Directory that `soulsmith data` wrote; without one, OUT/corpus."""
    depth: int = 4
    """The one dial: layers. Width, heads, batch, learning rates and horizon follow."""
    ratio: float = 8.0
    """Tokens to train on for each parameter of the matrices and the head."""
    steps: int | None = None
    """Train for so many steps instead."""
    minutes: float | None = None
    """Train for so long instead: the speed of this machine is measured first, and the horizon kept in the run directory."""
    length: int = 512
    """Tokens per row."""
    batch_rows: int = 16
    """Most rows per micro-batch."""
    batch_tokens: int | None = None
    """Tokens per step, instead of what follows from the horizon."""
    kv_heads: int | None = None
    """Key-value heads; without, as many as query heads."""
    d_head: int | None = None
    """Width of a head; without, 128."""
    tied: bool = False
    """One matrix for embedding and head."""
    midtrain: Path | None = None
    """Parquet file of documents about the SOUL (recipe `docs`) to mix in."""
    midtrain_share: float = 0.1
    """Share of rows that they take."""
    eval_tokens: int = 65_536
    """Tokens of each validation source that evals on the way read; the last one reads all."""
    seed: int = TrainConfig.seed
    compute: str = TrainConfig.compute
    """How products are taken: auto, fp32 or bf16 (weights and optimizer are always fp32)."""
    checkpoint_minutes: float = TrainConfig.checkpoint_minutes
    """Minutes between checkpoints."""
    checkpoint_steps: int = TrainConfig.checkpoint_steps
    """Steps between checkpoints, beside the minutes; 0: by the clock only."""
    keep: int = TrainConfig.keep
    """How many of the newest checkpoints stay."""
    keep_every: int = TrainConfig.keep_every
    """Checkpoints of steps that this divides stay for good; 0: none."""
    mesh: str = TrainConfig.mesh
    """Devices: auto, or sizes such as data=2,fsdp=4."""

    def plan(self, vocab_size: int, **more) -> Plan:
        """What the dial says to these settings; `more` overrides them."""
        return dial(self.depth, vocab_size, **{name: getattr(self, name) for name in DIAL} | more)


def main(config: Config, clock: Callable[[], float] = time.monotonic) -> int:
    ops.enable_compile_cache()
    join()
    corpus, directory = opened(config), config.out / "pretrain"
    extra = documents(config.midtrain, corpus)
    batches = Mixed(corpus, extra, config.midtrain_share, config.seed)
    plan = config.plan(corpus.tokenizer.vocab_size)
    model = fresh(plan.model, config.seed, config.compute)
    graph, params = nnx.split(model)
    state_bytes = 4 * sum(p.size for p in jax.tree.leaves(params)) * 4  # weights, gradients, two moments
    layout = Layout(make_mesh(config.mesh, accumulate=plan.accumulate, state_bytes=state_bytes), plan.model)
    params, programs = layout.put(params), Programs(plain_logprobs(graph), losses.nll, layout=layout, total=plain_nll(graph))
    data = {"corpus": corpus.hash, "tokenizer": corpus.tokenizer_hash, "midtrain": sha256_json(extra.tolist())}
    if config.minutes:
        plan = timed_plan(config, directory / "horizon.json", data, programs, params, corpus, model.compute, clock)
    check_start(programs, params, batches(0, plan.batch_rows), plan.model.vocab_size)
    summary(plan, corpus, len(extra))
    every = max(1, plan.steps // EVALS)
    job = Job(
        directory=directory, steps=plan.steps,
        batches=lambda k: batches(k, plan.batch_rows), programs=programs, optimizer=muon_adamw(plan.rates, plan.steps, model.compute),
        rate=lambda step: plan.rates.matrix * plan.rates.curve(plan.steps)(step), params=params,
        identity={"plan": asdict(plan), "data": data, "share": config.midtrain_share, "seed": config.seed, "compute": model.compute},
        model=plan.model, tokenizer=corpus.tokenizer, meta={"stage": "pretrain", "base": f"depth-{config.depth}"}, keep_optimizer=True,
        config=TrainConfig(accumulate=plan.accumulate, **{name: getattr(config, name) for name in (
            "checkpoint_minutes", "checkpoint_steps", "keep", "keep_every")}),
        evals=(Eval(lambda step, state: evaluate(
            programs, state.params, corpus, plan.batch_rows, None if step == plan.steps else config.eval_tokens), every),))  # fmt: skip
    code = train(job)
    if code == 0 and not (directory / "results.json").exists():
        finish(load_model(directory, compute=config.compute))
    return code


def opened(config: Config) -> Corpus:
    """The corpus, its template checked. Raises UserError for settings that contradict each other or a corpus that is not there."""
    if config.steps is not None and config.minutes is not None:
        raise UserError("--steps and --minutes both set the horizon", fix="Give one of them.")
    if config.minutes is not None and jax.process_count() > 1:
        raise UserError("--minutes measures one process; several would each choose another horizon", fix="Give --steps or --ratio.")
    preflight.check_positive(config, "depth", "ratio", "steps", "minutes", "length", "batch_rows", "batch_tokens", "kv_heads", "d_head")
    if not 0 <= config.midtrain_share < 1:
        raise UserError(f"--midtrain-share must be from 0 to below 1, not {config.midtrain_share}")
    corpus = Corpus.open(config.data or config.out / "corpus", config.length)
    preflight.check_template(Template(corpus.tokenizer), corpus.tokenizer.vocab_size)
    return corpus


def documents(path: Path | None, corpus: Corpus) -> np.ndarray:
    """Rows n×(T+1) of the documents in a Parquet file, packed as the corpus is. UserError when they are no documents, or too few for a row."""
    if path is None:
        return np.zeros((0, corpus.length + 1), np.int32)
    rows = read_rows(path)
    if not rows or kind_of(rows) != "docs":
        raise UserError("holds no documents (rows with a `text`)", where=path, fix="Make some with the recipe `docs`.")
    found = packed([np.array(corpus.tokenizer.encode(row["text"]), np.int32) for row in rows], corpus.length, corpus.tokenizer)
    if not len(found):
        raise UserError(f"has fewer than {corpus.length + 1} tokens", where=path, fix="Give more documents, or a smaller --length.")
    return found


@dataclass(frozen=True)
class Mixed:
    """Batch k: rows of the corpus, of which a `share` (spread evenly over the run) are `extra` rows instead, in permuted epochs. A pure function."""

    corpus: Corpus
    extra: np.ndarray
    share: float
    seed: int

    def __call__(self, k: int, rows: int) -> dict[str, np.ndarray]:
        batch = self.corpus.batch(k, rows, self.seed)
        targets = batch["targets"].reshape(rows, -1)
        for i in range(rows) if len(self.extra) else ():
            number = int((k * rows + i + 1) * self.share)
            if number > int((k * rows + i) * self.share):
                epoch, at = divmod(number - 1, len(self.extra))
                row = self.extra[permutation((self.seed, epoch, 1), len(self.extra))[at]]
                batch["ids"][i], targets[i] = row[:-1], row[1:]
        return batch


def timed_plan(config: Config, path: Path, data: dict, programs: Programs, params, corpus: Corpus, compute: str, clock) -> Plan:
    """The plan whose steps and evals take `config.minutes` here, compiling not counted. Kept in `path`: a resumed run has the same horizon.
    Raises UserError when the directory holds a run with another.
    """
    vocab = corpus.tokenizer.vocab_size
    asked = data | {name: getattr(config, name) for name in (*DIAL, "depth", "minutes", "eval_tokens")}
    kept = read_json(path) if path.exists() else {}
    if kept.get("asked") != asked:
        if (path.parent / "identity.json").exists():
            raise UserError("holds a run with another horizon", where=path.parent, fix="Choose another --out, or delete that directory.")
        per_token, update, scored = step_times(config.plan(vocab), programs, params, corpus, compute, clock)
        rows = corpus.validation.values()
        read = sum(config.length * len(v) + (EVALS - 1) * min(config.length * len(v), config.eval_tokens) for v in rows)
        seconds = max(60 * config.minutes - scored * read, 6 * config.minutes)
        tokens = seconds / per_token
        for _ in range(3):  # the batch follows from the horizon, and the updates that it asks for take from it
            plan = config.plan(vocab, tokens=tokens)
            per_step = per_token * plan.batch_tokens + update
            tokens = seconds / per_step * plan.batch_tokens
        kept = {"asked": asked, "tokens": tokens, "steps": max(1, int(seconds / per_step)), "seconds_per_step": per_step}
        write_json(path, kept)
        console.print(f"{kept['steps']:,} steps of {per_step:.2f} s and {scored * read:.0f} s of evals make {config.minutes:g} minutes")
    return config.plan(vocab, tokens=kept["tokens"], steps=kept["steps"])


def step_times(plan: Plan, programs: Programs, params, corpus: Corpus, compute: str, clock) -> tuple[float, float, float]:
    """Seconds per token of forward and backward, per update, and per token of an eval: the medians of three after the one that compiles."""
    optimizer, shards = muon_adamw(plan.rates, plan.steps, compute), programs.layout.shards
    state = TrainState(jax.tree.map(jnp.copy, params), programs.layout.init(optimizer.init, params))
    update = updater(optimizer, programs.layout.shardings(state))
    batches, times = [corpus.batch(k, plan.batch_rows, 0) for k in range(shards)], []
    for _ in range(4):
        marks = [clock()]
        value, grads = jax.block_until_ready(programs.accumulated(state.params, None, batches))
        marks.append(clock())
        state, _ = jax.block_until_ready(update(state, grads, value))
        marks.append(clock())
        list(programs.scores(state.params, None, batches))
        times.append(np.diff([*marks, clock()]))
    gradient, updated, scored = np.median(times[1:], axis=0).tolist()
    tokens = shards * plan.batch_rows * plan.length
    return gradient / tokens, updated, scored / tokens


def check_start(programs: Programs, params, batch: dict, vocab_size: int) -> None:
    """The first loss must be a number (else UserError), and should be ln V: a fresh model knows nothing."""
    loss = -float(next(programs.scores(params, None, [batch])).mean())
    if not math.isfinite(loss):
        raise UserError(f"the loss before the first step is {loss}", where="preflight", fix="Try --compute fp32.")
    if abs(loss - math.log(vocab_size)) > 0.5:
        console.print(f"[yellow]the loss before the first step is {loss:.2f}, not ln {vocab_size} = {math.log(vocab_size):.2f}[/]")


def summary(plan: Plan, corpus: Corpus, documents: int) -> None:
    """Print what will be trained."""
    c, rates = plan.model, plan.rates
    more = f", {documents:,} rows of documents" if documents else ""
    console.print(preflight.facts("pretraining", {
        "layers × width": f"{c.n_layers} × {c.d_model}, {c.n_heads} heads of {c.d_head} ({c.n_kv_heads} kv), MLP {c.d_ff}, vocabulary {c.vocab_size:,}",
        "parameters": f"{parameters(c):,}, of which {scaling_params(c):,} in matrices and head",
        "corpus": f"{corpus.tokens:,} tokens in {corpus.rows:,} rows of {corpus.length}{more}",
        "tokens": f"{plan.tokens:,} ({plan.tokens / corpus.tokens:.2f} epochs)",
        "steps": f"{plan.steps:,} of {plan.accumulate} × {plan.batch_rows} rows = {plan.batch_tokens:,} tokens",
        "rates": f"matrices {rates.matrix:.2g}, embedding {rates.embed:.2g}, head {rates.head:.2g}, decay {rates.decay:.2g}",
    }))  # fmt: skip


def evaluate(programs: Programs, params, corpus: Corpus, batch_rows: int, tokens: int | None = None) -> dict[str, float]:
    """Bits per byte on each validation source, on about `tokens` tokens of it or on all."""
    found = {}
    for source, rows in corpus.validation.items():
        if len(rows):
            count = min(len(rows), max(1, tokens // corpus.length)) if tokens else len(rows)
            chosen = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
            batches = [as_batch(chosen[at : at + batch_rows], batch_rows) for at in range(0, count, batch_rows)]
            found[f"bpb {source}"] = bits_per_byte(programs, params, batches, corpus.token_bytes)
    return found


def finish(loaded: Loaded) -> None:
    """What came of the run: samples.md and results.json beside the model."""
    lines, last = read_metrics(loaded.path / "metrics.jsonl"), {}
    for line in read_evals(loaded.path / "metrics.jsonl"):
        last |= line["eval"]
    write_atomic(loaded.path / "samples.md", samples(loaded))
    write_json(loaded.path / "results.json", {
        "bpb": {name.removeprefix("bpb "): value for name, value in last.items() if name.startswith("bpb ")},
        "params": parameters(loaded.config), "steps": len(lines), "tokens": sum(line["tokens"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines)})  # fmt: skip


def samples(loaded: Loaded) -> str:
    """A few prompts continued, greedily and drawn at temperature 0.8, as Markdown."""
    tokenizer, longest = loaded.tokenizer, loaded.config.max_len
    sampler = Sampler(loaded.model, tokenizer, max_len=longest, batch=len(PROMPTS))
    bos = tokenizer.special["<|bos|>"]
    prompts = [[bos, *tokenizer.encode(prompt)][: longest // 2] for prompt in PROMPTS]
    text = "# Samples\n"
    for title, options in (("Greedy", {}), ("Drawn at temperature 0.8", {"temperature": 0.8, "top_p": 0.95})):
        text += f"\n## {title}\n"
        for prompt, made in zip(PROMPTS, sampler.generate(prompts, max_new=SAMPLE_TOKENS, stop_ids=[bos], **options), strict=True):
            text += "\n" + indent(visible(prompt + tokenizer.decode(made.ids)), "    ", lambda _: True) + "\n\n---\n"
    return text
