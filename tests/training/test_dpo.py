"""DPO through its command, the displacement guard and the pair ledger."""

import json
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import TEMPLATE, decoder, model_dir, preference_rows, same

from model.load import load_model
from soul import conversation as c
from soul.errors import UserError
from soul.rows import write_rows
from training import dpo, losses
from training.data import Packed, Pair, pair, unframed
from training.fit import read_evals, read_metrics
from training.ledger import Sights, displacement, ledger, slots
from training.mesh import ONE_DEVICE
from training.optim import OptimConfig
from training.programs import Programs, plain_logprobs
from training.run import TrainConfig

TRAIN = TrainConfig(length=64, batch_rows=2, compute="fp32", optim=OptimConfig(lr=1e-3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model_dir(path / "model")
    write_rows(path / "few.parquet", preference_rows(9), "preference")
    write_rows(path / "many.parquet", preference_rows(60), "preference")
    return path


def config(base, out, data="few", **changes):
    return dpo.Config(**{"out": out, "model": str(base / "model"), "data": (base / f"{data}.parquet",), "train": TRAIN, **changes})


def pairs_file(out):
    return [json.loads(line) for line in (out / "dpo" / "pairs.jsonl").read_text().splitlines()]


# --- the command


@pytest.mark.parametrize("kind", losses.BETAS)
def test_every_loss_has_a_pulse_and_starts_where_it_must(base, tmp_path, kind):
    assert dpo.main(config(base, tmp_path, loss=kind, train=replace(TRAIN, epochs=3.0))) == 0
    lines = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    known = {"ipo": 1 / (4 * 0.1**2), "apo_zero": 1.0}.get(kind, np.log(2))
    assert kind == "simpo" or (lines[0]["loss"] == pytest.approx(known, rel=1e-6) and lines[0]["accuracy"] == 0.5)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["accuracy"] == 1.0
    stored = np.load(next((tmp_path / "dpo").glob("reference-*.npy")), allow_pickle=False) if kind != "simpo" else np.full((1, 1), np.nan)
    assert np.isnan(stored).all() == (kind == "simpo")  # a loss without reference computes none
    found = pairs_file(tmp_path)
    assert sorted(entry["id"] for entry in found) == [f"p{i}" for i in range(9)]
    assert {entry["class"] for entry in found} <= {"learned", "length-biased"} and all(entry["sights"] == 3 for entry in found)
    assert all(entry["first"] < entry["last"] for entry in found)


def test_a_rejected_reply_is_not_rejected_for_its_frame(base, tmp_path):
    call = [c.assistant("i look.", c.tool_call("Grep", pattern="def f"))]
    row = {"id": "p", "prompt": [c.user("where is f?")], "chosen": call, "rejected": call}
    whole = pair(TEMPLATE, row)
    item, frame = unframed(TEMPLATE, whole), np.isin(whole.rejected.ids, list(TEMPLATE.id.values()))
    assert (
        item.chosen is whole.chosen and frame[whole.rejected.mask > 0].sum() == 5
    )  # call, its argument, its value, its end; the turn's end
    assert (
        np.array_equal(item.rejected.mask, np.where(frame, 0, whole.rejected.mask))
        and item.rejected.mask.dtype == whole.rejected.mask.dtype
    )
    counts = {}
    for name in (False, True):
        assert dpo.main(config(base, tmp_path / str(name), frame=name)) == 0
        counts[name] = [
            (line["chosen_length"], line["rejected_length"]) for line in read_metrics(tmp_path / str(name) / "dpo/metrics.jsonl")
        ]
    assert all(plain[0] == here[0] and plain[1] == here[1] + 1 for here, plain in zip(counts[False], counts[True], strict=True))


def test_held_out_pairs_are_scored_before_and_after_and_never_trained_on(base, tmp_path):
    assert dpo.main(config(base, tmp_path, "many", validation=0.1, train=replace(TRAIN, epochs=2.0))) == 0
    scores = read_evals(tmp_path / "dpo" / "metrics.jsonl")
    (end,) = (line["eval"] for line in scores if "held_out" in line["eval"])
    found = pairs_file(tmp_path)
    assert end["held_out"] >= 2 and 60 - len(found) >= end["held_out"] and end["held_out_accuracy"] == 1.0
    assert 0 <= end["prefers_before"] <= end["prefers"] == 1.0
    scored = [entry for entry in found if entry["after_training"]]
    assert 32 <= len(scored) < 60 and all(entry["sights"] == 2 for entry in found)


def test_adapters_start_at_the_reference_and_export_a_whole_model(base, tmp_path):
    assert dpo.main(config(base, tmp_path, lora=2, train=replace(TRAIN, epochs=3.0, optim=OptimConfig(lr=1e-2)))) == 0
    lines = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-7) and lines[-1]["loss"] < 0.6
    before, after = (nnx.split(load_model(path).model)[1] for path in (base / "model", tmp_path / "dpo"))
    assert not same(before, after) and jax.tree.structure(before) == jax.tree.structure(after)


def test_a_stopped_run_ends_with_the_weights_and_the_ledger_of_an_uninterrupted_one(base, tmp_path, monkeypatch):
    train = replace(TRAIN, epochs=3.0, accumulate=2)
    assert dpo.main(config(base, tmp_path / "whole", train=train)) == 0
    batch = dpo.Run.batch

    def stop_at_2(self, k):
        if k == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, k)

    monkeypatch.setattr(dpo.Run, "batch", stop_at_2)
    assert dpo.main(config(base, tmp_path / "cut", train=train)) == 130
    monkeypatch.undo()
    with pytest.raises(UserError, match="other settings"):
        dpo.main(config(base, tmp_path / "cut", train=train, loss="ipo"))
    assert dpo.main(config(base, tmp_path / "cut", train=train)) == 0
    assert pairs_file(tmp_path / "cut") == pairs_file(tmp_path / "whole")
    assert same(*(nnx.split(load_model(tmp_path / name / "dpo").model)[1] for name in ("cut", "whole")))


def test_shards_tell_the_ledger_what_one_device_does(base, tmp_path):
    found = []
    for name, mesh in (("one", "auto"), ("eight", "data=4,fsdp=2")):
        train = replace(TRAIN, batch_rows=1, accumulate=8, epochs=2.0, mesh=mesh)
        assert dpo.main(config(base, tmp_path / name, "many", train=train)) == 0
        found.append({entry["id"]: (entry["sights"], entry["first"], entry["last"]) for entry in pairs_file(tmp_path / name)})
    assert found[0].keys() == found[1].keys()
    for row, (sights, *margins) in found[0].items():
        assert found[1][row][0] == sights and found[1][row][1:] == pytest.approx(margins, abs=2e-4)


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.0}, {"beta": float("nan")}, {"smoothing": 0.5}, {"smoothing": 0.1, "loss": "ipo"}, {"gamma": 0.5}, {"nll": -1.0}, {"validation": 0.6}],
    ids=str,
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=f"--{next(iter(changes))}"):
        dpo.main(dpo.Config(out=tmp_path, **changes))


def test_usual_strengths():
    assert dpo.preference_of(dpo.Config(out=".")) == losses.Preference("sigmoid", 0.1)
    assert dpo.preference_of(dpo.Config(out=".", loss="simpo")) == losses.Preference("simpo", 2.0, gamma=1.0)
    assert dpo.preference_of(dpo.Config(out=".", loss="simpo", beta=3.0, gamma=0.2)) == losses.Preference("simpo", 3.0, gamma=0.2)


def test_pairs_of_a_prompt_are_held_out_together():
    rows = [{**row, "prompt": [c.user(f"add {i // 3}")]} for i, row in enumerate(preference_rows(90))]
    packed, held = dpo.packs([pair(TEMPLATE, row) for row in rows], dpo.Config(out=".", train=TRAIN))
    sides = [{item.chosen.ids[: item.prompt].tobytes() for item in part.items} for part in (packed, held)]
    assert not sides[0] & sides[1] and len(packed.items) + len(held.items) == 90 and len(held.items) >= 3
    again, _ = dpo.packs([pair(TEMPLATE, row) for row in rows], dpo.Config(out=".", train=replace(TRAIN, seed=1)))
    assert {item.chosen.row for item in again.items} != {item.chosen.row for item in packed.items}
    assert dpo.packs([pair(TEMPLATE, row) for row in rows[:39]], dpo.Config(out=".", train=TRAIN))[1] is None


def test_held_out_pairs_fit_the_program_of_training():
    """Whichever side has the block with the most trained tokens."""
    sizes = [480, 150] + [10] * 58
    rows = [{"id": str(i), "prompt": [c.user(f"add {i}")], "chosen": [c.assistant("a" * n)], "rejected": [c.assistant("b" * n)]}
            for i, n in enumerate(sizes)]  # fmt: skip
    items, larger = [pair(TEMPLATE, row) for row in rows], set()
    for seed in range(40):
        train = replace(TRAIN, length=512, batch_rows=1, seed=seed)
        packed, held = dpo.packs(items, dpo.Config(out=".", validation=0.2, train=train))
        assert packed.supervised == held.supervised
        alone = [Packed.build(part.items, 512, 1, seed).supervised for part in (packed, held)]
        larger.add(int(np.sign(alone[0] - alone[1])))
    assert {1, -1} <= larger


def test_watching_changes_no_bit_and_one_executable_serves_all(tmp_path):
    graph, params = nnx.split(decoder())
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(9)], 64, 2, 0)
    loss, seen = losses.Preference("sigmoid", 0.1), []
    sights = Sights(tmp_path / "margins.jsonl", packed, lambda number, logp_n: seen.append(logp_n) or np.zeros(len(slots(packed, number))))
    watched, plain = dpo.Watched(plain_logprobs(graph), loss, sights, ONE_DEVICE), Programs(plain_logprobs(graph), loss, fused=False)
    sights.next = 0
    ((reference,),) = [list(watched.scores(params, None, [dpo.inputs(packed.batch(0))]))]
    batch = jax.device_put(packed.batch(0) | {"reference": reference})
    assert same(watched.gradients(params, None, batch), plain.gradients(params, None, batch))
    sights.flush()
    assert same(seen, [reference]) and watched.forward._cache_size() == 1


# --- the guard


def series(n, shift, accuracy, noise=0.0, name="chosen_shift", length=20.0):
    """`n` steps over which shift (nats per token) and accuracy go from 0 and 0.5 to the given ends."""
    wobble = np.random.default_rng(0).normal(0, noise, n)
    return [{name: length * (shift * t / (n - 1) + wobble[t]), "chosen_length": length, "accuracy": 0.5 + (accuracy - 0.5) * t / (n - 1)}
            for t in range(n)]  # fmt: skip


@pytest.mark.parametrize("name", ["chosen_shift", "chosen_logp"])
@pytest.mark.parametrize(
    ("shift", "accuracy", "noise", "displaced"),
    [(-0.5, 0.9, 0.0, True), (-0.5, 0.9, 0.1, True), (0.3, 0.9, 0.0, False), (-0.5, 0.4, 0.0, False), (-0.01, 0.9, 0.0, False),
     (-0.05, 0.9, 0.5, False)],
)  # fmt: skip
def test_the_guard_sees_chosen_replies_fall_while_accuracy_rises(name, shift, accuracy, noise, displaced):
    lines = series(40, shift, accuracy, noise, name)
    found = displacement(lines, 8)
    assert bool(found["displaced"]) is displaced
    assert noise or found["shift"] == pytest.approx(shift * (36 - (4 if name == "chosen_logp" else 0)) / 40, rel=0.1)
    assert not displacement(series(8, shift, accuracy, noise, "chosen_logp"), 8)["displaced"]  # nothing to compare with yet


def test_the_guard_warns_twice_or_stops(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "read_metrics", lambda path: series(40, -0.5, 0.9))
    with pytest.raises(UserError, match=r"0\.\d\d nats per token less likely than before.*--nll 0\.2"):
        dpo.main(config(base, tmp_path / "a", guard="stop"))
    assert dpo.main(config(base, tmp_path / "b", nll=0.3, train=replace(TRAIN, epochs=4.0))) == 0
    assert " ".join(capsys.readouterr().err.split()).count("--nll 0.6") == 2
    looks = [line["eval"] for line in read_evals(tmp_path / "b" / "dpo" / "metrics.jsonl") if "displaced" in line["eval"]]
    assert len(looks) >= 4 and all(look["displaced"] == 1.0 for look in looks)


def test_preflight_trains_nothing(base, tmp_path):
    assert dpo.main(config(base, tmp_path, preflight=True)) == 0
    assert not (tmp_path / "dpo").exists()


# --- the ledger


def made(prompt, chosen, rejected, row):
    item = pair(TEMPLATE, {"id": row, "prompt": [c.user(prompt)], "chosen": [c.assistant(chosen)], "rejected": [c.assistant(rejected)]})
    assert isinstance(item, Pair)
    return item


def test_every_class_of_the_ledger():
    pairs = [
        made("a", "good", "bad", "learned"), made("b", "x", "y", "unlearned"), made("c", "x", "y", "flipped"),
        made("d", "x", "y", "against"), made("d", "y", "x", "swapped"), made("e", "x", "y", "one"), made("e", "z", "x", "other"),
        made("f", "x", "y", "first"), made("f", "x", "y", "second"), made("g", "long " * 9, "no", "long"), made("g2", "long " * 9, "no", "likely"),
        made("h", "x", "y", "never"), made("i", "x", "y", "a tie"), made("j", "x", "y", "rose"), made("x", "y", "x", "another prompt"),
    ]  # fmt: skip
    number = {item.chosen.row: i for i, item in enumerate(pairs)}
    seen = {i: [0.1, 0.2, 0.3] for i in range(len(pairs))} | {number["unlearned"]: [-0.1, -0.2], number["flipped"]: [-0.1, 0.4, -0.3]}
    seen |= {number["a tie"]: [0.0], number["rose"]: [-0.2, -0.1, 0.1]}
    del seen[number["never"]]
    start = {number["long"]: np.array([-1.0, -1.2]), number["likely"]: np.array([-2.0, -1.2])}
    entries = ledger(pairs, seen, {number["rose"]: 0.5}, start)
    found = {entry["id"]: entry for entry in entries}
    assert {row: entry["class"] for row, entry in found.items()} == {
        "learned": "learned", "unlearned": "unlearned", "flipped": "flipped", "against": "contradictory", "swapped": "contradictory",
        "one": "contradictory", "other": "contradictory", "first": "learned", "second": "duplicate", "long": "length-biased", "likely": "learned",
        "never": "unseen", "a tie": "unlearned", "rose": "learned", "another prompt": "learned"}  # fmt: skip
    assert found["one"]["flags"] == {"contradictory": "other"} and found["second"]["flags"] == {"duplicate": "first"}
    assert found["rose"]["last"] == 0.5 and found["rose"]["after_training"] and found["rose"]["middle"] == -0.1
    assert [entry["class"] for entry in entries][:6] == ["contradictory"] * 4 + ["length-biased", "flipped"] and entries[-1][
        "id"
    ] == "never"


def test_sights_survive_a_crash_and_count_no_step_twice(tmp_path):
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(9)], 64, 2, 0)
    path = tmp_path / "margins.jsonl"

    def sights(k):
        out = Sights(path, packed, lambda number, logp_n: np.array([logp_n[0] + i for i in slots(packed, number)]))
        out.next = k
        return out

    first = sights(0)
    for k in range(3):
        first.add(lambda k=k: [np.array([100.0 * k])])
    first.flush()
    path.write_text(path.read_text()[:-4])  # the power goes while micro-batch 2 is written
    again = sights(1)
    for k in (1, 2, 3):
        again.add(lambda k=k: [np.array([100.0 * k])])
    seen = again.read()
    blocks = [packed.block_of(k) for k in range(4)]
    for i in range(len(packed.items)):
        assert seen[i] == [100.0 * k + i for k in range(4) if i in slots(packed, blocks[k])]
