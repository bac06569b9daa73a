"""SOUL.md parsing: what is a principle, what hashes cover, and one line naming file and line for every mistake."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soul.check_cmd import Config, main
from soul.errors import UserError
from soul.spec import CheckCall, conflicts, load_soul, parse_soul

FULL = """---
name: moss
version: 1.10
tools: [Read, Edit]
defaults:
  temperature: 0.7
  words: 80
---
# Moss the first

A voice with a <!-- remark --> word.

## Principles

- writes *prose* in lowercase. <!-- id: lowercase; check: lowercase_prose; repair: yes -->
- keeps answers short:
  - no preamble
  - no recap
<!-- check: max_words(80)
     ; check: forbid("a; b", "c") ; note: don't grow this -->

### Be brave
<!-- id: brave -->
Try things.

And again.

### Tools
1. read first <!-- check: read_before_edit -->
2. then
   edit

```
- not a principle <!-- nor a comment
```

## Background

- not a principle either, `<!--` is code
"""


def test_the_whole_format():
    soul = parse_soul(FULL, "x/SOUL.md")
    assert (soul.name, soul.version, soul.tools, soul.defaults) == ("moss", "1.10", ("Read", "Edit"), {"temperature": 0.7, "words": 80})
    assert [(p.id, p.section, p.line) for p in soul.principles] == [
        ("lowercase", "Principles", 15),
        ("keeps-answers-short-no-preamble", "Principles", 16),
        ("brave", "Principles", 22),
        ("read-first", "Tools", 29),
        ("then-edit", "Tools", 30),
    ]
    assert soul.principle("lowercase").text == "writes *prose* in lowercase."
    assert soul.principle("brave").text == "Be brave: Try things. And again."
    assert soul.principles[1].text == "keeps answers short: no preamble; no recap"
    assert soul.principle("lowercase").checks == (CheckCall("lowercase_prose", {}, True, 15),)
    assert soul.principles[1].checks == (
        CheckCall("max_words", {"n": 80}, False, 19),
        CheckCall("forbid", {"phrases": ["a; b", "c"]}, False, 20),
    )
    assert [p.id for p in soul.unverified] == ["brave", "then-edit"] and len(soul.verified) == 3
    assert "A voice with a  word." in soul.voice and "not a principle" in soul.voice and "## Background" in soul.voice
    assert "remark" not in soul.text and "<!-- id" not in soul.text and "\0" not in soul.text and "temperature" not in soul.text
    assert soul.text.startswith("# moss\n") and "## Principles\n- [lowercase] writes *prose* in lowercase.\n- [keeps" in soul.text


def test_bare_files_work():
    soul = parse_soul("- be kind\n- be kind\n* tell the truth\n", "dir/kit.md")
    assert soul.name == "kit" and [p.id for p in soul.principles] == ["be-kind", "be-kind-2", "tell-the-truth"]
    assert soul.unverified == soul.principles and soul.tools == ("Read", "Edit", "Grep", "Bash")
    titled = parse_soul("# Kit\n\n## Who\n\nsomeone\n\n## Wishes\n- a\n\n- b")
    assert titled.name == "Kit" and [p.section for p in titled.principles] == ["Wishes", "Wishes"] and titled.voice == "someone"


@pytest.mark.parametrize(
    "heading",
    ["Principles", "My core values", "House rules", "Style guide", "Voice & tone", "Behaviour", "Behavior", "Tools", "Working with code"],
)
def test_section_names(heading):
    soul = parse_soul(f"# x\n\n## Story\n- no\n\n## {heading}\n- yes\n\n## End\n- no")
    assert [p.text for p in soul.principles] == ["yes"]


def test_a_bullet_goes_on_in_indented_lines():
    soul = parse_soul("## Rules\n- a\n  b\n\n  c <!-- id: abc -->\n\nnot d\n- e\n\n---\n\n* f")
    assert [(p.id, p.text) for p in soul.principles] == [("abc", "a b c"), ("e", "e"), ("f", "f")] and soul.voice == "not d"


def test_ids_of_any_script_and_of_none():
    soul = parse_soul("## Rules\n- 简短 回答\n- Don't stop\n- !!!\n- don't stop <!-- id: dont-stop -->")
    assert [p.id for p in soul.principles] == ["简短-回答", "dont-stop-2", "principle-4", "dont-stop"]


def test_hashes_cover_what_they_should():
    def hashes(text):
        soul = parse_soul(text)
        return soul.hash, soul.voice_hash, tuple(p.hash for p in soul.principles)

    base = hashes(FULL)
    for same in (
        FULL.replace("\n", "\r\n"),
        "\ufeff" + FULL,
        FULL.replace("remark", "other"),
        FULL.replace("don't grow", "grow"),
        FULL.replace("yes -->", "yes  -->"),
    ):
        assert hashes(same) == base
    changed = hashes(FULL.replace("max_words(80)", "max_words(81)"))
    assert (
        changed[0] != base[0] and changed[1] == base[1] and [a == b for a, b in zip(base[2], changed[2])] == [True, False, True, True, True]
    )
    voice = hashes(FULL.replace("A voice", "One voice"))
    assert voice[0] != base[0] and voice[1] != base[1] and voice[2] == base[2]
    label = hashes(FULL.replace("1.10", "1.11"))
    assert label[0] != base[0] and label[1:] == base[1:]
    assert hashes(FULL.replace("repair: yes", "repair: no"))[2][0] != base[2][0]


def test_frozen_and_plain():
    soul = parse_soul(FULL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        soul.name = "x"
    assert parse_soul(FULL) == soul


@pytest.mark.parametrize(
    "call, params",
    [
        ("max_words(n=3)", {"n": 3}),
        ('forbid(["a", "b"])', {"phrases": ["a", "b"]}),
        ('forbid(phrases=["a"])', {"phrases": ["a"]}),
        ("forbid('x -- y')", {"phrases": ["x -- y"]}),
        ("no_emoji()", {}),
        (r'forbid_regex("\\d+")', {"pattern": r"\d+"}),
        ("max_comment_density(1)", {"ratio": 1}),
    ],
)
def test_check_calls(call, params):
    (check,) = parse_soul(f"## Rules\n- a <!-- check: {call} -->").principles[0].checks
    assert check.params == params and check.line == 2
    assert parse_soul(f"## Rules\n- a <!-- check: {check} -->".replace("\\d", "\\\\d")).principles[0].checks[0].params == params


BAD = {  # text: (line, words of the message)
    "": (None, "is empty"),
    " \n\n": (None, "is empty"),
    "a\0b": (None, "binary"),
    "just prose\n": (None, "no principle found"),
    "---\nname: x\n# y\n- z": (1, "no closing ---"),
    "---\nname: [x\n---\n- a": (3, "not valid YAML"),
    "---\nname: x\n\tversion: 1\n---\n- a": (3, "a tab"),
    "---\nname: x\nname: y\n---\n- a": (3, "'name' twice"),
    "---\ndefaults:\n  a: 1\n  a: 2\n---\n- a": (4, "'a' twice"),
    "---\nname: x\n\nnaem: y\n---\n- a": (4, "unknown key 'naem'"),
    "---\n- x\n---\n- a": (2, "key: value"),
    "---\nname:\n---\n- a": (2, "needs text for name"),
    "---\nname: {a: 1}\n---\n- a": (2, "needs text for name"),
    "---\ntools: [Read, Wrte]\n---\n- a": (2, "unknown tool 'Wrte'"),
    "---\ndefaults: 3\n---\n- a": (2, "under defaults"),
    "---\nname: !!python/object/apply:os.system [ls]\n---\n- a": (2, "needs text for name"),
    "---\ndefaults:\n  x: !!python/object/apply:os.system [ls]\n---\n- a": (3, "under defaults"),
    "---\ndefaults:\n  x: !!python/name:os.system a\n---\n- a": (3, "not valid YAML"),
    "---\na: &a [1]\ndefaults: {b: *a}\n---\n- a": (3, "alias"),
    "---\nname: &a x\nversion: *a\n---\n- a": (3, "alias"),
    "---\ndefaults:\n  day: 2024-01-02\n---\n- a": (3, "text or a number for 'day'"),
    "---\ndefaults:\n  x: .nan\n---\n- a": (3, "text or a number for 'x'"),
    "---\ntools: [{a: b}]\n---\n- a": (2, "unknown tool"),
    "---\nname: a\x07b\n---\n- a": (2, "not valid YAML"),
    "---\ntools: " + "[" * 4000 + "\n---\n- a": (2, "too deep"),
    "## Rules\n- a\n- b <!-- check: lowercase -->": (3, "unknown check 'lowercase'. Did you mean lowercase_prose"),
    "## Rules\n- b <!-- id: b; \ncheck: zzzzzz -->": (3, "The checks are code_fence_language"),
    "## Rules\n- a <!-- check: max_words -->": (2, "max_words takes max_words(n: a whole number)"),
    "## Rules\n- a <!-- check: max_words('9') -->": (2, "takes max_words(n: a whole number) (not '9')"),
    "## Rules\n- a <!-- check: max_words(-1) -->": (2, "takes max_words"),
    "## Rules\n- a <!-- check: max_words(True) -->": (2, "takes max_words"),
    "## Rules\n- a <!-- check: max_words(1, 2) -->": (2, "takes max_words"),
    "## Rules\n- a <!-- check: max_words(m=2) -->": (2, "takes max_words"),
    "## Rules\n- a <!-- check: forbid([]) -->": (2, "takes forbid(phrases: phrases in quotes)"),
    "## Rules\n- a <!-- check: forbid('a', 3) -->": (2, "takes forbid"),
    "## Rules\n- a <!-- check: forbid(' ') -->": (2, "takes forbid"),
    "## Rules\n- a <!-- check: forbid_regex('(a+)+') -->": (2, "run for very long"),
    "## Rules\n- a <!-- check: forbid_regex('[') -->": (2, "not a regular expression"),
    "## Rules\n- a <!-- check: max_comment_density(25) -->": (2, "a number from 0 to 1"),
    "## Rules\n- a <!-- check: __import__('os').system('ls') -->": (2, "cannot read the check"),
    "## Rules\n- a <!-- check: max_words(open('x')) -->": (2, "cannot read the check"),
    "## Rules\n- a <!-- check: max_words(**{'n': 3}) -->": (2, "takes max_words"),
    "## Rules\n- a <!-- check: max words -->": (2, "cannot read the check"),
    "## Rules\n- a <!-- check: -->": (2, "cannot read the check"),
    "## Rules\n- a <!-- check: " + "(" * 3000 + " -->": (2, "cannot read the check"),
    "## Rules\n- a <!-- id: x -->\n- b\n- c <!-- id: x -->": (4, "'x' is already used in line 2"),
    "## Rules\n- a <!-- id: Not Good -->": (2, "not made of"),
    "## Rules\n- a <!-- chek: no_emoji -->": (2, "unknown annotation key 'chek'"),
    "## Rules\n- a <!-- id: a; no_emoji -->": (2, "unknown annotation key 'no_emoji'"),
    "## Rules\n- a <!-- repair: maybe -->": (2, "yes or no"),
    "## Rules\n- a <!-- check: max_words(3); repair: yes -->": (2, "no check here has a repair"),
    "## Rules\n- a\n\n<!-- open\n- b": (4, "not closed"),
    "voice <!-- check: no_emoji -->\n\n## Rules\n- a": (1, "belongs to no principle"),
    "## Rules\n- <!-- id: x -->": (2, "without text"),
    "x" * 300_000: (None, "longer than"),
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:40])
def test_mistakes_are_told_in_one_line(text):
    line, what = BAD[text]
    with pytest.raises(UserError) as caught:
        parse_soul(text, "my.md")
    message = str(caught.value)
    assert message.startswith(f"my.md:{line}: " if line else "my.md: ") and what in message and "\n" not in message
    assert len(message) < 900


def test_mistakes_of_files(tmp_path):
    for name, data, what in [("a", b"\x89PNG\0\0", "binary"), ("b", b"ok\n\xff\xfe", ":2: is not UTF-8"), ("c", b"", "is empty")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=what):
            load_soul(tmp_path / name)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError):
            load_soul(path)


pieces = st.sampled_from(
    [
        "---\n",
        "name: x\n",
        "# T\n",
        "## Rules\n",
        "### sub\n",
        "- ",
        "  - ",
        "1. ",
        "<!-- ",
        " -->",
        "id: a",
        "check: no_emoji",
        "; ",
        "repair: yes",
        "\n",
        "\n\n",
        "```\n",
        "`",
        "text ",
        "\t",
        "\r",
        "é",
        "(",
        "'",
        '"',
    ]
)


@given(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=30).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_is_a_user_error(text):
    try:
        soul = parse_soul(text)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert soul.principles and len({p.id for p in soul.principles}) == len(soul.principles)
    assert all(p.text and p.line >= 1 and "\0" not in p.text for p in soul.principles)
    assert parse_soul(text) == soul
    assert all(f"- [{p.id}] {p.text}" in soul.text for p in soul.principles)


words = st.text("abcdefgh", min_size=1, max_size=6)


@given(
    st.lists(
        st.tuples(words, st.lists(st.sampled_from(["no_emoji", "max_words(3)", 'forbid("x; y")']), max_size=3)), min_size=1, max_size=6
    )
)
@settings(max_examples=100, deadline=None)
def test_written_principles_are_read_back(rows):
    lines = [f"- {text} <!-- id: p{i}{''.join(f'; check: {check}' for check in checks)} -->" for i, (text, checks) in enumerate(rows)]
    soul = parse_soul("## Rules\n\n" + "\n".join(lines))
    assert [(p.id, p.text, [str(c) for c in p.checks], p.line) for p in soul.principles] == [
        (f"p{i}", text, checks, i + 3) for i, (text, checks) in enumerate(rows)
    ]


@pytest.mark.parametrize(
    "one, other, what",
    [
        ("min_words(9)", "max_words(8)", "cannot hold"),
        ("max_words(8)", "min_words(9)", "cannot hold"),
        ("min_sentences(3)", "max_sentences(2)", "cannot hold"),
        ("min_sentences(9)", "max_words(8)", "cannot hold"),
        ("max_words(8)", "max_words(9)", "set max_words to 8 and to 9"),
        ("lowercase_prose", "sentence_case", "opposite"),
        ("contractions", "no_contractions", "opposite"),
        ("lowercase_prose", 'require_opening("Arr")', 'requires "Arr"'),
        ("lowercase_prose", 'require_ending("Bye")', 'requires "Bye"'),
        ('forbid("arr")', 'require_phrase("arr matey")', "forbid forbids"),
        ("no_question_in_final_turn", 'require_ending("ok?")', 'requires "ok?"'),
        ("no_emoji", 'require_ending("🦜")', "no_emoji forbids"),
        ("max_emoji(0)", 'require_opening("🦜")', "max_emoji forbids"),
        ("no_exclamation", 'require_opening("arr!")', "no_exclamation forbids"),
        ("no_offer", 'require_ending("let me know")', "no_offer forbids"),
        ("max_words(1)", 'require_phrase("two words")', "max_words forbids"),
    ],
)
def test_conflicts_are_seen(one, other, what):
    soul = parse_soul(f"## Rules\n- a <!-- id: a; check: {one} -->\n- b <!-- id: b; check: {other} -->")
    (told,) = conflicts(soul)
    assert what in told and "[a]" in told and "[b]" in told


def test_no_conflict_where_there_is_none():
    soul = parse_soul(
        '## Rules\n- a <!-- check: lowercase_prose; check: require_opening("arr"); check: no_question_in_final_turn -->\n'
        '- b <!-- check: min_words(3); check: max_sentences(1); check: forbid("bar"); check: require_opening("ok?", "arr") -->'
    )
    assert conflicts(soul) == []
    assert conflicts(parse_soul("## Rules\n- Be kind.\n- be  kind")) == ["[be-kind] and [be-kind-2] say the same"]


def test_the_command(tmp_path, capsys):
    path, reply = tmp_path / "s.md", tmp_path / "reply.txt"
    path.write_text(FULL)
    assert main(Config(path)) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lowercase_prose", "unverified", "brave", "max_words(80)", parse_soul(FULL).hash[:16]))
    reply.write_text("Hello there")
    assert main(Config(path, reply)) == 1
    assert "lowercase_prose at 0:5" in capsys.readouterr().out
    reply.write_text("hello there")
    assert main(Config(path, reply)) == 0
    path.write_text("## Rules\n- a [red]x[/bold] \x1b[31m <!-- check: max_words(1); check: min_words(2) -->")
    assert main(Config(path)) == 0
    printed = capsys.readouterr().out
    assert "conflict:" in printed and "\x1b" not in printed and "[/bold]" in printed
