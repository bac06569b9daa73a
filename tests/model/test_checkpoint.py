"""Steps on the disk: whole or not there, in every bit what was saved, whatever happens to the files."""

import gc
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import checkpoint
from soul.errors import UserError

STATE = {
    "params": {"w": jnp.arange(6.0).reshape(2, 3)},
    "optimizer": (jnp.ones(3, jnp.bfloat16), {"count": jnp.int32(5)}),
    "step": jnp.int32(9),
}
ABSTRACT = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, STATE))


def state_of(step: int, size: int = 6) -> dict:
    return {"params": {"w": jnp.arange(float(size)) + step}, "opt_state": (jnp.int32(step), jnp.full(size, 0.1 * step))}


def same(a, b) -> bool:
    """Equal structure, types and bits."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_state_comes_back_in_every_bit_and_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, STATE, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3] and checkpoint.latest(tmp_path) == 3
    step, state = checkpoint.restore(tmp_path, ABSTRACT)
    assert step == 3 and same(state, STATE)
    assert list(checkpoint.restore(tmp_path, {"params": STATE["params"]}, step=2)[1]) == ["params"]  # weights alone
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.restore(tmp_path, {"params": {"w": jax.ShapeDtypeStruct((3, 3), jnp.float32)}})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.restore(tmp_path, {"adapters": STATE["params"]})


def test_retention(tmp_path):
    with checkpoint.Saver(tmp_path, keep=2, keep_every=4) as saver:
        for step in range(1, 11):
            saver.save(step, state_of(step))
            saver.wait()
            assert checkpoint.latest(tmp_path) == step
    assert names(tmp_path) == ["10", "4", "8", "9"]
    checkpoint.save(tmp_path, 7, state_of(7), keep=1, keep_every=4)  # went back to 4: what came after is of another time
    assert names(tmp_path) == ["4", "7"]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    following = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    state, saved = state_of(1, 1 << 20), []
    with checkpoint.Saver(tmp_path, keep=9) as saver:
        for step in range(4):
            saved.append(jax.tree.map(lambda x: np.array(x, copy=True), state))
            saver.save(step, state)
            state = jax.block_until_ready(following(state))
    for step, expected in enumerate(saved):
        assert same(checkpoint.restore(tmp_path, state, step=step)[1], expected)


def _damage(file: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "deleted":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))] if data else b"more")
    elif data:
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "cut", "deleted"])
def test_a_damaged_file_is_noticed_and_the_step_before_is_taken(tmp_path, kind, capsys):
    """Every file in turn: what comes back is what was saved as step 2, or step 2 is named and step 1 comes back."""
    rng, noticed = random.Random(kind), 0
    for step in (1, 2):
        checkpoint.save(tmp_path / "good", step, state_of(step))
    files = [p.relative_to(tmp_path / "good") for p in sorted((tmp_path / "good" / "checkpoints" / "2").rglob("*")) if p.is_file()]
    assert len(files) > 12
    for file in files:
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        _damage(tmp_path / "bad" / file, kind, rng)
        step, state = checkpoint.restore(tmp_path / "bad", state_of(0))
        said = capsys.readouterr().err.replace("\n", "")
        assert same(state, state_of(step)), file
        assert step == 2 or ("checkpoints/2: checkpoint cannot be read" in said and "trying the one before it" in said), file
        noticed += step == 1
        shutil.rmtree(tmp_path / "bad")
    assert noticed >= len(files) - 3  # all but the manifest and two marks of Orbax that nothing reads


def test_no_step_that_can_be_read_is_an_error(tmp_path):
    path = checkpoint.save(tmp_path, 2, STATE)
    (path / "more.txt").write_text("a file beside the items is nobody's")
    assert checkpoint.restore(tmp_path, ABSTRACT)[0] == 2
    (path / "params" / "more.txt").write_text("")
    with pytest.raises(UserError, match=r"more\.txt is missing or not of this step"):
        checkpoint.restore(tmp_path, ABSTRACT)
    (path / checkpoint.MANIFEST).write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.restore(tmp_path, ABSTRACT, step=2)
    with pytest.raises(UserError, match="has no checkpoint"):
        checkpoint.restore(tmp_path / "nothing", ABSTRACT)


@pytest.mark.parametrize("fault", ["cut", "gone", "shapes"])
def test_a_step_that_cannot_be_read_says_so_once(tmp_path, fault, caplog, capfd):
    """Without a manifest it is Orbax that fails, with one of many reads; what it leaves of the others is collected in silence, whenever that is."""
    state = {"params": [jnp.full((8, 8), float(n)) for n in range(40)]}
    path = checkpoint.save(tmp_path, 1, state)
    (path / checkpoint.MANIFEST).unlink()
    for file in (path / "params" / "d").iterdir() if fault != "shapes" else ():
        file.write_bytes(file.read_bytes()[:-3] + b"abc") if fault == "cut" else file.unlink()
    wanted = {"params": [jax.ShapeDtypeStruct((3, 3) if fault == "shapes" and n % 8 == 5 else (8, 8), jnp.float32) for n in range(40)]}
    for _ in range(8):
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.restore(tmp_path, wanted, step=1)
        gc.collect()
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_step_of_old_is_read(tmp_path):
    """Before there were manifests, each item was compressed and written by a checkpointer of its own."""
    with ocp.StandardCheckpointer() as checkpointer:
        for item, tree in STATE.items():
            checkpointer.save(tmp_path / "checkpoints" / "5" / item, {"tree": tree})
            checkpointer.wait_until_finished()
    step, state = checkpoint.restore(tmp_path, ABSTRACT)
    assert step == 5 and same(state, STATE)


def test_a_step_killed_while_it_replaced_another_is_whole(tmp_path):
    path = checkpoint.save(tmp_path, 4, STATE)
    os.replace(path, path.with_name(".4.ready"))
    assert checkpoint.latest(tmp_path) == 4
    checkpoint.save(tmp_path, 4, {"params": STATE["params"]})
    assert names(tmp_path) == ["4"] and not (path / "optimizer").exists() and (path / "params").is_dir()


def test_what_a_killed_save_left_is_named_and_then_removed(tmp_path, capsys):
    checkpoint.save(tmp_path, 1, STATE)
    for name in (".2.partial", ".3.partial.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / name)
    assert checkpoint.restore(tmp_path, ABSTRACT)[0] == 1
    said = capsys.readouterr().err.replace("\n", "")
    assert ".2.partial: an unfinished checkpoint" in said and ".3.partial.orbax-checkpoint-tmp: an unfinished checkpoint" in said
    checkpoint.save(tmp_path, 2, STATE)
    assert names(tmp_path) == ["1", "2"]


def test_a_full_disk_leaves_the_last_good_step(tmp_path, caplog):
    """A limit on the size of files stops a write on its way, as a quota does, and needs no right to mount."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = checkpoint.Saver(tmp_path)
    saver.save(1, state_of(1))
    saver.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=r"of step 2: the disk is full; step 1 is whole\. Make room and run the same command again"):
            saver.save(2, {"params": [jnp.full(1 << 14, float(n)) for n in range(40)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert not caplog.records  # one error says it all
    assert checkpoint.steps(tmp_path) == [1] and same(checkpoint.restore(tmp_path, state_of(0))[1], state_of(1))
    saver.save(2, state_of(2))
    saver.close()
    assert names(tmp_path) == ["2"] and same(checkpoint.restore(tmp_path, state_of(0))[1], state_of(2))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this user may mount one."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "disk")]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("seen", ["before", "on the way"])
def test_a_disk_that_is_really_full(small_disk, seen, monkeypatch):
    size = 70_000  # 560 KB a step: there is no room for two
    checkpoint.save(small_disk, 1, state_of(1, size))
    if seen == "on the way":
        monkeypatch.setattr(checkpoint, "_check_room", lambda *_: None)
    with pytest.raises(UserError, match=r"of step 2: the disk is full.*; step 1 is whole"):
        checkpoint.save(small_disk, 2, state_of(2, size))
    assert checkpoint.steps(small_disk) == [1] and same(checkpoint.restore(small_disk, state_of(0, size))[1], state_of(1, size))


def test_a_disk_without_room_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=47))
    with pytest.raises(UserError, match=r"the disk is full \(5.2e-08 GB needed, 4.7e-08 GB left\); there is none yet"):
        checkpoint.save(tmp_path, 2, state_of(2))
    assert names(tmp_path) == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))  # some network file systems
    checkpoint.save(tmp_path, 2, state_of(2))


def test_an_error_of_the_background_comes_with_the_next_call(tmp_path, monkeypatch, capsys):
    saver = checkpoint.Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_seal", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(1, state_of(1))
        with pytest.raises(UserError, match="of step 1: the disk is full; there is none yet"):
            saver.save(2, state_of(2))
        assert names(tmp_path) == []
        with pytest.raises(KeyError), saver:  # what stopped the training is what is raised; the other is printed
            saver.save(3, state_of(3))
            raise KeyError
    assert "cannot write the checkpoint of step 3" in capsys.readouterr().err.replace("\n", " ")


def test_a_state_moves_between_one_device_and_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    one = state_of(3, 16)
    checkpoint.save(tmp_path / "one", 3, one)
    placed = jax.tree.map(lambda x: jax.device_put(x, sharded if x.ndim else replicated), one)
    _, many = checkpoint.restore(tmp_path / "one", placed)
    assert same(many, one) and jax.tree.map(lambda x: x.sharding, many) == jax.tree.map(lambda x: x.sharding, placed)
    checkpoint.save(tmp_path / "many", 3, many)
    _, back = checkpoint.restore(tmp_path / "many", jax.eval_shape(lambda: one))
    assert same(back, one) and {device for leaf in jax.tree.leaves(back) for device in leaf.devices()} == {jax.devices()[0]}
