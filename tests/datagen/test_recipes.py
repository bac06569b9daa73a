"""The other recipes, against a scripted teacher: what becomes a row, what becomes a pair, and why not."""

import asyncio
import contextlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datagen import recipes
from datagen.critique import Unreadable, ask_judge, parse_list, parse_verdict
from datagen.engine import Reply
from datagen.prompting import Prompts
from datagen.recipes.best_of import BestOf
from datagen.recipes.cai import Cai, probability_of_a
from datagen.recipes.distill import Distill
from datagen.recipes.docs import Docs
from datagen.recipes.introspect import Introspect
from datagen.seeds import Seed
from soul.errors import UserError
from soul.files import canonical_json, sha256_json
from soul.rows import schema
from soul.spec import parse_soul

SOUL = parse_soul(
    """# moss

a small helper.

## Principles

- writes in lowercase. <!-- id: lower; check: lowercase_prose -->
- keeps it short. <!-- id: short; check: max_words(8) -->
- sounds warm. <!-- id: warm -->
"""
)
UNCHECKED = parse_soul("# moss\n\na small helper.\n\n## Principles\n\n- is kind. <!-- id: kind -->\n- is calm. <!-- id: calm -->\n")
REPAIRED = parse_soul("# moss\n\na small helper.\n\n## Principles\n\n- is low. <!-- id: low; check: lowercase_prose; repair: yes -->\n")
LONG = "one two three four five six seven eight nine ten."


class Teacher:
    """Answers by stage: a text, (outcome, text), a Reply, or a function of (messages, replicate, role) that gives one."""

    def __init__(self, **by_stage):
        self.by_stage, self.said = by_stage, []

    async def __call__(self, stage, messages, *, role="teacher", replicate=0, **sampling):
        await asyncio.sleep(0)
        self.said.append((stage, role, replicate, messages, sampling))
        answer = self.by_stage[stage]
        answer = answer(messages, replicate, role) if callable(answer) else answer
        outcome, text = answer if isinstance(answer, tuple) else ("ok", answer)
        return text if isinstance(text, Reply) else Reply(outcome, text, key=f"key{len(self.said)}")

    def stages(self):
        return [stage for stage, *_ in self.said]


def make(name, teacher, options=None, soul=SOUL, prompt="hello?", source="seeds:1"):
    seed = Seed("s1", [{"role": "user", "content": prompt}], source, "seeds:1")
    results = asyncio.run(recipes.load(name, options, soul, Prompts())(seed, teacher))
    assert recipes.what_is_wrong(results) == ""
    assert all(set(row) <= set(schema(kind).names) for kind, row in results)
    for kind, row in results:  # the SOUL is in no row that talks
        assert kind == "docs" or "small helper" not in json.dumps([row.get("messages"), row.get("prompt")])
    return results


def by_kind(results):
    return {kind: row for kind, row in results}


def why_no_pair(results):
    return [step["text"] for step in results[0][1]["trail"] if step["stage"] == "no-pair"]


def verdict(word):
    return json.dumps({"why": "because", "verdict": word})


def prefers(text):
    """A judge that always finds the reply with `text` in it closer."""
    return lambda messages, replicate, role: verdict(
        "a" if text in re.search("(?s)<reply_a>(.*)</reply_a>", messages[1]["content"])[1] else "b"
    )


EVERY = {
    "distill": (dict(distill="a short reply.", student="another one.", judge=prefers("short")), Distill(judge=True)),
    "best-of": (dict(sample=lambda m, n, r: f"reply {n}.", judge=prefers("reply 2")), BestOf(n=4)),
    "introspect": (dict(reflect=lambda m, n, r: f"Number {n}.", interact=lambda m, n, r: f"turn {n}."), Introspect()),
    "docs": (dict(ideas='["first", "second"]', document="moss is brief. " * 40), Docs()),
    "cai": (dict(answer=lambda m, n, r: f"a reply {n}.", critique="hm", revise=lambda m, n, r: f"a reply, new {n}.", think="so",
                 compare=lambda m, n, r: "A" if "reply 0" in m[1]["content"].split("</reply_a>")[0] else "B"), Cai(think=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_the_order_in_which_answers_come_changes_nothing(name):
    script, options = EVERY[name]
    results = []
    for number in range(6):
        rng, teacher = random.Random(number), Teacher(**script)

        async def late(stage, messages, rng=rng, teacher=teacher, **more):
            for _ in range(rng.randrange(9)):
                await asyncio.sleep(0)
            reply = await teacher(stage, messages, **more)
            return replace(reply, key=sha256_json([stage, messages, more.get("replicate", 0)]))

        results.append(canonical_json(make(name, late, options)))
    assert len(set(results)) == 1 and '"reason":""' in results[0]


# --- the judge


def judged(answer, replies=("one", "two")):
    told = {"soul": SOUL.text, "request": "hello?", "replies": replies, "max_tokens": 9}
    teacher = Teacher(judge=answer)
    return asyncio.run(ask_judge(teacher, Prompts(), **told)), teacher


def test_a_judge_is_asked_in_both_orders_and_must_agree_with_itself():
    (winner, why, steps), teacher = judged(prefers("two"))
    assert (winner, why) == (1, "") and len(steps) == 2
    shown = [messages[1]["content"] for _, _, _, messages, _ in teacher.said]
    assert shown[0].index("one") < shown[0].index("two") and shown[1].index("one") > shown[1].index("two")
    assert {role for _, role, *_ in teacher.said} == {"judge"}
    assert judged(prefers("one"))[0][0] == 0
    assert judged(verdict("a"))[0][:2] == judged(verdict("b"))[0][:2] == (None, "judge: swap disagrees")
    assert judged(verdict("tie"))[0][:2] == (None, "judge: tie")
    assert judged("no idea")[0][:2] == (None, "judge: unreadable")
    half = lambda messages, *_: verdict("tie" if messages[1]["content"].index("one") < messages[1]["content"].index("two") else "a")  # noqa: E731
    assert judged(half)[0][:2] == (None, "judge: swap disagrees")


def test_apologies_are_taken_out_before_judging():
    (winner, _, _), teacher = judged(prefers("use a list."), ("I'm so sorry about that. use a set.", "use a list."))
    assert winner == 1 and "sorry" not in json.dumps([messages for *_, messages, _ in teacher.said])
    (winner, why, _), teacher = judged(verdict("a"), ("My apologies. use a set.", "use a set."))
    assert (winner, why, teacher.said) == (None, "judge: nothing to tell apart", [])


@pytest.mark.parametrize("text, word", [
    (verdict("a"), "a"), (verdict("Reply_B"), "b"), (verdict("TIE."), "tie"), (f"```json\n{verdict('b')}\n```", "b"),
    ('{"why": "x", "verdict": "(a)",}', "a"), (f"[1] so {verdict('b')}", "b"),
])  # fmt: skip
def test_verdicts_are_read_however_they_are_wrapped(text, word):
    assert parse_verdict(text) == word


@pytest.mark.parametrize("text", ["", "a", "[]", '{"verdict": "ab"}', '{"verdict": "neither"}', '{"verdict": "a"', "[" * 9000])
def test_an_unreadable_verdict_is_no_verdict(text):
    with pytest.raises(Unreadable):
        parse_verdict(text)


@pytest.mark.parametrize("text, found", [
    ('["x: y", "z"]', ["x: y", "z"]), ('{"items": ["x", "x", " "]}', ["x"]), ("Sure:\n1. one\n2) two", ["one", "two"]),
    ('- "one"\n- two\n', ["one", "two"]), ('```\n["a [1] b",]\n```', ["a [1] b"]), ('[{"n": 1, "request": "x"}, 3, {}]', ["x"]), (r'["\ud800 \ud83d\ude00"]', ["? 😀"]),
])  # fmt: skip
def test_lists_are_read_however_they_are_written(text, found):
    assert parse_list(text) == found


@given(st.text(max_size=60) | st.lists(st.sampled_from([*'[]{},:"\\ \n-1.', '"verdict"', '"a"', "null"]), max_size=40).map("".join))
def test_reading_verdicts_and_lists_ends_and_raises_nothing_else(text):
    for read in (parse_verdict, parse_list):
        with contextlib.suppress(Unreadable):
            assert read(text)


# --- distill


def test_distill_pairs_the_souls_answer_with_the_students_plain_one():
    teacher = Teacher(distill="a short reply.", student="A Loud Reply.")
    rows = by_kind(make("distill", teacher))
    assert set(rows) == {"sft", "preference"} and rows["preference"]["principles"] == ["lower"]
    assert (rows["preference"]["chosen"][0]["content"], rows["preference"]["rejected"][0]["content"]) == ("a short reply.", "A Loud Reply.")
    told = {stage: (role, "small helper" in json.dumps(messages)) for stage, role, _, messages, _ in teacher.said}
    assert told == {"distill": ("teacher", True), "student": ("student", False)}


@pytest.mark.parametrize(
    "student, why",
    [
        ("a short reply.", "the answers are equal"),
        ("another short one.", "the checks do not tell the answers apart"),
        (("truncated", "a cut"), "student: truncated"),
        ("I can't help with that.", "student: refused"),
    ],
)
def test_distill_makes_no_pair_without_a_difference(student, why):
    results = make("distill", Teacher(distill="a short reply.", student=student))
    assert set(by_kind(results)) == {"sft"} and why_no_pair(results) == [why]


@pytest.mark.parametrize(
    "answer, reason",
    [
        (LONG, "checks: short"),
        ("", "distill: empty"),
        (("truncated", "x"), "distill: truncated"),
        ("as [lower] says, hi.", "distill: recites the rules"),
    ],
)
def test_distill_rejects_what_does_not_keep_the_soul(answer, reason):
    [[kind, row]] = make("distill", Teacher(distill=answer, student="hm"))
    assert (kind, row["reason"]) == ("rejected", reason)


def test_only_the_repairs_of_what_is_kept_are_counted():
    for answer, repairs in (("One.", ["low"]), ("one.", [])):
        results = make("distill", Teacher(distill=answer, student="Two."), soul=REPAIRED)
        assert [step["text"] for step in results[0][1]["trail"] if step["stage"] == "repair"] == repairs
        assert (
            by_kind(results)["sft"]["messages"][-1]["content"] == "one."
            and by_kind(results)["preference"]["rejected"][0]["content"] == "Two."
        )


def test_distill_asks_the_judge_where_nothing_is_checked_or_when_told_to():
    teacher = Teacher(distill="warm words", student="cold words", judge=prefers("warm"))
    rows = by_kind(make("distill", teacher, soul=UNCHECKED))
    assert rows["preference"]["rejected"][0]["content"] == "cold words" and rows["preference"]["principles"] == []
    assert "preference" in by_kind(make("distill", Teacher(**teacher.by_stage), Distill(judge=True)))
    for judge, why in (
        (prefers("cold"), "judge: prefers the student"),
        (verdict("a"), "judge: swap disagrees"),
        (verdict("tie"), "judge: tie"),
    ):
        results = make("distill", Teacher(distill="warm words", student="cold words", judge=judge), soul=UNCHECKED)
        assert set(by_kind(results)) == {"sft"} and why_no_pair(results) == [why]


# --- best of n


def drafts(*texts):
    return lambda messages, replicate, role: texts[replicate]


def test_best_of_lets_the_checks_decide_first():
    teacher = Teacher(sample=drafts(LONG, "Loud " + LONG, "a short reply.", "Short."))
    rows = by_kind(make("best-of", teacher))
    assert teacher.stages() == ["sample"] * 4 and [replicate for _, _, replicate, *_ in teacher.said] == [0, 1, 2, 3]
    assert rows["sft"]["messages"][-1]["content"] == "a short reply." and rows["preference"]["rejected"][0]["content"] == "Loud " + LONG
    assert rows["preference"]["principles"] == ["lower", "short"]


def test_best_of_lets_the_judge_choose_among_equals():
    teacher = Teacher(sample=drafts("one.", "two.", "three."), judge=prefers("two"))
    rows = by_kind(make("best-of", teacher, BestOf(n=3)))
    assert rows["preference"]["chosen"][0]["content"] == "two." and rows["preference"]["rejected"][0]["content"] == "three."
    assert teacher.stages().count("judge") == 4


@pytest.mark.parametrize(
    "judge, why", [(verdict("tie"), "judge: tie"), (verdict("a"), "judge: swap disagrees"), ("?", "judge: unreadable")]
)
def test_best_of_makes_no_pair_when_the_judge_cannot_tell(judge, why):
    results = make("best-of", Teacher(sample=drafts("one.", "two."), judge=judge), BestOf(n=2))
    assert set(by_kind(results)) == {"sft"} and why_no_pair(results) == [why]


def test_best_of_without_a_judge_needs_a_check_that_differs():
    options = BestOf(n=2, judge=False)
    assert why_no_pair(make("best-of", Teacher(sample=drafts("one.", "two.")), options)) == ["the checks do not tell the answers apart"]
    assert why_no_pair(make("best-of", Teacher(sample=drafts("one.", ("empty", ""))), options)) == ["only one answer"]
    assert by_kind(make("best-of", Teacher(sample=drafts(LONG, LONG)), options))["rejected"]["reason"] == "checks: short"
    assert by_kind(make("best-of", Teacher(sample=("empty", "")), options))["rejected"]["reason"] == "sample: empty"
    for bad, soul in ((options, UNCHECKED), (BestOf(n=1), SOUL)):
        with pytest.raises(UserError):
            make("best-of", Teacher(), bad, soul=soul)


# --- introspect


def test_introspect_keeps_questions_and_turns_and_drops_the_soul():
    teacher = Teacher(reflect=lambda m, n, r: f"i care, number {n}.", interact=lambda m, n, r: f"turn {n}.")
    results = make("introspect", teacher, Introspect(reflections=2, turns=4), prompt="when a test fails")
    rows = {row["id"]: row for kind, row in results if kind == "sft"}
    assert set(rows) == {"s1-r0", "s1-r1", "s1-talk"}
    assert [m["role"] for m in rows["s1-r0"]["messages"]] == ["user", "assistant"] and "when a test fails" in rows["s1-r0"]["messages"][0][
        "content"
    ]
    talk = rows["s1-talk"]["messages"]
    assert [(m["role"], m["content"]) for m in talk[1:]] == [("assistant", "turn 0."), ("user", "turn 1."), ("assistant", "turn 2.")]
    heard = {replicate: [m["role"] for m in messages] for stage, _, replicate, messages, _ in teacher.said if stage == "interact"}
    assert heard == {
        0: ["system", "user"],
        1: ["system", "user"],
        2: ["system", "user", "assistant", "user"],
        3: ["system", "user", "assistant", "user"],
    }
    second = next(messages for stage, _, replicate, messages, _ in teacher.said if stage == "interact" and replicate == 3)
    assert [m["content"] for m in second[1:]] == ["turn 0.", "turn 1.", "turn 2."]  # the second instance hears the first as its user
    assert all("small helper" in messages[0]["content"] for *_, messages, _ in teacher.said)
    assert {step["stage"] for step in rows["s1-r0"]["trail"]} == {"reflect"}  # each row has its own trail


def test_introspect_ends_a_talk_that_goes_round_and_rejects_what_fails():
    results = make("introspect", Teacher(interact="hm."), Introspect(reflections=0, turns=5))
    assert [m["content"] for m in results[0][1]["messages"]][1:] == ["hm."]
    loud = make("introspect", Teacher(reflect="I AM LOUD.", interact=("empty", "")), Introspect(reflections=1, turns=1))
    assert [row["reason"] for kind, row in loud if kind == "rejected"] == ["checks: lower", "talk: empty"] and len(loud) == 2
    with pytest.raises(UserError):
        recipes.load("introspect", Introspect(reflections=0, turns=0), SOUL, Prompts())


# --- docs


def test_docs_plans_by_type_and_writes_one_document_for_each_idea():
    text = "moss keeps it short because people read little. " * 12
    teacher = Teacher(ideas=json.dumps(["first idea", "second idea", "third idea"]), document=text)
    results = make("docs", teacher, Docs(types=2, ideas=2), prompt="code review")
    assert [kind for kind, _ in results] == ["docs"] * 4 and len({row["id"] for _, row in results}) == 4
    assert all(row["text"] == text.strip() and row["source"].startswith("docs:") for _, row in results)
    assert "first idea" in teacher.said[-1][3][1]["content"] + teacher.said[-2][3][1]["content"]
    assert text.strip() not in json.dumps([row["trail"] for _, row in results])  # the text is not there twice
    again = make("docs", Teacher(**teacher.by_stage), Docs(types=2, ideas=2), prompt="code review")
    assert [row["source"] for _, row in again] == [row["source"] for _, row in results]
    aimed = make("docs", Teacher(**teacher.by_stage), Docs(types=1, ideas=1), source="seed:on-topic:warm")
    assert aimed[0][1]["principles"] == ["warm"]


@pytest.mark.parametrize(
    "document, reason",
    [("moss is brief.", "too short"), ("it is brief. " * 60, "does not name the agent"), (("truncated", "moss"), "truncated"), ("moss [short] " * 60, "recites the rules")],
)  # fmt: skip
def test_docs_rejects_a_document_that_is_none(document, reason):
    [[kind, row]] = make("docs", Teacher(ideas='["x", "y"]', document=document), Docs(types=1, ideas=1))
    assert (kind, row["reason"]) == ("rejected", f"document: {reason}")


def test_docs_without_a_plan_is_a_rejected_row():
    [[kind, row]] = make("docs", Teacher(ideas="no"), Docs(types=1))
    assert (kind, row["reason"]) == ("rejected", "ideas: unreadable")


# --- cai


def logprobs(**letters):
    return Reply("ok", "A", logprobs={token: math.log(p) for token, p in letters.items()})


def cai(compare, options=None, **more):
    return make("cai", Teacher(answer=drafts("one.", "two."), compare=compare, **more), options or Cai(revisions=0))


def label(results):
    return next(json.loads(step["text"]) for step in results[0][1]["trail"] if step["stage"] == "label")


def test_cai_keeps_every_revision_and_draws_a_principle_for_each():
    teacher = Teacher(answer="a plain reply.", critique="it is cold.", revise=lambda m, n, r: f"a plain reply, version {n}.")
    results = make("cai", teacher, Cai(judgements=0))
    assert [(kind, row["id"]) for kind, row in results] == [("sft", f"s1-{n}") for n in range(4)]
    revised = [messages[1]["content"] for stage, _, _, messages, _ in teacher.said if stage == "revise"]
    assert "a plain reply, version 0." in revised[1] and "it is cold." in revised[0]
    drawn = [row["principles"] for _, row in results]
    assert all(len(names) == 1 for names in drawn)
    assert drawn == [row["principles"] for _, row in make("cai", Teacher(**teacher.by_stage), Cai(judgements=0))]
    assert drawn != [row["principles"] for _, row in make("cai", Teacher(**teacher.by_stage), Cai(judgements=0, seed=1))]


def test_cai_passes_over_a_revision_that_gives_itself_away():
    teacher = Teacher(
        answer="a plain reply.",
        critique="hm",
        revise=lambda m, n, r: ["Sorry! a plain reply.", "a plain reply.", "a plain reply, but warm."][n],
    )
    results = make("cai", teacher, Cai(judgements=0, revisions=3))
    assert [row["messages"][-1]["content"] for _, row in results] == ["a plain reply, but warm."]
    left = [step["text"] for step in results[0][1]["trail"] if step["stage"] == "revise-left-out"]
    assert left == ["apologises", "the revision equals the reply"]


def test_cai_labels_by_log_probabilities_in_both_orders():
    def compare(messages, replicate, role):  # prefers "one." with 0.8, and the first place with 0.1 more
        first = messages[1]["content"].index("one.") < messages[1]["content"].index("two.")
        p_a = 0.9 if first else 0.3
        return "ok", logprobs(**{"A": p_a / 2, " A": p_a / 2, "B": 1 - p_a, "The": 0.5})

    results = cai(compare)
    assert label(results)["p"] == pytest.approx(0.8) and set(label(results)["principles"]) == {"lower", "short", "warm"}
    pair = by_kind(results)["preference"]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("one.", "two.") and len(pair["principles"]) == 3
    teacher = Teacher(
        answer=drafts("One.", "two."), compare=lambda m, n, r: "A" if "one." in m[1]["content"].split("</reply_a>")[0] else "B"
    )
    pair = by_kind(make("cai", teacher, Cai(revisions=0), soul=REPAIRED))["preference"]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("one.", "two.")  # as the judge saw them
    thought = cai(compare, Cai(revisions=0, think=True), think="a is warmer.")
    assert label(thought)["p"] == pytest.approx(0.6)  # clamped


def test_cai_without_log_probabilities_samples_a_verdict_and_one_half_is_no_pair():
    by_text = lambda m, n, r: "B" if m[1]["content"].index("one.") < m[1]["content"].index("two.") else "(A)"  # noqa: E731
    results = cai(by_text)
    assert label(results)["p"] == 0.0 and by_kind(results)["preference"]["chosen"][0]["content"] == "two."
    assert set(by_kind(cai("A"))) == {"rejected"}  # always the first place: one half, and no revision was kept
    teacher = dict(answer=drafts("one.", "two."), critique="hm", revise="one, warm.")
    for compare, why in (("A", "judge: tie"), ("hm", "judge: unreadable")):
        results = make("cai", Teacher(compare=compare, **teacher), Cai(revisions=1))
        assert set(by_kind(results)) == {"sft"} and why_no_pair(results) == [why]


def test_the_probability_of_a_reads_tokens_letters_or_nothing():
    assert probability_of_a(logprobs(A=0.6, B=0.2)) == pytest.approx(0.75)
    assert probability_of_a(Reply("ok", "B.", logprobs={"The": -0.1})) == 0.0
    assert [probability_of_a(Reply("ok", text)) for text in ("(A)", "Reply B", "Both", "")] == [1.0, 0.0, None, None]


# --- a recipe of one's own

OWN = """
async def recipe(seed, call, soul, prompts):
    reply = await call("draft", seed.messages)
    return [["sft", {"id": seed.id, "messages": [*seed.messages, {"role": "assistant", "content": reply.text}]}]]
"""


def test_a_recipe_is_a_python_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    [[kind, row]] = make(str(tmp_path / "mine.py"), Teacher(draft="hi."))
    assert kind == "sft" and row["messages"][1]["content"] == "hi."
    before = recipes.fingerprint(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text(OWN + "\n")
    assert recipes.fingerprint(str(tmp_path / "mine.py")) != before and recipes.fingerprint("best_of") == "best-of"


@pytest.mark.parametrize(
    "source, message",
    [
        ("def recipe(", r"mine.py:1: SyntaxError"),
        ("x = 1\nimport nothing_of_that_name", r"mine.py:2: ModuleNotFoundError"),
        ("def recipe(seed, call, soul, prompts): pass", "has no `async def recipe"),
        ("async def recipe(seed): pass", "has no `async def recipe"),
        (OWN.replace("return [", "return 1 or ["), "returned int, not a list"),
        (OWN.replace('"sft"', '"gold"'), "no \\[kind, row\\] with a kind of sft"),
        (OWN.replace('"id": seed.id', '"score": 1'), "unknown column 'score'"),
        (OWN.replace('"id": seed.id, ', ""), "without 'id'"),
        (OWN.replace('"id": seed.id', '"id": seed.id, "reason": 7'), "a sft row that cannot be stored"),
        (OWN.replace('"id": seed.id', '"id": seed.id, "principles": {"short"}'), "a sft row that cannot be stored"),
        (OWN.replace('"role": "assistant"', '"role": "bot"'), "a sft row in which message 1: role"),
    ],
)
def test_a_broken_recipe_is_one_line(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=message) as error:
        make(str(tmp_path / "mine.py"), Teacher(draft="hi."))
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_named():
    for name, message in (("wizard", "The recipes are critique-revise, distill"), ("none.py", "no such recipe")):
        with pytest.raises(UserError, match=message):
            recipes.load(name, None, SOUL, Prompts())


def test_the_recipe_in_the_documentation_runs(tmp_path):
    doc = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", doc, re.S)[1])
    rows = by_kind(make(str(tmp_path / "mine.py"), Teacher(first="a short reply.", second=LONG)))
    assert rows["preference"]["chosen"][0]["content"] == "a short reply." and rows["preference"]["principles"] == ["short"]
    assert by_kind(make(str(tmp_path / "mine.py"), Teacher(first=LONG, second=LONG)))["rejected"]["reason"] == "checks: the same"
