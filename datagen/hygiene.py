"""Pair hygiene: what a model could learn from chosen and rejected instead of what the SOUL asks for.

Two probes guess which side of a pair was chosen, trained on four fifths of the seeds and tested on the rest: one sees only the
lengths, one only which words occur, in any case and order. DPO takes such a shortcut if there is one.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

import numpy as np

from datagen.critique import gives_itself_away
from soul.spec import Soul

SAMPLE = 5_000  # pairs looked at: shares are then good to 0.01, in 1 to 3 s
PREFIX = 5  # words
FOLDS = 5
LEAST = 40  # pairs; with fewer a probe says nothing
# By chance a probe is right in 0.50 of n pairs, give or take 0.5/sqrt(n). On pairs that people and judges made (2,312 of hh-rlhf's
# harmless test set, 300 of a mixed DPO set) length gets 0.56 and 0.57, words 0.62 and 0.65: 0.75 is a shortcut that those have not.
WARN = 0.75
ADVICE = {
    "length": "If the SOUL asks for short replies, some of it is meant. Else balance them: more samples per request, or drop the most "
    "uneven pairs.",
    "words": "Read the telling words: those that the SOUL asks for are the signal. For others, name them in a forbid check, or write both "
    "sides with one teacher.",
    "apologises": "Chosen replies that apologise teach apology for a mistake that nobody saw: add a no_apology check.",
    "leaks": "Chosen replies that speak of their own revision: edit prompts/revise.j2, or drop them.",
    "prefix": "Most pairs begin alike: DPO gets its signal late in the reply. Write the sides independently.",
    "equal": "Pairs whose sides are equal have no signal: drop them.",
}


class Hygiene:
    """Takes preference rows one at a time and keeps a sample of them, drawn by `seed`, so that memory does not grow."""

    def __init__(self, soul: Soul, limit: int = SAMPLE, seed: int = 0):
        self.ids, self.limit, self.seen = [principle.id for principle in soul.principles], limit, 0
        self._random, self._pairs = random.Random(seed), []

    def add(self, row: dict) -> None:
        self.seen += 1
        at = len(self._pairs) if len(self._pairs) < self.limit else self._random.randrange(self.seen)
        if at < self.limit:
            sides = tuple("\n".join(message["content"] for message in row[side]) for side in ("prompt", "chosen", "rejected"))
            self._pairs[at : at + 1] = [(*sides, tuple(row.get("principles") or ()))]

    def report(self) -> dict | None:
        """Leaks and likenesses as counts and shares of the sample, the probes' accuracies, and `warnings`; None without pairs."""
        if not self._pairs:
            return None
        prompts, chosen, rejected, touched = zip(*self._pairs, strict=True)
        lengths = np.array([[len(a.split()), len(b.split())] for a, b in zip(chosen, rejected, strict=True)], float)
        leaks = Counter(why for request, text in zip(prompts, chosen, strict=True) if (why := gives_itself_away(text, request, self.ids)))
        starts = [a.split()[:PREFIX] == b.split()[:PREFIX] for a, b in zip(chosen, rejected, strict=True)]
        folds = np.array([zlib.crc32(prompt.encode("utf-8", "replace")) % FOLDS for prompt in prompts])  # one prompt, one fold
        probe, telling = word_probe(chosen, rejected, folds)
        found = {
            "pairs": self.seen,
            "sample": len(self._pairs),
            "length_ratio": round(float(np.median(lengths[:, 0].clip(1) / lengths[:, 1].clip(1))), 3),
            "chosen_longer": round(float(np.mean(lengths[:, 0] > lengths[:, 1])), 3),
            "equal": sum(a == b for a, b in zip(chosen, rejected, strict=True)),
            "shared_prefix": round(mean(starts), 3),
            "leaks": dict(leaks.most_common()),
            "length_probe": length_probe(lengths, folds),
            "word_probe": probe,
            "telling_words": telling,
            "margins": dict(sorted(Counter(map(len, touched)).items())),
            "principle_margins": self._margins(touched),
        }
        return found | {"warnings": warnings(found)}

    def _margins(self, touched: Sequence[tuple]) -> dict:
        sizes = {name: [len(names) for names in touched if name in names] for name in self.ids}
        return {name: {"median": median(found), "alone": found.count(1)} for name, found in sizes.items() if found}


def warnings(found: dict) -> list[str]:
    """A line for each thing that would teach a shortcut, with what to do."""
    leaks = {why: count for why, count in found["leaks"].items() if why != "apologises"}
    said = [
        ("length", (found["length_probe"] or 0) > WARN, f"length alone tells the sides apart in {found['length_probe']} of the pairs."),
        ("words", (found["word_probe"] or 0) > WARN, f"words alone tell the sides apart in {found['word_probe']} of the pairs."),
        ("apologises", "apologises" in found["leaks"], f"{found['leaks'].get('apologises')} chosen replies apologise."),
        ("leaks", bool(leaks), f"{sum(leaks.values())} chosen replies give themselves away ({', '.join(leaks)})."),
        ("prefix", found["shared_prefix"] > 0.5, f"{found['shared_prefix']:.0%} of the pairs share their first {PREFIX} words."),
        ("equal", found["equal"] > 0, f"{found['equal']} pairs have equal sides."),
    ]
    return [f"{what} {ADVICE[name]}" for name, so, what in said if so]


def length_probe(lengths: np.ndarray, folds: np.ndarray) -> float | None:
    """Accuracy of "the longer one" or "the shorter one", whichever held on the other folds. lengths: (pairs, 2) words."""
    sign = np.sign(lengths[:, 0] - lengths[:, 1])
    rights = [(np.sign(sign[folds != fold].sum() or 1) * sign[folds == fold] + 1) / 2 for fold in range(FOLDS)]
    return round(float(np.concatenate(rights).mean()), 3) if len(sign) >= LEAST else None


def word_probe(chosen: tuple[str, ...], rejected: tuple[str, ...], folds: np.ndarray) -> tuple[float | None, dict[str, list[str]]]:
    """(accuracy, telling words of each side) of a naive Bayes probe: a pair's score is the sum of the log-odds of the words
    that stand on one side only. Odds are add-one smoothed shares of pairs."""
    if len(chosen) < LEAST:
        return None, {}
    vocabulary: dict[str, int] = {}
    ids, signs, pairs = [], [], []
    for number, texts in enumerate(zip(chosen, rejected, strict=True)):
        a, b = (set(re.findall(r"\w+|[^\w\s]", text.casefold())) for text in texts)
        for sign, only in ((1, a - b), (-1, b - a)):
            ids += [vocabulary.setdefault(word, len(vocabulary)) for word in sorted(only)]
            signs += [sign] * len(only)
            pairs += [number] * len(only)
    word_k, sign_k, pair_k = np.array(ids, int), np.array(signs, int), np.array(pairs, int)

    def counts(keep_k: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(word_k[keep_k & (sign_k == sign)], minlength=len(vocabulary)) for sign in (1, -1)])

    score = np.zeros(len(chosen))
    for fold in range(FOLDS):
        test_k = folds[pair_k] == fold
        up_v, down_v = counts(~test_k) + 1
        score += np.bincount(pair_k[test_k], (np.log(up_v / down_v)[word_k] * sign_k)[test_k], minlength=len(chosen))
    up_v, down_v = counts(np.ones(len(word_k), bool))
    surprise_v = (up_v - down_v) / np.sqrt(up_v + down_v + 1)  # in standard deviations of a word that prefers no side
    words, order = list(vocabulary), np.argsort(surprise_v, kind="stable")
    telling = {
        "chosen": [words[i] for i in order[::-1][:8] if surprise_v[i] > 3],
        "rejected": [words[i] for i in order[:8] if surprise_v[i] < -3],
    }
    return round(float(np.mean((np.sign(score.round(9)) + 1) / 2)), 3), telling
