"""The shortcuts that pairs could teach: found when they are there, and not when they aren't."""

import random
import tracemalloc

import pytest

from datagen.hygiene import LEAST, WARN, Hygiene
from soul.spec import parse_soul

SOUL = parse_soul("# m\n\n## Principles\n\n- is short. <!-- id: short -->\n- is warm. <!-- id: warm -->\n- is calm. <!-- id: calm -->\n")
WORDS = [f"word{number}" for number in range(300)]


def text(rng, least=20, most=40):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def row(number, chosen, rejected, principles=(), request="hello"):
    sides = {"prompt": f"{request} {number}", "chosen": chosen, "rejected": rejected}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {"id": f"s{number}", "principles": list(principles)} | {k: [{"role": roles[k], "content": v}] for k, v in sides.items()}


def report(rows, **more):
    hygiene = Hygiene(SOUL, **more)
    for each in rows:
        hygiene.add(each)
    return hygiene.report()


def pairs(n, chosen=lambda rng: text(rng), rejected=lambda rng: text(rng), **more):
    rng = random.Random(0)
    return [row(number, chosen(rng), rejected(rng), **more) for number in range(n)]


def test_pairs_alike_in_all_but_meaning_raise_no_alarm():
    found = report(pairs(600))
    assert abs(found["length_probe"] - 0.5) < 0.1 and abs(found["word_probe"] - 0.5) < 0.1
    assert found["warnings"] == [] and found["leaks"] == {} and found["equal"] == 0
    assert 0.8 < found["length_ratio"] < 1.25 and 0.4 < found["chosen_longer"] < 0.6


@pytest.mark.parametrize("longer, share", [(True, 1.0), (False, 0.0)])
def test_length_alone_is_caught_in_either_direction(longer, share):
    sides = [lambda rng: text(rng, 41, 60), lambda rng: text(rng)][:: 1 if longer else -1]
    found = report(pairs(100, *sides))
    assert found["length_probe"] == 1.0 and found["chosen_longer"] == share and (found["length_ratio"] > 1.2) is longer
    assert any(line.startswith("length alone tells") and "Else balance them" in line for line in found["warnings"])


def test_a_telling_word_is_caught_and_named():
    found = report(pairs(100, lambda rng: "Ahoy, " + text(rng), lambda rng: text(rng) + " sir"))
    assert found["word_probe"] > 0.97 and found["telling_words"] == {"chosen": ["ahoy", ","], "rejected": ["sir"]}
    assert any(line.startswith("words alone tell") for line in found["warnings"])
    some = report(pairs(400, lambda rng: ("ahoy " if rng.random() < 0.3 else "") + text(rng)))
    assert 0.55 < some["word_probe"] < WARN and not some["warnings"]  # a habit of some replies is no alarm


def test_the_probes_are_tested_on_prompts_that_they_have_not_seen():
    rng = random.Random(3)
    once = [(text(rng), text(rng)) for _ in range(120)]
    found = report([row(number // 5, *once[number // 5]) for number in range(600)])
    assert abs(found["word_probe"] - 0.5) < 0.2  # five copies of each pair, all in one fold


def test_too_few_pairs_are_not_judged_and_none_have_no_report():
    found = report(pairs(LEAST - 1, lambda rng: "ahoy " * 99))
    assert found["length_probe"] is None and found["word_probe"] is None and found["warnings"] == []
    assert report([]) is None
    same = report(pairs(50, lambda rng: "x", lambda rng: "x"))
    assert (same["equal"], same["word_probe"], same["length_probe"], same["shared_prefix"]) == (50, 0.5, 0.5, 1.0)
    assert [line.split(".")[0] for line in same["warnings"]] == ["100% of the pairs share their first 5 words", "50 pairs have equal sides"]


def test_leaks_of_chosen_replies_are_counted_and_told():
    rows = [
        row(1, "Sorry, here it is.", "x"),
        row(2, "the revised reply: hi", "x"),
        row(3, "as [short] says, hi", "x"),
        row(4, "fine.", "Sorry!"),
        row(5, "my apologies to the boss.", "x", request="write an apology: my apologies"),
    ]
    found = report(rows)
    assert found["leaks"] == {"apologises": 1, "speaks of a revision": 1, "recites the rules": 1}
    assert [line.split(" ")[0] for line in found["warnings"]] == ["1", "2"]


def test_margins_say_on_how_many_principles_a_pair_differs():
    rows = [row(1, "a", "b", ["short"]), row(2, "a", "b", ["short", "warm"]), row(3, "a", "b"), row(4, "a", "b", ["short", "warm"])]
    found = report(rows)
    assert found["margins"] == {0: 1, 1: 1, 2: 2}
    assert found["principle_margins"] == {"short": {"median": 2, "alone": 1}, "warm": {"median": 2.0, "alone": 0}}


def test_the_sample_is_drawn_from_all_pairs_and_is_the_same_again():
    rows = [row(number, "a " * (1 + number // 500), "b") for number in range(1000)]
    found = report(rows, limit=100)
    assert (found["pairs"], found["sample"]) == (1000, 100) and 0.35 < found["chosen_longer"] < 0.65
    assert report(rows, limit=100) == found != report(rows, limit=100, seed=1)


def test_memory_does_not_grow_with_the_pairs():
    rng, hygiene, sizes = random.Random(0), Hygiene(SOUL, limit=200), []
    tracemalloc.start()
    for number in range(4000):
        hygiene.add(row(number, text(rng), text(rng)))
        if number in (999, 3999):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < 1.1 * sizes[0]
