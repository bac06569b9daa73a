"""`soulsmith eval`: SOUL adherence and tool calls on held-out prompts, every contestant on the same ones, with intervals."""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table

from evals.judge import ALL, COLUMNS, judge_call, judge_soul, parse_chat_reply, syntax_faults
from evals.prompts import Prompt, chat_prompt, from_rows, held_out, overlap, set_hash
from evals.sections import cell, metric_names
from evals.stats import Share, share
from evals.work import LATER, first_result, run_loops
from model.chatml import chatml_stops, encode_chatml
from soul.console import output, plain, progress
from soul.conversation import named_calls
from soul.errors import UserError
from soul.files import sha256_file, sha256_json, write_json
from soul.rows import read_rows
from soul.spec import Soul, load_soul
from soul.template import Template

RULES = (
    "A principle is judged where it can be kept or broken: one about calls on replies with a call, one about last words on replies "
    "without. A reply without a word outside code, or with control tokens out of place, fails every principle judged on it.",
    "A reply cut at the token limit is judged on what it said; a call that was cut doesn't end properly.",
    "A prompt that needs a tool and gets no call fails every column of the call.",
    "In its own chat template a base model may write its call as bare JSON, fenced JSON or in tool_call tags; "
    "the first complete call counts and what follows is dropped, as by a stop string.",
    "Of a model's shell commands only `ls`, and `cat`, `wc -l` or `python3` on one file of the prompt, are executed here; "
    "any other counts as not run, and the agent's loop is refused Bash.",
)


@dataclass(frozen=True)
class Config:
    """Measure SOUL adherence and tool use of models on held-out prompts; writes OUT/evals/NAME.json for each."""

    model: str = "smollm2-135m"
    """Models, separated by commas: a name that can be pulled, a Hugging Face directory, or a run's checkpoint directory.
    A model that no run trained is asked twice: in our template, and in its own with the SOUL and the tools in the system prompt."""
    soul: Path = Path("soul/SOUL.md")
    tasks: str = "stdlib"
    """`stdlib`, a directory of Python code, or `package:NAME`: tasks on their held-out functions. Or a Parquet file of rollouts."""
    n: int = 75
    """Prompts."""
    loops: int = 0
    """Prompts that ask for a change to a file and are run to their end in the agent's loop, judged by the files."""
    out: Path = Path("runs/eval")
    max_new: int = 120
    """Most tokens in a reply."""
    temperature: float = 0.0
    seed: int = 0
    batch: int = 16
    """Replies written at a time."""


def main(config: Config) -> int:
    from model.load import find, load_model
    from model.ops import enable_compile_cache
    from model.sampler import Sampler

    if config.n < 1 or config.max_new < 1 or config.temperature < 0:
        raise UserError("--n and --max-new begin at 1, --temperature at 0")
    models = [find(name) for name in dict.fromkeys(m.strip() for m in config.model.split(",")) if name]
    if not models:
        raise UserError("no model given", where="--model", fix="Name at least one.")
    enable_compile_cache()
    soul = load_soul(config.soul)
    ready = config.tasks.endswith(".parquet")
    prompts = from_rows(Path(config.tasks), config.n) if ready else held_out(config.n, config.seed, config.tasks)
    trained_on = sorted(config.out.glob("data/**/*.parquet"))
    rows = [row for path in trained_on for row in read_rows(path)]
    results: list[dict] = []
    for path in models:
        for name, template in contestants(path, {r["name"] for r in results}):
            loaded = load_model(path, raw=template == "chatml")
            sampler = Sampler(loaded.model, loaded.tokenizer, batch=config.batch)
            result = evaluate(loaded, sampler, prompts, soul, template=template, name=name, config=config)
            result["overlap"] = overlap(prompts, rows) if rows and not name.startswith("base") else None
            write_json(config.out / "evals" / f"{name.replace(' ', '-')}.json", result)
            results.append(result)
    print_table(results)
    return 0


def contestants(path: Path, taken: set[str]) -> list[tuple[str, str]]:
    """(name, template) pairs of a model: a run's checkpoint once, any other twice. A name that is taken gets a number."""
    tuned = (path / "checkpoints").is_dir()
    name = path.name if tuned else "base"
    name = next(n for n in (name, *(f"{name} {i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return [(name, "soulsmith")] if tuned else [(name, "soulsmith"), (f"{name} chat", "chatml")]


def evaluate(loaded, sampler, prompts: list[Prompt], soul: Soul, *, template: str, name: str, config: Config) -> dict:
    """Ask one contestant every prompt, in one batch, and judge the replies. The value is what OUT/evals/NAME.json holds.

    `template` is "soulsmith", or "chatml" for a base model in its own words with the SOUL and the tools in the system prompt.
    """
    started = time.perf_counter()
    ids, stop_ids = encode(loaded.tokenizer, prompts, soul, template)
    with progress(f"asking {name}", total=len(prompts), unit="replies") as update:
        count = itertools.count(1)
        done = sampler.generate(
            ids, max_new=config.max_new, temperature=config.temperature, seeds=[config.seed + i for i in range(len(prompts))],
            stop_ids=stop_ids, on_done=lambda *_: update(next(count)),
        )  # fmt: skip
    items = [judge(p, c, loaded.tokenizer, soul, template) for p, c in zip(prompts, done)]
    # without one valid first call there is no work to watch, only minutes to lose
    able = template == "soulsmith" and any(i["columns"].get("valid") for i in items)
    chores = [p for p in prompts if p.verify][: config.loops if able else 0]
    how = {"temperature": config.temperature, "seed": config.seed}
    loops = run_loops(loaded.tokenizer, sampler, chores, **how, what=f"{name} at work") if chores else []
    return {
        "name": name, "about": about(loaded, name, template), "template": template,
        "template_hash": Template(loaded.tokenizer).hash if template == "soulsmith" else sha256_json(chat_prompt(soul, [])),
        "model": str(loaded.path), "model_hash": model_hash(Path(loaded.path)),
        "soul": {"name": soul.name, "version": soul.version, "hash": soul.hash, "principles": len(soul.principles)},
        "principles": {p.id: p.text for p in soul.principles},
        "unverified": [{"id": p.id, "text": p.text} for p in soul.unverified],
        "eval_set_hash": set_hash(prompts), "n": len(prompts), **how, "max_new": config.max_new, "seconds": time.perf_counter() - started,
        "tokens": {"prompt": sum(map(len, ids)), "completion": sum(len(c.ids) for c in done)},
        "shares": {group: {k: v.to_dict() for k, v in cells.items()} for group, cells in shares(items, loops, soul).items()},
        "empty": sum(not i["remark"].strip() for i in items), "cut": sum(i["finish"] == "length" for i in items),
        "rules": list(RULES), "items": items, "loops": loops,
    }  # fmt: skip


def encode(tokenizer, prompts: list[Prompt], soul: Soul, template: str) -> tuple[list[list[int]], tuple[int, ...]]:
    if template == "soulsmith":
        ours = Template(tokenizer)
        return [ours.encode(p.messages, prompt=True).ids for p in prompts], ours.stop_ids
    return [encode_chatml(tokenizer, chat_prompt(soul, p.messages)) for p in prompts], tuple(chatml_stops(tokenizer))


def judge(prompt: Prompt, completion, tokenizer, soul: Soul, template: str) -> dict:
    finished = completion.finish == "stop"
    if template == "soulsmith":
        parsed = Template(tokenizer).parse_reply(completion.ids)
        reply, problems = parsed.messages[0], parsed.problems
    else:
        reply, problems = parse_chat_reply(tokenizer.decode(completion.ids))
        finished = True  # the stop string of parse_chat_reply's harness
    usable = not syntax_faults(reply, problems)
    checks = judge_soul(soul, prompt.messages, reply, usable=usable)
    columns = {ALL: all(checks.values())} if checks else {}
    calls, result = named_calls(reply), None
    if prompt.needs_tool:
        columns |= judge_call(reply, problems, finished=finished)
        if prompt.files or prompt.verify:
            result = first_result(prompt, calls)
            columns["runs"] = columns["valid"] and not result.startswith("error: ")
    else:
        columns["no needless call"] = not calls
    return {
        "id": prompt.id, "kind": prompt.kind, "prompt": prompt.text, "text": tokenizer.decode(completion.ids), "remark": reply["content"],
        "calls": [{"name": name, "args": args} for name, args in calls], "problems": problems, "usable": usable,
        "finish": completion.finish, "tokens": len(completion.ids), "checks": checks, "columns": columns, "result": result,
    }  # fmt: skip


def shares(items: list[dict], loops: list[dict], soul: Soul) -> dict[str, dict[str, Share]]:
    def column(name: str) -> Share:
        return share([i["columns"][name] for i in items if name in i["columns"]])

    def after(name: str) -> Share:
        return share([loop["columns"][name] for loop in loops if name in loop["columns"]])

    groups = {
        "tools": {name: column(name) for name in (*COLUMNS, "valid", "no needless call")},
        "adherence": {p.id: share([i["checks"][p.id] for i in items if p.id in i["checks"]]) for p in soul.verified} | {ALL: column(ALL)},
        "work": {"runs": column("runs"), "task done": share([loop["done"] for loop in loops])} | {name: after(name) for name in LATER},
    }
    return {group: {name: cell for name, cell in cells.items() if cell.n} for group, cells in groups.items()}


def model_hash(path: Path) -> str:
    """sha256 of a weights file, or of the names and sha256 of a directory's files."""
    if path.is_file():
        return sha256_file(path)
    weights = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return sha256_json({p.relative_to(weights).as_posix(): sha256_file(p) for p in sorted(weights.rglob("*")) if p.is_file()})


def about(loaded, name: str, template: str) -> str:
    base = loaded.meta.get("base") or Path(loaded.path).name
    if template == "chatml":
        return f"{base} in its own chat template, given the SOUL, the tools and three examples"
    return f"{base} in our template" if name.startswith("base") else f"{base} after {name.upper()}"


def print_table(results: list[dict]) -> None:
    table = Table("", *(Column(plain(r["name"]), justify="right") for r in results), box=None, pad_edge=False)
    for group in ("tools", "adherence", "work"):
        for name in metric_names(results, group):
            shown = [plain(str(cell(r, group, name) or "–")) for r in results]
            table.add_row(plain(name, "bold" if name in ("valid", ALL) else ""), *shown)
        table.add_section()
    output.print(table)
    for principle in results[0]["unverified"]:
        output.print(plain(f"not verified: {principle['id']}", "dim"))
