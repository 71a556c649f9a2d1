"""The callback: when a run captures, estimates, calibrates, chooses, reports and switches.

The global step is the only clock. With s the ``switch_step`` of ``plan.json``,

    step < s    warm-up on all tasks; the run is what it is without the callback
    step = s    gradient pass, estimates, selection; gradients, decision and report are written
    step > s    the selected mixture (``after="observe"``: still all tasks)

A decision is made once; a resumed run reads it.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_auxselect.decision import decide
from hf_auxselect.distributed import MainProcessValue, on_main_process
from hf_auxselect.estimators import AbstractEstimator, FittedEstimator, LinearizedTraining
from hf_auxselect.gradient_pass import GradientPass, needs_optimizer
from hf_auxselect.options import require_options
from hf_auxselect.plan import CostPreview, Plan, checked_sources, make_plan, warn_of_leaked_target
from hf_auxselect.publication import Publication
from hf_auxselect.report import Measurement, SelectionReport, calibrated, strategy_record
from hf_auxselect.report.console import for_stream
from hf_auxselect.report.table_rows import table_rows
from hf_auxselect.report.text import summary
from hf_auxselect.run_directory import DIRECTORY_NAME, RunDirectory, decision_of
from hf_auxselect.selectors import AbstractSelector, FixedSelection, ForwardSelection
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.trainer import access, checkpoints, data, support, tracking
from hf_auxselect.trainer.batches import BatchSource
from hf_auxselect.trainer.schedule import restart, schedule_restart
from hf_auxselect.trainer.trial_runs import RestOfRun
from hf_auxselect.verification import measure, mixtures_to_calibrate, mixtures_to_verify

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Run:
    """What one ``trainer.train()`` settles before its first step, and what it decides later.

    Attributes:
        plan: tasks, examples and switch steps.
        directory: the run's files.
        initial: trainable parameters of step 0 if training restarts from them, else None.
        batches: source of the trainer's batches; None if the mixture is never changed.
        notes: sentences for the report on what the estimates do not model.
        decisions: each decision by its switch step.
    """

    plan: Plan
    directory: RunDirectory
    initial: dict[str, Tensor] | None
    batches: BatchSource | None
    notes: list[str]
    decisions: dict[int, checkpoints.Decision] = field(default_factory=dict)

    def shares(self, switch_step: int) -> np.ndarray:
        """Share of each task in the mixture of a decision: float [K]."""
        weights = self.decisions[switch_step]["weights"]
        return np.array([weights[name] for name in self.plan.tasks.names])

    def rows_to_read(self, trainer: Trainer, step: int) -> int:
        """Number of training rows that the steps after ``step`` read."""
        if self.batches is not None:
            return self.batches.rows_to_read(step)
        steps = trainer.state.max_steps - step
        return steps * trainer.get_total_train_batch_size(trainer.args)


class TaskSelectionCallback(TrainerCallback):
    """Selects, in the middle of one training run, the tasks that lower the target's loss most.

    Add it to a ``Trainer`` or ``SFTTrainer`` whose training set has a task column (see
    :func:`hf_auxselect.concatenate_tasks`) and whose evaluation set is the target. The run warms up
    on all tasks, captures projected gradients of every task and of the target, estimates the
    target's loss after training on any subset of tasks, and goes on with the chosen one.

    Args:
        target: key of an ``eval_dataset`` dict. None: the ``eval_dataset``, or the dict's only key.
            The objective is the loss that the trainer logs for it.
        task_column: column of the training set with each row's task.
        warmup: steps on all tasks before the selection; a share of the run, or a number (int).
        estimator: predicts the loss of a mixture; None: ``LinearizedTraining()``.
        selector: searches for a mixture; None: ``ForwardSelection()``.
        after: ``"continue"`` goes on from the end of the warm-up. ``"restart"`` resets trainable
            parameters, optimizer and schedule for the remaining steps. ``"observe"`` selects and
            reports, and leaves the run as it is.
        keep: tasks that always stay.
        examples_per_task: examples of each task, and of the target, that the gradient pass reads
            at most, drawn by ``seed``; None: all.
        projection_dim: length of a projected gradient.
        batch_size: examples of a forward pass of the gradient pass; None: the trainer's
            ``per_device_train_batch_size``. Batches of short examples hold more.
        one_by_one: capture each example alone; slow, for models that hooks cannot capture.
        verify: number of ground-truth runs at the switch (the chosen mixture, all tasks, random
            subsets of the chosen size), whose losses the report compares with the estimates.
        calibrate: number of ground-truth runs on mixtures spread over all possible ones, before
            the choice; they correct the estimates and set their error bars.
        sources: task -> where its data come from, as an entry of TRL's ``datasets:`` (``path``,
            ``name``, ...), for exports and the model card.
        output_dir: files go to ``<output_dir>/_task_selection/``; None: the trainer's.
        seed: rules examples, projection and order; None: the trainer's ``data_seed`` or ``seed``.
        report_to_hub: pushes the report after training. True: to the trainer's model repo; or a
            repo id.

    Attributes:
        report: None before the selection, then a :class:`hf_auxselect.SelectionReport`.

    Raises:
        ValueError, TypeError: an argument is wrong; or from ``trainer.train()``, before its first
            step: a selection cannot work in this run.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        task_column: str = "task",
        warmup: float | int = 0.2,
        estimator: AbstractEstimator | None = None,
        selector: AbstractSelector | None = None,
        after: str = "continue",
        keep: Sequence[str] = (),
        examples_per_task: int | None = 256,
        projection_dim: int = 4096,
        batch_size: int | None = None,
        one_by_one: bool = False,
        verify: int = 0,
        calibrate: int = 0,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        output_dir: str | Path | None = None,
        seed: int | None = None,
        report_to_hub: bool | str | None = None,
    ) -> None:
        require_options(
            warmup=warmup,
            after=after,
            keep=keep,
            examples_per_task=examples_per_task,
            projection_dim=projection_dim,
            batch_size=batch_size,
            verify=verify,
            calibrate=calibrate,
            estimator=estimator,
            selector=selector,
        )
        self.target = target
        self.task_column = task_column
        self.warmup = warmup
        self.estimator = estimator or LinearizedTraining()
        self.selector = selector or ForwardSelection()
        self.after = after
        self.keep = tuple(str(k) if isinstance(k, int) else k for k in keep)  # as tasks are named
        self.examples_per_task = examples_per_task
        self.projection_dim = projection_dim
        self.batch_size = batch_size
        self.one_by_one = one_by_one
        self.verify = verify
        self.calibrate = calibrate
        self.sources = checked_sources(sources)
        self.output_dir = output_dir
        self.seed = seed
        self.report_to_hub = report_to_hub
        if (verify or calibrate) and not self._needs_estimates:
            option = f"{verify=}" if verify else f"{calibrate=}"
            raise ValueError(
                f"{option} compares estimates with ground-truth runs, but "
                "FixedSelection(estimate=False) makes no estimates; leave one of the two out."
            )
        self.report: SelectionReport | None = None
        self._publication = Publication(report_to_hub, target, weakref.ref(self))
        self._trainer: weakref.ref[Trainer] | None = None
        self._initial: dict[str, Tensor] = {}  # parameters that the trainer was made with
        self._run: _Run | None = None  # set during `trainer.train()`
        self._verify_again = False  # for `hf-auxselect verify`: what the report has verified, too

    def attach(self, trainer: Trainer) -> TaskSelectionCallback:
        """Add the callback to a trainer that was made without it; before ``trainer.train()``."""
        if not any(known is self for known in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        self._meet(trainer)
        return self

    def preview(self, trainer: Trainer) -> CostPreview:
        """Time a batch and predict what the gradient pass will cost. Changes nothing.

        Raises:
            ValueError: the run is one in which a selection cannot work.
        """
        self._meet(trainer)
        with access.preserved_rng():
            loader = trainer.get_train_dataloader()
            max_steps = access.total_steps(trainer, loader)
            plan = self._make_plan(trainer, max_steps)
            preview = self._gradient_pass(trainer, plan).preview()
        steps = (self.verify + self.calibrate) * (max_steps - plan.switch_steps[0])
        return replace(preview, verification_steps=steps)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (trainer := access.find_trainer(self)) is not None:
            self._meet(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._current_trainer()
        self._end_run()  # of a `train()` that was broken off
        self.report = initial = batches = None
        self._publication.begin(trainer)
        with access.preserved_rng():
            plan = self._make_plan(trainer, state.max_steps)
            warn_of_leaked_target(plan, self.task_column)
            support.warn_of_differences(trainer, is_rewritten=self.after != "observe")
            notes = self._gradient_pass(trainer, plan).check() if self._needs_estimates else []
        directory = RunDirectory(Path(self.output_dir or args.output_dir) / DIRECTORY_NAME)
        resumed = state.global_step > 0
        plan = directory.resume(plan) if resumed else directory.start(plan)
        if self.after == "restart":
            if resumed:
                initial = directory.load_initial() or self._initial
            else:
                initial = access.trainable_state(trainer.model)
                directory.save_initial(initial)
            schedule_restart(trainer, plan.switch_steps[0])
        if self.after != "observe":
            batches = BatchSource(trainer)
            batches.require_own_sampler(plan.tasks, plan.seed)
        self._run = run = _Run(
            plan=plan, directory=directory, initial=initial, batches=batches, notes=notes
        )
        if due := [step for step in plan.switch_steps if step <= state.global_step]:
            self._resume_after_switch(trainer, run, due[-1])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Gradients are cleared; the next batches and this step's checkpoint are still to come.
        if self._run is not None and state.global_step in self._run.plan.switch_steps:
            self._select(self._current_trainer(), self._run, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None and self._run.decisions:
            last = self._run.decisions[max(self._run.decisions)]
            trainer = self._current_trainer()
            on_main_process(lambda: checkpoints.save_decision(trainer, last))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_run()
        self._publication.end(self._current_trainer())

    def _end_run(self) -> None:
        """Give the trainer its own batches back."""
        if self._run is not None and self._run.batches is not None:
            self._run.batches.remove()
        self._run = None

    def _select(self, trainer: Trainer, run: _Run, step: int) -> None:
        """Make the decision of a switch step, and follow it."""
        start = time.perf_counter()
        fitted: MainProcessValue[FittedEstimator] | None = None  # None: no estimates are wanted
        store: GradientStore | None = None
        calibration: list[Measurement] = []
        with access.preserved_rng():
            if self._needs_estimates:
                store = self._capture(trainer, run)
            pass_seconds = time.perf_counter() - start
            if store is not None:
                fitted = self._estimate(store)
                if self.calibrate:
                    fitted, calibration = self._calibrate(trainer, run, fitted)
            report = self._choose(trainer, run, step, store, fitted)
        report.calibration = calibration
        report.sources = self.sources
        seconds = on_main_process(lambda: (pass_seconds, time.perf_counter() - start))
        report.run["gradient_pass_seconds"] = round(seconds[0], 3)
        report.run["seconds"] = round(seconds[1], 3)
        self._report(trainer, run, report, fitted)
        if run.initial is not None:
            restart(trainer, run.initial)
        self._switch(trainer, run, step)

    def _capture(self, trainer: Trainer, run: _Run) -> GradientStore:
        """Step 1: per-example gradients of every task and of the target."""
        gradient_pass = self._gradient_pass(trainer, run.plan)
        run.notes += gradient_pass.compare_loss()
        return gradient_pass.run(run.directory.gradients, run.initial)

    def _estimate(self, store: GradientStore) -> MainProcessValue[FittedEstimator]:
        """Step 2: the estimator, fitted to the gradients."""
        return MainProcessValue(lambda: self.estimator.fit(store))

    def _calibrate(
        self, trainer: Trainer, run: _Run, fitted: MainProcessValue[FittedEstimator]
    ) -> tuple[MainProcessValue[FittedEstimator], list[Measurement]]:
        """Step 2b, if asked for: the estimator, corrected by ground-truth runs."""
        rest = self._rest_of_run(trainer, run)
        mixtures = mixtures_to_calibrate(rest.tasks, self.calibrate, rest.seed)
        calibration = measure(rest, mixtures, fitted, "calibration")
        return MainProcessValue(lambda: calibrated(fitted.value, calibration)), calibration

    def _choose(
        self,
        trainer: Trainer,
        run: _Run,
        step: int,
        store: GradientStore | None,
        fitted: MainProcessValue[FittedEstimator] | None,
    ) -> SelectionReport:
        """Step 3: the selector's choice, and the report on it."""
        choose = partial(
            decide,
            plan=run.plan,
            store=store,
            estimator=self.estimator,
            selector=self.selector,
            keep=self.keep,
            run={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "after": self.after,
                "switch_step": step,
                "max_steps": trainer.state.max_steps,
                "keep": list(self.keep),
                "seed": run.plan.seed,
                "model": access.model_name(trainer),
                "adapter": access.trains_adapter(trainer),
                "versions": run.plan.to_dict()["versions"],
            },
            rows_to_read=run.rows_to_read(trainer, step),
            notes=run.notes,
        )
        if fitted is None:
            return on_main_process(lambda: choose(None))
        return fitted.ask(choose)

    def _report(
        self,
        trainer: Trainer,
        run: _Run,
        report: SelectionReport,
        fitted: MainProcessValue[FittedEstimator] | None,
    ) -> None:
        """Step 4: write and log the decision; where asked for, verify its estimates."""
        report.attach_gradients(run.directory.gradients, None if fitted is None else fitted.local())
        self.report = report
        decision = decision_of(report)
        run.decisions[decision["switch_step"]] = decision
        run.directory.save_decision(decision)
        run.directory.save_report(report)
        if run.batches is not None:
            step = decision["switch_step"]
            mixture = run.plan.tasks, run.shares(step), run.plan.seed
            count_reads = partial(run.batches.reads, *mixture, since=step)
            run.directory.save_rows(report, run.plan.tasks, count_reads)
        if self.verify and fitted is not None:
            self._verify(trainer, run, report, fitted)
        if trainer.is_world_process_zero():
            tqdm.write(for_stream(report, sys.stdout))
        access.log(trainer, report.metrics())
        tracking.show(
            trainer,
            tables=table_rows(report),
            summary=summary(report),
            markdown=report.to_markdown(),
            directory=run.directory.path / "report",
        )

    def _verify(
        self,
        trainer: Trainer,
        run: _Run,
        report: SelectionReport,
        fitted: MainProcessValue[FittedEstimator],
    ) -> None:
        """Train on a few mixtures, and write the report again with the losses."""
        rest = self._rest_of_run(trainer, run)
        mixtures = mixtures_to_verify(report.weights, rest.tasks.counts, self.verify, rest.seed)
        report.verification = measure(rest, mixtures, fitted, "verification")
        run.directory.save_report(report)

    def _rest_of_run(self, trainer: Trainer, run: _Run) -> RestOfRun:
        """The remaining steps, for ground-truth runs."""
        target = data.target_key(trainer, self.target)
        return RestOfRun(trainer, run.plan.tasks, target, run.plan.seed, run.initial)

    def _switch(self, trainer: Trainer, run: _Run, switch_step: int) -> None:
        """Step 5: draw the decided mixture from here on, at the position of the present step."""
        if run.batches is None:
            return
        shares = run.shares(switch_step)
        run.batches.draw_mixture(run.plan.tasks, shares, run.plan.seed, since=switch_step)

    def _resume_after_switch(self, trainer: Trainer, run: _Run, switch_step: int) -> None:
        """Follow the decision of the resumed run; make it only if it is due right now."""
        step = trainer.state.global_step
        at_switch = step == switch_step
        decision = checkpoints.read_decision(trainer, run.directory.decision, run.plan.tasks.names)
        strategies = (strategy_record(self.estimator), strategy_record(self.selector))
        if decision is not None and (decision["estimator"], decision["selector"]) != strategies:
            if at_switch and (self.after != "restart" or not self._needs_estimates):
                logger.warning(
                    "the checkpoint's decision was made with other options; nothing has been "
                    "trained on it yet, so it is made anew."
                )
                decision = None
            else:
                logger.warning(
                    "options of the selection have changed since it was made; the decision of the "
                    "resumed run (%s) stands.",
                    decision["selected"],
                )
        if decision is not None:
            run.decisions[switch_step] = decision
            self.report = run.directory.read_report(decision)
            if self.verify and at_switch and (self._verify_again or not self.report.verification):
                with checkpoints.random_states_of_checkpoint(trainer):
                    fitted = MainProcessValue(self.report.fitted)
                    self._verify(trainer, run, self.report, fitted)
            self._switch(trainer, run, switch_step)
        elif at_switch:
            with checkpoints.random_states_of_checkpoint(trainer):
                self._select(trainer, run, switch_step)
        elif self.after == "observe":
            logger.warning(
                "resumed at step %d, after the selection was due (step %d): nothing is selected.",
                step,
                switch_step,
            )
        else:
            raise ValueError(
                f"cannot resume at step {step}: the selection was due after step {switch_step}, "
                f"but neither the checkpoint nor {run.directory.decision} holds a decision. "
                f"Resume from a checkpoint of step {switch_step} or before."
            )

    def _make_plan(self, trainer: Trainer, max_steps: int) -> Plan:
        return make_plan(
            trainer,
            target=self.target,
            task_column=self.task_column,
            warmup=self.warmup,
            max_steps=max_steps,
            must_train_on=self.after != "observe" or needs_optimizer(self.estimator),
            selector=self.selector,
            keep=self.keep,
            examples_per_task=self.examples_per_task,
            seed=self.seed,
        )

    def _gradient_pass(self, trainer: Trainer, plan: Plan) -> GradientPass:
        return GradientPass(
            trainer=trainer,
            plan=plan,
            target=self.target,
            estimator=self.estimator,
            projection_dim=self.projection_dim,
            batch_size=self.batch_size,
            one_by_one=self.one_by_one,
        )

    @property
    def _needs_estimates(self) -> bool:
        return not isinstance(self.selector, FixedSelection) or self.selector.estimate

    def _meet(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        checkpoints.guard_resumption(trainer)
        if self.after == "restart" and trainer.model is not None:
            self._initial = access.trainable_state(trainer.model)

    def _current_trainer(self) -> Trainer:
        trainer = access.find_trainer(self) or (self._trainer and self._trainer())
        if trainer is None:
            raise RuntimeError(
                "TaskSelectionCallback does not know its trainer; call callback.attach(trainer) "
                "before trainer.train()."
            )
        return trainer
