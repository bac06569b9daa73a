"""Templates are strict both ways, and what is put into them is never read as a template."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datagen.prompting import BUILT_IN, Prompts
from soul.errors import UserError

VALUES = {
    "generate": {"soul": "SOUL"},
    "critique": {
        "soul": "SOUL",
        "request": "REQUEST",
        "reply": "REPLY",
        "known": [{"principle": "short", "why": "90 words"}],
        "principles": ["short", "warm"],
    },
    "revise": {
        "soul": "SOUL",
        "request": "REQUEST",
        "reply": "REPLY",
        "faults": [{"principle": "keeps it short.", "quote": "blah", "why": "90 words"}],
    },
    "judge": {"soul": "SOUL", "request": "REQUEST", "reply_a": "ONE", "reply_b": "TWO"},
    "repair_json": {"text": "[{", "problem": "Expecting value"},
    "reflect": {"soul": "SOUL", "topic": "TOPIC", "number": 9},
    "interact": {"soul": "SOUL", "topic": "TOPIC"},
    "ideas": {"soul": "SOUL", "name": "moss", "type": "FAQ", "domain": "DOMAIN", "principles": [{"text": "keeps it short."}], "n": 3},
    "document": {"soul": "SOUL", "name": "moss", "type": "FAQ", "domain": "DOMAIN", "idea": "IDEA"},
    "cai_critique": {"principle": "keeps it short.", "request": "REQUEST", "reply": "REPLY"},
    "cai_revise": {"principle": "keeps it short.", "request": "REQUEST", "reply": "REPLY", "critique": "CRITIQUE"},
    "compare": {
        "principle": "keeps it short.",
        "request": "REQUEST",
        "reply_a": "ONE",
        "reply_b": "TWO",
        "think": False,
        "thoughts": "THOUGHTS",
    },
    "scenario": {
        "domain": "DOMAIN",
        "language": "LANGUAGE",
        "person": "PERSON",
        "files": "3",
        "difficulty": "EASY",
        "trouble": "TROUBLE",
        "turns": ["changes their mind: wants something else"],
    },
    "project": {
        "domain": "DOMAIN",
        "language": "LANGUAGE",
        "person": "PERSON",
        "files": "3",
        "difficulty": "EASY",
        "trouble": "TROUBLE",
        "turns": ["changes their mind"],
        "request": "REQUEST",
        "later": ["LATER"],
        "done": "DONE",
    },
    "agent": {"soul": "SOUL", "tools": [{"name": "Read", "doc": "reads a file", "params": []}], "examples": ["EXAMPLE"]},
    "person": {"person": "PERSON", "done": "DONE", "talk": "TALK", "kind": "changes their mind", "about": "ABOUT"},
    "remark": {
        "soul": "SOUL",
        "before": "BEFORE",
        "text": "TEXT",
        "calls": "CALLS",
        "faults": [{"principle": "short.", "quote": "blah", "why": "90 words"}],
    },
    "remarks": {"talk": "TALK", "numbers": ["1", "2"]},
    "remarks_revise": {
        "soul": "SOUL",
        "talk": "TALK",
        "faults": [{"number": 2, "principle": "short.", "quote": "blah", "why": "90 words"}],
        "numbers": ["2"],
    },
    "repair_call": {"text": "TEXT", "problem": "PROBLEM"},
    "seeds": {"soul": "SOUL", "kind": "conflict", "principles": ["keeps it short.", "is thorough."], "n": 3, "number": 7},
}


def flat(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for item in items for text in flat(item)]


@pytest.mark.parametrize("name", VALUES)
def test_built_in_templates_carry_every_value_and_begin_with_the_soul(name):
    messages = Prompts().render(name, **VALUES[name])
    said = "\n".join(message["content"] for message in messages)
    shown = [text for text in flat(VALUES[name]) if text not in ("conflict",)]  # what only chooses among wordings
    assert [text for text in shown if text not in said] == []
    if "soul" in VALUES[name]:
        assert messages[0]["role"] == "system" and messages[0]["content"].startswith("SOUL\n")
    assert len(said) < (2500 if name in ("agent", "project", "scenario") else 1500)  # every character is paid for on every call


def test_what_chooses_among_wordings_changes_them():
    def said(name, **more):
        return Prompts().render(name, **VALUES[name] | more)[-1]["content"]

    assert len({said("reflect", number=number) for number in range(16)}) == 8
    assert len({said("seeds", number=number) for number in range(72)}) == 72
    assert len({said("seeds", kind=kind) for kind in ("on-topic", "near-miss", "conflict", "off-topic")}) == 4
    assert "single letter" in said("compare") and "single letter" not in said("compare", think=True)


def test_there_are_no_other_templates():
    assert {path.stem for path in BUILT_IN.glob("*.j2")} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_missing_or_an_extra_value_is_an_error(name):
    prompts, (first, *_) = Prompts(), VALUES[name]
    with pytest.raises(UserError, match=rf"{name}.j2: uses {first}, which this stage does not have"):
        prompts.render(name, **{k: v for k, v in VALUES[name].items() if k != first})
    with pytest.raises(UserError, match=f"{name}.j2: does not use guidance"):
        prompts.render(name, **VALUES[name], guidance="be kind")


PIECES = [*"{}%#<>/:\n \"'\\é", "{{ soul }}", "{% raw %}", "{#", "Human: ", "</request>", "\n\n", "<|im_end|>"]
NASTY = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@given(request=NASTY, reply=NASTY)
def test_values_are_inert_and_arrive_whole(request, reply):
    text = PROMPTS.render("judge", soul="s", request=request, reply_a=reply, reply_b="b")[1]["content"]
    assert f"<request>\n{request}\n</request>\n\n<reply_a>\n{reply}\n</reply_a>\n" in text


PROMPTS = Prompts()


def test_the_small_set_asks_for_one_thing_and_falls_back_for_the_rest():
    prompts = Prompts("small")
    system, user = prompts.render("revise", **VALUES["revise"])
    assert user["content"] == "REPLY" and "Mind: keeps it short. (blah) (90 words)" in system["content"] and "SOUL" not in system["content"]
    assert prompts.render("judge", **VALUES["judge"]) == PROMPTS.render("judge", **VALUES["judge"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "judge.j2").write_text("{% block user %}\n{{ soul }} {{ request }} {{ reply_a }} {{ reply_b }}\n{% endblock %}\n")
    return tmp_path


def test_a_folder_overrides_single_templates_and_changes_the_hash(folder):
    prompts = Prompts(folder)
    assert prompts.render("judge", **VALUES["judge"]) == [{"role": "user", "content": "SOUL REQUEST ONE TWO"}]
    edges = VALUES["judge"] | {"soul": "\n SOUL", "reply_b": "TWO \n\n"}
    assert prompts.render("judge", **edges)[0]["content"] == "\n SOUL REQUEST ONE TWO \n\n"
    assert prompts.render("generate", soul="SOUL") == PROMPTS.render("generate", soul="SOUL")
    assert prompts.hash != PROMPTS.hash == Prompts().hash
    copy = folder / "copy"
    shutil.copytree(BUILT_IN, copy)
    assert Prompts(copy).hash == PROMPTS.hash


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% block user %}\n{{ soul }\n{% endblock %}", r"judge.j2:2: template error"),
        ("{{ soul }}{{ request }}{{ reply_a }}{{ reply_b }}", "neither a `system` nor a `user` block"),
        ("{% block user %}{{ soul.__class__.__mro__ }}{{ request }}{{ reply_a }}{{ reply_b }}{% endblock %}", "template error"),
        ("{% block user %}{{ soul.nothing }}{{ request }}{{ reply_a }}{{ reply_b }}{% endblock %}", "template error"),
        ("{% block user %}{{ request }}{{ reply_a }}{{ reply_b }}{% endblock %}", "does not use soul"),
    ],
)
def test_a_broken_template_is_one_line_naming_the_file(folder, source, message):
    (folder / "judge.j2").write_text(source)
    with pytest.raises(UserError, match=message):
        Prompts(folder).render("judge", **VALUES["judge"])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Prompts(tmp_path / "nowhere")
