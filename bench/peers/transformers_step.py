"""Prints the seconds of the fastest AdamW step of SmolLM2-135M's shape in transformers, every token supervised.

python transformers_step.py float32|bfloat16 ROWS LENGTH STEPS
"""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

kind, *numbers = sys.argv[1:]
rows, length, steps = map(int, numbers)
shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, use_cache=False, **shape)).to(getattr(torch, kind))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
ids = torch.randint(0, 49152, (rows, length))
seconds = []
for _ in range(steps + 1):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
print(min(seconds[1:]))
