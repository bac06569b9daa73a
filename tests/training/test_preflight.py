import io
import re

import numpy as np
import pytest
from rich.console import Console
from tiny_model import TEMPLATE, preference_rows, sft_rows

from soul import conversation as c
from soul.errors import UserError
from training import preflight
from training.data import Example, Packed, Pair, example, pair

VOCAB = 272
GOOD = example(TEMPLATE, sft_rows(1)[0]["messages"], "good")


def changed(ids=None, mask=None):
    return Example(GOOD.ids.copy() if ids is None else ids, GOOD.mask.copy() if mask is None else mask, "r7")


def with_id(position, number):
    ids = GOOD.ids.copy()
    ids[position] = number
    return ids


BOS, END = TEMPLATE.id["<|bos|>"], TEMPLATE.id["<|assistant_end|>"]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (changed(mask=np.zeros_like(GOOD.mask)), "no trained token"),
        (changed(mask=np.ones_like(GOOD.mask)), "trains every token"),
        (changed(mask=np.where(GOOD.ids == END, 0, GOOD.mask)), "not trained"),
        (changed(ids=with_id(4, BOS)), "exactly one"),
        (changed(ids=with_id(0, 65)), "exactly one"),
        (changed(ids=np.roll(GOOD.ids, 2)), "exactly one"),
        (changed(ids=with_id(4, VOCAB)), "outside the vocabulary"),
        (changed(ids=with_id(4, -1)), "outside the vocabulary"),
        (changed(ids=GOOD.ids[:-1], mask=GOOD.mask[:-1]), "not trained"),
    ],
)
def test_broken_sequences_are_refused_by_row(item, why):
    preflight.check_example(TEMPLATE, GOOD, VOCAB)
    with pytest.raises(UserError, match=f"row r7.*{why}"):
        preflight.check_example(TEMPLATE, item, VOCAB)


def test_broken_pairs_are_refused():
    item = pair(TEMPLATE, preference_rows(1)[0])
    preflight.check_pair(TEMPLATE, item, VOCAB)
    other = item.rejected.ids.copy()
    other[3] += 1
    with pytest.raises(UserError, match="prompts differ"):
        preflight.check_pair(TEMPLATE, Pair(item.chosen, Example(other, item.rejected.mask), item.prompt), VOCAB)
    with pytest.raises(UserError, match="the same"):
        preflight.check_pair(TEMPLATE, Pair(item.chosen, item.chosen, item.prompt), VOCAB)


def test_rows_for_a_foreign_template_are_refused_and_plain_conversations_are_not():
    rows = [{"id": "a", "template_hash": TEMPLATE.hash}, {"id": "b", "template_hash": ""}]
    preflight.check_rows(TEMPLATE, rows)
    with pytest.raises(UserError, match="row c"):
        preflight.check_rows(TEMPLATE, [*rows, {"id": "c", "template_hash": "0" * 64}])


def test_control_ids_must_be_distinct_and_in_the_vocabulary():
    preflight.check_template(TEMPLATE, VOCAB)
    with pytest.raises(UserError, match="outside the model's vocabulary of 260"):
        preflight.check_template(TEMPLATE, 260)


def test_step_zero_must_be_ln_2():
    ln2 = np.full(3, np.float32(np.log(2)))
    preflight.check_step_zero(np.zeros(3), ln2)
    with pytest.raises(UserError, match="not ln 2"):
        preflight.check_step_zero(np.array([0, 1e-9, 0]), ln2)
    with pytest.raises(UserError, match="not ln 2"):
        preflight.check_step_zero(np.zeros(3), np.nextafter(ln2, np.float32(1)))


def test_the_view_shows_what_is_trained_and_obeys_nothing():
    item = example(TEMPLATE, [c.user("[bold]hi\x1b[31m"), c.assistant("yo 😀")])
    view = preflight.coloured(TEMPLATE, item)
    green = "".join(view.plain[span.start : span.end] for span in view.spans if span.style == "green")
    assert green == "yo 😀<|assistant_end|>"
    assert "\x1b" not in view.plain and "[bold]hi␛[31m" in view.plain


def test_the_summary_counts(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(preflight, "console", Console(file=out, width=120))
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(7)], 20, 2, 0)
    preflight.summary(packed, TEMPLATE, "DPO", 3)
    assert packed.dropped == 2 and re.search(r"longer than 20 +│ 2 ", out.getvalue()) and "trained tokens" in out.getvalue()
