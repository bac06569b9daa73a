"""How fast one optimizer step of SFT (or DPO) runs here, and where its time goes.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 .venv/bin/python bench/train_sft.py [--dpo] [--rows 4] [--length 256] [--share 0.4]

The weights are random in the shape of SmolLM2-135M: time does not depend on their values. `--share` is the supervised share of tokens.
The `soulsmith` command sets GLIBC_TUNABLES by itself.
"""

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import tyro
from flax import nnx

from model import ops
from model.config import ModelConfig
from model.transformer import Decoder
from training import losses
from training.data import Example, Packed, Pair
from training.fit import Programs, TrainState, updater
from training.optim import OptimConfig, adamw


@dataclass(frozen=True)
class Config:
    """Time one training step."""

    rows: int = 4
    length: int = 256
    share: float = 0.4
    """Supervised share of tokens."""
    dpo: bool = False
    compute: str = "auto"
    repeats: int = 5


def batch_of(config: Config) -> dict:
    rng = np.random.default_rng(0)

    def one() -> Example:
        mask = (rng.random(config.length) < config.share).astype(np.int32)
        mask[0] = 0
        return Example(rng.integers(0, 49000, config.length).astype(np.int32), mask)

    if not config.dpo:
        return Packed.build([one() for _ in range(config.rows)], config.length, config.rows, 0).batch(0)
    packed = Packed.build([Pair(one(), one(), 1) for _ in range(config.rows // 2)], config.length, config.rows // 2, 0)
    return packed.batch(0) | {"reference": np.full(packed.supervised, -10.0, np.float32)}


def main(config: Config) -> int:
    ops.enable_compile_cache()
    batch = jax.device_put(batch_of(config))
    model = Decoder(ModelConfig(), nnx.Rngs(0), compute=config.compute)
    graph, params = nnx.split(model)
    programs = Programs(graph, losses.dpo(0.1) if config.dpo else losses.sft)
    optimizer = adamw(OptimConfig(), 100)
    state, update = TrainState(params, optimizer.init(params)), updater(optimizer)
    del params, model
    times: dict[str, list[float]] = {}

    def timed(name: str, function, *args):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(config.repeats + 1):
        logp_n, pullback = timed("forward", programs.forward, state.params, batch)
        value, g_n = timed("loss", programs.loss, logp_n, batch)
        grads = timed("backward", programs.backward, pullback, g_n)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) / 1e9
        del pullback
        state, _ = timed("update", update, state, grads, value)
        del grads
    tokens = config.rows * config.length
    best = {name: min(seconds[1:]) for name, seconds in times.items()}
    step = min(map(sum, zip(*[seconds[1:] for seconds in times.values()], strict=True)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}, {graph_compute(config)}, "
          f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}")  # fmt: skip
    print(f"{'dpo' if config.dpo else 'sft'} {config.rows} x {config.length}, {int(batch['weights'].sum())} supervised tokens")
    print("first step (compiling) " + ", ".join(f"{name} {seconds[0]:.1f} s" for name, seconds in times.items()))
    print("best of the others     " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in best.items()))
    print(f"step {step:.2f} s, {tokens / step:.0f} tokens/s, kept for backward {kept:.2f} GB, peak memory {peak:.1f} GB")
    return 0


def graph_compute(config: Config) -> str:
    return ops.resolve_compute(config.compute)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
