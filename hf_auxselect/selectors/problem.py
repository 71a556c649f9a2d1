"""What a selector sees of a fitted estimator and of the gradients that it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence

from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.selectors.base import SelectionProblem
from hf_auxselect.store.arrays import GradientStore


def selection_problem(
    fitted: FittedEstimator,
    store: GradientStore,
    *,
    keep: Sequence[str] = (),
    rows_to_read: int | None = None,
) -> SelectionProblem:
    """The problem of choosing among the tasks of a store by the estimates of ``fitted``.

    Args:
        fitted: an estimator, fitted to ``store``; it may be calibrated.
        store: the captured gradients.
        keep: names of tasks that must be selected.
        rows_to_read: number of training rows that the remaining steps read; None: not known.

    Raises:
        ValueError: ``keep`` names an unknown task.
    """
    means_KD = store.mean_gradients()
    return SelectionProblem(
        fitted.estimate,
        store.task_names,
        store.task_sizes.tolist(),
        difference=fitted.difference,
        gradient=fitted.gradient if fitted.has_gradient else None,
        group_gradients=fitted.group_gradients if fitted.has_gradient else None,
        keep=keep,
        groups=[*store.groups],
        gram=means_KD @ means_KD.T,
        rows_to_read=rows_to_read,
    )
