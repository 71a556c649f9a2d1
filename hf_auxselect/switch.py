"""A switch step of a run: capture, estimate, calibrate, choose, confirm, report, verify, switch."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial

from tqdm.auto import tqdm
from transformers import Trainer

from hf_auxselect.confirmation import confirmed, finalists, run_race, rungs
from hf_auxselect.decision import average_with_earlier, choose, report_on
from hf_auxselect.distributed import MainProcessValue, on_main_process
from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.gradient_pass import GradientPass
from hf_auxselect.ground_truth import GroundTruthRuns, Measured, digest_of_data, measure
from hf_auxselect.layers import LayersRecord, layer_scores
from hf_auxselect.options import Confirmation, Options
from hf_auxselect.plan import Plan
from hf_auxselect.report import SelectionReport, calibrated, strategy_record
from hf_auxselect.report.console import for_stream
from hf_auxselect.report.content import Evaluation, Race
from hf_auxselect.report.table_rows import table_rows
from hf_auxselect.report.text import summary
from hf_auxselect.reselection import credited, score_of
from hf_auxselect.run import Run
from hf_auxselect.run_directory import RunDirectory, decision_of
from hf_auxselect.selectors import Selection
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.trainer import access, checkpoints, tracking
from hf_auxselect.trainer.evaluation import evaluation_loss, evaluation_metrics
from hf_auxselect.trainer.loss import evaluating
from hf_auxselect.trainer.schedule import restart
from hf_auxselect.trainer.trial_runs import RestOfRun
from hf_auxselect.verification import mixtures_to_calibrate, mixtures_to_verify


def evaluate_target(trainer: Trainer, plan: Plan, step: int) -> list[Evaluation]:
    """The target's loss and metrics now; nothing if the trainer has no ``compute_metrics``.

    Every process must call it.

    Args:
        trainer: evaluates.
        plan: has the target.
        step: that the present model has been trained for.
    """
    if trainer.compute_metrics is None:
        return []
    loss, metrics = evaluation_metrics(trainer, plan.target_key)
    return [Evaluation(step=step, loss=loss if math.isfinite(loss) else None, metrics=metrics)]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One switch step of a run.

    :meth:`test_drift`, :meth:`decide`, :meth:`publish`, :meth:`follow`, in this order.

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

    @property
    def plan(self) -> Plan:
        """The run's, with the target of this selection."""
        return self.run.plan.at(self.step)

    @property
    def directory(self) -> RunDirectory:
        """Where the files of this selection are."""
        return self.run.directory.at(self.run.plan, self.step)

    @property
    def _is_first(self) -> bool:
        return self.step == self.run.plan.switch_steps[0]

    def test_drift(self) -> bool:
        """Test, where asked for, whether the target has changed; False: the last decision stays."""
        run, reselection = self.run, self.options.reselection
        last = run.last_decision
        if last is None or reselection is None or reselection.significance is None:
            return True
        target, p_value = self.plan.target.name, 1.0
        before = run.plan.at(last["switch_step"]).target
        if before.name != target:
            with access.preserved_rng():
                gradient_pass = GradientPass(
                    trainer=self.trainer, plan=self.plan, options=self.options
                )
                p_value = gradient_pass.drift(before, self.directory.drift_gradients)
        run.drift_tests[self.step] = checkpoints.DriftTest(
            step=self.step, target=target, p_value=p_value
        )
        if p_value <= reselection.significance:
            return True
        run.directory.save_decision(run.record())
        return False

    def decide(self) -> tuple[SelectionReport, MainProcessValue[FittedEstimator] | None]:
        """Find clusters, where asked for; capture, estimate, calibrate, choose and confirm.

        Returns:
            The report on the choice, not written yet, and what made its estimates; None: nothing
            is estimated.
        """
        start, options = time.perf_counter(), self.options
        fitted: MainProcessValue[FittedEstimator] | None = None
        store: GradientStore | None = None
        calibration = Measured([], [])
        pass_seconds, notes = 0.0, list(self.run.notes)
        evaluations = evaluate_target(self.trainer, self.plan, self.step)
        # Ground-truth runs start from the run's own random states, which are back after each part.
        with access.preserved_rng():
            if options.clusters is not None and self._is_first:
                self._find_clusters(options.clusters)
            record = self._look_back()
            if options.needs_estimates:
                store, notes = self._capture()
                pass_seconds = time.perf_counter() - start
                fitted = self._estimate(store)
        layers = self._choose_layers(store)
        if options.calibrate and fitted is not None:
            fitted, calibration = self._calibrate(fitted)
            notes += calibration.warnings
        with access.preserved_rng():
            selection = self._choose(store, fitted, is_repeated=record is not None)
            if record is not None and fitted is not None:
                selection = self._average(selection, fitted, record)
        race = None
        if options.confirmation is not None:
            selection, race = self._confirm(options.confirmation, selection, fitted)
            if record is not None and race.winner != race.choice:
                record["averaged_with"] = None
        with access.preserved_rng():
            report = self._report(store, fitted, selection, notes)
        report.calibration, report.confirmation = calibration.runs, race
        report.layers, report.evaluations = layers, evaluations
        report.sources = options.sources
        seconds = on_main_process(lambda: (pass_seconds, time.perf_counter() - start))
        report.run["gradient_pass_seconds"] = round(seconds[0], 3)
        report.run["seconds"] = round(seconds[1], 3)
        report.attach_gradients(
            self.directory.gradients, None if fitted is None else fitted.local()
        )
        self.run.decisions[self.step] = decision_of(report)
        if record is not None:
            self.run.decisions[self.step]["reselection"] = record
            report.decisions = self.run.decision_lines
        return report, fitted

    def _look_back(self) -> checkpoints.ReselectionRecord | None:
        """What was measured since the last decision, if the run may decide again."""
        run, reselection, target = self.run, self.options.reselection, self.plan.target_key
        if reselection is None:
            return None
        record = checkpoints.ReselectionRecord(
            target=self.plan.target.name, loss=None, scores={}, averaged_with=None
        )
        if not reselection.memory or run.batches is None:
            return record
        losses = {target: self._measured_loss(target)}
        record["loss"] = losses[target]
        last = run.last_decision
        if last is None or "reselection" not in last:
            return record
        before = last["reselection"]
        record["scores"] = before["scores"]
        key = run.plan.at(last["switch_step"]).target_key
        if key not in losses:
            losses[key] = self._measured_loss(key)
        now = losses[key]
        if before["loss"] is not None and now is not None:
            record["scores"] = credited(
                before["scores"],
                before["target"],
                last["weights"],
                (before["loss"] - now) / (self.step - last["switch_step"]),
                memory=reselection.memory,
            )
        return record

    def _measured_loss(self, target: str | None) -> float | None:
        """The loss that the trainer would log for a target now; None: not finite."""
        with evaluating(self.trainer):
            loss = evaluation_loss(self.trainer, target)
        return loss if math.isfinite(loss) else None

    def _find_clusters(self, number: int) -> None:
        """Step 0, if asked for: clusters of the training rows by gradient, as the run's tasks."""
        run = self.run
        gradient_pass = GradientPass(trainer=self.trainer, plan=run.plan, options=self.options)
        tasks = gradient_pass.find_clusters(number, run.directory.cluster_gradients, run.initial)
        run.directory.save_clusters(tasks)
        run.plan = run.plan.with_tasks(tasks, self.options.examples_per_task)

    def _capture(self) -> tuple[GradientStore, list[str]]:
        """Step 1: per-example gradients of every task and of the target; and the report's notes."""
        run = self.run
        gradient_pass = GradientPass(trainer=self.trainer, plan=self.plan, options=self.options)
        notes = [*run.notes, *gradient_pass.compare_loss()]
        return gradient_pass.run(self.directory.gradients, run.initial), notes

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
        self.run.apply_layer_rates(self.trainer, record)
        return record

    def _calibrate(
        self, fitted: MainProcessValue[FittedEstimator]
    ) -> tuple[MainProcessValue[FittedEstimator], Measured]:
        """Step 2b, if asked for: the estimator, corrected by ground-truth runs."""
        rest = self._runs.rest
        mixtures = mixtures_to_calibrate(rest.tasks, self.options.calibrate, rest.seed)
        calibration = measure(self._runs, mixtures, fitted, "calibration")
        return MainProcessValue(lambda: calibrated(fitted.value, calibration.runs)), calibration

    def _choose(
        self,
        store: GradientStore | None,
        fitted: MainProcessValue[FittedEstimator] | None,
        *,
        is_repeated: bool,
    ) -> MainProcessValue[Selection]:
        """Step 3: the choice, from the shadow prices of the last one where the run repeats it."""
        options, last = self.options, self.run.last_decision
        rows_to_read = self.run.rows_to_read(self.trainer, self.step)
        prices = last.get("shadow_prices", {}) if last is not None and is_repeated else {}
        return MainProcessValue(
            lambda: choose(
                None if fitted is None else fitted.value,
                plan=self.plan,
                store=store,
                selector=options.selector.starting_from(prices),
                keep=options.keep,
                rows_to_read=rows_to_read,
            )
        )

    def _average(
        self,
        selection: MainProcessValue[Selection],
        fitted: MainProcessValue[FittedEstimator],
        record: checkpoints.ReselectionRecord,
    ) -> MainProcessValue[Selection]:
        """The choice, averaged with an earlier one that has helped; ``record`` names that one."""
        step, reselection = self._step_to_average_with(record), self.options.reselection
        if step is None or reselection is None:
            return selection
        record["averaged_with"] = step
        earlier, memory = self.run.decisions[step]["weights"], reselection.memory
        rows_to_read = self.run.rows_to_read(self.trainer, self.step)
        return MainProcessValue(
            lambda: average_with_earlier(
                earlier, selection.value, fitted.value, memory=memory, rows_to_read=rows_to_read
            )
        )

    def _step_to_average_with(self, record: checkpoints.ReselectionRecord) -> int | None:
        """Switch step of the last decision for this target, if the loss has fallen with it."""
        run, selector = self.run, self.options.selector
        scores = record["scores"].get(record["target"], {})
        steps = [
            step
            for step, decision in sorted(run.decisions.items())
            if run.plan.at(step).target_key == self.plan.target_key
            and decision["selector"] == strategy_record(selector)
            and all(decision["weights"].get(name, 0) > 0 for name in self.options.keep)
        ]
        if not steps or not selector.asks_for_target_only:
            return None
        return steps[-1] if score_of(run.decisions[steps[-1]]["weights"], scores) > 0 else None

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
        notes: list[str],
    ) -> SelectionReport:
        """The report on the choice."""
        trainer, run, options = self.trainer, self.run, self.options
        return selection.ask(
            partial(
                report_on,
                fitted=None if fitted is None else fitted.local(),
                plan=self.plan,
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
                notes=notes,
            )
        )

    def publish(
        self, report: SelectionReport, fitted: MainProcessValue[FittedEstimator] | None
    ) -> None:
        """Step 4: write and log the decision; where asked for, verify its estimates."""
        trainer, run = self.trainer, self.run
        run.directory.save_decision(run.record())
        self.directory.save_report(report)
        if run.batches is not None:
            mixture = run.plan.tasks, run.shares(self.step), run.seed_of(self.step)
            count_reads = partial(run.batches.reads, *mixture, since=self.step)
            self.directory.save_rows(report, run.plan.tasks, count_reads)
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
            directory=self.directory.path / "report",
        )

    def verify(self, report: SelectionReport, fitted: MainProcessValue[FittedEstimator]) -> None:
        """Train on a few mixtures, and write the report again with the losses."""
        rest = self._runs.rest
        counts, number = rest.tasks.counts, self.options.verify
        mixtures = mixtures_to_verify(report.weights, counts, number, rest.seed)
        report.verification, warnings = measure(self._runs, mixtures, fitted, "verification")
        # A report that is verified again has the warnings of the last time.
        earlier = [text for text in report.warnings if not text.startswith("verification:")]
        report.warnings = earlier + warnings
        self.directory.save_report(report)

    @cached_property
    def _runs(self) -> GroundTruthRuns:
        """Ground-truth runs over the remaining steps."""
        trainer, run, confirmation = self.trainer, self.run, self.options.confirmation
        target, seed = self.plan.target_key, run.seed_of(self.step)
        if self.step in run.decisions:
            run.apply_layer_rates(trainer, run.decisions[self.step].get("layers"))
        rates = {} if run.layer_rates is None else run.layer_rates.rates
        rest = RestOfRun(trainer, run.plan.tasks, target, seed, run.initial, rates)
        stops: list[int] = []
        if confirmation is not None:
            number, share = confirmation.finalists, confirmation.share
            stops = [step for _, step in rungs(number, rest.first_step, rest.last_step, share)]
        path = run.directory.ground_truth_runs(run.plan, self.step)
        return GroundTruthRuns(rest, path, stops, data=digest_of_data(self.plan))

    def restart(self) -> None:
        """Reset parameters, optimizer and schedule, if training restarts."""
        if self.run.initial is not None:
            restart(self.trainer, self.run.initial)

    def follow(self) -> None:
        """Step 5: draw the decided mixture from here on, at the position of the present step."""
        run = self.run
        run.apply_layer_rates(self.trainer, run.decisions[self.step].get("layers"))
        if run.batches is not None:
            shares, seed = run.shares(self.step), run.seed_of(self.step)
            run.batches.draw_mixture(run.plan.tasks, shares, seed, since=self.step)
