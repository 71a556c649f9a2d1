"""By how much gradient clipping shortens the gradients of the remaining steps.

Shapes: N examples of the auxiliary tasks, K tasks, D projection_dim.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, all_tasks_pooled
from hf_auxselect.estimators.captured_gradients import CaptureCounts, chunks_of_tasks
from hf_auxselect.store.arrays import GradientStore


def clipping_factor(
    store: GradientStore, counts: CaptureCounts, *, max_grad_norm: float, rows_per_step: int
) -> float:
    """By how much clipping shortens gradients in training on all tasks: at most 1.

    One factor serves all mixtures, so that estimates are smooth in the weights. They agree with
    ground-truth runs as well as with a factor of each mixture's own (``docs/accuracy.md``).

    It is ``max_grad_norm / sqrt(E|g|^2)`` for the gradient g of a batch of B rows, whose mean
    square is ``|b|^2 + trace(C) / B`` with the mean b and covariance C of one row's gradient.

    Args:
        store: has the scalar ``"loss"``, in the model's own parameters.
        counts: how its examples were captured.
        max_grad_norm: the length to which gradients are clipped.
        rows_per_step: B, rows of training data in one optimizer step.
    """
    gradients_ND = store.scalar("loss")[1]
    b_KD = np.zeros((len(store.task_names), gradients_ND.shape[1]))
    square_K = np.zeros(len(b_KD))
    for k, examples in chunks_of_tasks(store):
        chunk_ND = gradients_ND[examples].astype(np.float64)
        b_KD[k] += counts.example_weights_N[examples] @ chunk_ND
        square_K[k] += counts.moment_weights_N[examples] @ (chunk_ND**2).sum(1)
    square_K += counts.pairs_K * (b_KD**2).sum(1)
    shares_1K = all_tasks_pooled(store.task_sizes)
    mean = float(((counts.token_weights(shares_1K) @ b_KD) ** 2).sum())
    of_row = float((counts.row_weights(shares_1K[0]) @ square_K).sum())
    square = mean + max(of_row - mean, 0.0) / rows_per_step
    return min(1.0, max_grad_norm / max(float(np.sqrt(square)), TINY))
