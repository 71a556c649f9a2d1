"""The plan: what a run settles before its first step, and refuses if it cannot work."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from transformers import Trainer

from hf_auxselect import __version__, switch
from hf_auxselect.estimators import Estimate
from hf_auxselect.files import JsonDict
from hf_auxselect.gradients import TaskExamples
from hf_auxselect.mixture import TaskRows
from hf_auxselect.seeds import random_permutation
from hf_auxselect.selectors import AbstractSelector

logger = logging.getLogger(__name__)


class PlanRecord(TypedDict):
    """What is written to ``plan.json``."""

    switch_step: int
    seed: int
    tasks: dict[str, int]
    """Task -> number of rows."""
    target: int
    fingerprint: JsonDict
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tasks, examples and switch step of a run: the same on every process and after a resume."""

    tasks: TaskRows
    examples: tuple[TaskExamples, ...]
    """Of each auxiliary task, what the gradient pass reads."""
    target: TaskExamples
    switch_step: int
    """Optimizer steps of warm-up; the selection follows the last of them."""
    seed: int
    fingerprint: JsonDict
    """What a resumed run must share with the one it goes on with, by what it is called."""

    @property
    def num_examples(self) -> int:
        return sum(len(task.example_ids) for task in (*self.examples, self.target))

    def reads_per_row(
        self, weights: Mapping[str, float], max_steps: int, rows_per_step: int
    ) -> dict[str, float]:
        """How often the steps after the switch read each row of a task, in a mixture."""
        rows = (max_steps - self.switch_step) * rows_per_step
        return {
            name: round(rows * weights[name] / count, 3)
            for name, count in zip(self.tasks.names, self.tasks.counts.tolist(), strict=True)
        }

    def to_dict(self) -> PlanRecord:
        """What is written to ``plan.json``."""
        packages = ("torch", "transformers", "accelerate", "datasets")
        return {
            "switch_step": self.switch_step,
            "seed": self.seed,
            "tasks": dict(zip(self.tasks.names, self.tasks.counts.tolist(), strict=True)),
            "target": self.target.num_rows,
            "fingerprint": self.fingerprint,
            "versions": {"hf_auxselect": __version__} | {name: version(name) for name in packages},
        }


@dataclass(frozen=True, kw_only=True)
class CostPreview:
    """What the gradient pass will cost; ``str()`` is a readable summary.

    Attributes:
        num_examples: examples that the pass reads, the target's included.
        seconds: predicted duration, from timed batches; with the passes over fewer examples that
            looking ahead takes.
        disk_mib: size of the gradient store, MiB; twice as much for a moment, at the end of the
            pass, when its parts are merged into one file.
        memory_mib: memory of the projection's tables and, to look ahead, of the tasks' mean
            gradients and of the parameters before they are moved, MiB, beyond that of an evaluation
            batch with gradients.
        switch_step: optimizer step after which the pass runs.
        verification_steps: further training steps, of ``verify`` and ``calibrate`` mixtures.
    """

    num_examples: int
    seconds: float
    disk_mib: float
    memory_mib: float
    switch_step: int
    verification_steps: int = 0

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"gradient pass after step {self.switch_step}: {self.num_examples} examples, about "
            f"{minutes} min {seconds:02d} s, {self.disk_mib:.1f} MiB on disk, "
            f"{self.memory_mib:.0f} MiB of memory"
        ) + (
            f"; real fine-tunes: {self.verification_steps} training steps"
            if self.verification_steps
            else ""
        )


def make_plan(
    trainer: Trainer,
    *,
    target: str | None,
    task_column: str,
    warmup: float | int,
    max_steps: int,
    must_train_on: bool,
    selector: AbstractSelector,
    keep: Sequence[str],
    examples_per_task: int | None,
    seed: int | None,
) -> Plan:
    """Settle the plan of a run, or say why it cannot work.

    Args:
        trainer: the trainer, with its data prepared.
        target: key of an ``eval_dataset`` dict, or None.
        task_column: column of the training set.
        warmup: share of the run or number of steps.
        max_steps: optimizer steps of the whole run.
        must_train_on: whether a step must be left after the selection.
        selector: is asked for a choice once, so that options that do not fit raise now.
        keep: tasks that always stay.
        examples_per_task: at most this many of each are captured; None: all.
        seed: None: the trainer's ``data_seed`` or ``seed``.

    Raises:
        ValueError: the run is one in which a selection cannot work; says why and what to do.
    """
    switch.refuse_unsupported(trainer)
    tasks = switch.read_tasks(trainer, task_column)
    _dry_run(selector, tasks.names, keep)
    target_set = switch.target_dataset(trainer, target)
    switch_step = warmup if isinstance(warmup, int) else max(1, round(warmup * max_steps))
    if switch_step + must_train_on > max_steps:
        raise ValueError(
            f"warmup={warmup} ends after step {switch_step}, but the run has only {max_steps} "
            "steps, and none would be left for the estimates to be about; lower warmup, or train "
            "for longer (max_steps, num_train_epochs)."
        )
    if seed is None:
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    train_rows = switch.ModelRows(trainer, trainer.train_dataset)
    target_rows = switch.ModelRows(trainer, target_set)

    def draw(examples: np.ndarray, name: str) -> tuple[int, ...]:
        order = random_permutation(len(examples), seed, "examples", name)
        return tuple(sorted(examples[order[:examples_per_task]].tolist()))

    target_ids = draw(np.arange(len(target_rows)), "the target")
    target_weights = switch.evaluation_weights(trainer, target_rows, target_ids)
    if not sum(target_weights) > 0:
        raise ValueError(
            f"the target has no label tokens: in all {len(target_ids)} examples of eval_dataset "
            "that were looked at, every label is masked (-100). Look at its prompts and "
            "completions."
        )
    task_of_example = tasks.ids[train_rows.packed_rows]
    examples = tuple(
        TaskExamples(
            name=name,
            rows=train_rows,
            example_ids=draw(np.flatnonzero(task_of_example == k), name),
            num_rows=int(tasks.counts[k]),
        )
        for k, name in enumerate(tasks.names)
    )
    for task in examples:
        if not switch.has_label_tokens(trainer, train_rows, task.example_ids):
            raise ValueError(
                f"the task {task.name!r} has no label tokens: in all {len(task.example_ids)} "
                "examples of it that were looked at, every label is masked (-100), as when "
                "truncation cuts the completions off. Raise max_length, shorten its prompts, or "
                "leave the task out."
            )
    return Plan(
        tasks=tasks,
        examples=examples,
        target=TaskExamples(
            name=target or "target",
            rows=target_rows,
            example_ids=target_ids,
            num_rows=len(target_set),
            example_weights=tuple(target_weights),
        ),
        switch_step=switch_step,
        seed=seed,
        fingerprint={
            "tasks": dict(zip(tasks.names, tasks.counts.tolist(), strict=True)),
            "training rows": _digest(tasks.ids.tolist(), _sample(train_rows)),
            "target rows": _digest(len(target_rows), _sample(target_rows)),
            "trainable parameters": _digest(
                *(
                    (n, tuple(p.shape))
                    for n, p in trainer.model.named_parameters()
                    if p.requires_grad
                )
            ),
            "number of processes": trainer.args.world_size,
            "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        },
    )


def warn_of_leaked_target(plan: Plan) -> None:
    """Warn if the target is one of the training tasks, row for row."""
    target = plan.target.rows
    for task, own in zip(plan.examples, plan.tasks.rows, strict=True):
        if len(own) == len(target) and all(task.rows[i] == target[j] for j, i in enumerate(own)):
            logger.warning(
                "the target equals the training task %r row for row: the estimates are about rows "
                "that are trained on, too optimistic for new ones. Hold rows out for the target.",
                task.name,
            )


def require_same_plan(plan: Plan, on_disk: PlanRecord, path: Any) -> None:
    """Compare with the plan of the run that is resumed.

    Raises:
        ValueError: names each thing that changed.
    """
    before = on_disk["fingerprint"]
    changed = [
        f"{what} ({before.get(what)} before, {now} now)"
        for what, now in plan.fingerprint.items()
        if before.get(what) != now
    ]
    if changed:
        raise ValueError(
            f"cannot resume: the run differs from the one in {path} in {'; '.join(changed)}. The "
            "position in the mixture would be lost. Restore it, or start anew in another "
            "output_dir."
        )


def _dry_run(selector: AbstractSelector, task_names: Sequence[str], keep: Sequence[str]) -> None:
    """Let the selector meet its tasks, so that options that do not fit raise now."""

    def nothing(weights: ArrayLike) -> Estimate:
        zeros = np.zeros(len(np.asarray(weights)))
        return Estimate(loss=zeros, low=zeros, high=zeros)

    selector.select(nothing, task_names, keep=keep)


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _sample(rows: switch.ModelRows) -> list[Any]:
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // 64))]
