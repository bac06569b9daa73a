"""Refuses to train on data that would teach the wrong thing, and shows what will be trained."""

from collections import Counter
from itertools import groupby

import numpy as np
from rich.table import Table
from rich.text import Text

from soul.console import console, plain
from soul.errors import UserError
from soul.template import Template
from training.data import Example, Packed, Pair


def check_rows(template: Template, rows: list[dict]) -> None:
    """Refuse rows made for another template. Rows without a hash are plain conversations, made for none.

    Raises:
        UserError: naming the first row whose hash is another one.
    """
    for row in rows:
        if row["template_hash"] not in ("", template.hash):
            raise UserError(
                f"made for template {row['template_hash'][:12]}, not this model's {template.hash[:12]} (other control ids or tool specs)",
                where=f"row {row['id']}",
                fix="Export the data again for this model.",
            )


def check_example(template: Template, item: Example, vocab_size: int, skip: int = 0) -> None:
    """Refuse a broken sequence: one bos, and it first; ids in range; something trained but not everything; every reply after `skip`
    ends in a trained `<|assistant_end|>`.

    Raises:
        UserError: naming the row.
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
    elif not (ends := np.flatnonzero(ids[skip:] == end)).size or not mask[skip:][ends].all():
        problem = "has an <|assistant_end|> that is not trained: the model would never learn to stop"
    else:
        return
    raise UserError(problem, where=f"row {item.row}")


def check_pair(template: Template, item: Pair, vocab_size: int) -> None:
    """Both branches must pass `check_example`, share the prompt's ids, and differ after it."""
    for branch in (item.chosen, item.rejected):
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


def check_step_zero(margins: np.ndarray, per_pair: np.ndarray) -> None:
    """Before the first DPO step policy and reference are the same weights: each margin is 0 and each loss ln 2, in every bit.

    Raises:
        UserError: when they are not, so the reference log-probs are not this model's on these rows.
    """
    if np.any(margins != 0) or np.any(per_pair != np.float32(np.log(2))):
        raise UserError(f"step-0 DPO loss is {per_pair.mean():.7f}, not ln 2 (largest margin {np.abs(margins).max():.3g})",
                        where="preflight", fix="Delete reference-*.npy in the run's dpo directory and run again.")  # fmt: skip


def summary(packed: Packed, template: Template, title: str, steps: int) -> None:
    """Print what will be trained: counts, lengths, the supervised share, and one example token by token."""
    branches = [b for item in packed.items for b in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))]
    lengths = np.array([len(b) for b in branches])
    supervised = sum(int(b.mask.sum()) for b in branches)
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in (
        ("pairs" if packed.paired else "rows", f"{len(packed.items):,}"),
        ("dropped, longer than " + str(packed.length), f"{packed.dropped:,}"),
        ("tokens", f"{packed.tokens:,}"),
        ("trained tokens", f"{supervised:,} ({supervised / packed.tokens:.0%})"),
        ("lengths, min / median / max", f"{lengths.min()} / {int(np.median(lengths))} / {lengths.max()}"),
        ("packed rows", f"{packed.rows:,} of {packed.length} tokens, {packed.tokens / (packed.rows * packed.length):.0%} full"),
        ("steps", f"{steps:,}"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print("one example, trained tokens in green:")
    console.print(coloured(template, branches[0]))


def coloured(template: Template, item: Example) -> Text:
    """An example's text, trained tokens green, the others dim; nothing in it reaches the terminal unsanitised."""
    text, ids = Text(), item.ids.tolist()
    for (control, trained), run in groupby(range(len(ids)), lambda n: (ids[n] in template.token, bool(item.mask[n]))):
        span = [ids[n] for n in run]
        said = "".join(template.token[i] for i in span) if control else template.tokenizer.decode_bytes(span).decode("utf-8", "replace")
        text.append_text(plain(said, style="green" if trained else "dim"))
    return text
