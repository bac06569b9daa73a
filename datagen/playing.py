"""One rollout played: the teacher is the agent in a real workspace, and in turns the user; every turn is a journaled call.

Tools are executed anew on every replay, so a rollout that was killed at turn 9 asks for nothing before turn 10. That holds as
long as results repeat; `difference` proves it for every row that is kept.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from datagen.critique import ask_critic, gives_itself_away, recites
from datagen.engine import Reply
from datagen.protocol import OPEN, as_text, call_text, joined_native, joined_text, length, split_calls, written
from datagen.recipes.common import Workings
from datagen.scenarios import Scenario, Script
from datagen.tool_calls import BadCall
from soul import conversation, tools
from soul.checks import CHECKS
from soul.files import canonical_json
from soul.registry import Violation, assistants
from soul.spec import Soul, repair, run_checks
from workspace.tools import REJECTED, Workspace, clip

SAME_CALLS = 3  # of one call, with nothing changed in between: the agent goes round in circles
ANSWERS = 3  # questions of the agent that the user answers
SHOWN_CHARS = 6_000  # of the conversation that a reviser sees


@dataclass(frozen=True)
class Play:
    steps: int = 20
    """Messages of the agent until it must have answered the user."""
    context: int = 96_000
    """Longest conversation, in characters (about three a token); a longer one is rejected."""
    rounds: int = 2
    """Revisions of one message that breaks a check; its calls stay as they are."""
    critic: bool = True
    """Have the judge look at all messages in the end, and the ones with faults said again."""
    calls: Literal["auto", "native", "text"] = "auto"
    """How the teacher calls tools: by the API, or in its text (for servers without tools; auto: only the embedded one)."""
    project_tokens: int = 8192
    """Longest project, in tokens."""
    shots: int = 1
    """Approved rollouts shown to the agent, of those in --gold."""


class Ended(Exception):
    """The rollout cannot go on; the message is the reason of its rejection."""


class Stage:
    """The conversation so far, and what was said differently at first: `drafts` has such wordings by message index, each with
    the principles that it broke."""

    def __init__(self, work: Workings, options: Play, scenario: Scenario, script: Script, workspace: Workspace, examples: list[str]):
        self.work, self.options, self.scenario, self.script, self.workspace = work, options, scenario, script, workspace
        self.examples, self.specs = examples, [tools.TOOLS[name] for name in work.soul.tools]
        self.messages = [conversation.user(script.request)]
        self.drafts: dict[int, tuple[str, set[str]]] = {}
        # by what they look at: in the middle of a talk a message is not the final one, and may well ask something
        self.whole, self.middle = part(work.soul, "conversation"), part(work.soul, "each", "turn")
        self.last = part(work.soul, "each", "turn", "final")
        self.made: Counter[str] = Counter()  # calls since the user last spoke
        self.valid: Counter[str] = Counter()  # by tool
        self.refused = ""

    async def run(self) -> None:
        """Play to the end. Raises Ended when it cannot be used."""
        turns, answered = iter(zip(self.scenario.talk, self.script.turns, strict=True)), 0
        while True:
            await self.agent_turn()
            asks = self.messages[-1]["content"].rstrip(" *_)\"'").endswith("?")
            if self.refused:
                kind, about, self.refused = "refused", f"{self.refused} (the user {self.scenario.reason})", ""
            elif asks and answered < ANSWERS:
                kind, about, answered = "answer", "", answered + 1
            elif (turn := next(turns, None)) is not None:
                kind, about = turn
            else:
                break
            await self.person_turn(kind, about)
        self.messages.append(await self.in_voice(self.messages.pop(), self.last))

    async def agent_turn(self) -> None:
        """Messages and results until the agent speaks without a call."""
        self.made.clear()
        for _ in range(self.options.steps):
            if length(self.messages) > self.options.context:
                raise Ended("too long")
            message = await self.in_voice(await self.agent_message(), self.middle)
            self.messages.append(message)
            if not (calls := conversation.named_calls(message)):
                return
            for name, args in calls:
                self.messages.append(conversation.tool(await self.execute(name, args)))
            if broken := {fault.principle for fault in run_checks(self.whole, self.messages)}:  # by what a result shows
                raise Ended(f"checks: {', '.join(sorted(broken))}")
        raise Ended("agent: no end of its turn")

    async def person_turn(self, kind: str, about: str) -> None:
        told = {"person": self.scenario.person, "done": self.script.done, "talk": as_text(self.messages, results=False)}
        reply = await self.ask("person", self.work.prompts.render("person", kind=kind, about=about, **told))
        why = reply.outcome if not reply.ok else "empty" if not reply.text.strip() else "calls a tool" if OPEN in reply.text else ""
        if why:
            raise Ended(f"person: {why}")
        self.messages.append(conversation.user(reply.text.strip()))

    async def ask(self, stage: str, messages: list[dict], **more) -> Reply:
        """A call whose text is in the row anyway: the trail has its key only."""
        reply = await self.work.call(stage, messages, **more)
        self.work.note(stage, "", reply.key)
        return reply

    # --- the agent's message

    async def agent_message(self) -> dict:
        """The next message, its calls sound and within the SOUL; one that is not gets one more chance."""
        native = self.options.calls == "native"
        offered = {"tools": tools.openai_schema(self.work.soul.tools)} if native and self.specs else {}
        told = {"soul": self.work.soul.text, "tools": [] if native else self.specs, "examples": self.examples}
        prompt, join = self.work.prompts.render("agent", **told), joined_native if native else joined_text
        message, problem = self.read(reply := await self.ask("agent", join(prompt, self.messages), **offered))
        if problem:
            mend = self.work.prompts.render("repair_call", text=written(message) if message else reply.text, problem=problem)
            message, problem = self.read(await self.ask("repair-call", join(prompt, [*self.messages, *mend]), **offered))
        if problem:
            raise Ended(f"agent: {problem}")
        return message

    def read(self, reply: Reply) -> tuple[dict | None, str]:
        """(message, what is wrong with its calls). Raises Ended where asking again does not help."""
        if not reply.ok:
            raise Ended(f"agent: {reply.outcome}" + (f" ({reply.why})" if reply.why else ""))
        try:
            text, calls = (reply.text.strip(), reply.tool_calls) if reply.tool_calls else split_calls(reply.text)
        except BadCall as bad:
            return None, str(bad)
        message = conversation.assistant(text, *calls)
        names = [conversation.name_of(call) for call in calls]
        if foreign := [name for name in names if name in tools.TOOLS and name not in self.work.soul.tools]:
            return message, f"there is no tool {foreign[0]}"
        if recites(text, self.work.principles):
            return message, "it cites a rule"
        wrong = [fault for fault in self.faults(message, self.middle) if about_calls(fault, message)]
        return message, "; ".join(f"{self.work.principles[fault.principle].text} ({fault.why})" for fault in wrong)

    def faults(self, message: dict, soul: Soul) -> list[Violation]:
        """What is wrong with a next message: by the checks of `soul` on it alone, and by those that look at the conversation."""
        told = run_checks(self.whole, [*self.messages, message])
        return run_checks(soul, [message]) + [fault for fault in told if fault.message_index == len(self.messages)]

    async def in_voice(self, message: dict, soul: Soul) -> dict:
        """`message` with a text that passes the checks: repaired by program, else said again by the teacher."""
        draft, broken = message["content"], {fault.principle for fault in self.faults(message, soul)}
        for number in range(self.options.rounds + 1):
            message = message | {"content": repair(soul, [message])[0][0]["content"]}
            if not (found := self.faults(message, soul)):
                break
            if number == self.options.rounds or any(about_calls(fault, message) for fault in found):
                raise Ended(f"checks: {', '.join(sorted({fault.principle for fault in found}))}")
            told = [(fault.principle, message["content"][slice(*fault.span)], fault.why) for fault in found]
            message = await self.said_again(len(self.messages), message, told, number)
        if message["content"] != draft:
            self.drafts.setdefault(len(self.messages), (draft, broken))
        return message

    async def said_again(self, index: int, message: dict, faults: list[tuple[str, str, str]], number: int = 0) -> dict:
        """The message at `index` worded anew, its calls untouched; as it was where the new wording gives itself away."""
        told = [{"principle": self.work.principles[p].text, "quote": quote[:80], "why": why} for p, quote, why in faults]
        before = clip(as_text(self.messages[:index]), SHOWN_CHARS)
        calls = "\n".join(map(call_text, conversation.named_calls(message)))
        said = {"soul": self.work.soul.text, "before": before, "text": message["content"], "calls": calls, "faults": told}
        reply = await self.work.call("remark", self.work.prompts.render("remark", **said), replicate=number)
        leak = gives_itself_away(reply.text, before, self.work.principles) or ("calls a tool" if OPEN in reply.text else "")
        why = leak if reply.ok else reply.outcome
        self.work.note(f"remark-{why.replace(' ', '-')}" if why else "remark", reply.text, reply.key)
        return message if why else message | {"content": reply.text.strip()}

    # --- tools

    async def execute(self, name: str, args: dict[str, str]) -> str:
        """The real result of a call, or the user's refusal where the scenario has one. Raises Ended for calls that go nowhere."""
        key = canonical_json([name, args])
        self.made[key] += 1
        if self.made[key] == SAME_CALLS:
            raise Ended("agent: goes round in circles")
        if self.refused == call_text((name, args)):
            raise Ended("agent: repeats a call that was refused")
        self.valid[name] += not tools.problem(name, args)
        if [name, self.valid[name]] == self.scenario.refuse and not self.refused and not tools.problem(name, args):
            self.refused = call_text((name, args))
            return REJECTED
        result = await asyncio.to_thread(self.workspace.run, name, args)
        if name in ("Edit", "Bash") and not result.startswith("error: "):  # other calls may give something new now
            self.made = Counter({made: count for made, count in self.made.items() if made == key})
        return result


def part(soul: Soul, *scopes: str) -> Soul:
    """The SOUL with those of its checks only."""
    kept = [replace(p, checks=tuple(call for call in p.checks if CHECKS[call.name].scope in scopes)) for p in soul.principles]
    return replace(soul, principles=tuple(kept))


def about_calls(fault: Violation, message: dict) -> bool:
    """Whether a fault lies in what is done: such checks point at no words."""
    return bool(conversation.calls_of(message)) and fault.span == (0, 0) and fault.check != "explain_before_act"


async def criticised(work: Workings, messages: list[dict], principles: list[str]) -> list[tuple[int, str, str, str]]:
    """(message, principle, words at fault, why) of the faults that the judge finds in what the agent said; words that stand in no
    message, and so could not be said again, are noted and passed over."""
    said = {at: messages[at]["content"] for at in assistants(messages) if messages[at]["content"]}
    request = as_text([message for message in messages if message["role"] == "user"])
    told = {"soul": work.soul.text, "request": request, "reply": "\n\n".join(said.values()), "known": []}
    findings, step = await ask_critic(work.call, work.prompts, max_tokens=1024, principles=principles, **told)
    work.trail.append(step)
    found = []
    for finding in findings or ():
        at = next((at for at, text in said.items() if finding.quote and finding.quote in text), None)
        if at is None:
            work.note("critique-without-place", f"{finding.principle}: {finding.why}")
        else:
            found.append((at, finding.principle, finding.quote, finding.why))
    return found


def difference(messages: list[dict], workspace: Workspace) -> str:
    """Run every call again in a fresh workspace; says which is the first with another result, "" when there is none."""
    results = (message["content"] for message in messages if message["role"] == "tool")
    for number, (name, args) in enumerate((call for message in messages for call in conversation.named_calls(message)), 1):
        if (kept := next(results)) != REJECTED and workspace.run(name, args) != kept:
            return f"{name} gives another result when it runs again (call {number})"
    return ""


def accepted(workspace: Workspace, commands: str, seconds: int = 60) -> tuple[bool, str]:
    """(whether all of `commands` succeed, what they print)."""
    script = f"trap '[ $? -eq 0 ] && echo accepted' EXIT\nset -e\n{commands}"
    result = workspace.run("Bash", {"command": script, "timeout": str(seconds)})
    return result.rpartition("\n")[2] == "accepted", result
