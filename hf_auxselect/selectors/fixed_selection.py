"""A given subset or mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hf_auxselect.selectors.base import (
    AbstractSelector,
    Selection,
    SelectionProblem,
    normalized_weights,
    require_known,
)


@dataclass(frozen=True)
class FixedSelection(AbstractSelector):
    """Returns a given subset or mixture, for checks and ablations.

    Args:
        tasks: names (a subset, in which each task has a weight proportional to its number of rows),
            or a mapping from names to weights, which are scaled to sum to 1.
        estimate: whether the mixture's loss is estimated. False spares a training run the gradient
            pass.
    """

    tasks: tuple[str, ...] | Mapping[str, float]
    estimate: bool = True

    def __init__(
        self, tasks: Iterable[str] | Mapping[str, float], *, estimate: bool = True
    ) -> None:
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be several names or a mapping, got the string {tasks!r}.")
        given = dict(tasks) if isinstance(tasks, Mapping) else tuple(tasks)
        if not given:
            raise ValueError("tasks is empty; give at least one task.")
        object.__setattr__(self, "tasks", given)
        object.__setattr__(self, "estimate", estimate)

    def select(self, problem: SelectionProblem) -> Selection:
        names = problem.task_names
        require_known(self.tasks, names, "FixedSelection")
        left_out = sorted(set(problem.keep) - set(self.tasks))
        if left_out:
            raise ValueError(f"FixedSelection leaves out {left_out}, which keep asks for.")
        if isinstance(self.tasks, Mapping):
            weights = np.array([[float(self.tasks.get(name, 0.0)) for name in names]])
        else:
            weights = np.array([[name in self.tasks for name in names]])
        estimate = problem.estimate(weights) if self.estimate else None
        return Selection(weights=normalized_weights(weights, estimate, problem), estimate=estimate)
