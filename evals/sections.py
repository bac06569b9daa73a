"""The parts of a report as plain values made from the run's own files. Nothing is escaped here: the page does that to every value."""

import importlib.metadata
import json
import os
import platform
import shlex
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from evals.charts import curve
from evals.stats import Share, paired
from soul.conversation import named_calls
from soul.files import sha256_file
from soul.rows import read_rows

GROUPS = {
    "tools": ("Tool calls", "Held-out prompts that need a tool; the first reply is judged."),
    "adherence": ("The soul", "Share of held-out replies that pass every machine check of a principle."),
    "work": ("Work", "What happens when the calls are really executed."),
}
ABOUT = {
    "valid": "all of the columns below at once",
    "no needless call": "prompts that need no tool",
    "all at once": "no verified principle broken",
    "runs": "the first call, executed in the prompt's own files, gives no error",
    "task done": "the whole agent loop, judged by the files it left",
    "no call for thanks": "said after each of those tasks, in the same conversation",
    "next request runs": "then another task: its first call is valid and gives no error",
}
STRONG = ("valid", "all at once")


def evidence(results: list[dict]) -> list[dict]:
    """Groups of metrics; a metric has one row per contestant that was measured on it."""
    groups = []
    for key, (title, note) in GROUPS.items():
        metrics = []
        for name in sorted(metric_names(results, key), key=lambda name: name not in STRONG):
            about = next((r["principles"][name] for r in results if name in r["principles"]), ABOUT.get(name, ""))
            metrics.append({"name": name, "about": about, "rows": measured(results, key, name), "strong": name in STRONG})
        if metrics:
            groups.append({"title": title, "note": note, "metrics": metrics})
    return groups


def metric_names(results: list[dict], group: str) -> list[str]:
    """Names of a group's shares in their own order: a contestant that never called has no verdicts on calls, so the longest leads."""
    measured = sorted((list(r["shares"].get(group, {})) for r in results), key=len, reverse=True)
    return list(dict.fromkeys(name for names in measured for name in names))


def cell(result: dict, group: str, name: str) -> Share | None:
    found = result["shares"].get(group, {}).get(name)
    return Share(found["k"], found["n"], found["low"], found["high"]) if found else None


def measured(results: list[dict], group: str, name: str) -> list[tuple[int, str, Share]]:
    """(number, name, share) of every contestant that has one."""
    return [(i, r["name"], found) for i, r in enumerate(results) if (found := cell(r, group, name))]


def pairs(results: list[dict]) -> list[tuple]:
    """(measure, names, Paired) of every tuned model against each base and the stage before it, on the prompts both answered."""
    out = []
    for measure, column in (("valid call", "valid"), ("every verified principle", "all at once")):
        for at, after in enumerate(results):
            if after["name"].startswith("base"):
                continue
            for before in (r for r in results[:at] if r["name"].startswith("base") or r is results[at - 1]):
                left, right = ({i["id"]: i["columns"][column] for i in r["items"] if column in i["columns"]} for r in (before, after))
                both = [i for i in left if i in right]
                if both:
                    out.append((measure, f"{before['name']} → {after['name']}", paired([left[i] for i in both], [right[i] for i in both])))
    return out


def headlines(results: list[dict]) -> list[dict]:
    """The last contestant's three numbers, with the others' beside them."""
    out = []
    for group, name, what in (
        ("tools", "valid", "tool calls valid"),
        ("adherence", "all at once", "replies that keep every verified principle"),
        ("work", "runs", "first calls that run without error"),
    ):
        if have := measured(results, group, name):
            index, last, found = have[-1]
            note = "; ".join([f"{last}, {found.k} of {found.n}", *(f"{who} {percent(c)}" for _, who, c in have[:-1])])
            out.append({"what": what, "big": percent(found), "share": found, "index": index, "note": note})
    return out


def percent(share: Share) -> str:
    return f"{100 * share.value:.0f}\u00a0%"


def questions(results: list[dict], count: int) -> list[tuple[dict, list[tuple]]]:
    """(item, [(index, name, item of that contestant)]): the first prompts of each kind in turn; none is picked for being good."""
    kinds: dict[str, list[dict]] = {}
    for item in results[0]["items"] if results else []:
        kinds.setdefault(item["kind"], []).append(item)
    turns = [item for one_of_each in zip_longest(*kinds.values()) for item in one_of_each if item]
    by_id = [{item["id"]: item for item in r["items"]} for r in results]
    return [(q, [(i, r["name"], by_id[i][q["id"]]) for i, r in enumerate(results) if q["id"] in by_id[i]]) for q in turns[:count]]


def data(run: Path, files: list[Path]) -> dict:
    """The data files with their hashes, one critique-and-revise row, one rollout."""
    listed, revision, rollout = [], None, None
    for path in files:
        rows = read_rows(path)
        listed.append({"name": path.relative_to(run), "rows": len(rows), "bytes": path.stat().st_size, "sha": sha256_file(path)})
        accepted = [row for row in rows if row["accepted"]]
        revision = revision or next((r for r in accepted if {"draft", "critique"} <= {s["stage"] for s in r["trail"]}), None)
        rollout = rollout or next((r for r in accepted if any(m["role"] == "tool" for m in r.get("messages", []))), None)
    turns = rollout["messages"][:24] if rollout else []
    shown = [{"role": m["role"], "text": m["content"], "calls": [{"name": n, "args": args} for n, args in named_calls(m)]} for m in turns]
    kept = sum(f["rows"] for f in listed if f["name"].stem != "rejected")
    return {"files": listed, "rows": kept, "revision": revision and _revision(revision), "rollout": shown}


def _revision(row: dict) -> dict:
    said = row.get("messages") or row["prompt"]
    asked = next((m["content"] for m in said if m["role"] == "user"), "")
    return {"asked": asked, "steps": [{"stage": s["stage"], "text": _critique(s["text"])} for s in row["trail"]]}


def _critique(text: str) -> str:
    """A critique's JSON as lines of prose; any other text as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    found = next((v for v in found.values() if isinstance(v, list)), [found]) if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        return text
    return "\n".join(" · ".join(str(x[k]) for k in ("verdict", "principle", "quote", "why") if x.get(k)) for x in found) or "nothing to say"


def stats(value: dict, title: str) -> list[dict]:
    """A stats file as groups: single values as facts, counts as bars, records as a table."""
    groups = [{"title": title, "facts": [(k, v) for k, v in value.items() if not isinstance(v, dict | list)]}]
    for name, part in value.items():
        group = {"title": f"{title}: {name}"}
        records = [{"": k, **v} for k, v in part.items() if isinstance(v, dict)] if isinstance(part, dict) else part
        if isinstance(part, dict) and part and all(isinstance(v, int) for v in part.values()):
            most = max(*part.values(), 1)
            groups.append(group | {"bars": [{"label": k, "fraction": v / most, "value": f"{v:,}"} for k, v in part.items()]})
        elif isinstance(records, list) and records and all(isinstance(r, dict) for r in records):
            head = list(dict.fromkeys(key for r in records for key in r))
            groups.append(group | {"head": head, "table": [[_cell(r.get(key)) for key in head] for r in records]})
        elif isinstance(part, dict) and part:
            groups.append(group | {"facts": list(part.items())})
    return groups


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


LOSS = {"Loss (nats per supervised token)": {"train": "loss"}, "Tokens per second": {"tokens/s": "tokens_per_s"}}
CHARTS = {  # stage -> title -> legend -> column of metrics.jsonl
    "pretrain": LOSS,
    "sft": LOSS,
    "dpo": {
        "DPO loss (0.693 = no preference yet)": {"train": "loss"},
        "Preference accuracy (ties count ½)": {"train": "accuracy"},
        "Reward margin": {"margin": "margin"},
        "Log-probability per reply": {"chosen": "chosen_logp", "rejected": "rejected_logp"},
    },
}


def training(stage: str, lines: list[dict], results: dict, pairs: list[dict]) -> dict:
    """Curves of a stage's metrics.jsonl, its last evaluation, what its results.json says, and how many pairs the ledger has in each class."""
    rows, known = [line for line in lines if "eval" not in line], evaluated(lines)
    evals = [{"step": line["step"], **line["eval"]} for line in lines if "eval" in line]
    curves = CHARTS[stage] | {"Bits per byte, held out": {_seen(name[4:64]): name for name in known if name.startswith("bpb ")}}
    charts = [curve(title, {name: _points(evals if title[:4] == "Bits" else rows, key) for name, key in legend.items()})
              for title, legend in curves.items() if legend]  # fmt: skip
    classes = Counter(str(pair.get("class")) for pair in pairs)
    facts = {name: value for name, value in results.items() if name in ("params", "tokens")} | known
    note = f"{len(rows):,} steps" + (f", median {speed:,.0f} tokens/s" if (speed := _speed(rows)) else "")
    return {
        "title": stage, "note": note, "charts": [c for c in charts if c],
        "facts": [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}") for name, value in facts.items() if name not in classes],
        "pairs": [{"label": name, "fraction": n / len(pairs), "value": f"{n:,}"} for name, n in classes.most_common()],
    }  # fmt: skip


def _seen(name: str) -> str:
    """A source's name for a chart's legend, which the page takes as it is: whatever a reader could not see becomes U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def evaluated(lines: list[dict]) -> dict[str, float]:
    """The last value of everything that was evaluated on the way."""
    return {name: x for line in lines if "eval" in line for name, x in line["eval"].items() if isinstance(x, int | float)}


def _speed(rows: list[dict]) -> float | None:
    """Median tokens/s; the first step, which compiles, is left out where there are others."""
    speeds = sorted(y for _, y in _points(rows[1:] or rows, "tokens_per_s"))
    return speeds[len(speeds) // 2] if speeds else None


def planned(plan: dict, logs: dict[str, list[dict]]) -> list[list[str]]:
    """A row per planned stage: tokens/s, peak memory and hours, each as planned and as it was (with the difference)."""
    out = []
    for p in plan.get("stages", []):
        lines = logs.get(p["stage"], [])
        rows, peak = [line for line in lines if "eval" not in line], evaluated(lines).get("peak_gb")
        done = sum(row.get("seconds", 0) for row in rows) / 3600 if peak else None  # a run that has not ended has no peak yet
        cells = []
        compared = ((p["tokens_per_s"], _speed(rows), ",.0f"), (p["peak_bytes"] / 1e9, peak, ".1f"), (p["hours"], done, ".3g"))
        for before, after, form in compared:
            off = f" ({after / before - 1:+.0%})" if after and before else ""
            cells += [f"{before:{form}}" if before else "–", f"{after:{form}}{off}" if after else "–"]
        out.append([p["stage"], "yes" if p["fits"] else "no", *cells])
    return out


def _points(rows: list[dict], key: str) -> list[tuple[float, float]]:
    found = ((row.get("step", i), row.get(key)) for i, row in enumerate(rows))
    return [(float(x), float(y)) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def stages(saved: list[dict]) -> list[dict]:
    """The entries of stages.json as rows with bars and a total."""
    times = [(stage["name"], float(stage["seconds"])) for stage in saved]
    longest, total = max((t for _, t in times), default=0) or 1.0, sum(t for _, t in times)
    rows = [{"label": name, "fraction": t / longest, "value": clock(t)} for name, t in times]
    return [*rows, {"label": "total", "fraction": None, "value": clock(total)}] if rows else []


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def settings(results: list[dict]) -> list[tuple[str, str]]:
    if not results:
        return []
    soul = results[-1]["soul"]
    rows = [("soul", f"{soul['name']} {soul['version']} · {soul['hash']}"), ("eval set", results[0]["eval_set_hash"])]
    for r in results:
        heat = "greedy" if r["temperature"] == 0 else f"temperature {r['temperature']}, seed {r['seed']}"
        rows += [
            (f"model {r['name']}", f"{r['model']} · {r['model_hash']}"),
            ("its template", f"{r['template']} · {r['template_hash']}"),
            ("its replies", f"{heat}, at most {r['max_new']} tokens; {r['tokens']['completion']:,} tokens in {clock(r['seconds'])}"),
        ]
        if o := r.get("overlap"):
            rows.append(("training rows", f"{o['exact']} of {o['n']} prompts are in them, {o['grams']} share a run of 13 words"))
    return rows


def machine() -> list[tuple[str, str]]:
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    rows = [("processor", cpu), ("cores", str(os.cpu_count()))]
    if "SC_PHYS_PAGES" in os.sysconf_names:
        rows.append(("memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"))
    rows.append(("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"))
    return [*rows, ("libraries", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "pyarrow")))]


def commands(run: Path) -> list[str]:
    """One command per resolved config that a stage left in the run directory."""
    known = ("quickstart", "generate", "convert", "on-policy", "plan-train", "pretrain", "sft", "dpo", "eval")
    lines = [f"soulsmith {name} --config {shlex.quote(str(run / f'{name}.json'))}" for name in known if (run / f"{name}.json").exists()]
    return [*lines, f"soulsmith report {shlex.quote(str(run))}"]
