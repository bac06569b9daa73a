"""Logits and greedy continuations against transformers (the `[parity]` extra); the golden files stand in where it is missing."""

import functools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.load import load_model
from model.sampler import Sampler
from soul.files import home

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parents[1] / "golden"
REAL = home() / "models" / "smollm2-135m"
ROPE = {"rope_type": "default", "rope_theta": 5e5}
SHAPE = {
    "vocab_size": 288,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SHAPE |= {"max_position_embeddings": 256, "rope_parameters": ROPE, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
PROMPTS = [
    "The capital of France is", "def fibonacci(n):\n", "import os\n\ndef list_files(path):\n    ", "Once upon a time", "1 2 3 4 5 6",
    "<|im_start|>user\nWrite a function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n", "class Stack:\n    def __init__(self):\n",
    "Water boils at", "The three primary colors are", "SELECT name FROM users WHERE", "for i in range(10):\n    print(", "Dear Sir or Madam,",
    "<|im_start|>user\nWhat is a list comprehension?<|im_end|>\n<|im_start|>assistant\n", "# TODO", "The quick brown fox", "déjà vu means",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n", "In 1969, the first", "x = [1, 2, 3]\nprint(sum(x))  #", "To make tea,",
]  # fmt: skip


def theirs(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, ids):
    model = nnx.merge(graph, params)
    return model.logits(model.hidden(ids))


def ours(model, ids):
    return np.asarray(forward(*nnx.split(model), jnp.array(ids, jnp.int32)))


@pytest.mark.parametrize(
    "kind, more",
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    ],
)
def test_random_small_models(kind, more, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SHAPE, **more))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((GOLDEN / "tiny_llama" / "tokenizer.json").read_text())
    ids = np.random.default_rng(0).integers(0, 288, (3, 200)).tolist()
    np.testing.assert_allclose(ours(load_model(tmp_path, raw=True, compute="fp32").model, ids), theirs(model, ids), atol=1e-4)


@pytest.mark.skipif(not REAL.exists(), reason="smollm2-135m is not pulled")
def test_real_model_logits_and_greedy_continuations(capsys):
    loaded = load_model(REAL, raw=True, compute="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    model = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    done = Sampler(loaded.model, loaded.tokenizer, max_len=256, batch=20).generate(prompts, max_new=64)
    worst = 0.0
    for prompt, completion in zip(prompts, done, strict=True):
        ids = [*prompt, *completion.ids]
        reference = theirs(model, [ids])[0]
        padded = ids + [0] * (128 - len(ids))  # causal: what follows changes nothing, and one shape compiles once
        worst = max(worst, np.abs(ours(loaded.model, [padded])[0, : len(ids)] - reference).max())
        # by induction, their greedy continuation is ours when each of our tokens is their first choice after the ones before it
        assert len(completion.ids) == 64 and reference[len(prompt) - 1 : -1].argmax(-1).tolist() == completion.ids
    with capsys.disabled():
        print(json.dumps({"max_abs_logit_difference": float(worst), "greedy_tokens_equal": 64 * len(prompts)}))
    assert worst < 1e-3
