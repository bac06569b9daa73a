"""Self-reflection and self-interaction (arXiv:2511.01689): the SOUL answers questions about itself, and two instances of it talk.

Seeds are topics ("when a test fails", "being asked to hurry"). The rows keep the questions and the turns, never the SOUL.
"""

import asyncio
from dataclasses import dataclass

from datagen.recipes.common import Options, Workings, because, failing
from soul import conversation
from soul.errors import UserError
from soul.spec import Soul, check_table, repair

SWAPPED = {"user": "assistant", "assistant": "user"}


@dataclass(frozen=True)
class Introspect(Options):
    reflections: int = 3
    """Questions about itself per topic, each one row."""
    turns: int = 5
    """Turns of a talk between two instances, one row seen from the first; 0 = none."""

    def check(self, soul: Soul) -> None:
        if self.reflections + self.turns < 1:
            raise UserError("with no reflections and no turns there is nothing to make")


async def introspect(work: Workings, options: Introspect) -> list:
    """Sft rows `ID-r0`, `ID-r1`, … and `ID-talk`."""
    jobs = [_reflect(work.fresh(), number) for number in range(options.reflections)]
    jobs += [_talk(work.fresh(), options.turns)] if options.turns else []
    return list(await asyncio.gather(*jobs))


async def _reflect(work: Workings, number: int) -> list:
    told, question = work.prompts.render("reflect", soul=work.soul.text, topic=work.request, number=number)
    reply = await work.ask("reflect", [told, question], replicate=number)
    why = work.fault(reply)
    return _row(work, f"r{number}", [question] if why else [question, conversation.assistant(reply.text.strip())], why)


async def _talk(work: Workings, turns: int) -> list:
    """The talk as the first instance saw it, up to its last sound turn; the other instance is its user."""
    told, opener = work.prompts.render("interact", soul=work.soul.text, topic=work.request)
    said, why = [opener], ""
    for turn in range(turns):
        heard = said if turn % 2 == 0 else [{"role": SWAPPED[m["role"]], "content": m["content"]} for m in said[1:]]
        reply = await work.ask("interact", [told, *heard], replicate=turn)
        why = work.fault(reply) or ("repeats itself" if any(m["content"] == reply.text.strip() for m in said) else "")
        if why:
            break
        said.append((conversation.user if turn % 2 else conversation.assistant)(reply.text.strip()))
    if len(said) > 1 and said[-1]["role"] == "user":
        said.pop()
    return _row(work, "talk", said, "" if len(said) > 1 else why)


def _row(work: Workings, name: str, messages: list[dict], why: str) -> list:
    touched = failing(check_table(work.soul, messages))
    messages, repaired = repair(work.soul, messages)
    work.note_repair(repaired)
    checks = [] if why else check_table(work.soul, messages)
    reason = f"{name.rstrip('0123456789')}: {why}" if why else because(failing(checks))
    columns = {"id": f"{work.seed.id}-{name}", "messages": messages, "checks": checks, "accepted": not reason, "reason": reason}
    return ["rejected" if reason else "sft", work.row(touched, **columns)]
