"""Shrink a mixture towards all tasks, so that a choice does not rest on the noise of estimates.

Shapes: K tasks, M mixtures, E endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import is_number
from hf_auxselect.selectors.base import Array, SelectionProblem, checked

LEAST_SHRINKAGE = 0.1
"""The default never goes farther from all tasks than to 1 minus this. A convention: no interval
knows all errors of an estimate, and of a convex loss it costs at most a tenth of the gain. In
ground-truth runs it gained more than the optimum in text and demo, and less in small."""

FRACTIONS = np.linspace(0, 1 - LEAST_SHRINKAGE, 19)[1:]
"""How far from all tasks to an endpoint mixtures are tried; a convention."""

RISK_AVERSION = 0.25
"""How many half widths of its 90% interval count against an estimated gain, by default.

Measured on ground-truth runs of small, demo, text and arithmetic, choosing from random pools of
mixtures (``benchmarks.accuracy.risk_aversion``): with 0.25 the choice has nearly all of the gain of
the best estimate and is less often worse than all tasks; with 1, all tasks are nearly always kept.
"""

KEPT_ALL = (
    "No significant difference: no mixture is estimated to be better than all tasks by more than "
    "its uncertainty, so all tasks were kept, by their sizes."
)


def is_shrinkage(value: float | None) -> bool:
    """Whether it is a share, or None for the default."""
    return value is None or (is_number(value) and 0 <= value <= 1)


def shrink(weights_K: Array, shares_K: Array, shrinkage: float) -> Array:
    """A mixture moved by a share of the way towards all tasks."""
    return (1 - shrinkage) * weights_K + shrinkage * shares_K


@dataclass(frozen=True)
class GainBounds:
    """Upper bounds of the loss of mixtures minus that of all tasks.

    A bound is the estimated difference, plus ``risk_aversion`` times the half width of its 90%
    interval: 1 is the upper end of the interval, 0 the estimate itself.
    """

    problem: SelectionProblem
    shares_K: Array
    risk_aversion: float = RISK_AVERSION

    def upper(self, weights_MK: Array) -> Array:
        """The bounds [M], nats per label token; 0 for all tasks themselves."""
        loss, high = _difference(self.problem, weights_MK, self.shares_K)
        return loss + self.risk_aversion * (high - loss)

    def best_on_segments(
        self, endpoints_EK: Array, usable: Array | None = None
    ) -> tuple[Array, float]:
        """The mixture with the lowest bound on the segments from all tasks to some endpoints.

        Args:
            endpoints_EK: of the segments, at ``FRACTIONS`` of which mixtures are tried.
            usable: bool [E, len(FRACTIONS)]: which of these mixtures may be chosen; None: all.

        Returns:
            The mixture [K] and its bound.
        """
        points_MK = points_on_segments(endpoints_EK, self.shares_K)
        upper_M = self.upper(points_MK)
        if usable is not None:
            upper_M = np.where(usable.ravel(), upper_M, np.inf)
        first = int(np.argmin(upper_M))
        return points_MK[first], float(upper_M[first])


def points_on_segments(endpoints_EK: Array, shares_K: Array) -> Array:
    """Mixtures at ``FRACTIONS`` of the way from all tasks to each endpoint: [E * fractions, K]."""
    points = shares_K + FRACTIONS[:, None] * (endpoints_EK - shares_K)[:, None]
    return points.reshape(-1, len(shares_K))


def _difference(
    problem: SelectionProblem, weights_MK: Array, reference_K: Array
) -> tuple[Array, Array]:
    """Estimated differences of losses and their upper ends [M].

    Without a ``difference`` the errors of the two losses count as independent.
    """
    if problem.difference is not None:
        found = problem.difference(weights_MK, reference_K)
        loss, high = found.loss, found.high
    else:
        ours, other = problem.estimate(weights_MK), problem.estimate(reference_K[None])
        loss = ours.loss - other.loss
        high = loss + np.hypot(ours.high - ours.loss, other.loss - other.low)
    return checked(loss, weights_MK, problem), high
