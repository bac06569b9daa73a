"""Every answer that teachers are known to give has one reading. Numbers are the rows of the list of wire failures."""

import json
from email.utils import formatdate

import pytest
from fake_teacher import answer, completion
from hypothesis import given
from hypothesis import strategies as st

from datagen.tool_calls import BadCall, read_calls
from datagen.wire import OUTCOMES, Answer, Request, classify, make_request, split_reasoning
from soul import conversation

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
    ("13 a reply after reasoning has no first logprob", choice("<think>a</think>A", logprobs={}), "ok", dict(logprobs=None)),
    (
        "18 nobody serves it so",
        error(404, message="x", availability={"constraint": {"field": "zdr"}}),
        "permanent",
        dict(stops=True, fix="No provider of this model allows zdr: leave it out or choose another model."),
    ),
    ("23 a refusal in its own field", choice(None, refusal="I can't"), "refused", dict(why="I can't")),
    ("26 who served", answer(completion("hi", provider="X")), "ok", dict(served="fake-1@X")),
    ("26 a model without a provider", answer(completion("hi")), "ok", dict(served="fake-1")),
    (
        "27 cached tokens",
        choice("hi", usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}),
        "ok",
        dict(usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}, cost=None),
    ),
    (
        "27 nonsense in usage",
        answer(
            '{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"cost": NaN, "a": 1e999, "b": [1], "c": 2}}'
        ),
        "ok",
        dict(usage={"c": 2}, cost=None),
    ),
    (
        "30 comments before the answer",
        answer(": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n" + json.dumps(completion("hi"))),
        "ok",
        dict(text="hi"),
    ),
    (
        "30 an event with an error",
        answer(': X\n\ndata: {"choices": [{"delta": {"content": "ha"}}]}\n\ndata: {"error": {"code": 429}}\n\n'),
        "rate_limited",
        dict(text="", free=True),
    ),
    (
        "30 an error under the choice of an event",
        answer('data: {"choices": [{"delta": {}, "finish_reason": "error", "error": {"code": 502}}]}'),
        "transient",
        {},
    ),
    (
        "30 a whole answer as an event",
        answer("data: " + json.dumps(completion("hi", object="chat.completion")) + "\n\ndata: [DONE]\n\n"),
        "ok",
        dict(text="hi"),
    ),
    ("30 pieces of an answer", answer('data: {"choices": [{"delta": {"content": "ha"}}]}\n\ndata: [DONE]'), "transient", dict(text="")),
    ("30 comments alone", answer(": OPENROUTER PROCESSING\n\n"), "transient", {}),
    ("31 batch accepted", answer({"id": "b", "status": "validating"}, 202), "transient", dict(text="")),
    (
        "half an emoji",
        answer('{"choices": [{"message": {"content": "hi \\ud83d"}, "finish_reason": "stop"}], "model": "m\\udc00"}'),
        "ok",
        dict(text="hi \ufffd", model="m\ufffd"),
    ),
    ("half an emoji in an error", error(code=429, message="x\ud83d"), "rate_limited", dict(why="429: x\ufffd")),
    ("half an emoji in the usage's names", choice("hi", usage={"\ud83d": 1}), "ok", dict(usage={"\ufffd": 1})),
    ("a cost below nothing", choice("hi", usage={"cost": -1}), "ok", dict(cost=None)),
    ("a time in the past", error(503, code=503, message="x", retry_after=-5), "transient", dict(retry_after=0.0)),
    ("a code that is no number", error(code="\u00b2\u00b2\u00b2", message="x"), "transient", {}),
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


SPELLINGS = st.characters(codec=None, categories=("L", "N", "P", "Cs", "Z"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 700) | st.just(10**400) | st.floats() | st.text(SPELLINGS, max_size=8),
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
                    "tool_calls",
                    "function",
                    "arguments",
                    "name",
                    "logprobs",
                    "top_logprobs",
                    "token",
                    "logprob",
                    "retry_after",
                    "availability",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def holds(value):
    """Can a file, a database and a request hold it?"""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def check(said):
    verdict = classify(said, now=NOW)
    assert verdict.outcome in OUTCOMES
    for value in (verdict.text, verdict.why, verdict.fix, verdict.finish, verdict.reasoning, verdict.usage, verdict.cost, verdict.served,
                  verdict.retry_after, verdict.tool_calls, verdict.logprobs):  # fmt: skip
        holds(value)
    assert verdict.cost is None or verdict.cost >= 0
    assert verdict.retry_after is None or verdict.retry_after >= 0
    if verdict.outcome not in ("ok", "truncated"):
        assert verdict.text == ""
    if verdict.outcome == "ok":
        assert verdict.text.strip() or verdict.tool_calls
    else:
        assert verdict.tool_calls == [] and (verdict.logprobs is None or verdict.outcome == "truncated")
    return verdict


@given(
    body=JSON,
    status=st.sampled_from([0, 200, 400, 402, 404, 429, 500]),
    retry=st.text(max_size=8),
    comments=st.sampled_from(["", ": x\n\n", "data: "]),
)
def test_classify_never_raises_and_exports_no_text_of_a_failure(body, status, retry, comments):
    check(Answer(status, comments + json.dumps(body), {"retry-after": retry, "x-ratelimit-reset": retry}))


MESSAGE = st.fixed_dictionaries({}, optional={name: JSON for name in ("content", "tool_calls", "reasoning", "refusal")})
CHOICE = st.fixed_dictionaries(
    {"message": MESSAGE}, optional={"finish_reason": st.sampled_from(["stop", "tool_calls"]) | JSON, "logprobs": JSON, "error": JSON}
)


@given(
    body=st.fixed_dictionaries(
        {"choices": st.lists(CHOICE, min_size=1, max_size=2)}, optional={"usage": JSON, "model": JSON, "provider": JSON}
    )
)
def test_classify_never_raises_on_what_looks_like_a_completion(body):
    check(Answer(200, json.dumps(body)))


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")), st.sampled_from([200, 202, 429, 500, 529]))
def test_classify_never_raises_on_bytes(body, status):
    check(Answer(status, body))
    check(Answer(status, "[" * 100_000 + body))


@given(st.text(st.sampled_from("0123456789 :,+-MonJanGMT\u0663"), max_size=40))
def test_any_date_is_a_time_or_none(said):
    check(error(429, {"retry_after": said, "x_ratelimit_reset": said}, code=429, message="x"))


@pytest.mark.parametrize("said", ["9" * 400, "1e5", "Mon, 01 Jan 0001 00:00:00 -0000", "Fri, 31 Dec 9999 23:59:59 -2359", "\u0663"])
def test_a_strange_time_to_wait_is_no_time(said):
    assert check(error(429, {"retry_after": said, "x_ratelimit_reset": "9" * 5000}, code=429, message="x")).outcome == "rate_limited"


def calling(*calls, finish="tool_calls", content=None, usage=None):
    return choice(
        content,
        finish,
        usage,
        tool_calls=[{"id": "", "type": "function", "function": {"name": name, "arguments": args}} for name, args in calls],
    )


ROW_FORM = [{"type": "function", "function": {"name": "Read", "arguments": '{"file_path": "a.py"}'}}]
READ = ("Read", '{"file_path": "a.py"}')


@pytest.mark.parametrize(
    "calls, arguments",
    [
        ([READ], ['{"file_path": "a.py"}']),
        (
            [("Read", {"file_path": "a.py", "offset": 4, "limit": None, "deep": {"x": [1]}})],
            ['{"file_path": "a.py", "offset": "4", "deep": "{\\"x\\": [1]}"}'],
        ),
        ([("Read", None)], ["{}"]),
        ([("Read", "")], ["{}"]),
        ([("Read", " \n")], ["{}"]),
        ([("Read", '{"old_string": "a\tb\n"}')], ['{"old_string": "a\\tb\\n"}']),
        ([("launch_rocket", "{}")], ["{}"]),
        ([READ, READ], ['{"file_path": "a.py"}'] * 2),
        ([("Read", '{"file_path": "\\ud83d"}')], ['{"file_path": "\ufffd"}']),
    ],
    ids=["string", "object", "null", "empty", "blank", "raw tab and newline", "unknown tool", "two, with empty ids", "half an emoji"],
)
def test_16_tool_calls_are_normalised(calls, arguments):
    verdict = check(calling(*calls))
    assert (verdict.outcome, verdict.text) == ("ok", "")
    assert [call["function"]["arguments"] for call in verdict.tool_calls] == arguments
    assert [call["function"]["name"] for call in verdict.tool_calls] == [name for name, _ in calls]
    assert conversation.validate([conversation.assistant("", *verdict.tool_calls)]) == []


@pytest.mark.parametrize(
    "calls, outcome, why",
    [
        ([READ, ("Read", '{"file_path": "/src/ma')], "truncated", "the arguments of Read are cut"),
        ([("Read", '{"file_path"')], "truncated", "cut"),
        ([("Read", '{"a": {"b": 1}')], "truncated", "cut"),
        ([("Read", '{"a": tru')], "truncated", "cut"),
        ([("Read", "file_path=a.py")], "empty", "the arguments of Read are not JSON"),
        ([("Read", '{"a": 1}}')], "empty", "not JSON"),
        ([("Read", "[1]")], "empty", "no JSON object"),
        ([("Read", '{"a": ' + "[" * 100_000)], "empty", "not JSON"),
        ([("R\ud83d", "x")], "empty", "R\ufffd are not JSON"),
        ([READ, ("", "{}")], "empty", "no name"),
        ([READ, (None, "{}")], "empty", "no name"),
    ],
)
def test_15_16_calls_that_are_cut_or_have_no_reading_give_none(calls, outcome, why):
    verdict = check(calling(*calls))
    assert verdict.outcome == outcome and why in verdict.why


@pytest.mark.parametrize("said", ["Read", {"Read": {}}, [None], [["Read"]], [{"function": None}]])
def test_16_what_is_no_list_of_calls(said):
    with pytest.raises(BadCall):
        read_calls(said)


def test_15_calls_are_held_against_what_was_asked():
    tools, limit = [{"type": "function", "function": {"name": "Read"}}], {"completion_tokens": 64}
    whole = calling(READ, usage={"completion_tokens": 20})
    assert classify(whole, now=NOW, asked=make_request("u", {"tools": tools, "max_tokens": 64})).tool_calls == ROW_FORM
    for field in ("max_tokens", "max_completion_tokens"):
        cut = classify(calling(READ, usage=limit), now=NOW, asked=make_request("u", {"tools": tools, field: 64}))
        assert (cut.outcome, cut.tool_calls) == ("truncated", [])
    unasked = classify(whole, now=NOW, asked=make_request("u", {"max_tokens": 64}))
    assert (unasked.outcome, unasked.tool_calls) == ("empty", []) and "none was offered" in unasked.why


def test_text_beside_calls_is_kept_and_length_wins():
    assert check(calling(READ, content="let me look.")).text == "let me look."
    assert check(calling(READ, finish="length")).outcome == "truncated"
    assert check(calling(finish="stop", content="hi")).tool_calls == []


def test_a_reply_cut_after_its_first_token_still_has_the_logprobs_of_that_token():
    given = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -2.5}]}]}
    for content, expected in (("A because", {"A": -0.1, "B": -2.5}), ("<think>A", None)):
        verdict = check(answer({"choices": [{"message": {"content": content}, "finish_reason": "length", "logprobs": given}]}))
        assert (verdict.outcome, verdict.logprobs) == ("truncated", expected)


def test_logprobs_are_the_alternatives_to_the_first_token():
    def first(logprobs, content="A"):
        return check(answer({"choices": [{"message": {"content": content}, "finish_reason": "stop", "logprobs": logprobs}]})).logprobs

    def token(word, value, **more):
        return {"token": word, "logprob": value, "bytes": [65]} | more

    top = [token("A", -0.1), token(" A", -3), token("B", -2.5), token("B", -9999.0), token("C", None), {"token": 3}, "x"]
    assert first({"content": [token("A", -0.1, top_logprobs=top), token("B", -1.0)]}) == {"A": -0.1, " A": -3.0, "B": -2.5}
    assert first({"content": [token("A", -0.1)]}) == {"A": -0.1}
    assert first({"content": [token("\ud83d", -0.1)]}) == {"\ufffd": -0.1}
    assert [first(none) for none in (None, {}, {"content": None}, {"content": []}, {"content": [{}]}, [])] == [None] * 6
    assert first({"content": [token("<think>", -0.1)]}, "<think>hm</think>A") is None


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
