"""How the gradient of every example follows from one call of a module.

For a linear layer it is the sum over positions of the outer products g x^T of the output's gradient
and the input; for any other module its own vector-Jacobian product, by vmap or example by example.

Shapes: B examples of a batch, S positions.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

from hf_auxselect.capture.memory import is_out_of_memory
from hf_auxselect.capture.scalars import at_least_float32
from hf_auxselect.sharding import device_of, shape_of
from hf_auxselect.zero import drop_gathered

logger = logging.getLogger(__name__)

Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
"""Gradients by name, of a module, its input and the gradient of its output."""

_CONSTANTS = (nn.Module, str, int, float, torch.dtype, torch.device, type(None))
_NO_GRADIENT = (
    "no gradient reaches a trainable parameter: the model has none, or its adapter is merged or "
    "disabled. Train a LoRA adapter (peft_config=...) or unfreeze parameters."
)


class UnsupportedModuleError(ValueError):
    """A trainable parameter whose per-example gradient cannot be captured; names it."""


def _flat_positions(tensor: Tensor) -> Tensor:
    """[B, ..., C] -> [B, S, C], in at least float32 because half precision loses sums over S."""
    return at_least_float32(tensor).reshape(len(tensor), -1, tensor.shape[-1])


def _linear_gradients(module: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    grad_BSo, x_BSi = _flat_positions(grad), _flat_positions(x)
    return {"weight": grad_BSo.mT @ x_BSi, "bias": grad_BSo.sum(1)}


def _conv1d_gradients(module: Conv1D, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    grad_BSo, x_BSi = _flat_positions(grad), _flat_positions(x)
    return {"weight": x_BSi.mT @ grad_BSo, "bias": grad_BSo.sum(1)}


def _embedding_gradients(module: nn.Embedding, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    grad_BSd, ids_BS = _flat_positions(grad), x.reshape(len(x), -1)
    if module.padding_idx is not None:
        grad_BSd = grad_BSd * (ids_BS != module.padding_idx).unsqueeze(-1)
    rows = grad_BSd.new_zeros(len(x), module.num_embeddings, module.embedding_dim)
    return {"weight": rows.scatter_add_(1, ids_BS.unsqueeze(-1).expand_as(grad_BSd), grad_BSd)}


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear_gradients,
    Conv1D: _conv1d_gradients,
    nn.Embedding: _embedding_gradients,
}


def differentiate(
    output: Tensor,
    parameters: Mapping[str, Tensor],
    grad: Tensor | None = None,
    *,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Autograd's gradient, by name, of the parameters that the output depends on.

    Raises:
        UnsupportedModuleError: it depends on none.
    """
    if not output.requires_grad:
        raise UnsupportedModuleError(_NO_GRADIENT)
    gradients = torch.autograd.grad(
        output, list(parameters.values()), grad, allow_unused=True, retain_graph=retain_graph
    )
    drop_gathered(parameters.values())
    return {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


def with_zeros(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of all parameters: 0, of the whole shape, for those that have none."""
    return {
        name: gradients[name]
        if name in gradients
        else torch.zeros(shape_of(p), dtype=p.dtype, device=device_of(p))
        for name, p in parameters.items()
    }


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of tuples, lists and dicts, with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = copy.copy(value)  # it may be a ModelOutput
        for name, item in value.items():
            changed[name] = map_tensors(item, change)
        return changed
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def _is_plain(value: Any) -> bool:
    """Whether it is of a type in which no tensor is overlooked."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, (Tensor, *_CONSTANTS))


@dataclass(frozen=True)
class BatchLayout:
    """How the tensors of a batch split by example."""

    batch_size: int
    lengths: frozenset[int]
    """Sequence lengths S of the batch: [B*S, ...] holds the positions of one example after another,
    as ``view(-1, hidden_size)`` leaves them."""

    def splits(self, tensor: Tensor) -> bool:
        """Whether the first dimension is that of the batch, or of all its positions."""
        if tensor.ndim == 0:
            return False
        rows = len(tensor)
        if self.batch_size == 1:
            return True
        return rows == self.batch_size or rows in {self.batch_size * S for S in self.lengths}

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether it is one for all examples."""
        return tensor.shape[:1] in ((), (1,))

    def split(self, tensor: Tensor) -> Tensor:
        """[B, ...] as [B, 1, ...], [B*S, ...] as [B, S, ...]."""
        return tensor.reshape(self.batch_size, len(tensor) // self.batch_size, *tensor.shape[1:])

    def rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """The part of some examples of a tensor; all of one that does not split."""
        if len(range(*rows.indices(self.batch_size))) == self.batch_size or not self.splits(tensor):
            return tensor
        return self.split(tensor)[rows].flatten(0, 1)

    def batch_first(self, tensor: Tensor) -> Tensor:
        """[B, ...] as it is, [B*S, ...] as [B, S, ...]."""
        return tensor if len(tensor) == self.batch_size else self.split(tensor)


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module that owns trainable parameters, and one of the tensors it returned."""

    path: str
    module: nn.Module
    own: Mapping[str, str]
    """Names of those parameters, in the module -> in the model."""
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    """Positional and keyword arguments, an empty tensor in place of each tensor."""
    output: int
    """Number of the tensor among those that the module returns."""
    layout: BatchLayout
    autocast: torch.dtype | None
    """What the call was autocast to; a backward often runs outside of that context."""
    vectorise: bool
    """Whether ``vmap`` may run the module."""

    def of_rows(self, rows: slice) -> ModuleCall:
        """The same call, of some examples of the batch."""
        return replace(self, layout=replace(self.layout, batch_size=rows.stop - rows.start))

    def splits_by_example(self, tensors: Sequence[Tensor], output: Tensor) -> bool:
        layout = self.layout
        by_example = [layout.splits(tensor) for tensor in tensors]
        return (
            any(by_example)
            and layout.splits(output)
            and all(
                split or layout.is_shared(tensor)
                for split, tensor in zip(by_example, tensors, strict=True)
            )
            and all(map(_is_plain, self.inputs))
        )

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients [B, *shape] of the own parameters, from that of the output."""
        rule = self.rule(len(tensors))
        if rule is None:
            return self._replay(grad, tensors)
        x, grad = self.layout.batch_first(tensors[0]), self.layout.batch_first(grad)
        # In an autocast that spans the backward, sums over positions would be rounded.
        with torch.autocast(grad.device.type, enabled=False):
            return rule(self.module, x, grad)

    def rule(self, num_tensors: int) -> Rule | None:
        """The rule for the own parameters; None if the module must run again."""
        args, kwargs = self.inputs
        if len(args) + len(kwargs) != 1 or num_tensors != 1:
            return None
        for kind, rule in _RULES.items():
            # Subclasses that compute otherwise (quantized layers do) add their bias all the same.
            known = type(self.module).forward is kind.forward or self.own.keys() == {"bias"}
            if isinstance(self.module, kind) and known and self.own.keys() <= {"weight", "bias"}:
                return rule
        return None

    def _replay(self, grad: Tensor, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The module's vector-Jacobian product of each example."""
        trainable = {n: p for n, p in self.module.named_parameters() if n in self.own}
        splits = [self.layout.splits(tensor) for tensor in tensors]
        tensors = [
            self.layout.split(tensor) if by_example else tensor
            for tensor, by_example in zip(tensors, splits, strict=True)
        ]
        grad = self.layout.split(grad)
        module, prefix = self.module, ""
        if isinstance(module, FSDPModule):  # whose hooks take it for another pass over the layer
            module, prefix = _WithoutHooks(module), "module."

        def forward(tensors: Sequence[Tensor], parameters: dict[str, Tensor] | None) -> Tensor:
            rest = iter(tensors)
            args, kwargs = map_tensors(self.inputs, lambda _: next(rest))
            if parameters is None:
                output = module(*args, **kwargs)
            else:
                own = {f"{prefix}{name}": value for name, value in parameters.items()}
                output = torch.func.functional_call(module, own, args, kwargs)
            return tensors_in(output)[self.output]

        def vectorised(tensors: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
            parameters = {name: parameter.detach() for name, parameter in trainable.items()}
            pull_back = torch.func.vjp(partial(forward, tensors), parameters)[1]
            return pull_back(grad)[0]

        def alone(i: int) -> dict[str, Tensor]:
            mine = [
                t[i] if by_example else t for t, by_example in zip(tensors, splits, strict=True)
            ]
            with torch.enable_grad():
                output = forward(mine, None)
            gradients = differentiate(output, trainable, grad[i]) if output.requires_grad else {}
            return with_zeros(gradients, trainable)

        gradients: dict[str, Tensor] | None = None
        # Casts that autocast keeps for later would outlive the replay.
        enabled = self.autocast is not None
        with torch.autocast(grad.device.type, self.autocast, enabled=enabled, cache_enabled=False):
            if self.vectorise:
                in_dims = ([0 if by_example else None for by_example in splits], 0)
                try:
                    gradients = torch.func.vmap(vectorised, in_dims)(tensors, grad)
                except RuntimeError as error:
                    # Kernels that vmap knows no rule for, changes in place, or branches on
                    # data: each raises its own message, of no class of its own.
                    if is_out_of_memory(error):
                        raise
                    _log_one_by_one(self.path, type(self.module).__name__, str(error))
            if gradients is None:
                each = [alone(i) for i in range(self.layout.batch_size)]
                gradients = {name: torch.stack([g[name] for g in each]) for name in trainable}
        return {name: at_least_float32(gradient) for name, gradient in gradients.items()}


class _WithoutHooks(nn.Module):
    """A module whose own hooks are not called; those of its parts are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@functools.cache  # once, not in every batch
def _log_one_by_one(path: str, kind: str, reason: str) -> None:
    logger.info(
        "per-example gradients of the module %r (%s) are computed example by example, which is "
        "slower, because vmap says: %s",
        path,
        kind,
        reason,
    )
