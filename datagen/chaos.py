"""`soulsmith chaos`: a teacher on loopback that answers deterministically and fails as told, to try a run without paying.

    soulsmith chaos --fault rate_limit=0.05 error_200=0.02 cut=0.01 --latency-ms 50

The text of an answer is a function of the request alone, so an interrupted run that goes on must end with the dataset of an
uninterrupted one. Which try fails, and how, is drawn from (--seed, request, number of the try), whatever the order.
"""

import asyncio
import hashlib
import re
import signal
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from datagen.chaos_faults import FAULTS, MODEL, PROVIDER, Ask, Wire, http
from soul.console import console, plain
from soul.errors import UserError
from soul.files import canonical_json

CONTEXT = 32768  # tokens


@dataclass(frozen=True)
class Config:
    """Serve a pretend teacher on 127.0.0.1 until Ctrl-C; docs/chaos.md lists the faults. GET /chaos/stats counts."""

    fault: tuple[str, ...] = ()
    """NAME=SHARE …: how the tries fail, each with its share of them, such as rate_limit=0.05 html=0.01."""
    first_fails: float = 0.0
    """Share of the requests whose first try gets a 500; later tries are as others."""
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    """Added to the latency, drawn evenly from 0 to this."""
    capacity: int | None = None
    """A 429 for what comes when so many are in flight."""
    retry_after: float | None = 1.0
    """Seconds that a 429 asks to wait; None leaves the header out."""
    downtime: float = 5.0
    """Seconds that nobody listens after the fault `die`."""
    price: tuple[float, float] = (1.0, 2.0)
    """USD per million prompt and completion tokens."""
    sentences: int = 4
    """Length of an answer; a token is four bytes."""
    seed: int = 0
    port: int = 0
    """0 takes a free one."""


class Chaos:
    """The server, also for tests: `async with Chaos(config) as chaos` serves at `chaos.url`.

    `script(body, n)` names the fault of the n-th try (from 1) of that body, or None, and replaces --fault and --first-fails.
    Raises UserError for a fault that is not in FAULTS, shares that make no sense, or a port that is taken.
    """

    def __init__(self, config: Config = Config(), script: Callable[[dict, int], str | None] | None = None):
        self.config, self.script = config, script
        self.shares = [_share(item) for item in config.fault]
        if sum(share for _, share in self.shares) > 1:
            raise UserError("the shares of --fault add up to more than 1")
        self.port, self.in_flight, self.most = config.port, 0, 0
        self.tries: Counter[bytes] = Counter()
        self.answered: set[bytes] = set()
        self.faults: Counter[str] = Counter()
        self.counts, self.usd = Counter(), 0.0
        self.connections: set[_Connection] = set()
        self.revival: asyncio.TimerHandle | asyncio.Task | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> "Chaos":
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.revival:
            self.revival.cancel()
        self.down()
        await self.server.wait_closed()

    async def up(self) -> None:
        try:
            self.server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024)
        except OSError as error:
            raise UserError(f"port {self.port} cannot be used: {error.strerror}", fix="Leave --port out to get a free one.") from None
        self.port = self.server.sockets[0].getsockname()[1]

    def down(self) -> None:
        """Stop listening; what is in flight gets a 500 without a body, as from an engine that died."""
        self.server.close()
        for connection in list(self.connections):
            if connection.waiting:
                connection.transport.write(http(500, b""))
            connection.transport.close()

    def die(self) -> None:
        self.down()
        self.revival = asyncio.get_running_loop().call_later(self.config.downtime, self._revive)

    def _revive(self) -> None:
        self.revival = asyncio.ensure_future(self.up())

    def stats(self) -> dict:
        """`repeats`: whole answers to a request that had one before, so paid twice, unless several samples were asked for."""
        counts = {name: self.counts[name] for name in ("requests", "answers", "repeats", "prompt_tokens", "completion_tokens")}
        return counts | {"distinct": len(self.tries), "usd": round(self.usd, 9), "most_in_flight": self.most, "faults": dict(self.faults)}

    def fault(self, ask: Ask, n: int) -> str | None:
        if self.script:
            return self.script(ask.body, n)
        draw = hashlib.sha256(b"%d %d " % (self.config.seed, n) + ask.digest).digest()
        if n == 1 and int.from_bytes(draw[:6]) < self.config.first_fails * 2**48:
            return "error_500"
        point = int.from_bytes(draw[6:12]) / 2**48
        for name, share in self.shares:
            if (point := point - share) < 0:
                return name
        return None

    def complete(self, connection: "_Connection", raw: bytes) -> None:
        try:
            ask = Ask(raw, self.config.price, self.config.sentences, self.config.retry_after)
            ask.body["messages"][-1]["role"]
        except (ValueError, TypeError, LookupError):
            connection.send(Wire(http(400, {"error": {"code": 400, "message": "the body needs a list of messages"}})))
            return
        self.counts["requests"] += 1
        self.tries[ask.digest[:16]] += 1
        n = self.tries[ask.digest[:16]]
        full = self.config.capacity is not None and self.in_flight >= self.config.capacity
        name = "rate_limit" if full else self.fault(ask, n)
        wire = FAULTS[name](ask) if name else ask.honest()
        if name:
            self.faults["over capacity" if full else name] += 1
        connection.waiting = True
        self.in_flight += 1
        self.most = max(self.most, self.in_flight - full)
        delay = 0 if full else self.config.latency_ms + self.config.jitter_ms * ask.digest[3] / 255
        if delay:
            asyncio.get_running_loop().call_later(delay / 1000, self._deliver, connection, ask.digest[:16], wire)
        else:
            self._deliver(connection, ask.digest[:16], wire)

    def _deliver(self, connection: "_Connection", key: bytes, wire: Wire) -> None:
        if not connection.send(wire):
            return
        prompt, wrote, usd = wire.usage
        self.counts.update(answers=wire.whole, repeats=wire.whole and key in self.answered, prompt_tokens=prompt, completion_tokens=wrote)
        self.usd += usd
        if wire.whole:
            self.answered.add(key)

    def get(self, path: str) -> tuple[int, object]:
        """What is asked besides completions; paths as OpenRouter and vLLM have them."""
        prices = dict(zip(("prompt", "completion"), (f"{price / 1e6:.12f}" for price in self.config.price), strict=True))
        knobs = ["temperature", "top_p", "max_tokens", "response_format", "structured_outputs", "logprobs", "top_logprobs", "tools"]
        endpoint = {
            "name": f"{PROVIDER} | {MODEL}", "provider_name": PROVIDER, "tag": "chaos/bf16", "context_length": CONTEXT, "quantization": "bf16",
            "max_completion_tokens": 8192, "pricing": prices | {"request": "0"}, "supported_parameters": knobs, "status": 0,
        }  # fmt: skip
        model = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": CONTEXT}  # vLLM is sent schemas and logprobs
        known = {
            "/health": {}, "/chaos/stats": self.stats(), "/v1/models": {"object": "list", "data": [model]},
            "/v1/key": {"data": {"label": MODEL, "limit": 100.0, "limit_remaining": 100.0 - self.usd, "usage": self.usd, "is_free_tier": False}},
            f"/v1/models/{MODEL}/endpoints": {"data": {"id": MODEL, "name": MODEL, "endpoints": [endpoint]}},
        }  # fmt: skip
        found = known.get(path.removeprefix("/api").partition("?")[0])
        return (404, {"error": {"code": 404, "message": f"no {path} here"}}) if found is None else (200, found)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as much of it as a client's POST with a length needs; a third of the cost of aiohttp.web."""

    def __init__(self, chaos: Chaos):
        self.chaos, self.buffer, self.waiting = chaos, bytearray(), False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.chaos.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.chaos.connections.discard(self)
        self.chaos.in_flight -= self.waiting
        self.waiting = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n") + 4) > 3:
            length = re.search(rb"(?i)\r\ncontent-length: *(\d{1,9})\r\n", self.buffer[:end])
            whole = end + (int(length[1]) if length else 0)
            if len(self.buffer) < whole:
                return
            method, path = (self.buffer[:end].split(b" ", 2) + [b""])[:2]
            raw = bytes(self.buffer[end:whole])
            del self.buffer[:whole]
            if method == b"POST" and path.endswith(b"/chat/completions"):
                self.chaos.complete(self, raw)
            else:
                self.transport.write(http(*self.chaos.get(path.decode("latin-1"))))

    def send(self, wire: Wire) -> bool:
        """False when the client has gone."""
        if self.transport.is_closing():
            return False
        self.transport.write(wire.data)
        if wire.then == "trickle":
            asyncio.get_running_loop().call_later(0.05, self.send, Wire(b"1\r\n \r\n", "trickle"))
        if wire.then in ("hang", "trickle"):
            return True
        self.chaos.in_flight -= self.waiting
        self.waiting = False
        if wire.then == "reset":
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif wire.then == "close":
            self.transport.close()
        elif wire.then == "die":
            self.chaos.die()
        return True


def _share(item: str) -> tuple[str, float]:
    name, _, share = item.partition("=")
    if name not in FAULTS:
        raise UserError(f"there is no fault {name!r}", fix=f"Faults are: {', '.join(FAULTS)}.")
    if not re.fullmatch(r"0?\.[0-9]+|[01](\.0*)?", share):
        raise UserError(f"{item!r} gives no share between 0 and 1", fix=f"Write it as {name}=0.05.")
    return name, float(share)


def main(config: Config) -> int:
    return asyncio.run(_serve(config))


async def _serve(config: Config) -> int:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Chaos(config) as chaos:
        console.print(plain(f"serving {chaos.url}#{MODEL} until Ctrl-C; try: soulsmith generate --teacher {chaos.url}#{MODEL} …"))
        await stop.wait()
    console.print(plain(canonical_json(chaos.stats())))
    return 0
