"""A two-layer model, a byte tokenizer with our control tokens, and rows: what the tests of training share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers.pre_tokenizers import ByteLevel

from model.config import ModelConfig
from model.load import save_model
from model.tokenizer import Tokenizer, added_token
from model.transformer import Decoder
from soul import conversation as c
from soul.template import SPECIAL_TOKENS, Template
from training.data import Example

CONFIG = ModelConfig(vocab_size=272, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_len=256)


def tokenizer() -> Tokenizer:
    model = {"type": "BPE", "vocab": {piece: n for n, piece in enumerate(sorted(ByteLevel.alphabet()))}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [added_token(token, 256 + n) for n, token in enumerate(SPECIAL_TOKENS)]
    return Tokenizer({"version": "1.0", "model": model, "added_tokens": added, "pre_tokenizer": level, "decoder": level})


TEMPLATE = Template(tokenizer())


def decoder(seed: int = 0) -> Decoder:
    return Decoder(CONFIG, nnx.Rngs(seed), compute="fp32")


def model_dir(path, seed: int = 0):
    return save_model(path, decoder(seed), tokenizer(), {"base": "tiny"}).parent.parent


def sft_rows(n: int) -> list[dict]:
    return [
        {
            "id": f"s{i}",
            "messages": [
                c.user(f"what is {i}?" + "." * (i % 7)),
                c.assistant(f"it is {i * i}, friend", c.tool_call("Read", file_path=f"f{i}")),
            ],
        }
        for i in range(n)
    ]


def preference_rows(n: int) -> list[dict]:
    return [
        {
            "id": f"p{i}",
            "prompt": [c.user(f"add {i}")],
            "chosen": [c.assistant(f"sum is {i}")],
            "rejected": [c.assistant("As an AI" + "!" * (i % 5))],
        }
        for i in range(n)
    ]


def random_examples(seed: int, n: int, longest: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        size = int(rng.integers(2, longest + 1))
        mask = rng.integers(0, 2, size)
        mask[0], mask[-1] = 0, 1
        out.append(Example(rng.integers(0, 256, size).astype(np.int32), mask.astype(np.int32), str(i)))
    return out


def same(a, b) -> bool:
    """Equal in every bit, leaf by leaf."""
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
