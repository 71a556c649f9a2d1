"""Tables of the page on noisy groups."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from results import markdown, number, percent, read, table

LOOKED_AT = range(5)
"""Seeds that were looked at while the recipe was written."""
NAMES = {
    "GradExLogistic()": "`GradExLogistic()`",
    "LinearizedTraining()": "`LinearizedTraining()`, the default: 30 remaining steps",
    "LinearizedTraining(probes=False)": "`LinearizedTraining(probes=False)`",
    "LinearizedTraining, next three steps": "`LinearizedTraining(probes=False)`, three steps",
    "GaussNewton()": "`GaussNewton()`",
    "loss of the group": "*loss of the group itself*",
}


def _lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = read("noisy_groups")["addition"]
    return lines


@table
def noisy_groups() -> str:
    """AUROC of each estimator, seed by seed, and what the widest gap drops."""
    lines = _lines()
    rows = []
    for name, shown in NAMES.items():
        row = [shown]
        for fresh in (False, True):
            of_seeds = [line for line in lines if (line["seed"] not in LOOKED_AT) == fresh]
            row.append(", ".join(number(line["auroc"][name]) for line in of_seeds))
        dropped = [line["dropped"][name] for line in lines]
        row += [f"{fmean(found[kind] for found in dropped):.1f}" for kind in ("random", "right")]
        rows.append(row)
    seeds = [[str(x["seed"]) for x in lines if (x["seed"] not in LOOKED_AT) == f] for f in (0, 1)]
    header = [
        "scored by",
        f"AUROC, seeds {', '.join(seeds[0])}",
        f"seeds {', '.join(seeds[1])}",
        "random groups dropped, of 8",
        "right groups dropped, of 12",
    ]
    return markdown(header, rows)


@table
def noisy_groups_dropped() -> str:
    """The target's loss with and without what was dropped, and the default mixture."""
    rows = [
        [
            str(line["seed"]),
            number(line["loss"]),
            number(line["loss_without_dropped"]),
            *(
                f"{line['mixture']['above_floor'][kind]} of {count}"
                for kind, count in (("random", 8), ("right", 12))
            ),
            percent(line["mixture"]["share_of_random"]),
            str(len(line["warnings"])),
        ]
        for line in _lines()
    ]
    return markdown(
        [
            "seed",
            "target loss, all groups",
            "without the dropped groups",
            "random groups above the floor",
            "right groups above the floor",
            "share of rows from random groups",
            "warnings",
        ],
        rows,
    )


@table
def noisy_families() -> str:
    """The rank of the shuffled task among the tasks, by each score."""
    families = read("noisy_groups")["families"]
    shown = {
        **NAMES,
        "LinearizedTraining()": "`LinearizedTraining()`, the default",
    }
    rows = [
        [label, *(str(f["rank"].get(name, "not captured")) for f in families)]
        for name, label in shown.items()
    ]
    rows.insert(
        2,
        [
            "slope of `LinearizedTraining()`, the score of `MixtureOptimization()`",
            *(str(f["rank_of_slope"]["LinearizedTraining()"]) for f in families),
        ],
    )
    rows.append(
        [
            "share of the shuffled task by `MixtureOptimization()`, over its share in all rows",
            *(number(f["mixture"]["shuffled"]) for f in families),
        ]
    )
    header = ["", *(f"{f['family']}, {f['tasks']}" for f in families)]
    return markdown(header, rows)
