"""From estimates, gradients and strategies to the plain records of a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_auxselect.estimators import (
    ESTIMATORS,
    AbstractEstimator,
    Estimate,
    FittedCalibrated,
    FittedEstimator,
)
from hf_auxselect.estimators.base import unit_vectors
from hf_auxselect.estimators.registry import RENAMED_OPTIONS
from hf_auxselect.files import JsonDict
from hf_auxselect.report.content import (
    NUM_RANDOM_SUBSETS,
    Measurement,
    Row,
    Similarity,
    TaskSummary,
)
from hf_auxselect.selectors import Selection, random_alternatives
from hf_auxselect.store.arrays import GradientStore


def compare(
    fitted: FittedEstimator,
    selection: Selection,
    store: GradientStore,
    shown: Sequence[int],
    *,
    seed: int,
) -> list[Row]:
    """Estimate the losses that a reader compares the choice with; see ``ReportFields.rows``.

    Of the tasks ``shown``, those dropped are added to the chosen mixture.
    """
    task_names = store.task_names
    num_tasks = len(task_names)
    chosen = np.array([[selection.weights[name] for name in task_names]])
    random, are_subsets = random_alternatives(
        chosen[0], np.asarray(store.task_sizes), NUM_RANDOM_SUBSETS, seed
    )
    of_subsets = f"random {len(selection.selected)} of {num_tasks} tasks"
    everything = np.ones((1, num_tasks), bool)
    left_out = everything & ~np.eye(num_tasks, dtype=bool)

    groups = [*store.groups]

    def rows(names: Sequence[str], weights: np.ndarray) -> list[Row]:
        return _rows(names, fitted.estimate(weights), groups)

    of_random = fitted.estimate(random)
    losses = of_random.loss
    low, high = np.quantile(losses, [0.05, 0.95])
    lines = rows(["no further training"], np.zeros((1, num_tasks)))
    lines += rows(["chosen"], chosen) + rows(["all tasks"], everything)
    lines.append(
        Row(
            name=of_subsets if are_subsets else "chosen weights in random order",
            loss=float(losses.mean()),
            low=float(low),
            high=float(high),
            group_losses=_by_group(groups, of_random.group_losses, slice(None)),
        )
    )
    own = store.target.task_names[0]
    if own in task_names:
        lines += rows([f"only {own}"], np.array([[name == own for name in task_names]]))
    without = rows([f"all without {name}" for name in task_names], left_out)
    lines += [
        dataclasses.replace(row, left_out=name)
        for row, name in zip(without, task_names, strict=True)
    ]
    dropped = [task_names[k] for k in shown if selection.weights[task_names[k]] == 0]
    if dropped:
        added = rows(
            [f"chosen and {name}" for name in dropped],
            np.array([_with_task(chosen[0], store, name) for name in dropped]),
        )
        lines += [
            dataclasses.replace(row, added=name) for row, name in zip(added, dropped, strict=True)
        ]
    return lines


def _with_task(weights_K: np.ndarray, store: GradientStore, name: str) -> np.ndarray:
    """A mixture with one more task, whose share is that of its rows among those of all its tasks.

    For a subset, in which shares are those of rows, this is the subset with the task.
    """
    k = store.task_names.index(name)
    sizes_K = np.asarray(store.task_sizes, float)
    share = sizes_K[k] / (sizes_K[k] + sizes_K[weights_K > 0].sum())
    result_K = weights_K / weights_K.sum() * (1 - share)
    result_K[k] = share
    return result_K


def compare_with_all_tasks(
    fitted: FittedEstimator, selection: Selection, store: GradientStore
) -> Row:
    """The chosen mixture's loss minus that of all tasks."""
    chosen = np.array([[selection.weights[name] for name in store.task_names]])
    difference = fitted.difference(chosen, np.ones(len(store.task_names), bool))
    return _rows(["chosen minus all tasks"], difference, [*store.groups])[0]


def _rows(names: Sequence[str], estimate: Estimate, groups: Sequence[str]) -> list[Row]:
    return [
        Row(
            name=name,
            loss=float(loss),
            low=float(low),
            high=float(high),
            group_losses=_by_group(groups, estimate.group_losses, slice(i, i + 1)),
        )
        for i, (name, loss, low, high) in enumerate(
            zip(names, estimate.loss, estimate.low, estimate.high, strict=True)
        )
    ]


def _by_group(
    groups: Sequence[str], losses_MG: np.ndarray | None, which: slice
) -> dict[str, float]:
    """Mean loss of each group over some mixtures; nothing if there are no losses of groups."""
    if losses_MG is None:
        return {}
    return dict(zip(groups, losses_MG[which].mean(0).tolist(), strict=True))


def summarize_tasks(
    store: GradientStore, losses_after: np.ndarray | None = None
) -> list[TaskSummary]:
    """What a store holds of each of its tasks; with their estimated losses [K] if there are any."""
    counts = np.bincount(store.task_ids, minlength=len(store.task_names))
    tokens = np.bincount(store.task_ids, store.num_label_tokens, minlength=len(store.task_names))
    return [
        TaskSummary(
            name=name,
            rows=int(store.task_sizes[k]),
            captured=int(counts[k]),
            label_tokens=int(tokens[k]),
            loss=float(store.task_losses[k]),
            loss_after=None if losses_after is None else float(losses_after[k]),
        )
        for k, name in enumerate(store.task_names)
    ]


def gradient_directions(store: GradientStore) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradients of the tasks [K, D] and of the target [D], divided by their lengths."""
    own_KD, target_1D = store.mean_gradients(), store.target.mean_gradients()
    return unit_vectors(own_KD), unit_vectors(target_1D)[0]


def similarity(
    task_names: Sequence[str], directions_KD: np.ndarray, target_D: np.ndarray, shown: Sequence[int]
) -> Similarity:
    """Cosines between the mean gradients of some tasks, and of each with the target."""
    means_KD = directions_KD[list(shown)]
    order = clustered(means_KD @ means_KD.T)
    means_KD = means_KD[order]
    return Similarity(
        tasks=[task_names[shown[k]] for k in order],
        cosines=np.round(means_KD @ means_KD.T, 4).tolist(),
        target=np.round(means_KD @ target_D, 4).tolist(),
    )


def clustered(cosines_KK: np.ndarray) -> list[int]:
    """The leaves of an average-linkage clustering by cosine, from left to right."""
    clusters = [[k] for k in range(len(cosines_KK))]
    means_CC = np.array(cosines_KK, float)  # mean cosine between the members of two clusters
    np.fill_diagonal(means_CC, -np.inf)
    while len(clusters) > 1:
        i, j = sorted(int(c) for c in np.unravel_index(np.argmax(means_CC), means_CC.shape))
        sizes = np.array([len(clusters[i]), len(clusters[j])])
        means_CC[i] = means_CC[:, i] = sizes @ means_CC[[i, j]] / sizes.sum()
        means_CC[i, i] = -np.inf
        means_CC = np.delete(np.delete(means_CC, j, 0), j, 1)
        clusters[i] += clusters.pop(j)
    return clusters[0]


def most_relevant(
    weights: Mapping[str, float], directions_KD: np.ndarray, target_D: np.ndarray, at_most: int
) -> list[int]:
    """The tasks that a page shows in detail: all, or the chosen ones and those nearest the target.

    Nearest by the cosine of mean gradients, of either sign.
    """
    if len(weights) <= at_most:
        return list(range(len(weights)))
    cosines_K = np.abs(directions_KD @ target_D)
    is_chosen_K = np.array([*weights.values()]) > 0
    order = np.lexsort((-cosines_K, ~is_chosen_K))[:at_most]
    return sorted(order.tolist())


def calibrated(fitted: FittedEstimator, runs: Sequence[Measurement]) -> FittedEstimator:
    """The estimator calibrated by ground-truth runs, if there are any."""
    if not runs:
        return fitted
    weights = np.array([[*run.weights.values()] for run in runs])
    return FittedCalibrated(fitted, weights, [run.measured for run in runs])


def strategy_record(strategy: Any) -> JsonDict:
    """Name and options of an estimator or selector, as JSON values.

    An option that is an estimator itself becomes a record of the same form. JSON has no infinity,
    which becomes the text "Infinity" or "-Infinity".
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
        ),
        parse_constant=str,
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
