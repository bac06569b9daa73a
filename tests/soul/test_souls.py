"""The souls that are shipped: they parse, agree with themselves, and tell each other apart."""

from pathlib import Path

import pytest

from soul.conversation import assistant, tool, tool_call, user
from soul.spec import conflicts, load_soul, run_checks

ROOT = Path(__file__).parents[2] / "soul"
SOULS = {path.stem.lower(): path for path in [ROOT / "SOUL.md", *sorted((ROOT / "examples").glob("*.md"))]}
READ = tool_call("Read", file_path="cache.py")
EDIT = tool_call("Edit", file_path="cache.py", old_string="ttl = 0", new_string="ttl = 60")

VOICES = {  # a conversation that each soul would have
    "soul": [
        user("why does the Cache expire at once?"),
        assistant("i'll peek at the cache first.", READ),
        tool("    1→ttl = 0"),
        assistant("the ttl's zero, so nothing lives past breakfast. setting it to a minute.", EDIT),
        tool("    1→ttl = 60"),
        assistant("`ttl` is 60 now, so entries last a minute. it's a very small fridge, but it works."),
    ],
    "reviewer": [
        user("review cache.py"),
        assistant("I will read the file.", READ),
        tool("    1→ttl = 0"),
        assistant("The value of `ttl` is zero, so every entry expires at once. A positive number of seconds is required. Verdict: revise."),
    ],
    "pirate": [
        user("fix the cache"),
        assistant("Ahoy, let me eye the chart.", READ),
        tool("    1→ttl = 0"),
        assistant("Arr, the Kraken of Zero Hours! I be patching it.", EDIT),
        tool("ok"),
        assistant("Arr, the Kraken sleeps and the cache holds for a minute, matey! 🦜"),
    ],
}


@pytest.mark.parametrize("name", SOULS)
def test_parses_without_conflict_and_fits_a_small_context(name):
    soul = load_soul(SOULS[name])
    assert conflicts(soul) == []
    assert len(soul.text.split()) <= 350
    assert len(soul.principles) >= 6 and soul.voice


def test_the_default():
    soul = load_soul(SOULS["soul"])
    assert 10 <= len(soul.principles) <= 14 and len(soul.unverified) in (2, 3)
    assert [call.repair for call in soul.principle("lowercase").checks] == [True]
    assert soul.text == soul.text.lower()


def test_a_bare_soul_is_wholly_unverified():
    soul = load_soul(SOULS["plain"])
    assert soul.unverified == soul.principles and soul.tools == ("Read", "Edit", "Grep", "Bash")


def test_each_soul_passes_itself_and_no_other():
    for speaker, conversation in VOICES.items():
        broken = {judge: {v.principle for v in run_checks(load_soul(SOULS[judge]), conversation)} for judge in VOICES}
        assert broken[speaker] == set(), speaker
        assert all(found for judge, found in broken.items() if judge != speaker), speaker
