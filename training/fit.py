"""The one training loop: pretraining, SFT and DPO differ only in the programs and the batches that they hand to `fit`."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from soul.console import console, plain, progress
from soul.files import write_atomic
from soul.records import json_lines
from training.programs import Programs


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside its step number."""

    params: Any
    opt_state: Any


@dataclass(frozen=True)
class Eval:
    """`run(step, state)` gives numbers, after every `every` steps and after the last (0: after the last only)."""

    run: Callable[[int, TrainState], dict[str, float]]
    every: int = 0


@dataclass(frozen=True)
class Loop:
    """How long to train, and what the loop needs from outside.

    `save(step, state)` must have copied the state when it returns: the next step donates it.
    """

    steps: int
    save: Callable[[int, TrainState], None]
    metrics: Path
    accumulate: int = 1
    """Micro-batches per step."""
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    """Steps between checkpoints, beside the minutes (0: by the clock only)."""
    rate: Callable[[int], float] = lambda step: 0.0
    """The learning rate of a step, to be written down."""
    title: str = "training"
    evals: tuple[Eval, ...] = ()
    clock: Callable[[], float] = time.monotonic


def updater(optimizer: optax.GradientTransformation, shardings: Any = None) -> Callable:
    """The compiled `(state, gradient of the sum, value) -> (state, metrics)`; the state is donated, and stays where `shardings` says."""

    def _update(state: TrainState, grads, value):
        total, (count, sums) = value
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of its int32 count
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": total / count, **{name: s / count for name, s in sums.items()}, "grad_norm": optax.tree.norm(grads)}
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    return jax.jit(_update, donate_argnums=0, out_shardings=(shardings, None))


def fit(programs: Programs, optimizer: optax.GradientTransformation, state: TrainState, batches: Callable[[int], dict], loop: Loop, *,
        start: int = 0, frozen: Any = None) -> tuple[TrainState, int]:  # fmt: skip
    """Train from step `start` to `loop.steps`; gives the state and the step that it stands at, fewer than asked after a signal.

    `batches(k)` is micro-batch k, a pure function, so the step number alone says where the data stands. SIGINT and SIGTERM save at the next
    step boundary and return; a second SIGINT raises KeyboardInterrupt at once. A step's metrics are read after the next one was dispatched.
    """
    layout, alone = programs.layout, jax.process_count() == 1
    step, saved, update = start, loop.clock(), updater(optimizer, layout.shardings(state))

    def by_steps() -> bool:
        return loop.checkpoint_steps > 0 and step % loop.checkpoint_steps == 0

    def stopping(stopped: bool) -> bool:
        """Several processes agree to stop only where all of them save anyway: asking at each step would wait for each step."""
        if alone or not by_steps():
            return alone and stopped
        return bool(multihost_utils.process_allgather(np.array(stopped)).any())

    with _stop_signals() as stopped, closing(_Metrics(loop, start)) as log, progress(loop.title, loop.steps, "steps") as show:
        show(start)
        while step < loop.steps and not stopping(stopped.is_set()):
            micro = [batches(k) for k in layout.local(range(step * loop.accumulate, (step + 1) * loop.accumulate))]
            others = loop.accumulate // len(micro)  # each process sees its own; the rows are alike
            value, grads = programs.accumulated(state.params, frozen, micro)
            state, metrics = update(state, grads, value)
            del grads  # half a gigabyte that the next forward can use
            log.read()
            log.waiting = metrics, {"step": step, "lr": loop.rate(step), "tokens": others * sum(map(_tokens, micro)),
                                    "supervised": others * sum(int(b["weights"].sum()) for b in micro)}  # fmt: skip
            step += 1
            for eval_ in loop.evals:
                if step == loop.steps or (eval_.every > 0 and step % eval_.every == 0):
                    log.read()
                    log.evaluated(step, eval_.run(step, state))
            timed = alone and loop.clock() - saved >= 60 * loop.checkpoint_minutes
            if step < loop.steps and (timed or by_steps()):
                log.read()
                loop.save(step, state)
                saved = loop.clock()
            show(step, log.note)
        log.read()
        show(step, log.note)
    if step < loop.steps:
        loop.save(step, state)
    return state, step


def bits_per_byte(programs: Programs, params: Any, batches: Sequence[dict], token_bytes: np.ndarray, frozen: Any = None) -> float:
    """How well text is predicted, whatever the tokenizer: Σ nats / (ln 2 · Σ bytes) over the weighted targets that stand for bytes.

    `token_bytes[id]` is the length of a token's raw bytes, 0 for control ids, which count in neither sum. Infinite where no target has bytes.
    """
    nats = total = 0.0
    for batch, logp_n in zip(batches, programs.scores(params, frozen, batches), strict=True):
        bytes_n = token_bytes[batch["targets"]] * batch["weights"]
        nats -= float(np.sum(logp_n, where=bytes_n > 0, dtype=np.float64))
        total += float(bytes_n.sum())
    return nats / (math.log(2) * total) if total else math.inf


def _tokens(batch: dict) -> int:
    return int((batch["segments"] > 0).sum()) if "segments" in batch else batch["ids"].size


class _Metrics:
    """metrics.jsonl, a line per step, flushed; lines of steps that a resumed run will do again are taken out first."""

    def __init__(self, loop: Loop, start: int):
        self.clock, self.note = loop.clock, ""
        self.waiting: tuple[dict, dict] | None = None
        """A step's metrics on the device, and what is known of it."""
        kept = [line for line in json_lines(loop.metrics) if line["step"] < start + ("eval" in line)]
        write_atomic(loop.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = loop.metrics.open("a", encoding="utf-8")
        self.last = self.clock()

    def close(self) -> None:
        self.file.close()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Write down an eval of the state after `step` steps; its time doesn't count as training."""
        self._write({"step": step, "eval": values})
        console.print(plain(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())))
        self.last = self.clock()

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def read(self) -> None:
        """Wait for the step whose metrics are waiting, and write its line."""
        if self.waiting is None:
            return
        (metrics, known), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = self.clock()
        seconds, self.last = now - self.last, now
        line = known | values | {"seconds": round(seconds, 3), "tokens_per_s": round(known["tokens"] / seconds, 1) if seconds > 0 else 0.0}
        self._write(line)
        accuracy = f" accuracy {values['accuracy']:.2f}" if "accuracy" in values else ""
        self.note = f"loss {values['loss']:.3f}{accuracy} {line['tokens_per_s']:,.0f} tok/s"
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss of step {known['step']} is {values['loss']}")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, one a step; a line cut by a crash is left out."""
    return [line for line in json_lines(path) if "eval" not in line]


def read_evals(path: Path) -> list[dict]:
    """{"step", "eval": {name: number}} of each evaluation on the way."""
    return [line for line in json_lines(path) if "eval" in line]


@contextmanager
def _stop_signals():
    """An event set by SIGINT or SIGTERM; the previous handlers come back at the first signal, so a second SIGINT interrupts."""
    stopped, before = threading.Event(), {}

    def restore():
        while before:
            signal.signal(*before.popitem())

    def stop(number, _frame):
        restore()
        stopped.set()
        console.print(f"{signal.Signals(number).name}: saving after this step (again: stop without saving)")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
