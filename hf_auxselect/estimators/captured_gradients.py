"""The gradients that a store holds, read some examples at a time, and their weights in the losses.

Shapes: N examples of the auxiliary tasks, K tasks, M mixtures, D projection_dim, S vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hf_auxselect.estimators.base import Array
from hf_auxselect.store.arrays import GradientStore

# Bounds memory; shapes no estimate but for rounding.
_NUMBERS_AT_ONCE = 2**21
"""Numbers of gradients that are in memory at once (16 MB in float64). A convention."""

ReadGradients = Callable[[GradientStore, slice], tuple[Array, Array]]
"""Reads some examples of a store: gradients g of the loss, and phi with H = E[phi phi^T]; float64
[., D] each."""


def chunks_of_tasks(store: GradientStore) -> Iterator[tuple[int, slice]]:
    """Examples of one task that follow each other, few at a time: the task, and which examples."""
    task_ids, size = store.task_ids, max(1, _NUMBERS_AT_ONCE // store.gradients.shape[1])
    ends = [*(np.flatnonzero(np.diff(task_ids)) + 1).tolist(), len(task_ids)]
    start = 0
    for end in ends:
        for first in range(start, end, size):
            yield int(task_ids[start]), slice(first, min(first + size, end))
        start = end


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedGradients:
    """Gradients of a store's examples, and the weight of each example in its task's loss.

    Attributes:
        store: the examples.
        read: reads g and phi of some of them.
        weights_N: weights of the examples; they sum to 1 within a task.
    """

    store: GradientStore
    read: ReadGradients
    weights_N: Array

    def chunks(self) -> Iterator[tuple[int, slice, Array, Array]]:
        """A task, some of its examples, and g and phi of these; all examples in turn."""
        for k, examples in chunks_of_tasks(self.store):
            yield k, examples, *self.read(self.store, examples)

    def moments(self) -> tuple[Array, Array]:
        """The mean gradient b [K, D] of each task, and the trace of its curvature H [K]."""
        b_KD = np.zeros((len(self.store.task_names), self.store.gradients.shape[1]))
        trace_K = np.zeros(len(b_KD))
        for k, examples, g_ND, phi_ND in self.chunks():
            b_KD[k] += self.weights_N[examples] @ g_ND
            trace_K[k] += self.weights_N[examples] @ (phi_ND**2).sum(1)
        return b_KD, trace_K

    def mean_curvature_times(self, vectors_DS: Array) -> Array:
        """The mean of the tasks' curvature H, times some vectors [D, S]."""
        result_DS = np.zeros_like(vectors_DS)
        weights_N = self.weights_N / len(self.store.task_names)
        for _, examples, _, phi_ND in self.chunks():
            result_DS += phi_ND.T @ (weights_N[examples, None] * (phi_ND @ vectors_DS))
        return result_DS


class CaptureCounts:
    """How many examples of each task were captured, and what a row of training data holds of them.

    Attributes:
        counts_K: captured examples of a task.
        examples_per_row_K: mean number of examples in a row of a task; 1 unless rows are packed.
        tokens_per_row_K: mean number of label tokens in a row of a task.
        example_weights_N: weight of an example in its task's loss, in proportion to its label
            tokens.
        missing_K: share of a task's examples that were not captured.
        task_sizes_K: rows of a task.
        moment_weights_N, pairs_K: a row's contribution to the gradient of a batch, by the mean
            label tokens of its task's rows, has the second moment
            ``sum_n moment_weights_n g_n g_n^T + pairs_k b_k b_k^T``. The m examples of a row are
            taken as independent, each with the mean b / m.
    """

    def __init__(self, store: GradientStore) -> None:
        self.task_sizes_K = store.task_sizes
        self.counts_K = np.bincount(store.task_ids)
        tokens_N = store.num_label_tokens.astype(np.float64)
        tokens_K = np.bincount(store.task_ids, tokens_N)
        self.examples_per_row_K = store.examples_per_row
        self.tokens_per_row_K = tokens_K / self.counts_K * self.examples_per_row_K
        self.example_weights_N = tokens_N / tokens_K[store.task_ids]
        num_examples_K = store.task_sizes * self.examples_per_row_K
        self.missing_K = 1 - self.counts_K / np.maximum(num_examples_K, self.counts_K)
        self.missing_K[self.counts_K < 2] = 0.0  # one does not tell how they differ
        per_example_K = self.examples_per_row_K / self.counts_K / self.tokens_per_row_K**2
        self.moment_weights_N = tokens_N**2 * per_example_K[store.task_ids]
        self.pairs_K = 1 - 1 / self.examples_per_row_K

    def token_weights(self, shares_MK: Array) -> Array:
        """Weight of each task in the label tokens of mixtures of rows; they sum to 1 or are 0."""
        w_MK = shares_MK * self.tokens_per_row_K
        return w_MK / np.where(shares_MK.any(1), w_MK.sum(1), 1.0)[:, None]

    def row_weights(self, shares_K: Array) -> Array:
        """Weight of each task's rows in the second moment of one row of a mixture [K]."""
        square_K = shares_K * self.tokens_per_row_K**2
        return square_K / float(shares_K @ self.tokens_per_row_K) ** 2
