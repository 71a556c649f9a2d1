"""Tables of the recipes: what training on other mixtures has measured.

``benchmarks/results/recipes/RECIPE.json`` maps the name of a comparison to its ``settings`` and
``runs`` (:class:`recipes.comparison.Run`). Each gives two tables, ``recipe_RECIPE_NAME`` with what
was measured of each mixture, and ``mixtures_RECIPE_NAME`` with the chosen shares; spaces and dashes
in a name become ``_``.
"""

from __future__ import annotations

import re
from functools import partial
from statistics import fmean, stdev
from typing import Any

from results import RESULTS, TABLES, markdown, percent, read

ALL, CHOSEN = "all tasks", "chosen by hf-auxselect"


def measured(recipe: str, name: str) -> str:
    """Columns as in ``recipes.comparison.table``: metrics, and the gain over all tasks."""
    runs = read(f"recipes/{recipe}")[name]["runs"]
    known = {(run["name"], run["seed"]): run["measured"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    columns = list(runs[0]["measured"])
    rows = []
    for mixture in dict.fromkeys(run["name"] for run in runs):
        own = {seed: known[mixture, seed] for seed in seeds if (mixture, seed) in known}
        gains = [
            known[ALL, seed]["loss"] - values["loss"]
            for seed, values in own.items()
            if (ALL, seed) in known
        ]
        rows.append(
            [
                mixture,
                str(len(own)),
                *(mean([v[column] for v in own.values()], column) for column in columns),
                "" if mixture == ALL or not gains else mean(gains, sign="+"),
            ]
        )
    return markdown(["", "seeds", *columns, "gain"], rows)


def mixtures(recipe: str, name: str) -> str:
    """Shares of the tasks in the chosen mixture, by seed; the largest mean first."""
    runs = read(f"recipes/{recipe}")[name]["runs"]
    chosen: dict[int, dict[str, Any]] = {
        run["seed"]: run["weights"] for run in runs if run["name"] == CHOSEN
    }
    tasks = dict.fromkeys(task for weights in chosen.values() for task in weights)
    shares = {task: [weights.get(task, 0.0) for weights in chosen.values()] for task in tasks}
    rows = [
        [task, *map(percent, values)]
        for task, values in sorted(shares.items(), key=lambda item: -fmean(item[1]))
        if max(values) > 0
    ]
    return markdown(["", *(f"seed {seed}" for seed in chosen)], rows)


def mean(values: list[float], column: str = "loss", *, sign: str = "") -> str:
    """A mean and, of several seeds, its standard error; metrics other than losses in percent."""
    scale, digits = (1, 4) if column == "loss" else (100, 1)
    values = [scale * value for value in values]
    text = f"{fmean(values):{sign}.{digits}f}".replace("-", "−")
    if len(values) > 1:
        text += f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text + ("" if column == "loss" else "%")


for _path in sorted((RESULTS / "recipes").glob("*.json")):
    for _name in read(f"recipes/{_path.stem}"):
        _key = re.sub(r"\W", "_", f"{_path.stem}_{_name}")
        TABLES[f"recipe_{_key}"] = partial(measured, _path.stem, _name)
        TABLES[f"mixtures_{_key}"] = partial(mixtures, _path.stem, _name)
