"""`soulsmith generate`: from a SOUL and seeds to SFT and preference rows, through a journal."""

import asyncio
import shlex
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from datagen.engine import Engine, Policy
from datagen.export import export
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.recipes.critique_revise import CritiqueRevise, critique_revise
from datagen.seeds import read_seeds
from datagen.teachers import Teacher, open_teacher
from datagen.wire import WIRE_VERSION
from soul.console import console, plain, progress
from soul.errors import UserError
from soul.files import sha256_json
from soul.spec import Soul, load_soul

PACE = ("concurrency", "deadline", "retry_failed")


@dataclass(frozen=True)
class Config:
    """Make a dataset: a teacher drafts, the checks and a critic find faults, the teacher revises; writes OUT/data."""

    seeds: Path
    """Requests to answer: .jsonl or .parquet (`messages`, or `prompt`), or .txt with one a line."""
    teacher: str
    """openrouter:MODEL, openai:MODEL, local:smollm2-135m, or http://HOST:PORT/v1#MODEL."""
    out: Path
    """Run directory; the same one again goes on where it stopped and pays nothing twice."""
    soul: Path = Path("soul/SOUL.md")
    prompts: Path | None = None
    """A folder of templates that replace the built-in ones of the same name."""
    limit: int | None = None
    """Only the first so many seeds."""
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 512
    """Longest reply, in tokens; longer ones are rejected as truncated."""
    concurrency: int | None = None
    """Calls in flight; by default what suits the teacher."""
    deadline: float = 300.0
    """Seconds that one call may take."""
    retry_failed: bool = False
    """Ask again for the rows whose calls failed."""
    recipe: CritiqueRevise = field(default_factory=CritiqueRevise)


def main(config: Config) -> int:
    soul = load_soul(config.soul)
    prompts = Prompts(config.prompts)
    recipe = critique_revise(config.recipe, soul, prompts)
    teacher = open_teacher(config.teacher)
    ids = [seed.id for seed in read_seeds(config.seeds, config.limit)]  # every row is read before any is paid for
    if not ids:
        raise UserError("has no rows", where=config.seeds)
    journal = Journal(config.out)
    try:
        twice = journal.plan(ids)
        if twice:
            console.print(f"{twice} seeds repeat another one and are left out")
        done = asyncio.run(_generate(config, soul, prompts, teacher, journal, recipe))
    finally:
        journal.close()
    if not done:
        console.print(plain(f"stopped; everything answered so far is kept. Go on with: {resume_command(config)}"))
    return 0 if done else 130


async def _generate(config: Config, soul: Soul, prompts: Prompts, teacher: Teacher, journal: Journal, recipe) -> bool:
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
    hashes = {"soul": soul.hash, "prompts": prompts.hash}
    run_id = sha256_json([WIRE_VERSION, hashes, asdict(config.recipe), teacher.base_url, teacher.name, sampling])
    policy = Policy(concurrency=config.concurrency or teacher.concurrency, deadline=config.deadline)
    engine = Engine(teacher, journal, run_id, sampling, policy)
    if config.retry_failed:
        journal.reopen_failed(run_id)
    try:
        with progress("generate", journal.planned()) as update:
            counts = engine.counts

            def show() -> None:
                note = f"{counts['accepted']} accepted, {counts['rejected']} rejected, {counts['sent']} calls"
                now = "finishing the calls in flight (Ctrl-C again to stop)" if engine.interrupted else engine.trouble
                update(counts["rows"], f"{note}; {now}" if now else note)

            show()
            return await engine.run(_once(read_seeds(config.seeds, config.limit)), recipe, show)
    finally:
        await teacher.close()
        facts = {"teacher": config.teacher, "command": command(config), "hashes": hashes}
        _tell(export(journal, run_id, config.out / "data", soul, facts), config)


def _once(seeds):
    seen = set()
    for seed in seeds:
        if seed.id not in seen:
            seen.add(seed.id)
            yield seed


def _tell(stats: dict, config: Config) -> None:
    rows = stats["rows"]
    console.print(plain(f"{rows['sft']} sft rows, {rows['preference']} pairs, {rows['rejected']} rejected in {config.out / 'data'}"))
    for reason, count in list(stats["reasons"].items())[:5]:
        console.print(plain(f"  {count} × {reason}"))


def command(config: Config) -> str:
    """The command line that makes this dataset; settings that only change how fast it comes are left out."""
    words = ["soulsmith", "generate"]
    for prefix, part in (("", config), ("recipe.", config.recipe)):
        for item in fields(part):
            value = getattr(part, item.name)
            if item.name in PACE or is_dataclass(value) or value == item.default:
                continue
            flag = f"{prefix}{item.name}".replace("_", "-")
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return shlex.join(words)


def resume_command(config: Config) -> str:
    """The command that goes on with this run: its settings are in the run directory where the front door started it."""
    saved = config.out / "generate.json"
    return shlex.join(["soulsmith", "generate", "--config", str(saved)]) if saved.exists() else command(config)
