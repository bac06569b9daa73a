"""Bits per byte: how well text is predicted, whatever the tokenizer."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.programs import Programs


def as_batch(rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Rows n×(T+1) as a pretraining batch of `size` rows: ids size×T, targets and weights (size·T). Those beyond n have weight 0."""
    filled = np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), rows.dtype)]).astype(np.int32)
    weights = np.repeat(np.arange(size) < len(rows), rows.shape[1] - 1).astype(np.float32)
    return {"ids": filled[:, :-1], "targets": filled[:, 1:].reshape(-1), "weights": weights}


def bits_per_byte(programs: Programs, params: Any, batches: Sequence[dict], token_bytes: np.ndarray, frozen: Any = None) -> float:
    """Σ nats / (ln 2 · Σ bytes) over the weighted targets that stand for bytes: control tokens count in neither sum.

    `token_bytes[id]` is the length of a token's raw bytes, 0 for control ids. Infinite where no target has bytes.
    """
    nats = total = 0.0
    for batch, logp_n in zip(batches, programs.scores(params, frozen, batches), strict=True):
        bytes_n = token_bytes[batch["targets"]] * batch["weights"]
        nats -= float(np.sum(logp_n, where=bytes_n > 0, dtype=np.float64))
        total += float(bytes_n.sum())
    return nats / (math.log(2) * total) if total else math.inf
