import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TEMPLATE, decoder, preference_rows, random_examples, sft_rows

from soul import conversation as c
from soul.errors import UserError
from soul.rows import write_rows
from training import losses
from training.data import Example, Packed, Pair, best_fit, example, load_rows, pair
from training.programs import Programs, plain_logprobs

T = 32


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_places_every_length_once_within_capacity(lengths, capacity):
    groups = best_fit(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= capacity for group in groups)
    # best fit can never leave two groups that would fit into one
    sizes = sorted(sum(lengths[i] for i in group) for group in groups)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4))
def test_every_supervised_token_appears_exactly_once_and_in_its_own_segment(seed, n, per_batch):
    examples = random_examples(seed, n, 40)
    kept = [e for e in examples if len(e) <= T]
    if not kept:
        with pytest.raises(UserError, match="longer than 32"):
            Packed.build(examples, T, per_batch, seed)
        return
    packed = Packed.build(examples, T, per_batch, seed)
    assert packed.dropped == n - len(kept)
    seen = []
    for number in range(len(packed.blocks)):
        block = packed.block(number)
        real = block["weights"] > 0
        at, targets = block["at"][real], block["targets"][real]
        rows, columns = at // T, at % T
        segments = block["segments"]
        assert (block["ids"][rows, columns + 1] == targets).all()  # what is predicted is the next token …
        assert (segments[rows, columns] == segments[rows, columns + 1]).all() and (
            segments[rows, columns] > 0
        ).all()  # … of the same segment
        for r in range(per_batch):
            for s in range(1, segments[r].max() + 1):
                where = np.flatnonzero(segments[r] == s)
                assert (np.diff(where) == 1).all()
                assert (block["positions"][r, where] == np.arange(len(where))).all()
                trained = block["targets"][real & (block["at"] // T == r) & np.isin(block["at"] % T + 1, where)]
                seen.append((tuple(block["ids"][r, where]), tuple(trained)))
    assert sorted(seen) == sorted((tuple(e.ids), tuple(e.ids[e.mask == 1])) for e in kept)


def test_short_and_long_rows_share_batches():
    # packed longest first, no short row here meets a long one, and each step of one packed row follows one kind
    examples = [Example(np.arange(n) % 7 + 20, np.ones(n, int), str(i)) for i, n in enumerate([30] * 40 + [6] * 120)]
    packed = Packed.build(examples, 64, 1, 0)
    units = [[len(packed.items[i]) for i in unit] for block in packed.blocks for unit in block]
    assert sum(unit.count(6) for unit in units if 30 in unit) > 0.7 * 120
    assert packed.tokens > 0.9 * 64 * packed.rows
    assert {i for block in packed.blocks for unit in block for i in unit} == set(range(160))
    other = Packed.build(examples, 64, 1, 1)
    assert other.blocks != packed.blocks == Packed.build(examples, 64, 1, 0).blocks


def test_batch_k_is_a_pure_function_of_seed_and_k():
    examples = random_examples(3, 50, T)
    one, two = Packed.build(examples, T, 2, 7), Packed.build(examples, T, 2, 7)
    ahead = two.batch(13)  # asked for out of order, from another object
    for k in range(20):
        one.batch(k)
    assert all((one.batch(13)[name] == ahead[name]).all() for name in ahead)
    blocks = len(one.blocks)
    epochs = [[one.block_of(k) for k in range(e * blocks, (e + 1) * blocks)] for e in range(3)]
    assert all(sorted(epoch) == list(range(blocks)) for epoch in epochs)  # each epoch sees everything once
    assert epochs[0] != epochs[1]
    assert [Packed.build(examples, T, 2, 8).block_of(k) for k in range(blocks)] != epochs[0]


def test_shapes_are_the_same_for_every_batch():
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(23)], 64, 2, 0)
    shapes = {tuple((name, value.shape) for name, value in packed.block(n).items()) for n in range(len(packed.blocks))}
    assert len(shapes) == 1


def test_both_branches_of_a_pair_are_in_one_batch_and_numbered():
    pairs = [pair(TEMPLATE, row) for row in preference_rows(9)]
    packed = Packed.build(pairs, 64, 2, 0)
    found = {}
    for number in range(len(packed.blocks)):
        block = packed.block(number)
        for slot in np.flatnonzero(block["real"]):
            item = pairs[block["index"][slot]]
            for branch, offset in ((item.chosen, 0), (item.rejected, packed.pairs)):
                assert (block["targets"][block["branch"] == slot + offset] == branch.ids[branch.mask == 1]).all()
            found[int(block["index"][slot])] = True
    assert sorted(found) == list(range(9))


def test_a_pair_masks_its_prompt_even_where_the_assistant_speaks_in_it():
    prompt = [c.user("a"), c.assistant("b"), c.user("c")]
    item = pair(TEMPLATE, {"id": "x", "prompt": prompt, "chosen": [c.assistant("yes")], "rejected": [c.assistant("no")]})
    assert item.chosen.mask[: item.prompt].sum() == 0 and item.chosen.mask.sum() == len("yes") + 1
    assert item.prompt == len(TEMPLATE.encode(prompt).ids)
    assert isinstance(item, Pair) and len(item) == len(item.chosen)


def test_rows_that_cannot_be_rendered_or_are_of_the_wrong_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match="row bad"):
        example(TEMPLATE, [{"role": "robot", "content": "x"}], "bad")
    write_rows(tmp_path / "s.parquet", sft_rows(2), "sft")
    write_rows(tmp_path / "empty.parquet", [], "sft")
    assert len(load_rows([tmp_path / "s.parquet"] * 2, "sft")) == 4
    with pytest.raises(UserError, match="holds sft rows, not preference"):
        load_rows([tmp_path / "s.parquet"], "preference")
    with pytest.raises(UserError, match="no rows"):
        load_rows([tmp_path / "empty.parquet"], "sft")


def test_packed_rows_give_the_loss_and_gradients_of_examples_without_segments():
    """The other side knows nothing of packing: an example a row, no segments, no positions; what stands behind it is never looked at."""
    graph, params = nnx.split(decoder())
    programs = Programs(plain_logprobs(graph), losses.nll)
    examples = random_examples(4, 13, T)
    packed = Packed.build(examples, 2 * T, 8, 0)
    assert packed.rows < len(examples) and max(len(unit) for block in packed.blocks for unit in block) > 2
    at = np.concatenate([n * T + np.flatnonzero(e.mask) - 1 for n, e in enumerate(examples)])
    rows = {
        "ids": np.stack([np.pad(e.ids, (0, T - len(e)), constant_values=7) for e in examples]),
        "at": at.astype(np.int32),
        "targets": np.concatenate([e.ids[e.mask == 1] for e in examples]),
        "weights": np.ones(len(at), np.float32),
    }
    (loss, (count, _)), grads = programs.accumulated(params, None, [packed.block(n) for n in range(len(packed.blocks))])
    (plain_loss, (plain_count, _)), plain_grads = programs.gradients(params, None, jax.device_put(rows))
    assert int(count) == int(plain_count) == len(at) and float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5 * float(np.abs(y).max()))
