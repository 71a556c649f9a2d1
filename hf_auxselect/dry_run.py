"""A choice without estimates before training, so that what cannot work costs nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators import Estimate
from hf_auxselect.options import Options
from hf_auxselect.selectors import SelectionProblem
from hf_auxselect.tasks import TaskRows


def dry_run(options: Options, tasks: TaskRows) -> None:
    """Let the selector choose among its tasks, so that options that do not fit raise now.

    There are no estimates or gradients yet: all are 0.

    Args:
        options: the callback's.
        tasks: what the selector will choose among.

    Raises:
        ValueError: an option of the selector does not fit the tasks.
    """
    num_tasks, groups = len(tasks.names), options.groups

    def nothing(weights: ArrayLike) -> Estimate:
        zeros = np.zeros(len(np.asarray(weights)))
        of_groups = np.zeros((len(zeros), len(groups))) if groups else None
        return Estimate(loss=zeros, low=zeros, high=zeros, group_losses=of_groups)

    options.selector.select(
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
