"""`soulsmith sft` on a tiny model: mixtures, validation, samples, adapters, preflight."""

import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_model import CONFIG, TEMPLATE, decoder, model_dir, same, sft_rows, tokenizer

import soulsmith
from model import checkpoint
from model.load import load_model
from soul import conversation as c
from soul.errors import UserError
from soul.rows import write_rows
from training import losses, sft
from training.data import Packed, example
from training.fit import TrainState, read_evals, read_metrics
from training.mixture import Part
from training.muon import Rates, muon_adamw
from training.optim import OptimConfig
from training.programs import Programs, plain_logprobs
from training.run import TrainConfig, setup

TRAIN = TrainConfig(length=96, batch_rows=2, compute="fp32", optim=OptimConfig(lr=1e-2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, and a mixture of two sources."""
    path = tmp_path_factory.mktemp("base")
    model_dir(path / "model")
    write_rows(path / "mine.parquet", [row | {"soul_hash": "s"} for row in sft_rows(40)], "sft")
    general = [{"instruction": f"say {i}", "output": f"{i}" * 3} for i in range(40)] + [{"instruction": "say", "output": "x" * 300}]
    (path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    (path / "mix.yaml").write_text("- data: mine.parquet\n- data: general.jsonl\n  weight: 0.2\n")
    return path


def config(base, out, train=TRAIN, **more):
    return sft.Config(out=out, train=train, **({"mixture": base / "mix.yaml", "model": str(base / "model")} | more))


def params(path):
    return nnx.split(load_model(path).model)[1]


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed")
    assert sft.main(config(base, out)) == 0
    return out


def test_a_mixture_is_trained_and_validated_by_source(mixed):
    steps, evals = len(read_metrics(mixed / "sft" / "metrics.jsonl")), read_evals(mixed / "sft" / "metrics.jsonl")
    lines = [line for line in evals if "bpb mine" in line["eval"]]
    assert [line["step"] for line in lines] == [-(-steps // 4) * n for n in (1, 2, 3)] + [steps]
    for source in ("mine", "general"):
        assert lines[-1]["eval"][f"bpb {source}"] < lines[0]["eval"][f"bpb {source}"] < 20
    assert load_model(mixed).meta["soul_hash"] == "s"


def test_samples_continue_held_out_prompts(mixed):
    text = (mixed / "sft" / "samples.md").read_text()
    assert text.startswith("# Held-out prompts") and text.count("## Row") == 3 == text.count("becomes")
    assert "say " in text and "what is " in text and "<|assistant_start|>" in text  # of both sources


def test_few_rows_are_trained_on_whole(base, tmp_path, capsys):
    write_rows(tmp_path / "few.parquet", sft_rows(19), "sft")
    train = TrainConfig(**{**vars(TRAIN), "max_tokens": 300})
    assert sft.main(config(base, tmp_path, train, mixture=None, data=(tmp_path / "few.parquet",))) == 0
    assert not any("bpb" in name for line in read_evals(tmp_path / "sft" / "metrics.jsonl") for name in line["eval"])
    assert (tmp_path / "sft" / "samples.md").read_text().startswith("# Training prompts")


def test_bits_per_byte_are_those_of_the_rows_one_by_one(base):
    this, items = setup(str(base / "model"), TRAIN, base, "sft"), [example(TEMPLATE, row["messages"]) for row in sft_rows(9)]
    graph, weights = nnx.split(this.loaded.model)
    (found,) = sft.evals(this, Programs(plain_logprobs(graph), losses.nll), None, [Part("x", 9, 1.0, [], items)], 512, 99, 1.0)
    assert found.every == 25
    ids_bt, masks_bt = (np.stack([np.pad(getattr(item, name), (0, 96 - len(item))) for item in items]) for name in ("ids", "mask"))
    model = nnx.merge(graph, weights)
    logp_btv = jax.jit(lambda ids: jax.nn.log_softmax(model.logits(model.hidden(ids))))(ids_bt)  # what follows a token cannot reach it
    logp_bt = np.take_along_axis(np.asarray(logp_btv)[:, :-1], ids_bt[:, 1:, None], 2)[..., 0]
    text_bt = (masks_bt[:, 1:] == 1) & (ids_bt[:, 1:] < 256)  # the tiny tokenizer's ids below 256 are one byte each
    expected = -logp_bt[text_bt].sum() / math.log(2) / text_bt.sum()
    assert found.run(0, TrainState(weights, None)) == {"bpb x": pytest.approx(expected, rel=1e-5)}


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    assert sft.main(config(base, out, lora=2)) == 0
    return out


def test_adapters_are_trained_and_merged_into_a_plain_model(base, adapted):
    lines, loaded = read_metrics(adapted / "sft" / "metrics.jsonl"), load_model(adapted)
    assert lines[-1]["loss"] < lines[0]["loss"] and loaded.meta["lora"] == 2
    (item,) = [p.name for p in (adapted / "sft" / "checkpoints" / str(len(lines))).iterdir() if p.is_dir()]
    assert item == "params"  # not the adapters: any reader of models reads it
    before, after = params(base / "model"), nnx.state(loaded.model)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = {
        str(path): not np.array_equal(x, y) for (path, x), y in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    }
    assert all(flag != ("norm" in name) for name, flag in moved.items())
    with pytest.raises(UserError, match="other settings"):
        sft.main(config(base, adapted))


def test_an_interrupted_run_of_adapters_resumes_to_the_same_bits(base, adapted, tmp_path, monkeypatch):
    batch = Packed.batch

    def stop_at_3(self, k):
        if k == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, k)

    monkeypatch.setattr(Packed, "batch", stop_at_3)
    assert sft.main(config(base, tmp_path, lora=2)) == 130
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "sft") == 4
    assert sft.main(config(base, tmp_path, lora=2)) == 0
    assert same(params(tmp_path), params(adapted))


def test_preflight_alone_trains_nothing(base, tmp_path, capsys):
    assert sft.main(config(base, tmp_path, preflight=True)) == 0
    said = capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert "nothing was trained" in said and "1 longer than 96" in said and "0.2" not in said and "(20%)" in said


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([c.user("hi"), c.assistant(" ")], "row b: its last assistant turn is empty"),
        ([c.user("hi")], "row b: has no trained token"),
        ([c.user("x" * 90_000), c.assistant("")], "row b: its last assistant turn is empty"),
        ([{"role": "robot", "content": "x"}], "row b: cannot be rendered"),
    ],
)
def test_the_command_refuses_with_exit_code_2_and_writes_nothing(base, tmp_path, capsys, messages, why):
    write_rows(tmp_path / "bad.parquet", [*sft_rows(2), {"id": "b", "messages": messages}], "sft")
    argv = [
        "sft",
        "--out",
        str(tmp_path / "run"),
        "--model",
        str(base / "model"),
        "--data",
        str(tmp_path / "bad.parquet"),
        "--preflight",
        "--length",
        "96",
    ]
    assert soulsmith.main(argv) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_two_ways_to_name_the_data_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="--data and --mixture"):
        sft.main(config(base, tmp_path, data=(base / "mine.parquet",)))


RATES = Rates(matrix=0.02, embed=0.3, head=0.008, gain=0.02)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A base whose optimizer has seen two steps of ones."""
    path = tmp_path_factory.mktemp("pretrained")
    weights, optimizer = nnx.split(decoder())[1], muon_adamw(RATES, 10)
    state = optimizer.init(weights)
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to the power of its int32 count
        for _ in range(2):
            _, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, weights), state, weights)
    plan = {"length": 96, "batch_rows": 8, "accumulate": 1, "rates": vars(RATES)}
    checkpoint.describe(path, CONFIG, tokenizer(), {"stage": "pretrain", "steps": 10, "identity": {"plan": plan}})
    checkpoint.save(path, 10, {"params": weights, "opt_state": state})
    return path, state


def test_the_momenta_of_pretraining_are_gone_on_with(base, pretrained, tmp_path, monkeypatch):
    (path, kept), seen = pretrained, {}
    monkeypatch.setattr(sft, "train", lambda job: seen.update(job=job) or 1)
    assert sft.main(config(base, tmp_path, model=str(path))) == 1
    job = seen["job"]
    fresh = job.optimizer.init(job.params)
    matrix, embed = (job.warm(fresh).inner_states[name].inner_state for name in ("matrix", "embed"))
    old, table = (kept.inner_states[name].inner_state for name in ("matrix", "embed"))
    assert same((matrix.momentum, matrix.second), (old.momentum, old.second)) and int(old.count) == 2 and int(matrix.count) == 0
    assert same(embed[0], table[0]) and int(embed[0].count) == 2  # Adam's: its averages need no correction any more
    assert [int(part.count) for part in embed if isinstance(part, optax.ScaleByScheduleState)] == [0]
    rates = [float(job.rate(step)) for step in range(job.steps + 1)]
    assert rates[0] == pytest.approx(0.02 * 0.8 * (2 / 8) ** 0.5) == max(rates) and rates[-1] == 0
    assert job.identity["settings"]["warm_start"] == 0.8
    for more in ({"warm_start": "no"}, {"lora": 2}, {"model": str(base / "model")}):
        assert sft.main(config(base, tmp_path, **({"model": str(path)} | more))) == 1
        assert "warm_start" not in seen["job"].identity["settings"] and same(seen["job"].warm(1), 1)


def test_a_warm_start_has_a_pulse(base, pretrained, tmp_path):
    assert sft.main(config(base, tmp_path, model=str(pretrained[0]))) == 0
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and load_model(tmp_path).meta["warm_start"] == 0.8
