"""Tables of the pages on choosing."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from results import RESULTS, markdown, number, percent, read, table

ALL_TASKS, CHOSEN = "all tasks", "MixtureOptimization()"
RANDOM = ("random 1", "random 2", "random 3")
TARGET_ONLY = "target only"
"""It trains on rows that no mixture has, and has no regret."""


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
def protected() -> str:
    """Losses after really training under ceilings, of ``benchmarks.accuracy.constrained``."""
    found = read("constrained")
    names, limit = found["protected"], found["limit_nats"]
    base = next(line["measured"] for line in found["lines"] if line["selector"] == ALL_TASKS)
    rows = []
    for line in found["lines"]:
        above = {
            name: [
                own - other for own, other in zip(line["measured"][name], base[name], strict=True)
            ]
            for name in names
        }
        kept = sum(
            all(above[name][i] <= limit for name in names) for i in range(len(found["seeds"]))
        )
        rows.append(
            [
                line["selector"],
                number(fmean(line["measured"]["target"]), 2),
                *(signed(fmean(above[name]), 3) for name in names),
                f"{kept} of {len(found['seeds'])}",
            ]
        )
    header = ["", "target", *(f"{name}, above all tasks" for name in names), "within the limit"]
    return markdown(header, rows)


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


Lines = dict[str, dict[str, float]]
"""Family -> what was measured of a strategy there."""


def lines_of_strategies() -> dict[str, Lines]:
    """What was measured of each strategy, by regret; random subsets as one."""
    records = selections()
    names = dict.fromkeys(name for record in records.values() for name in record["summary"])
    found: dict[str, Lines] = {}
    for name in names:
        own = {f: r["summary"][name] for f, r in records.items() if name in r["summary"]}
        if name.startswith("random "):
            own = {
                family: {key: fmean(r["summary"][n][key] for n in RANDOM) for key in line}
                for family, line in own.items()
                for r in [records[family]]
                if all(n in r["summary"] for n in RANDOM)
            }
            name = "random subset, mean of three"
        found[name] = own
    by_regret = sorted(found, key=lambda name: fmean(of("regret", found[name])))
    return {name: found[name] for name in sorted(by_regret, key=TARGET_ONLY.__eq__)}


@table
def choices() -> str:
    """What strategies' mixtures gain over all tasks, by ground truth."""
    records = selections()
    rows = [
        [name, *(gain(lines[f]) if f in lines else "not run" for f in records)]
        for name, lines in lines_of_strategies().items()
        if name != ALL_TASKS
    ]
    base = [f"{number(r['summary'][ALL_TASKS]['loss'], 2)} nats" for r in records.values()]
    return markdown(["", *records], [[f"*{ALL_TASKS}: loss*", *base], *rows])


@table
def choices_summary() -> str:
    """Harm, regret, exact matches and cost of strategies, over families."""
    strategies = lines_of_strategies()
    rows = []
    for name, lines in strategies.items():
        is_mixture = name != TARGET_ONLY
        rows.append(
            [
                name,
                str(len(lines)),
                "" if name == ALL_TASKS else times_worse(lines),
                regret(lines) if is_mixture else "",
                more_regret(lines, strategies[CHOSEN]) if is_mixture and name != CHOSEN else "",
                signed(100 * fmean(matches), 1)
                if (matches := of("exact_match_gain", lines))
                else "",
                number(fmean(costs), 1) if (costs := of("cost", lines)) else "",
            ]
        )
    header = [
        "",
        "families",
        "worse than all tasks",
        "mean regret",
        "regret above the default's",
        "exact match, points",
        "cost, runs",
    ]
    return markdown(header, rows)


def of(key: str, lines: Lines) -> list[float]:
    """A figure, of the families in which it was measured."""
    return [line[key] for line in lines.values() if key in line]


def times_worse(lines: Lines) -> str:
    """In how many of how many runs a strategy was worse than all tasks."""
    runs = sum(line["seeds"] for line in lines.values())
    worse = sum(line["seeds"] * line["worse_than_all_tasks"] for line in lines.values())
    return f"{worse:.0f} of {runs:.0f}"


def regret(lines: Lines) -> str:
    """Mean over families."""
    return percent(fmean(of("regret", lines)))


def more_regret(lines: Lines, others: Lines) -> str:
    """By how much regrets are above others' in the same families: mean and standard error."""
    values = [100 * (line["regret"] - others[f]["regret"]) for f, line in lines.items()]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{signed(fmean(values), 0)} ± {error:.0f} points"


def signed(value: float, digits: int) -> str:
    """With its sign."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def gain(line: dict[str, float]) -> str:
    """Gain, with its standard error over seeds where there are several."""
    return signed(line["gain"], 3) + (
        f" ± {number(line['gain_se'], 3)}" if line["seeds"] > 1 else ""
    )


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
