"""Seconds and estimates of searches over 38 and over 1,729 tasks, with the default estimator.

The stores are synthetic: 38 tasks with 100 examples each, and 1,729 tasks (as many as a collection
of instruction data has) with 20 each; 512 numbers per gradient, 256 target examples. A forward
selection of 1,729 tasks adds 20 tasks, whether it helps or not.

    python -m benchmarks.cost.search_time [--tasks 38,1729]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.cost.synthetic_store import synthetic_store
from hf_auxselect import (
    BackwardElimination,
    BeamSearch,
    ForwardSelection,
    LinearizedTraining,
    RandomEnsemble,
    SelectionProblem,
)
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import AbstractSelector, selection_problem
from hf_auxselect.selectors.base import LossEstimate

ALWAYS = -1e9
"""An improvement that every task has, so that searches of many tasks do the same work."""
SEARCHES: dict[int, tuple[int, list[AbstractSelector]]] = {
    38: (
        100,
        [
            ForwardSelection(),
            BackwardElimination(),
            BeamSearch(),
            RandomEnsemble(),
            RandomEnsemble(num_subsets=None),
        ],
    ),
    1729: (
        20,
        [
            ForwardSelection(max_tasks=20, min_improvement=ALWAYS),
        ],
    ),
}
"""Number of tasks -> captured examples of each, and searches."""


def measure(num_tasks: int) -> list[dict[str, Any]]:
    """One line for each search."""
    num_per_task, searches = SEARCHES[num_tasks]
    store = synthetic_store(0, num_tasks=num_tasks, num_per_task=num_per_task)
    problem = selection_problem(LinearizedTraining().fit(store), store)
    asked = {"estimates": 0, "gradients": 0}

    def estimate(weights: np.ndarray) -> LossEstimate:
        asked["estimates"] += len(weights)
        return problem.estimate(weights)

    def gradient(weights: np.ndarray) -> np.ndarray:
        assert problem.gradient is not None
        asked["gradients"] += len(weights)
        return problem.gradient(weights)

    counted = SelectionProblem(
        estimate,
        problem.task_names,
        problem.task_sizes,
        gradient=None if problem.gradient is None else gradient,
    )
    problem.estimate(np.eye(num_tasks, dtype=bool)[:1])  # warms up
    lines = []
    for search in searches:
        asked |= {"estimates": 0, "gradients": 0}
        start = time.perf_counter()
        selection = search.select(counted)
        seconds = time.perf_counter() - start
        assert selection.estimate is not None
        lines.append(
            {
                "tasks": num_tasks,
                "search": repr(search),
                "seconds": round(seconds, 2),
                **asked,
                "selected": len(selection.selected),
                "estimated_loss": float(selection.estimate.loss[0]),
            }
        )
        print(
            f"{num_tasks:5} {seconds:8.2f} s  {asked['estimates']:6} estimates  "
            f"{asked['gradients']:4} gradients  {lines[-1]['selected']:3} tasks  "
            f"{lines[-1]['estimated_loss']:.4f} nats  {search!r}",
            flush=True,
        )
    return lines


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="38,1729", metavar="a,b")
    options = parser.parse_args()
    lines = [line for num in options.tasks.split(",") for line in measure(int(num))]
    record = {
        "command": f"python -m benchmarks.cost.search_time --tasks {options.tasks}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "lines": lines,
    }
    write_atomically(RESULTS / "search_time.json", to_json(record))


if __name__ == "__main__":
    main()
