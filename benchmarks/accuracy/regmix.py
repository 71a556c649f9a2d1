"""Surrogates on runs that others have measured: the tables of RegMix.

512 mixtures of 17 domains of the Pile, each trained on for real with a model of 1M parameters, and
13 losses; 256 further mixtures judge. Nothing here is estimated from gradients: ``fit_runs`` sees
the mixtures and the losses. LightGBM's figures are those that come with the tables, measured with
the settings of the paper (Liu et al., arXiv 2407.01492). The folder of the tables, which have a
licence of their own (MIT), is named by ``HF_AUXSELECT_REGMIX``.

    python -m benchmarks.accuracy.regmix
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.accuracy.measures import is_inside, spearman
from hf_auxselect import KernelSurrogate, RidgeSurrogate
from hf_auxselect.estimators.surrogates import AbstractSurrogate
from hf_auxselect.files import to_json, write_atomically

FOLDER = Path(
    os.environ.get("HF_AUXSELECT_REGMIX", Path(__file__).parents[3] / "shared" / "regmix")
)
NUM_RUNS = (32, 64, 128, 256, 512)
SURROGATES = {"RidgeSurrogate()": RidgeSurrogate(), "KernelSurrogate()": KernelSurrogate()}
LIGHTGBM = {512: (0.990, 0.990), 64: (0.870, 0.902)}
"""Rank correlation for the loss of Pile-CC, and mean over the 13 losses, by number of runs."""


def read_table(name: str) -> tuple[list[str], np.ndarray]:
    """Names of the columns, but for the first, which numbers the runs; and the numbers."""
    with (FOLDER / f"{name}_1m.csv").open() as file:
        header, *rows = csv.reader(file)
    return header[1:], np.array([row[1:] for row in rows], np.float64)


def judge(surrogate: AbstractSurrogate, num_runs: int) -> dict[str, Any]:
    """Fit to the first runs, and compare what it says of the test mixtures with their losses."""
    (_, known), (names, losses) = read_table("train_mixture"), read_table("train_pile_loss")
    (_, asked), (_, true) = read_table("test_mixture"), read_table("test_pile_loss")
    ranks, held, seconds = {}, [], []
    for j, name in enumerate(names):
        start = time.perf_counter()
        estimate = surrogate.fit_runs(known[:num_runs], losses[:num_runs, j]).estimate(asked)
        seconds.append(time.perf_counter() - start)
        ranks[name.removeprefix("metric/the_pile_").removesuffix("_val_loss")] = spearman(
            estimate.loss, true[:, j]
        )
        held.append(float(is_inside(estimate, true[:, j]).mean()))
    return {
        "runs": num_runs,
        "spearman_pile_cc": ranks["pile_cc"],
        "spearman_mean": float(np.mean(list(ranks.values()))),
        "spearman_least": min(ranks.values()),
        "coverage": float(np.mean(held)),
        "coverage_range": [min(held), max(held)],
        "seconds": float(np.median(seconds)),
    }


def main() -> None:
    """Print the table and write it as JSON."""
    lines = []
    print("                  runs  Pile-CC   mean  least  coverage (of single losses)  seconds")
    for num_runs in NUM_RUNS:
        for name, surrogate in SURROGATES.items():
            line = {"surrogate": name} | judge(surrogate, num_runs)
            lines.append(line)
            low, high = line["coverage_range"]
            print(
                f"{name:18}{num_runs:4}  {line['spearman_pile_cc']:7.3f}  "
                f"{line['spearman_mean']:.3f}  {line['spearman_least']:.3f}  "
                f"{line['coverage']:.0%} ({low:.0%} to {high:.0%})  {line['seconds']:.2f}"
            )
    record = {
        "command": "python -m benchmarks.accuracy.regmix",
        "unit": "Spearman's rank correlation on 256 test mixtures, of 13 losses",
        "lines": lines,
        "lightgbm": [
            {"runs": n, "spearman_pile_cc": cc, "spearman_mean": mean}
            for n, (cc, mean) in LIGHTGBM.items()
        ],
    }
    write_atomically(RESULTS / "regmix.json", to_json(record))


if __name__ == "__main__":
    main()
