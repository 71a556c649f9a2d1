"""A given subset or mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from hf_auxselect.files import read_json
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Selection,
    SelectionProblem,
    normalized_weights,
    require_known,
)


class _DecisionFile(TypedDict):
    """What is read of a decision; other keys are left alone."""

    weights: dict[str, float]


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

    @classmethod
    def from_file(cls, path: str | Path, *, estimate: bool = True) -> FixedSelection:
        """Follow a decision: a file of ``hf-auxselect select``, or a run's ``selection.json``.

        Args:
            path: JSON with ``weights``, task -> weight; what else it holds is left alone. The run
                that follows it must have the tasks with positive weights, and may have others.
            estimate: whether the mixture's loss is estimated.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or no decision; names it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no decision file {str(path)!r}.")
        weights = read_json(path, _DecisionFile)["weights"]
        wrong = [name for name, weight in weights.items() if weight < 0]
        if wrong:
            raise ValueError(f"{path}: the weight of {wrong[0]!r} is negative.")
        chosen = {name: weight for name, weight in weights.items() if weight > 0}
        if not chosen:
            raise ValueError(f"{path}: no task has a positive weight.")
        return cls(chosen, estimate=estimate)

    def select(self, problem: SelectionProblem) -> Selection:
        names = problem.task_names
        require_known(self.tasks, names, "FixedSelection")
        if isinstance(self.tasks, Mapping):
            chosen = {name for name, weight in self.tasks.items() if weight > 0}
        else:
            chosen = set(self.tasks)
        left_out = sorted(set(problem.keep) - chosen)
        if left_out:
            raise ValueError(f"FixedSelection leaves out {left_out}, which keep asks for.")
        if isinstance(self.tasks, Mapping):
            weights = np.array([[float(self.tasks.get(name, 0.0)) for name in names]])
        else:
            weights = np.array([[name in self.tasks for name in names]])
        estimate = problem.estimate(weights) if self.estimate else None
        return Selection(weights=normalized_weights(weights, estimate, problem), estimate=estimate)
