"""The command: bad input before anything is paid, kills and resumes, and the same dataset in the end."""

import asyncio
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from aiohttp import web
from fake_teacher import completion, server

from datagen.generate import Config, command, main, resume_command
from datagen.recipes.best_of import BestOf
from datagen.recipes.critique_revise import CritiqueRevise
from datagen.seeds import read_seeds
from datagen.teachers import open_teacher
from soul.errors import UserError
from soul.rows import read_rows

ROOT = Path(__file__).parents[2]
SOUL = "# moss\n\n## Principles\n\n- writes in lowercase. <!-- id: lower; check: lowercase_prose -->\n- is warm. <!-- id: warm -->\n"
JUDGED = json.dumps([{"principle": "warm", "quote": "", "why": "", "verdict": "ok"}])


class Fake:
    """A server in a thread; counts what it answered by body, and holds answers back when `delay` is set."""

    def __init__(self):
        self.bodies, self.delay, self.status = [], 0.0, 200

    async def handle(self, request):
        body = await request.text()
        self.bodies.append(body)
        await asyncio.sleep(self.delay)
        last = json.loads(body)["messages"][-1]["content"]
        text = JUDGED if "JSON list" in last else "a calm reply." if "<notes>" in last else f"A Reply to {last}"
        return (
            web.json_response(completion(text), status=self.status)
            if self.status == 200
            else web.json_response({"error": {"message": "no"}}, status=self.status)
        )


@pytest.fixture
def fake():
    fake, ready, loop = Fake(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve():
        async with server(fake.handle) as url:
            fake.url = f"{url}#fake-1"
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
def given(tmp_path):
    (tmp_path / "SOUL.md").write_text(SOUL)
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(12)))
    return tmp_path


def config(given, teacher, **more):
    return Config(seeds=given / "seeds.jsonl", teacher=teacher, out=given / "run", soul=given / "SOUL.md", **more)


def data(given):
    return {path.name: path.read_bytes() for path in sorted((given / "run" / "data").iterdir())}


def test_the_whole_way_and_the_same_bytes_again(given, fake):
    assert main(config(given, fake.url)) == 0
    sft, pairs = read_rows(given / "run/data/sft.parquet"), read_rows(given / "run/data/preference.parquet")
    assert (
        [row["messages"][0]["content"] for row in sft]
        == [f"question {n}" for n in range(12)]
        == [row["prompt"][0]["content"] for row in pairs]
    )
    assert sft[0]["messages"][1]["content"] == "a calm reply." and pairs[3]["rejected"][0]["content"] == "A Reply to question 3"
    stats = json.loads((given / "run/data/stats.json").read_text())
    assert (
        stats["rows"] == {"sft": 12, "preference": 12, "rejected": 0}
        and stats["cost_usd"] == pytest.approx(0.048)
        and stats["stages"]["draft"] == 12
    )
    assert "| lower | lowercase_prose | 12 | 0 | 12 | 0 |" in (given / "run/data/README.md").read_text()
    first, sent = data(given), len(fake.bodies)
    assert sent == 48
    assert main(config(given, fake.url, concurrency=2, deadline=9.0)) == 0
    assert data(given) == first and len(fake.bodies) == sent


@pytest.mark.parametrize("edit", ["soul", "prompts", "temperature", "seeds", "recipe"])
def test_what_decides_a_row_computes_it_again(given, fake, edit):
    main(config(given, fake.url, limit=3))
    sent, more = len(fake.bodies), {"limit": 3}
    if edit == "soul":
        (given / "SOUL.md").write_text(SOUL.replace("is warm", "is cosy"))
    elif edit == "prompts":
        (given / "p").mkdir()
        (given / "p" / "generate.j2").write_text("{% block system %}hello {{ soul }}{% endblock %}")
        more["prompts"] = given / "p"
    elif edit == "temperature":
        more["temperature"] = 0.1
    elif edit == "seeds":
        (given / "seeds.jsonl").write_text((given / "seeds.jsonl").read_text().replace('question 1"', 'question 99"'))
    else:
        more["critique_revise"] = CritiqueRevise(samples=2)
    assert main(config(given, fake.url, **more)) == 0
    paid_twice = len(fake.bodies) - len(set(fake.bodies))
    assert len(fake.bodies) > sent and paid_twice == (3 if edit == "recipe" else 0)  # a second sample is the same body
    assert len(read_rows(given / "run/data/sft.parquet")) == 3


def child(given, url):
    code = """if True:
        import sys
        from pathlib import Path
        from datagen.generate import Config, main
        at = Path(sys.argv[1])
        sys.exit(main(Config(seeds=at / "seeds.jsonl", teacher=sys.argv[2], out=at / "run", soul=at / "SOUL.md", concurrency=4)))
    """
    return subprocess.Popen([sys.executable, "-c", code, str(given), url], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(fake, count):
    while len(fake.bodies) < count:
        threading.Event().wait(0.002)


def test_kill_minus_nine_pays_only_calls_in_flight_again_and_ends_the_same(given, fake, tmp_path_factory):
    other = tmp_path_factory.mktemp("uninterrupted")
    for name in ("SOUL.md", "seeds.jsonl"):
        (other / name).write_text((given / name).read_text())
    main(config(other, fake.url))
    whole, calls = data(other), len(fake.bodies)
    fake.bodies.clear()
    fake.delay, rng = 0.01, random.Random(7)
    for _ in range(4):
        process = child(given, fake.url)
        wait_for(fake, len(fake.bodies) + rng.randint(3, 9))
        process.kill()
        process.communicate()
    fake.delay = 0.0
    assert main(config(given, fake.url)) == 0
    assert {name: data(given)[name] for name in data(given) if name.endswith("parquet")} == {
        name: whole[name] for name in whole if name.endswith("parquet")
    }
    assert calls <= len(fake.bodies) <= calls + 4 * 4


def test_interrupt_drains_exits_130_and_names_the_resume_command(given, fake):
    fake.delay = 0.03
    process = child(given, fake.url)
    wait_for(fake, 3)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130 and f"soulsmith generate --seeds {given / 'seeds.jsonl'}" in " ".join(told.split())
    sent = set(fake.bodies)
    assert len(sent) < 48
    fake.delay = 0.0
    assert main(config(given, fake.url)) == 0 and len(fake.bodies) == 48


def test_the_command_in_the_card_makes_the_same_config(given, fake):
    made = config(given, fake.url, prompts=Path("small"), max_tokens=99, critique_revise=CritiqueRevise(critic="checks", draft_soul=True))
    read = tyro.cli(Config, args=shlex.split(command(made))[2:])
    assert read == made
    off = config(given, fake.url, recipe="best-of", best_of=BestOf(soul=False), any_text=True)
    assert tyro.cli(Config, args=shlex.split(command(off))[2:]) == off and "--best-of.no-soul" in command(off)
    (given / "run").mkdir()
    (given / "run" / "generate.json").write_text("{}")
    assert resume_command(made) == f"soulsmith generate --config {given}/run/generate.json"


def test_a_second_process_on_the_run_directory_is_refused(given, fake):
    fake.delay = 0.05
    process = child(given, fake.url)
    wait_for(fake, 1)
    with pytest.raises(UserError, match=f"pid {process.pid}"):
        main(config(given, fake.url))
    process.kill()
    process.communicate()


def test_a_stop_keeps_what_was_answered(given, fake):
    fake.status = 401
    with pytest.raises(UserError, match="Check the API key"):
        main(config(given, fake.url))
    fake.status = 200
    assert main(config(given, fake.url)) == 0 and len(read_rows(given / "run/data/sft.parquet")) == 12


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", r"seeds.jsonl:4: is not JSON"),
        ("[1]", r"seeds.jsonl:4: a row must be an object"),
        ('{"answer": "x"}', r"seeds.jsonl:4: has neither `messages` nor any of prompt"),
        ('{"prompt": 3}', r"seeds.jsonl:4: `prompt` must be text"),
        ('{"prompt": "  "}', r"seeds.jsonl:4: has no request"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', r"seeds.jsonl:4: message 0: role"),
        ('{"messages": "hi"}', r"seeds.jsonl:4: `messages` is not a list"),
        ('{"prompt": "\\ud800"}', r"seeds.jsonl:4: .*surrogate"),
    ],
)
def test_a_bad_seed_is_named_before_anything_is_paid(given, fake, line, message):
    lines = (given / "seeds.jsonl").read_text().splitlines()
    (given / "seeds.jsonl").write_text("\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(UserError, match=message):
        main(config(given, fake.url))
    assert fake.bodies == [] and not (given / "run").exists()


def test_seed_files_of_every_kind_give_the_same_rows(tmp_path):
    prompts = ["what: is\n\nHuman: this?", "{{ soul }} {% raw %}", "q\u2028r"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts), encoding="utf-8")
    pq.write_table(
        pa.table({"messages": [[{"role": "user", "content": p}, {"role": "assistant", "content": "x"}] for p in prompts]}),
        tmp_path / "b.parquet",
    )
    (tmp_path / "c.txt").write_text("{{ soul }} {% raw %}\n\n")
    a, b = list(read_seeds(tmp_path / "a.jsonl")), list(read_seeds(tmp_path / "b.parquet"))
    assert [s.messages[0]["content"] for s in a] == prompts and [s.id for s in a] == [s.id for s in b]
    assert [s.id for s in read_seeds(tmp_path / "c.txt")] == [a[1].id] and len(list(read_seeds(tmp_path / "a.jsonl", 2))) == 2
    (tmp_path / "d.jsonl").write_text('{"instruction": "Add", "input": "1 2", "system": "be kind"}')
    [seed] = read_seeds(tmp_path / "d.jsonl")
    assert [m["content"] for m in seed.messages] == ["be kind", "Add\n\n1 2"]
    (tmp_path / "e.parquet").write_bytes(b"nope")
    for name, message in (("e.parquet", "not a readable Parquet"), ("f.jsonl", "no such file"), ("a.csv", "no such file")):
        with pytest.raises(UserError, match=message):
            list(read_seeds(tmp_path / name))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("openrouter:a/b", "OPENROUTER_API_KEY is not set"),
        ("openai:gpt", "OPENAI_API_KEY is not set"),
        ("wizard:a", "unknown teacher 'wizard:a'"),
        ("openrouter:", "unknown teacher"),
        ("http://host/v1", "does not name a host and a model"),
        ("", "unknown teacher"),
    ],
)
def test_an_unknown_teacher_or_a_missing_key_is_named_first(given, monkeypatch, spec, message):
    for name in ("OPENROUTER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        main(config(given, spec))
    assert not (given / "run").exists() and os.environ.get("OPENROUTER_API_KEY") is None


def test_the_key_reaches_neither_journal_nor_dataset(given, fake, monkeypatch):
    monkeypatch.setenv("SOULSMITH_API_KEY", "sk-very-secret")
    main(config(given, fake.url, limit=2))
    assert not [path for path in given.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]


def send(handler, attempts=1):
    async def go():
        async with server(handler) as url:
            teacher = open_teacher(f"{url}#m")
            request = teacher.request([{"role": "user", "content": "é"}], replicate=0, temperature=0.5, top_p=1.0, max_tokens=9)
            try:
                return request, [await teacher.send(request) for _ in range(attempts)]
            finally:
                await teacher.close()

    return asyncio.run(go())


def test_the_bytes_on_the_wire_are_the_bytes_in_the_key_on_every_attempt():
    seen = []

    async def handler(request):
        seen.append(await request.read())
        return web.json_response({"error": {"message": "x"}}, status=429, headers={"Retry-After": "3"})

    request, answers = send(handler, 2)
    assert seen == [request.body.encode()] * 2  # and one send is one request: the client does not retry by itself
    assert answers[0].status == 429 and answers[0].headers["retry-after"] == "3" and json.loads(answers[0].body)["error"]["message"] == "x"


def test_what_breaks_on_the_way_is_an_answer_too():
    async def cut(request):
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"cho')
        request.transport.abort()
        return response

    assert send(cut)[1][0].status == 0 and send(cut)[1][0].reached

    async def nobody():
        teacher = open_teacher("http://127.0.0.1:9/v1#m")
        try:
            return await teacher.send(teacher.request([], replicate=0, temperature=0.5, top_p=1.0, max_tokens=9))
        finally:
            await teacher.close()

    answer = asyncio.run(nobody())
    assert answer.status == 0 and not answer.reached and "cannot connect to http://127.0.0.1:9/v1" in answer.body
