"""The compiled programs of one step: log-probs and their gradient, whole or in parts.

Whole (`fused`), forward and backward are one program and XLA plans their memory together. In parts (forward, loss, backward), the forward is an
executable of its own, so that the reference log-probs of DPO come out of the very program that the policy's do, and equal weights give equal bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from training import losses

Logprobs = Callable[[Any, Any, dict], jax.Array]


def plain_logprobs(graph) -> Logprobs:
    """`(params, frozen, batch) -> logp_n` of a decoder that is trained whole (`frozen` is None)."""
    return lambda params, _, batch: losses.token_logprobs(graph, params, batch)


class Programs:
    """Log-probs, loss and gradient of one model and loss.

    `logprobs(params, frozen, batch) -> logp_n`: `params` is what is trained, `frozen` a pytree that is not (None, or the base under adapters).
    `loss(logp_n, batch) -> (sum, (count, {metric: sum}))`.
    """

    def __init__(self, logprobs: Logprobs, loss: Callable, fused: bool = True):
        def forward(params, frozen, batch):
            return jax.vjp(lambda p: logprobs(p, frozen, batch), params)

        def backward(pullback, g_n):
            return pullback(g_n)[0]

        def whole(params, frozen, batch):
            return jax.value_and_grad(lambda p: loss(logprobs(p, frozen, batch), batch), has_aux=True)(params)

        def add(a, b):
            return jax.tree.map(jnp.add, a, b)

        self.fused = fused
        self.forward, self.backward, self.whole, self.add = (
            jax.jit(forward),
            jax.jit(backward),
            jax.jit(whole),
            jax.jit(add, donate_argnums=0),
        )
        self.logprobs = jax.jit(logprobs)
        self.loss = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def gradients(self, params, frozen, batch: dict):
        """(sum, (count, sums)) of one micro-batch, and the gradient of the sum."""
        if self.fused:
            return self.whole(params, frozen, batch)
        logp_n, pullback = self.forward(params, frozen, batch)
        value, g_n = self.loss(logp_n, batch)
        return value, self.backward(pullback, g_n)

    def accumulated(self, params, frozen, batches: Sequence[dict]):
        """Sums, counts and gradients over all micro-batches (numpy or device arrays): added, never averaged."""
        value, grads = self.gradients(params, frozen, jax.device_put(batches[0]))
        for batch in batches[1:]:
            more, more_grads = self.gradients(params, frozen, jax.device_put(batch))
            value, grads = self.add(value, more), self.add(grads, more_grads)
        return value, grads
