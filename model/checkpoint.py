"""Checkpoints: DIR/config.json, tokenizer.json, meta.json, and DIR/checkpoints/STEP/ITEM written by Orbax.

A step is a dict of pytrees, each its own Orbax item, so that the weights (`params`) can be read without the optimizer state.
A step directory appears by one rename when all of it is on the disk, last of all manifest.json with the SHA-256 of each file: nothing else would
notice a flipped bit in a weight. What a killed process left is named `.STEP.partial…`.
"""

import logging
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from soul.console import console, plain
from soul.errors import UserError
from soul.files import read_json, sha256_file, write_json
from soul.template import Template

MANIFEST = "manifest.json"
FULL = ("No space left", "Disk quota", "File too large", "disk is full")  # how TensorStore's ValueError spells a full disk
UNAWAITED = r"coroutine '(async_serialize|_read_array_index_and_device_put|Store\._get_array_metadatas)"
NOISE = re.compile(
    rf"{UNAWAITED}|Event loop is closed|Encountered error while reading array index|orbax|tensorstore|OCDBT|the stored shape"
)

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a dozen lines for every save, and tracebacks of what it raises as well


def describe(directory: str | Path, config: ModelConfig, tokenizer: Tokenizer, meta: dict) -> None:
    """Write what a checkpoint directory is: config, tokenizer, and `meta` (soul_hash, base, stage …) with the template and its hash."""
    directory, template = Path(directory), Template(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config.to_hf())
    tokenizer.save(directory / "tokenizer.json")
    write_json(directory / "meta.json", {**meta, "template_hash": template.hash, "template": template.describe()})


def read_description(directory: str | Path) -> tuple[ModelConfig, Tokenizer, dict]:
    """Config, tokenizer and meta of a checkpoint directory.
    Raises UserError when a file is broken, or the template has changed since (the difference is shown).
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


def save(directory: str | Path, step: int, state: dict, keep: int = 2, keep_every: int = 0) -> Path:
    """Write `state` (a dict of pytrees of arrays; the weights under "params") as `step` and wait until it is there; see `Saver`."""
    with Saver(directory, keep, keep_every) as saver:
        saver.save(step, state)
    return saver.root / str(step)


class Saver:
    """Writes steps into DIRECTORY/checkpoints behind the training, one at a time; a context manager.

    The newest `keep` steps stay, and those that `keep_every` divides (0: none). Steps after the one just saved are dropped: a run that went back
    past a damaged step writes them anew. With `jax.distributed` every process calls `save` and `close` alike and sees the same file system: each
    writes its shards, and process 0 gives the step its name when all of them are there.
    Raises UserError from the next call, when a step could not be written. Earlier steps are untouched; its parts go at once, or when the next step is saved.
    """

    def __init__(self, directory: str | Path, keep: int = 1, keep_every: int = 0):
        self.root, self.keep, self.keep_every = Path(directory).absolute() / "checkpoints", max(1, keep), keep_every
        self.pool, self.pending = ThreadPoolExecutor(1, "checkpoint"), None
        _hush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        elif self.pending and (error := self.pending.exception()):  # what is on its way says more; other processes may not come here
            console.print(plain(str(error), style="bold yellow"))

    def save(self, step: int, state: dict) -> None:
        """Begin to write `state`; its arrays may be donated when this returns.

        From an accelerator they are copied to the host, and written while the training goes on. In host memory they are written before this
        returns (1.1 to 1.9 s for the 1.6 GB of 135M weights and Adam's state), and only checksums, rename and clean-up go on behind: XLA would
        make the next step wait for the reader of a donated buffer anyway, and a copy would take three times the weights in memory.
        """
        self.wait()
        with self._failing(step):
            self.root.mkdir(parents=True, exist_ok=True)
            _sweep(self.root)
            _check_room(self.root, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            writing = _write(self.root / f".{step}.partial", state)
            if jax.default_backend() == "cpu":
                writing.wait_until_finished()
        self.pending = self.pool.submit(self._finish, step, writing)

    def wait(self) -> None:
        """Return when the step that was being written is in its place, seen by every process."""
        if self.pending is None:
            return
        error, self.pending = self.pending.exception(), None
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(error is not None)).any():
            error = error or UserError("another process could not write its part of a checkpoint", where=self.root)
        if error:
            raise error

    def close(self) -> None:
        self.wait()
        self.pool.shutdown()

    def _finish(self, step: int, writing) -> None:
        with self._failing(step):
            writing.wait_until_finished()
            writing.close()
            if jax.process_index() == 0:
                _seal(partial := self.root / f".{step}.partial")
                _name(partial, self.root / str(step))
                for old in self._expired(step):
                    os.replace(self.root / str(old), self.root / f".{old}.old.partial")
                _sweep(self.root)

    def _expired(self, step: int) -> list[int]:
        known = steps(self.root.parent)
        kept = [n for n in known if n <= step][-self.keep :]
        return [n for n in known if n not in kept and (n > step or not self.keep_every or n % self.keep_every)]

    @contextmanager
    def _failing(self, step: int):
        """Turn what stops a write into a UserError, and take its parts away."""
        try:
            yield
        except (OSError, ValueError, UserError) as error:  # TensorStore's errors are ValueErrors
            _sweep(self.root)
            full = any(word in str(error) for word in FULL)
            reason = error.what if isinstance(error, UserError) else "the disk is full" if full else " ".join(str(error).split())[:200]
            whole = latest(self.root.parent)
            known = "there is none yet" if whole is None else f"step {whole} is whole"
            fix = f"{'Make room and run' if full else 'Run'} the same command again: it goes on from there."
            raise UserError(f"cannot write the checkpoint of step {step}: {reason}; {known}", where=self.root, fix=fix) from error


@cache
def _hush() -> None:
    """Keep quiet, once for the process, what is left of the other reads and writes of a save or restore of which one failed.

    Orbax closes their event loop and leaves them to the garbage collector, which finds them at any later time: 2,500 tracebacks after 291 failed
    restores of 80 arrays, each of which had been told in one line.
    """
    warnings.filterwarnings("ignore", UNAWAITED, RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: not NOISE.search(record.getMessage()))
    show = sys.unraisablehook
    sys.unraisablehook = lambda it: None if NOISE.search(str(it.exc_value)) else show(it)


def _check_room(root: Path, needed: int) -> None:
    """Refuse before the disk is filled for nothing. (A quota is met only on the way.)"""
    disk = shutil.disk_usage(root)
    if disk.total and disk.free < needed:
        raise UserError(f"the disk is full ({needed / 1e9:.3g} GB needed, {disk.free / 1e9:.3g} GB left)")


def _write(path: Path, state: dict):
    """Begin one Orbax save of all items; gives the checkpointer that has to finish it.

    Without compression: 1.1 s to 1.9 s in place of 2.2 s to 3.9 s for 1.6 GB on 2 cores, read in 1.3 s in place of 1.9 s, for 8 % more bytes.
    """
    import orbax.checkpoint as ocp

    handlers = {item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in state}
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
    trees = {item: ocp.args.PyTreeSave({"tree": tree}) for item, tree in state.items()}  # Orbax wants a container; an item may be one array
    checkpointer.save(path, ocp.args.Composite(**trees))
    return checkpointer


def _seal(path: Path) -> None:
    """Write the manifest, and see to it that every file and every directory entry has reached the disk."""
    write_json(path / MANIFEST, _digests(path))
    for inside in (*path.rglob("*"), path):
        _sync(inside)


def _name(partial: Path, final: Path) -> None:
    if final.exists():  # what replaces it waits under a name that `steps` understands while there is none
        ready = partial.with_name(f".{final.name}.ready")
        os.replace(partial, ready)
        os.replace(final, partial.with_name(f".{final.name}.old.partial"))
        partial = ready
    os.replace(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(root: Path) -> None:
    for left in root.glob(".*.partial*") if jax.process_index() == 0 else ():
        shutil.rmtree(left, ignore_errors=True)


def _digests(path: Path, items: tuple[str, ...] = ("*",)) -> dict[str, str]:
    """SHA-256 of each file beneath the items, by its path in the step."""
    files = sorted(file for item in items for file in path.glob(f"{item}/**/*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        return {file.relative_to(path).as_posix(): digest for file, digest in zip(files, pool.map(sha256_file, files))}


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

    An array comes back under the sharding that its leaf in `abstract` has (or on the first device), whatever it was saved under.
    A step that is damaged or cannot be read is named and the one before it is taken, unless `step` was asked for.
    Raises UserError when no step can be read.
    """
    _hush()
    root = Path(directory).absolute() / "checkpoints"
    for left in sorted(root.glob(".*.partial*")):
        console.print(plain(f"{left}: an unfinished checkpoint of a stopped run, not used"))
    fault = UserError("has no checkpoint", where=directory)
    for candidate in [step] if step is not None else reversed(steps(directory)):
        path = root / str(candidate)
        try:
            _verify(path, tuple(abstract))
            return candidate, {item: _restore_item(path / item, tree) for item, tree in abstract.items()}
        except (ValueError, KeyError, OSError, TypeError, UserError) as error:
            reason = " ".join(str(error).split())[:200]
            fault = UserError(f"checkpoint cannot be read ({reason})", where=path)
            if step is None:
                console.print(plain(f"{fault}; trying the one before it", style="bold yellow"))
    raise fault


def _verify(path: Path, items: tuple[str, ...]) -> None:
    """Raise ValueError naming a file of the items that is missing, more or other than the manifest says. Steps of old have no manifest."""
    if not (path / MANIFEST).exists():
        return
    known = read_json(path / MANIFEST)
    expected = {name: digest for name, digest in known.items() if name.split("/")[0] in items} if isinstance(known, dict) else {}
    found = _digests(path, items)
    if wrong := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise ValueError(f"{wrong[0]} is {'damaged' if wrong[0] in expected and wrong[0] in found else 'missing or not of this step'}")


def _restore_item(path: Path, tree):
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

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
