"""The gradient pass: projected gradients of chosen examples of every task, into a store.

Shapes: N examples, D projection_dim.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_auxselect.capture.batching import BatchLimits, TaskExamples
from hf_auxselect.capture.check import (
    NUM_CANDIDATES,
    compare_with_autograd,
    examples_to_check,
)
from hf_auxselect.capture.example_gradients import (
    ExampleGradients,
    warn_of_one_by_one,
)
from hf_auxselect.capture.hooks import NonFiniteError
from hf_auxselect.capture.layer_gradients import measure_layers, parameter_rates, require_layers
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    AT_OPTIMIZER,
    NEXT_TOKEN_LOSS,
    SCALARS,
    CollateFn,
    ExampleLoss,
    count_label_tokens,
    match_model_loss,
)
from hf_auxselect.checks import require_count
from hf_auxselect.distributed import gather, on_main_process, process_rank
from hf_auxselect.fingerprint import digest
from hf_auxselect.layers import LayerSelection
from hf_auxselect.sharding import is_sharded
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.store.format import Arrays, Role, task_entry
from hf_auxselect.store.records import LayerGradients, RemainingTraining
from hf_auxselect.store.writer import ShardSpec, StoreWriter

logger = logging.getLogger(__name__)

_SHARDS_OF_TASK = 16
_LEAST_SHARD, _LARGEST_SHARD = 32, 4096
"""Number of shards of a task, and the fewest and most examples of a shard. A convention: shards are
small enough to share out among processes and to lose, and few enough to list."""


def capture_gradients(
    model: nn.Module,
    tasks: Mapping[str, Sequence[Any]],
    target: Sequence[Any],
    collate_fn: CollateFn,
    *,
    groups: Mapping[str, Sequence[Any]] | None = None,
    directory: str | Path,
    projection_dim: int = 4096,
    batch_size: int = 16,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    scalars: Sequence[str] | None = None,
    layers: LayerSelection | None = None,
    one_by_one: bool = False,
    loss: ExampleLoss | None = None,
    progress: bool = True,
) -> GradientStore:
    """Capture the projected gradient of every example of every task and of the target.

    One forward per batch and one backward per scalar, in evaluation mode (no dropout); the model is
    left as it was. A pass that was interrupted goes on where it stopped when it is called again
    with the same arguments.

    Args:
        model: the model, on its device. Gradients are those of its trainable parameters, where
            they are now (the linearization point).
        tasks: name -> examples of each auxiliary task.
        target: examples of the target.
        collate_fn: turns a list of examples into the model's keyword arguments with ``labels``
            (int64 [B, S], -100 where there is no loss), on the model's device.
        groups: name -> examples of further targets.
        directory: where the store is written.
        projection_dim: D, length of a projected gradient.
        batch_size: examples of a forward pass if they are as long as the longest; shorter ones are
            filled up to as many tokens (at most four times as many examples). The numbers depend on
            it by rounding only.
        seed: determines the projection and the labels that are drawn for ``sampled_loss``.
        optimizer: the optimizer of the training that the estimates are about, for estimators that
            model its steps.
        scalars: what is differentiated: ``"margin"``, ``"loss"``, ``"sampled_loss"``, each also
            with ``"@optimizer"`` behind it, for the gradient in the coordinates in which a step of
            the optimizer is a plain gradient step. The first is the store's default. None: what the
            estimators of this package need, with the optimizer if it is given.
        layers: scores layers by gradients of the target, for :func:`hf_auxselect.score_layers`, and
            leaves those that it does not keep out of the gradients; with the optimizer out of those
            in its coordinates alone. None: all layers, and no scores.
        one_by_one: run each example alone, without hooks: slow, but right for any model. A model
            whose tensors do not split by example runs so in any case.
        loss: how the loss of an example follows from the model; None: found by comparing with the
            loss that the model itself returns for labels. A store in ``directory`` that was
            captured with another loss is replaced.
        progress: show a progress bar.

    Returns:
        The store, read from ``directory``.

    Raises:
        ValueError: no task; an empty task, target or group; an unknown scalar; an unsupported
            optimizer.
        UnsupportedLossError: the model's own loss is no negative log-likelihood of its labels.
        UnsupportedModuleError, GradientCheckError: see :func:`check_per_example_gradients`.
        NonFiniteError: a loss or gradient is NaN or infinite; names task and row.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources: A First-Order
    Approximation Approach" (EMNLP Findings 2024), section 3, step 1.
    """
    if not tasks:
        raise ValueError("tasks is empty; expected a mapping from task names to examples.")
    if scalars is None:
        scalars = ("margin",)
        if optimizer is not None:
            scalars += ("loss", "loss@optimizer", "sampled_loss@optimizer")

    if loss is None:
        batches = (collate_fn([target[i]]) for i in range(min(len(target), NUM_CANDIDATES)))
        with evaluation_mode(model):
            labelled = (b for b in batches if count_label_tokens(model, b, NEXT_TOKEN_LOSS).any())
            batch = next(labelled, None)
            loss = NEXT_TOKEN_LOSS if batch is None else match_model_loss(model, batch)

    def examples_of(name: str, rows: Sequence[Any]) -> TaskExamples:
        return TaskExamples(name=name, rows=rows, example_ids=range(len(rows)), num_rows=len(rows))

    return capture_examples(
        model,
        [examples_of(name, rows) for name, rows in tasks.items()],
        examples_of("target", target),
        collate_fn,
        groups=[examples_of(name, rows) for name, rows in (groups or {}).items()],
        directory=directory,
        projection_dim=projection_dim,
        batch_size=batch_size,
        seed=seed,
        scalars=scalars,
        optimizer=optimizer,
        layers=layers,
        one_by_one=one_by_one,
        loss=loss,
        progress=progress,
    )


def capture_examples(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    *,
    groups: Sequence[TaskExamples] = (),
    directory: str | Path,
    projection_dim: int,
    batch_size: int,
    seed: int,
    scalars: Sequence[str],
    optimizer: torch.optim.Optimizer | None = None,
    training: RemainingTraining | None = None,
    layers: LayerSelection | None = None,
    one_by_one: bool = False,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
    progress: bool = True,
) -> GradientStore:
    """:func:`capture_gradients` for chosen rows of each task, shared among the processes of a run.

    With ``torch.distributed`` set up, every process calls this with the same arguments; each
    captures its share of the shards, the first one writes them, and all return the same store
    (``directory`` must be visible to all).

    Args beyond those of :func:`capture_gradients`:
        training: the training after the switch, kept in the store.
    """
    parts = with_roles(tasks, target, groups)
    for task, role in parts:
        if not len(task.example_ids):
            raise ValueError(f"{role} {task.name!r} has no examples.")
    for spec in scalars:
        if spec.removesuffix(AT_OPTIMIZER) not in SCALARS:
            raise ValueError(
                f"unknown scalar {spec!r} in scalars; known are {sorted(SCALARS)}, each also with "
                f"{AT_OPTIMIZER!r} behind it."
            )
        if spec.endswith(AT_OPTIMIZER) and optimizer is None:
            raise ValueError(f"the scalar {spec!r} needs optimizer=...")
    require_count("batch_size", batch_size, 1)
    require_count("seed", seed, 0)
    rank, world_size = process_rank()
    shards = plan_shards(parts)
    by_key = {(task.name, role): task for task, role in parts}
    rates = None if training is None else training.total_group_rates
    sketch = CountSketch(projection_dim, seed)
    measured: LayerGradients | None = None
    of_parameters: dict[str, float] = {}
    if layers is not None:
        require_layers(model, layers)
        measured = measure_layers(model, target, collate_fn, layers, sketch=sketch, loss=loss)
        of_parameters = parameter_rates(model, layers.by, measured.rates)
    state = None if optimizer is None else read_optimizer(model, optimizer, rates, of_parameters)
    one_by_one = one_by_one or loss.of_batch is not None
    rerun: frozenset[str] = frozenset()
    if not one_by_one:
        with contextlib.suppress(NonFiniteError):  # the pass itself names task and row
            checked = examples_to_check(model, tasks, target, collate_fn, loss)
            found = compare_with_autograd(model, checked, collate_fn, loss=loss)
            rerun = found.rerun
            if found.inseparable is not None:
                one_by_one = True
                warn_of_one_by_one(found.inseparable)
            else:
                logger.info("captured gradients agree with autograd; error %.1e", found.error)
    capture = ExampleGradients(
        model,
        collate_fn,
        sketch,
        scalars,
        seed,
        state,
        parameter_rates=of_parameters,
        one_by_one=one_by_one,
        loss=loss,
        rerun=rerun,
    )
    metadata = capture.metadata | {
        "batch_size": batch_size,
        "training": {} if training is None else training.to_json(),
        # They depend on the trainer's evaluation batches, and are written into each shard.
        "target_weights": digest(target.example_weights).hex(),
    }
    if groups:
        metadata["group_weights"] = {
            group.name: digest(group.example_weights).hex() for group in groups
        }
    vectors = capture.vectors()
    if measured is not None:
        metadata["layers"] = measured.to_json()
        vectors |= measured.to_vectors()
    writer: StoreWriter | None = None

    def open_store() -> list[ShardSpec]:
        nonlocal writer
        writer = StoreWriter(
            directory,
            scalars=scalars,
            tasks=[task_entry(task.name, role, task.num_rows) for task, role in parts],
            shards=shards,
            metadata=metadata,
            vectors=vectors,
        )
        return writer.pending

    pending = on_main_process(open_store)  # only the first process has a writer
    limits = BatchLimits.of(1 if one_by_one else batch_size, [task for task, _ in parts])
    in_step = is_sharded(model)
    num_done = sum(len(shard.example_ids) for shard in shards if shard not in pending)
    bar = tqdm(
        total=num_done + sum(len(shard.example_ids) for shard in pending),
        initial=num_done,
        desc="gradient pass",
        unit="example",
        disable=not progress or rank != 0,
    )

    def write(shards: Sequence[ShardSpec], results: Sequence[Any]) -> None:
        assert writer is not None
        for shard, arrays in zip(shards, results, strict=False):
            writer.write(shard, arrays)

    with bar, capture:
        for start in range(0, len(pending), world_size):
            round_of_shards = pending[start : start + world_size]
            result: Arrays | Exception | None = None
            is_idle = rank >= len(round_of_shards)
            if not is_idle or in_step:  # an idle process goes along, for nothing
                shard = round_of_shards[0 if is_idle else rank]
                task = by_key[shard.task, shard.role]
                try:
                    result = capture.shard(shard, task, limits, advance=bar.update)
                except Exception as caught:  # raised in all processes, so that none waits for it
                    # Within a pass the others wait in a layer, and only the launcher ends them.
                    if in_step and not isinstance(caught, NonFiniteError):
                        raise
                    result = caught
            results = gather(None if is_idle else result)
            for other in results:
                if isinstance(other, Exception):
                    raise other
            # A full disk, say, is an error in all processes.
            on_main_process(functools.partial(write, round_of_shards, results))
            bar.update(sum(len(shard.example_ids) for shard in round_of_shards[1:]))
    if capture.fixed_with_gradient:
        logger.warning(
            "%d trainable parameter(s), such as %r, have a gradient now, but had none in training "
            "so far, and so no state of the optimizer; the estimates take them as fixed.",
            len(capture.fixed_with_gradient),
            min(capture.fixed_with_gradient),
        )
    return GradientStore.load(directory)


def with_roles(
    tasks: Sequence[TaskExamples], target: TaskExamples, groups: Sequence[TaskExamples]
) -> list[tuple[TaskExamples, Role]]:
    """All that is captured, in the order of the store."""
    parts: list[tuple[TaskExamples, Role]] = [(task, "task") for task in tasks]
    return [*parts, (target, "target"), *((group, "group") for group in groups)]


def plan_shards(parts: Sequence[tuple[TaskExamples, Role]]) -> list[ShardSpec]:
    """Cut each task into shards, which processes share out and an interruption loses one of.

    The cuts depend on the task alone, so that its shards are found again beside other tasks.
    """
    shards = []
    for task, role in parts:
        size = min(max(len(task.example_ids) // _SHARDS_OF_TASK, _LEAST_SHARD), _LARGEST_SHARD)
        for start in range(0, len(task.example_ids), size):
            ids = tuple(int(i) for i in task.example_ids[start : start + size])
            shards.append(ShardSpec(task=task.name, role=role, example_ids=ids))
    return shards
