"""Contradictions between principles that can be seen without asking a model."""

from soul.checks import CHECKS

_OPPOSITE = (("lowercase_prose", "sentence_case"), ("contractions", "no_contractions"))
_BOUNDS = (("min_words", "max_words"), ("min_sentences", "max_sentences"), ("min_sentences", "max_words"))
_REQUIRED = ("require_opening", "require_ending", "require_phrase")


def conflicts(soul) -> list[str]:
    """One sentence per contradiction that is visible in the checks and texts of `soul`; [] is no promise that none exists."""
    calls = [(principle.id, call) for principle in soul.principles for call in principle.checks]
    return [*_same_text(soul), *_limits(calls), *_opposites(calls), *_required_but_forbidden(calls)]


def _same_text(soul):
    seen = {}
    for principle in soul.principles:
        key = " ".join(principle.text.casefold().split()).rstrip(".!")
        if key in seen:
            yield f"[{seen[key]}] and [{principle.id}] say the same"
        seen.setdefault(key, principle.id)


def _limits(calls):
    numbers = [(id, call.name, call.params["n"]) for id, call in calls if "n" in call.params]
    for i, (id, name, n) in enumerate(numbers):
        for other_id, other, m in numbers[i + 1 :]:
            if name == other and n != m:
                yield f"[{id}] and [{other_id}] set {name} to {n} and to {m}"
            least, most = sorted([(id, name, n), (other_id, other, m)], key=lambda item: item[1].startswith("max_"))
            if (least[1], most[1]) in _BOUNDS and least[2] > most[2]:
                yield f"[{least[0]}] {least[1]}({least[2]}) cannot hold with [{most[0]}] {most[1]}({most[2]})"


def _opposites(calls):
    owner = {call.name: id for id, call in calls}
    for one, other in _OPPOSITE:
        if one in owner and other in owner:
            yield f"[{owner[one]}] {one} is the opposite of [{owner[other]}] {other}"


def _required_but_forbidden(calls):
    """Hold every required phrase against every check that a fragment can break."""
    required = [(id, call.name, phrase) for id, call in calls if call.name in _REQUIRED for phrase in call.params["phrases"]]
    for id, name, phrase in required:
        for other_id, other in calls:
            whole = other.name.startswith(("min_", "require_")) or other.name == "sentence_case"
            if whole or (other.name == "no_question_in_final_turn" and name == "require_opening"):
                continue
            if CHECKS[other.name]([{"role": "assistant", "content": phrase}], **other.params):
                yield f'[{id}] requires "{phrase}", which [{other_id}] {other.name} forbids'
