"""Tables of the pages on choosing."""

from __future__ import annotations

from results import markdown, number, percent, read, table


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
