"""Does a reply keep the SOUL? One verdict per principle that has a machine check; the others are listed, never passed."""

from soul.conversation import calls_of
from soul.prose import mask, words
from soul.registry import CHECKS
from soul.spec import CheckCall, Soul, check_table

ALL = "all at once"
ABOUT_CALLS = ("explain_before_act", "one_call_per_turn", "max_edit_lines")


def judge_soul(soul: Soul, prompt: list[dict], reply: dict, *, usable: bool = True) -> dict[str, bool]:
    """Verdict per verified principle that can be kept or broken here, for the one message `reply` that answers `prompt`.

    A principle about calls says nothing of a reply without one, nor one about last words of a reply that goes on to call: such
    verdicts would be free points, so they are left out. A reply without a word outside code, or not `usable`, fails every
    principle that is left: silence keeps no promise, and a base model's "system system system" is lowercase by accident.
    """
    acts = bool(calls_of(reply))
    tested = [p.id for p in soul.verified if any(_applies(call, acts) for call in p.checks)]
    if not usable or not words(mask(reply["content"])):
        return dict.fromkeys(tested, False)
    broken = {row["principle"] for row in check_table(soul, [*prompt, reply]) if not row["ok"]}
    return {p: p not in broken for p in tested}


def _applies(call: CheckCall, acts: bool) -> bool:
    scope = CHECKS[call.name].scope
    return acts if scope == "conversation" or call.name in ABOUT_CALLS else not (acts and scope == "final")
