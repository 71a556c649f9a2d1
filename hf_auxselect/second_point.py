"""The tasks' gradients at a second point, where training is about to lead.

What a gradient changes by along a way of realistic length holds all that a Gauss-Newton matrix
leaves out there: the model's own curvature, and what is no longer quadratic.

Shapes: K tasks, D projection_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_auxselect.distributed import computed_once, gather, process_rank
from hf_auxselect.gradients import (
    BatchLimits,
    TaskExamples,
    row_length,
    seconds_of_batches,
)
from hf_auxselect.optimizer_state import read_optimizer
from hf_auxselect.per_example import (
    SCALARS,
    Batch,
    CollateFn,
    evaluation_mode,
    forward_label_logits,
)
from hf_auxselect.projection import CountSketch
from hf_auxselect.store import GradientStore, add_vectors

logger = logging.getLogger(__name__)

SECOND_POINT_EXAMPLES = 64
"""Examples of a task that are read again, at most: mean gradients take fewer than curvature."""


def capture_second_point(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    collate_fn: CollateFn,
    store: GradientStore,
    displacement_D: np.ndarray,
    *,
    directory: str | Path,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    progress: bool = True,
) -> GradientStore:
    """Capture by how much the mean gradient of every task changes along a displacement.

    A projected displacement cannot be taken as it is: the one that is taken is the combination of
    the optimizer's momentum and the tasks' mean gradients that is nearest to it. Two passes of
    forward and backward over at most 64 examples of each task, spread evenly over those of the
    store: one at the anchor, which sums it up, and one at its end. The model is left as it was.
    With ``torch.distributed`` set up, the batches are shared out.

    Args:
        model: the model at the anchor.
        tasks: the examples of the store, in its order.
        collate_fn: as for ``capture_gradients``.
        store: what was captured at the anchor, with the scalar ``"loss@optimizer"``.
        displacement_D: what ``AbstractEstimator.second_point`` returned.
        directory: where the store is; the result is added to it.
        optimizer: that of the store.
        batch_size: as for ``capture_gradients``.
        progress: show a progress bar.

    Returns:
        The store with two more vectors, in the optimizer's coordinates: ``second_point``, the
        displacement as it was taken, rounding included, and ``gradient_changes`` of the tasks. If
        one of them is not finite, a warning is logged and the store is returned as it was.

    Source: secants of gradients as in quasi-Newton methods; Nocedal and Wright, "Numerical
    Optimization" (2006), section 6.1.
    """
    state = read_optimizer(model, optimizer)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sketch = CountSketch(store.metadata["projection_dim"], store.metadata["seed"])
    chosen = [
        _spread(np.flatnonzero((store.task_ids == k) & (store.num_label_tokens > 0)))
        for k in range(len(tasks))
    ]
    ids = [store.example_ids[own].tolist() for own in chosen]
    read = [replace(task, example_ids=own) for task, own in zip(tasks, ids, strict=True)]
    rank, world_size = process_rank()
    batches = list(_batches(read, batch_size))[rank::world_size]
    share_N = np.zeros(len(store))  # of an example in the mean gradient of its task
    for own in chosen:
        tokens = store.num_label_tokens[own]
        share_N[own] = tokens / tokens.sum()

    gradients_ND = store.scalar("loss@optimizer")[1]
    before_KD = np.stack([share_N[own] @ gradients_ND[own].astype(np.float64) for own in chosen])
    sources_SD = np.vstack([store.vectors["momentum"].astype(np.float64), before_KD])
    coefficients_S = computed_once(
        lambda: np.linalg.lstsq(sources_SD.T, displacement_D, rcond=None)[0]
    )

    def gradient(k: int, places: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """Of one batch's part in its task's mean loss, by parameter and in the coordinates."""
        batch = collate_fn([tasks[k].rows[ids[k][i]] for i in places])
        values = _gradients(model, parameters, batch, share_N[chosen[k][places]])
        for name, value in values.items():
            yield name, value.flatten().float() * state.scales[name]

    bar = tqdm(
        total=2 * sum(len(places) for _, places in batches),
        desc="second point",
        unit="example",
        disable=not progress or rank != 0,
    )
    with bar, evaluation_mode(model):
        displacement = {
            name: torch.zeros(p.numel(), device=p.device) for name, p in parameters.items()
        }
        for k, places in batches:
            for name, value in gradient(k, places):
                displacement[name] += float(coefficients_S[1 + k]) * value
            bar.update(len(places))
        displacement = _sum_over_processes(displacement)
        for name, momentum in state.momentum.items():
            displacement[name] += float(coefficients_S[0]) * momentum * state.scales[name]
        after_KD = np.zeros((len(tasks), sketch.dim))
        with _displaced(parameters, displacement, state.scales) as moved:
            for k, places in batches:
                for name, value in gradient(k, places):
                    after_KD[k] += sketch.project(name, value[None])[0].double().cpu().numpy()
                bar.update(len(places))
        parts = [sketch.project(name, value[None])[0] for name, value in moved.items()]
    vectors = {
        "second_point": torch.stack(parts).sum(0).cpu().numpy(),
        "gradient_changes": np.sum(gather(after_KD), axis=0) - before_KD,
    }
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        logger.warning(
            "gradients where training is about to lead are not finite, and left out; look at the "
            "learning rate: training may diverge."
        )
        return store
    computed_once(lambda: add_vectors(directory, vectors))
    return store.with_vectors(vectors)


def predict_second_point_seconds(
    model: nn.Module, tasks: Sequence[TaskExamples], collate_fn: CollateFn, *, batch_size: int
) -> float:
    """Seconds that one process needs for both passes: the middle one of their batches, timed."""
    read = [replace(task, example_ids=_spread(task.example_ids).tolist()) for task in tasks]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = [
        [read[k].rows[read[k].example_ids[i]] for i in places]
        for k, places in _batches(read, batch_size)
    ]
    with evaluation_mode(model):
        return 2 * seconds_of_batches(
            batches,
            lambda rows: _gradients(model, parameters, collate_fn(rows), np.ones(len(rows))),
        )


def _spread(examples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Those that are read again, spread evenly over all."""
    count = min(len(examples), SECOND_POINT_EXAMPLES)
    return np.asarray(examples)[np.linspace(0, len(examples) - 1, count).astype(int)]


def _batches(tasks: Sequence[TaskExamples], batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Task and places among its ``example_ids`` of the examples of each batch."""
    limits = BatchLimits.of(batch_size, tasks)
    for k, task in enumerate(tasks):
        lengths = np.array([row_length(task.rows[i]) for i in task.example_ids])
        for places in limits.cut(lengths):
            yield k, places


def _gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, shares: np.ndarray
) -> dict[str, Tensor]:
    """Of a weighted sum of the losses of a batch's examples, by parameter."""
    losses = SCALARS["loss"](forward_label_logits(model, batch))
    weights = torch.as_tensor(shares, dtype=losses.dtype, device=losses.device)
    values = torch.autograd.grad(losses @ weights, list(parameters.values()), allow_unused=True)
    return {
        name: value for name, value in zip(parameters, values, strict=True) if value is not None
    }


def _sum_over_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    if process_rank()[1] == 1:
        return values
    parts = gather({name: value.cpu() for name, value in values.items()})
    return {
        name: torch.stack([part[name] for part in parts]).sum(0).to(value.device)
        for name, value in values.items()
    }


@contextmanager
def _displaced(
    parameters: Mapping[str, Tensor],
    displacement: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> Iterator[dict[str, Tensor]]:
    """Parameters elsewhere for the length of a context; how far they have really moved.

    Both displacements are in the optimizer's coordinates. In half precision a small one is rounded.
    """
    before = {name: p.detach().clone() for name, p in parameters.items()}
    moved = {}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p += (displacement[name] * scales[name]).view_as(p)
                moved[name] = (p.float() - before[name].float()).flatten() / scales[name]
        yield moved
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
