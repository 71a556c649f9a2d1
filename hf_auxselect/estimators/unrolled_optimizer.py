"""The remaining optimizer steps, unrolled: what they make of gradients, momentum, decay and noise.

In the eigenvectors of a quadratic model's curvature H, training falls apart into recursions of two
numbers each, the displacement and the momentum. They are tabulated as functions of the eigenvalue.

Shapes: M mixtures, R eigenvalues of each, G eigenvalues in a table, Q basis functions of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hf_auxselect.estimators.base import TINY, Array

# Constants that shape estimates: how finely responses are tabulated, and what they are limited to.
# All are conventions; the first six bound errors of interpolation, far below those of the model.
_GRID_POINTS = 8192
"""Eigenvalues at which responses to constant sources are tabulated; between, it is interpolated."""

_NOISE_GRID_POINTS = 2048
"""The same for responses to single steps, which take many numbers each."""

_BASIS_GRID_POINTS = 64
"""Eigenvalues whose responses to single steps give the basis functions of time."""

_BASIS_TOLERANCE = 1e-6
"""Basis functions of time are kept down to this share of the largest singular value."""

_MAX_PASSES = 64
"""If the examples are read more often, what shuffling leaves of their noise is next to nothing."""

_MAX_MOMENTS = 256
"""Points in time between which the sum of responses is interpolated."""

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


class NoiseResponse(NamedTuple):
    """The covariance of the displacement after the last step, per unit of each step's noise.

    Between the eigenvectors i and j it is ``sum_q drawn_iq drawn_jq - sum_p passes_ip passes_jp``:
    the covariance of independent draws, less what drawing without replacement takes away.
    """

    drawn: Array
    """[M, R, Q]"""
    passes: Array
    """[M, R, passes over the examples]"""


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
        self._tabulate_noise()

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

    def noise_response(self, values_MR: Array, steps_per_pass_M: Array) -> NoiseResponse:
        """The response to noise of the gradients which is independent between examples.

        Rows are drawn without replacement, so that after a whole pass, P steps long, their noise
        has cancelled out: noise of the steps s and t is correlated by u_st = 1 for s = t, less
        1 / P for all s, t of the same pass.

        Args:
            values_MR: eigenvalues.
            steps_per_pass_M: P, the number of steps after which all rows of a mixture are read.
        """
        num_steps = len(self._rates)
        steps_per_pass_M = np.maximum(steps_per_pass_M, num_steps / _MAX_PASSES)
        place_MR = self._coordinate(values_MR) / self._largest_x * (_NOISE_GRID_POINTS - 1)
        at_MR, share_MR = _between(place_MR, _NOISE_GRID_POINTS)
        share_MR1 = share_MR[..., None]
        drawn = self._basis_GQ[at_MR] * (1 - share_MR1) + self._basis_GQ[at_MR + 1] * share_MR1

        # Within a pass, noise adds up to 0: the sum over its steps of an unconstrained draw, spread
        # over them, is taken away. The last pass may be broken off.
        num_passes = int(np.ceil(num_steps / steps_per_pass_M.min(initial=num_steps)))
        ends_MP = np.minimum(np.arange(num_passes + 1) * steps_per_pass_M[:, None], num_steps)
        last = len(self._sums_SG) - 1
        moment_MP, between_MP = _between(ends_MP / num_steps * last, last + 1)
        sums_MRP = np.zeros((*values_MR.shape, num_passes + 1))
        for later, of_time in ((0, 1 - between_MP), (1, between_MP)):
            for higher, of_value in ((0, 1 - share_MR), (1, share_MR)):
                sums = self._sums_SG[moment_MP[:, None, :] + later, at_MR[..., None] + higher]
                sums_MRP += of_time[:, None, :] * of_value[..., None] * sums
        passes = np.diff(sums_MRP, axis=2) / np.sqrt(steps_per_pass_M)[:, None, None]
        return NoiseResponse(drawn, passes)

    def _coordinate(self, values: Array) -> Array:
        """Place of eigenvalues in the tables, whose entries are evenly spaced in it."""
        scaled = np.maximum(values * self.summed_learning_rate, -1.0)
        return np.clip(np.log(scaled + 2), 0.0, self._largest_x)

    def _values(self, num_points: int) -> Array:
        """The eigenvalues of the entries of a table with this many points."""
        x = np.linspace(0.0, self._largest_x, num_points)
        return (np.exp(x) - 2) / self.summed_learning_rate

    def _tabulate_sources(self) -> None:
        self._x_G = np.linspace(0.0, self._largest_x, _GRID_POINTS)
        values_G = self._values(_GRID_POINTS)
        # Columns: momentum, gradient, parameters.
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

    def _tabulate_noise(self) -> None:
        num_steps = len(self._rates)
        # Responses h_t are smooth in the eigenvalue: few functions of time span them all.
        few = np.stack(list(self._impulses(self._values(_BASIS_GRID_POINTS))))
        times_TQ, size_Q, _ = np.linalg.svd(few, full_matrices=False)
        times_TQ = times_TQ[:, size_Q >= _BASIS_TOLERANCE * size_Q[0]]
        num_moments = min(num_steps, _MAX_MOMENTS)
        self._basis_GQ = np.zeros((_NOISE_GRID_POINTS, times_TQ.shape[1]))
        later_SG = np.zeros((num_moments + 1, _NOISE_GRID_POINTS))
        total_G = np.zeros(_NOISE_GRID_POINTS)
        impulses = self._impulses(self._values(_NOISE_GRID_POINTS))
        for t, own_G in zip(range(num_steps - 1, -1, -1), impulses, strict=True):
            self._basis_GQ += own_G[:, None] * times_TQ[num_steps - 1 - t]
            total_G += own_G
            # Step t is the time from t to t + 1; the responses of the steps since each moment.
            first = -(-t * num_moments // num_steps)
            if first * num_steps < (t + 1) * num_moments:
                share = t + 1 - first * num_steps / num_moments
                later_SG[first] = total_G - (1 - share) * own_G
        self._sums_SG = later_SG[0] - later_SG  # since the switch

    def _impulses(self, values_G: Array) -> Iterator[Array]:
        """Displacement after the last step per unit of gradient in one step, from the last back."""
        of_delta_G, of_momentum_G = np.ones_like(values_G), np.zeros_like(values_G)
        values_G = values_G + self._coupled_decay
        for rate, beta, correction in reversed(list(self._steps())):
            of_momentum_G = of_momentum_G - of_delta_G * rate / correction
            yield (1 - beta) * of_momentum_G
            of_delta_G = (1 - rate * self._decay) * of_delta_G
            of_delta_G += (1 - beta) * values_G * of_momentum_G
            of_momentum_G = beta * of_momentum_G

    def _steps(self) -> Iterator[tuple[float, float, float]]:
        """Rate, momentum coefficient and correction of its bias, of each step."""
        return zip(self._rates, self._betas, self._corrections, strict=True)


def _between(places: Array, length: int) -> tuple[Array, Array]:
    """The entry before each position in a table, and the share of the one after it."""
    before = np.clip(places.astype(np.int64), 0, length - 2)
    return before, places - before
