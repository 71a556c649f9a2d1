"""A compact approximation of an estimator, which a report page evaluates without Python.

Shapes: K tasks, A anchors (mixtures at which the estimator was asked), M mixtures, O outputs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.estimators.parallel import one_blas_thread
from hf_auxselect.seeds import random_words

Array = np.ndarray

MAX_TASKS = 60
"""Tasks whose weights can be changed in a page; with more, those chosen and those most aligned with
the target. A convention: more do not fit a page."""

# Constants that shape the approximation. Measured on the demo (K = 11, estimates with a standard
# deviation of 0.059 nats), median of three seeds: an error of 0.0107 nats, with half as many
# anchors 0.012, with twice as many 0.0085; with the shares in place of their roots, 0.0148.
_ANCHORS_PER_TASK = 100
_MAX_ANCHORS = 1200
_GAMMAS = (0.01, 0.03, 0.1, 0.3)
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_HELD_OUT = 0.2
"""Mixtures that the error is measured on, as a share of the anchors. A convention."""

_UNITS = 255
"""Anchors are multiples of 1/255, so that a share takes one byte."""

OUTPUTS = ("loss", "below", "above", "difference_below", "difference_above")
"""What is approximated: the loss, the distances to the ends of its interval, and the distances to
the ends of the interval of its difference from all tasks."""


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """Kernel ridge regression of an estimator's answers on the mixture.

    A mixture with shares s is answered by

        output_o(s) = mean_o + sum_a coefficient_ao k(s, s_a),    k = (1 + u) exp(-u),
        u^2 = scale * sum_k (sqrt(s_k) - sqrt(s_ak))^2,

    a Matérn kernel (smoothness 3/2) of the Hellinger distance between mixtures. Scale and ridge
    penalty are those with the least leave-one-out error of the loss.

    Attributes:
        tasks: names of the K tasks whose weights may differ from 0.
        anchors: base64 of uint8 [A, K]: shares in units of 1/255, which sum to 255.
        coefficients: base64 of little-endian float64 [O, A].
        means: mean_o of each output.
        scale: of the squared distance.
        all_tasks: estimated loss of all tasks, nats per label token.
        error: 90% quantile of the error of the loss on further random mixtures that are no
            subsets, nats per label token.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), eqs. 2.25 and
    4.17; leave-one-out: eq. 5.12.
    """

    tasks: list[str]
    anchors: str
    coefficients: str
    means: list[float]
    scale: float
    all_tasks: float
    error: float

    def outputs(self, shares_MK: Array) -> Array:
        """The outputs, in the order of ``OUTPUTS``, for mixtures whose shares sum to 1: [M, O].

        Raises:
            ValueError: the record is damaged.
        """
        count = len(self.tasks)
        units = np.frombuffer(base64.b64decode(self.anchors, validate=True), np.uint8)
        coefficients = np.frombuffer(base64.b64decode(self.coefficients, validate=True), "<f8")
        if len(units) * len(OUTPUTS) != len(coefficients) * count:
            raise ValueError("anchors and coefficients do not belong together.")
        kernel_MA = _kernel(shares_MK, units.reshape(-1, count) / _UNITS, self.scale)
        outputs_MO = kernel_MA @ coefficients.reshape(len(OUTPUTS), -1).T + self.means
        outputs_MO[:, 1:] = np.maximum(outputs_MO[:, 1:], 0.0)
        return outputs_MO


def approximate(
    fitted: FittedEstimator,
    task_names: Sequence[str],
    task_sizes: Sequence[int],
    varied: Sequence[int],
    *,
    seed: int,
) -> WhatIf:
    """Approximate an estimator by its answers to random subsets and mixtures.

    Args:
        fitted: the estimator.
        task_names: of all its tasks.
        task_sizes: number of training rows of each.
        varied: the tasks whose weights may be changed; the others have none.
        seed: determines the mixtures.
    """
    sizes_K = np.asarray(task_sizes, float)[list(varied)]
    count = min(_MAX_ANCHORS, _ANCHORS_PER_TASK * len(sizes_K))
    num_held_out = math.ceil(_HELD_OUT * count)
    units_MK = random_mixtures(sizes_K, count + num_held_out, seed)
    weights = np.zeros((len(units_MK), len(task_names)))
    weights[:, list(varied)] = units_MK / _UNITS
    everything = np.ones(len(task_names), bool)
    estimate, difference = fitted.estimate(weights), fitted.difference(weights, everything)
    outputs_MO = np.stack(
        [
            estimate.loss,
            estimate.loss - estimate.low,
            estimate.high - estimate.loss,
            difference.loss - difference.low,
            difference.high - difference.loss,
        ],
        axis=1,
    )
    anchors_AK, outputs_AO = units_MK[:-num_held_out], outputs_MO[:-num_held_out]
    with one_blas_thread():
        scale, coefficients_AO = _regression(anchors_AK / _UNITS, outputs_AO)
    record = WhatIf(
        tasks=[task_names[k] for k in varied],
        anchors=base64.b64encode(anchors_AK.astype(np.uint8).tobytes()).decode(),
        coefficients=base64.b64encode(coefficients_AO.T.astype("<f8").tobytes()).decode(),
        means=outputs_AO.mean(0).tolist(),
        scale=scale,
        all_tasks=float(fitted.estimate(everything[None]).loss[0]),
        error=0.0,
    )
    # Of few tasks, every subset is an anchor: the error is that of mixtures.
    held_out = [m for m in range(count, len(units_MK)) if _concentration(m) is not None]
    residuals = record.outputs(units_MK[held_out] / _UNITS)[:, 0] - outputs_MO[held_out, 0]
    error = np.quantile(np.abs(residuals), 0.9)
    return WhatIf(**{**vars(record), "error": float(error)})


def random_mixtures(sizes_K: Array, count: int, seed: int) -> Array:
    """Random subsets and mixtures of random subsets, by turns, in units of 1/255: [count, K].

    Sizes of subsets are uniform. The weights of a mixture are uniform (Dirichlet), or concentrated
    on a few tasks.
    """
    words = random_words(4, seed, "what-if mixtures", 0)
    rng = np.random.default_rng([int(word) for word in words])
    units_MK = np.zeros((count, len(sizes_K)), np.int64)
    for m in range(count):
        subset = rng.permutation(len(sizes_K))[: 1 + rng.integers(len(sizes_K))]
        concentration = _concentration(m)
        share_S = (
            sizes_K[subset]
            if concentration is None
            else rng.dirichlet(np.full(len(subset), concentration))
        )
        units_MK[m, subset] = _whole_units(share_S / share_S.sum())
    return units_MK


def _concentration(m: int) -> float | None:
    """Of the Dirichlet distribution that random mixture m is drawn from; None: it is a subset."""
    return (None, 1.0, 0.3)[m % 3]


def _whole_units(shares: Array) -> Array:
    """Shares rounded to multiples of 1/255 that sum to 1: largest remainders first."""
    exact = shares * _UNITS
    units = np.floor(exact).astype(np.int64)
    order = np.argsort(units - exact, kind="stable")
    units[order[: _UNITS - units.sum()]] += 1
    return units


def _kernel(shares_MK: Array, anchors_AK: Array, scale: float) -> Array:
    roots_MK, roots_AK = np.sqrt(shares_MK), np.sqrt(anchors_AK)
    squares = (roots_MK**2).sum(1)[:, None] + (roots_AK**2).sum(1) - 2 * roots_MK @ roots_AK.T
    u_MA = np.sqrt(scale * np.maximum(squares, 0.0))
    return (1 + u_MA) * np.exp(-u_MA)


def _regression(anchors_AK: Array, outputs_AO: Array) -> tuple[float, Array]:
    """Scale and coefficients [A, O] with the least leave-one-out error of the first output."""
    centered_AO = outputs_AO - outputs_AO.mean(0)
    roots_AK = np.sqrt(anchors_AK)
    variance = max(float(((roots_AK - roots_AK.mean(0)) ** 2).sum(1).mean()), 1e-12)
    best, least = (0.0, np.zeros_like(outputs_AO)), np.inf
    for gamma in _GAMMAS:
        scale = 3 * gamma / variance
        values_A, vectors_AA = np.linalg.eigh(_kernel(anchors_AK, anchors_AK, scale))
        projected_AO = vectors_AA.T @ centered_AO
        for ridge in _RIDGES:
            inverse_A = 1 / (np.maximum(values_A, 0.0) + ridge)
            coefficients_AO = (vectors_AA * inverse_A) @ projected_AO
            diagonal_A = (vectors_AA**2) @ inverse_A
            error = float(np.mean((coefficients_AO[:, 0] / diagonal_A) ** 2))
            if error < least:
                best, least = (scale, coefficients_AO), error
    return best
