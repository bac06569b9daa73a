"""Teachers for tests: one in memory with a script, and an OpenAI-compatible server on loopback."""

import asyncio
import json
import selectors
from collections import Counter
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

    name, base_url, concurrency, deadline, price = "fake-1", "http://fake/v1", 4, True, None

    def __init__(self, reply=None, **attributes):
        self.reply = reply or (lambda body, n: f"echo: {body['messages'][-1]['content']}")
        self.sent, self._times = [], Counter()
        for name, value in attributes.items():
            setattr(self, name, value)

    def request(self, messages, *, replicate, temperature, top_p, max_tokens, **extra):
        body = {"model": self.name, "messages": messages, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        return make_request(self.base_url, body | extra, replicate)

    async def send(self, request):
        self.sent.append(request.body)
        self._times[request.body] += 1
        times = self._times[request.body]
        await asyncio.sleep(0)
        result = self.reply(json.loads(request.body), times)
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


class _Jump(selectors.DefaultSelector):
    def select(self, timeout=None):
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("everybody waits and nobody sleeps: this would hang")
        self.now += 0 if events else max(timeout, 0)
        return events


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next timer, so that hours of waiting take no time and are exact."""

    def __init__(self):
        self._jump = _Jump()
        self._jump.now = 0.0
        super().__init__(self._jump)
        self._clock_resolution = 1e-9

    def time(self):
        return self._jump.now


def in_virtual_time(coroutine):
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(coroutine)


def loop_time():
    return asyncio.get_running_loop().time()


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
