"""One reply, judged: does it keep the SOUL, and is it a tool call that the agent could execute?"""

import json
import re

from soul import conversation, tools
from soul.files import sound
from soul.prose import mask, words
from soul.registry import CHECKS
from soul.spec import CheckCall, Soul, check_table

ALL = "all at once"
ABOUT_CALLS = ("explain_before_act", "one_call_per_turn", "max_edit_lines")
ENDINGS = ("<|assistant_end|> is missing", "goes on after its end", "text after a call")
COLUMNS = ("makes a call", "syntax", "known tool", "required arguments", "no unknown arguments", "typed values", "ends after the call")


def judge_soul(soul: Soul, prompt: list[dict], reply: dict, *, usable: bool = True) -> dict[str, bool]:
    """Verdict per verified principle that can be kept or broken here, for the one message `reply` that answers `prompt`.

    A principle about calls says nothing of a reply without one, nor one about last words of a reply that goes on to call: such
    verdicts would be free points, so they are left out. A reply without a word outside code, or not `usable`, fails every
    principle that is left: silence keeps no promise, and a base model's "system system system" is lowercase by accident.
    """
    acts = bool(conversation.calls_of(reply))
    tested = [p.id for p in soul.verified if any(_applies(call, acts) for call in p.checks)]
    if not usable or not words(mask(reply["content"])):
        return dict.fromkeys(tested, False)
    broken = {row["principle"] for row in check_table(soul, [*prompt, reply]) if not row["ok"]}
    return {p: p not in broken for p in tested}


def _applies(call: CheckCall, acts: bool) -> bool:
    scope = CHECKS[call.name].scope
    return acts if scope == "conversation" or call.name in ABOUT_CALLS else not (acts and scope == "final")


def judge_call(message: dict, problems: list[str], *, finished: bool) -> dict[str, bool]:
    """Columns of validity for one reply to a prompt that needs a tool; `valid` is all of them.

    A reply without a call fails every column. `problems` are those of `Template.parse_reply` or `parse_chat_reply`.
    """
    if not (calls := conversation.named_calls(message)):
        return dict.fromkeys((*COLUMNS, "valid"), False)
    specs = [tools.TOOLS.get(name) for name, _ in calls]
    known = all(specs)
    both = [(spec, args) for spec, (_, args) in zip(specs, calls) if spec]
    values = (
        True,
        not syntax_faults(message, problems),
        known,
        known and all(p.name in args for spec, args in both for p in spec.params if p.required),
        known and all(set(args) <= {p.name for p in spec.params} for spec, args in both),
        known and all(_typed(spec, args) for spec, args in both),
        finished and not any(p in ENDINGS for p in problems),
    )
    return dict(zip(COLUMNS, values)) | {"valid": all(values)}


def syntax_faults(message: dict, problems: list[str]) -> list[str]:
    """Problems that leave no message the agent could use: neither a missing end nor a call that is well-formed but wrong."""
    semantic = {tools.problem(name, args) for name, args in conversation.named_calls(message)}
    return [p for p in problems if p not in ENDINGS and p not in semantic]


def _typed(spec: tools.ToolSpec, args: dict[str, str]) -> bool:
    """Every known argument alone has a value of its type; the tool's own rule decides."""
    need = {p.name: "" for p in spec.params if p.required}
    return all(tools.problem(spec.name, need | {k: v}) is None for k, v in args.items() if k in {p.name for p in spec.params})


def parse_chat_reply(text: str) -> tuple[dict, list[str]]:
    """A chat model's reply as (assistant message, problems): the remark is what stands before the first call.

    Read as a call: `<tool_call>{…}</tool_call>`, fenced JSON, a bare JSON object, or a list of them, with name|tool|function and
    arguments|parameters|args, also nested as in OpenAI's format. What follows the first call is dropped, as by a harness with a
    stop string.
    """
    for match in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if call := _as_call(value):
            remark = re.sub(r"(```\w*|<\|?tool_call\|?>|\[)?\s*(\[)?\s*$", "", text[: match.start()])
            return conversation.assistant(remark.strip(), call), []
    return conversation.assistant(text.strip()), []


def _as_call(value: dict) -> dict | None:
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    name = next((value[k] for k in ("name", "tool", "function") if isinstance(value.get(k), str)), None)
    args = next((value[k] for k in ("arguments", "parameters", "args") if k in value), None)
    if isinstance(args, str):
        try:
            args = json.loads(args, strict=False)
        except ValueError:
            return None
    if not name or not isinstance(args, dict):
        return None
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in args.items() if v is not None}
    return conversation.call_from(sound(name), {sound(k): sound(v) for k, v in texts.items()})
