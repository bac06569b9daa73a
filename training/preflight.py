"""Refuses to train on data that would teach the wrong thing, and shows what will be trained."""

import codecs
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.table import Table
from rich.text import Text

from soul.console import console, plain
from soul.errors import UserError
from soul.template import Template
from training.data import Example, Packed, Pair
from training.mixture import Part, prompt_key

SHARES = (0.005, 0.995)  # of trained tokens: outside of these a mask is broken, or there is next to nothing to learn
SHOWN, EDGE = 160, 24  # of an example's trained tokens, and of either end of a long stretch that is not trained


def check_positive(settings: object, *names: str) -> None:
    """Refuse (UserError) a setting that is given and not above 0."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {value}")


def check_rows(template: Template, rows: list[dict]) -> None:
    """Refuse rows made for another template. Rows without a hash are plain conversations, made for none.
    Raises UserError naming the first row whose hash is another one.
    """
    for row in rows:
        if row["template_hash"] not in ("", template.hash):
            what = f"made for template {row['template_hash'][:12]}, not this model's {template.hash[:12]} (other control ids or tool specs)"
            raise UserError(what, where=f"row {row['id']}", fix="Export the data again for this model.")


_FRAMES = {f"<|{turn}_{side}|>" for turn in ("system", "user", "tool_result") for side in ("start", "end")} | {"<|assistant_start|>"}


def check_example(template: Template, item: Example, vocab_size: int, skip: int = 0) -> None:
    """Refuse a broken sequence: one bos, and it first; ids in range; something trained but not everything, and no other turn's frame; every
    reply after `skip` ends in a trained `<|assistant_end|>`, and the last one says something. Raises UserError naming the row.
    """
    ids, mask, end = item.ids, item.mask, template.id["<|assistant_end|>"]
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        problem = f"has a token id outside the vocabulary of {vocab_size}"
    elif (ids == template.id["<|bos|>"]).sum() != 1 or ids[0] != template.id["<|bos|>"]:
        problem = "must hold exactly one <|bos|>, at its start"
    elif not mask.any():
        problem = "has no trained token (no assistant turn?)"
    elif mask.all() or mask[0]:
        problem = "trains every token: the loss mask is broken"
    elif trained := [token for token, n in template.id.items() if token in _FRAMES and mask[ids == n].any()]:
        problem = f"trains {trained[0]}: the loss mask is broken"
    elif not (ends := np.flatnonzero(ids[skip:] == end)).size or not mask[skip:][ends].all():
        problem = "has an <|assistant_end|> that is not trained: the model would never learn to stop"
    elif not _last_reply(template, ids).strip():
        problem = "its last assistant turn is empty: the model would learn to say nothing"
    else:
        return
    raise UserError(problem, where=f"row {item.row}")


def _last_reply(template: Template, ids: np.ndarray) -> bytes:
    starts, end = np.flatnonzero(ids == template.id["<|assistant_start|>"]), template.id["<|assistant_end|>"]
    reply = ids[starts[-1] :] if starts.size else ids
    return template.tokenizer.decode_bytes(reply[: np.argmax(reply == end)].tolist())


def check_pair(template: Template, item: Pair, vocab_size: int) -> None:
    """Both branches must pass `check_example`, share the prompt's ids, and differ after it."""
    for branch in item.branches:
        check_example(template, branch, vocab_size, item.prompt)
    if not np.array_equal(item.chosen.ids[: item.prompt], item.rejected.ids[: item.prompt]):
        raise UserError("the branches' prompts differ", where=f"row {item.chosen.row}")
    if np.array_equal(item.chosen.ids, item.rejected.ids):
        raise UserError("chosen and rejected are the same", where=f"row {item.chosen.row}")


def check_template(template: Template, vocab_size: int) -> None:
    """Control ids must be distinct and inside the model's vocabulary."""
    if doubled := [token for token, n in Counter(template.id.values()).items() if n > 1]:
        raise UserError(f"two control tokens share id {doubled[0]}", where="tokenizer")
    for token, number in template.id.items():
        if not 0 <= number < vocab_size:
            raise UserError(f"{token} has id {number}, outside the model's vocabulary of {vocab_size}", where="tokenizer")


def check_shares(items: Sequence[Example]) -> None:
    """Refuse (UserError) data of which next to nothing is trained, or next to everything."""
    trained, tokens = sum(item.trained for item in items), sum(map(len, items))
    if not SHARES[0] <= trained / tokens <= SHARES[1]:
        raise UserError(f"{trained:,} of {tokens:,} tokens are trained ({trained / tokens:.1%})", where="preflight",
                        fix="Look at the rows: is one side of the conversations missing?")  # fmt: skip


def check_held_out(train: Sequence[Example], held_out: Sequence[Example], seed: int) -> None:
    """Refuse (UserError) a row that is trained on while its prompt is held out: the validation would measure memory."""
    known = {prompt_key(item, seed): item for item in held_out}
    if shared := next((item for item in train if prompt_key(item, seed) in known), None):
        raise UserError(f"has the prompt of row {known[prompt_key(shared, seed)].row}, which is held out", where=f"row {shared.row}")


def facts(title: str, values: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in values.items():
        table.add_row(name, value)
    return table


def summary(packed: Packed, template: Template, title: str, steps: int, parts: Sequence[Part] = ()) -> None:
    """Print what will be trained: counts, lengths, the supervised share, the sources, and three examples token by token."""
    branches = [branch for item in packed.items for branch in item.branches]
    lengths, supervised = np.array([len(b) for b in branches]), sum(b.trained for b in branches)
    dropped = packed.dropped + sum(n for part in parts for reason, n in part.left_out.items() if reason.startswith("longer"))
    console.print(facts(title, {
        "pairs" if packed.paired else "rows": f"{len(packed.items):,}",
        f"dropped, longer than {packed.length}": f"{dropped:,}",
        "tokens": f"{packed.tokens:,}",
        "trained tokens": f"{supervised:,} ({supervised / packed.tokens:.0%})",
        "lengths, min / median / max": f"{lengths.min()} / {int(np.median(lengths))} / {lengths.max()}",
        "packed rows": f"{packed.rows:,} of {packed.length} tokens, {packed.tokens / (packed.rows * packed.length):.0%} full",
        "steps": f"{steps:,}",
    }))  # fmt: skip
    if parts:
        console.print(_sources(parts))
    console.print("three examples; what is trained is green, every second token underlined:")
    for item in _three(packed.items, parts):
        console.print(coloured(template, item.branches[0]))
        if packed.paired:
            console.print("rejected:", coloured(template, item.rejected, item.prompt))
        console.print()


def _sources(parts: Sequence[Part]) -> Table:
    table = Table("source", "rows", "used", "trained tokens", "held out", "left out", title="sources", title_justify="left")
    trained = [sum(item.trained for item in part.train) for part in parts]
    for part, tokens in zip(parts, trained, strict=True):
        out = ", ".join(f"{n:,} {reason}" for reason, n in part.left_out.items()) or "0"
        share = f"{tokens:,} ({tokens / sum(trained):.0%})"
        table.add_row(plain(part.name), f"{part.rows:,}", f"{part.times:.3g} ×", share, f"{len(part.held_out):,}", plain(out))
    return table


def _three(items: Sequence, parts: Sequence[Part]) -> list:
    """One of each of the first three sources, or the first, the middle and the last."""
    firsts = [part.train[0] for part in parts if part.train][:3]
    rest = [items[n] for n in sorted({0, len(items) // 2, len(items) - 1})]
    return firsts if len(firsts) == 3 else (firsts + [item for item in rest if all(item is not first for first in firsts)])[:3]


def coloured(template: Template, item: Example, start: int = 0) -> Text:
    """An example's text from token `start`: trained tokens green, the others dim, every second underlined; the middle of a long stretch that is
    not trained is left out, and what follows the first 160 trained tokens. Nothing in it reaches the terminal unsanitised."""
    text, ids, left = Text(), item.ids[start:].tolist(), SHOWN
    pieces = enumerate(_pieces(template, ids))
    for trained, run in groupby(pieces, lambda numbered: bool(item.mask[start + numbered[0]])):
        run = list(run)
        for at, (number, piece) in enumerate(run):
            if trained and left <= 0:
                return text.append(f" … {len(ids) - number} more tokens", "dim italic")
            left -= trained
            if not trained and len(run) > 3 * EDGE and EDGE <= at < len(run) - EDGE:
                if at == EDGE:
                    text.append(f" … {len(run) - 2 * EDGE} tokens … ", "dim italic")
                continue
            text.append_text(plain(piece, style=("green" if trained else "dim") + " underline" * (number % 2)))
    return text


def spelled(template: Template, ids: list[int]) -> str:
    """The text of ids, control tokens by their names."""
    return "".join(_pieces(template, ids))


def _pieces(template: Template, ids: list[int]) -> Iterator[str]:
    """The text of each token; a character that is cut in two comes whole with its last token."""
    decoder, decode = codecs.getincrementaldecoder("utf-8")("replace"), template.tokenizer.decode_bytes
    for n, token in enumerate(ids):
        before = ids[max(0, n - 1) : n]  # with it, since a byte that the vocabulary lacks is spelled as two tokens
        yield decoder.decode(decode([*before, token])[len(decode(before)) :]) + template.token.get(token, "")
