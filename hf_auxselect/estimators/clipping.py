"""By how much gradient clipping shortens the gradients of a mixture.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, Array, used_columns
from hf_auxselect.estimators.captured_gradients import CaptureCounts, chunks_of_tasks
from hf_auxselect.store.arrays import GradientStore


class GradientClipping:
    """The factor min(1, max_grad_norm / |g|) of a mixture, with |g| the length of its gradients.

    |g| is the root mean square over batches of B rows that are drawn from the mixture,

        |g|^2 = |b_w|^2 + (sum_k p_k s_k - |b_w|^2) / B,

    where b_w is the mixture's mean gradient, p_k the share of task k in the rows, and s_k the mean
    square of what one of its rows contributes. All tasks of a mixture are shortened alike.

    Args:
        store: has the scalar ``"loss"``, in the model's own parameters.
        counts: how its examples were captured.
        max_grad_norm: the length to which gradients are clipped.
        rows_per_step: B, rows of training data in one optimizer step.
    """

    def __init__(
        self,
        store: GradientStore,
        counts: CaptureCounts,
        *,
        max_grad_norm: float,
        rows_per_step: int,
    ) -> None:
        self._counts, self._max_grad_norm, self._batch_size = counts, max_grad_norm, rows_per_step
        gradients_ND = store.scalar("loss")[1]
        num_tasks = len(store.task_names)
        b_KD, self._square_K = np.zeros((num_tasks, gradients_ND.shape[1])), np.zeros(num_tasks)
        tokens_N = store.num_label_tokens.astype(np.float64)
        for k, examples in chunks_of_tasks(store):
            chunk = gradients_ND[examples].astype(np.float64)
            b_KD[k] += counts.example_weights_N[examples] @ chunk
            squares_N = tokens_N[examples] ** 2 * (chunk**2).sum(1)
            self._square_K[k] += counts.examples_per_row_K[k] * squares_N.sum() / counts.counts_K[k]
        self._gram_KK = b_KD @ b_KD.T
        # A row is a sum of m examples. They are taken as independent, each with the mean b / m.
        m_K = counts.examples_per_row_K
        mean_squares_K = counts.tokens_per_row_K**2 * np.diagonal(self._gram_KK)
        self._square_K += (1 - 1 / m_K) * mean_squares_K

    def factor(self, shares_MK: Array) -> tuple[Array, Array]:
        """The factor of each mixture [M], and its derivatives [M, K].

        Args:
            shares_MK: shares of the tasks in the rows of mixtures; a row of zeros has the factor 1.
        """
        # In units of label tokens: a batch's gradient is the sum over its rows, divided by the
        # number of its label tokens, which is taken as that of its mean rows.
        tokens_K = self._counts.tokens_per_row_K
        used = used_columns(shares_MK)
        tokens_MK = shares_MK * tokens_K
        total_M = np.maximum(tokens_MK.sum(1), TINY)
        gram_MK = tokens_MK[:, used] @ self._gram_KK[used]
        mean_M = (gram_MK * tokens_MK).sum(1)
        keep = 1 - 1 / self._batch_size
        square_M = keep * mean_M + shares_MK @ self._square_K / self._batch_size
        norm_M = np.sqrt(np.maximum(square_M, 0.0)) / total_M
        factor_M = np.minimum(1.0, self._max_grad_norm / np.maximum(norm_M, TINY))
        of_square_MK = 2 * keep * gram_MK * tokens_K + self._square_K / self._batch_size
        of_log_norm_MK = of_square_MK / (2 * np.maximum(square_M, TINY)[:, None])
        of_log_norm_MK -= tokens_K / total_M[:, None]
        return factor_M, np.where(factor_M < 1, -factor_M, 0.0)[:, None] * of_log_norm_MK
