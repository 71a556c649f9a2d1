"""What batches change, against steps along the mean gradient: clipping and noise.

Both are those of training on all tasks, and count for every mixture: the estimate stays smooth, and
agrees with ground-truth runs as well as with terms of each mixture's own (``docs/accuracy.md``).

Shapes: N examples of the auxiliary tasks, K tasks, D projection_dim, R vectors of the basis.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, all_tasks_pooled
from hf_auxselect.estimators.captured_gradients import CaptureCounts, chunks_of_tasks
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.estimators.unrolled_optimizer import UnrolledOptimizer
from hf_auxselect.store.arrays import GradientStore


def clipping_factor(
    store: GradientStore, counts: CaptureCounts, *, max_grad_norm: float, rows_per_step: int
) -> float:
    """By how much clipping shortens gradients in training on all tasks: at most 1.

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


def add_minibatch_noise(
    model: QuadraticModel, optimizer: UnrolledOptimizer, *, clipping: float, rows_per_step: int
) -> None:
    """Add what the noise of minibatches adds to the loss of the target, and of each group.

    A step sees the gradient of a batch of B rows. What it differs by from the mean gradient moves
    the parameters by epsilon after the last step: 0 in the mean, but it adds to the quadratic term

        E[epsilon^T H_T epsilon] / 2 = sum_st u_st trace(H_T A_s C A_t^T) / (2 B),

    where A_t is the displacement per unit of gradient in step t alone, C the covariance of one
    row's gradient, and u_st the correlation of the noise of two steps
    (``UnrolledOptimizer.noise_covariance``).

    Args:
        model: of all tasks' losses.
        optimizer: the remaining steps.
        clipping: the factor by which clipping shortens gradients.
        rows_per_step: B.

    Source: Mandt et al., "Stochastic Gradient Descent as Approximate Bayesian Inference" (JMLR
    2017), section 3, here for finitely many steps and drawing without replacement.
    """
    sizes_K = model.counts.task_sizes_K
    shares_1K = all_tasks_pooled(sizes_K)
    w_1K = clipping * model.counts.token_weights(shares_1K)
    values_1R, (vectors_RR,) = model.tasks.eigendecomposition(w_1K)
    covariance_RR = model.tasks.row_covariance(shares_1K[0])
    response_RR = optimizer.noise_covariance(values_1R[0], float(sizes_K.sum()) / rows_per_step)
    spread_RR = vectors_RR.T @ covariance_RR @ vectors_RR * response_RR
    spread_RR = vectors_RR @ spread_RR @ vectors_RR.T
    scale = clipping**2 / rows_per_step
    for target in (model.target, *model.groups):
        target.noise = scale * target.mean_quadratic_term(spread_RR)
