"""How fast the sampler generates and reads prompts here.

    .venv/bin/python bench/decode.py [--batches 4 16 32] [--prompt 129] [--new 96]

The weights are random in the shape of SmolLM2-135M: time does not depend on their values. Every row runs to the end.
A batch of 4 is what one conversation uses: `alone` is then the speed that one reader sees.
"""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import tyro

from model.config import ModelConfig
from model.sampler import Request, Sampler
from model.transformer import Decoder
from soul.machine import suit_malloc


@dataclass(frozen=True)
class Config:
    """Time generation."""

    batches: tuple[int, ...] = (4, 16, 32)
    prompt: int = 129
    new: int = 96
    temperature: float = 0.7
    top_p: float = 0.9
    compute: str = "auto"
    repeats: int = 3


def main(config: Config) -> int:
    model = Decoder(ModelConfig(), compute=config.compute)
    print(f"{platform.machine()} {platform.node()} jax {jax.__version__} {jax.devices()[0].device_kind}, products in {model.compute}")
    rng = np.random.default_rng(0)
    for batch in config.batches:
        sampler, best = Sampler(model, batch=batch), [0.0, 0.0]
        start = time.perf_counter()
        sampler.generate([rng.integers(0, 49000, config.prompt).tolist()], max_new=1)
        compiled = time.perf_counter() - start
        for _ in range(config.repeats):
            for seed in range(batch):
                prompt = rng.integers(0, 49000, config.prompt).tolist()
                sampler.submit(Request(prompt, config.new, config.temperature, config.top_p, seed))
            marks = [time.perf_counter()]
            sampler.admit()
            jax.block_until_ready(sampler.cache)
            marks.append(time.perf_counter())
            while any(slot.request for slot in sampler.slots):
                sampler.step()
            marks.append(time.perf_counter())
            speeds = batch * (config.prompt - 1) / (marks[1] - marks[0]), batch * config.new / (marks[2] - marks[1])
            best = [max(pair) for pair in zip(best, speeds, strict=True)]
        print(
            f"batch {batch:>2}: decode {best[1]:.0f} tok/s (alone {best[1] / batch:.0f}), prefill {best[0]:.0f} tok/s, compile {compiled:.1f} s"
        )
    return 0


if __name__ == "__main__":
    suit_malloc()  # as the soulsmith command does
    sys.exit(main(tyro.cli(Config)))
