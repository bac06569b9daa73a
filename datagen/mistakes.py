"""Mistakes and their repair: a recovery puts a wrong call before the right one, a pair puts it in its place.

Each wrong call is executed where it stands, and what it does not do wrong is not used. Read, Edit and Bash word the errors.
"""

import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

from datagen.edits import occurrences
from datagen.from_code import misplaced
from datagen.phrases import fill, pick
from datagen.python_text import defined
from datagen.tasks import Step, Task, edit_step
from workspace.tools import REJECTED

DEFINES = re.compile(r"\s*(?:async )?(?:def|class) |@")
# a loop's head, and the last of its lines, which moves it on; between them nothing that prints
COUNTED = re.compile(r"^(([ \t]*)while .*:.*)\n(?:(?!.*print)\2[ \t]+.*\n)+?(\2[ \t]+(\w+) (?:[+*-]|//)?= .*)$", re.M)


def calls_of(task: Task, tool: str, *needs: str) -> list[int]:
    """Where in the steps that tool is called with these arguments."""
    return [i for i, step in enumerate(task.steps) if step.tool == tool and all(need in step.args for need in needs)]


def spliced(task: Task, at: int, *steps: Step, drop: int = 0) -> tuple[Step, ...]:
    return (*task.steps[:at], *steps, *task.steps[at + drop :])


# ---- recoveries: Task -> Task, or None where the mistake would make no sense


def wrong_path(rng: random.Random, task: Task) -> Task | None:
    """The person names a path that isn't there; a search, or the error's own hint, leads to the right one."""
    path, wrong = task.slots["file"], misplaced(rng, task.slots["file"])
    reads, named = calls_of(task, "Read"), re.compile(rf"(?<![\w/.-]){re.escape(path)}(?!\w)")
    if not reads or not named.search(task.request) or wrong in task.files:
        return None
    first = task.steps[reads[0]]
    tried = Step("read", "Read", {"file_path": wrong}, "error: ", {"file": wrong})
    searched = [i for i in calls_of(task, "Grep") if i < reads[0]]
    rest = task.steps[reads[0] :]
    if Path(wrong).name == Path(path).name and "offset" not in first.args:  # the error says where the file is
        steps = (tried, replace(first, situation="nearby", slots={"path": wrong}), *rest[1:])
    elif searched:
        old = task.steps[searched[0]]
        args = {"pattern": old.args["pattern"]}
        steps = (tried, replace(old, situation="missing", args=args, slots=old.slots | {"path": wrong}), *rest)
    else:
        return None
    return replace(task, kind=f"{task.kind}_recover_path", request=named.sub(wrong, task.request), steps=steps)


def ambiguous(rng: random.Random, task: Task) -> Task | None:
    """The part that changes stands elsewhere too; the second attempt takes more lines."""
    for at in calls_of(task, "Edit", "old_string"):
        if wrong := too_narrow(task, at):
            again = replace(task.steps[at], situation="again")
            return replace(task, kind=f"{task.kind}_recover_unique", steps=spliced(task, at, wrong, again, drop=1))
    return None


def too_narrow(task: Task, at: int) -> Step | None:
    """The Edit at that step with just the part that changes, if that is not unique in the file as it then is."""
    step, text = task.steps[at], text_before(task, at)
    narrow = step.narrow
    if not narrow or occurrences(text, narrow) != 2 or narrow == step.args["old_string"] or narrow not in step.args["old_string"]:
        return None
    head, _, tail = step.args["old_string"].partition(narrow)
    new = step.args["new_string"]
    if not new.startswith(head) or not new.endswith(tail) or len(new) < len(head) + len(tail):
        return None
    new = new[len(head) : len(new) - len(tail)]
    wrong = replace(step, args=step.args | {"old_string": narrow, "new_string": new}, expect="error: old_string occurs")
    return wrong if new != narrow else None


def text_before(task: Task, at: int) -> str:
    """The file of the Edit at that step, as the edits before it leave it."""
    path = task.steps[at].args["file_path"]
    text = task.files.get(path, "")
    for step in task.steps[:at]:
        if step.tool == "Edit" and step.args["file_path"] == path and not step.rejected and not step.expect.startswith("error: "):
            text = text.replace(step.args["old_string"], step.args["new_string"]) if "old_string" in step.args else step.args["new_string"]
    return text


def misquoted(rng: random.Random, task: Task) -> Task | None:
    """old_string with other spaces is not found; the file is read again, and the edit takes its real lines."""
    for at in calls_of(task, "Edit", "old_string"):
        step = task.steps[at]
        sloppy = re.sub(r" ([=+*-]=?) |(?<=,) ", r"\1", step.args["old_string"], count=1)
        reads = [i for i in calls_of(task, "Read") if i < at]
        if sloppy != step.args["old_string"] and sloppy not in text_before(task, at) and len(reads) == 1 and at == reads[0] + 1:
            tried = replace(step, args=step.args | {"old_string": sloppy}, expect="error: old_string not found")
            steps = spliced(task, at, tried, replace(task.steps[reads[0]], situation="reread"), step, drop=1)
            return replace(task, kind=f"{task.kind}_recover_match", steps=steps)
    return None


def slip(rng: random.Random, task: Task) -> Task | None:
    """New code with a colon left out; the check fails, the line is mended, and the check passes."""
    if not (found := executed(task, "verify")):
        return None
    code, check = found
    heads = [line for line in code.split("\n") if re.match(r"\s*(?:def|class|for|while|if|else|try)\b.*:$", line)]
    heads = [line for line in heads if code.count(line[:-1]) == 1]
    if not heads:
        return None
    good, failed = rng.choice(heads), replace(check, expect="SyntaxError")
    return mended(task, "check", good, good[:-1], failed, replace(check, situation="recheck"), "broken")


def misspelt(rng: random.Random, task: Task) -> Task | None:
    """New code calls a function by a name that it doesn't have; running it says so."""
    if not (found := executed(task, "try")):
        return None
    code, run = found
    uses = [(line, name) for line in code.split("\n") for name in defined(code) if len(name) > 4 and re.match(rf"(?=\S).*\b{name}\(", line)]
    uses = [(line, name) for line, name in uses if not DEFINES.match(line) and code.count(line) == 1]
    if not uses:
        return None
    good, name = rng.choice(uses)
    cut = rng.randint(1, len(name) - 2)
    bad = good.replace(f"{name}(", f"{name[:cut]}{name[cut + 1 :]}(")
    return mended(task, "crash", good, bad, replace(run, situation="run", expect="NameError"), run, "crashed")


def endless(rng: random.Random, task: Task) -> Task | None:
    """New code leaves out the step of a loop that prints nothing: running it ends by the command's timeout."""
    if not (found := executed(task, "try")):
        return None
    code, run = found
    loops = [(loop[0], loop[3]) for loop in COUNTED.finditer(code) if re.search(rf"\b{loop[4]}\b", loop[1]) and code.count(loop[1]) == 1]
    if not loops:
        return None
    good, moves = rng.choice(loops)
    failed = replace(run, situation="run", args=run.args | {"timeout": "1"}, expect="timed out after 1 s")
    return mended(task, "timeout", good, good.removesuffix(f"\n{moves}"), failed, run, "hung", step=moves.strip())


def executed(task: Task, situation: str) -> tuple[str, Step] | None:
    """(code, command) of a task that ends with making a file and with a command of that situation on it."""
    if len(task.steps) < 3 or task.steps[-2].situation != situation or "old_string" in task.steps[-3].args:
        return None
    return task.steps[-3].args["new_string"], task.steps[-2]


def mended(task: Task, kind: str, good: str, bad: str, failed: Step, again: Step, situation: str, **slots: str) -> Task:
    """The file is made with `bad` in place of `good`; the command fails; one edit, and the command `again`."""
    *before, made, _, closing = task.steps
    broken = replace(made, args=made.args | {"new_string": made.args["new_string"].replace(good, bad)})
    repair = replace(edit_step(made.args["file_path"], bad, good, situation), slots=slots)
    return replace(task, kind=f"{task.kind}_recover_{kind}", steps=(*before, broken, failed, repair, again, closing))


def refused(rng: random.Random, task: Task) -> Task | None:
    """The person wants the new file elsewhere: refuses the call, says where, and gets it there."""
    made, path = calls_of(task, "Edit"), task.slots["file"]
    if len(made) != 1 or "old_string" in task.steps[made[0]].args or path in task.request or calls_of(task, "Bash"):
        return None
    folder = rng.choice([name for name in ("src", "lib", "app", "scripts", "tools") if not path.startswith(name)])
    moved = f"{folder}/{Path(path).name}"
    if moved in task.files:
        return None
    step = task.steps[made[0]]
    reply = fill(pick(rng, "elsewhere"), {"file": moved, "name": folder})
    refusal = replace(step, expect=REJECTED, rejected=True, slots={"file": path}, reply=reply)
    right = replace(step, situation="moved", args=step.args | {"file_path": moved}, expect=f"created {moved}")
    steps, final = spliced(task, made[0], refusal, right, drop=1), {moved: task.final[path]}
    return replace(task, kind=f"{task.kind}_recover_rejected", steps=steps, slots=task.slots | {"file": moved}, final=final)


def refused_sed(rng: random.Random, task: Task) -> Task | None:
    """The person wants no sed: the same change by Edit."""
    for at in calls_of(task, "Edit", "old_string")[:1]:
        step = task.steps[at]
        old, new = step.narrow.strip(), step.args["new_string"].strip()
        if step.narrow == step.args["old_string"] and old and new and re.fullmatch(r"[\w .,()=+:\"-]+", old + new) and len(old + new) < 100:
            program = "s/{}/{}/".format(old.replace(".", r"\."), new)
            command = f"sed -i {shlex.quote(program)} {step.args['file_path']}"
            reply = fill(pick(rng, "no_sed"), {"file": step.args["file_path"]})
            wrong = Step("edit", "Bash", {"command": command}, REJECTED, rejected=True, reply=reply)
            return replace(task, kind=f"{task.kind}_recover_rejected", steps=spliced(task, at, wrong))
    return None


def misspelled(rng: random.Random, task: Task) -> Task | None:
    """The check is run on a file that isn't there; `ls` shows its name."""
    run, path = calls_of(task, "Bash", "command"), task.slots["file"]
    if not run or "/" in path or path not in task.steps[run[-1]].args["command"]:
        return None
    stem = Path(path).stem
    wrong = rng.choice([stem[:-1] if stem[-1] == "s" else f"{stem}s", stem.replace("_", "")]) + ".py"
    if wrong == path:
        return None
    check = task.steps[run[-1]]
    command = check.args["command"].replace(path, wrong)
    tried = replace(check, args={"command": command}, expect="exit code: ", slots={"command": command, "file": wrong})
    steps = spliced(task, run[-1], tried, Step("astray", "Bash", {"command": "ls"}, path))
    return replace(task, kind=f"{task.kind}_recover_command", steps=steps)


# recovery -> (share, the tools that it needs, the check that its failure breaks)
RECOVERIES = {
    wrong_path: (4, {"Read"}, ""), ambiguous: (4, {"Edit"}, "unique_old_string"), misquoted: (3, {"Edit"}, "unique_old_string"),
    slip: (3, {"Bash"}, ""), misspelt: (3, {"Bash"}, ""), endless: (3, {"Bash"}, ""), refused: (2, {"Edit"}, ""), refused_sed: (2, {"Bash"}, ""), misspelled: (2, {"Bash"}, ""),
}  # fmt: skip


def with_mistake(rng: random.Random, task: Task, tools: frozenset[str], checks: frozenset[str]) -> Task:
    """The task with a mistake at its start or in its middle, the first that makes sense; the task itself where none does."""
    fit = {make: share for make, (share, needs, breaks) in RECOVERIES.items() if needs <= tools and breaks not in checks}
    while fit:
        make = rng.choices(list(fit), list(fit.values()))[0]
        if made := make(rng, task):
            return made
        del fit[make]
    return task


# ---- pairs: the right call against a wrong one


def wrong_calls(rng: random.Random, task: Task) -> list[tuple[str, int, Step]]:
    """(what is wrong, the step in whose place it stands, the wrong call or, without one, the claim that it's done) for each
    plausible mistake, in random order."""
    path, made, found = task.slots["file"], calls_of(task, "Edit"), []
    if "_recover_" in task.kind:  # the step that it would be put against may be the mistake
        return []
    edits, reads = calls_of(task, "Edit", "old_string"), calls_of(task, "Read")
    if edits and reads and reads[0] < edits[0]:
        found.append(("edit_unread", reads[0], replace(task.steps[edits[0]], situation="edit", expect="error: read ")))
        whole = {"file_path": path, "new_string": task.final[path]}
        found += [("overwrite", edits[0], Step("edit", "Edit", whole, "error: "))] if len(task.final[path]) < 3000 else []
    found += [("ambiguous_edit", at, wrong) for at in edits if (wrong := too_narrow(task, at))]
    if reads and not reads[0] and Path(wrong := misplaced(rng, path)).name == Path(path).name and wrong not in task.files:
        step = task.steps[reads[0]]
        astray = replace(step, args=step.args | {"file_path": wrong}, expect="error: ", slots={"file": wrong})
        found.append(("wrong_path", reads[0], astray))
    if made and not edits and rng.random() < 0.4:
        found.append(("needless_read", made[0], Step("read", "Read", {"file_path": path}, "error: ")))
    if made and rng.random() < 0.4:  # as many in which a call is too much as in which it is missing
        closing, again = len(task.steps) - 1, replace(task.steps[made[-1]], situation="edit", expect="error: ")
        found.append(rng.choice([("needless_call", closing, again), ("claimed_done", made[0], task.steps[closing])]))
    rng.shuffle(found)
    return found
