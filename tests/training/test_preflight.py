import io
import re
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from tiny_model import TEMPLATE, preference_rows, sft_rows

from soul import conversation as c
from soul.errors import UserError
from training import preflight
from training.data import Example, Packed, Pair, example, pair
from training.mixture import Part

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
        (changed(mask=np.where(GOOD.ids == TEMPLATE.id["<|user_end|>"], 1, GOOD.mask)), r"trains <\|user_end\|>"),
        (changed(mask=np.where(GOOD.ids == TEMPLATE.id["<|assistant_start|>"], 1, GOOD.mask)), r"trains <\|assistant_start\|>"),
        (example(TEMPLATE, [c.user("hi"), c.assistant("ho"), c.user("hi"), c.assistant("")], "r7"), "last assistant turn is empty"),
        (example(TEMPLATE, [c.user("hi"), c.assistant("ho"), c.user("hi"), c.assistant(" \n")], "r7"), "last assistant turn is empty"),
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


def test_a_turn_that_only_calls_is_not_empty():
    said = [c.user("hi"), c.assistant("", c.tool_call("Read", file_path="a")), c.tool("x"), c.assistant("it is x")]
    for messages in (said, said[:2], [c.user("hi"), c.assistant(""), c.user("?"), c.assistant("ho")]):
        preflight.check_example(TEMPLATE, example(TEMPLATE, messages), VOCAB)


def share(trained, tokens):
    return Example(np.zeros(tokens, np.int32), (np.arange(tokens) >= tokens - trained).astype(np.int32))


def test_data_of_which_next_to_nothing_or_everything_is_trained_is_refused():
    preflight.check_shares([share(1, 100), share(99, 100)])
    for items in ([share(1, 100), share(0, 901)], [share(999, 1000)]):
        with pytest.raises(UserError, match="tokens are trained"):
            preflight.check_shares(items)


def test_a_trained_row_whose_prompt_is_held_out_is_refused():
    other = example(TEMPLATE, [c.user("another"), c.assistant("x")], "other")
    again = example(TEMPLATE, [*sft_rows(1)[0]["messages"][:1], c.assistant("another reply")], "again")
    preflight.check_held_out([GOOD], [other], 0)
    with pytest.raises(UserError, match="row again: has the prompt of row good"):
        preflight.check_held_out([other, again], [GOOD], 0)


def styled(view, style):
    return "".join(view.plain[span.start : span.end] for span in view.spans if style in str(span.style).split())


def test_the_view_shows_what_is_trained_and_obeys_nothing():
    view = preflight.coloured(TEMPLATE, example(TEMPLATE, [c.user("[bold]hi\x1b[31m"), c.assistant("yo 😀")]))
    assert styled(view, "green") == "yo 😀<|assistant_end|>"
    assert styled(view, "dim") == "<|bos|><|user_start|>[bold]hi␛[31m<|user_end|><|assistant_start|>"
    assert "\x1b" not in view.plain and "[bold]hi␛[31m" in view.plain


def test_the_view_shows_where_tokens_begin():
    view = preflight.coloured(TEMPLATE, example(TEMPLATE, [c.user("abcd"), c.assistant("efg")]))
    assert styled(view, "underline") == "<|user_start|>bd<|assistant_start|>f<|assistant_end|>"


def test_the_view_leaves_out_the_middle_of_what_is_not_trained_and_the_end_of_what_is():
    view = preflight.coloured(TEMPLATE, example(TEMPLATE, [c.user("q" * 500), c.assistant("a" * 500)])).plain
    assert view.count("q") == 2 * preflight.EDGE - 4 and "… 456 tokens …" in view
    assert view.count("a" * preflight.SHOWN) == 1 and view.endswith(f"… {501 - preflight.SHOWN} more tokens")
    both = [c.user("q"), c.assistant("a" * preflight.SHOWN), c.user("z"), c.assistant("b")]
    assert preflight.coloured(TEMPLATE, example(TEMPLATE, both)).plain.endswith("a … 7 more tokens")


def test_a_rejected_branch_is_shown_without_the_prompt():
    item = pair(TEMPLATE, preference_rows(1)[0])
    assert preflight.coloured(TEMPLATE, item.rejected, item.prompt).plain == "<|assistant_start|>As an AI<|assistant_end|>"


def printed(monkeypatch, *given):
    out = io.StringIO()
    monkeypatch.setattr(preflight, "console", Console(file=out, width=120))
    preflight.summary(*given)
    return out.getvalue()


def test_the_summary_counts(monkeypatch):
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(7)], 20, 2, 0)
    said = printed(monkeypatch, packed, TEMPLATE, "DPO", 3)
    assert packed.dropped == 2 and re.search(r"longer than 20 +│ 2 ", said) and "trained tokens" in said
    assert said.count("<|bos|>") == 3 and said.count("rejected:") == 3


def test_the_summary_names_each_source(monkeypatch):
    items = [example(TEMPLATE, row["messages"], row["id"]) for row in sft_rows(9)]
    parts = [Part("mine", 8, 2.0, items[:3] * 2, items[3:4], Counter({"longer than 96": 4})), Part("general", 5, 1.0, items[4:], [])]
    said = printed(monkeypatch, Packed.build([i for part in parts for i in part.train], 96, 2, 0), TEMPLATE, "SFT", 3, parts)
    assert re.search(r"mine +│ 8 +│ 2 × .*│ 1 +│ 4 longer than 96", said) and re.search(r"general +│ 5 +│ 1 ×", said)
    assert re.search(r"dropped, longer than 96 +│ 4 ", said)
    assert said.count("<|bos|>") == 3 and "what is 0?" in said and "what is 4?" in said  # one of each source
