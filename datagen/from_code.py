"""Tasks made from real functions: a request, a small workspace, and the right calls, all known before anything runs.

`convert` then really executes the calls, so no tool result is ever written by hand; whatever turns out different from what
the task says (an edit that doesn't apply, a grep that misses, a final file that differs) is dropped with its reason.
The same tasks on held-out modules are the evals' prompts.
"""

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from datagen.bugs import fix
from datagen.code_changes import STALE, Unsuitable, change, operator
from datagen.code_seeds import Function, imperative, third_person
from datagen.phrases import ask
from datagen.talk import AFTER, BEFORE, talk
from datagen.tasks import (
    Pool,
    Step,
    Task,
    edit_step,
    grep_step,
    home,
    joined,
    place,
    quoted_name,
    read_part,
    read_step,
    small_file,
    suitable,
)
from workspace.tools import REJECTED

# ---- kinds: find, explain


def searched(rng: random.Random, pool: Pool) -> tuple[Function, str, dict[str, str]]:
    """A function, its file's path, and a workspace of that file and up to two others."""
    function = pool.draw(rng, pool.listed)
    path = place(rng, function.module.path)
    files = {path: function.module.text}
    for _ in range(rng.randint(0, 2)):
        other = pool.draw(rng, pool.listed).module
        files.setdefault(place(rng, other.path), other.text)
    defined = [line for text in files.values() for line in text.splitlines() if f"def {function.name}" in line]
    if len(defined) > 3:
        raise Unsuitable("name is too common")
    same = [line for line in defined if re.match(rf"\s*def {function.name}\(", line)]
    if len(same) != 1:
        raise Unsuitable("name is defined twice")
    return function, path, dict(sorted(files.items()))


def find(rng: random.Random, pool: Pool) -> Task:
    function, path, files = searched(rng, pool)
    request = ask(rng, "find", name=quoted_name(rng, function.name), doc=imperative(function.doc))
    slots = {"name": function.name, "file": path, "line": str(function.line)}
    return Task("find", function.module.name, request, files, (grep_step(function, path), Step("found")), slots)


def explain(rng: random.Random, pool: Pool) -> Task:
    function, path, files = searched(rng, pool)
    request = ask(rng, "explain", name=quoted_name(rng, function.name), file=path)
    slots = {"name": function.name, "file": path, "line": str(function.line), "does": third_person(function.doc)}
    # a habit to learn: a file that is named narrows the search
    steps = (grep_step(function, path, scoped=path in request), read_part(function, path), Step("explained"))
    return Task("explain", function.module.name, request, files, steps, slots)


def misplaced(rng: random.Random, path: str) -> str:
    """A path that someone might take for this one: in another folder, or in the plural."""
    name, stem, suffix = Path(path).name, Path(path).stem, Path(path).suffix
    other = stem[:-1] if re.search("[^s]s$", stem) else re.sub("y$", "ie", re.sub("s$", "se", stem)) + "s"
    return rng.choice([f"core/{name}", f"tools/{name}", f"pkg/{path}", f"{other}{suffix}", f"{other}{suffix}"])


def wrong_path(rng: random.Random, pool: Pool) -> Task:
    """The person names a path that doesn't exist; a search finds the right one."""
    if rng.random() < 0.5:
        return wrong_path_edit(rng, pool)
    function, path, files = searched(rng, pool)
    wrong = misplaced(rng, path)
    if wrong in files:
        raise Unsuitable("wrong path exists")
    request = ask(rng, "explain_at", name=quoted_name(rng, function.name), file=wrong)
    slots = {"name": function.name, "file": path, "line": str(function.line), "does": third_person(function.doc), "path": wrong}
    tried = Step("search", "Grep", {"pattern": f"def {function.name}", "path": wrong}, expect="error: ")
    steps = (tried, grep_step(function, path, "missing"), read_part(function, path), Step("explained"))
    return Task("recover_path", function.module.name, request, files, steps, slots)


def wrong_path_edit(rng: random.Random, pool: Pool) -> Task:
    task = edit(rng, pool)
    path, name = next(iter(task.files)), task.slots["name"]
    wrong = misplaced(rng, path)
    told = Path(wrong).name == Path(path).name  # the error says where the file is
    if not told and name not in task.request:
        raise Unsuitable("nothing to search for")
    error = f"error: {wrong} does not exist; did you mean {path}?" if told else "error: "
    tried = Step("read", "Read", {"file_path": wrong}, expect=error, slots={"file": wrong})
    search = Step("missing", "Grep", {"pattern": f"def {name}"}, expect=f"{path}:", slots={"path": wrong})
    rest = (replace(task.steps[0], situation="nearby", slots={"path": wrong}), *task.steps[1:]) if told else (search, *task.steps)
    return replace(task, kind="recover_path", request=task.request.replace(path, wrong), steps=(tried, *rest))


# ---- kinds: add a function, create a file


def pasted(rng: random.Random, code: str) -> str:
    return rng.choice([f"\n```python\n{code}```", f"\n\n{code.rstrip()}"])


def add(rng: random.Random, pool: Pool) -> Task:
    """A new function goes above the first one: the anchor is that one's `def` line, which is unique and on one line."""
    told = rng.random() < 0.45  # in words, and so the agent writes it: a function that calls nothing unseen
    new, first = pool.pair(rng, pool.ready if told else pool.short)
    path, text = home(rng, first, new), small_file(first.code, imports=first.imports + new.imports)
    signature = f"{new.function.name}({new.function.args})"
    if not told:
        request = ask(rng, "paste", file=path, name=quoted_name(rng, new.function.name)) + pasted(rng, new.code)
    else:
        request = ask(rng, "add", sig=rng.choice([signature, f"`{signature}`"]), file=path, doc=imperative(new.function.doc))
    steps = (read_step(path), edit_step(path, first.head, f"{new.code}\n\n{first.head}"), Step("added"))
    slots, final = {"name": new.function.name, "file": path}, {path: text.replace(first.head, f"{new.code}\n\n{first.head}")}
    return Task("add", new.function.module.name, request, {path: text}, steps, slots, final, (f"def {new.function.name}(", first.head))


def create(rng: random.Random, pool: Pool) -> Task:
    new, other = pool.draw(rng, pool.whole), pool.draw(rng, pool.short)
    path, code = place(rng, new.function.module.path), small_file(new.code, imports=new.imports)
    files = {} if rng.random() < 0.5 else {place(rng, other.function.module.path): small_file(other.code, imports=other.imports)}
    if Path(path).name in {Path(there).name for there in files}:
        raise Unsuitable("file exists")
    request = ask(rng, "create", file=path) + pasted(rng, code)
    steps = (Step("create", "Edit", {"file_path": path, "new_string": code}, expect=f"created {path}"), Step("created"))
    slots = {"name": new.function.name, "file": path}
    return Task("create", new.function.module.name, request, files, steps, slots, {path: code}, (f"def {new.function.name}(",))


def save(rng: random.Random, pool: Pool) -> Task:
    """The request doesn't say whether the file is there: the agent looks, and makes it."""
    task = create(rng, pool)
    path = task.slots["file"]
    looked = replace(read_step(path), expect=f"error: {path} does not exist")
    request = ask(rng, "save", file=path) + pasted(rng, task.final[path])
    return replace(task, kind="save", request=request, steps=(looked, replace(task.steps[0], situation="absent"), *task.steps[1:]))


# ---- kinds: change one line


def edit(rng: random.Random, pool: Pool) -> Task:
    snippet, other = pool.pair(rng)
    name, path = snippet.function.name, place(rng, snippet.function.module.path)
    made = change(rng, snippet.code, name, snippet.function.doc)
    together = rng.random() < 0.6 and len(made.code) + len(other.code) < 480 and made.old not in other.code and name not in other.code
    beside = [other] if together and other.function.module.name == snippet.function.module.name else []
    text = small_file(made.code, *(one.code for one in beside), imports=sum((one.imports for one in beside), snippet.imports))
    request = ask(rng, made.wording, name=quoted_name(rng, name), file=path, **made.slots)
    callers = [Step("callers", "Grep", {"pattern": name}, expect=f"{path}:")] if made.wording == "rename" else []
    closing = Step("documented" if made.wording == "docstring" else "edited")
    steps = (read_step(path), *callers, edit_step(path, made.old, made.new), closing)
    slots, final = {"name": name, "file": path, "new": made.said}, {path: text.replace(made.old, made.new)}
    return Task(f"edit_{made.wording}", snippet.function.module.name, request, {path: text}, steps, slots, final, (made.new,))


def rejected(rng: random.Random, pool: Pool) -> Task:
    """The person refuses the call: the agent says so and stops."""
    task = (edit if rng.random() < 0.6 else add)(rng, pool)
    last = max(i for i, step in enumerate(task.steps) if step.tool)
    refused = replace(task.steps[last], expect=REJECTED, rejected=True)
    return replace(task, kind="recover_rejected", steps=(*task.steps[:last], refused, Step("stopped")), final={}, must_contain=())


def not_unique(rng: random.Random, pool: Pool) -> Task:
    """Two functions share a stale docstring; the second attempt takes the `def` line along."""
    first, second = pool.pair(rng)
    stale = f'    """{rng.choice(STALE)}"""'
    texts = [snippet.code.replace(snippet.code.splitlines()[1], stale, 1) for snippet in (first, second)]
    path, text = home(rng, first, second), small_file(*texts, imports=first.imports + second.imports)
    target, good = rng.choice([(first, first.code.splitlines()[1]), (second, second.code.splitlines()[1])])
    old, new = f"{target.head}\n{stale}", f"{target.head}\n{good}"
    ambiguous = replace(edit_step(path, stale, good), expect="error: old_string occurs 2 times")
    request = ask(rng, "docstring", name=quoted_name(rng, target.function.name), file=path, new=f"{target.function.doc}.")
    steps = (read_step(path), ambiguous, edit_step(path, old, new, "again"), Step("documented"))
    slots = {"name": target.function.name, "file": path}
    return Task("recover_unique", target.function.module.name, request, {path: text}, steps, slots, {path: text.replace(old, new)}, (new,))


def mismatch(rng: random.Random, pool: Pool) -> Task:
    """The person quotes the line with other spaces; the agent tries that, sees the nearest lines, and takes the real one."""
    snippet, _ = pool.pair(rng)
    made = operator(rng, snippet.code)
    path, sloppy = place(rng, snippet.function.module.path), re.sub(r" ([=+*-]=?) |(?<=,) ", r"\1", made.slots["old"])
    if sloppy in made.code or made.code.count(made.old) != 1:
        raise Unsuitable("no sloppy quote")
    tried = replace(edit_step(path, sloppy, made.slots["new"]), expect="error: old_string not found")
    request = ask(rng, "operator", name=quoted_name(rng, snippet.function.name), file=path, old=sloppy, new=made.slots["new"])
    steps = (read_step(path), tried, edit_step(path, made.old, made.new, "mismatch"), Step("edited"))
    text = small_file(made.code, imports=snippet.imports)
    slots, final = {"name": snippet.function.name, "file": path, "new": made.said}, {path: text.replace(made.old, made.new)}
    return Task("recover_match", snippet.function.module.name, request, {path: text}, steps, slots, final, (made.new,))


# ---- kinds: run a command, or no tool at all

THINGS = ("files", "jobs", "mails", "orders", "reports", "messages")


def run(rng: random.Random, pool: Pool) -> Task:
    first, second = pool.draw(rng, pool.short), pool.draw(rng, pool.short)
    path, other = (Path(place(rng, snippet.function.module.path)).name for snippet in (first, second))
    wording = rng.choice(["list", "count", "script"])
    files = {f"old_{other}" if other == path else other: small_file(second.code, imports=second.imports)}
    files[path] = small_file(first.code, imports=first.imports)
    if wording == "list":
        others = rng.sample(["README.md", "notes.txt", "setup.cfg", "data.csv", "todo.txt"], rng.randint(0, 2))
        files |= {name: f"{Path(name).stem}\n" for name in others}
        command, expect, output, closing = "ls", "\n".join(sorted(files)), ", ".join(f"`{name}`" for name in sorted(files)), "listed"
    elif wording == "count":
        lines = files[path].count("\n")
        command, expect, output, closing = f"wc -l {path}", f"{lines} {path}", str(lines), "counted"
    else:
        path, a, b = rng.choice(["main.py", "demo.py", "report.py", "check.py"]), rng.randint(2, 40), rng.randint(2, 40)
        words = f"{a} {rng.choice(THINGS)} {rng.choice(['checked', 'found', 'left', 'sent'])}"
        programs = (
            (f'print("{words}")', words), (f'print("total:", {a} + {b})', f"total: {a + b}"), (f"print(sum(range({a})))", sum(range(a))),
            (f'print("largest:", max({a}, {b}))', f"largest: {max(a, b)}"), (f'print("done, {words}")', f"done, {words}"),
        )  # fmt: skip
        program, output = rng.choice(programs)
        files = {path: program + "\n"}
        command, expect, output, closing = f"python3 {path}", str(output), str(output), "printed"
    steps = (Step("run", "Bash", {"command": command}, expect=expect), Step(closing))
    slots = {"file": path, "command": command, "output": output}
    return Task(f"run_{wording}", first.function.module.name, ask(rng, wording, file=path), files, steps, slots)


def timed_out(rng: random.Random, pool: Pool) -> Task:
    """A program that waits for ever; its text shows how it runs once. It prints nothing before it waits: how much of that a command
    cut off after a second has shown depends on the machine."""
    path, option = rng.choice(["watch.py", "poll.py", "monitor.py", "worker.py"]), rng.choice(["--once", "--single", "--now"])
    thing, count = rng.choice(THINGS), rng.randint(2, 40)
    text = f'''import sys
import time


def check():
    print("{count} {thing} waiting")


while "{option}" not in sys.argv:
    time.sleep({rng.choice([30, 60, 300, 3600])})
    check()
check()
'''
    command, output = f"python3 {path}", f"{count} {thing} waiting"
    tried = Step("run", "Bash", {"command": command, "timeout": "1"}, "timed out after 1 s", {"command": command})
    once = replace(tried, situation="once", args={"command": f"{command} {option}"}, expect=output, slots={"new": option})
    steps = (tried, replace(read_step(path), situation="endless"), once, Step("once_printed"))
    slots = {"file": path, "output": output, "new": option}
    return Task("recover_timeout", "made", ask(rng, "script", file=path), {path: text}, steps, slots)


def answer(rng: random.Random, pool: Pool) -> Task:
    """A question that needs no tool, about a known function or with the code in it: the model must learn when not to call."""
    wording = rng.choice(["chat", "chat", "chat", "use", "use", "code", "code", "code", "write"])
    if wording == "write":
        snippet = pool.draw(rng, pool.whole)
        function, code = snippet.function, small_file(snippet.code, imports=snippet.imports)
        request = ask(rng, "write", sig=f"`{function.name}({function.args})`", doc=imperative(function.doc))
        closing = Step("written", body=f"\n```python\n{code}```")
    else:
        function = pool.draw(rng, pool.documented)
        code = suitable(function) if wording == "code" else ""
        asked = ask(rng, "chat" if wording == "code" and not code else wording, id=rng.choice([function.id, f"`{function.id}`"]))
        request, closing = f"{asked}\n```python\n{code}```" if code else asked, Step("purpose" if wording == "use" else "answer")
    do = re.sub("^return ((?:`True`|true) if )?", lambda told: "tell whether " if told[1] else "get ", imperative(function.doc))
    slots = {"id": function.name if code else function.id, "name": function.name, "does": third_person(function.doc), "do": do}
    return Task("answer", function.module.name, request, {}, (closing,), slots)


WORK = {find: 2, explain: 2, add: 2, create: 1, edit: 2, run: 1}


def turns(rng: random.Random, pool: Pool) -> Task:
    """Two requests, one after the other: work and then talk or more work, or talk first."""
    order = rng.choices(["work talk", "talk work", "work work", "talk talk"], [4, 3, 4, 1])[0].split()
    parts = []
    for what, among in zip(order, (BEFORE, AFTER), strict=True):
        if what == "work":
            parts.append(rng.choices(list(WORK), list(WORK.values()))[0](rng, pool))
        else:
            parts.append(answer(rng, pool) if rng.random() < 0.2 else talk(rng, among=among))
    return joined(*parts)


# kind -> (share, the tools that it needs)
KINDS = {
    find: (10, {"Grep"}), explain: (11, {"Grep", "Read"}), add: (11, {"Read", "Edit"}), create: (7, {"Edit"}), save: (4, {"Read", "Edit"}),
    edit: (10, {"Read", "Edit"}), fix: (3, {"Read", "Edit", "Bash"}), run: (4, {"Bash"}), wrong_path: (3, {"Grep", "Read"}),
    rejected: (2, {"Read", "Edit"}), not_unique: (1, {"Read", "Edit"}), mismatch: (1, {"Read", "Edit"}), timed_out: (0.2, {"Read", "Bash"}),
    answer: (20, set()), talk: (27, set()), turns: (36, set()),
}  # fmt: skip
EVAL_KINDS = (find, explain, add, edit, add, explain, find, edit, create, run)


def held_out_tasks(functions: Sequence[Function], n: int = 60, seed: int = 0) -> list[Task]:
    """n different tasks from (held-out) functions, the evals' prompts; fewer when 20 n draws don't give n. The first step's
    tool is the call that a good first turn makes; `must_contain` is what the file in `final` must hold after a successful run."""
    pool, tasks = Pool(functions), {}
    for attempt in range(20 * n):
        with suppress(Unsuitable):
            task = EVAL_KINDS[len(tasks) % len(EVAL_KINDS)](random.Random(f"held-out:{seed}:{attempt}"), pool)
            tasks.setdefault(task.request, task)
        if len(tasks) == n:
            break
    return list(tasks.values())
