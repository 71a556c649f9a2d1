"""Passes over a model within the memory that training takes: checkpoints, smaller batches, peaks.

Gradient checkpointing keeps the inputs of a layer instead of its activations and runs the layer
again in the backward pass. Transformers' layers do so only in training mode, with dropout; here
they do so in evaluation mode.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")

_ENTRIES_OF_ROWS = 2**18
"""Entries of a matrix up to which ``row_by_row`` takes it whole: 1 MiB in float32."""

_PARTS = 16
"""Parts, at most, in which ``row_by_row`` takes a larger one: about 5 temporary tensors of a part
exist at once, a third of the matrix; more parts would cost more kernel launches."""

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "can't allocate memory",  # DefaultCPUAllocator on Linux
    "not enough memory",  # DefaultCPUAllocator on Windows
    "cublas_status_alloc_failed",
)

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params")
"""Arguments by which layers are handed what they computed for earlier tokens."""


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, gradients on; every module's mode is put back.

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
    Where checkpointing is not enabled, nothing happens. Everything is put back.
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
    """Layers with the flag; or those in the lists of a model that runs them checkpointed itself."""
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
    """``function(matrix_LV, values_L)`` [L], which is computed from each row alone.

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


def row_length(row: Any) -> int:
    """Tokens of a tokenized example; 0 if they are not known."""
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0


def num_tokens(rows: Sequence[Any]) -> int:
    """Tokens of a batch, padding included; or its rows, if lengths are unknown."""
    return len(rows) * max(max(map(row_length, rows)), 1)


class FittingBatches:
    """Runs batches, in parts where memory does not suffice for a whole one.

    A batch for which memory does not suffice is halved until it does; later batches of more tokens
    than half of it has are cut beforehand. A warning is logged when the limit is met first.
    """

    def __init__(self) -> None:
        self.tokens: float = math.inf
        """Most tokens that are tried at once, padding included."""

    def run(
        self,
        rows: Sequence[R],
        run: Callable[[Sequence[R]], T],
        example: Callable[[R], Any] = lambda row: row,
    ) -> Iterator[T]:
        """Results of the parts of a batch, in order; a part runs when its result is asked for.

        Args:
            rows: the batch.
            run: is called with parts of it.
            example: the tokenized example in a row.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one example alone.
        """
        size = num_tokens([example(row) for row in rows])
        if len(rows) == 1 or size <= self.tokens:
            try:
                result = run(rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    length = row_length(example(rows[0]))
                    raise torch.OutOfMemoryError(
                        "memory does not suffice for one example"
                        + (f" of {length} tokens" if length else "")
                        + " in the gradient pass. Set gradient_checkpointing=True, truncate rows "
                        "(max_length), train fewer parameters, or free memory. The allocator said: "
                        f"{error}"
                    ) from error
                message = str(error)
            else:
                yield result
                return
            # Outside of the except clause nothing refers to the frames of the attempt any more.
            clear_device_cache(garbage_collection=True)
            log = logger.warning if self.tokens == math.inf else logger.info
            self.tokens = size // 2
            log(
                "memory does not suffice for a batch of %d examples (%d tokens, padding included); "
                "the gradient pass goes on in smaller ones, to the same results. The allocator "
                "said: %s",
                len(rows),
                size,
                message,
            )
        middle = len(rows) // 2
        yield from self.run(rows[:middle], run, example)
        yield from self.run(rows[middle:], run, example)


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
    """Follows which storages come and go."""

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


@dataclass(frozen=True)
class PassCost:
    """Predicted cost of passes over a model."""

    seconds: float
    """That one process needs."""
    memory: int
    """Bytes that the largest batch takes at most, on the model's device."""


def predict_batches(
    model: nn.Module, batches: Sequence[list[Any]], run: Callable[[list[Any]], object]
) -> PassCost:
    """Cost of ``run`` for all batches: the largest one is measured, the middle one is timed.

    All take the middle one's time times the ratio of the tokens, padding included.
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
