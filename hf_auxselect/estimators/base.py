"""What all estimators share: the estimate, the strategy and its fitted form, mixtures.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.store.arrays import GradientStore

Array = np.ndarray

NORMAL_95 = 1.6448536269514722
"""Half the width of a 90% interval in standard deviations of a normal distribution."""

TINY = 1e-300
"""The least divisor: what may be 0 is raised to it before a division."""

# Constants that shape estimates.
NUM_ENDPOINTS = 16
"""At how many predicted endpoints of training the target's loss is measured.

A convention: 16 forward passes over at most 64 examples cost little beside the gradients.
"""

NUM_RANDOM_SUBSETS = 200
"""How many random subsets stand for all mixtures: for probes, diagnostics and calibration.

A convention.
"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated loss of the target, and of further targets (groups), for M mixtures.

    Attributes:
        loss: float64 [M], nats per label token of the target.
        low, high: float64 [M], 90% interval of ``loss``.
        weights: float64 [M, K], the mixtures, each row summing to 1 (or 0: no further training);
            None where the source of the estimate knows no mixture.
        group_losses: float64 [M, G], loss of each group, nats per its label token, in the order of
            ``GradientStore.groups``. None where the store has no groups.
    """

    loss: Array
    low: Array
    high: Array
    weights: Array | None = None
    group_losses: Array | None = None

    def __len__(self) -> int:
        return len(self.loss)


def normalize_mixtures(weights: ArrayLike, task_sizes: ArrayLike) -> Array:
    """Share of each task in M mixtures: float64 [M, K]; the shares of one sum to 1 or are 0.

    Args:
        weights: [M, K]. Booleans are subsets: the examples of the tasks in the subset are pooled,
            so that a task's share is its share of these examples. Numbers are mixture weights: the
            shares of the tasks whatever their size, up to a factor per mixture.
        task_sizes: [K], number of training examples of each task.

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


def unit_vectors(vectors: Array) -> Array:
    """Vectors [., D] divided by their lengths; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def used_columns(weights_MK: Array) -> Array | slice:
    """The columns that are not 0 in all rows; all of them unless leaving out others is faster."""
    columns = np.flatnonzero(weights_MK.any(0))
    return columns if 0 < 2 * len(columns) < weights_MK.shape[1] else slice(None)


def all_tasks_pooled(task_sizes: ArrayLike) -> Array:
    """Shares of the mixture of all tasks, each in proportion to its size: float64 [1, K]."""
    return normalize_mixtures(np.ones((1, len(np.asarray(task_sizes))), bool), task_sizes)


def random_subsets(num_tasks: int) -> Array:
    """``NUM_RANDOM_SUBSETS`` subsets of tasks, bool [., K]; all sizes are equally likely."""
    rng = np.random.default_rng(0)
    sizes_M = rng.integers(1, num_tasks + 1, NUM_RANDOM_SUBSETS)
    return rng.random((NUM_RANDOM_SUBSETS, num_tasks)).argsort(1) < sizes_M[:, None]


def group_differences(one: Estimate, other: Estimate) -> Array | None:
    """Group losses of M mixtures minus those of one other [M, G]; None without groups."""
    if one.group_losses is None or other.group_losses is None:
        return None
    return one.group_losses - other.group_losses


class ProbePoints(NamedTuple):
    """Displacements, in the optimizer's coordinates, at which more is to be measured."""

    secant_points_KD: Array
    """Where each task's mean gradient is to be measured again."""
    endpoints_ED: Array
    """``NUM_ENDPOINTS`` predicted endpoints of training, at which the target's loss is measured."""


class AbstractEstimator(ABC):
    """Options of an estimator; ``fit`` prepares it for a gradient store."""

    @property
    @abstractmethod
    def scalars(self) -> tuple[str, ...]:
        """Differentiated scalars that the gradient pass must capture for it.

        A class variable where they do not depend on the options.
        """

    @property
    def needs_probes(self) -> bool:
        """Whether :meth:`probe_points` may ask for measurements at displaced parameters."""
        return False

    def probe_points(self, store: GradientStore) -> ProbePoints | None:
        """Where gradients and losses are to be measured once more; None: nowhere.

        Args:
            store: what was captured at the linearization point.
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
            Loss and 90% interval, nats per label token of the target; and the losses of the
            groups, if the store has any.
        """

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        """Estimate by how much the loss on each of M mixtures differs from that on another one.

        Errors that both share cancel, so the interval may be far narrower than that of either loss.
        This default takes the two errors as independent, which gives an interval that is too wide
        rather than too narrow. Estimators that know what the errors share override it.

        Args:
            weights: [M, K], as in :meth:`estimate`.
            reference: [K], a subset mask or mixture.

        Returns:
            Loss on the mixture minus loss on the reference and its 90% interval, nats per label
            token of the target; negative where the mixture is better. Group losses likewise.
        """
        ours, other = self.estimate(weights), self.estimate(np.asarray(reference)[None])
        loss = ours.loss - other.loss
        return Estimate(
            loss=loss,
            low=loss - np.hypot(ours.loss - ours.low, other.high - other.loss),
            high=loss + np.hypot(ours.high - ours.loss, other.loss - other.low),
            weights=ours.weights,
            group_losses=group_differences(ours, other),
        )

    @property
    def has_gradient(self) -> bool:
        """Whether :meth:`gradient` and :meth:`group_gradients` can be called."""
        return False

    def gradient(self, weights: ArrayLike) -> Array:
        """Differentiate the estimated loss with respect to the weights of each of M mixtures.

        Use it to search for mixture weights, and to rank tasks by what a little more of each does.

        Args:
            weights: [M, K], as in :meth:`estimate`; taken as the mixtures whose shares sum to 1.

        Returns:
            float64 [M, K], nats per label token of the target and unit of weight. Only derivatives
            along the simplex mean something: of any change v of the weights that sums to 0 the
            derivative is ``gradient @ v``. The K numbers of a mixture sum to 0.

        Raises:
            NotImplementedError: the estimator has no gradient (``has_gradient`` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient; see has_gradient.")

    def group_gradients(self, weights: ArrayLike) -> Array:
        """Like :meth:`gradient`, of the losses of the store's groups: float64 [M, G, K].

        Raises:
            NotImplementedError: the estimator has no gradient (``has_gradient`` is False).
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient; see has_gradient.")

    def task_losses(self, weights: ArrayLike) -> Array | None:
        """Estimate the tasks' own losses after fine-tuning on each of M mixtures, for a report.

        Args:
            weights: [M, K], as in :meth:`estimate`.

        Returns:
            float64 [M, K], of the captured examples, nats per label token; None if the estimator
            has no model of them.
        """
        return None

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Numbers that say how far to trust the estimates; names end with their unit, if any."""
