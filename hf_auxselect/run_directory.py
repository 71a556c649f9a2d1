"""The files of a run under ``<output_dir>/_task_selection/``.

The main process writes them, and an error on it is raised on all processes: each of them must call
the methods that write.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hf_auxselect.distributed import on_main_process
from hf_auxselect.files import read_json, to_json, write_atomically
from hf_auxselect.plan import Plan, PlanRecord, require_same_plan
from hf_auxselect.report.content import DecisionLine
from hf_auxselect.report.exports.rows import ROWS_NAME, row_lines
from hf_auxselect.report.report import DECISION_NAME, SelectionReport, step_name
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.checkpoints import (
    ConfirmationRecord,
    Decision,
    DriftTest,
    SavedDecision,
    clusters_of,
)

logger = logging.getLogger(__name__)

DIRECTORY_NAME = "_task_selection"
"""Under the output directory; Trainer leaves names with an underscore out of its Hub uploads."""


@dataclass(frozen=True)
class RunDirectory:
    """Reads and writes the files of one run."""

    path: Path

    def at(self, plan: Plan, step: int) -> RunDirectory:
        """Where the files of the selection after a step are: of the first one, this directory."""
        return self if step == plan.switch_steps[0] else RunDirectory(self.path / step_name(step))

    @property
    def gradients(self) -> Path:
        """Where the gradient store is."""
        return self.path / "gradients"

    @property
    def cluster_gradients(self) -> Path:
        """Where the gradient store of all training rows is, by which they are clustered."""
        return self.path / "cluster_gradients"

    @property
    def clusters(self) -> Path:
        """The file with the cluster of each training row."""
        return self.path / "clusters.json"

    @property
    def decision(self) -> Path:
        """The file of the run's decisions."""
        return self.path / DECISION_NAME

    @property
    def drift_gradients(self) -> Path:
        """Where the gradients of the targets that a test compares are."""
        return self.path / "drift_gradients"

    def ground_truth_runs(self, plan: Plan, step: int) -> Path:
        """The file of what ground-truth runs from the switch after a step have measured."""
        later = "" if step == plan.switch_steps[0] else f"_{step_name(step)}"
        return self.path / f"ground_truth_runs{later}.json"

    def start(self, plan: Plan) -> Plan:
        """Write the plan of a new run, and delete what an earlier one has decided.

        What ground-truth runs have measured stays: it counts only from the same state and data, so
        that a run that was stopped before its first checkpoint finds it again.

        Raises:
            OSError: the directory cannot be written to; names ``output_dir``.
        """

        def write() -> None:
            try:
                write_atomically(self._plan, to_json(plan.to_dict()))
            except OSError as error:
                raise OSError(
                    f"output_dir: cannot write to {str(self.path)!r} ({error.strerror}); "
                    "pass output_dir=... to TaskSelectionCallback, or change the trainer's."
                ) from error
            self.decision.unlink(missing_ok=True)
            self.clusters.unlink(missing_ok=True)
            shutil.rmtree(self._report, ignore_errors=True)  # its pictures would be of that run
            for later in self.path.glob(step_name("*")):
                shutil.rmtree(later)

        on_main_process(write)
        return plan

    def read_plan(self) -> PlanRecord | None:
        """What is on disk of the plan of the run that is resumed; None: it had none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._plan
        # Read on one process: another would find a plan that the main process has just written.
        return on_main_process(lambda: read_json(path, PlanRecord) if path.is_file() else None)

    def resume(self, plan: Plan, on_disk: PlanRecord | None) -> Plan:
        """The plan of the resumed run, which selects when the one on disk does.

        Args:
            plan: as the options ask for it, with the seed on disk.
            on_disk: from :meth:`read_plan`; None: the run gets this plan.

        Raises:
            ValueError: the run on disk is another one; names what differs.
        """
        if on_disk is None:
            logger.info("resuming a run that was started without a task selection.")
            return self.start(plan)
        require_same_plan(plan, on_disk, self._plan)
        asked, step = plan.switch_steps[0], on_disk["switch_step"]
        if asked != step:
            logger.warning(
                "warmup asks for a first selection after step %d, but in the run that is resumed "
                "it is after step %d, which stands. To change it, start anew in another "
                "output_dir.",
                asked,
                step,
            )
        return plan.starting_at(step)

    def save_initial(self, initial: dict[str, Tensor]) -> None:
        """Write the trainable parameters of step 0."""
        on_main_process(lambda: write_atomically(self._initial, save(initial)))

    def load_initial(self) -> dict[str, Tensor] | None:
        """Read the trainable parameters of step 0; None, with a warning, if the file is missing.

        Raises:
            ValueError: the file is damaged.
        """
        if not self._initial.is_file():
            logger.warning(
                "%s is missing; a restart goes back to the parameters the trainer was made with.",
                self._initial,
            )
            return None
        try:
            return load_file(self._initial)
        except SafetensorError as error:
            raise ValueError(
                f"{self._initial}: damaged ({error}); after='restart' has nothing to go back to. "
                "Start again, in another output_dir."
            ) from error

    @property
    def _plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def _report(self) -> Path:
        return self.path / "report"

    @property
    def _initial(self) -> Path:
        return self.path / "initial_adapter.safetensors"

    def save_decision(self, decision: SavedDecision) -> None:
        """Write ``selection.json``."""
        on_main_process(lambda: write_atomically(self.decision, to_json(decision)))

    def forget_later(self, record: SavedDecision) -> None:
        """Write ``selection.json`` anew if there have been selections after the first one."""

        def write() -> None:
            if any(self.path.glob(step_name("*"))):
                write_atomically(self.decision, to_json(record))

        on_main_process(write)

    def save_clusters(self, tasks: TaskRows) -> None:
        """Write ``clusters.json``."""
        on_main_process(lambda: write_atomically(self.clusters, to_json(clusters_of(tasks))))

    def save_report(self, report: SelectionReport) -> None:
        """Write the files of the report."""
        on_main_process(lambda: report.save(self._report))

    def save_rows(
        self, report: SelectionReport, tasks: TaskRows, count_reads: Callable[[], np.ndarray]
    ) -> None:
        """Write ``rows.jsonl``: what the rest of the run reads.

        Args:
            report: is told where the file is.
            tasks: of the training set.
            count_reads: how often each row is read, int64 [N]; called on the main process alone.
        """
        path = self._report / ROWS_NAME
        on_main_process(
            lambda: write_atomically(path, row_lines(tasks.names, tasks.rows, count_reads()))
        )
        report.rows_file = path

    def read_report(self, decision: Decision) -> SelectionReport:
        """The report on a decision; a short one if the checkpoint was moved without it."""
        try:
            report = SelectionReport.load(self.path)
        except FileNotFoundError:
            report = SelectionReport(
                weights=decision["weights"],
                estimator=decision["estimator"],
                selector=decision["selector"],
                run={"after": decision["after"], "switch_step": decision["switch_step"]},
            )
        report.attach_gradients(self.gradients)
        report.rows_file = self._report / ROWS_NAME
        return report


def decision_of(report: SelectionReport) -> Decision:
    """The decision that a report is about."""
    chosen = report.row("chosen") if report.rows else None
    decision = Decision(
        selected=report.selected,
        weights=report.weights,
        estimated_loss=chosen.loss if chosen else None,
        low=chosen.low if chosen else None,
        high=chosen.high if chosen else None,
        estimated_loss_all=report.row("all tasks").loss if report.rows else None,
        switch_step=report.run["switch_step"],
        after=report.run["after"],
        seed=report.run["seed"],
        estimator=report.estimator,
        selector=report.selector,
    )
    if report.shadow_prices:
        decision["shadow_prices"] = report.shadow_prices
    if report.layers is not None:
        decision["layers"] = report.layers
    if (race := report.confirmation) is not None:
        decision["confirmation"] = ConfirmationRecord(
            finalists=race.asked,
            share=race.share,
            winner=race.winner,
            measured_loss=race.measured(race.winner),
            measured_loss_all=race.measured("all tasks"),
        )
    return decision


def decision_lines(
    decisions: Iterable[Decision], drift_tests: Mapping[int, DriftTest]
) -> list[DecisionLine]:
    """What a report shows of a run's decisions and tests, in their order; of one decision nothing.

    Args:
        decisions: of a run that may decide again.
        drift_tests: each by its step.
    """
    lines = {}
    for decision in decisions:
        step, record = decision["switch_step"], decision.get("reselection")
        if record is None:  # of a run that did not decide again until it was resumed
            continue
        test = drift_tests.get(step)
        lines[step] = DecisionLine(
            step=step,
            target=record["target"],
            weights={name: weight for name, weight in decision["weights"].items() if weight > 0},
            loss=record["loss"],
            estimated=decision["estimated_loss"],
            low=decision["low"],
            high=decision["high"],
            p_value=None if test is None else test["p_value"],
            averaged_with=record["averaged_with"],
        )
    weights: dict[str, float] = {}
    for step in sorted({*lines, *drift_tests}):
        if step in lines:
            weights = lines[step].weights
        else:
            test = drift_tests[step]
            lines[step] = DecisionLine(
                step=step,
                target=test["target"],
                weights=weights,
                p_value=test["p_value"],
                is_selection=False,
            )
    return [lines[step] for step in sorted(lines)] if len(lines) > 1 else []
