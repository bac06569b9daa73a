"""Teachers: who answers. Every teacher makes frozen requests and gives raw answers; retry and deadline are the engine's.

openrouter:VENDOR/MODEL     key from OPENROUTER_API_KEY, see datagen/openrouter.py
openai:MODEL                key from OPENAI_API_KEY
http://HOST:8000/v1#MODEL   any OpenAI-compatible server (key from SOULSMITH_API_KEY, if it needs one)
vllm:MODEL_OR_DIRECTORY     starts vLLM for as long as the run takes, see datagen/vllm.py
local:smollm2-135m          the embedded model, see datagen/local.py
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from datagen.wire import Answer, Request, classify, json_object, make_request
from soul.errors import UserError

if TYPE_CHECKING:
    from datagen.vllm import Serve

FORMS = "openrouter:MODEL, openai:MODEL, vllm:MODEL, local:smollm2-135m or http://HOST:PORT/v1#MODEL"
LOOK = 30.0  # seconds that a question about the server itself (models, key, health) may take

# What a server fills in from the model's generation_config.json, or from its own taste, unless it is said; by `owned_by`
# of its /models. Only these servers are sent a schema or a wish for logprobs: others may refuse fields that they don't know.
SERVERS = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}


@dataclass(frozen=True)
class Price:
    """USD per prompt token, per completion token and per request."""

    prompt: float
    completion: float
    request: float = 0.0


FREE = Price(0.0, 0.0, 0.0)


class Teacher(Protocol):
    """`deadline` says whether the engine's total deadline applies; `concurrency` is the default number in flight.
    `price` is known after `open`, None where nobody can know it; `open` comes before the first request, whose body may
    depend on what the route supports. `base_url` stands for the weights and the route in a request's key. A teacher that has
    nothing to check has no `open`, and one whose server cannot go away no `recover`."""

    name: str
    base_url: str
    concurrency: int
    deadline: bool
    price: Price | None

    def request(
        self, messages: list[dict], *, replicate: int, temperature: float, top_p: float, max_tokens: int,
        schema: dict | None = None, logprobs: bool = False, tools: list[dict] | None = None,
    ) -> Request: ...  # fmt: skip
    async def open(self) -> None: ...
    async def recover(self) -> None: ...
    async def send(self, request: Request) -> Answer: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Provider:
    """A service: where it is (as keys say it), what answers a GET while it is up, what its requests carry besides, and
    what it `can`: schema, logprobs."""

    base_url: str
    alive: str = "/models"
    length_field: str = "max_tokens"
    extra: dict = field(default_factory=dict)
    with_tools: dict = field(default_factory=dict)
    headers: dict = field(default_factory=dict)
    can: frozenset[str] = frozenset()
    top_logprobs: int = 20


def open_teacher(
    spec: str, *, provider: Sequence[str] = (), mixed: bool = False, distillable: bool = True, price: Price | None = None,
    serve: "Serve | None" = None, out: Path | None = None,
) -> Teacher:  # fmt: skip
    """The teacher that `spec` names. Nothing is sent or started before its `open`. Raises UserError for an unknown form, a
    missing key, or a URL without a model.

    provider, mixed, distillable: routes of OpenRouter, see there. price: of a service that does not tell it.
    serve, out: how vLLM is run, and where it logs.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("http", "https"):
        url, _, model = spec.partition("#")
        if not model or not urlsplit(url).hostname:
            raise UserError(f"teacher {spec!r} does not name a host and a model", fix="Write it as http://HOST:PORT/v1#MODEL.")
        return HttpTeacher(Provider(url.rstrip("/")), model, os.environ.get("SOULSMITH_API_KEY") or "none", price=price)
    if kind == "local" and rest:
        from datagen.local import LocalTeacher
        from model.pull import MODELS

        if rest not in MODELS and not Path(rest).exists():
            raise UserError(f"no model {rest!r}", where=spec, fix=f"Give a directory, or one of: {', '.join(MODELS)}.")
        return LocalTeacher(rest)
    if kind == "vllm" and rest:
        from datagen.vllm import Serve, VllmTeacher

        return VllmTeacher(rest, serve or Serve(), log=(out or Path()) / "vllm.log")
    if kind == "openrouter" and rest:
        from datagen.openrouter import OpenRouterTeacher

        key = _key("OPENROUTER_API_KEY", spec)
        return OpenRouterTeacher(rest, key, pins=provider, mixed=mixed, distillable=distillable, price=price)
    if kind == "openai" and rest:
        openai = Provider("https://api.openai.com/v1", length_field="max_completion_tokens", can=frozenset({"schema", "logprobs"}))
        return HttpTeacher(openai, rest, _key("OPENAI_API_KEY", spec), price=price)
    raise UserError(f"unknown teacher {spec!r}", fix=f"Use {FORMS}.")


def _key(name: str, spec: str) -> str:
    if not (key := os.environ.get(name, "").strip()):
        raise UserError(f"teacher {spec} needs a key, and {name} is not set", fix=f"export {name}=…")
    return key


class HttpTeacher:
    """Chat completions of one model over HTTP, through the connection pool of the `openai` client and not its methods.

    The body is sent as the very bytes that were hashed, and the response is taken unparsed: the client reads a 200 with an
    error inside as success, and it takes 0.28 of the 0.58 ms of CPU that a call costs. `max_reply` is the longest reply, in
    tokens, that the model's context leaves room for (None: unknown).
    """

    deadline = True

    def __init__(self, provider: Provider, model: str, key: str, *, price: Price | None = None, concurrency: int = 32,
                 patience: float = 600.0, poll: float = 2.0, sleep=asyncio.sleep):  # fmt: skip
        self.name, self.base_url, self.concurrency, self.price = model, provider.base_url, concurrency, price
        self.max_reply: int | None = None
        self._provider, self._key, self._url = provider, key, provider.base_url
        self._extra, self._can = provider.extra, provider.can
        self._patience, self._poll, self._sleep = patience, poll, sleep
        self._client = None

    def request(
        self, messages: list[dict], *, replicate: int, temperature: float, top_p: float, max_tokens: int,
        schema: dict | None = None, logprobs: bool = False, tools: list[dict] | None = None,
    ) -> Request:  # fmt: skip
        """A frozen request. Raises UserError when `max_tokens` cannot fit the model's context."""
        if self.max_reply is not None and max_tokens > self.max_reply:
            what = f"a reply of {max_tokens:,} tokens cannot fit: with a prompt there is room for {self.max_reply:,} at most"
            raise UserError(what, where=self.name, fix="Lower --max-tokens.")
        # sampling parameters are always sent: a server's defaults are the model's, and change with it
        body = {"model": self.name, "messages": messages, "temperature": temperature, "top_p": top_p}
        body |= {self._provider.length_field: max_tokens} | self._extra
        if schema is not None and "schema" in self._can:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        if logprobs and "logprobs" in self._can:
            body |= {"logprobs": True, "top_logprobs": self._provider.top_logprobs}
        if tools:
            body |= {"tools": tools} | self._provider.with_tools
        return make_request(self.base_url, body, replicate)

    async def open(self) -> None:
        """Check that the server is there and serves the model. A server without /models is taken at its word."""
        answer = await self.get("/models")
        if answer.status == 0 or answer.status in (401, 403):
            fix = "Start the server, or check the URL." if answer.status == 0 else "Check the API key."
            raise UserError(classify(answer, now=0.0).why, where=self.name, fix=fix)
        if not (served := listed(answer)):
            return
        if self.name not in served:
            raise UserError(f"{self._url} does not serve {self.name!r}", fix=f"It serves: {', '.join(sorted(served)[:20])}.")
        model = served[self.name]
        if isinstance(length := model.get("max_model_len"), int):
            self.max_reply = length - 1
        if (owner := model.get("owned_by")) in SERVERS:
            self._extra, self._can = self._extra | SERVERS[owner], frozenset({"schema", "logprobs"})

    async def recover(self) -> None:
        """Wait until somebody answers again. Raises UserError after `patience` seconds."""
        for _ in range(max(1, int(self._patience / self._poll))):
            if (await self.get(self._provider.alive)).status:
                return
            await self._sleep(self._poll)
        raise UserError(f"nobody has answered for {self._patience:,.0f} s", where=self._url, fix="Start it and run the same command again.")

    async def send(self, request: Request) -> Answer:
        return await self._call("post", "/chat/completions", content=request.body.encode())

    async def get(self, path: str) -> Answer:
        try:
            async with asyncio.timeout(LOOK):
                return await self._call("get", path)
        except TimeoutError:
            return Answer(0, f"{self._url} does not answer", reached=False)

    async def _call(self, method: str, path: str, **content) -> Answer:
        import aiohttp
        import httpx2
        import openai

        if self._client is None:
            # the engine bounds what is in flight, so the pool must never be the narrower gate; None would be aiohttp's 100
            limits = httpx2.Limits(max_connections=0, max_keepalive_connections=None)
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"} | self._provider.headers
            self._client = openai.DefaultAioHttpClient(base_url=self._url, headers=headers, limits=limits, timeout=None)
        try:
            response = await self._client.request(method, path, **content)
        except httpx2.HTTPError as error:
            reached = not isinstance(error.__cause__, aiohttp.ClientConnectorError)
            what = "the connection broke" if reached else f"cannot connect to {self._url}"
            return Answer(0, f"{what} ({error})" if str(error) else what, reached=reached)
        return Answer(response.status_code, response.text, {name.lower(): value for name, value in response.headers.items()})

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def listed(answer: Answer) -> dict[str, dict]:
    """The models of a /models answer by id; empty when it is no such list."""
    rows = data_of(answer)
    return {row["id"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)} if isinstance(rows, list) else {}


def data_of(answer: Answer) -> object:
    """What a good answer about the server has as its `data`."""
    return (json_object(answer.body) or {}).get("data") if answer.status == 200 else None
