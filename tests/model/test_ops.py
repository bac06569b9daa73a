import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention as att
from model import ops

KEY = jax.random.key(7)


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def reference_attention(q, k, v, segments=None):
    """One head at a time, keys and values repeated, full scores: the definition, spelled out."""
    b, t, heads, h = q.shape
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(h)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool))[None], (b, t, t))
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask[:, None], s, -jnp.inf), axis=-1), v)


@pytest.mark.parametrize("t", [5, 64, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_and_its_gradients_equal_the_definition(t, packed):
    q, k, v = normal(0, 2, t, 4, 8), normal(1, 2, t, 2, 8), normal(2, 2, t, 2, 8)
    segments = jnp.asarray([[0] * (t // 3) + [1] * (t - t // 3), [5] * (t - 2) + [0] * 2]) if packed else None
    weight = normal(3, *q.shape)

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda *qkv: (f(*qkv, segments) * weight).sum(), (0, 1, 2)))(q, k, v)

    for ours, theirs in zip(jax.tree.leaves(loss(att.attention)), jax.tree.leaves(loss(reference_attention)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_segment_never_sees_another_one_however_large_its_keys():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    q, k, v = normal(0, 1, 6, 2, 8), normal(1, 1, 6, 1, 8), normal(2, 1, 6, 1, 8)
    loud = jnp.where(segments[..., None, None] == 1, 1e3, 1.0)
    run = jax.jit(att.attention)
    a, b = run(q, k, v, segments), run(q, k * loud, v * loud, segments)
    np.testing.assert_array_equal(a[:, 3:], b[:, 3:])
    assert not np.allclose(a[:, :3], b[:, :3])


def test_segment_starts():
    np.testing.assert_array_equal(att.segment_starts((1, 6), jnp.asarray([[3, 3, 1, 1, 1, 3]])), [[0, 0, 2, 2, 2, 5]])
    np.testing.assert_array_equal(att.segment_starts((1, 3)), [[0, 0, 0]])


@pytest.mark.parametrize("compute, tolerance", [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("transpose", [False, True])
def test_matmul_values_and_gradients(compute, tolerance, transpose):
    x, w, weight = normal(0, 3, 7, 16), normal(1, 16, 24), normal(2, 3, 7, 24)
    value, grads = jax.value_and_grad(lambda x, w: (ops.matmul(x, w, compute, transpose) * weight).sum(), (0, 1))(
        x, w.T if transpose else w
    )
    wanted, exact = jax.value_and_grad(lambda x, w: (jnp.einsum("btd,df->btf", x, w) * weight).sum(), (0, 1))(x, w)
    np.testing.assert_allclose(value, wanted, rtol=tolerance * 10)
    for ours, theirs in zip(grads, (exact[0], exact[1].T if transpose else exact[1]), strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("kept", [0, ops.KEPT])
@pytest.mark.parametrize("n, chunk", [(10, 4), (12, 4), (3, 256)])
def test_token_logprobs_values_and_gradients_equal_log_softmax(n, chunk, kept, monkeypatch):
    monkeypatch.setattr(ops, "KEPT", kept)
    x, head, weight = normal(0, n, 16), normal(1, 50, 16), normal(2, n)
    targets = jax.random.randint(KEY, (n,), 0, 50)

    def definition(x, head):
        return jnp.take_along_axis(jax.nn.log_softmax(x @ head.T), targets[:, None], axis=1)[:, 0]

    def chunked(x, head):
        return ops.token_logprobs(x, head, targets, "fp32", chunk)

    np.testing.assert_allclose(chunked(x, head), definition(x, head), atol=1e-4)
    ours, theirs = (jax.jit(jax.grad(lambda x, h, f=f: (f(x, h) * weight).sum(), (0, 1)))(x, head) for f in (chunked, definition))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_kept_gradient_of_a_token_that_is_nearly_sure_is_as_fine_as_any(monkeypatch):
    x = jnp.eye(16)[:8]
    head = jnp.eye(16) * jnp.linspace(8.0, 12.0, 16)[:, None]  # p of the target from .994 to .9998
    targets = jnp.arange(8, dtype=jnp.int32)

    def gradient(kept):
        monkeypatch.setattr(ops, "KEPT", kept)
        return jax.grad(lambda x: ops.token_logprobs(x, head, targets, "bf16").sum())(x)

    np.testing.assert_allclose(gradient(ops.KEPT), gradient(0), rtol=0.02, atol=1e-5)


def test_token_logprobs_hold_a_gradient_up_to_a_limit_and_full_logits_never(monkeypatch):
    def biggest(n, kept):
        monkeypatch.setattr(ops, "KEPT", kept)
        args = (jnp.zeros((n, 8)), jnp.zeros((512, 8)), jnp.zeros(n, jnp.int32))
        grad = jax.grad(lambda x, h, t: ops.token_logprobs(x, h, t, "fp32", 16).sum(), (0, 1))
        return jax.jit(grad).lower(*args).compile().memory_analysis().temp_size_in_bytes

    full = 1024 * 512 * 4
    assert biggest(1024, full - 1) < full / 2 < full <= biggest(1024, full) < 1.5 * full


def test_rms_norm_keeps_dtype_and_computes_in_fp32():
    x = normal(0, 2, 8)
    rms = np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(ops.rms_norm(x, jnp.full(8, 2.0), 0.0), 2 * x / rms, rtol=1e-5)
    assert ops.rms_norm(x.astype(jnp.bfloat16), jnp.ones(8), 1e-5).dtype == jnp.bfloat16


def test_rope_depends_on_distance_only_and_position_zero_is_the_identity():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(a, b):
        turn = [ops.rope(x, ops.rope_table(jnp.asarray([[p]]), 8, 100.0)) for x, p in ((q, a), (k, b))]
        return float((turn[0] * turn[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    np.testing.assert_array_equal(ops.rope(q, ops.rope_table(jnp.zeros((1, 1), jnp.int32), 8, 100.0)), q)
    turned = ops.rope(jnp.asarray([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4), ops.rope_table(jnp.asarray([[2]]), 4, 100.0))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)], atol=1e-6)  # i pairs with i + h/2, angle > 0


def test_compute_is_explicit_or_decided_once():
    assert ops.resolve_compute("fp32") == "fp32" and ops.resolve_compute("auto") in ("fp32", "bf16")
    with pytest.raises(ValueError, match="fp16"):
        ops.resolve_compute("fp16")


@pytest.mark.parametrize("compute, tolerance", [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("n", [5, 512, 1100])  # less than a chunk, one, several with padding
def test_nll_is_the_weighted_sum_of_token_logprobs(n, compute, tolerance):
    x, head = normal(0, n, 32), normal(1, 96, 32) * 0.3
    targets, weights = jnp.arange(n) % 96, (jnp.arange(n) % 3).astype(jnp.float32)
    plain = jax.jit(jax.value_and_grad(lambda x, w: 2 * -(ops.token_logprobs(x, w, targets, "fp32") * weights).sum(), (0, 1)))(x, head)
    ours = jax.jit(jax.value_and_grad(lambda x, w: 2 * ops.nll(x, w, targets, weights, compute), (0, 1)))(x, head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=tolerance)
    assert float(ops.nll(x, head, targets, weights, compute)) == pytest.approx(float(ours[0]) / 2, rel=1e-5)


@pytest.mark.parametrize("compute, tolerance", [("fp32", 1e-5), ("bf16", 0.03)])
def test_swiglu_and_its_gradients_equal_the_definition(compute, tolerance):
    x, gate, up, down, weight = normal(0, 2, 5, 16), normal(1, 16, 24), normal(2, 16, 24), normal(3, 24, 16), normal(4, 2, 5, 16)
    ours = jax.value_and_grad(lambda *a: (ops.swiglu(*a, compute) * weight).sum(), (0, 1, 2, 3))(x, gate, up, down)
    spelled = jax.value_and_grad(lambda x, g, u, d: (((jax.nn.silu(x @ g) * (x @ u)) @ d) * weight).sum(), (0, 1, 2, 3))(x, gate, up, down)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(spelled), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=tolerance)


@pytest.mark.parametrize("vocab, width, n", [(8192, 256, 512), (8192, 256, 2048), (32768, 384, 1024), (49152, 576, 640)])
def test_the_shapes_that_training_uses_run_in_this_machines_arithmetic(vocab, width, n):
    """XLA's CPU client accepts some bf16 products and fails only when it runs them."""
    x, head, targets = normal(0, n, width), normal(1, vocab, width), jnp.zeros(n, jnp.int32)
    compute = ops.resolve_compute("auto")
    for loss in (
        lambda x, w: ops.nll(x, w, targets, jnp.ones(n), compute),
        lambda x, w: ops.token_logprobs(x, w, targets, compute).sum(),
    ):
        assert all(bool(jnp.isfinite(g).all()) for g in jax.jit(jax.grad(loss, (0, 1)))(x, head))


def test_bf16_is_really_tried_when_the_first_to_ask_is_a_model_being_traced(monkeypatch):
    """XLA's "UNIMPLEMENTED ... DotThunk" comes when a product runs, so a probe that is only traced would always say yes."""
    ran = []

    def wait(tree):
        ran.extend(jax.tree.map(lambda x: not isinstance(x, jax.core.Tracer), jax.tree.leaves(tree)))
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: Unsupported element type in DotThunk")

    monkeypatch.setattr(jax, "block_until_ready", wait)
    found = []
    jax.eval_shape(lambda x: found.append(ops._bf16_runs()) or x, 1.0)
    assert ran == [True, True] and found == [False]
