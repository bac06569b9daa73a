"""`soulsmith convert`: tool rollouts from code, without a teacher.

Every call is executed in a temporary workspace while the rollout is built, remarks pass the SOUL's checks, and what
fails is dropped and counted. Row i depends on (seed, i) alone: the same bytes with one worker or many.
"""

import multiprocessing
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datagen.code_changes import Unsuitable
from datagen.code_seeds import Function, parses, read_code, split
from datagen.from_code import KINDS, Pool, Task
from datagen.phrases import Voice
from soul import rows
from soul.console import output as stdout
from soul.console import plain, progress
from soul.conversation import assistant, tool, tool_call, user
from soul.errors import UserError
from soul.files import write_atomic, write_json
from soul.spec import Soul, check_table, load_soul, repair, run_checks
from workspace.tools import REJECTED, Workspace, make_workspace

CHUNK = 32
REMARK_TRIES = 4
DRAWS = 8
# kind -> (share of its pairs that are about the call and not about the voice, their reason)
JUDGED = {"answer": (0.9, "needless_call"), "find": (0.3, "told_without_looking"), "explain": (0.3, "told_without_looking")}
JUDGMENTS = {reason for _, reason in JUDGED.values()}
MAX_CHARS = 1600  # of what the template renders: at most 640 tokens at 2.5 characters each, the lowest ratio measured (median 3.2)


@dataclass(frozen=True)
class Config:
    """Make tool rollouts from real code; every tool result comes from executing the tool."""

    soul: Path = Path("soul/SOUL.md")
    """The SOUL.md whose voice and checks the remarks follow."""
    out: Path = Path("runs/code")
    """The run directory; writes data/rollouts.parquet and data/rollouts_preference.parquet there."""
    from_code: str = "stdlib"
    """A directory of Python code, or `stdlib`."""
    from_package: str = ""
    """An installed package to take the code from, instead of --from-code."""
    n: int = 400
    """How many rollouts."""
    seed: int = 0
    workers: int = 1
    include_held_out: bool = False
    """Also use the modules kept for evals."""


Attempt = tuple[str, str, dict | None, dict | None]  # kind, reason, row, pair; the row is None when it was dropped for `reason`
Contrast = tuple[list[dict], dict, dict, list[dict]]  # prompt, chosen, rejected, check table of the rejected side

# ---- one rollout


def execute(task: Task) -> list[str]:
    """Run the task's calls in a fresh workspace; gives their results. Raises Unsuitable when anything is not as the task says."""
    with tempfile.TemporaryDirectory(prefix="soulsmith-") as directory:
        root = Path(directory)
        workspace, results = make_workspace(task.files, root), []
        for step in (step for step in task.steps if step.tool):
            result = REJECTED if step.rejected else workspace.run(step.tool, step.args)
            if step.expect not in result or result.startswith("error: ") != step.expect.startswith("error: "):
                raise Unsuitable(f"{step.tool} gave another result")
            results.append(result)
        for path, text in (task.files | task.final).items():
            if (root / path).read_text(encoding="utf-8") != text:
                raise Unsuitable("final file differs")
            if path in task.final and not parses(text):
                raise Unsuitable("final file does not parse")
    return results


def speak(task: Task, results: list[str], voice: Voice, rng: random.Random) -> tuple[list[dict], list[str]]:
    """The conversation with remarks that pass every check of the SOUL, and the principles that a repair touched."""
    for _ in range(REMARK_TRIES):
        messages, left = [user(task.request)], iter(results)
        for step in task.steps:
            text = voice.say(rng, step.situation, task.slots | step.slots)
            if text is None:
                raise Unsuitable(f"no remark passes the SOUL: {step.situation}")
            if step.tool:
                messages += [assistant(text, tool_call(step.tool, **step.args)), tool(next(left))]
            else:
                messages.append(assistant(text + step.body))
        messages, repaired = repair(voice.soul, messages)
        faults = run_checks(voice.soul, messages)
        if not faults:
            return messages, repaired
    raise Unsuitable(f"breaks the SOUL: {faults[0].principle}")


def preference(task: Task, messages: list[dict], voice: Voice, rng: random.Random) -> Contrast | None:
    """One assistant message in the SOUL's voice and in another. The calls are the same; rejected is the longer one in about
    half of the pairs, and otherwise as near in length as can be."""
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    place = 0 if rng.random() < 0.75 else len(spoken) - 1
    prompt, chosen = messages[: spoken[place]], messages[spoken[place]]
    step, longer = task.steps[place], rng.random() < 0.4  # 0.5 gave 0.60 longer ones: a shorter one is not always found
    if run_checks(voice.soul, [*prompt, chosen]):
        return None
    length = len(chosen["content"])
    candidates = list(dict.fromkeys(voice.misaligned(rng, step.situation, task.slots | step.slots)))
    for text in sorted(candidates, key=lambda text: ((len(text) > length) != longer, abs(len(text) - length))):
        other = chosen | {"content": text}
        if any(fault.message_index == len(prompt) for fault in run_checks(voice.soul, [*prompt, other])):
            return prompt, chosen, other, check_table(voice.soul, [*prompt, other])
    return None


def judgement(task: Task, messages: list[dict], voice: Voice, rng: random.Random) -> Contrast | None:
    """Like `preference`, but both sides are in the SOUL's voice and differ in the call: one that a question didn't need, and
    that finds nothing when it is run, or a place in the code that is told without looking."""
    if "Grep" not in voice.soul.tools:
        return None
    prompt, chosen = messages[:1], messages[1]
    if task.kind == "answer":
        text, call = voice.say(rng, "search", task.slots), {"pattern": f"def {task.slots['name']}"}
        with tempfile.TemporaryDirectory(prefix="soulsmith-") as directory:
            needless = not task.files and Workspace(Path(directory)).run("Grep", call) == "no matches found"
        other = assistant(text, tool_call("Grep", **call)) if text and needless else None
    else:
        text = voice.say(rng, task.steps[-1].situation, task.slots)
        other = assistant(text) if text else None
    if other is None or run_checks(voice.soul, [*prompt, other]):
        return None
    return prompt, chosen, other, check_table(voice.soul, [*prompt, other])


class Builder:
    """What a worker needs to make rollout i: functions, voice and seed, prepared once."""

    def __init__(self, soul: Soul, functions: Sequence[Function], seed: int):
        self.pool, self.voice, self.seed = Pool(functions), Voice(soul), seed
        self.kinds = {make: share for make, (share, needs) in KINDS.items() if needs <= set(soul.tools)}
        self.verifiable = any(principle.checks for principle in soul.principles)

    def build(self, attempt: int) -> Attempt:
        rng = random.Random(f"rollout:{self.seed}:{attempt}")
        make = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        kind = make.__name__
        try:
            task = self._draw(rng, make)
            kind = task.kind
            if foreign := {step.tool for step in task.steps if step.tool} - set(self.voice.soul.tools):
                raise Unsuitable(f"this SOUL has no {min(foreign)}")
            messages, repaired = speak(task, execute(task), self.voice, rng)
            if length(messages) > MAX_CHARS:
                raise Unsuitable("too long")
        except Unsuitable as dropped:
            return kind, str(dropped), None, None
        common = {
            "id": f"code-{self.seed}-{attempt}", "source": f"code:{task.source}", "soul_hash": self.voice.soul.hash,
            "files": [{"path": path, "content": text} for path, text in task.files.items()],
        }  # fmt: skip
        checks = check_table(self.voice.soul, messages)
        row = common | {"messages": messages, "principles": repaired, "checks": checks, "reason": task.kind}
        share, reason = JUDGED.get(task.kind, (0.0, ""))
        found = judgement(task, messages, self.voice, rng) if rng.random() < share else None
        if not found:
            reason, found = task.kind, preference(task, messages, self.voice, rng) if self.verifiable else None
        if not found:
            return kind, "", row, None
        prompt, chosen, other, table = found
        broken = sorted({check["principle"] for check in table if not check["ok"]})
        pair = {"prompt": prompt, "chosen": [chosen], "rejected": [other], "principles": broken, "checks": table, "reason": reason}
        return kind, "", row, common | pair

    def _draw(self, rng: random.Random, make) -> Task:
        # a function that suits no task of its kind says nothing about the yield: draw others before giving up
        for _ in range(DRAWS - 1):
            with suppress(Unsuitable):
                return make(rng, self.pool)
        return make(rng, self.pool)


def length(messages: list[dict]) -> int:
    """Characters of what the template renders, with an allowance for control tokens."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return sum(len(message["content"]) + 8 for message in messages) + sum(len(call) + 20 for call in calls)


# ---- many


_builder: Builder | None = None


def _start(soul: Soul, functions: Sequence[Function], seed: int) -> None:
    global _builder
    _builder = Builder(soul, functions, seed)


def _build(attempt: int) -> Attempt:
    return _builder.build(attempt)


def attempts(soul: Soul, functions: Sequence[Function], seed: int, workers: int, most: int) -> Iterator[Attempt]:
    """Results of attempts 0, 1, 2 … in order, however many workers make them."""
    if workers <= 1:
        yield from map(Builder(soul, functions, seed).build, range(most))
        return
    # spawned, not forked: JAX's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(soul, list(functions), seed)) as executor:
        try:
            yield from executor.map(_build, range(most), chunksize=CHUNK)
        finally:
            executor.shutdown(cancel_futures=True)


def build_rollouts(
    soul: Soul, functions: Sequence[Function], n: int, seed: int = 0, workers: int = 1, on_row=None
) -> tuple[list[dict], list[dict], dict]:
    """(sft rows, preference rows, stats) of n rollouts made from `functions`; fewer when 4 n attempts don't give n.

    Every row passes all checks of the SOUL, and carries in `files` the workspace that its calls start from.
    """
    done, pairs, kinds, dropped, seen, tried = [], [], Counter(), Counter(), set(), 0
    for kind, reason, row, pair in attempts(soul, functions, seed, workers, 4 * n + CHUNK):
        if len(done) == n:
            break
        tried += 1
        if row and row["messages"][0]["content"] in seen:
            reason, row = "duplicate request", None
        if row is None:
            dropped[f"{kind}: {reason}"] += 1
            continue
        seen.add(row["messages"][0]["content"])
        done.append(row)
        kinds[kind] += 1
        if pair:
            pairs.append(pair)
        if on_row:
            on_row(len(done))
    judged = Counter(pair["reason"] for pair in pairs if pair["reason"] in JUDGMENTS)
    voiced = [pair for pair in pairs if pair["reason"] not in JUDGMENTS]
    return done, pairs, {
        "wanted": n, "attempts": tried, "rollouts": len(done), "pairs": len(pairs), "kinds": dict(sorted(kinds.items())),
        "judged": dict(sorted(judged.items())), "dropped": dict(sorted(dropped.items())), "longer_rejected": share_longer(voiced),
    }  # fmt: skip


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
    if not any(principle.checks for principle in soul.principles):
        pairs += " This SOUL has no machine checks, so no pair about its voice could be verified."
    return f"""# Tool rollouts from code

{stats["rollouts"]} rollouts for the SOUL `{soul.name}` ({soul.hash[:12]}), from the functions of `{source}`; {stats["attempts"]} attempts.
Every tool result was produced by executing the tool on the row's `files`; remarks come from phrase templates and pass every check.

{pairs}

{counted("kind", stats["kinds"])}

{counted("pair about the call", stats["judged"])}

{counted("dropped", stats["dropped"])}
"""


def counted(head: str, counts: dict[str, int]) -> str:
    return "\n".join([f"| {head} | rows |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts.items())])


def main(config: Config) -> int:
    """Run the command. Raises UserError for a SOUL or code that can't be used."""
    if config.n < 1 or config.workers < 1:
        raise UserError("--n and --workers begin at 1")
    soul = load_soul(config.soul)
    source = f"package:{config.from_package}" if config.from_package else config.from_code
    functions = read_code(source)
    if not config.include_held_out:
        functions = split(functions)[0]
    if not functions:
        raise UserError("all of its modules are kept for evals", where=source, fix="Pass --include-held-out.")
    with progress("rollouts", config.n) as update:
        rollouts, pairs, stats = build_rollouts(soul, functions, config.n, config.seed, config.workers, on_row=update)
    if not rollouts:
        worst = max(stats["dropped"], key=stats["dropped"].get)
        raise UserError(f"no rollout could be made; most often: {worst}", where=source)
    write(config.out, soul, source, rollouts, pairs, stats)
    dropped = stats["attempts"] - len(rollouts)
    stdout.print(plain(f"{len(rollouts)} rollouts, {len(pairs)} pairs, {dropped} dropped: {config.out}/data/rollouts.md"))
    return 0
