"""The remaining optimizer steps, unrolled: what they make of gradients, momentum and decay.

In the eigenvectors of a quadratic model's curvature H, training falls apart into recursions of two
numbers each, the displacement and the momentum. They are tabulated as functions of the eigenvalue.

Shapes: G eigenvalues in a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hf_auxselect.estimators.base import TINY, Array

# Constants that shape estimates: how finely responses are tabulated, and what they are limited to.
# Both are conventions; the first bounds errors of interpolation, far below those of the model.
_GRID_POINTS = 8192
"""Eigenvalues at which responses to constant sources are tabulated; between, it is interpolated."""

_STABLE_SHARE = 0.9
"""Larger curvature than this share of ``stable_curvature`` is answered like this much.

At a share of 1 the displacement would oscillate without end.
"""


class Response(NamedTuple):
    """Displacement after the last step per unit of each source, at some eigenvalues."""

    momentum: Array
    """Per unit of the optimizer's momentum."""
    gradient: Array
    """Per unit of the gradient, with the opposite sign: training goes against the gradient."""
    parameters: Array
    """Per unit of the parameters, by weight decay, with the opposite sign."""


class UnrolledOptimizer:
    """The displacement after the remaining steps, for each eigenvalue of H.

    In the optimizer's coordinates, with a gradient b + H delta, step t is

        m_t = beta m_{t-1} + (1 - beta) (b + H delta_{t-1}),
        delta_t = delta_{t-1} - eta_t (m_t / (1 - beta^(t_0 + t)) + decay (theta + delta_{t-1})).

    Steps begin from the optimizer's own m_0 after its t_0 steps. SGD has no division by
    1 - beta^(t_0 + t), and adds its decay to b + H delta instead. All of it is linear in the
    sources m_0, b and theta, and a function of one eigenvalue.

    Args:
        rates: eta_t of each step.
        momentum_coefficient: beta; that of the steps taken, if it changes.
        steps_taken: t_0, which corrects the bias of momentum towards 0; None: not corrected.
        weight_decay: per unit of learning rate.
        decay_is_coupled: whether decay is added to the gradient, and so to the momentum.
        momentum_coefficients: beta of each step, if a scheduler changes it; None: it does not.

    Attributes:
        summed_learning_rate: sum of the learning rates, less what momentum delays. Training has
            just begun to converge along a curvature of 1 / summed_learning_rate.
        stable_curvature: the largest along which the steps converge, however many they are.
    """

    def __init__(
        self,
        rates: Array,
        *,
        momentum_coefficient: float,
        steps_taken: int | None,
        weight_decay: float,
        decay_is_coupled: bool = False,
        momentum_coefficients: Array | None = None,
    ) -> None:
        self._rates = rates
        beta = momentum_coefficient
        changes = momentum_coefficients is not None
        self._betas = (
            np.full(len(rates), beta) if momentum_coefficients is None else (momentum_coefficients)
        )
        # Per step, of the displacement; and per unit of gradient.
        self._decay, self._coupled_decay = (
            (0.0, weight_decay) if decay_is_coupled else (weight_decay, 0.0)
        )
        steps = np.arange(1, len(rates) + 1)
        forgotten = np.cumprod(self._betas) if changes else beta**steps
        self.summed_learning_rate = float((rates * (1 - forgotten)).sum()) or 1.0
        self._initial_momentum = 1.0 if steps_taken is None else 1 - beta**steps_taken
        base = self._betas if changes else beta
        self._corrections = (
            np.ones(len(rates)) if steps_taken is None else 1 - base ** (steps_taken + steps)
        )
        # Where a step would overshoot for good, real training does not diverge but leaves the
        # quadratic model; there the response is that of the largest curvature which converges.
        # Negative curvature is an error of the projection: it may cancel that of other directions,
        # but not grow beyond a factor of e.
        least = float(self._betas.min())
        self.stable_curvature = 2 * (1 + least) / ((1 - least) * max(float(rates.max()), TINY))
        largest = _STABLE_SHARE * self.stable_curvature
        self._largest_x = np.log(largest * self.summed_learning_rate + 2)
        self._tabulate_sources()

    def response(self, values: Array) -> Response:
        """The response to sources that are the same in every step; eigenvalues of any shape."""
        x = self._coordinate(values)
        momentum, gradient, parameters = (np.interp(x, self._x_G, d) for d in self._delta_3G)
        return Response(momentum, -gradient, -parameters)

    def response_slope(self, values: Array) -> Response:
        """The derivative of :meth:`response` with respect to the eigenvalue, of the same shapes.

        It is that of the interpolated table, as finite differences see it.
        """
        x = self._coordinate(values)
        at = np.clip(np.searchsorted(self._x_G, x, side="right") - 1, 0, _GRID_POINTS - 2)
        scaled = values * self.summed_learning_rate
        is_limited = (scaled <= -1) | (x >= self._largest_x)
        of_value = self.summed_learning_rate / np.where(is_limited, np.inf, scaled + 2)
        slopes_3G = np.diff(self._delta_3G) / np.diff(self._x_G)
        momentum, gradient, parameters = slopes_3G[:, at] * of_value
        return Response(momentum, -gradient, -parameters)

    def _coordinate(self, values: Array) -> Array:
        """Place of eigenvalues in the tables, whose entries are evenly spaced in it."""
        scaled = np.maximum(values * self.summed_learning_rate, -1.0)
        return np.clip(np.log(scaled + 2), 0.0, self._largest_x)

    def _values(self, x: Array) -> Array:
        """The eigenvalues at some places in the tables; the inverse of :meth:`_coordinate`."""
        return (np.exp(x) - 2) / self.summed_learning_rate

    def _tabulate_sources(self) -> None:
        self._x_G = np.linspace(0.0, self._largest_x, _GRID_POINTS)
        values_G = self._values(self._x_G)
        # Rows: momentum, gradient, parameters.
        delta_3G, momentum_3G = np.zeros((2, 3, _GRID_POINTS))
        momentum_3G[0] = self._initial_momentum
        gradient_31, parameters_31 = np.array([[0.0, 1, self._coupled_decay], [0, 0, self._decay]])[
            ..., None
        ]
        values_G = values_G + self._coupled_decay
        for rate, beta, correction in self._steps():
            momentum_3G *= beta
            momentum_3G += (1 - beta) * (values_G * delta_3G + gradient_31)
            delta_3G *= 1 - rate * self._decay
            delta_3G -= rate * (momentum_3G / correction + parameters_31)
        self._delta_3G = delta_3G

    def _steps(self) -> Iterator[tuple[float, float, float]]:
        """Rate, momentum coefficient and correction of its bias, of each step."""
        return zip(self._rates, self._betas, self._corrections, strict=True)
