"""The selection report: its content, with estimates for other choices, and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from hf_auxselect.estimators import AbstractEstimator, Estimate, FittedEstimator
from hf_auxselect.estimators.reliability import reliability_warnings
from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically
from hf_auxselect.layers import require_layers_record
from hf_auxselect.report import analysis, exports, figures, markdown, page, text
from hf_auxselect.report.content import ReportContent, ReportFields, SavedReport
from hf_auxselect.report.exports.rows import ROWS_NAME
from hf_auxselect.report.what_if import MAX_TASKS, WhatIf, approximate
from hf_auxselect.selectors import Selection
from hf_auxselect.store.arrays import GradientStore

REPORT_NAME = "report.json"
WHAT_IF_NAME = "what_if.json"
DECISION_NAME = "selection.json"


class _LastDecision(TypedDict):
    """What is read of a run's decisions; other keys are left alone."""

    switch_step: int


def step_name(step: int | str) -> str:
    """Directory of the files of a later selection, in that of the run."""
    return f"step_{step}"


@dataclass(kw_only=True)
class SelectionReport(ReportContent):
    """What a selection decided and why; made by the callback, read back by :meth:`load`.

    Attributes:
        selected: the tasks with a positive weight.
        weights: task -> fraction of the training examples; 0 for dropped tasks.
        rows: estimates of no further training, the chosen mixture, all tasks, the chosen weights in
            random order (of a chosen subset, random subsets of its size), the task with the
            target's name if there is one, all tasks without each one, and the chosen mixture with
            each dropped one (of more than 60 tasks, with the most similar ones).
        difference: the chosen mixture's loss minus that of all tasks, with its own interval.
        verification, calibration: ground-truth runs after and before the choice.
        confirmation: the finalists that were trained to confirm the choice, or None.
        evaluations: the target's loss and metrics at the switch and after training, if the trainer
            has ``compute_metrics``.
        layers: ``scores`` of layers and ``rates`` by them, or None.
        diagnostics: numbers that say how far to trust the estimates and the choice.
        warnings: what a reader should know before trusting the choice.

    The remaining fields are described in :class:`hf_auxselect.report.content.ReportFields`. Losses
    are nats per label token of the target.
    """

    what_if: WhatIf | None = None
    """The estimator in a form that the page evaluates; a file of its own."""
    gradients_directory: Path | None = None
    """Where the gradient store is, for :meth:`estimate`; not part of the JSON."""
    rows_file: Path | None = None
    """Where ``rows.jsonl`` is, for :meth:`export`; not part of the JSON."""
    _fitted: FittedEstimator | None = field(default=None, init=False, repr=False, compare=False)

    def attach_gradients(self, directory: Path, fitted: FittedEstimator | None = None) -> None:
        """Let :meth:`estimate` use a store of gradients.

        Args:
            directory: of the store.
            fitted: the estimator as it is fitted to the store and calibrated; None: it is fitted
                when it is first needed.
        """
        self.gradients_directory = directory
        self._fitted = fitted

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

    def gradients(self) -> GradientStore:
        """The stored gradients of the run.

        Raises:
            ValueError: they are not available.
        """
        if self.gradients_directory is None or not self.gradients_directory.is_dir():
            raise ValueError(
                "the report's gradient store is not available, so nothing can be estimated "
                f"(looked for {self.gradients_directory})."
            )
        return GradientStore.load(self.gradients_directory)

    def fitted(self, estimator: AbstractEstimator | None = None) -> FittedEstimator:
        """The estimator, fitted to the stored gradients and calibrated.

        Args:
            estimator: the one that the report was made with, where it is none of this package;
                None: it is made from the report's record of it.

        Raises:
            ValueError: the report's gradients or estimator are not available.
        """
        if self._fitted is None:
            if estimator is None:
                estimator = analysis.estimator_from(self.estimator)
            fitted = estimator.fit(self.gradients())
            self._fitted = analysis.calibrated(fitted, self.calibration)
        return self._fitted

    def add_estimates(
        self, fitted: FittedEstimator, selection: Selection, store: GradientStore, *, seed: int
    ) -> None:
        """Fill in what estimates and gradients tell of a selection.

        Args:
            fitted: the estimator that the selection was made with.
            selection: what was chosen.
            store: the gradients that the estimator was fitted to.
            seed: determines the random subsets.
        """
        names = store.task_names
        weights = {name: selection.weights[name] for name in names}
        directions = analysis.gradient_directions(store)
        shown = analysis.most_relevant(weights, *directions, MAX_TASKS)
        self.rows = analysis.compare(fitted, selection, store, shown, seed=seed)
        self.difference = analysis.compare_with_all_tasks(fitted, selection, store)
        after = fitted.task_losses(np.array([[*weights.values()]]))
        self.tasks = analysis.summarize_tasks(store, None if after is None else after[0])
        self.similarity = analysis.similarity(names, *directions, shown)
        self.what_if = approximate(fitted, names, store.task_sizes.tolist(), shown, seed=seed)
        self.target = analysis.summarize_tasks(store.target)[0]
        self.groups = [analysis.summarize_tasks(group)[0] for group in store.groups.values()]
        self.diagnostics = fitted.diagnostics() | selection.diagnostics
        training = store.remaining_training
        restarts = training is not None and training.restarts
        self.warnings += reliability_warnings(self.diagnostics, restarts=restarts)

    def metrics(self) -> dict[str, float]:
        """What the trainer logs of the selection."""
        metrics = {
            "auxselect/num_selected": float(len(self.selected)),
            "auxselect/seconds": float(self.run["seconds"]),
        }
        if self.rows:
            metrics["auxselect/estimated_loss"] = self.row("chosen").loss
            metrics["auxselect/estimated_loss_all"] = self.row("all tasks").loss
        if (race := self.confirmation) is not None:
            measured = {
                "auxselect/measured_loss": race.measured(race.winner),
                "auxselect/measured_loss_all": race.measured("all tasks"),
            }
            metrics |= {name: loss for name, loss in measured.items() if loss is not None}
        return metrics

    def compared_with_all_tasks(self) -> str:
        """One sentence on the chosen mixture and all tasks; empty without estimates."""
        return text.comparison_sentence(self)

    def agreement(self) -> str:
        """How the estimates agree with the ground-truth runs; empty if there are none."""
        return text.agreement_sentence(self)

    def to_text(self) -> str:
        """The report for the terminal."""
        return text.to_text(self)

    def to_markdown(self) -> str:
        """The report as a Markdown page."""
        return markdown.to_markdown(self)

    def to_html(self) -> str:
        """The report as one self-contained HTML page, which estimates other mixtures itself."""
        return page.to_html(self, self.what_if)

    def export(self, format: str, *, sources: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """The chosen mixture for another training tool, as the text of a file.

        One epoch of the file reads the chosen shares. It leaves out no row that the run itself
        reads after the selection, and repeats none that it need not. A comment in the file states
        the number of rows of each task and the shares that they make.

        Args:
            format: ``"trl"``, ``"axolotl"``, ``"llamafactory"``, ``"open-instruct"``,
                ``"ms-swift"`` or ``"datasets"`` (Python code); or ``"rows"``: the rows themselves,
                a line of JSON each, as the run wrote them to ``rows.jsonl``.
            sources: task -> where its data are, with the keys of an entry of TRL's ``datasets:``
                (``path``, ``name``, ``data_dir``, ``data_files``, ``split``, ``columns``). It is
                joined to the report's own ``sources``. A task without a source gets its name as
                the path, and a comment says so.

        Raises:
            ValueError: an unknown format; a source that is wrong, or that the tool cannot express;
                a report without the number of rows of a task; or there is no ``rows.jsonl``.
        """
        if format not in exports.FORMATS:
            raise ValueError(f"format must be one of {[*exports.FORMATS]}, got {format!r}.")
        if format != "rows":
            return exports.export(self, format, sources)
        if self.rows_file is None or not self.rows_file.is_file():
            raise ValueError(
                f"the rows of this selection are not available ({self.rows_file or 'rows.jsonl'} "
                "is missing). A run writes them when it switches to the mixture, which "
                "after='observe' does not."
            )
        return self.rows_file.read_text(encoding="utf-8")

    def to_dict(self) -> JsonDict:
        """The report as JSON values."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReportFields)}
        return {"selected": self.selected} | dataclasses.asdict(ReportFields(**content))

    def save(self, directory: str | Path) -> None:
        """Write the report's files into a directory.

        ``report.json``, ``README.md`` and ``index.html``; with estimates, ``what_if.json`` and the
        figures as PNG and SVG.
        """
        directory = Path(directory)
        write_atomically(directory / REPORT_NAME, to_json(self.to_dict()))
        if self.what_if is not None:
            write_atomically(directory / WHAT_IF_NAME, to_json(vars(self.what_if)))
        for name, content in figures.draw(self).items():
            write_atomically(directory / name, content)
        write_atomically(directory / "index.html", self.to_html())
        write_atomically(directory / "README.md", self.to_markdown())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        repo_type: str = "model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Push the report to the Hub, in one commit.

        A model repo gets a section in its card, metadata (base model, data sets, tags, the measured
        loss), and the files of the report under ``task_selection/``. The rest of the card stays. A
        dataset repo gets the tables as parquet files, too, which its viewer shows. A Space is
        static and shows the report's page. Pushing again replaces what was pushed before.

        Args:
            repo_id: ``user/name``, or ``name`` of the user who is logged in. Made if missing.
            repo_type: ``"model"``, ``"dataset"`` or ``"space"``.
            private: whether a repo that is made is private; None: as its owner has set.
            token: with write permission; None: that of ``hf auth login`` or ``HF_TOKEN``.
            revision: an existing branch; None: ``main``.

        Returns:
            The URL of the repo.

        Raises:
            ValueError: an argument is wrong.
            OSError: the Hub has not taken the report; the message says what to do.
        """
        from hf_auxselect.report import hub  # the client is slow to import

        return hub.push(
            self,
            repo_id,
            repo_type=repo_type,
            private=private,
            token=token,
            revision=revision,
            retries=hub.RETRIES,
        )

    @classmethod
    def load(cls, directory: str | Path) -> SelectionReport:
        """Read a report from its directory, or from the ``_task_selection`` directory above it.

        Of a run that has selected several times, the last report; those of later selections are in
        ``step_<n>`` of that directory, and the first one is in its ``report``.

        Raises:
            FileNotFoundError: there is no report.
            ValueError: the report is damaged; the message names the file.
        """
        directory = Path(directory)
        if not (directory / REPORT_NAME).is_file() and (directory / "report").is_dir():
            directory = _last_selection(directory) / "report"
        path = directory / REPORT_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"no selection report in {str(directory)!r}: {REPORT_NAME} is missing."
            )
        saved = read_json(path, SavedReport)
        if saved.layers is not None:
            try:
                require_layers_record(saved.layers)
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}).") from error
        report = cls(**{f.name: getattr(saved, f.name) for f in dataclasses.fields(ReportFields)})
        if (directory / WHAT_IF_NAME).is_file():
            report.what_if = read_json(directory / WHAT_IF_NAME, WhatIf)
        report.attach_gradients(directory.parent / "gradients")
        report.rows_file = directory / ROWS_NAME
        return report


def later_switch_step(directory: Path) -> int | None:
    """The switch step that the report of a run's directory is about; None: the run's first one."""
    if not any(directory.glob(step_name("*"))):
        return None
    step = read_json(directory / DECISION_NAME, _LastDecision)["switch_step"]
    return step if (directory / step_name(step) / "report" / REPORT_NAME).is_file() else None


def _last_selection(directory: Path) -> Path:
    """Where the files of a run's last selection are."""
    step = later_switch_step(directory)
    return directory if step is None else directory / step_name(step)
