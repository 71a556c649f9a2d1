"""A decision: the selector chooses a mixture, and a report says what and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_auxselect.estimators import AbstractEstimator, FittedEstimator
from hf_auxselect.plan import Plan
from hf_auxselect.report import SelectionReport, strategy_record
from hf_auxselect.report.content import Interval, RunRecord
from hf_auxselect.reselection import averaged
from hf_auxselect.selectors import (
    AbstractSelector,
    Selection,
    SelectionProblem,
    Step,
    selection_problem,
)
from hf_auxselect.store.arrays import GradientStore


def choose(
    fitted: FittedEstimator | None,
    *,
    plan: Plan,
    store: GradientStore | None,
    selector: AbstractSelector,
    keep: Sequence[str],
    rows_to_read: int,
) -> Selection:
    """Choose a mixture.

    Args:
        fitted: the estimator, fitted and calibrated; None: nothing is estimated, which only a fixed
            selection can do without.
        plan: of the run.
        store: the gradients that ``fitted`` was fitted to.
        selector: chooses the mixture.
        keep: tasks that must be selected.
        rows_to_read: number of training rows that the remaining steps read.
    """
    if fitted is None or store is None:
        problem = SelectionProblem(
            _no_estimate,
            plan.tasks.names,
            plan.tasks.counts.tolist(),
            keep=keep,
            rows_to_read=rows_to_read,
        )
    else:
        problem = selection_problem(fitted, store, keep=keep, rows_to_read=rows_to_read)
    return selector.select(problem)


def average_with_earlier(
    earlier: Mapping[str, float],
    selection: Selection,
    fitted: FittedEstimator,
    *,
    memory: float,
    rows_to_read: int,
) -> Selection:
    """A new choice, averaged with the mixture of an earlier decision.

    Args:
        earlier: that mixture.
        selection: the new choice.
        fitted: the estimator that it was made with.
        memory: share of the earlier mixture.
        rows_to_read: number of training rows that the remaining steps read.
    """
    weights = averaged(selection.weights, earlier, memory=memory, rows_to_read=rows_to_read)
    alone, together = (
        fitted.estimate(np.array([[*mixture.values()]])) for mixture in (selection.weights, weights)
    )
    tried = Step(  # so that it may be a finalist
        tasks=tuple(selection.selected),
        loss=float(alone.loss[0]),
        low=float(alone.low[0]),
        high=float(alone.high[0]),
        accepted=False,
        weights={name: weight for name, weight in selection.weights.items() if weight > 0},
    )
    return replace(
        selection, weights=weights, estimate=together, history=(*selection.history, tried)
    )


def report_on(
    selection: Selection,
    fitted: FittedEstimator | None,
    *,
    plan: Plan,
    store: GradientStore | None,
    estimator: AbstractEstimator,
    selector: AbstractSelector,
    run: RunRecord,
    rows_to_read: int,
    notes: Sequence[str],
) -> SelectionReport:
    """Report on a choice.

    Args:
        selection: what was chosen.
        fitted: the estimator that the choice was made with, or None.
        plan: of the run.
        store: the gradients that ``fitted`` was fitted to.
        estimator: as the user gave it.
        selector: as the user gave it.
        run: what the report tells of the run.
        rows_to_read: number of training rows that the remaining steps read.
        notes: sentences on what the estimates do not model.
    """
    report = SelectionReport(
        weights=selection.weights,
        scores=selection.scores,
        score_intervals={
            name: Interval(low=low, high=high)
            for name, (low, high) in selection.score_intervals.items()
        },
        history=list(selection.history),
        shadow_prices=selection.shadow_prices,
        estimator=strategy_record(estimator),
        selector=strategy_record(selector),
        run={**run, **plan.amounts(selection.weights, rows_to_read)},
    )
    if fitted is not None and store is not None:
        report.add_estimates(fitted, selection, store, seed=plan.seed)
        report.warnings += [*selection.notes, *notes, *plan.target_sample_note()]
    return report


def _no_estimate(weights: Any) -> Any:
    raise AssertionError("FixedSelection(estimate=False) asked for an estimate")
