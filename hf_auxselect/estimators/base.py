"""What all estimators share: the estimate, the strategy and its fitted form, mixtures.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.store import GradientStore

Array = np.ndarray

NORMAL_95 = 1.6448536269514722
"""Half the width of a 90% interval in standard deviations of a normal distribution."""


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


class AbstractEstimator(ABC):
    """Options of an estimator; ``fit`` prepares it for a gradient store."""

    @property
    @abstractmethod
    def scalars(self) -> tuple[str, ...]:
        """Differentiated scalars that the gradient pass must capture for it.

        A class variable where they do not depend on the options.
        """

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

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Numbers that say how far to trust the estimates; names end with their unit, if any."""


def outlier_share(gradients: Array, task_ids: Array) -> float:
    """Share of the examples whose gradient norm is over ten times the median of their task."""
    norms = np.linalg.norm(gradients, axis=1)
    medians = np.array([np.median(norms[task_ids == k]) for k in range(task_ids.max() + 1)])
    return float(np.mean(norms > 10 * medians[task_ids]))


def estimate_in_chunks(
    rows_MK: Array, estimate: Callable[[Array], tuple[Array, Array]], *, size: int
) -> Estimate:
    """The estimate of mixtures, ``size`` at a time, from loss and standard deviation [M] of each.

    Neither the loss nor an end of its interval is below 0.
    """
    chunks = [
        estimate(rows_MK[first : first + size]) for first in range(0, max(len(rows_MK), 1), size)
    ]
    loss, deviation = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return Estimate(
        loss=np.maximum(loss, 0.0),
        low=np.maximum(loss - NORMAL_95 * deviation, 0.0),
        high=np.maximum(loss + NORMAL_95 * deviation, 0.0),
        weights=rows_MK,
    )
