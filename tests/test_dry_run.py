"""A choice without estimates before training."""

import numpy as np
import pytest
from tiny import callback

from hf_auxselect import AbstractSelector, BackwardElimination, FixedSelection
from hf_auxselect.dry_run import dry_run
from hf_auxselect.selectors import Selection
from hf_auxselect.tasks import TaskRows

TASKS = TaskRows(("a", "b"), np.repeat([0, 1], [30, 10]))


class Own(AbstractSelector):
    def select(self, problem):
        return Selection(weights={"a": 1 - 1e-7, "b": 1e-7})


def refuse_or_run(selector, tasks=TASKS, **options):
    dry_run(callback(selector=selector, **options)._options(), tasks)


@pytest.mark.parametrize("selector", [FixedSelection({"a": 1, "b": 1e-7}), Own()])
def test_a_share_that_cannot_be_drawn_is_refused(selector):
    name = type(selector).__name__
    with pytest.raises(ValueError, match=f"{name} gives the task 'b' a share of 1e-07, .*1e-06"):
        refuse_or_run(selector, after="continue")
    refuse_or_run(selector, after="observe")  # nothing is drawn


def test_a_tiny_task_may_still_be_dropped_by_the_estimates():
    tasks = TaskRows(("a", "b"), np.repeat([0, 1], [2_000_000, 1]))
    refuse_or_run(BackwardElimination(), tasks)
    with pytest.raises(ValueError, match="FixedSelection gives the task 'b' a share of 5e-07"):
        refuse_or_run(FixedSelection(["a", "b"]), tasks)
