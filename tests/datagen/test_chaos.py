"""The pretend teacher: the same answers whatever fails, faults drawn from a seed, and honest books."""

import asyncio
import json
from collections import Counter

import aiohttp
import pytest
from fake_teacher import Clock

from datagen.chaos import Chaos, Config, main
from datagen.chaos_faults import FAULTS, Ask, answer_text, instance
from datagen.critique import CRITIQUE_SCHEMA, parse_critique
from datagen.engine import Engine, Policy
from datagen.journal import Journal
from datagen.prompting import Prompts
from datagen.recipes import load
from datagen.recipes.critique_revise import CritiqueRevise
from datagen.seeds import Seed
from datagen.teachers import HttpTeacher, Provider
from soul.errors import UserError
from soul.spec import load_soul
from soul.tools import openai_schema, problem


def body(text="how do i sort a list?", **more):
    return {"model": "chaos", "messages": [{"role": "user", "content": text}], "max_tokens": 512} | more


def ask(text="how do i sort a list?", **more):
    return Ask(json.dumps(body(text, **more)).encode(), (1.0, 2.0), 4, 1.0)


def said(wire):
    return json.loads(wire.data.partition(b"\r\n\r\n")[2])


def text_of(wire):
    return said(wire)["choices"][0]["message"]["content"]


async def post(chaos, session, value):
    async with session.post(f"{chaos.url}/chat/completions", data=value if isinstance(value, bytes) else json.dumps(value)) as response:
        return response.status, await response.json()


def serve(use, config=None, script=None):
    async def go():
        async with Chaos(config or Config(), script) as chaos, aiohttp.ClientSession() as session:
            return await use(chaos, session)

    return asyncio.run(go())


# --- what it says


def test_an_answer_is_a_function_of_the_request():
    assert ask().text == ask().text == ask(max_tokens=1024).text
    assert len({ask(f"how do i sort list {n}?").text for n in range(50)}) > 45
    assert ask(temperature=0.1).text != ask(temperature=0.2).text
    drafts = [ask(f"question number {n}").text for n in range(40)]
    assert 5 < sum(text.startswith("Great question!") for text in drafts) < 35


def test_a_long_answer_is_cut_at_max_tokens():
    cut = said(ask(max_tokens=10).honest())
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 10
    assert ask().text.startswith(cut["choices"][0]["message"]["content"])


def test_critiques_judgements_and_schemas_are_answered_readably():
    prompts, principles = Prompts(), ["warm", "short", "calm"]
    told = {"soul": "s", "request": "r", "reply": "hello", "known": [], "principles": principles}
    found = Counter()
    for n in range(40):
        messages = prompts.render("critique", **told | {"request": f"r{n}"})
        for more in ({}, {"response_format": {"type": "json_schema", "json_schema": {"schema": CRITIQUE_SCHEMA}}}):
            findings = parse_critique(answer_text(body(messages=messages) | more, ask(str(n)).digest, 4), "hello", principles)
            found[len(findings)] += 1
    assert set(found) == {0, 1} and found[0] > found[1] > 0
    verdicts = []
    for a, b in (("one", "two"), ("two", "one"), ("same", "same")):
        messages = prompts.render("judge", soul="s", request="r", reply_a=a, reply_b=b)
        verdicts.append(json.loads(answer_text(body(messages=messages), ask().digest, 4))["verdict"])
    assert sorted(verdicts[:2]) == ["a", "b"] and verdicts[2] == "tie", "the same reply wins in both orders"


def test_a_schema_gets_an_instance_of_it():
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"}, "kind": {"enum": ["x", "y"]}, "many": {"type": "array", "items": {"type": "integer", "minimum": 3}},
            "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
    }  # fmt: skip
    values = [instance(schema, pick) for pick in range(1000, 1200)]
    assert all(isinstance(v["name"], str) and v["kind"] in "xy" and isinstance(v["maybe"], bool) and min(v["many"]) >= 3 for v in values)
    assert len({v["name"] for v in values}) > 100 and {v["kind"] for v in values} == {"x", "y"}


def test_tools_and_logprobs_are_used_when_offered():
    [call] = said(ask(tools=openai_schema(("Read", "Grep"))).honest())["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "Read" and set(json.loads(call["function"]["arguments"])) == {"file_path", "offset", "limit"}
    assert problem("Read", {key: str(value) for key, value in json.loads(call["function"]["arguments"]).items()}) is None
    prompt = "<reply_a>\nx\n</reply_a>\n<reply_b>\ny\n</reply_b>\nAnswer with a single letter, A or B."
    choice = said(ask(prompt, logprobs=True, top_logprobs=5).honest())["choices"][0]
    [first] = choice["logprobs"]["content"]
    assert first["token"] == choice["message"]["content"] and {item["token"] for item in first["top_logprobs"]} == {"A", "B"}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_http_of_the_length_it_tells(name):
    wire = FAULTS[name](ask())
    head, _, data = wire.data.partition(b"\r\n\r\n")
    if name == "hang":
        assert wire.data == b""
    elif name != "trickle":
        length = int(dict(line.split(b": ") for line in head.split(b"\r\n")[1:])[b"Content-Length"])
        assert length == (4000 if wire.then in ("close", "reset") else len(data))


# --- which requests fail


def test_faults_are_drawn_from_the_seed_whatever_the_order():
    asks = [ask(f"q{n}") for n in range(1500)]

    def drawn(seed, asks, n=1, **more):
        chaos = Chaos(Config(fault=("rate_limit=0.1", "html=.05"), seed=seed, **more))
        return {one.digest: chaos.fault(one, n) for one in asks}

    first = drawn(0, asks)
    shares = Counter(first.values())
    assert 100 < shares["rate_limit"] < 200 and 45 < shares["html"] < 110
    assert first == drawn(0, asks[::-1]) and first != drawn(1, asks) and first != drawn(0, asks, n=2)
    assert set(drawn(0, asks, first_fails=1.0).values()) == {"error_500"}
    assert drawn(0, asks, n=2, first_fails=1.0) == drawn(0, asks, n=2)


@pytest.mark.parametrize(
    "fault, why",
    [("nothing=0.1", "no fault 'nothing'.*rate_limit"), ("html", "gives no share"), ("html=2", "no share"), ("html=x", "no share")],
)
def test_a_fault_that_makes_no_sense_is_refused(fault, why):
    with pytest.raises(UserError, match=why):
        main(Config(fault=(fault,)))
    with pytest.raises(UserError, match="more than 1"):
        Chaos(Config(fault=("html=0.6", "cut=0.6")))


# --- the server


def test_a_taken_port_is_said():
    async def use(chaos, session):
        with pytest.raises(UserError, match=f"port {chaos.port} cannot be used"):
            async with Chaos(Config(port=chaos.port)):
                pass

    serve(use)


def test_the_books_are_kept():
    async def use(chaos, session):
        statuses = [(await post(chaos, session, value))[0] for value in (body("a"), body("b"), body("b"), body("b"), body("c"))]
        assert statuses == [200, 200, 200, 429, 429]
        async with session.get(f"{chaos.url.removesuffix('/v1')}/chaos/stats") as response:
            return await response.json()

    stats = serve(use, script=lambda body, n: "rate_limit" if n == 3 or body["messages"][0]["content"] == "c" else None)
    usage = [said(ask(text).honest())["usage"] for text in ("a", "b", "b")]
    assert stats["requests"] == 5 and stats["answers"] == 3 and stats["distinct"] == 3 and stats["repeats"] == 1
    assert stats["usd"] == pytest.approx(sum(entry["cost"] for entry in usage)) and stats["usd"] > 0
    assert stats["completion_tokens"] == sum(entry["completion_tokens"] for entry in usage)


def test_above_capacity_it_says_429():
    async def use(chaos, session):
        statuses = [status for status, _ in await asyncio.gather(*(post(chaos, session, body(f"q{n}")) for n in range(10)))]
        return Counter(statuses), chaos.stats()

    statuses, stats = serve(use, Config(latency_ms=400.0, capacity=4))
    assert statuses == {200: 4, 429: 6} and stats["most_in_flight"] == 4 and stats["faults"] == {"over capacity": 6}


def test_other_paths_are_as_openrouter_and_vllm_have_them():
    async def use(chaos, session):
        found = {}
        for path in ("/health", "/v1/models", "/v1/key", "/api/v1/key", "/v1/models/chaos/endpoints", "/v1/nothing"):
            async with session.get(chaos.url.removesuffix("/v1") + path) as response:
                found[path] = response.status, await response.json()
        return found

    found = serve(use, Config(price=(3.0, 5.0)))
    assert found["/health"][0] == 200 and found["/v1/models"][1]["data"][0]["id"] == "chaos"
    assert found["/v1/key"] == found["/api/v1/key"] and found["/v1/key"][1]["data"]["limit_remaining"] == 100.0
    [endpoint] = found["/v1/models/chaos/endpoints"][1]["data"]["endpoints"]
    assert float(endpoint["pricing"]["prompt"]) == pytest.approx(3e-6) and "logprobs" in endpoint["supported_parameters"]
    assert found["/v1/nothing"][0] == 404


def test_requests_in_pieces_and_in_one_packet_and_no_requests_at_all():
    data = json.dumps(body()).encode()
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)

    async def use(chaos, session):
        reader, writer = await asyncio.open_connection("127.0.0.1", chaos.port)
        for part in (whole + whole[:30], whole[30:-20], whole[-20:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
        writer.close()
        bad = [await post(chaos, session, value) for value in (b"{", b"[]", b"{}", b'{"messages": []}', b'{"messages": ["x"]}', b"\xff")]
        return chaos.counts["requests"], [status for status, _ in bad]

    assert serve(use) == (2, [400] * 6)


def test_it_comes_back_after_dying():
    async def use(chaos, session):
        async with session.post(f"{chaos.url}/chat/completions", data=json.dumps(body())) as response:
            died = (response.status, await response.read())
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(chaos, session, body())
        for _ in range(100):
            await asyncio.sleep(0.01)
            try:
                return died, (await post(chaos, session, body()))[0]
            except aiohttp.ClientConnectionError:
                continue

    assert serve(use, Config(downtime=0.05), lambda body, n: "die" if n == 1 else None) == ((500, b""), 200)


# --- a whole run


def dataset(folder, config):
    """The rows of critique_revise over the server, once and again."""
    clock, soul = Clock(), load_soul("soul/SOUL.md")
    seeds = [Seed(f"row{n}", [{"role": "user", "content": f"how do i sort list number {n}?"}], "s", "s") for n in range(12)]

    async def go():
        async with Chaos(config) as chaos:
            for _ in range(2):
                teacher, journal = HttpTeacher(Provider(chaos.url), "chaos", "none"), Journal(folder)
                journal.plan(seed.id for seed in seeds)
                policy = Policy(concurrency=4, attempts=12, deadline=1.0)
                engine = Engine(
                    teacher, journal, "run", {"temperature": 1.0, "top_p": 1.0, "max_tokens": 256}, policy, clock=clock, sleep=clock.sleep
                )
                sent = chaos.counts["requests"]
                assert await engine.run(iter(seeds), load("critique-revise", CritiqueRevise(), soul, Prompts()))
                rows = [[row.row_id, [[kind, values["reason"], values.get("messages"), values.get("chosen")] for kind, values in row.results]]
                        for row in journal.rows("run")]  # fmt: skip
                await teacher.close()
                journal.close()
            assert chaos.counts["requests"] == sent, "the second run sends nothing"
            return rows, chaos.stats()

    return asyncio.run(go())


def test_a_run_through_faults_ends_with_the_same_dataset(tmp_path):
    calm, _ = dataset(tmp_path / "calm", Config())
    faults = ("rate_limit=0.1", "error_200=0.1", "cut=0.1", "html=0.05", "reset=0.05", "blank=0.05", "hang=0.01")
    rough, stats = dataset(tmp_path / "rough", Config(fault=faults, first_fails=0.2))
    assert rough == calm and stats["repeats"] == 0 and sum(stats["faults"].values()) > 10
    kinds = Counter(kind for _, results in calm for kind, *_ in results)
    assert kinds["sft"] > 6 and kinds["preference"] > 2


def test_the_command_serves_until_told_to_stop(tmp_path):
    import signal
    import subprocess
    import sys

    code = "from datagen.chaos import Config, main; main(Config())"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[1]
    assert "http://127.0.0.1:" in said and "/v1#chaos" in said
    assert process.returncode == 0 and json.loads(rest)["requests"] == 0
