"""A report's tables as plain values, for programs that show tables of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from hf_auxselect.report.content import Measurement, Race, ReportContent, Row
from hf_auxselect.report.text import nats

TableRow = dict[str, str | float | bool]
"""Column -> value; losses are nats per label token, as exact as the report shows them."""


def table_rows(content: ReportContent) -> dict[str, list[TableRow]]:
    """The tables of a report that have rows, by name.

    ``estimates`` compares mixtures, ``tasks`` has each task's share and the loss of all tasks
    without it, ``ground_truth_runs``, ``calibration_runs`` and ``finalists`` have measured losses.
    """
    without = {row.left_out: row for row in content.rows if row.left_out is not None}
    tasks: list[TableRow] = [
        {
            "task": name,
            "share": round(weight, 4),
            "chosen": weight > 0,
            **(_loss(without[name], " without it") if name in without else {}),
        }
        for name, weight in content.weights.items()
    ]
    estimates: list[TableRow] = [
        {"trained on": row.name, **_loss(row)} for row in content.rows if row.left_out is None
    ]
    found = {
        "estimates": estimates,
        "tasks": tasks,
        "ground_truth_runs": _runs(content.verification),
        "calibration_runs": _runs(content.calibration),
        "finalists": _finalists(content.confirmation),
    }
    return {name: rows for name, rows in found.items() if rows}


def _loss(row: Row, suffix: str = "") -> TableRow:
    return {
        f"loss{suffix}": round(row.loss, 4),
        "low": round(row.low, 4),
        "high": round(row.high, 4),
    }


def _finalists(race: Race | None) -> list[TableRow]:
    """The losses at the steps of a race; cells of finalists that were dropped are empty."""
    if race is None or not race.steps:
        return []
    return [
        {
            "trained on": one.name,
            **{
                f"step {step}": cell
                for step, cell in zip_longest(race.steps, map(_measured, one.losses), fillvalue="")
            },
            "result": race.verdict(one),
        }
        for one in race.finalists
    ]


def _measured(loss: float | None) -> float | str:
    return nats(None) if loss is None else round(loss, 4)


def _runs(runs: Sequence[Measurement]) -> list[TableRow]:
    return [
        {
            "trained on": run.name,
            "measured": round(run.measured, 4),
            "estimated": round(run.estimated, 4),
            "low": round(run.low, 4),
            "high": round(run.high, 4),
        }
        for run in runs
    ]
