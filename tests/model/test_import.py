import functools
import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from model.gguf_import import read_gguf
from model.hf_import import read_hf, write_hf
from model.load import load_model
from soul.errors import UserError
from soul.files import home

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = home() / "models" / "smollm2-135m"
FAMILIES = ("tiny_llama", "tiny_qwen2", "tiny_qwen3")


@pytest.fixture
def tiny(tmp_path):
    """A copy of tiny_qwen2 (biases and an untied head) to spoil."""
    return Path(shutil.copytree(GOLDEN / "tiny_qwen2", tmp_path / "tiny"))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, ids):
    model = nnx.merge(graph, params)
    return model.logits(model.hidden(ids))


def logits_of(path, ids):
    return np.asarray(forward(*nnx.split(load_model(path, raw=True, compute="fp32").model), jnp.array(ids, jnp.int32)))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    golden = json.loads((GOLDEN / name / "logits.json").read_text())
    ours = logits_of(GOLDEN / name, golden["ids"])[:, -3:, :40]
    np.testing.assert_allclose(ours, golden["last_3_by_40"], atol=2e-6)


def save_as(path, arrays, dtype=None):
    save_file({k: np.ascontiguousarray(v if dtype is None else v.astype(dtype)) for k, v in arrays.items()}, path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_float_types(tiny, dtype):
    arrays = load_file(tiny / "model.safetensors")
    save_as(tiny / "model.safetensors", arrays, dtype)
    ids = [[1, 2, 3, 4]]
    np.testing.assert_allclose(logits_of(tiny, ids), logits_of(GOLDEN / "tiny_qwen2", ids), atol=1e-3 if dtype == np.float16 else 0)


def test_shards_and_redundant_tensors(tiny):
    arrays = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    names = sorted(arrays)
    files = {name: f"model-0000{1 + (n > 9)}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_as(
            tiny / file,
            {name: arrays[name] for name in names if files[name] == file} | {f"{file[:11]}.rotary_emb.inv_freq": np.ones(4, np.float32)},
        )
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    ids = [[5, 6, 7]]
    np.testing.assert_array_equal(logits_of(tiny, ids), logits_of(GOLDEN / "tiny_qwen2", ids))
    for bad, says in (
        ({"a": "../x.safetensors"}, "outside its directory"),
        ({"a": "gone.safetensors"}, "no such file"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(UserError, match=says):
            load_model(tiny)


def spoil(arrays, change):
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del arrays[name]
    elif change == "unexpected":
        arrays["model.layers.2.mlp.up_proj.weight"] = arrays[name]
    elif change == "shape":
        arrays[name] = arrays[name].T
    elif change == "integer":
        arrays[name] = arrays[name].astype(np.int8)


@pytest.mark.parametrize(
    "change, says",
    [
        ("missing", "missing model.layers.1.mlp.up_proj.weight"),
        ("unexpected", "unexpected model.layers.2.mlp.up_proj.weight"),
        ("shape", r"model.layers.1.mlp.up_proj.weight is \(16, 24\), not \(24, 16\)"),
        ("integer", "up_proj.weight is I8, not one of"),
    ],
)
def test_wrong_tensors_are_named(tiny, change, says):
    arrays = load_file(tiny / "model.safetensors")
    spoil(arrays, change)
    save_as(tiny / "model.safetensors", arrays)
    with pytest.raises(UserError, match=says):
        load_model(tiny)


def test_corrupt_files_are_one_clear_line(tiny):
    whole = (tiny / "model.safetensors").read_bytes()
    for data in (b"", b"\xff" * 64, whole[:100], whole[:-7]):
        (tiny / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="is not a safetensors file"):
            load_model(tiny)
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_model(tiny)
    (tiny / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="JSON object"):
        load_model(tiny)
    (tiny / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UserError, match="GPT2LMHeadModel is not supported"):
        load_model(tiny)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(source: Path, path: Path, arch: str, *, pre="smollm", leave_out=(), scaling=None) -> Path:
    """What llama.cpp's converter writes for these weights, its reordering of Llama's q and k rows included."""
    hf, spec = json.loads((source / "config.json").read_text()), json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
    if scaling:
        writer.add_rope_scaling_type(scaling)
    control = {token["id"]: token["content"] for token in spec["added_tokens"]}
    pieces = {n: piece for piece, n in spec["model"]["vocab"].items()} | control
    tokens = [pieces.get(n, f"[PAD{n}]") for n in range(hf["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if n in control else 1 if n in pieces else 5 for n in range(len(tokens))])
    writer.add_token_merges(["h e", "Ġ a"])
    for name, values in load_file(source / "model.safetensors").items():
        values, (stem, kind) = values.astype(np.float32), name.rsplit(".", 1)
        if stem in ("model.embed_tokens", "model.norm", "lm_head"):
            stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{GGUF_NAMES[rest]}"
        if arch == "llama" and stem.endswith(("attn_q", "attn_k")):
            heads = hf["num_attention_heads"] if stem.endswith("q") else hf["num_key_value_heads"]
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if stem not in leave_out:
            writer.add_tensor(f"{stem}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def mergeable(tmp_path):
    """tiny_* with the pieces that the GGUF's merges make, so its tokenizer is sound."""

    def make(name):
        path = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        spec = json.loads((path / "tokenizer.json").read_text())
        spec["model"]["vocab"] |= {"he": 276, "Ġa": 277}
        (path / "tokenizer.json").write_text(json.dumps(spec))
        return path

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_gives_the_same_logits_as_safetensors(name, mergeable, tmp_path):
    path = write_gguf(mergeable(name), tmp_path / "m.gguf", name.removeprefix("tiny_"))
    ids = [[1, 2, 3, 256, 40, 41]]
    np.testing.assert_array_equal(logits_of(path, ids), logits_of(GOLDEN / name, ids))
    config, tokenizer, _ = read_gguf(path)
    assert tokenizer.vocab_size == 278 and config.vocab_size == 288
    assert tokenizer.base_special["<|im_end|>"] == 258 and tokenizer.encode("he 12")[0] == 276


def test_gguf_written_as_a_hugging_face_directory(mergeable, tmp_path):
    source = read_gguf(write_gguf(mergeable("tiny_llama"), tmp_path / "m.gguf", "llama"))
    write_hf(tmp_path / "out", *source)
    config, tokenizer, tensors = read_hf(tmp_path / "out")
    assert config == source[0] and tokenizer.encode("he a 12") == source[1].encode("he a 12")
    assert {name for name, _, _ in tensors} == set(load_file(GOLDEN / "tiny_llama" / "model.safetensors"))
    np.testing.assert_array_equal(logits_of(tmp_path / "out", [[1, 2, 3]]), logits_of(GOLDEN / "tiny_llama", [[1, 2, 3]]))


@pytest.mark.parametrize("pre, cut", [("smollm", ["ab", " ", "1", "2", "3", "'s"]), ("qwen2", ["ab", " ", "1", "2", "3", "'s"])])
def test_gguf_pre_tokenizers(pre, cut, mergeable, tmp_path):
    from tokenizers import Tokenizer as HF

    source = read_gguf(write_gguf(mergeable("tiny_llama"), tmp_path / "m.gguf", "llama", pre=pre))
    splitter = HF.from_str(json.dumps(source[1].spec)).pre_tokenizer
    assert [piece.replace("Ġ", " ") for piece, _ in splitter.pre_tokenize_str("ab 123's")] == cut


def test_bad_gguf_files_are_one_clear_line(mergeable, tmp_path):
    source, path = mergeable("tiny_llama"), tmp_path / "m.gguf"
    whole = write_gguf(source, path, "llama").read_bytes()
    for data in (b"", b"not a model", whole[:8], whole[:300], whole[: len(whole) // 2], whole[:-40], b"GGUF" + b"\xff" * 200):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.gguf"):
            load_model(path)
    with pytest.raises(UserError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    for how, says in (
        ({"arch": "gpt2"}, "architecture gpt2 is not supported"),
        ({"arch": "llama", "pre": "falcon"}, "tokenizer gpt2/falcon is not supported"),
        ({"arch": "llama", "leave_out": ("blk.1.ffn_up",)}, "missing model.layers.1.mlp.up_proj.weight"),
        ({"arch": "llama", "scaling": gguf.RopeScalingType.YARN}, "RoPE scaling"),
    ):
        with pytest.raises(UserError, match=says):
            load_model(write_gguf(source, path, **how))


@pytest.mark.skipif(
    not REAL.exists() or json.loads((REAL / "source.json").read_text()).get("from") != "pip", reason="no pulled 4-bit smollm2-135m"
)
def test_real_logits_are_those_of_transformers():
    rows = json.loads((GOLDEN / "smollm2.json").read_text())
    logits = logits_of(REAL, [row["ids"] + [0] * (32 - len(row["ids"])) for row in rows])  # causal: what follows changes nothing
    for n, row in enumerate(rows):
        last = logits[n, len(row["ids"]) - 1]
        assert np.argsort(-last)[:5].tolist() == row["top_ids"]
        np.testing.assert_allclose(last[row["top_ids"]], row["top_logits"], atol=1e-3)
