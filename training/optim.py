"""AdamW with warm-up and a linear way down to zero."""

from dataclasses import dataclass

import jax
import optax


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-4
    """Highest learning rate."""
    warmup: float = 0.05
    """Share of the steps over which it rises; then it falls linearly to 0."""
    weight_decay: float = 0.0
    """On matrices; never on norms, biases or embeddings."""
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    """Largest global gradient norm."""


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, …: the first is not zero, and the one after the last would be."""
    up = min(max(1, round(config.warmup * steps)), max(1, steps - 1))
    rising = optax.linear_schedule(config.lr / up, config.lr, max(1, up - 1))
    return optax.join_schedules([rising, optax.linear_schedule(config.lr, 0.0, max(1, steps - up))], [up])


def decayed(params) -> object:
    """Which parameters weight decay touches: matrices other than the embedding and the head."""

    def one(path, leaf):
        return leaf.ndim >= 2 and not any(str(getattr(key, "key", "")) in ("embed", "head") for key in path)

    return jax.tree_util.tree_map_with_path(one, params)


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
    )
