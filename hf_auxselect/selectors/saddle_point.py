"""Minimise a loss of mixtures under ceilings on others, or the largest of several losses.

Shapes: K tasks, G groups, M starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_auxselect.selectors.base import Array, SelectionProblem, checked
from hf_auxselect.selectors.simplex import Box, measured_slopes, minimize

MAX_ROUNDS = 60
"""Most updates of the prices; a convention. Convex problems take about five."""

PRICE_TOLERANCE = 0.01
"""The last update changes no price by more than this share of 1 plus the largest; a convention."""

INNER_STEPS = 200
"""Most steps of a search between two updates of the prices; a convention."""

FIRST_PENALTY = 10.0
"""Prices per nat of excess by which the first update changes them. A convention: an excess of 0.1
nats moves a price by 1, which trades the losses one for one."""

_GROWTH, _ENOUGH, _LARGEST_PENALTY = 4.0, 0.25, 1e3
"""The penalty grows by the first, up to the third, where an update leaves more than the second of
the error. Values in common use for the method of multipliers."""


@dataclass(frozen=True, kw_only=True)
class SaddlePoint:
    """Where the searches from M starts have ended.

    Attributes:
        weights: the mixtures [M, K].
        objectives: the loss that is minimised [M].
        excesses: the losses under ceilings minus these [M, G].
        prices: of the ceilings, or the weights of the losses in the worst case [M, G].
        rounds: number of updates of the prices of each start [M].
        steps: number of steps of all searches together.
    """

    weights: Array
    objectives: Array
    excesses: Array
    prices: Array
    rounds: Array
    steps: int

    @property
    def violations(self) -> Array:
        """By how much the worst ceiling is exceeded [M]; below 0 where all hold."""
        return self.excesses.max(1)


@dataclass(frozen=True)
class Losses:
    """The objective and the excesses of a problem, as functions of mixtures, with derivatives.

    Attributes:
        problem: gives estimates.
        ceilings_G: what is subtracted from each loss.
        columns: of the target and the groups ``[target, *groups]``, which ones have a ceiling.
        weight: of the target's loss in the objective: 1, or 0 if the largest excess is all.
    """

    problem: SelectionProblem
    ceilings_G: Array
    columns: tuple[int, ...]
    weight: float = 1.0

    def all(self, weights_MK: Array) -> Array:
        """The losses of the target and of all groups: [M, 1 + groups].

        Raises:
            ValueError: an estimate is NaN, or has no losses of the groups.
        """
        found = self.problem.estimate(weights_MK)
        groups = found.group_losses
        if groups is None:
            raise ValueError(
                f"the estimates have no losses of the groups {list(self.problem.groups)}; use "
                "another estimator."
            )
        return checked(np.column_stack([found.loss, groups]), weights_MK, self.problem)

    def all_slopes(self, weights_MK: Array) -> Array:
        """Their derivatives along the simplex: [M, 1 + groups, K]."""
        of_target, of_groups = self.problem.gradient, self.problem.group_gradients
        if of_target is None or of_groups is None:
            return measured_slopes(self.all)(weights_MK)
        return np.concatenate([of_target(weights_MK)[:, None], of_groups(weights_MK)], 1)

    def values(self, weights_MK: Array) -> tuple[Array, Array]:
        """The objective [M] and the excesses [M, G]."""
        found = self.all(weights_MK)
        return self.weight * found[:, 0], found[:, self.columns] - self.ceilings_G


def not_negative(prices_MG: Array) -> Array:
    """The nearest prices of ceilings."""
    return np.maximum(prices_MG, 0.0)


def on_simplex(prices_MG: Array) -> Array:
    """The nearest weights that are not negative and sum to 1."""
    sorted_MG = -np.sort(-prices_MG, 1)
    excess_MG = np.cumsum(sorted_MG, 1) - 1
    number_G = np.arange(1, prices_MG.shape[1] + 1)
    last_M = (sorted_MG * number_G > excess_MG).sum(1) - 1
    threshold_M = np.take_along_axis(excess_MG, last_M[:, None], 1)[:, 0] / (last_M + 1)
    return np.maximum(prices_MG - threshold_M[:, None], 0.0)


def saddle_point(
    losses: Losses,
    starts_MK: Array,
    prices_G: Array,
    box: Box,
    restrict: Callable[[Array], Array],
    *,
    tolerance: float,
) -> SaddlePoint:
    """Minimise ``objective + max over prices of prices @ excesses`` from M starts.

    Prices that are not negative (``restrict`` cuts them at 0) make this the lowest objective whose
    excesses are not above 0; prices on the simplex make it the lowest largest excess. In each round
    the mixture minimises the objective with penalty r,

        objective(w) + max over p of [p @ excesses(w) - |p - prices|^2 / (2 r)],

    and the prices become the maximiser, ``restrict(prices + r * excesses)``.

    Args:
        losses: objective and excesses.
        starts_MK: mixtures within the bounds.
        prices_G: the first prices.
        box: the bounds of the weights.
        restrict: the nearest prices that are possible: [M, G] -> [M, G].
        tolerance: nats; how far excesses may be above 0, and how much the objective may be missed.

    Source: the proximal method of multipliers, Rockafellar, "Augmented Lagrangians and applications
    of the proximal point algorithm in convex programming" (Math. Oper. Res. 1976); the update of
    the prices is the projected dual ascent of "A Primal-Dual Subgradient Approach for Fair Meta
    Learning" (arXiv 2009.12675), with the penalty as its rate.
    """
    num_starts = len(starts_MK)
    weights, steps = starts_MK.copy(), 0
    prices = np.repeat(restrict(prices_G[None]), num_starts, 0)
    penalties, errors = np.full(num_starts, FIRST_PENALTY), np.full(num_starts, np.inf)
    objectives, excesses = losses.values(weights)
    rounds = np.zeros(num_starts, int)
    active = np.arange(num_starts)
    for _ in range(MAX_ROUNDS):
        rates_M1, before_MG = penalties[active, None], prices[active]

        def at_penalty(
            weights_MK: Array, rows: Array, rates_M1: Array = rates_M1, before_MG: Array = before_MG
        ) -> Array:
            objective, excess = losses.values(weights_MK)
            new = restrict(before_MG[rows] + rates_M1[rows] * excess)
            change = ((new - before_MG[rows]) ** 2).sum(1) / (2 * rates_M1[rows, 0])
            return objective + (new * excess).sum(1) - change

        def slopes_at_penalty(
            weights_MK: Array, rows: Array, rates_M1: Array = rates_M1, before_MG: Array = before_MG
        ) -> Array:
            _, excess = losses.values(weights_MK)
            new = restrict(before_MG[rows] + rates_M1[rows] * excess)
            slopes = losses.all_slopes(weights_MK)
            return losses.weight * slopes[:, 0] + np.einsum(
                "mg,mgk->mk", new, slopes[:, losses.columns]
            )

        found = minimize(
            at_penalty,
            slopes_at_penalty,
            weights[active],
            box,
            tolerance=tolerance / 4,
            max_steps=INNER_STEPS,
        )
        steps += found.steps
        weights[active] = found.weights
        objectives[active], excesses[active] = losses.values(found.weights)
        new = restrict(before_MG + rates_M1 * excesses[active])
        # Bounds excesses above 0 and what prices that are not 0 leave of a ceiling or of the worst.
        moved = np.abs(new - before_MG).max(1)
        error = moved / penalties[active]
        prices[active] = new
        rounds[active] += 1
        slow = error > _ENOUGH * errors[active]
        penalties[active] = np.minimum(
            np.where(slow, _GROWTH * penalties[active], penalties[active]), _LARGEST_PENALTY
        )
        errors[active] = error
        unsettled = moved > PRICE_TOLERANCE * (1 + new.max(1))
        active = active[(error > tolerance) | unsettled]
        if not len(active):
            break
    return SaddlePoint(
        weights=weights,
        objectives=objectives,
        excesses=excesses,
        prices=prices,
        rounds=rounds,
        steps=steps,
    )
