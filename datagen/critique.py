"""Reading what teachers write: critiques as JSON, however they are wrapped, and replies that give themselves away."""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from datagen.prompting import Prompts

MAX_CRITIQUE = 100_000


@dataclass(frozen=True)
class Finding:
    """One fault of a reply: which principle, the words at fault ("" when something is missing), and why."""

    principle: str
    quote: str
    why: str


class Unreadable(ValueError):
    """A critique that has no reading; the message says what is wrong, for the repair round."""


async def ask_critic(
    call: Callable, prompts: Prompts, *, max_tokens: int, reply: str, principles: list[str], **told
) -> tuple[list[Finding] | None, dict]:
    """Have `reply` judged; broken JSON gets one repair round. Gives (findings, trail step); None: there was no reading it."""
    prompt, stage, step = prompts.render("critique", reply=reply, principles=principles, **told), "critique", "critique"
    while True:
        answer = await call(stage, prompt, temperature=0.0, max_tokens=max_tokens)
        try:
            findings = parse_critique(answer.text, reply, principles)
        except Unreadable as problem:
            if stage == "critique" and answer.text:
                prompt = prompts.render("repair_json", text=answer.text, problem=str(problem))
                stage, step = "repair_json", "critique-repaired"
                continue
            findings, step = None, "critique-unreadable"
        return findings, {"stage": step, "text": answer.text, "key": answer.key}


def parse_critique(text: str, reply: str, principles: Collection[str]) -> list[Finding]:
    """The violations in a critic's answer ([] when it found none). Fences, prose around the JSON, trailing commas, a lone
    object or a list inside an object are read; unknown principles are dropped, and so is a quote the reply does not have.

    Raises:
        Unreadable: when there is no JSON list of judgements in it.
    """
    found, judged = [], 0
    for item in _judgements(text[:MAX_CRITIQUE]):
        verdict = str(item.get("verdict", "")).strip().lower()
        if verdict not in ("violates", "violation", "ok"):
            continue
        judged += 1
        principle = str(item.get("principle", "")).strip()
        if verdict != "ok" and principle in principles:
            quote = item.get("quote") if isinstance(item.get("quote"), str) else ""
            found.append(Finding(principle, quote if _flat(quote) in _flat(reply) else "", str(item.get("why") or "").strip()))
    if not judged:
        raise Unreadable('no object has a "verdict" of "violates" or "ok"')
    return found


def _judgements(text: str) -> list[dict]:
    problem = "there is no JSON in it"
    decoder = json.JSONDecoder(strict=False)
    for source in (text, _without_trailing_commas(text)):
        for start in [match.start() for match in re.finditer(r"[\[{]", source)][:50]:
            try:
                value, _ = decoder.raw_decode(source, start)
            except json.JSONDecodeError as error:
                problem = error.msg
                continue
            except RecursionError:
                problem = "it is nested too deeply"
                continue
            if isinstance(value, dict):
                inner = next((v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
                value = inner if inner is not None else [value]
            if isinstance(value, list) and any(isinstance(item, dict) for item in value):
                return [item for item in value if isinstance(item, dict)]
    raise Unreadable(problem)


def _without_trailing_commas(text: str) -> str:
    """Drop commas before ] or }, outside strings."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda match: match[1] or "", text)


def _flat(text: str) -> str:
    return " ".join(text.split()).casefold()


# A chosen reply that talks about its own revision teaches apology for a mistake that nobody saw.
_LEAK = re.compile(
    r"\bas (?:revised|rewritten|requested above)\b"
    r"|\b(?:revised|rewritten|rephrased|improved|updated|corrected|previous|original|earlier|first|initial)"
    r" (?:reply|response|answer|draft)\b"
    r"|\b(?:revision|rewrite) of (?:the|my|your) (?:reply|response|answer|draft)\b"
    r"|\b(?:the|my) (?:draft|critique)\b|\bthe notes? (?:say|said|mention|hold|above|suggest)"
    r"|^\W*you(?:'|’)re (?:absolutely )?right\b|</?(?:notes?|reply|request|draft)>",
    re.I,
)
_APOLOGY = re.compile(
    r"\b(?:i(?:'|’)?m|i am|so|very|really|we(?:'|’)?re) sorry\b|^\W*sorry\b|\bapologi[sz]e|\bapolog(?:y|ies)\b|\bmy (?:bad|mistake)\b", re.I
)
_REFUSAL = re.compile(
    r"^\W*(?:(?:i(?:'|’)m|i am) (?:so |very )?sorry,? (?:but )?|unfortunately,? |as an ai[^.]{0,60}, )?"
    r"(?:i|we) (?:can(?:'|’)?t|cannot|can not|am (?:not able|unable)|(?:'|’)m (?:not able|unable)|won(?:'|’)t) (?:to )?"
    r"(?:help|assist|answer|provide|comply|fulfil|do that|discuss)",
    re.I,
)


def gives_itself_away(revision: str, request: str, principles: Collection[str] = ()) -> str:
    """Why `revision` cannot pass as a first reply ("" when it can): it is blank, speaks of revising, apologises, or cites
    principles by id. What the request itself talks about is no leak."""
    if not revision.strip():
        return "empty"
    for name, pattern in (("speaks of a revision", _LEAK), ("apologises", _APOLOGY)):
        if (match := pattern.search(revision)) and not pattern.search(request) and match.group().lower() not in request.lower():
            return name
    return "recites the rules" if any(f"[{principle}]" in revision for principle in principles) else ""


def strays(revision: str, request: str, drafts: str) -> bool:
    """Does the revision speak of something else? A small teacher answers the note ("you can write only the reply.") instead of
    the request. On the subject means: a quarter of its words of four letters or more stand in the request or the drafts; fewer than three such words say nothing."""
    words = _content_words(revision)
    return len(words) >= 3 and len(words & (_content_words(request) | _content_words(drafts))) < len(words) / 4


def _content_words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{4,}", text.casefold()))


def refuses(reply: str) -> bool:
    """Does the reply decline instead of answering?"""
    return bool(_REFUSAL.match(reply))
