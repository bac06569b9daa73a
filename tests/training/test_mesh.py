"""Eight fake devices do what one does. Bounds are about ten times what was measured; only the order of sums differs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import CONFIG as TINY
from tiny_model import TEMPLATE, preference_rows, random_examples, same

from model import checkpoint
from model.transformer import Decoder
from soul.errors import UserError
from training import losses, mesh
from training.data import Packed, pair
from training.fit import Loop, TrainState, fit, read_metrics
from training.lora import trained as adapted
from training.mesh import Layout, make_mesh
from training.muon import Rates, muon_adamw
from training.optim import OptimConfig, adamw
from training.programs import Programs, plain_logprobs

CONTROL = tuple(range(256, 264))
CONFIG = replace(TINY, qk_norm=True)  # gains of a head stay whole on every device


def decoder():
    return Decoder(CONFIG, nnx.Rngs(0), compute="fp32")


GRAPH = nnx.split(decoder())[0]


def fresh():
    return nnx.split(decoder())[1]


def layout_of(spec):
    return Layout(make_mesh(spec, accumulate=8), CONFIG) if spec else Layout()


def sft_batches():
    return Packed.build(random_examples(0, 40, 32), 32, 2, 5).batch


def pretrain_batches():
    def batch(k):
        rows = np.random.default_rng(k).integers(0, 256, (2, 33)).astype(np.int32)
        return {"ids": rows[:, :-1], "targets": rows[:, 1:].reshape(-1), "weights": np.ones(64, np.float32)}

    return batch


def dpo_batches():
    """With a reference that is a little off, so that the gradient doesn't vanish."""
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(40)], 64, 2, 0)
    noise = np.random.default_rng(0).normal(-5, 0.1, (len(packed.blocks), packed.supervised)).astype(np.float32)
    return lambda k: packed.batch(k) | {"reference": noise[packed.block_of(k)]}


KINDS = {"sft": (sft_batches, losses.nll, True), "pretrain": (pretrain_batches, losses.nll, True),
         "dpo": (dpo_batches, losses.Preference(beta=0.1, alpha=0.2), False)}  # fmt: skip


@functools.cache
def programs_of(kind, spec=None):
    _, loss, fused = KINDS[kind]
    return Programs(plain_logprobs(GRAPH), loss, fused, layout_of(spec))


def apart(a, b) -> float:
    """The largest difference of any leaf, relative to that leaf's largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max() / (np.abs(np.asarray(y)).max() + 1e-30)) for x, y in pairs)


def distance(a, b) -> float:
    """The largest relative Frobenius distance of any leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y))) for x, y in pairs)


def placed(tree, layout) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(layout.shardings(tree)), strict=True)
    return all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs)


@pytest.fixture(scope="module")
def alone():
    """Sums and gradients of 8 micro-batches on one device, by kind."""
    return {kind: programs_of(kind).accumulated(fresh(), None, [*map(make(), range(8))]) for kind, (make, _, _) in KINDS.items()}


@pytest.mark.parametrize("kind, spec", [
    ("sft", "data=8"), ("sft", "data=2,fsdp=4"), ("pretrain", "fsdp=8"), ("pretrain", "data=2,fsdp=2,tensor=2"), ("dpo", "data=2,fsdp=4"),
])  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(alone, kind, spec):
    """Measured: values 2e-7, gradients 7e-7 of each leaf's largest."""
    programs = programs_of(kind, spec)
    batch = KINDS[kind][0]()
    value, grads = programs.accumulated(programs.layout.put(fresh()), None, [batch(k) for k in range(8)])
    assert apart(value, alone[kind][0]) < 3e-6 and apart(grads, alone[kind][1]) < 1e-5
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads)) and placed(grads, programs.layout)


OPTIMIZERS = {"adamw": adamw(OptimConfig(lr=1e-2), 6), "muon": muon_adamw(Rates(0.02, 0.1, 0.01, 0.01, 0.1), 6)}


def trained(tmp_path, optimizer, spec=None, steps=6, start=0, resume=None):
    """State after `steps` steps of two accumulated groups, started fresh or read back from `resume`; and the losses."""
    programs, optimizer = programs_of("sft", spec), OPTIMIZERS[optimizer]
    params = programs.layout.put(fresh())
    state = TrainState(params, programs.layout.init(optimizer.init, params))
    if resume:
        start, items = checkpoint.restore(resume, vars(state))
        state = TrainState(**items)
    assert not spec or placed(state, programs.layout)
    metrics = tmp_path / "metrics.jsonl"
    state, _ = fit(programs, optimizer, state, sft_batches(), Loop(steps, lambda step, state: None, metrics, 16), start=start)
    return state, np.array([line["loss"] for line in read_metrics(metrics)])


@pytest.fixture(scope="module")
def alone_trained(tmp_path_factory):
    return {name: trained(tmp_path_factory.mktemp(name), name) for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_six_steps_are_those_of_one_device(tmp_path, alone_trained, optimizer, spec="data=2,fsdp=4"):
    """Measured: losses 2e-7, weights 4e-5 of each leaf's largest, embedding 1.3e-4 of its norm.

    The embedding by its norm: Adam makes a whole step of a single element whose gradient cancels to its rounding (7e-10 beside 9).
    """
    state, losses_ = trained(tmp_path, optimizer, spec)
    expected, expected_losses = alone_trained[optimizer]
    assert expected_losses[-1] < expected_losses[0] - 0.5
    assert apart(losses_, expected_losses) < 1e-5 and distance(state.params, expected.params) < 1e-3
    rest, expected_rest = ({name: leaf for name, leaf in tree.items() if name != "embed"} for tree in (state.params, expected.params))
    assert apart(rest, expected_rest) < 1e-3
    assert placed(state, layout_of(spec))


def test_a_device_holds_an_eighth_of_the_state():
    layout = layout_of("fsdp=8")
    params = layout.put(fresh())
    for optimizer in OPTIMIZERS.values():
        state = TrainState(params, layout.init(optimizer.init, params))
        held, whole = (
            sum(f(x) for x in jax.tree.leaves(state)) for f in (lambda x: x.addressable_shards[3].data.nbytes, lambda x: x.nbytes)
        )
        assert held == pytest.approx(whole / 8, rel=0.02)  # counters, and q_norm-like gains that 8 does not divide


def test_no_whole_weight_outlives_the_forward():
    """The pullback keeps parts of the weights and gathers them again: 80 instead of 184 MB a device at 34M parameters, 128 tokens."""
    programs, batch = programs_of("dpo", "fsdp=8"), dpo_batches()
    [placed_batch] = programs.layout.place([batch(k) for k in range(8)])
    _, pullback = jax.eval_shape(programs.forward, programs.layout.put(fresh()), None, placed_batch)
    weights = {x.shape for x in jax.tree.leaves(fresh()) if x.ndim == 2}
    assert not [x.shape for x in jax.tree.leaves(pullback) if x.shape[1:] in weights]


def test_before_the_first_step_every_margin_is_zero():
    """Also for a block that stands on another shard than when its reference was computed."""
    programs = programs_of("dpo", "data=2,fsdp=4")
    params = programs.layout.put(fresh())
    packed = Packed.build([pair(TEMPLATE, row) for row in preference_rows(60)], 64, 2, 0)
    reference = [*programs.scores(params, None, [packed.block(n) for n in range(len(packed.blocks))])]
    assert len(reference) == len(packed.blocks) > 8 and all(r.shape == (packed.supervised,) for r in reference)
    batches = [packed.batch(k) | {"reference": reference[packed.block_of(k)]} for k in range(8)]
    (_, (count, sums)), _ = programs.accumulated(params, None, batches)
    assert float(sums["margin"]) == 0.0 and float(sums["accuracy"]) == float(count) / 2
    logp = [np.asarray(x) for x in programs.scores(params, None, batches)]
    assert all(np.array_equal(a, b["reference"]) for a, b in zip(logp, batches, strict=True))


def test_scores_are_those_of_one_device():
    batches = [sft_batches()(k) for k in range(3)]
    for fused_kind in ("sft", "dpo"):
        one = [*programs_of(fused_kind).scores(fresh(), None, batches)]
        programs = programs_of(fused_kind, "data=2,fsdp=4")
        many = [*programs.scores(programs.layout.put(fresh()), None, batches)]
        assert len(many) == 3 and apart(many, one) < 1e-5


@pytest.mark.parametrize("before, after", [(None, "data=2,fsdp=4"), ("data=2,fsdp=4", None)])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, alone_trained, before, after):
    half, _ = trained(tmp_path / "a", "adamw", before, steps=3)
    checkpoint.save(tmp_path / "run", 3, vars(half))
    _, losses_ = trained(tmp_path / "b", "adamw", after, resume=tmp_path / "run")
    _, expected = alone_trained["adamw"]
    assert len(losses_) == 3 and apart(losses_, expected[3:]) < 1e-5


def test_adapters_are_trained_on_a_mesh():
    """The frozen base is split like parameters, adapters along their longest axis; the gradient is that of one device."""
    adapters = adapted(decoder(), 4, CONTROL, 0)
    batch = sft_batches()
    micro = [batch(k) for k in range(8)]
    _, expected = Programs(adapters.logprobs, losses.nll).accumulated(adapters.params, adapters.frozen, micro)
    layout = layout_of("fsdp=8")
    programs = Programs(adapters.logprobs, losses.nll, layout=layout)
    params, frozen = layout.put(adapters.params), layout.put(adapters.frozen)
    _, grads = programs.accumulated(params, frozen, micro)
    assert apart(grads, expected) < 1e-5
    assert all(x.addressable_shards[0].data.nbytes < x.nbytes for x in jax.tree.leaves(frozen) if x.ndim == 2)


class Device:
    platform = "gpu"

    def __init__(self, memory):
        self.memory = memory

    def memory_stats(self):
        return {"bytes_limit": self.memory}


@pytest.mark.parametrize("accumulate, state_gb, sizes", [
    (8, 1, (8, 1)), (8, 40, (8, 1)), (8, 60, (4, 2)), (8, 300, (1, 8)), (8, 9000, (1, 8)), (16, 100, (2, 4)), (4, 1, (4, 1)), (3, 1, (3, 1)), (1, 1, None),
])  # fmt: skip
def test_auto_splits_the_state_no_finer_than_it_must(monkeypatch, accumulate, state_gb, sizes):
    """Eight devices of 80 GB; a number of micro-batches that doesn't divide among them takes fewer."""
    real = jax.devices()
    fake = [Device(80e9) for _ in real]
    monkeypatch.setattr(mesh.jax, "devices", lambda: fake)
    monkeypatch.setattr(mesh.jax, "make_mesh", lambda shape, *_, devices: (shape, len(devices)))
    made = make_mesh("auto", accumulate=accumulate, state_bytes=state_gb * 10**9)
    assert made == (sizes and ((*sizes, 1), sizes[0] * sizes[1]))


def test_whole_brings_weights_back():
    layout = layout_of("data=2,fsdp=4")
    back = layout.whole(layout.put(fresh()))
    assert same(back, fresh()) and all(len(x.devices()) == 1 for x in jax.tree.leaves(back))


def test_auto_on_a_cpu_is_one_device():
    assert make_mesh("auto", accumulate=8) is None and make_mesh("data=1") is None


@pytest.mark.parametrize("spec, accumulate, message", [
    ("data=3", 3, "asks for 3 devices, here are 8. Write sizes that multiply to 8"),
    ("data=8", 4, "--accumulate 4 micro-batches a step do not divide among 8 shards (data × fsdp). Use a multiple of 8"),
    ("rows=8", 8, "'rows=8' is not data, fsdp, tensor=SIZE"),
    ("data=-8", 8, "'data=-8' is not"),
    ("data", 8, "'data' is not"),
])  # fmt: skip
def test_a_wrong_mesh_is_one_clear_line(spec, accumulate, message):
    with pytest.raises(UserError) as error:
        make_mesh(spec, accumulate=accumulate)
    assert message in str(error.value)


def test_heads_are_never_split():
    """kv_heads=2 of 8 elements each: 16 columns would divide by 4, but a head would stand on two devices."""
    specs = Layout(make_mesh("fsdp=2,tensor=4", accumulate=2), CONFIG).specs(fresh())
    layer = nnx.to_pure_dict(specs)["layers"][0]
    assert tuple(layer["wk"]) == ("fsdp", None) and tuple(layer["wq"]) == ("fsdp", "tensor")
