"""Kernels between mixtures, and how they are fitted to known losses.

Kernels see the square roots of the shares, whose distance is the Hellinger distance of mixtures up
to a factor: a share that grows from nothing counts for more than one that was large before.

Shapes: K tasks, M mixtures that the loss is known of, Q mixtures that it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hf_auxselect.estimators.base import TINY, Array

# Constants that shape estimates.
_PRIOR_DEVIATION = 1.5
"""Standard deviation of the normal priors of the logarithms of rates, signal and noise.

Their middles are pessimistic: every task matters, and noise has as much variance as the signal.
Measured on the mixtures that RegMix trained to fit surrogates, and on a made-up function of 38 to
400 tasks: with 16 to 128 of these mixtures the intervals hold 87% to 92% of 256 others; with 3 for
all of them 76% to 85%. Without a common rate, a hundred tasks of which none is known to matter less
than the others would make all mixtures unlike each other.
"""

_LEAST_NOISE = 1e-6
"""Added to the noise, as a share of the variance, so that the matrix can be inverted."""

_NUM_STEPS = 50
"""Steps of Rprop. 200 changed no rank correlation on the runs of RegMix by 0.0005."""

_GROWTH, _SHRINKAGE, _FIRST_STEP, _LARGEST_STEP, _LEAST_STEP = 1.2, 0.5, 0.1, 1.0, 1e-6
"""Of Rprop's steps: the first two are its authors' own, the others conventions."""


class Kernel(Protocol):
    """Similarity of mixtures by the roots of their shares."""

    def __call__(self, one_QK: Array, other_MK: Array) -> Array:
        """The similarity of each pair [Q, M]."""

    def gradient(self, one_QK: Array, other_MK: Array, factors_M: Array) -> Array:
        """Derivatives of ``kernel(one, other) @ factors`` with respect to ``one`` [Q, K]."""


@dataclass(frozen=True, eq=False)
class LinearKernel:
    """The dot product."""

    center_K: Array

    def __call__(self, one_QK: Array, other_MK: Array) -> Array:
        return (one_QK - self.center_K) @ (other_MK - self.center_K).T

    def gradient(self, one_QK: Array, other_MK: Array, factors_M: Array) -> Array:
        return np.tile(factors_M @ (other_MK - self.center_K), (len(one_QK), 1))


@dataclass(frozen=True, eq=False)
class MaternKernel:
    """(1 + r + r^2 / 3) exp(-r), where r^2 is 5 times the sum of rate_k (x_k - y_k)^2.

    The Matern kernel of smoothness 5/2, with a length scale 1 / sqrt(rate_k) for each task.
    """

    rates_K: Array

    def __call__(self, one_QK: Array, other_MK: Array) -> Array:
        r_QM = self._distances(one_QK, other_MK)
        return (1 + r_QM + r_QM**2 / 3) * np.exp(-r_QM)

    def gradient(self, one_QK: Array, other_MK: Array, factors_M: Array) -> Array:
        slope_QM = self.slopes(one_QK, other_MK) * factors_M
        apart_QK = one_QK * slope_QM.sum(1)[:, None] - slope_QM @ other_MK
        return 2 * self.rates_K * apart_QK

    def slopes(self, one_QK: Array, other_MK: Array) -> Array:
        """Derivatives with respect to the sum of rate_k (x_k - y_k)^2 [Q, M]."""
        r_QM = self._distances(one_QK, other_MK)
        return -5 / 6 * (1 + r_QM) * np.exp(-r_QM)

    def _distances(self, one_QK: Array, other_MK: Array) -> Array:
        one, other = (x * np.sqrt(self.rates_K) for x in (one_QK, other_MK))
        squares_QM = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
        return np.sqrt(5 * np.maximum(squares_QM, 0.0))


def most_likely_matern(roots_MK: Array, losses_M: Array) -> tuple[MaternKernel, float, float]:
    """The Matern kernel under which the known losses are most likely, its variance, and noise.

    Losses, less their mean and in units of their standard deviation, are a Gaussian process of
    covariance signal * kernel + noise * identity + 1, the last for an unknown mean. Each task's
    rate is a common one times its own factor. The logarithms of these, of signal and of noise
    maximize the marginal likelihood times normal priors. The signal is returned as a variance,
    nats^2, the noise as a multiple of the signal. Cost: 50 times M^3 + M^2 K.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), eq. 5.8 and
    5.9; Rprop: Riedmiller and Braun (ICNN 1993), for Gaussian processes Blum and Riedmiller (ESANN
    2013).
    """
    scale = max(float(losses_M.std()), TINY)
    y_M = (losses_M - losses_M.mean()) / scale
    # 1 / the mean square by which two mixtures differ, in one task.
    unit = 1 / max(2 * float(roots_MK.var(0).mean()), TINY)

    def rates(log_P: Array) -> Array:
        return unit * np.exp(log_P[:-3] + log_P[-3])

    def gradient(log_P: Array) -> Array:
        """Of the logarithm of likelihood times priors, with respect to the logarithms."""
        rates_K, (signal, noise) = rates(log_P), np.exp(log_P[-2:])
        kernel = MaternKernel(rates_K)
        similar_MM = kernel(roots_MK, roots_MK)
        covariance_MM = signal * similar_MM + (noise + _LEAST_NOISE) * np.eye(len(y_M)) + 1.0
        inverse_MM = np.linalg.inv(covariance_MM)
        solved_M = inverse_MM @ y_M
        # Half of it is the derivative with respect to the covariance.
        outer_MM = np.outer(solved_M, solved_M) - inverse_MM
        slope_MM = outer_MM * kernel.slopes(roots_MK, roots_MK)
        # The sum over pairs of slope * (x_k - y_k)^2.
        of_rates_K = 2 * slope_MM.sum(1) @ roots_MK**2
        of_rates_K -= 2 * ((slope_MM @ roots_MK) * roots_MK).sum(0)
        of_logs_K = signal * rates_K * of_rates_K
        of_signal, of_noise = signal * (outer_MM * similar_MM).sum(), noise * np.trace(outer_MM)
        likelihood_P = 0.5 * np.append(of_logs_K, [of_logs_K.sum(), of_signal, of_noise])
        return likelihood_P - log_P / _PRIOR_DEVIATION**2

    log_P = np.zeros(roots_MK.shape[1] + 3)
    step_P, before_P = np.full(len(log_P), _FIRST_STEP), np.zeros(len(log_P))
    for _ in range(_NUM_STEPS):
        gradient_P = gradient(log_P)
        agree_P = gradient_P * before_P
        step_P = np.where(agree_P > 0, step_P * _GROWTH, step_P)
        step_P = np.where(agree_P < 0, step_P * _SHRINKAGE, step_P)
        step_P = np.clip(step_P, _LEAST_STEP, _LARGEST_STEP)
        # After a change of sign it waits for one step.
        before_P = np.where(agree_P < 0, 0.0, gradient_P)
        log_P = log_P + np.sign(before_P) * step_P
    signal, noise = np.exp(log_P[-2:])
    kernel = MaternKernel(rates(log_P))
    return kernel, float(scale**2 * signal), float((noise + _LEAST_NOISE) / signal)
