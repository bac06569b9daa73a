"""The compiled programs of one step: log-probs and their gradient, whole or in parts, on one device or on each shard of a mesh.

Whole (`fused`), forward and backward are one program and XLA plans their memory together. In parts (forward, loss, backward), the forward is an
executable of its own, so that the reference log-probs of DPO come out of the very program that the policy's do, and equal weights give equal bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from training import losses
from training.mesh import ONE_DEVICE, ROWS, Layout

Logprobs = Callable[[Any, Any, dict], jax.Array]


def plain_logprobs(graph) -> Logprobs:
    """`(params, frozen, batch) -> logp_n` of a decoder that is trained whole (`frozen` is None)."""
    return lambda params, _, batch: losses.token_logprobs(graph, params, batch)


def plain_nll(graph) -> Callable:
    """`total` of a decoder that is trained whole on the likelihood of tokens."""
    return lambda params, _, batch: losses.token_nll(graph, params, batch)


class Programs:
    """Log-probs, loss and gradient of one model and loss.

    `logprobs(params, frozen, batch) -> logp_n`: `params` is what is trained, `frozen` a pytree that is not (None, or the base under adapters).
    `loss(logp_n, batch) -> (sum, (count, {metric: sum}))`. Under a mesh both see one shard's micro-batch and whole parameters.
    `total(params, frozen, batch)` is what both together give, where there is a shorter way to it; only the fused program takes it.
    """

    def __init__(self, logprobs: Logprobs, loss: Callable, fused: bool = True, layout: Layout = ONE_DEVICE, total: Callable | None = None):
        gradient_of_loss = jax.value_and_grad(loss, has_aux=True)

        def only(params, frozen, batch):
            p, f = layout.parts(params), layout.parts(frozen)
            return layout.spread(layout.gathered(logprobs, p, f), (p, f, ROWS), ROWS)(params, frozen, batch)

        def forward(params, frozen, batch):
            p, f = layout.parts(params), layout.parts(frozen)
            logp = layout.gathered(logprobs, p, f)

            def shard(params, frozen, batch):
                logp_n, pullback = jax.vjp(lambda q: logp(q, frozen, batch), params)
                return logp_n, layout.stacked(pullback)

            return layout.spread(shard, (p, f, ROWS), (ROWS, ROWS))(params, frozen, batch)

        def of_loss(logp_n, batch):
            def shard(logp_n, batch):
                value, g_n = gradient_of_loss(logp_n, batch)
                return layout.total(value), g_n

            return layout.spread(shard, (ROWS, ROWS), (P(), ROWS))(logp_n, batch)

        def backward(params, pullback, g_n):
            p = layout.parts(params)

            def shard(pullback, g_n):
                return layout.scattered(layout.unstacked(pullback)(g_n)[0], p)

            return layout.spread(shard, (ROWS, ROWS), p)(pullback, g_n)

        def whole(params, frozen, batch):
            p, f = layout.parts(params), layout.parts(frozen)
            value_of = layout.gathered(total or (lambda *args: loss(logprobs(*args), args[-1])), p, f)

            def shard(params, frozen, batch):
                value, grads = jax.value_and_grad(value_of, has_aux=True)(params, frozen, batch)
                return layout.total(value), layout.scattered(grads, p)

            return layout.spread(shard, (p, f, ROWS), (P(), p))(params, frozen, batch)

        def add(a, b):
            return jax.tree.map(jnp.add, a, b)

        self.fused, self.layout = fused, layout
        self.logprobs, self.forward, self.loss, self.backward, self.whole = map(jax.jit, (only, forward, of_loss, backward, whole))
        self.add = jax.jit(add, donate_argnums=0)

    def gradients(self, params, frozen, batch: dict):
        """(sum, (count, sums)) of one micro-batch (or of one for each shard, placed by `layout`), and the gradient of the sum."""
        if self.fused:
            return self.whole(params, frozen, batch)
        logp_n, pullback = self.forward(params, frozen, batch)
        value, g_n = self.loss(logp_n, batch)
        return value, self.backward(params, pullback, g_n)

    def accumulated(self, params, frozen, batches: Sequence[dict]):
        """Sums, counts and gradients over all micro-batches (numpy arrays; of those, this process's): added, never averaged."""
        value = grads = None
        for batch in self.layout.place(batches):
            more, more_grads = self.gradients(params, frozen, batch)
            value, grads = (more, more_grads) if value is None else (self.add(value, more), self.add(grads, more_grads))
        return value, grads

    def scores(self, params, frozen, batches: Sequence[dict]) -> Iterator[np.ndarray]:
        """log p of every micro-batch, N each, by the forward that training uses; any number of them, the same on every process."""
        layout = self.layout
        filled = [*batches, *batches[-1:] * (-len(batches) % layout.shards)]
        groups = layout.place([filled[k] for k in layout.local(range(len(filled)))])
        for first, group in zip(range(0, len(filled), layout.shards), groups):
            logp_n = self.logprobs(params, frozen, group) if self.fused else self.forward(params, frozen, group)[0]
            yield from layout.fetch(logp_n)[: len(batches) - first]
