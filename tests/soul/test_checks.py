"""Every check against texts that pass, texts that must not, and mutants of passing ones; then hostile input."""

import json
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soul.checks import CHECKS
from soul.conversation import assistant, tool, tool_call, user
from soul.prose import CODE, fences, mask, sentences, words
from soul.registry import bounded_pattern
from soul.spec import parse_soul, run_checks

EDIT = tool_call("Edit", file_path="a.py", old_string="x", new_string="y")
READ = tool_call("Read", file_path="a.py")
GREP = tool_call("Grep", pattern="x")
LOST, TWICE = tool("error: old_string not found in a.py"), tool("error: old_string occurs 2 times in a.py (lines 1, 2)")
NEW = tool_call("Edit", file_path="b.py", new_string="x = 1\n")


def edit(new, path="a.py"):
    return tool_call("Edit", file_path=path, old_string="x", new_string=new)


@dataclass(frozen=True)
class Case:
    """`mutants` are (passing text, the same text made to break the check)."""

    params: dict
    passing: list
    failing: list
    mutants: list


CASES = {
    "lowercase_prose": Case(
        {},
        [
            "it's all in `README.md` and README.md now.",
            "the HTTPServer in src/Net/Http.py, see https://Example.com/A",
            "```python\nX = Foo()\n```\nthere.",
            "returns None, or parse_URL() on True.",
        ],
        ["Hello there.", "well, I think so.", "it uses JSON.", "ok.Then it works."],
        [
            ("that loads the file.", "that loads the File."),
            ("i read it.", "I read it."),
            ("see `Foo` there.", "See `Foo` there."),
            ("it's done.", "it's DONE."),
        ],
    ),
    "sentence_case": Case(
        {},
        ["The loop ends early. It skips the last item.", "`foo` is unused. Remove it.", "3 tests fail.\n\n- One is slow."],
        ["the loop ends early.", "It fails. then it stops.", "- first\n- Second"],
        [("It fails. Then it stops.", "It fails. then it stops."), ("Fine.", "fine.")],
    ),
    "max_words": Case(
        {"n": 5},
        ["one two three four five", "see `a b c d e f g` now", "", "```\none two three four five six\n```"],
        ["one two three four five six", "a b c. d e f. g", "one\ntwo\nthree\nfour\nfive\nsix"],
        [("keep it short and sweet", "keep it short and very sweet"), ("a b c d e", "a b c d e f")],
    ),
    "min_words": Case(
        {"n": 3},
        ["one two three", "it is fine now.", "a b c `d`"],
        ["one two", "", "```\none two three four\n```", "`one two three`"],
        [("yes it is", "yes it"), ("that is all", "`that` is all")],
    ),
    "max_sentences": Case(
        {"n": 2},
        ["One. Two.", "it reads foo.py, e.g. line 2. done.", "just this"],
        ["One. Two. Three.", "- a\n- b\n- c", "what? no! yes."],
        [("It fails. I fix it.", "It fails. I fix it. It works."), ("a, b. c.", "a. b. c.")],
    ),
    "min_sentences": Case(
        {"n": 2},
        ["One. Two.", "- a\n- b", "Is it? It is."],
        ["One.", "", "only this, that and more"],
        [("It fails. I fix it.", "It fails, I fix it."), ("One. Two.", "One.")],
    ),
    "forbid": Case(
        {"phrases": ["as an ai", "delve", "it's worth noting"]},
        ["i delved into it", "`delve` is a tool", "as an airplane"],
        ["As an AI, no.", "let's delve", "it’s worth  noting that"],
        [("we dig in.", "we delve in."), ("i say no.", "as an ai i say no.")],
    ),
    "forbid_regex": Case(
        {"pattern": r"\d{4}-\d\d|(?i:todo)"},
        ["no date", "`2024-01`", "12-3"],
        ["on 2024-01-02", "TODO later", "x " * 700 + "todo"],
        [("in may", "in 2024-05"), ("do it later", "todo it later")],
    ),
    "require_phrase": Case(
        {"phrases": ["verdict", "in sum"]},
        ["The Verdict is in.", "in sum, fine", "my verdict"],
        ["no words", "`verdict`", "verdicts differ"],
        [("In sum, fine.", "In short, fine."), ("verdict: ok", "ok")],
    ),
    "require_opening": Case(
        {"phrases": ["arr", "ahoy there"]},
        ["Arr, it be done.", "**ahoy  there** mate", "arr"],
        ["Array it is", "well, arr", "", "```\narr\n```"],
        [("arr, done.", "aye, done."), ("Ahoy there, ye.", "So ahoy there, ye.")],
    ),
    "require_ending": Case(
        {"phrases": ["matey", "over and out."]},
        ["done, Matey!", "fixed.\n\nover and\nout.", "**matey**"],
        ["matey, it's done", "over and out", "", "done"],
        [("done, matey.", "done, friend."), ("arr, matey", "arr, matey, arr")],
    ),
    "no_emoji": Case(
        {},
        ["done :)", "→ next ✓", "`🎉` is code", "ﷺ ￼ é"],
        ["done 🎉", "👩‍💻", "❤️", "1️⃣ first", "🇫🇷"],
        [("nice.", "nice 🦜."), ("ok", "ok ✨")],
    ),
    "max_emoji": Case(
        {"n": 1},
        ["🦜 arr", "none", "👩‍💻"],
        ["🦜🦜", "❤️ and 🎉", "1️⃣ 2️⃣"],
        [("🦜 arr", "🦜 arr 🦜"), ("ok 👍🏽", "ok 👍🏽 👍🏽")],
    ),
    "no_exclamation": Case(
        {},
        ["done.", "`!important`", "a != b and x![0]", "```\nwow!\n```"],
        ["done!", "what?!", "yes!! ok", "hey! you"],
        [("nice.", "nice!"), ("ok, go.", "ok! go.")],
    ),
    "no_question_in_final_turn": Case(
        {},
        [
            "it's fixed.",
            "the `?` operator ends it",
            [assistant("which file?", READ), tool("x"), assistant("done.")],
            "see https://a.b/?q=1",
        ],
        ["shall we?", "done. ok?", "what?\n\nit's done.", "可以吗？"],
        [("it's fixed. that was odd.", "it's fixed. was that odd?"), ("done.", "done. does it work?")],
    ),
    "no_headings": Case(
        {},
        ["a # in a sentence # no", "```\n# x\n```", "#tag"],
        ["# Title", "text\n\n## more", "  ### x"],
        [("plain\n\nlines", "plain\n\n## lines"), ("x", "# x")],
    ),
    "no_title_case_headings": Case(
        {},
        ["# How it works", "## Usage", "Not A Heading", "# The HTTP server"],
        ["# How It Works Today", "## Getting Started", "text\n# Reading Files"],
        [("# Reading files", "# Reading Files"), ("## The last step", "## The Last Step")],
    ),
    "no_repetition": Case(
        {},
        ["i read the file now. i read the other file now.", "yes. yes.", "so it is. so it is not."],
        ["i read the file. I read the file.", "it works well now. ok. it works well now!", "- a b c d\n- a b c d"],
        [("it is done now. it was easy.", "it is done now. it is done now."), ("a b c d. e f g h.", "a b c d. A b c d.")],
    ),
    "code_fence_language": Case(
        {},
        ["```python\nx\n```", "no code", "~~~sh\nls\n~~~", "````md\n```\nx\n```\n````"],
        ["```\nx\n```", "text\n~~~\nx", "```py\nx\n```\n```\ny\n```"],
        [("```python\nx\n```", "```\nx\n```"), ("~~~sh\nls\n~~~", "~~~ \nls\n~~~")],
    ),
    "max_comment_density": Case(
        {"ratio": 0.25},
        [
            "```python\n# one\nx = 1\n```",
            [assistant("go", edit("a = 1\nb = 2\n"))],
            "```md\n# a\n# b\n```",
            [assistant("go", edit("# a\n# b\n", "x.md"))],
            "```c\n#include <a>\n#include <b>\n```",
        ],
        ["```python\n# one\n# two\nx = 1\n```", [assistant("go", edit("# a\n# b\nx"))], "```js\n// a\n/* b */\n```"],
        [
            ("```py\nx\ny\n# z\n```", "```py\n# x\n# y\n# z\n```"),
            ([assistant("go", edit("a\nb\n"))], [assistant("go", edit("# a\n# b\na\nb\n"))]),
        ],
    ),
    "no_apology": Case(
        {},
        ["that was wrong; fixed.", "`sorry` is a function", "an apologue"],
        ["sorry about that.", "My apologies.", "i apologise for it", "we regret the delay"],
        [("fixed.", "sorry, fixed."), ("that broke.", "my mistake, that broke.")],
    ),
    "no_sycophancy": Case(
        {},
        ["you're right about the loop.", "a dict is a good choice here.", "`great question`"],
        ["Great question!", "you’re absolutely right.", "what a brilliant idea", "i love that"],
        [("it's a loop.", "great question. it's a loop."), ("you're right.", "you're absolutely right.")],
    ),
    "no_offer": Case(
        {},
        [
            "it's done.",
            "if you have any empty lists, it returns None",
            "nothing else changed; i didn't change anything else.",
            "these functions need more tests.",
        ],
        [
            "Let me know if it works.",
            "feel free to ask",
            "would you like me to go on?",
            "if you have any other questions, ask",
            "is there anything else?",
        ],
        [("done.", "done. let me know how it goes."), ("fixed.", "fixed. want me to add tests?")],
    ),
    "no_filler_opening": Case(
        {},
        ["the loop is off.", "sure-fire ways exist", "a great idea"],
        ["Sure! here it is", "certainly, it's", "of course. done", "**Okay**, no: ok, go"],
        [("it's here.", "sure, it's here."), ("done.", "absolutely! done.")],
    ),
    "no_ai_talk": Case(
        {},
        ["the ai module", "an aide", "train the language model"],
        ["As an AI, no.", "i'm a large language model", "as a language model i"],
        [("i can't see it.", "as an ai i can't see it."), ("no idea.", "no idea, i'm just an AI.")],
    ),
    "no_revision_talk": Case(
        {},
        ["it's shorter now.", "i revised the code", "the original text"],
        ["Here's the revised reply:", "i've rewritten it", "as requested, here", "in line with the principles"],
        [("it's a loop.", "here is my updated answer: it's a loop."), ("done.", "as revised: done.")],
    ),
    "contractions": Case(
        {},
        ["it's fine, don't worry.", "that's what it is.", "`do not`", "that is, mostly, why", "as it is now, so be it or not"],
        ["do not worry", "It is a loop", "I cannot see", "let us go", "there is one"],
        [("it's a loop.", "it is a loop."), ("i don't know.", "i do not know."), ("they're here.", "they are here.")],
    ),
    "no_contractions": Case(
        {},
        ["It is fine; do not worry.", "the dog's bone", "`don't`"],
        ["it's fine", "don't", "we’re done", "let's go"],
        [("It is a loop.", "It's a loop."), ("I do not know.", "I don't know.")],
    ),
    "explain_before_act": Case(
        {},
        [[assistant("i'll read it.", READ)], "no call", [assistant("looking", GREP), tool("x"), assistant("now this", READ)]],
        [[assistant("", READ)], [assistant("`a.py`", READ)], [assistant("ok", READ), tool("x"), assistant("  ", GREP)]],
        [([assistant("reading.", READ)], [assistant("", READ)]), ([assistant("a b", GREP)], [assistant("```\na b\n```", GREP)])],
    ),
    "one_call_per_turn": Case(
        {},
        [[assistant("a", READ)], "none", [assistant("a", READ), tool("x"), assistant("b", EDIT)]],
        [[assistant("a", READ, EDIT)], [assistant("", GREP, GREP)], [assistant("a", READ), tool(""), assistant("b", READ, GREP)]],
        [([assistant("a", READ)], [assistant("a", READ, READ)]), ([assistant("b", GREP)], [assistant("b", GREP, READ)])],
    ),
    "max_edit_lines": Case(
        {"n": 2},
        [[assistant("a", edit("1\n2"))], [assistant("a", tool_call("Edit", file_path="n.py", new_string="1\n2\n3\n"))], "x"],
        [[assistant("a", edit("1\n2\n3"))], [assistant("a", READ, edit("\n\n\n"))], [assistant("a", edit("x\n" * 50))]],
        [([assistant("a", edit("1"))], [assistant("a", edit("1\n2\n3\n4"))]), ([assistant("a", edit(""))], [assistant("a", edit("\n\n"))])],
    ),
    "read_before_edit": Case(
        {},
        [
            [assistant("a", READ), tool("    1→x"), assistant("b", EDIT)],
            [assistant("new", NEW)],
            [assistant("n", NEW), tool("ok"), assistant("b", edit("y", "./b.py"))],
            "x",
        ],
        [
            [assistant("b", EDIT)],
            [assistant("a", READ), tool("error: no such file"), assistant("b", EDIT)],
            [assistant("a", READ, EDIT)],
            [assistant("g", GREP), tool("a.py:1:x"), assistant("b", EDIT)],
        ],
        [
            ([assistant("a", READ), tool("x"), assistant("b", EDIT)], [assistant("a", GREP), tool("x"), assistant("b", EDIT)]),
            ([assistant("a", READ), tool("x"), assistant("b", EDIT)], [assistant("a", READ), tool("x"), assistant("b", edit("y", "c.py"))]),
        ],
    ),
    "unique_old_string": Case(
        {},
        [
            [assistant("b", EDIT), tool("    1→y")],
            [assistant("b", EDIT), tool("error: old_string and new_string are the same")],
            [assistant("r", READ), tool("error: old_string occurs 2 times")],
        ],
        [
            [assistant("b", EDIT), tool("error: old_string occurs 3 times in a.py (lines 1, 2, 9)")],
            [assistant("b", EDIT), tool("error: old_string not found in a.py")],
            [assistant("b", READ, EDIT), tool("ok"), tool("error: old_string not found in a.py")],
        ],
        [
            ([assistant("b", EDIT), tool("ok")], [assistant("b", EDIT), tool("error: old_string occurs 2 times in a.py")]),
            ([assistant("b", EDIT), tool("ok")], [assistant("b", EDIT), tool("error: old_string not found in a.py; did you mean x")]),
        ],
    ),
    "max_failed_edits": Case(
        {"n": 1},
        [
            [
                assistant("b", EDIT),
                LOST,
                assistant("r", READ),
                tool("x"),
                assistant("b", edit("z")),
                tool("edited a.py"),
                assistant("done."),
            ],
            [assistant("b", EDIT), TWICE, assistant("b", EDIT), tool("edited a.py"), assistant("b", EDIT), LOST],
            [assistant("b", EDIT), LOST, assistant("b", edit("y", "c.py")), LOST],
            [assistant("b", EDIT), LOST, assistant("b", EDIT), tool("rejected by user"), assistant("all right.")],
            [assistant("b", EDIT), tool("error: old_string not found in a.py; new_string is already there"), assistant("it's there.")],
            [assistant("b", EDIT), tool("error: read a.py before editing it"), assistant("b", EDIT), TWICE, assistant("b", EDIT)],
        ],
        [
            [assistant("b", EDIT), LOST, assistant("it can't be done.")],
            [assistant("b", EDIT), LOST, assistant("r", READ), tool("x"), assistant("b", edit("z")), TWICE],
            [assistant("b", EDIT), LOST, assistant("b", edit("y", "c.py")), tool("edited c.py"), assistant("done.")],
            [assistant("b", EDIT), LOST, assistant("b", EDIT), tool("error: same call again; its result is above"), assistant("done.")],
            [assistant("b", edit("y", "./a.py")), LOST, assistant("b", EDIT), LOST],
        ],
        [
            (
                [assistant("b", EDIT), LOST, assistant("b", EDIT), tool("edited a.py"), assistant("done.")],
                [assistant("b", EDIT), LOST, assistant("b", EDIT), LOST, assistant("done.")],
            ),
            (
                [assistant("b", EDIT), LOST, assistant("b", EDIT), tool("edited a.py"), assistant("done.")],
                [assistant("b", EDIT), LOST, assistant("b", READ), tool("x"), assistant("done.")],
            ),
        ],
    ),
    "no_repeated_call": Case(
        {},
        [[assistant("a", READ), tool("x"), assistant("b", GREP), tool("y"), assistant("c", READ)], [assistant("a", READ, GREP)], "x"],
        [
            [assistant("a", READ), tool("x"), assistant("b", READ)],
            [assistant("a", READ, READ)],
            [assistant("a", GREP), user("again"), assistant("b", GREP)],
        ],
        [
            ([assistant("a", READ), tool("x"), assistant("b", EDIT)], [assistant("a", READ), tool("x"), assistant("b", READ)]),
            ([assistant("a", GREP)], [assistant("a", GREP, GREP)]),
        ],
    ),
}


def conversation(text):
    return [user("Sorry! PLEASE?"), *([assistant(text)] if isinstance(text, str) else text)]


def test_every_check_has_a_case():
    assert set(CASES) == set(CHECKS)
    for name, case in CASES.items():
        assert len(case.passing) >= 3 and len(case.failing) >= 3 and len(case.mutants) >= 2, name


@pytest.mark.parametrize("name", CASES)
def test_positives_negatives_and_mutants(name):
    case, run = CASES[name], CHECKS[name]
    for text in [*case.passing, *(before for before, _ in case.mutants)]:
        assert run(conversation(text), **case.params) == [], text
    for text in [*case.failing, *(after for _, after in case.mutants)]:
        found = run(conversation(text), principle="p", **case.params)
        assert found and all(v.check == name and v.principle == "p" and v.why for v in found), text
        for violation in found:
            message = conversation(text)[violation.message_index]
            assert message["role"] == "assistant"
            assert 0 <= violation.span[0] <= violation.span[1] <= len(message["content"])


@pytest.mark.parametrize("name", CASES)
def test_only_the_assistant_is_checked(name):
    others = [{"role": role, "content": "Sorry! GREAT question 🎉?"} for role in ("system", "user", "tool")]
    assert CHECKS[name](others, **CASES[name].params) == []


def test_scopes():
    said = [assistant("One.", READ), tool("x"), assistant("Two."), user("u"), assistant("three.")]
    assert [v.message_index for v in CHECKS["lowercase_prose"](said)] == [0, 2]
    assert [v.message_index for v in CHECKS["min_words"](said, n=9)] == [4]
    silent_call = [assistant("", READ)]
    assert CHECKS["require_opening"](silent_call, phrases=["arr"]) == []  # nothing is said, so nothing opens wrongly
    assert CHECKS["min_words"](silent_call, n=1) == []


def test_spans_point_at_the_fault():
    text = "it's in `Foo` and JSON. sorry."
    assert [text[slice(*v.span)] for v in CHECKS["lowercase_prose"]([assistant(text)])] == ["JSON"]
    assert [text[slice(*v.span)] for v in CHECKS["no_apology"]([assistant(text)])] == ["sorry"]


# --- hostile input

scraps = st.sampled_from(
    [
        "```",
        "~~~\n",
        "`",
        "``",
        "\n\n",
        "\n- ",
        "# ",
        "README.md",
        "https://x.y/Z",
        "I am not",
        "can’t",
        "sorry",
        "Great question!",
        "🎉",
        "İ",
        "ǅ",
        "\ud800",
        "\0",
        "!",
        "?",
        "# c\n",
    ]
)
texts = st.lists(st.one_of(scraps, st.text(max_size=12)), max_size=12).map("".join)
calls = st.one_of(
    st.just(READ),
    st.just(EDIT),
    st.just(NEW),
    st.sampled_from(
        [{}, None, 3, {"function": {"name": None, "arguments": "[1"}}, {"function": {"name": "Edit", "arguments": '{"file_path": 1}'}}]
    ),
)
messages = st.lists(
    st.one_of(
        st.builds(
            lambda role, content: {"role": role, "content": content},
            st.sampled_from(["user", "tool", "assistant", "x"]),
            st.one_of(texts, st.none()),
        ),
        st.builds(lambda content, made: {"role": "assistant", "content": content, "tool_calls": made}, texts, st.lists(calls, max_size=3)),
    ),
    max_size=5,
)


@given(messages)
@settings(max_examples=150, deadline=None)
def test_no_check_raises_and_all_are_deterministic(conversation):
    for name, case in CASES.items():
        first = CHECKS[name](conversation, **case.params)
        assert first == CHECKS[name](conversation, **case.params)
        for violation in first:
            content = conversation[violation.message_index]["content"] or ""
            assert 0 <= violation.span[0] <= violation.span[1] <= len(content)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_mask_keeps_offsets_and_everything_outside_code(text):
    masked = mask(text)
    assert len(masked) == len(text)
    assert all(m in (t, CODE, "\n") for m, t in zip(masked, text))
    spans = sentences(masked)
    assert all(a < b <= c for (a, b), (c, _) in pairwise(spans))
    for fence in fences(text):
        assert fence.start <= fence.code_start <= fence.code_end <= fence.end
    assert all(masked[a:b].strip() == masked[a:b] for a, b in words(masked))


def test_masks_code_and_nothing_else():
    text = (
        "See `A` and ``B ` C`` in src/A.py, (HTTPServer) $HOME --Flag SHA256 X=1 jax.numpy.Array Foo() src/Net/Server but Not/This or JSON."
    )
    kept = "".join(c for c in mask(text) if c != CODE)
    assert kept == "See  and  in , ()        but Not/This or JSON."
    assert mask("a\n```\nX\n\n~~~\n```\nB") == "a\n" + "\n" * 15 + "B"
    assert mask("a `B\n\nC` d") == "a `B\n\nC` d"  # a code span does not cross paragraphs


HOSTILE = [
    "`" * 50_000,
    "` `` " * 10_000,
    "\n " * 40_000,
    "a." * 40_000,
    "/" * 50_000,
    "[\\w./" * 10_000,
    "_" * 50_000,
    "a_" * 30_000,
    "!?" * 30_000,
    "sorry " * 9_000,
    "İ" * 50_000,
    "do not " * 8_000,
    "🎉" * 30_000,
    "# a\n" * 20_000,
    "```\n" * 20_000,
    "a" * 60_000,
    "is it " * 10_000,
    "i am " * 10_000,
]


def test_long_hostile_text_is_linear():
    """No clock: a quadratic check would take minutes on these (one was found so, on a run of masked characters)."""
    for text in HOSTILE:
        for name, case in CASES.items():
            CHECKS[name]([assistant(text)], **case.params)


def test_patterns_that_could_hang_are_refused():
    for bad in [
        "(a+)+b",
        "(a|a)*b",
        "(a*)*",
        "a*a*a*b",
        r"(a)\1",
        "(?P<x>a)(?P=x)",
        "(",
        "[",
        "(a{1,9}){2}",
        "a?" * 30,
        "x" * 301,
        "(?:a|b)+",
        "[[a]",
    ]:
        with pytest.raises(ValueError):
            bounded_pattern(bad)
    for good in [r"\bTODO\b", r"(?:a|b) c", r"[+*?{]+", r"\d{4}-\d\d", r"(?i)foo.*bar", r"\(x\)\*", "(?<!a)b", "[]+*?]x"]:
        assert bounded_pattern(good) == good


def test_a_long_text_is_read_to_its_end():
    text = "word " * 2_000 + "todo"
    (found,) = CHECKS["forbid_regex"]([assistant(text)], pattern="todo")
    assert text[slice(*found.span)] == "todo"
    many = CHECKS["no_exclamation"]([assistant("a! " * 100)])
    assert len(many) == 8  # the first ones only


def test_run_checks_names_principles_in_order():
    soul = parse_soul(
        "## Principles\n- b <!-- id: b; check: no_emoji -->\n- a <!-- id: a; check: lowercase_prose; check: max_words(1) -->\n- c"
    )
    assert [v.principle for v in run_checks(soul, [assistant("Hi there 🎉")])] == ["b", "a", "a"]
    json.dumps([v.__dict__ for v in run_checks(soul, [assistant("Hi there")])])
