"""Forward selection: add the task that lowers the estimated loss most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import is_number, require_count
from hf_auxselect.selectors.base import AbstractSelector, Selection, SelectionProblem, require_room
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class ForwardSelection(AbstractSelector):
    """Adds the task that lowers the estimated loss most, until none lowers it.

    Choose it where few of many tasks help and whole tasks are wanted. It starts from ``keep``, or
    else from no task. Each step tries all remaining tasks and takes the best one, unlike the single
    pass in index order of the authors' code. At least one task is always selected. A task that
    helps only together with another one is missed; see ``BeamSearch``.

    Cost: at most K (K + 1) / 2 estimates, those of a step in one call.

    With ``lazy=True`` a step tries the tasks in the order of lower bounds, which one gradient gives
    for all of them, and leaves out those that their bounds rule out. Of a loss that is convex in
    the weights, the result is the same. Of other losses it need not be: that of
    ``LinearizedTraining`` is not convex, and bounds are lowered by what the search sees of this.
    In both cases it ends only where no task lowers the estimate. Choose it where the full search
    takes too long. Without a gradient all tasks are tried.

    The history has every try, or with more than 64 tasks the ten best of each step.

    Args:
        max_tasks: largest number of selected tasks; None: no limit.
        min_improvement: nats per label token by which a task must lower the estimate to be added.
        lazy: leave out tasks by their bounds.
    """

    max_tasks: int | None = None
    min_improvement: float = 0.0
    lazy: bool = False

    def __post_init__(self) -> None:
        require_count("max_tasks", self.max_tasks, 1, optional=True)
        if not is_number(self.min_improvement, finite=False):
            raise ValueError(
                "min_improvement must be a number of nats per label token, got "
                f"{self.min_improvement!r}."
            )

    def select(self, problem: SelectionProblem) -> Selection:
        limit = len(problem.task_names) if self.max_tasks is None else self.max_tasks
        require_room("max_tasks", limit, problem)
        search = SubsetSearch(problem)
        mask = search.kept.copy()
        loss = float(search.try_masks(mask[None])[0]) if mask.any() else np.inf
        while mask.sum() < limit and not mask.all():
            goal = loss - (self.min_improvement if mask.any() else 0.0)
            more, lower = search.best_change(
                mask, loss, np.flatnonzero(~mask), goal=goal, lazy=self.lazy
            )
            if not lower < goal:
                break
            mask, loss = more, lower
            search.accept(mask)
        return search.selection(mask)
