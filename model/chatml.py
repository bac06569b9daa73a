"""ChatML, the base models' own template (SmolLM2, Qwen2.5, Qwen3), rendered segment by segment to ids."""

from collections.abc import Sequence

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


def encode_chatml(tokenizer, messages: Sequence[dict], generation: bool = True) -> list[int]:
    """Ids of `messages` in ChatML; `generation` opens the assistant's turn. The same ids as the models' own templates give
    on text without control tokens, while text that spells a control token stays text. No system turn is added.
    Raises ValueError for a message with tool calls (ChatML itself has none: render them into the content), or a tokenizer without ChatML's control tokens.
    """
    control = tokenizer.base_special
    if TURN_START not in control or TURN_END not in control:
        raise ValueError("the tokenizer has no ChatML control tokens")
    start, end, newline = control[TURN_START], control[TURN_END], tokenizer.encode("\n")
    ids: list[int] = []
    for message in messages:
        if message.get("tool_calls"):
            raise ValueError("ChatML has no tool calls: render them into the content")
        ids += [start, *tokenizer.encode(f"{message['role']}\n{message['content']}"), end, *newline]
    return [*ids, start, *tokenizer.encode("assistant\n")] if generation else ids


def chatml_stops(tokenizer) -> list[int]:
    """Ids that end a generated turn: the turn's end, a new turn, and the end of text."""
    return [tokenizer.base_special[name] for name in (TURN_END, TURN_START, "<|endoftext|>") if name in tokenizer.base_special]
