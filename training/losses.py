"""Losses over token log-probabilities. The model appears only in `token_logprobs`; a loss never sees it.

A loss is `loss(logp_n, batch) -> (sum, (count, sums))`: `sums` maps each metric's name to a sum over the same `count`. So accumulated
micro-batches add up and divide once: a mean of means would weigh short batches like long ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model import ops


def token_logprobs(graph, params, batch: dict) -> jax.Array:
    """log p of each supervised token, N in fp32; the head is computed at those positions only (all of them where the batch has no `at`)."""
    model = nnx.merge(graph, params)
    x_btd = model.hidden(batch["ids"], batch.get("positions"), batch.get("segments"))
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    return ops.token_logprobs(x_nd[batch["at"]] if "at" in batch else x_nd, model.head_vd(), batch["targets"], model.compute)


def nll(logp_n: jax.Array, batch: dict):
    """Negative log-likelihood of the supervised tokens: the loss of pretraining and SFT."""
    return -jnp.sum(logp_n * batch["weights"]), (jnp.sum(batch["weights"]), {})


def by_branch(values_n: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Sums over each chosen and each rejected branch, P each (0 in empty slots)."""
    pairs = batch["real"].shape[0]
    total = jax.ops.segment_sum(values_n, batch["branch"], num_segments=2 * pairs + 1)
    return total[:pairs], total[pairs:-1]


def sigmoid(margin: jax.Array, smoothing: float) -> jax.Array:
    """-(1-ε) log σ(m) - ε log σ(-m), written so that m = 0 gives exactly ln 2 for every ε."""
    return smoothing * margin - jax.nn.log_sigmoid(margin)


def margins(logp_n: jax.Array, batch: dict, beta: float) -> jax.Array:
    """β × (log-ratio of chosen - log-ratio of rejected), P. Differences to the reference are taken per token and then summed, so equal
    weights give exactly 0 whatever the order of the sum."""
    won, lost = by_branch(logp_n - batch["reference"], batch)
    return beta * (won - lost)


def dpo(beta: float, smoothing: float = 0.0, alpha: float = 0.0):
    """Sigmoid DPO (Rafailov et al. 2023), with conservative label smoothing and `alpha` × mean-token NLL of the chosen branch.

    The batch carries `reference`: the reference model's log p of each supervised token, from the same compiled forward.
    """

    def loss(logp_n: jax.Array, batch: dict):
        real = batch["real"]
        chosen, rejected = by_branch(logp_n, batch)
        long, short = by_branch(batch["weights"], batch)
        margin = margins(logp_n, batch, beta)
        per_pair = sigmoid(margin, smoothing)
        if alpha:
            per_pair = per_pair - alpha * chosen / jnp.maximum(long, 1.0)
        win = (margin > 0).astype(jnp.float32) + 0.5 * (margin == 0).astype(jnp.float32)
        metrics = {
            "accuracy": win, "margin": margin, "chosen_logp": chosen, "rejected_logp": rejected,
            "chosen_length": long, "rejected_length": short,
        }  # fmt: skip
        return jnp.sum(per_pair * real), (jnp.sum(real), {name: jnp.sum(value * real) for name, value in metrics.items()})

    return loss
