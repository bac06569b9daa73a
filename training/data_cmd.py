"""`soulsmith data`: documents to shards of token ids, with a held-out part and a card, which `training.corpus` reads.

Everything is a function of sources and settings, so an interrupted run reads the stream again and only encodes what is not there yet: a shard counts
when its .json, which is written last, is there, and names the hash of the documents that are due.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from textwrap import dedent

import numpy as np

from model.tokenizer import Tokenizer
from soul.console import console, plain, progress
from soul.errors import UserError
from soul.files import read_json, sha256_json, write_atomic, write_json
from training.corpus import FORMAT, save_array
from training.sources import DEFAULT, Document, Source, mixture, parse_sources
from training.tokenizer import TOKENIZER_BYTES, capped, load_tokenizer, say, tokenizer_hash, train_tokenizer, up_to

SHARD_BYTES = 1 << 26  # of text, about 16M tokens
BATCH_BYTES = 1 << 20  # encoded at once
SIZE = attrgetter("size")
_TOTALS = {"documents": 0, "tokens": 0, "bytes": 0}


@dataclass(frozen=True)
class Config:
    """Tokenize documents for pretraining; `soulsmith pretrain --data OUT` reads the result."""

    out: Path
    """Directory for the shards, tokenizer.json and the card."""
    data: tuple[str, ...] = DEFAULT
    """Sources: a preset, a file or folder, or hf:NAME[:CONFIG][:SPLIT][@COLUMN]; with =WEIGHT on each, shares of the bytes."""
    column: str | None = None
    """The column of the rows' text; without it, text or content."""
    tokenizer: str | None = None
    """A directory with a tokenizer.json, or a model; without it, one is trained on these sources."""
    vocab_size: int = 32768
    """Ids of the tokenizer that is trained."""
    max_bytes: int = 1_000_000_000
    """Stop after so many bytes of text."""
    workers: int = 0
    """Threads that encode; 0 for one per core."""


def main(config: Config) -> int:
    if config.workers:
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # the Rust core reads it when it first encodes
    sources = parse_sources(config.data, config.column)
    settings = {"sources": [asdict(s) for s in sources], "max_bytes": config.max_bytes, "tokenizer": config.tokenizer or config.vocab_size}
    for left_over in config.out.glob(".*.tmp"):  # of a killed run
        left_over.unlink()
    total, tokenizer = _begin(config, sources, settings)
    counts, held_out = Counter(), {source.name: [] for source in sources}
    stream = _to_train(mixture(sources, config.max_bytes, counts), held_out)
    shards: dict[str, dict] = {}
    with progress("tokenizing", total, "MB") as update:

        def done(size: int = 0) -> None:
            update(round((sum(s["bytes"] for s in shards.values()) + size) / 1e6, 1))

        while documents := list(up_to(stream, SHARD_BYTES, SIZE)):
            name = f"shard-{len(shards):05}"
            shards[name] = _shard(config.out, name, documents, tokenizer, done)
        left = [document for documents in held_out.values() for document in documents]
        validation = _shard(config.out, "validation", left, tokenizer, lambda size: None)
    if not shards:
        raise UserError("no document is left to train on", where=", ".join(config.data), fix="Give more data.")
    card = _card(sources, tokenizer, shards, validation, counts)
    write_json(config.out / "card.json", card)
    write_atomic(config.out / "README.md", _readme(card))
    tokens, size = card["tokens"], card["bytes"]
    console.print(plain(f"{tokens:,} tokens of {size / 1e6:,.1f} MB in {config.out}, {size / tokens:.2f} bytes per token"))
    return 0


def _begin(config: Config, sources: list[Source], settings: dict) -> tuple[float, Tokenizer]:
    """Read local sources through once, so that bad rows are told before anything is written; the MB of text to encode, and the tokenizer."""
    mine, theirs = config.out / "build.json", config.out / "tokenizer.json"
    if mine.exists() and read_json(mine) != settings:
        raise UserError("holds data made with other settings", where=config.out, fix="Choose another --out, or remove it.")
    if theirs.exists() and not mine.exists():
        raise UserError("holds a tokenizer of something else", where=config.out, fix="Choose another --out.")
    local, size = not any(source.place.startswith("hf:") for source in sources), 0

    def read() -> Iterator[Document]:
        nonlocal size
        for document in mixture(sources, config.max_bytes if local else min(config.max_bytes, TOKENIZER_BYTES), Counter()):
            size += document.size * (not document.held_out)
            yield document

    stream, new = read(), not theirs.exists()
    if not new:
        tokenizer = Tokenizer.load(theirs)
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        console.print(plain("training the tokenizer"))
        tokenizer = train_tokenizer(up_to(capped(stream), TOKENIZER_BYTES), config.vocab_size)
        say(tokenizer, config.vocab_size)
    if local:
        for _ in stream:
            pass
    write_json(mine, settings)
    if new:
        tokenizer.save(theirs)
    return round((size if local else config.max_bytes) / 1e6, 1), tokenizer


def _to_train(stream: Iterable[Document], held_out: dict[str, list[Document]]) -> Iterator[Document]:
    for document in stream:
        if document.held_out:
            held_out[document.source].append(document)
        else:
            yield document


def _shard(out: Path, name: str, documents: list[Document], tokenizer: Tokenizer, done: Callable[[int], None]) -> dict:
    """Write the shard unless it is there; what its .json says. Raises UserError when it was made of other documents."""
    digest = hashlib.sha256(tokenizer_hash(tokenizer).encode())
    for document in documents:
        digest.update(b"%d\0%b" % (document.size, document.text.encode()))
    path = out / f"{name}.json"
    if path.exists():
        if not isinstance(facts := read_json(path), dict) or facts.get("digest") != digest.hexdigest():
            raise UserError("the sources have changed since this was written", where=path, fix="Choose another --out, or remove this one.")
        return facts
    ids, starts, rest = [np.empty(0, np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)], [0], iter(documents)
    sources: dict[str, Counter] = defaultdict(Counter)
    while batch := list(up_to(rest, BATCH_BYTES, SIZE)):
        for document, found in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
            ids.append(np.array(found, ids[0].dtype))
            starts.append(starts[-1] + len(found))
            sources[document.source].update(documents=1, tokens=len(found), bytes=document.size)
        done(sum(sources.values(), Counter())["bytes"])
    save_array(out / f"{name}.ids.npy", np.concatenate(ids))
    save_array(out / f"{name}.starts.npy", np.array(starts, np.int64))
    facts = {"digest": digest.hexdigest(), **_TOTALS, **sum(sources.values(), Counter()), "sources": sources}
    write_json(path, facts)
    return facts


def _card(sources: list[Source], tokenizer: Tokenizer, shards: dict[str, dict], validation: dict, skipped: Counter) -> dict:
    described = {}
    for source in sources:
        counts = sum((Counter(shard["sources"].get(source.name)) for shard in shards.values()), Counter())
        described[source.name] = {"from": source.place, "licence": source.licence, "weight": source.weight, **_TOTALS, **counts}
    return {
        "format": FORMAT,
        "hash": sha256_json([FORMAT, *(shard["digest"] for shard in (*shards.values(), validation))]),
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        **{key: sum(shard[key] for shard in shards.values()) for key in _TOTALS},
        "skipped": dict(skipped), "sources": described, "validation": validation, "shards": shards,
    }  # fmt: skip


def _readme(card: dict) -> str:
    held_out, skipped = card["validation"]["sources"], "; ".join(f"{n:,} {why}" for why, n in sorted(card["skipped"].items())) or "none"
    head = f"""\
        # Tokenized documents

        {card["tokens"]:,} tokens of {card["bytes"]:,} bytes in {card["documents"]:,} documents, with a vocabulary of {card["vocab_size"]:,}; made by `soulsmith data`.
        Documents that were left out: {skipped}. The texts keep their licences; check them before passing this directory on.

        | source | from | licence | documents | bytes | tokens | held-out bytes |
        |---|---|---|---|---|---|---|
        """
    rows = [
        f"| {name} | {facts['from']} | {facts['licence']} | {facts['documents']:,} | {facts['bytes']:,} | {facts['tokens']:,} "
        f"| {held_out.get(name, _TOTALS)['bytes']:,} |\n"
        for name, facts in card["sources"].items()
    ]
    return dedent(head) + "".join(rows) + f"\nHash of tokenizer and documents: `{card['hash']}`\n"
