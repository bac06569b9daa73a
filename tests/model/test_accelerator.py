"""What a GPU or a TPU would run, checked on a CPU: by patching what the code asks the backend, and by lowering for the other platform."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import attention, ops
from model.config import ModelConfig
from model.transformer import Decoder
from training import losses
from training.mesh import Layout, make_mesh
from training.programs import Programs, plain_logprobs, plain_nll

SMALL = ModelConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=96, rope_theta=1e4, max_len=256)
JAX_ATTENTION = jax.nn.dot_product_attention


@pytest.fixture(autouse=True)
def loose():
    """What jax's own attention does inside is not of one type and rank."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def on(monkeypatch):
    """Call it with "gpu" or "tpu": from then on the code thinks that it runs there."""

    forget = attention.fast_attention.cache_clear

    def become(backend):
        forget()
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    yield become
    forget()


@pytest.fixture
def asked(monkeypatch):
    """The implementations that are asked of jax; cuDNN's is done by XLA's."""
    names = []

    def attend(*args, implementation, **kwargs):
        names.append(implementation)
        return JAX_ATTENTION(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return names


def batch(rows=2, length=32, segments=True):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SMALL.vocab_size, (rows, length + 1)).astype(np.int32)
    found = {"ids": ids[:, :-1], "targets": ids[:, 1:].reshape(-1), "weights": rng.integers(0, 2, rows * length).astype(np.float32)}
    if segments:
        found["segments"] = np.repeat([[1] * 12 + [2] * (length - 12)], rows, axis=0).astype(np.int32)
    return found


def programs(compute="bf16", layout=None, **changes):
    graph, params = nnx.split(Decoder(SMALL, nnx.Rngs(0), compute=compute))
    params = jax.tree.map(lambda p: p * 8 if p.ndim > 1 else p, params)  # so that attention matters
    return Programs(plain_logprobs(graph), losses.nll, total=plain_nll(graph), **({"layout": layout} if layout else {})), params


def step(compute="bf16", **rows):
    made, params = programs(compute)
    (total, _), grads = made.whole(params, None, batch(**rows))
    return float(total), np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize(("compute", "bound"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_an_accelerator_computes_what_a_cpu_does(on, asked, compute, bound, segments):
    """Bounds: of the gradient's length. Seen: 9e-7 in fp32, 0.012 in bf16 (where activations are rounded once more)."""
    total, grads = step(compute, segments=segments)
    on("gpu")
    other, other_grads = step(compute, segments=segments)
    assert asked.count("cudnn") == (0 if compute == "fp32" else 1 + SMALL.n_layers)
    assert other == pytest.approx(total, rel=bound / 3)
    assert np.linalg.norm(other_grads - grads) < bound * np.linalg.norm(grads)


def test_activations_are_rounded_there_but_logits_are_not(on):
    model = Decoder(SMALL, nnx.Rngs(0), compute="bf16")
    on("gpu")

    def rounded(x):
        return bool((x == x.astype(jnp.bfloat16).astype(x.dtype)).all())

    x_nd = jax.random.normal(jax.random.key(0), (5, SMALL.d_model))
    assert rounded(ops.matmul(x_nd, model.layers[0].wq[...], "bf16")) and not rounded(model.logits(x_nd))


def test_fp32_products_stay_fp32_there(on):
    """By default a GPU rounds fp32 operands to TF32, a TPU to bf16."""
    on("gpu")
    text = lowered("cuda", *programs("fp32"))
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 40 and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_is_tried_even_when_the_first_to_ask_is_being_traced(on, asked, masked):
    on("gpu")
    seen = []
    jax.jit(lambda x: seen.append(attention.fast_attention("gpu", 16, masked)) or x)(1.0)
    assert seen == [attention.by_cudnn] and "cudnn" in asked


def test_a_kernel_that_fails_or_drops_the_segments_is_left_and_said_so(on, monkeypatch, caplog):
    on("gpu")

    def without_mask(q, k, v, mask=None, **kwargs):
        return JAX_ATTENTION(q, k, v, mask=mask if kwargs["implementation"] == "xla" else None, **kwargs | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_mask)
    assert attention.fast_attention("gpu", 16, False) is attention.by_cudnn
    with caplog.at_level(logging.WARNING):
        assert attention.fast_attention("gpu", 16, True) is None
        assert "cudnn attention within segments is off" in caplog.text and "differs from XLA" in caplog.text
        on("gpu")
        monkeypatch.setattr(jax.nn, "dot_product_attention", JAX_ATTENTION)  # there is no cuDNN here
        assert attention.fast_attention("gpu", 16, False) is None
        assert "cudnn attention is off" in caplog.text
    total, _ = step()  # and training goes on without
    assert np.isfinite(total)


def test_an_odd_row_is_left_to_xla(on, asked):
    on("gpu")
    step(length=31)
    assert "cudnn" not in asked[3:]


def lowered(platform, made, params, **rows):
    return made.whole.trace(params, None, batch(**rows)).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def cudnn(on, monkeypatch):
    """A GPU with cuDNN as far as lowering asks."""
    kernels = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(kernels + "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels + "check_compute_capability", lambda _: True)
    monkeypatch.setattr(kernels + "is_cuda_compute_capability_equal", lambda _: False)
    on("gpu")
    monkeypatch.setattr(attention, "fast_attention", lambda *_: attention.by_cudnn)


@pytest.mark.parametrize("segments", [True, False])
def test_the_step_of_a_gpu_holds_cudnn_forward_and_backward_in_every_layer(cudnn, segments):
    text = lowered("cuda", *programs(), segments=segments)
    name = "__cudnn$fmhaScaleBiasSoftmax" if segments else "__cudnn$fmhaSoftmax"
    assert text.count(f"{name}(") == text.count(f"{name}Backward(") == SMALL.n_layers


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2", "data=2,tensor=4"])
def test_on_a_mesh_no_kernel_is_left_for_xla_to_split(cudnn, mesh):
    """It could not: what a shard of a mesh with an axis of XLA's own asks of `custom_partitioning` fails in compiling."""
    layout = Layout(make_mesh(mesh, accumulate=8), SMALL)
    made, params = programs(layout=layout)
    shapes = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, layout.shardings(params))
    text = lowered("cuda", made, shapes, rows=8)
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text and "CustomSPMDPartitioning" not in text


@pytest.mark.parametrize("mesh", ["data=4,fsdp=2", "data=2,fsdp=2,tensor=2", "data=2,tensor=4"])
def test_heads_of_their_own_devices_give_the_sums_of_one_device(on, asked, mesh):
    on("gpu")
    layout = Layout(make_mesh(mesh, accumulate=8), SMALL)
    one, params = programs()
    many, _ = programs(layout=layout)
    parts = [batch(segments=True) for _ in range(layout.shards)]
    (total, _), grads = one.accumulated(params, None, parts)
    before = len(asked)
    (split, _), split_grads = many.accumulated(layout.put(params), None, parts)
    assert "cudnn" in asked[before:]
    bound, apart = (1e-3, 0.06) if "tensor" in mesh else (1e-6, 1e-6)  # seen 1e-4 and .03 (each device rounds its part to bf16), 0 and 7e-8
    assert float(split) == pytest.approx(float(total), rel=bound)
    assert all(np.linalg.norm(a - b) < apart * np.linalg.norm(b) for a, b in zip(*map(arrays, (split_grads, grads)), strict=True))


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def heads(t=256, d_head=64, kv=2):
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (jax.random.normal(key, (2, t, n, d_head), jnp.bfloat16) for key, n in zip(keys, (4, kv, kv), strict=True))
    return q, k, v, jnp.repeat(jnp.asarray([[1] * 100 + [2] * (t - 100)]), 2, axis=0)


@pytest.mark.parametrize("masked", [True, False])
def test_splash_attention_agrees_with_xla(monkeypatch, masked):
    """In Pallas' interpreter: what the kernel computes, not how a TPU runs it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make = splash.make_splash_mha_single_device
    monkeypatch.setattr(splash, "make_splash_mha_single_device", functools.partial(make, interpret=True))
    q, k, v, segments = heads()

    def results(attend):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments if masked else None), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pullback(jnp.ones_like(out)))]

    for fast, slow in zip(results(attention.by_splash), results(attention.by_xla), strict=True):
        assert np.abs(fast - slow).max() < 0.03 * np.abs(slow).max()


def test_the_step_of_a_tpu_holds_splash_attention(on, monkeypatch):
    on("tpu")
    monkeypatch.setattr(attention, "fast_attention", lambda *_: attention.by_splash)
    assert "tpu_custom_call" in lowered("tpu", *programs(), length=128)
    assert "tpu_custom_call" not in lowered("tpu", *programs(), length=96)
