"""A choice without estimates before training, so that what cannot work costs nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators import Estimate
from hf_auxselect.options import Options
from hf_auxselect.sampler import MIN_SHARE
from hf_auxselect.selectors import AbstractSelector, FixedSelection, SelectionProblem
from hf_auxselect.tasks import TaskRows

_ROUNDING = 1e-9
"""By which share of itself a weight may differ from another one that is meant to be the same."""


def dry_run(options: Options, tasks: TaskRows) -> None:
    """Let the selector choose among its tasks, so that options that do not fit raise now.

    There are no estimates or gradients yet: all are 0.

    Args:
        options: the callback's.
        tasks: what the selector will choose among.

    Raises:
        ValueError: an option of the selector does not fit the tasks, or a share of its mixture is
            too small to be drawn.
    """
    num_tasks, groups = len(tasks.names), options.groups

    def nothing(weights: ArrayLike) -> Estimate:
        zeros = np.zeros(len(np.asarray(weights)))
        of_groups = np.zeros((len(zeros), len(groups))) if groups else None
        return Estimate(loss=zeros, low=zeros, high=zeros, group_losses=of_groups)

    selection = options.selector.select(
        SelectionProblem(
            nothing,
            tasks.names,
            tasks.counts.tolist(),
            keep=options.keep,
            groups=groups,
            gram=np.zeros((num_tasks, num_tasks)),
            rows_to_read=len(tasks.ids),
        )
    )
    if options.after != "observe":
        _require_drawable(options.selector, selection.weights, tasks)


def _require_drawable(
    selector: AbstractSelector, weights: Mapping[str, float], tasks: TaskRows
) -> None:
    """Raise ValueError for a share that the sampler would refuse after the gradient pass.

    Selectors that follow estimates may drop a tiny task later. Theirs is wrong only where it is
    also below the task's share of all rows, which no subset weighted by size has.
    """
    for name, count in zip(tasks.names, tasks.counts.tolist(), strict=True):
        weight, by_size = weights.get(name, 0.0), count / len(tasks.ids)
        is_final = isinstance(selector, FixedSelection) or weight < by_size * (1 - _ROUNDING)
        if 0 < weight < MIN_SHARE and is_final:
            raise ValueError(
                f"{type(selector).__name__} gives the task {name!r} a share of {weight:.3g}, but "
                f"a mixture cannot hold less than {MIN_SHARE:g} of a task; give it more, or leave "
                "it out."
            )
