"""Remarks by a teacher for rollouts that were executed: generate -> (check, critique, revise) x n -> verify. Calls stay as they are.

A rollout comes with the remarks of phrase templates. The teacher words all of them in one call, without the SOUL, from the
templates as notes; what breaks the SOUL is worded again, with it. A rollout that ends with a fault keeps the templates.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from datagen import generate, since
from datagen.critique import gives_itself_away, strays
from datagen.engine import Recipe
from datagen.generate import Config, Session, tell_stopped
from datagen.journal import Journal
from datagen.long_rollouts import DOMAINS
from datagen.phrases import sentence_case
from datagen.playing import Ended, criticised
from datagen.prompting import Prompts
from datagen.protocol import OPEN, joined_text, written
from datagen.recipes.common import Workings
from datagen.rollouts import JUDGMENTS, WRONG_CALLS, length
from datagen.seeds import Seed
from soul.conversation import named_calls
from soul.errors import UserError
from soul.files import sha256_json
from soul.registry import assistants
from soul.spec import Soul, check_table, repair, run_checks

FACTS = "says what the conversation shows, and loses none of the facts in the notes."
_MARK = re.compile(r"^={3,}[ \t]*(?:message )?(\d{1,3})[ \t]*=*[ \t]*$", re.M)
_FACT = re.compile(r"`([^`\n]+)`|(?<![\w.])(\d+)(?!\w)")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.M)


Fault = tuple[int, str, str, str]  # message, principle (or "facts"), words at fault, why


@dataclass(frozen=True)
class Remarks:
    rounds: int = 2
    """Revisions at most of what a rollout says; with a fault left after them, it keeps the remarks of the templates."""
    critic: bool = True
    """Have the judge look for faults against the principles that have no check."""


def remarks(options: Remarks, soul: Soul, prompts: Prompts, most: int) -> Recipe:
    """The recipe: an sft row of at most `most` characters, and a pair for each message whose first wording breaks a check."""

    async def recipe(seed: Seed, call: Callable) -> list:
        rollout = _Rollout(options, soul, prompts, seed, call)
        try:
            return await rollout.run(most)
        except Ended as ended:
            return rollout.rejected(str(ended))

    return recipe


class _Rollout(Workings):
    def __init__(self, options: Remarks, soul: Soul, prompts: Prompts, seed: Seed, call: Callable):
        super().__init__(soul, prompts, seed, call)
        self.options = options
        self.numbers = {at: n for n, at in enumerate(assistants(self.history), 1)}
        self.unchecked = [principle.id for principle in soul.unverified] if options.critic else []

    async def run(self, most: int) -> list:
        """The rows. Raises Ended where the teacher's remarks cannot be used."""
        # in sentence case: notes in the SOUL's own voice would give drafts in it, and no pairs
        notes = self.worded({at: sentence_case(self.history[at]["content"]) for at in self.numbers})
        drafts = said = await self.asked("remarks", list(self.numbers), talk=self.talk(notes))
        for number in range(self.options.rounds + 1):
            messages = repair(self.soul, self.worded(said))[0]
            if length(messages) > most:
                raise Ended("too long")
            faults = self.faults(messages, drafts)
            if self.unchecked:
                faults += await criticised(self, messages, self.unchecked)
            if not faults:
                return self.rows(messages, drafts)
            if number < self.options.rounds:
                told = {"soul": self.soul.text, "talk": self.talk(messages), "faults": list(map(self.told, faults))}
                again = await self.asked("remarks_revise", sorted({at for at, *_ in faults}), number, **told)
                said = {at: messages[at]["content"] for at in self.numbers} | again
        raise Ended(f"still at fault: {', '.join(sorted({principle for _, principle, *_ in faults}))}")

    def told(self, fault: Fault) -> dict:
        at, name, quote, why = fault
        text = self.principles[name].text if name in self.principles else FACTS
        return {"number": self.numbers[at], "principle": text, "quote": quote[:80], "why": why}

    def worded(self, said: dict[int, str]) -> list[dict]:
        return [message | {"content": said[at]} if at in said else message for at, message in enumerate(self.history)]

    def talk(self, messages: list[dict]) -> str:
        who = {at: f"assistant, message {number}" for at, number in self.numbers.items()}
        return "\n\n".join(f"{who.get(at, message['role'])}: {written(message)}" for at, message in enumerate(messages))

    async def asked(self, stage: str, wanted: list[int], replicate: int = 0, **told) -> dict[int, str]:
        """The teacher's wording of those messages; an answer that cannot be read gets one repair call. Raises Ended."""
        numbers = {self.numbers[at]: at for at in wanted}
        prompt = self.prompts.render(stage, numbers=list(map(str, numbers)), **told)
        for name in (stage, f"{stage}_repair"):
            reply = await self.ask(name, prompt, replicate=replicate)
            if not reply.ok:
                raise Ended(f"{stage}: {reply.outcome}" + (f" ({reply.why})" if reply.why else ""))
            said, problem = read_remarks(reply.text, list(numbers))
            if not problem:
                return {at: (said[number] + self.code(at)) for number, at in numbers.items()}
            prompt = joined_text([], [*prompt, *self.prompts.render("repair_call", text=reply.text, problem=problem)])
        raise Ended(f"{stage}: {problem}")

    def code(self, at: int) -> str:
        """The code block that ends a message: it came from the data, as calls do."""
        block = _FENCE.search(self.history[at]["content"])
        return "\n" + self.history[at]["content"][block.start() :] if block else ""

    # --- faults

    def faults(self, messages: list[dict], drafts: dict[int, str]) -> list[Fault]:
        """What checks find, and what can be seen to be untrue or to speak of its own making."""
        checked = run_checks(self.soul, messages)
        found = [(v.message_index, v.principle, messages[v.message_index]["content"][slice(*v.span)], v.why) for v in checked]
        seen = ""
        for at, message in enumerate(messages):
            text, note, calls = message["content"], self.history[at]["content"], named_calls(message)
            seen = "\n".join([seen, note, *(part for name, args in calls for part in (name, *args.values()))])
            if at in self.numbers:
                why = untrue(text, "" if calls else note, seen) or (text != drafts[at] and gives_itself_away(text, seen, self.principles))
                why = why or (not calls and strays(text.removesuffix(self.code(at)), seen, "") and "speaks of something else")
                found += [(at, "facts", "", why)] if why else []
        return found

    def rows(self, messages: list[dict], drafts: dict[int, str]) -> list:
        pairs, touched = [], set()
        for at in self.numbers:
            prompt, draft = messages[:at], messages[at] | {"content": drafts[at]}
            table = check_table(self.soul, [*prompt, draft])
            broken = {check["principle"] for check in table if not check["ok"]}
            if broken and not run_checks(self.soul, messages[: at + 1]):
                sides = {"prompt": prompt, "chosen": [messages[at]], "rejected": [draft]}
                pairs.append(["preference", self.row(broken, **sides, checks=table)])
            touched |= broken
        return [["sft", self.row(touched, messages=messages, checks=check_table(self.soul, messages))], *pairs]


def read_remarks(text: str, numbers: list[int]) -> tuple[dict[int, str], str]:
    """(the text under each `=== NUMBER` line, what is wrong with them). Code blocks are cut off: a teacher's code was never run."""
    _, *parts = _MARK.split(text.replace("\r\n", "\n"))
    found = list(map(int, parts[::2]))
    said = {number: _FENCE.split(body, maxsplit=1)[0].strip() for number, body in zip(found, parts[1::2], strict=True)}
    if OPEN in text:
        return {}, f"it has {OPEN}; calls are made as they stand"
    if sorted(found) != sorted(said) or not set(numbers) <= set(said):
        return {}, f"each of {', '.join(f'=== {number}' for number in numbers)} must stand once, on a line of its own"
    return said, next((f"message {number} is empty" for number in numbers if not said[number]), "")


def untrue(text: str, note: str, seen: str) -> str:
    """A name in backticks or a number that stands nowhere in `seen`, or one of the note's that got lost; "" when there is none."""
    text, note, seen = text.casefold(), note.casefold(), seen.casefold()
    facts, noted = ([name or number for name, number in _FACT.findall(part)] for part in (text, note))
    # few things are counted with one digit, as "2 files" are; of `def f` the longest word is what must not get lost
    invented = [fact for fact in facts if fact.removesuffix("()") not in seen and not re.fullmatch(r"\d", fact)]
    lost = [fact for fact in noted if max(re.findall(r"\w[\w./-]*", fact) or [fact], key=len) not in text]
    return f"`{invented[0]}` is not in the conversation" if invented else f"leaves out `{lost[0]}`" if lost else ""


# --- the command


def prepare(config: Config, options: Remarks, most: int) -> Session:
    """Raises UserError for anything that can be seen to be wrong before the first call."""
    session = generate.prepare(replace(config, seeds=DOMAINS))  # it wants some seeds; ours are not there yet
    setup = session.setup | {"command": "convert", "recipe": sha256_json(["remarks", asdict(options), most])}
    return replace(session, recipe=remarks(options, session.soul, session.prompts, most), setup=setup)


def speak(session: Session, rollouts: list[dict], pairs: list[dict], finish: Callable[[list, list, dict], None]) -> int:
    """Have the teacher word what the rollouts say, and `finish` what there is of it, however this ends; gives the exit code. Raises
    UserError for a run directory that holds another command's run, and as the engine does."""
    config, seeds = session.config, {_key(row): Seed(_key(row), row["messages"], row["source"], row["id"]) for row in rollouts}
    with closing(Journal(config.out)) as journal:
        if (before := journal.noted("run")) and before["setup"].get("command") != "convert":
            raise UserError("holds the run of another command", where=config.out, fix="Choose another --out.")
        journal.note("run", {"id": session.run_id, "soul": since.soul_facts(session.soul), "setup": session.setup})
        try:
            done = asyncio.run(generate.compute(session, journal, iter(seeds.values()), "remarks", len(seeds)))
        finally:
            finish(*spoken(session, journal, rollouts, pairs))
    if not done:
        tell_stopped(f"soulsmith convert --config {config.out / 'convert.json'}")
    return 0 if done else 130


def _key(row: dict) -> str:
    return sha256_json(row["messages"])[:16]


def spoken(session: Session, journal: Journal, rollouts: list[dict], pairs: list[dict]) -> tuple[list[dict], list[dict], dict]:
    """(rollouts, pairs, facts) as far as there are answers; where those cannot be used, with the templates' remarks. Pairs about
    calls stay as they are; of those about the voice, the teacher's take the place of the templates'."""
    done, contrasts, templates, served, paired = [], [], Counter(), Counter(), {pair["id"]: pair for pair in pairs}
    for row in rollouts:
        if not (finished := journal.row(_key(row), session.run_id)):
            continue
        ((kind, first), *more), pair = finished.results, paired.get(row["id"])
        if kind == "rejected":
            why = first["reason"].partition(" (")[0]
            templates[why] += 1
            first = {"trail": [*first.get("trail", ()), {"stage": "template", "text": why, "key": ""}]}
        served.update(first.get("served", ()))
        done.append(row | {name: first[name] for name in ("messages", "checks", "principles", "trail", "served") if name in first})
        contrasts += [pair] if pair and (kind == "rejected" or pair["reason"] in JUDGMENTS | WRONG_CALLS) else []
        same = {"reason": row["reason"], "files": row["files"]}
        contrasts += [new | same | {"id": f"{row['id']}-{len(new['prompt'])}"} for _, new in more]
    facts = {"teacher": session.config.teacher, "by_teacher": len(done) - templates.total(), "unanswered": len(rollouts) - len(done)}
    facts |= {"by_templates": dict(templates.most_common()), "served": dict(served.most_common()), "ledger": journal.ledger()}
    priced = [entry["cost"] for entry in facts["ledger"] if entry["cost"] is not None]
    return done, contrasts, {"remarks": facts | {"cost_usd": round(sum(priced), 6) if priced else None}}
