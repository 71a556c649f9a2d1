"""By how much gradient clipping shortens each task's gradient in a mixture.

Shapes: N examples of the auxiliary tasks, K tasks, M mixtures, D projection_dim, J batches of B
examples.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, Array, all_tasks_pooled, used_columns
from hf_auxselect.estimators.captured_gradients import CaptureCounts, chunks_of_tasks
from hf_auxselect.store.arrays import GradientStore

# Constants that shape estimates: of how many batches the mean is taken.
_DRAWN_EXAMPLES = 2048
"""Number of examples that are drawn of a mixture. A convention."""

_MIN_BATCHES = 8
"""Number of batches that are drawn of a mixture, at least. A convention."""


class GradientClipping:
    """The mean factor c_wk by which clipping shortens the gradients of task k in mixture w.

    It is the mean of min(1, max_grad_norm / |g|) over batches, each counted by the label tokens
    that task k has in it, so that tasks with large gradients lose more. Batches of the mixture are
    drawn from the captured examples, the same random numbers for every mixture. The squared length
    |g|^2 of a batch's gradient has the examples' own squared lengths. The inner product of two
    different examples is taken as that of their tasks' mean gradients.

    Args:
        store: has the scalar ``"loss"``, in the model's own parameters.
        counts: how its examples were captured.
        max_grad_norm: the length to which gradients are clipped.
        rows_per_step: rows of training data in one optimizer step.
    """

    def __init__(
        self,
        store: GradientStore,
        counts: CaptureCounts,
        *,
        max_grad_norm: float,
        rows_per_step: int,
    ) -> None:
        self._store, self._counts, self._max_grad_norm = store, counts, max_grad_norm
        gradients_ND = store.scalar("loss")[1]
        b_KD = np.zeros((len(store.task_names), gradients_ND.shape[1]))
        self._square_N = np.empty(len(store))
        for k, examples in chunks_of_tasks(store):
            chunk = gradients_ND[examples].astype(np.float64)
            b_KD[k] += counts.example_weights_N[examples] @ chunk
            self._square_N[examples] = (chunk**2).sum(1)
        self._gram_KK = b_KD @ b_KD.T
        rng = np.random.default_rng(0)
        # Examples of a step: more than rows where these are packed, as in a mixture of all tasks.
        per_row_1 = all_tasks_pooled(store.task_sizes) @ counts.examples_per_row_K
        self._batch_size = size = round(rows_per_step * float(per_row_1[0]))
        num_examples = size * max(_MIN_BATCHES, _DRAWN_EXAMPLES // size)
        # The same random numbers for every mixture, so that mixtures differ by their shares alone;
        # those that say which task are spread out evenly, over the tasks in the order of names.
        self._which_task = (rng.permutation(num_examples) + rng.random(num_examples)) / num_examples
        self._which_example = rng.random(num_examples)
        self._by_name_K = np.argsort(store.task_names)
        self._by_task_N = np.argsort(store.task_ids, kind="stable")

    def factors(self, shares_MK: Array) -> Array:
        """c_wk of each task in each mixture [M, K], given the tasks' shares in the rows."""
        example_MJB, task_MJB = self._batches(shares_MK)
        used = np.arange(shares_MK.shape[1])[used_columns(shares_MK)]
        place_K = np.zeros(shares_MK.shape[1], np.int64)
        place_K[used] = np.arange(len(used))
        gram_KK, num_tasks = self._gram_KK[np.ix_(used, used)], len(used)
        tokens_MJB = self._store.num_label_tokens[example_MJB].astype(np.float64)
        num_batches = example_MJB.shape[0] * example_MJB.shape[1]
        batch_MJ1 = np.arange(num_batches).reshape(*example_MJB.shape[:2], 1)
        tokens_MJK = np.bincount(
            (batch_MJ1 * num_tasks + place_K[task_MJB]).ravel(),
            tokens_MJB.ravel(),
            minlength=num_batches * num_tasks,
        ).reshape(*example_MJB.shape[:2], num_tasks)
        own_MJB = self._square_N[example_MJB] - np.diagonal(self._gram_KK)[task_MJB]
        square_MJ = (tokens_MJB**2 * own_MJB).sum(2)
        square_MJ += ((tokens_MJK @ gram_KK) * tokens_MJK).sum(2)
        tokens_MJ = tokens_MJB.sum(2)
        norm_MJ = np.sqrt(np.maximum(square_MJ, 0.0)) / tokens_MJ
        factor_MJ = np.minimum(1.0, self._max_grad_norm / np.maximum(norm_MJ, TINY))
        share_MJK = tokens_MJK / tokens_MJ[..., None]
        total_MK = share_MJK.sum(1)
        result_MK = np.repeat(factor_MJ.mean(1, keepdims=True), shares_MK.shape[1], axis=1)
        result_MK[:, used] = np.divide(
            np.einsum("mj,mjk->mk", factor_MJ, share_MJK),
            total_MK,
            out=result_MK[:, used],
            where=total_MK > 0,
        )
        return result_MK

    def _batches(self, shares_MK: Array) -> tuple[Array, Array]:
        """J batches of B examples of each mixture: which, and their tasks; int64 [M, J, B]."""
        counts_K = self._counts.counts_K
        first_K = np.cumsum(counts_K) - counts_K
        size = self._batch_size
        shape_MJB = (len(shares_MK), len(self._which_task) // size, size)
        per_row_K = self._counts.examples_per_row_K
        if (per_row_K != 1).any():
            shares_MK = shares_MK * per_row_K
            shares_MK = shares_MK / np.where(shares_MK.any(1), shares_MK.sum(1), 1.0)[:, None]
        place_MJB = np.zeros(shape_MJB, np.int64)
        for m, ends_K in enumerate(np.cumsum(shares_MK[:, self._by_name_K], axis=1)):
            places = np.searchsorted(ends_K, self._which_task, side="right")
            place_MJB[m] = places.reshape(shape_MJB[1:])
        task_MJB = self._by_name_K[np.minimum(place_MJB, len(counts_K) - 1)]
        share_JB = self._which_example.reshape(shape_MJB[1:])
        within_MJB = (share_JB * counts_K[task_MJB]).astype(np.int64)
        return self._by_task_N[first_K[task_MJB] + within_MJB], task_MJB
