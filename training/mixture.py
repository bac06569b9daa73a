"""What SFT trains on: files and data sets, each with its weight, mapped to conversations, a part of each held out."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import yaml

from soul import conversation
from soul.console import progress
from soul.errors import UserError
from soul.files import read_text
from soul.records import file_rows, hub_rows
from training.data import Example, permutation

REQUESTS, REPLIES = ("instruction", "prompt", "question", "query"), ("output", "response", "completion", "answer")
TOO_FEW = 20  # rows, of which none are held out
MOST_HELD, MOST_UNUSABLE = 0.1, 0.1  # shares of a source's rows
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Source:
    """One entry of a mixture: the keys that it may have in the file, and their meaning."""

    data: str
    """A file, or hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT."""
    epochs: float | None = None
    """How often each row is used in one pass over the mixture; a fraction takes some rows once more than others."""
    weight: float | None = None
    """Instead of epochs: the source's share of the trained tokens."""
    max_length: int | None = None
    """Longer rows are dropped, beside those longer than --length."""
    rows: int | None = None
    """Only so many rows, the first."""
    instruction: str | None = None
    """The column of the request, where it is not found by its name; `input` and `response` likewise."""
    input: str | None = None
    response: str | None = None

    @property
    def name(self) -> str:
        return self.data[3:].partition(":")[0] if self.data.startswith("hf:") else Path(self.data).stem


KEYS = [key.name for key in fields(Source)]
NUMBERS = {"epochs": float, "weight": float, "max_length": int, "rows": int}


def read_mixture(path: Path) -> list[Source]:
    """The entries of a YAML or JSON file; paths in it are relative to it. Raises UserError naming the file, the entry and the key."""
    try:
        entries = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"is not YAML: {getattr(error, 'problem', error)}", where=f"{path}:{mark.line + 1}" if mark else path) from None
    if not isinstance(entries, list) or not entries:
        raise UserError("must be a list of entries", where=path, fix="Write `- data: FILE` for each source.")
    return [_entry(entry, f"{path}: entry {n}", path.parent) for n, entry in enumerate(entries, 1)]


def _entry(entry: object, where: str, folder: Path) -> Source:
    if not isinstance(entry, dict) or "data" not in entry:
        raise UserError("has no `data`", where=where, fix="Write `- data: FILE`, and its other keys below.")
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}", where=where, fix=f"Keys are: {', '.join(KEYS)}.")
        kind = NUMBERS.get(key, str)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise UserError(f"{key} must be {'text' if kind is str else 'a number'}, not {value!r:.60}", where=where)
        if not (value.strip() if kind is str else 0 < value < math.inf):
            raise UserError(f"{key} must {'not be empty' if kind is str else 'be above 0'}", where=where)
    if "epochs" in entry and "weight" in entry:
        raise UserError("has both epochs and weight", where=where, fix="Give one of them.")
    source = Source(**entry)
    return source if source.data.startswith("hf:") else replace(source, data=str(folder / source.data))


# --- rows to conversations


def conversations(source: Source) -> tuple[list[dict], Counter]:
    """Rows with `id`, `messages`, `template_hash` and `soul_hash`, and what was left out: a row of columns without request or reply.
    Raises UserError naming the row that cannot be read, or the columns when they are not known; when more than a tenth has no request or reply.
    """
    found, unusable = [], Counter()
    with progress(source.name, None, "rows") as show:
        for number, (where, row) in enumerate(islice(_rows(source), source.rows)):
            if not isinstance(row, dict):
                raise UserError(f"a row must be an object, not {type(row).__name__}", where=where)
            messages = _messages(row, source, where)
            if isinstance(messages, str):
                unusable[messages] += 1
                continue
            known = {key: row.get(key) or "" for key in ("template_hash", "soul_hash")}
            found.append({"id": str(row.get("id") or where), "messages": messages, **known})
            if number % 1000 == 0:
                show(number)
    if unusable.total() > MOST_UNUSABLE * (unusable.total() + len(found)):
        raise UserError(f"{unusable.total()} of {unusable.total() + len(found)} rows have no request or no reply", where=source.data,
                        fix="Name the columns: instruction, input, response.")  # fmt: skip
    return found, unusable


def _messages(row: dict, source: Source, where: str) -> list[dict] | str:
    """A row's conversation, or why it has none."""
    try:
        if row.get("messages") is not None and source.response is None:
            return conversation.canonical(row["messages"])
        request, extra, reply = _cells(row, source, where)
        if isinstance(request, list) and isinstance(reply, list):  # prompt and completion as messages
            return conversation.canonical([*request, *reply])
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError("is not a list of {role, content}", where=where) from None
    for text in (request, extra, reply, row.get("system")):
        if not isinstance(text, str | None):
            raise UserError(f"a column must be text, not {type(text).__name__}", where=where)
    if not (request or "").strip() or not (reply or "").strip():
        return "no request" if not (request or "").strip() else "no reply"
    before = [conversation.system(row["system"])] if row.get("system") else []
    return [*before, conversation.user(f"{request}\n\n{extra}" if extra else request), conversation.assistant(reply)]


def _cells(row: dict, source: Source, where: str) -> list:
    wanted = {"instruction": (source.instruction, REQUESTS), "input": (source.input, ("input",)), "response": (source.response, REPLIES)}
    cells = []
    for key, (given, usual) in wanted.items():
        column = given or next((name for name in usual if name in row), None)
        if (given and given not in row) or (column is None and key != "input"):
            missing = f"no column {given!r}" if given else f"neither `messages` nor a column for the {key}"
            fix = "These are pairs for `soulsmith dpo`." if "chosen" in row else f"Name it: `{key}: COLUMN`."
            raise UserError(f"has {missing}; it has {', '.join(map(str, row))}", where=where, fix=fix)
        cells.append(row[column] if column else None)
    return cells


def _rows(source: Source) -> Iterator[tuple[str, object]]:
    path = Path(source.data)
    if source.data.startswith("hf:"):
        name, *more = source.data.removeprefix("hf:").split(":")
        split = more.pop() if more else "train"
        return hub_rows(name, *more, split=split, where=source.data)
    if path.suffix not in SUFFIXES:
        raise UserError(f"is none of {', '.join(SUFFIXES)}", where=path)
    if not path.is_file():
        raise UserError("no such file", where=path)
    return file_rows(path)


# --- how often each row is used, and which are held out


@dataclass(frozen=True)
class Part:
    """One source, encoded: `train` has each row as often as a pass uses it; `left_out` counts the rows that are in neither, by reason."""

    name: str
    rows: int
    times: float
    train: list[Example]
    held_out: list[Example]
    left_out: Counter = field(default_factory=Counter)


def build(encoded: Sequence[tuple[Source, list[Example], Counter]], length: int, share: float, least: int, seed: int) -> list[Part]:
    """The parts of a mixture, from each source's rows and what could not be used of it. Rows over the length are dropped; of each source about
    `share` of the tokens, and at least `least`, are held out. Raises UserError for a source of which nothing is left, and for weights that cannot be met.
    """
    sources, kept, held, left_out, keys = [source for source, _, _ in encoded], [], [], [], set()
    for source, items, unusable in encoded:
        limit = min(length, source.max_length or length)
        kept.append([item for item in items if len(item) <= limit])
        if items and not kept[-1]:
            raise UserError(f"all {len(items)} rows are longer than {limit} tokens", where=source.data, fix="Raise --length.")
        left_out.append(unusable + Counter({f"longer than {limit}": len(items) - len(kept[-1])}))
        held.append(hold_out(kept[-1], share, least, seed))
        keys |= {prompt_key(item, seed) for item in held[-1]}
    train = [[item for item in items if prompt_key(item, seed) not in keys] for items in kept]
    used = times(sources, [sum(item.trained for item in items) for items in train])
    parts = []
    for n, (source, items, unusable) in enumerate(encoded):
        name = source.name if sum(source.name == other.name for other in sources) == 1 else source.data
        elsewhere = Counter({"held out elsewhere": len(kept[n]) - len(train[n]) - len(held[n])})
        rows = len(items) + unusable.total()
        parts.append(Part(name, rows, used[n], repeated(train[n], used[n], seed), held[n], left_out[n] + elsewhere))
    return parts


def prompt_key(item: Example, seed: int) -> bytes:
    """Hash of what stands before the first trained token: rows that answer the same prompt are all held out, or none is."""
    return hashlib.blake2b(item.ids[: int(item.mask.argmax())].tobytes(), digest_size=16, key=str(seed).encode()).digest()


def hold_out(items: Sequence[Example], share: float, least: int, seed: int) -> list[Example]:
    """Rows of about `share` of the tokens and at least `least`, but of no more than a tenth of the rows; none of fewer than 20."""
    if len(items) < TOO_FEW or share <= 0:
        return []
    wanted, most, held, tokens = max(share * sum(map(len, items)), least), MOST_HELD * len(items), [], 0
    for _, group in groupby(sorted(items, key=lambda item: prompt_key(item, seed)), key=lambda item: prompt_key(item, seed)):
        group = list(group)
        if tokens < wanted and len(held) + len(group) <= most:
            held += group
            tokens += sum(map(len, group))
    return held


def times(sources: Sequence[Source], tokens: Sequence[int]) -> list[float]:
    """How often a pass uses each source's rows, from the trained tokens of each.

    Sources with epochs (1 where nothing is said) fix the size of the pass, and the weights are shares of the whole; where all have weights, these
    are relative to each other and the pass is as long as no row is used more than once.
    """
    used = [source.epochs or 1.0 for source in sources]
    weights = {n: source.weight for n, source in enumerate(sources) if source.weight}
    if empty := [sources[n].data for n in weights if not tokens[n]]:
        raise UserError("has a weight but no rows", where=empty[0])
    fixed, total = sum(t * k for n, (t, k) in enumerate(zip(tokens, used, strict=True)) if n not in weights), sum(weights.values())
    if len(weights) < len(sources) and (total >= 1 or not fixed):
        what = f"weights add up to {total:g}, which leaves nothing for the sources with epochs"
        raise UserError(what, fix="Weights are shares of the whole.")
    whole = fixed / (1 - total) if len(weights) < len(sources) else min(tokens[n] * total / w for n, w in weights.items()) / total
    return [weights[n] * whole / tokens[n] if n in weights else used[n] for n in range(len(sources))]


def repeated(items: list[Example], number: float, seed: int) -> list[Example]:
    """Every row ⌊number⌋ times, and some of them, chosen by the seed and worth the rest in trained tokens, once more."""
    order, trained = permutation((seed, len(items)), len(items)), np.array([item.trained for item in items], int)
    up_to = np.cumsum(trained[order]) - trained[order] / 2  # the middle of the row that reaches the mark decides whether it is in
    whole = math.floor(number)
    once_more = np.sort(order[: np.searchsorted(up_to, (number - whole) * trained.sum())])
    return items * whole + [items[i] for i in once_more]


def beginning(items: Sequence[Example], tokens: float) -> list[Example]:
    """The first items, up to the one that reaches so many tokens."""
    before = np.cumsum([0, *map(len, items)])
    return [item for item, start in zip(items, before) if start < tokens]
