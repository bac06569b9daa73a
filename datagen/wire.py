"""What goes over the wire and what comes back: frozen requests, their keys, and one reading of every answer.

Pure: no sockets, no clock. `classify` is the only place that knows how OpenRouter, vLLM and OpenAI say that something
went wrong; the cases are those met in the wild, each with its row in the tests.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property

from datagen.tool_calls import BadCall, clean, read_calls
from soul.files import canonical_json

WIRE_VERSION = 1  # raise when `classify` or the body's layout changes what an old answer means

# What a key leaves out. Everything else that reaches the teacher is in it.
#   API key, headers            who pays does not change the reply
#   deadline, attempts, backoff they decide whether a reply comes, not what it says
#   concurrency                 order of sending is not content
#   stage, row id               two rows that ask the same thing share one reply
OUTCOMES = ("ok", "truncated", "refused", "empty", "rate_limited", "transient", "permanent", "budget")
FINAL = ("ok", "truncated", "refused", "permanent")


@dataclass(frozen=True)
class Request:
    """One call: `body` is the canonical JSON, byte for byte what every attempt sends."""

    base_url: str
    body: str
    replicate: int = 0

    @cached_property
    def key(self) -> str:
        said = canonical_json([WIRE_VERSION, self.base_url, self.replicate, self.body])
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def make_request(base_url: str, body: dict, replicate: int = 0) -> Request:
    return Request(base_url, canonical_json(body), replicate)


@dataclass(frozen=True)
class Answer:
    """What came back. `status` 0: no whole HTTP answer, `body` says why; `reached` False: there was nobody to ask."""

    status: int
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)
    reached: bool = True


@dataclass(frozen=True)
class Verdict:
    """The one reading of an answer. `text` is the answer alone, reasoning kept apart; `stops` ends the whole run;
    `free` spends none of the call's attempts; unknown `cost` (USD) is None, never 0. `tool_calls` are whole and in the
    form of rows, `logprobs` the alternatives to the first token of the answer; calls only where the outcome is "ok"."""

    outcome: str
    text: str = ""
    why: str = ""
    fix: str | None = None
    finish: str | None = None
    reasoning: str = ""
    usage: dict | None = None
    cost: float | None = None
    model: str | None = None
    provider: str | None = None
    quantization: str | None = None
    retry_after: float | None = None
    stops: bool = False
    free: bool = False
    reached: bool = True
    tool_calls: list[dict] = field(default_factory=list)
    logprobs: dict[str, float] | None = None

    @property
    def served(self) -> str:
        """Who answered, as "model@provider (quantization)", with what is known of it."""
        name = f"{self.model or ''}@{self.provider}" if self.provider else self.model or ""
        return f"{name} ({self.quantization})" if name and self.quantization else name

    @property
    def final(self) -> bool:
        """Whether the same request need never be sent again; a wrong key or a missing model can be put right."""
        return self.outcome in FINAL and not self.stops


@dataclass(frozen=True)
class _Error:
    code: int | None
    kind: str
    message: str
    meta: dict


_KINDS = {  # error.type, error.code (as a word) or metadata.error_type -> outcome; a word says more than a status
    "rate_limit_exceeded": "rate_limited",
    "insufficient_quota": "budget",
    "insufficient_credits": "budget",
    "context_length_exceeded": "permanent",
    "content_filter": "refused",
    "content_policy_violation": "refused",
    "moderation": "refused",
    "server_error": "transient",
    "provider_unavailable": "transient",
    "timeout": "transient",
}
_STATUSES = {400: "permanent", 401: "permanent", 402: "budget", 403: "permanent", 404: "permanent", 405: "permanent", 413: "permanent",
             422: "permanent", 429: "rate_limited"}  # fmt: skip
_MODERATION = re.compile(r"moderation|flagged|guardrail|content policy", re.I)


def classify(answer: Answer, *, now: float, asked: Request | None = None) -> Verdict:
    """Read an answer; no bytes make it raise. `now` is the wall clock (Unix seconds), for retry times given as dates. `asked`
    matters to answers with tool calls: none are taken where no tools were offered, and one that used up max_tokens is
    truncated even if its JSON happens to close."""
    if answer.status == 0:
        return Verdict("transient", why=answer.body, free=not answer.reached, reached=answer.reached)
    data = _read_body(answer.body)
    error = _find_error(data or {})
    if error or answer.status >= 400:
        error = error or _Error(None, "", answer.body.strip()[:200] or "no body", {})
        return _failure(answer, error, data or {}, now)
    if data is None:
        return Verdict("transient", why=f"the answer is not JSON: {answer.body.strip()[:80]!r}")
    return _completion(data, asked)


def _failure(answer: Answer, error: _Error, data: dict, now: float) -> Verdict:
    status = error.code or (answer.status if answer.status >= 400 else None)
    outcome = _KINDS.get(error.kind) or _STATUSES.get(status or 0, "transient")
    retry_after = _retry_after(answer.headers, error.meta, now)
    if outcome == "budget" and retry_after is not None:
        outcome = "rate_limited"  # a 402 with a time is OpenRouter's limit on money in flight, not an empty purse
    if status == 403 and (_MODERATION.search(error.message) or {"reasons", "flagged_input"} & set(error.meta)):
        outcome = "refused"
    raw = error.meta.get("raw")
    why = clean(f"{error.message} ({raw})" if isinstance(raw, str) and raw else error.message)
    stops = outcome == "budget" or (outcome == "permanent" and status in (401, 403, 404, 405))
    provider = _text(error.meta.get("provider_name")) or _text(data.get("provider"))
    return Verdict(
        outcome, why=f"{status or error.kind or 'error'}: {why}", fix=_fix(status, outcome, error), stops=stops,
        free=outcome == "rate_limited", retry_after=retry_after, provider=provider, **_accounts(data),
    )  # fmt: skip


def _fix(status: int | None, outcome: str, error: _Error) -> str | None:
    if "thought_signature" in f"{error.message} {error.meta.get('raw')}":
        return "This model wants its own reasoning back: do not replay assistant turns to it."
    if outcome == "budget":
        return "Add credit or lower --max-tokens."
    if status == 401:
        return "Check the API key."
    if status == 404:
        if isinstance(others := error.meta.get("fallback_models"), list) and others:
            return clean(f"Models served instead: {', '.join(map(str, others))}."[:300])
        if isinstance(constraint := error.meta.get("constraint"), dict):
            return clean(f"No provider of this model allows {str(constraint.get('field'))[:80]}: leave it out or choose another model.")
        return "Check the model's name and the URL."
    return None


def _completion(data: dict, asked: Request | None) -> Verdict:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Verdict("transient", why="the answer has no choices", **_accounts(data))
    choice = choices[0]
    message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
    finish = _text(choice.get("finish_reason"))
    thought, text, open_thought = split_reasoning(_content(message.get("content")))
    said = dict(
        finish=finish, reasoning=_text(message.get("reasoning")) or _text(message.get("reasoning_content")) or thought,
        provider=_text(data.get("provider")), **_accounts(data),
    )  # fmt: skip
    first = None if thought else _first_logprobs(choice.get("logprobs"))
    if finish == "content_filter" or message.get("refusal"):
        return Verdict("refused", why=_text(message.get("refusal")) or "content filter", **said)
    if finish == "length" or open_thought:
        why = "cut at max_tokens" if finish == "length" else "the reasoning never ended"
        return Verdict("truncated", text, why=why, **said, logprobs=None if open_thought else first)
    if finish in ("error", "abort"):
        return Verdict("transient", why=f"finish_reason {finish}", **said)
    try:
        calls = read_calls(message.get("tool_calls"))
    except BadCall as bad:  # cut: asking again gives the same cut; otherwise another sample may do better
        return Verdict("truncated" if bad.cut else "empty", why=str(bad), **said)
    if calls and (wrong := _misplaced(said["usage"], asked)):
        return Verdict(**wrong, **said)
    if not text.strip() and not calls:
        if finish is None and not (said["usage"] or {}).get("completion_tokens"):
            said["cost"] = said["cost"] or 0.0  # a blank finish without tokens is not billed
        return Verdict("empty", why="only reasoning came back" if said["reasoning"] else "the reply is empty", **said)
    if finish is None:
        return Verdict("transient", why="no finish_reason: the text may be a part", **said)
    return Verdict("ok", text, **said, tool_calls=calls, logprobs=first)


def _misplaced(usage: dict | None, asked: Request | None) -> dict | None:
    """What is wrong with tool calls that are whole in themselves, seen from what was asked."""
    if asked is None:
        return None
    body = json.loads(asked.body)
    if not body.get("tools"):
        return {"outcome": "empty", "why": "it calls a tool, and none was offered"}
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    cut = limit and (usage or {}).get("completion_tokens") == limit
    return {"outcome": "truncated", "why": "the tool calls were cut at max_tokens"} if cut else None


def _first_logprobs(logprobs: object) -> dict[str, float] | None:
    """Token -> log-probability for the first token of the answer; of tokens that are spelled alike, the likelier."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = tokens[0] if isinstance(tokens, list) and tokens and isinstance(tokens[0], dict) else {}
    found: dict[str, float] = {}
    for item in (first, *(first["top_logprobs"] if isinstance(first.get("top_logprobs"), list) else ())):
        if isinstance(item, dict) and isinstance(item.get("token"), str) and (value := _number(item.get("logprob"))) is not None:
            token = clean(item["token"])
            found[token] = max(float(value), found.get(token, float(value)))
    return found or None


def split_reasoning(content: str) -> tuple[str, str, bool]:
    """(reasoning, answer, whether reasoning was left open). Servers without a reasoning parser leave `<think>` in the
    content, and those whose chat template opens it leave only the closing tag."""
    before, close, after = content.partition("</think>")
    if close:
        return before.replace("<think>", "", 1).strip(), after.strip(), False
    if content.lstrip().startswith("<think>"):
        return content.replace("<think>", "", 1).strip(), "", True
    return "", content, False


def _accounts(data: dict) -> dict:
    usage = _numbers(data.get("usage"), deep=True)
    cost = (usage or {}).get("cost")
    cost = float(cost) if isinstance(cost, (int, float)) and cost >= 0 else None
    return {"usage": usage, "cost": cost, "model": _text(data.get("model"))}


def _numbers(usage: object, deep: bool = False) -> dict | None:
    """The counts in `usage` and, one level down, in its details: what else is there would only break the ledger's sums."""
    if not isinstance(usage, dict):
        return None
    kept = {clean(name): _numbers(value) if deep and isinstance(value, dict) else _number(value) for name, value in usage.items()}
    return {name: value for name, value in kept.items() if value is not None}


def _number(value: object) -> int | float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e15 < value < 1e15 else None


def _find_error(data: dict) -> _Error | None:
    """The error in a body, wherever it is: on top, under the first choice, as a bare string, or vLLM's old flat form."""
    error = data.get("error")
    if not error and isinstance(data.get("choices"), list) and data["choices"] and isinstance(data["choices"][0], dict):
        error = data["choices"][0].get("error")
    if not error and data.get("object") == "error":
        error = data
    if not error:
        return None
    if not isinstance(error, dict):
        return _Error(None, "", str(error)[:300], {})
    meta = dict(error.get("metadata")) if isinstance(error.get("metadata"), dict) else {}
    for place in (error, error.get("availability")):
        if isinstance(place, dict):
            meta |= {name: place[name] for name in ("retry_after", "fallback_models", "constraint") if name in place}
    told = (meta.get("error_type"), error.get("error_type"), error.get("code"), error.get("type"))
    words = [word for word in told if isinstance(word, str)]
    kind = next((word for word in words if word in _KINDS), "") or next((word for word in words if not word.isdigit()), "")
    code = next((int(c) for c in map(str, (error.get("code"), error.get("http_status"))) if re.fullmatch("[45][0-9][0-9]", c)), None)
    return _Error(code, kind, str(error.get("message") or kind or "unnamed error")[:300], meta)


def _retry_after(headers: Mapping[str, str], meta: dict, now: float) -> float | None:
    """Seconds to wait: Retry-After as seconds or an HTTP date, X-RateLimit-Reset in epoch milliseconds, or the body's."""
    said = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]*)?", said):
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - now)
    except (OverflowError, TypeError, ValueError):
        pass
    inner = meta.get("headers") if isinstance(meta.get("headers"), dict) else {}
    reset = str(headers.get("x-ratelimit-reset") or inner.get("X-RateLimit-Reset"))
    if re.fullmatch("[0-9]{1,15}", reset):
        return max(0.0, (int(reset) / 1000 if int(reset) > 1e11 else int(reset)) - now)
    in_body = _number(meta.get("retry_after"))
    return None if in_body is None else max(0.0, float(in_body))


def _read_body(body: str) -> dict | None:
    """The JSON object in a body. We never ask for a stream, but comments that keep a connection alive, and events with an
    error or with the whole answer in them, are met where a proxy streams anyway; pieces of an answer are nothing."""
    if (data := json_object(body)) is not None:
        return data
    lines = [line for line in body.splitlines() if line.strip() and not line.startswith(":")]
    if not any(line.startswith("data:") for line in lines):
        return json_object("\n".join(lines))
    events = [event for line in lines if line.startswith("data:") and (event := json_object(line[5:])) is not None]
    return next((event for event in events if _find_error(event) or event.get("object") == "chat.completion"), None)


def json_object(body: str) -> dict | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _content(content: object) -> str:
    if isinstance(content, list):
        return "".join(_text(part.get("text")) or "" for part in content if isinstance(part, dict))
    return _text(content) or ""


def _text(value: object) -> str | None:
    return clean(value) if isinstance(value, str) and value else None
