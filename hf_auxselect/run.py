"""The state of one ``trainer.train()``: its plan, its files, and its decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
from torch import Tensor
from transformers import Trainer

from hf_auxselect.capture.layer_gradients import parameter_rates
from hf_auxselect.layers import LayersRecord, rates_in_training
from hf_auxselect.plan import Plan
from hf_auxselect.report.content import DecisionLine
from hf_auxselect.run_directory import RunDirectory, decision_lines
from hf_auxselect.seeds import random_words
from hf_auxselect.trainer import checkpoints
from hf_auxselect.trainer.batches import BatchSource
from hf_auxselect.trainer.layer_rates import LayerRates


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
        drift_tests: each test of whether the target has changed, by its step.
    """

    plan: Plan
    directory: RunDirectory
    initial: dict[str, Tensor] | None
    batches: BatchSource | None
    notes: list[str]
    decisions: dict[int, checkpoints.Decision] = field(default_factory=dict)
    layer_rates: LayerRates | None = None
    """What multiplies the updates of layers, if a decision asks for it."""
    drift_tests: dict[int, checkpoints.DriftTest] = field(default_factory=dict)

    def apply_layer_rates(self, trainer: Trainer, record: LayersRecord | None) -> None:
        """Multiply the updates of layers by the rates that a choice of layers asks for."""
        self.remove_layer_rates()
        if record is not None and (rates := rates_in_training(record)):
            by = record["selection"]["by"]
            of_parameters = parameter_rates(trainer.model, by, rates)
            self.layer_rates = LayerRates(trainer, of_parameters)

    def remove_layer_rates(self) -> None:
        """Leave the optimizer's updates as they are."""
        if self.layer_rates is not None:
            self.layer_rates.remove()
            self.layer_rates = None

    @property
    def last_decision(self) -> checkpoints.Decision | None:
        """The decision that the run follows; None before the first one."""
        return self.decisions[max(self.decisions)] if self.decisions else None

    @property
    def last_directory(self) -> RunDirectory:
        """Where the files of the last selection are."""
        return self.directory.at(self.plan, max(self.decisions))

    @property
    def decision_lines(self) -> list[DecisionLine]:
        """What reports show of several decisions; of one nothing."""
        ordered = [self.decisions[step] for step in sorted(self.decisions)]
        return decision_lines(ordered, self.drift_tests)

    def is_settled(self, step: int) -> bool:
        """Whether it was decided after this step what to train on, or not to decide anew."""
        return step in self.decisions or step in self.drift_tests

    def record(self) -> checkpoints.SavedDecision:
        """What is written of the decisions; there must be one."""
        *earlier, last = (self.decisions[step] for step in sorted(self.decisions))
        record = cast(checkpoints.SavedDecision, dict(last))
        if earlier:
            record["earlier"] = earlier
        if self.drift_tests:
            record["drift_tests"] = [self.drift_tests[step] for step in sorted(self.drift_tests)]
        return record

    def recall(self, record: checkpoints.SavedDecision, step: int) -> None:
        """Take up what was written, up to the step that the run resumes after."""
        last = {k: v for k, v in record.items() if k not in ("earlier", "drift_tests")}
        decisions = [*record.get("earlier", []), cast(checkpoints.Decision, last)]
        self.decisions = {
            one["switch_step"]: one for one in decisions if one["switch_step"] <= step
        }
        self.drift_tests = {
            test["step"]: test for test in record.get("drift_tests", []) if test["step"] <= step
        }

    def forget(self, step: int) -> None:
        """Take back what was decided after a step."""
        self.decisions.pop(step, None)
        self.drift_tests.pop(step, None)

    def seed_of(self, switch_step: int) -> int:
        """Determines the order of a decision's rows; later ones do not begin with the same rows."""
        if switch_step == self.plan.switch_steps[0]:
            return self.plan.seed
        return int(random_words(1, self.plan.seed, "mixture", switch_step)[0] >> np.uint64(32))

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
