import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evals import sections
from evals.report import Config, collect, main, to_html, to_markdown
from evals.stats import share
from soul.conversation import assistant, tool, tool_call, user
from soul.errors import UserError
from soul.rows import write_rows

EVIL = "</script></style><img src=x onerror=alert(1)>\x1b]0;owned\x07 \u202egnp.exe {{ 7*7 }} &lt;"


def result(name, *, k=1, n=3, text="on it."):
    columns = [{"valid": i < k, "makes a call": i < k, "all at once": i < k} for i in range(n)]
    items = [
        {
            "id": f"t{i}", "kind": "find", "prompt": f"where is x{i}? {text}", "text": text, "remark": text,
            "calls": [{"name": "Grep", "args": {"pattern": text}}], "problems": [], "usable": True, "finish": "stop", "tokens": 9,
            "checks": {"lowercase": i < k}, "columns": columns[i], "result": None,
        }
        for i in range(n)
    ]  # fmt: skip
    cell = share([i < k for i in range(n)]).to_dict()
    return {
        "name": name, "about": text, "template": "soulsmith", "template_hash": "aa", "model": f"runs/{name}", "model_hash": "bb",
        "soul": {"name": f"pip {text}", "version": "1", "hash": "cc", "principles": 2}, "principles": {"lowercase": text},
        "unverified": [{"id": "warm", "text": f"is warm {text}"}], "eval_set_hash": "dd", "n": n, "temperature": 0.0, "seed": 0,
        "max_new": 120, "seconds": 1.0, "tokens": {"prompt": 1, "completion": 2}, "rules": ["a rule"], "items": items, "loops": [],
        "overlap": {"exact": 0, "grams": 1, "n": n},
        "shares": {"tools": {"valid": cell, "makes a call": cell},
                   "adherence": {"lowercase": cell, "all at once": cell}, "work": {"runs": cell}},
    }  # fmt: skip


def full_run(root: Path, text="on it.") -> Path:
    run = root / "first"
    (run / "evals").mkdir(parents=True)
    for name, k in (("dpo", 3), ("base", 0), ("sft", 2), ("base chat", 1)):
        (run / "evals" / f"{name.replace(' ', '-')}.json").write_text(json.dumps(result(name, k=k, text=text)))
    trail = [
        {"stage": s, "text": t, "key": "k"}
        for s, t in (("draft", text), ("critique", json.dumps([{"principle": "lowercase", "why": text}])), ("revise", text))
    ]
    rollout = [user(text), assistant(text, tool_call("Grep", pattern=text)), tool(text), assistant(text)]
    rows = [{"id": "a", "messages": [user(text), assistant(text)], "trail": trail}, {"id": "b", "messages": rollout}]
    write_rows(run / "data" / "sft.parquet", rows, "sft")
    (run / "data" / "stats.json").write_text(
        json.dumps(
            {
                "teacher": text,
                "cost": None,
                "rows": {},
                "reasons": {text: 3, "too long": 1},
                "hashes": {"soul": "cc"},
                "words": {"sft": None},
                "principles": {"lowercase": {"checks": [text], "repaired": 4}},
                "ledger": [{"stage": "draft", "calls": 7, "cost": 0.25}, {"stage": text}],
            }
        )
    )
    for stage in ("sft", "dpo"):
        (run / stage).mkdir()
        lines = [
            json.dumps({"step": i, "loss": math.log(2) - i / 100, "accuracy": 0.5, "chosen_logp": -9.0, "rejected_logp": -9.5})
            for i in range(50)
        ]
        (run / stage / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
        (run / f"{stage}.json").write_text("{}")
    (run / "stages.json").write_text(json.dumps([{"name": "sft", "seconds": 75.0}, {"name": "dpo", "seconds": 3700.2}]))
    return run


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_a_whole_run(tmp_path):
    run = full_run(tmp_path)
    assert main(Config(run)) == 0
    page = Page((run / "report.html").read_text())
    for words in (
        "valid",
        "base chat",
        "from draft to revision",
        "every result executed",
        "Not verified",
        "is warm",
        "DPO loss",
        "1 h 01 min",
        "processor",
    ):
        assert words in page.text, words
    assert f"soulsmith dpo --config {run}/dpo.json" in page.text and f"soulsmith report {run}" in page.text
    assert "100.0 % [44–100]" in page.text and "+66.7 pp" in page.text
    markdown = (run / "report.md").read_text()
    assert "| valid | 0.0 % \\[0–56\\] | 33.3 %" in markdown and "too long: 1" in markdown and "| draft | 7 | 0.25 |" in markdown


def test_contestants_stand_in_the_order_of_a_life(tmp_path):
    context = collect(full_run(tmp_path))
    assert [r["name"] for r in context["results"]] == ["base", "base chat", "sft", "dpo"]
    assert {names for _, names, _ in context["pairs"]} >= {"base → sft", "base chat → dpo", "sft → dpo"}


def test_hostile_text_stays_text(tmp_path):
    run = full_run(tmp_path, EVIL).rename(tmp_path / "run\u202e<b>\x1b")
    main(Config(run))
    html = (run / "report.html").read_text()
    page = Page(html)
    assert page.tags.isdisjoint({"script", "img", "iframe", "a", "link", "object", "form", "base"})
    assert not {name for name in page.attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert "<img src=x onerror=alert(1)>" in page.text and "{{ 7*7 }}" in page.text
    for hidden in ("\x1b", "\x07", "\u202e"):
        assert hidden not in html and hidden not in (run / "report.md").read_text()
    assert "<U+202E>" in page.text and "␛" in page.text
    assert "<img" not in (run / "report.md").read_text()


def test_nothing_is_loaded_and_the_style_is_pinned(tmp_path):
    html = to_html(collect(full_run(tmp_path)))
    assert "default-src 'none'; style-src 'sha256-" in html and "unsafe" not in html
    assert "http:" not in html and "https:" not in html and "url(" not in html


def test_a_row_of_five_megabytes_is_clipped(tmp_path):
    run = tmp_path / "big"
    write_rows(
        run / "data" / "sft.parquet", [{"id": "a", "messages": [user("hi"), assistant("x" * 5_000_000), tool("y" * 5_000_000)]}], "sft"
    )
    html = to_html(collect(run))
    assert len(html) < 60_000 and "5,000,000 characters" in html


@pytest.mark.parametrize("keep", ["data", "evals", "sft"])
def test_a_part_of_a_run_still_has_a_report(tmp_path, keep):
    run = full_run(tmp_path)
    for path in [p for p in run.rglob("*") if p.is_file() and p.relative_to(run).parts[0] != keep]:
        path.unlink()
    context = collect(run)
    assert to_html(context) and to_markdown(context)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        collect(tmp_path / "none")
    with pytest.raises(UserError, match="nothing to report"):
        collect(tmp_path)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "sft.json").write_text("{")
    with pytest.raises(UserError, match=r"sft\.json"):
        collect(tmp_path)


def trained_run(root: Path, text="python") -> Path:
    run = root / "trained"
    for stage, speed in (("pretrain", 2000.0), ("dpo", 90.0)):
        (run / stage).mkdir(parents=True)
        lines = [{"step": i, "loss": 2.0, "seconds": 36.0, "tokens_per_s": speed if i else 1.0} for i in range(5)]
        lines += [{"step": n, "eval": {f"bpb {text}": 2.5 - n / 10}} for n in (2, 5)] + [
            {"step": 5, "eval": {"peak_gb": 4.4, "learned": 2.0}}
        ]
        (run / stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "pretrain" / "results.json").write_text(json.dumps({"bpb": {text: 2.0}, "params": 11_500_000, "tokens": 4096, "steps": 5}))
    (run / "dpo" / "pairs.jsonl").write_text("\n".join(json.dumps({"id": text, "class": c}) for c in ("learned", "flipped", "learned")))
    plan = {"fits": True, "params": 1, "available_bytes": 2, "rows": 4, "accumulate": 1, "tokens": None, "step_s": 1.0, "mfu": 0.3}
    stages = [plan | {"stage": "pretrain", "tokens_per_s": 1600.0, "peak_bytes": 4_000_000_000, "hours": 0.05},
              plan | {"stage": "sft", "tokens_per_s": None, "peak_bytes": 9_000_000_000, "hours": None, "fits": False},
              plan | {"stage": "dpo", "tokens_per_s": 100.0, "peak_bytes": 5_500_000_000, "hours": None}]  # fmt: skip
    (run / "training_plan.json").write_text(json.dumps({"device": "cpu", "peak_flops": 1e12, "stages": stages}))
    return run


def test_plan_and_run_stand_side_by_side(tmp_path):
    context = collect(trained_run(tmp_path))
    assert context["planned"] == [
        ["pretrain", "yes", "1,600", "2,000 (+25%)", "4.0", "4.4 (+10%)", "0.05", "0.05 (+0%)"],
        ["sft", "no", "–", "–", "9.0", "–", "–", "–"],
        ["dpo", "yes", "100", "90 (-10%)", "5.5", "4.4 (-20%)", "–", "0.05"],
    ]
    page, text = Page(to_html(context)).text, to_markdown(context)
    for words in ("As planned, and as it was", "2,000 (+25%)", "11,500,000", "Bits per byte, held out", "5 steps, median 2,000 tokens/s"):
        assert words in page, words
    assert "| pretrain | yes | 1,600 | 2,000 (+25%)" in text and "2 pairs learned" in text and "bpb python 2" in text


def test_the_hours_of_a_run_that_has_not_ended_are_not_compared(tmp_path):
    run = trained_run(tmp_path)
    lines = (run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    (run / "pretrain" / "metrics.jsonl").write_text("\n".join(lines[:-1]))
    assert collect(run)["planned"][0][2:] == ["1,600", "2,000 (+25%)", "4.0", "–", "0.05", "–"]


def test_pairs_are_counted_by_their_class(tmp_path):
    (_, dpo) = collect(trained_run(tmp_path))["training"]
    assert [(row["label"], row["value"]) for row in dpo["pairs"]] == [("learned", "2"), ("flipped", "1")]
    assert ("learned", "2") not in dpo["facts"] and ("peak_gb", "4.4") in dpo["facts"]


def test_a_plan_alone_has_a_report(tmp_path):
    run = trained_run(tmp_path)
    for path in [p for p in run.rglob("*") if p.is_file() and p.name != "training_plan.json"]:
        path.unlink()
    assert "1,600" in Page(to_html(collect(run))).text


def test_hostile_names_of_evals_and_pairs_stay_text(tmp_path):
    context = collect(trained_run(tmp_path, EVIL))
    html = to_html(context)
    assert Page(html).tags.isdisjoint({"script", "img"}) and "\x1b" not in html and "\u202e" not in html
    assert "<img" not in to_markdown(context)


def test_the_step_that_compiles_is_no_speed():
    rows = [{"step": n, "tokens_per_s": speed} for n, speed in enumerate((1.0, 2.0, 90.0))]
    assert sections.training("sft", rows, {}, [])["note"] == "3 steps, median 90 tokens/s"
    assert sections.training("sft", rows[:1], {}, [])["note"] == "1 steps, median 1 tokens/s"
