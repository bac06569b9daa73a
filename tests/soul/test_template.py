import pytest
from hypothesis import given
from hypothesis import strategies as st

from soul import conversation as c
from soul.template import SPECIAL_TOKENS, Template


class ByteTokenizer:
    """One id per byte, control ids above: the smallest tokenizer that keeps the protocol's two promises."""

    special = {token: 256 + n for n, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode_bytes(self, ids):
        return bytes(id for id in ids if id < 256)


TEMPLATE = Template(ByteTokenizer())
ID = TEMPLATE.id

fragments = [token[i:j] for token in SPECIAL_TOKENS for i, j in ((0, None), (0, 5), (5, None), (2, -2))]
texts = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from(fragments)), max_size=5).map(
    "".join
)
calls = st.builds(c.call_from, texts.filter(bool), st.dictionaries(texts, texts, max_size=3))
messages = st.lists(
    st.one_of(
        st.builds(c.system, texts),
        st.builds(c.user, texts),
        st.builds(c.tool, texts),
        st.builds(lambda t, k: c.assistant(t, *k), texts, st.lists(calls, max_size=2)),
    ),
    max_size=6,
)


@given(messages)
def test_encode_then_parse_is_the_identity(conversation):
    encoded = TEMPLATE.encode(conversation)
    assert TEMPLATE.parse(encoded.ids) == type(TEMPLATE.parse([]))(conversation, [])
    assert len(encoded.ids) == len(encoded.mask)


@given(messages)
def test_text_never_gives_a_control_id(conversation):
    ids = TEMPLATE.encode(conversation).ids
    control = [TEMPLATE.token[id] for id in ids if id in TEMPLATE.token]
    expected = ["<|bos|>"]
    for message in conversation:
        turn = {"tool": "tool_result"}.get(message["role"], message["role"])
        expected.append(f"<|{turn}_start|>")
        for call in c.calls_of(message):
            expected += ["<|tool_call_start|>", *["<|tool_arg|>", "<|tool_val|>"] * len(c.arguments(call)), "<|tool_call_end|>"]
        expected.append(f"<|{turn}_end|>")
    assert control == expected


@given(messages)
def test_the_mask_is_exactly_what_the_assistant_says(conversation):
    encoded = TEMPLATE.encode(conversation)
    inside = False
    for id, trained in zip(encoded.ids, encoded.mask):
        assert trained == inside
        if id == ID["<|assistant_start|>"]:
            inside = True
        elif id == ID["<|assistant_end|>"]:
            inside = False


@given(st.lists(st.integers(0, 255 + len(SPECIAL_TOKENS)), max_size=30))
def test_parsing_never_raises_and_accepts_only_what_encode_writes(ids):
    parsed = TEMPLATE.parse(ids)
    if not parsed.problems:
        assert TEMPLATE.encode(parsed.messages).ids == ids
    TEMPLATE.parse_reply(ids)


GREP = c.assistant("i'll look.", c.tool_call("Grep", pattern="def load", path="."))


def reply_ids(message):
    return TEMPLATE.encode([message]).ids[2:]


def test_a_well_formed_reply_has_no_problems():
    parsed = TEMPLATE.parse_reply(reply_ids(GREP))
    assert parsed.messages == [GREP] and parsed.problems == []


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda ids: ids[:-1], "<|assistant_end|> is missing"),
        (lambda ids: ids[:-2] + ids[-1:], "has no <|tool_call_end|>"),
        (lambda ids: [*ids, 65], "goes on after its end"),
        (lambda ids: [*ids[:-1], 65, ids[-1]], "text after a call"),
        (lambda ids: [ID["<|bos|>"], *ids], "<|bos|> in a wrong place"),
        (lambda ids: [id for id in ids if id != ID["<|tool_val|>"]], "has no <|tool_val|>"),
        (lambda ids: [*ids[:-1], ID["<|user_start|>"]], "<|assistant_end|> is missing"),
        (lambda ids: [0xFF, *ids], "not UTF-8"),
    ],
)
def test_every_syntax_fault_is_named(spoil, problem):
    assert any(problem in found for found in TEMPLATE.parse_reply(spoil(reply_ids(GREP))).problems)


@pytest.mark.parametrize(
    "call, problem",
    [
        (c.tool_call("Delete", file_path="x"), "unknown tool Delete"),
        (c.tool_call("Read"), "Read needs file_path"),
        (c.tool_call("Read", file_path="x", mode="fast"), "Read has no argument mode"),
        (c.tool_call("Read", file_path="x", offset="ten"), "offset must be a whole number"),
        (c.tool_call("Edit", file_path="x", new_string="y", replace_all="maybe"), "must be true or false"),
    ],
)
def test_calls_are_held_against_the_tool_specs(call, problem):
    assert any(problem in found for found in TEMPLATE.parse_reply(reply_ids(c.assistant("", call))).problems)


def test_a_repeated_argument_is_a_fault():
    ids = reply_ids(c.assistant("", c.tool_call("Read", file_path="x")))
    arg = ids[ids.index(ID["<|tool_arg|>"]) : ids.index(ID["<|tool_call_end|>"])]
    at = ids.index(ID["<|tool_call_end|>"])
    assert any("given twice" in p for p in TEMPLATE.parse_reply(ids[:at] + arg + ids[at:]).problems)


def test_a_prompt_is_a_prefix_of_the_whole():
    whole = TEMPLATE.encode([c.user("hi"), c.assistant("hello")]).ids
    prompt = TEMPLATE.encode([c.user("hi")], prompt=True).ids
    assert whole[: len(prompt)] == prompt and prompt[-1] == ID["<|assistant_start|>"]


def test_unsound_conversations_are_refused():
    for bad in (
        [{"role": "robot", "content": ""}],
        [{"role": "user", "content": None}],
        [c.user("\ud800")],
        [{"role": "user", "content": "", "tool_calls": [c.tool_call("Read")]}],
    ):
        with pytest.raises(ValueError, match="message 0"):
            TEMPLATE.encode(bad)


def test_the_hash_follows_tokens_and_tools(monkeypatch):
    from soul import tools

    class Other(ByteTokenizer):
        special = {**ByteTokenizer.special, "<|bos|>": 999}

    assert Template(Other()).hash != TEMPLATE.hash
    monkeypatch.delitem(tools.TOOLS, "Bash")
    assert Template(ByteTokenizer()).hash != TEMPLATE.hash
