"""What an edit of SOUL.md touches: only the rows in which the edited principle was at work."""

import pytest

from datagen.journal import Row
from datagen.since import check_same_setup, counted, edit_of, marked, soul_facts, split, touched
from soul import conversation as c
from soul.errors import UserError
from soul.spec import parse_soul

SOUL = """# moss

a calm voice.

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose -->
- at most ten words. <!-- id: short; check: max_words(10) -->
- is warm. <!-- id: warm -->
"""


def row(name, text="all calm here.", principles=(), critique="", reason="", status="finished"):
    trail = [{"stage": "critique", "text": critique, "key": ""}] if critique else []
    kind = "rejected" if reason else "sft"
    result = {"id": name, "messages": [c.user("hi"), c.assistant(text)], "principles": list(principles), "trail": trail, "reason": reason}
    return Row(name, status, [[kind, result]])


ROWS = [
    row("plain"),
    row("revised", principles=["short"]),
    row("judged", critique='[{"principle": "warm", "verdict": "ok"}]'),
    row("judged elsewhere", critique='[{"principle": "kind", "verdict": "ok"}]'),
    row("long", text="this one has a few more words than that."),
    row("blocked", reason="checks: lower, short"),
    row("failed", status="failed"),
]


def again(edited):
    before, after = parse_soul(SOUL), parse_soul(edited)
    kept, stale = split(ROWS, edit_of(soul_facts(before), after), after)
    assert sorted([*kept, *stale]) == sorted(r.row_id for r in ROWS)
    return stale


def test_no_edit_touches_only_what_never_finished():
    assert again(SOUL) == {"failed": "not finished"}


def test_an_edit_of_the_voice_touches_everything():
    assert set(again(SOUL.replace("calm", "loud")).values()) == {"voice"}


def test_an_edited_check_touches_what_it_moved_and_what_fails_it_now():
    stale = again(SOUL.replace("max_words(10)", "max_words(8)"))
    assert stale == {
        "revised": "revised for short", "long": "now fails short", "blocked": "revised for short", "failed": "not finished",
    }  # fmt: skip


def test_an_edited_principle_without_a_check_touches_what_a_critic_judged_on_it():
    stale = again(SOUL.replace("is warm.", "is very warm."))
    assert stale == {"judged": "critic must judge warm", "failed": "not finished"}


def test_a_new_principle_is_run_where_it_has_a_check_and_judged_where_it_has_none():
    assert set(again(SOUL + '- never says few. <!-- id: few; check: forbid("few") -->\n')) == {"long", "failed"}
    assert set(again(SOUL + "- is funny. <!-- id: funny -->\n")) == {"judged", "judged elsewhere", "failed"}


def test_a_removed_principle_touches_only_what_it_moved():
    stale = again(SOUL.replace("- at most ten words. <!-- id: short; check: max_words(10) -->\n", ""))
    assert set(stale) == {"revised", "blocked", "failed"}


def test_an_edit_says_what_it_is_and_counts_why():
    soul = parse_soul(SOUL)
    edit = edit_of(soul_facts(soul), parse_soul(SOUL.replace("is warm.", "is cosy.") + "- is funny. <!-- id: funny -->\n"))
    assert str(edit) == "changed: warm; added: funny"
    assert str(edit_of(soul_facts(soul), soul)) == "nothing changed"
    assert counted({"a": "x", "b": "x", "c": "y"}) == ["2 rows: x", "1 rows: y"]


def test_kept_rows_say_where_they_came_from_and_are_not_changed_otherwise():
    ((kind, result),) = marked(ROWS[1], "runs/old", "0123456789abcdef")
    assert kind == "sft" and result["trail"][-1] == {"stage": "kept", "text": "from runs/old, made under SOUL 0123456789ab", "key": ""}
    assert result | {"trail": []} == ROWS[1].results[0][1]
    assert touched(ROWS[1], edit_of(soul_facts(parse_soul(SOUL)), parse_soul(SOUL)), parse_soul(SOUL)) == ""


def test_a_run_under_other_settings_is_not_kept_from():
    check_same_setup({"teacher": "a", "prompts": "b"}, {"teacher": "a", "prompts": "b"}, "runs/old")
    with pytest.raises(UserError, match=r"runs/old.*another prompts, teacher"):
        check_same_setup({"teacher": "a", "prompts": "b"}, {"teacher": "x", "prompts": "y"}, "runs/old")
