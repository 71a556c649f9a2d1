"""Predicted time and memory of the gradient pass and its probes, from a few batches of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_auxselect.capture.batching import BatchLimits, TaskExamples, num_tokens, row_length
from hf_auxselect.capture.example_gradients import ExampleGradients
from hf_auxselect.capture.examples import plan_shards, with_roles
from hf_auxselect.capture.hooks import InseparableError
from hf_auxselect.capture.memory import PeakMemory, evaluation_mode
from hf_auxselect.capture.module_gradients import UnsupportedModuleError
from hf_auxselect.capture.probes import ProbeReader, WeightedRow, examples_to_probe
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import NEXT_TOKEN_LOSS, CollateFn, ExampleLoss
from hf_auxselect.sharding import device_of, shape_of, trainable_parameters


@dataclass(frozen=True)
class PassCost:
    """Predicted cost of passes over a model."""

    seconds: float
    """Time that one process needs."""
    memory: int
    """Bytes that the largest batch takes at most, on the model's device."""


def predict_batches(
    model: nn.Module, batches: Sequence[list[Any]], run: Callable[[list[Any]], object]
) -> PassCost:
    """Predict the cost of ``run`` for all batches.

    The memory is that of the largest batch. The time is that of the middle one, times the ratio of
    the numbers of tokens, padding included.
    """
    sizes = [num_tokens(rows) for rows in batches]
    order = sorted(range(len(batches)), key=lambda i: (sizes[i], len(batches[i])))
    with PeakMemory(next(model.parameters()).device) as peak:  # this one warms up, too
        run(batches[order[-1]])
    middle = order[len(batches) // 2]
    start = time.perf_counter()
    run(batches[middle])
    seconds = time.perf_counter() - start
    return PassCost(seconds * sum(sizes) / sizes[middle], peak.bytes)


def predict_pass(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    *,
    projection_dim: int,
    batch_size: int,
    scalars: Sequence[str],
    one_by_one: bool = False,
    groups: Sequence[TaskExamples] = (),
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> PassCost:
    """Cost of the pass for one process, from two of its batches: see :func:`predict_batches`.

    The memory is that of a batch, without the tables of the projection and without the optimizer's
    state.
    """
    one_by_one = one_by_one or loss.of_batch is not None
    parts = with_roles(tasks, target, groups)
    limits = BatchLimits.of(1 if one_by_one else batch_size, [task for task, _ in parts])
    by_key = {(task.name, role): task for task, role in parts}
    batches: list[list[Any]] = []
    for shard in plan_shards(parts):
        rows = [by_key[shard.task, shard.role].rows[i] for i in shard.example_ids]
        lengths = np.array([row_length(row) for row in rows])
        batches += [[rows[i] for i in chosen] for chosen in limits.cut(lengths)]
    # The optimizer may not exist yet.
    scales = {
        name: torch.ones(1, device=device_of(p)).expand(shape_of(p).numel())
        for name, p in trainable_parameters(model).items()
    }
    sketch = CountSketch(projection_dim, 0)
    capture = ExampleGradients(
        model,
        collate_fn,
        sketch,
        scalars,
        0,
        None,
        scales=scales,
        one_by_one=one_by_one,
        loss=loss,
    )
    try:
        with capture:
            return predict_batches(
                model, batches, lambda rows: capture.batches("", list(enumerate(rows)))
            )
    except UnsupportedModuleError as error:
        # Of a sharded model; the pass itself finds out before it begins.
        if one_by_one or not isinstance(error.__cause__, InseparableError):
            raise
    return predict_pass(
        model,
        tasks,
        target,
        collate_fn,
        projection_dim=projection_dim,
        batch_size=batch_size,
        scalars=scalars,
        one_by_one=True,
        groups=groups,
        loss=loss,
    )


def predict_probes(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    *,
    num_endpoints: int,
    batch_size: int,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> PassCost:
    """Cost of the probes for one process: see :func:`predict_batches`.

    The memory is that of a batch, with the gradient of the parameters, but without their
    displacements and without the optimizer's state.
    """

    def reader_of(examples: Sequence[TaskExamples]) -> ProbeReader:
        chosen = [examples_to_probe(task) for task in examples]
        return ProbeReader(model, collate_fn, chosen, batch_size, loss)

    def predict(
        reader: ProbeReader, run: Callable[[Sequence[WeightedRow]], Iterator[object]]
    ) -> PassCost:
        batches = [[row for row, _ in reader.rows(batch)] for batch in reader.all_batches]
        return predict_batches(model, batches, lambda rows: list(run([(row, 1.0) for row in rows])))

    task_reader, target_reader = reader_of(tasks), reader_of([target])
    with evaluation_mode(model):
        of_tasks = predict(task_reader, task_reader.run_gradients)
        of_target = predict(target_reader, target_reader.run_losses)
    return PassCost(
        2 * of_tasks.seconds + (1 + num_endpoints) * of_target.seconds,
        max(of_tasks.memory, of_target.memory),
    )
