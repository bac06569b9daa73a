"""Rows to batches: tokenised examples, best-fit packing, and batch k as a pure function of (seed, k).

A row holds T tokens of one or more examples. `segments` numbers them from 1 (0 is padding), `positions` restarts in each, and attention
stays inside a segment, so a packed row gives the same loss and gradients as its examples one by one.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from soul import rows as row_files
from soul.errors import UserError
from soul.template import Template

PACKING = "random order"  # a run's identity has it: another version must not go on with other batches
CHUNK = 256  # supervised positions are padded to a multiple of what the head computes at once


@dataclass(frozen=True)
class Example:
    """One sequence: `ids` and `mask` (1 = trained), and the row that it came from."""

    ids: np.ndarray
    mask: np.ndarray
    row: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        return int(self.mask.sum())

    @property
    def branches(self) -> tuple["Example", ...]:
        return (self,)


@dataclass(frozen=True)
class Pair:
    """Both branches, encoded whole; their first `prompt` tokens are the prompt's."""

    chosen: Example
    rejected: Example
    prompt: int

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def branches(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected


def load_rows(paths: Sequence[Path], kind: str) -> list[dict]:
    """Rows of every file, in order. Raises UserError for a file of the other kind, and when no file has a row."""
    found = []
    for path in paths:
        rows = row_files.read_rows(path)
        if rows and row_files.kind_of(rows) != kind:
            raise UserError(f"holds {row_files.kind_of(rows)} rows, not {kind} rows", where=path)
        found += rows
    if not found:
        raise UserError("no rows to train on", where=", ".join(map(str, paths)))
    return found


def example(template: Template, messages: list[dict], row: str = "") -> Example:
    try:
        encoded = template.encode(messages)
    except ValueError as error:
        raise UserError(f"cannot be rendered: {error}", where=f"row {row}") from None
    return Example(np.asarray(encoded.ids, np.int32), np.asarray(encoded.mask, np.int32), row)


def pair(template: Template, row: dict) -> Pair:
    """Encode prompt + chosen and prompt + rejected. Raises UserError when their ids don't begin with the prompt's.

    The mask of a branch covers its reply only: what the prompt's assistant turns say is common to both and cancels.
    """
    prompt = example(template, row["prompt"], row["id"])
    branches = []
    for name in ("chosen", "rejected"):
        branch = example(template, [*row["prompt"], *row[name]], row["id"])
        if not np.array_equal(branch.ids[: len(prompt)], prompt.ids):
            raise UserError(f"the {name} branch does not begin with the prompt's tokens", where=f"row {row['id']}")
        branches.append(Example(branch.ids, np.where(np.arange(len(branch)) < len(prompt), 0, branch.mask), branch.row))
    return Pair(*branches, len(prompt))


def unframed(template: Template, item: Pair) -> Pair:
    """The pair with no weight on control tokens of its rejected branch: it is rejected for its words, and its calls and ends are well formed.

    Against a call that was not needed, plain DPO unlearns how a call ends (`docs/preference.md`).
    """
    rejected = item.rejected
    words = ~np.isin(rejected.ids, list(template.id.values()))
    return replace(item, rejected=replace(rejected, mask=rejected.mask * words))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices grouped so that each group's lengths sum to at most `capacity`: in the order given, each into the fullest group that holds it."""
    groups: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in range(len(lengths)):
        at = bisect_left(space, (lengths[index], -1))
        room, group = space.pop(at) if at < len(space) else (capacity, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        entry = (room - lengths[index], group)
        space.insert(bisect_left(space, entry), entry)
    return groups


@dataclass(frozen=True)
class Packed:
    """Examples or pairs packed into units; a unit is one row, or for pairs two: every chosen branch, every rejected.

    Units are grouped into fixed blocks of `per_batch` once (by the seed) and blocks are permuted each epoch. So a block meets the compiled
    program always with the same neighbours, which is what lets reference log-probs be compared with the policy's bit for bit.
    """

    items: list[Example] | list[Pair]
    length: int
    per_batch: int
    seed: int
    dropped: int = 0
    least: int = 0
    """`supervised` is at least this, so that held-out data is read by the program that was compiled for the training data."""

    @classmethod
    def build(cls, items: list, length: int, per_batch: int, seed: int, least: int = 0) -> "Packed":
        """Drop what is longer than `length` (counted, never cut). Raises UserError when nothing is left."""
        kept = [item for item in items if len(item) <= length]
        if not kept:
            raise UserError(f"all {len(items)} rows are longer than {length} tokens", fix="Raise --length.")
        return cls(kept, length, per_batch, seed, len(items) - len(kept), least)

    @property
    def paired(self) -> bool:
        return isinstance(self.items[0], Pair)

    @cached_property
    def blocks(self) -> list[list[list[int]]]:
        # not longest first, as best fit is mostly done: that puts rows of a kind beside each other, and two thirds of the quickstart's steps
        # saw calls alone, so that its model never learned when not to call. Random order fills 99.0 % of the rows instead of 99.6
        mixed = permutation((self.seed, len(self.items)), len(self.items)).tolist()
        units = [[mixed[i] for i in unit] for unit in best_fit([len(self.items[i]) for i in mixed], self.length)]
        order = permutation((self.seed,), len(units))
        return [[units[i] for i in order[at : at + self.per_batch]] for at in range(0, len(units), self.per_batch)]

    @cached_property
    def supervised(self) -> int:
        """The static number of supervised positions: the most of any block, padded, so that one program serves all."""
        most = max(sum(branch.trained for unit in block for i in unit for branch in self.items[i].branches) for block in self.blocks)
        return max(self.least, -(-most // CHUNK) * CHUNK)

    @cached_property
    def pairs(self) -> int:
        return max(sum(map(len, block)) for block in self.blocks)

    @cached_property
    def tokens(self) -> int:
        return sum(len(branch) for item in self.items for branch in item.branches)

    @property
    def rows(self) -> int:
        return sum(map(len, self.blocks)) * len(self.items[0].branches)

    def block_of(self, k: int) -> int:
        """The block that is batch k: position k in the endless sequence of permuted epochs."""
        epoch, at = divmod(k, len(self.blocks))
        return int(permutation((self.seed, epoch), len(self.blocks))[at])

    def batch(self, k: int) -> dict[str, np.ndarray]:
        return self.block(self.block_of(k))

    def block(self, number: int) -> dict[str, np.ndarray]:
        """Arrays of one block: ids, positions, segments (B×T); at, targets, weights (N); for pairs also branch (N) and real (P).

        `at[n]` is the flattened position whose hidden state predicts `targets[n]`. `branch[n]` is the pair's number for its chosen branch,
        number + P for its rejected one, 2P for padding. `index` numbers the pairs in `items`.
        """
        block = self.blocks[number]
        rows = [row for unit in block for row in zip(*(self.items[i].branches for i in unit))]
        batch = _arrays(rows, self.length, self.per_batch * len(self.items[0].branches), self.supervised)
        if not self.paired:
            return batch
        order, numbers = [i for unit in block for i in unit], []
        slot = {i: n for n, i in enumerate(order)}
        for unit in block:
            for side in (0, 1):
                for i in unit:
                    numbers += [slot[i] + side * self.pairs] * self.items[i].branches[side].trained
        batch["branch"] = _padded(numbers, self.supervised, 2 * self.pairs)
        batch["real"] = _padded([1] * len(order), self.pairs).astype(np.float32)
        batch["index"] = _padded(order, self.pairs, -1)
        return batch


def _arrays(rows: Sequence[Sequence[Example]], length: int, count: int, supervised: int) -> dict[str, np.ndarray]:
    ids, positions, segments = (np.zeros((count, length), np.int32) for _ in range(3))
    at, targets = [], []
    for r, row in enumerate(rows):
        start = 0
        for s, item in enumerate(row):
            span = slice(start, start + len(item))
            ids[r, span], positions[r, span], segments[r, span] = item.ids, np.arange(len(item)), s + 1
            where = np.flatnonzero(item.mask)
            at.append(r * length + start + where - 1)
            targets.append(item.ids[where])
            start += len(item)
    n = sum(map(len, at))
    return {
        "ids": ids, "positions": positions, "segments": segments,
        "at": _padded(np.concatenate(at), supervised), "targets": _padded(np.concatenate(targets), supervised),
        "weights": _padded([1] * n, supervised).astype(np.float32),
    }  # fmt: skip


def as_batch(rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Rows n×(T+1) as a pretraining batch of `size` rows: ids size×T, targets and weights (size·T). Those beyond n have weight 0."""
    filled = np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), rows.dtype)]).astype(np.int32)
    weights = np.repeat(np.arange(size) < len(rows), rows.shape[1] - 1).astype(np.float32)
    return {"ids": filled[:, :-1], "targets": filled[:, 1:].reshape(-1), "weights": weights}


def _padded(values: Sequence[int], size: int, fill: int = 0) -> np.ndarray:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out


def permutation(key: tuple[int, ...], n: int) -> np.ndarray:
    """Philox is specified: the order survives versions of numpy, processes and platforms."""
    return np.argsort(np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(n), kind="stable")
