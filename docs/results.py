"""Figures of ``benchmarks/results``, and how tables show them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Register a table under its function's name."""
    TABLES[function.__name__] = function
    return function


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first row is in bold where its first cell is."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def listed(name: str, kept: dict[str, dict[Any, str]], columns: dict[str, str]) -> str:
    """A table with one row per line of a file of results.

    Args:
        name: the file.
        kept: which lines: key -> values, and what a row is called by the first of the keys.
        columns: header -> format of the line's numbers.
    """
    label = next(iter(kept))
    rows = [
        [
            kept[label][found[label]],
            *(f.format(**found).replace("-", "−") for f in columns.values()),
        ]
        for found in read(name)["lines"]
        if all(found[key] in values for key, values in kept.items())
    ]
    return markdown(["", *columns], rows)


def bullets(*items: str) -> str:
    """A list, in lines of at most 120 characters."""
    lines = (fill(f"* {item}", 120, subsequent_indent="  ") + "\n" for item in items)
    return "".join(lines)


def number(value: float, digits: int = 2) -> str:
    """With a minus sign as in text, and none before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def percent(value: float) -> str:
    """Without decimals."""
    return f"{value:.0%}".replace("-", "−")
