"""What is measured away from the anchor: gradients at second points, losses at ends.

What gradients and losses change by along a way of realistic length holds all that a Gauss-Newton
matrix leaves out there: the model's own curvature, and what is no longer quadratic.

Shapes: K tasks, T examples of the target, E ends, D projection_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_auxselect.capture.examples import BatchLimits, TaskExamples
from hf_auxselect.capture.hooks import CollateFn, differentiate
from hf_auxselect.capture.memory import (
    FittingBatches,
    PassCost,
    evaluation_mode,
    predict_batches,
    row_length,
)
from hf_auxselect.capture.optimizer_state import OptimizerState, read_optimizer
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    NEXT_TOKEN_LOSS,
    SCALARS,
    Batch,
    ExampleLoss,
    forward_label_logits,
)
from hf_auxselect.capture.schedule import group_rates
from hf_auxselect.distributed import computed_once, gather, process_rank, sum_over_processes
from hf_auxselect.store.arrays import GradientStore, add_vectors, evenly_spread

logger = logging.getLogger(__name__)

EXAMPLES_AHEAD = 64
"""Examples of a task, and of the target, that are read again at most: mean gradients take fewer
than curvature."""

Values = Mapping[str, Tensor]
"""A flat tensor by name of the parameter."""


def look_ahead(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    store: GradientStore,
    second_points_KD: np.ndarray,
    ends_ED: np.ndarray,
    *,
    directory: str | Path,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
    progress: bool = True,
) -> GradientStore:
    """Measure by how much the tasks' mean gradients and the target's losses change on the way.

    A projected displacement cannot be taken as it is: the one that is taken is the combination of
    the optimizer's momentum and the tasks' mean gradients that is nearest to it. At most 64
    examples of each task, spread evenly over those of the store, run forward and backward twice: at
    the anchor, for these mean gradients, and at the task's second point. As many of the target run
    forward, at the anchor and at each end. The model is left as it was. With ``torch.distributed``
    set up, the batches are shared out. On the CPU, K + 1 float32 numbers are kept per parameter.

    Args:
        model: the model at the anchor.
        tasks: the examples of the store, in its order.
        target: those of its target.
        collate_fn: as for ``capture_gradients``.
        store: what was captured at the anchor, with the scalar ``"loss@optimizer"``.
        second_points_KD: where each task's gradients are captured once more; from
            ``AbstractEstimator.way_ahead``.
        ends_ED: where losses are measured; likewise.
        directory: where the store is; the result is added to it.
        optimizer: that of the store.
        batch_size: as for ``capture_gradients``.
        loss: how the loss of an example is computed.
        progress: show a progress bar.

    Returns:
        The store with four more vectors: ``second_points`` and ``ends``, as they were taken,
        rounding included; the ``gradient_changes`` [K, D] of the tasks from the anchor to their
        second points, in the optimizer's coordinates like these; and the ``end_changes`` [E, T] of
        the losses of those examples of the target that were read. If one of them is not finite, a
        warning is logged and the store is returned as it was.

    Source: secants of gradients as in quasi-Newton methods; Nocedal and Wright, "Numerical
    Optimization" (2006), section 6.1.
    """
    state = read_optimizer(model, optimizer, group_rates(store.metadata.get("training")))
    sketch = CountSketch(store.metadata["projection_dim"], store.metadata["seed"])
    reader = _TaskReader(model, collate_fn, tasks, store, batch_size, loss)
    target_reader = _TargetReader(model, collate_fn, target, batch_size, loss)
    gradients_ND = store.scalar("loss@optimizer")[1]
    before_KD = np.stack([reader.mean_of_task(k, gradients_ND) for k in range(len(tasks))])
    sources = np.vstack([store.vectors["momentum"].astype(np.float64), before_KD])
    wanted = np.vstack([second_points_KD, ends_ED])
    coefficients = computed_once(lambda: np.linalg.lstsq(sources.T, wanted.T, rcond=None)[0].T)
    to_second_points, to_ends = np.split(coefficients, [len(tasks)])

    def project(values: Values) -> np.ndarray:
        return sketch.project_all(values).double().cpu().numpy()

    rank, _ = process_rank()
    bar = tqdm(
        total=2 * reader.num_examples + (1 + len(to_ends)) * target_reader.num_examples,
        desc="looking ahead",
        unit="example",
        disable=not progress or rank != 0,
    )
    with bar, evaluation_mode(model):
        reader.advance = target_reader.advance = bar.update
        way = _Displacements(reader.parameters, state, len(sources))
        if rank == 0:
            way.add(0, {name: m * state.scales[name] for name, m in state.momentum.items()})
        for k in range(len(tasks)):
            way.add(1 + k, reader.gradient(k, state.scales))
        way.sum_over_processes()
        losses_T = target_reader.losses()
        second_points, after, ends, changes = [], [], [], []
        for k, combination in enumerate(to_second_points):
            with way.taken(combination) as moved:
                second_points.append(project(moved))
                after.append(project(reader.gradient(k, state.scales)))
        for combination in to_ends:
            with way.taken(combination) as moved:
                ends.append(project(moved))
                changes.append(target_reader.losses() - losses_T)
    vectors = {
        "second_points": np.stack(second_points),
        "gradient_changes": np.sum(gather(np.stack(after)), axis=0) - before_KD,
        "ends": np.stack(ends),
        "end_changes": np.sum(gather(np.stack(changes)), axis=0),
    }
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        logger.warning(
            "gradients or losses where training is about to lead are not finite, and left out; "
            "look at the learning rate: training may diverge."
        )
        return store
    computed_once(lambda: add_vectors(directory, vectors))
    return store.with_vectors(vectors)


def losses_at(
    model: nn.Module,
    target: TaskExamples,
    collate_fn: CollateFn,
    values: Values,
    *,
    batch_size: int,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> np.ndarray:
    """The target's losses with other values of the trainable parameters.

    At most 64 examples are read, as in :func:`look_ahead`; the model is left as it was.

    Args:
        model: the model.
        target: the examples.
        collate_fn: as for ``capture_gradients``.
        values: of the trainable parameters, by name.
        batch_size: as for ``capture_gradients``.
        loss: how the loss of an example is computed.

    Returns:
        float64 [T], nats per label token of each example.
    """
    reader = _TargetReader(model, collate_fn, target, batch_size, loss)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with evaluation_mode(model), _restored(parameters):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(values[name])
        return np.sum(gather(reader.losses()), axis=0)


def predict_look_ahead(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    *,
    num_ends: int,
    batch_size: int,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> PassCost:
    """Cost for one process, from batches of tasks and target: see :func:`predict_batches`.

    The memory is that of a batch, with the gradient of the parameters, but without their
    displacements and without the optimizer's state.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fitting = FittingBatches()

    def batches(of: Sequence[TaskExamples]) -> list[list[object]]:
        read = [_read_again(task) for task in of]
        return [[read[k].rows[i] for i in ids] for k, ids, _ in _batches(read, batch_size, loss)]

    def forward_and_backward(rows: Sequence[object]) -> None:
        _gradients(model, parameters, collate_fn(list(rows)), np.ones(len(rows)), loss)

    def forward(rows: Sequence[object]) -> None:
        _losses(model, collate_fn(list(rows)), loss)

    def predict(of: Sequence[TaskExamples], run: Callable[[Sequence[object]], None]) -> PassCost:
        return predict_batches(model, batches(of), lambda rows: list(fitting.run(rows, run)))

    with evaluation_mode(model):
        of_tasks = predict(tasks, forward_and_backward)
        of_target = predict([target], forward)
    return PassCost(
        2 * of_tasks.seconds + (1 + num_ends) * of_target.seconds,
        max(of_tasks.memory, of_target.memory),
    )


def _read_again(task: TaskExamples) -> TaskExamples:
    """Those of its examples that are read again."""
    ids = np.asarray(task.example_ids)
    return replace(task, example_ids=ids[evenly_spread(len(ids), EXAMPLES_AHEAD)].tolist())


def _batches(
    tasks: Sequence[TaskExamples], batch_size: int, loss: ExampleLoss
) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Of each batch: its task, its examples, and their places among those of the task."""
    limits = BatchLimits.of(batch_size if loss.of_batch is None else 1, tasks)
    for k, task in enumerate(tasks):
        for places in limits.cut(np.array([row_length(task.rows[i]) for i in task.example_ids])):
            yield k, [task.example_ids[i] for i in places], places


class _TargetReader:
    """Reads examples of the target again: this process's share of their batches.

    Attributes:
        num_examples: that this process reads.
        advance: is told how many examples have been read.
    """

    def __init__(
        self,
        model: nn.Module,
        collate_fn: CollateFn,
        target: TaskExamples,
        batch_size: int,
        loss: ExampleLoss,
    ) -> None:
        self._model, self._collate_fn, self._loss = model, collate_fn, loss
        self._target = _read_again(target)
        rank, world_size = process_rank()
        self._batches = list(_batches([self._target], batch_size, loss))[rank::world_size]
        self.num_examples = sum(len(ids) for _, ids, _ in self._batches)
        self._fitting = FittingBatches()
        self.advance: Callable[[int], object] = lambda count: None

    def losses(self) -> np.ndarray:
        """Of all that are read again [T]; 0 for those that other processes read."""
        losses_T = np.zeros(len(self._target.example_ids))
        for _, ids, places in self._batches:
            rows = [self._target.rows[i] for i in ids]
            losses_T[places] = np.concatenate(list(self._fitting.run(rows, self._losses)))
            self.advance(len(ids))
        return losses_T

    def _losses(self, rows: Sequence[Any]) -> np.ndarray:
        batch = self._collate_fn(list(rows))
        return _losses(self._model, batch, self._loss).double().cpu().numpy()


class _TaskReader:
    """Reads some of a store's examples of the tasks again: this process's share of their batches.

    Attributes:
        parameters: those that are trained, by name.
        num_examples: that this process reads.
        advance: is told how many examples have been read.
    """

    def __init__(
        self,
        model: nn.Module,
        collate_fn: CollateFn,
        tasks: Sequence[TaskExamples],
        store: GradientStore,
        batch_size: int,
        loss: ExampleLoss,
    ) -> None:
        self._model, self._collate_fn, self._loss = model, collate_fn, loss
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.advance: Callable[[int], object] = lambda count: None
        self._rows_of_store: list[np.ndarray] = []
        self._shares: list[np.ndarray] = []  # of each example in the mean loss of its task
        for k in range(len(tasks)):
            # Rows without a label token have no loss and no gradient.
            own = np.flatnonzero((store.task_ids == k) & (store.num_label_tokens > 0))
            own = own[evenly_spread(len(own), EXAMPLES_AHEAD)]
            tokens = store.num_label_tokens[own]
            self._rows_of_store.append(own)
            self._shares.append(tokens / tokens.sum())
        self._tasks = [
            replace(task, example_ids=store.example_ids[own].tolist())
            for task, own in zip(tasks, self._rows_of_store, strict=True)
        ]
        rank, world_size = process_rank()
        self._batches = list(_batches(self._tasks, batch_size, loss))[rank::world_size]
        self.num_examples = sum(len(ids) for _, ids, _ in self._batches)
        self._fitting = FittingBatches()

    def mean_of_task(self, k: int, vectors_ND: np.ndarray) -> np.ndarray:
        """Mean [D] of the store's vectors over the examples of a task that are read again."""
        return self._shares[k] @ vectors_ND[self._rows_of_store[k]].astype(np.float64)

    def gradient(self, k: int, scales: Values) -> dict[str, Tensor]:
        """This process's part of the gradient of a task's mean loss, in the coordinates."""
        total: dict[str, Tensor] = {}
        for task, ids, places in self._batches:
            if task == k:
                rows = [
                    (self._tasks[k].rows[i], share)
                    for i, share in zip(ids, self._shares[k][places], strict=True)
                ]
                for part in self._fitting.run(rows, self._gradients, lambda row: row[0]):
                    for name, value in part.items():
                        if name in scales:
                            scaled = value.flatten().float() * scales[name]
                            total[name] = total[name] + scaled if name in total else scaled
                self.advance(len(ids))
        return total

    def _gradients(self, rows: Sequence[tuple[Any, float]]) -> dict[str, Tensor]:
        batch = self._collate_fn([row for row, _ in rows])
        shares = np.array([share for _, share in rows])
        return _gradients(self._model, self.parameters, batch, shares, self._loss)


def _gradients(
    model: nn.Module, parameters: Values, batch: Batch, shares: np.ndarray, loss: ExampleLoss
) -> dict[str, Tensor]:
    """Of a weighted sum of the losses of a batch's examples, by parameter."""
    losses = SCALARS["loss"](forward_label_logits(model, batch, loss))
    weights = torch.as_tensor(shares, dtype=losses.dtype, device=losses.device)
    return differentiate(losses @ weights, parameters)


def _losses(model: nn.Module, batch: Batch, loss: ExampleLoss) -> Tensor:
    """Of a batch's examples, nats per label token."""
    with torch.no_grad():
        return SCALARS["loss"](forward_label_logits(model, batch, loss))


@contextmanager
def _restored(parameters: Values) -> Iterator[Values]:
    """Lets parameters change for the length of a context; the values to which they return."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


class _Displacements:
    """Displacements of the parameters, in the optimizer's coordinates: combinations of S sources.

    The sources are kept on the CPU. What the optimizer does not train does not move.
    """

    def __init__(self, parameters: Values, state: OptimizerState, count: int) -> None:
        self._parameters = {name: p for name, p in parameters.items() if name in state.scales}
        self._state = state
        self._sources = {n: torch.zeros(count, p.numel()) for n, p in self._parameters.items()}

    def add(self, source: int, values: Values) -> None:
        """Add to a source."""
        for name, value in values.items():
            self._sources[name][source] += value.cpu()

    def sum_over_processes(self) -> None:
        """Add up what the processes have."""
        for name, value in self._sources.items():
            self._sources[name] = sum_over_processes(value.to(self._parameters[name].device)).cpu()

    @contextmanager
    def taken(self, coefficients: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Parameters elsewhere for the length of a context; how far they have really moved.

        ``coefficients`` [S] are those of the sources. In half precision a small displacement is
        rounded.
        """
        factors = torch.from_numpy(coefficients).float()
        moved = {}
        with _restored(self._parameters) as before:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    scale = self._state.scales[name]
                    step = (factors @ self._sources[name]).to(p.device) * scale
                    p += step.view_as(p)
                    step = p.float() - before[name].float()
                    moved[name] = self._state.to_coordinates(name, step.flatten())
            yield moved
