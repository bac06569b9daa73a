"""The embedded teacher: ChatML by ids, one answer per request whatever the batch, and failures that reach the rows."""

import asyncio
import json
import threading

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from datagen.local import LocalTeacher
from datagen.wire import classify
from model.chatml import chatml_stops, encode_chatml
from model.config import ModelConfig
from model.load import Loaded
from model.sampler import Sampler
from model.transformer import Decoder
from soul.errors import UserError

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class Bytes:
    """A byte tokenizer with ChatML's control tokens after the bytes."""

    base_special = {name: 256 + n for n, name in enumerate(NAMES)}
    special, vocab_size = {}, 259

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)


TOKENIZER = Bytes()


def spelled(ids):
    return "".join(NAMES[i - 256] if i > 255 else chr(i) for i in ids)


def test_chatml_is_the_models_own_template():
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi\n"}]
    want = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi\n<|im_end|>\n"
    assert spelled(encode_chatml(TOKENIZER, messages, generation=False)) == want
    assert spelled(encode_chatml(TOKENIZER, messages)) == want + "<|im_start|>assistant\n"
    assert chatml_stops(TOKENIZER) == [258, 257, 256]


@given(st.lists(st.sampled_from([*NAMES, "<|im_", "x", "\n"]), max_size=8).map("".join))
def test_text_that_spells_a_control_token_stays_text(text):
    ids = encode_chatml(TOKENIZER, [{"role": "user", "content": text}])
    assert [i for i in ids if i > 255] == [257, 258, 257]
    assert text.encode() in TOKENIZER.decode_bytes(ids)


def test_calls_and_other_tokenizers_are_refused():
    with pytest.raises(ValueError, match="no tool calls"):
        encode_chatml(TOKENIZER, [{"role": "assistant", "content": "", "tool_calls": [{}]}])
    other = Bytes()
    other.base_special = {}
    with pytest.raises(ValueError, match="no ChatML"):
        encode_chatml(other, [])


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(vocab_size=259, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_head=16, d_ff=32, max_len=256)
    return Loaded(Decoder(config, rngs=nnx.Rngs(0), compute="fp32"), TOKENIZER, config, {}, None)


@pytest.fixture
def loads(tiny, monkeypatch):
    calls = []

    def load_model(name, **options):
        calls.append((name, options))
        return tiny

    monkeypatch.setattr("model.load.load_model", load_model)
    return calls


def ask(teacher, texts, **sampling):
    sampling = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 12, "replicate": 0} | sampling
    requests = [teacher.request([{"role": "user", "content": text}], **sampling) for text in texts]

    async def go():
        try:
            return await asyncio.gather(*map(teacher.send, requests))
        finally:
            await teacher.close()

    return [answer.body for answer in asyncio.run(go())]


def test_an_answer_depends_on_its_request_alone(loads):
    texts = [f"question {n}" * (n % 3 + 1) for n in range(9)]
    together = ask(LocalTeacher("tiny", batch=4), texts)
    alone = ask(LocalTeacher("tiny", batch=4), texts[5:6])
    assert alone == together[5:6] and len(set(together)) == 9
    assert ask(LocalTeacher("tiny", batch=4), texts[5:6], replicate=1) != alone
    assert loads[0] == ("tiny", {"raw": True}) and len(loads) == 3  # once per teacher


def test_the_answer_reads_like_a_servers(loads):
    teacher = LocalTeacher("tiny")
    assert not loads  # nothing is loaded for a run that only replays
    [body] = ask(teacher, ["hi"])
    usage = json.loads(body)["usage"]
    assert usage["prompt_tokens"] == len(encode_chatml(TOKENIZER, [{"role": "user", "content": "hi"}])) and usage["cost"] == 0.0
    assert 1 <= usage["completion_tokens"] <= 12
    assert not [thread for thread in threading.enumerate() if thread.name == "local teacher"]


def test_a_prompt_that_does_not_fit_fails_its_row_only(loads):
    long, short = (classify_one(body) for body in ask(LocalTeacher("tiny"), ["x" * 250, "x"]))
    assert long.outcome == "permanent" and not long.stops and "exceed 256" in long.why
    assert short.outcome in ("ok", "truncated", "empty")


def classify_one(body):
    from datagen.wire import Answer

    return classify(Answer(400 if '"error"' in body[:10] else 200, body), now=0)


def test_a_model_that_cannot_be_loaded_reaches_everyone_who_waits(monkeypatch):
    def load_model(name, **options):
        raise UserError("no model 'nope'")

    monkeypatch.setattr("model.load.load_model", load_model)
    with pytest.raises(UserError, match="no model 'nope'"):
        ask(LocalTeacher("nope"), ["a", "b", "c"])

    monkeypatch.setattr("model.load.load_model", lambda *a, **o: 1 / 0)
    with pytest.raises(UserError, match="the embedded model failed: ZeroDivisionError"):
        ask(LocalTeacher("nope"), ["a", "b", "c"])


def test_what_nobody_waits_for_is_dropped(loads, monkeypatch):
    teacher, steps, step = LocalTeacher("tiny", batch=4), [], Sampler.step
    monkeypatch.setattr(Sampler, "step", lambda self: steps.append(1) or step(self))

    async def go():
        sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 200, "replicate": 0}
        tasks = [asyncio.create_task(teacher.send(teacher.request([{"role": "user", "content": f"{n}"}], **sampling))) for n in range(40)]
        await asyncio.sleep(0.01)
        for task in tasks[:-1]:
            task.cancel()
        await tasks[-1]
        await teacher.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(go())[:-1])
    assert len(steps) < 60  # writing all of them takes 250


def test_the_weights_are_in_the_key(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    one, other = (LocalTeacher(str(tmp_path / name)) for name in ("a", "b"))
    assert one.base_url != other.base_url
    (tmp_path / "a" / "model.safetensors").write_bytes(b"b")
    assert LocalTeacher(str(tmp_path / "a")).base_url == other.base_url
    assert LocalTeacher("smollm2-135m").base_url == "local:smollm2-135m"
