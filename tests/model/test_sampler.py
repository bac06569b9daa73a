from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import sampler as module
from model.config import ModelConfig
from model.sampler import Request, Sampler, sample
from model.transformer import Decoder
from soul.errors import UserError

CONFIG = ModelConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=48, rope_theta=1e4, max_len=1024)
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, 96, n).tolist() for n in (1, 3, 64, 65, 70, 130, 200)]


@pytest.fixture(scope="module")
def model():
    model = Decoder(CONFIG, compute="fp32")
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params))


@pytest.fixture
def sampler(model):
    return Sampler(model, max_len=600, batch=4)


@pytest.fixture(scope="module")
def full_forward(model):
    graph, params = nnx.split(model)

    @jax.jit
    def logits(ids):
        m = nnx.merge(graph, params)
        return m.logits(m.hidden(ids))

    def greedy(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 320), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(np.argmax(logits(padded)[0, len(ids) - 1])))
        return ids[len(prompt) :]

    return greedy


def test_cached_greedy_decoding_equals_the_full_forward(sampler, full_forward):
    for prompt, got in zip(PROMPTS, sampler.generate(PROMPTS, max_new=19), strict=True):
        assert got.ids == full_forward(prompt, 19) and got.finish == "length"


def test_a_row_does_not_depend_on_the_rest_of_the_batch(model):
    together = Sampler(model, batch=4).generate(PROMPTS, max_new=12, temperature=1.0, top_p=0.9, seeds=range(50, 57))
    alone = Sampler(model, batch=1)
    for i in (6, 2, 0, 5):
        assert alone.generate([PROMPTS[i]], max_new=12, temperature=1.0, top_p=0.9, seeds=[50 + i]) == [together[i]]


def test_seeds_alone_decide_the_draws(sampler):
    same = sampler.generate([PROMPTS[1]] * 3, max_new=12, temperature=1.5, seeds=[4, 4, 5])
    assert same[0] == same[1] != same[2]
    assert sampler.generate([PROMPTS[1]], max_new=12, temperature=1.5, seeds=[2**40 + 4]) == same[:1]  # seeds count modulo 2^32


def test_a_stop_id_ends_the_row_and_is_kept(sampler):
    free = sampler.generate(PROMPTS[:3], max_new=20)
    stop = free[1].ids[9]
    cut = free[1].ids.index(stop) + 1
    stopped = sampler.generate(PROMPTS[:3], max_new=20, stop_ids=[stop, 95])
    assert stopped[1].ids == free[1].ids[:cut] and stopped[1].finish == "stop"
    for a, b in zip(stopped, free, strict=True):
        assert a.ids == b.ids[: len(a.ids)] and (a.finish == "stop") == (a.ids[-1] in (stop, 95))


def test_a_shared_beginning_is_computed_once_and_changes_nothing(sampler, model, monkeypatch):
    chunks = []
    real = module._prefill
    monkeypatch.setattr(module, "_prefill", lambda *a: chunks.append(a[4].shape[1]) or real(*a))
    prompts = [PROMPTS[5] + [i] * 5 for i in range(6)]  # 130 shared tokens: two whole chunks
    got = sampler.generate(prompts, max_new=6)
    assert len(chunks) <= 1 + 6
    del chunks[:]
    turn = prompts[5] + got[5].ids + [7] * 3
    again = sampler.generate([turn], max_new=6)  # the next turn of a chat continues from its own row
    assert chunks == [64]
    assert again == Sampler(model, batch=4).generate([turn], max_new=6)
    for prompt, completion in zip(prompts, got, strict=True):
        assert [completion] == Sampler(model, batch=4).generate([prompt], max_new=6)


def test_chats_that_take_turns_keep_their_rows(sampler, monkeypatch):
    chats = [[i] * 70 for i in range(4)]
    for chat, got in zip(chats, sampler.generate(chats[:3], max_new=4) + sampler.generate(chats[3:], max_new=4), strict=True):
        chat += got.ids  # the newcomer took the row that was still empty
    chunks, real = [], module._prefill
    monkeypatch.setattr(module, "_prefill", lambda *a: chunks.append(a[4].shape[1]) or real(*a))
    for chat in (chats[1], chats[0], chats[3], chats[2]):
        sampler.generate([chat + [9] * 5], max_new=2)
    assert chunks == [64] * 4


def test_an_error_leaves_nothing_behind(sampler):
    with pytest.raises(UserError):
        sampler.generate([PROMPTS[0], []], max_new=3)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS[:6], max_new=3, on_done=fail)
    assert not sampler.queue and sampler.step() == []


def assert_cached(sampler, model, prompt):
    """What the sampler holds for the prompt is what a fresh one computes for it."""
    fresh = Sampler(model, max_len=600, batch=4)
    assert sampler.generate([prompt], max_new=2) == fresh.generate([prompt], max_new=2)
    [row], n = [r for r, slot in enumerate(sampler.slots) if slot.held[: len(prompt)] == list(prompt)], len(prompt)
    for a, b in zip(sampler.cache, fresh.cache, strict=True):
        np.testing.assert_allclose(a[row, :, :n], b[0, :, :n], atol=1e-4)


def test_a_beginning_shared_near_the_end_of_the_cache(sampler, model):
    first = (PROMPTS[6] * 2)[:240]
    assert_cached(sampler, model, first)
    assert_cached(sampler, model, first[:200] + [3] * 45)
    assert sampler.size == 256


def test_a_finished_row_keeps_its_tokens_while_others_go_on(sampler, model):
    full = (PROMPTS[6] * 2)[:241]
    _, got = sampler.generate([PROMPTS[0], full], max_new=16)
    assert sampler.size == len(sampler.slots[1].held) == 256  # the second row fills the cache to its last place
    sampler.generate([PROMPTS[1]], max_new=17)
    del sampler.slots[0].held[:]
    assert_cached(sampler, model, full + got.ids + PROMPTS[2])


def test_the_cache_grows_for_long_rows_and_shrinks_again(sampler, full_forward):
    long = (PROMPTS[6] * 3)[:290]
    assert sampler.generate([long, PROMPTS[1]], max_new=8)[0].ids == full_forward(long, 8)
    assert sampler.size == 512
    sampler.generate([(PROMPTS[6] * 3)[:560]], max_new=8)
    assert sampler.size == 1024
    assert sampler.generate([PROMPTS[4]], max_new=8)[0].ids == full_forward(PROMPTS[4], 8)
    assert sampler.size == 256
    assert sampler.generate([long], max_new=8)[0].ids == full_forward(long, 8)


def test_a_row_ends_at_max_len(model):
    [got] = Sampler(model, max_len=80, batch=4).generate([PROMPTS[4]], max_new=50)
    assert len(got.ids) == 10 and got.finish == "length"


def test_stream_gives_the_same_ids_and_stops_when_closed(sampler):
    [wanted] = sampler.generate([PROMPTS[3]], max_new=11, temperature=1.0, seeds=[3])
    assert list(sampler.stream(PROMPTS[3], max_new=11, temperature=1.0, seed=3)) == wanted.ids
    stream = sampler.stream(PROMPTS[3], max_new=11)
    next(stream)
    stream.close()
    assert sampler.step() == [] and not sampler.queue


def test_requests_of_different_kinds_share_a_batch_and_report_as_they_end(sampler):
    short, long = sampler.submit(Request(PROMPTS[0], 2)), sampler.submit(Request(PROMPTS[1], 20, temperature=1.0, seed=9))
    first = sampler.step()
    late = sampler.submit(Request(PROMPTS[2], 3))
    rest = [done for _ in range(4) for done in sampler.step()]
    assert [h for h, _ in first] == [short] and {h for h, _ in rest} == {long, late}
    done = []
    sampler.generate(PROMPTS[:6], max_new=3, on_done=lambda i, c: done.append((i, len(c.ids))))
    assert sorted(done) == [(i, 3) for i in range(6)]


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    got = Sampler(model, SimpleNamespace(vocab_size=5), batch=4).generate(PROMPTS[:4], max_new=30, temperature=3.0)
    assert {i for c in got for i in c.ids} == {0, 1, 2, 3, 4}


def test_bf16_weights_decode_what_the_bf16_forward_says(model):
    params = nnx.state(model)
    fast = Decoder(CONFIG, compute="bf16")
    nnx.update(fast, params)
    [got] = Sampler(fast, batch=4).generate([PROMPTS[5]], max_new=1)
    scores = nnx.jit(lambda m, ids: m.logits(m.hidden(ids)))(fast, jnp.asarray([PROMPTS[5]]))[0, -1]
    assert scores[got.ids[0]] > scores.max() - 0.1


@pytest.mark.parametrize("prompt, options", [([], {}), ([1] * 600, {}), ([1], {"max_new": 0}), ([1], {"stop_ids": range(17)})])
def test_what_does_not_fit_is_refused(sampler, prompt, options):
    with pytest.raises(UserError):
        sampler.generate([prompt], **{"max_new": 4, **options})


def draws(logits, temperature, top_p, n=4000):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, len(logits)))
    return np.asarray(sample(rows, jnp.arange(n, dtype=jnp.uint32), jnp.full(n, 3), jnp.full(n, temperature), jnp.full(n, top_p)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = np.log([0.5, 0.25, 0.125, 0.125]).repeat(100)  # 400 tokens: more than one block of the two-level sum
    wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    got = np.bincount(draws(logits, temperature, 1.0) // 100, minlength=4) / 4000
    np.testing.assert_allclose(got, wanted.reshape(4, 100).sum(1), atol=4 * np.sqrt(0.25 / 4000))


def test_rounding_never_draws_an_impossible_token(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(1 - 2**-24))
    logits = jnp.where(jnp.arange(700)[None] < 300, jax.random.normal(jax.random.key(0), (200, 700)), -1e30)
    got = sample(logits, jnp.zeros(200, jnp.uint32), jnp.arange(200), jnp.ones(200), jnp.ones(200))
    assert got.max() < 300


def test_top_p_keeps_the_smallest_set_that_reaches_its_mass():
    logits = np.log([0.05, 0.5, 0.3, 0.1, 0.05])
    assert set(draws(logits, 1.0, 0.75)) == {1, 2} and set(draws(logits, 1.0, 0.85)) == {1, 2, 3}
    assert set(draws(logits, 1.0, 0.0)) == {1} and set(draws(logits, 1.0, 1.0)) == {0, 1, 2, 3, 4}
    assert set(draws(logits, 0.0, 1.0)) == {1}
    assert set(draws([0.0, -1e30, -1e30], 1.0, 1.0, 200)) == {0}
