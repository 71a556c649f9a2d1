"""The tables of a report as parquet files, which the viewer of a dataset repo shows."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_auxselect.report.content import ReportContent

_LOSSES = [("loss", pa.float64()), ("low", pa.float64()), ("high", pa.float64())]
_SCHEMAS = {
    "estimates": pa.schema([("name", pa.string()), ("left_out", pa.string()), *_LOSSES]),
    "tasks": pa.schema(
        [
            ("task", pa.string()),
            ("share", pa.float64()),
            ("score", pa.float64()),
            ("score_low", pa.float64()),
            ("score_high", pa.float64()),
            ("rows", pa.int64()),
            ("captured", pa.int64()),
            ("label_tokens", pa.int64()),
            ("loss_at_switch", pa.float64()),
            ("reads_per_row", pa.float64()),
            ("source", pa.string()),
        ]
    ),
    "history": pa.schema([("tasks", pa.list_(pa.string())), *_LOSSES, ("accepted", pa.bool_())]),
    "ground_truth_runs": pa.schema(
        [
            ("purpose", pa.string()),
            ("name", pa.string()),
            ("measured", pa.float64()),
            ("estimated", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
            ("seconds", pa.float64()),
            ("mixture", pa.list_(pa.struct([("task", pa.string()), ("share", pa.float64())]))),
        ]
    ),
}


def parquet_tables(report: ReportContent) -> dict[str, bytes]:
    """The tables that have rows, as parquet files, by name.

    ``estimates`` of mixtures, ``tasks`` with their shares, ``history`` of the search, and
    ``ground_truth_runs``. Losses are of the target, nats per label token; ``low`` and ``high`` are
    as in the report.
    """
    files = {}
    for name, rows in _rows(report).items():
        if rows:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMAS[name]), sink)
            files[name] = sink.getvalue().to_pybytes()
    return files


def _rows(report: ReportContent) -> dict[str, list[dict[str, Any]]]:
    captured = {task.name: task for task in report.tasks}
    tasks: list[dict[str, Any]] = []
    for name, share in report.weights.items():
        task, source = captured.get(name), report.sources.get(name)
        interval = report.score_intervals.get(name)
        tasks.append(
            {
                "task": name,
                "share": share,
                "score": report.scores.get(name),
                "score_low": interval and interval.low,
                "score_high": interval and interval.high,
                "rows": task and task.rows,
                "captured": task and task.captured,
                "label_tokens": task and task.label_tokens,
                "loss_at_switch": task and task.loss,
                "reads_per_row": report.run.get("reads_per_row", {}).get(name),
                "source": json.dumps(source, ensure_ascii=False) if source else None,
            }
        )
    purposes = {"verification": report.verification, "calibration": report.calibration}
    return {
        "estimates": [vars(row) for row in report.rows],
        "tasks": tasks,
        "history": [vars(step) for step in report.history],
        "ground_truth_runs": [
            vars(run)
            | {
                "purpose": purpose,
                "mixture": [{"task": task, "share": run.weights[task]} for task in run.weights],
            }
            for purpose, runs in purposes.items()
            for run in runs
        ]
        + _finalists(report),
    }


def _finalists(report: ReportContent) -> list[dict[str, Any]]:
    """The finalists that were trained to the end of their race."""
    race = report.confirmation
    if race is None:
        return []
    return [
        vars(one)
        | {
            "purpose": "confirmation",
            "measured": measured,
            "mixture": [{"task": task, "share": one.weights[task]} for task in one.weights],
        }
        for one in race.finalists
        if (measured := race.measured(one.name)) is not None
    ]
