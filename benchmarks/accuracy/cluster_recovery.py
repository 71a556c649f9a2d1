"""Clusters by gradient of a run's examples: do they find the tasks that the run knows?

From the stored gradients of a run, by default that of ``make demo``. The examples of all tasks are
clustered without their names. Agreement is the adjusted Rand index, 1 if clusters and tasks are the
same and 0 on average if they have nothing to do with each other; purity is the share of examples
that are of the most frequent task of their cluster.

    python -m benchmarks.accuracy.cluster_recovery [--run outputs/demo/selected/_task_selection]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS
from hf_auxselect import GradientStore
from hf_auxselect.clusters import cluster_gradients
from hf_auxselect.files import to_json, write_atomically

MULTIPLES = (1, 2, 4)
"""Numbers of clusters, as multiples of the number of tasks."""


def adjusted_rand(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """Agreement of two partitions of N examples."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = np.zeros((one_N.max() + 1, other_N.max() + 1))
    np.add.at(table, (one_N, other_N), 1)
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(np.array([len(one_N)]))
    return (both - chance) / ((rows + columns) / 2 - chance)


def measure(store: GradientStore) -> list[dict[str, Any]]:
    """Agreement of clusters and tasks for each captured gradient and number of clusters."""
    lines = []
    for scalar in ("loss", "loss@optimizer"):
        if scalar not in store.scalars:
            continue
        for multiple in MULTIPLES:
            number = multiple * len(store.task_names)
            start = time.perf_counter()
            labels_N = cluster_gradients(store.scalar(scalar)[1], number)
            seconds = time.perf_counter() - start
            clusters = (store.task_ids[labels_N == c] for c in range(number))
            largest = sum(int(np.bincount(tasks_M).max()) for tasks_M in clusters)
            lines.append(
                {
                    "gradient": scalar,
                    "clusters": number,
                    "adjusted_rand": adjusted_rand(store.task_ids, labels_N),
                    "purity": largest / len(labels_N),
                    "largest_share": float(np.bincount(labels_N).max()) / len(labels_N),
                    "seconds": seconds,
                }
            )
    return lines


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("outputs/demo/selected/_task_selection"))
    options = parser.parse_args()
    store = GradientStore.load(options.run / "gradients")
    lines = measure(store)
    print("gradient         clusters   Rand  purity  largest")
    for line in lines:
        print(
            f"{line['gradient']:16} {line['clusters']:8} {line['adjusted_rand']:6.2f} "
            f"{line['purity']:7.2f} {line['largest_share']:8.2f}"
        )
    record = {
        "command": "make demo, then python -m benchmarks.accuracy.cluster_recovery",
        "tasks": store.task_names,
        "examples": len(store),
        "lines": lines,
    }
    write_atomically(RESULTS / "cluster_recovery.json", to_json(record))


if __name__ == "__main__":
    main()
