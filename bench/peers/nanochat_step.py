"""Prints the seconds of the fastest optimizer step of nanochat's model and optimizer: 8,192 random tokens, compiled.

python nanochat_step.py float32|bfloat16 CHECKOUT DEPTH VOCAB LENGTH STEPS
"""

import os
import sys
import time

kind, checkout, *numbers = sys.argv[1:]
depth, vocab, length, steps = map(int, numbers)
os.environ["NANOCHAT_DTYPE"] = kind
sys.path.insert(0, checkout)

import torch  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402

width = -(-64 * depth // 128) * 128
with torch.device("meta"):
    config = GPTConfig(length, vocab, depth, width // 128, width // 128, width, window_pattern="L")
    model = GPT(config)
model.to_empty(device="cpu")
model.init_weights()
optimizer = model.setup_optimizer()
compiled = torch.compile(model, dynamic=False)
ids = torch.randint(0, vocab, (8192 // length, length + 1))
x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
seconds = []
for _ in range(steps + 2):
    start = time.perf_counter()
    compiled(x, y).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - start)
print(min(seconds[2:]))
