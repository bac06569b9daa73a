"""Near duplicates by MinHash and contamination by n-grams, over a stream of seeds; only hashes are kept.

MinHash (Broder 1997) over word 5-gram shingles: the share of equal positions in two signatures estimates the Jaccard
similarity of the texts. LSH finds candidates: signatures are cut into 16 bands of 4, and two texts of similarity 0.7 agree
in some band with probability 0.99, two of similarity 0.3 with 0.12; candidates are then compared by whole signatures.
About 2 KB are kept per text.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from datagen.seeds import Seed, read_rows

SHINGLE = 5  # words
GRAM = 13  # words; the length at which GPT-3's authors called a run of text contaminated
BANDS, ROWS = 16, 4
NEAR = 0.7  # Jaccard similarity of shingles above which two requests count as one


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold()) or [text.strip()]  # emoji are no words, but not all the same


def grams(tokens: list[str], n: int) -> set[int]:
    """64-bit hashes of all runs of n words; of the whole text when it is shorter."""
    runs = (tokens[start : start + n] for start in range(max(1, len(tokens) - n + 1)))
    return {int.from_bytes(hashlib.blake2b("\0".join(run).encode("utf-8", "surrogatepass"), digest_size=8).digest()) for run in runs}


class MinHash:
    """Signatures of sets of 64-bit hashes, by the `seed` of their hash functions.

    The functions are multiply-shift (Dietzfelbinger 1997): the upper half of a·x + b mod 2^64 with odd a. They are good enough
    because the hashes are random already; of small integers they would give a biased estimate.
    """

    def __init__(self, functions: int = BANDS * ROWS, seed: int = 0):
        draw = np.random.default_rng(seed).integers(0, 2**63, (2, functions), dtype=np.uint64)
        self._a, self._b = draw[0] * np.uint64(2) + np.uint64(1), draw[1]

    def signature(self, hashes: set[int]) -> np.ndarray:
        """(functions,) uint32: the least value of each function over the set."""
        x_n1 = np.fromiter(hashes, np.uint64, len(hashes))[:, None]
        return ((x_n1 * self._a + self._b) >> np.uint64(32)).min(axis=0).astype(np.uint32)


class Near:
    """The texts seen so far: `seen(text)` says whether one as similar as `threshold` was, and remembers it if not."""

    def __init__(self, threshold: float = NEAR):
        self.threshold, self._minhash = threshold, MinHash()
        self._bands: dict[int, int] = {}  # a band's values and number, hashed -> the first text that has them
        self._kept: list[bytes] = []

    def seen(self, text: str) -> bool:
        signature = self._minhash.signature(grams(words(text), SHINGLE))
        keys = [hash((band, *signature[band * ROWS : (band + 1) * ROWS].tolist())) for band in range(BANDS)]  # ints: the same everywhere
        for candidate in {self._bands[key] for key in keys if key in self._bands}:
            if np.mean(np.frombuffer(self._kept[candidate], np.uint32) == signature) >= self.threshold:
                return True
        for key in keys:
            self._bands.setdefault(key, len(self._kept))
        self._kept.append(signature.tobytes())
        return False


class Contamination:
    """Texts that training must not see: `found(text)` says whether it shares a run of 13 words with any, or is one of them."""

    def __init__(self, texts: Iterable[str]):
        self._hashes: set[int] = set()
        for text in texts:
            self._hashes |= grams(words(text), GRAM)

    def found(self, text: str) -> bool:
        return not self._hashes.isdisjoint(grams(words(text), GRAM))


def clean(seeds: Iterable[Seed], against: Iterable[str] = (), *, near: float = NEAR, dropped: Counter | None = None) -> Iterator[Seed]:
    """The seeds without near duplicates of earlier ones (`near` = 0 leaves them in) and without what stands in `against` (texts
    of eval sets, see `texts`), as a stream. What is left out is counted by reason in `dropped`."""
    held_out, before = Contamination(against), Near(near)
    for seed in seeds:
        text = "\n".join(message["content"] for message in seed.messages if message["role"] == "user")
        reason = "stands in an eval set" if held_out.found(text) else "near duplicate" if near and before.seen(text) else ""
        if not reason:
            yield seed
        elif dropped is not None:
            dropped[reason] += 1


def texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Every text in the rows of files that seeds could come from, whatever its column; of `held-out`, the prompts of our own
    evals. Raises UserError as `read_seeds` does."""
    for path in paths:
        if str(path) == "held-out":
            yield from _held_out()
            continue
        for _, row in read_rows(path):
            yield from _strings(row)


def _held_out(n: int = 600) -> Iterator[str]:
    """The first n tasks and n prompts without one that evals draw from with seed 0; they ask 75 unless told."""
    from datagen.code_seeds import read_code, split
    from datagen.from_code import held_out_tasks
    from datagen.talk import held_out_talk

    _, functions = split(read_code("stdlib"))
    yield from (task.request for task in held_out_tasks(functions, n))
    yield from (row["prompt"] for row in held_out_talk(functions, n))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
