"""Passes over a model within the memory that training takes, and how much memory they take.

Gradient checkpointing keeps the inputs of a layer instead of its activations and runs the layer
again in the backward pass. Transformers' layers do so only in training mode, with dropout; here
they do so in evaluation mode.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_ENTRIES_OF_ROWS = 2**18
"""Up to this number of entries ``row_by_row`` takes a matrix at once: 1 MiB in float32."""

_PARTS = 16
"""The largest number of parts in which ``row_by_row`` takes a larger matrix. Derived: about 5
temporary tensors of a part exist at once, a third of the matrix; more parts would cost more kernel
launches."""

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "can't allocate memory",  # DefaultCPUAllocator on Linux
    "not enough memory",  # DefaultCPUAllocator on Windows
    "cublas_status_alloc_failed",
)

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params")
"""Names of the arguments that hold a layer's results for earlier tokens."""


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off and gradients on; every module's mode is restored afterwards.

    Layers for which gradient checkpointing is enabled are checkpointed, as in training.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad(), checkpointed(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint, in any mode, the layers for which gradient checkpointing is enabled.

    They run again during a backward pass, whatever the options with which checkpointing was enabled
    (``use_reentrant=True`` does not work with ``torch.autograd.grad``): the forward must not be
    random, as in evaluation mode. Key-value caches are off, because layers would fill them twice.
    Where checkpointing is not enabled, nothing happens. Everything is restored afterwards.
    """
    layers = list(_checkpointed_layers(model))
    if not layers:
        yield
        return
    # A wrapper around the whole model may have no config; submodels have their own.
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for config in caching:
            config.use_cache = False
        for layer in layers:
            layer.forward = partial(_run_checkpointed, layer.forward)
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def checkpointing_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Mark a model in evaluation mode as the trainer will when training begins, if ``enabled``."""
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is False]
    marked = marked if enabled else []
    try:
        for module in marked:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        yield
    finally:
        for module in marked:
            module.gradient_checkpointing = False  # type: ignore[assignment]


def _checkpointed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers with the flag, or those in the lists of a model with the flag."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is not True:
            continue
        if isinstance(module, GradientCheckpointingLayer):
            yield module
        elif not any(isinstance(below, GradientCheckpointingLayer) for below in module.modules()):
            lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
            yield from dict.fromkeys(layer for layers in lists for layer in layers)


def _run_checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    caches = [value for value in args if type(value).__name__.endswith("Cache")]
    caches += [value for name, value in kwargs.items() if name in _CACHES and value is not None]
    # Transformations of functions (vmap, in which modules are replayed) know no checkpoints.
    in_transform = torch._C._are_functorch_transforms_active()
    if caches or in_transform or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
    )


def row_by_row(
    function: Callable[[Tensor, Tensor], Tensor], matrix_LV: Tensor, values_L: Tensor
) -> Tensor:
    """Compute ``function(matrix_LV, values_L)`` [L], whose entries depend on one row each.

    A large matrix is worked on in parts, forward and backward, so that besides it and its gradient
    nothing of its size exists.
    """
    if matrix_LV.numel() <= _ENTRIES_OF_ROWS:
        return function(matrix_LV, values_L)
    result: Tensor = _RowByRow.apply(function, matrix_LV, values_L)
    return result


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor, Tensor], Tensor], matrix_LV: Tensor, values_L: Tensor
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(matrix_LV, values_L)
        parts = _RowByRow._parts(matrix_LV, values_L)
        return torch.cat([function(matrix, values) for matrix, values in parts])

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> Any:
        matrix_LV, values_L = ctx.saved_tensors
        grad_LV = torch.empty_like(matrix_LV)
        rows = zip(
            _RowByRow._parts(matrix_LV, values_L), _RowByRow._parts(grad_LV, grad_L), strict=True
        )
        for (matrix, values), (result, grad) in rows:
            leaf = matrix.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.function(leaf, values)
            result.copy_(torch.autograd.grad(output, leaf, grad)[0])
        return None, grad_LV, None

    @staticmethod
    def _parts(matrix_LV: Tensor, values_L: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(_ENTRIES_OF_ROWS // matrix_LV.shape[1], -(-len(matrix_LV) // _PARTS))
        return zip(matrix_LV.split(rows), values_L.split(rows), strict=True)


def take_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix[rows]`` for distinct rows, with one new matrix backward where torch makes two."""
    result: Tensor = _TakeRows.apply(matrix, rows)
    return result


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = matrix.shape
        ctx.save_for_backward(rows)
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in message for text in _OUT_OF_MEMORY)


class PeakMemory:
    """Measures, while open, by how many bytes at most the tensors on a device grow.

    On CUDA the allocator is asked, and its statistics of the peak are reset. Elsewhere every
    operation of this thread is followed, which takes some microseconds each; temporary buffers
    within operations are not seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._mode = _LiveBytes() if device.type != "cuda" else None

    def __enter__(self) -> PeakMemory:
        if self._mode is None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._mode is None:
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._mode.__exit__(*exception)
            self.bytes = self._mode.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._see(value, created=False)
        output = func(*args, **kwargs)
        for value in tree_leaves(output):
            self._see(value, created=True)
        self.peak = max(self.peak, self._live)
        return output

    def _see(self, value: Any, *, created: bool) -> None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known() is not None:
            return
        size = storage.nbytes() if created else 0  # inputs were there before

        def forget(reference: weakref.ref[Any]) -> None:
            self._live -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, forget)
        self._live += size
