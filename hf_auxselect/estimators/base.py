"""What all estimators share: the estimate, the strategy and its fitted form, mixtures.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import ThreadpoolController

from hf_auxselect.store.arrays import GradientStore

Array = np.ndarray

NORMAL_95 = 1.6448536269514722
"""Half the width of a 90% interval in standard deviations of a normal distribution."""


NUM_ENDS = 16
"""Where training may lead: at how many such points the target's loss is measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated loss of the target for M mixtures.

    Attributes:
        loss: float64 [M], nats per label token of the target.
        low, high: float64 [M], 90% interval of ``loss``.
        weights: float64 [M, K], the mixtures, each row summing to 1 (or 0: no further training);
            None where the source of the estimate knows no mixture.
    """

    loss: Array
    low: Array
    high: Array
    weights: Array | None = None

    def __len__(self) -> int:
        return len(self.loss)


def normalize_mixtures(weights: ArrayLike, task_sizes: ArrayLike) -> Array:
    """Share of each task in M mixtures: float64 [M, K], rows sum to 1 or are 0.

    Args:
        weights: [M, K]. Booleans are subsets: the rows of the tasks in the subset are pooled, so
            that a task's share is its share of their rows. Numbers are mixture weights: shares of
            the tasks whatever their size, up to a factor per mixture.
        task_sizes: [K], rows of each task.

    Raises:
        ValueError: the shape is not [M, K], or a weight is negative or not finite.
    """
    given = np.asarray(weights)
    sizes = np.asarray(task_sizes, np.float64)
    if given.ndim != 2 or given.shape[1] != len(sizes):
        raise ValueError(
            f"weights must have shape [mixtures, {len(sizes)}], one column per task, got "
            f"{list(given.shape)}."
        )
    shares = given * sizes if given.dtype == bool else given.astype(np.float64)
    if not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise ValueError("weights must be finite and not negative.")
    totals = shares.sum(1, keepdims=True)
    return np.divide(shares, totals, out=np.zeros_like(shares), where=totals > 0)


def random_subsets(num_tasks: int) -> Array:
    """200 subsets of tasks, as masks; all sizes are equally likely."""
    rng = np.random.default_rng(0)
    sizes_M = rng.integers(1, num_tasks + 1, 200)
    return rng.random((200, num_tasks)).argsort(1) < sizes_M[:, None]


class AbstractEstimator(ABC):
    """Options of an estimator; ``fit`` prepares it for a gradient store."""

    @property
    @abstractmethod
    def scalars(self) -> tuple[str, ...]:
        """Differentiated scalars that the gradient pass must capture for it.

        A class variable where they do not depend on the options.
        """

    @property
    def look_ahead(self) -> bool:
        """Whether it may ask for what :meth:`way_ahead` returns."""
        return False

    def way_ahead(self, store: GradientStore) -> tuple[Array, Array] | None:
        """Displacements from the anchor at which more is to be measured; None: nothing.

        Returns:
            Where each task's mean gradient is to be captured once more, float64 [K, D]; and
            ``NUM_ENDS`` ends of training, at which the target's loss is to be measured [E, D]; in
            the optimizer's coordinates.
        """
        return None

    @abstractmethod
    def fit(self, store: GradientStore) -> FittedEstimator:
        """Prepare for the examples of ``store``; raises KeyError if it lacks one of ``scalars``."""


class FittedEstimator(ABC):
    """An estimator that knows one store."""

    @abstractmethod
    def estimate(self, weights: ArrayLike) -> Estimate:
        """Estimate the target's loss after fine-tuning on each of M mixtures.

        Args:
            weights: [M, K], boolean subset masks or non-negative mixture weights; see
                :func:`normalize_mixtures`. A row of zeros means no further training.

        Returns:
            Loss and 90% interval, nats per label token of the target.
        """

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        """Estimate by how much the loss on each of M mixtures differs from that on another one.

        Errors that both share cancel, so the interval may be far narrower than that of either loss.
        Here they are taken for independent, which is on the safe side; estimators that know better
        say so.

        Args:
            weights: [M, K], as in :meth:`estimate`.
            reference: [K], a subset mask or mixture.

        Returns:
            Loss on the mixture minus loss on the reference and its 90% interval, nats per label
            token of the target; negative where the mixture is better.
        """
        ours, other = self.estimate(weights), self.estimate(np.asarray(reference)[None])
        loss = ours.loss - other.loss
        return Estimate(
            loss=loss,
            low=loss - np.hypot(ours.loss - ours.low, other.high - other.loss),
            high=loss + np.hypot(ours.high - ours.loss, other.loss - other.low),
            weights=ours.weights,
        )

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Numbers that say how far to trust the estimates; names end with their unit, if any."""


def outlier_share(gradients: Array, task_ids: Array) -> float:
    """Share of the examples whose gradient norm is over ten times the median of their task."""
    norms = np.linalg.norm(gradients, axis=1)
    medians = np.array([np.median(norms[task_ids == k]) for k in range(task_ids.max() + 1)])
    return float(np.mean(norms > 10 * medians[task_ids]))


def kernel_distance(one: Array, other: Array) -> float:
    """How unlike the inner products of the same N gradients are at two points [N, D] each.

    One less the cosine of the matrices of all N x N inner products: 0 if they are the same up to a
    factor, 1 if they have nothing in common.

    Source: Fort et al., "Deep Learning versus Kernel Learning" (NeurIPS 2020), section 3, there for
    gradients of the network's outputs.
    """
    kernels = [vectors @ vectors.T for vectors in (one, other)]
    norms = [max(float(np.linalg.norm(kernel)), 1e-300) for kernel in kernels]
    return 1 - float(np.vdot(*kernels)) / norms[0] / norms[1]


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's correlation of two arrays [M], ties at their mean rank; 0 if one is constant."""

    def ranks(values: Array) -> Array:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    both = np.stack([ranks(np.asarray(one)), ranks(np.asarray(other))])
    both -= both.mean(1, keepdims=True)
    norms = np.linalg.norm(both, axis=1)
    return float(both[0] @ both[1] / norms.prod()) if norms.all() else 0.0


def in_chunks(
    rows_MK: Array, function: Callable[[Array], tuple[Array, ...]], *, size: int
) -> tuple[Array, ...]:
    """Arrays [M] of M mixtures, worked out ``size`` mixtures at a time and in parallel."""
    parts = [rows_MK[first : first + size] for first in range(0, max(len(rows_MK), 1), size)]
    with one_blas_thread(), ThreadPoolExecutor(_num_cores()) as pool:
        chunks = list(pool.map(function, parts))
    return tuple(np.concatenate(column) for column in zip(*chunks, strict=True))


def one_blas_thread() -> AbstractContextManager[object]:
    """Keeps NumPy's products and decompositions to one thread each.

    The matrices here are small: further threads cost more than they give, and many times more where
    other processes use the cores, too.
    """
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
