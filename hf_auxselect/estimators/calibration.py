"""Estimates that are calibrated by a few ground-truth runs.

Shapes: K tasks, M mixtures, A calibration runs (mixtures that were trained on).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators.base import (
    NORMAL_95,
    TINY,
    Array,
    Estimate,
    FittedEstimator,
    random_subsets,
)

# Constants that shape estimates. The rule and its constants were settled after all families of
# benchmarks/ had been looked at, so that none is held out from calibrated estimates.
PRIOR_RUNS = 2
"""Offset, slope and interval are shrunk as if this many further runs had agreed with the estimates.

Measured, mostly after a restart; 4 were tried for the slope. The record names no families.
"""

TASK_VARIANCE_SHARE = 0.25
"""The share of the variance left by scale and offset which is taken to come from single tasks.

The record of its choice is not kept.
"""

MIN_SLOPE = -0.5
"""The slope of the residuals is this at least, so that the estimates' scale is halved at most.

A convention: an estimator that needs less would not be worth calibrating.
"""

MIN_SHARE_OF_SLOPE = 1e-3
"""At smaller shares of a task the correction's slope is that at this share; at 0 it is infinite.

A convention. It shapes derivatives alone.
"""

_MIN_WIDTH = 1e-12
"""Width of an interval, nats, below which a run does not tell whether it is too narrow."""


class _Correction(NamedTuple):
    """What is added to estimates; see :class:`FittedCalibrated`."""

    middle: float
    """e_m."""
    offset: float
    slope: float
    tasks_K: Array
    """u."""


class FittedCalibrated(FittedEstimator):
    """Another estimator, with scale, offset and intervals calibrated by ground-truth runs.

    Choose it (``TaskSelectionCallback(calibrate=8)``) where losses matter as well as ranks, above
    all after a restart. Its limit: with few runs it corrects little, since it is shrunk towards the
    estimates. With e the estimates and y the measured losses of the A runs, e_m the mean of e, and
    v the variance of the estimates of random subsets,

        loss(w) = e(w) + offset + slope (e(w) - e_m) + f(w) . u,
        offset = sum_a (y_a - e_a) / (A + 2),
        slope = sum_a (e_a - e_m) (y_a - e_a) / (sum_a (e_a - e_m)^2 + 2 v).

    The last term is what single tasks add: f_k(w) is the root of task k's share in w, less its mean
    over the random subsets, in units in which |f|^2 is 1 in their mean. The K numbers u are those
    of a ridge regression of the residuals that the line leaves. Its penalty is the one that is
    right where a quarter of their variance comes from single tasks.

    Half-widths of intervals are multiplied by a factor, factor^2 = (2 + sum_a z_a^2) / (A + 2),
    where z_a is the error at run a of the calibration by all others, in standard deviations of the
    estimate: the posterior mean of their variance under a scaled inverse chi-squared prior. The
    loss without further training is known, and stays as it is. The runs measure no losses of
    groups, which stay as the estimator gives them.

    Args:
        fitted: the estimator.
        weights: the mixtures of the runs [A, K], masks or weights.
        losses: measured losses of the target [A], nats per label token.

    Raises:
        ValueError: there are no runs, or the shapes do not agree.
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
        deviation_A = np.maximum(below_A + above_A, _MIN_WIDTH) / (2 * NORMAL_95)
        random = fitted.estimate(random_subsets(np.shape(weights)[1]))
        self._spread = float(random.loss.var())
        roots_MK = np.sqrt(_shares(random))
        self._root_means_K = roots_MK.mean(0)
        self._root_scale = max(float(np.sqrt(roots_MK.var(0).sum())), TINY)
        features_AK = self._features(estimate)
        self._correction = self._fit(estimate.loss, features_AK, residual_A)
        left_out_A = np.zeros(len(measured_A))
        for a in range(len(measured_A)):
            others = np.arange(len(measured_A)) != a
            fit = self._fit(estimate.loss[others], features_AK[others], residual_A[others])
            left_out_A[a] = residual_A[a] - self._corrections(fit, estimate)[a]
        square = float(((left_out_A / deviation_A) ** 2).sum())
        self._factor = np.sqrt((PRIOR_RUNS + square) / (PRIOR_RUNS + len(measured_A)))

    def _fit(self, loss_A: Array, features_AK: Array, residual_A: Array) -> _Correction:
        """What explains the residuals of some runs."""
        count, num_tasks = features_AK.shape
        if count == 0:
            return _Correction(0.0, 0.0, 0.0, np.zeros(num_tasks))
        middle, offset = float(loss_A.mean()), float(residual_A.sum()) / (count + PRIOR_RUNS)
        x_A = loss_A - middle
        square = float(x_A @ x_A) + PRIOR_RUNS * self._spread
        slope = float(x_A @ residual_A) / max(square, TINY)
        slope = max(slope, MIN_SLOPE)
        kernel_AA = TASK_VARIANCE_SHARE * features_AK @ features_AK.T
        kernel_AA += (1 - TASK_VARIANCE_SHARE) * np.eye(count)
        left_A = residual_A - offset - slope * x_A
        tasks_K = TASK_VARIANCE_SHARE * np.linalg.solve(kernel_AA, left_A) @ features_AK
        return _Correction(middle, offset, slope, tasks_K)

    def _features(self, estimate: Estimate) -> Array:
        """The features f of the mixtures of an estimate [M, K]."""
        return (np.sqrt(_shares(estimate)) - self._root_means_K) / self._root_scale

    def _corrections(self, fit: _Correction, plain: Estimate) -> Array:
        """By how much estimates are moved [M]."""
        of_line_M = fit.offset + fit.slope * (plain.loss - fit.middle)
        return of_line_M + self._features(plain) @ fit.tasks_K

    def estimate(self, weights: ArrayLike) -> Estimate:
        plain = self._fitted.estimate(weights)
        moved_M = plain.loss + self._corrections(self._correction, plain)
        is_trained = plain.high > plain.low
        return self._with_interval(plain, np.where(is_trained, moved_M, plain.loss), lowest=0.0)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        plain = self._fitted.difference(weights, reference)
        other = self._fitted.estimate(np.asarray(reference)[None])
        fit = self._correction
        apart_MK = self._features(plain) - self._features(other)
        moved_M = plain.loss * (1 + fit.slope) + apart_MK @ fit.tasks_K
        return self._with_interval(plain, moved_M, lowest=-np.inf)

    @property
    def has_gradient(self) -> bool:
        return self._fitted.has_gradient

    def gradient(self, weights: ArrayLike) -> Array:
        plain_MK = self._fitted.gradient(weights)
        estimate = self._fitted.estimate(weights)
        fit, is_trained_M1 = self._correction, (estimate.high > estimate.low)[:, None]
        roots_MK = np.sqrt(np.maximum(_shares(estimate), MIN_SHARE_OF_SLOPE))
        of_tasks_MK = fit.tasks_K / (2 * self._root_scale * roots_MK)
        of_tasks_MK -= of_tasks_MK.mean(1, keepdims=True)
        return plain_MK + is_trained_M1 * (fit.slope * plain_MK + of_tasks_MK)

    def group_gradients(self, weights: ArrayLike) -> Array:
        return self._fitted.group_gradients(weights)

    def _with_interval(self, plain: Estimate, loss: Array, *, lowest: float) -> Estimate:
        loss = np.maximum(loss, lowest)
        below, above = _half_widths(plain)
        return Estimate(
            loss=loss,
            low=np.maximum(loss - self._factor * below, lowest),
            high=loss + self._factor * above,
            weights=plain.weights,
            group_losses=plain.group_losses,
        )

    def task_losses(self, weights: ArrayLike) -> Array | None:
        return self._fitted.task_losses(weights)

    def diagnostics(self) -> dict[str, float]:
        """The estimator's diagnostics, and what the ground-truth runs have changed."""
        return {
            **self._fitted.diagnostics(),
            "calibration_scale": 1 + self._correction.slope,
            "calibration_offset_nats": self._correction.offset,
            "calibration_interval_factor": float(self._factor),
        }


def _half_widths(estimate: Estimate) -> tuple[Array, Array]:
    """Half-widths of the intervals below and above; those cut at 0 are as wide below as above."""
    below, above = estimate.loss - estimate.low, estimate.high - estimate.loss
    return np.where(estimate.low == 0, np.maximum(below, above), below), above


def _shares(estimate: Estimate) -> Array:
    """Shares of the tasks in the mixtures that were estimated [M, K]."""
    assert estimate.weights is not None  # fitted estimators give them
    return estimate.weights
