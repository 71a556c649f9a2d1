"""The selection report: what was chosen, what was expected of the alternatives, and from what.

A report is a record of plain values; ``save`` renders it as JSON, Markdown and a picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_auxselect.estimators import (
    ESTIMATORS,
    AbstractEstimator,
    Estimate,
    FittedCalibrated,
    FittedEstimator,
)
from hf_auxselect.estimators.reliability import doubts_about
from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically
from hf_auxselect.selectors.base import RandomEnsemble, Selection, Step
from hf_auxselect.store.arrays import GradientStore

REPORT_NAME = "report.json"
PICTURE_NAME = "left_out.png"
NUM_RANDOM_SUBSETS = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison: a mixture and its estimated loss, nats per label token.

    For random subsets ``loss`` is the mean over them, ``low`` and ``high`` their 5% and 95%
    quantiles; for all others they are the 90% interval of the estimate.
    """

    name: str
    left_out: str | None = None
    """The task that is left out of all tasks, in rows of that kind."""
    loss: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """What the pass saw of one task."""

    name: str
    rows: int
    captured: int
    label_tokens: int
    """Label tokens of the captured examples."""
    loss: float
    """At the anchor, nats per label token."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A mixture on which the rest of the run was trained for real, next to its estimate.

    Losses are of the target, nats per label token; ``low`` and ``high`` are the estimate's 90%
    interval.
    """

    name: str
    weights: dict[str, float]
    """Task -> share of the training examples."""
    estimated: float
    low: float
    high: float
    measured: float
    seconds: float


@dataclass(kw_only=True)
class _Content:
    """What a report holds, as its JSON does; documented below."""

    weights: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    difference: Row | None = None
    tasks: list[TaskSummary] = field(default_factory=list)
    target: TaskSummary | None = None
    history: list[Step] = field(default_factory=list)
    verification: list[Measurement] = field(default_factory=list)
    calibration: list[Measurement] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    estimator: JsonDict = field(default_factory=dict)
    selector: JsonDict = field(default_factory=dict)
    run: JsonDict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Record(_Content):
    """The JSON of a report."""

    selected: list[str]


@dataclass(kw_only=True)
class SelectionReport(_Content):
    """What a selection decided and why; made by the callback, read back by :meth:`load`.

    Attributes:
        weights: task -> share of the training examples; 0 for dropped tasks.
        scores: task -> score of the selector, if it has them.
        rows: estimates of no further training, the chosen mixture, all tasks, random subsets
            of the chosen size, and all tasks without each one.
        difference: the chosen mixture's loss less that of all tasks; its interval is narrower than
            theirs, which share errors.
        tasks: what was captured of each task; ``target`` of the target.
        history: every mixture the selector tried.
        verification: mixtures that were trained for real (``verify=n``), the chosen one first.
        calibration: mixtures that were trained for real before the choice (``calibrate=n``), beside
            the estimates that they have put right since.
        diagnostics: numbers that say how far to trust the estimates.
        estimator, selector: name and options of the strategies.
        run: switch step, mode, seed, model, versions, seconds.
        warnings: what a reader should know before trusting the choice.
    """

    gradients_directory: Path | None = None
    """Where the gradient store is, for :meth:`estimate`; not part of the JSON."""
    _fitted: FittedEstimator | None = field(default=None, repr=False)

    @property
    def selected(self) -> list[str]:
        """The tasks with a share, in the order of the training set."""
        return [task for task, weight in self.weights.items() if weight > 0]

    def row(self, name: str) -> Row:
        """The line of the comparison called ``name``."""
        return next(row for row in self.rows if row.name == name)

    def estimate(self, tasks: Iterable[str] | Mapping[str, float] | np.ndarray) -> Estimate:
        """Estimate the target's loss for other choices, from the stored gradients.

        Args:
            tasks: names of a subset; or a mapping from names to weights; or an array [M, K] of
                subset masks (bool) or weights, tasks in the order of ``weights``.

        Returns:
            M losses (1 for names or a mapping) with 90% intervals, nats per label token.

        Raises:
            ValueError: an unknown task; or the report's gradients or estimator are not available.
        """
        names = list(self.weights)
        if isinstance(tasks, np.ndarray):
            return self.fitted().estimate(tasks)
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be several names or a mapping, got the string {tasks!r}.")
        given = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, True)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; the report knows {names}.")
        weights = np.array([[given.get(name, 0) for name in names]])
        return self.fitted().estimate(weights if isinstance(tasks, Mapping) else weights == 1)

    def fitted(self) -> FittedEstimator:
        """The estimator, fitted to the stored gradients.

        Raises:
            ValueError: the report's gradients or estimator are not available.
        """
        if self._fitted is None:
            if self.gradients_directory is None or not self.gradients_directory.is_dir():
                raise ValueError(
                    "the report's gradient store is not available, so nothing can be estimated "
                    f"(looked for {self.gradients_directory})."
                )
            store = GradientStore.load(self.gradients_directory)
            fitted = estimator_from(self.estimator).fit(store)
            self._fitted = calibrated(fitted, self.calibration)
        return self._fitted

    def add_estimates(
        self, fitted: FittedEstimator, selection: Selection, store: GradientStore, *, seed: int
    ) -> None:
        """Fill in what estimates and gradients tell of a selection; ``seed``: of random subsets."""
        self.rows = compare(fitted, selection, store.task_names, seed=seed)
        self.difference = compare_with_all_tasks(fitted, selection, store.task_names)
        self.tasks = summarize_tasks(store)
        self.target = summarize_tasks(store.target)[0]
        self.diagnostics = fitted.diagnostics()
        training = store.metadata.get("training") or {}
        restarts = training.get("after") == "restart"
        self.warnings += doubts_about(self.diagnostics, restarts=restarts)

    def metrics(self) -> dict[str, float]:
        """What the trainer logs of the selection."""
        metrics = {
            "auxselect/num_selected": float(len(self.selected)),
            "auxselect/seconds": float(self.run["seconds"]),
        }
        if self.rows:
            metrics["auxselect/estimated_loss"] = self.row("chosen").loss
            metrics["auxselect/estimated_loss_all"] = self.row("all tasks").loss
        return metrics

    def to_dict(self) -> JsonDict:
        """The report as JSON values."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Content)}
        return {"selected": self.selected} | dataclasses.asdict(_Content(**record))

    def save(self, directory: str | Path) -> None:
        """Write ``report.json``, ``README.md`` and, with estimates, ``left_out.png``."""
        directory = Path(directory)
        write_atomically(directory / REPORT_NAME, to_json(self.to_dict()))
        if any(row.left_out for row in self.rows):
            write_atomically(directory / PICTURE_NAME, self._draw_left_out())
        write_atomically(directory / "README.md", self.to_markdown())

    @classmethod
    def load(cls, directory: str | Path) -> SelectionReport:
        """Read a report from its directory, or from the ``_task_selection`` directory above it.

        Raises:
            FileNotFoundError: there is no report.
            ValueError: the report is damaged; the message names the file.
        """
        directory = Path(directory)
        if not (directory / REPORT_NAME).is_file() and (directory / "report").is_dir():
            directory = directory / "report"
        path = directory / REPORT_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"no selection report in {str(directory)!r}: {REPORT_NAME} is missing."
            )
        record = read_json(path, _Record)
        report = cls(**{f.name: getattr(record, f.name) for f in dataclasses.fields(_Content)})
        report.gradients_directory = directory.parent / "gradients"
        return report

    def to_text(self) -> str:
        """The comparison as a table for the terminal."""
        title = f"Selected {len(self.selected)} of {len(self.weights)} tasks"
        lines = [f"{title}: {', '.join(printable(name) for name in self.selected)}"]
        if self.rows:
            width = max(len(printable(row.name)) for row in self.rows)
            lines.append(f"{'estimated target loss, nats/token':>{width + 20}}")
            for row in self.rows:
                name = printable(row.name)
                lines.append(f"  {name:<{width}}  {row.loss:7.4f}  [{row.low:.4f}, {row.high:.4f}]")
            lines += [self.compared_with_all_tasks()] if self.difference else []
        if self.verification:
            width = max(len(printable(one.name)) for one in self.verification)
            lines.append(f"{'measured by real fine-tunes, and estimated':>{width + 29}}")
            lines += [
                f"  {printable(one.name):<{width}}  {one.measured:7.4f}  {one.estimated:7.4f}  "
                f"[{one.low:.4f}, {one.high:.4f}]"
                for one in self.verification
            ]
            lines.append(f"  {self.agreement()}")
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])

    def compared_with_all_tasks(self) -> str:
        """One sentence on the chosen mixture next to all tasks; empty without estimates."""
        if self.difference is None:
            return ""
        if abs(self.difference.loss) < 1e-12:
            return "The chosen mixture is that of all tasks."
        text = (
            f"The chosen mixture, less all tasks: {self.difference.loss:+.4f} "
            f"[{self.difference.low:+.4f}, {self.difference.high:+.4f}]"
        )
        if self.difference.low > 0:
            return f"{text}: by these estimates all tasks are better."
        if self.difference.high >= 0:
            return f"{text}: by these estimates it cannot be told from all tasks."
        return f"{text}."

    def agreement(self) -> str:
        """One sentence on how the estimates agree with what was measured; empty if nothing was."""
        if not self.verification:
            return ""
        measured = np.array([one.measured for one in self.verification])
        estimated = np.array([one.estimated for one in self.verification])
        inside = sum(one.low <= one.measured <= one.high for one in self.verification)
        error = np.mean(np.abs(estimated - measured) / measured)
        text = (
            f"Estimates err by {error:.1%} on average; {inside} of {len(measured)} intervals hold "
            "the measured loss."
        )
        by_name = {one.name: one.measured for one in self.verification}
        if {"chosen", "all tasks"} <= by_name.keys():
            gain = by_name["all tasks"] - by_name["chosen"]
            text += f" The chosen mixture ends {abs(gain):.4f} nats "
            text += "below all tasks." if gain > 0 else "above all tasks: the choice did not win."
        return text

    def to_markdown(self) -> str:
        """The report as a Markdown page."""
        chosen = ", ".join(f"**{escape_markdown(name)}**" for name in self.selected)
        lines = [
            "# Task selection",
            "",
            f"Selected {len(self.selected)} of {len(self.weights)} auxiliary tasks: {chosen}.",
            "",
        ]
        for text in self.warnings:
            lines += [f"> **Warning.** {escape_markdown(text)}", ""]
        if self.rows:
            lines += [
                "## Estimated loss of the target after fine-tuning",
                "",
                "Nats per label token; lower is better. Intervals hold 90% (for random subsets: "
                f"90% of {NUM_RANDOM_SUBSETS} subsets), by the estimator's own account.",
                "",
                *_table(
                    ["trained on", "loss", "low", "high"],
                    [
                        [row.name, f"{row.loss:.4f}", f"{row.low:.4f}", f"{row.high:.4f}"]
                        for row in self.rows
                    ],
                ),
                "",
                escape_markdown(self.compared_with_all_tasks()),
                "",
                f"![Estimated loss when each task is left out]({PICTURE_NAME})",
                "",
            ]
        if self.verification:
            lines += ["## Checked by real fine-tunes", "", self.agreement(), ""]
            lines += [*_measurements(self.verification), ""]
        if self.calibration:
            seconds = sum(one.seconds for one in self.calibration)
            lines += ["## Calibrated by real fine-tunes", ""]
            lines += [f"Before the calibration; the fine-tunes took {seconds:.0f} seconds.", ""]
            lines += [*_measurements(self.calibration), ""]
        lines += ["## Mixture", ""]
        headers = ["task", "share of examples"] + (["score"] if self.scores else [])
        lines += _table(
            headers,
            [
                [name, f"{weight:.4f}"]
                + (
                    [f"{self.scores[name]:.4f}" if name in self.scores else "–"]
                    if self.scores
                    else []
                )
                for name, weight in self.weights.items()
            ],
        )
        if self.tasks and self.target:
            key = "" if self.target.name == "target" else f"{self.target.name} "
            lines += ["", "## What the gradient pass saw", ""]
            lines += _table(
                ["task", "rows", "captured", "label tokens", "loss before the switch"],
                [
                    [t.name, str(t.rows), str(t.captured), str(t.label_tokens), f"{t.loss:.4f}"]
                    for t in [*self.tasks, dataclasses.replace(self.target, name=f"{key}(target)")]
                ],
            )
        for title, record in [
            ("Diagnostics", self.diagnostics),
            ("Estimator", self.estimator),
            ("Selector", self.selector),
            ("Run", self.run),
        ]:
            if record:
                lines += ["", f"## {title}", ""]
                lines += _table(["", ""], [[key, _show(value)] for key, value in record.items()])
        return "\n".join(lines) + "\n"

    def _draw_left_out(self) -> bytes:
        """PNG: estimated loss of all tasks without each one, with intervals, best first."""
        import io

        from matplotlib.figure import Figure

        rows = sorted((row for row in self.rows if row.left_out), key=lambda row: row.loss)
        figure = Figure(figsize=(7.5, 1.8 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        losses = np.array([row.loss for row in rows])
        errors = np.array(
            [[row.loss - row.low for row in rows], [row.high - row.loss for row in rows]]
        )
        all_tasks, chosen = self.row("all tasks"), self.row("chosen")
        errors = np.maximum(errors, 0.0)  # a loss below 0 lies outside of its interval
        kept = np.array([self.weights[row.left_out or ""] > 0 for row in rows])
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
        axes.set_yticks(places, [_short(printable(row.left_out or "")) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("estimated target loss, nats per label token (90% interval)")
        axes.set_title("All tasks but one: left of the dashed line, the task does harm")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for text in [*axes.get_yticklabels(), axes.title]:
            text.set_parse_math(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def compare(
    fitted: FittedEstimator, selection: Selection, task_names: Sequence[str], *, seed: int
) -> list[Row]:
    """Estimate what a reader wants to compare the choice with; see :class:`SelectionReport`."""
    num_tasks = len(task_names)
    chosen = np.array([[selection.weights[name] for name in task_names]])
    subset_size = len(selection.selected)
    random = RandomEnsemble(
        num_subsets=NUM_RANDOM_SUBSETS, subset_size=subset_size, seed=seed
    ).subsets(num_tasks)
    everything = np.ones((1, num_tasks), bool)
    left_out = everything & ~np.eye(num_tasks, dtype=bool)

    def rows(names: Sequence[str], weights: np.ndarray) -> list[Row]:
        return _rows(names, fitted.estimate(weights))

    losses = fitted.estimate(random).loss
    low, high = np.quantile(losses, [0.05, 0.95])
    lines = rows(["no further training"], np.zeros((1, num_tasks)))
    lines += rows(["chosen"], chosen) + rows(["all tasks"], everything)
    lines.append(
        Row(
            name=f"random {subset_size} of {num_tasks} tasks",
            loss=float(losses.mean()),
            low=float(low),
            high=float(high),
        )
    )
    without = rows([f"all without {name}" for name in task_names], left_out)
    return lines + [
        dataclasses.replace(row, left_out=name)
        for row, name in zip(without, task_names, strict=True)
    ]


def calibrated(fitted: FittedEstimator, anchors: Sequence[Measurement]) -> FittedEstimator:
    """The estimator put right by mixtures that were trained for real, if there are any."""
    if not anchors:
        return fitted
    weights = np.array([[*one.weights.values()] for one in anchors])
    return FittedCalibrated(fitted, weights, [one.measured for one in anchors])


def _measurements(measurements: Sequence[Measurement]) -> list[str]:
    return _table(
        ["trained on", "measured", "estimated", "low", "high", "seconds"],
        [
            [
                one.name,
                *(f"{x:.4f}" for x in (one.measured, one.estimated, one.low, one.high)),
                f"{one.seconds:.1f}",
            ]
            for one in measurements
        ],
    )


def compare_with_all_tasks(
    fitted: FittedEstimator, selection: Selection, task_names: Sequence[str]
) -> Row:
    """The chosen mixture's loss less that of all tasks."""
    chosen = np.array([[selection.weights[name] for name in task_names]])
    difference = fitted.difference(chosen, np.ones(len(task_names), bool))
    return _rows(["chosen, less all tasks"], difference)[0]


def _rows(names: Sequence[str], estimate: Estimate) -> list[Row]:
    return [
        Row(name=name, loss=float(loss), low=float(low), high=float(high))
        for name, loss, low, high in zip(
            names, estimate.loss, estimate.low, estimate.high, strict=True
        )
    ]


def summarize_tasks(store: GradientStore) -> list[TaskSummary]:
    """What a store holds of each of its tasks."""
    counts = np.bincount(store.task_ids, minlength=len(store.task_names))
    tokens = np.bincount(store.task_ids, store.num_label_tokens, minlength=len(store.task_names))
    return [
        TaskSummary(
            name=name,
            rows=int(store.task_sizes[k]),
            captured=int(counts[k]),
            label_tokens=int(tokens[k]),
            loss=float(store.task_losses[k]),
        )
        for k, name in enumerate(store.task_names)
    ]


def strategy_record(strategy: Any) -> JsonDict:
    """Name and options of an estimator or selector, as JSON values.

    An option that is an estimator itself becomes a record of the same form.
    """
    options = (
        {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)}
        if dataclasses.is_dataclass(strategy)
        else {}
    )
    return {"name": type(strategy).__name__} | json.loads(
        json.dumps(
            options,
            default=lambda value: (
                strategy_record(value) if isinstance(value, AbstractEstimator) else repr(value)
            ),
        )
    )


def estimator_from(record: JsonDict) -> Any:
    """The estimator that :func:`strategy_record` described.

    Raises:
        ValueError: it, or an estimator among its options, is not one of this package.
    """
    options = {
        option: estimator_from(value) if isinstance(value, dict) else value
        for option, value in record.items()
    }
    name = options.pop("name", None)
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; known are {sorted(ESTIMATORS)}.")
    return ESTIMATORS[name](**options)


def printable(text: str) -> str:
    """A name for the terminal: colours, newlines, right-to-left marks and the like escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_markdown(text: str) -> str:
    """A text that Markdown, and HTML within it, shows as it is."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|~$" else c for c in text)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers)]
    body = [[escape_markdown(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [*lines, *body]]


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
