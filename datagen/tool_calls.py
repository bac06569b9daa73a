"""Tool calls as servers give them, in the one form that rows have (soul/conversation.py).

`arguments` comes as a JSON string, an object, null or ""; the last two are a call without arguments. Ids come empty or
twice, so they are dropped: the order of the calls says which result belongs to which. A tool of an unknown name is still a
call: what is wrong with it is said by `soul.tools.problem`, in the words that the model gets to read.
"""

import json

from soul.conversation import call_from


class BadCall(ValueError):
    """A call without a reading. `cut`: it ended in the middle, as it does at max_tokens; otherwise it is no call at all."""

    def __init__(self, why: str, cut: bool = False):
        super().__init__(why)
        self.cut = cut


def read_calls(calls: object) -> list[dict]:
    """`message.tool_calls` of a completion, normalised: values are strings, nulls are left out; [] when there are none. Raises
    BadCall when any of them has no name, or arguments that are no JSON object. All or none: half a turn is no turn."""
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadCall("tool_calls is not a list")
    return [_read(call) for call in calls]


def _read(call: object) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadCall("a tool call has no name")
    name, given = clean(function["name"].strip()), function.get("arguments")
    given = given.strip() if isinstance(given, str) else given
    args = (_parse(name, given) if given and isinstance(given, str) else given) or {}
    if not isinstance(args, dict):
        raise BadCall(f"the arguments of {name} are no JSON object")
    try:
        kept = {key: value for key, value in args.items() if value is not None}
        texts = {clean(key): clean(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for key, v in kept.items()}
    except RecursionError:
        raise BadCall(f"the arguments of {name} are nested too deeply") from None
    return call_from(name, texts)


def _parse(name: str, text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        ends = error.msg.startswith("Unterminated string") or error.pos >= len(text) or not text.endswith("}")
        cut = ends and text.startswith("{")
        raise BadCall(f"the arguments of {name} {'are cut' if cut else 'are not JSON'}: {error.msg}", cut) from None
    except (ValueError, RecursionError):
        raise BadCall(f"the arguments of {name} are not JSON") from None  # a number of thousands of digits, or too deep


def clean(text: str) -> str:
    """`text` without lone surrogates (half an emoji, from servers that cut UTF-16), which no file and no request can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
