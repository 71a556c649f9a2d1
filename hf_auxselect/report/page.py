"""A report as one self-contained HTML page: ``page.html.jinja``, ``page.css`` and ``page.js``.

The page opens no connection, is readable without JavaScript, and shows names as text only.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_auxselect.report import text
from hf_auxselect.report.content import NUM_RANDOM_SUBSETS, ReportContent, Row
from hf_auxselect.report.what_if import WhatIf

MAX_ROWS = 60
"""Rows of a table; a search finds the other tasks. A convention, as ``what_if.MAX_TASKS``."""

_NAMED = 6
"""Tasks that the decision names; the table has the others."""

_LONGEST_NAME = 60
"""Characters of a name within a sentence."""

_LEVELS = 10
"""Shades of a cosine."""


def to_html(content: ReportContent, what_if: WhatIf | None) -> str:
    """The page of a report.

    Args:
        content: the report.
        what_if: answers for other mixtures; None: the page cannot give any.
    """
    style, script = _asset("page.css"), _asset("page.js")
    ordered = [name for name, _ in sorted(content.weights.items(), key=lambda item: -item[1])]
    left_out = sorted((row for row in content.rows if row.left_out), key=lambda row: row.loss)
    added = sorted((row for row in content.rows if row.added), key=lambda row: row.loss)
    compared = [row for row in content.rows if not row.left_out and not row.added]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=content,
            style=style,
            script=script,
            policy=_policy(style, script),
            title=decision_title(content),
            lead=lead_sentences(content),
            confirmation=text.confirmation_sentence(content),
            layers=text.layers_sentence(content),
            agreement=text.agreement_sentence(content),
            calibration=text.calibration_sentence(content),
            leave_one_out=leave_one_out_sentences(content),
            compared=compared,
            left_out=_both_ends(left_out),
            added=added[:MAX_ROWS],
            scale=_Scale([row for row in content.rows if row.name != "no further training"]),
            tasks=ordered[:MAX_ROWS],
            summaries={task.name: task for task in content.tasks},
            alignment=_alignment(content),
            num_random_subsets=NUM_RANDOM_SUBSETS,
            steps=[step for step in content.history if step.accepted],
            what_if=what_if,
            data=_data(content, what_if),
        )
    )


def decision_title(content: ReportContent) -> str:
    """The decision in one sentence."""
    selected, count = content.selected, len(content.weights)
    if len(selected) == count:
        if content.difference is not None and abs(content.difference.loss) > text.SAME:
            return f"Keep all {count} tasks, with other shares."
        return f"Keep all {count} tasks." if count > 1 else "Keep the only task."
    if len(selected) == 1:
        return f"Train on {_shortened(selected[0])} alone, 1 of {count} tasks."
    names = [_shortened(name) for name in selected[:_NAMED]]
    more = len(selected) - len(names)
    last = f"{more} more" if more else names.pop()
    return f"Train on {len(selected)} of {count} tasks: {', '.join(names)} and {last}."


def lead_sentences(content: ReportContent) -> str:
    """What the decision is estimated to do, and whether it differs from all tasks."""
    difference = content.difference
    if difference is None or len(content.selected) == len(content.weights):
        return text.comparison_sentence(content)
    loss = content.row("chosen").loss
    side = "below" if difference.loss < 0 else "above"
    if difference.low > 0:
        verdict = "The difference is significant: all tasks are better."
    elif difference.high < 0:
        verdict = "The difference is significant."
    else:
        verdict = "The difference is not significant: the interval holds 0."
    return (
        f"The target's loss is estimated at {loss:.4f}, {abs(difference.loss):.4f} {side} that of "
        f"all tasks (90% interval {difference.low:+.4f} to {difference.high:+.4f}). {verdict}"
    )


def leave_one_out_sentences(content: ReportContent) -> list[str]:
    """What leaving out single tasks is estimated to do: the two ends, in words."""
    rows = sorted((row for row in content.rows if row.left_out), key=lambda row: row.loss)
    if len(rows) < 2:
        return []
    reference = content.row("all tasks").loss
    return [
        f"Without {_shortened(row.left_out or '')} the loss "
        f"{'falls' if row.loss < reference else 'rises'} by {abs(row.loss - reference):.4f}."
        for row in (rows[0], rows[-1])
    ]


def _shortened(name: str) -> str:
    """A name within a sentence; tables have it whole."""
    return text.shortened(text.printable(name), _LONGEST_NAME)


def _both_ends(rows: Sequence[Row]) -> list[Row]:
    """The rows with the lowest losses and those with the highest, if there are too many."""
    half = MAX_ROWS // 2
    return list(rows) if len(rows) <= MAX_ROWS else [*rows[:half], *rows[-half:]]


def _alignment(content: ReportContent) -> dict[str, float]:
    similarity = content.similarity
    if similarity is None:
        return {}
    return dict(zip(similarity.tasks, similarity.target, strict=True))


class _Scale:
    """Places losses on a track of 0 to 100."""

    def __init__(self, rows: Sequence[Row]) -> None:
        losses = [row.loss for row in rows]
        ends = [end for row in rows for end in (row.low, row.high)]
        # Intervals that reach far beyond all losses are cut off, so that losses stay apart.
        spread = max(max(losses, default=1.0) - min(losses, default=0.0), 1e-9)
        self.low = max(min(ends, default=0.0), min(losses, default=0.0) - 2 * spread)
        self.high = min(max(ends, default=1.0), max(losses, default=1.0) + 2 * spread)
        self.high = max(self.high, self.low + 1e-9)

    def place(self, loss: float) -> str:
        """Where a loss is, in percent of the track; at its end if it is beyond it."""
        share = (loss - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0.0), 1.0):.1f}"


def _data(content: ReportContent, what_if: WhatIf | None) -> Markup:
    """What the page's script reads: JSON that cannot end its element."""
    data: dict[str, Any] = {
        "weights": content.weights,
        "sizes": {task.name: task.rows for task in content.tasks},
        "rows": [
            {key: value for key, value in vars(row).items() if key != "group_losses"}
            for row in content.rows
            if not row.left_out and not row.added
        ],
    }
    if what_if is not None:
        data["whatIf"] = vars(what_if)
    if len(content.weights) > MAX_ROWS:
        left_out = {row.left_out: row for row in content.rows if row.left_out}
        data["search"] = [
            [name, weight, *((row.loss, row.low, row.high) if row else ())]
            for name, weight in content.weights.items()
            for row in [left_out.get(name)]
        ]
    encoded = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(encoded.replace("<", "\\u003c").replace("&", "\\u0026"))


def _policy(style: str, script: str) -> str:
    """A content security policy: this style, this script, and no network."""

    def digest(source: str) -> str:
        return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _asset(name: str) -> Markup:
    return Markup(files("hf_auxselect.report").joinpath(name).read_text("utf-8"))


@functools.cache
def _environment() -> Environment:
    """Templates in which every value is escaped, and names are isolated in their direction."""
    environment = Environment(
        loader=PackageLoader("hf_auxselect.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "mixture": text.mixture,
        "nats": text.nats,
        "moment": _moment,
        "name": _name,
        "shown": _shown,
        "level": lambda cosine: f"{'p' if cosine >= 0 else 'n'}{round(abs(cosine) * _LEVELS)}",
        "percent": "{:.1%}".format,
    }
    return environment


def _moment(value: str) -> str:
    """A date and time for readers; what is no ISO 8601 stays as it is."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return text.printable(value)


def _name(value: str) -> Markup:
    return Markup("<bdi>{}</bdi>").format(text.printable(value))


def _shown(value: Any) -> str:
    return text.printable(text.shown(value))
