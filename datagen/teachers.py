"""Teachers: who answers. Every teacher makes frozen requests and gives raw answers; retry and deadline are the engine's.

http://host:8000/v1#model   any OpenAI-compatible server (key from SOULSMITH_API_KEY, if it needs one)
openrouter:vendor/model     key from OPENROUTER_API_KEY
openai:model                key from OPENAI_API_KEY
local:smollm2-135m          the embedded model, see datagen/local.py
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from datagen.wire import Answer, Request, make_request
from soul.errors import UserError

FORMS = "openrouter:MODEL, openai:MODEL, local:smollm2-135m or http://HOST:PORT/v1#MODEL"


class Teacher(Protocol):
    """`deadline` says whether the engine's total deadline applies; `concurrency` is the default number in flight."""

    name: str
    base_url: str
    concurrency: int
    deadline: bool

    def request(self, messages: list[dict], *, replicate: int, temperature: float, top_p: float, max_tokens: int) -> Request: ...
    async def send(self, request: Request) -> Answer: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Provider:
    """A service with its own name: where it is, whose key it takes, and what its requests carry besides."""

    base_url: str
    key_name: str
    length_field: str = "max_tokens"
    extra: dict = field(default_factory=dict)


PROVIDERS = {
    "openrouter": Provider(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY",
        # without require_parameters a route may ignore sampling settings; compression would cut the SOUL out of its middle
        extra={"provider": {"require_parameters": True}, "plugins": [{"id": "context-compression", "enabled": False}]},
    ),
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY", length_field="max_completion_tokens"),
}  # fmt: skip


def open_teacher(spec: str) -> Teacher:
    """The teacher that `spec` names. Nothing is sent yet.

    Raises:
        UserError: for an unknown form, a missing key, or a URL without a model.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("http", "https"):
        url, _, model = spec.partition("#")
        if not model or not urlsplit(url).hostname:
            raise UserError(f"teacher {spec!r} does not name a host and a model", fix="Write it as http://HOST:PORT/v1#MODEL.")
        return HttpTeacher(Provider(url.rstrip("/"), "SOULSMITH_API_KEY"), model, os.environ.get("SOULSMITH_API_KEY") or "none")
    if kind == "local" and rest:
        from datagen.local import LocalTeacher
        from model.pull import MODELS

        if rest not in MODELS and not Path(rest).exists():
            raise UserError(f"no model {rest!r}", where=spec, fix=f"Give a directory, or one of: {', '.join(MODELS)}.")

        return LocalTeacher(rest)
    if kind not in PROVIDERS or not rest:
        raise UserError(f"unknown teacher {spec!r}", fix=f"Use {FORMS}.")
    provider = PROVIDERS[kind]
    key = os.environ.get(provider.key_name, "").strip()
    if not key:
        raise UserError(f"teacher {spec} needs a key, and {provider.key_name} is not set", fix=f"export {provider.key_name}=…")
    return HttpTeacher(provider, rest, key)


class HttpTeacher:
    """Chat completions of one model over HTTP, by the `openai` client with its own retries off.

    The body is sent as the very bytes that were hashed, and the response is taken unparsed: the client reads a 200 with
    an error inside as success, and its parsing is half of its cost.
    """

    deadline = True

    def __init__(self, provider: Provider, model: str, key: str, concurrency: int = 32):
        self.name, self.base_url, self.concurrency = model, provider.base_url, concurrency
        self._provider, self._key = provider, key
        self._client = None

    def request(self, messages: list[dict], *, replicate: int, temperature: float, top_p: float, max_tokens: int) -> Request:
        # sampling parameters are always sent: a server's defaults are the model's, and change with it
        sampling = {"temperature": temperature, "top_p": top_p, self._provider.length_field: max_tokens}
        return make_request(self.base_url, {"model": self.name, "messages": messages} | sampling | self._provider.extra, replicate)

    async def send(self, request: Request) -> Answer:
        import aiohttp
        import httpx2
        import openai

        if self._client is None:
            self._client = self._open(openai, httpx2)
        try:
            response = await self._client.post("/chat/completions", cast_to=httpx2.Response, content=request.body.encode())
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reached = not isinstance(cause.__cause__, aiohttp.ClientConnectorError)
            what = "the connection broke" if reached else f"cannot connect to {self.base_url}"
            return Answer(0, f"{what} ({cause})" if str(cause) else what, reached=reached)
        return Answer(response.status_code, response.text, {name.lower(): value for name, value in response.headers.items()})

    def _open(self, openai, httpx2):
        # the engine bounds what is in flight, so the pool must never be the narrower gate
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        client = openai.DefaultAioHttpClient(limits=limits, timeout=None)
        return openai.AsyncOpenAI(api_key=self._key, base_url=self.base_url, max_retries=0, timeout=None, http_client=client)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


def completion_body(model: str, text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> str:
    """A chat completion as an OpenAI-compatible server writes it; what the embedded teacher answers with."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "cost": 0.0}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}, ensure_ascii=False)
