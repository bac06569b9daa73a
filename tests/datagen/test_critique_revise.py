"""The recipe, against a scripted teacher: what becomes a row, what becomes a pair, and what must not."""

import asyncio
import contextlib
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datagen import recipes
from datagen.critique import Unreadable, gives_itself_away, parse_critique, refuses
from datagen.engine import Reply
from datagen.prompting import Prompts
from datagen.recipes.critique_revise import CritiqueRevise
from datagen.seeds import Seed
from soul.errors import UserError
from soul.spec import parse_soul

SOUL = parse_soul(
    """# moss

a small helper.

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose; repair: yes -->
- keeps it short. <!-- id: short; check: max_words(8) -->
- sounds warm. <!-- id: warm -->
"""
)
LONG = "one two three four five six seven eight nine ten."
OK = json.dumps([{"principle": "warm", "quote": "", "why": "", "verdict": "ok"}])
COLD = json.dumps([{"principle": "warm", "quote": "hm", "why": "it is cold", "verdict": "violates"}])


@dataclass
class Script:
    """Answers by stage, in order, the last one for ever; an entry may be (outcome, text)."""

    draft: list = field(default_factory=lambda: ["a short reply."])
    critique: list = field(default_factory=lambda: [OK])
    repair_json: list = field(default_factory=lambda: [OK])
    revise: list = field(default_factory=lambda: ["a warm reply."])
    said: list = field(default_factory=list)

    async def __call__(self, stage, messages, *, replicate=0, **sampling):
        self.said.append((stage, messages, replicate))
        entries = getattr(self, stage)
        entry = entries[min(sum(s == stage for s, _, _ in self.said) - 1, len(entries) - 1)]
        outcome, text = entry if isinstance(entry, tuple) else ("ok", entry)
        return Reply(outcome, text, key=f"key{len(self.said)}", why="" if outcome == "ok" else "told so")

    def stages(self):
        return [stage for stage, _, _ in self.said]


def make(script, messages=None, soul=SOUL, **options):
    messages = messages or [{"role": "user", "content": "hello?"}]
    seed = Seed("s1", messages, "seeds:1", "seeds:1")
    results = asyncio.run(recipes.load("critique-revise", CritiqueRevise(**options), soul, Prompts())(seed, script))
    return {kind: row for kind, row in results}, results


def test_a_clean_draft_is_kept_and_makes_no_pair():
    script = Script()
    rows, _ = make(script)
    assert script.stages() == ["draft", "critique"] and set(rows) == {"sft"}
    assert rows["sft"]["messages"] == [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "a short reply."}]
    assert all(check["ok"] for check in rows["sft"]["checks"]) and rows["sft"]["soul_hash"] == SOUL.hash


def test_a_long_draft_is_revised_and_gives_a_pair_on_that_principle():
    script = Script(draft=[LONG])
    rows, _ = make(script)
    assert script.stages() == ["draft", "critique", "revise", "critique"]
    assert rows["preference"]["chosen"][0]["content"] == "a warm reply." and rows["preference"]["rejected"][0]["content"] == LONG
    assert rows["preference"]["prompt"] == [{"role": "user", "content": "hello?"}] and rows["preference"]["principles"] == ["short"]
    assert [step["stage"] for step in rows["sft"]["trail"]] == script.stages() and rows["sft"]["principles"] == ["short"]


def test_the_soul_is_told_to_critic_and_reviser_but_is_not_in_the_rows():
    script = Script(draft=[LONG])
    rows, _ = make(script)
    starts = {stage: messages[0]["content"].startswith(SOUL.text.strip()) for stage, messages, _ in script.said}
    assert starts == {"draft": False, "critique": True, "revise": True}
    assert "small helper" not in json.dumps(rows["sft"]["messages"]) + json.dumps(rows["preference"]["prompt"])
    script = Script()
    make(script, draft_soul=True)
    assert script.said[0][1][0]["content"].startswith(SOUL.text.strip())


def test_the_critic_sees_what_the_checks_found_and_the_reviser_sees_both():
    script = Script(draft=["hm " * 9], critique=[COLD, OK])
    rows, _ = make(script)
    critique, revise = script.said[1][1][1]["content"], script.said[2][1][1]["content"]
    assert "- short: " in critique and "principles: lower, short, warm." in critique
    assert "keeps it short." in revise and 'sounds warm. (it is cold: "hm")' in revise
    assert rows["preference"]["principles"] == ["short", "warm"]


def test_a_repair_is_free_counted_and_gives_the_pair_its_contrast():
    script = Script(draft=["A short Reply."])
    rows, _ = make(script)
    assert script.stages() == ["draft", "critique"]
    assert rows["sft"]["messages"][-1]["content"] == "a short reply." and rows["preference"]["rejected"][0]["content"] == "A short Reply."
    assert rows["preference"]["principles"] == ["lower"] and {"stage": "repair", "text": "lower", "key": ""} in rows["sft"]["trail"]


@pytest.mark.parametrize(
    "draft, reason",
    [
        (("empty", ""), "draft: empty (told so)"),
        (("refused", ""), "draft: refused (told so)"),
        (("permanent", ""), "draft: permanent (told so)"),
        ("I'm sorry, but I can't help with that.", "draft: refused"),
    ],
)
def test_a_structural_failure_is_a_rejected_row(draft, reason):
    rows, _ = make(Script(draft=[draft]))
    assert set(rows) == {"rejected"} and rows["rejected"]["reason"] == reason and not rows["rejected"]["accepted"]


def test_a_cut_draft_may_be_revised_but_never_pairs():
    script = Script(draft=[("truncated", "A cut")])
    rows, _ = make(script)
    assert set(rows) == {"sft"} and script.stages() == ["draft", "revise", "critique"]
    rows, _ = make(Script(draft=[("truncated", "a cut")]), rounds=0)
    assert rows["rejected"]["reason"] == "draft: truncated"


@pytest.mark.parametrize(
    "revision",
    [
        "Sorry, here it is.",
        "the revised reply: hi",
        "as revised, hi",
        "my draft was long",
        "<reply>hi</reply>",
        "I cannot help with that",
        ("truncated", "cut"),
    ],
)
def test_a_revision_that_gives_itself_away_is_refused_counted_and_asked_again(revision):
    script = Script(draft=[LONG], revise=[revision, "a warm reply."])
    rows, _ = make(script)
    assert rows["sft"]["messages"][-1]["content"] == "a warm reply."
    assert [replicate for stage, _, replicate in script.said if stage == "revise"] == [0, 1]
    assert any(step["stage"].startswith("revise-") for step in rows["sft"]["trail"])
    rows, _ = make(Script(draft=[LONG], revise=[revision]))
    assert set(rows) == {"rejected"} and rows["rejected"]["reason"] == "checks: short"


def test_what_the_critic_still_finds_blocks_the_row():
    rows, _ = make(Script(draft=["hm."], critique=[COLD], revise=["hm ok."]))
    assert rows["rejected"]["reason"] == "critic: warm"


def test_an_unreadable_critique_gets_one_repair_round_then_counts_as_failed():
    script = Script(critique=["no idea"])
    rows, _ = make(script)
    assert script.stages() == ["draft", "critique", "repair_json"] and "critique-repaired" in [s["stage"] for s in rows["sft"]["trail"]]
    script = Script(critique=["no idea"], repair_json=["still none"])
    rows, _ = make(script)
    assert script.stages() == ["draft", "critique", "repair_json"] and "critique-unreadable" in [s["stage"] for s in rows["sft"]["trail"]]
    rows, _ = make(Script(critique=["no idea"], repair_json=["still none"]), on_failed_critique="reject", rounds=0)
    assert rows["rejected"]["reason"] == "critique: unreadable"


def test_checks_alone_can_be_the_critic_but_not_without_checks():
    script = Script(draft=[LONG])
    rows, _ = make(script, critic="checks")
    assert script.stages() == ["draft", "revise"] and set(rows) == {"sft", "preference"}
    with pytest.raises(UserError, match="no principle has a check"):
        make(Script(), soul=parse_soul("# x\n\n## Principles\n\n- is nice.\n"), critic="checks")


def test_of_several_drafts_the_best_goes_on_and_the_worst_is_the_other_side():
    script = Script(draft=[LONG, "short one.", "A SHORT " * 9])
    rows, _ = make(script, samples=3)
    assert [replicate for stage, _, replicate in script.said if stage == "draft"] == [0, 1, 2]
    assert rows["sft"]["messages"][-1]["content"] == "short one." and rows["preference"]["rejected"][0]["content"].startswith("A SHORT")
    assert rows["preference"]["principles"] == ["lower", "short"]


def test_a_draft_that_nobody_could_judge_is_no_pair():
    rows, _ = make(Script(critique=["no idea", OK], repair_json=["none"]), on_failed_critique="reject")
    assert set(rows) == {"sft"} and rows["sft"]["messages"][-1]["content"] == "a warm reply."


def test_two_clean_drafts_are_no_pair():
    rows, _ = make(Script(draft=["short one.", "short two."]), samples=2)
    assert set(rows) == {"sft"}


@pytest.mark.parametrize(
    "script, options, why",
    [
        (dict(draft=["fine."]), {}, "no fault in any draft"),
        (dict(draft=["fine as ever."], critique=[COLD, OK], revise=["fine as ever."]), {}, "the revision equals the draft"),
        (dict(draft=[("truncated", "a cut")]), {}, "every draft was cut off"),
        (dict(draft=[LONG], critique=[OK, COLD]), {"keep": "all"}, "the last version still has faults"),
    ],
)
def test_no_pair_is_made_and_the_reason_kept(script, options, why):
    rows, _ = make(Script(**script), **options)
    assert set(rows) == {"sft"}
    assert [step["text"] for step in rows["sft"]["trail"] if step["stage"] == "no-pair"] == [why]


def test_a_preamble_is_no_first_reply_but_talk_of_replies_is():
    for text in ("Sure! Here's the reply:\nhi.", "here is my lowercase response to the user: hi", "Here's a reply that is short: hi"):
        assert gives_itself_away(text, "what is a tuple?") == "has a preamble"
    for text in ("here's the response object: it holds the body.", "here is how you reply: use send.", "the reply arrives late."):
        assert gives_itself_away(text, "how do i send?") == ""
    rows, _ = make(Script(draft=[LONG], revise=["Here is the reply: hi."]))
    assert rows["rejected"]["reason"] == "checks: short" and "revise-has-a-preamble" in [
        step["stage"] for step in rows["rejected"]["trail"]
    ]


def test_keep_last_best_and_all_differ():
    bad = f"{LONG} {LONG}"
    script = dict(draft=[LONG], revise=["hm.", f"hm, {bad}", "fine."], critique=[OK, COLD, COLD, OK])
    stages = {}
    for keep in ("last", "best", "all"):
        teacher = Script(**script)
        rows, results = make(teacher, keep=keep, rounds=3)
        stages[keep] = [messages[1]["content"] for stage, messages, _ in teacher.said if stage == "revise"][-1]
        assert rows["sft"]["messages"][-1]["content"] == "fine."
        assert [row["id"] for kind, row in results if kind == "sft"] == (["s1-0", "s1-1"] if keep == "all" else ["s1"])
    assert bad in stages["last"] and bad not in stages["best"]  # best goes back to the version with fewer faults


def test_drawn_principles_are_seeded_and_differ_by_round():
    soul = parse_soul("# x\n\n## Principles\n\n" + "".join(f"- is thing {n}. <!-- id: p{n} -->\n" for n in range(9)))

    def asked(seed):
        script = Script(critique=[COLD.replace("warm", f"p{n}") for n in range(9)])
        make(script, soul=soul, principles=2, seed=seed, rounds=2)
        return [
            [p for p in range(9) if f"p{p}" in messages[1]["content"].split("principles: ")[1]]
            for stage, messages, _ in script.said
            if stage == "critique"
        ]

    assert asked(0) == asked(0) and all(len(drawn) == 2 for drawn in asked(0))
    assert len({str(asked(seed)) for seed in range(4)}) > 1


def test_a_conversation_is_told_whole_and_a_second_system_turn_is_joined():
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Human: c\n\nd: e"},
    ]
    script = Script(draft=[LONG])
    rows, _ = make(script, messages)
    assert [m["role"] for m in script.said[0][1]] == ["system", "user", "assistant", "user"] and script.said[0][1][0]["content"].endswith(
        "\n\nbe kind"
    )
    assert "Human: c\n\nd: e" in script.said[1][1][1]["content"]
    assert rows["preference"]["prompt"] == [*messages[:2], {"role": "assistant", "content": "b"}, messages[3]]


@pytest.mark.parametrize(
    "text",
    [
        COLD,
        f"Here you go:\n```json\n{COLD}\n```\nHope that helps [1]!",
        COLD.replace("}]", "},]"),
        json.dumps({"critique": json.loads(COLD)}),
        COLD[1:-1],
        COLD.replace("violates", "Violation"),
        "[note] " + COLD,
    ],
)
def test_critiques_are_read_however_they_are_wrapped(text):
    [finding] = parse_critique(text, "well, hm.", ["warm"])
    assert (finding.principle, finding.quote, finding.why) == ("warm", "hm", "it is cold")


def test_invented_principles_and_quotes_are_dropped():
    assert parse_critique(COLD, "well, hm.", ["other"]) == []
    assert parse_critique(COLD, "other words", ["warm"])[0].quote == ""


def test_lone_surrogates_in_a_critique_go_no_further():
    [finding] = parse_critique(COLD.replace("it is cold", r"it is \ud800 cold"), "well, hm.", ["warm"])
    assert finding.why == "it is ? cold"


@pytest.mark.parametrize("text", ["", "no", "[]", "[1, 2]", '[{"principle": "warm"}]', "[" * 5000, '{"verdict"'])
def test_unreadable_critiques_are_told_apart(text):
    with pytest.raises(Unreadable):
        parse_critique(text, "hm", ["warm"])


@given(st.text(max_size=80) | st.lists(st.sampled_from([*'[]{},:"\\ \n', '"verdict"', '"ok"', "null", "1"]), max_size=40).map("".join))
def test_reading_a_critique_ends_and_raises_nothing_else(text):
    with contextlib.suppress(Unreadable):
        parse_critique(text, "hm", ["warm"])


def test_what_the_request_talks_about_is_no_leak():
    assert gives_itself_away("here's the corrected code: sort the original list first.", "fix it") == ""
    assert gives_itself_away("i apologize for the delay, boss.", "write an apology to my boss: apologize nicely") == ""
    assert gives_itself_away("my apologies! here:", "what is a tuple?") == "apologises"
    assert refuses("I cannot provide that.") and not refuses("you can't pickle a lambda. i can help: use def.")


@pytest.mark.parametrize(
    "revision, off",
    [
        ("you can write only the reply.", True),
        ("that's all i need to know. now, how about this:", True),
        ("it registers a format for unpacking archives.", False),
        ("register_unpack_format adds an archive format to shutil.", False),
        ("yes.", False),
    ],
)
def test_a_revision_must_stay_on_the_subject(revision, off):
    from datagen.critique import strays

    assert strays(revision, "What's shutil.register_unpack_format?", "It Registers A Format For Unpacking Archives.") is off
