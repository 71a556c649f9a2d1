"""The figures of a report as PNG and SVG, for README, model card and trackers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hf_auxselect.report.content import ReportContent
from hf_auxselect.report.text import printable, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_LABEL_LENGTH = 40
_MAX_ROWS = 40
"""Tasks that a figure shows at most: with more, those at the two ends."""

# Okabe and Ito's colours, which colour-blind readers can tell apart; shapes differ, too.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.4"


def draw(content: ReportContent) -> dict[str, bytes]:
    """The figures that a report's numbers allow, by file name: ``.png`` and ``.svg`` of each."""
    drawn: dict[str, bytes] = {}
    for name, figure in _figures(content):
        for kind in ("png", "svg"):
            drawn[f"{name}.{kind}"] = _saved(figure, kind)
    return drawn


def _figures(content: ReportContent) -> Iterator[tuple[str, Figure]]:
    if any(row.left_out for row in content.rows):
        yield "left_out", _left_out(content)
    if content.similarity is not None and len(content.similarity.tasks) > 1:
        yield "similarity", _similarity(content)


def _saved(figure: Figure, kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # Text stays text; no date, so that the same report gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf-auxselect"}):
        figure.savefig(
            buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    return buffer.getvalue()


def _left_out(content: ReportContent) -> Figure:
    """Estimated loss of all tasks without each one, with intervals, lowest first."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in content.rows if row.left_out), key=lambda row: row.loss)
    if len(rows) > _MAX_ROWS:
        rows = [*rows[: _MAX_ROWS // 2], *rows[-_MAX_ROWS // 2 :]]
    figure = Figure(figsize=(7.5, 1.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    losses = np.array([row.loss for row in rows])
    errors = np.array([[row.loss - row.low for row in rows], [row.high - row.loss for row in rows]])
    all_tasks, chosen = content.row("all tasks"), content.row("chosen")
    errors = np.maximum(errors, 0.0)  # the interval of a loss below 0 does not contain it
    kept = np.array([content.weights[row.left_out or ""] > 0 for row in rows])
    for mask, colour, shape, label in [
        (kept, BLUE, "o", "left out: a selected task"),
        (~kept, ORANGE, "s", "left out: a dropped task"),
    ]:
        axes.errorbar(
            losses[mask],
            places[mask],
            xerr=errors[:, mask],
            fmt=shape,
            color=colour,
            capsize=3,
            label=label if mask.any() else None,
        )
    axes.axvline(all_tasks.loss, color=GREY, linestyle="--", label="all tasks")
    axes.axvline(chosen.loss, color=GREEN, label="chosen mixture")
    axes.set_yticks(places, [_label(row.left_out or "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("estimated target loss, nats per label token (90% interval)")
    axes.set_title("Leave one task out: left of the dashed line, the task does harm")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for text in [*axes.get_yticklabels(), axes.title]:
        text.set_parse_math(False)
    return figure


def _similarity(content: ReportContent) -> Figure:
    """Cosines of the tasks' mean gradients, clustered, and of each with the target."""
    from matplotlib.figure import Figure

    assert content.similarity is not None
    shown = content.similarity
    names, count = shown.tasks[:_MAX_ROWS], min(len(shown.tasks), _MAX_ROWS)
    cosines = np.array(shown.cosines)[:count, :count]
    table = np.column_stack([np.array(shown.target)[:count], np.full(count, np.nan), cosines])
    size = 2.6 + 0.28 * count
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.add_subplot()
    # Purple to orange through white, which colour-blind readers can tell apart.
    image = axes.imshow(table, cmap="PuOr", vmin=-1, vmax=1)
    axes.set_yticks(np.arange(count), [_label(name) for name in names])
    labels = ["target", "", *(_label(name) for name in names)]
    axes.set_xticks(np.arange(len(labels)), labels, rotation=90)
    if count <= 12:
        for i, j in np.ndindex(table.shape):
            if np.isfinite(table[i, j]):
                dark = abs(table[i, j]) > 0.6
                colour = "white" if dark else "black"
                axes.text(
                    j, i, f"{table[i, j]:.1f}", ha="center", va="center", size=7, color=colour
                )
    axes.set_title("Cosine of mean gradients")
    figure.colorbar(image, ax=axes, shrink=0.6)
    for text in [*axes.get_yticklabels(), *axes.get_xticklabels()]:
        text.set_parse_math(False)
    return figure


def _label(name: str) -> str:
    return shortened(printable(name), _MAX_LABEL_LENGTH)
