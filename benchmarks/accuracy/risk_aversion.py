"""How much of its interval must count against an estimated gain, by ground-truth runs.

From pools of 12 mixtures that were really trained on, and all tasks, the one is taken whose
estimated loss minus that of all tasks, plus r half widths of its 90% interval, is lowest. Over
random pools: the gain over all tasks, as a share of the range of losses; how often the choice is
worse than all tasks; and the regret against the best of the pool.

    python -m benchmarks.accuracy.risk_aversion [--families small,demo]

Shapes: M mixtures, K tasks.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.accuracy.captured import gradients
from benchmarks.accuracy.measures import read_truth
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import LinearizedTraining
from hf_auxselect.estimators.base import all_tasks_pooled
from hf_auxselect.files import to_json, write_atomically

PATH = RESULTS / "risk_aversion.json"
RISK_AVERSIONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
NUM_POOLS, POOL_SIZE = 1000, 12


def measured(family: str) -> dict[str, dict[str, float]]:
    """By risk aversion: gain, share worse than all tasks, and regret."""
    store, truth = gradients(family, "continue"), read_truth(family, "continue")
    shares_K = all_tasks_pooled(store.task_sizes)[0]
    everything = int(np.flatnonzero(np.isclose(truth.weights, shares_K, atol=1e-4).all(1))[0])
    gain = LinearizedTraining().fit(store).difference(truth.weights, shares_K)
    half_M, true_M = (gain.high - gain.low) / 2, truth.mean / np.ptp(truth.mean)
    found = {}
    for risk_aversion in RISK_AVERSIONS:
        bound_M = gain.loss + risk_aversion * half_M
        bound_M[everything] = 0.0
        rng = np.random.default_rng(0)
        changes, regrets = [], []
        for _ in range(NUM_POOLS):
            pool = np.append(rng.choice(len(true_M), POOL_SIZE, replace=False), everything)
            chosen = pool[np.argmin(bound_M[pool])]
            changes.append(true_M[chosen] - true_M[everything])
            regrets.append(true_M[chosen] - true_M[pool].min())
        found[str(risk_aversion)] = {
            "gain": -float(np.mean(changes)),
            "worse": float(np.mean(np.array(changes) > 0)),
            "regret": float(np.mean(regrets)),
        }
    return found


def main() -> None:
    """Measure, and add to what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", default=",".join(f for f in FAMILIES if f not in VARIANTS), metavar="a,b"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    record: dict[str, Any] = {
        "command": "python -m benchmarks.accuracy.risk_aversion",
        "families": {},
    }
    if PATH.is_file():
        record = json.loads(PATH.read_text())
    for family in options.families.split(","):
        record["families"][family] = measured(family)
        for risk_aversion, found in record["families"][family].items():
            values = ", ".join(f"{what} {value:.1%}" for what, value in found.items())
            print(f"{family} {risk_aversion}: {values}")
        write_atomically(PATH, to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
