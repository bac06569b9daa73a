"""MinHash against exact Jaccard, and what is taken out of a stream of seeds."""

import random
import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datagen import code_seeds
from datagen.dedup import SHINGLE, Contamination, MinHash, Near, clean, grams, texts, words
from datagen.seeds import Seed
from evals import prompts

WORDS = [f"word{number}" for number in range(500)]
TEXT = " ".join(WORDS[:40])


def seed(text, *before):
    messages = [{"role": "system", "content": "be kind"}, *before, {"role": "user", "content": text}]
    return Seed(text[:9], messages, "s", "s")


def jaccard(a, b):
    return len(a & b) / len(a | b)


@given(st.sets(st.text(), min_size=1, max_size=60), st.sets(st.text(), max_size=60), st.sets(st.text(), max_size=60), st.integers(0, 9))
def test_a_signature_estimates_the_jaccard_similarity(common, one, other, number):
    a, b = ({hashed for text in common | own for hashed in grams([text], 1)} for own in (one, other))
    minhash = MinHash(functions=512, seed=number)
    estimate = np.mean(minhash.signature(a) == minhash.signature(b))
    assert abs(estimate - jaccard(a, b)) < 6 * (0.25 / 512) ** 0.5  # six standard deviations
    assert np.array_equal(minhash.signature(a), MinHash(512, seed=number).signature(a))


def test_signatures_are_unbiased_and_of_another_seed_differ():
    rng, minhash, errors = random.Random(0), MinHash(), []
    for _ in range(300):
        tokens = [rng.choice(WORDS) for _ in range(rng.randint(20, 80))]
        other = [rng.choice(WORDS) if rng.random() < 0.05 else token for token in tokens]
        a, b = grams(tokens, SHINGLE), grams(other, SHINGLE)
        errors.append(np.mean(minhash.signature(a) == minhash.signature(b)) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.012 and np.std(errors) < 0.07
    assert not np.array_equal(minhash.signature({1, 2}), MinHash(seed=1).signature({1, 2}))


def test_what_is_near_is_seen_and_what_is_far_is_not():
    rng, found = random.Random(1), {"near": [], "far": []}
    for _ in range(200):
        tokens = [rng.choice(WORDS) for _ in range(60)]
        changed = list(tokens)
        at = rng.randrange(5, 55)
        changed[at] = "other"
        similarity = jaccard(grams(tokens, SHINGLE), grams(changed, SHINGLE))  # 51 of 61 shingles: 0.84
        half = [*tokens[:40], *(rng.choice(WORDS) for _ in range(20))]
        assert similarity > 0.8 and jaccard(grams(tokens, SHINGLE), grams(half, SHINGLE)) < 0.55
        for name, text in (("near", changed), ("far", half)):
            before = Near()
            assert not before.seen(" ".join(tokens)) and before.seen(" ".join(tokens).upper() + "!")
            found[name].append(before.seen(" ".join(text)))
    assert np.mean(found["near"]) > 0.95 and np.mean(found["far"]) < 0.05


def test_short_texts_are_near_only_when_they_are_equal():
    before = Near()
    assert [before.seen(text) for text in ("fix it", "Fix it!", "fix this", "🙂", "🎉", "🙂", "你好", "")] == [
        False, True, False, False, False, True, False, False,
    ]  # fmt: skip


def test_a_shared_run_of_thirteen_words_is_contamination_and_twelve_are_not():
    held_out = Contamination([TEXT, "short one"])
    assert held_out.found("well, " + " ".join(WORDS[7:20]).upper() + "?") and not held_out.found(" ".join(WORDS[7:19]))
    assert held_out.found("Short one.") and not held_out.found("a short one") and not Contamination([]).found(TEXT)


def test_clean_streams_and_counts_what_it_leaves_out():
    taken, dropped = [], Counter()

    def stream():
        for text in (TEXT, TEXT + " more", "what is a tuple?", "What is a tuple", "the eval asks this"):
            taken.append(text)
            yield seed(text)

    cleaned = clean(stream(), ["The eval asks this."], dropped=dropped)
    assert taken == [] and next(cleaned).messages[-1]["content"] == TEXT and len(taken) == 1
    assert [s.messages[-1]["content"] for s in cleaned] == ["what is a tuple?"]
    assert dropped == {"near duplicate": 2, "stands in an eval set": 1}
    assert len(list(clean((seed(text) for text in taken), near=0))) == 5


def test_only_what_the_user_says_is_compared():
    before = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "ok " * 50}]
    assert len(list(clean([seed("and now?", *before), seed("then what?")]))) == 2


def test_texts_of_any_file_are_found_in_any_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"turns": ["one", {"deep": "two"}], "n": 3, "x": null}\n')
    (tmp_path / "b.txt").write_text("three\n")
    assert list(texts([tmp_path / "a.jsonl", tmp_path / "b.txt"])) == ["one", "two", "three"]
    assert words("It's A—b\n") == ["it", "s", "a", "b"]


def test_the_prompts_of_our_own_evals_are_held_out(monkeypatch):
    functions = code_seeds.read_code("package:email")  # of a package, because the whole standard library takes 2 s
    for module in (code_seeds, prompts):
        monkeypatch.setattr(module, "read_code", lambda source: functions)
    asked = [prompt.text for prompt in prompts.held_out(30)]
    held = Contamination(texts(["held-out"]))
    assert len(asked) == 30 and all(held.found(text) for text in asked) and not held.found("what is a tuple, and when would i want one?")


def test_memory_is_a_few_kilobytes_a_text():
    rng, before = random.Random(2), Near()
    tracemalloc.start()
    for _ in range(500):
        before.seen(" ".join(rng.choice(WORDS) for _ in range(200)))
    kept = tracemalloc.get_traced_memory()[0] / 500
    tracemalloc.stop()
    assert kept < 2500
