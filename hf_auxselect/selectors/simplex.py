"""Search for mixtures on the simplex: bounds on the weights, and the least of a smooth function.

Shapes: K tasks, M mixtures that are searched from at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hf_auxselect.selectors.base import (
    Array,
    GradientFn,
    LossEstimate,
    SelectionProblem,
    Step,
    tasks_of,
)

ValueFn = Callable[[Array, Array], Array]
"""Weights [M, K] and from which start each of them comes [M] -> values [M] or slopes [M, K]."""

KEPT_SHARE = 0.5
"""A kept task has at least this fraction of its share in all tasks. A convention."""

LEAST_WEIGHT = 2e-6
"""Smaller weights become 0: the sampler draws no rows of a task whose share is below 1e-6."""

STEP_OF_SLOPES = 1e-3
"""Change of weights by which slopes are measured where there is no gradient. A convention: the
error is of its square, rounding of 1e-13 over it."""
_CHUNK = 2**22
"""Weights that are estimated at once where slopes are measured: 32 MiB; a convention."""

_PATIENCE = 20
"""Steps after which a search ends if they have lowered its best value by less than the tolerance.
A convention. It is for functions with kinks, at which the gap does not become small."""

_BISECTIONS = 100
_MEMORY = 10
"""Of how many losses the largest one is what a step must improve on."""
_SUFFICIENT = 1e-4
_SHORTEST = 2.0**-30
"""Constants of the spectral projected gradient method, as in its paper (see ``minimize``)."""


@dataclass(frozen=True)
class Box:
    """The mixtures whose weights lie between bounds.

    Attributes:
        shares_K: the mixture of all tasks by size, which lies within the bounds.
        low_K, high_K: bounds of each weight.
        notes: what a reader should know of the bounds.
    """

    shares_K: Array
    low_K: Array
    high_K: Array
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, problem: SelectionProblem, max_repetitions: float | None) -> Box:
        """The bounds that ``keep`` and a cap on repetitions set.

        Args:
            problem: whose tasks these are.
            max_repetitions: how often the remaining steps may read a row, at most; None: no cap.

        Raises:
            ValueError: the cap needs ``rows_to_read``, and the problem has none.
        """
        sizes_K = np.asarray(problem.task_sizes, float)
        shares_K = sizes_K / sizes_K.sum()
        low_K = np.where(problem.kept, KEPT_SHARE * shares_K, 0.0)
        high_K = np.ones(len(sizes_K))
        if max_repetitions is None:
            return cls(shares_K, low_K, high_K)
        if problem.rows_to_read is None:
            raise ValueError(
                "max_repetitions needs the number of rows that the remaining steps read: give the "
                "SelectionProblem rows_to_read=..., or leave max_repetitions out."
            )
        reads = problem.rows_to_read / sizes_K.sum()
        if reads >= max_repetitions:
            note = (
                f"max_repetitions={max_repetitions:g} cannot hold: the remaining steps read "
                f"{problem.rows_to_read} rows, and there are {sizes_K.sum():.0f}. All tasks were "
                f"kept by their sizes, which reads each row {reads:.1f} times, the least there is."
            )
            return cls(shares_K, shares_K, shares_K, (note,))
        return cls(shares_K, low_K, np.minimum(shares_K * max_repetitions / max(reads, 1e-12), 1))

    def project(self, points_MK: Array) -> Array:
        """The nearest mixtures within the bounds, by squares of changes over shares of all tasks.

        A task that is split in two moves as it would as one.
        """
        low_K, high_K, shares_K = self.low_K, self.high_K, self.shares_K
        # The weights are clip(point - t * share), with t such that they sum to 1.
        least_M1 = ((points_MK - high_K) / shares_K).min(1, keepdims=True)
        most_M1 = ((points_MK - low_K) / shares_K).max(1, keepdims=True)
        for _ in range(_BISECTIONS):
            middle_M1 = (least_M1 + most_M1) / 2
            totals_M1 = np.clip(points_MK - middle_M1 * shares_K, low_K, high_K).sum(1)[:, None]
            least_M1 = np.where(totals_M1 > 1, middle_M1, least_M1)
            most_M1 = np.where(totals_M1 > 1, most_M1, middle_M1)
        result_MK = np.clip(points_MK - most_M1 * shares_K, low_K, high_K)
        free_MK = ((result_MK > low_K) & (result_MK < high_K)) * shares_K
        rest_M1 = 1 - result_MK.sum(1, keepdims=True)
        total_M1 = free_MK.sum(1, keepdims=True)
        part_MK = np.divide(free_MK, total_M1, out=np.zeros_like(free_MK), where=total_M1 > 0)
        return np.clip(result_MK + rest_M1 * part_MK, low_K, high_K)

    def lowest(self, slopes_MK: Array) -> Array:
        """The mixtures within the bounds with the lowest ``slopes @ weights``: [M, K]."""
        order_MK = np.argsort(slopes_MK, 1, kind="stable")
        room_MK = (self.high_K - self.low_K)[order_MK]
        before_MK = np.cumsum(room_MK, 1) - room_MK
        given_MK = np.clip(1 - self.low_K.sum() - before_MK, 0, room_MK)
        result_MK = np.zeros_like(slopes_MK)
        np.put_along_axis(result_MK, order_MK, given_MK, 1)
        return result_MK + self.low_K

    def drawable(self, weights_K: Array) -> Array:
        """A mixture without weights below ``LEAST_WEIGHT``."""
        small_K = (weights_K < LEAST_WEIGHT) & (weights_K > 0) & (self.low_K == 0)
        if not small_K.any():
            return weights_K
        return self.without(weights_K < LEAST_WEIGHT).project(weights_K[None])[0]

    def without(self, dropped: Array) -> Box:
        """The same bounds, with no weight for some tasks: bool [K]; kept ones stay."""
        return replace(self, high_K=np.where(dropped & (self.low_K == 0), 0.0, self.high_K))

    def singles(self) -> Array:
        """For each task the mixture nearest to it alone: [K, K]; itself where no bound binds."""
        shares_K, low_K = self.shares_K, self.low_K
        own_K = np.minimum(self.high_K, 1 - (low_K.sum() - low_K))
        kept_K = np.where(low_K > 0, shares_K, 0.0)
        of_kept_K = kept_K.sum() - kept_K
        others_K = np.maximum(1 - shares_K, 1e-300)
        # The others have s times their share in all tasks, kept ones at least ``KEPT_SHARE``.
        factors_K = (1 - own_K) / others_K
        free_K = np.maximum(others_K - of_kept_K, 1e-300)
        less_K = np.maximum(1 - own_K - KEPT_SHARE * of_kept_K, 0) / free_K
        is_less_K = (factors_K < KEPT_SHARE) & (of_kept_K > 0)
        factors_K = np.where(is_less_K, less_K, factors_K)
        result_KK = np.maximum(factors_K[:, None] * shares_K, low_K)
        np.fill_diagonal(result_KK, 0.0)
        np.fill_diagonal(result_KK, 1 - result_KK.sum(1))
        return result_KK


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where a search from M starts has ended.

    Attributes:
        weights: the mixtures [M, K].
        values: of the function there [M].
        gaps: how far the function lies above its least value at most, if it is convex [M].
        first_slopes: its derivatives at the starts [M, K].
        steps: number of steps of all starts together.
    """

    weights: Array
    values: Array
    gaps: Array
    first_slopes: Array
    steps: int


def minimize(
    value: ValueFn,
    slopes: ValueFn,
    starts_MK: Array,
    box: Box,
    *,
    tolerance: float,
    max_steps: int,
) -> Minima:
    """The least values of a smooth function of mixtures near M starts: projected gradient descent.

    A start ends when a mixture within the bounds cannot be lower by more than ``tolerance`` on the
    tangent there (the Frank-Wolfe gap), when 20 steps have lowered the function by less than
    ``tolerance``, when no shorter step lowers it, or after ``max_steps``.

    Args:
        value: the function: [M, K], starts [M] -> [M].
        slopes: its derivative along the simplex: [M, K], starts [M] -> [M, K].
        starts_MK: mixtures within the bounds.
        box: the bounds.
        tolerance: in units of the function.
        max_steps: largest number of steps from one start.

    Source: Birgin, Martínez and Raydan, "Nonmonotone spectral projected gradient methods on convex
    sets" (SIAM J. Optim. 2000), algorithm SPG2; in the metric of :meth:`Box.project`.
    """
    shares_K = box.shares_K
    weights, everyone = starts_MK.copy(), np.arange(len(starts_MK))
    values, gradients = value(weights, everyone), slopes(weights, everyone).copy()
    first_slopes = gradients.copy()
    best, best_values = weights.copy(), values.copy()
    gaps, best_gaps = np.full(len(weights), np.inf), np.full(len(weights), np.inf)
    recent = np.repeat(values[:, None], _MEMORY, 1)
    earlier = np.full((_PATIENCE, len(weights)), np.inf)  # best values of the last steps
    centred = gradients - gradients @ shares_K[:, None]
    rates = 1 / np.maximum(np.abs(centred).max(1), 1e-300)
    active, steps = everyone, 0
    for step in range(max_steps + 1):
        slopes_MK = gradients[active]
        gaps[active] = ((weights[active] - box.lowest(slopes_MK)) * slopes_MK).sum(1)
        improved = active[values[active] <= best_values[active]]
        best[improved], best_values[improved] = weights[improved], values[improved]
        best_gaps[improved] = gaps[improved]
        is_stalled = earlier[step % _PATIENCE] - best_values < tolerance
        earlier[step % _PATIENCE] = best_values
        active = active[(gaps[active] > tolerance) & ~is_stalled[active]]
        if not len(active) or step == max_steps:
            break
        moves = box.project(weights[active] - rates[active, None] * shares_K * gradients[active])
        moves -= weights[active]
        descent = (gradients[active] * moves).sum(1)
        bounds, lengths = recent[active].max(1), np.ones(len(active))
        fresh = np.full(len(active), np.nan)
        pending = np.flatnonzero(descent < 0)
        while len(pending):
            rows = active[pending]
            tried = value(weights[rows] + lengths[pending, None] * moves[pending], rows)
            limit = bounds[pending] + _SUFFICIENT * lengths[pending] * descent[pending]
            fresh[pending[tried <= limit]] = tried[tried <= limit]
            pending = pending[~(tried <= limit)]
            lengths[pending] /= 2
            pending = pending[lengths[pending] >= _SHORTEST]
        moved = ~np.isnan(fresh)
        active, moves = active[moved], (lengths[:, None] * moves)[moved]
        if not len(active):
            break
        weights[active] += moves
        values[active] = fresh[moved]
        new = slopes(weights[active], active)
        bend = (moves * (new - gradients[active])).sum(1)
        squares = (moves**2 / shares_K).sum(1)
        rates[active] = np.where(bend > 0, squares / np.maximum(bend, 1e-300), 2 * rates[active])
        rates[active] = np.clip(rates[active], 1e-12, 1e12)
        gradients[active] = new
        recent[active] = np.column_stack([recent[active, 1:], values[active]])
        steps += len(active)
    return Minima(
        weights=best, values=best_values, gaps=best_gaps, first_slopes=first_slopes, steps=steps
    )


def measured_slopes(losses: GradientFn) -> GradientFn:
    """Derivatives along the simplex from 2 K + 1 estimates a mixture, for want of a gradient.

    Args:
        losses: [M, K] -> [M], or [M, G] for several functions.

    Returns:
        A function [M, K] -> [M, K], or [M, G, K].
    """

    def slopes(weights_MK: Array) -> Array:
        num_tasks = weights_MK.shape[1]
        chunk = max(1, _CHUNK // num_tasks)
        parts = []
        for weights_K in weights_MK:
            here = losses(weights_K[None])[0]
            steps = []
            for length in (STEP_OF_SLOPES, 2 * STEP_OF_SLOPES):
                there = [
                    losses(
                        (1 - length) * weights_K + length * np.eye(stop - start, num_tasks, start)
                    )
                    for start in range(0, num_tasks, chunk)
                    for stop in [min(start + chunk, num_tasks)]
                ]
                steps.append(np.concatenate(there) - here)
            parts.append(((4 * steps[0] - steps[1]) / (2 * STEP_OF_SLOPES)).T)
        return np.array(parts)

    return slopes


def steps_of(
    weights_MK: Array, estimate: LossEstimate, problem: SelectionProblem, *, accepted: bool = False
) -> list[Step]:
    """Mixtures with their estimates, for the history of a search."""
    return [
        Step(
            tasks=tasks_of(weights_K, problem),
            loss=float(loss),
            low=float(low),
            high=float(high),
            accepted=accepted,
            weights={
                problem.task_names[k]: float(weights_K[k])
                for k in np.flatnonzero(weights_K).tolist()
            },
        )
        for weights_K, loss, low, high in zip(
            weights_MK, estimate.loss, estimate.low, estimate.high, strict=True
        )
    ]
