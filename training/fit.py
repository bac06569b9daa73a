"""The one training loop: pretraining, SFT and DPO differ only in the programs and the batches that they hand to `fit`."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from soul.console import console, plain, progress
from training.programs import Programs


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds beside its step number."""

    params: Any
    opt_state: Any


@dataclass(frozen=True)
class FitConfig:
    steps: int
    accumulate: int = 1
    """Micro-batches per step."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints: each is three times the weights (1.6 GB for 135M)."""
    checkpoint_steps: int = 0
    """Steps between checkpoints, beside the minutes (0: by the clock only)."""


@dataclass(frozen=True)
class Eval:
    """`run(step, state)` gives numbers, after every `every` steps and after the last (0: after the last only)."""

    run: Callable[[int, TrainState], dict[str, float]]
    every: int = 0

    def due(self, step: int, steps: int) -> bool:
        return step == steps or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class Hooks:
    """What the loop needs from outside. `save(step, state)` must have copied the state when it returns: the next step donates it."""

    save: Callable[[int, TrainState], None]
    metrics: Path
    rate: Callable[[int], float] = lambda step: 0.0
    """The learning rate of a step, to be written down."""
    title: str = "training"
    evals: tuple[Eval, ...] = ()
    clock: Callable[[], float] = time.monotonic


def _update(optimizer, state: TrainState, grads, value):
    total, (count, sums) = value
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of its int32 count
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {"loss": total / count, **{name: s / count for name, s in sums.items()}, "grad_norm": optax.tree.norm(grads)}
    return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics


def updater(optimizer: optax.GradientTransformation, shardings: Any = None) -> Callable:
    """The compiled `(state, gradient of the sum, value) -> (state, metrics)`; the state is donated, and stays where `shardings` says."""
    return jax.jit(partial(_update, optimizer), donate_argnums=0, out_shardings=(shardings, None))


def fit(programs: Programs, optimizer: optax.GradientTransformation, state: TrainState, batches: Callable[[int], dict], config: FitConfig,
        hooks: Hooks, *, start: int = 0, frozen: Any = None) -> tuple[TrainState, int]:  # fmt: skip
    """Train from step `start` to `config.steps`; gives the state and the step that it stands at, fewer than asked after a signal.

    `batches(k)` is micro-batch k, a pure function, so the step number alone says where the data stands. SIGINT and SIGTERM save at the next
    step boundary and return; a second SIGINT raises KeyboardInterrupt at once. A step's metrics are read after the next one was dispatched.
    """
    layout, alone = programs.layout, jax.process_count() == 1
    step, saved, update = start, hooks.clock(), updater(optimizer, layout.shardings(state))

    def stopping(stopped: bool) -> bool:
        """Several processes agree to stop only where all of them save anyway: asking at each step would wait for each step."""
        if alone or not config.checkpoint_steps or step % config.checkpoint_steps:
            return alone and stopped
        return bool(multihost_utils.process_allgather(np.array(stopped)).any())

    with _stop_signals() as stopped, _Metrics(hooks, start) as log, progress(hooks.title, config.steps, "steps") as show:
        show(start)
        while step < config.steps and not stopping(stopped.is_set()):
            micro = [batches(k) for k in layout.local(range(step * config.accumulate, (step + 1) * config.accumulate))]
            others = config.accumulate // len(micro)  # each process sees its own; the rows are alike
            value, grads = programs.accumulated(state.params, frozen, micro)
            state, metrics = update(state, grads, value)
            del grads  # half a gigabyte that the next forward can use
            log.read()
            log.defer({"step": step, "lr": hooks.rate(step), "tokens": others * sum(map(_tokens, micro)),
                       "supervised": others * sum(int(b["weights"].sum()) for b in micro)}, metrics)  # fmt: skip
            step += 1
            for eval_ in hooks.evals:
                if eval_.due(step, config.steps):
                    log.read()
                    log.evaluated(step, eval_.run(step, state))
            timed = alone and hooks.clock() - saved >= 60 * config.checkpoint_minutes
            if step < config.steps and (timed or (config.checkpoint_steps and step % config.checkpoint_steps == 0)):
                log.read()
                hooks.save(step, state)
                saved = hooks.clock()
            show(step, log.note)
        log.read()
        show(step, log.note)
    if step < config.steps:
        hooks.save(step, state)
    return state, step


def _tokens(batch: dict) -> int:
    return int((batch["segments"] > 0).sum()) if "segments" in batch else batch["ids"].size


class _Metrics:
    """metrics.jsonl, a line per step, flushed; lines of steps that a resumed run will do again are taken out first."""

    def __init__(self, hooks: Hooks, start: int):
        self.clock, self.note, self.waiting = hooks.clock, "", None
        hooks.metrics.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(hooks.metrics) if line["step"] < start + ("eval" in line)]
        temporary = hooks.metrics.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, hooks.metrics)
        self.file = hooks.metrics.open("a", encoding="utf-8")
        self.last = self.clock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def defer(self, known: dict, metrics: dict) -> None:
        self.waiting = known, metrics

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Write down an eval of the state after `step` steps; its time doesn't count as training."""
        self._write({"step": step, "eval": values})
        console.print(plain(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())))
        self.last = self.clock()

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def read(self) -> None:
        if self.waiting is None:
            return
        known, metrics = self.waiting
        self.waiting = None
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
    """The lines of a metrics.jsonl, one a step; a last line cut by a crash is left out."""
    return [line for line in _lines(path) if "eval" not in line]


def read_evals(path: Path) -> list[dict]:
    """{"step", "eval": {name: number}} of each evaluation on the way."""
    return [line for line in _lines(path) if "eval" in line]


def _lines(path: Path) -> list[dict]:
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


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
