"""What a report holds: plain records, as its JSON has them. Rendering sees nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_auxselect.files import JsonDict
from hf_auxselect.selectors import Step

NUM_RANDOM_SUBSETS = 200
"""Random subsets that a report compares the choice with. A convention: 5% and 95% quantiles of
200 losses have a standard error of about 0.15 of their standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison: a mixture and its estimated loss, nats per label token.

    For random subsets ``loss`` is the mean over them, and ``low`` and ``high`` are their 5% and 95%
    quantiles; otherwise ``low`` and ``high`` bound the 90% interval of the estimate.
    """

    name: str
    left_out: str | None = None
    """The task that is left out of all tasks, in rows of that kind."""
    added: str | None = None
    """The task that is added to the chosen mixture, in rows of that kind."""
    loss: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """What the gradient pass read of one task."""

    name: str
    rows: int
    captured: int
    label_tokens: int
    """Label tokens of the captured examples."""
    loss: float
    """At the switch, nats per label token."""
    loss_after: float | None = None
    """Estimated for the end of training on the chosen mixture; None if it is not estimated."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Cosines between the mean gradients of tasks: above 0, training on one also serves the other.

    In the optimizer's coordinates if the estimator captured them so.
    """

    tasks: list[str]
    """In the order of a clustering: similar tasks are neighbours."""
    cosines: list[list[float]]
    """[task, task]"""
    target: list[float]
    """Cosine of each task with the target."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of a ground-truth run on a mixture, next to its estimate.

    Losses are of the target, nats per label token; ``low`` and ``high`` bound the estimate's 90%
    interval.
    """

    name: str
    weights: dict[str, float]
    """Task -> fraction of the training examples."""
    estimated: float
    low: float
    high: float
    measured: float
    seconds: float


class RunRecord(TypedDict, total=False):
    """What a report tells of the run that it was made in."""

    created: str
    """When the decision was made: ISO 8601, UTC."""
    after: str
    switch_step: int
    max_steps: int
    keep: list[str]
    seed: int
    model: str
    adapter: bool
    """Whether an adapter was trained, not the model itself."""
    final_loss: float
    """The target's loss that the trainer logged after its last step, nats per label token."""
    versions: dict[str, str]
    reads_per_row: dict[str, float]
    """How often the steps after the switch read each row of a task."""
    rows_to_read: int
    """Rows of the training set that the steps after the switch read."""
    rows_per_task: dict[str, int]
    examples_per_row: dict[str, float]
    """Mean number of examples in a row of each task, where rows are packed."""
    gradient_pass_seconds: float
    seconds: float
    """Of the whole selection, the gradient pass and calibration runs included."""


@dataclass(kw_only=True)
class ReportFields:
    """The fields of a report.

    Attributes:
        weights: task -> fraction of the training examples; 0 for dropped tasks.
        scores: task -> score, if the selector has scores.
        rows: estimates of no further training, the chosen mixture, all tasks, random subsets of the
            chosen size, the task with the target's name if there is one, all tasks without each
            one, and the chosen mixture with each dropped one (of more than 60 tasks, with the
            most similar ones).
        difference: the chosen mixture's loss minus that of all tasks. Its interval is narrower than
            the intervals of the two losses, whose errors are shared.
        tasks: what was captured of each task; ``target``: of the target.
        similarity: of the tasks' gradients; None without gradients.
        history: every mixture the selector tried.
        verification: ground-truth runs after the choice (``verify=n``), the chosen mixture first.
        calibration: ground-truth runs before the choice (``calibrate=n``), next to the estimates
            before calibration.
        diagnostics: numbers that say how far to trust the estimates and the choice.
        estimator, selector: name and options of the strategies.
        run: date, switch step, mode, seed, model, versions, seconds.
        sources: task -> where its data come from, as an entry of TRL's ``datasets:`` (``path``,
            ``name``, ``split``, ...), for exports and the model card; empty where it is not known.
        warnings: what a reader should know before trusting the choice.
    """

    weights: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    difference: Row | None = None
    tasks: list[TaskSummary] = field(default_factory=list)
    target: TaskSummary | None = None
    similarity: Similarity | None = None
    history: list[Step] = field(default_factory=list)
    verification: list[Measurement] = field(default_factory=list)
    calibration: list[Measurement] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    estimator: JsonDict = field(default_factory=dict)
    selector: JsonDict = field(default_factory=dict)
    run: RunRecord = field(default_factory=RunRecord)
    sources: dict[str, JsonDict] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class SavedReport(ReportFields):
    """The JSON of a report: its fields, and the selected tasks for other programs that read it."""

    selected: list[str]


@dataclass(kw_only=True)
class ReportContent(ReportFields):
    """The fields of a report, and what follows from them."""

    @property
    def selected(self) -> list[str]:
        """The tasks with a positive weight, in the order of the training set."""
        return [task for task, weight in self.weights.items() if weight > 0]

    def row(self, name: str) -> Row:
        """The line of the comparison called ``name``: ``"chosen"``, ``"all tasks"``, ...

        Raises:
            KeyError: there is no such line.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}.")
