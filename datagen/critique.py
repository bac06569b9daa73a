"""Reading what teachers write: critiques, verdicts and lists as JSON, however they are wrapped, and replies that give themselves away."""

import asyncio
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from datagen.prompting import Prompts
from soul.files import sound
from soul.repairs import REPAIRS

MAX_CRITIQUE = 100_000


def _object(**properties: dict) -> dict:
    """A JSON schema as strict structured output wants it: an object at the root, every property required, no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_TEXT = {"type": "string"}
_JUDGEMENT = _object(principle=_TEXT, quote=_TEXT, why=_TEXT, verdict={"type": "string", "enum": ["violates", "ok"]})
CRITIQUE_SCHEMA = _object(judgements={"type": "array", "items": _JUDGEMENT})
VERDICT_SCHEMA = _object(why=_TEXT, verdict={"type": "string", "enum": ["a", "b", "tie"]})
LIST_SCHEMA = _object(items={"type": "array", "items": _TEXT})


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
        answer = await call(stage, prompt, role="judge", temperature=0.0, max_tokens=max_tokens, schema=CRITIQUE_SCHEMA)
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
    Raises Unreadable when there is no JSON list of judgements in it."""

    def accept(value: object) -> list[dict] | None:
        if isinstance(value, dict):
            value = next((v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)), [value])
        return [item for item in value if isinstance(item, dict)] or None if isinstance(value, list) else None

    found, judged = [], 0
    for item in _first_json(text, accept):
        verdict = str(item.get("verdict", "")).strip().lower()
        if verdict not in ("violates", "violation", "ok"):
            continue
        judged += 1
        principle = str(item.get("principle", "")).strip()
        if verdict != "ok" and principle in principles:
            quote = item.get("quote") if isinstance(item.get("quote"), str) else ""
            found.append(Finding(principle, quote if _flat(quote) in _flat(reply) else "", sound(str(item.get("why") or "").strip())))
    if not judged:
        raise Unreadable('no object has a "verdict" of "violates" or "ok"')
    return found


def _first_json(text: str, accept: Callable[[object], object | None]) -> object:
    """The first thing that `accept` makes of a JSON value anywhere in `text`. Raises Unreadable when it takes none."""
    problem, text, decoder = "there is no JSON in it", text[:MAX_CRITIQUE], json.JSONDecoder(strict=False)
    without_trailing_commas = re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda match: match[1] or "", text)
    for source in (text, without_trailing_commas):
        for start in [match.start() for match in re.finditer(r"[\[{]", source)][:50]:
            try:
                value, _ = decoder.raw_decode(source, start)
            except (json.JSONDecodeError, RecursionError) as error:
                problem = getattr(error, "msg", "it is nested too deeply")
                continue
            if (accepted := accept(value)) is not None:
                return accepted
    raise Unreadable(problem)


def _flat(text: str) -> str:
    return " ".join(text.split()).casefold()


async def ask_judge(call: Callable, prompts: Prompts, *, max_tokens: int, replies: tuple[str, str], **told) -> tuple[int | None, str, list]:
    """Which of two replies is closer to the SOUL, asked twice with the order swapped, since judges prefer a place. Apologies
    are taken out first: wording alone moves verdicts. Gives (0 or 1, "", trail steps), or (None, why not, steps)."""
    shown = [REPAIRS["no_apology"](reply).strip() or reply for reply in replies]
    if shown[0] == shown[1]:
        return None, "judge: nothing to tell apart", []
    orders = ((0, 1), (1, 0))
    asked = [prompts.render("judge", reply_a=shown[a], reply_b=shown[b], **told) for a, b in orders]
    sampling = {"role": "judge", "temperature": 0.0, "max_tokens": max_tokens, "schema": VERDICT_SCHEMA}
    answers = await asyncio.gather(*(call("judge", prompt, **sampling) for prompt in asked))
    steps = [{"stage": "judge", "text": answer.text, "key": answer.key} for answer in answers]
    try:
        verdicts = [parse_verdict(answer.text) for answer in answers]
    except Unreadable:
        return None, "judge: unreadable", steps
    if verdicts == ["tie", "tie"]:
        return None, "judge: tie", steps
    winners = {order["ab".index(verdict)] if verdict != "tie" else None for order, verdict in zip(orders, verdicts, strict=True)}
    return (winners.pop(), "", steps) if len(winners) == 1 else (None, "judge: swap disagrees", steps)


def parse_verdict(text: str) -> str:
    """ "a", "b" or "tie" from a judge's answer, however its JSON is wrapped. Raises Unreadable."""

    def accept(value: object) -> str | None:
        said = str(value.get("verdict", "")) if isinstance(value, dict) else ""
        match = re.fullmatch(r"\W*(?:reply[ _-]?)?(a|b|tie)\W*", said.strip(), re.I)
        return match[1].lower() if match else None

    return _first_json(text, accept)


def parse_list(text: str) -> list[str]:
    """The texts of a JSON list (of strings or of objects with one, also inside an object), else of a numbered or bulleted list,
    without repeats. Raises Unreadable when there is neither."""

    def accept(value: object) -> list[str] | None:
        if isinstance(value, dict):
            value = next((inner for inner in value.values() if isinstance(inner, list)), None)
        items = value if isinstance(value, list) else []
        items = [next((text for text in item.values() if isinstance(text, str)), "") if isinstance(item, dict) else item for item in items]
        return list(dict.fromkeys(sound(item.strip()) for item in items if isinstance(item, str) and item.strip())) or None

    try:
        return _first_json(text, accept)
    except Unreadable:
        lines = re.findall(r"^[ \t]*(?:\d{1,3}[.)]|[-*•])[ \t]+(\S.*?)[ \t]*$", text[:MAX_CRITIQUE], re.M)
        if len(lines) < 2:
            raise
        return list(dict.fromkeys(line.strip('"') for line in lines))


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


# "Here's the reply:" before the reply; "here's the response object:" talks of the subject
_PREAMBLE = re.compile(
    r"^\W*(?:\w+\W{1,2})?here(?:'|’)?s?(?: is)? (?:the|a|an|my|your) (?:[\w-]+ ){0,3}(?:reply|response)"
    r"(?: (?:to|that|for|in|with) [^\n:]{0,60})?:",
    re.I,
)


def gives_itself_away(revision: str, request: str, principles: Collection[str] = ()) -> str:
    """Why `revision` cannot pass as a first reply ("" when it can): it is blank, announces itself, speaks of revising,
    apologises, or cites principles by id. What the request itself talks about is no leak."""
    if not revision.strip():
        return "empty"
    for name, pattern in (("has a preamble", _PREAMBLE), ("speaks of a revision", _LEAK), ("apologises", _APOLOGY)):
        if (match := pattern.search(revision)) and not pattern.search(request) and match.group().lower() not in request.lower():
            return name
    return "recites the rules" if recites(revision, principles) else ""


def recites(text: str, principles: Collection[str]) -> bool:
    """Does `text` cite a principle by its id, which only stands in the prompt?"""
    return any(f"[{principle}]" in text for principle in principles)


def strays(revision: str, request: str, drafts: str) -> bool:
    """Does the revision speak of something else? A small teacher answers the note ("you can write only the reply.") instead of
    the request. On the subject means: a quarter of its words of four letters or more stand in the request or the drafts; fewer
    than three such words say nothing."""
    words = _content_words(revision)
    return len(words) >= 3 and len(words & (_content_words(request) | _content_words(drafts))) < len(words) / 4


def _content_words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{4,}", text.casefold()))


def refuses(reply: str) -> bool:
    """Does the reply decline instead of answering?"""
    return bool(_REFUSAL.match(reply))
