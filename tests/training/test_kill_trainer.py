"""Killed anywhere, stopped, damaged or out of disk: the run that goes on ends in the bits of a run that nothing happened to.

Run as a script (BASE OUT KILLS), this file is the server of `killed`: it imports once and forks a child for each attempt, before JAX has a
backend. By hand, a larger KILLS makes it a soak test.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import orbax.checkpoint  # noqa: F401  before the fork: half a second in every child
import pytest
from flax import nnx
from test_pretrain import LENGTH, FakeCorpus
from tiny_model import model_dir, preference_rows, same, sft_rows

import training.run
from model import checkpoint
from model.load import load_model
from soul.errors import UserError
from soul.rows import write_rows
from training import dpo, pretrain, sft
from training.optim import OptimConfig
from training.run import TrainConfig

STAGES = ("pretrain", "sft", "dpo")
KILLS = 3  # of each stage, before it may finish
SLOWEST = 0.03  # seconds from the chosen operation to the kill: into TensorStore's own writes, of which Python sees nothing


def run(stage: str, base: Path, out: Path, **settings) -> int:
    """Train a few steps of the stage, with a checkpoint after each; gives the exit code."""
    settings = {"compute": "fp32", "checkpoint_steps": 1, "keep": 2} | settings
    if stage == "pretrain":
        return pretrain.main(pretrain.Config(out, depth=1, length=LENGTH, batch_rows=2, batch_tokens=4 * LENGTH, steps=6, **settings))
    train = TrainConfig(length=64, batch_rows=1, epochs=1.5, optim=OptimConfig(lr=1e-3), **settings)
    command = sft if stage == "sft" else dpo
    return command.main(command.Config(out=out, model=str(base / "model"), data=(base / f"{stage}.parquet",), train=train))


def without_the_rest(set_attribute) -> None:
    """A corpus that needs no files, and none of the samples that come after the training."""
    set_attribute(pretrain.Corpus, "open", lambda directory, length: FakeCorpus(length))
    set_attribute(pretrain, "finish", lambda loaded: None)
    set_attribute(sft, "write_samples", lambda *_: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_the_rest(monkeypatch.setattr)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model_dir(path / "model")
    write_rows(path / "sft.parquet", sft_rows(6), "sft")
    write_rows(path / "dpo.parquet", preference_rows(10), "preference")
    return path


@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    """Each stage trained once in peace, OUT/whole, and once under fire, OUT/killed; and what the server says of each attempt."""
    out = tmp_path_factory.mktemp("out")
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, __file__, base, out, str(KILLS)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, [json.loads(line) for line in done.stdout.splitlines()]


def weights(path: Path):
    return nnx.split(load_model(path).model)[1]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_it_ends_in_the_same_bits(killed, stage):
    out, attempts = killed
    mine = [attempt for attempt in attempts if attempt["stage"] == stage]
    assert [attempt["code"] for attempt in mine] == [-signal.SIGKILL] * KILLS + [0], mine
    assert same(weights(out / "killed" / stage), weights(out / "whole" / stage))
    left, expected = (sorted(os.listdir(out / name / stage / "checkpoints")) for name in ("killed", "whole"))
    assert left == expected  # nothing of the killed saves stays


def test_some_were_killed_in_a_save_and_some_went_on(killed):
    left = [name for attempt in killed[1] for name in attempt["left"]]
    assert any("partial" in name for name in left) and any(name.isdigit() for name in left)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_says_how_to_go_on(killed, base, stage, tmp_path, monkeypatch, capsys):
    def send(k):
        if k == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        watch_batches(patch.setattr, send)
        assert run(stage, base, tmp_path, checkpoint_steps=0) == 130
    assert f"Go on with: soulsmith {stage} --config {tmp_path / stage}.json" in capsys.readouterr().err.replace("\n", "")
    assert checkpoint.steps(tmp_path / stage) == [2 if stage == "pretrain" else 3]  # it takes two micro-batches for a step
    assert run(stage, base, tmp_path) == 0
    assert same(weights(tmp_path / stage), weights(killed[0] / "whole" / stage))


def test_a_full_disk_and_then_a_damaged_checkpoint(killed, base, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(k):
        if k == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))

    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"the disk is full; step 4 is whole\. Make room and run the same"),
        ):
            watch_batches(patch.setattr, fill)
            run("sft", base, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.steps(tmp_path / "sft") == [3, 4]
    for path in (tmp_path / "sft" / "checkpoints" / "4" / "opt_state").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    assert run("sft", base, tmp_path) == 0
    said = capsys.readouterr().err.replace("\n", "")
    assert "checkpoints/4: checkpoint cannot be read" in said and "going on at step 3" in said
    assert same(weights(tmp_path / "sft"), weights(killed[0] / "whole" / "sft"))


def watch_batches(set_attribute, seen) -> None:
    """Have `seen(k)` called before micro-batch k is made."""
    fit = training.run.fit

    def watched(programs, optimizer, state, batches, *rest, **named):
        return fit(programs, optimizer, state, lambda k: (seen(k), batches(k))[1], *rest, **named)

    set_attribute(training.run, "fit", watched)


def watch(out: Path, kill_at: int, delay: float) -> list[int]:
    """Count micro-batches and operations on files beneath `out`, and kill this process `delay` seconds after number `kill_at`."""
    count, due = [0], threading.Event()

    def kill():
        due.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def tick(*_):
        count[0] += 1
        if count[0] == kill_at:
            due.set() if delay else os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        writes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (event == "open" and arguments[2] & os.O_ACCMODE)
        if writes and str(arguments[0]).startswith(str(out)):
            tick()

    threading.Thread(target=kill, daemon=True).start()
    watch_batches(setattr, tick)
    sys.addaudithook(audit)
    return count


def attempt(stage: str, base: Path, out: Path, kill_at: int = 0, delay: float = 0.0) -> int:
    """Train in a forked child, which leaves the number of operations in OUT/STAGE.count; gives its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        count = watch(out / stage, kill_at, delay)
        code = run(stage, base, out)
        (out / f"{stage}.count").write_text(str(count[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(stage: str, base: Path, out: Path, kills: int) -> None:
    rng = random.Random(stage)
    assert attempt(stage, base, out / "whole") == 0
    count = int((out / "whole" / f"{stage}.count").read_text())
    for n in range(kills + 1):
        at = rng.randrange(1, count // 2) if n < kills else 0
        code = attempt(stage, base, out / "killed", at, rng.choice((0.0, rng.uniform(0, SLOWEST))))
        root = out / "killed" / stage / "checkpoints"
        left = sorted(os.listdir(root)) if root.is_dir() else []
        print(json.dumps({"stage": stage, "of": count, "at": at, "code": code, "left": left}), flush=True)


def main(base: str, out: str, kills: str) -> int:
    """Every stage in a process of its own."""
    import conftest  # noqa: F401  JAX as the tests have it

    without_the_rest(setattr)
    children = []
    for stage in STAGES:
        if not (child := os.fork()):
            try:
                serve(stage, Path(base), Path(out), int(kills))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
