"""Rows per second of single calls: ours with journal, ledger and export, a bare client, and peers in environments of their own.

    python -m bench.datagen --peers curator=VENV/bin/python distilabel=VENV2/bin/python

Every client asks the same server (`soulsmith chaos` in a process of its own, on the same machine) for the same rows at the same
concurrency; rounds are interleaved, and what is shown is the median and the ratio to the bare client of the same round.
Time begins with the rows at hand and ends with the replies at hand (ours: exported); imports are not counted.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """async def recipe(seed, call, soul, prompts):
    reply = await call("draft", seed.messages)
    said = [*seed.messages, {"role": "assistant", "content": reply.text}]
    return [["sft" if reply.ok else "rejected", {"id": seed.id, "messages": said, "accepted": reply.ok, "reason": reply.outcome}]]
"""


@dataclass(frozen=True)
class Config:
    """Compare single-call throughput on a loopback server."""

    rows: int = 5000
    concurrency: int = 256
    latencies_ms: tuple[float, ...] = (0, 50, 500)
    jitter_ms: float = 20
    rounds: int = 3
    first_fails: float = 0.0
    """Share of requests whose first try gets a 500: what one failure in a hundred costs."""
    peers: tuple[str, ...] = ()
    """NAME=PYTHON: curator or distilabel, installed in the environment of that interpreter."""
    clients: tuple[str, ...] = ("bare", "soulsmith")
    memory: bool = False
    """Measure the peak memory of one soulsmith run of --rows instead."""
    run: str = ""
    """Used by the bench itself: the client to run in this process."""
    url: str = ""


def prompts(rows: int) -> list[str]:
    return [f"Question {n}: what is {n} times {n + 1}, and why would anyone ask?" for n in range(rows)]


async def bare(config: Config) -> float:
    """What anyone would write first: the SDK, a semaphore, gather."""
    import openai

    gate = asyncio.Semaphore(config.concurrency)
    began = time.perf_counter()
    async with openai.AsyncOpenAI(api_key="none", base_url=config.url, http_client=openai.DefaultAioHttpClient()) as client:

        async def one(text: str) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model="chaos", messages=[{"role": "user", "content": text}], temperature=0.8, top_p=0.95, max_tokens=256
                )
                return reply.choices[0].message.content

        replies = await asyncio.gather(*map(one, prompts(config.rows)))
    assert all(replies)
    return time.perf_counter() - began


def soulsmith(config: Config) -> float:
    """The whole command: seeds read, journal, ledger, export, card."""
    import aiohttp  # noqa: F401  what a run imports by itself, as the bare client does before its time begins
    import httpx2  # noqa: F401
    import openai  # noqa: F401
    import pandas  # noqa: F401  Arrow's first conversion imports it
    import pyarrow.parquet  # noqa: F401

    from datagen.generate import Config as Generate
    from datagen.generate import main
    from soul.rows import read_rows

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "single.py").write_text(RECIPE)
        with (folder / "seeds.jsonl").open("w") as file:
            file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts(config.rows))
        settings = Generate(
            seeds=folder / "seeds.jsonl", teacher=f"{config.url}#chaos", out=folder / "run", soul=ROOT / "soul/SOUL.md",
            recipe=str(folder / "single.py"), concurrency=config.concurrency, max_tokens=256,
        )  # fmt: skip
        began = time.perf_counter()
        assert main(settings) == 0
        seconds = time.perf_counter() - began
        if not config.memory:
            assert len(read_rows(folder / "run/data/sft.parquet")) == config.rows
    return seconds


def measure(config: Config, name: str, python: str) -> float:
    """Seconds of one client, in a process of its own."""
    script = [str(ROOT / "bench/datagen_peers.py"), name] if name in ("curator", "distilabel") else ["-m", "bench.datagen", "--run", name]
    given = ["--rows", str(config.rows), "--concurrency", str(config.concurrency), "--url", config.url]
    given += ["--memory"] if config.memory else []
    done = subprocess.run([python, *script, *given], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def server(config: Config, latency: float) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "soulsmith.py", "chaos", "--latency-ms", str(latency), "--jitter-ms", str(config.jitter_ms)]
    process = subprocess.Popen([*command, "--first-fails", str(config.first_fails)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "http://" in line:
            return process, next(word for word in line.split() if word.startswith("http://")).partition("#")[0]
    raise SystemExit("the server did not start")


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main(config: Config) -> None:
    if config.run:
        result = asyncio.run(bare(config)) if config.run == "bare" else soulsmith(config)
        print(json.dumps([result, peak_mb()] if config.memory else result))
        return
    pythons = dict.fromkeys(config.clients, sys.executable) | dict(peer.split("=", 1) for peer in config.peers)
    if config.memory:
        pythons = {"soulsmith": sys.executable}
    for latency in config.latencies_ms:
        times: dict[str, list] = {name: [] for name in pythons}
        for _ in range(config.rounds):
            for name, python in pythons.items():
                process, url = server(config, latency)  # a fresh one: its tries count from the beginning
                try:
                    times[name].append(measure(replace(config, url=url), name, python))
                finally:
                    process.terminate()
                    process.wait()
        show(config, latency, times)


def show(config: Config, latency: float, times: dict[str, list]) -> None:
    for name, seconds in times.items():
        if config.memory:
            print(f"{latency:g} ms  {config.rows:,} rows  peak {max(mb for _, mb in seconds):,.0f} MB  {seconds[0][0]:.1f} s", flush=True)
            continue
        rates = [config.rows / s for s in seconds]
        ratio = median(b / s for b, s in zip(times["bare"], seconds, strict=True)) if "bare" in times else float("nan")
        print(
            f"{latency:g} ms  {name:<10} {median(rates):7,.0f} rows/s  ({min(rates):,.0f} to {max(rates):,.0f})  {ratio:.2f} × bare",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
