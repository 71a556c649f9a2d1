"""Backward elimination: drop the task whose absence lowers the estimated loss most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.selectors.base import AbstractSelector, Selection, SelectionProblem
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class BackwardElimination(AbstractSelector):
    """Starts from all tasks and drops the one whose absence lowers the estimated loss most.

    Choose it where few of many tasks do harm. It stops when no absence lowers the loss, or when
    ``min_tasks`` (or only ``keep``) are left.

    Cost: at most K (K + 1) / 2 estimates.

    Args:
        min_tasks: smallest number of selected tasks.
        min_improvement: nats per label token by which dropping a task must lower the estimate.
    """

    min_tasks: int = 1
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if self.min_tasks < 1:
            raise ValueError(f"min_tasks must be at least 1, got {self.min_tasks}.")

    def select(self, problem: SelectionProblem) -> Selection:
        search = SubsetSearch(problem)
        mask = np.ones(len(problem.task_names), bool)
        best = search.try_masks(mask[None])[0]
        while mask.sum() > self.min_tasks and (mask & ~search.kept).any():
            candidates = np.flatnonzero(mask & ~search.kept)
            masks = np.repeat(mask[None], len(candidates), 0)
            masks[np.arange(len(candidates)), candidates] = False
            losses = search.try_masks(masks)
            first = int(np.argmin(losses))
            if not losses[first] < best - self.min_improvement:
                break
            mask, best = masks[first], losses[first]
            search.accept(mask)
        return search.selection(mask)
