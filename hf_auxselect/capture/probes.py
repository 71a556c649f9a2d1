"""Probes: gradients and losses that are measured at displaced parameters.

Over a displacement as long as that of training, gradients and losses change by all that a
Gauss-Newton matrix leaves out: the model's own curvature, and terms beyond the quadratic.

Shapes: K tasks, T examples of the target, E endpoints, S sources, D projection_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_auxselect.capture.batching import BatchLimits, FittingBatches, TaskExamples, row_length
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.module_gradients import differentiate
from hf_auxselect.capture.optimizer_state import OptimizerState, read_optimizer
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    NEXT_TOKEN_LOSS,
    SCALARS,
    CollateFn,
    ExampleLoss,
    forward_label_logits,
)
from hf_auxselect.distributed import gather, on_main_process, process_rank, sum_over_processes
from hf_auxselect.sharding import (
    assign,
    device_of,
    is_sharded,
    parameters_of_graph,
    passes_to_add,
    reshard,
    shape_of,
    trainable_parameters,
    whole,
    write,
)
from hf_auxselect.store.arrays import GradientStore, evenly_spread
from hf_auxselect.store.records import MAX_PROBE_EXAMPLES, InitialLosses, Probes
from hf_auxselect.store.writer import add_vectors

logger = logging.getLogger(__name__)

Values = Mapping[str, Tensor]
"""A flat tensor by name of the parameter."""


def measure_probes(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    store: GradientStore,
    secant_points_KD: np.ndarray,
    endpoints_ED: np.ndarray,
    *,
    directory: str | Path,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    parameter_rates: Mapping[str, float] | None = None,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
    progress: bool = True,
) -> GradientStore:
    """Measure how the tasks' mean gradients and the target's losses change under displacements.

    A projected displacement cannot be applied as it is: the one that is applied is the combination
    of the optimizer's momentum and the tasks' mean gradients that is nearest to it. At most 64
    examples of each task, spread evenly over those of the store, run forward and backward twice:
    where the model is, for these mean gradients, and at the task's secant point. As many of the
    target run forward, where the model is and at each endpoint. The model is left as it was. With
    ``torch.distributed`` set up, the batches are shared out. On the CPU, K + 1 float32 numbers are
    kept per parameter.

    Args:
        model: the model at the linearization point.
        tasks: the examples of the store, in its order.
        target: those of its target.
        collate_fn: as for ``capture_gradients``.
        store: what was captured, with the scalar ``"loss@optimizer"``.
        secant_points_KD: the displacement at which each task's mean gradient is measured again;
            from ``AbstractEstimator.probe_points``.
        endpoints_ED: predicted endpoints of training, at which losses are measured; likewise.
        directory: where the store is; the probes are added to it.
        optimizer: that of the store.
        batch_size: as for ``capture_gradients``.
        parameter_rates: those that the store was captured with.
        loss: how the loss of an example is computed.
        progress: show a progress bar.

    Returns:
        The store with its ``probes``, whose displacements are those that were applied, rounding
        included. If a number of them is not finite, a warning is logged and the store is returned
        as it was.

    Raises:
        ValueError: the store was captured without the optimizer.

    Source: secants of gradients as in quasi-Newton methods; Nocedal and Wright, "Numerical
    Optimization" (2006), section 6.1.
    """
    record, training = store.optimizer, store.remaining_training
    if record is None:
        raise ValueError(
            "the store was captured without the optimizer, in whose coordinates displacements are. "
            "Pass optimizer=... to capture_gradients."
        )
    rates = None if training is None else training.total_group_rates
    state = read_optimizer(model, optimizer, rates, parameter_rates)
    sketch = CountSketch(store.metadata["projection_dim"], store.metadata["seed"])
    chosen, before_KD = _captured_means(store, tasks)
    reader = ProbeReader(model, collate_fn, chosen, batch_size, loss)
    of_target = examples_to_probe(target)
    target_reader = ProbeReader(model, collate_fn, [of_target], batch_size, loss)
    sources_SD = np.vstack([record.momentum_D, before_KD])
    wanted = np.vstack([secant_points_KD, endpoints_ED])
    coefficients = on_main_process(lambda: np.linalg.lstsq(sources_SD.T, wanted.T, rcond=None)[0].T)
    to_secant_points_KS, to_endpoints_ES = np.split(coefficients, [len(tasks)])

    def project(values: Values) -> np.ndarray:
        return sketch.project_all(values).double().cpu().numpy()

    rank, _ = process_rank()
    bar = tqdm(
        total=2 * reader.num_examples + (1 + len(to_endpoints_ES)) * target_reader.num_examples,
        desc="probes",
        unit="example",
        disable=not progress or rank != 0,
    )
    with bar, evaluation_mode(model):
        reader.advance = target_reader.advance = bar.update
        displacements = _Displacements(model, reader.parameters, state, len(sources_SD))
        if rank == 0:
            displacements.add(0, {n: m * state.scales[n] for n, m in state.momentum.items()})
        for k in range(len(tasks)):
            displacements.add(1 + k, reader.gradient(k, state.scales))
        displacements.sum_over_processes()
        losses_T = target_reader.losses()
        secant_points, after, endpoints, changes = [], [], [], []
        for k, combination in enumerate(to_secant_points_KS):
            with displacements.applied(combination) as moved:
                secant_points.append(project(moved))
                after.append(project(reader.gradient(k, state.scales)))
        for combination in to_endpoints_ES:
            with displacements.applied(combination) as moved:
                endpoints.append(project(moved))
                changes.append(target_reader.losses() - losses_T)
    vectors = Probes(
        secant_points_KD=np.stack(secant_points),
        gradient_changes_KD=np.sum(gather(np.stack(after)), axis=0) - before_KD,
        endpoints_ED=np.stack(endpoints),
        loss_changes_ET=np.sum(gather(np.stack(changes)), axis=0),
        task_example_ids=[np.array(task.example_ids, np.int64) for task in chosen],
        target_example_ids=np.array(of_target.example_ids, np.int64),
    ).to_vectors()
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        logger.warning(
            "gradients or losses at the predicted endpoints of training are not finite, and are "
            "left out; look at the learning rate: training may diverge."
        )
        return store
    on_main_process(lambda: add_vectors(directory, vectors))
    return store.with_vectors(vectors)


def losses_at(
    model: nn.Module,
    target: TaskExamples,
    collate_fn: CollateFn,
    values: Values,
    *,
    batch_size: int,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> InitialLosses:
    """The target's losses with other values of the trainable parameters.

    At most 64 examples are read, as in :func:`measure_probes`; the model is left as it was.

    Args:
        model: the model.
        target: the examples.
        collate_fn: as for ``capture_gradients``.
        values: of the trainable parameters, by name.
        batch_size: as for ``capture_gradients``.
        loss: how the loss of an example is computed.

    Returns:
        The losses, nats per label token, and the ids of the examples.
    """
    chosen = examples_to_probe(target)
    reader = ProbeReader(model, collate_fn, [chosen], batch_size, loss)
    with evaluation_mode(model), _restored(model, reader.parameters):
        assign(model, reader.parameters, values)
        losses_T = np.sum(gather(reader.losses()), axis=0)
    return InitialLosses(losses_T=losses_T, example_ids=np.array(chosen.example_ids, np.int64))


def examples_to_probe(task: TaskExamples) -> TaskExamples:
    """At most 64 of the examples, spread evenly over all."""
    ids = np.asarray(task.example_ids)
    return replace(task, example_ids=ids[evenly_spread(len(ids), MAX_PROBE_EXAMPLES)].tolist())


def _captured_means(
    store: GradientStore, tasks: Sequence[TaskExamples]
) -> tuple[list[TaskExamples], np.ndarray]:
    """The examples of each task that probes read, and the mean [K, D] of their gradients."""
    gradients_ND = store.scalar("loss@optimizer")[1]
    chosen, means = [], []
    for k, task in enumerate(tasks):
        rows = store.rows_to_probe(k)
        tokens = store.num_label_tokens[rows]
        weights = tokens / tokens.sum()
        ids = store.example_ids[rows].tolist()
        chosen.append(replace(task, example_ids=ids, example_weights=weights.tolist()))
        means.append(weights @ gradients_ND[rows].astype(np.float64))
    return chosen, np.stack(means)


@dataclass(frozen=True)
class _TaskBatch:
    """Some examples of one task."""

    task: int
    places: np.ndarray
    """Places of the examples among those of the task."""


WeightedRow = tuple[Any, float]
"""An example, and its weight in the mean loss of its task."""


class ProbeReader:
    """Computes losses and mean gradients of examples, wherever the model's parameters are.

    Args:
        model: the model, in evaluation mode when it is read.
        collate_fn: as for ``capture_gradients``.
        tasks: the examples; with weights where gradients are asked for.
        batch_size: as for ``capture_gradients``.
        loss: how the loss of an example is computed.

    Attributes:
        parameters: the trainable ones, by name.
        all_batches: the batches of all processes.
        num_examples: how many examples this process reads.
        advance: called with the number of examples that have been read.
    """

    def __init__(
        self,
        model: nn.Module,
        collate_fn: CollateFn,
        tasks: Sequence[TaskExamples],
        batch_size: int,
        loss: ExampleLoss,
    ) -> None:
        self._model, self._collate_fn, self._loss = model, collate_fn, loss
        self._tasks = tasks
        self._fitting = FittingBatches(can_split=not is_sharded(model))
        self.parameters = trainable_parameters(model)
        limits = BatchLimits.of(batch_size if loss.of_batch is None else 1, tasks)
        self.all_batches = [
            _TaskBatch(k, places)
            for k, task in enumerate(tasks)
            for places in limits.cut(np.array([row_length(task.rows[i]) for i in task.example_ids]))
        ]
        rank, world_size = process_rank()
        self._batches = self.all_batches[rank::world_size]
        self.num_examples = sum(len(batch.places) for batch in self._batches)
        self.advance: Callable[[int], object] = lambda count: None

    def rows(self, batch: _TaskBatch) -> list[WeightedRow]:
        """The examples of a batch; those of tasks without weights count 1 each."""
        task = self._tasks[batch.task]
        weights = task.example_weights
        return [
            (task.rows[task.example_ids[i]], 1.0 if weights is None else weights[i])
            for i in batch.places
        ]

    def losses(self) -> np.ndarray:
        """Loss [T] of the examples of the first task; 0 for those that other processes read."""
        losses_T = np.zeros(len(self._tasks[0].example_ids))
        own, others = self._batches_of(0)
        for batch in own:
            losses_T[batch.places] = np.concatenate(list(self.run_losses(self.rows(batch))))
            self.advance(len(batch.places))
        for batch in others:
            list(self.run_losses(self.rows(batch)))
        return losses_T

    def gradient(self, k: int, scales: Values) -> dict[str, Tensor]:
        """This process's part of the gradient of a task's mean loss, in the coordinates."""
        total: dict[str, Tensor] = {}
        own, others = self._batches_of(k)
        for batch in own:
            for part in self.run_gradients(self.rows(batch)):
                for name, value in part.items():
                    if name in scales:
                        scaled = value.flatten().float() * scales[name]
                        total[name] = total[name] + scaled if name in total else scaled
            self.advance(len(batch.places))
        for batch in others:
            list(self.run_gradients(self.rows(batch)))
        return total

    def _batches_of(self, k: int) -> tuple[list[_TaskBatch], list[_TaskBatch]]:
        """This process's batches of a task; and others, so that all processes run as many."""
        own = [batch for batch in self._batches if batch.task == k]
        any_batch = next(batch for batch in self.all_batches if batch.task == k)
        return own, [any_batch] * passes_to_add(len(own), self._model)

    def run_losses(self, rows: Sequence[WeightedRow]) -> Iterator[np.ndarray]:
        """Losses of the examples of a batch, in parts that fit into memory."""

        def run(part: Sequence[WeightedRow]) -> np.ndarray:
            with torch.no_grad():
                return self._losses(part).double().cpu().numpy()

        return self._fitting.run(rows, run, lambda row: row[0])

    def run_gradients(self, rows: Sequence[WeightedRow]) -> Iterator[dict[str, Tensor]]:
        """Gradients of the weighted sum of a batch's losses, in parts that fit into memory."""

        def run(part: Sequence[WeightedRow]) -> dict[str, Tensor]:
            with parameters_of_graph(self._model, self.parameters) as of_graph:
                losses = self._losses(part)
            weights = torch.as_tensor(
                [weight for _, weight in part], dtype=losses.dtype, device=losses.device
            )
            return differentiate(losses @ weights, of_graph)

        return self._fitting.run(rows, run, lambda row: row[0])

    def _losses(self, rows: Sequence[WeightedRow]) -> Tensor:
        batch = self._collate_fn([row for row, _ in rows])
        return SCALARS["loss"](forward_label_logits(self._model, batch, self._loss))


@contextmanager
def _restored(model: nn.Module, parameters: Values) -> Iterator[Values]:
    """Let parameters change for the length of a context; gives the values to which they return."""
    before = {name: whole(p).clone() for name, p in parameters.items()}
    try:
        yield before
    finally:
        assign(model, parameters, before)


class _Displacements:
    """Displacements of the parameters, in the optimizer's coordinates: combinations of S sources.

    The sources are kept on the CPU. Parameters that the optimizer does not train do not move.
    """

    def __init__(
        self, model: nn.Module, parameters: Values, state: OptimizerState, count: int
    ) -> None:
        self._model = model
        self._parameters = {name: p for name, p in parameters.items() if name in state.scales}
        self._state = state
        self._sources = {
            n: torch.zeros(count, shape_of(p).numel()) for n, p in self._parameters.items()
        }

    def add(self, source: int, values: Values) -> None:
        """Add to a source."""
        for name, value in values.items():
            self._sources[name][source] += value.cpu()

    def sum_over_processes(self) -> None:
        """Add up the sources of all processes."""
        for name, value in self._sources.items():
            device = device_of(self._parameters[name])
            self._sources[name] = sum_over_processes(value.to(device)).cpu()

    @contextmanager
    def applied(self, coefficients_S: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Displace the parameters for the length of a context; gives how far they really moved.

        In half precision a small displacement is rounded.
        """
        factors = torch.from_numpy(coefficients_S).float()
        moved = {}
        with _restored(self._model, self._parameters) as before:
            for name, value in before.items():
                scale = self._state.scales[name]
                step = (factors @ self._sources[name]).to(value.device) * scale
                after = value.clone()
                after += step.view_as(value)
                write(self._parameters[name], after)
                step = after.float() - value.float()
                moved[name] = self._state.to_coordinates(name, step.flatten())
            reshard(self._model)
            yield moved
