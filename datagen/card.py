"""The dataset card: what was made, from what, how much was kept and why not the rest."""

from soul.spec import Soul


def card(stats: dict, soul: Soul) -> str:
    """The README.md of a data directory, with the front matter by which Hugging Face `datasets` finds its files."""
    rows = stats["rows"]
    parts = [_front(), f"# Data for {soul.name}\n", f"{rows['sft']} conversations and {rows['preference']} preference pairs from {stats['seeds']} requests; "
             f"{rows['rejected']} rows rejected. Replies by `{stats['teacher']}`, held to `{soul.path}` by checks and critic; the SOUL is not in the rows.\n"]  # fmt: skip
    parts.append("## What was kept out\n\n" + _table(["reason", "rows"], stats["reasons"].items()) if stats["reasons"] else "Nothing was rejected.\n")
    by_principle = [(name, ", ".join(p["checks"]) or "critic only", p["broken_on_the_way"], p["repaired"], p["pairs"], p["blocked"]) for name, p in stats["principles"].items()]
    parts.append("## Principles\n\n" + _table(["principle", "verified by", "broken on the way", "repaired by program", "pairs", "rows blocked"], by_principle))
    lengths = [(name, w["mean"], w["median"], w["max"]) for name, w in stats["words"].items() if w]
    parts.append("## Lengths in words\n\n" + _table(["side", "mean", "median", "longest"], lengths))
    calls = [(e["stage"], e["model"] or "", e["outcome"], e["calls"], e["attempts"], e["prompt_tokens"], e["completion_tokens"], _usd(e["cost"])) for e in stats["ledger"]]
    parts.append("## Calls\n\n" + _table(["stage", "model", "outcome", "calls", "attempts", "prompt tokens", "completion tokens", "cost"], calls))
    parts.append(f"Total cost: {_usd(stats['cost_usd'])}.\n")
    parts.append("## Made by\n\n" + f"    {stats['command']}\n\n" + _table(["what", "sha256"], [(n, f"`{h}`") for n, h in stats["hashes"].items()]))
    return "\n".join(parts)


def _front() -> str:
    configs = "".join(f"- config_name: {kind}\n  data_files: {kind}.parquet\n" for kind in ("sft", "preference", "rejected"))
    return f"---\nconfigs:\n{configs}tags: [soulsmith, synthetic]\n---\n"


def _table(head: list[str], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    return "unknown" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"${cost:.4f}"
