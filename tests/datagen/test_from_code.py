"""The rollouts of all shipped souls: true, replayable, in the SOUL's voice, and the same bytes with any number of workers."""

import ast
import hashlib
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest

from datagen import convert
from datagen.code_changes import Unsuitable
from datagen.code_seeds import outside, read_code, split
from datagen.convert import Config, build_rollouts, main
from datagen.from_code import KINDS, Pool, Step, Task, add, answer, create, edit, held_out_tasks, misplaced, not_unique, save
from datagen.phrases import REMARKS, TALK, Voice
from datagen.rollouts import JUDGMENTS, PATH, execute, length
from soul import conversation, rows
from soul.errors import UserError
from soul.spec import load_soul, parse_soul, run_checks
from soul.tools import problem
from workspace.tools import REJECTED, make_workspace

SOULS = sorted([Path("soul/SOUL.md"), *Path("soul/examples").glob("*.md")])
N = 60


@pytest.fixture(scope="module")
def functions():
    return split(read_code("stdlib"))


@pytest.fixture(scope="module", params=SOULS, ids=lambda path: path.stem)
def built(request, functions):
    soul = load_soul(request.param)
    return soul, *build_rollouts(soul, functions[0], N, seed=1)


def calls(messages):
    return [call for message in messages for call in conversation.calls_of(message)]


def test_every_row_is_sound_and_breaks_no_check(built):
    soul, done, _, stats = built
    assert len(done) == stats["rollouts"] == N, stats
    for row in done:
        assert conversation.validate(row["messages"]) == []
        assert run_checks(soul, row["messages"]) == []
        assert all(check["ok"] for check in row["checks"])
        assert row["soul_hash"] == soul.hash and row["source"].startswith("code:")
        for call in calls(row["messages"]):
            assert problem(conversation.name_of(call), conversation.arguments(call)) is None
        assert row["messages"][-1]["role"] == "assistant" and not conversation.calls_of(row["messages"][-1])
        assert length(row["messages"]) <= convert.MAX_CHARS


def test_every_call_replays_to_the_same_bytes(built, tmp_path):
    for number, row in enumerate(built[1]):
        root = tmp_path / str(number)
        root.mkdir()
        workspace = make_workspace(
            {file["path"]: file["content"] for file in row["files"]}, root, env={"PATH": PATH}
        )  # the Python that ran it
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        assert len(results) == len(calls(row["messages"]))
        for call, recorded in zip(calls(row["messages"]), results, strict=True):
            if recorded != REJECTED:
                assert workspace.run(conversation.name_of(call), conversation.arguments(call)) == recorded
        for path in root.rglob("*.py"):
            ast.parse(path.read_text())


def test_pairs_differ_in_prose_or_in_the_call_and_never_in_both(built):
    soul, done, pairs, stats = built
    checked = any(principle.checks for principle in soul.principles)
    assert len(pairs) > 0.9 * N if checked else len(pairs) == sum(stats["judged"].values())
    assert set(stats["judged"]) == JUDGMENTS
    sources = {row["id"]: row["messages"] for row in done}
    for pair in pairs:
        (chosen,), (rejected,), prompt = pair["chosen"], pair["rejected"], pair["prompt"]
        assert sources[pair["id"]][: len(prompt) + 1] == [*prompt, chosen]
        assert chosen["content"] != rejected["content"]
        assert run_checks(soul, [*prompt, chosen]) == []
        broken = {fault.principle for fault in run_checks(soul, [*prompt, rejected])}
        calls_of = conversation.calls_of(chosen), conversation.calls_of(rejected)
        if pair["reason"] in JUDGMENTS:
            assert [len(calls) for calls in calls_of] == ([0, 1] if pair["reason"] == "needless_call" else [1, 0])
            assert not broken and not pair["principles"]  # the voice is right on both sides: only the call can be learned
            for call in calls_of[1]:
                assert re.fullmatch(r"def \w+", conversation.arguments(call)["pattern"])  # what one would type, so no dotted name
        else:
            assert calls_of[0] == calls_of[1]
            assert set(pair["principles"]) <= broken and pair["principles"]


def test_length_alone_does_not_tell_the_sides_of_a_pair_apart(functions):
    _, _, stats = build_rollouts(load_soul("soul/SOUL.md"), functions[0], 150, seed=5)
    assert 0.35 < stats["longer_rejected"] < 0.65, stats["longer_rejected"]


def test_two_workers_give_the_same_bytes_as_one(functions, tmp_path):
    soul = load_soul("soul/SOUL.md")
    sample = functions[0][:400]
    digests = []
    for workers in (1, 2):
        done, pairs, stats = build_rollouts(soul, sample, 40, seed=7, workers=workers)
        convert.write(tmp_path / str(workers), soul, "stdlib", done, pairs, stats)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / str(workers) / "data").iterdir())])
    assert digests[0] == digests[1] and len(digests[0]) == 4
    assert build_rollouts(soul, sample, 40, seed=8)[0] != done


def test_every_kind_is_made_and_most_draws_hold(functions):
    pool = Pool(functions[0])
    for make in KINDS:
        done = 0
        for seed in range(40):
            with suppress(Unsuitable):
                done += execute(make(random.Random(seed), pool)) is not None
            if done == 3:
                break
        assert done, make.__name__


def drawn(make, pool, n=80):
    for seed in range(n):
        with suppress(Unsuitable):
            yield make(random.Random(seed), pool)


def test_what_the_agent_writes_itself_names_only_what_is_there(functions):
    pool, seen = Pool(functions[0]), {add: 0, create: 0, answer: 0}
    for make in seen:
        for task in drawn(make, pool):
            text = next(iter(task.final.values()), task.steps[-1].body.partition("```python\n")[2].rstrip("`"))
            if text and (make is create or "def " not in task.request):
                made = next(node for node in ast.parse(text).body if getattr(node, "name", "") == task.slots["name"])
                assert not outside(ast.unparse(made)) & outside(text), task
                seen[make] += 1
    assert min(seen.values()) >= 5, seen


def test_functions_lie_together_only_where_they_belong(functions):
    pool = Pool(functions[0])
    names = [{snippet.function.name for snippet in group} for group in pool.short.values()]
    for make in (add, edit, not_unique):
        for task in drawn(make, pool):
            ((path, text),) = task.files.items()
            defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)} | {task.slots["name"]}
            own = any(defined <= module for module in names)
            assert own or Path(path).stem in ("utils", "helpers", "common", "misc"), task


def test_a_rename_looks_for_callers_first_and_breaks_none(functions):
    pool, renames = Pool(functions[0]), 0
    for task in drawn(edit, pool, 150):
        tools = [step.tool for step in task.steps]
        assert tools == (["Read", "Grep", "Edit", ""] if task.kind == "edit_rename" else ["Read", "Edit", ""])
        if task.kind == "edit_rename":
            renames += len(re.findall(rf"\b{task.slots['name']}\b", *task.files.values())) == 1
    assert renames > 5


def test_a_wrong_path_is_one_that_someone_might_type():
    found = {misplaced(random.Random(seed), path) for seed in range(30) for path in ("src/tasks.py", "process.py", "ast.py", "query.py")}
    assert {"task.py", "processes.py", "asts.py", "queries.py", "core/tasks.py", "pkg/src/tasks.py"} <= found
    assert not any("my_" in path or "ss." in path for path in found - {"core/process.py", "tools/process.py", "pkg/process.py"})


def test_a_task_that_does_not_run_as_planned_is_dropped():
    files = {"a.py": "def f():\n    return 1\n"}
    read, edit = {"file_path": "a.py"}, {"file_path": "a.py", "old_string": "return 1", "new_string": "return 2"}

    def task(*steps, final):
        return Task("edit", "m", "change it", files, steps, {}, final)

    good = (Step("read", "Read", read, "    1→"), Step("edit", "Edit", edit, "edited a.py"))
    assert len(execute(task(*good, final={"a.py": "def f():\n    return 2\n"}))) == 2
    with pytest.raises(Unsuitable, match="final file differs"):
        execute(task(*good, final={"a.py": "def f():\n    return 3\n"}))
    with pytest.raises(Unsuitable, match="Edit gave another result"):
        execute(task(good[1], final={}))  # never read
    broken = Step("edit", "Edit", edit | {"new_string": "return ("}, "edited a.py")
    with pytest.raises(Unsuitable, match="does not parse"):
        execute(task(good[0], broken, final={"a.py": "def f():\n    return (\n"}))


def test_a_soul_that_nothing_passes_drops_every_row_and_says_why(functions):
    soul = parse_soul("# Mute\n\n## Principles\n\n- says almost nothing. <!-- id: mute; check: max_words(0) -->\n")
    done, pairs, stats = build_rollouts(soul, functions[0], 5)
    assert done == pairs == []
    assert any("no remark passes the SOUL" in reason for reason in stats["dropped"])


def test_a_soul_without_checks_gets_rollouts_and_pairs_about_the_call_only(functions, tmp_path):
    soul = parse_soul("# Free\n\n## Principles\n\n- is kind.\n")
    done, pairs, stats = build_rollouts(soul, functions[0], 15)
    assert len(done) == 15 and {pair["reason"] for pair in pairs} <= JUDGMENTS
    assert "no pair about its voice could be verified" in convert.card(soul, "stdlib", stats)


def test_the_voice_keeps_to_its_soul():
    soul = load_soul("soul/SOUL.md")
    voice = Voice(soul)
    ways = {what: len(openers) * len(cores) for what, (_, openers, cores) in voice.pools.items()}
    assert min(n for what, n in ways.items() if what not in TALK) >= 15
    assert all(ways[what] >= 6 for what in TALK - {"told"})  # replies to small talk have no openers, and "told" says what it is given
    assert set(voice.pools) == set(REMARKS)


def test_held_out_tasks_have_their_own_workspaces_and_what_to_verify(functions):
    train, held_out = functions
    tasks = held_out_tasks(held_out, 60)
    assert tasks == held_out_tasks(held_out, 60)
    assert len(tasks) == len({task.request for task in tasks}) == 60
    trained = {function.module.name for function in train}
    for task in tasks:
        assert task.source not in trained
        assert task.request.strip() and task.steps[0].tool in ("Read", "Edit", "Grep", "Bash")
        assert not task.final or task.must_contain
    assert sum(bool(task.final) for task in tasks) >= 20


def test_the_command_writes_its_files(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "shapes.py").write_text(
        '"""Shapes."""\n\n\ndef area(a, b):\n    """Return the area of a rectangle."""\n    return a * b\n\n\n'
        'def perimeter(a, b=1):\n    """Return the length of the rectangle\'s border."""\n    return a + a + b + b\n'
    )
    out = tmp_path / "run"
    assert main(Config(out=out, from_code=str(tmp_path / "code"), n=6, include_held_out=True)) == 0
    done = rows.read_rows(out / "data/rollouts.parquet")
    assert len(done) == 6 and {row["source"] for row in done if row["reason"] != "talk"} == {"code:shapes"}
    assert rows.read_rows(out / "data/rollouts_preference.parquet")
    assert "6 rollouts" in (out / "data/rollouts.md").read_text()
    with pytest.raises(UserError):
        main(Config(out=out, n=0))


def test_a_file_of_which_nothing_is_said_is_looked_for_before_it_is_made(functions):
    pool, made = Pool(functions[0]), 0
    for attempt in range(40):
        with suppress(Unsuitable):
            task = save(random.Random(attempt), pool)
            looked, written, _ = task.steps
            path = task.slots["file"]
            missing, created = execute(task)
            assert missing.startswith(f"error: {path} does not exist") and created.startswith(f"created {path} ")
            assert (looked.tool, written.tool, looked.args["file_path"]) == ("Read", "Edit", path) and path not in task.files
            assert not re.search(r"\b(new|create)\b", task.request.split("\n")[0], re.I)
            made += 1
    assert made > 20
