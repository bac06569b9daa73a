import random
from pathlib import Path

import pytest

from datagen.code_changes import Unsuitable
from datagen.code_seeds import is_held_out, read_code
from datagen.phrases import REMARKS, REQUESTS, SMALL_TALK, TALK, Voice
from datagen.rollouts import judged, speak
from datagen.talk import QUESTIONS, asked, held_out_talk, said, talk
from soul.conversation import assistant
from soul.spec import load_soul, parse_soul, repair, run_checks

ROOT = Path(__file__).parents[2]
SOULS = [ROOT / "soul" / "SOUL.md", *sorted((ROOT / "soul" / "examples").glob("*.md"))]


def key(text):
    return "".join(sorted(text.casefold().rstrip(".?!")))  # a typing slip only moves letters


def test_training_and_evals_share_no_wording_and_no_question():
    assert not set(asked(False)) & set(asked(True)) and {*asked(False), *asked(True)} == set(QUESTIONS)
    assert not set(said(False)) & set(said(True)) and {kind for _, kind in said(False)} == set(SMALL_TALK)
    assert len({text for kind in SMALL_TALK for text in REQUESTS[kind]}) == len(said(False)) + len(said(True))
    trained = {key(talk(random.Random(i)).request) for i in range(3000)}
    held = [key(row["prompt"]) for row in held_out_talk([], 75)]
    assert len(held) == len(set(held)) == len(asked(True)) + len(said(True)) and trained.isdisjoint(held)


def test_held_out_talk_is_a_third_of_each_kind_and_repeatable():
    functions = [f for f in read_code("package:email") if is_held_out(f.module.name)]
    rows = held_out_talk(functions, 25)
    assert [sum(row["kind"] == kind for row in rows) for kind in ("about code", "question", "small talk")] == [9, 8, 8]
    assert rows == held_out_talk(functions, 25) != held_out_talk(functions, 25, seed=1)
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 25
    assert held_out_talk(functions, 0) == []


@pytest.mark.parametrize("path", SOULS, ids=lambda path: path.stem)
def test_every_soul_has_its_own_talk(path):
    voice = Voice(load_soul(path))
    for kind, situation in SMALL_TALK.items():
        assert len(voice.pools[situation][2]) >= 4, (kind, situation)
    assert len({voice.pools[situation][0] for situation in TALK}) == 1  # one voice, also for answers
    done = 0
    for i in range(200):
        task = talk(random.Random(i))
        try:
            messages, _ = speak(task, [], voice, random.Random(i))
        except Unsuitable as why:  # an answer may have a word that this SOUL forbids; then the row is dropped
            assert task.steps[0].situation == "told" and "breaks the SOUL" in str(why)
            continue
        assert len(messages) == 2 and not run_checks(voice.soul, messages) and "{" not in messages[1]["content"]
        done += 1
    assert done >= 190


def test_a_question_is_answered_in_the_voice_of_the_soul():
    told = {"core": QUESTIONS["who invented python?"]}
    for path, want in zip(
        SOULS,
        (
            "guido van rossum, around 1990.",
            "Arr, Guido van Rossum",
            "Guido van Rossum, around 1990.",
            "Guido van Rossum, around 1990. Verdict: ",
        ),
        strict=True,
    ):
        voice = Voice(load_soul(path))
        replies = [voice.say(random.Random(i), "told", told) for i in range(20)]
        assert any(want in repair(voice.soul, [assistant(reply)])[0][0]["content"] for reply in replies), replies
        assert all("uido" in reply and ".," not in reply for reply in replies)
    plain = Voice(load_soul(ROOT / "soul" / "examples" / "plain.md"))
    assert plain.say(random.Random(0), "told", {"core": QUESTIONS["how many legs does a spider have?"]}) == "Eight."
    assert all(isinstance(text, str) and "{" not in text and not text.endswith(("?", "!")) for text in QUESTIONS.values())


def test_the_agent_knows_its_name_and_its_tools():
    voice = Voice(parse_soul("---\nname: Juno\ntools: [Read, Grep]\n---\n# Juno\n\nkind.\n\n## principles\n\n- is kind.\n"))
    assert all("Juno" in voice.say(random.Random(i), "named", {}) for i in range(20))
    told = [voice.say(random.Random(i), "tools", {}) for i in range(40)]
    assert sum("`Read` and `Grep`" in text for text in told) > 20 and not any("`." in text.replace("`Grep`", "") for text in told)
    assert not any("Edit" in voice.say(random.Random(i), situation, {}) for i in range(20) for situation in SMALL_TALK.values())
    bare = Voice(parse_soul("---\nname: Juno\ntools: []\n---\n# Juno\n\nkind.\n\n## principles\n\n- is kind.\n"))
    replies = [bare.say(random.Random(i), situation, {}) for i in range(20) for situation in SMALL_TALK.values()]
    assert not [reply for reply in replies if "  " in reply or " ." in reply or " ," in reply or reply.endswith("with.")]
    shouting = Voice(
        parse_soul("---\nname: Mr. Loud\n---\n# x\n\n## principles\n\n- lowercase. <!-- check: lowercase_prose; repair: yes -->\n")
    )
    task = next(task for task in map(lambda i: talk(random.Random(i)), range(99)) if task.steps[0].situation == "named")
    assert "mr. loud" in speak(task, [], shouting, random.Random(0))[0][1]["content"]


def test_a_search_for_a_greeting_loses():
    voice, found = Voice(load_soul(SOULS[0])), []
    for i in range(200):
        task = talk(random.Random(i))
        messages, _ = speak(task, [], voice, random.Random(i))
        reason, contrast = judged(task, messages, voice, random.Random(f"judge {i}"))
        assert reason == "needless_call"
        if contrast:
            (prompt, chosen, rejected, _) = contrast
            assert prompt == messages[:1] and chosen == messages[1] and not chosen.get("tool_calls")
            (call,) = rejected["tool_calls"]
            assert call["function"]["name"] == "Grep"
            found.append(call)
    assert 15 < len(found) < 60


def test_remarks_of_small_talk_say_nothing_that_the_agent_cannot_keep():
    assert not [text for situation in SMALL_TALK.values() for text in REMARKS[situation] if "?" in text or "!" in text]
