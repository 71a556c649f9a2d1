"""What an estimator must beat: simple ways to rank mixtures, with the interface of an estimator.

They order mixtures and do not know by how much the loss will move; ``loss`` is therefore a score on
an arbitrary scale (lower is better), without an interval.

Shapes: K tasks, M mixtures, D projection_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect import AbstractEstimator, Estimate, FittedEstimator, GradientStore
from hf_auxselect.estimators import normalize_mixtures

Array = np.ndarray


class _Score(FittedEstimator):
    """A function of the shares of the tasks [M, K] -> [M]."""

    def __init__(self, store: GradientStore, function: Callable[[Array], Array]) -> None:
        self._sizes = store.task_sizes
        self._function = function

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK = normalize_mixtures(weights, self._sizes)
        score_M = self._function(shares_MK)
        return Estimate(loss=score_M, low=score_M, high=score_M, weights=shares_MK)

    def diagnostics(self) -> dict[str, float]:
        return {}


def _task_means(store: GradientStore, vectors_ND: Array) -> Array:
    """Mean over each task's examples, weighted as in its loss: [K, D]."""
    means_KD = np.zeros((len(store.task_names), vectors_ND.shape[1]))
    np.add.at(means_KD, store.task_ids, store.example_weights[:, None] * vectors_ND)
    return means_KD


def _gradients(store: GradientStore, *, preconditioned: bool) -> Array:
    """Loss gradients [N, D], with or without the optimizer's preconditioner."""
    return store.scalar("loss@optimizer" if preconditioned else "loss")[1].astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class MeanDotProduct(AbstractEstimator):
    """Minus the dot product of the mixture's and the target's mean loss gradient.

    The first-order change of the target's loss under one small step of gradient descent.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer")
    preconditioned: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        means = _task_means(store, _gradients(store, preconditioned=self.preconditioned))
        of_target = _gradients(store.target, preconditioned=self.preconditioned)
        score = -means @ (store.target.example_weights @ of_target)
        return _Score(store, lambda shares: shares @ score)


@dataclass(frozen=True, kw_only=True)
class MeanCosine(AbstractEstimator):
    """Minus the mean cosine between an example's and the target's mean loss gradient.

    Source: LESS (Xia et al., ICML 2024), section 3, with task means in place of examples.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer")
    preconditioned: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        gradients = _gradients(store, preconditioned=self.preconditioned)
        gradients /= np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-300)
        of_target = _gradients(store.target, preconditioned=self.preconditioned)
        score = -_task_means(store, gradients) @ (store.target.example_weights @ of_target)
        return _Score(store, lambda shares: shares @ score)


@dataclass(frozen=True, kw_only=True)
class StepNorm(AbstractEstimator):
    """Minus the norm of the mixture's mean gradient: how far a step goes, wherever it leads."""

    scalars: ClassVar[tuple[str, ...]] = ("loss@optimizer",)

    def fit(self, store: GradientStore) -> FittedEstimator:
        means = _task_means(store, _gradients(store, preconditioned=True))
        return _Score(store, lambda shares: -np.linalg.norm(shares @ means, axis=1))


@dataclass(frozen=True, kw_only=True)
class NumberOfTasks(AbstractEstimator):
    """Minus the effective number of tasks, 1 / (sum of squared shares): more is better."""

    scalars: ClassVar[tuple[str, ...]] = ("loss",)

    def fit(self, store: GradientStore) -> FittedEstimator:
        return _Score(store, lambda shares: -1 / (shares**2).sum(1))
