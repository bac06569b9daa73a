"""Checkpoints: DIR/config.json, tokenizer.json, meta.json, and DIR/checkpoints/STEP/ITEM written by Orbax.

A step is a dict of pytrees, each its own Orbax item, so that the weights (`params`) can be read without the optimizer state.
A step directory appears by one rename when everything in it is written; what a killed process left is named `.STEP.partial`.
"""

import logging
import os
import shutil
from pathlib import Path

import jax

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from soul.console import console, plain
from soul.errors import UserError
from soul.files import disk_error, read_json, write_json
from soul.template import Template

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs a dozen lines for every save


def describe(directory: str | Path, config: ModelConfig, tokenizer: Tokenizer, meta: dict) -> None:
    """Write what a checkpoint directory is: config, tokenizer, and `meta` (soul_hash, base, stage …) with the template and its hash."""
    directory, template = Path(directory), Template(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config.to_hf())
    tokenizer.save(directory / "tokenizer.json")
    write_json(directory / "meta.json", {**meta, "template_hash": template.hash, "template": template.describe()})


def read_description(directory: str | Path) -> tuple[ModelConfig, Tokenizer, dict]:
    """Config, tokenizer and meta of a checkpoint directory.

    Raises:
        UserError: when a file is broken, or the template has changed since (the difference is shown).
    """
    directory = Path(directory)
    config = ModelConfig.from_hf(read_json(directory / "config.json"), where=str(directory / "config.json"))
    tokenizer, meta = Tokenizer.load(directory), read_json(directory / "meta.json")
    now = Template(tokenizer)
    if meta.get("template_hash") != now.hash:
        changes = "; ".join(_differences(meta.get("template") or {}, now.describe())[:3])
        raise UserError(
            f"was trained with another token template ({changes})", where=directory,
            fix="Use the soulsmith version that wrote it, or train again.",
        )  # fmt: skip
    return config, tokenizer, meta


def save(directory: str | Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` (a dict of pytrees of arrays; the weights under "params") as `step`, then drop all but the newest `keep` steps.

    Raises:
        UserError: when the disk is full; earlier steps are untouched.
    """
    import orbax.checkpoint as ocp

    root = Path(directory).absolute() / "checkpoints"
    final, partial, ready = root / str(step), root / f".{step}.partial", root / f".{step}.ready"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.glob(".*.partial"):
            shutil.rmtree(old)
        with ocp.StandardCheckpointer() as checkpointer:
            for item, tree in state.items():
                checkpointer.save(partial / item, {"tree": tree})  # Orbax wants a container; an item may be one array
                checkpointer.wait_until_finished()
        os.replace(partial, ready)
        if final.exists():
            os.replace(final, root / f".{step}.old.partial")
        os.replace(ready, final)
        for old in steps(directory)[: -keep or None]:
            os.replace(root / str(old), root / f".{old}.old.partial")
        for old in root.glob(".*.partial"):
            shutil.rmtree(old)
    except OSError as error:
        raise disk_error(error, final) from error
    except ValueError as error:  # TensorStore's own errors, a full disk among them
        raise UserError(f"cannot write the checkpoint: {error}", where=final, fix="Is the disk full?") from error
    return final


def steps(directory: str | Path) -> list[int]:
    """The complete steps of a checkpoint directory, in order."""
    root = Path(directory) / "checkpoints"
    for ready in root.glob(".*.ready"):  # killed between the two renames that replace a step: it is whole
        if not (final := root / ready.name.split(".")[1]).exists():
            os.replace(ready, final)
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def latest(directory: str | Path) -> int | None:
    """The newest complete step, or None."""
    return max(steps(directory), default=None)


def restore(directory: str | Path, abstract: dict, step: int | None = None) -> tuple[int, dict]:
    """Read the items named in `abstract` (a dict of pytrees of arrays or ShapeDtypeStruct), of `step` or else of the newest.

    A step that cannot be read is named and the one before it is taken, unless `step` was asked for.

    Raises:
        UserError: when no step can be read.
    """
    root = Path(directory).absolute() / "checkpoints"
    for left in sorted(root.glob(".*.partial")):
        console.print(plain(f"{left}: an unfinished checkpoint of a stopped run, not used"))
    fault = UserError("has no checkpoint", where=directory)
    for candidate in [step] if step is not None else reversed(steps(directory)):
        try:
            return candidate, {item: _restore_item(root / str(candidate) / item, tree) for item, tree in abstract.items()}
        except (ValueError, KeyError, OSError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            fault = UserError(f"checkpoint cannot be read ({reason})", where=root / str(candidate))
            if step is None:
                console.print(plain(f"{fault}; trying the one before it", style="bold yellow"))
    raise fault


def _restore_item(path: Path, tree):
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, {"tree": jax.tree.map(target, tree)})["tree"]


def _differences(old: object, new: object, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in sorted({*old, *new}) for d in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for n, (a, b) in enumerate(zip(old, new)) for d in _differences(a, b, f"{at}[{n}]")]
    return [] if old == new else [f"{at} was {str(old)[:80]!r}, is {str(new)[:80]!r}"]
