"""A switch step of a run: capture, estimate, calibrate, choose, confirm, report, verify, switch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from hf_auxselect.capture.layer_gradients import parameter_rates
from hf_auxselect.confirmation import confirmed, finalists, run_race, rungs
from hf_auxselect.decision import choose, report_on
from hf_auxselect.distributed import MainProcessValue, on_main_process
from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.gradient_pass import GradientPass
from hf_auxselect.ground_truth import GroundTruthRuns, measure
from hf_auxselect.layers import LayersRecord, layer_scores, rates_in_training
from hf_auxselect.options import Confirmation, Options
from hf_auxselect.plan import Plan
from hf_auxselect.report import Measurement, SelectionReport, calibrated, strategy_record
from hf_auxselect.report.console import for_stream
from hf_auxselect.report.content import Race
from hf_auxselect.report.table_rows import table_rows
from hf_auxselect.report.text import summary
from hf_auxselect.run_directory import RunDirectory, decision_of
from hf_auxselect.selectors import Selection
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.trainer import access, checkpoints, data, tracking
from hf_auxselect.trainer.batches import BatchSource
from hf_auxselect.trainer.layer_rates import LayerRates
from hf_auxselect.trainer.schedule import restart
from hf_auxselect.trainer.trial_runs import RestOfRun
from hf_auxselect.verification import mixtures_to_calibrate, mixtures_to_verify


@dataclass(kw_only=True)
class Run:
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
    layer_rates: LayerRates | None = None
    """What shortens the steps of layers, if a decision asks for it."""

    def follow_layers(self, trainer: Trainer, record: LayersRecord | None) -> None:
        """Let the optimizer's steps be those that a choice of layers asks for; None: whole."""
        self.make_steps_whole()
        if record is not None and (rates := rates_in_training(record)):
            by = record["selection"]["by"]
            of_parameters = parameter_rates(trainer.model, by, rates)
            self.layer_rates = LayerRates(trainer, of_parameters)

    def make_steps_whole(self) -> None:
        """Let the optimizer's steps be as the optimizer makes them."""
        if self.layer_rates is not None:
            self.layer_rates.remove()
            self.layer_rates = None

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


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One switch step of a run: :meth:`decide`, :meth:`publish`, :meth:`follow`, in this order.

    Every process must call them.

    Attributes:
        trainer: between two optimizer steps.
        run: is told of the decision.
        options: the callback's.
        step: the number of optimizer steps before the switch.
    """

    trainer: Trainer
    run: Run
    options: Options
    step: int

    def decide(self) -> tuple[SelectionReport, MainProcessValue[FittedEstimator] | None]:
        """Find clusters, where asked for; capture, estimate, calibrate, choose and confirm.

        Returns:
            The report on the choice, not written yet, and what made its estimates; None: nothing
            is estimated.
        """
        start, options = time.perf_counter(), self.options
        fitted: MainProcessValue[FittedEstimator] | None = None
        store: GradientStore | None = None
        calibration: list[Measurement] = []
        pass_seconds = 0.0
        # Ground-truth runs start from the run's own random states, which are back after each part.
        with access.preserved_rng():
            if options.clusters is not None:
                self._find_clusters(options.clusters)
            if options.needs_estimates:
                store = self._capture()
                pass_seconds = time.perf_counter() - start
                fitted = self._estimate(store)
        layers = self._choose_layers(store)
        if options.calibrate and fitted is not None:
            fitted, calibration = self._calibrate(fitted)
        with access.preserved_rng():
            selection = self._choose(store, fitted)
        race = None
        if options.confirmation is not None:
            selection, race = self._confirm(options.confirmation, selection, fitted)
        with access.preserved_rng():
            report = self._report(store, fitted, selection)
        report.calibration, report.confirmation = calibration, race
        report.layers = layers
        report.sources = options.sources
        seconds = on_main_process(lambda: (pass_seconds, time.perf_counter() - start))
        report.run["gradient_pass_seconds"] = round(seconds[0], 3)
        report.run["seconds"] = round(seconds[1], 3)
        report.attach_gradients(
            self.run.directory.gradients, None if fitted is None else fitted.local()
        )
        return report, fitted

    def _find_clusters(self, number: int) -> None:
        """Step 0, if asked for: clusters of the training rows by gradient, as the run's tasks."""
        run = self.run
        gradient_pass = GradientPass(trainer=self.trainer, plan=run.plan, options=self.options)
        tasks = gradient_pass.find_clusters(number, run.directory.cluster_gradients, run.initial)
        run.directory.save_clusters(tasks)
        run.plan = run.plan.with_tasks(tasks, self.options.examples_per_task)

    def _capture(self) -> GradientStore:
        """Step 1: per-example gradients of every task and of the target."""
        run = self.run
        gradient_pass = GradientPass(trainer=self.trainer, plan=run.plan, options=self.options)
        run.notes += gradient_pass.compare_loss()
        return gradient_pass.run(run.directory.gradients, run.initial)

    def _estimate(self, store: GradientStore) -> MainProcessValue[FittedEstimator]:
        """Step 2: the estimator, fitted to the gradients."""
        return MainProcessValue(lambda: self.options.estimator.fit(store))

    def _choose_layers(self, store: GradientStore | None) -> LayersRecord | None:
        """Which layers were chosen in step 1, if asked for; ground-truth runs train them alone."""
        selection = self.options.layers
        if store is None or store.layers is None or selection is None:
            return None
        layers = store.layers
        record = LayersRecord(
            selection=strategy_record(selection),
            scores=on_main_process(lambda: layer_scores(layers, selection.method)),
            rates=layers.rates,
        )
        self.run.follow_layers(self.trainer, record)
        return record

    def _calibrate(
        self, fitted: MainProcessValue[FittedEstimator]
    ) -> tuple[MainProcessValue[FittedEstimator], list[Measurement]]:
        """Step 2b, if asked for: the estimator, corrected by ground-truth runs."""
        rest = self._runs.rest
        mixtures = mixtures_to_calibrate(rest.tasks, self.options.calibrate, rest.seed)
        calibration = measure(self._runs, mixtures, fitted, "calibration")
        return MainProcessValue(lambda: calibrated(fitted.value, calibration)), calibration

    def _choose(
        self, store: GradientStore | None, fitted: MainProcessValue[FittedEstimator] | None
    ) -> MainProcessValue[Selection]:
        """Step 3: the selector's choice."""
        rows_to_read = self.run.rows_to_read(self.trainer, self.step)
        return MainProcessValue(
            lambda: choose(
                None if fitted is None else fitted.value,
                plan=self.run.plan,
                store=store,
                selector=self.options.selector,
                keep=self.options.keep,
                rows_to_read=rows_to_read,
            )
        )

    def _confirm(
        self,
        confirmation: Confirmation,
        selection: MainProcessValue[Selection],
        fitted: MainProcessValue[FittedEstimator] | None,
    ) -> tuple[MainProcessValue[Selection], Race]:
        """Step 3b, if asked for: the choice among finalists that are trained."""
        tasks, keep = self.run.plan.tasks, self.options.keep
        mixtures = selection.ask(
            lambda chosen: finalists(chosen, tasks, keep, confirmation.finalists)
        )
        race = run_race(self._runs, mixtures, confirmation)
        both = MainProcessValue(
            lambda: confirmed(selection.value, race, None if fitted is None else fitted.value)
        )
        return MainProcessValue(lambda: both.value[0]), both.ask(lambda values: values[1])

    def _report(
        self,
        store: GradientStore | None,
        fitted: MainProcessValue[FittedEstimator] | None,
        selection: MainProcessValue[Selection],
    ) -> SelectionReport:
        """The report on the choice."""
        trainer, run, options = self.trainer, self.run, self.options
        return selection.ask(
            partial(
                report_on,
                fitted=None if fitted is None else fitted.local(),
                plan=run.plan,
                store=store,
                estimator=options.estimator,
                selector=options.selector,
                run={
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "after": options.after,
                    "switch_step": self.step,
                    "max_steps": trainer.state.max_steps,
                    "keep": list(options.keep),
                    "seed": run.plan.seed,
                    "model": access.model_name(trainer),
                    "adapter": access.trains_adapter(trainer),
                    "versions": run.plan.to_dict()["versions"],
                },
                rows_to_read=run.rows_to_read(trainer, self.step),
                notes=run.notes,
            )
        )

    def publish(
        self, report: SelectionReport, fitted: MainProcessValue[FittedEstimator] | None
    ) -> None:
        """Step 4: write and log the decision; where asked for, verify its estimates."""
        trainer, run = self.trainer, self.run
        run.decisions[self.step] = decision = decision_of(report)
        run.directory.save_decision(decision)
        run.directory.save_report(report)
        if run.batches is not None:
            mixture = run.plan.tasks, run.shares(self.step), run.plan.seed
            count_reads = partial(run.batches.reads, *mixture, since=self.step)
            run.directory.save_rows(report, run.plan.tasks, count_reads)
        if self.options.verify and fitted is not None:
            self.verify(report, fitted)
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

    def verify(self, report: SelectionReport, fitted: MainProcessValue[FittedEstimator]) -> None:
        """Train on a few mixtures, and write the report again with the losses."""
        rest = self._runs.rest
        counts, number = rest.tasks.counts, self.options.verify
        mixtures = mixtures_to_verify(report.weights, counts, number, rest.seed)
        report.verification = measure(self._runs, mixtures, fitted, "verification")
        self.run.directory.save_report(report)

    @cached_property
    def _runs(self) -> GroundTruthRuns:
        """Ground-truth runs over the remaining steps."""
        trainer, run, confirmation = self.trainer, self.run, self.options.confirmation
        target = data.target_key(trainer, self.options.target)
        if self.step in run.decisions:
            run.follow_layers(trainer, run.decisions[self.step].get("layers"))
        rates = {} if run.layer_rates is None else run.layer_rates.rates
        rest = RestOfRun(trainer, run.plan.tasks, target, run.plan.seed, run.initial, rates)
        stops: list[int] = []
        if confirmation is not None:
            number, share = confirmation.finalists, confirmation.share
            stops = [step for _, step in rungs(number, rest.first_step, rest.last_step, share)]
        return GroundTruthRuns(rest, run.directory.ground_truth_runs, stops)

    def restart(self) -> None:
        """Reset parameters, optimizer and schedule, if training restarts."""
        if self.run.initial is not None:
            restart(self.trainer, self.run.initial)

    def follow(self) -> None:
        """Step 5: draw the decided mixture from here on, at the position of the present step."""
        run = self.run
        run.follow_layers(self.trainer, run.decisions[self.step].get("layers"))
        if run.batches is not None:
            shares = run.shares(self.step)
            run.batches.draw_mixture(run.plan.tasks, shares, run.plan.seed, since=self.step)
