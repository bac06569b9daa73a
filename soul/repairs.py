"""Mechanical repairs of a reply, for the checks whose fix needs no judgement.

A repair runs only where the SOUL says `repair: yes`, and is kept only if its check then passes and no other principle
begins to fail; so repairing twice is the same as once, and what is counted as repaired is repaired.
"""

import ast
import re
import warnings
from collections.abc import Iterator

from soul.checks import CHECKS, EMOJI, EXCLAMATION
from soul.prose import CODE, fences, mask, sentences
from soul.registry import Violation, assistants
from soul.wording import APOLOGY, CONTRACTED, EXPANDED, FILLER, OFFER, SYCOPHANCY, contract, expand


def _on_prose(pattern: re.Pattern, new):
    """A repair that replaces what `pattern` matches in the prose; code stays as it is, byte for byte."""

    def repair(text: str) -> str:
        parts, last = [], 0
        for match in pattern.finditer(mask(text)):
            parts += [text[last : match.start()], new(match)]
            last = match.end()
        return "".join([*parts, text[last:]])

    return repair


def _dropping(is_bad):
    """A repair that drops the sentences whose masked text `is_bad`; the text stays as it is when nothing would remain."""

    def repair(text: str) -> str:
        prose, kept, last = mask(text), [], 0
        for start, end in sentences(prose):
            if is_bad(prose[start:end]):
                kept.append(text[last:start])
                gap = re.compile(r"[ \t]*\n?" if not text[:start].rpartition("\n")[2].strip() else r"[ \t]*").match(text, end)
                last = gap.end()
        rest = "".join([*kept, text[last:]]).strip()
        return rest if kept and (re.search(rf"\w|{CODE}", mask(rest)) or fences(rest)) else text

    return repair


_PYTHON = ("FunctionDef", "AsyncFunctionDef", "ClassDef", "Import", "ImportFrom", "For", "While", "If", "With", "Try")


def _name_python(text: str) -> str:
    for fence in reversed(fences(text)):
        if not fence.language and _is_python(text[fence.code_start : fence.code_end]):
            line = text[fence.start : fence.code_start]
            text = text[: fence.start] + line.rstrip() + "python" + line[len(line.rstrip()) :] + text[fence.code_start :]
    return text


def _is_python(code: str) -> bool:
    """Does it parse, and does it hold a statement that only Python writes so (`ls -la` parses as a subtraction)?"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code[:20_000])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(type(node).__name__ in _PYTHON for node in tree.body)


def _capitalise(text: str) -> str:
    for start, end in sentences(prose := mask(text)):
        first = re.search(rf"\w|{CODE}", prose[start:end])
        if first and len(first.group().upper()) == 1:
            at = start + first.start()
            text = text[:at] + (text[at] if first.group() == CODE else first.group().upper()) + text[at + 1 :]
    return text


REPAIRS = {
    "lowercase_prose": _on_prose(re.compile(r"[^\W\d_]+"), lambda match: "".join(character.lower() for character in match.group())),
    "sentence_case": _capitalise,
    "no_apology": _dropping(APOLOGY.search),
    "no_sycophancy": _dropping(SYCOPHANCY.search),
    "no_offer": _dropping(OFFER.search),
    "no_filler_opening": _on_prose(FILLER, lambda match: ""),
    "no_question_in_final_turn": _dropping(re.compile(r"[?？]\W*$").search),
    "no_emoji": _on_prose(re.compile(rf"(?:(?<=\S)[ \t]*{EMOJI.pattern}(?!\w)|{EMOJI.pattern}[ \t]*)"), lambda match: ""),
    "no_exclamation": _on_prose(EXCLAMATION, lambda match: "" if match.string[: match.start()].endswith((".", "?")) else "."),
    "contractions": _on_prose(EXPANDED, contract),
    "no_contractions": _on_prose(CONTRACTED, expand),
    "code_fence_language": _name_python,
}


def _results(soul, messages: list[dict]) -> Iterator[tuple[str, int, str, list[Violation]]]:
    """(principle, number of its check, check, violations) of every check, in the order of the SOUL."""
    for principle in soul.principles:
        for number, call in enumerate(principle.checks):
            yield principle.id, number, call.name, CHECKS[call.name](messages, principle=principle.id, **call.params)


def run_checks(soul, messages: list[dict]) -> list[Violation]:
    """Every violation of the soul's checked principles, in the order of the principles, then of the messages."""
    return [violation for *_, found in _results(soul, messages) for violation in found]


def check_table(soul, messages: list[dict]) -> list[dict]:
    """One row per check that passes (message_index -1), and one per violation of a check that does not."""
    rows = []
    for principle, _, check, found in _results(soul, messages):
        head = {"principle": principle, "check": check, "ok": not found}
        places = [(v.message_index, *v.span, v.why) for v in found] or [(-1, 0, 0, "")]
        rows += [head | {"message_index": index, "start": start, "end": end, "why": why} for index, start, end, why in places]
    return rows


def repair(soul, messages: list[dict]) -> tuple[list[dict], list[str]]:
    """A repaired copy of `messages`, and the ids of the principles repaired (sorted; [] when nothing was).

    Only the content of assistant messages changes. Ends because every repair kept makes the set of failing
    (principle, check, message) strictly smaller.
    """
    messages, repaired, failing, before = list(messages), set(), _failing(soul, messages), None
    calls = [(principle.id, number, call) for principle in soul.principles for number, call in enumerate(principle.checks) if call.repair]
    while failing and failing != before:
        before = failing
        for principle, number, call in calls:
            for index in assistants(messages):
                if (principle, number, index) not in failing:
                    continue
                attempt = [*messages]
                attempt[index] = messages[index] | {"content": REPAIRS[call.name](messages[index].get("content") or "")}
                after = _failing(soul, attempt)
                if after < failing and (principle, number, index) not in after:
                    messages, failing = attempt, after
                    repaired.add(principle)
    return messages, sorted(repaired)


def _failing(soul, messages: list[dict]) -> set[tuple[str, int, int]]:
    return {(principle, number, v.message_index) for principle, number, _, found in _results(soul, messages) for v in found}
