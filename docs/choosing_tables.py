"""Tables of the pages on choosing."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from results import RESULTS, markdown, number, percent, read, table

ALL_TASKS = "all tasks"


@table
def mixture_search() -> str:
    """Gaps, noise and time of ``benchmarks.accuracy.mixture_search``."""
    found = read("mixture_search")
    gaps = found["gap_to_grid_nats"]
    kept, true = found["all_tasks_kept_of_noise"], found["true_loss_minus_all_tasks_nats"]
    count = found["problems"]
    rows = [
        [
            f"largest gap to a grid, 3 to 5 tasks, {count} problems each, {kind}",
            f"{number(max(gaps[kind].values()), 4)} nats",
        ]
        for kind in gaps
    ]
    rows += [
        [f"tasks do not differ, estimates are noise: all tasks kept, {name}", percent(kept[name])]
        for name in kept
    ]
    rows += [
        [
            f"tasks differ, estimates are noisy: true loss minus all tasks, {name}",
            f"{number(true[f'{name}: mean'], 3)} nats; worse in {percent(true[f'{name}: worse'])}",
        ]
        for name in ("default", "risk_aversion=1.75", "shrinkage=0", "round_to_subset")
    ]
    rows += [
        [f"seconds, {tasks} tasks, `{name}`", number(value, 1)]
        for tasks, times in found["seconds"].items()
        for name, value in times.items()
    ]
    return markdown(["measured", "result"], rows)


@table
def constrained() -> str:
    """The part of ``benchmarks.accuracy.mixture_search`` with ceilings."""
    found = read("mixture_search")["constrained"]
    rows = [
        ["problems", str(found["problems"])],
        [
            "largest gap to the best of the grid within the ceilings",
            f"{found['largest_gap_of_range']:.2%} of the range of losses",
        ],
        ["largest excess over a ceiling", f"{number(found['largest_excess_nats'], 4)} nats"],
        [
            f"largest error of {found['prices']} prices, against finite differences",
            f"{found['largest_relative_error_of_a_price']:.2%}",
        ],
        [
            "steps from prices of 0, and from those of an earlier selection",
            f"{found['steps_from_0']:.0f}, {found['steps_from_earlier_prices']:.0f}",
        ],
    ]
    return markdown(["measured", "result"], rows)


@table
def coreset_noise() -> str:
    """Precision and recall of coresets and of a loss filter, by share of wrong tasks."""
    found = {
        (line["kind"], line["method"], line["wrong"]): line
        for line in read("coreset_noise")["lines"]
    }
    kinds = {
        "own rule": "a wrong rule of each task's own",
        "random": "random answers",
        "shuffled": "exchanged answers",
    }
    methods = {
        "coreset, 10 tasks": "`size=10`",
        "coreset, 10 tasks, min_members=2": "`size=10, min_members=2`",
        "loss filter": "loss filter",
    }
    rows = [
        [kinds[kind], methods[method]]
        + [
            "{precision:.2f} / {recall:.2f}".format(**found[kind, method, w])
            for w in (0.1, 0.2, 0.4)
        ]
        for kind in kinds
        for method in methods
    ]
    return markdown(["wrong tasks", "", "10% wrong", "20%", "40%"], rows)


@table
def layers() -> str:
    """Losses after training one layer, by planted shift and by the score that chose it."""
    kinds = {
        "chain": "five layers without residual connections",
        "transformer": "transformer of four blocks, LoRA",
    }
    shifts = {"input": "permuted inputs", "feature": "new pairs", "output": "permuted labels"}
    rows = [
        [
            kinds[kind],
            shifts[shift],
            ", ".join(map(str, found["best_layer"])),
            *(number(found[f"loss_{what}"]) for what in ("all_layers", "best_layer")),
            *(
                f"{number(found[method]['loss'])} ({number(found[method]['rank_correlation'])})"
                for method in ("cross_validation", "snr", "rgn")
            ),
        ]
        for kind, by_shift in read("layers").items()
        if kind in kinds
        for shift, found in by_shift.items()
    ]
    methods = ["cross_validation", "snr", "rgn"]
    return markdown(
        ["model", "shift", "best layer, by seed", "all layers", "best layer", *methods], rows
    )


@table
def cluster_recovery() -> str:
    """Agreement of clusters with the tasks of the demo."""
    names = {"loss": "gradient", "loss@optimizer": "gradient in the optimizer's coordinates"}
    rows = [
        [
            names[line["gradient"]],
            str(line["clusters"]),
            number(line["adjusted_rand"]),
            percent(line["purity"]),
            percent(line["largest_share"]),
        ]
        for line in read("cluster_recovery")["lines"]
    ]
    return markdown(
        ["", "clusters", "agreement", "of their cluster's main task", "in the largest cluster"],
        rows,
    )


def selections() -> dict[str, dict[str, Any]]:
    """Family -> what ``benchmarks.accuracy.selection`` measured of it."""
    paths = sorted((RESULTS / "selection").glob("*.json"))
    return {path.stem: read(f"selection/{path.stem}") for path in paths}


def of_strategy(name: str) -> Iterator[dict[str, float]]:
    """A strategy's line in every family in which it has been measured."""
    for record in selections().values():
        if name in record["summary"]:
            yield record["summary"][name]


@table
def choices() -> str:
    """What strategies' mixtures gain over all tasks, by ground truth."""
    records = selections()
    names = list(dict.fromkeys(name for r in records.values() for name in r["choices"]))
    rows = []
    for name in names:
        if name == ALL_TASKS:
            continue
        cells = []
        for record in records.values():
            line = record["summary"].get(name)
            cells.append("not run" if line is None else gain(line))
        lines = list(of_strategy(name))
        runs = sum(line["seeds"] for line in lines)
        worse = sum(line["seeds"] * line["worse_than_all_tasks"] for line in lines)
        regret = percent(fmean(line["regret"] for line in lines)) if lines else ""
        rows.append([name, *cells, f"{worse:.0f} of {runs:.0f}", regret])
    base = [
        f"{number(r['summary'][ALL_TASKS]['loss'], 2)} nats, regret "
        f"{percent(r['summary'][ALL_TASKS]['regret'])}"
        for r in records.values()
    ]
    rows.insert(0, [f"*{ALL_TASKS}: loss*", *base, "", ""])
    header = ["", *records, "worse than all tasks", "mean regret"]
    return markdown(header, rows)


def gain(line: dict[str, float]) -> str:
    """Gain, with its standard error over seeds where there are several."""
    text = f"{line['gain']:+.3f}".replace("-", "\u2212")
    return text + (f" ± {number(line['gain_se'], 3)}" if line["seeds"] > 1 else "")


@table
def risk_aversion() -> str:
    """Gain, harm and regret of choices by how much of the interval counts against them."""
    families = read("risk_aversion")["families"]
    values = list(next(iter(families.values())))
    rows = [
        [
            value,
            *(
                f"{percent(of[value]['gain'] + 0.0)}, {percent(of[value]['worse'])}, "
                f"{percent(of[value]['regret'])}"
                for of in families.values()
            ),
            ", ".join(
                percent(fmean(of[value][key] for of in families.values()))
                for key in ("gain", "worse", "regret")
            ),
        ]
        for value in values
    ]
    return markdown(["`risk_aversion`", *families, "mean"], rows)


@table
def reselection() -> str:
    """Losses above an oracle's at the end of simulated runs."""
    found = {(one["scenario"], one["strategy"]): one for one in read("reselection")["lines"]}
    scenarios = list(dict.fromkeys(scenario for scenario, _ in found))
    strategies = dict.fromkeys(strategy for _, strategy in found if strategy != "oracle")
    rows = [
        [strategy]
        + [
            f"{number(one['above_oracle'])} ± {number(one['standard_error'])}"
            for scenario in scenarios
            for one in [found[scenario, strategy]]
        ]
        for strategy in strategies
    ]
    return markdown(["", *scenarios], rows)
