"""Tables of the pages on choosing."""

from __future__ import annotations

from results import markdown, number, percent, read, table


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
        for name in ("default", "shrinkage=0", "round_to_subset")
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
