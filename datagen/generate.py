"""`soulsmith generate`: seeds to SFT and preference rows, held to a SOUL. Run it again to go on; nothing is paid twice."""

import asyncio
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from tyro.conf import Suppress

from datagen import dedup, recipes, since
from datagen.budget import Budget
from datagen.engine import Engine, Policy, Recipe
from datagen.export import export
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.recipes import BestOf, Cai, CritiqueRevise, Distill, Docs, Introspect
from datagen.seeds import Seed, read_seeds
from datagen.status import Status, line
from datagen.teachers import Price, Teacher, open_teacher
from datagen.vllm import Serve
from datagen.wire import WIRE_VERSION
from soul.console import console, plain, progress
from soul.errors import UserError
from soul.files import sha256_json
from soul.spec import Soul, load_soul

SAMPLING = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 512}
PACE = ("concurrency", "deadline", "retry_failed", "redo_truncated", "rpm", "tpm", "max_usd")


@dataclass(frozen=True)
class Config:
    """Make a dataset: a teacher drafts, the checks and a critic find faults, the teacher revises; writes OUT/data."""

    seeds: Path
    """Requests to answer: .jsonl, .jsonl.gz or .parquet (`messages`, or `prompt`), .txt with one a line, or hf:DATASET[:SPLIT]."""
    teacher: str
    """openrouter:MODEL, openai:MODEL, vllm:MODEL, local:smollm2-135m, or http://HOST:PORT/v1#MODEL."""
    out: Path
    """Run directory; the same one again goes on where it stopped and pays nothing twice."""
    soul: Path = Path("soul/SOUL.md")
    recipe: str = "critique-revise"
    """critique-revise, distill, best-of, introspect, docs, cai, or a Python file with `async def recipe(seed, call, soul, prompts)`."""
    student: str = ""
    """Who writes the rejected side of distill; by default the teacher."""
    judge: str = ""
    """Who judges and criticises; by default the teacher."""
    prompts: Path | None = None
    """A folder of templates that replace the built-in ones of the same name."""
    limit: int | None = None
    """Only the first so many seeds."""
    dedup: float | None = None
    """Leave out seeds that are this similar to an earlier one (0.8 is usual); repeated ones are always left out."""
    against: tuple[Path, ...] = ()
    """Files that must not be trained on, such as eval sets: seeds that share 13 words in a row with one are left out."""
    temperature: float | None = None
    """By default what the SOUL's `defaults` say, else 0.8."""
    top_p: float | None = None
    """Likewise, else 0.95."""
    max_tokens: int | None = None
    """Longest reply, in tokens; longer ones are rejected as truncated. Likewise, else 512."""
    max_usd: float | None = None
    """Never spend more than this on the run directory, whatever happens; a run that reaches it stops and can go on."""
    price: tuple[float, float] | None = None
    """USD per million prompt and completion tokens, for a teacher that doesn't tell."""
    provider: tuple[str, ...] = ()
    """OpenRouter providers to use, and no others."""
    any_text: bool = False
    """Also use OpenRouter models whose authors do not allow training on their outputs."""
    allow_mixed: bool = False
    """Accept rows from several providers, quantisations or served models."""
    concurrency: int | None = None
    """Most calls in flight; by default what suits the teacher. Rate limits lower it, success raises it again."""
    rpm: float | None = None
    """Requests per minute, where the account has a fixed limit."""
    tpm: float | None = None
    """Tokens per minute, likewise."""
    deadline: float = 300.0
    """Seconds that one call may take."""
    retry_failed: bool = False
    """Ask again for the rows whose calls failed."""
    redo_truncated: int | None = None
    """Ask again, with so many tokens, for the rows that were cut at --max-tokens; nothing else is asked again."""
    since: Path | None = None
    """An earlier run under an earlier version of this SOUL: rows that the edit doesn't touch are kept from it."""
    critique_revise: CritiqueRevise = field(default_factory=CritiqueRevise)
    distill: Distill = field(default_factory=Distill)
    best_of: BestOf = field(default_factory=BestOf)
    introspect: Introspect = field(default_factory=Introspect)
    docs: Docs = field(default_factory=Docs)
    cai: Cai = field(default_factory=Cai)
    vllm: Serve = field(default_factory=Serve)


@dataclass(frozen=True, kw_only=True)
class OwnRecipe(Config):
    """The same teachers, money and pace for a command that brings its own recipe: the settings of the others mean nothing to it."""

    recipe: Suppress[str] = "critique-revise"
    student: Suppress[str] = ""
    since: Suppress[Path | None] = None
    critique_revise: Suppress[CritiqueRevise] = field(default_factory=CritiqueRevise)
    distill: Suppress[Distill] = field(default_factory=Distill)
    best_of: Suppress[BestOf] = field(default_factory=BestOf)
    introspect: Suppress[Introspect] = field(default_factory=Introspect)
    docs: Suppress[Docs] = field(default_factory=Docs)
    cai: Suppress[Cai] = field(default_factory=Cai)


@dataclass(frozen=True)
class Session:
    """What decides a run, read and checked before anything is sent. `setup` is all of it but the SOUL, hashed part by part."""

    config: Config
    soul: Soul
    prompts: Prompts
    recipe: Recipe
    teachers: dict[str, Teacher]
    sampling: dict
    setup: dict[str, str]
    ids: list[str]
    """Of the seeds that are left, in order."""

    @property
    def run_id(self) -> str:
        return sha256_json([WIRE_VERSION, self.soul.hash, self.setup])

    def seeds(self) -> Iterator[Seed]:
        """The seeds of `ids`, streamed."""
        left = set(self.ids)
        for seed in read_seeds(self.config.seeds, self.config.limit):
            if seed.id in left:
                left.remove(seed.id)
                yield seed

    @property
    def facts(self) -> dict:
        """What the card tells and a later edit of the SOUL is compared with."""
        hashes = {"soul": self.soul.hash, "prompts": self.prompts.hash}
        return {"teacher": self.config.teacher, "command": command(self.config), "hashes": hashes}


def prepare(config: Config) -> Session:
    """Raises UserError for anything that can be seen to be wrong before the first call."""
    soul, prompts = load_soul(config.soul), Prompts(config.prompts)
    options = options_of(config)
    recipe = recipes.load(config.recipe, options, soul, prompts)
    price = config.price and Price(config.price[0] / 1e6, config.price[1] / 1e6)
    routes = {"provider": config.provider, "mixed": config.allow_mixed, "distillable": not config.any_text}
    specs = {"teacher": config.teacher, "student": config.student, "judge": config.judge}
    specs = {role: spec for role, spec in specs.items() if spec or role == "teacher"}
    # the same one twice is one teacher, with one limit
    known = {spec: open_teacher(spec, **routes, price=price, serve=config.vllm, out=config.out) for spec in dict.fromkeys(specs.values())}
    teachers = {role: known[spec] for role, spec in specs.items()}
    sampling = sampling_of(config, soul)
    setup = {
        "prompts": prompts.hash, "sampling": sha256_json(sampling),
        "recipe": sha256_json([recipes.fingerprint(config.recipe), options and asdict(options)]),
        "teacher": sha256_json({role: [teacher.base_url, teacher.name] for role, teacher in teachers.items()}),
    }  # fmt: skip
    return Session(config, soul, prompts, recipe, teachers, sampling, setup, wanted(config))


def wanted(config: Config) -> list[str]:
    """Ids of the seeds to answer, each once; every row is read before any is paid for, and what is left out is told."""
    dropped, ids = Counter(), {}
    stream = read_seeds(config.seeds, config.limit)
    if config.dedup or config.against:
        stream = dedup.clean(stream, dedup.texts(config.against), near=config.dedup or 0.0, dropped=dropped)
    for seed in stream:
        dropped["repeats another one"] += seed.id in ids
        ids[seed.id] = None
    if not ids:
        raise UserError("has no rows", where=config.seeds)
    for why, count in (+dropped).items():
        console.print(plain(f"{count} seeds left out: {why}"))
    return list(ids)


def sampling_of(config: Config, soul: Soul) -> dict:
    """Flags before the SOUL's `defaults` before SAMPLING. Raises UserError for a default that no request can have."""
    if unknown := sorted(set(soul.defaults) - set(SAMPLING)):
        raise UserError(f"unknown default {unknown[0]!r}", where=soul.path, fix=f"Defaults are {', '.join(SAMPLING)}.")
    if wrong := sorted(name for name, value in soul.defaults.items() if isinstance(value, str)):
        raise UserError(f"the default {wrong[0]!r} must be a number", where=soul.path)
    given = {name: getattr(config, name) for name in SAMPLING if getattr(config, name) is not None}
    return SAMPLING | soul.defaults | given


def options_of(config: Config) -> object | None:
    """The option group of the chosen built-in recipe."""
    return getattr(config, config.recipe.replace("-", "_"), None) if config.recipe in recipes.RECIPES else None


def main(config: Config) -> int:
    session = prepare(config)
    with closing(Journal(config.out)) as journal:
        plan_rows(session, journal)
        if config.since:
            keep(session, journal)
        try:
            done = asyncio.run(compute(session, journal, session.seeds(), "generate", journal.planned()))
        finally:
            _tell(export(journal, session.run_id, config.out / "data", session.soul, session.facts), config)
    if not done:
        tell_stopped(resume_command(config))
    return 0 if done else 130


def plan_rows(session: Session, journal: Journal) -> None:
    """Write down which rows this run is about, and under what it is made."""
    journal.plan(session.ids)
    journal.note("run", {"id": session.run_id, "soul": since.soul_facts(session.soul), "setup": session.setup})


def keep(session: Session, journal: Journal) -> None:
    """Take over the rows of --since that the edit of the SOUL does not touch; says how many of them were touched, and why."""
    with closing(since.Past(session.config.since)) as past:
        since.check_same_setup(past.run["setup"], session.setup, session.config.since)
        edit, kept, again = since.edit_of(past.run["soul"], session.soul), 0, {}
        for row in past.rows():
            if why := since.touched(row, edit, session.soul):
                again[row.row_id] = why
            elif journal.row(row.row_id, session.run_id) is None:
                journal.finish(row.row_id, session.run_id, row.status, since.marked(row, session.config.since, past.run["soul"]["hash"]))
                kept += 1
    journal.commit()
    console.print(plain(f"since {session.config.since}: {edit}; {kept:,} rows kept, {len(again):,} to make again"))
    for text in since.counted(again):
        console.print(plain(f"  {text}"))


async def compute(session: Session, journal: Journal, seeds: Iterable[Seed], title: str, total: int, recipe: Recipe | None = None) -> bool:
    """Run the engine over `seeds` with a live view; True when all rows are finished, False after Ctrl-C."""
    config, teacher = session.config, session.teachers["teacher"]
    policy = Policy(
        concurrency=config.concurrency or teacher.concurrency, deadline=config.deadline, rpm=config.rpm, tpm=config.tpm,
        allow_mixed=config.allow_mixed, redo_truncated=config.redo_truncated,
    )  # fmt: skip
    budget = None if config.max_usd is None else Budget(config.max_usd, journal.spent())
    engine = Engine(teacher, journal, session.run_id, session.sampling, policy, others=session.teachers, budget=budget)
    if config.retry_failed:
        journal.reopen_failed(session.run_id)
    if config.redo_truncated:
        journal.redo_truncated(session.run_id)
    status, done = Status(config.out, total), False
    try:
        with progress(title, total) as update:

            def show() -> None:
                shown = status(engine.snapshot(), "draining" if engine.interrupted else "running")
                now = "finishing the calls in flight (Ctrl-C again to stop)" if engine.interrupted else shown["trouble"]
                update(shown["rows"], f"{line(shown)}; {now}" if now else line(shown))

            show()
            done = await engine.run(seeds, recipe or session.recipe, show)
            return done
    finally:
        status(engine.snapshot(), "done" if done else "stopped")
        for one in set(session.teachers.values()):
            await one.close()


def tell_stopped(again: str) -> None:
    console.print(plain(f"stopped; everything answered so far is kept. Go on with: {again}"))


def _tell(stats: dict, config: Config) -> None:
    rows = stats["rows"]
    docs = f"{rows['docs']} documents, " if rows.get("docs") else ""
    console.print(plain(f"{docs}{rows['sft']} sft rows, {rows['preference']} pairs, {rows['rejected']} rejected in {config.out / 'data'}"))
    for reason, count in list(stats["reasons"].items())[:5]:
        console.print(plain(f"  {count} × {reason}"))
    for warning in stats.get("warnings", ()):
        console.print(plain(f"warning: {warning}", "yellow"))


def command(config: Config) -> str:
    """The command line that makes this dataset; settings that only change how fast it comes are left out."""
    words = ["soulsmith", "generate"]
    for prefix, part in (("", config), (f"{config.recipe}.", options_of(config)), ("vllm.", config.vllm)):
        for item in fields(part) if part is not None else ():
            value = getattr(part, item.name)
            if item.name in PACE or is_dataclass(value) or value == item.default:
                continue
            flag = f"--{prefix}{'no-' * (value is False)}{item.name}".replace("_", "-")
            texts = [] if isinstance(value, bool) else list(map(str, value if isinstance(value, tuple) else [value]))
            words += [f"{flag}={texts[0]}"] if texts and texts[0].startswith("-") else [flag, *texts]
    return shlex.join(words)


def resume_command(config: Config) -> str:
    """The command that goes on with this run: its settings are in the run directory where the front door started it."""
    saved = config.out / "generate.json"
    return shlex.join(["soulsmith", "generate", "--config", str(saved)]) if saved.exists() else command(config)
