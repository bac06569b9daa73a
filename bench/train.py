"""How fast one optimizer step runs here, and beside the same step in PyTorch.

    .venv/bin/python bench/train.py pretrain --depth 4 --vocab 8192 --peer-python TORCH/bin/python --nanochat CHECKOUT
    .venv/bin/python bench/train.py sft --rows 4 --peer-python TORCH/bin/python
    .venv/bin/python bench/train.py dpo --rows 2

pretrain: a model of `--depth`, 8,192 tokens a step, Muon and AdamW included; the peer is nanochat's own model and optimizer under torch.compile.
sft: SmolLM2-135M's shape, AdamW included; the peer is `transformers`. dpo: the same shape, `--rows` rows of each branch, against an SFT step
of the same tokens per branch. Weights and tokens are random: time does not depend on them. Peers run in fp32 and in bf16, before and after
ours, and the fastest step counts. Nothing else should run on the machine.
"""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import tyro
from flax import nnx

from model import ops
from model.config import ModelConfig
from model.transformer import Decoder
from soul.machine import suit_malloc
from training import depth as dials
from training import losses
from training.data import Example, Packed, Pair
from training.fit import TrainState, updater
from training.muon import muon_adamw
from training.optim import OptimConfig, adamw
from training.programs import Programs, plain_logprobs, plain_nll
from training.run import peak_bytes

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Config:
    """Time one training step."""

    stage: tyro.conf.Positional[Literal["pretrain", "sft", "dpo"]]
    depth: int = 4
    vocab: int = 8192
    rows: int = 4
    """Rows per micro-batch (pretrain: 8,192 tokens a step in as many micro-batches as that takes)."""
    length: int = 512
    share: float = 1.0
    """Supervised share of tokens (sft, dpo)."""
    compute: str = "auto"
    steps: int = 8
    peer_python: Path | None = None
    """A Python with torch (and transformers for sft)."""
    nanochat: Path | None = None
    """A checkout of nanochat."""


def pretraining(config: Config):
    """(programs, optimizer, params, micro-batches) of a step of pretraining."""
    plan = dials.dial(config.depth, config.vocab, length=config.length)
    graph, params = nnx.split(dials.fresh(plan.model, 0, config.compute))
    rng = np.random.default_rng(0)

    def micro() -> dict:
        ids = rng.integers(0, config.vocab, (config.rows, config.length + 1)).astype(np.int32)
        return {"ids": ids[:, :-1], "targets": ids[:, 1:].reshape(-1), "weights": np.ones(config.rows * config.length, np.float32)}

    batches = [micro() for _ in range(8192 // (config.rows * config.length))]
    optimizer = muon_adamw(plan.rates, 1000, ops.resolve_compute(config.compute))
    return Programs(plain_logprobs(graph), losses.nll, total=plain_nll(graph)), optimizer, params, batches


def tuning(config: Config, dpo: bool):
    """The same of SFT, or of DPO with as many tokens in each branch."""
    rng = np.random.default_rng(0)

    def one() -> Example:
        mask = (rng.random(config.length) < config.share).astype(np.int32)
        mask[0] = 0
        return Example(rng.integers(0, 49000, config.length).astype(np.int32), mask)

    graph, params = nnx.split(Decoder(ModelConfig(), nnx.Rngs(0), compute=config.compute))
    items = [Pair(one(), one(), 1) if dpo else one() for _ in range(config.rows)]
    packed = Packed.build(items, config.length, config.rows, 0)
    batch = packed.batch(0) | ({"reference": np.full(packed.supervised, -10.0, np.float32)} if dpo else {})
    if dpo:
        programs = Programs(plain_logprobs(graph), losses.Preference(beta=0.1), fused=False)
    else:
        programs = Programs(plain_logprobs(graph), losses.nll, total=plain_nll(graph))
    return programs, adamw(OptimConfig(), 100), params, [batch]


def ours(config: Config, programs, optimizer, params, batches) -> float:
    """Seconds of the fastest of `steps` steps; the first one, which compiles, is printed."""
    state, update, seconds = TrainState(params, jax.jit(optimizer.init)(params)), updater(optimizer), []
    for _ in range(config.steps + 1):
        start = time.perf_counter()
        value, grads = programs.accumulated(state.params, None, batches)
        state, metrics = update(state, grads, value)
        del grads
        jax.block_until_ready((state.params, metrics))
        seconds.append(time.perf_counter() - start)
    print(f"  first step {seconds[0]:.1f} s, others {min(seconds[1:]):.2f} to {max(seconds[1:]):.2f} s, peak {peak_bytes() / 1e9:.1f} GB")
    return min(seconds[1:])


def peer(config: Config, kind: str) -> float:
    """Seconds of the fastest step of the peer in `kind` (float32, bfloat16), in a process of its own."""
    script, *arguments = {
        "pretrain": ("nanochat_step.py", config.nanochat, config.depth, config.vocab, config.length, config.steps),
        "sft": ("transformers_step.py", config.rows, config.length, config.steps),
    }[config.stage]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = subprocess.run([config.peer_python, PEERS / script, kind, *map(str, arguments)], capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"the peer failed:\n{run.stderr[-2000:]}")
    print(f"  {script} {kind}: {run.stdout.strip().splitlines()[-1]} s a step")
    return float(run.stdout.split()[-1])


def main(config: Config) -> int:
    ops.enable_compile_cache()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} {jax.default_backend()}, {ops.resolve_compute(config.compute)}"
    )
    tokens = 8192 if config.stage == "pretrain" else config.rows * config.length
    theirs = min(map(lambda kind: peer(config, kind), ("float32", "bfloat16"))) if config.peer_python and config.stage != "dpo" else None
    if config.stage == "pretrain":
        mine = ours(config, *pretraining(config))
    else:
        mine = ours(config, *tuning(config, config.stage == "dpo"))
    print(f"{config.stage}: {tokens / mine:,.0f} tokens/s" + (" per branch" if config.stage == "dpo" else ""))
    if config.stage == "dpo":
        print(f"dpo step: {mine / ours(config, *tuning(config, False)):.2f} times the sft step of the same tokens per branch")
    if theirs is not None:
        theirs = min(theirs, *map(lambda kind: peer(config, kind), ("float32", "bfloat16")))
        print(f"peer: {tokens / theirs:,.0f} tokens/s; ours is {theirs / mine:.2f} times as fast")
    return 0


if __name__ == "__main__":
    suit_malloc()  # as the soulsmith command does
    sys.exit(main(tyro.cli(Config)))
