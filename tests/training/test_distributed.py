"""Two processes of two devices each, started here and joined over loopback, train what one process does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS, ACCUMULATE = 3, 8


def main(out: Path) -> None:
    """One process: join, train 3 steps, save; process 0 leaves its losses and log-probs in `out`."""
    import jax
    import numpy as np

    from training.mesh import Layout, join, make_mesh

    jax.config.update("jax_num_cpu_devices", 2)
    join()
    assert jax.process_count() == 2 and jax.device_count() == 4

    from tiny_model import CONFIG

    from model import checkpoint

    layout = Layout(make_mesh("data=2,fsdp=2", accumulate=ACCUMULATE), CONFIG)
    built = []
    state, losses, scores = train(layout, built, out / f"metrics-{jax.process_index()}.jsonl")
    assert all(k % 4 // 2 == jax.process_index() for k in built) and len(built) == STEPS * ACCUMULATE // 2
    checkpoint.save(out / "run", STEPS, vars(state))
    if jax.process_index() == 0:
        np.savez(out / "got.npz", losses=losses, **{f"score{n}": s for n, s in enumerate(scores)})


def train(layout, built, metrics):
    """State, losses, and log-probs before the first step; `built` collects the numbers of the micro-batches that were made here."""
    import numpy as np
    from flax import nnx
    from tiny_model import decoder, random_examples

    from training import losses
    from training.data import Packed
    from training.fit import Loop, TrainState, fit, read_metrics
    from training.optim import OptimConfig, adamw
    from training.programs import Programs, plain_logprobs

    graph, params = nnx.split(decoder())
    packed = Packed.build(random_examples(0, 40, 32), 32, 2, 5)
    programs = Programs(plain_logprobs(graph), losses.nll, layout=layout)
    optimizer = adamw(OptimConfig(lr=1e-2), STEPS)
    params = layout.put(params)
    scores = [*programs.scores(params, None, [packed.batch(k) for k in range(5)])]

    def batch(k):
        built.append(k)
        return packed.batch(k)

    state, _ = fit(programs, optimizer, TrainState(params, layout.init(optimizer.init, params)), batch,
                   Loop(STEPS, lambda step, state: None, metrics, ACCUMULATE))  # fmt: skip
    return state, np.array([line["loss"] for line in read_metrics(metrics)]), scores


def start(spec: str, out: Path) -> subprocess.Popen:
    import jax

    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE))), "SOULSMITH_DISTRIBUTED": spec,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # fmt: skip
    command = [sys.executable, str(HERE / "test_distributed.py"), str(out)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_processes_train_what_one_does(tmp_path):
    """Measured: losses 0, weights 3e-4 of each leaf's largest. Two interpreters start, join and compile: 10 s of work."""
    import jax
    import numpy as np
    from test_mesh import apart

    from model import checkpoint
    from training.mesh import Layout

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(f"127.0.0.1:{port},2,{n}", tmp_path) for n in (0, 1)]
    try:
        state, losses, scores = train(Layout(), [], tmp_path / "alone.jsonl")
        faults = [process.communicate(timeout=240)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(faults)
    got = np.load(tmp_path / "got.npz", allow_pickle=False)
    assert apart(got["losses"], losses) < 1e-5
    assert len(scores) == 5 and all(apart(got[f"score{n}"], score) < 1e-5 for n, score in enumerate(scores))
    step, items = checkpoint.restore(tmp_path / "run", jax.eval_shape(lambda: vars(state)))
    assert step == STEPS and apart(items["params"], state.params) < 1e-3


@pytest.mark.parametrize("spec", ["here", "host:1,two,0", "host:1,2"])
def test_a_wrong_address_is_one_clear_line(monkeypatch, spec):
    from soul.errors import UserError
    from training.mesh import join

    monkeypatch.setenv("SOULSMITH_DISTRIBUTED", spec)
    with pytest.raises(UserError, match=r"cannot join.*Write HOST:PORT,PROCESSES,ID or auto\."):
        join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
