"""Forward selection: add the task that lowers the estimated loss most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.selectors.base import AbstractSelector, Selection, SelectionProblem
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class ForwardSelection(AbstractSelector):
    """Adds the task that lowers the estimated loss most, until none lowers it.

    The default, and the choice where few of many tasks help. It starts from ``keep``, or else from
    no task. Each step tries all remaining tasks and takes the best one, unlike the single pass in
    index order of the authors' code. At least one task is always selected. A task that helps only
    together with another one is missed.

    Cost: at most K (K + 1) / 2 estimates.

    Args:
        max_tasks: largest number of selected tasks; None: no limit.
        min_improvement: nats per label token by which a task must lower the estimate to be added.
    """

    max_tasks: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, got {self.max_tasks}.")

    def select(self, problem: SelectionProblem) -> Selection:
        search = SubsetSearch(problem)
        mask = search.kept.copy()
        best = search.try_masks(mask[None])[0] if mask.any() else np.inf
        limit = len(problem.task_names) if self.max_tasks is None else self.max_tasks
        while mask.sum() < limit and not mask.all():
            candidates = np.flatnonzero(~mask)
            masks = np.repeat(mask[None], len(candidates), 0)
            masks[np.arange(len(candidates)), candidates] = True
            losses = search.try_masks(masks)
            first = int(np.argmin(losses))
            if not losses[first] < best - (self.min_improvement if mask.any() else 0.0):
                break
            mask, best = masks[first], losses[first]
            search.accept(mask)
        return search.selection(mask)
