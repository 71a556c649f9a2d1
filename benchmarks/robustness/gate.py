"""Which diagnostics tell bad estimates from good ones, and how well they do together.

The cases are the families of ``agreement.py`` and the variants of small of ``drift.py``, two of
which were made to fail; it reads what those have measured. Estimates are bad where they miss the
losses by more than 5% in the mean, or rank mixtures with a Spearman below 0.6. The measure is the
AUROC: the probability that a bad case has a larger value than a good one. The gate is the largest
of the diagnostics in units of the limits above which the report warns.

    python -m benchmarks.robustness.gate
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np

from benchmarks import RESULTS
from hf_auxselect.estimators.reliability import RELIABILITY_CHECKS
from hf_auxselect.files import to_json, write_atomically

FAMILIES = ("arithmetic", "logic", "text", "spelling", "demo", "sparse", "sorting")
LARGEST_ERROR, LEAST_SPEARMAN = 0.05, 0.6
REMOVED = ("kernel_drift", "rank_correlation_with_step_norm")
"""Diagnostics that the package had when the cases were measured (up to commit 94bcc46)."""


def cases() -> dict[str, dict[str, float]]:
    """Agreement with ground truth and diagnostics, by case."""
    found = {}
    for family in FAMILIES:
        record = json.loads((RESULTS / "agreement" / f"{family}-continue.json").read_text())
        lines = {line["estimator"]: line for line in record["lines"]}
        found[family] = record["diagnostics"] | lines["LinearizedTraining()"]
    for line in json.loads((RESULTS / "drift.json").read_text())["lines"]:
        found[line["family"]] = line["probes"]
    return found


def is_bad(case: dict[str, float]) -> bool:
    """Whether estimates are too far off, or rank too badly."""
    return case["error"] > LARGEST_ERROR or case["spearman"] < LEAST_SPEARMAN


def auroc(values: list[float], bad: list[bool]) -> float:
    """Probability that a bad case has the larger value; ties count half."""
    of_bad, of_good = (
        [v for v, b in zip(values, bad, strict=True) if b == which] for which in (True, False)
    )
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(of_bad, of_good)]
    return float(np.mean(pairs))


def main() -> None:
    """Print the table and write it as JSON."""
    found, limits = cases(), {check.diagnostic: check.limit for check in RELIABILITY_CHECKS}
    rows: list[dict[str, Any]] = []

    def add(name: str, values: dict[str, float]) -> None:
        bad = [is_bad(found[case]) for case in values]
        row = {"diagnostic": name, "cases": len(bad), "bad": sum(bad)}
        rows.append(row | {"auroc": auroc(list(values.values()), bad), "values": values})

    for name in (*limits, *REMOVED):
        add(name, {case: abs(of[name]) for case, of in found.items() if name in of})
    of_gate = {
        case: max(of[name] / limit for name, limit in limits.items() if name in of)
        for case, of in found.items()
    }
    add("gate", of_gate)
    for row in rows:
        print(f"{row['diagnostic']:34} {row['auroc']:.2f} ({row['bad']} bad of {row['cases']})")
    record = {"command": "python -m benchmarks.robustness.gate", "rows": rows}
    write_atomically(RESULTS / "gate.json", to_json(record))


if __name__ == "__main__":
    main()
