import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.judge import COLUMNS, judge_call, parse_chat_reply
from soul.conversation import arguments, assistant, calls_of, name_of, tool_call
from soul.template import SPECIAL_TOKENS, Template


class Bytes:
    """One token per byte, control tokens above them."""

    special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


TEMPLATE = Template(Bytes())


def ids_of(*parts):
    """Text and control tokens, as a model would emit them after <|assistant_start|>."""
    return [i for part in parts for i in ([Bytes.special[part]] if part in Bytes.special else part.encode())]


START, ARG, VAL, END, STOP = "<|tool_call_start|>", "<|tool_arg|>", "<|tool_val|>", "<|tool_call_end|>", "<|assistant_end|>"
GOOD = ("looking. ", START, "Read", ARG, "file_path", VAL, "a.py", ARG, "offset", VAL, "4", END, STOP)


def columns(*parts, finished=True):
    parsed = TEMPLATE.parse_reply(ids_of(*parts))
    got = judge_call(parsed.messages[0], parsed.problems, finished=finished)
    assert got["valid"] == all(got[c] for c in COLUMNS)
    # the eval and the agent must agree on what may be executed
    assert got["valid"] == (bool(calls_of(parsed.messages[0])) and not parsed.problems and finished)
    return {name for name, ok in got.items() if not ok}


def test_a_good_call_passes_every_column():
    assert columns(*GOOD) == set()


@pytest.mark.parametrize(
    ("parts", "failed"),
    [
        (GOOD[:-1], {"ends after the call"}),  # no end token
        ((*GOOD[:-1], "and then", STOP), {"ends after the call"}),
        ((*GOOD, "more"), {"ends after the call"}),
        (
            ("x", START, "Open", ARG, "file_path", VAL, "a", END, STOP),
            {"known tool", "required arguments", "no unknown arguments", "typed values"},
        ),
        (("x", START, "Read", ARG, "offset", VAL, "4", END, STOP), {"required arguments"}),
        (("x", START, "Read", ARG, "file_path", VAL, "a", ARG, "depth", VAL, "4", END, STOP), {"no unknown arguments"}),
        (("x", START, "Read", ARG, "file_path", VAL, "a", ARG, "offset", VAL, "four", END, STOP), {"typed values"}),
        (("x", START, "Read", ARG, "file_path", VAL, "a", STOP), {"syntax"}),  # never closed
        (("x", START, "Read", ARG, "file_path", VAL, "a", VAL, "b", END, STOP), {"syntax"}),
    ],
)
def test_each_fault_has_its_column(parts, failed):
    assert columns(*parts) == failed | {"valid"}


def test_no_call_fails_everything():
    assert columns("just talk", STOP) == {*COLUMNS, "valid"}
    assert columns('{"name": "Read", "arguments": {"file_path": "a"}}', STOP) == {*COLUMNS, "valid"}


def test_a_cut_reply_does_not_end():
    assert columns(*GOOD, finished=False) == {"ends after the call", "valid"}


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "Read", "file_path", "a", "7"]), max_size=14))
def test_any_token_soup_is_judged_as_the_agent_would(parts):
    columns(*parts)


CALL = {"name": "Grep", "arguments": {"pattern": "def load", "-A": 2}}
INNER = json.dumps(CALL)


@pytest.mark.parametrize(
    "text",
    [
        f"let me look.\n{INNER}",
        f"let me look.\n```json\n{INNER}\n```\nThis will find it.",
        f"let me look.\n<tool_call>\n{INNER}\n</tool_call>",
        f"let me look.\n<tool_call>[{INNER}]</tool_call>",
        f"let me look. [{INNER}, {INNER}]",
        'let me look. {"tool": "Grep", "parameters": {"pattern": "def load", "-A": "2"}}',
        'let me look. {"type": "function", "function": {"name": "Grep", "arguments": "{\\"pattern\\": \\"def load\\", \\"-A\\": 2}"}}',
        f'let me look. {{"tool_calls": [{INNER}]}}',
        'let me look. ```\n{"name": "Grep",\n "args": {"pattern": "def load", "-A": 2, "path": null}}\n```',
    ],
)
def test_chat_formats_are_read(text):
    message, problems = parse_chat_reply(text)
    (call,) = calls_of(message)
    assert (name_of(call), arguments(call), problems) == ("Grep", {"pattern": "def load", "-A": "2"}, [])
    assert message["content"].startswith("let me look.") and "Grep" not in message["content"] and "```" not in message["content"]
    assert judge_call(message, problems, finished=True)["valid"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call",
        "{",
        '{"name": "Grep"',
        '{"pattern": "x"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "Grep", "arguments": "x"}',
        "{" * 5000,
    ],
)
def test_chat_text_without_a_call(text):
    message, _ = parse_chat_reply(text)
    assert message == assistant(text.strip())


def test_deep_nesting_is_not_a_crash():
    parse_chat_reply('{"a":' * 3000)
    parse_chat_reply("[" * 3000 + "{")


def test_lone_surrogates_of_json_are_replaced():
    message, _ = parse_chat_reply('{"name": "Grep", "arguments": {"pattern": "\\ud800"}}')
    json.dumps(message, ensure_ascii=False).encode()


@given(st.text(max_size=60))
def test_chat_parser_never_raises(text):
    message, _ = parse_chat_reply(text + '{"name": "Read", "arguments": {"file_path": "' + text.replace('"', ""))
    assert message["role"] == "assistant"


@given(st.dictionaries(st.sampled_from(["file_path", "offset", "limit"]), st.text(max_size=20)))
def test_chat_arguments_survive(args):
    message, _ = parse_chat_reply("on it. " + json.dumps({"name": "Read", "arguments": args}))
    assert calls_of(message) == [tool_call("Read", **args)]
