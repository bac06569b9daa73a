"""Every answer that teachers are known to give has one reading. Numbers are the rows of the list of wire failures."""

import json
from email.utils import formatdate

import pytest
from fake_teacher import answer, completion
from hypothesis import given
from hypothesis import strategies as st

from datagen.wire import OUTCOMES, Answer, Request, classify, make_request, split_reasoning

NOW = 1_700_000_000.0


def error(status=200, headers=None, **fields):
    return answer({"error": fields}, status, **(headers or {}))


def choice(content="", finish="stop", usage=None, **message):
    return answer({"choices": [{"message": {"content": content, **message}, "finish_reason": finish}], "usage": usage})


CASES = [
    (
        "1 429 with seconds",
        error(429, {"retry_after": "20"}, code=429, message="Rate limit exceeded", metadata={"error_type": "rate_limit_exceeded"}),
        "rate_limited",
        dict(retry_after=20.0, free=True),
    ),
    (
        "2 429 with a date",
        error(429, {"retry_after": formatdate(NOW + 90, usegmt=True)}, code=429, message="slow down"),
        "rate_limited",
        dict(retry_after=90.0),
    ),
    (
        "2 429 with a reset in ms",
        error(429, {"x_ratelimit_reset": str(int((NOW + 45) * 1000))}, code=429, message="x"),
        "rate_limited",
        dict(retry_after=45.0),
    ),
    ("3 429 for an hour", error(429, {"retry_after": "3600"}, code=429, message="free quota"), "rate_limited", dict(retry_after=3600.0)),
    (
        "5 200 with a 429 inside",
        answer(
            {
                "id": None,
                "choices": None,
                "usage": None,
                "error": {
                    "message": "Provider returned error",
                    "code": 429,
                    "metadata": {"raw": "Too Many Requests", "provider_name": "X"},
                },
            }
        ),
        "rate_limited",
        dict(provider="X", free=True, why="429: Provider returned error (Too Many Requests)"),
    ),
    ("6 error beside choices", answer(completion(None) | {"error": {"code": 429, "message": "x"}}), "rate_limited", dict(text="")),
    (
        "7 error under the choice",
        answer({"choices": [{"message": {"content": "half"}, "finish_reason": "error", "error": {"code": 502, "message": "x"}}]}),
        "transient",
        dict(text=""),
    ),
    ("7 finish error without more", choice("half", "error"), "transient", dict(text="")),
    ("8 code as a word", error(code="server_error", message="x"), "transient", {}),
    ("8 error as a string", answer({"error": "something broke"}), "transient", dict(why="error: something broke")),
    ("8 only error_type and http_status", error(error_type="rate_limit_exceeded", http_status=429), "rate_limited", {}),
    (
        "9 thought signature",
        error(code=400, message="bad", metadata={"raw": "missing a thought_signature"}),
        "permanent",
        dict(stops=False),
    ),
    ("10 blank and unbilled", choice("", None, {"completion_tokens": 0}), "empty", dict(cost=0.0)),
    ("11 only reasoning, cut", choice("", "length", reasoning="hmm"), "truncated", dict(text="", reasoning="hmm")),
    ("12 only reasoning, stopped", choice(None, "stop", reasoning_content="hmm"), "empty", dict(text="", reasoning="hmm")),
    ("13 think tags", choice("<think>a</think>\nanswer"), "ok", dict(text="answer", reasoning="a")),
    ("13 think tag left open", choice("<think>a and on"), "truncated", dict(text="", reasoning="a and on")),
    ("13 only the closing tag", choice("a</think>answer"), "ok", dict(text="answer", reasoning="a")),
    ("14 cut text", choice("half a", "length"), "truncated", dict(text="half a")),
    (
        "19 no such model",
        error(404, code="model_not_found", message="x", metadata={"fallback_models": ["a", "b"]}),
        "permanent",
        dict(stops=True, final=False, fix="Models served instead: a, b."),
    ),
    (
        "20 503 with a time in the body",
        error(503, code=503, message="x", availability={"retry_after": 7}),
        "transient",
        dict(retry_after=7.0),
    ),
    ("21 no credit", error(402, code=402, message="requires more credits, or fewer max_tokens"), "budget", dict(stops=True, final=False)),
    ("21 openai's empty quota", error(429, code="insufficient_quota", message="x"), "budget", dict(stops=True)),
    ("22 money in flight", error(402, {"retry_after": "1"}, code=402, message="x"), "rate_limited", dict(retry_after=1.0, stops=False)),
    (
        "23 moderation",
        error(403, code=403, message="flagged", metadata={"reasons": ["x"], "flagged_input": "y"}),
        "refused",
        dict(stops=False),
    ),
    ("23 content filter", choice("", "content_filter"), "refused", {}),
    ("24 wrong key", error(401, code=401, message="no auth"), "permanent", dict(stops=True, final=False)),
    ("25 too long", error(400, code="context_length_exceeded", message="x"), "permanent", dict(stops=False, final=True)),
    ("25 too large", answer("", 413), "permanent", {}),
    ("27 no usage", choice("hi"), "ok", dict(text="hi", usage=None, cost=None)),
    ("29 HTML", answer("<html>oops</html>"), "transient", {}),
    ("29 empty body", answer(""), "transient", {}),
    ("29 cut JSON", answer('{"choices": [{"mess'), "transient", {}),
    ("29 reset", Answer(0, "the connection broke"), "transient", dict(free=False)),
    ("29 524", answer("<html>", 524), "transient", {}),
    (
        "32 vLLM",
        error(400, message="maximum context length is 2048", type="BadRequestError", param="max_tokens", code=400),
        "permanent",
        {},
    ),
    (
        "32 vLLM, flat",
        answer({"object": "error", "message": "maximum context length", "type": "BadRequestError", "code": 400}, 400),
        "permanent",
        dict(why="400: maximum context length"),
    ),
    ("36 engine died", answer("", 500), "transient", {}),
    ("39 nobody there", Answer(0, "cannot connect", reached=False), "transient", dict(free=True)),
    ("43 abort", choice("half", "abort"), "transient", dict(text="")),
    ("no choices", answer({"choices": []}), "transient", {}),
    ("no finish reason", choice("half", None), "transient", dict(text="")),
    ("content in parts", choice([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ok", dict(text="ab")),
]


@pytest.mark.parametrize("name, said, outcome, expected", CASES, ids=[case[0] for case in CASES])
def test_classify(name, said, outcome, expected):
    verdict = classify(said, now=NOW)
    assert verdict.outcome == outcome, verdict
    assert {key: getattr(verdict, key) for key in expected} == expected


def test_hint_about_replayed_reasoning():
    assert "replay" in classify(CASES[11][1], now=NOW).fix


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 700) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "error",
                    "choices",
                    "message",
                    "content",
                    "code",
                    "usage",
                    "metadata",
                    "cost",
                    "finish_reason",
                    "reasoning",
                    "object",
                    "type",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(body=JSON, status=st.sampled_from([0, 200, 400, 404, 429, 500]), retry=st.text(max_size=8))
def test_classify_never_raises_and_exports_no_text_of_a_failure(body, status, retry):
    verdict = classify(Answer(status, json.dumps(body), {"retry-after": retry}), now=NOW)
    assert verdict.outcome in OUTCOMES
    if verdict.outcome not in ("ok", "truncated"):
        assert verdict.text == ""
    if verdict.outcome == "ok":
        assert verdict.text.strip()


@given(st.text(alphabet=st.sampled_from("ab <>/think\n")))
def test_text_without_closed_reasoning_stays_whole(text):
    if "</think>" not in text and not text.lstrip().startswith("<think>"):
        assert split_reasoning(text) == ("", text, False)


BODY = {"model": "m", "messages": [{"role": "system", "content": "the soul"}, {"role": "user", "content": "hi"}], "temperature": 1.0}


def changed(**fields):
    return make_request("http://a/v1", BODY | fields).key


def test_every_byte_that_reaches_the_wire_changes_the_key():
    soul = [{"role": "system", "content": "the soul."}, BODY["messages"][1]]
    keys = {
        changed(),
        changed(model="n"),
        changed(messages=soul),
        changed(temperature=0.9),
        changed(top_p=1.0),
        make_request("http://b/v1", BODY).key,
        make_request("http://a/v1", BODY, 1).key,
    }
    assert len(keys) == 7


def test_key_ignores_order_of_fields_and_is_stable():
    assert changed() == make_request("http://a/v1", dict(reversed(BODY.items()))).key
    assert make_request("u", {"model": "é"}).key == Request("u", '{"model":"é"}').key
