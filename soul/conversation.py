"""Conversations: plain dicts in the chat format that Hugging Face `datasets`, TRL and vLLM read.

    {"role": "system" | "user" | "assistant" | "tool", "content": str,
     "tool_calls"?: [{"type": "function", "function": {"name": str, "arguments": JSON string}}]}

`arguments` stays a JSON string because Arrow would fill every other tool's keys with null; every value inside it is a
string, because the token template carries raw strings (an `offset` of 40 is "40").
"""

import json
import re

_SURROGATE = re.compile("[\ud800-\udfff]")

ROLES = ("system", "user", "assistant", "tool")
Message = dict


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}


def assistant(content: str, *calls: dict) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)} if calls else {"role": "assistant", "content": content}


def tool_call(name: str, /, **args: str) -> dict:
    """A call in the wire format; Grep's `-A` and `-B` are passed as `**{"-A": "2"}`."""
    return call_from(name, args)


def call_from(name: str, args: dict[str, str]) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(args, ensure_ascii=False)}}


def name_of(call: dict) -> str:
    return call["function"]["name"]


def arguments(call: dict) -> dict[str, str]:
    """The call's arguments as a dict; raises ValueError when they are not a JSON object."""
    args = json.loads(call["function"]["arguments"])
    if not isinstance(args, dict):
        raise ValueError("arguments are not a JSON object")
    return args


def calls_of(message: Message) -> list[dict]:
    return message.get("tool_calls") or []


def named_calls(message: Message) -> list[tuple[str, dict[str, str]]]:
    """(name, arguments) of every call; raises ValueError as `arguments` does."""
    return [(name_of(call), arguments(call)) for call in calls_of(message)]


def validate(messages: list[Message]) -> list[str]:
    """Problems that keep `messages` from being rendered by the template, each naming the message; [] when it is sound."""
    problems = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            problems.append(f"{where}: role must be one of {', '.join(ROLES)}")
            continue
        if not isinstance(message.get("content"), str):
            problems.append(f"{where}: content must be a string")
        elif _has_surrogate(message["content"]):
            problems.append(f"{where}: content has a lone surrogate, which UTF-8 cannot hold")
        if calls_of(message) and message["role"] != "assistant":
            problems.append(f"{where}: only an assistant may call tools")
            continue
        problems += [f"{where}, call {n}: {problem}" for n, call in enumerate(calls_of(message)) for problem in _call_problems(call)]
    return problems


def _call_problems(call: dict) -> list[str]:
    try:
        name, args = name_of(call), arguments(call)
    except (KeyError, TypeError, ValueError) as error:
        return [f"not a function call with JSON arguments ({type(error).__name__})"]
    if not isinstance(name, str) or not name:
        return ["the name must be a non-empty string"]
    texts = [name, *args, *(value for value in args.values() if isinstance(value, str))]
    problems = [f"argument {key!r} must be a string" for key, value in args.items() if not isinstance(value, str)]
    return problems + (["has a lone surrogate"] if any(map(_has_surrogate, texts)) else [])


def canonical(messages: list[Message]) -> list[Message]:
    """A normalised copy of rows from elsewhere: None content is "", dict arguments become a JSON string of strings,
    empty `tool_calls` and foreign keys are dropped. Raises ValueError on a call that has no such reading."""
    result = []
    for message in messages:
        copy = {"role": message["role"], "content": message.get("content") or ""}
        if calls := [_canonical_call(call) for call in calls_of(message)]:
            copy["tool_calls"] = calls
        result.append(copy)
    return result


def _canonical_call(call: dict) -> dict:
    args = call["function"]["arguments"]
    args = json.loads(args) if isinstance(args, str) else args
    if not isinstance(args, dict):
        raise ValueError("arguments are not a JSON object")
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in args.items() if value is not None
    }
    return call_from(name_of(call), texts)


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None
