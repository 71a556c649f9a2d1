"""The gradient pass of a run: whether it can work, what it will cost, and what it captures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer

from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.check import compare_with_autograd
from hf_auxselect.capture.cost import PassCost, predict_pass, predict_probes
from hf_auxselect.capture.example_gradients import warn_of_one_by_one
from hf_auxselect.capture.examples import capture_examples
from hf_auxselect.capture.layer_gradients import (
    examples_to_score,
    parameter_rates,
    require_layers,
)
from hf_auxselect.capture.memory import checkpointing_enabled
from hf_auxselect.capture.optimizer_families import is_changed
from hf_auxselect.capture.optimizer_state import why_not_modelled
from hf_auxselect.capture.probes import losses_at, measure_probes
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import AT_OPTIMIZER, Batch
from hf_auxselect.clusters import cluster_gradients, cluster_rows, evenly_split
from hf_auxselect.distributed import on_main_process
from hf_auxselect.estimators import AbstractEstimator
from hf_auxselect.estimators.base import NUM_ENDPOINTS
from hf_auxselect.layers import LayerSelection
from hf_auxselect.options import Options
from hf_auxselect.plan import CostPreview, Plan
from hf_auxselect.reselection import MAX_TESTED, drift_p_value
from hf_auxselect.sharding import is_sharded, shape_of
from hf_auxselect.store.arrays import GradientStore, evenly_spread
from hf_auxselect.store.writer import add_vectors
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer import access, data
from hf_auxselect.trainer.evaluation import compare_evaluation
from hf_auxselect.trainer.layer_rates import why_no_rates
from hf_auxselect.trainer.schedule import schedule_after, training_to_come

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GradientPass:
    """Captures what the estimator of a run needs."""

    trainer: Trainer
    plan: Plan
    options: Options

    def check(self) -> list[str]:
        """Check loss, optimizer and captured gradients on a few rows, before the first step.

        Returns:
            Sentences for the report on what of the loss and of the optimizer is not modelled.
        """
        notes = list(self.plan.loss.notes)
        if needs_optimizer(self.options.estimator):
            notes += self._check_optimizer()
        if self.options.layers is not None:
            self._check_layers(self.options.layers)
        self.compare_loss()
        if self.options.one_by_one or self.plan.loss.of_example.of_batch is not None:
            return notes
        with self.trainer.compute_loss_context_manager():
            found = compare_with_autograd(
                self.trainer.model,
                self.plan.examples_to_check(self.trainer.model, self._collate_fn),
                self._collate_fn,
                loss=self.plan.loss.of_example,
            )
        if found.inseparable is not None:
            warn_of_one_by_one(found.inseparable)
        return notes

    def compare_loss(self) -> list[str]:
        """Evaluate some rows with the trainer; a sentence, also logged, if their loss differs.

        Terms that are 0 in the first step (a distance from the initial model) show at the switch.
        """
        trainer, target = self.trainer, self.plan.target_key
        notes = compare_evaluation(
            trainer, data.target_dataset(trainer, target), self.plan.loss, "the target"
        )
        for group in self.plan.groups:
            dataset = data.group_dataset(trainer, group.name, [target])
            what = f"the group {group.name!r}"
            notes += compare_evaluation(trainer, dataset, self.plan.loss, what)
        return notes

    def _check_optimizer(self) -> list[str]:
        """Refuse an optimizer whose steps are not modelled; note what is unknown about others."""
        trainer = self.trainer
        first_step = max(self.plan.switch_steps[0], trainer.state.global_step)
        schedule = schedule_after(trainer, first_step)
        name = access.optimizer_name(trainer)
        reason = why_not_modelled(trainer.model, trainer.optimizer, schedule, first_step=first_step)
        estimator = type(self.options.estimator).__name__
        if reason is not None:
            raise ValueError(
                f"{estimator} models the steps of the run's optimizer, {name}: {reason} Or pass "
                "estimator=GradExLogistic(), which does not depend on it."
            )
        notes = []
        if is_changed(trainer.optimizer):
            notes.append(
                f"{name} replaces step of the optimizer that it is made from; the estimates are "
                "about that one's own steps."
            )
        if schedule.unknown_because is not None:
            notes.append(
                "the learning rates of the steps after the switch are not known "
                f"({schedule.unknown_because}); the estimates assume the rates of the switch. "
                f"Pass learning_rates=... to {estimator} to say what they will be."
            )
        for note in notes:
            logger.warning("%s", note)
        return notes

    def _check_layers(self, layers: LayerSelection) -> None:
        """Refuse a choice of layers that does not fit the model or its optimizer."""
        require_layers(self.trainer.model, layers)
        layers.require_examples(len(examples_to_score(self.plan.target).example_ids))
        reason = None if layers.training == "all" else why_no_rates(self.trainer)
        if reason is not None:
            raise ValueError(f"layers: training={layers.training!r}: {reason}")

    def preview(self) -> CostPreview:
        """Run a few batches and predict the cost of all selections."""
        steps, clusters = self.plan.switch_steps, self.options.clusters
        plan = self.plan
        if clusters is not None:  # of which nothing is known yet
            tasks = evenly_split(len(plan.tasks.ids), clusters)
            plan = plan.with_tasks(tasks, self.options.examples_per_task)
        total = replace(self, plan=plan)._preview(clusters)
        without = replace(self.options, clusters=None)
        known: dict[str | None, CostPreview] = {}
        for step in steps[1:]:
            later = replace(self, plan=plan.at(step), options=without)
            key = later.plan.target_key
            if key not in known:
                known[key] = later._preview(None)
            one = known[key]
            total = replace(
                total,
                num_examples=total.num_examples + one.num_examples,
                seconds=total.seconds + one.seconds,
                disk_mib=total.disk_mib + one.disk_mib,
                memory_mib=max(total.memory_mib, one.memory_mib),
                host_memory_mib=max(total.host_memory_mib, one.host_memory_mib),
            )
        return replace(total, num_selections=len(steps))

    def _preview(self, clusters: int | None) -> CostPreview:
        """The cost of one selection, and of finding so many clusters before it."""
        plan = self.plan
        sketch = CountSketch(self.options.projection_dim, plan.seed)
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        entries = sum(shape_of(p).numel() for p in parameters)
        kept = sum(sketch.table_bytes(shape_of(p).numel()) for p in parameters)
        if needs_optimizer(self.options.estimator):  # its scales and momentum
            kept += 2 * 4 * entries
        host = 0
        with (
            self.trainer.compute_loss_context_manager(),
            checkpointing_enabled(
                self.trainer.model, self.trainer.args.gradient_checkpointing or False
            ),
        ):
            cost = self._predicted(plan.examples, self.options.estimator.scalars, plan.groups)
            seconds, memory = cost.seconds, cost.memory
            if self.options.estimator.needs_probes:
                cost = predict_probes(
                    self.trainer.model,
                    plan.examples,
                    plan.target,
                    self._collate_fn,
                    num_endpoints=NUM_ENDPOINTS,
                    batch_size=self._batch_size,
                    loss=plan.loss.of_example,
                )
                # The displacement, its start, a task's gradient; sources are on the CPU.
                probe_memory = cost.memory + 3 * 4 * entries
                sources = 4 * (1 + len(plan.examples)) * entries
                if parameters[0].device.type == "cpu":
                    probe_memory += sources
                else:
                    host = sources
                seconds, memory = seconds + cost.seconds, max(memory, probe_memory)
            if self.options.layers is not None:
                cost = self._predicted_layers()
                seconds, memory = seconds + cost.seconds, max(memory, cost.memory)
            if clusters is not None:
                cost = self._predicted([plan.all_rows()], self._scalars_to_compare)
                seconds, memory = seconds + cost.seconds, max(memory, cost.memory)
        bytes_per_gradient = 4 * (1 + self.options.projection_dim)
        bytes_per_example = 28 + len(self.options.estimator.scalars) * bytes_per_gradient
        num_clustered = (
            0 if clusters is None else len(plan.tasks.ids) + len(plan.target.example_ids)
        )
        disk = plan.num_examples * bytes_per_example + num_clustered * (28 + bytes_per_gradient)
        return CostPreview(
            num_examples=plan.num_examples + num_clustered,
            seconds=seconds / self.trainer.args.world_size,
            disk_mib=disk / 2**20,
            memory_mib=(kept + memory) / 2**20,
            host_memory_mib=host / 2**20,
            switch_step=plan.switch_steps[0],
            is_sharded=is_sharded(self.trainer.model),
        )

    def run(self, directory: Path, initial: Mapping[str, Tensor] | None) -> GradientStore:
        """Capture gradients at theta_0 and, if the estimator asks for it, at its probes.

        Args:
            directory: where the store is written.
            initial: trainable parameters at step 0 if training restarts there, else None.
        """
        trainer, plan = self.trainer, self.plan
        with trainer.compute_loss_context_manager():
            store = self._captured(
                plan.examples,
                self.options.estimator.scalars,
                directory,
                initial,
                plan.groups,
                self.options.layers,
            )
            if initial is not None:
                losses = losses_at(
                    trainer.model,
                    plan.target,
                    self._collate_fn,
                    initial,
                    batch_size=self._batch_size,
                    loss=plan.loss.of_example,
                )
                on_main_process(lambda: add_vectors(directory, losses.to_vectors()))
                store = store.with_vectors(losses.to_vectors())
            way = on_main_process(lambda: self.options.estimator.probe_points(store))
            if way is None:
                return store
            rates = None
            if self.options.layers is not None and store.layers is not None:
                by, of_layers = self.options.layers.by, store.layers.rates
                rates = parameter_rates(trainer.model, by, of_layers)
            return measure_probes(
                trainer.model,
                plan.examples,
                plan.target,
                self._collate_fn,
                store,
                *way,
                directory=directory,
                optimizer=trainer.optimizer,
                batch_size=self._batch_size,
                parameter_rates=rates,
                loss=plan.loss.of_example,
                progress=self._shows_progress,
            )

    def drift(self, before: TaskExamples, directory: Path) -> float:
        """P-value of the hypothesis that a former target has gradients as the present one has.

        Args:
            before: the former target.
            directory: where the store of the gradients of both is written.
        """
        tested = [
            replace(
                examples,
                example_ids=[examples.example_ids[i] for i in places],
                example_weights=None,
            )
            for examples in (before, self.plan.target)
            for places in [evenly_spread(len(examples.example_ids), MAX_TESTED).tolist()]
        ]
        with self.trainer.compute_loss_context_manager():
            store = self._captured(
                [tested[0]], self._scalars_to_compare, directory, None, target=tested[1]
            )
        return on_main_process(
            lambda: drift_p_value(
                store.loss_gradients, store.target.loss_gradients, seed=self.plan.seed
            )
        )

    def find_clusters(
        self, number: int, directory: Path, initial: Mapping[str, Tensor] | None
    ) -> TaskRows:
        """Cluster all training rows by their loss gradients at theta_0.

        Args:
            number: of clusters.
            directory: where the store of these gradients is written.
            initial: trainable parameters at step 0 if training restarts there, else None.
        """
        plan = self.plan
        with self.trainer.compute_loss_context_manager():
            store = self._captured([plan.all_rows()], self._scalars_to_compare, directory, initial)
        order = np.argsort(store.example_ids)
        labels_N = on_main_process(
            lambda: cluster_gradients(store.loss_gradients[order], number, seed=plan.seed)
        )
        return cluster_rows(labels_N)

    def _predicted(
        self,
        tasks: Sequence[TaskExamples],
        scalars: Sequence[str],
        groups: Sequence[TaskExamples] = (),
    ) -> PassCost:
        """What capturing some tasks, the target and groups will cost."""
        return predict_pass(
            self.trainer.model,
            tasks,
            self.plan.target,
            self._collate_fn,
            groups=groups,
            projection_dim=self.options.projection_dim,
            batch_size=self._batch_size,
            scalars=scalars,
            one_by_one=self.options.one_by_one,
            loss=self.plan.loss.of_example,
        )

    def _predicted_layers(self) -> PassCost:
        """What scoring layers will cost: some examples of the target, each alone."""
        return predict_pass(
            self.trainer.model,
            [],
            examples_to_score(self.plan.target),
            self._collate_fn,
            projection_dim=self.options.projection_dim,
            batch_size=1,
            scalars=("loss",),
            one_by_one=True,
            loss=self.plan.loss.of_example,
        )

    def _captured(
        self,
        tasks: Sequence[TaskExamples],
        scalars: Sequence[str],
        directory: Path,
        initial: Mapping[str, Tensor] | None,
        groups: Sequence[TaskExamples] = (),
        layers: LayerSelection | None = None,
        target: TaskExamples | None = None,
    ) -> GradientStore:
        """The gradients of some tasks, the target and groups at theta_0.

        Args beyond those of :func:`capture_examples`:
            target: None: the plan's.
        """
        trainer, plan, options = self.trainer, self.plan, self.options
        training = training_to_come(
            trainer, trainer.state.global_step, restarts=initial is not None
        )
        if plan.examples_per_row:
            training = replace(training, examples_per_row=plan.examples_per_row)
        return capture_examples(
            trainer.model,
            tasks,
            target or plan.target,
            self._collate_fn,
            groups=groups,
            directory=directory,
            projection_dim=options.projection_dim,
            batch_size=self._batch_size,
            seed=plan.seed,
            scalars=scalars,
            optimizer=trainer.optimizer if needs_optimizer(options.estimator) else None,
            training=training,
            layers=layers,
            one_by_one=options.one_by_one,
            loss=plan.loss.of_example,
            progress=self._shows_progress,
        )

    @property
    def _shows_progress(self) -> bool:
        return not self.trainer.args.disable_tqdm

    @property
    def _scalars_to_compare(self) -> tuple[str, ...]:
        """In the optimizer's coordinates, where these are captured anyway."""
        at = AT_OPTIMIZER if needs_optimizer(self.options.estimator) else ""
        return (f"loss{at}",)

    @cached_property
    def _collate_fn(self) -> Callable[[list[Any]], Batch]:
        return data.collate_function(self.trainer)

    @property
    def _batch_size(self) -> int:
        if self.options.one_by_one:
            return 1
        return self.options.batch_size or self.trainer.args.per_device_train_batch_size


def needs_optimizer(estimator: AbstractEstimator) -> bool:
    """Whether the estimator models steps of the run's optimizer."""
    return any(spec.endswith(AT_OPTIMIZER) for spec in estimator.scalars)
