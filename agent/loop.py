"""One turn of the agent: generate, ask, execute, until the model answers or a named limit ends it.

Pure of terminals and models: `generate`, `ask` and `on_event` are given, so the same loop runs in the chat, in evals and
in tests. It always ends, with a `Status` that says why, and it leaves messages that the template can render.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from soul import conversation, tools
from soul.files import canonical_json
from workspace.tools import REJECTED, Workspace

TRIES = 3  # of one reply: a malformed one is drawn again twice, then the turn ends
MAX_REJECTIONS = 2
SAME_CALL = "error: same call again; its result is above"
INTERRUPTED = "error: interrupted"


class Status(StrEnum):
    """Why a turn ended; stored in transcripts."""

    answered = "answered"  # the model spoke and called nothing
    cut = "cut"  # its text reached max_new
    steps = "steps"  # max_steps replies, all with calls
    malformed = "malformed"  # TRIES replies that cannot be parsed
    repeated = "repeated"  # the same call a third time
    rejected = "rejected"  # MAX_REJECTIONS refusals by the person
    context_full = "context_full"  # no room for another reply
    interrupted = "interrupted"  # Ctrl-C


class ContextFull(Exception):
    """Raised by `generate` when the prompt leaves no room for a reply."""


@dataclass(frozen=True)
class Reply:
    """One generated assistant message; `cut` when it is plain text that max_new ended (a cut call is malformed)."""

    message: dict
    problems: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    cut: bool = False


class Generate(Protocol):
    def __call__(self, messages: list[dict], *, seed: int, attempt: int) -> Reply: ...


def run_turn(
    messages: list[dict], *, generate: Generate, workspace: Workspace, ask: Callable[[str, dict[str, str]], bool],
    on_event: Callable[[str, dict], None] = lambda kind, data: None, shorten: Callable[[str], str] = str, max_steps: int = 12, seed: int = 0,
) -> tuple[list[dict], Status]:  # fmt: skip
    """Continue `messages` (ending with the user's) until the turn is over; gives the longer list and the status.

    Args:
        generate: draws one reply. Every draw gets a new seed: with one seed, a retry repeats its own mistake.
        ask: whether this call may run; it sees exactly the arguments that will be executed.
        on_event: told of "reply", "call", "result" and "status" as they happen.
        shorten: makes a tool result fit the context.
    """
    turn = _Turn(list(messages), generate, workspace, ask, on_event, shorten, seed)
    try:
        status = next((status for _ in range(max_steps) if (status := turn.step())), Status.steps)
    except ContextFull:
        status = Status.context_full
    except KeyboardInterrupt:
        status = Status.interrupted
    on_event("status", {"status": status.value})
    return turn.messages, status


class _Turn:
    def __init__(self, messages, generate, workspace, ask, on_event, shorten, seed):
        self.messages, self.generate, self.workspace, self.ask = messages, generate, workspace, ask
        self.on_event, self.shorten, self.seed = on_event, shorten, seed
        self.made: Counter[tuple[str, str]] = Counter()
        self.rejections = 0

    def step(self) -> Status | None:
        """One reply and the results of its calls; a status when the turn is over."""
        for attempt in range(TRIES):
            reply = self.generate(self.messages, seed=self.seed, attempt=attempt)
            usable = _usable(reply)
            self.on_event("reply", {
                "message": reply.message, "problems": list(reply.problems), "usable": usable, "ids": list(reply.ids), "seed": self.seed,
            })  # fmt: skip
            self.seed += 1
            if usable:
                break
        else:
            return Status.malformed
        self.messages.append(reply.message)
        if calls := conversation.named_calls(reply.message):
            return self._execute(calls)
        return Status.cut if reply.cut else Status.answered

    def _execute(self, calls: list[tuple[str, dict[str, str]]]) -> Status | None:
        status = None
        for name, args in calls:
            if not status:
                try:
                    status = self._call(name, args)
                    continue
                except KeyboardInterrupt:
                    status = Status.interrupted
            self._result(INTERRUPTED, approved=None)
        return status

    def _call(self, name: str, args: dict[str, str]) -> Status | None:
        self.on_event("call", {"name": name, "args": args})
        key = (name, canonical_json(args))
        self.made[key] += 1
        if self.made[key] > 1:
            self._result(SAME_CALL, approved=None)
            return Status.repeated if self.made[key] > 2 else None
        if fault := tools.problem(name, args):
            self._result(f"error: {fault}", approved=None)
            return None
        if not self.ask(name, dict(args)):
            self._result(REJECTED, approved=False)
            self.rejections += 1
            return Status.rejected if self.rejections == MAX_REJECTIONS else None
        result = self.workspace.run(name, args)
        if name in ("Edit", "Bash") and not result.startswith("error: "):
            # files may have changed, so other tools may give something new; a cycle of edits or of commands stays one
            self.made = Counter({made: count for made, count in self.made.items() if made[0] == name})
        self._result(result, approved=True)
        return None

    def _result(self, text: str, *, approved: bool | None) -> None:
        text = self.shorten(text)
        self.messages.append(conversation.tool(text))
        self.on_event("result", {"text": text, "approved": approved})


def _usable(reply: Reply) -> bool:
    """Whether a reply can go into the conversation: sound syntax, or plain text that was cut. A well-formed call of an unknown
    tool or with a missing argument is usable: its error result tells the model."""
    return reply.cut or set(reply.problems) <= {tools.problem(name, args) for name, args in conversation.named_calls(reply.message)}
