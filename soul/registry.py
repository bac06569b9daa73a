"""What a check is: the decorator that registers one, the types its parameters may have, and how it is run."""

import inspect
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from soul import prose

MAX_HITS = 8  # violations kept per message and check: enough to revise by, few enough to store
CHECKS: dict[str, "Check"] = {}


@dataclass(frozen=True)
class Violation:
    """One breach: `span` is (start, end) in that message's content, (0, 0) when it lies in a call or in what is missing."""

    principle: str
    check: str
    message_index: int
    span: tuple[int, int]
    why: str


@dataclass(frozen=True)
class Reply:
    """An assistant message as checks see it: `prose` is `text` with code masked, `calls` are (tool name, arguments)."""

    text: str
    prose: str
    calls: tuple[tuple[str, dict[str, str]], ...]


class Pattern(str):
    """Parameter type: a regular expression that cannot backtrack for long."""


class Ratio(float):
    """Parameter type: a number from 0 to 1."""


@dataclass(frozen=True)
class Check:
    """A registered check. Scope "turn": every assistant message; "each": those of them that are not calls alone; "final":
    the last one without calls; "conversation": all messages at once."""

    name: str
    run: Callable
    scope: str
    takes: dict[str, type]
    doc: str

    @property
    def usage(self) -> str:
        kinds = {int: "a whole number", list[str]: "phrases in quotes", Pattern: "a regular expression", Ratio: "a number from 0 to 1"}
        return f"{self.name}({', '.join(f'{name}: {kinds[kind]}' for name, kind in self.takes.items())})"

    def __call__(self, messages: list[dict], *, principle: str = "", **params) -> list[Violation]:
        if self.scope == "conversation":
            hits = islice(self.run(messages, **params), MAX_HITS)
        else:
            runs = {index: self.run(reply_of(messages[index]), **params) for index in _in_scope(messages, self.scope)}
            hits = ((index, *hit) for index, run in runs.items() for hit in islice(run, MAX_HITS))
        return [Violation(principle, self.name, index, span, why) for index, span, why in hits]

    def bind(self, args: list, kwargs: dict) -> dict:
        """Parameters as `run` takes them; raises ValueError that says what the check takes. `f("a", "b")` is `f(["a", "b"])`."""
        names = list(self.takes)
        if names and self.takes[names[-1]] == list[str] and len(args) >= len(names) and isinstance(args[len(names) - 1], str):
            args = [*args[: len(names) - 1], list(args[len(names) - 1 :])]
        try:
            bound = dict(zip(names, args, strict=False)) | kwargs
            if len(args) > len(names) or set(bound) != set(names) or set(names[: len(args)]) & set(kwargs):
                raise ValueError
            return {name: _typed(bound[name], self.takes[name]) for name in names}
        except ValueError as error:
            raise ValueError(f"{self.name} takes {self.usage}" + (f" ({error})" if str(error) else "")) from None


def check(scope: str) -> Callable:
    """Register a generator as a check: scope "conversation" is given the messages and yields (message index, span, why),
    the others are given a Reply and yield (span, why). The first line of the docstring is what `soul check` prints."""

    def register(run: Callable) -> Callable:
        params = list(inspect.signature(run).parameters.values())[1:]
        CHECKS[run.__name__] = Check(run.__name__, run, scope, {p.name: p.annotation for p in params}, inspect.getdoc(run))
        return run

    return register


def never(name: str, pattern: re.Pattern, why: str, doc: str) -> None:
    """Register a check of scope "each" that `pattern` matches nowhere in the prose; `why` follows the quoted match."""

    def run(reply: Reply):
        for match in pattern.finditer(reply.prose):
            yield match.span(), f'"{match.group():.40}" {why}'

    CHECKS[name] = Check(name, run, "each", {}, doc)


def reply_of(message: dict) -> Reply:
    text = message.get("content") if isinstance(message.get("content"), str) else ""
    return Reply(text, prose.mask(text), calls_of(message))


def calls_of(message: dict) -> tuple[tuple[str, dict[str, str]], ...]:
    """(name, arguments) of every call; a malformed one, which a model may well produce, reads as far as it can."""
    calls = message.get("tool_calls")
    read = []
    for call in calls if isinstance(calls, list) else ():
        try:
            name, args = call["function"]["name"], json.loads(call["function"]["arguments"])
        except (KeyError, TypeError, ValueError, RecursionError):
            name, args = "", {}
        args = args if isinstance(args, dict) else {}
        read.append((str(name), {key: value for key, value in args.items() if isinstance(value, str)}))
    return tuple(read)


def assistants(messages: list[dict]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


def _in_scope(messages: list[dict], scope: str) -> list[int]:
    turns = assistants(messages)
    if scope == "final":
        return [index for index in turns if not messages[index].get("tool_calls")][-1:]
    return [index for index in turns if scope == "turn" or messages[index].get("content") or not messages[index].get("tool_calls")]


def _typed(value: object, kind: type) -> object:
    if kind is int and type(value) is int and value >= 0:
        return value
    if kind is Ratio and type(value) in (int, float) and 0 <= value <= 1:
        return value
    if kind == list[str] and isinstance(value, list | tuple) and value and all(isinstance(item, str) and item.strip() for item in value):
        return list(value)
    if kind is Pattern and isinstance(value, str):
        return bounded_pattern(value)
    raise ValueError(f"not {value!r:.40}")


def bounded_pattern(pattern: str) -> str:
    """`pattern` itself, or ValueError when it is no regular expression or one that could backtrack for very long: a
    quantifier on a group, more than 2 unbounded quantifiers, more than 8 choices, a backreference (Python's `re` has no
    time limit, and a SOUL.md may come from anyone)."""
    bare = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[^1-9]", "x", pattern))
    bare = re.sub(r"\(\?(?:<?[=!]|:|P<\w+>|[aimsux]+\))", "(", bare)
    repeats, choices = len(re.findall(r"[*+{]", bare)), len(re.findall(r"[?|]", bare))
    if len(pattern) > 300 or repeats > 2 or choices > 8 or re.search(r"\)[*+{]|\\[1-9]|\(\?", bare):
        raise ValueError("this pattern could run for very long: no repeated groups or backreferences, at most 2 of * + {} and 8 of ? |")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.purge()  # what was compiled before does not warn again
            re.compile(pattern)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern
