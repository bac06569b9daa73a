"""The shape of a decoder, and its translation from and to Hugging Face `config.json`."""

from dataclasses import dataclass

from soul.errors import UserError

FAMILIES = {  # architecture -> (qkv_bias, qk_norm); what these three compute is exactly what Decoder computes
    "LlamaForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 49152
    d_model: int = 576
    n_layers: int = 30
    n_heads: int = 9
    n_kv_heads: int = 3
    d_head: int = 64
    d_ff: int = 1536
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    max_len: int = 8192

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            what = f"{self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads"
            raise UserError(what, fix="n_heads must be a multiple of n_kv_heads")
        if self.d_head % 2:
            raise UserError(f"head width {self.d_head} is odd", fix="RoPE rotates pairs: d_head must be even")

    @classmethod
    def from_hf(cls, hf: dict, where: str = "config.json") -> "ModelConfig":
        """Read a `config.json` of Llama, Qwen2 or Qwen3. Raises UserError where Decoder would not be exact."""
        arch = (hf.get("architectures") or ["(none)"])[0]
        if arch not in FAMILIES:
            raise UserError(f"architecture {arch} is not supported", where=where, fix=f"use one of {', '.join(FAMILIES)}")
        rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        _refuse_inexact(hf, rope, where)
        qkv_bias, qk_norm = FAMILIES[arch]
        try:
            heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
            default_head = 128 if arch == "Qwen3ForCausalLM" else d_model // heads
            return cls(
                vocab_size=hf["vocab_size"],
                d_model=d_model,
                n_layers=hf["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=hf.get("num_key_value_heads") or heads,
                d_head=hf.get("head_dim") or default_head,
                d_ff=hf["intermediate_size"],
                norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                tied=bool(hf.get("tie_word_embeddings", False)),
                max_len=hf.get("max_position_embeddings", 2048),
            )
        except KeyError as missing:
            raise UserError(f"key {missing} is missing", where=where) from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"a size is not a positive number ({error})", where=where) from None

    def to_hf(self) -> dict:
        """The `config.json` under which transformers, vLLM and llama.cpp compute the same. UserError if there is none."""
        arch = next((name for name, switches in FAMILIES.items() if switches == (self.qkv_bias, self.qk_norm)), None)
        if arch is None:
            raise UserError("no Hugging Face architecture has both QKV bias and QK-norm", fix="switch one of them off")
        return {
            "architectures": [arch],
            "model_type": arch.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.d_head,
            "intermediate_size": self.d_ff,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_len,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": "float32",
        }


def _refuse_inexact(hf: dict, rope: dict, where: str) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    faults = {
        f"RoPE scaling {kind!r}": kind not in ("default", None),
        "partial rotary embedding": hf.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        "sliding-window attention": bool(hf.get("use_sliding_window")) or layer_types != {"full_attention"},
        f"activation {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        # in transformers this flag of Llama and Qwen3 biases the output projection too, which Decoder lacks
        "attention bias": bool(hf.get("attention_bias")) and hf["architectures"][0] != "Qwen2ForCausalLM",
        "MLP bias": bool(hf.get("mlp_bias")),
        "quantised weights": bool(hf.get("quantization_config")),
    }
    for what, present in faults.items():
        if present:
            raise UserError(f"{what} is not supported, so the import would not be exact", where=where)
