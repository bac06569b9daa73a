"""The real vLLM, opt-in: `make test-vllm VLLM_PYTHON=/path/to/python` (or VLLM_COMMAND); docs/teachers.md has the numbers.

One server, killed in the middle of a run of the built-in recipe: the rows wait for the next one and none fails.
"""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.recipes import load
from datagen.recipes.critique_revise import CritiqueRevise
from datagen.seeds import read_seeds
from datagen.vllm import Serve, VllmTeacher
from model.load import find
from soul.conversation import user
from soul.spec import load_soul

PYTHON = os.environ.get("VLLM_PYTHON")
COMMAND = os.environ.get("VLLM_COMMAND") or (PYTHON and f"{PYTHON} -m vllm.entrypoints.openai.api_server")
pytestmark = pytest.mark.skipif(not COMMAND, reason="VLLM_PYTHON or VLLM_COMMAND is not set")

ARGS = os.environ.get("VLLM_ARGS", "--dtype bfloat16 --max-num-seqs 32")
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 96}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SEEDS = [
    "name a fruit",
    "what is a list?",
    "sort [3, 1, 2]",
    "why is the sky blue?",
    "say hello",
    "what is 2 + 2?",
    "name a sea",
    "what is git?",
]
VERDICT = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


@pytest.fixture
def model(tmp_path) -> Path:
    """SmolLM2-135M as vLLM wants it: with its chat template and end of turn."""
    if given := os.environ.get("VLLM_MODEL"):
        return Path(given)
    source, folder = find("smollm2-135m"), tmp_path / "smollm2-135m"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(source / name)
    config = json.loads((source / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_a_run_outlives_its_server(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    out, soul = tmp_path / "run", load_soul("soul/SOUL.md")
    recipe = load("critique-revise", CritiqueRevise(rounds=1, critic_tokens=128), soul, Prompts("small"))
    (tmp_path / "seeds.txt").write_text("\n".join(SEEDS))
    seeds = list(read_seeds(tmp_path / "seeds.txt"))
    teacher = VllmTeacher(str(model), Serve(command=COMMAND, args=ARGS, max_len=4096), out / "vllm.log")
    numbers = {}

    async def run(journal, rows, watch=None) -> Engine:
        journal.plan(seed.id for seed in rows)
        engine = Engine(teacher, journal, "real", SAMPLING, Policy(concurrency=8))
        watching = asyncio.create_task(watch(engine)) if watch else None
        assert await engine.run(iter(rows), recipe)
        if watching:
            await watching
        return engine

    async def kill(engine) -> None:
        while engine.outcomes["ok"] + engine.outcomes["truncated"] < 6:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        [server] = psutil.Process(teacher._process.pid).children()
        os.kill(server.pid, signal.SIGKILL)
        while not teacher._restarted or not await teacher._healthy():
            await asyncio.sleep(0.5)
        numbers["until it answers again, s"] = time.monotonic() - began

    async def go() -> None:
        began = time.monotonic()
        await teacher.open()
        numbers["start, s"] = time.monotonic() - began
        journal = Journal(out)
        try:
            engine = await run(journal, seeds[:5], kill)
            assert teacher._restarted and engine.counts["rows"] == 5
        finally:
            journal.close()
        journal = Journal(out)  # as a run that is started again
        try:
            engine = await run(journal, seeds)
            assert engine.counts["already finished"] == 5 and engine.counts["rows"] == 8
            engine = await run(journal, seeds)
            assert engine.counts["already finished"] == 8 and engine.counts["sent"] == 0
            statuses = {row.row_id: row.status for row in journal.rows("real")}
            assert len(statuses) == 8 and "failed" not in statuses.values()
            await probe(journal)
            outcomes = {(line["stage"], line["outcome"]): line["calls"] for line in journal.ledger()}
            print(*(f"{stage} {outcome}: {calls}" for (stage, outcome), calls in sorted(outcomes.items())), sep="\n")
        finally:
            journal.close()
        await rate()

    async def probe(journal) -> None:
        """A schema and logprobs, as a recipe gets them."""
        said = {}

        async def ask(seed, call):
            said["schema"] = await call("judge", [user("Is it good?")], schema=VERDICT, max_tokens=64)
            said["logprobs"] = await call("compare", [user("Is it bad?")], schema=VERDICT, logprobs=True, max_tokens=64)
            return [["rejected", {"id": seed.id, "source": seed.source, "messages": seed.messages, "accepted": False, "reason": "probe"}]]

        assert await Engine(teacher, journal, "probe", SAMPLING).run(iter(seeds[:1]), ask)
        assert set(json.loads(said["schema"].text)) == {"ok"}
        assert len(said["logprobs"].logprobs) > 1 and max(said["logprobs"].logprobs.values()) <= 0
        assert said["schema"].served.startswith(teacher.name)

    async def rate() -> None:
        """Completion tokens a second, 32 replies at once behind the same SOUL."""

        def asked(n: int):
            messages = [{"role": "system", "content": soul.text}, user(f"{n}: tell me a story")]
            return teacher.request(messages, replicate=0, temperature=1.0, top_p=1.0, max_tokens=128)

        began = time.monotonic()
        answers = await asyncio.gather(*(teacher.send(asked(n)) for n in range(32)))
        tokens = sum(json.loads(answer.body)["usage"]["completion_tokens"] for answer in answers)
        numbers["completion tokens/s, 32 at once"] = tokens / (time.monotonic() - began)

    async def main() -> None:
        try:
            await go()
        finally:
            await teacher.close()

    asyncio.run(main())
    assert teacher.prefix_hits > 0.5
    print(*(f"{name}: {value:.1f}" for name, value in numbers.items()), f"prefix cache: {teacher.prefix_hits:.0%}", sep="\n")
