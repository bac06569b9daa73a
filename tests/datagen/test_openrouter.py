"""OpenRouter's preflight against a small copy of it on loopback: what it accepts, what it refuses, and in which words."""

import asyncio
import json

import pytest
from aiohttp import web

from datagen.openrouter import OpenRouterTeacher
from datagen.teachers import Price
from soul.errors import UserError

EVERY = ["temperature", "top_p", "max_tokens", "structured_outputs", "response_format", "logprobs", "top_logprobs", "tools"]
ASKED = {"replicate": 0, "temperature": 0.5, "top_p": 1.0, "max_tokens": 9}


def endpoint(tag, quantization="fp8", prompt="0.0000001", completion="0.0000004", context=131072, supports=EVERY, **more):
    return {
        "tag": tag, "provider_name": tag.partition("/")[0].title(), "quantization": quantization, "context_length": context,
        "pricing": {"prompt": prompt, "completion": completion, "request": "0", "image": "0"}, "supported_parameters": supports,
    } | more  # fmt: skip


class Service:
    """Answers as OpenRouter does. `replies` overrides a path with (status, body)."""

    def __init__(self, *endpoints, limit=12.5, known=("a/b", "a/big", "c/d"), distillable=("a/b",), **replies):
        self.endpoints, self.limit, self.known, self.distillable = endpoints, limit, known, distillable
        self.replies, self.asked = replies, []

    async def handle(self, request):
        path = request.path.removeprefix("/v1")
        self.asked.append((path, request.headers.get("X-Session-Id"), await request.text()))
        if reply := self.replies.get(path.strip("/").partition("/")[0]):
            return web.json_response(reply[1], status=reply[0])
        if path == "/key":
            return web.json_response({"data": {"label": "sk-or…", "limit_remaining": self.limit, "usage": 1.0}})
        if path == "/models":
            ids = self.distillable if request.query.get("distillable") == "true" else self.known
            return web.json_response({"data": [{"id": name} for name in ids]})
        if path == "/models/a/b/endpoints":
            return web.json_response({"data": {"id": "a/b", "endpoints": self.endpoints}})
        if path == "/chat/completions":
            return web.json_response({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "provider": "Deepinfra"})
        return web.json_response({"error": {"code": 404, "message": "Not Found"}}, status=404)

    def open(self, model="a/b", then=None, **options) -> OpenRouterTeacher:
        """A teacher after its preflight, closed again; `then(teacher)` runs before."""

        async def main():
            app = web.Application()
            app.router.add_route("*", "/v1/{path:.*}", self.handle)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            teacher = OpenRouterTeacher(model, "sk-or-1", url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", **options)
            try:
                await teacher.open()
                if then:
                    await then(teacher)
            finally:
                await teacher.close()
                await runner.cleanup()
            return teacher

        return asyncio.run(main())


def body(teacher, **more) -> dict:
    return json.loads(teacher.request([], **ASKED, **more).body)


def test_a_preflight_learns_price_room_and_quantization(capfd):
    service = Service(endpoint("deepinfra/fp8"), endpoint("together", completion="0.0000006", context=32768, max_completion_tokens=8192))
    teacher = service.open()
    assert teacher.price == Price(1e-7, 6e-7, 0.0)  # the dearest, since any may serve
    assert teacher.max_reply == 131071 and teacher.quantization == {"Deepinfra": "fp8", "Together": "fp8"}
    shown = capfd.readouterr().err
    assert (
        "deepinfra/fp8 fp8 $0.10/$0.40 per million, 131072 tokens, together fp8 $0.10/$0.60" in shown and "$12.50 left on the key" in shown
    )
    assert "sk-or-1" not in shown and not [text for _, _, text in service.asked if text]  # a preflight pays for nothing


def test_a_price_of_ones_own_wins():
    assert Service(endpoint("x")).open(price=Price(1, 2, 3)).price == Price(1, 2, 3)
    assert Service(endpoint("x", prompt="-1", completion="-1")).open().price is None
    for odd in ({"prompt": "free"}, {}, "free", None):
        assert Service(endpoint("x") | {"pricing": odd}).open().price is None


@pytest.mark.parametrize(
    "replies, message",
    [
        ({"key": (401, {"error": {"code": 401, "message": "User not found."}})}, "401: User not found. Check the API key."),
        ({"key": (200, ["odd"])}, "OpenRouter's preflight failed: .*Try again later."),
        ({"models": (503, {"error": {"code": 503, "message": "down"}})}, "503: down"),
    ],
)
def test_a_wrong_key_and_a_sick_service_are_told_apart(replies, message):
    with pytest.raises(UserError, match=message):
        Service(endpoint("x"), **replies).open()


@pytest.mark.parametrize("limit", [0, -0.01])
def test_a_key_with_nothing_left_is_refused(limit):
    with pytest.raises(UserError, match=r"has spent its limit. Raise the key's limit"):
        Service(endpoint("x"), limit=limit).open()
    assert Service(endpoint("x"), limit=None).open().price  # a key without a limit


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(UserError, match=r"OpenRouter has no model 'a/bigg'. Did you mean a/big"):
        Service(endpoint("x")).open("a/bigg")
    with pytest.raises(UserError, match=r"See openrouter.ai/models."):
        Service(endpoint("x")).open("zzzz")
    with pytest.raises(UserError, match=r"a/b: has no endpoint at the moment"):
        Service().open()


def test_a_model_that_may_not_be_trained_on_is_refused_unless_told():
    service = Service(endpoint("x"), distillable=("c/d",))
    with pytest.raises(UserError, match=r"its authors have not allowed training on its output.*--any-text"):
        service.open()
    assert body(service.open(distillable=False))["provider"] == {"require_parameters": True}
    assert body(Service(endpoint("x")).open())["provider"] == {"require_parameters": True, "enforce_distillable_text": True}
    assert Service(endpoint("x"), distillable=()).open()  # the list could not be had: the route itself enforces it


def test_different_quantizations_are_not_mixed_unless_told():
    mixed = Service(endpoint("deepinfra/fp4", "fp4"), endpoint("together", "bf16", prompt="0.0000002"))
    with pytest.raises(UserError, match=(
        r"different quantizations.*deepinfra/fp4 fp4 \$0.10/\$0.40 per million, 131072 tokens; together bf16 \$0.20/\$0.40.*"
        "Pin one with --provider deepinfra/fp4, or give --allow-mixed"
    )):  # fmt: skip
        mixed.open()
    assert mixed.open(mixed=True).quantization == {"Deepinfra": "fp4", "Together": "bf16"}
    pinned = mixed.open(pins=["Together"])
    assert pinned.price == Price(2e-7, 4e-7) and pinned.quantization == {"Together": "bf16"}
    two = Service(endpoint("deepinfra/fp4", "fp4"), endpoint("deepinfra/bf16", "bf16"))
    with pytest.raises(UserError, match=r"different quantizations"):
        two.open(pins=["deepinfra"])
    assert two.open(mixed=True).quantization == {"Deepinfra": "fp4 or bf16"}
    assert two.open(pins=["deepinfra/bf16"]).quantization == {"Deepinfra": "bf16"}


def test_a_pin_excludes_everybody_else_and_must_exist():
    service = Service(endpoint("deepinfra/fp8"), endpoint("together"))
    routing = body(service.open(pins=["Together", "deepinfra/fp8", "together"]))["provider"]
    assert routing["only"] == ["deepinfra/fp8", "together"] and routing["allow_fallbacks"] is False and "order" not in routing
    with pytest.raises(UserError, match=r"no provider groq. It is served by: deepinfra/fp8 fp8 .*; together fp8"):
        service.open(pins=["together", "groq"])


def test_every_parameter_that_is_sent_must_be_taken():
    only = [name for name in EVERY if name != "top_p"]
    with pytest.raises(UserError, match=r"every parameter that is sent: x lacks top_p; y lacks top_p. Choose another model."):
        Service(endpoint("x", supports=only), endpoint("y", supports=only)).open()
    one = Service(endpoint("x", supports=only), endpoint("y", "bf16"))
    assert one.open().quantization == {"Y": "bf16"}  # x is never reached, so it neither mixes nor prices
    with pytest.raises(UserError, match=r"x lacks top_p. Pin another provider, or none."):
        one.open(pins=["x"])


def test_a_schema_goes_only_where_some_route_takes_it(capfd):
    plain = Service(endpoint("x", supports=["temperature", "top_p", "max_tokens", "response_format", "logprobs"]))
    teacher = plain.open()
    assert not {"response_format", "logprobs", "top_logprobs"} & body(teacher, schema={"type": "object"}, logprobs=True).keys()
    assert "no route takes logprobs and top_logprobs; requests go without" in capfd.readouterr().err
    full = body(Service(endpoint("x")).open(), schema={"type": "object"}, logprobs=True)
    assert full["response_format"]["json_schema"]["strict"] is True and full["top_logprobs"] == 5


def test_a_reply_longer_than_any_route_gives_is_refused():
    teacher = Service(endpoint("x", context=4096), endpoint("y", context=8192, max_completion_tokens=2048)).open()
    assert teacher.max_reply == 4095
    with pytest.raises(UserError, match=r"Lower --max-tokens"):
        teacher.request([], **ASKED | {"max_tokens": 4096})
    assert Service(endpoint("x", context=None)).open().max_reply is Service(endpoint("x", context="big")).open().max_reply is None


def test_one_session_for_all_calls_and_none_of_it_in_the_key():
    service, other = Service(endpoint("x")), Service(endpoint("x"))
    sent = []

    async def ask(teacher):
        sent.append(teacher.request([{"role": "user", "content": "hi"}], **ASKED))
        assert (await teacher.send(sent[-1])).status == 200

    service.open(then=ask)
    other.open(then=ask, pins=["x"])
    (path, session, text), (_, pinned, _) = service.asked[-1], other.asked[-1]
    assert path == "/chat/completions" and text == sent[0].body and session not in text
    assert session.startswith("soulsmith-") and len(session) < 128 and session != pinned
    assert {asked for _, asked, _ in service.asked} == {session}
