"""The token template: conversations to ids and back, segment by segment, never through one string.

Text is encoded as ordinary text and control tokens are inserted as ids, so text that spells `<|assistant_start|>` is
inert; calls are parsed over ids, so an argument that spells `<|tool_arg|>` stays an argument. The same functions serve
datagen (true lengths), training, evals and the agent.

    <|bos|> ( <|system_start|> text <|system_end|> | <|user_start|> text <|user_end|>
            | <|assistant_start|> text ( <|tool_call_start|> Name ( <|tool_arg|> key <|tool_val|> value )* <|tool_call_end|> )* <|assistant_end|>
            | <|tool_result_start|> text <|tool_result_end|> )*
"""

from dataclasses import dataclass, field
from typing import Protocol

from soul import conversation, tools
from soul.files import sha256_json

SPECIAL_TOKENS = (
    "<|bos|>", "<|pad|>", "<|system_start|>", "<|system_end|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|tool_call_start|>", "<|tool_arg|>", "<|tool_val|>", "<|tool_call_end|>", "<|tool_result_start|>", "<|tool_result_end|>",
)  # fmt: skip
RULES = "bos once; loss on assistant text, calls and <|assistant_end|>; a turn that calls ends <|tool_call_end|><|assistant_end|>; values raw; v1"
_TURNS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool_result"}
_STARTS = {f"<|{name}_start|>": (role, f"<|{name}_end|>") for role, name in _TURNS.items()}


class TextTokenizer(Protocol):
    """What the template needs: `encode` never gives a control id, and `decode_bytes` inverts it byte for byte."""

    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids and the loss mask (1 = trained), of the same length."""

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Parsed:
    """Messages read from ids, and every syntax fault met on the way ([] = well-formed)."""

    messages: list[dict]
    problems: list[str] = field(default_factory=list)


class Template:
    """Renders conversations for one tokenizer. `hash` covers tokens, tool specs and rules; `describe()` is what is hashed."""

    def __init__(self, tokenizer: TextTokenizer):
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.special]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}")
        self.tokenizer = tokenizer
        self.id = {token: tokenizer.special[token] for token in SPECIAL_TOKENS}
        self.token = {number: token for token, number in self.id.items()}
        self.stop_ids = (self.id["<|assistant_end|>"], self.id["<|bos|>"], self.id["<|user_start|>"], self.id["<|tool_result_start|>"])
        self.hash = sha256_json(self.describe())

    def describe(self) -> dict:
        specs = [[spec.name, spec.doc, [[p.name, p.doc, p.required, p.type] for p in spec.params]] for spec in tools.TOOLS.values()]
        return {"special_tokens": self.id, "tools": specs, "rules": RULES}

    # --- conversation → ids

    def encode(self, messages: list[dict], *, prompt: bool = False) -> Encoded:
        """Ids and loss mask of a whole conversation; `prompt=True` appends `<|assistant_start|>` for the model to go on.

        Raises:
            ValueError: when `messages` is not sound (see `conversation.validate`).
        """
        if problems := conversation.validate(messages):
            raise ValueError("; ".join(problems))
        ids, mask = [self.id["<|bos|>"]], [0]
        for message in messages:
            turn = _TURNS[message["role"]]
            trained = int(message["role"] == "assistant")
            body = self._body(message) + [self.id[f"<|{turn}_end|>"]]
            ids += [self.id[f"<|{turn}_start|>"], *body]
            mask += [0] + [trained] * len(body)
        if prompt:
            ids.append(self.id["<|assistant_start|>"])
            mask.append(0)
        return Encoded(ids, mask)

    def _body(self, message: dict) -> list[int]:
        ids = self.tokenizer.encode(message["content"])
        for call in conversation.calls_of(message):
            ids += [self.id["<|tool_call_start|>"], *self.tokenizer.encode(conversation.name_of(call))]
            for key, value in conversation.arguments(call).items():
                ids += [self.id["<|tool_arg|>"], *self.tokenizer.encode(key), self.id["<|tool_val|>"], *self.tokenizer.encode(value)]
            ids.append(self.id["<|tool_call_end|>"])
        return ids

    # --- ids → conversation

    def parse(self, ids: list[int]) -> Parsed:
        """The conversation that `ids` render; never raises, faults are listed."""
        messages, problems, position = [], [], 0
        if not ids or self.token.get(ids[0]) != "<|bos|>":
            problems.append("does not begin with <|bos|>")
        else:
            position = 1
        while position < len(ids):
            start = self.token.get(ids[position])
            if start not in _STARTS:
                problems.append(f"{start or 'text'} between turns")
                position += 1
                continue
            role, end = _STARTS[start]
            message, faults, position = self._parse_turn(ids, position + 1, role, end)
            messages.append(message)
            problems += [f"message {len(messages) - 1}: {fault}" for fault in faults]
        return Parsed(messages, problems)

    def parse_reply(self, ids: list[int]) -> Parsed:
        """The one assistant message generated after `<|assistant_start|>`, end token included. Besides syntax, calls are
        held against the tool specs, so `problems == []` means every call may be executed as it stands."""
        message, problems, position = self._parse_turn(ids, 0, "assistant", "<|assistant_end|>")
        if position < len(ids):
            problems.append("goes on after its end")
        for call in conversation.calls_of(message):
            if fault := tools.problem(conversation.name_of(call), conversation.arguments(call)):
                problems.append(fault)
        return Parsed([message], problems)

    def _parse_turn(self, ids: list[int], position: int, role: str, end: str) -> tuple[dict, list[str], int]:
        """Read one turn's body from `position`; gives (message, faults, position after the turn)."""
        problems: list[str] = []
        text, position = self._text(ids, position, problems)
        calls = []
        while position < len(ids):
            token = self.token.get(ids[position])
            if token == end:
                break
            if token == "<|tool_call_start|>" and role == "assistant":
                call, position = self._parse_call(ids, position + 1, problems)
                calls.append(call)
                if position < len(ids) and ids[position] not in self.token:
                    problems.append("text after a call")
                    _, position = self._text(ids, position, problems)
            elif token in _STARTS:  # the next turn begins: this one was never closed
                problems.append(f"{end} is missing")
                return _message(role, text, calls), problems, position
            else:
                problems.append(f"{token} in a wrong place")
                _, position = self._text(ids, position + 1, problems)
        if position >= len(ids):
            problems.append(f"{end} is missing")
        return _message(role, text, calls), problems, position + 1

    def _parse_call(self, ids: list[int], position: int, problems: list[str]) -> tuple[dict, int]:
        name, position = self._text(ids, position, problems)
        args: dict[str, str] = {}
        while position < len(ids) and self.token.get(ids[position]) == "<|tool_arg|>":
            key, position = self._text(ids, position + 1, problems)
            if position >= len(ids) or self.token.get(ids[position]) != "<|tool_val|>":
                problems.append(f"argument {key} of {name} has no <|tool_val|>")
                continue
            if key in args:
                problems.append(f"argument {key} of {name} is given twice")
            args[key], position = self._text(ids, position + 1, problems)
        if position < len(ids) and self.token.get(ids[position]) == "<|tool_call_end|>":
            return conversation.call_from(name, args), position + 1
        problems.append(f"call of {name} has no <|tool_call_end|>")
        return conversation.call_from(name, args), position

    def _text(self, ids: list[int], position: int, problems: list[str]) -> tuple[str, int]:
        """The longest run of ordinary tokens from `position`, decoded as a whole (a character may span tokens)."""
        end = position
        while end < len(ids) and ids[end] not in self.token:
            end += 1
        try:
            return self.tokenizer.decode_bytes(ids[position:end]).decode("utf-8"), end
        except UnicodeDecodeError:
            problems.append("text is not UTF-8")
            return self.tokenizer.decode_bytes(ids[position:end]).decode("utf-8", "replace"), end


def _message(role: str, text: str, calls: list[dict]) -> dict:
    return conversation.assistant(text, *calls) if role == "assistant" else {"role": role, "content": text}
