"""Backward elimination: drop the task whose absence lowers the estimated loss most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import is_number, require_count
from hf_auxselect.selectors.base import AbstractSelector, Selection, SelectionProblem
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class BackwardElimination(AbstractSelector):
    """Starts from all tasks and drops the one whose absence lowers the estimated loss most.

    Choose it where few of many tasks do harm. It stops when no absence lowers the loss, or when
    ``min_tasks`` (or only ``keep``) are left.

    Cost: at most K (K + 1) / 2 estimates, those of a step in one call. With hundreds of tasks use
    ``lazy=True``: a step then leaves out the tasks that lower bounds rule out, as
    ``ForwardSelection`` describes. Of a loss that is convex in the weights the result is the same;
    of other losses it need not be.

    The history has every try, or with more than 64 tasks the ten best of each step; if these are
    more than 100,000 names of tasks, accepted ones at even distances.

    Args:
        min_tasks: smallest number of selected tasks.
        min_improvement: nats per label token by which dropping a task must lower the estimate.
        lazy: leave out tasks by their bounds.
    """

    min_tasks: int = 1
    min_improvement: float = 0.0
    lazy: bool = False

    def __post_init__(self) -> None:
        require_count("min_tasks", self.min_tasks, 1)
        if not is_number(self.min_improvement, finite=False):
            raise ValueError(
                "min_improvement must be a number of nats per label token, got "
                f"{self.min_improvement!r}."
            )

    def select(self, problem: SelectionProblem) -> Selection:
        search = SubsetSearch(problem)
        mask = np.ones(len(problem.task_names), bool)
        loss = float(search.try_masks(mask[None])[0])
        while mask.sum() > self.min_tasks and (mask & ~search.kept).any():
            goal = loss - self.min_improvement
            fewer, lower = search.best_change(
                mask, loss, np.flatnonzero(mask & ~search.kept), goal=goal, lazy=self.lazy
            )
            if not lower < goal:
                break
            mask, loss = fewer, lower
            search.accept(mask)
        return search.selection(mask)
