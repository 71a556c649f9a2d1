"""What all searches over subsets share: estimates of masks, and the history of what was tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf_auxselect.selectors.base import (
    Array,
    Selection,
    SelectionProblem,
    Step,
    normalized_weights,
)


class SubsetSearch:
    """One search over subsets of the tasks of a problem.

    Args:
        problem: what is searched.
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self._problem = problem
        self._steps: list[Step] = []
        self.kept = problem.kept

    def try_masks(self, masks: Array, *, record: bool = True) -> Array:
        """Estimated losses [M] of subset masks [M, K].

        Raises:
            ValueError: an estimate is NaN.
        """
        result = self._problem.estimate(masks)
        if np.isnan(result.loss).any():
            tasks = self._tasks_of(masks[int(np.argmax(np.isnan(result.loss)))])
            raise ValueError(f"the estimate for the tasks {list(tasks)} is NaN.")
        if record:
            self._steps += [
                Step(
                    tasks=self._tasks_of(mask),
                    loss=float(loss),
                    low=float(low),
                    high=float(high),
                    accepted=False,
                )
                for mask, loss, low, high in zip(
                    masks, result.loss, result.low, result.high, strict=True
                )
            ]
        return result.loss

    def accept(self, mask: Array) -> None:
        """Mark the last try of this subset as accepted."""
        tasks = self._tasks_of(mask)
        for i in reversed(range(len(self._steps))):
            if self._steps[i].tasks == tasks:
                self._steps[i] = replace(self._steps[i], accepted=True)
                return

    def selection(self, mask: Array, scores: dict[str, float] | None = None) -> Selection:
        """The selection of the tasks of one mask [K]."""
        result = self._problem.estimate(mask[None])
        return Selection(
            weights=normalized_weights(mask[None], result, self._problem),
            estimate=result,
            history=tuple(self._steps),
            scores=scores or {},
        )

    def _tasks_of(self, mask: Array) -> tuple[str, ...]:
        names = self._problem.task_names
        return tuple(name for name, chosen in zip(names, mask, strict=True) if chosen)
