"""The figure of a report."""

from __future__ import annotations

import io

import numpy as np

from hf_auxselect.report.content import ReportContent
from hf_auxselect.report.text import printable

_MAX_LABEL_LENGTH = 40


def left_out_figure(content: ReportContent) -> bytes:
    """PNG: estimated loss of all tasks without each one, with intervals, lowest first."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in content.rows if row.left_out), key=lambda row: row.loss)
    figure = Figure(figsize=(7.5, 1.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    losses = np.array([row.loss for row in rows])
    errors = np.array([[row.loss - row.low for row in rows], [row.high - row.loss for row in rows]])
    all_tasks, chosen = content.row("all tasks"), content.row("chosen")
    errors = np.maximum(errors, 0.0)  # the interval of a loss below 0 does not contain it
    kept = np.array([content.weights[row.left_out or ""] > 0 for row in rows])
    for mask, colour, label in [
        (kept, "#0072b2", "left out: a selected task"),
        (~kept, "#d55e00", "left out: a dropped task"),
    ]:
        axes.errorbar(
            losses[mask],
            places[mask],
            xerr=errors[:, mask],
            fmt="o",
            color=colour,
            capsize=3,
            label=label if mask.any() else None,
        )
    axes.axvline(all_tasks.loss, color="0.4", linestyle="--", label="all tasks")
    axes.axvline(chosen.loss, color="#009e73", label="chosen mixture")
    axes.set_yticks(places, [_label(row.left_out or "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("estimated target loss, nats per label token (90% interval)")
    axes.set_title("Leave one task out: left of the dashed line, the task does harm")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for text in [*axes.get_yticklabels(), axes.title]:
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _label(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _MAX_LABEL_LENGTH else name[: _MAX_LABEL_LENGTH - 1] + "…"
