"""`soulsmith quickstart`: the whole loop on one machine, with no key and no GPU.

Each stage is a command that anyone could have typed, in a process of its own (so its memory goes when it ends: training
needs most of 8 GB); this file only orders them, skips what is done, and keeps the time.
A stage's key covers its settings, the SOUL and every stage before it, so an edited SOUL runs again from the first stage
that it touches, and a run that was stopped goes on where it stood.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import soulsmith
from soul.console import console, plain
from soul.files import read_json, sha256_json, write_atomic, write_json
from soul.rows import read_rows
from soul.spec import Soul, load_soul
from soulsmith import config_to_json


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
    chat_seeds: int = 24
    """Requests for generate, critique, revise."""
    rollouts: int = 720
    """Tool rollouts made from the Python installation's own functions."""
    own_replies: int = 180
    """Replies of the model after SFT, of which those that err about calling make preference pairs."""
    sft_tokens: int = 96_000
    """Tokens of supervised fine-tuning."""
    dpo_tokens: int = 18_000
    """Tokens of preference tuning, both branches counted."""
    length: int = 640
    """Tokens per packed row; half of it for preference tuning, which holds two rows at a time."""
    prompts: int = 75
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
    todo = stages(config, soul)
    record, pace = Record(config.out / "stages.json", todo, soul), 1.0
    for number, stage in enumerate(todo):
        label = f"[{number + 1}/{len(todo)}] {stage.title}"
        begun = record.entries.get(stage.name)
        spent = begun["seconds"] if begun else 0.0
        if begun and begun["done"]:
            console.print(plain(f"{label}: done before ({spent:.0f} s)", "dim"))
            continue
        left = pace * sum(later.minutes for later in todo[number:])
        console.print(plain(f"{label} · about {max(1, round(left))} min left", "bold"))
        if not begun:
            _clear(config.out, stage)
        started = time.monotonic()
        record.put(stage, spent)
        try:
            code = stage.run()
        finally:
            seconds = time.monotonic() - started
            record.put(stage, spent + seconds)
        if code:
            return _stopped(config, code)
        record.put(stage, spent + seconds, done=True)
        if stage.minutes >= 1:  # a short stage says nothing about this machine's speed
            pace = seconds / 60 / stage.minutes
    _tell(config, sum(entry["seconds"] for entry in record.entries.values()) / 60)
    return 0


def stages(config: Config, soul: Soul) -> list[Stage]:
    """The stages in order, with the settings that each command gets."""
    from datagen.convert import Config as Convert
    from datagen.generate import Config as Generate
    from datagen.on_policy import Config as OnPolicy
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
    local = config.teacher.startswith("local:")
    generate = Generate(
        seeds=out / "seeds.jsonl", teacher=config.teacher, out=out, soul=config.soul, max_tokens=96,
        prompts=Path(soulsmith.__file__).parent / "prompts" / "small" if local else None,
        # a 135M critic cannot judge: there the checks do; and its drafts often ramble past the limit, so three are written
        critique_revise=CritiqueRevise(
            samples=3 if local else 1, rounds=1, keep="best", critic="checks" if checked and local else "teacher", seed=config.seed
        ),
    )  # fmt: skip
    convert = Convert(soul=config.soul, out=out, n=config.rollouts, seed=config.seed)
    own = OnPolicy(out=out, soul=config.soul, n=config.own_replies, seed=config.seed)
    sft = Sft(
        out=out, model=config.base, data=(data / "sft.parquet", data / "rollouts.parquet"),
        train=TrainConfig(length=config.length, batch_rows=1, epochs=10.0, max_tokens=config.sft_tokens, seed=config.seed, optim=OptimConfig(lr=2e-4)),
    )  # fmt: skip
    dpo = Dpo(
        # not convert's pairs about the voice: SFT has it already, and they made needless calls oftener (docs/preference.md)
        out=out, data=(data / "preference.parquet", data / "on_policy_preference.parquet"), nll=0.2,
        train=TrainConfig(length=config.length // 2, batch_rows=1, epochs=3.0, max_tokens=config.dpo_tokens, seed=config.seed, optim=OptimConfig(lr=1e-5, warmup=0.1)),
    )  # fmt: skip
    evals = Eval(model=config.base, soul=config.soul, n=config.prompts, loops=config.loops, out=out, seed=config.seed)

    def evaluate() -> int:
        tuned = [str(out / name) for name in ("sft", "dpo") if (out / name / "config.json").exists()]
        return run_command("eval", replace(evals, model=",".join([config.base, *tuned])), out)

    def prefer() -> int:
        if any(read_rows(path) for path in dpo.data):
            return run_command("dpo", dpo, out)
        console.print(plain("no preference pairs, neither from drafts nor from the model's own replies, so this stage is left out"))
        return 0

    def command(name: str, title: str, minutes: float, settings: object, *makes: str) -> Stage:
        return Stage(name, title, minutes, config_to_json(settings), lambda: run_command(name, settings, config.out), makes)

    requests = "requests from the Python installation's functions"
    return [
        *([] if Path(config.base).is_dir() else [command("pull", f"fetch {config.base}", 0.3, Pull(name=config.base))]),
        Stage("seeds", requests, 0.1, [config.chat_seeds, config.seed], lambda: write_seeds(config), ("seeds.jsonl",)),
        command("generate", "generate, critique, revise", 1.0, generate, "data/sft.parquet", "data/preference.parquet"),
        command("convert", "tool rollouts, really executed", 0.2, convert, "data/rollouts.parquet", "data/rollouts_preference.parquet"),
        command("sft", "supervised fine-tuning", 7.0, sft, "sft"),
        command("on-policy", "the tuned model's own replies, for pairs", 1.0, own, "data/on_policy_preference.parquet"),
        Stage("dpo", "preference tuning", 2.0, config_to_json(dpo), prefer, ("dpo",)),
        Stage("eval", "evals on held-out prompts, before and after", 4.5, config_to_json(evals), evaluate, ("evals",)),
        command("report", "the report", 0.1, Report(run=out)),
    ]


def run_command(name: str, settings: object, out: Path) -> int:
    """`soulsmith NAME --config OUT/NAME.json` as a child; gives its exit code. Ctrl-C reaches the child, which saves and ends."""
    saved = out / f"{name}.json"
    write_json(saved, config_to_json(settings))
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler, not SIG_IGN: that the child would inherit
    try:
        return subprocess.Popen([sys.executable, soulsmith.__file__, name, "--config", str(saved)]).wait()
    finally:
        signal.signal(signal.SIGINT, before)


def write_seeds(config: Config) -> int:
    from datagen.code_seeds import chat_seeds, read_code, split

    seeds = chat_seeds(split(read_code("stdlib"))[0], config.chat_seeds, config.seed)
    write_atomic(config.out / "seeds.jsonl", "".join(json.dumps(seed, ensure_ascii=False) + "\n" for seed in seeds))
    return 0


class Record:
    """OUT/stages.json: what each stage's key was, whether it is done, and the seconds it took over all attempts."""

    def __init__(self, path: Path, todo: list[Stage], soul: Soul):
        self.path, self.todo, self.keys, key = path, todo, {}, soul.hash
        for stage in todo:
            self.keys[stage.name] = key = sha256_json([key, stage.name, stage.settings])
        saved = read_json(path) if path.exists() else []
        self.entries = {entry["name"]: entry for entry in saved if entry["key"] == self.keys.get(entry["name"])}

    def put(self, stage: Stage, seconds: float, done: bool = False) -> None:
        entry = {"name": stage.name, "title": stage.title, "key": self.keys[stage.name], "done": done, "seconds": round(seconds, 1)}
        self.entries[stage.name] = entry
        write_json(self.path, [self.entries[stage.name] for stage in self.todo if stage.name in self.entries])


def _clear(out: Path, stage: Stage) -> None:
    for made in stage.makes:
        path = out / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _stopped(config: Config, code: int) -> int:
    code = 130 if code == -signal.SIGINT else code
    if code < 0:
        hint = ": the machine ran out of memory, most likely" if -code == signal.SIGKILL else ""
        console.print(plain(f"the stage was killed by {signal.Signals(-code).name}{hint}", "bold red"))
    if code < 0 or code == 130:
        console.print(plain(f"stopped; what is done is kept. Go on with: soulsmith quickstart --config {config.out / 'quickstart.json'}"))
    return code if code > 0 else 1


def _tell(config: Config, minutes: float) -> None:
    console.print(plain(f"report   {config.out / 'report.html'}"))
    console.print(plain(f"dataset  {config.out / 'data'}  (soulsmith show {config.out})"))
    console.print(plain(f"chat     soulsmith chat --model {config.out}"))
    console.print(plain(f"{minutes:.1f} minutes in all", "dim"))
