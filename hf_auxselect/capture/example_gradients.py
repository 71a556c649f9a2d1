"""Losses, outputs and projected gradients of the examples of a batch.

Shapes: B examples of a batch, D projection_dim.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_auxselect.capture.batching import BatchLimits, FittingBatches, TaskExamples, row_length
from hf_auxselect.capture.hooks import (
    ONE_BY_ONE,
    GradientHooks,
    InseparableError,
    NonFiniteError,
    RetryBatchError,
)
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.module_gradients import UnsupportedModuleError, differentiate
from hf_auxselect.capture.optimizer_state import OptimizerState
from hf_auxselect.capture.projection import PROJECTION_VERSION, CountSketch
from hf_auxselect.capture.scalars import (
    AT_OPTIMIZER,
    NEXT_TOKEN_LOSS,
    SCALARS,
    CollateFn,
    ExampleLoss,
    LabelLogits,
    at_least_float32,
    forward_label_logits,
)
from hf_auxselect.files import JsonDict
from hf_auxselect.seeds import random_words
from hf_auxselect.sharding import (
    device_of,
    is_sharded,
    parameters_of_graph,
    passes_to_add,
    runs_backward_once,
    shape_of,
    trainable_parameters,
    whole,
)
from hf_auxselect.store.format import Arrays
from hf_auxselect.store.writer import ShardSpec

logger = logging.getLogger(__name__)


def warn_of_one_by_one(reason: str) -> None:
    """Log that examples cannot be captured in batches, and why."""
    logger.warning("the gradient pass runs each example alone, which is slower: %s.", reason)


class ExampleGradients:
    """Runs batches and collects losses, outputs and projected gradients of their examples.

    Args:
        model: the model; while this is open, it is in evaluation mode and has hooks.
        collate_fn: as for ``capture_gradients``.
        sketch: the projection.
        scalars: names of what is differentiated.
        seed: determines the labels that are drawn for ``sampled_loss``.
        optimizer: in whose coordinates scalars with ``AT_OPTIMIZER`` are differentiated.
        scales: stands for the scales of an optimizer that does not exist yet.
        parameter_rates: by what the steps of a parameter are multiplied. ``optimizer`` knows them;
            without it, gradients are captured in coordinates in which they are plain steps.
        one_by_one: run each example alone, without hooks.
        loss: how the loss of an example is computed.
        rerun: as for ``GradientHooks``.

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
        parameter_rates: Mapping[str, float] | None = None,
        one_by_one: bool = False,
        loss: ExampleLoss = NEXT_TOKEN_LOSS,
        rerun: frozenset[str] = frozenset(),
    ) -> None:
        self._loss = loss
        self._model = model
        self._collate_fn = collate_fn
        self._sketch = sketch
        self._scalars = scalars
        self._seed = seed
        self._optimizer = optimizer
        self._scales = (scales or {}) if optimizer is None else optimizer.scales
        self._rates = parameter_rates or {}
        self._is_sharded, self._runs_once = is_sharded(model), runs_backward_once(model)
        self._fitting = FittingBatches(can_split=not self._is_sharded)
        self._trainable = trainable_parameters(model)
        self._hooks = None if one_by_one else GradientHooks(model, self._receive, rerun=rerun)
        if self._hooks is not None:
            self._hooks.in_parts = True
        self._of_graph: Mapping[str, Tensor] = self._trainable
        self._projected: dict[str, Tensor] = {}
        self.fixed_with_gradient: set[str] = set()
        self._stack = contextlib.ExitStack()

    @property
    def metadata(self) -> JsonDict:
        """Identifies all that the captured numbers depend on, but for the examples."""
        state = self._optimizer
        loss: JsonDict = {
            "shift": self._loss.shift,
            "per_token": self._loss.per_token,
            "of_labels": self._loss.of_batch is None,
        }
        if self._loss.of_batch is not None:
            loss["name"] = self._loss.of_batch_name
        return {
            "parameters": _digest(self._values),
            "num_trainable_parameters": sum(shape_of(p).numel() for p in self._trainable.values()),
            "projection": "count_sketch",
            "projection_version": PROJECTION_VERSION,
            "projection_dim": self._sketch.dim,
            "seed": self._seed,
            "loss": loss,
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

    @functools.cached_property
    def _values(self) -> dict[str, Tensor]:
        """The whole trainable parameters."""
        return {name: whole(p) for name, p in self._trainable.items()}

    def vectors(self) -> Arrays:
        """Projected momentum and parameters [D], in the optimizer's coordinates."""
        state = self._optimizer
        if state is None:
            return {}
        # A gradient scales by P^(1/2), the parameters themselves by its inverse. A parameter that
        # decays by less than the others is taken for smaller, which makes the constant part of
        # weight decay exact.
        return {
            name: self._sketch.project_all(values).cpu().numpy()
            for name, values in {
                "momentum": {n: m * state.scales[n] for n, m in state.momentum.items()},
                "parameters": {
                    n: state.to_coordinates(n, p.float().flatten() * state.decay_ratios[n])
                    for n, p in self._values.items()
                    if n in state.scales
                },
            }.items()
        }

    def prepare_tables(self) -> None:
        """Build the projection's tables now, not within a backward pass."""
        for name, p in self._trainable.items():
            like = at_least_float32(torch.empty(0, dtype=p.dtype, device=device_of(p)))
            self._sketch.prepare(name, shape_of(p).numel(), like)

    def __enter__(self) -> ExampleGradients:
        self.prepare_tables()
        self._stack.enter_context(evaluation_mode(self._model))
        if self._hooks is not None:
            self._stack.enter_context(self._hooks)
        else:
            of_graph = parameters_of_graph(self._model, self._trainable)
            self._of_graph = self._stack.enter_context(of_graph)
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
        """Capture the arrays of one shard, in its order; its batches hold similar lengths."""
        rows = [(i, task.rows[i]) for i in shard.example_ids]
        stream = f"{shard.role}/{shard.task}"
        lengths = np.array([row_length(row) for _, row in rows])
        batches = list(limits.cut(lengths))
        parts: list[Arrays] = []
        extra = passes_to_add(len(batches), self._model)
        for chosen in batches:
            parts += self.batches(stream, [rows[i] for i in chosen])
            advance(len(chosen))
        for _ in range(extra):
            self.batches(stream, [rows[i] for i in batches[-1]])
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
        """Capture losses, label tokens, outputs and projected gradients of some examples of a task.

        The result has several parts, in order, where memory does not suffice for one batch.

        Args:
            stream: names the task, for the random numbers that draw labels.
            rows: ids and rows of the examples.
        """
        run = functools.partial(self._batch, stream)
        return list(self._fitting.run(rows, run, lambda row: row[1]))

    def _batch(self, stream: str, rows: Sequence[tuple[int, Any]]) -> Arrays:
        if self._hooks is not None:
            self._hooks.batch_size = len(rows)
            run = functools.partial(self._run, stream, rows)
            try:
                return run() if self._is_sharded else self._hooks.capture(run)
            except (InseparableError, RetryBatchError) as error:
                if self._is_sharded:  # other processes run no batch once more
                    raise UnsupportedModuleError(
                        f"the hooks cannot separate the examples of a batch: {error}. The model "
                        f"is sharded, so all processes run each batch once; {ONE_BY_ONE}."
                    ) from error
                # The check has seen other examples: not every model uses its parts in each batch.
                self._hooks.__exit__()
                self._hooks = None
                warn_of_one_by_one(str(error))
        parts = [self._run(stream, [row]) for row in rows]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, stream: str, rows: Sequence[tuple[int, Any]]) -> Arrays:
        batch = self._collate_fn([row for _, row in rows])
        names = list(dict.fromkeys(spec.removesuffix(AT_OPTIMIZER) for spec in self._scalars))

        def forward() -> LabelLogits:
            output = forward_label_logits(self._model, batch, self._loss)
            if "sampled_loss" not in names:
                return output
            uniforms = self._uniforms(stream, [i for i, _ in rows], output)
            return replace(output, uniforms=uniforms)

        output = forward()
        with torch.no_grad():
            losses = SCALARS["loss"](output).detach()
        arrays = {
            "losses": losses.float().cpu().numpy(),
            "num_label_tokens": self._loss.count(output.num_label_tokens).cpu().numpy(),
        }
        for position, name in enumerate(names):
            if self._runs_once and position:
                output = forward()
            values = SCALARS[name](output)
            specs = [s for s in self._scalars if s.removesuffix(AT_OPTIMIZER) == name]
            zeros = output.logits.new_zeros(len(rows), self._sketch.dim)
            self._projected = {spec: zeros.clone() for spec in specs}
            retain_graph = position + 1 < len(names) and not self._runs_once
            if self._hooks is not None:
                self._hooks.backward(values, retain_graph=retain_graph)
            else:  # one example alone
                gradients = differentiate(values.sum(), self._of_graph, retain_graph=retain_graph)
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
        rate = self._rates.get(name, 1.0)
        # Where the optimizer is known, plain gradients tell how batches are clipped, by their whole
        # length.
        own_rate = rate if self._optimizer is None else 1.0
        for spec in plain if own_rate else ():
            of_rate = gradients if own_rate == 1 else gradients * own_rate**0.5
            self._projected[spec][rows] += self._sketch.project(name, of_rate)
        if not scaled or not rate:
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
                raise NonFiniteError.of(what, task, int(row))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
