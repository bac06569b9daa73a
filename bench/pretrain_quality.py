"""How well a model predicts held-out text after some minutes of pretraining here, beside nanochat's model and beside zlib and xz.

    .venv/bin/soulsmith data --out CORPUS --vocab-size 8192
    .venv/bin/python bench/pretrain_quality.py --corpus CORPUS --out RUN --peer-python TORCH/bin/python --nanochat CHECKOUT

Ours is `soulsmith pretrain`; the peer is nanochat's own model and optimizer on the same rows in the same order, at the same width, depth, batch and
wall-clock, compiling not counted for either. zlib and xz compress all held-out documents of a source as one file. Nothing else should run.
"""

import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import tyro

from soul.files import read_json
from training.corpus import Corpus

PEER = Path(__file__).parent / "peers" / "nanochat_pretrain.py"


@dataclass(frozen=True)
class Config:
    """Compare bits per byte."""

    corpus: Path
    out: Path
    depth: int = 4
    minutes: float = 10.0
    length: int = 512
    rows: int = 8
    """Rows per step."""
    peer_python: Path | None = None
    nanochat: Path | None = None
    kind: str = "bfloat16"
    """The peer's arithmetic: the faster of float32 and bfloat16 here (bench/train.py)."""
    rates: Literal["raised", "law"] = "raised"
    """The peer's: "law" are its own for so small a batch, "raised" do better in a short run (bench/peers/nanochat_pretrain.py)."""
    seed: int = 0


def compressors(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Bits per byte of zlib -9 and xz -9 by source."""
    table: dict[str, dict[str, float]] = {"zlib -9": {}, "xz -9": {}}
    for source, documents in corpus.held_out.items():
        text = b"\n".join(corpus.tokenizer.decode_bytes(ids.tolist()) for ids in documents)
        table["zlib -9"][source] = 8 * len(zlib.compress(text, 9)) / len(text)
        table["xz -9"][source] = 8 * len(lzma.compress(text, preset=9)) / len(text)
    return table


def ours(config: Config) -> dict:
    command = [Path(sys.executable).parent / "soulsmith", "pretrain", "--out", config.out, "--data", config.corpus, "--depth", config.depth,
               "--length", config.length, "--batch-tokens", config.rows * config.length, "--minutes", config.minutes, "--eval-tokens", 8192, "--seed", config.seed]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    return read_json(config.out / "pretrain" / "results.json")


def peer(config: Config, corpus: Corpus, steps: int) -> dict:
    """The peer's results, on the rows that ours saw and as many again, should it be faster."""
    with tempfile.TemporaryDirectory() as directory:
        batches = [corpus.batch(k, config.rows, config.seed) for k in range(2 * steps)]
        rows = [np.concatenate([b["ids"], b["targets"].reshape(b["ids"].shape)[:, -1:]], 1) for b in batches]
        np.save(Path(directory, "train.npy"), np.concatenate(rows))
        np.save(Path(directory, "bytes.npy"), np.pad(corpus.token_bytes, (0, -len(corpus.token_bytes) % 64)))
        for source, validation in corpus.validation.items():
            np.save(Path(directory, f"validation-{source.replace('/', '_')}.npy"), validation)
        numbers = config.depth, -(-corpus.tokenizer.vocab_size // 64) * 64, config.minutes, config.rows, config.rates
        command = [config.peer_python, PEER, config.kind, config.nanochat, *numbers, directory]
        run = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def main(config: Config) -> int:
    corpus = Corpus.open(config.corpus, config.length)
    table, mine = compressors(corpus), ours(config)
    table["soulsmith"] = mine["bpb"]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; depth {config.depth}, {config.minutes:g} minutes, {config.rows} × {config.length} tokens a step"
    )
    print(f"soulsmith: {mine['tokens']:,} tokens, {mine['tokens_per_s']:,.0f} a second")
    if config.peer_python:
        theirs = peer(config, corpus, mine["tokens"] // (config.rows * config.length))
        table["nanochat"] = theirs["bpb"]
        print(f"nanochat ({config.rates}): {theirs['steps']} steps, {theirs['tokens_per_s']:,.0f} tokens/s")
    names = list(corpus.held_out)
    print("bits per byte".ljust(16) + "".join(name.rjust(20) for name in names))
    for who, scores in table.items():
        print(who.ljust(16) + "".join(f"{scores[name.replace('/', '_') if who == 'nanochat' else name]:20.4f}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
