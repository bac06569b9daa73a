"""One way in: `load_model` takes a pulled name, a Hugging Face directory, a GGUF file, a checkpoint or a run directory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import chatml, checkpoint, pull
from model.config import ModelConfig
from model.gguf_import import read_gguf
from model.hf_import import LazyTensor, assemble, read_hf
from model.tokenizer import DOCUMENT_START, TURN_START, Tokenizer, adopt
from model.transformer import Decoder
from soul.errors import UserError
from soul.files import read_json

STAGES = ("dpo", "sft", "pretrain")  # of a run, the furthest first
NOISE = 0.3  # in standard deviations of the copied row


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer; `meta` says where it comes from, `path` is the directory it was read from."""

    model: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    meta: dict
    path: Path


def load_model(name_or_dir: str | Path, *, dtype=jnp.float32, raw: bool = False, compute: str = "auto") -> Loaded:
    """Load a model by name or path, on the default device.

    A base model's tokenizer always carries our special tokens on the base's control ids. `raw=True` keeps the base's weights as they
    are (for its own chat template); otherwise `adopt_rows` gives those ids rows to start from. Of a run directory the last stage that
    has a checkpoint is taken. A name that has not been pulled yet is pulled.
    Raises UserError for an unknown name, a directory that is none of these, or weights that do not fit.
    """
    path = find(name_or_dir)
    if (path / "checkpoints").is_dir():
        return _load_checkpoint(path, dtype, compute)
    config, tokenizer, tensors = read_base(path)
    meta = read_json(path / "source.json") if (path / "source.json").exists() else {"base": path.name}
    adopted = adopt(tokenizer)
    fresh = not tokenizer.special and not raw  # a tokenizer with our tokens comes with trained rows
    tensors = assemble(config, tensors, path, dtype, (lambda name, rows: adopt_rows(rows, adopted, name[0])) if fresh else None)
    config = replace(config, vocab_size=tensors[("embed",)].shape[0])
    return Loaded(build(config, tensors, dtype, compute), adopted, config, {**meta, "raw": raw}, path)


def find(name_or_dir: str | Path) -> Path:
    """The directory (or GGUF file) that a model argument means; pulls a known name when it is not there."""
    path = Path(name_or_dir)
    if not path.exists():
        if str(name_or_dir) in pull.MODELS:
            return pull.pull(str(name_or_dir))
        raise UserError(f"no model {str(name_or_dir)!r}", fix=f"Give a directory, or one of: {', '.join(pull.MODELS)}.")
    for candidate in (path, *(path / stage for stage in STAGES)):
        if checkpoint.latest(candidate) is not None:
            return candidate
    if path.suffix == ".gguf" or (path / "config.json").exists():
        return path
    raise UserError("holds no model", where=path, fix="Expected a run, a checkpoint, or config.json with safetensors.")


def read_base(path: Path) -> tuple[ModelConfig, Tokenizer, Iterator[LazyTensor]]:
    """What a GGUF file or a Hugging Face directory holds; weights stay on disk until read."""
    return read_gguf(path) if path.suffix == ".gguf" else read_hf(path)


def _load_checkpoint(path: Path, dtype, compute: str) -> Loaded:
    config, tokenizer, meta = checkpoint.read_description(path)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, compute=compute))
    graph, abstract = nnx.split(model)
    step, state = checkpoint.restore(path, {"params": abstract})
    return Loaded(nnx.merge(graph, state["params"]), tokenizer, config, {**meta, "step": step}, path)


def save_model(directory: str | Path, model: Decoder, tokenizer: Tokenizer, meta: dict, step: int = 0) -> Path:
    """Write a params-only checkpoint that `load_model` reads back exactly."""
    checkpoint.describe(directory, model.config, tokenizer, meta)
    return checkpoint.save(directory, step, {"params": nnx.state(model)}, keep=1)


def build(config: ModelConfig, params: dict[tuple, jax.Array], dtype=jnp.float32, compute: str = "auto") -> Decoder:
    """A Decoder around given parameters, without drawing random ones first."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, compute=compute))
    for path, value in params.items():
        node = model.layers[path[1]] if path[0] == "layers" else model
        setattr(node, path[-1], nnx.Param(value))
    return model


def adopt_rows(rows_vd: np.ndarray, tokenizer: Tokenizer, name: str = "embed") -> np.ndarray:
    """Rows of the embedding (or head) for our special tokens on a base model's control ids.

    `…end` rows become the base's end-of-turn row plus noise, all others its start-of-turn row plus noise; the end of the
    assistant's turn, `<|bos|>` and `<|pad|>` keep the rows they took over. Mean-initialised rows were measured to fail: 0 of 24 valid
    calls after 100,000 tokens, against 8 of 8 after 50,000 with copies (DESIGN.md). Ids beyond the base's vocabulary get the mean row.

    The two tokens that stand before every reply get the embeddings of the two that the base reads there (`reply_header`), so that it
    replies to what was said from the first step on: on SmolLM2-135M the KL divergence of the reply's first token from that in the base's
    own template falls from 12.6 to 3.4 nats, of the second from 9.7 to 0.7 (bench/takeover.py).
    """
    appended = max(0, tokenizer.vocab_size - len(rows_vd))
    out = np.concatenate([rows_vd, np.repeat(rows_vd.mean(0, keepdims=True), appended, 0)])
    names = {n: base for base, n in tokenizer.base_special.items()}
    ours = tokenizer.special
    end, start = ours["<|assistant_end|>"], ours["<|assistant_start|>"]
    if names.get(start) not in TURN_START:
        start = end
    kept = {"<|assistant_end|>", "<|pad|>", *(["<|assistant_start|>"] if start != end else [])}
    if names.get(ours["<|bos|>"]) in DOCUMENT_START:
        kept.add("<|bos|>")
    random = np.random.default_rng(list(name.encode()))
    for token, n in ours.items():
        if token not in kept:
            row = rows_vd[end if token.endswith("end|>") else start]
            out[n] = row + NOISE * row.std() * random.standard_normal(row.shape).astype(row.dtype)
    if name == "embed" and (header := reply_header(tokenizer)):
        out[[ours["<|user_end|>"], ours["<|tool_result_end|>"], ours["<|assistant_start|>"]]] = rows_vd[[header[0], header[0], header[1]]]
    return out


def reply_header(tokenizer: Tokenizer) -> list[int]:
    """The base's last two ids before a reply in its own chat template: of ChatML or Llama 3, [] of others."""
    base = tokenizer.base_special
    if chatml.TURN_START in base and chatml.TURN_END in base:
        return chatml.encode_chatml(tokenizer, [])[-2:]
    return [base["<|end_header_id|>"], *tokenizer.encode("\n\n")][-2:] if "<|end_header_id|>" in base else []
