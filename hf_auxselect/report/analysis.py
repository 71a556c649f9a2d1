"""From estimates, gradients and strategies to the plain records of a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_auxselect.estimators import (
    ESTIMATORS,
    AbstractEstimator,
    Estimate,
    FittedCalibrated,
    FittedEstimator,
)
from hf_auxselect.estimators.registry import RENAMED_OPTIONS
from hf_auxselect.files import JsonDict
from hf_auxselect.report.content import NUM_RANDOM_SUBSETS, Measurement, Row, TaskSummary
from hf_auxselect.selectors import RandomEnsemble, Selection
from hf_auxselect.store.arrays import GradientStore


def compare(
    fitted: FittedEstimator, selection: Selection, task_names: Sequence[str], *, seed: int
) -> list[Row]:
    """Estimate the losses that a reader compares the choice with; see ``ReportFields.rows``."""
    num_tasks = len(task_names)
    chosen = np.array([[selection.weights[name] for name in task_names]])
    subset_size = len(selection.selected)
    random = RandomEnsemble(
        num_subsets=NUM_RANDOM_SUBSETS, subset_size=subset_size, seed=seed
    ).subsets(num_tasks)
    everything = np.ones((1, num_tasks), bool)
    left_out = everything & ~np.eye(num_tasks, dtype=bool)

    def rows(names: Sequence[str], weights: np.ndarray) -> list[Row]:
        return _rows(names, fitted.estimate(weights))

    losses = fitted.estimate(random).loss
    low, high = np.quantile(losses, [0.05, 0.95])
    lines = rows(["no further training"], np.zeros((1, num_tasks)))
    lines += rows(["chosen"], chosen) + rows(["all tasks"], everything)
    lines.append(
        Row(
            name=f"random {subset_size} of {num_tasks} tasks",
            loss=float(losses.mean()),
            low=float(low),
            high=float(high),
        )
    )
    without = rows([f"all without {name}" for name in task_names], left_out)
    return lines + [
        dataclasses.replace(row, left_out=name)
        for row, name in zip(without, task_names, strict=True)
    ]


def compare_with_all_tasks(
    fitted: FittedEstimator, selection: Selection, task_names: Sequence[str]
) -> Row:
    """The chosen mixture's loss minus that of all tasks."""
    chosen = np.array([[selection.weights[name] for name in task_names]])
    difference = fitted.difference(chosen, np.ones(len(task_names), bool))
    return _rows(["chosen minus all tasks"], difference)[0]


def _rows(names: Sequence[str], estimate: Estimate) -> list[Row]:
    return [
        Row(name=name, loss=float(loss), low=float(low), high=float(high))
        for name, loss, low, high in zip(
            names, estimate.loss, estimate.low, estimate.high, strict=True
        )
    ]


def summarize_tasks(store: GradientStore) -> list[TaskSummary]:
    """What a store holds of each of its tasks."""
    counts = np.bincount(store.task_ids, minlength=len(store.task_names))
    tokens = np.bincount(store.task_ids, store.num_label_tokens, minlength=len(store.task_names))
    return [
        TaskSummary(
            name=name,
            rows=int(store.task_sizes[k]),
            captured=int(counts[k]),
            label_tokens=int(tokens[k]),
            loss=float(store.task_losses[k]),
        )
        for k, name in enumerate(store.task_names)
    ]


def calibrated(fitted: FittedEstimator, runs: Sequence[Measurement]) -> FittedEstimator:
    """The estimator calibrated by ground-truth runs, if there are any."""
    if not runs:
        return fitted
    weights = np.array([[*run.weights.values()] for run in runs])
    return FittedCalibrated(fitted, weights, [run.measured for run in runs])


def strategy_record(strategy: Any) -> JsonDict:
    """Name and options of an estimator or selector, as JSON values.

    An option that is an estimator itself becomes a record of the same form.
    """
    options = (
        {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)}
        if dataclasses.is_dataclass(strategy)
        else {}
    )
    return {"name": type(strategy).__name__} | json.loads(
        json.dumps(
            options,
            default=lambda value: (
                strategy_record(value) if isinstance(value, AbstractEstimator) else repr(value)
            ),
        )
    )


def estimator_from(record: JsonDict) -> Any:
    """The estimator that :func:`strategy_record` described.

    Raises:
        ValueError: it, an estimator among its options, or an option is not one of this version.
    """
    options = {
        RENAMED_OPTIONS.get(option, option): (
            estimator_from(value) if isinstance(value, dict) else value
        )
        for option, value in record.items()
    }
    name = options.pop("name", None)
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; known are {sorted(ESTIMATORS)}.")
    try:
        return ESTIMATORS[name](**options)
    except TypeError as error:
        raise ValueError(
            f"the estimator {name} has other options in this version ({error})."
        ) from None
