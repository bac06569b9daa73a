"""What each service is sent, byte for byte, and what a preflight of a plain server finds out."""

import asyncio
import json

import pytest
from aiohttp import web

from datagen.local import LocalTeacher
from datagen.openrouter import OpenRouterTeacher
from datagen.teachers import FREE, HttpTeacher, Price, Provider, open_teacher
from datagen.vllm import Serve, VllmTeacher
from soul.errors import UserError

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
FORMAT = (
    '"response_format":{"json_schema":{"name":"answer","schema":{"properties":{"ok":{"type":"boolean"}},"type":"object"},"strict":true}'
)
FORMAT += ',"type":"json_schema"}'
ASKED = {"replicate": 0, "temperature": 0.5, "top_p": 1.0, "max_tokens": 9}
TOOL = {"type": "function", "function": {"name": "Read", "parameters": {"type": "object"}}}
TOOLS = '"tools":[{"function":{"name":"Read","parameters":{"type":"object"}},"type":"function"}]'

PLUGINS = '"plugins":[{"enabled":false,"id":"context-compression"}]'
GOLDEN = {
    "openrouter:a/b": (
        f'{{"max_tokens":9,"messages":[],"model":"a/b",{PLUGINS},"provider":{{"enforce_distillable_text":true,"require_parameters":true}},'
        '"temperature":0.5,"top_p":1.0}',
        f'{{"logprobs":true,"max_tokens":9,"messages":[],"model":"a/b",{PLUGINS},"provider":{{"enforce_distillable_text":true,'
        f'"require_parameters":true}},{FORMAT},"temperature":0.5,{TOOLS},"top_logprobs":5,"top_p":1.0}}',
    ),
    "openai:gpt": (
        '{"max_completion_tokens":9,"messages":[],"model":"gpt","temperature":0.5,"top_p":1.0}',
        f'{{"logprobs":true,"max_completion_tokens":9,"messages":[],"model":"gpt",{FORMAT},"temperature":0.5,{TOOLS},"top_logprobs":20,'
        '"top_p":1.0}',
    ),
    "http://h:1/v1#m": (
        '{"max_tokens":9,"messages":[],"model":"m","temperature":0.5,"top_p":1.0}',
        f'{{"max_tokens":9,"messages":[],"model":"m","temperature":0.5,{TOOLS},"top_p":1.0}}',
    ),
    "vllm:a/b": (
        '{"max_tokens":9,"messages":[],"min_p":0.0,"model":"a/b","repetition_penalty":1.0,"temperature":0.5,"top_k":-1,"top_p":1.0}',
        f'{{"logprobs":true,"max_tokens":9,"messages":[],"min_p":0.0,"model":"a/b","repetition_penalty":1.0,{FORMAT},"temperature":0.5,'
        f'"tool_choice":"none",{TOOLS},"top_k":-1,"top_logprobs":20,"top_p":1.0}}',
    ),
    "local:smollm2-135m": ('{"max_tokens":9,"messages":[],"model":"smollm2-135m","temperature":0.5,"top_p":1.0}',) * 2,
}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("OPENROUTER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.delenv("SOULSMITH_API_KEY", raising=False)


@pytest.mark.parametrize("spec", GOLDEN)
def test_the_body_of_each_service_is_golden(spec):
    teacher = open_teacher(spec)
    plain, full = GOLDEN[spec]
    assert teacher.request([], **ASKED).body == plain
    assert teacher.request([], **ASKED, schema=SCHEMA, logprobs=True, tools=[TOOL]).body == full
    assert teacher.request([], **ASKED).body == plain  # what one request asks for does not leak into the next


def test_each_spec_opens_its_own_kind_of_teacher(tmp_path):
    kinds = {"openrouter:a/b": OpenRouterTeacher, "openai:gpt": HttpTeacher, "vllm:a/b": VllmTeacher, "local:smollm2-135m": LocalTeacher}
    assert {spec: type(open_teacher(spec)) for spec in kinds} == kinds
    assert open_teacher("http://h:1/v1#m").price is None and open_teacher("http://h:1/v1#m", price=Price(1, 2)).price == Price(1, 2, 0)
    assert open_teacher("vllm:a/b").price == open_teacher("local:smollm2-135m").price == FREE


@pytest.mark.parametrize(
    "spec, message",
    [
        ("vllm:", "unknown teacher"),
        ("vllm:./nowhere", "no such directory"),
        ("local:nowhere", "no model 'nowhere'"),
        ("https://host/v1", "does not name a host and a model"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_before_anything_starts(spec, message):
    with pytest.raises(UserError, match=message):
        open_teacher(spec)


def test_a_service_without_its_key_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(UserError, match=r"OPENAI_API_KEY is not set"):
        open_teacher("openai:gpt")


# --- a plain server


def with_server(go, models=None, status=200):
    """Run `go(url)` against a server whose /models answers `models` (404 when None)."""
    asked = []

    async def answer(request):
        asked.append(request.headers.get("Authorization"))
        if models is None:
            raise web.HTTPNotFound
        return web.Response(text=models if isinstance(models, str) else json.dumps(models), status=status, content_type="application/json")

    async def main():
        app = web.Application()
        app.router.add_get("/v1/models", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await go(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        finally:
            await runner.cleanup()

    return asyncio.run(main()), asked


def opened(models=None, status=200, model="m"):
    async def go(url):
        teacher = open_teacher(f"{url}#{model}")
        try:
            await teacher.open()
        finally:
            await teacher.close()
        return teacher

    return with_server(go, models, status)[0]


def test_a_model_that_is_not_served_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"does not serve 'nope'\. It serves: a, b\."):
        opened({"data": [{"id": "b"}, {"id": "a"}, {"no": "id"}, "noise"]}, model="nope")


@pytest.mark.parametrize("models", [None, "not json", [], {"data": None}, {"data": []}, {"object": "list"}])
def test_a_server_without_a_list_of_models_is_taken_at_its_word(models):
    teacher = opened(models)
    assert teacher.max_reply is None and teacher.request([], **ASKED).body == GOLDEN["http://h:1/v1#m"][0]


def test_a_reply_that_cannot_fit_is_refused_before_it_is_sent():
    teacher = opened({"data": [{"id": "m", "max_model_len": 2048}]})
    assert teacher.max_reply == 2047 and teacher.request([], **ASKED | {"max_tokens": 2047})
    with pytest.raises(UserError, match=r"a reply of 2,048 tokens cannot fit.*2,047 at most. Lower --max-tokens"):
        teacher.request([], **ASKED | {"max_tokens": 2048})


@pytest.mark.parametrize("owner, extra", [("vllm", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}), ("llamacpp", {"top_k": 0})])
def test_a_server_that_is_known_is_told_all_its_sampling_and_takes_schemas(owner, extra):
    body = json.loads(opened({"data": [{"id": "m", "owned_by": owner}]}).request([], **ASKED, schema=SCHEMA, logprobs=True).body)
    assert extra.items() <= body.items() and body["response_format"]["type"] == "json_schema" and body["top_logprobs"] == 20
    assert not {"provider", "plugins"} & body.keys()
    unknown = json.loads(opened({"data": [{"id": "m", "owned_by": "me"}]}).request([], **ASKED, schema=SCHEMA, logprobs=True).body)
    assert unknown.keys() == {"model", "messages", "temperature", "top_p", "max_tokens"}


def test_a_wrong_key_and_an_absent_server_have_their_own_fix(monkeypatch):
    with pytest.raises(UserError, match=r"401: wrong key. Check the API key."):
        opened({"error": {"message": "wrong key"}}, 401)

    async def nobody():
        teacher = open_teacher("http://127.0.0.1:9/v1#m")
        try:
            await teacher.open()
        finally:
            await teacher.close()

    with pytest.raises(UserError, match=r"cannot connect to http://127.0.0.1:9/v1.*Start the server, or check the URL."):
        asyncio.run(nobody())

    monkeypatch.setenv("SOULSMITH_API_KEY", "sk-1")

    async def go(url):
        teacher = open_teacher(f"{url}#m")
        await teacher.open()
        await teacher.close()

    assert with_server(go, {"data": [{"id": "m"}]})[1] == ["Bearer sk-1"]


def test_one_send_is_one_request_of_the_very_bytes_in_the_key():
    seen = []

    async def handler(request):
        seen.append(await request.read())
        if len(seen) < 3:
            return web.json_response({"error": {"message": "x"}}, status=(429, 500)[len(seen) - 1], headers={"Retry-After": "3"})
        request.transport.abort()
        return web.Response()

    async def go():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        teacher = open_teacher(f"http://127.0.0.1:{runner.addresses[0][1]}/v1#m")
        request = teacher.request([{"role": "user", "content": "é"}], **ASKED)
        answers = [await teacher.send(request) for _ in range(3)]
        await teacher.close()
        await runner.cleanup()
        return request, answers

    request, answers = asyncio.run(go())
    assert seen == [request.body.encode()] * 3  # the client retries nothing by itself
    assert [answer.status for answer in answers] == [429, 500, 0] and answers[0].headers["retry-after"] == "3"
    assert answers[2].reached and "the connection broke" in answers[2].body


def test_recover_waits_for_the_server_and_gives_up_in_the_end():
    slept = []

    async def go(url):
        real = HttpTeacher(Provider(url), "m", "none", sleep=lambda seconds: sleep(seconds))
        away, real._url = real._url, "http://127.0.0.1:9/v1"

        async def sleep(seconds):
            slept.append(seconds)
            if len(slept) == 3:  # somebody starts it
                await real.close()
                real._url = away

        await real.recover()
        await real.close()

    with_server(go, {"data": []})
    assert slept == [2.0] * 3

    async def never():
        async def sleep(seconds):
            slept.append(seconds)

        teacher = HttpTeacher(Provider("http://127.0.0.1:9/v1"), "m", "none", patience=20.0, sleep=sleep)
        try:
            await teacher.recover()
        finally:
            await teacher.close()

    slept.clear()
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1: nobody has answered for 20 s"):
        asyncio.run(never())
    assert len(slept) == 10


def test_a_vllm_key_names_weights_and_flags_but_no_place(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / "model.safetensors").write_bytes(b"weights")
    here, there = (VllmTeacher(str(tmp_path / folder / "model"), Serve(), tmp_path / "log") for folder in ("here", "there"))
    assert here.request([], **ASKED).key == there.request([], **ASKED).key and str(tmp_path) not in here.base_url
    other = VllmTeacher(str(tmp_path / "here" / "model"), Serve(args="--dtype  float32"), tmp_path / "log")
    assert other.base_url == f"{here.base_url} --dtype float32" and other.request([], **ASKED).key != here.request([], **ASKED).key
    (tmp_path / "there" / "model" / "model.safetensors").write_bytes(b"others")
    assert VllmTeacher(str(tmp_path / "there" / "model"), Serve(), tmp_path / "log").base_url != here.base_url


def test_a_tool_parser_lets_vllm_choose():
    teacher = open_teacher("vllm:a/b", serve=Serve(args="--enable-auto-tool-choice --tool-call-parser hermes"))
    assert "tool_choice" not in teacher.request([], **ASKED, tools=[TOOL]).body
