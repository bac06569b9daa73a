"""`soulsmith rollouts`: long tool conversations. Scenario -> project -> agent and user play -> acceptance -> critique and revision.

A teacher writes a small project with something wrong in it, plays the agent that works on it with real tools in a sandbox,
and the user who clarifies, refuses and changes their mind. A row is kept when the scenario's acceptance command succeeds
(and failed before), every call gives the same result when it runs again, and every check of the SOUL passes.
"""

import asyncio
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datagen import generate
from datagen.engine import Recipe
from datagen.export import export
from datagen.generate import OwnRecipe, Session, tell_stopped
from datagen.journal import Journal
from datagen.plan import price
from datagen.playing import Ended, Play, Stage, accepted, criticised, difference
from datagen.prompting import Prompts
from datagen.protocol import as_text
from datagen.recipes.common import Workings
from datagen.scenarios import Scenario, Unusable, from_seed, languages, read_project, read_script, scenarios
from datagen.seeds import Seed, read_rows
from soul import conversation
from soul.console import console, plain
from soul.errors import UserError
from soul.files import sha256_json
from soul.spec import Soul, check_table, repair, run_checks
from workspace.tools import Workspace, clip, make_workspace, require_sandbox

DOMAINS = Path(__file__).with_name("domains.txt")
GOLD_CHARS = 8_000  # of one approved rollout in a prompt


@dataclass(frozen=True, kw_only=True)
class Config(OwnRecipe):
    """Make long tool rollouts: a teacher writes projects, works on them with real tools, and plays the user; writes OUT/data."""

    seeds: Path = DOMAINS
    """What projects are about, one a row, in any form that generate reads; by default eighty domains."""
    n: int = 100
    """Scenarios: domain x language x difficulty x trouble, no two alike. With a larger n the first ones stay the same."""
    languages: tuple[str, ...] = ()
    """By default all whose program is installed."""
    difficulties: tuple[str, ...] = ()
    """easy, medium, hard; by default all."""
    seed: int = 0
    gold: Path | None = None
    """Rollouts that a person has approved (rows with `messages`), shown to the agent as examples."""
    allow_unsafe: bool = False
    """Run the teacher's commands even where there is no sandbox."""
    max_tokens: int = 2048
    """Longest message, in tokens."""
    deadline: float = 600.0
    pilot: int = 0
    """Only price the run: play this many of the scenarios, which it then doesn't play again."""
    play: Play = field(default_factory=Play)


def rollouts(options: Play, soul: Soul, prompts: Prompts, gold: list[str], sandbox: object) -> Recipe:
    """The recipe: an sft row, and a pair for each message that had to be said again (calls equal)."""

    async def recipe(seed: Seed, call: Callable) -> list:
        work, found = Workings(soul, prompts, seed, call), {"messages": seed.messages}
        examples = random.Random(f"gold:{seed.id}").sample(gold, min(options.shots, len(gold)))
        try:
            return await _rollout(work, from_seed(seed), options, examples, sandbox, found)
        except Ended as ended:
            return [["rejected", work.row(**found, accepted=False, reason=str(ended))]]

    return recipe


async def _rollout(work: Workings, scenario: Scenario, options: Play, examples: list[str], sandbox: object, found: dict) -> list:
    """The rows of a scenario; what there is of it so far goes into `found`. Raises Ended."""
    told, later = scenario.told, len(scenario.talk)
    prompt = work.prompts.render("scenario", **told)
    script = await _written(work, "scenario", lambda text: read_script(text, later, prompt[-1]["content"]), prompt)
    prompt = work.prompts.render("project", request=script.request, later=list(script.turns), done=script.done, **told)
    project = await _written(work, "project", read_project, prompt, max_tokens=options.project_tokens)
    found["files"] = [{"path": path, "content": text} for path, text in project.files.items()]
    with _fresh(project.files, sandbox) as workspace:
        if scenario.fails and (await asyncio.to_thread(accepted, workspace, project.accept))[0]:
            raise Ended("accepts from the start")
    with _fresh(project.files, sandbox) as workspace:
        stage = Stage(work, options, scenario, script, workspace, examples)
        found["messages"] = stage.messages
        await stage.run()
        done, printed = await asyncio.to_thread(accepted, workspace, project.accept)
    if not done:
        raise Ended(f"acceptance fails ({clip(printed, 200)})")
    with _fresh(project.files, sandbox) as workspace:
        if why := await asyncio.to_thread(difference, stage.messages, workspace):
            raise Ended(why)
    if options.critic:
        await _criticise(work, stage)
    if faults := run_checks(work.soul, stage.messages):
        raise Ended(f"checks: {', '.join(sorted({fault.principle for fault in faults}))}")
    return _rows(work, stage, found["files"])


async def _written(work: Workings, stage: str, read: Callable, prompt: list[dict], **more):
    reply = await work.ask(stage, prompt, **more)
    try:
        if reply.ok:
            return read(reply.text)
    except Unusable as problem:
        raise Ended(f"{stage}: {problem}") from None
    raise Ended(f"{stage}: {reply.outcome}" + (f" ({reply.why})" if reply.why else ""))


@contextmanager
def _fresh(files: dict[str, str], sandbox: object) -> Iterator[Workspace]:
    # what a command leaves behind (a folder without permissions) must not end the run
    with tempfile.TemporaryDirectory(prefix="soulsmith-", ignore_cleanup_errors=True) as folder:
        yield make_workspace(files, folder, sandbox=sandbox)


async def _criticise(work: Workings, stage: Stage) -> None:
    """The judge reads all that the agent said; messages with a fault that it quotes are said again. Raises Ended where that fails."""
    messages, faults = stage.messages, {}
    for at, *fault in await criticised(work, messages, list(work.principles)):
        faults.setdefault(at, []).append(fault)
    for at, some in faults.items():
        said = await stage.said_again(at, messages[at], some)
        after = repair(work.soul, [*messages[:at], said, *messages[at + 1 :]])[0]
        principles = {principle for principle, *_ in some}
        if after[at]["content"] == messages[at]["content"] or run_checks(work.soul, after):
            raise Ended(f"critic: {', '.join(sorted(principles))}")
        stage.drafts.setdefault(at, (messages[at]["content"], principles))
        messages[at] = after[at]


def _rows(work: Workings, stage: Stage, files: list[dict]) -> list:
    messages, touched = stage.messages, set().union(*(broken for _, broken in stage.drafts.values()))
    rows = [["sft", work.row(touched, messages=messages, checks=check_table(work.soul, messages), files=files)]]
    for index, (draft, broken) in sorted(stage.drafts.items()):
        sides = {"prompt": messages[:index], "chosen": [messages[index]], "rejected": [messages[index] | {"content": draft}]}
        checks = check_table(work.soul, messages[: index + 1])
        rows.append(["preference", work.row(broken, id=f"{work.seed.id}-{index}", **sides, checks=checks, files=files)])
    return rows


# --- the command


def read_gold(path: Path | None) -> list[str]:
    """Approved rollouts as text. Raises UserError for a row without a sound conversation."""
    texts = []
    for where, row in read_rows(path) if path else ():
        try:
            messages = conversation.canonical(row["messages"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("is no conversation", where=where) from None
        if problems := conversation.validate(messages):
            raise UserError(problems[0], where=where)
        texts.append(clip(as_text(messages), GOLD_CHARS))
    return texts


def prepare(config: Config) -> tuple[Session, list[Seed]]:
    """The session, and the seeds of all scenarios. Raises UserError for anything that can be seen to be wrong before the first call."""
    sandbox, gold, session = require_sandbox(config.allow_unsafe), read_gold(config.gold), generate.prepare(config)
    domains = [seed.messages[-1]["content"] for seed in session.seeds()]
    drawn = scenarios(domains, languages(config.languages), config.difficulties, config.n, config.seed)
    play = config.play
    if play.calls == "auto":
        play = replace(play, calls="text" if config.teacher.startswith("local:") else "native")
    setup = session.setup | {"recipe": sha256_json(["rollouts", asdict(play), gold])}
    recipe = rollouts(play, session.soul, session.prompts, gold, sandbox)
    seeds = [scenario.seed for scenario in drawn]
    return replace(session, recipe=recipe, setup=setup, ids=[seed.id for seed in seeds]), seeds


def main(config: Config) -> int:
    """Run the command. Raises UserError as `prepare` and the engine do."""
    if config.n < 1:
        raise UserError("--n begins at 1")
    session, seeds = prepare(config)
    again = f"soulsmith rollouts --config {config.out / 'rollouts.json'}" + " --pilot 0" * bool(config.pilot)
    with closing(Journal(config.out)) as journal:
        generate.plan_rows(session, journal)
        if config.pilot:
            told = price(session, journal, seeds, session.ids, config.pilot)
            console.print(plain(f"then: {again}"))
            return 0 if told else 130
        try:
            done = asyncio.run(generate.compute(session, journal, iter(seeds), "rollouts", len(seeds)))
        finally:
            hashes = {"soul": session.soul.hash, "prompts": session.prompts.hash}
            facts = {"teacher": config.teacher, "command": again, "hashes": hashes}
            stats = export(journal, session.run_id, config.out / "data", session.soul, facts)
            rows = stats["rows"]
            told = f"{rows['sft']} rollouts, {rows['preference']} pairs, {rows['rejected']} rejected in {config.out / 'data'}"
            console.print(plain(told + "".join(f"\n  {count} × {why}" for why, count in list(stats["reasons"].items())[:5])))
    if not done:
        tell_stopped(again)
    return 0 if done else 130
