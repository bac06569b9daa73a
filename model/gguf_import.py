"""Reading a GGUF file: config, tokenizer, and weights dequantised to fp32 under their Hugging Face names."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from model.hf_import import LazyTensor
from model.tokenizer import Tokenizer, added_token
from soul.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# the published pre-tokenizer patterns of the Qwen and Llama-3 families; they differ in how many digits make one piece
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF token types


def _split(digits: str) -> list[dict]:
    pattern = {"Regex": CL100K.replace("DIGITS", digits)}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, {**GPT2_SPLIT, "use_regex": False}]


PRE_TOKENIZERS = {
    "gpt-2": [GPT2_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2_SPLIT],
    "qwen2": _split(""),
    "llama-bpe": _split("{1,3}"),
}
TENSORS = {  # ours on the right is the Hugging Face name inside a layer
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DERIVED = {"rope_freqs.weight"}


def read_gguf(path: Path) -> tuple[ModelConfig, Tokenizer, Iterator[LazyTensor]]:
    """Open a GGUF file; weights stay on disk, and are dequantised to fp32 when read.

    Raises UserError for a corrupt or truncated file, an unsupported architecture, or a tokenizer that is not byte-level BPE.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError, TypeError, OSError) as error:
        raise UserError(f"is not a GGUF file that can be read ({error})", where=path, fix="Fetch it again.") from None
    try:
        config = _config(fields, {tensor.name for tensor in reader.tensors}, path)
        tokenizer = _tokenizer(fields, path)
    except KeyError as missing:
        raise UserError(f"metadata {missing} is missing", where=path) from None
    return config, tokenizer, (
        (_hf_name(tensor.name, path), tuple(int(n) for n in reversed(tensor.shape)), partial(_read, tensor, config, path))
        for tensor in reader.tensors if tensor.name not in DERIVED
    )  # fmt: skip


def _read(tensor, config: ModelConfig, path: Path) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"tensor {tensor.name} ({tensor.tensor_type.name}) cannot be dequantised: {error}", where=path) from None
    kind = tensor.name.split(".")[-2]
    if config.qkv_bias or config.qk_norm or kind not in ("attn_q", "attn_k"):  # qwen2 and qwen3 are stored as they are
        return values
    # llama.cpp rotates adjacent pairs, so for the llama architecture it stores q and k rows interleaved
    heads = config.n_heads if kind == "attn_q" else config.n_kv_heads
    return values.reshape(heads, config.d_head // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _config(fields: dict, names: set[str], path: Path) -> ModelConfig:
    arch = fields["general.architecture"]
    if arch not in ARCHITECTURES:
        raise UserError(f"architecture {arch} is not supported", where=path, fix=f"Use one of {', '.join(ARCHITECTURES)}.")
    get = {key.removeprefix(arch + "."): value for key, value in fields.items()}
    heads = get["attention.head_count"]
    scaled = "rope_freqs.weight" in names or get.get("rope.scaling.type", "none") != "none"
    return ModelConfig.from_hf({
        "architectures": [ARCHITECTURES[arch]], "vocab_size": len(fields["tokenizer.ggml.tokens"]), "hidden_size": get["embedding_length"],
        "num_hidden_layers": get["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": get.get("attention.head_count_kv", heads),
        "head_dim": get.get("attention.key_length", get["embedding_length"] // heads), "intermediate_size": get["feed_forward_length"],
        "rms_norm_eps": get["attention.layer_norm_rms_epsilon"], "rope_theta": get.get("rope.freq_base", 10_000.0),
        "rope_scaling": {"rope_type": "llama3"} if scaled else None, "max_position_embeddings": get["context_length"],
        "tie_word_embeddings": "output.weight" not in names,
    }, where=str(path))  # fmt: skip


def _tokenizer(fields: dict, path: Path) -> Tokenizer:
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(f"tokenizer {kind}/{pre} is not supported", where=path, fix=f"Supported: gpt2 with {', '.join(PRE_TOKENIZERS)}.")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
        "vocab": {piece: n for n, (piece, type) in enumerate(zip(tokens, types)) if type != UNUSED},
        "merges": fields["tokenizer.ggml.merges"],
    }  # fmt: skip
    added = [added_token(piece, n) for n, (piece, type) in enumerate(zip(tokens, types)) if type in (CONTROL, USER_DEFINED)]
    return Tokenizer({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]}, "post_processor": None,
        "decoder": GPT2_SPLIT, "model": model,
    }, where=path)  # fmt: skip


def _hf_name(name: str, path: Path) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in OUTSIDE:
        return f"{OUTSIDE[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in TENSORS:
        return f"model.layers.{parts[1]}.{TENSORS[parts[2]]}.{parts[3]}"
    raise UserError(f"unexpected tensor {name}", where=path)
