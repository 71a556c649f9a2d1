"""The gradient pass: projected gradients of chosen examples of every task, into a store.

Shapes: B examples of a batch, N examples in all, D projection_dim.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_auxselect.capture.check import compare_with_autograd, examples_to_check
from hf_auxselect.capture.hooks import (
    CollateFn,
    GradientHooks,
    InseparableError,
    NonFiniteError,
    differentiate,
)
from hf_auxselect.capture.memory import (
    FittingBatches,
    PassCost,
    evaluation_mode,
    predict_batches,
    row_length,
)
from hf_auxselect.capture.optimizer_state import OptimizerState, read_optimizer
from hf_auxselect.capture.projection import PROJECTION_VERSION, CountSketch
from hf_auxselect.capture.scalars import (
    NEXT_TOKEN_LOSS,
    SCALARS,
    ExampleLoss,
    LabelLogits,
    at_least_float32,
    count_label_tokens,
    forward_label_logits,
    match_model_loss,
)
from hf_auxselect.capture.schedule import group_rates
from hf_auxselect.distributed import computed_once, gather, process_rank
from hf_auxselect.files import JsonDict
from hf_auxselect.fingerprint import digest
from hf_auxselect.seeds import random_words
from hf_auxselect.store.arrays import Arrays, GradientStore, ShardSpec, StoreWriter

logger = logging.getLogger(__name__)

AT_OPTIMIZER = "@optimizer"
"""Suffix of a scalar whose gradient is taken in the coordinates of the optimizer's steps."""


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """The examples of one task that the pass reads."""

    name: str
    rows: Sequence[Any]
    """All rows of a dataset; ``example_ids`` picks some."""
    example_ids: Sequence[int]
    """Ascending row numbers."""
    num_rows: int
    """Rows that the task has for training."""
    example_weights: Sequence[float] | None = None
    """Share of each example in the task's loss; None: in proportion to its label tokens."""


def capture_gradients(
    model: nn.Module,
    tasks: Mapping[str, Sequence[Any]],
    target: Sequence[Any],
    collate_fn: CollateFn,
    *,
    directory: str | Path,
    projection_dim: int = 4096,
    batch_size: int = 16,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    scalars: Sequence[str] | None = None,
    one_by_one: bool = False,
    loss: ExampleLoss | None = None,
    progress: bool = True,
) -> GradientStore:
    """Capture the projected gradient of every example of every task and of the target.

    One forward per batch and one backward per scalar, in evaluation mode (no dropout); the model is
    left as it was. A pass that was interrupted goes on where it stopped when it is called again
    with the same arguments.

    Args:
        model: the model at the anchor, on its device; its trainable parameters are differentiated.
        tasks: name -> examples of each auxiliary task.
        target: examples of the target.
        collate_fn: turns a list of examples into the model's keyword arguments with ``labels``
            (int64 [B, S], -100 where there is no loss), on the model's device.
        directory: where the store is written.
        projection_dim: D, length of a projected gradient.
        batch_size: examples of a forward pass if they are as long as the longest; shorter ones are
            filled up to as many tokens (at most four times as many examples). The numbers depend on
            it by rounding only.
        seed: rules the projection and the labels that are drawn for ``sampled_loss``.
        optimizer: the optimizer of the training that the estimates are about, for estimators that
            model its steps.
        scalars: what is differentiated: ``"margin"``, ``"loss"``, ``"sampled_loss"``, each also
            with ``"@optimizer"`` behind it, for the gradient in the coordinates in which a step of
            the optimizer is a plain gradient step. The first is the store's default. None: what the
            estimators of this package need, with the optimizer if it is given.
        one_by_one: run each example alone, without hooks: slow, but right for any model. A model
            whose tensors do not split by example runs so in any case.
        loss: how the loss of an example follows from the model; None: found by comparing with the
            loss that the model itself returns for labels.
        progress: show a progress bar.

    Returns:
        The store, read from ``directory``.

    Raises:
        ValueError: no task, an empty task or target, an unknown scalar, an unsupported optimizer.
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
        batches = (collate_fn([target[i]]) for i in range(min(len(target), 32)))
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
        directory=directory,
        projection_dim=projection_dim,
        batch_size=batch_size,
        seed=seed,
        scalars=scalars,
        optimizer=optimizer,
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
    directory: str | Path,
    projection_dim: int,
    batch_size: int,
    seed: int,
    scalars: Sequence[str],
    optimizer: torch.optim.Optimizer | None = None,
    training: JsonDict | None = None,
    one_by_one: bool = False,
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
    progress: bool = True,
) -> GradientStore:
    """:func:`capture_gradients` for chosen rows of each task, shared among the processes of a run.

    With ``torch.distributed`` set up, every process calls this with the same arguments; each
    captures its share of the shards, the first one writes them, and all return the same store
    (``directory`` must be visible to all).

    Args beyond those of :func:`capture_gradients`:
        training: what is known of the training to come, kept in the metadata.
    """
    for task in (*tasks, target):
        if not len(task.example_ids):
            raise ValueError(f"task {task.name!r} has no examples.")
    for spec in scalars:
        if spec.removesuffix(AT_OPTIMIZER) not in SCALARS:
            raise ValueError(
                f"unknown scalar {spec!r} in scalars; known are {sorted(SCALARS)}, each also with "
                f"{AT_OPTIMIZER!r} behind it."
            )
        if spec.endswith(AT_OPTIMIZER) and optimizer is None:
            raise ValueError(f"the scalar {spec!r} needs optimizer=...")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rank, world_size = process_rank()
    shards = _plan_shards(tasks, target)
    by_key = {(task.name, is_target): task for task, is_target in _with_target(tasks, target)}
    rates = group_rates(training)
    state = None if optimizer is None else read_optimizer(model, optimizer, rates)
    sketch = CountSketch(projection_dim, seed)
    one_by_one = one_by_one or loss.of_batch is not None
    whole: frozenset[str] = frozenset()
    if not one_by_one:
        with contextlib.suppress(NonFiniteError):  # the pass itself names task and row
            checked = examples_to_check(model, tasks, target, collate_fn, loss)
            found = compare_with_autograd(model, checked, collate_fn, loss=loss)
            whole = found.whole
            if found.inseparable is not None:
                one_by_one = True
                warn_of_one_by_one(found.inseparable)
            else:
                logger.info("captured gradients agree with autograd; error %.1e", found.error)
    capture = _Capture(
        model,
        collate_fn,
        sketch,
        scalars,
        seed,
        state,
        one_by_one=one_by_one,
        loss=loss,
        whole=whole,
    )
    metadata = capture.metadata | {
        "batch_size": batch_size,
        "training": training or {},
        # They depend on the trainer's evaluation batches, and are written into each shard.
        "target_weights": digest(target.example_weights).hex(),
    }
    writer: StoreWriter | None = None

    def open_store() -> list[ShardSpec]:
        nonlocal writer
        writer = StoreWriter(
            directory,
            scalars=scalars,
            tasks=[
                {"name": task.name, "target": is_target, "num_rows": task.num_rows}
                for task, is_target in _with_target(tasks, target)
            ],
            shards=shards,
            metadata=metadata,
            vectors=capture.vectors(),
        )
        return writer.pending

    pending = computed_once(open_store)  # only the first process has a writer
    limits = BatchLimits.of(1 if one_by_one else batch_size, [*tasks, target])
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
            if rank < len(round_of_shards):
                shard = round_of_shards[rank]
                task = by_key[shard.task, shard.is_target]
                try:
                    result = capture.shard(shard, task, limits, advance=bar.update)
                except Exception as caught:  # raised in all processes, so that none waits for it
                    result = caught
            results = gather(result)
            for other in results:
                if isinstance(other, Exception):
                    raise other
            # A full disk, say, is an error in all processes.
            computed_once(functools.partial(write, round_of_shards, results))
            bar.update(sum(len(shard.example_ids) for shard in round_of_shards[1:]))
    if capture.fixed_with_gradient:
        logger.warning(
            "%d trainable parameter(s), such as %r, have a gradient now, but had none in training "
            "so far, and so no state of the optimizer; the estimates take them as fixed.",
            len(capture.fixed_with_gradient),
            min(capture.fixed_with_gradient),
        )
    return GradientStore.load(directory)


def warn_of_one_by_one(reason: str) -> None:
    """Log that examples cannot be captured in batches, and why."""
    logger.warning("the gradient pass runs each example alone, which is slower: %s.", reason)


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
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> PassCost:
    """Cost of the pass for one process, from two of its batches: see :func:`predict_batches`.

    The memory is that of a batch, without the tables of the projection and without the optimizer's
    state.
    """
    one_by_one = one_by_one or loss.of_batch is not None
    limits = BatchLimits.of(1 if one_by_one else batch_size, [*tasks, target])
    by_key = {(task.name, is_target): task for task, is_target in _with_target(tasks, target)}
    batches: list[list[Any]] = []
    for shard in _plan_shards(tasks, target):
        rows = [by_key[shard.task, shard.is_target].rows[i] for i in shard.example_ids]
        lengths = np.array([row_length(row) for row in rows])
        batches += [[rows[i] for i in chosen] for chosen in limits.cut(lengths)]
    # The optimizer may not exist yet.
    scales = {
        name: torch.ones(1, device=p.device).expand(p.numel())
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    sketch = CountSketch(projection_dim, 0)
    capture = _Capture(
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
    with capture:
        return predict_batches(
            model, batches, lambda rows: capture.batches("", list(enumerate(rows)))
        )


@dataclass(frozen=True)
class BatchLimits:
    """How many examples fit into a batch: as many tokens as in one of the longest examples."""

    tokens: int
    """With padding."""
    examples: int

    @classmethod
    def of(cls, batch_size: int, tasks: Sequence[TaskExamples]) -> BatchLimits:
        """Batches of short examples hold more of them, up to four times ``batch_size``.

        A batch of any length then needs no more memory for activations than training on the longest
        rows does.
        """
        if batch_size == 1:
            return cls(0, 1)
        longest = max(row_length(task.rows[i]) for task in tasks for i in task.example_ids)
        return cls(batch_size * longest, 4 * batch_size if longest else batch_size)

    def cut(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of the examples of each batch, by ascending length."""
        order = np.argsort(lengths, kind="stable")
        start = 0
        for end in range(1, len(order) + 1):
            size = end + 1 - start
            if (
                end == len(order)
                or size > self.examples
                or size * lengths[order[end]] > self.tokens
            ):
                yield order[start:end]
                start = end


class _Capture:
    """Runs batches and collects losses, outputs and projected gradients of their examples.

    Attributes:
        fixed_with_gradient: parameters that the optimizer has not stepped so far, but that had a
            gradient in some batch.
    """

    def __init__(
        self,
        model: nn.Module,
        collate_fn: CollateFn,
        sketch: CountSketch,
        scalars: Sequence[str],
        seed: int,
        optimizer: OptimizerState | None,
        *,
        scales: Mapping[str, Tensor] | None = None,
        one_by_one: bool = False,
        loss: ExampleLoss = NEXT_TOKEN_LOSS,
        whole: frozenset[str] = frozenset(),
    ) -> None:
        self._loss = loss
        self._model = model
        self._collate_fn = collate_fn
        self._sketch = sketch
        self._scalars = scalars
        self._seed = seed
        self._optimizer = optimizer
        self._scales = (scales or {}) if optimizer is None else optimizer.scales
        self._fitting = FittingBatches()
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._hooks = None if one_by_one else GradientHooks(model, self._receive, whole=whole)
        if self._hooks is not None:
            self._hooks.in_parts = True
        self._projected: dict[str, Tensor] = {}
        self.fixed_with_gradient: set[str] = set()
        self._stack = contextlib.ExitStack()

    @property
    def metadata(self) -> JsonDict:
        """What the captured numbers depend on; equal for equal numbers."""
        state = self._optimizer
        return {
            "anchor": _digest(self._trainable),
            "num_trainable_parameters": sum(p.numel() for p in self._trainable.values()),
            "projection": "count_sketch",
            "projection_version": PROJECTION_VERSION,
            "projection_dim": self._sketch.dim,
            "seed": self._seed,
            "loss": {
                "shift": self._loss.shift,
                "per_token": self._loss.per_token,
                "of_labels": self._loss.of_batch is None,
            },
            "optimizer": state
            and {
                "name": state.name,
                "scales": _digest(state.scales),
                "momentum_coefficient": state.momentum_coefficient,
                "learning_rate_factor": state.learning_rate_factor,
                "weight_decay": state.weight_decay,
                "steps_taken": state.steps_taken,
                "decay_is_coupled": state.decay_is_coupled,
                "groups": [asdict(group) for group in state.groups],
                "num_fixed_parameters": state.num_fixed,
            },
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
        }

    def vectors(self) -> Arrays:
        """Projections [D], in the optimizer's coordinates, of what its steps depend on."""
        state = self._optimizer
        if state is None:
            return {}
        # A gradient scales by P^(1/2), the parameters themselves by its inverse. What decays by
        # less than the others is as if it were smaller: so weight decay's constant part is exact.
        return {
            name: self._sketch.project_all(values).cpu().numpy()
            for name, values in {
                "momentum": {n: m * state.scales[n] for n, m in state.momentum.items()},
                "parameters": {
                    n: state.to_coordinates(n, p.detach().float().flatten() * state.decay_ratios[n])
                    for n, p in self._trainable.items()
                    if n in state.scales
                },
            }.items()
        }

    def prepare_tables(self) -> None:
        """Build the projection's tables, which would else be built within a backward pass."""
        for name, p in self._trainable.items():
            like = at_least_float32(p.detach().new_empty(0))
            self._sketch.prepare(name, p.numel(), like)

    def __enter__(self) -> _Capture:
        self.prepare_tables()
        self._stack.enter_context(evaluation_mode(self._model))
        if self._hooks is not None:
            self._stack.enter_context(self._hooks)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def shard(
        self,
        shard: ShardSpec,
        task: TaskExamples,
        limits: BatchLimits,
        advance: Callable[[int], object],
    ) -> Arrays:
        """The arrays of one shard, in its order; batches hold examples of like length."""
        rows = [(i, task.rows[i]) for i in shard.example_ids]
        stream = f"{'target' if shard.is_target else 'task'}/{shard.task}"
        lengths = np.array([row_length(row) for _, row in rows])
        batches = list(limits.cut(lengths))
        parts: list[Arrays] = []
        for chosen in batches:
            parts += self.batches(stream, [rows[i] for i in chosen])
            advance(len(chosen))
        back = np.argsort(np.concatenate(batches))
        arrays = {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
        arrays["example_ids"] = np.array(shard.example_ids, np.int64)
        arrays["example_weights"] = arrays["num_label_tokens"].astype(np.float64)
        if task.example_weights is not None:
            weight = dict(zip(task.example_ids, task.example_weights, strict=True))
            arrays["example_weights"] = np.array([weight[i] for i in shard.example_ids], np.float64)
        self._refuse_non_finite(task.name, arrays)
        return arrays

    def batches(self, stream: str, rows: list[tuple[int, Any]]) -> list[Arrays]:
        """Losses, label tokens, outputs and projected gradients of numbered examples of a task.

        In several parts, in order, where memory does not suffice for one batch.
        """
        run = functools.partial(self._batch, stream)
        return list(self._fitting.run(rows, run, lambda row: row[1]))

    def _batch(self, stream: str, rows: Sequence[tuple[int, Any]]) -> Arrays:
        if self._hooks is not None:
            self._hooks.batch_size = len(rows)
            try:
                return self._hooks.capture(functools.partial(self._run, stream, rows))
            except InseparableError as error:
                # The check has seen other examples: not every model uses its parts in each batch.
                self._hooks.__exit__()
                self._hooks = None
                warn_of_one_by_one(str(error))
        parts = [self._run(stream, [row]) for row in rows]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, stream: str, rows: Sequence[tuple[int, Any]]) -> Arrays:
        batch = self._collate_fn([row for _, row in rows])
        output = forward_label_logits(self._model, batch, self._loss)
        names = list(dict.fromkeys(spec.removesuffix(AT_OPTIMIZER) for spec in self._scalars))
        if "sampled_loss" in names:
            output = replace(output, uniforms=self._uniforms(stream, [i for i, _ in rows], output))
        with torch.no_grad():
            losses = SCALARS["loss"](output).detach()
        arrays = {
            "losses": losses.float().cpu().numpy(),
            "num_label_tokens": self._loss.count(output.num_label_tokens).cpu().numpy(),
        }
        for position, name in enumerate(names):
            values = SCALARS[name](output)
            specs = [s for s in self._scalars if s.removesuffix(AT_OPTIMIZER) == name]
            zeros = output.logits.new_zeros(len(rows), self._sketch.dim)
            self._projected = {spec: zeros.clone() for spec in specs}
            retain_graph = position + 1 < len(names)
            if self._hooks is not None:
                self._hooks.backward(values, retain_graph=retain_graph)
            else:  # one example alone
                gradients = differentiate(values.sum(), self._trainable, retain_graph=retain_graph)
                for parameter, gradient in gradients.items():
                    self._receive(parameter, at_least_float32(gradient).unsqueeze(0))
                del gradients
            for spec in specs:
                arrays[f"outputs.{spec}"] = values.detach().float().cpu().numpy()
                arrays[f"gradients.{spec}"] = self._projected[spec].float().cpu().numpy()
            del values  # and its graph, before those of the next scalar are computed
        return arrays

    def _uniforms(self, stream: str, ids: list[int], output: LabelLogits) -> Tensor:
        """Random numbers for the label tokens that depend on the example, not on its batch."""
        counts = output.num_label_tokens.tolist()
        words = [
            random_words(count, "sampled labels", self._seed, stream, int(example))
            for example, count in zip(ids, counts, strict=True)
        ]
        uniforms = (np.concatenate(words) >> np.uint64(40)).astype(np.float32) * 2.0**-24
        return torch.from_numpy(uniforms).to(output.logits.device)

    def _receive(self, name: str, gradients: Tensor) -> None:
        gradients = gradients.flatten(1)
        first = 0 if self._hooks is None else self._hooks.first_row
        rows = slice(first, first + len(gradients))
        plain = [spec for spec in self._projected if not spec.endswith(AT_OPTIMIZER)]
        scaled = [spec for spec in self._projected if spec.endswith(AT_OPTIMIZER)]
        for spec in plain:
            self._projected[spec][rows] += self._sketch.project(name, gradients)
        if not scaled:
            return
        if name not in self._scales:
            if name not in self.fixed_with_gradient and gradients.any():
                self.fixed_with_gradient.add(name)
            return
        gradients = gradients * self._scales[name]
        for spec in scaled:
            self._projected[spec][rows] += self._sketch.project(name, gradients)

    def _refuse_non_finite(self, task: str, arrays: Arrays) -> None:
        for name, what in [("losses", "loss")] + [
            (f"gradients.{spec}", f"gradient of the {spec}") for spec in self._scalars
        ]:
            finite = np.isfinite(arrays[name]).reshape(len(arrays[name]), -1).all(1)
            if not finite.all():
                row = arrays["example_ids"][np.flatnonzero(~finite)[0]]
                raise NonFiniteError(
                    f"task {task!r}, row {row}: the {what} is NaN or infinite. Look at that row (a "
                    "token id out of range?) and at the learning rate: training may have diverged "
                    "before the gradient pass."
                )


def _with_target(
    tasks: Sequence[TaskExamples], target: TaskExamples
) -> list[tuple[TaskExamples, bool]]:
    return [(task, False) for task in tasks] + [(target, True)]


def _plan_shards(tasks: Sequence[TaskExamples], target: TaskExamples) -> list[ShardSpec]:
    """Cut each task into shards: small enough to share out and to lose, few enough to list.

    The cuts depend on the task alone, so that its shards are found again beside other tasks.
    """
    shards = []
    for task, is_target in _with_target(tasks, target):
        size = min(max(len(task.example_ids) // 16, 32), 4096)
        for start in range(0, len(task.example_ids), size):
            ids = tuple(int(i) for i in task.example_ids[start : start + size])
            shards.append(ShardSpec(task=task.name, is_target=is_target, example_ids=ids))
    return shards


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
