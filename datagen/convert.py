"""`soulsmith convert`: tool rollouts from code, or from instruct and edit data sets; a teacher, if any, words the remarks.

Every call is executed in a temporary workspace while the rollout is built, remarks pass the SOUL's checks, and what
fails is dropped and counted. Row i depends on (seed, i) alone: the same bytes with one worker or many.
"""

import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Suppress

from datagen import remarks
from datagen.bugs import NO_SANDBOX
from datagen.card import calls_made
from datagen.code_changes import Unsuitable
from datagen.code_seeds import Function, read_code, split
from datagen.edits import task_of
from datagen.from_code import KINDS, Pool, Task
from datagen.generate import OwnRecipe
from datagen.instruct import FOREIGN, NO_PYTHON, Columns, Item, Mixture, Project, read_items, small_project
from datagen.mistakes import with_mistake
from datagen.remarks import Remarks
from datagen.rollouts import JUDGMENTS, WRONG_CALLS, Maker, contrasted, judged
from soul import rows
from soul.console import output as stdout
from soul.console import plain, progress
from soul.conversation import assistant, calls_of, tool_call
from soul.errors import UserError
from soul.files import write_atomic, write_json
from soul.spec import Soul, check_table, load_soul
from workspace.tools import Sandbox, require_sandbox

CHUNK = 32
DRAWS = 8
MAX_CHARS = 1600  # of what the template renders: at most 640 tokens at 2.5 characters each, the lowest ratio measured (median 3.2)
MAX_DATASET_CHARS = 12_000
READ_AHEAD = 400  # rows of a data set that the small projects are made from

Attempt = tuple[str, str, dict | None, dict | None]  # kind, reason, row, pair; the row is None when it was dropped for `reason`


@dataclass(frozen=True, kw_only=True)
class Config(OwnRecipe):
    """Make tool rollouts from real code or from a data set; every tool result comes from executing the tool."""

    soul: Path = Path("soul/SOUL.md")
    """The SOUL.md whose voice and checks the remarks follow."""
    out: Path = Path("runs/code")
    """The run directory; writes data/rollouts.parquet and data/rollouts_preference.parquet there."""
    teacher: str = ""
    """Who words the remarks, named as in generate; phrase templates do where there is none."""
    no_teacher: Annotated[bool, FlagCreatePairsOff] = False
    """The default, spelled out."""
    remarks: Remarks = field(default_factory=Remarks)
    from_code: str = "stdlib"
    """A directory of Python code, or `stdlib`."""
    from_package: str = ""
    """An installed package to take the code from, instead of --from-code."""
    dataset: tuple[str, ...] = ()
    """Instruct or edit data sets instead of code: .jsonl, .jsonl.gz, .json or .parquet files, folders, or names on the Hub."""
    columns: Columns = field(default_factory=Columns)
    n: int = 400
    """How many rollouts, of each data set; 0 for all that a data set gives."""
    seed: int = 0
    workers: int = 1
    """Processes; 0 for one per core."""
    max_chars: int = 0
    """Longer rows are dropped; 0 for 1,600 from code and 12,000 from a data set."""
    bash: float = 0.15
    """Of a data set: share of the rollouts that run a command."""
    mistakes: float = 0.15
    """Of a data set: share of the rollouts with a mistake and its repair."""
    run: bool = False
    """Of a data set: commands may run the rows' own code, and not only compile it. It is a stranger's, and needs the sandbox."""
    include_held_out: bool = False
    """Also use the modules kept for evals."""
    max_tokens: int = 1024
    """Longest answer of the teacher, which has all remarks of a rollout, in tokens."""
    # settings of generate that mean nothing here
    seeds: Suppress[Path] = Path()
    limit: Suppress[int | None] = None
    dedup: Suppress[float | None] = None
    against: Suppress[tuple[Path, ...]] = ()

    @property
    def most(self) -> int:
        """Characters of a row."""
        return self.max_chars or (MAX_DATASET_CHARS if self.dataset else MAX_CHARS)


# ---- one rollout


class Builder(Maker):
    """Rollout i from functions."""

    def __init__(self, soul: Soul, functions: Sequence[Function], seed: int, most: int = MAX_CHARS):
        super().__init__(soul, seed, most)
        self.pool = Pool(functions)
        self.kinds = {make: share for make, (share, needs) in KINDS.items() if needs <= set(soul.tools)}

    def build(self, attempt: int) -> Attempt:
        rng = random.Random(f"rollout:{self.seed}:{attempt}")
        make = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        kind = make.__name__
        try:
            task = self._draw(rng, make)
            kind = task.kind
            return kind, "", *self.rows(f"code-{self.seed}-{attempt}", f"code:{task.source}", task, rng, judged)
        except Unsuitable as dropped:
            return kind, str(dropped), None, None

    def _draw(self, rng: random.Random, make) -> Task:
        # a function that suits no task of its kind says nothing about the yield: draw others before giving up
        for _ in range(DRAWS - 1):
            with suppress(Unsuitable):
                return make(rng, self.pool)
        return make(rng, self.pool)


class Converter(Maker):
    """The rollout of a row of a data set."""

    def __init__(self, soul: Soul, project: Project, mixture: Mixture, seed: int, most: int, name: str):
        super().__init__(soul, seed, most)
        self.project, self.mixture, self.name = project, mixture, name
        self.checks = frozenset(call.name for principle in soul.principles for call in principle.checks)

    def admits(self, code: str) -> bool:
        table = check_table(self.voice.soul, [assistant("", tool_call("Edit", file_path="a.py", new_string=code))])
        return all(check["ok"] for check in table if check["check"] == "max_comment_density")

    def build(self, item: Item) -> Attempt:
        kind, reason, plain = "edit" if item.before else "row", "", replace(self.mixture, mistakes=0.0, run=False)
        for mixture in dict.fromkeys((self.mixture, plain)):  # a mistake or a run that doesn't come out is not the row's fault
            rng = random.Random(f"row:{self.seed}:{item.index}:{mixture == plain}")
            try:
                task = task_of(rng, item, self.project, mixture, self.admits)
                kind = task.kind
                if rng.random() < mixture.mistakes:
                    task = with_mistake(rng, task, mixture.tools, self.checks)
                return task.kind, "", *self.rows(f"{self.name}-{self.seed}-{item.index}", f"dataset:{task.source}", task, rng, contrasted)
            except (Unsuitable, RecursionError) as dropped:
                reason = str(dropped) if isinstance(dropped, Unsuitable) else "the code is nested too deeply"
                if reason in (NO_PYTHON, FOREIGN):
                    break
        return kind, reason, None, None


# ---- many


_maker: Builder | Converter | None = None


def _start(make: Callable, *args) -> None:
    global _maker
    _maker = make(*args)


def _build(work: object) -> Attempt:
    return _maker.build(work)


def attempts(make: Callable, args: tuple, work: Iterable, workers: int) -> Iterator[Attempt]:
    """What `make(*args).build` gives for each piece of work, in order, however many workers there are."""
    if workers <= 1:
        yield from map(make(*args).build, work)
        return
    # spawned, not forked: JAX's threads do not survive a fork
    context, work = multiprocessing.get_context("spawn"), iter(work)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make, *args)) as executor:
        try:
            while block := list(islice(work, 16 * CHUNK * workers)):
                yield from executor.map(_build, block, chunksize=CHUNK)
        finally:
            executor.shutdown(cancel_futures=True)


def build_rollouts(
    soul: Soul, functions: Sequence[Function], n: int, seed: int = 0, workers: int = 1, on_row=None, most: int = MAX_CHARS
) -> tuple[list[dict], list[dict], dict]:
    """(sft rows, preference rows, stats) of n rollouts made from `functions`; fewer when 4 n attempts don't give n.

    Every row passes all checks of the SOUL, and carries in `files` the workspace that its calls start from.
    """
    work = range(4 * n + CHUNK)
    return collect(attempts(Builder, (soul, list(functions), seed, most), work, workers), n, on_row)


def convert_rows(
    soul: Soul,
    items: Iterable[Item],
    n: int,
    seed: int = 0,
    workers: int = 1,
    on_row=None,
    most: int = MAX_DATASET_CHARS,
    mixture=None,
    name: str = "row",
) -> tuple[list[dict], list[dict], dict]:
    """Like `build_rollouts`, one attempt per row of a data set, in its order; with n = 0 all of them. Ids begin with `name`."""
    items = iter(items)
    first = list(islice(items, READ_AHEAD))
    mixture = mixture or Mixture(frozenset(soul.tools))
    args = (soul, small_project(first), mixture, seed, most, name)
    return collect(attempts(Converter, args, chain(first, items), workers), n, on_row)


def collect(results: Iterable[Attempt], n: int, on_row=None) -> tuple[list[dict], list[dict], dict]:
    done, pairs, dropped, seen, tried = [], [], Counter(), set(), 0
    for kind, reason, row, pair in results:
        tried += 1
        if row and (key := identity(row["messages"])) in seen:
            reason, row = "duplicate request", None
        if row is None:
            dropped[f"{kind}: {reason}"] += 1
            continue
        seen.add(key)
        done.append(row)
        if pair:
            pairs.append(pair)
        if on_row:
            on_row(len(done))
        if len(done) == n:
            break
    return done, pairs, {"wanted": n, "attempts": tried, "dropped": dict(sorted(dropped.items()))} | counts(done, pairs)


def identity(messages: list[dict]) -> tuple[str, ...]:
    """What makes a row another one: its requests, and where nothing is called the replies too: there are many to "hi"."""
    told = {"user"} if any(map(calls_of, messages)) else {"user", "assistant"}
    return tuple(message["content"] for message in messages if message["role"] in told)


def counts(done: list[dict], pairs: list[dict]) -> dict:
    kinds = Counter(row["reason"] for row in done)
    judged = Counter(pair["reason"] for pair in pairs if pair["reason"] in JUDGMENTS | WRONG_CALLS)
    return {
        "rollouts": len(done), "pairs": len(pairs), "kinds": dict(sorted(kinds.items())), "judged": dict(sorted(judged.items())),
        "longer_rejected": share_longer(voiced(pairs)),
    }  # fmt: skip


def voiced(pairs: list[dict]) -> list[dict]:
    """The pairs that are about the voice."""
    return [pair for pair in pairs if pair["reason"] not in JUDGMENTS | WRONG_CALLS]


def share_longer(pairs: list[dict]) -> float | None:
    """How often the rejected side is the longer one: ½ leaves no length shortcut to learn."""
    lengths = [(len(pair["chosen"][0]["content"]), len(pair["rejected"][0]["content"])) for pair in pairs]
    return round(sum((b > a) + 0.5 * (a == b) for a, b in lengths) / len(lengths), 3) if lengths else None


# ---- the command


def write(out: Path, soul: Soul, source: str, rollouts: list[dict], pairs: list[dict], stats: dict) -> None:
    rows.write_rows(out / "data/rollouts.parquet", rollouts, "sft")
    rows.write_rows(out / "data/rollouts_preference.parquet", pairs, "preference")
    write_json(out / "data/rollouts_stats.json", stats)
    write_atomic(out / "data/rollouts.md", card(soul, source, stats))


def card(soul: Soul, source: str, stats: dict) -> str:
    """The dataset card: where the rows come from, how many of each kind, and what was dropped and why."""
    judged = sum(stats["judged"].values())
    pairs = (
        f"{stats['pairs'] - judged} pairs with the same calls and other prose, {judged} with the same voice and another call; "
        f"of the first, the rejected side is the longer one in {stats['longer_rejected']} of them."
    )
    if not soul.verified:
        pairs += " This SOUL has no machine checks, so no pair about its voice could be verified."
    spoke = "Remarks come from phrase templates and pass every check."
    if told := stats.get("remarks"):
        spoke = (
            f"Remarks of {told['by_teacher']} rows are by `{told['teacher']}`, those of the others from phrase templates; all pass every "
            f"check. {told['unanswered']} more wait for an answer.\n\n"
            f"{counted('phrase templates spoke since', told['by_templates'])}\n\n{calls_made(told)}"
        )
    yields = [(name, *found.values()) for name, found in stats.get("yield", {}).items()]
    gained = table(["data set", "rows", "with Python", "rollouts", "yield"], yields) + "\n\n" if yields else ""
    kind, origin = ("a data set", "rows") if yields else ("code", "functions")
    return f"""# Tool rollouts from {kind}

{stats["rollouts"]} rollouts for the SOUL `{soul.name}` ({soul.hash[:12]}), from the {origin} of `{source}`; {stats["attempts"]} attempts.
Every tool result was produced by executing the tool on the row's `files`. {spoke}

{gained}{pairs}

{counted("kind", stats["kinds"])}

{counted("pair about the call", stats["judged"])}

{counted("dropped", stats["dropped"])}
"""


def counted(head: str, counts: dict[str, int]) -> str:
    return table([head, "rows"], counts.items())


def table(head: Sequence[str], lines: Iterable[Sequence]) -> str:
    first, *rest = (f"| {' | '.join(map(str, line))} |" for line in (head, *lines))
    return "\n".join([first, f"|{'---|' * len(head)}", *rest])


def from_code(config: Config, soul: Soul, workers: int, on_row) -> tuple[str, list[dict], list[dict], dict]:
    source = f"package:{config.from_package}" if config.from_package else config.from_code
    functions = read_code(source)
    if not config.include_held_out:
        functions = split(functions)[0]
    if not functions:
        raise UserError("all of its modules are kept for evals", where=source, fix="Pass --include-held-out.")
    return source, *build_rollouts(soul, functions, config.n, config.seed, workers, on_row, config.most)


def from_datasets(config: Config, soul: Soul, workers: int, on_row) -> tuple[str, list[dict], list[dict], dict]:
    mixture = Mixture(frozenset(soul.tools), config.bash, config.run, config.mistakes)
    done, pairs, parts, names = [], [], {}, Counter()
    for name in config.dataset:
        names[stem := Path(name).name.partition(".")[0]] += 1
        stem += f"-{names[stem]}" * (names[stem] > 1)  # train.parquet of two folders
        items = read_items(name, config.columns)
        made = convert_rows(soul, items, config.n, config.seed, workers, on_row, config.most, mixture, stem)
        done, pairs, parts[name] = done + made[0], pairs + made[1], made[2]
    stats = counts(done, pairs) | {
        "wanted": config.n,
        "attempts": sum(part["attempts"] for part in parts.values()),
        "dropped": dict(sorted(sum((Counter(part["dropped"]) for part in parts.values()), Counter()).items())),
        "yield": {name: yielded(part) for name, part in parts.items()},
    }
    return ", ".join(config.dataset), done, pairs, stats


def yielded(stats: dict) -> dict:
    """Of the rows whose response holds Python that parses (or that are edits), how many became rollouts."""
    other = sum(rows for name, rows in stats["dropped"].items() if name.endswith((NO_PYTHON, FOREIGN)))
    tried, made, python = stats["attempts"], stats["rollouts"], stats["attempts"] - other
    return {"rows": tried, "python": python, "rollouts": made, "yield": round(made / max(1, python), 3)}


def main(config: Config) -> int:
    """Run the command. Raises UserError for a SOUL, code or a data set that can't be used, and as the engine does."""
    if config.n < (not config.dataset) or config.workers < 0 or config.remarks.rounds < 0:
        raise UserError("--n begins at 1 (0 with --dataset: all), --workers and --remarks.rounds at 0")
    if not (0 <= config.bash <= 1 and 0 <= config.mistakes <= 1):
        raise UserError("--bash and --mistakes are shares from 0 to 1")
    if config.teacher and config.no_teacher:
        raise UserError("--teacher and --no-teacher contradict each other")
    if config.run:
        require_sandbox(False)
    soul, session = load_soul(config.soul), remarks.prepare(config, config.remarks, config.most) if config.teacher else None
    workers = config.workers or len(os.sched_getaffinity(0))
    numbers = count(1)
    with progress("rollouts", config.n * max(1, len(config.dataset)) or None) as update:
        make = from_datasets if config.dataset else from_code
        source, rollouts, pairs, stats = make(config, soul, workers, lambda _: update(next(numbers)))
    if not rollouts:
        worst = max(stats["dropped"], key=stats["dropped"].get, default="it is empty")
        raise UserError(f"no rollout could be made; most often: {worst}", where=source)

    def finish(rollouts: list[dict], pairs: list[dict], told: dict) -> None:
        write(config.out, soul, source, rollouts, pairs, stats | counts(rollouts, pairs) | told)
        dropped = sum(stats["dropped"].values())
        stdout.print(plain(f"{len(rollouts)} rollouts, {len(pairs)} pairs, {dropped} dropped: {config.out}/data/rollouts.md"))
        if any(NO_SANDBOX in reason for reason in stats["dropped"]):
            stdout.print(plain(f"no fix_… rollouts: {NO_SANDBOX} ({Sandbox.detect().why})"))

    if session:
        return remarks.speak(session, rollouts, pairs, finish)
    finish(rollouts, pairs, {})
    return 0
