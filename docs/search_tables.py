"""Tables of searches over subsets: how far they are from the best, and what they ask for."""

from __future__ import annotations

from results import bullets, markdown, percent, read, table

_SETS = ("random, 12 tasks", "demo, 8 of its tasks")


def _share(value: float) -> str:
    return "0" if value < 5e-5 else f"{value:.1%}"


@table
def search_regret() -> str:
    """Best subset found, mean and largest regret, and estimates, for each search."""
    lines = {(line["problems"], line["selector"]): line for line in read("search_regret")["lines"]}
    header = ["", *(f"{name}: best found, regret (largest)" for name in _SETS)]
    rows = []
    for selector in dict.fromkeys(selector for _, selector in lines):
        own = [lines[name, selector] for name in _SETS]
        rows.append(
            [
                f"`{selector}`",
                *(
                    f"{percent(line['best_found_share'])}, {_share(line['mean_regret'])} "
                    f"({_share(line['largest_regret'])})"
                    for line in own
                ),
                f"{own[0]['mean_estimates']:,.0f}",
            ]
        )
    return markdown([*header, "estimates, 12 tasks"], rows)


@table
def lazy_searches() -> str:
    """Lazy searches next to full ones."""
    return markdown(
        ["", "tasks", "same answer", "estimates, full", "estimates, lazy", "gradients"],
        [
            [
                f"`{line['search']}`",
                str(line["tasks"]),
                percent(line["same_share"]),
                f"{line['mean_estimates_full']:,.0f}",
                f"{line['mean_estimates_lazy']:,.0f}",
                f"{line['mean_gradients']:.0f}",
            ]
            for line in read("search_regret")["lazy"]
        ],
    )


@table
def tangents() -> str:
    """How often losses fall below their tangents."""
    found = read("search_regret")["tangents"]["random"]
    return bullets(
        "The loss after training is **not convex**: of the subsets in a random quadratic model of "
        f"training that differ in one task, {percent(found['below_share'])} are below the tangent "
        "of the other. The bounds are then lowered, by twice the largest curvature of this kind "
        "that the search has seen. So its result may differ from that of the full search."
    )


@table
def search_times() -> str:
    """Seconds and estimates of searches with the default estimator."""
    shown = {"ForwardSelection": "adds", "BackwardElimination": "drops"}
    rows = []
    for line in read("search_time")["lines"]:
        name = line["search"].partition("(")[0]
        is_lazy, tasks = "lazy=True" in line["search"], line["tasks"]
        what = f"`{name}({'lazy=True' if is_lazy else ''})`"
        if "num_subsets=None" in line["search"]:
            what = f"`{name}(num_subsets=None)`"
        if tasks > 1000:
            what += f", {shown[name]} 20 tasks"
        rows.append(
            [
                f"{tasks:,}",
                what,
                f"{line['estimates']:,}",
                f"{line['gradients']:,}",
                f"{line['seconds']:.1f}",
            ]
        )
    return markdown(["tasks", "", "estimates", "gradients", "seconds"], rows)
