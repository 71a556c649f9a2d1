"""The callback: when a run captures, estimates, calibrates, chooses, reports and switches.

The global step is the only clock. With s the ``switch_step`` of ``plan.json``,

    step < s    warm-up on all tasks; the run is what it is without the callback
    step = s    gradient pass, estimates, selection; gradients, decision and report are written
    step > s    the selected mixture (``after="observe"``: still all tasks)

A decision is made once; a resumed run reads it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_auxselect.confirmation import training_steps
from hf_auxselect.distributed import MainProcessValue, on_main_process
from hf_auxselect.estimators import AbstractEstimator, LinearizedTraining
from hf_auxselect.gradient_pass import GradientPass, needs_optimizer
from hf_auxselect.layers import LayerSelection
from hf_auxselect.leaked_target import warn_of_leaked_target
from hf_auxselect.options import (
    Confirmation,
    Options,
    checked_sources,
    kept_tasks,
    named_groups,
)
from hf_auxselect.plan import CostPreview, Plan, make_plan
from hf_auxselect.publication import Publication
from hf_auxselect.report import SelectionReport, strategy_record
from hf_auxselect.reselection import Reselection
from hf_auxselect.run import Run
from hf_auxselect.run_directory import DIRECTORY_NAME, RunDirectory
from hf_auxselect.selectors import AbstractSelector, MixtureOptimization
from hf_auxselect.switch import Switch, evaluate_target
from hf_auxselect.trainer import access, checkpoints, hub, support
from hf_auxselect.trainer.batches import BatchSource
from hf_auxselect.trainer.schedule import schedule_restart

logger = logging.getLogger(__name__)


class TaskSelectionCallback(TrainerCallback):
    """Selects, in the middle of one training run, the tasks that lower the target's loss most.

    Add it to a ``Trainer`` or ``SFTTrainer`` whose training set has a task column (see
    :func:`hf_auxselect.concatenate_tasks`) and whose evaluation set is the target. The run warms up
    on all tasks, captures projected gradients of every task and of the target, estimates the
    target's loss after training on any mixture of tasks, and goes on with the chosen one.

    Args:
        target: key of an ``eval_dataset`` dict. None: the ``eval_dataset``, or the dict's only key.
            The objective is the loss that the trainer logs for it.
        task_column: column of the training set with each row's task.
        warmup: steps on all tasks before the selection; a share of the run, or a number (int).
        estimator: predicts the loss of a mixture; None: ``LinearizedTraining()``.
        selector: searches for a mixture; None: ``MixtureOptimization()``.
        after: ``"continue"`` goes on from the end of the warm-up. ``"restart"`` resets trainable
            parameters, optimizer and schedule for the remaining steps. ``"observe"`` selects and
            reports, and leaves the run as it is.
        keep: tasks that always stay.
        groups: further keys of the ``eval_dataset`` dict, whose losses are estimated and reported,
            and which selectors such as ``ConstrainedSelection`` take into account.
        examples_per_task: examples of each task, and of the target, that the gradient pass reads
            at most, drawn by ``seed``; None: all.
        projection_dim: length of a projected gradient.
        batch_size: examples of a forward pass of the gradient pass; None: the trainer's
            ``per_device_train_batch_size``. Batches of short examples hold more.
        one_by_one: capture each example alone; slow, for models that hooks cannot capture.
        verify: number of ground-truth runs at the switch, whose losses the report compares with the
            estimates: the chosen mixture, all tasks, and the chosen weights in random order (of a
            chosen subset, random subsets of its size).
        calibrate: number of ground-truth runs on mixtures spread over all possible ones, before
            the choice; they correct the estimates and set their error bars.
        confirm: number of finalists that are trained at the switch for the remaining steps: the
            choice, all tasks, the best estimated others. The run goes on with the best measured
            one. A :class:`Confirmation` has more options; 0: the estimates decide.
        reselect: number of steps from one selection to the next; each is made anew, by gradients
            at the present parameters. A :class:`Reselection` has more options, such as targets
            that change; None: there is one selection.
        clusters: number of tasks that the training set is split into at the switch, by the
            gradients of its rows, each of which is captured once more; see
            :func:`hf_auxselect.cluster_tasks`. No task column is needed, and none is read. None:
            tasks are those of the column.
        layers: which layers count in the estimates and, if asked for, which are trained after the
            switch; a :class:`hf_auxselect.LayerSelection`. None: all.
        sources: task -> where its data come from, as an entry of TRL's ``datasets:`` (``path``,
            ``name``, ...), for exports and the model card.
        output_dir: files go to ``<output_dir>/_task_selection/``; None: the trainer's.
        seed: determines examples, projection and order; None: the trainer's ``data_seed``, or else
            its ``seed``.
        report_to_hub: pushes the report after training. True: to the trainer's model repo; or a
            repo id.

    Attributes:
        report: None before the selection, then a :class:`hf_auxselect.SelectionReport`; of several
            selections the last one's.

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
        groups: Sequence[str] = (),
        examples_per_task: int | None = 256,
        projection_dim: int = 4096,
        batch_size: int | None = None,
        one_by_one: bool = False,
        verify: int = 0,
        calibrate: int = 0,
        confirm: int | Confirmation = 0,
        reselect: int | Reselection | None = None,
        clusters: int | None = None,
        layers: LayerSelection | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        output_dir: str | Path | None = None,
        seed: int | None = None,
        report_to_hub: bool | str | None = None,
    ) -> None:
        self.target = target
        self.task_column = task_column
        self.warmup = warmup
        self.estimator = LinearizedTraining() if estimator is None else estimator
        self.selector = MixtureOptimization() if selector is None else selector
        self.after = after
        self.keep = kept_tasks(keep)
        self.groups = named_groups(groups)
        self.examples_per_task = examples_per_task
        self.projection_dim = projection_dim
        self.batch_size = batch_size
        self.one_by_one = one_by_one
        self.verify = verify
        self.calibrate = calibrate
        self.confirm = confirm
        self.reselect = reselect
        self.clusters = clusters
        self.layers = layers
        self.sources = checked_sources(sources)
        self.output_dir = output_dir
        self.seed = seed
        self.report_to_hub = report_to_hub
        self._options()  # checks them
        self.report: SelectionReport | None = None
        self._publication = Publication(report_to_hub, target, weakref.ref(self))
        self._trainer: weakref.ref[Trainer] | None = None
        self._initial: dict[str, Tensor] = {}  # parameters that the trainer was made with
        self._run: Run | None = None  # set during `trainer.train()`
        self._verify_again = False  # for `hf-auxselect verify`: what the report has verified, too

    def attach(self, trainer: Trainer) -> TaskSelectionCallback:
        """Add the callback to a trainer that was made without it; before ``trainer.train()``."""
        if not any(known is self for known in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        self._meet(trainer)
        return self

    def preview(self, trainer: Trainer) -> CostPreview:
        """Time a few batches and predict what the gradient pass will cost. Changes nothing.

        With several processes, all of them call it. FSDP and DeepSpeed move and shard the model
        when training begins: the callback prints the preview then.

        Raises:
            ValueError: the run is one in which a selection cannot work, or FSDP or DeepSpeed has
                yet to move the model.
        """
        self._meet(trainer)
        support.require_model_on_device(trainer)
        with access.preserved_rng():
            loader = trainer.get_train_dataloader()
            max_steps = access.total_steps(trainer, loader)
            plan = self._make_plan(trainer, max_steps)
            return self._preview(trainer, plan, max_steps)

    def _preview(self, trainer: Trainer, plan: Plan, max_steps: int) -> CostPreview:
        gradient_pass = GradientPass(trainer=trainer, plan=plan, options=self._options())
        preview = gradient_pass.preview()
        confirmation = self._options().confirmation
        steps = sum(
            (self.verify + self.calibrate) * (max_steps - step)
            + training_steps(confirmation, step, max_steps)
            for step in plan.switch_steps
        )
        return replace(preview, verification_steps=steps)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (trainer := access.find_trainer(self)) is not None:
            self._meet(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, options = self._current_trainer(), self._options()
        self._end_run()  # of a `train()` that was broken off
        self.report = initial = batches = None
        self._publication.begin(trainer)
        directory = RunDirectory(Path(self.output_dir or args.output_dir) / DIRECTORY_NAME)
        resumed = state.global_step > 0
        on_disk = directory.read_plan() if resumed else None
        # Examples are drawn by the seed, and those of the run are in its gradient store.
        seed = None if on_disk is None else self._resumed_seed(trainer, on_disk["seed"])
        with access.preserved_rng():
            plan = self._make_plan(trainer, state.max_steps, seed)
            warn_of_leaked_target(plan, self.task_column)
            support.warn_of_differences(trainer, is_rewritten=self.after != "observe")
            gradient_pass = GradientPass(trainer=trainer, plan=plan, options=options)
            is_needed = options.needs_estimates or options.clusters is not None
            notes = gradient_pass.check() if is_needed else []
            is_due = state.global_step < plan.switch_steps[-1]
            if is_needed and is_due and support.prepares_model_late(trainer):
                preview = self._preview(trainer, plan, state.max_steps)
                if state.is_world_process_zero:
                    tqdm.write(str(preview))
        plan = directory.resume(plan, on_disk) if resumed else directory.start(plan)
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
        self._run = run = Run(
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
            record = self._run.record()
            trainer, tasks = self._current_trainer(), self._run.plan.tasks
            on_main_process(lambda: checkpoints.save_decision(trainer, record))
            if self.clusters is not None:
                on_main_process(lambda: checkpoints.save_clusters(trainer, tasks))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._current_trainer()
        if self._run is not None and self.report is not None:
            self._add_evaluation(trainer, self._run, self.report)
        self._end_run()
        self._publication.end(trainer)

    def _add_evaluation(self, trainer: Trainer, run: Run, report: SelectionReport) -> None:
        """Add the target's metrics after training to the report."""
        step, switch_step = hub.final_step(trainer), max(run.decisions)
        if made := evaluate_target(trainer, run.plan.at(switch_step), step):
            before = [one for one in report.evaluations if one.step <= switch_step]
            report.evaluations = before + made
            run.last_directory.save_report(report)

    def _end_run(self) -> None:
        """Give the trainer its own batches and steps back."""
        if self._run is not None:
            self._run.remove_layer_rates()
            if self._run.batches is not None:
                self._run.batches.remove()
        self._run = None

    def _select(self, trainer: Trainer, run: Run, step: int) -> None:
        """Make the decision of a switch step, if it is due, and follow it."""
        switch = Switch(trainer=trainer, run=run, options=self._options(), step=step)
        if not switch.test_drift():
            if self.report is not None:
                self.report.decisions = run.decision_lines
                run.last_directory.save_report(self.report)
            return
        self._publication.target = switch.plan.target_key
        self.report, fitted = switch.decide()
        switch.publish(self.report, fitted)
        switch.restart()
        switch.follow()

    def _resume_after_switch(self, trainer: Trainer, run: Run, switch_step: int) -> None:
        """Follow the last decision of the resumed run; make one only if it is due right now."""
        step, options = trainer.state.global_step, self._options()
        at_switch = step == switch_step
        if self.clusters is not None:
            tasks = checkpoints.read_clusters(trainer, run.directory.clusters, run.plan.tasks)
            run.plan = run.plan.with_tasks(tasks, self.examples_per_task)
        saved = checkpoints.read_decision(trainer, run.directory.decision, run.plan.tasks.names)
        if saved is not None:
            run.recall(saved, step)
            if run.decisions:
                run.directory.forget_later(run.record())
        decision = run.last_decision
        if decision is not None and (changed := changed_options(decision, self)):
            if decision["switch_step"] == step and (
                self.after != "restart" or not options.needs_estimates
            ):
                logger.warning(
                    "the checkpoint's decision was made with other options: %s. Nothing has been "
                    "trained on it yet, so it is made anew.",
                    in_words(changed),
                )
                run.forget(step)
                decision = run.last_decision
            else:
                logger.warning(
                    "options of the selection have changed since it was made: %s. Training on its "
                    "mixture has begun; the decision of the resumed run (%s) stands.",
                    in_words(changed),
                    decision["selected"],
                )
        if decision is not None:
            decided = decision["switch_step"]
            switch = Switch(trainer=trainer, run=run, options=options, step=decided)
            self.report = switch.directory.read_report(decision)
            self.report.decisions = run.decision_lines
            self._publication.target = switch.plan.target_key
            is_new = self._verify_again or not self.report.verification
            if self.verify and decided == step and is_new:
                self._verify(trainer, switch, self.report)
            switch.follow()
        if at_switch and not run.is_settled(step):
            with checkpoints.random_states_of_checkpoint(trainer):
                self._select(trainer, run, switch_step)
        elif decision is not None:
            if not run.is_settled(switch_step):
                logger.warning(
                    "no selection was made after step %d, where reselect=%r asks for one; the "
                    "decision of step %d stands.",
                    switch_step,
                    self.reselect,
                    decision["switch_step"],
                )
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

    def _verify(self, trainer: Trainer, switch: Switch, report: SelectionReport) -> None:
        """Verify what a resumed run has selected, if its estimates can be made again."""
        own = self.estimator if strategy_record(self.estimator) == report.estimator else None
        try:
            fitted = MainProcessValue(lambda: report.fitted(own))
        except (OSError, KeyError, ValueError) as error:
            if self._verify_again:  # nothing else was asked for
                raise
            logger.warning(
                "verify=%d: the selection is not verified, since its estimates cannot be made "
                "again: %s Training goes on.",
                self.verify,
                error,
            )
            return
        with checkpoints.random_states_of_checkpoint(trainer):
            switch.verify(report, fitted)

    def _resumed_seed(self, trainer: Trainer, on_disk: int) -> int:
        """The seed of the run that is resumed; warns if the options ask for another one."""
        asked = access.data_seed(trainer)[1] if self.seed is None else self.seed
        if asked != on_disk:
            logger.warning(
                "%s=%d, but the run that is resumed was started with %d, which stands for the "
                "task selection. To change it, start anew in another output_dir.",
                "data_seed (or seed) of the training arguments" if self.seed is None else "seed",
                asked,
                on_disk,
            )
        return on_disk

    def _make_plan(self, trainer: Trainer, max_steps: int, seed: int | None = None) -> Plan:
        options = self._options()
        return make_plan(
            trainer,
            options if seed is None else replace(options, seed=seed),
            max_steps=max_steps,
            must_train_on=self.after != "observe" or needs_optimizer(self.estimator),
        )

    def _options(self) -> Options:
        """The options as they are now: attributes may have been set."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

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


def changed_options(
    decision: checkpoints.Decision, callback: TaskSelectionCallback
) -> dict[str, str]:
    """A callback's options that a decision was not made with: what was before, what is now.

    A decision does not record ``keep``, which differs if a task was dropped that is to stay.
    """
    options = callback._options()
    race, layers = decision.get("confirmation"), decision.get("layers")
    asked = options.confirmation
    before = {
        "estimator": decision["estimator"],
        "selector": decision["selector"],
        "layers": layers and layers["selection"],
        "confirm": race and {"finalists": race["finalists"], "share": race["share"]},
    }
    now = {
        "estimator": strategy_record(options.estimator),
        "selector": strategy_record(options.selector),
        "layers": options.layers and strategy_record(options.layers),
        "confirm": asked and {"finalists": asked.finalists, "share": asked.share},
    }
    changed = {
        name: f"{before[name]} before, {now[name]} now" for name in now if before[name] != now[name]
    }
    dropped = [name for name in options.keep if not decision["weights"][name] > 0]
    if dropped:
        changed["keep"] = f"{dropped} dropped before, {list(options.keep)} now"
    return changed


def in_words(changed: Mapping[str, str]) -> str:
    """What :func:`changed_options` has found, for a message."""
    return "; ".join(f"{name} ({what})" for name, what in changed.items())
