"""Re-selection in simulated runs whose losses are known: how near to an oracle does it end?

The tasks are quadratic (:mod:`benchmarks.simulated_run`), so that estimates miss the truth only by
the noise of captured examples and by errors that are new at each selection. Takes a minute or two.

    python -m benchmarks.accuracy.reselection [--runs 100]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.simulated_run import EVERY, STEPS, WARM_UP, World, simulate
from hf_auxselect import Reselection
from hf_auxselect.files import to_json, write_atomically

SCENARIOS: dict[str, list[tuple[int, float]]] = {
    "stationary": [],
    "abrupt": [(80, 1.0)],
    "gradual": [(60, 0.25), (80, 0.5), (100, 0.75), (120, 1.0)],
    "return": [(50, 1.0), (60, 0.0)],
}
"""Steps at which the target changes, and the share of the second target from there on."""

_TESTED: dict[str, Any] = {"targets": [(1, "changes")], "significance": 0.05}
STRATEGIES: dict[str, dict[str, Any]] = {
    "all tasks": {"reselection": None, "selects": False},
    "one selection": {"reselection": None},
    "every 20 steps": {"reselection": Reselection(every=EVERY)},
    "every 20 steps, memory=0": {"reselection": Reselection(every=EVERY, memory=0)},
    "every 40 steps": {"reselection": Reselection(every=2 * EVERY)},
    "every 40 steps, memory=0": {"reselection": Reselection(every=2 * EVERY, memory=0)},
    "if the target has changed": {"reselection": Reselection(every=EVERY, **_TESTED)},
    "oracle": {"reselection": None, "knows": True},
}


def steps_to_follow(losses: list[float], oracle: list[float], change: int) -> int:
    """Steps from a change on until the loss is within 5% of the oracle's at the end."""
    reached = [step for step in range(change, STEPS) if losses[step] <= 1.05 * oracle[-1]]
    return (min(reached) if reached else STEPS) - change


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    lines = []
    for scenario, dates in SCENARIOS.items():
        runs = {
            name: [simulate(World(seed), dates, **how) for seed in range(options.runs)]
            for name, how in STRATEGIES.items()
        }
        change = dates[-1][0] if dates else WARM_UP
        for name, own in runs.items():
            pairs = list(zip(own, runs["oracle"], strict=True))
            above = np.array([one["losses"][-1] - best["losses"][-1] for one, best in pairs])
            follow = [steps_to_follow(one["losses"], best["losses"], change) for one, best in pairs]
            line = {
                "scenario": scenario,
                "strategy": name,
                "above_oracle": round(float(above.mean()), 4),
                "standard_error": round(float(above.std(ddof=1) / len(above) ** 0.5), 4),
                "steps_to_follow": round(float(np.mean(follow)), 1),
                "selections": round(float(np.mean([len(one["selections"]) for one in own])), 2),
            }
            lines.append(line)
            print(line, flush=True)
    versions = [(date, 0.0) for date in range(40, STEPS, EVERY)]
    tested = Reselection(every=EVERY, **_TESTED)
    selected = [
        len(simulate(World(seed), versions, tested, same_rows=False)["selections"]) - 1
        for seed in range(options.runs)
    ]
    rate = float(np.sum(selected)) / (len(versions) * options.runs)
    print(f"selected again without a change: {rate:.1%} of tests")
    result = {"runs": options.runs, "false_selections": round(rate, 4), "lines": lines}
    write_atomically(RESULTS / "reselection.json", to_json(result))


if __name__ == "__main__":
    main()
