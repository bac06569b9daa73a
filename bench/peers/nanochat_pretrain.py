"""Pretrain nanochat's own model with its optimizer and schedules for some minutes on rows that are given, and print its bits per byte.

    python nanochat_pretrain.py float32|bfloat16 CHECKOUT DEPTH VOCAB MINUTES ROWS_PER_STEP law|raised DIRECTORY

DIRECTORY holds train.npy (rows × T+1, in the order to be used), bytes.npy (bytes of each id) and validation-NAME.npy. Compiling and the
timing of five steps, from which the horizon follows, are not counted. `law`: settings of its scripts/base_train.py at commit 92d63d4, where rates
shrink with the root of the batch. `raised`: Muon's rate stays at .02 and the decay at .28, as ours do in short runs: it is the stronger peer.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

kind, checkout, *numbers, scaling, directory = sys.argv[1:]
depth, vocab, minutes, rows = int(numbers[0]), int(numbers[1]), float(numbers[2]), int(numbers[3])
directory = Path(directory)
os.environ["NANOCHAT_DTYPE"] = kind
sys.path.insert(0, checkout)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402

train = torch.from_numpy(np.load(directory / "train.npy").astype(np.int64))
length = train.shape[1] - 1
batch_tokens = rows * length


def fresh(layers: int = depth) -> GPT:
    wide = -(-64 * layers // 128) * 128
    with torch.device("meta"):
        return GPT(GPTConfig(length, vocab, layers, wide // 128, wide // 128, wide, window_pattern="L"))


def scaling_params(layers: int) -> int:
    counts = fresh(layers).num_scaling_params()
    return counts["transformer_matrices"] + counts["lm_head"]


def optimizer_of(model):
    """Its optimizer, rates and decay scaled as by its --num-iterations runs: by the batch, and by 12 tokens a parameter."""
    scale = math.sqrt(batch_tokens / 2**19)
    rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
    decay = 0.28 * scale * scaling_params(12) / scaling_params(depth)
    scaled = {name: rate * scale for name, rate in rates.items()}
    if scaling == "raised":
        scaled["matrix_lr"], decay = 0.02, min(decay, 0.28)
    return model.setup_optimizer(**scaled, weight_decay=decay), decay


def step(run, model, optimizer, number: int, steps: int, decay: float) -> float:
    at = number * rows % (len(train) - rows + 1)
    batch = train[at : at + rows]
    down = round(0.65 * steps)
    left = (steps - number) / down
    rate = (number + 1) / 40 if number < 40 else 1.0 if number <= steps - down else left + (1 - left) * 0.05
    momentum = 0.85 + 0.12 * number / 400 if number < 400 else 0.97 if number < steps - down else 0.97 * left + 0.90 * (1 - left)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = momentum, decay * 0.5 * (1 + math.cos(math.pi * number / steps))
    loss = run(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return float(loss)


def bits_per_byte(model, name: str) -> float:
    validation, sizes = torch.from_numpy(np.load(directory / name).astype(np.int64)), torch.from_numpy(np.load(directory / "bytes.npy"))
    nats = total = 0.0
    with torch.no_grad():
        for batch in validation.split(rows):
            targets = batch[:, 1:].contiguous()
            losses = model(batch[:, :-1].contiguous(), targets, loss_reduction="none").view(targets.shape).double()
            nats += float((losses * (sizes[targets] > 0)).sum())
            total += float(sizes[targets].sum())
    return nats / math.log(2) / total


torch.manual_seed(42)
model = fresh()
model.to_empty(device="cpu")
model.init_weights()
run, seconds, (optimizer, decay) = torch.compile(model, dynamic=False), [], optimizer_of(model)
for number in range(7):
    start = time.perf_counter()
    step(run, model, optimizer, number, 1000, decay)
    seconds.append(time.perf_counter() - start)
steps = int(60 * minutes / sorted(seconds[2:])[2])
torch.manual_seed(42)
model.init_weights()
optimizer, decay = optimizer_of(model)
print(f"{steps} steps of {sorted(seconds[2:])[2]:.2f} s", file=sys.stderr, flush=True)
start = time.perf_counter()
for number in range(steps):
    loss = step(run, model, optimizer, number, steps, decay)
    if number % 50 == 0:
        print(f"step {number} loss {loss:.3f} {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
spent = time.perf_counter() - start
scores = {path.stem.removeprefix("validation-"): bits_per_byte(model, path.name) for path in sorted(directory.glob("validation-*.npy"))}
print(json.dumps({"bpb": scores, "steps": steps, "seconds": spent, "tokens_per_s": steps * batch_tokens / spent}))
