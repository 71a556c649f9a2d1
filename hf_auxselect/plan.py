"""The plan: what a run settles before its first step, and refuses if it cannot work."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from hf_auxselect._version import __version__
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.check import examples_to_check
from hf_auxselect.capture.scalars import CollateFn
from hf_auxselect.checks import is_count
from hf_auxselect.clusters import evenly_split
from hf_auxselect.dry_run import dry_run
from hf_auxselect.files import JsonDict
from hf_auxselect.fingerprint import digest
from hf_auxselect.options import Options
from hf_auxselect.report.content import RunRecord
from hf_auxselect.reselection import Reselection
from hf_auxselect.seeds import random_permutation
from hf_auxselect.sharding import shape_of, trainable_parameters
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer import access, data, support
from hf_auxselect.trainer.evaluation import evaluation_weights, has_label_tokens
from hf_auxselect.trainer.loss import TrainerLoss, settle_loss

logger = logging.getLogger(__name__)


ALL_ROWS = "all rows"
"""The one task of a training set that is split into clusters later."""


class _PlanRecord(TypedDict):
    """What every plan has."""

    switch_step: int
    seed: int
    tasks: dict[str, int]
    """Task -> number of rows."""
    target: int
    fingerprint: JsonDict
    versions: dict[str, str]


class PlanRecord(_PlanRecord, total=False):
    """The content of ``plan.json``."""

    switch_steps: list[int]
    """Of ``reselect=``, with the target of each selection."""
    targets: list[str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tasks, examples and switch step of a run: the same on every process and after a resume."""

    tasks: TaskRows
    examples: tuple[TaskExamples, ...]
    """What the gradient pass reads of each auxiliary task."""
    target: TaskExamples
    target_key: str | None
    """Of the ``eval_dataset`` dict, or None."""
    groups: tuple[TaskExamples, ...]
    """Further targets, whose losses are estimated, too."""
    loss: TrainerLoss
    """How the loss of an example is computed, in agreement with the trainer."""
    examples_per_row: dict[str, float]
    """Mean number of examples in a packed row of each task; empty if each row is one example."""
    switch_steps: tuple[int, ...]
    """Optimizer steps after which a selection is made, ascending; the first ends the warm-up."""
    max_steps: int
    """Optimizer steps of the whole run."""
    reselection: Reselection | None
    targets: Mapping[str | None, TaskExamples]
    """By its key, each target that the run may have."""
    default_target: str | None
    """Key of the target where ``reselection`` names none."""
    seed: int
    fingerprint: JsonDict
    """What a resumed run must share with the run that it continues."""

    def starting_at(self, first_step: int) -> Plan:
        """The plan with another step of the first selection."""
        steps: tuple[int, ...] = (first_step,)
        if self.reselection is not None:
            steps = self.reselection.steps(first_step, self.max_steps)
        return replace(self, switch_steps=steps).at(first_step)

    def at(self, step: int) -> Plan:
        """The plan with the target of the selection after this step."""
        key = None if self.reselection is None else self.reselection.target_at(step)
        key = self.default_target if key is None else key
        return replace(self, target=self.targets[key], target_key=key)

    @property
    def num_examples(self) -> int:
        every = (*self.examples, self.target, *self.groups)
        return sum(len(task.example_ids) for task in every)

    def with_tasks(self, tasks: TaskRows, examples_per_task: int | None) -> Plan:
        """The plan with the training rows in other tasks.

        Args:
            tasks: of the training rows.
            examples_per_task: at most this many of each are captured; None: all.
        """
        rows = self.examples[0].rows
        assert isinstance(rows, data.ModelRows)
        return replace(
            self, tasks=tasks, examples=_examples_of(tasks, rows, self.seed, examples_per_task)
        )

    def all_rows(self) -> TaskExamples:
        """All training rows as one task, to be captured."""
        rows = self.examples[0].rows
        return TaskExamples(
            name=ALL_ROWS, rows=rows, example_ids=range(len(rows)), num_rows=len(rows)
        )

    def target_sample_note(self) -> list[str]:
        """A sentence for the report for each target whose loss is that of some of its examples."""
        whole = [(self.target, f"the target's {len(self.target.rows)} examples")]
        whole += [(g, f"the {len(g.rows)} examples of the group {g.name!r}") for g in self.groups]
        return [
            f"estimates are about {len(one.example_ids)} of {examples}; the logged loss is "
            "that of all. examples_per_task=None reads all."
            for one, examples in whole
            if len(one.example_ids) != len(one.rows)
        ]

    def examples_to_check(self, model: nn.Module, collate_fn: CollateFn) -> list[Any]:
        """Two examples whose captured gradients are compared with autograd's before the first step.

        Where some have several images, or none, those two of a task that differ most from one: a
        batch then holds more or fewer images than examples.
        """
        loss = self.loss.of_example
        for task in (*self.examples, self.target, *self.groups):
            assert isinstance(task.rows, data.ModelRows)
            others = np.abs(task.rows.num_images(task.example_ids) - 1)
            if others.any():
                order = np.argsort(-others, kind="stable")
                first = replace(task, example_ids=[task.example_ids[i] for i in order])
                second = replace(first, example_ids=first.example_ids[1:] or first.example_ids)
                return examples_to_check(model, [first], second, collate_fn, loss)
        return examples_to_check(model, self.examples, self.target, collate_fn, loss)

    def amounts(self, weights: Mapping[str, float], rows_to_read: int) -> RunRecord:
        """How much there is of each task, and how much of it the rest of the run reads.

        Args:
            weights: share of each task in the mixture.
            rows_to_read: number of rows that are drawn from the mixture.
        """
        rows = dict(zip(self.tasks.names, self.tasks.counts.tolist(), strict=True))
        amounts = RunRecord(
            reads_per_row={
                name: round(rows_to_read * weights[name] / count, 3) for name, count in rows.items()
            },
            rows_to_read=rows_to_read,
            rows_per_task=rows,
        )
        if self.examples_per_row:
            amounts["examples_per_row"] = self.examples_per_row
        return amounts

    def to_dict(self) -> PlanRecord:
        """The content of ``plan.json``."""
        packages = ("torch", "transformers", "accelerate", "datasets")
        record: PlanRecord = {
            "switch_step": self.switch_steps[0],
            "seed": self.seed,
            "tasks": dict(zip(self.tasks.names, self.tasks.counts.tolist(), strict=True)),
            "target": self.target.num_rows,
            "fingerprint": self.fingerprint,
            "versions": {"hf_auxselect": __version__} | {name: version(name) for name in packages},
        }
        if self.reselection is not None:
            record["switch_steps"] = list(self.switch_steps)
            record["targets"] = [self.at(step).target.name for step in self.switch_steps]
        return record


@dataclass(frozen=True, kw_only=True)
class CostPreview:
    """What the gradient pass will cost; ``str()`` is a readable summary.

    Attributes:
        num_examples: examples that the pass reads, the target's included.
        seconds: predicted duration, from timed batches; includes the probes, which are passes over
            fewer examples.
        disk_mib: size of the gradient store, MiB. At the end of the pass it takes twice as much for
            a moment, while its parts are merged into one file.
        memory_mib: predicted peak of the memory, in MiB, that the passes over the model take on its
            device beyond what is there before them (parameters, the optimizer's state): activations
            and gradients of the largest batch, as measured; the projection's tables; a copy of the
            optimizer's state; and, for probes, displacements of the parameters and, on the CPU,
            the tasks' mean gradients. Without libraries, the allocator's fragments, and what the
            estimator and the selector take afterwards.
        host_memory_mib: predicted size of the tasks' mean gradients, in MiB, which the host's
            memory holds where the model is not on the CPU; else 0.
        switch_step: optimizer step after which the pass runs; of several, the first one.
        verification_steps: further training steps at most, of the ground-truth runs of ``verify``,
            ``calibrate`` and ``confirm``; these share the runs on equal mixtures.
        num_selections: number of selections, which all other numbers are about together; with
            ``Reselection(significance=...)`` the largest possible one, without the tests.
        is_sharded: whether the numbers are about a process that holds its shard of the model, and
            all of what belongs to trained parameters.
    """

    num_examples: int
    seconds: float
    disk_mib: float
    memory_mib: float
    switch_step: int
    verification_steps: int = 0
    host_memory_mib: float = 0.0
    num_selections: int = 1
    is_sharded: bool = False

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        passes = (
            f"{self.num_selections} gradient passes, the first"
            if self.num_selections > 1
            else "gradient pass"
        )
        return (
            f"{passes} after step {self.switch_step}: {self.num_examples} examples, about "
            f"{minutes} min {seconds:02d} s, {self.disk_mib:.1f} MiB on disk, "
            f"{self.memory_mib:.0f} MiB of memory"
            + (
                f" and {self.host_memory_mib:.0f} MiB of the host's memory"
                if self.host_memory_mib
                else ""
            )
            + (
                f"; ground-truth runs: {self.verification_steps} training steps"
                if self.verification_steps
                else ""
            )
            + (
                "; each process holds its shard of the model and, in this memory, whole gradients "
                "of the trained parameters"
                if self.is_sharded
                else ""
            )
        )


def make_plan(trainer: Trainer, options: Options, *, max_steps: int, must_train_on: bool) -> Plan:
    """Settle the plan of a run, or say why it cannot work.

    Args:
        trainer: the trainer, with its data prepared.
        options: the callback's. Its selector is asked for a choice once, so that options of it that
            do not fit raise now.
        max_steps: optimizer steps of the whole run.
        must_train_on: whether a step must be left after the selection.

    Raises:
        ValueError: the run is one in which a selection cannot work; says why and what to do.
    """
    support.refuse_unsupported(trainer)
    if options.clusters is None:
        tasks = split = data.read_tasks(trainer, options.task_column)
        _warn_of_unknown_sources(options, tasks.names)
    else:
        tasks = TaskRows((ALL_ROWS,), np.zeros(len(trainer.train_dataset), np.int64))
        split = evenly_split(len(tasks.ids), options.clusters)
    dry_run(options, split)
    warmup, seed = options.warmup, _seed(trainer, options)
    switch_step = warmup if isinstance(warmup, int) else max(1, round(warmup * max_steps))
    if switch_step + must_train_on > max_steps:
        raise ValueError(
            f"warmup={warmup} ends after step {switch_step}, but the run has only {max_steps} "
            "steps, and none would be left for the estimates to be about; lower warmup, or train "
            "for longer (max_steps, num_train_epochs)."
        )
    default_target = data.target_key(trainer, options.target)
    keys = [default_target]
    switch_steps: tuple[int, ...] = (switch_step,)
    if (reselection := options.reselection) is not None:
        switch_steps = reselection.steps(switch_step, max_steps)
        named = map(reselection.target_at, range(switch_step, max_steps))
        keys = list(dict.fromkeys(default_target if key is None else key for key in named))
    target_sets = {
        key: data.target_dataset(trainer, key, of_reselect=key != default_target) for key in keys
    }
    group_sets = {name: data.group_dataset(trainer, name, keys) for name in options.groups}
    train_rows = data.ModelRows(trainer, trainer.train_dataset)
    target_rows = {key: data.ModelRows(trainer, one) for key, one in target_sets.items()}

    if options.clusters is not None and train_rows.is_packed:
        raise ValueError(
            f"clusters={options.clusters} splits the training set by rows, but its rows hold "
            "several packed examples. Set packing=False; or split the set before it is packed, "
            "with cluster_tasks."
        )
    at_most = options.examples_per_task
    loss = settle_loss(trainer, train_rows, target_rows[keys[0]])

    def evaluated(rows: data.ModelRows, key: str | None, name: str, what: str) -> TaskExamples:
        ids = _draw(np.arange(len(rows)), what, seed, at_most)
        weights = _weights_in_evaluation(trainer, key, rows, ids, loss, what)
        return TaskExamples(
            name=name, rows=rows, example_ids=ids, num_rows=len(rows), example_weights=weights
        )

    targets = {
        key: evaluated(
            rows, key, key or "target", "the target" if key == keys[0] else f"the target {key!r}"
        )
        for key, rows in target_rows.items()
    }
    group_rows = {name: data.ModelRows(trainer, dataset) for name, dataset in group_sets.items()}
    groups = tuple(
        evaluated(rows, name, name, f"the group {name!r}") for name, rows in group_rows.items()
    )
    task_of_example = tasks.ids[train_rows.packed_rows]
    examples_per_row = np.bincount(task_of_example, minlength=len(tasks.names)) / tasks.counts
    examples = _examples_of(tasks, train_rows, seed, at_most)
    for task in examples:
        if not has_label_tokens(trainer, train_rows, task.example_ids, loss):
            raise ValueError(
                f"the task {task.name!r} has no label tokens: in all {len(task.example_ids)} "
                "examples of it that were looked at, every label is masked (-100), as when "
                "truncation cuts the completions off. Raise max_length, shorten its prompts, or "
                "leave the task out."
            )
    return Plan(
        tasks=tasks,
        examples=examples,
        target=targets[keys[0]],
        target_key=keys[0],
        groups=groups,
        loss=loss,
        examples_per_row=(
            {}
            if (examples_per_row == 1).all()
            else dict(zip(tasks.names, examples_per_row.tolist(), strict=True))
        ),
        switch_steps=switch_steps,
        max_steps=max_steps,
        reselection=reselection,
        targets=targets,
        default_target=default_target,
        seed=seed,
        fingerprint={
            "tasks": dict(zip(tasks.names, tasks.counts.tolist(), strict=True)),
            "training rows": _digest_of_rows(train_rows, tasks),
            "target rows": _digest_of_rows(target_rows[keys[0]]),
            "groups": {name: _digest_of_rows(rows) for name, rows in group_rows.items()},
            "trainable parameters": digest(
                *((n, tuple(shape_of(p))) for n, p in trainable_parameters(trainer.model).items())
            ).hex(),
            "loss": str(loss.of_example),
            "number of processes": trainer.args.world_size,
            "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
            "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        }
        | ({} if options.clusters is None else {"clusters": options.clusters})
        | {f"rows of the target {key!r}": _digest_of_rows(target_rows[key]) for key in keys[1:]},
    )


def _seed(trainer: Trainer, options: Options) -> int:
    """The callback's seed, or the trainer's that stands in for it."""
    if options.seed is not None:
        return options.seed
    name, seed = access.data_seed(trainer)
    if not is_count(seed, 0):
        raise ValueError(
            f"{name} of TrainingArguments must be an int of at least 0 to seed the selection "
            f"too, got {seed!r}; change it, or give the callback its own seed=..."
        )
    return seed


def _warn_of_unknown_sources(options: Options, names: Sequence[str]) -> None:
    """Warn of sources of other tasks; no error, since tasks may be left out on purpose."""
    if unknown := [name for name in options.sources if name not in names]:
        logger.warning(
            "sources names %s, but the tasks of the training set are %s; exports and the model "
            "card leave such sources out. Correct the names if these tasks should be there.",
            unknown,
            list(names),
        )


def _examples_of(
    tasks: TaskRows, rows: data.ModelRows, seed: int, at_most: int | None
) -> tuple[TaskExamples, ...]:
    """What the gradient pass reads of each task."""
    task_of_example = tasks.ids[rows.packed_rows]
    return tuple(
        TaskExamples(
            name=name,
            rows=rows,
            example_ids=_draw(np.flatnonzero(task_of_example == k), name, seed, at_most),
            num_rows=int(tasks.counts[k]),
        )
        for k, name in enumerate(tasks.names)
    )


def _draw(examples: np.ndarray, name: str, seed: int, at_most: int | None) -> tuple[int, ...]:
    """Up to so many of some examples, ascending."""
    order = random_permutation(len(examples), seed, "examples", name)
    return tuple(sorted(examples[order[:at_most]].tolist()))


def require_same_plan(plan: Plan, on_disk: PlanRecord, path: Any) -> None:
    """Compare with the plan of the run that is resumed.

    Raises:
        ValueError: names each thing that changed.
    """
    before = on_disk["fingerprint"]
    changed = [
        f"{what} ({before.get(what)} before, {now} now)"
        for what, now in plan.fingerprint.items()
        if what in before and before[what] != now  # earlier releases wrote less
    ]
    if changed:
        raise ValueError(
            f"cannot resume: the run differs from the one in {path} in {'; '.join(changed)}. The "
            "position in the mixture would be lost. Restore it, or start anew in another "
            "output_dir."
        )


def _weights_in_evaluation(
    trainer: Trainer,
    key: str | None,
    rows: data.ModelRows,
    ids: Sequence[int],
    loss: TrainerLoss,
    what: str,
) -> tuple[float, ...]:
    """Weight of each of some examples in the loss that the trainer logs for an evaluation set.

    Raises:
        ValueError: none of them has a label token, or counts in the logged loss.
    """
    if not has_label_tokens(trainer, rows, ids, loss):
        raise ValueError(
            f"{what} has no label tokens: in all {len(ids)} examples of eval_dataset "
            "that were looked at, every label is masked (-100). Look at its prompts and "
            "completions."
        )
    weights = evaluation_weights(trainer, key, rows, ids, loss)
    if not sum(weights) > 0:
        raise ValueError(
            f"dataloader_drop_last=True leaves all {len(ids)} examples of {what} that "
            "are read out of the trainer's evaluation batches. Lower per_device_eval_batch_size, "
            "or pass examples_per_task=None."
        )
    return tuple(weights)


def _digest_of_rows(rows: data.ModelRows, tasks: TaskRows | None = None) -> str:
    """A hash of 64 or more rows, spread out, and of which task each row belongs to.

    Rows that a map-style dataset makes at random are read from the same random states in every
    process. If they still differ when they are read twice, their number alone is hashed.
    """
    ids = None if tasks is None else tasks.ids

    def read() -> bytes:
        hashes = []
        for i in _spread_out(rows):
            if not rows.is_stored:
                random.seed(0)
                np.random.seed(0)
                torch.manual_seed(0)
            hashes.append(digest(rows.without_format(i)))
        return b"".join(hashes)

    with access.preserved_rng():
        first = read()
        known = first if rows.is_stored or read() == first else b""
    return digest(len(rows), ids, known).hex()


def _spread_out(rows: data.ModelRows) -> range:
    return range(0, len(rows), max(1, len(rows) // 64))
