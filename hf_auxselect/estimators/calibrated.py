"""Estimates that a few real runs have put right.

Shapes: K tasks, M mixtures, A anchors (mixtures that were trained on for real).
"""

from __future__ import annotations

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


class FittedCalibrated(FittedEstimator):
    """An estimator whose scale, offset and error bars are those that fit some real runs.

    With e the estimates and y the measured losses of the A anchors, e_m the mean of e, and v the
    variance of the estimates of 200 random subsets,

        loss(w) = e(w) + offset + slope (e(w) - e_m),
        offset = sum_a (y_a - e_a) / (A + 2),
        slope = sum_a (e_a - e_m) (y_a - e_a) / (sum_a (e_a - e_m)^2 + 2 v),

    least squares shrunk towards the estimates themselves. That does not depend on the scale of the
    estimates: after a restart they tell which mixture is better, and hardly by how much.

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
        self._spread = float(fitted.estimate(random_subsets(np.shape(weights)[1])).loss.var())
        self._middle, self._offset, self._slope = self._line(estimate.loss, residual_A)
        left_out_A = np.zeros(len(measured_A))
        for a in range(len(measured_A)):
            others = np.arange(len(measured_A)) != a
            middle, offset, slope = self._line(estimate.loss[others], residual_A[others])
            left_out_A[a] = residual_A[a] - offset - slope * (estimate.loss[a] - middle)
        square = float(((left_out_A / deviation_A) ** 2).sum())
        self._factor = np.sqrt((_AGREEING_RUNS + square) / (_AGREEING_RUNS + len(measured_A)))

    def _line(self, estimated: Array, residual: Array) -> tuple[float, float, float]:
        """Mean estimate, offset and slope of the residuals, both shrunk."""
        if len(residual) == 0:
            return 0.0, 0.0, 0.0
        middle = float(estimated.mean())
        x = estimated - middle
        slope = float(x @ residual) / max(float(x @ x) + _AGREEING_RUNS * self._spread, 1e-300)
        # A scale below a half would be an estimator not worth calibrating.
        return middle, float(residual.sum()) / (len(x) + _AGREEING_RUNS), max(slope, -0.5)

    def estimate(self, weights: ArrayLike) -> Estimate:
        plain = self._fitted.estimate(weights)
        is_trained = plain.high > plain.low
        moved = plain.loss + self._offset + self._slope * (plain.loss - self._middle)
        return self._widened(plain, np.where(is_trained, moved, plain.loss), lowest=0.0)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        plain = self._fitted.difference(weights, reference)
        return self._widened(plain, plain.loss * (1 + self._slope), lowest=-np.inf)

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
            "calibration_scale": 1 + self._slope,
            "calibration_offset_nats": self._offset,
            "calibration_interval_factor": float(self._factor),
        }


def _half_widths(estimate: Estimate) -> tuple[Array, Array]:
    """Of the intervals, below and above; those that end at 0 would go as far below as above."""
    below, above = estimate.loss - estimate.low, estimate.high - estimate.loss
    return np.where(estimate.low == 0, np.maximum(below, above), below), above
