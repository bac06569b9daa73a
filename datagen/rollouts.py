"""From a task to rows: its calls are executed, its remarks spoken and checked, and one of them told apart from a worse one."""

import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from datagen.code_changes import Unsuitable
from datagen.code_seeds import tree_of
from datagen.from_code import Step, Task
from datagen.mistakes import wrong_calls
from datagen.phrases import Voice
from soul.conversation import assistant, tool, tool_call, user
from soul.registry import assistants
from soul.spec import Soul, check_table, repair, run_checks
from workspace.tools import REJECTED, Workspace, make_workspace

REMARK_TRIES = 4
# kind -> (share of its pairs that are about the call and not about the voice, their reason). Calls lose in about as many as they
# win: with five times as many needless ones, DPO took valid calls from 100 % to 86
JUDGED = {
    "answer": (0.2, "needless_call"),
    "talk": (0.15, "needless_call"),
    "find": (0.8, "told_without_looking"),
    "explain": (0.8, "told_without_looking"),
}
JUDGMENTS = {reason for _, reason in JUDGED.values()}
WRONG_CALLS = {"edit_unread", "ambiguous_edit", "wrong_path", "overwrite", "needless_read", "needless_call", "claimed_done"}
WRONG_SHARE = 0.4
# what the rejected side of a pair about the call may break: it is what the pair is about
ABOUT_CALLS = {"read_before_edit", "unique_old_string", "max_failed_edits", "no_repeated_call", "max_edit_lines", "max_comment_density"}
UNSTEADY = re.compile(r"0x[0-9a-f]{6,}|^exit code: |^timed out after |^\(no output\)$", re.M)
# the Python that runs this: a version manager's `python3` is a shell script that takes 200 ms to find one
PATH = f"{os.path.dirname(os.path.realpath(sys.executable))}:{os.environ.get('PATH', os.defpath)}"
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # an fsync or rmdir on a disk takes 2 to 4 ms

Contrast = tuple[list[dict], dict, dict, list[dict]]  # prompt, chosen, rejected, check table of the rejected side


def execute(task: Task) -> list[str]:
    """Run the task's calls in a fresh workspace; gives their results. Raises Unsuitable when anything is not as the task says."""
    with scratch(task.files, task.steps) as workspace:
        results = perform(workspace, task.steps)
        for path, text in (task.files | task.final).items():
            if (workspace.root / path).read_text(encoding="utf-8") != text:
                raise Unsuitable("final file differs")
            if path in task.final and path.endswith(".py") and not tree_of(text):
                raise Unsuitable("final file does not parse")
    return results


@contextmanager
def scratch(files: dict[str, str], steps: Iterable[Step] = ()) -> Iterator[Workspace]:
    """A temporary workspace; in memory unless a step runs a command, whose sandbox has a /dev/shm of its own."""
    commands = any(step.tool == "Bash" for step in steps)
    with tempfile.TemporaryDirectory(prefix="soulsmith-", dir=None if commands else IN_MEMORY) as directory:
        yield make_workspace(files, directory, env={"PATH": PATH})


def perform(workspace: Workspace, steps: Sequence[Step]) -> list[str]:
    """The results of the steps' calls. Raises Unsuitable for one that is not as the step expects."""
    results = []
    for step in (step for step in steps if step.tool):
        result = REJECTED if step.rejected else workspace.run(step.tool, step.args)
        if step.expect not in result or result.startswith("error: ") != step.expect.startswith("error: "):
            raise Unsuitable(f"{step.tool} gave another result")
        if step.expect.startswith("timed out") and result != step.expect:
            raise Unsuitable("what a command shows before its time is up depends on the machine")
        if step.situation == "try" and (UNSTEADY.search(result) or workspace.run(step.tool, step.args) != result):
            raise Unsuitable("the code fails, or prints nothing, or something else each time")
        results.append(result)
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
            messages += [user(step.reply)] if step.reply else []
        messages, repaired = repair(voice.soul, messages)
        faults = run_checks(voice.soul, messages)
        if not faults:
            return messages, repaired
    raise Unsuitable(f"breaks the SOUL: {faults[0].principle}")


def preference(task: Task, messages: list[dict], voice: Voice, rng: random.Random) -> Contrast | None:
    """One assistant message in the SOUL's voice and in another. The calls are the same; rejected is the longer one in about
    half of the pairs, and otherwise as near in length as can be."""
    spoken = assistants(messages)
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


def judged(task: Task, messages: list[dict], voice: Voice, rng: random.Random) -> tuple[str, Contrast | None]:
    """For rollouts from code, (what is wrong, pair) in the shares of `JUDGED`: both sides are in the SOUL's voice and differ in the
    call, one that a question didn't need and that finds nothing when it is run, or a place in the code that is told without looking."""
    share, reason = JUDGED.get(task.kind, (0.0, ""))
    if rng.random() >= share or "Grep" not in voice.soul.tools:
        return reason, None
    needless, pattern = reason == "needless_call", f"def {task.slots['name']}"
    text = voice.say(rng, "search" if needless else task.steps[-1].situation, task.slots)
    if text is None:
        return reason, None
    if needless:
        with scratch({}) as workspace:
            if workspace.run("Grep", {"pattern": pattern}) != "no matches found":
                return reason, None
    prompt, chosen, other = messages[:1], messages[1], assistant(text, *([tool_call("Grep", pattern=pattern)] if needless else []))
    if run_checks(voice.soul, [*prompt, other]):
        return reason, None
    return reason, (prompt, chosen, other, check_table(voice.soul, [*prompt, other]))


def contrasted(task: Task, messages: list[dict], voice: Voice, rng: random.Random) -> tuple[str, Contrast | None]:
    """For rollouts from data sets: a call in place of the right one that, executed there, fails."""
    if rng.random() >= WRONG_SHARE:
        return "", None
    spoken = assistants(messages)
    for reason, place, wrong in wrong_calls(rng, task):
        prompt, chosen, right = messages[: spoken[place]], messages[spoken[place]], task.steps[place]
        same = wrong.situation == right.situation and not wrong.slots
        text = chosen["content"] if same else voice.say(rng, wrong.situation, task.slots | wrong.slots)
        if text is None or run_checks(voice.soul, [*prompt, chosen]):
            continue
        other = assistant(text, *([tool_call(wrong.tool, **wrong.args)] if wrong.tool else []))
        table = check_table(voice.soul, [*prompt, other])
        if any(not check["ok"] and check["check"] not in ABOUT_CALLS for check in table):
            continue
        with scratch(task.files, task.steps[:place]) as workspace, suppress(Unsuitable):
            perform(workspace, (*task.steps[:place], wrong))
            return reason, (prompt, chosen, other, table)
    return "", None


class Maker:
    """What a worker needs to turn a task into rows, prepared once."""

    def __init__(self, soul: Soul, seed: int, most: int):
        self.voice, self.seed, self.most = Voice(soul), seed, most

    def rows(self, name: str, source: str, task: Task, rng: random.Random, judge: Callable) -> tuple[dict, dict | None]:
        """(sft row, preference row or None). Raises Unsuitable."""
        soul = self.voice.soul
        if foreign := {step.tool for step in task.steps if step.tool} - set(soul.tools):
            raise Unsuitable(f"this SOUL has no {min(foreign)}")
        messages, repaired = speak(task, execute(task), self.voice, rng)
        if length(messages) > self.most:
            raise Unsuitable("too long")
        files = [{"path": path, "content": text} for path, text in task.files.items()]
        common = {"id": name, "source": source, "soul_hash": soul.hash, "files": files}
        row = common | {"messages": messages, "principles": repaired, "checks": check_table(soul, messages), "reason": task.kind}
        reason, found = judge(task, messages, self.voice, rng)
        if not found:
            reason, found = task.kind, preference(task, messages, self.voice, rng) if soul.verified else None
        if not found:
            return row, None
        prompt, chosen, other, table = found
        broken = sorted({check["principle"] for check in table if not check["ok"]})
        pair = {"prompt": prompt, "chosen": [chosen], "rejected": [other], "principles": broken, "checks": table, "reason": reason}
        return row, common | pair


def length(messages: list[dict]) -> int:
    """Characters of what the template renders, with an allowance for control tokens."""
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    return sum(len(message["content"]) + 8 for message in messages) + sum(len(call) + 20 for call in calls)
