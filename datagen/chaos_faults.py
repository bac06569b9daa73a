"""What the server of datagen/chaos.py says: honest answers, and every way that teachers are known to fail, byte for byte."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import cached_property

MODEL, PROVIDER = "chaos", "Chaos"


@dataclass(frozen=True)
class Wire:
    """What goes out: the bytes, what happens then (keep | close | reset | trickle | hang | die), and the
    prompt tokens, completion tokens and USD they themselves tell of."""

    data: bytes
    then: str = "keep"
    whole: bool = False  # an answer as it should be
    usage: tuple[int, int, float] = (0, 0, 0.0)


def http(status: int, body: object, headers: dict[str, str] | None = None, kind: str = "application/json", length: int = 0) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": kind, "Content-Length": str(length or len(data))} | (headers or {})
    return "\r\n".join([f"HTTP/1.1 {status} ", *(f"{name}: {value}" for name, value in lines.items()), "", ""]).encode() + data


class Ask:
    """One request for a completion: makes the honest answer to it, and the parts that faults are made of."""

    def __init__(self, raw: bytes, price: tuple[float, float], sentences: int, pause: float | None):
        self.body, self.digest, self.raw = json.loads(raw), hashlib.sha256(raw).digest(), raw
        self.price, self.sentences, self.pause = price, sentences, pause

    @cached_property
    def text(self) -> str:  # a longer limit leaves the words as they are
        same = re.sub(rb'"max_(completion_)?tokens": ?[0-9]+', b"", self.raw)
        return answer_text(self.body, hashlib.sha256(same).digest(), self.sentences)

    def say(self, content: str | None, finish: str | None = "stop", *, tokens: int | None = None, message: dict | None = None,
            choice: dict | None = None, whole: bool = False, **top: object) -> Wire:  # fmt: skip
        """A 200 with `content`; `tokens` were generated for it (by default as many as it has)."""
        wrote = len((content or "").encode()) // 4 + 1 if tokens is None else tokens
        prompt, (price_in, price_out) = len(self.raw) // 4 + 1, self.price
        cost = round((prompt * price_in + wrote * price_out) / 1e6, 12) if wrote else 0.0
        body = {
            "id": f"gen-{self.digest[:6].hex()}", "object": "chat.completion", "model": self.body.get("model", MODEL), "provider": PROVIDER,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content} | (message or {}), "finish_reason": finish} | (choice or {})],
            "usage": {"prompt_tokens": prompt, "completion_tokens": wrote, "total_tokens": prompt + wrote, "cost": cost},
        } | top  # fmt: skip
        return Wire(http(200, body), whole=whole, usage=(0, 0, 0.0) if "usage" in top else (prompt, wrote, cost))

    def honest(self) -> Wire:
        if self.body.get("tools") and self.body["messages"][-1].get("role") != "tool":
            function = self.body["tools"][0]["function"]
            return self.call(
                (function["name"], json.dumps(instance(function.get("parameters", {}), int.from_bytes(self.digest[:8])))), whole=True
            )
        if len(self.text.encode()) // 4 + 1 > self.limit:
            return self.say(self.text.encode()[: 4 * self.limit].decode(errors="ignore"), "length", tokens=self.limit)
        choice = {"logprobs": first_logprobs(self.text)} if self.body.get("logprobs") else {}
        return self.say(self.text, choice=choice, whole=True)

    def call(self, *calls: tuple[str, object], ids: tuple[str, ...] = ("call_1", "call_2"), **more) -> Wire:
        made = [{"id": ids[n], "type": "function", "function": {"name": name, "arguments": args}} for n, (name, args) in enumerate(calls)]
        return self.say(None, "tool_calls", tokens=more.pop("tokens", 20), message={"tool_calls": made}, **more)

    @property
    def limit(self) -> int:
        return self.body.get("max_tokens") or self.body.get("max_completion_tokens") or 4096

    @property
    def wait(self) -> float:
        return self.pause or 0.0


def error(status: int, code: object, message: str, wait: str = "", **more: object) -> Callable[[Ask], Wire]:
    """An error before generation; `wait` names the header that carries the seconds of --retry-after."""

    def make(ask: Ask) -> Wire:
        headers = {wait: f"{ask.wait:g}"} if wait and ask.pause is not None else {}
        return Wire(http(status, {"error": {"code": code, "message": message} | more}, headers))

    return make


def limited(header: str, value: Callable[[Ask], str]) -> Callable[[Ask], Wire]:
    return lambda ask: Wire(http(429, {"error": LIMITED}, {header: value(ask)}))


def within(make: Callable[[Ask], Wire], before: bytes, after: bytes = b"", kind: str = "application/json") -> Callable[[Ask], Wire]:
    """The body of another answer with something around it."""

    def wrapped(ask: Ask) -> Wire:
        wire = make(ask)
        return replace(wire, data=http(200, before + wire.data.partition(b"\r\n\r\n")[2] + after, kind=kind))

    return wrapped


READ = ("Read", '{"file_path": "a.py"}')
LONG = "This model's maximum context length is 2048 tokens. However, your request has 8 input tokens plus 2045 'max_tokens'"
VLLM = {"message": LONG, "type": "BadRequestError", "param": "input_tokens, max_tokens", "code": 400}
LIMITED = {"code": 429, "message": "Rate limit exceeded", "metadata": {"error_type": "rate_limit_exceeded"}}
UPSTREAM = {"code": 429, "message": "Provider returned error", "metadata": {"raw": "Too Many Requests", "provider_name": PROVIDER}}
NOWHERE = {"code": "constraint_filtered", "retryable": False, "constraint": {"field": "quantizations"}}
PING, PIECE = b": OPENROUTER PROCESSING\n\n", b'data: {"choices": [{"delta": {"content": "The"}}]}\n\n'
PART = b'{"choices": [{"mess'

# fmt: off
FAULTS: dict[str, Callable[[Ask], Wire]] = {  # the numbers are those of docs/chaos.md and of the tests
    "rate_limit": error(429, 429, "Rate limit exceeded", "Retry-After", metadata=LIMITED["metadata"]),  # 1, 4
    "rate_limit_date": limited("Retry-After", lambda a: formatdate(math.ceil(time.time() + a.wait), usegmt=True)),  # 2
    "rate_limit_reset": limited("X-RateLimit-Reset", lambda a: str(int(1000 * (time.time() + a.wait)))),  # 2
    "daily_quota": limited("Retry-After", lambda a: "3600"),  # 3
    "error_200": lambda a: Wire(http(200, {"id": None, "choices": None, "usage": None, "error": UPSTREAM})),  # 5
    "error_choices": lambda a: a.say(None, tokens=0, error={"code": 429, "message": "Rate limit exceeded"}),  # 6
    "error_finish": lambda a: a.say("The first half of", "error", choice={"error": {"code": 502, "message": "upstream"}}),  # 7
    "error_word": error(200, "server_error", "internal"),  # 8
    "error_string": lambda a: Wire(http(200, {"error": "something broke"})),  # 8
    "error_typed": lambda a: Wire(http(200, {"error": {"error_type": "rate_limit_exceeded", "http_status": 429}})),  # 8
    "thought_signature": error(200, 400, "Provider returned error", metadata={"raw": "missing a thought_signature"}),  # 9
    "blank": lambda a: a.say("", None, tokens=0),  # 10
    "reasoning_cut": lambda a: a.say("", "length", tokens=a.limit, message={"reasoning": "hmm, the user"}),  # 11
    "reasoning_only": lambda a: a.say(None, tokens=9, message={"reasoning": "hmm, the user wants"}),  # 12, 40
    "think": lambda a: a.say(f"<think>hmm, the user</think>\n{a.text}", whole=True),  # 13
    "think_open": lambda a: a.say("<think>hmm, the user wants"),  # 13
    "length": lambda a: a.say(a.text[: len(a.text) // 2], "length"),  # 14
    "tool_cut": lambda a: a.call(("Read", '{"file_path": "/src/ma'), tokens=a.limit),  # 15
    "tool_limit": lambda a: a.call(READ, tokens=a.limit),  # 15
    "tool_dict": lambda a: a.call(("Read", {"file_path": "a.py", "offset": 4, "limit": None})),  # 16
    "tool_null": lambda a: a.call(("Read", None)),  # 16
    "tool_empty": lambda a: a.call(("Read", "")),  # 16
    "tool_bad": lambda a: a.call(("Read", "file_path=a.py")),  # 16
    "tool_ids": lambda a: a.call(READ, READ, ids=("", "")),  # 16
    "tool_unknown": lambda a: a.call(("launch_rocket", "{}")),  # 16
    "tool_parallel": lambda a: a.call(READ, ("Grep", '{"pattern": "x"}')),  # 16
    "json_prose": lambda a: a.say(f"Sure! Here is what I think:\n\n{a.text}\n\nHope this helps."),  # 17
    "json_fenced": lambda a: a.say(f"```json\n{a.text}\n```"),  # 17
    "json_comma": lambda a: a.say(re.sub(r"([}\]])\s*$", r",\1", a.text)),  # 17
    "json_broken": lambda a: a.say("It breaks nothing that I can see."),  # 17
    "constraint": error(404, 404, "No endpoints match", availability=NOWHERE),  # 18
    "no_endpoints": error(404, 404, "No endpoints found", metadata={"error_type": "no_endpoints"}),  # 19
    "deprecated": error(404, 404, "model deprecated", metadata={"error_type": "model_deprecated"}, fallback_models=["chaos-2"]),  # 19
    "no_model": error(400, "model_not_found", "The model does not exist"),  # 19
    "unavailable": lambda a: error(503, 503, "temporarily_unavailable", availability={"retry_after": a.wait})(a),  # 20
    "no_credit": error(402, 402, "This request requires more credits, or fewer max_tokens; can only afford 2666"),  # 21
    "in_flight_budget": error(402, 402, "wait", "Retry-After", metadata={"limit_source": "openrouter_in_flight_budget"}),  # 22
    "moderation": error(403, 403, "input flagged", metadata={"reasons": ["violence"], "flagged_input": "x"}),  # 23
    "guardrail": error(403, 403, "blocked by a guardrail of this account"),  # 23
    "bad_key": error(401, 401, "No auth credentials found"),  # 24
    "too_long": error(400, "context_length_exceeded", "too many tokens"),  # 25
    "too_large": lambda a: Wire(http(413, b"")),  # 25
    "other_model": lambda a: a.say(a.text, model="chaos-2", whole=True),  # 26
    "other_provider": lambda a: a.say(a.text, provider="Elsewhere", whole=True),  # 26
    "no_usage": lambda a: a.say(a.text, usage=None, whole=True),  # 27
    "no_cost": lambda a: a.say(a.text, usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}, whole=True),  # 27
    "trickle": lambda a: Wire(b"HTTP/1.1 200 \r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n", "trickle"),  # 28
    "html": lambda a: Wire(http(200, b"<html><h1>Just a moment</h1></html>", kind="text/html")),  # 29
    "no_body": lambda a: Wire(http(200, b"")),  # 29
    "cut": lambda a: Wire(http(200, a.say(a.text).data.partition(b"\r\n\r\n")[2][:-40])),  # 29
    "short": lambda a: Wire(http(200, PART, length=4000), "close"),  # 29
    "reset": lambda a: Wire(http(200, PART, length=4000), "reset"),  # 29
    "error_524": lambda a: Wire(http(524, b"<html>A timeout occurred</html>", kind="text/html")),  # 29
    "error_529": error(529, "overloaded", "Overloaded", type="overloaded_error"),  # 29
    "comments": within(Ask.honest, 3 * PING),  # 30
    "sse_whole": within(Ask.honest, PING + b"data: ", b"\n\ndata: [DONE]\n\n", "text/event-stream"),  # 30
    "sse_error": within(error(200, 502, "upstream"), PING + PIECE + b"data: ", b"\n\n", "text/event-stream"),  # 30
    "sse_pieces": lambda a: Wire(http(200, PING + PIECE * 3 + b"data: [DONE]\n\n", kind="text/event-stream")),  # 30
    "batch": lambda a: Wire(http(202, {"id": "batch_1", "status": "validating", "results": None})),  # 31
    "vllm_long": lambda a: Wire(http(400, {"error": VLLM})),  # 32
    "vllm_flat": lambda a: Wire(http(400, {"object": "error"} | VLLM)),  # 32
    "vllm_no_model": error(404, 404, "The model `m` does not exist.", type="NotFoundError"),  # 33
    "tool_text": lambda a: a.say('<tool_call>\n{"name": "Read", "arguments": {"file_path": "a.py"}}\n</tool_call>'),  # 35
    "die": lambda a: Wire(http(500, b""), "die"),  # 36
    "error_500": lambda a: Wire(http(500, b"")),  # 36, --first-fails
    "hang": lambda a: Wire(b"", "hang"),  # 37, 38
    "loading": error(503, 503, "the model is loading"),  # 39
    "reasoning_content": lambda a: a.say(a.text, message={"reasoning_content": "hmm"}, whole=True),  # 40
    "thinking_cut": lambda a: a.say("hmm, the user wants", "length"),  # 40
    "no_choice": lambda a: a.say("", choices=[]),  # 43
    "abort": lambda a: a.say("The first half of", "abort"),  # 43
}
# fmt: on

SENTENCES = (
    "that's the part that breaks first, so start there.", "keep the function small and give it one job.",
    "read the last line of the traceback: it names the file.", "a test that can't fail isn't a test.",
    "write the error message for the person who'll read it at night.", "the cache is stale, like bread on a sill.",
    "sort once, outside the loop, and it's quick.", "if it's slow, measure before you guess.",
)  # fmt: skip
CRITIC = re.compile(r"each of these principles: (.+?)\.\s")
PAIR = re.compile(r"<reply_a>\n(.*)\n</reply_a>.*<reply_b>\n(.*)\n</reply_b>", re.S)


def answer_text(body: dict, digest: bytes, sentences: int) -> str:
    """The answer to a request: judgements for the critic's and the judge's prompts, an instance of the schema where one is
    given, else prose about the request. Half the first drafts are loud; what is asked for in tags (a revision) is calm."""
    prompt = "\n".join(part for part in (message.get("content") for message in body["messages"][-1:]) if isinstance(part, str))
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
    if found := CRITIC.search(prompt + "\n"):
        items = [{"principle": name, "quote": "", "why": "as it should be", "verdict": "ok"} for name in found[1].split(", ")]
        if digest[0] < 64:
            items[digest[1] % len(items)] |= {"why": "it could be warmer", "verdict": "violates"}
        name = next((name for name, part in (schema or {}).get("properties", {}).items() if part.get("type") == "array"), None)
        return json.dumps({name: items} if name else items)
    if (found := PAIR.search(prompt)) and ("single letter" in prompt or '"verdict"' in prompt):
        a, b = (hashlib.sha256(reply.encode()).digest() for reply in found.groups())  # the same reply wins in both orders
        if "single letter" in prompt:
            return "A" if a > b else "B"
        return json.dumps({"why": "it says more", "verdict": "tie" if a == b else "a" if a > b else "b"})
    if schema:
        return json.dumps(instance(schema, int.from_bytes(digest[:8])))
    asked = re.search(r"<request>\n(.*?)\n</request>", prompt, re.S)
    about = " ".join(re.findall(r"[^\W\d_]{4,}", asked[1] if asked else prompt)[:6]).lower()
    said = " ".join(SENTENCES[digest[n % 32] % len(SENTENCES)] for n in range(sentences))
    return f"{about}: {said}" if asked or digest[2] & 1 else f"Great question! {about.capitalize()}: {said}"


def instance(schema: dict, pick: int) -> object:
    """A value that `schema` (the part of JSON Schema that structured output uses) allows; `pick` chooses among many."""
    if options := schema.get("enum"):
        return options[pick % len(options)]
    if options := schema.get("anyOf"):
        return instance(options[0], pick)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: instance(part, pick // (n + 1)) for n, (name, part) in enumerate(schema.get("properties", {}).items())}
    if kind == "array":
        return [instance(schema.get("items", {"type": "string"}), pick // 8**n) for n in range(max(4, schema.get("minItems", 0)))]
    if kind == "string":
        return f"{SENTENCES[pick % 8]} {SENTENCES[pick // 8 % 8]} ({pick % 9973})"
    return {"boolean": bool(pick & 1), "null": None}.get(kind, schema.get("minimum", 0) + pick % 2)


def first_logprobs(text: str) -> dict:
    """A choice's `logprobs`: nine to one for the letter that was said, or all for the first word of anything else."""
    token = text.split(" ", 1)[0]
    odds = {token: 0.9, "B" if token == "A" else "A": 0.1} if token in ("A", "B") else {token: 1.0}
    top = [{"token": word, "logprob": math.log(share), "bytes": list(word.encode())} for word, share in odds.items()]
    return {"content": [top[0] | {"top_logprobs": top}]}
