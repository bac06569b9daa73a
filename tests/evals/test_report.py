import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

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
