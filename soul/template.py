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
        Raises ValueError when `messages` is not sound (see `conversation.validate`)."""
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
        reader, messages = _Reader(self, ids), []
        problems = [] if reader.take("<|bos|>") else ["does not begin with <|bos|>"]
        while (start := reader.token) is not None:
            reader.position += 1
            if start not in _STARTS:
                problems.append(f"{start or 'text'} between turns")
                continue
            reader.problems = []
            messages.append(reader.turn(*_STARTS[start]))
            problems += [f"message {len(messages) - 1}: {fault}" for fault in reader.problems]
        return Parsed(messages, problems)

    def parse_reply(self, ids: list[int]) -> Parsed:
        """The one assistant message generated after `<|assistant_start|>`, end token included. Besides syntax, calls are
        held against the tool specs, so `problems == []` means every call may be executed as it stands."""
        reader = _Reader(self, ids)
        message = reader.turn("assistant", "<|assistant_end|>")
        if reader.token is not None:
            reader.problems.append("goes on after its end")
        faults = [tools.problem(name, args) for name, args in conversation.named_calls(message)]
        return Parsed([message], reader.problems + [fault for fault in faults if fault])


class _Reader:
    """A place in ids, and the faults met on the way to it."""

    def __init__(self, template: Template, ids: list[int]):
        self.template, self.ids, self.position = template, ids, 0
        self.problems: list[str] = []

    @property
    def token(self) -> str | None:
        """The control token here, "" for ordinary text, None at the end."""
        return self.template.token.get(self.ids[self.position], "") if self.position < len(self.ids) else None

    def take(self, token: str) -> bool:
        """Whether `token` stands here; then the place is behind it."""
        found = self.token == token
        self.position += found
        return found

    def turn(self, role: str, end: str) -> dict:
        """One turn's message, from behind its start token to behind `end`, or to where the next turn begins."""
        text, calls = self.text(), []
        while not (closed := self.take(end)) and self.token is not None and self.token not in _STARTS:
            if role == "assistant" and self.take("<|tool_call_start|>"):
                calls.append(self.call())
                if self.token == "":
                    self.problems.append("text after a call")
            else:
                self.problems.append(f"{self.token} in a wrong place")
                self.position += 1
            self.text()
        if not closed:
            self.problems.append(f"{end} is missing")
        return conversation.assistant(text, *calls) if role == "assistant" else {"role": role, "content": text}

    def call(self) -> dict:
        name, args = self.text(), {}
        while self.take("<|tool_arg|>"):
            key = self.text()
            if not self.take("<|tool_val|>"):
                self.problems.append(f"argument {key} of {name} has no <|tool_val|>")
                continue
            if key in args:
                self.problems.append(f"argument {key} of {name} is given twice")
            args[key] = self.text()
        if not self.take("<|tool_call_end|>"):
            self.problems.append(f"call of {name} has no <|tool_call_end|>")
        return conversation.call_from(name, args)

    def text(self) -> str:
        """The longest run of ordinary tokens, decoded as a whole (a character may span tokens)."""
        start = self.position
        while self.token == "":
            self.position += 1
        data = self.template.tokenizer.decode_bytes(self.ids[start : self.position])
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.problems.append("text is not UTF-8")
            return data.decode("utf-8", "replace")
