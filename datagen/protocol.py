"""Conversations with tools as a teacher reads and writes them: by the API, with ids, or in the text alone.

The text form is that of Hermes (`<tool_call>` around a JSON object), which many open models were trained on.
"""

import json
import re

from datagen.recipes.common import joined
from datagen.tool_calls import BadCall, read_calls
from soul import conversation

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_START, _END = re.compile(rf"\s*{OPEN}\s*"), re.compile(rf"\s*{CLOSE}\s*")


def split_calls(text: str) -> tuple[str, list[dict]]:
    """(text, calls) of a message in the text form. Raises BadCall unless blocks of one JSON object each end the message."""
    said, mark, rest = text.partition(OPEN)
    if not mark and CLOSE in text:
        raise BadCall(f"{CLOSE} without {OPEN}")
    found, at, rest = [], 0, mark + rest
    while at < len(rest):
        if not (start := _START.match(rest, at)):
            raise BadCall("something stands after the call; results come from the tool, not from you")
        try:
            value, at = json.JSONDecoder(strict=False).raw_decode(rest, start.end())
        except (ValueError, RecursionError) as error:
            raise BadCall(f"the call is not JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
        if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
            raise BadCall('a call is {"name": …, "arguments": {…}} and nothing else')
        if not (end := _END.match(rest, at)):
            raise BadCall(f"{CLOSE} is missing after the call")
        found, at = [*found, value], end.end()
    return said.strip(), read_calls([{"function": value} for value in found])


def call_text(call: tuple[str, dict[str, str]]) -> str:
    return json.dumps({"name": call[0], "arguments": call[1]}, ensure_ascii=False)


def written(message: dict) -> str:
    """A message in the text form."""
    blocks = [f"{OPEN}\n{call_text(call)}\n{CLOSE}" for call in conversation.named_calls(message)]
    return "\n".join([message["content"], *blocks] if message["content"] else blocks)


def as_text(messages: list[dict], results: bool = True) -> str:
    """A conversation to read, with or without what the tools gave."""
    return "\n\n".join(f"{message['role']}: {written(message)}" for message in messages if results or message["role"] != "tool")


def length(messages: list[dict]) -> int:
    """Characters."""
    return sum(len(written(message)) for message in messages)


def joined_text(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """For a teacher that knows no tools: calls in the text, results as the user's turn."""
    said = []
    for message in messages:
        shown = f"<tool_response>\n{message['content']}\n</tool_response>" if message["role"] == "tool" else written(message)
        said.append({"role": "user" if message["role"] == "tool" else message["role"], "content": shown})
    return _merged(joined(prompt, said))


def joined_native(prompt: list[dict], messages: list[dict]) -> list[dict]:
    """For a teacher with tools: calls and results with ids, of the nine characters that Mistral's templates want."""
    result, number, waiting = [], 0, []
    for message in messages:
        if calls := conversation.calls_of(message):
            waiting, number = [f"call{number + n:05d}" for n in range(len(calls))], number + len(calls)
            message = message | {"tool_calls": [call | {"id": name} for call, name in zip(calls, waiting, strict=True)]}
        elif message["role"] == "tool":
            message = message | {"tool_call_id": waiting.pop(0)}
        result.append(message)
    return _merged(joined(prompt, result))


def _merged(messages: list[dict]) -> list[dict]:
    """Turns of the user that follow each other as one: many chat templates want user and assistant to alternate."""
    result: list[dict] = []
    for message in messages:
        if result and message["role"] == result[-1]["role"] == "user":
            result[-1] = conversation.user(f"{result[-1]['content']}\n\n{message['content']}")
        else:
            result.append(message)
    return result
