"""Mixture optimization: the weights with the lowest estimated loss, as far as they are certain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import is_count, is_number
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Array,
    GradientFn,
    Selection,
    SelectionProblem,
    checked,
    normalized_weights,
)
from hf_auxselect.selectors.shrinkage import (
    KEPT_ALL,
    RISK_AVERSION,
    GainBounds,
    is_shrinkage,
    shrink,
)
from hf_auxselect.selectors.simplex import (
    Box,
    Minima,
    measured_slopes,
    minimize,
    steps_of,
)

MAX_STEPS = 500
"""Most steps of a search from one start; a convention. Searches of convex losses take about 20."""

NEGLIGIBLE = 1e-3
"""A weight below this fraction of the task's share in all tasks becomes 0. A convention."""


@dataclass(frozen=True, kw_only=True)
class MixtureOptimization(AbstractSelector):
    """Finds the mixture weights with the lowest estimated loss, and shrinks them towards all tasks.

    Choose it where the training set may be weighted, as it can be in a run of the callback. The
    lowest estimate of a mixture is never above that of a subset, and by default no task is left
    out.

    The loss is minimised over the weights by projected gradient descent from several starts, with
    the estimator's gradient, or else with slopes measured from 2 K + 1 estimates. The result is
    then moved towards the mixture of all tasks by their sizes, as far as the estimates are noise:
    of 5%, 10%, ..., 90% of the way from all tasks to each optimum, and to each of the best single
    tasks, the mixture is taken whose gain over all tasks is largest, less ``risk_aversion`` times
    the half width of its 90% interval. If no gain is left, all tasks are kept, and the report says
    so. Without intervals of the difference, those of the losses are used, which are wider.

    The scores are slopes: by how much the estimated loss would rise for each unit of weight that
    all tasks together give to the task, nats per label token; negative where more of it helps.

    Cost: K estimates, and about 20 gradients from each start; by default 19 differences for each
    start more.

    Args:
        max_repetitions: how often the remaining steps may read a row of a task at most, which caps
            the task's weight. Where even all tasks together are read more often, all are kept.
            None: no cap.
        shrinkage: share of the way from the optimum to all tasks that is gone back: 0 is the
            optimum, 1 is all tasks. None: by the rule above, and at least a tenth.
        risk_aversion: see above. 0 trusts the estimates alone; with 1, a gain must hold at the end
            of its 90% interval. It plays no part where ``shrinkage`` is given.
        round_to_subset: choose a subset, whose tasks are weighted by their sizes: the best of those
            that take tasks in the order of their optimal weight over their share in all tasks;
            with ``shrinkage=None``, the one with the largest gain by that rule.
        starts: number of starts: all tasks, then the best single tasks.
        tolerance: nats per label token; how far above the least loss a search may end.
    """

    max_repetitions: float | None = None
    shrinkage: float | None = None
    risk_aversion: float = RISK_AVERSION
    round_to_subset: bool = False
    starts: int = 8
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        require_mixture_options(self.max_repetitions, self.starts, self.tolerance)
        if not is_shrinkage(self.shrinkage):
            raise ValueError(f"shrinkage must be in [0, 1] or None, got {self.shrinkage!r}.")
        if not (is_number(self.risk_aversion) and self.risk_aversion >= 0):
            raise ValueError(f"risk_aversion must be 0 or more, got {self.risk_aversion!r}.")

    def select(self, problem: SelectionProblem) -> Selection:
        box = Box.of(problem, self.max_repetitions)
        singles_KK = box.singles()
        estimate = problem.estimate(singles_KK)
        losses_K = checked(estimate.loss, singles_KK, problem)
        best = np.argsort(losses_K, kind="stable")[: self.starts - 1]
        minima = lowest_mixtures(
            problem,
            np.vstack([box.shares_K[None], singles_KK[best]]),
            box,
            tolerance=self.tolerance,
        )
        optimum_K = minima.weights[int(np.argmin(minima.values))]
        bounds = None
        if self.shrinkage is None:
            bounds = GainBounds(problem, box.shares_K, self.risk_aversion)
        notes = box.notes
        if self.round_to_subset:
            weights_K = _best_subset(optimum_K, problem, box, bounds)
        elif bounds is None:
            assert self.shrinkage is not None
            weights_K = shrink(without_negligible(optimum_K, box), box.shares_K, self.shrinkage)
        else:
            uppers_K = bounds.upper(singles_KK)
            order = np.argsort(uppers_K, kind="stable")[: max(1, self.starts - 1)]
            endpoints_EK = np.vstack([minima.weights, singles_KK[order]])
            weights_K, upper = bounds.best_on_segments(endpoints_EK)
            weights_K = weights_K if upper < 0 else box.shares_K
        if bounds is not None and not notes and np.allclose(weights_K, box.shares_K):
            notes = (KEPT_ALL,)
        weights_K = box.drawable(weights_K)
        chosen = problem.estimate(weights_K[None])
        slopes_K = minima.first_slopes[0]
        slopes_K = slopes_K - slopes_K @ box.shares_K
        return Selection(
            weights=normalized_weights(weights_K[None], chosen, problem),
            estimate=chosen,
            history=(
                *steps_of(singles_KK, estimate, problem),
                *steps_of(weights_K[None], chosen, problem, accepted=True),
            ),
            scores=dict(zip(problem.task_names, slopes_K.tolist(), strict=True)),
            notes=notes,
        )


def require_mixture_options(max_repetitions: float | None, starts: int, tolerance: float) -> None:
    """Raise ValueError for the first option of a search for weights that is wrong."""
    if max_repetitions is not None and not (is_number(max_repetitions) and max_repetitions > 0):
        raise ValueError(
            f"max_repetitions must be a positive number or None, got {max_repetitions!r}."
        )
    if not is_count(starts, 1):
        raise ValueError(f"starts must be a number of starts, 1 or more, got {starts!r}.")
    if not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be positive (nats per label token), got {tolerance!r}.")


def lowest_mixtures(
    problem: SelectionProblem, starts_MK: Array, box: Box, *, tolerance: float
) -> Minima:
    """The lowest estimated losses near some starts; see ``minimize``."""

    def losses(weights_MK: Array) -> Array:
        return checked(problem.estimate(weights_MK).loss, weights_MK, problem)

    slopes: GradientFn = problem.gradient or measured_slopes(losses)
    return minimize(
        lambda weights_MK, _: losses(weights_MK),
        lambda weights_MK, _: slopes(weights_MK),
        starts_MK,
        box,
        tolerance=tolerance,
        max_steps=MAX_STEPS,
    )


def without_negligible(weights_K: Array, box: Box) -> Array:
    """The mixture without weights that are next to nothing."""
    small_K = weights_K < NEGLIGIBLE * box.shares_K
    return box.without(small_K).project(weights_K[None])[0]


def _best_subset(
    optimum_K: Array, problem: SelectionProblem, box: Box, bounds: GainBounds | None
) -> Array:
    """Of the subsets that take tasks by their weight over their share in all tasks, the best."""
    ratios_K = np.where(problem.kept, np.inf, np.round(optimum_K / box.shares_K, 9))
    cuts_M = np.unique(ratios_K)  # tasks with equal ratios stay together
    masks_MK = ratios_K >= cuts_M[::-1, None]
    subsets_MK = masks_MK * box.shares_K
    subsets_MK /= subsets_MK.sum(1, keepdims=True)
    within_M = (subsets_MK <= box.high_K + 1e-9).all(1)
    subsets_MK = subsets_MK[within_M]  # the last one is all tasks
    if bounds is None:
        scores_M = checked(problem.estimate(subsets_MK).loss, subsets_MK, problem)
    else:
        scores_M = np.append(bounds.upper(subsets_MK)[:-1], 0.0)
    return subsets_MK[int(np.argmin(scores_M))]
