"""A report for a terminal: tables in colour where ``rich`` is installed, else plain text."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from hf_auxselect.report.content import GroupLine, Measurement, Race, ReportContent, Row
from hf_auxselect.report.text import (
    agreement_sentence,
    calibration_sentence,
    comparison_sentence,
    confirmation_sentence,
    decision_sentence,
    layers_sentence,
    nats,
    printable,
    to_text,
)

if TYPE_CHECKING:
    from rich.table import Table

_INTERVAL = "90% interval"


def for_stream(content: ReportContent, stream: TextIO) -> str:
    """The report, as text for ``stream``.

    A terminal gets tables in colour if ``rich`` is installed. A file, a pipe or a notebook gets
    plain text, so that logs are the same with and without ``rich``.
    """
    if stream.isatty():
        try:
            return _in_colour(content, width=shutil.get_terminal_size().columns)
        except ImportError:
            pass
    return to_text(content)


def _in_colour(content: ReportContent, *, width: int) -> str:
    """Tables in which chosen tasks are bold, as text with escape sequences."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=True,
        width=width,
        no_color=bool(os.environ.get("NO_COLOR")),
        highlight=False,
        markup=False,  # names of tasks are not markup
        emoji=False,
    )
    number, total = len(content.selected), len(content.weights)
    console.print(f"Selected {number} of {total} tasks", style="bold")
    if content.decisions:
        told = map(decision_sentence, content.decisions)
        console.print("Selections of this run, of which this is the last:", *told, sep="\n  ")
    # Those without a task are in the table of tasks; those with one more are left to the page.
    mixtures = [row for row in content.rows if row.left_out is None and row.added is None]
    if mixtures:
        table = _table("Estimated target loss, nats per label token", "trained on", "loss")
        for row in mixtures:
            style = "bold" if row.name == "chosen" else ""
            table.add_row(printable(row.name), *_loss(row), style=style)
        console.print(table)
    if sentence := comparison_sentence(content):
        console.print(sentence)
    if content.group_lines:
        console.print(_groups(content.group_lines))
    console.print(_tasks(content))
    if content.confirmation is not None:
        if content.confirmation.steps:
            console.print(_race(content.confirmation))
        console.print(confirmation_sentence(content))
    if content.layers is not None:
        console.print(layers_sentence(content))
    for title, sentence, runs in [
        ("Ground-truth runs", agreement_sentence(content), content.verification),
        ("Calibration runs", calibration_sentence(content), content.calibration),
    ]:
        if runs:
            console.print(_runs(title, runs), sentence, sep="\n")
    for warning in content.warnings:
        console.print(f"Warning: {warning}", style="yellow")
    return buffer.getvalue().rstrip("\n")


def _tasks(content: ReportContent) -> Table:
    """Every task's share of the mixture, and the loss of all tasks without it."""
    without = {row.left_out: _loss(row) for row in content.rows if row.left_out is not None}
    table = _table("Tasks", "task", "share", *(["loss without it"] if without else []))
    for name, weight in content.weights.items():
        cells = without.get(name, ())
        table.add_row(printable(name), f"{weight:.1%}", *cells, style="bold" if weight else "dim")
    return table


def _groups(lines: Sequence[GroupLine]) -> Table:
    has_prices = any(line.price is not None for line in lines)
    columns = ["before", "all tasks", "chosen", *(["shadow price"] if has_prices else [])]
    title = "Estimated losses of the groups, nats per label token"
    table = _table(title, "group", *columns, interval=False)
    for line in lines:
        losses = [f"{loss:.4f}" for loss in (line.before, line.all_tasks, line.chosen)]
        price = "" if line.price is None else f"{line.price:.3g}"
        table.add_row(printable(line.name), *losses, *([price] if has_prices else []))
    return table


def _runs(title: str, runs: Iterable[Measurement]) -> Table:
    table = _table(title, "trained on", "measured", "estimated")
    for run in runs:
        interval = f"[{run.low:.4f}, {run.high:.4f}]"
        table.add_row(printable(run.name), f"{run.measured:.4f}", f"{run.estimated:.4f}", interval)
    return table


def _race(race: Race) -> Table:
    steps = [f"step {step}" for step in race.steps]
    table = _table("Finalists", "trained on", *steps, interval=False)
    table.add_column("")
    for one in race.finalists:
        cells = [*map(nats, one.losses), *[""] * (len(steps) - len(one.losses))]
        style = "bold" if one.name == race.winner else ""
        table.add_row(printable(one.name), *cells, race.verdict(one), style=style)
    return table


def _table(title: str, first: str, *numbers: str, interval: bool = True) -> Table:
    """An empty table of a name and numbers; the interval of the last loss follows it."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    if interval and numbers[-1] != "share":
        table.add_column(_INTERVAL, justify="right", no_wrap=True)
    return table


def _loss(row: Row) -> tuple[str, str]:
    return f"{row.loss:.4f}", f"[{row.low:.4f}, {row.high:.4f}]"
