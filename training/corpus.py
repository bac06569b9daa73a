"""A directory of token ids as rows to train on: memory-mapped shards, and an index of rows packed by best fit.

`soulsmith data` writes it. A shard holds the documents' ids end to end, without `<|bos|>`, and where each begins. A row of T+1 tokens is made of
pieces, each `<|bos|>` and some tokens of one document; the index says which. It is built once per length. Batch k is then a pure function of
(seed, k): nothing is buffered, and the data position of a run is one integer.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from model.tokenizer import Tokenizer
from soul.console import console, plain
from soul.errors import UserError
from soul.files import read_json, write_atomic
from training.data import as_batch, permutation
from training.tokenizer import token_bytes, tokenizer_hash

FORMAT = 1


def pack(starts: Sequence[int], capacity: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Pieces (first token, count) in the order of rows, and where each row begins in them (and the last one ends).

    Document d is tokens starts[d]:starts[d+1]; a piece takes count + 1 places of a row, and every row is full: capacity tokens. What is longer than
    a row fills rows of its own first. Then the largest piece that fits is placed; when none fits, the largest there is is cropped to fill the row.
    Best fit with cropping is nanochat's, which drops what is cropped off; here that returns as a piece with a `<|bos|>` of its own, because documents
    of code are long: of the standard library, rows of 513 would keep 11 % of the tokens, rows of 2,049 31 %. Only what is left over for the last
    row, which it cannot fill, is never used.
    """
    shelves: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]  # pieces by the places they take
    stocked = 0  # bit n: shelf n has a piece; so a pick costs a few machine words, however many pieces there are
    pieces: list[tuple[int, int]] = []
    rows = [0]
    for start, end in pairwise(starts):
        while end - start >= capacity:
            pieces.append((start, capacity - 1))
            rows.append(len(pieces))
            start += capacity - 1
        if end > start:
            shelves[end - start + 1].append((start, end - start))
            stocked |= 1 << (end - start + 1)
    room = capacity
    while stocked:
        fitting = stocked & ((1 << (room + 1)) - 1)
        size = (fitting or stocked).bit_length() - 1
        start, count = shelves[size].pop()
        if not shelves[size]:
            stocked ^= 1 << size
        take = min(count, room - 1)
        pieces.append((start, take))
        room -= take + 1
        if take < count:
            shelves[count - take + 1].append((start + take, count - take))
            stocked |= 1 << (count - take + 1)
        if not room:
            rows.append(len(pieces))
            room = capacity
    return pieces[: rows[-1]], rows


@dataclass(frozen=True)
class Shard:
    """Ids of documents end to end, and `starts` (documents + 1) of where each begins; both memory-mapped."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def open(cls, directory: Path, name: str, tokens: int) -> "Shard":
        ids, starts = (_mapped(directory / f"{name}.{part}.npy") for part in ("ids", "starts"))
        if len(ids) != tokens or starts[-1:].tolist() != [tokens]:
            raise UserError(f"holds {len(ids)} tokens, not the {tokens} of the card", where=directory / name, fix="Make the data again.")
        return cls(ids, starts)


@dataclass(frozen=True)
class Corpus:
    """A directory that `soulsmith data` wrote, in rows of `length` + 1 tokens. `hash` is the identity of tokenizer and data."""

    directory: Path
    length: int
    tokenizer: Tokenizer
    tokenizer_hash: str
    hash: str
    tokens: int
    bytes: int
    card: dict
    shards: list[Shard]
    pieces: np.ndarray  # (pieces, 3) uint32: shard, first token, count
    row_starts: np.ndarray  # (rows + 1) int64

    @classmethod
    def open(cls, directory: str | Path, length: int) -> "Corpus":
        """Map the shards, and the index of rows (built at the first opening).
        Raises UserError for a directory without finished data, changed files, another tokenizer, or too few tokens for one row.
        """
        directory = Path(directory)
        if not (directory / "card.json").is_file():
            raise UserError("holds no finished data", where=directory, fix=f"Run `soulsmith data --out {directory}`.")
        card, tokenizer = read_json(directory / "card.json"), Tokenizer.load(directory)
        try:
            same = card["tokenizer"] == tokenizer_hash(tokenizer) and card["format"] == FORMAT
            shards = [Shard.open(directory, name, shard["tokens"]) for name, shard in card["shards"].items()]
            pieces, row_starts = _index(directory, card["hash"], shards, length)
            facts = [card[key] for key in ("tokenizer", "hash", "tokens", "bytes")]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"is damaged ({error})", where=directory / "card.json", fix="Make the data again.") from None
        if not same:
            raise UserError("was not made with the tokenizer beside it", where=directory / "card.json", fix="Make the data again.")
        if len(row_starts) < 2:
            raise UserError(f"has fewer than {length + 1} tokens", where=directory, fix="Give more data, or a smaller length.")
        return cls(directory, length, tokenizer, *facts, card, shards, pieces, row_starts)

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """V int32: bytes of text of each id, 0 for control ids."""
        return token_bytes(self.tokenizer)

    def batch(self, k: int, rows: int, seed: int) -> dict[str, np.ndarray]:
        """ids (rows × T), targets and weights (rows·T) of batch k: rows k·rows and on of the endless sequence of permuted epochs."""
        tokens = np.empty((rows, self.length + 1), np.int32)
        for i in range(rows):
            epoch, at = divmod(k * rows + i, self.rows)
            row = _order(seed, epoch, self.rows)[at]
            _fill(tokens[i], self.pieces[self.row_starts[row] : self.row_starts[row + 1]], self.shards, self.tokenizer)
        return as_batch(tokens, rows)

    @cached_property
    def validation(self) -> dict[str, np.ndarray]:
        """`packed` rows of each source's held-out documents."""
        return {source: packed(documents, self.length, self.tokenizer) for source, documents in self.held_out.items()}

    @cached_property
    def held_out(self) -> dict[str, list[np.ndarray]]:
        """The ids of each held-out document, by source; `tokenizer.decode_bytes` gives its text back byte for byte."""
        card = self.card["validation"]
        shard, first, out = Shard.open(self.directory, "validation", card["tokens"]), 0, {}
        for source, counts in card["sources"].items():
            bounds = shard.starts[first : first + counts["documents"] + 1]
            out[source] = [shard.ids[a:b] for a, b in pairwise(bounds)]
            first += counts["documents"]
        return out


def packed(documents: Sequence[np.ndarray], length: int, tokenizer: Tokenizer) -> np.ndarray:
    """Rows (n, length + 1) int32 of documents' ids, packed as a corpus is: every token once, but for the last partial row."""
    starts = np.cumsum([0, *map(len, documents)])
    pieces, bounds = pack(starts.tolist(), length + 1)
    rows, shard = np.empty((len(bounds) - 1, length + 1), np.int32), Shard(np.concatenate(documents), starts)
    for row, (first, end) in zip(rows, pairwise(bounds)):
        _fill(row, [(0, *piece) for piece in pieces[first:end]], [shard], tokenizer)
    return rows


def save_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()  # np.save into a file says nothing of a full disk but "0 written"
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())  # not getbuffer(): Python 3.12.1 crashes collecting one that an exception kept alive


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"is missing or damaged ({error})", where=path, fix="Make the data again.") from None


def _fill(row: np.ndarray, pieces: Sequence[Sequence[int]], shards: list[Shard], tokenizer: Tokenizer) -> None:
    at, bos = 0, tokenizer.special["<|bos|>"]
    for shard, first, count in np.asarray(pieces, np.int64):
        row[at] = bos
        row[at + 1 : at + 1 + count] = shards[shard].ids[first : first + count]
        at += 1 + count
    if row.max() >= tokenizer.vocab_size:  # the model would take it for its last id, silently
        raise UserError(f"the data has the id {row.max()}, beyond its tokenizer's {tokenizer.vocab_size}", fix="Make the data again.")


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return permutation((seed, epoch), rows)


def _index(directory: Path, data: str, shards: list[Shard], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces and row starts for this data and length, from their files or new."""
    key = hashlib.sha256(f"{FORMAT} {data} {length}".encode()).hexdigest()[:12]
    files = [directory / f"rows-{length}-{key}.{part}.npy" for part in ("pieces", "starts")]
    if not all(map(Path.is_file, files)):
        pieces, row_starts, cut = [np.empty((0, 3), np.uint32)], [np.zeros(1, np.int64)], 0
        for number, shard in enumerate(shards):
            spans, rows = pack(shard.starts.tolist(), length + 1)
            spans = np.array(spans, np.uint32).reshape(-1, 2)
            cut += spans[~np.isin(spans[:, 0], shard.starts), 1].sum()
            row_starts.append(np.array(rows[1:], np.int64) + sum(map(len, pieces)))
            pieces.append(np.insert(spans, 0, number, axis=1))
        for file, parts in zip(files, (pieces, row_starts)):
            save_array(file, np.concatenate(parts))
        behind = f"{cut / max(1, sum(int(p[:, 2].sum()) for p in pieces)):.0%} of the tokens stand behind a cut in their document"
        console.print(plain(f"packed {sum(map(len, row_starts)) - 1:,} rows of {length + 1} tokens; {behind}"))
    return _mapped(files[0]), _mapped(files[1])
