"""The report and its page: size and time by the number of tasks.

On random gradients, 512 numbers each: 100 examples of each task, or 20 where there are more than
100 tasks. The estimator is the default without probes.

    python -m benchmarks.cost.report_page [--tasks 11,38,1729]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.cost.synthetic_store import synthetic_store
from hf_auxselect import FixedSelection, LinearizedTraining, SelectionReport
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import SelectionProblem

MANY = 100
NUM_SELECTED = 8


def measure(num_tasks: int) -> dict[str, Any]:
    """Seconds of a report's parts, and bytes of its files, with so many tasks."""
    store = synthetic_store(0, num_tasks=num_tasks, num_per_task=20 if num_tasks > MANY else 100)
    fitted = LinearizedTraining(probes=False).fit(store)
    chosen = FixedSelection(store.task_names[:NUM_SELECTED])
    selection = chosen.select(
        SelectionProblem(fitted.estimate, store.task_names, store.task_sizes.tolist())
    )
    report = SelectionReport(weights=selection.weights, run={"after": "continue"})
    start = time.perf_counter()
    report.add_estimates(fitted, selection, store, seed=0)
    numbers = time.perf_counter()
    page = report.to_html()
    rendered = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        report.save(directory)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(directory).iterdir())}
    assert report.what_if is not None
    spread = float(np.std([row.loss for row in report.rows]))
    return {
        "tasks": num_tasks,
        "seconds_of_numbers": numbers - start,
        "seconds_of_page": rendered - numbers,
        "page_kb": len(page.encode()) / 1000,
        "file_kb": {name: size / 1000 for name, size in sizes.items()},
        "what_if_error_nats": report.what_if.error,
        "spread_of_rows_nats": spread,
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="11,38,1729", metavar="a,b")
    options = parser.parse_args()
    lines = [measure(int(number)) for number in options.tasks.split(",")]
    print("tasks   page kB   page s   numbers s   error of what-if / nats")
    for line in lines:
        print(
            f"{line['tasks']:5} {line['page_kb']:9.0f} {line['seconds_of_page']:8.2f} "
            f"{line['seconds_of_numbers']:11.1f}   {line['what_if_error_nats']:.4f}"
        )
    record = {"command": "python -m benchmarks.cost.report_page", "lines": lines}
    write_atomically(RESULTS / "report_page.json", to_json(record))


if __name__ == "__main__":
    main()
