"""Teachers for tests: one in memory with a script, and an OpenAI-compatible server on loopback."""

import asyncio
import json
from contextlib import asynccontextmanager

from aiohttp import web

from datagen.wire import Answer, make_request


def completion(text, finish="stop", **more):
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "cost": 0.001}
    return {
        "model": "fake-1",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": usage,
    } | more


def answer(body, status=200, **headers):
    return Answer(status, body if isinstance(body, str) else json.dumps(body), {k.replace("_", "-"): v for k, v in headers.items()})


class FakeTeacher:
    """`reply(body, n)` gives the Answer (or text) for the n-th send of that very body."""

    name, base_url, concurrency, deadline = "fake-1", "http://fake/v1", 4, True

    def __init__(self, reply=None):
        self.reply = reply or (lambda body, n: f"echo: {body['messages'][-1]['content']}")
        self.sent = []

    def request(self, messages, *, replicate, temperature, top_p, max_tokens):
        body = {"model": self.name, "messages": messages, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        return make_request(self.base_url, body, replicate)

    async def send(self, request):
        self.sent.append(request.body)
        await asyncio.sleep(0)
        result = self.reply(json.loads(request.body), self.sent.count(request.body))
        if asyncio.iscoroutine(result):
            result = await result
        return answer(completion(result)) if isinstance(result, str) else result

    async def close(self):
        pass


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self, start=1_000_000.0):
        self.now, self.slept = start, []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@asynccontextmanager
async def server(handler):
    """Serve `handler(request) -> web.StreamResponse` for POST /v1/chat/completions; yields the base URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
