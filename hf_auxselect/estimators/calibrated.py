"""Estimates that a few real runs have put right.

Shapes: K tasks, M mixtures, A anchors (mixtures that were trained on for real).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators.base import (
    NORMAL_95,
    Array,
    Estimate,
    FittedEstimator,
    random_subsets,
)

_AGREEING_RUNS = 2
"""All is shrunk as if so many further runs had agreed with the estimates."""

_SHARE_OF_TASKS = 0.25
"""Of the variance that scale and offset leave, what single tasks add wherever they take part."""


class _Correction(NamedTuple):
    """What is added to estimates; see :class:`FittedCalibrated`."""

    middle: float
    offset: float
    slope: float
    of_tasks_K: Array
    """u."""


class FittedCalibrated(FittedEstimator):
    """An estimator whose scale, offset and error bars are those that fit some real runs.

    With e the estimates and y the measured losses of the A anchors, e_m the mean of e, and v the
    variance of the estimates of 200 random subsets,

        loss(w) = e(w) + offset + slope (e(w) - e_m) + f(w) . u,
        offset = sum_a (y_a - e_a) / (A + 2),
        slope = sum_a (e_a - e_m) (y_a - e_a) / (sum_a (e_a - e_m)^2 + 2 v),

    least squares shrunk towards the estimates themselves. That does not depend on the scale of the
    estimates: after a restart they tell which mixture is better, and hardly by how much.

    Much of the error that is left is what single tasks add to it. f_k(w) is the root of task k's
    share in w, less its mean over the random subsets, in units in which |f|^2 is 1 in their mean;
    the K numbers u are those of a ridge regression of what the line leaves at the anchors, with the
    penalty that is right where a quarter of its variance comes from them.

    Intervals are widened or narrowed by

        factor^2 = (2 + sum_a z_a^2) / (A + 2),

    where z_a is the error at anchor a of the calibration by all others, in standard deviations of
    the estimate: the posterior mean of their variance under a scaled inverse chi-squared prior.
    The loss without further training is known, and left alone.

    Args:
        fitted: the estimator.
        weights: the anchors [A, K], masks or weights.
        losses: measured losses of the target [A], nats per label token.

    Raises:
        ValueError: there are no anchors, or the shapes do not agree.
    """

    def __init__(self, fitted: FittedEstimator, weights: ArrayLike, losses: ArrayLike) -> None:
        measured_A = np.asarray(losses, np.float64)
        if len(measured_A) == 0 or len(np.asarray(weights)) != len(measured_A):
            raise ValueError(
                f"losses must be those of the mixtures in weights, one or more; got "
                f"{len(measured_A)} losses of {len(np.asarray(weights))} mixtures."
            )
        self._fitted = fitted
        estimate = fitted.estimate(weights)
        residual_A = measured_A - estimate.loss
        below_A, above_A = _half_widths(estimate)
        deviation_A = np.maximum(below_A + above_A, 1e-12) / (2 * NORMAL_95)
        random = fitted.estimate(random_subsets(np.shape(weights)[1]))
        self._spread = float(random.loss.var())
        roots_MK = np.sqrt(_shares(random))
        self._root_means_K = roots_MK.mean(0)
        self._root_scale = max(float(np.sqrt(roots_MK.var(0).sum())), 1e-300)
        features_AK = self._features(estimate)
        self._correction = self._fit(estimate.loss, features_AK, residual_A)
        left_out_A = np.zeros(len(measured_A))
        for a in range(len(measured_A)):
            others = np.arange(len(measured_A)) != a
            fit = self._fit(estimate.loss[others], features_AK[others], residual_A[others])
            left_out_A[a] = residual_A[a] - self._corrections(fit, estimate)[a]
        square = float(((left_out_A / deviation_A) ** 2).sum())
        self._factor = np.sqrt((_AGREEING_RUNS + square) / (_AGREEING_RUNS + len(measured_A)))

    def _fit(self, loss_A: Array, features_AK: Array, residual_A: Array) -> _Correction:
        """What explains the residuals at some anchors."""
        count, num_tasks = features_AK.shape
        if count == 0:
            return _Correction(0.0, 0.0, 0.0, np.zeros(num_tasks))
        middle, offset = float(loss_A.mean()), float(residual_A.sum()) / (count + _AGREEING_RUNS)
        x_A = loss_A - middle
        square = float(x_A @ x_A) + _AGREEING_RUNS * self._spread
        slope = float(x_A @ residual_A) / max(square, 1e-300)
        slope = max(slope, -0.5)  # with less, an estimator would not be worth calibrating
        kernel_AA = _SHARE_OF_TASKS * features_AK @ features_AK.T
        kernel_AA += (1 - _SHARE_OF_TASKS) * np.eye(count)
        left_A = residual_A - offset - slope * x_A
        of_tasks_K = _SHARE_OF_TASKS * np.linalg.solve(kernel_AA, left_A) @ features_AK
        return _Correction(middle, offset, slope, of_tasks_K)

    def _features(self, estimate: Estimate) -> Array:
        """Of the mixtures of an estimate: f [M, K]."""
        return (np.sqrt(_shares(estimate)) - self._root_means_K) / self._root_scale

    def _corrections(self, fit: _Correction, plain: Estimate) -> Array:
        """By how much estimates are moved [M]."""
        of_line_M = fit.offset + fit.slope * (plain.loss - fit.middle)
        return of_line_M + self._features(plain) @ fit.of_tasks_K

    def estimate(self, weights: ArrayLike) -> Estimate:
        plain = self._fitted.estimate(weights)
        moved_M = plain.loss + self._corrections(self._correction, plain)
        is_trained = plain.high > plain.low
        return self._widened(plain, np.where(is_trained, moved_M, plain.loss), lowest=0.0)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        plain = self._fitted.difference(weights, reference)
        other = self._fitted.estimate(np.asarray(reference)[None])
        fit = self._correction
        apart_MK = self._features(plain) - self._features(other)
        moved_M = plain.loss * (1 + fit.slope) + apart_MK @ fit.of_tasks_K
        return self._widened(plain, moved_M, lowest=-np.inf)

    def _widened(self, plain: Estimate, loss: Array, *, lowest: float) -> Estimate:
        loss = np.maximum(loss, lowest)
        below, above = _half_widths(plain)
        return Estimate(
            loss=loss,
            low=np.maximum(loss - self._factor * below, lowest),
            high=loss + self._factor * above,
            weights=plain.weights,
        )

    def diagnostics(self) -> dict[str, float]:
        """Those of the estimator, and what the real runs have changed."""
        return {
            **self._fitted.diagnostics(),
            "calibration_scale": 1 + self._correction.slope,
            "calibration_offset_nats": self._correction.offset,
            "calibration_interval_factor": float(self._factor),
        }


def _half_widths(estimate: Estimate) -> tuple[Array, Array]:
    """Of the intervals, below and above; those that end at 0 would go as far below as above."""
    below, above = estimate.loss - estimate.low, estimate.high - estimate.loss
    return np.where(estimate.low == 0, np.maximum(below, above), below), above


def _shares(estimate: Estimate) -> Array:
    """Of tasks in the mixtures that were estimated [M, K]."""
    assert estimate.weights is not None  # of fitted estimators they are known
    return estimate.weights
