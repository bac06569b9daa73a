"""Losses over token log-probabilities. The model appears only in `token_logprobs`; a loss never sees it.

A loss is `loss(logp_n, batch) -> (sum, (count, sums))`: `sums` maps each metric's name to a sum over the same `count`. So accumulated
micro-batches add up and divide once: a mean of means would weigh short batches like long ones.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import ops

BETAS = {"sigmoid": 0.1, "ipo": 0.1, "sigmoid_norm": 5.0, "simpo": 2.0, "apo_zero": 0.1}  # the preference losses, and each one's usual β
BY_TOKEN = ("ipo", "sigmoid_norm", "simpo")  # they compare means per token, the others sums over the reply
SMOOTHED = ("sigmoid", "sigmoid_norm", "simpo")


def token_logprobs(graph, params, batch: dict) -> jax.Array:
    """log p of each supervised token, N in fp32; the head is computed at those positions only (all of them where the batch has no `at`)."""
    model = nnx.merge(graph, params)
    return ops.token_logprobs(_supervised(model, batch), model.head_vd(), batch["targets"], model.compute)


def token_nll(graph, params, batch: dict):
    """`nll` of `token_logprobs` in one pass over the head: faster where a gradient follows."""
    model = nnx.merge(graph, params)
    total = ops.nll(_supervised(model, batch), model.head_vd(), batch["targets"], batch["weights"], model.compute)
    return total, (jnp.sum(batch["weights"]), {})


def _supervised(model, batch: dict) -> jax.Array:
    x_btd = model.hidden(batch["ids"], batch.get("positions"), batch.get("segments"))
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    return x_nd[batch["at"]] if "at" in batch else x_nd


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


@dataclass(frozen=True)
class Preference:
    """A preference loss over pairs; calling it gives `(sum over pairs, (pairs, {metric: sum}))`. P is the number of pairs in a batch.

    With r the log-ratio of policy and reference summed over a branch, r̄ its mean per token, p̄ the policy's mean log p per token:

    sigmoid       -log σ(β (r_chosen - r_rejected))                 Rafailov et al. 2023; with ε (label smoothing) conservative DPO
    sigmoid_norm  -log σ(β (r̄_chosen - r̄_rejected))                 length-normalized DPO of Tülu 3 (Lambert et al. 2024)
    ipo           (r̄_chosen - r̄_rejected - 1/(2β))²                 Azar et al. 2023; on means, as the authors told TRL that they do
    simpo         -log σ(β (p̄_chosen - p̄_rejected) - γ)             Meng et al. 2024; no reference
    apo_zero      1 - σ(β r_chosen) + σ(β r_rejected)               D'Oosterlinck et al. 2024: chosen up, rejected down, each by itself

    `alpha` adds that much of the chosen branch's NLL, mean per token. The batch carries `reference` (N): the reference model's log p of each
    supervised token, from the same compiled forward; simpo needs none.
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    alpha: float = 0.0
    gamma: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.kind != "simpo"

    def scores(self, logp_n: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
        """β × what the loss compares, of each chosen and each rejected branch (P): sums or means per token of log-ratios or log p.

        Differences to the reference are taken per token and then summed, so equal weights give exactly 0 whatever the order of the sum.
        """
        won, lost = by_branch(logp_n - batch["reference"] if self.needs_reference else logp_n, batch)
        if self.kind in BY_TOKEN:
            long, short = by_branch(batch["weights"], batch)
            won, lost = won / jnp.maximum(long, 1.0), lost / jnp.maximum(short, 1.0)
        return self.beta * won, self.beta * lost

    def per_pair(self, won: jax.Array, lost: jax.Array) -> jax.Array:
        """The loss of each pair (P) by its `scores`, without the NLL."""
        if self.kind == "ipo":
            return ((won - lost) / self.beta - 1 / (2 * self.beta)) ** 2
        if self.kind == "apo_zero":
            return 1 - jax.nn.sigmoid(won) + jax.nn.sigmoid(lost)
        return sigmoid(won - lost - self.gamma, self.smoothing)

    def at_zero(self) -> np.float32:
        """Each pair's loss when policy and reference are the same weights, in every bit, without the NLL."""
        return {"ipo": np.float32(1 / (2 * self.beta)) ** 2, "apo_zero": np.float32(1)}.get(self.kind, np.float32(math.log(2)))

    def __call__(self, logp_n: jax.Array, batch: dict):
        real = batch["real"]
        chosen, rejected = by_branch(logp_n, batch)
        long, short = by_branch(batch["weights"], batch)
        won, lost = self.scores(logp_n, batch)
        margin, per_pair = won - lost, self.per_pair(won, lost)
        if self.alpha:
            per_pair = per_pair - self.alpha * chosen / jnp.maximum(long, 1.0)
        win = (margin > 0).astype(logp_n.dtype) + 0.5 * (margin == 0).astype(logp_n.dtype)
        metrics = {
            "accuracy": win, "margin": margin, "chosen_logp": chosen, "rejected_logp": rejected,
            "chosen_length": long, "rejected_length": short,
        }  # fmt: skip
        if self.needs_reference:
            metrics["chosen_shift"] = by_branch(logp_n - batch["reference"], batch)[0]
        return jnp.sum(per_pair * real), (jnp.sum(real), {name: jnp.sum(value * real) for name, value in metrics.items()})
