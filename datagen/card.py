"""The dataset card: what was made, from what, how much was kept and why not the rest, and what the pairs could teach by mistake."""

from soul.spec import Soul

CALLS = ("stage", "model", "provider", "outcome", "calls", "attempts", "prompt_tokens", "completion_tokens")
PROBES = {
    "length_ratio": "chosen / rejected in words, median",
    "chosen_longer": "share of pairs whose chosen side is longer",
    "shared_prefix": "share of pairs whose first words agree",
    "length_probe": "accuracy of a probe that sees lengths only",
    "word_probe": "accuracy of a probe that sees words only",
    "equal": "pairs with equal sides",
}


def card(stats: dict, soul: Soul) -> str:
    """The README.md of a data directory, with the front matter by which Hugging Face `datasets` finds its files."""
    rows = stats["rows"]
    configs = "\n".join(f"- config_name: {kind}\n  data_files: {kind}.parquet" for kind in rows)
    made = f"{rows['sft']} conversations and {rows['preference']} preference pairs from {stats['seeds']} requests"
    made += f", {rows['docs']} documents" if rows.get("docs") else ""
    words = [(side, *lengths.values()) for side, lengths in stats["words"].items() if lengths]
    parts = [
        _section("What was kept out", _table(["reason", "rows"], stats["reasons"].items())),
        _section("Why some requests gave no pair", _table(["reason", "requests"], stats["no_pair"].items())) if stats["no_pair"] else "",
        _section("Principles", _principles(stats, soul)),
        _section("Pair hygiene", _hygiene(stats["hygiene"])) if stats["hygiene"] else "",
        _section("Lengths in words", _table(["side", "mean", "median", "longest"], words)),
        _section("Calls", calls_made(stats)),
        _section("Made by", f"    {stats['command']}\n\n" + _table(["what", "sha256"], stats["hashes"].items())),
    ]
    return f"""---
configs:
{configs}
tags: [soulsmith, synthetic]
---

# Data for {soul.name}

{made}; {rows["rejected"]} rejected.
Replies by `{stats["teacher"]}`, held to `{soul.path}` by checks and critic; the SOUL itself is not in the rows.
{"".join(parts)}"""


def _principles(stats: dict, soul: Soul) -> str:
    """What each principle saw; margins are the principles on which a pair differs, of which it is one."""
    margins = (stats["hygiene"] or {}).get("principle_margins", {})
    table = []
    for name, seen in stats["principles"].items():
        margin = margins.get(name, {})
        row = [seen[key] for key in ("broken_on_the_way", "repaired", "pairs", "blocked", "aimed")]
        table.append([name, ", ".join(seen["checks"]) or "critic only", *row, margin.get("median", "-"), margin.get("alone", "-")])
    gaps = f"\nGaps, no row is about them: {', '.join(stats['gaps'])}. Aim seeds at them: `soulsmith seeds --soul {soul.path}`.\n"
    told = "\nMargin: the median number of principles on which its pairs differ; alone: pairs that differ on nothing else.\n"
    head = ["principle", "verified by", "broken on the way", "repaired by program", "pairs", "rows blocked", "seeds aimed"]
    return _table([*head, "margin", "alone"], table) + (told if margins else "") + (gaps if stats["gaps"] else "")


def _hygiene(found: dict) -> str:
    warned = "".join(f"**WARNING** {_cell(line)}\n\n" for line in found["warnings"])
    rows = [(text, found[name]) for name, text in PROBES.items()] + [(f"chosen: {why}", count) for why, count in found["leaks"].items()]
    rows += [(f"pairs that differ on {margin} principles", count) for margin, count in found["margins"].items()]
    telling = "".join(
        f"\nWords that tell {side}: {' '.join(f'`{word}`' for word in words if '`' not in word)}\n"
        for side, words in found["telling_words"].items()
        if words
    )
    looked = f"Of {found['pairs']} pairs, {found['sample']} were looked at; a probe near 0.5 sees nothing.\n\n"
    return f"{warned}{looked}{_table(['what', 'value'], rows)}{telling}"


def calls_made(stats: dict) -> str:
    calls = [(*(entry.get(name) for name in CALLS), _usd(entry["cost"])) for entry in stats["ledger"]]
    served = _table(["served by", "rows"], stats["served"].items()) + "\n" if stats["served"] else ""
    return f"{_table([*(name.replace('_', ' ') for name in CALLS), 'cost'], calls)}\n{served}Total cost: {_usd(stats['cost_usd'])}.\n"


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n\n{body}"


def _table(head: list[str], rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def _cell(value: object) -> str:
    return "unknown" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"${cost:.4f}"
