"""Tables of searches over subsets: how far they are from the best, and what they ask for."""

from __future__ import annotations

from results import markdown, percent, read, table

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
