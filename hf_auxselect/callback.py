"""The callback: when to capture, estimate, select, report and switch, and what is kept on disk.

The global step is the only clock. With K the ``switch_step`` of ``plan.json``,

    step < K    warm-up on all tasks; the run is what it is without the callback
    step = K    gradient pass, estimates, selection; gradients, decision and report are written
    step > K    the selected mixture (``after="observe"``: still all tasks)

and a decision, once made, is read and never made again.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_auxselect.distributed import computed_once, process_rank
from hf_auxselect.estimators import AbstractEstimator, FittedEstimator, LinearizedTraining
from hf_auxselect.files import read_json, to_json, write_atomically
from hf_auxselect.gradient_pass import GradientPass, needs_optimizer
from hf_auxselect.plan import (
    CostPreview,
    Plan,
    PlanRecord,
    make_plan,
    require_same_plan,
    select,
    warn_of_leaked_target,
)
from hf_auxselect.report.report import Measurement, SelectionReport, calibrated, strategy_record
from hf_auxselect.sampler import MixtureSampler
from hf_auxselect.selectors.base import AbstractSelector, FixedSelection, ForwardSelection
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.trainer import access, checkpoints, data, support
from hf_auxselect.trainer.batches import BatchSource, consumed_batches
from hf_auxselect.trainer.schedule import restart, schedule_restart
from hf_auxselect.trainer.trial_runs import RestOfRun
from hf_auxselect.verification import measure, mixtures_to_calibrate, mixtures_to_verify

logger = logging.getLogger(__name__)

DIRECTORY_NAME = "_task_selection"
"""Under the output directory; Trainer leaves names with an underscore out of its Hub uploads."""
MODES = ("continue", "restart", "observe")


class TaskSelectionCallback(TrainerCallback):
    """Selects, in the middle of one training run, the tasks that lower the target's loss most.

    Add it to a ``Trainer`` or ``SFTTrainer`` whose training set has a task column (see
    :func:`hf_auxselect.concatenate_tasks`) and whose evaluation set is the target. The run warms up
    on all tasks, captures projected gradients of every task and of the target, estimates the
    target's loss after training on any subset of tasks, and goes on with the chosen one.

    Args:
        target: None: the trainer's ``eval_dataset`` is the target, or the only one of an
            ``eval_dataset`` dict. A string: that key of the dict. What is minimised is the loss
            that the trainer logs for it.
        task_column: column of the training set that names each row's task.
        warmup: share of the run's steps in (0, 1), or number of optimizer steps (int >= 1), that
            are trained on all tasks before the selection.
        estimator: how the loss of a mixture is estimated; None: ``LinearizedTraining()``.
        selector: how a mixture is searched for; None: ``ForwardSelection()``.
        after: ``"continue"`` goes on from where the warm-up ended. ``"restart"`` puts the trainable
            parameters back to their initial values and resets optimizer and schedule for the
            remaining steps. ``"observe"`` chooses and reports, and leaves the run as it would be.
        keep: tasks that always stay.
        examples_per_task: examples of each task, and of the target, that the gradient pass reads
            at most, drawn by ``seed``; None: all.
        projection_dim: length of a projected gradient.
        batch_size: examples of a forward pass of the gradient pass; None: the trainer's
            ``per_device_train_batch_size``. Short examples are filled up to as many tokens as in
            one of the longest.
        one_by_one: capture each example alone: slow, but right for models whose trainable
            parameters hooks cannot capture.
        verify: so many mixtures (the chosen one, all tasks, random subsets of the chosen size) are
            fine-tuned for real at the switch, each for the rest of the run, and the report tells
            how the estimates agree. The run itself is not changed by it.
        calibrate: so many mixtures, spread out over all, are fine-tuned for real before the choice,
            and set the estimates' scale and offset, what single tasks add to them, and error bars.
        output_dir: files go to ``<output_dir>/_task_selection/``; None: the trainer's.
        seed: rules examples, projection and the mixture's order; None: the trainer's ``data_seed``,
            or else its ``seed``.

    Attributes:
        report: None before the selection, then a :class:`hf_auxselect.SelectionReport`.

    Raises:
        ValueError, TypeError: here, if an argument is wrong; from ``trainer.train()``, before its
            first step, if the run is one in which a selection cannot work.
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
        output_dir: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        is_share = isinstance(warmup, float) and 0 < warmup < 1
        if isinstance(warmup, bool) or not (is_share or (isinstance(warmup, int) and warmup >= 1)):
            raise ValueError(
                f"warmup must be a share of the run in (0, 1) or a number of steps (an int of at "
                f"least 1), got {warmup!r}."
            )
        if after not in MODES:
            raise ValueError(f"after must be one of {list(MODES)}, got {after!r}.")
        if isinstance(keep, str):
            raise TypeError(f"keep must be a sequence of task names, got the string {keep!r}.")
        if examples_per_task is not None and examples_per_task < 2:
            raise ValueError(
                f"examples_per_task must be at least 2, or None; got {examples_per_task}."
            )
        if projection_dim < 2:
            raise ValueError(f"projection_dim must be at least 2, got {projection_dim}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None; got {batch_size}.")
        for name, number in (("verify", verify), ("calibrate", calibrate)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name} must be a number of mixtures, 0 or more; got {number!r}.")
        if not isinstance(estimator, AbstractEstimator | None):
            raise TypeError(
                f"estimator must be an object such as LinearizedTraining(), got {estimator!r}."
            )
        if not isinstance(selector, AbstractSelector | None):
            raise TypeError(
                f"selector must be an object such as ForwardSelection(), got {selector!r}."
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
        self._verify_again = False  # in a resumed run that has been verified before
        self.output_dir = output_dir
        self.seed = seed
        if (verify or calibrate) and not self._needs_estimates:
            option = f"{verify=}" if verify else f"{calibrate=}"
            raise ValueError(
                f"{option} compares estimates with real fine-tunes, but "
                "FixedSelection(estimate=False) makes none; leave one of the two out."
            )
        self.report: SelectionReport | None = None
        # Set when a trainer is met, and for the length of a `train()`:
        self._trainer: weakref.ref[Trainer] | None = None
        self._initial: dict[str, torch.Tensor] = {}
        self._plan: Plan | None = None
        self._batches: BatchSource | None = None
        self._decision: checkpoints.Decision | None = None
        self._notes: list[str] = []

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
        steps = (self.verify + self.calibrate) * (max_steps - plan.switch_step)
        return replace(preview, verification_steps=steps)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = access.find_trainer(self)
        if trainer is not None:
            self._meet(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._current_trainer()
        if self._batches is not None:  # of a `train()` that was broken off
            self._batches.remove()
        self.report = self._plan = self._batches = self._decision = None
        with access.preserved_rng():
            plan = self._make_plan(trainer, state.max_steps)
            warn_of_leaked_target(plan, self.task_column)
            support.warn_of_differences(trainer, is_rewritten=self.after != "observe")
            if self._needs_estimates:
                self._notes = self._gradient_pass(trainer, plan).check()
        resumed = state.global_step > 0
        self._plan = self._resume_plan(plan) if resumed else self._start_plan(plan)
        if self.after == "restart":
            self._settle_initial(trainer, resumed)
            schedule_restart(trainer, self._plan.switch_step)
        if self.after != "observe":
            self._batches = self._shadow_batches(trainer)
        if state.global_step >= self._plan.switch_step:
            self._resume_after_switch(trainer, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here gradients are cleared, the next batches are not yet drawn, and the checkpoint of
        # this step is not yet written.
        if self._plan is not None and state.global_step == self._plan.switch_step:
            self._select(self._current_trainer(), state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._decision is not None and state.is_world_process_zero:
            checkpoints.save_decision(self._current_trainer(), self._decision)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._batches is not None:
            self._batches.remove()
            self._batches = None

    def _select(self, trainer: Trainer, state: TrainerState) -> None:
        """Capture, estimate, select, report; then switch."""
        assert self._plan is not None
        start = time.perf_counter()
        fitted: FittedEstimator | None = None
        store: GradientStore | None = None
        with access.preserved_rng():
            if self._needs_estimates:
                gradient_pass = self._gradient_pass(trainer, self._plan)
                self._notes += gradient_pass.compare_loss()
                store = gradient_pass.run(self._directory / "gradients", self._restart_from)
            pass_seconds = time.perf_counter() - start

            def fit() -> None:
                nonlocal fitted
                fitted = self.estimator.fit(store) if store is not None else None

            computed_once(fit)
            calibration: list[Measurement] = []
            if self.calibrate:
                rest = self._rest_of_run(trainer)
                anchors = mixtures_to_calibrate(rest.tasks, self.calibrate, rest.seed)
                calibration = measure(rest, anchors, fitted, "calibration")
            if fitted is not None:
                fitted = calibrated(fitted, calibration)

            def choose() -> SelectionReport:
                report = self._make_report(trainer, store, fitted)
                report.calibration = calibration
                report.run["gradient_pass_seconds"] = round(pass_seconds, 3)
                report.run["seconds"] = round(time.perf_counter() - start, 3)
                return report

            report = computed_once(choose)
        report.gradients_directory = self._directory / "gradients"
        report._fitted = fitted
        self.report = report
        self._decision = checkpoints.decision_of(report)
        if state.is_world_process_zero:
            write_atomically(self._directory / "selection.json", to_json(self._decision))
            report.save(self._directory / "report")
        if self.verify:
            self._verify(trainer, report, fitted)
        if state.is_world_process_zero:
            tqdm.write(report.to_text())
        access.log(trainer, report.metrics())
        if self.after == "restart":
            restart(trainer, self._initial)
        self._switch(trainer, state)

    def _make_report(
        self,
        trainer: Trainer,
        store: GradientStore | None,
        fitted: FittedEstimator | None,
    ) -> SelectionReport:
        assert self._plan is not None
        # Without a fitted estimator the selection is fixed and asks for no estimate.
        estimate = fitted.estimate if fitted is not None else _no_estimate
        selection = select(self.selector, estimate, self._plan.tasks, self.keep)
        report = SelectionReport(
            weights=selection.weights,
            scores=selection.scores,
            history=list(selection.history),
            estimator=strategy_record(self.estimator),
            selector=strategy_record(self.selector),
            run={
                "after": self.after,
                "switch_step": self._plan.switch_step,
                "max_steps": trainer.state.max_steps,
                "keep": list(self.keep),
                "seed": self._plan.seed,
                "model": access.model_name(trainer),
                "versions": self._plan.to_dict()["versions"],
                "reads_per_row": self._plan.reads_per_row(
                    selection.weights,
                    trainer.state.max_steps,
                    trainer.get_total_train_batch_size(trainer.args),
                ),
            },
        )
        if store is not None and fitted is not None:
            report.add_estimates(fitted, selection, store, seed=self._plan.seed)
            report.warnings += [*self._notes, *self._plan.target_sample_note()]
        return report

    def _verify(
        self, trainer: Trainer, report: SelectionReport, fitted: FittedEstimator | None
    ) -> None:
        """Fine-tune on a few mixtures for real, and write the report again with the result."""
        rest = self._rest_of_run(trainer)
        mixtures = mixtures_to_verify(report.weights, rest.tasks.counts, self.verify, rest.seed)
        report.verification = measure(rest, mixtures, fitted, "verification")
        if trainer.is_world_process_zero():
            report.save(self._directory / "report")

    def _rest_of_run(self, trainer: Trainer) -> RestOfRun:
        assert self._plan is not None
        return RestOfRun(
            trainer,
            self._plan.tasks,
            data.target_key(trainer, self.target),
            self._plan.seed,
            self._restart_from,
        )

    @property
    def _restart_from(self) -> dict[str, torch.Tensor] | None:
        """Trainable parameters at step 0 if training restarts there."""
        return self._initial if self.after == "restart" else None

    def _switch(self, trainer: Trainer, state: TrainerState) -> None:
        """Feed the selected mixture from here on, at the position that belongs to this step."""
        if self._batches is None:
            return
        assert self._plan is not None and self._decision is not None
        weights = self._decision["weights"]
        per_epoch = len(trainer.callback_handler.train_dataloader)
        accumulation = trainer.args.gradient_accumulation_steps
        at_switch, now, at_end = (
            consumed_batches(step, per_epoch, accumulation)
            for step in (self._plan.switch_step, state.global_step, state.max_steps)
        )
        self._batches.mixture.start(
            self._plan.tasks,
            np.array([weights[name] for name in self._plan.tasks.names]),
            self._plan.seed,
            consumed=now - at_switch,
            total=at_end - now,
        )

    def _resume_after_switch(self, trainer: Trainer, state: TrainerState) -> None:
        """Follow the decision of the run that is resumed; make it only if it is due right now."""
        assert self._plan is not None
        at_switch = state.global_step == self._plan.switch_step
        decision = checkpoints.read_decision(
            trainer, self._directory / "selection.json", self._plan.tasks.names
        )
        if decision is not None and not self._same_strategies(decision):
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
            self._decision = decision
            self.report = self._read_report(decision)
            if self.verify and at_switch and (self._verify_again or not self.report.verification):
                with checkpoints.random_states_of_checkpoint(trainer):
                    is_main = trainer.is_world_process_zero()
                    self._verify(trainer, self.report, self.report.fitted() if is_main else None)
            self._switch(trainer, state)
        elif at_switch:
            with checkpoints.random_states_of_checkpoint(trainer):
                self._select(trainer, state)
        elif self.after == "observe":
            logger.warning(
                "resumed at step %d, after the selection was due (step %d): nothing is selected.",
                state.global_step,
                self._plan.switch_step,
            )
        else:
            raise ValueError(
                f"cannot resume at step {state.global_step}: the selection was due after step "
                f"{self._plan.switch_step}, but neither the checkpoint nor "
                f"{self._directory / 'selection.json'} holds a decision. Resume from a checkpoint "
                f"of step {self._plan.switch_step} or before."
            )

    def _same_strategies(self, decision: checkpoints.Decision) -> bool:
        now = (strategy_record(self.estimator), strategy_record(self.selector))
        return (decision["estimator"], decision["selector"]) == now

    def _read_report(self, decision: checkpoints.Decision) -> SelectionReport:
        try:
            report = SelectionReport.load(self._directory)
        except FileNotFoundError:  # the checkpoint was moved without it
            report = SelectionReport(
                weights=decision["weights"],
                estimator=decision["estimator"],
                selector=decision["selector"],
                run={"after": decision["after"], "switch_step": decision["switch_step"]},
            )
        report.gradients_directory = self._directory / "gradients"
        return report

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

    def _start_plan(self, plan: Plan) -> Plan:
        """A new run: its plan is written, and nothing of an earlier run is left to be believed."""
        if process_rank()[0] == 0:
            try:
                write_atomically(self._directory / "plan.json", to_json(plan.to_dict()))
            except OSError as error:
                raise OSError(
                    f"output_dir: cannot write to {str(self._directory)!r} ({error.strerror}); "
                    "pass output_dir=... to TaskSelectionCallback, or change the trainer's."
                ) from error
            for name in ("selection.json", "report/report.json"):
                (self._directory / name).unlink(missing_ok=True)
        return plan

    def _resume_plan(self, plan: Plan) -> Plan:
        """A resumed run: the plan on disk counts; a run that had none so far gets one."""
        path = self._directory / "plan.json"
        if not path.is_file():
            logger.info("resuming a run that was started without a task selection.")
            return self._start_plan(plan)
        on_disk = read_json(path, PlanRecord)
        require_same_plan(plan, on_disk, path)
        return replace(plan, switch_step=on_disk["switch_step"], seed=on_disk["seed"])

    def _settle_initial(self, trainer: Trainer, resumed: bool) -> None:
        """Know the values that a restart goes back to: those at step 0."""
        path = self._directory / "initial_adapter.safetensors"
        if not resumed:
            self._initial = access.trainable_state(trainer.model)
            if process_rank()[0] == 0:
                write_atomically(path, save(self._initial))
        elif path.is_file():
            try:
                self._initial = load_file(path)
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: damaged ({error}); after='restart' has nothing to go back to. Start "
                    "again, in another output_dir."
                ) from error
        else:
            logger.warning(
                "%s is missing; a restart goes back to the parameters the trainer was made with.",
                path,
            )

    def _shadow_batches(self, trainer: Trainer) -> BatchSource:
        assert self._plan is not None
        batches = BatchSource(trainer)
        counts = self._plan.tasks.counts
        try:
            with access.preserved_rng():
                batches.mixture.build_loader(
                    MixtureSampler(self._plan.tasks, counts / counts.sum(), self._plan.seed)
                )
        except ValueError:
            batches.remove()
            raise
        return batches

    @property
    def _needs_estimates(self) -> bool:
        return not isinstance(self.selector, FixedSelection) or self.selector.estimate

    @property
    def _directory(self) -> Path:
        output_dir = self.output_dir or self._current_trainer().args.output_dir
        return Path(output_dir) / DIRECTORY_NAME

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


def _no_estimate(weights: Any) -> Any:
    raise AssertionError("FixedSelection(estimate=False) asked for an estimate")
