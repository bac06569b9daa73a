"""`soulsmith report RUN`: one page of evidence from whatever a run directory holds, as report.md and report.html."""

import base64
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import jinja2
import tyro
from markupsafe import Markup

from evals import charts, sections
from soul.console import console, plain
from soul.console import visible as show_controls
from soul.errors import UserError
from soul.files import read_json, read_text, write_atomic
from soul.records import json_lines

HERE = Path(__file__).parent
TITLES = {"stats": "generated", "rollouts_stats": "rollouts"}


@dataclass(frozen=True)
class Config:
    """Write report.md and report.html into a run directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run directory, as given to --out."""
    examples: int = 8
    """Prompts shown with every model's answer."""


def main(config: Config) -> int:
    context = collect(config.run, config.examples)
    write_atomic(config.run / "report.md", to_markdown(context))
    write_atomic(config.run / "report.html", to_html(context))
    console.print(plain(f"report: {config.run / 'report.html'}"))
    return 0


def collect(run: Path, examples: int = 8) -> dict:
    """Everything the page shows; parts that the run lacks are empty.

    Raises UserError when `run` is no directory, holds nothing to report, or has a broken file.
    """
    if not run.is_dir():
        raise UserError("no such run directory", where=run, fix="Give the directory that --out named.")
    results = read_results(run)
    yields = {path: read_json(path) for path in sorted(run.glob("data/**/*stats.json"))}
    logs = {stage: json_lines(run / stage / "metrics.jsonl") for stage in ("pretrain", "sft", "dpo")}
    files = sorted(run.glob("data/**/*.parquet"))
    if not (results or yields or files or any(logs.values()) or (run / "training_plan.json").exists()):
        raise UserError("nothing to report yet", where=run, fix="Run generate, convert, sft, dpo or eval with this --out first.")
    newest = max(path.stat().st_mtime for path in run.rglob("*") if path.is_file())
    return {
        "run": run, "date": datetime.fromtimestamp(newest, UTC).strftime("%d %B %Y, %H:%M UTC"),
        "soul": results[-1]["soul"] if results else {"name": run.resolve().name, "principles": 0, "hash": ""},
        "results": results, "headlines": sections.headlines(results), "groups": sections.evidence(results), "pairs": sections.pairs(results),
        "rules": list(dict.fromkeys(rule for r in results for rule in r["rules"])),
        "unverified": results[-1]["unverified"] if results else [],
        "questions": sections.questions(results, examples),
        "data": sections.data(run, files),
        "yields": [g for path, value in yields.items() for g in sections.stats(value, TITLES.get(path.stem, path.stem))],
        "planned": sections.planned(read_if(run / "training_plan.json", {}), logs),
        "training": [
            sections.training(stage, rows, read_if(run / stage / "results.json", {}), json_lines(run / stage / "pairs.jsonl"))
            for stage, rows in logs.items() if rows
        ],
        "stages": sections.stages(read_if(run / "stages.json", [])),
        "settings": sections.settings(results), "machine": sections.machine(), "commands": sections.commands(run),
    }  # fmt: skip


def read_results(run: Path) -> list[dict]:
    """evals/*.json in the order of a life: base models first, then SFT, then DPO, then others by name."""
    order = {"base": 0, "base chat": 1, "pretrain": 2, "sft": 3, "dpo": 4}
    found = [read_json(path) for path in sorted(run.glob("evals/*.json"))]
    return sorted(found, key=lambda r: (order.get(r["name"], 9), r["name"]))


def read_if(path: Path, default):
    return read_json(path) if path.exists() else default


def to_html(context: dict) -> str:
    """The page. Every value is made visible and escaped but the SVG of evals.charts; the style is allowed by its hash alone."""
    style = read_text(HERE / "report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = _template("report.html.j2", finalize=lambda v: v if isinstance(v, Markup) else visible(v, 20_000), autoescape=True)
    return page.render(context, style=Markup(style), style_hash=f"sha256-{digest}")


def to_markdown(context: dict) -> str:
    return _template("report.md.j2", finalize=markdown, autoescape=False).render(context)


def _template(name: str, **options) -> jinja2.Template:
    """`finalize` runs on the value of every expression, so no text reaches a page unseen, whatever a template forgets."""
    loader = jinja2.FileSystemLoader(HERE)
    env = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    env.filters |= {"bar": charts.bar, "strip": charts.strip, "clip": visible, "line": one_line}
    return env.get_template(name)


# ---- untrusted text made safe to look at: nothing may hide in it, reorder it, or fill the page


def visible(text: object, limit: int = 4000) -> str:
    """`text` with control, direction and invisible characters spelled out, clipped to `limit` characters with a note.

    ESC becomes ␛ and U+202E becomes <U+202E>. HTML is not escaped here: the template does that.
    """

    def spell(match: re.Match) -> str:
        # zero-width and tag characters, line and paragraph separators: nothing a reader could see
        unseen = unicodedata.category(match.group()) in ("Cf", "Zl", "Zp")
        return f"<U+{ord(match.group()):04X}>" if unseen else match.group()

    full = str(text)
    shown = re.sub(r"[^\x00-\x7f]", spell, show_controls(full[:limit]))
    return shown if len(full) <= limit else f"{shown}\n… [{len(full):,} characters, {limit:,} shown]"


def one_line(text: object, limit: int = 200) -> str:
    full = str(text)
    flat = " ".join(full[: 4 * limit].split())
    return visible(flat if len(flat) <= limit and len(full) <= 4 * limit else flat[: limit - 1] + "…", limit)


def markdown(text: object) -> str:
    """Untrusted text inside one Markdown line: no HTML, link, emphasis, table break or heading comes of it."""
    flat = re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", one_line(text, 400))
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
