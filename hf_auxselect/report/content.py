"""What a report holds: plain records, as its JSON has them. Rendering sees nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_auxselect.files import JsonDict
from hf_auxselect.layers import LayersRecord
from hf_auxselect.selectors import Step

NUM_RANDOM_SUBSETS = 200
"""Random subsets that a report compares the choice with. A convention: 5% and 95% quantiles of
200 losses have a standard error of about 0.15 of their standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison: a mixture and its estimated loss, nats per label token.

    For random mixtures ``loss`` is the mean over them, and ``low`` and ``high`` are their 5% and
    95% quantiles; otherwise ``low`` and ``high`` bound the 90% interval of the estimate.
    """

    name: str
    left_out: str | None = None
    """The task that is left out of all tasks, in rows of that kind."""
    added: str | None = None
    """The task that is added to the chosen mixture, in rows of that kind."""
    loss: float
    low: float
    high: float
    group_losses: dict[str, float] = field(default_factory=dict)
    """Estimated loss of each group, nats per its label token."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 90% interval."""

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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The target as the trainer evaluates it, with the metrics of its ``compute_metrics``."""

    step: int
    """Optimizer steps of the run that the evaluated model has been trained for."""
    loss: float | None
    """Nats per label token; None: not finite."""
    metrics: dict[str, float]
    """What ``compute_metrics`` returns, by its own names; the finite numbers among it."""


@dataclass(frozen=True, kw_only=True)
class GroupLine:
    """Losses of one group, nats per its label token, as tables show them."""

    name: str
    before: float
    """Without further training."""
    all_tasks: float
    chosen: float
    price: float | None
    """Shadow price of its ceiling; None if it has none."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A mixture that was trained before the switch, to see whether the run should go on with it.

    Losses are of the target, nats per label token; ``low`` and ``high`` bound the estimate's 90%
    interval. They are None without estimates.
    """

    name: str
    weights: dict[str, float]
    """Task -> fraction of the training examples."""
    estimated: float | None = None
    low: float | None = None
    high: float | None = None
    losses: list[float | None]
    """Measured, at the first steps of the race; None: not finite. A finalist that was dropped has
    fewer than the race has steps."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Race:
    """The finalists of ``confirm=n``, and which one the run goes on with.

    Attributes:
        finalists: in the order that decides between equal losses.
        steps: optimizer steps of the run at which the finalists were measured, ascending; empty if
            there was one finalist only, which was not trained.
        winner: name of the finalist that goes on.
        choice: name of the selector's choice.
        asked: number of finalists that were asked for.
        share: of the remaining steps, that the race was about.
    """

    finalists: list[Finalist]
    steps: list[int]
    winner: str
    choice: str
    asked: int
    share: float

    def finalist(self, name: str) -> Finalist:
        """The finalist of this name."""
        return next(one for one in self.finalists if one.name == name)

    def measured(self, name: str) -> float | None:
        """A finalist's loss at the end of the race; None if it was dropped or is not finite."""
        losses = self.finalist(name).losses
        return losses[-1] if losses and len(losses) == len(self.steps) else None

    def verdict(self, finalist: Finalist) -> str:
        """What became of a finalist, in a word or two; empty if it lost at the end."""
        if finalist.name == self.winner:
            return "won"
        last = len(finalist.losses)
        return f"dropped at step {self.steps[last - 1]}" if 0 < last < len(self.steps) else ""


@dataclass(frozen=True, kw_only=True)
class DecisionLine:
    """A selection of a run that selects several times, or a test that let none be made.

    Losses are of the target of this selection, nats per label token; ``low`` and ``high`` bound the
    estimate's 90% interval.
    """

    step: int
    """Of the switch."""
    target: str
    weights: dict[str, float]
    """Task -> share of the examples that the run reads from here on; those above 0."""
    loss: float | None = None
    """Measured at the switch; None: it was not measured or is not finite."""
    estimated: float | None = None
    """For the end of the run; None without estimates."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    """Of the test of whether the target has changed; None: there was no test."""
    is_selection: bool = True
    """False: the test let no selection be made."""
    averaged_with: int | None = None
    """Switch step of the earlier selection whose mixture is part of this one; None: none is."""

    @property
    def result(self) -> str:
        """What was decided, in a few words."""
        if not self.is_selection:
            return "target not significantly different: not selected again"
        if self.averaged_with is not None:
            return f"new choice, averaged with the mixture of step {self.averaged_with}"
        return "new choice"


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
    """Of the whole selection: gradient pass, calibration and confirmation included."""


@dataclass(kw_only=True)
class ReportFields:
    """The fields of a report.

    Attributes:
        weights: task -> fraction of the training examples; 0 for dropped tasks.
        scores: task -> score, if the selector has scores; ``score_intervals``: their 90%
            intervals, about which subsets were drawn.
        rows: estimates of no further training, the chosen mixture, all tasks, the chosen weights in
            random order (of a chosen subset, random subsets of its size), the task with the
            target's name if there is one, all tasks without each one, and the chosen mixture with
            each dropped one (of more than 60 tasks, with the most similar ones).
        difference: the chosen mixture's loss minus that of all tasks. Its interval is narrower than
            the intervals of the two losses, whose errors are shared.
        tasks: what was captured of each task; ``target``: of the target.
        groups: what was captured of the groups, further targets whose losses are estimated.
        shadow_prices: group -> decrease of the target's loss for each nat by which the group's
            ceiling rises, or its weight in the worst case; empty for other selectors.
        similarity: of the tasks' gradients; None without gradients.
        history: the mixtures that the selector tried; of searches over more than 64 tasks, the best
            of each step.
        verification: ground-truth runs after the choice (``verify=n``), the chosen mixture first.
        calibration: ground-truth runs before the choice (``calibrate=n``), next to the estimates
            before calibration.
        confirmation: the finalists that were trained before the switch (``confirm=n``).
        evaluations: the target's loss and metrics, measured at the switch and after training; empty
            if the trainer has no ``compute_metrics``.
        layers: scores of layers and what was chosen by them (``layers=LayerSelection(...)``).
        decisions: where a run selects several times (``reselect``), all its selections so far;
            the other fields are about the last one.
        diagnostics: numbers that say how far to trust the estimates and the choice.
        estimator, selector: name and options of the strategies.
        run: date, switch step, mode, seed, model, versions, seconds.
        sources: task -> where its data come from, as an entry of TRL's ``datasets:`` (``path``,
            ``name``, ``split``, ...), for exports and the model card; empty where it is not known.
        warnings: what a reader should know before trusting the choice.
    """

    weights: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    score_intervals: dict[str, Interval] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    difference: Row | None = None
    tasks: list[TaskSummary] = field(default_factory=list)
    target: TaskSummary | None = None
    groups: list[TaskSummary] = field(default_factory=list)
    shadow_prices: dict[str, float] = field(default_factory=dict)
    similarity: Similarity | None = None
    history: list[Step] = field(default_factory=list)
    verification: list[Measurement] = field(default_factory=list)
    calibration: list[Measurement] = field(default_factory=list)
    confirmation: Race | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    layers: LayersRecord | None = None
    decisions: list[DecisionLine] = field(default_factory=list)
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

    @property
    def group_lines(self) -> list[GroupLine]:
        """The estimated losses of the groups; empty without groups."""
        if not self.groups or not self.rows:
            return []
        before, everything, chosen = (
            self.row(name).group_losses for name in ("no further training", "all tasks", "chosen")
        )
        return [
            GroupLine(
                name=group.name,
                before=before[group.name],
                all_tasks=everything[group.name],
                chosen=chosen[group.name],
                price=self.shadow_prices.get(group.name),
            )
            for group in self.groups
            if group.name in before
        ]

    @property
    def metric_names(self) -> list[str]:
        """The metrics of the evaluations."""
        return list(dict.fromkeys(name for one in self.evaluations for name in one.metrics))

    def row(self, name: str) -> Row:
        """The line of the comparison called ``name``: ``"chosen"``, ``"all tasks"``, ...

        Raises:
            KeyError: there is no such line.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}.")
