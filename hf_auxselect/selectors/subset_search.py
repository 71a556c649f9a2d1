"""What all searches over subsets share: estimates of masks, and the history of what was tried.

Shapes: K tasks, M subsets, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.estimators.base import TINY
from hf_auxselect.selectors.base import (
    Array,
    Selection,
    SelectionProblem,
    Step,
    checked,
    normalized_weights,
    tasks_of,
)

# What a history records. Conventions that keep ``report.json`` below a few megabytes.
_ALL_RECORDED = 64
"""With up to this many tasks, a history has every try."""
_BEST_RECORDED = 10
"""With more tasks, a history has the best of those that are tried at once, this many of them."""
_NAMES_RECORDED = 100_000
"""Names of tasks in a history, at most."""

# What lazy scoring tries. Conventions: they trade tries for rounds, and change no bound.
_FIRST_BATCH = 4
"""Candidates that are tried at once at the beginning of a round; the number doubles then."""
_CURVATURE_MARGIN = 2.0
"""The most negative curvature seen so far, times this, is allowed for in what was not tried."""
_ROUNDING = 1e-9
"""By how much rounding may move a loss of 1 nat, or of a nat of a larger loss."""


@dataclass(kw_only=True)
class _Try:
    mask: Array
    loss: float
    low: float
    high: float
    accepted: bool = False


class SubsetSearch:
    """One search over subsets of the tasks of a problem.

    Its history has every try if there are at most 64 tasks; with more, the ten best of those that
    are tried at once. It has no more than 100,000 names of tasks: if need be, tries that
    were not accepted are recorded at even distances, and then accepted ones.

    Args:
        problem: what is searched.
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self._problem = problem
        self._sizes_K = np.asarray(problem.task_sizes, float)
        self._tries: list[_Try] = []
        self._least_curvature = 0.0
        self.kept = problem.kept

    def try_masks(self, masks: Array, *, record: int | None = None) -> Array:
        """Estimated losses [M] of subset masks [M, K].

        Args:
            masks: the subsets.
            record: how many of them the history gets, those with the lowest losses; None: see
                above.

        Raises:
            ValueError: an estimate is NaN.
        """
        result = self._problem.estimate(masks)
        checked(result.loss, masks, self._problem)
        if record is None:
            record = len(masks) if masks.shape[1] <= _ALL_RECORDED else _BEST_RECORDED
        self._tries += [
            _Try(
                mask=masks[i].copy(),
                loss=float(result.loss[i]),
                low=float(result.low[i]),
                high=float(result.high[i]),
            )
            for i in np.sort(np.argsort(result.loss, kind="stable")[:record])
        ]
        return result.loss

    def best_change(
        self, mask: Array, loss: float, tasks: Array, *, goal: float, lazy: bool
    ) -> tuple[Array, float]:
        """The best subset that differs from a present one in a single task.

        Args:
            mask: the present subset [K].
            loss: its estimated loss.
            tasks: which tasks may be added or dropped, in ascending order [C].
            goal: a loss that the change must be below to be of use.
            lazy: try the candidates in the order of their lower bounds, and leave out those whose
                bound is above the best loss. It needs the problem's gradient, and a present subset
                that is not empty. Without these, and where nothing is below the goal, all are
                tried.

        Returns:
            The subset [K] and its loss; the first one among equals.
        """
        masks_CK = np.repeat(mask[None], len(tasks), 0)
        masks_CK[np.arange(len(tasks)), tasks] = ~mask[tasks]
        if not (lazy and mask.any() and self._problem.gradient is not None):
            losses_C = self.try_masks(masks_CK)
        else:
            losses_C = self._lazy_losses(mask, loss, tasks, masks_CK, goal)
        best = int(np.argmin(losses_C))
        return masks_CK[best], float(losses_C[best])

    def _lazy_losses(
        self, mask: Array, loss: float, tasks: Array, masks_CK: Array, goal: float
    ) -> Array:
        """Losses of the candidates that were tried, and infinity for the others [C].

        Adding or dropping task k moves the weights by a step s_k along the line through the task's
        corner of the simplex. The tangent there, L + s_k g_k with g_k the derivative towards that
        corner, bounds a convex loss from below. Where tries fall below their tangents, the loss is
        not convex, and the tangents are lowered: by s_k^2 times twice the most negative
        (try - tangent) / s_k^2 that this search has seen.
        """
        assert self._problem.gradient is not None
        weights_K = mask * self._sizes_K
        total = weights_K.sum()
        weights_K = weights_K / total
        gradient_K = self._problem.gradient(weights_K[None])[0]
        towards_C = gradient_K[tasks] - gradient_K @ weights_K
        sizes_C = self._sizes_K[tasks]
        steps_C = np.where(mask[tasks], -sizes_C, sizes_C)
        steps_C = steps_C / (total + steps_C)
        square_C = np.maximum(steps_C**2, TINY)
        tangents_C = loss + steps_C * towards_C
        order = np.argsort(tangents_C, kind="stable")
        losses_C, rounding = np.full(len(tasks), np.inf), _ROUNDING * max(1.0, abs(loss))
        untried_C, batch = np.ones(len(tasks), bool), _FIRST_BATCH
        while untried_C.any():
            bounds_C = tangents_C + _CURVATURE_MARGIN * self._least_curvature * square_C
            open_C = untried_C & (bounds_C - rounding <= min(losses_C.min(), goal))
            if open_C.any():
                tried, batch = order[open_C[order]][:batch], 2 * batch
            elif losses_C.min() < goal:
                break
            else:  # the search would end here: only if the full one would, too
                tried = np.flatnonzero(untried_C)
            losses_C[tried] = self.try_masks(masks_CK[tried])
            curvature_C = (losses_C[tried] - tangents_C[tried]) / square_C[tried]
            self._least_curvature = min(self._least_curvature, float(curvature_C.min()))
            untried_C[tried] = False
        return losses_C

    def accept(self, mask: Array) -> None:
        """Mark the last try of this subset as accepted; one that is not recorded is tried again."""
        tries = (one for one in reversed(self._tries) if np.array_equal(one.mask, mask))
        found = next(tries, None)
        if found is None:
            self.try_masks(mask[None])
            found = self._tries[-1]
        found.accepted = True

    def selection(self, mask: Array, scores: dict[str, float] | None = None) -> Selection:
        """The selection of the tasks of one mask [K]."""
        result = self._problem.estimate(mask[None])
        return Selection(
            weights=normalized_weights(mask[None], result, self._problem),
            estimate=result,
            history=self._history(),
            scores=scores or {},
        )

    def _history(self) -> tuple[Step, ...]:
        accepted = [one for one in self._tries if one.accepted]
        others = [one for one in self._tries if not one.accepted]
        others = _spread_out(others, _NAMES_RECORDED - _names_in(accepted))
        accepted = _spread_out(accepted, _NAMES_RECORDED)
        recorded = {id(one) for one in (*accepted, *others)}
        tries = [one for one in self._tries if id(one) in recorded]
        return tuple(
            Step(
                tasks=tasks_of(one.mask, self._problem),
                loss=one.loss,
                low=one.low,
                high=one.high,
                accepted=one.accepted,
                weights=None if one.mask.dtype == bool else self._weights_of(one.mask),
            )
            for one in tries
        )

    def _weights_of(self, weights: Array) -> dict[str, float]:
        chosen = np.flatnonzero(weights).tolist()
        return {self._problem.task_names[k]: float(weights[k]) for k in chosen}


def _spread_out(tries: list[_Try], most: int) -> list[_Try]:
    """Tries at even distances that have at most about so many names, the last one among them."""
    number = _names_in(tries)
    if number <= most:
        return tries
    every = -(-number // most) if most > 0 else len(tries)
    return tries[::-1][::every][::-1] if every < len(tries) else []


def _names_in(tries: list[_Try]) -> int:
    return sum(int(np.count_nonzero(one.mask)) for one in tries)
