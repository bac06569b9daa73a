"""`soulsmith quickstart`: the whole loop on one machine, with no key and no GPU.

Each stage is a command that anyone could have typed; this file only orders them, skips what is done, and keeps the time.
A stage's key covers its settings, the SOUL and every stage before it, so an edited SOUL runs again from the first stage
that it touches, and a run that was stopped goes on where it stood.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soul.console import console, plain
from soul.files import read_json, sha256_json, write_atomic, write_json
from soul.spec import Soul, load_soul
from soulsmith import config_to_json, run_command


@dataclass(frozen=True)
class Config:
    """From a SOUL.md to a dataset, a tuned model, evals and a report, on this machine."""

    soul: Path = Path("soul/SOUL.md")
    """Any SOUL.md: plain markdown is enough."""
    out: Path = Path("runs/quickstart")
    base: str = "smollm2-135m"
    """The model to tune."""
    teacher: str = "local:smollm2-135m"
    """Who drafts and revises the chat rows: local:NAME, openrouter:MODEL, or http://HOST:PORT/v1#MODEL."""
    chat_seeds: int = 32
    """Requests for generate, critique, revise."""
    rollouts: int = 480
    """Tool rollouts made from the Python installation's own functions."""
    sft_tokens: int = 110_000
    """Tokens of supervised fine-tuning."""
    dpo_tokens: int = 24_000
    """Tokens of preference tuning, both branches counted."""
    length: int = 384
    """Tokens per packed row."""
    prompts: int = 60
    """Held-out prompts of the evals."""
    loops: int = 12
    """Held-out prompts that are run to their end through the agent, judged by the files."""
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """`run(config) -> exit code`; `minutes` as measured on 2 cores, the first guess of the time left; `makes` is deleted
    before a run under another key (never the journal: paid work is kept)."""

    name: str
    title: str
    minutes: float
    settings: object
    run: Callable[[], int]
    makes: tuple[str, ...] = ()


def main(config: Config) -> int:
    soul = load_soul(config.soul)
    try:
        return _run(stages(config, soul), config, soul)
    except KeyboardInterrupt:
        return _stopped(config)


def stages(config: Config, soul: Soul) -> list[Stage]:
    """The stages in order, with the settings that each command gets."""
    from datagen.convert import Config as Convert
    from datagen.generate import Config as Generate
    from datagen.recipes.critique_revise import CritiqueRevise
    from evals.report import Config as Report
    from evals.run import Config as Eval
    from model.pull import Config as Pull
    from training.dpo import Config as Dpo
    from training.optim import OptimConfig
    from training.run import TrainConfig
    from training.sft import Config as Sft

    out, data = config.out, config.out / "data"
    checked = any(principle.checks for principle in soul.principles)
    generate = Generate(
        seeds=out / "seeds.jsonl", teacher=config.teacher, out=out, soul=config.soul, max_tokens=96,
        # a 135M critic cannot judge: there the checks do, and the teacher revises what they find
        recipe=CritiqueRevise(rounds=2, keep="best", critic="checks" if checked and config.teacher.startswith("local:") else "teacher", seed=config.seed),
    )  # fmt: skip
    convert = Convert(soul=config.soul, out=out, n=config.rollouts, seed=config.seed)
    sft = Sft(
        out=out, model=config.base, data=(data / "sft.parquet", data / "rollouts.parquet"),
        train=TrainConfig(length=config.length, batch_rows=2, epochs=10.0, max_tokens=config.sft_tokens, seed=config.seed, optim=OptimConfig(lr=3e-4)),
    )  # fmt: skip
    dpo = Dpo(
        out=out, data=(data / "preference.parquet", data / "rollouts_preference.parquet"), nll=0.2,
        train=TrainConfig(length=config.length, batch_rows=2, epochs=1.0, max_tokens=config.dpo_tokens, seed=config.seed, optim=OptimConfig(lr=1e-5, warmup=0.1)),
    )  # fmt: skip
    evals = Eval(model=f"{config.base},{out / 'sft'},{out / 'dpo'}", soul=config.soul, n=config.prompts, loops=config.loops, out=out, seed=config.seed)

    def command(name: str, title: str, minutes: float, settings: object, *makes: str) -> Stage:
        return Stage(name, title, minutes, config_to_json(settings), lambda: run_command(name, settings), makes)

    return [
        command("pull", f"fetch {config.base}", 0.3, Pull(name=config.base)),
        Stage("seeds", "requests from the Python installation's functions", 0.1, [config.chat_seeds, config.seed], lambda: write_seeds(config), ("seeds.jsonl",)),
        command("generate", "generate, critique, revise", 2.0, generate, "data/sft.parquet", "data/preference.parquet"),
        command("convert", "tool rollouts, really executed", 0.2, convert, "data/rollouts.parquet", "data/rollouts_preference.parquet"),
        command("sft", "supervised fine-tuning", 6.0, sft, "sft"),
        command("dpo", "preference tuning", 2.0, dpo, "dpo"),
        command("eval", "evals on held-out prompts, before and after", 3.5, evals, "evals"),
        command("report", "the report", 0.1, Report(run=out)),
    ]


def write_seeds(config: Config) -> int:
    from datagen.code_seeds import chat_seeds, read_code, split

    seeds = chat_seeds(split(read_code("stdlib"))[0], config.chat_seeds, config.seed)
    write_atomic(config.out / "seeds.jsonl", "".join(json.dumps(seed, ensure_ascii=False) + "\n" for seed in seeds))
    return 0


def _run(todo: list[Stage], config: Config, soul: Soul) -> int:
    record = config.out / "stages.json"
    done = {entry["name"]: entry for entry in (read_json(record) if record.exists() else [])}
    key, pace, pending = soul.hash, 1.0, {}
    for stage in todo:
        key = sha256_json([key, stage.name, stage.settings])
        pending[stage.name] = key
    for number, stage in enumerate(todo):
        before = done.get(stage.name, {})
        same = before.get("key") == pending[stage.name]
        left = sum(later.minutes * pace for later in todo[number:] if done.get(later.name, {}).get("key") != pending[later.name] or not done[later.name].get("done"))
        if same and before.get("done"):
            console.print(plain(f"[{number + 1}/{len(todo)}] {stage.title}: done before ({before['seconds']:.0f} s)", "dim"))
            continue
        if not same:
            _clear(config.out, stage)
        console.print(plain(f"[{number + 1}/{len(todo)}] {stage.title} · about {left:.0f} min left" if left >= 1 else f"[{number + 1}/{len(todo)}] {stage.title}", "bold"))
        spent = before.get("seconds", 0.0) if same else 0.0
        started = time.monotonic()
        done[stage.name] = {"name": stage.name, "title": stage.title, "key": pending[stage.name], "done": False, "seconds": spent}
        _save(record, todo, done)
        try:
            code = stage.run()
        finally:
            seconds = time.monotonic() - started
            done[stage.name]["seconds"] = round(spent + seconds, 1)
            _save(record, todo, done)
        if code:
            return _stopped(config) if code == 130 else code
        done[stage.name]["done"] = True
        _save(record, todo, done)
        if seconds > 20:  # a short stage says nothing about this machine's speed
            pace = seconds / 60 / stage.minutes
    _tell(config, done)
    return 0


def _save(record: Path, todo: list[Stage], done: dict[str, dict]) -> None:
    write_json(record, [done[stage.name] for stage in todo if stage.name in done])


def _clear(out: Path, stage: Stage) -> None:
    for made in stage.makes:
        path = out / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _stopped(config: Config) -> int:
    console.print(plain(f"stopped; what is done is kept. Go on with: soulsmith quickstart --config {config.out / 'quickstart.json'}"))
    return 130


def _tell(config: Config, done: dict[str, dict]) -> None:
    minutes = sum(entry["seconds"] for entry in done.values()) / 60
    for label, text in (
        ("report ", config.out / "report.html"),
        ("dataset", f"{config.out / 'data'}  (soulsmith show {config.out})"),
        ("chat   ", f"soulsmith chat --model {config.out / 'dpo'}"),
    ):
        console.print(plain(f"{label}  {text}"))
    console.print(plain(f"{minutes:.1f} minutes in all", "dim"))

