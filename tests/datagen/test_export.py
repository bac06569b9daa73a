"""From journal rows to files: the same bytes, flat memory, and a card that tells what was lost and why."""

import json
import tracemalloc
from dataclasses import dataclass, field

import pyarrow.parquet as pq
import pytest

from datagen import export as exporting
from datagen.card import card
from datagen.export import Tally, export
from datagen.journal import Row
from soul.rows import read_rows
from soul.spec import parse_soul

SOUL = parse_soul(
    "# moss\n\n## Principles\n\n- is lower. <!-- id: lower; check: lowercase_prose -->\n- is warm. <!-- id: warm -->\n- is calm. <!-- id: calm -->\n"
)
FACTS = {"teacher": "fake", "command": "soulsmith generate", "hashes": {"soul": SOUL.hash}}
ENTRY = {"stage": "draft", "model": "m-1", "provider": "p-1", "outcome": "ok", "calls": 3, "attempts": 4, "prompt_tokens": 9,
         "completion_tokens": None, "cost": 0.25}  # fmt: skip


@dataclass
class Rows:
    """A journal as export sees it; `results` may be a function of the row's number."""

    results: list = field(default_factory=list)
    count: int | None = None

    def rows(self, run_id):
        for number in range(len(self.results) if self.count is None else self.count):
            yield Row(f"r{number}", "finished", self.results(number) if callable(self.results) else self.results[number])

    def planned(self):
        return len(self.results) if self.count is None else self.count

    def ledger(self):
        return [ENTRY, ENTRY | {"outcome": "empty", "cost": None}]


def user(text):
    return [{"role": "user", "content": text}]


def said(text):
    return [{"role": "assistant", "content": text}]


def step(stage, text="", key=""):
    return {"stage": stage, "text": text, "key": key}


def sft(name="a", text="hi", **more):
    return ["sft", {"id": name, "messages": user("hello") + said(text), "principles": [], "trail": []} | more]


def pair(name="a", **more):
    return [
        "preference",
        {"id": name, "prompt": user("hello " + name), "chosen": said("hi"), "rejected": said("HI"), "principles": ["lower"]} | more,
    ]


def rejected(name="a", reason="checks: lower, warm", **more):
    return ["rejected", {"id": name, "messages": user("hello"), "accepted": False, "reason": reason} | more]


def tally(*results):
    count = Tally(SOUL)
    for some in results:
        count.add(some)
    return count.summary()


def test_the_files_hold_the_rows_in_order_and_the_same_journal_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "GROUP", 2)
    journal = Rows([[sft(f"s{n}"), pair(f"s{n}")] if n % 3 else [rejected(f"s{n}")] for n in range(7)])
    stats = export(journal, "run", tmp_path / "a", SOUL, FACTS)
    export(journal, "run", tmp_path / "b", SOUL, FACTS)
    assert stats["rows"] == {"sft": 4, "preference": 4, "rejected": 3} and stats["seeds"] == 7 and stats["cost_usd"] == 0.25
    assert [row["id"] for row in read_rows(tmp_path / "a/sft.parquet")] == ["s1", "s2", "s4", "s5"]
    assert pq.ParquetFile(tmp_path / "a/sft.parquet").num_row_groups == 2
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "preference.parquet", "rejected.parquet", "sft.parquet", "stats.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert json.loads((tmp_path / "a/stats.json").read_text())["rows"] == stats["rows"]


def test_documents_have_their_own_file_which_goes_with_them(tmp_path):
    doc = ["docs", {"id": "d", "text": "moss is calm.", "principles": ["calm"], "source": "docs:FAQ"}]
    stats = export(Rows([[doc]]), "run", tmp_path, SOUL, FACTS)
    assert stats["rows"]["docs"] == 1 and read_rows(tmp_path / "docs.parquet")[0]["text"] == "moss is calm."
    assert "config_name: docs" in (tmp_path / "README.md").read_text() and ", 1 documents;" in (tmp_path / "README.md").read_text()
    export(Rows([[sft()]]), "run", tmp_path, SOUL, FACTS)
    assert not (tmp_path / "docs.parquet").exists() and "docs" not in (tmp_path / "README.md").read_text()


def test_a_failure_in_the_middle_leaves_the_old_files(tmp_path):
    export(Rows([[sft("old")]]), "run", tmp_path, SOUL, FACTS)
    with pytest.raises(ValueError, match="columns that sft rows do not have"):
        export(Rows([[sft("new")], [sft("bad", score=1)]]), "run", tmp_path, SOUL, FACTS)
    assert [row["id"] for row in read_rows(tmp_path / "sft.parquet")] == ["old"] and not list(tmp_path.glob(".*"))


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "GROUP", 200)
    peaks = []
    for count in (1000, 4000):
        journal = Rows(lambda n: [sft(f"s{n}", f"text {n} " * 100), rejected(f"s{n}")], count)
        tracemalloc.start()
        export(journal, "run", tmp_path, SOUL, FACTS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_reasons_and_missing_pairs_are_counted():
    stats = tally(
        [rejected(reason="draft: empty (no text)")],
        [rejected(reason="draft: empty (other)")],
        [rejected()],
        [sft(trail=[step("draft", "x", "k1"), step("no-pair", "judge: tie")])],
        [sft(trail=[step("no-pair", "judge: swap disagrees")])],
        [sft(trail=[step("no-pair", "the revision equals the draft")])],
        [sft(trail=[step("no-pair", "judge: tie")])],
    )
    assert stats["reasons"] == {"draft: empty": 2, "checks: lower, warm": 1}
    assert stats["no_pair"] == {"judge: tie": 2, "judge: swap disagrees": 1, "the revision equals the draft": 1}
    assert stats["principles"]["warm"]["blocked"] == 1


def test_a_call_that_several_rows_of_a_seed_tell_of_counts_once():
    trail = [step("draft", "x", "k1"), step("repair", "lower"), step("repair", "lower"), step("no-pair", "judge: tie")]
    stats = tally([sft("a-0", trail=trail), sft("a-1", trail=trail), rejected(trail=[step("draft", "x", "k1"), step("revise", "y", "k2")])])
    assert stats["stages"] == {"draft": 1, "no-pair": 1, "repair": 2, "revise": 1}
    assert stats["no_pair"] == {"judge: tie": 1} and stats["principles"]["lower"]["repaired"] == 2


def test_coverage_counts_seeds_rows_and_pairs_and_names_the_gaps():
    stats = tally(
        [sft(principles=["lower"], source="seed:conflict:lower+warm"), pair(source="seed:conflict:lower+warm")],
        [rejected(source="seed:on-topic:calm")],
    )
    seen = {name: (entry["aimed"], entry["broken_on_the_way"], entry["pairs"]) for name, entry in stats["principles"].items()}
    assert seen == {"lower": (1, 1, 1), "warm": (1, 0, 0), "calm": (1, 0, 0)} and stats["gaps"] == ["calm"]


def test_rows_of_a_recipe_that_leaves_columns_out_are_counted_too():
    bare = [["sft", {"id": "a", "messages": user("q") + said("a b")}], ["rejected", {"id": "b", "messages": user("q")}]]
    bare += [["preference", {"id": "c", "prompt": user("q"), "chosen": said("x"), "rejected": said("y")}]]
    stats = tally(bare)
    assert stats["reasons"] == {"no reason given": 1} and stats["words"]["sft"] == {"mean": 2.0, "median": 2, "max": 2}
    assert "## Pair hygiene" in card(FACTS | stats | {"seeds": 1, "ledger": [], "cost_usd": None}, SOUL)


def test_lengths_are_exact():
    stats = tally(*[[sft(text="w " * n)] for n in (1, 2, 2, 9)])
    assert stats["words"]["sft"] == {"mean": 3.5, "median": 2, "max": 9} and stats["words"]["chosen"] is None


def test_the_card_tells_coverage_routes_ledger_and_warnings(tmp_path):
    long = [[sft(f"s{n}", served=["m-1@p-1"]), pair(f"s{n}", chosen=said("Sorry, " + "hi " * 30), served=["m-1@p-1"])] for n in range(50)]
    stats = export(Rows(long), "run", tmp_path, SOUL, FACTS)
    text = (tmp_path / "README.md").read_text()
    assert len(stats["warnings"]) == 3 and all(f"**WARNING** {line}" in text for line in stats["warnings"])
    for line in (
        "| draft | m-1 | p-1 | ok | 3 | 4 | 9 | unknown | $0.2500 |",
        "| m-1@p-1 | 100 |",
        "| lower | lowercase_prose | 0 | 0 | 50 | 0 | 0 | 1.0 | 50 |",
        "Gaps, no row is about them: warm, calm.",
        "Words that tell rejected:" if stats["hygiene"]["telling_words"]["rejected"] else "Words that tell chosen: `",
        "| chosen: apologises | 50 |",
        "Total cost: $0.2500.",
    ):
        assert line in text, line


def test_what_teachers_wrote_cannot_break_the_tables():
    stats = tally([rejected(reason="draft: a | b\n# x")], [pair(chosen=said("`|` <b>"))])
    text = card(FACTS | stats | {"seeds": 1, "ledger": [], "cost_usd": None}, SOUL)
    assert "| draft: a \\| b # x | 1 |" in text and "\n# x" not in text
