"""`soulsmith tokenizer`: train a byte-level BPE tokenizer, and measure how well one compresses."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from model.tokenizer import Tokenizer, added_token, adopt
from soul import conversation as c
from soul import rows as row_files
from soul.console import console, output, plain
from soul.errors import UserError
from soul.files import sha256_json
from soul.template import SPECIAL_TOKENS
from training.sources import PRESETS, Document, mixture, parse_sources

# GPT-4's split, with groups of 1-2 digits: nanochat measured 3 digits at +0.7 % bits per byte and 1 digit at +0.4 % (depth 12, 32,768 tokens)
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
CAP = 10_000  # characters of one document that are looked at
LONGEST = 32  # characters of a token: a rule of 80 dashes is a habit of one file, not a word
TOKENIZER_BYTES = 200_000_000  # that it is trained on, at most
SAMPLE = 2_000_000  # bytes of each source that compression is measured on


@dataclass(frozen=True)
class Config:
    """Train a byte-level BPE tokenizer on text and code; the result is OUT/tokenizer.json."""

    directory: Annotated[Path, tyro.conf.arg(name="out")]  # a field `out` would have its settings saved as OUT/tokenizer.json
    """Directory for tokenizer.json."""
    vocab_size: int = 32768
    """Ids, with the 14 control tokens, which come last."""
    data: tuple[str, ...] = ("python-docs=5", "python-code=1")
    """Sources, weighed by bytes: a preset, a file or folder, or hf:NAME[:CONFIG][:SPLIT][@COLUMN], each with =WEIGHT or all without."""
    column: str | None = None
    """The column of the rows' text; without it, text or content."""
    max_bytes: int = TOKENIZER_BYTES
    """Stop reading after so many bytes."""
    eval: bool = False
    """Print bytes per token on held-out documents and on rollouts, beside GPT-2's and cl100k's (extra `tokenizer`)."""
    rollouts: Path | None = None
    """Parquet file of rollouts to measure; without it, a few that come along."""


EXAMPLE = [
    c.user("there is a bug in src/prices.py: total() ignores the discount. can you fix it?"),
    c.assistant("i'll look at the function first.", c.tool_call("Read", file_path="src/prices.py")),
    c.tool("     1\tdef total(items, discount=0.0):\n     2\t    \"\"\"Sum of prices, less the discount.\"\"\"\n     3\t    return sum(i.price for i in items)\n"),
    c.assistant(
        "the sum is returned as it is. i'll take the discount off.",
        c.tool_call(
            "Edit", file_path="src/prices.py", old_string="    return sum(i.price for i in items)",
            new_string="    return sum(i.price for i in items) * (1 - discount)",
        ),
    ),
    c.tool("edited src/prices.py"),
    c.assistant("now the tests.", c.tool_call("Bash", command="python -m pytest -q tests/test_prices.py")),
    c.tool("....                                                                     [100%]\n4 passed in 0.03s\n"),
    c.assistant("done: `total` now multiplies by `1 - discount`, and the four tests pass."),
]  # fmt: skip


def main(config: Config) -> int:
    counts = Counter()
    kept: dict[str, list[str]] = defaultdict(list)
    stream = mixture(parse_sources(config.data, config.column), config.max_bytes, counts)
    tokenizer = train_tokenizer(capped(stream, kept), config.vocab_size)
    tokenizer.save(config.directory / "tokenizer.json")
    say(tokenizer, config.vocab_size)
    if config.eval:
        kept["rollouts"] = conversation_texts(row_files.read_rows(config.rollouts) if config.rollouts else [{"messages": EXAMPLE}])
        output.print(compression({"this": tokenizer.encode_batch, **peers()}, kept))
    return 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over `texts`, the same file for the same texts; fewer ids than `vocab_size` when they have too few words.

    Every one of the 256 bytes has a piece; our control tokens come after the merges. Raises UserError for a size that cannot hold both.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Core

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        fix = f"256 bytes and control tokens need {least}."
        raise UserError(f"a vocabulary of {vocab_size} is too small", where="--vocab-size", fix=fix)
    core = Core(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # its own `special_tokens` would come first
        vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, max_token_length=LONGEST, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    spec = json.loads(core.to_str())
    return Tokenizer(spec | {"added_tokens": [added_token(t, core.get_vocab_size() + n) for n, t in enumerate(SPECIAL_TOKENS)]})


def load_tokenizer(place: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, of a directory with one, or of a model, with our control tokens. Raises UserError."""
    path = Path(place)
    if (path.is_file() and path.suffix == ".json") or (path / "tokenizer.json").is_file():
        return adopt(Tokenizer.load(path))
    from model.gguf_import import read_gguf
    from model.load import find

    path = find(place)
    return adopt(read_gguf(path)[1] if path.suffix == ".gguf" else Tokenizer.load(path))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    return sha256_json(tokenizer.spec)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for (V int32); 0 for control ids. From the pieces' bytes: a decoded string would count
    the replacement characters of pieces that are no whole UTF-8, 193 of 32,768 in nanochat."""
    control = {*tokenizer.special.values(), *tokenizer.base_special.values()}
    return np.array([0 if n in control else len(tokenizer.decode_bytes([n])) for n in range(tokenizer.vocab_size)], np.int32)


def capped(stream: Iterable[Document], kept: dict[str, list[str]] | None = None) -> Iterator[str]:
    """The beginnings of documents to train on; those that are held out go to `kept`, by source."""
    for document in stream:
        if not document.held_out:
            yield document.text[:CAP]
        elif kept is not None:
            kept[document.source].append(document.text)


def say(tokenizer: Tokenizer, wanted: int) -> None:
    have = tokenizer.vocab_size
    console.print(plain(f"tokenizer of {have:,} ids"))
    if have < wanted:
        more = f"`--data fineweb-edu=5 code=1` streams more from the hub ({PRESETS['fineweb-edu'][0]})."
        console.print(plain(f"the data has no {wanted:,} pieces that occur twice; what was learned is kept. {more}", "yellow"))


# --- compression


def conversation_texts(rows: Sequence[dict]) -> list[str]:
    """What a tokenizer sees of conversations: contents, tool names, keys and values, each on its own, without control tokens."""
    messages = [m for row in rows for key in ("messages", "prompt", "chosen") for m in row.get(key) or ()]
    calls = [(name, args) for m in messages for name, args in c.named_calls(m)]
    texts = [m["content"] for m in messages] + [text for name, args in calls for text in (name, *args, *args.values())]
    return [text for text in texts if text]


def compression(encoders: dict[str, Callable[[list[str]], list[list[int]]]], texts: dict[str, list[str]]) -> Table:
    """A table of bytes per token: a row for each kind of text, a column for each `encode_batch`."""
    table = Table("bytes per token", *encoders)
    for kind, all_texts in texts.items():
        sample = list(up_to(all_texts, SAMPLE))
        size = sum(len(text.encode()) for text in sample)
        table.add_row(kind, *(f"{size / sum(map(len, encode(sample))):.3f}" for encode in encoders.values()))
    return table


def up_to(items: Iterable, size: int, weigh: Callable[[Any], int] = lambda text: len(text.encode())) -> Iterator:
    """The first items, up to the one with which they weigh so much."""
    for item in items:
        yield item
        size -= weigh(item)
        if size <= 0:
            return


def peers() -> dict[str, Callable[[list[str]], list[list[int]]]]:
    """`encode_batch` of GPT-2's and cl100k's tokenizers; one line says why when they are not to be had."""
    try:
        import tiktoken

        return {name: tiktoken.get_encoding(name).encode_ordinary_batch for name in ("gpt2", "cl100k_base")}
    except ImportError:
        console.print(plain("GPT-2 and cl100k are left out: tiktoken is not installed (pip install 'soulsmith[tokenizer]')"))
    except Exception as error:  # it fetches its files at first use, and raises what the network raises
        console.print(plain(f"GPT-2 and cl100k are left out: tiktoken cannot fetch its files ({type(error).__name__})"))
    return {}
