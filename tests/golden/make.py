"""Writes the golden files with transformers (the `[parity]` extra): `python tests/golden/make.py`.

tiny_llama, tiny_qwen2, tiny_qwen3: models of a few kB with the logits that transformers computes.
smollm2.json: token ids and top logits of the real model as `soulsmith pull smollm2-135m --source pip` stores it.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[2]))
from model.gguf_import import GPT2_SPLIT, PRE_TOKENIZERS
from model.tokenizer import added_token
from soul.files import home, write_json

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 288, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e5}
TINY = {
    "tiny_llama": LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=ROPE),
    "tiny_qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False, rope_parameters=ROPE),
    "tiny_qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True, rope_parameters=ROPE),
}
IDS = [[256, *range(40, 70), 3, 200, 199], [257, *range(100, 20, -5), *[7] * 17]]
TEXTS = [
    "The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n    return", "Once upon a time, in 1984,",
    "import os\nimport sys\n\n\tprint('déjà vu 😀')  # 12,345.67", "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
]  # fmt: skip


def tokenizer_spec() -> dict:
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate(alphabet)}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<extra_{n}>" for n in range(17))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": GPT2_SPLIT,
        "added_tokens": [added_token(name, 256 + n) for n, name in enumerate(names)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["smollm"]},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip


def main() -> None:
    for n, (name, config) in enumerate(TINY.items()):
        torch.manual_seed(n)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms and biases too, or a dropped one would not show
            parameter.data = (parameter.data + 0.15 * torch.randn_like(parameter)).bfloat16().float()
        model.bfloat16().save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        write_json(HERE / name / "tokenizer.json", tokenizer_spec())
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)  # bfloat16() also rounded the RoPE table
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits[:, -3:, :40].double().round(decimals=6)
        (HERE / name / "logits.json").write_text(json.dumps({"ids": IDS, "last_3_by_40": logits.tolist()}) + "\n")
    path = home() / "models" / "smollm2-135m"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            top = model(torch.tensor([ids])).logits[0, -1].topk(5)
        rows.append({"text": text, "ids": ids, "top_ids": top.indices.tolist(), "top_logits": [round(v, 5) for v in top.values.tolist()]})
    (HERE / "smollm2.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
