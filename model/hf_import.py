"""Reading and writing Hugging Face model directories (config.json, tokenizer.json, safetensors) of Llama, Qwen2 and Qwen3."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import param_table
from soul.errors import UserError
from soul.files import atomic_path, read_json, write_json

LazyTensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # Hugging Face name, shape, read()
READABLE = {"F32", "F16", "BF16"}


def read_hf(path: Path) -> tuple[ModelConfig, Tokenizer, Iterator[LazyTensor]]:
    """Open a safetensors directory, in one file or sharded by an index; weights stay on disk until read.
    Raises UserError for a missing or broken file, or an architecture that Decoder does not compute exactly.
    """
    config = ModelConfig.from_hf(_json_object(path / "config.json"), where=str(path / "config.json"))
    return config, Tokenizer.load(path), _tensors(path)


def _tensors(path: Path) -> Iterator[LazyTensor]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("has no weight_map", where=index)
        files = sorted({str(name) for name in weight_map.values()})
        if bad := [name for name in files if Path(name).name != name]:
            raise UserError(f"names a file outside its directory: {bad[0]}", where=index)
    else:
        files = ["model.safetensors"]
    for file in (path / name for name in files):
        if not file.exists():
            raise UserError("no such file", where=file, fix="Fetch the model again.")
        try:
            handle = safe_open(file, framework="numpy")
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                piece = handle.get_slice(name)
                if piece.get_dtype() not in READABLE:
                    raise UserError(f"tensor {name} is {piece.get_dtype()}, not one of {', '.join(sorted(READABLE))}", where=file)
                yield name, tuple(piece.get_shape()), partial(handle.get_tensor, name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"is not a safetensors file that can be read ({error})", where=file, fix="Fetch it again.") from None


def matched(config: ModelConfig, tensors: Iterable[LazyTensor], where: object) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of every tensor that `config` asks for, by Hugging Face name; no array is read.
    Raises UserError naming the missing, unexpected and mis-shaped tensors.
    """
    specs = {spec.hf: spec for spec in param_table(config)}
    found = {name: (shape, read) for name, shape, read in tensors if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        found.pop("lm_head.weight", None)
    faults = [f"missing {name}" for name in specs if name not in found] + [f"unexpected {name}" for name in found if name not in specs]
    for name in specs.keys() & found.keys():
        wanted = specs[name].shape[::-1] if specs[name].transpose else specs[name].shape
        if found[name][0] != wanted:
            faults.append(f"{name} is {found[name][0]}, not {wanted}")
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise UserError(f"the weights do not fit config.json: {'; '.join(sorted(faults)[:6])}{more}", where=where)
    return {name: found[name][1] for name in specs}


def assemble(
    config: ModelConfig, tensors: Iterable[LazyTensor], where: object, dtype=jnp.float32, rows: Callable | None = None
) -> dict[tuple, jax.Array]:
    """Parameters by path, in our orientation; `rows(path, values_vd)`, if given, may change embedding and head (new token rows).
    Raises UserError as `matched`, before the first array is read.
    """
    readers, params = matched(config, tensors, where), {}
    for spec in param_table(config):
        values = readers[spec.hf]()
        values = values.T if spec.transpose else values
        if rows and spec.path in (("embed",), ("head",)):
            values = rows(spec.path, values.astype(np.float32))
        # a copy: jax would otherwise alias the memory-mapped file, and training donates its buffers
        params[spec.path] = jnp.array(np.ascontiguousarray(values.astype(dtype, copy=False)))
    return params


def write_hf(path: Path, config: ModelConfig, tokenizer: Tokenizer, tensors: Iterable[LazyTensor]) -> None:
    """Write a directory that `read_hf` and `transformers` load: fp32 weights under their Hugging Face names."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(read(), dtype=np.float32) for name, _, read in tensors}
    write_json(path / "config.json", config.to_hf())
    tokenizer.save(path / "tokenizer.json")
    with atomic_path(path / "model.safetensors") as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})
        shutil.copymode(path / "config.json", temporary)  # safetensors writes 0600


def _json_object(path: Path) -> dict:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError("must hold a JSON object", where=path)
    return value
