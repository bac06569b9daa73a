"""The dataset card: what was made, from what, how much was kept and why not the rest."""

from soul.spec import Soul

CALLS = ("stage", "model", "outcome", "calls", "attempts", "prompt_tokens", "completion_tokens")


def card(stats: dict, soul: Soul) -> str:
    """The README.md of a data directory, with the front matter by which Hugging Face `datasets` finds its files."""
    rows = stats["rows"]
    principles = [(name, ", ".join(p["checks"]) or "critic only", *list(p.values())[1:]) for name, p in stats["principles"].items()]
    lengths = [(side, *words.values()) for side, words in stats["words"].items() if words]
    calls = [(*(entry[name] for name in CALLS), _usd(entry["cost"])) for entry in stats["ledger"]]
    return f"""---
configs:
- config_name: sft
  data_files: sft.parquet
- config_name: preference
  data_files: preference.parquet
- config_name: rejected
  data_files: rejected.parquet
tags: [soulsmith, synthetic]
---

# Data for {soul.name}

{rows["sft"]} conversations and {rows["preference"]} preference pairs from {stats["seeds"]} requests; {rows["rejected"]} rejected.
Replies by `{stats["teacher"]}`, held to `{soul.path}` by checks and critic; the SOUL itself is not in the rows.

## What was kept out

{_table(["reason", "rows"], stats["reasons"].items())}
## Principles

{_table(["principle", "verified by", "broken on the way", "repaired by program", "pairs", "rows blocked"], principles)}
## Lengths in words

{_table(["side", "mean", "median", "longest"], lengths)}
## Calls

{_table([*(name.replace("_", " ") for name in CALLS), "cost"], calls)}
Total cost: {_usd(stats["cost_usd"])}.

## Made by

    {stats["command"]}

{_table(["what", "sha256"], stats["hashes"].items())}"""


def _table(head: list[str], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    return "unknown" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"${cost:.4f}"
