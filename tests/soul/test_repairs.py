"""Repairs: what they change, what they must leave, and that repairing is idempotent and never makes things worse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soul.checks import CHECKS
from soul.conversation import assistant, tool, tool_call, user
from soul.prose import CODE, mask
from soul.repairs import REPAIRS
from soul.spec import check_table, parse_soul, repair, run_checks


def soul_of(*checks, repairs="yes"):
    return parse_soul(
        "## Rules\n" + "\n".join(f"- p{i} <!-- id: p{i}; check: {check}; repair: {repairs} -->" for i, check in enumerate(checks))
    )


CASES = [
    ("lowercase_prose", "I read `README.md` and README.md. HTTPServer is JSON.", "i read `README.md` and README.md. HTTPServer is json."),
    ("lowercase_prose", "So:\n\n```python\nclass Foo: pass\n```\nDone, İ.", "so:\n\n```python\nclass Foo: pass\n```\ndone, i̇."),
    ("sentence_case", "it fails. `foo` does. then\n\n- it stops", "It fails. `foo` does. Then\n\n- It stops"),
    ("no_apology", "I'm sorry about that. The loop is fixed.", "The loop is fixed."),
    ("no_apology", "the loop is fixed. sorry!\n\nit runs now.", "the loop is fixed. \n\nit runs now."),
    ("no_apology", "sorry about that.\n```py\nx = 1\n```", "```py\nx = 1\n```"),
    ("no_apology", "sorry about that.", "sorry about that."),  # nothing would remain
    ("no_sycophancy", "great question! it's a loop.", "it's a loop."),
    ("no_offer", "done.\n\nlet me know if you need more.", "done."),
    ("no_filler_opening", "Sure! Certainly, here it is.", "here it is."),
    ("no_question_in_final_turn", "it's `x?` now. does that help?", "it's `x?` now."),
    ("no_emoji", "done 🎉! 👍🏽 and ❤️ `🎉`", "done! and `🎉`"),
    ("no_exclamation", "done!! a != b. what?! `x!`", "done. a != b. what? `x!`"),
    (
        "contractions",
        "I do not know. It is a loop; you will not see `do not`. CANNOT",
        "I don't know. It's a loop; you won't see `do not`. CAN'T",
    ),
    (
        "no_contractions",
        "I don't. It's been fine, and we’re done. Can't? Won't. Let's go; that's it",
        "I do not. It has been fine, and we are done. Cannot? Will not. Let us go; that is it",
    ),
    ("no_contractions", "he'd go", "he'd go"),  # had or would: left alone
    (
        "code_fence_language",
        "x\n```\nimport os\n```\n~~~\ndef f(): pass\n~~~",
        "x\n```python\nimport os\n```\n~~~python\ndef f(): pass\n~~~",
    ),
    ("code_fence_language", "```\nls -la\n```", "```\nls -la\n```"),
]


@pytest.mark.parametrize("check, before, after", CASES)
def test_repairs(check, before, after):
    soul = soul_of(check)
    messages = [user("Sorry! Do not?"), assistant(before)]
    result, ids = repair(soul, messages)
    assert result[1]["content"] == after and result[0] == messages[0]
    assert ids == (["p0"] if before != after else [])
    assert messages[1]["content"] == before  # the caller's messages are not touched


def test_every_repair_is_tested():
    assert {check for check, _, _ in CASES} == set(REPAIRS)
    assert set(REPAIRS) <= set(CHECKS)


def test_only_where_the_soul_asks():
    messages = [assistant("Hello")]
    assert repair(soul_of("lowercase_prose", repairs="no"), messages) == (messages, [])
    mixed = parse_soul("## Rules\n- a <!-- id: a; check: lowercase_prose; check: max_words(1); repair: yes -->")
    assert [call.repair for call in mixed.principles[0].checks] == [True, False]


def test_calls_results_and_extra_keys_survive():
    call = tool_call("Edit", file_path="A.py", old_string="I do not", new_string="X")
    messages = [assistant("I edit A.py", call) | {"extra": 1}, tool("Sorry! I do not"), assistant("Done")]
    result, ids = repair(soul_of("lowercase_prose"), messages)
    assert [m["content"] for m in result] == ["i edit A.py", "Sorry! I do not", "done"] and ids == ["p0"]
    assert result[0]["tool_calls"] == [call] and result[0]["extra"] == 1


def test_a_repair_never_breaks_another_principle():
    soul = parse_soul("## Rules\n- a <!-- id: a; check: no_apology; repair: yes -->\n- b <!-- id: b; check: min_words(4) -->")
    messages = [assistant("sorry about that. done now.")]
    assert repair(soul, messages) == (messages, [])
    fought = soul_of("contractions", "no_contractions")
    assert repair(fought, [assistant("a loop, do not worry")])[1] == []


def test_several_repairs_work_together():
    soul = soul_of("lowercase_prose", "contractions", "no_apology", "no_exclamation", "no_offer")
    text = "Sorry about that! I do not see `Foo`! It is in src/Foo.py. Let me know if it works!"
    result, ids = repair(soul, [assistant(text)])
    assert result[0]["content"] == "i don't see `Foo`. it's in src/Foo.py." and ids == ["p0", "p1", "p2", "p3", "p4"]
    assert run_checks(soul, result) == []


def test_check_table_has_a_row_for_every_check():
    soul = parse_soul("## Rules\n- a <!-- id: a; check: lowercase_prose; check: no_emoji -->\n- b <!-- id: b -->")
    assert check_table(soul, [assistant("Hi Ho")]) == [
        {"principle": "a", "check": "lowercase_prose", "ok": False, "message_index": 0, "start": 0, "end": 2, "why": '"Hi" has a capital'},
        {"principle": "a", "check": "lowercase_prose", "ok": False, "message_index": 0, "start": 3, "end": 5, "why": '"Ho" has a capital'},
        {"principle": "a", "check": "no_emoji", "ok": True, "message_index": -1, "start": 0, "end": 0, "why": ""},
    ]


scraps = st.sampled_from(
    [
        "Sorry. ",
        "great question! ",
        "I am here. ",
        "do not ",
        "it's ",
        "README.md ",
        "`Code` ",
        "```\nimport os\n```\n",
        "\n\n",
        "- ",
        "🎉",
        " ok? ",
        "!",
        "let me know ",
        "sure, ",
        "İ",
        "iſ here ",
        "it İs x",
        "\ud800",
        "don’t ",
    ]
)
texts = st.lists(st.one_of(scraps, st.text(max_size=6)), min_size=1, max_size=10).map("".join)


@pytest.mark.parametrize("name", REPAIRS)
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_repaired_or_unchanged_and_idempotent(name, text):
    soul = soul_of(name)
    once, ids = repair(soul, [assistant(text)])
    assert (run_checks(soul, once) == []) if ids else (once == [assistant(text)])
    assert repair(soul, once) == (once, [])


@given(texts)
@settings(max_examples=60, deadline=None)
def test_all_repairs_together_are_idempotent_and_keep_code(text):
    soul = soul_of(*(name for name in REPAIRS if name not in ("sentence_case", "no_contractions", "code_fence_language")))
    once, _ = repair(soul, [assistant(text)])
    assert repair(soul, once) == (once, [])
    before, after = run_checks(soul, [assistant(text)]), run_checks(soul, once)
    assert {v.check for v in after} <= {v.check for v in before}


@given(texts)
@settings(max_examples=100, deadline=None)
def test_lowercasing_leaves_code_alone(text):
    repaired = REPAIRS["lowercase_prose"](text)
    code = "".join(c for c, m in zip(text, mask(text)) if m == CODE)
    assert "".join(c for c in repaired.replace("\u0307", "") if c in code) or not code
    if "İ" not in text:
        assert all(a == b for a, b, m in zip(text, repaired, mask(text)) if m in (CODE, "\n"))
