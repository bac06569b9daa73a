import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.chatml import encode_chatml
from model.config import ModelConfig
from model.load import NOISE, adopt_rows, find, load_model, reply_header, save_model
from model.tokenizer import Tokenizer, added_token, adopt
from model.transformer import Decoder
from soul.conversation import user
from soul.errors import UserError
from soul.files import home
from soul.template import Template

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = home() / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def loaded():
    return load_model(GOLDEN / "tiny_llama", compute="fp32")


def arrays_of(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_raw_keeps_every_row_and_adoption_changes_only_ours(loaded):
    raw = load_model(GOLDEN / "tiny_llama", raw=True, compute="fp32")
    a, b = arrays_of(raw.model), arrays_of(loaded.model)
    assert raw.tokenizer.special == loaded.tokenizer.special and raw.meta == {"base": "tiny_llama", "raw": True}
    changed = set(np.flatnonzero((a[("embed",)] != b[("embed",)]).any(1)).tolist())
    kept = {"<|assistant_end|>", "<|bos|>", "<|pad|>"}
    assert changed == {n for name, n in loaded.tokenizer.special.items() if name not in kept}
    assert_same({k: v for k, v in a.items() if k != ("embed",)}, {k: v for k, v in b.items() if k != ("embed",)})
    again = load_model(GOLDEN / "tiny_llama", compute="fp32")
    assert_same(arrays_of(again.model), b)  # the noise is seeded


def test_adopted_rows_are_noisy_copies_of_turn_start_and_turn_end(loaded):
    tokenizer, width = loaded.tokenizer, 4096
    rows = np.random.default_rng(0).standard_normal((288, width)).astype(np.float32) * 0.05
    new, head = adopt_rows(rows, tokenizer), adopt_rows(rows, tokenizer, "head")
    for token, n in tokenizer.special.items():
        source = tokenizer.special["<|assistant_end|>" if token.endswith("end|>") else "<|assistant_start|>"]
        noise = (new[n] - rows[source]) / rows[source].std()
        if token in ("<|system_end|>", "<|tool_call_end|>", "<|tool_arg|>", "<|tool_val|>", "<|system_start|>"):
            assert abs(noise.std() - NOISE) < 0.02 and abs(noise.mean()) < 0.02
            assert (head[n] != new[n]).any()
    assert new.dtype == np.float32 and (new[:256] == rows[:256]).all()


def test_what_stands_before_a_reply_reads_as_in_the_bases_own_template(loaded):
    tokenizer = loaded.tokenizer
    rows = np.random.default_rng(0).standard_normal((288, 8)).astype(np.float32)
    new, head = adopt_rows(rows, tokenizer), adopt_rows(rows, tokenizer, "head")
    before, last = encode_chatml(tokenizer, [user("hi")])[-2:]  # ChatML's own ids
    assert before == tokenizer.encode("t")[0] and last == tokenizer.encode("\n")[0]
    for token, n in (("<|user_end|>", before), ("<|tool_result_end|>", before), ("<|assistant_start|>", last)):
        np.testing.assert_array_equal(new[tokenizer.special[token]], rows[n])
        assert (head[tokenizer.special[token]] != rows[n]).all()  # what is read, not what is written


def test_reply_headers_of_llama_3_and_of_a_base_without_a_template():
    base = Tokenizer.load(GOLDEN / "tiny_llama")
    names = {"<|end_header_id|>": 260, "<|eot_id|>": 261}
    llama = SimpleNamespace(base_special=names, encode=lambda text: {"\n\n": [271]}[text])
    assert reply_header(llama) == [260, 271]
    assert reply_header(SimpleNamespace(base_special={"<|endoftext|>": 0}, encode=base.encode)) == []


def test_a_base_with_few_control_tokens_grows(tmp_path):
    path = Path(shutil.copytree(GOLDEN / "tiny_qwen2", tmp_path / "m"))
    spec = json.loads((path / "tokenizer.json").read_text())
    vocab = {**spec["model"]["vocab"], **{f"Ġ{c}": 256 + n for n, c in enumerate("abcdefghijklmnopqrstuvwxyz")}}
    spec["model"] |= {"vocab": vocab, "merges": [f"Ġ {c}" for c in "abcdefghijklmnopqrstuvwxyz"]}
    spec["added_tokens"] = [added_token("<|endoftext|>", 282), added_token("<|im_end|>", 283)]
    (path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = load_model(path, compute="fp32")
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 296  # 8 more than the model had
    assert loaded.model.embed[...].shape == loaded.model.head[...].shape == (296, 16)
    assert np.abs(np.asarray(loaded.model.embed[...])).sum(1).min() > 0
    start, end = loaded.tokenizer.special["<|assistant_start|>"], loaded.tokenizer.special["<|assistant_end|>"]
    rows = np.asarray(loaded.model.embed[...])
    assert np.corrcoef(rows[start], rows[end])[0, 1] > 0.8  # no turn-start token: every row comes from the turn's end


def test_checkpoint_round_trip_is_exact(loaded, tmp_path):
    save_model(tmp_path / "run" / "sft", loaded.model, loaded.tokenizer, {"soul_hash": "s", "stage": "sft"}, step=7)
    for path in (tmp_path / "run", tmp_path / "run" / "sft"):
        again = load_model(path, compute="fp32")
        assert_same(arrays_of(again.model), arrays_of(loaded.model))
        assert again.path == tmp_path / "run" / "sft" and again.config == loaded.config
        assert again.meta["soul_hash"] == "s" and again.meta["step"] == 7
        assert again.meta["template_hash"] == Template(loaded.tokenizer).hash
        assert again.tokenizer.special == loaded.tokenizer.special and again.tokenizer.base_special == loaded.tokenizer.base_special
    half = load_model(tmp_path / "run", dtype=jnp.bfloat16, compute="fp32").model
    assert half.embed[...].dtype == jnp.bfloat16
    save_model(tmp_path / "run" / "dpo", loaded.model, loaded.tokenizer, {"stage": "dpo"})
    assert find(tmp_path / "run").name == "dpo"  # the furthest stage


def test_what_holds_no_model_is_said_clearly(tmp_path):
    for argument, says in ((tmp_path, "holds no model"), ("smollm3", "no model 'smollm3'.* one of: smollm2-135m")):
        with pytest.raises(UserError, match=says):
            load_model(argument)


def test_a_changed_template_is_refused_and_shown(loaded, tmp_path):
    save_model(tmp_path, loaded.model, loaded.tokenizer, {})
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["template"]["rules"], meta["template_hash"] = "older rules", "0" * 64
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"another token template.*rules was 'older rules', is 'bos once"):
        load_model(tmp_path)


def test_a_model_trained_from_scratch_saves_and_loads(tmp_path):
    tokenizer = adopt(Tokenizer.load(GOLDEN / "tiny_llama"))
    config = ModelConfig(vocab_size=288, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, tied=False, max_len=32)
    model = Decoder(config, nnx.Rngs(3), compute="fp32")
    save_model(tmp_path, model, tokenizer, {"stage": "pretrain"})
    assert_same(arrays_of(load_model(tmp_path, compute="fp32").model), arrays_of(model))


@pytest.mark.skipif(not REAL.exists(), reason="smollm2-135m is not pulled")
def test_real_model_by_name():
    loaded = load_model("smollm2-135m", dtype=jnp.bfloat16)
    assert loaded.config.vocab_size == 49152 and loaded.meta["base"] == "smollm2-135m" and loaded.path == REAL
    assert loaded.model.embed[...].dtype == jnp.bfloat16 and sum(v.size for v in jax.tree.leaves(nnx.state(loaded.model))) == 134_515_008
