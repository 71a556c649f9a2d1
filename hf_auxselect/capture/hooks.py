"""Per-example gradients of every trainable parameter, from one backward of a batch.

Hooks on the modules that own trainable parameters see each module's input x and the gradient g of
its output, from which the gradient of every example follows: for a linear layer the sum over
positions of the outer products g x^T, for any other module its own vector-Jacobian product. Where
the tensors of a module do not split by example (experts that get routed tokens, say), those of a
module around it do, and that one is run again for each example.

Shapes: B examples of a batch, S positions, V vocabulary, L label tokens of a batch.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_auxselect.capture.memory import is_out_of_memory
from hf_auxselect.capture.scalars import HALF, Batch, at_least_float32

CollateFn = Callable[[list[Any]], Batch]
ReceiveFn = Callable[[str, Tensor], None]
Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
T = TypeVar("T")

logger = logging.getLogger(__name__)

_FULL = (torch.float32, torch.float64)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_CONSTANTS = (nn.Module, str, int, float, torch.dtype, torch.device, type(None))

_ENTRIES_AT_ONCE = 2**20
"""Entries of a module's per-example gradients that exist at once, at least those of an example.

4 MiB in float32. Those of a LoRA matrix of rank 16 on 4096 features, for a batch of 16, exist at
once; of a head of 4096 x 256 entries, one example's."""

ONE_BY_ONE = "pass one_by_one=True, which runs each example alone: slow, but right for any model"
_NO_GRADIENT = (
    "no gradient reaches a trainable parameter: the model has none, or its adapter is merged or "
    "disabled. Train a LoRA adapter (peft_config=...) or unfreeze parameters."
)
_HOW_TO_SPLIT = (
    "Freeze the parameter or, for position embeddings, let the collator return position_ids of the "
    "shape of input_ids."
)


class UnsupportedModuleError(ValueError):
    """A trainable parameter whose per-example gradient cannot be captured; names it."""


class InseparableError(UnsupportedModuleError):
    """Only examples that run alone have gradients of their own; says why."""


class NonFiniteError(ValueError):
    """A loss or gradient of an example that is NaN or infinite; names task and row."""


def _autocast_dtype(output: Any) -> torch.dtype | None:
    """What operations on the device of a tensor are autocast to now; None: they are not."""
    device = output.device.type if isinstance(output, Tensor) else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


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
    return {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


def autograd_gradients(
    output: Tensor, parameters: Mapping[str, Tensor], grad: Tensor | None = None
) -> dict[str, Tensor]:
    """:func:`differentiate`; 0 for parameters that the output does not depend on."""
    gradients = differentiate(output, parameters, grad)
    return {
        n: gradients[n] if n in gradients else torch.zeros_like(p) for n, p in parameters.items()
    }


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of tuples, lists and dicts, with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [_map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = copy.copy(value)  # it may be a ModelOutput
        for name, item in value.items():
            changed[name] = _map_tensors(item, change)
        return changed
    return value


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(value, found.append)
    return found


def _is_plain(value: Any) -> bool:
    """Whether it is of a type in which no tensor is overlooked."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, (Tensor, *_CONSTANTS))


class _Kept(torch.autograd.Function):
    """Keeps tensors as autograd does: gradient checkpointing drops them and computes them again."""

    @staticmethod
    def keep(tensors: Sequence[Tensor]) -> Any:
        """An empty tensor; read ``grad_fn.saved_tensors`` of it once in each backward.

        Without the tensor, PyTorch 2.6 frees what its ``grad_fn`` has saved.
        """
        root = torch.empty(0, requires_grad=True)
        return _Kept.apply(root, *(tensor.data for tensor in tensors))

    @staticmethod
    def forward(ctx: Any, root: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return root.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        raise AssertionError("nothing depends on what is kept")


@dataclass(frozen=True)
class _Layout:
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
class _Call:
    """A call of a module that owns trainable parameters, and one of the tensors it returned."""

    path: str
    module: nn.Module
    own: Mapping[str, str]
    """Names of those parameters, in the module -> in the model."""
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    """Positional and keyword arguments, an empty tensor in place of each tensor."""
    output: int
    """Number of the tensor among those that the module returns."""
    layout: _Layout
    autocast: torch.dtype | None
    """What the call was autocast to; a backward often runs outside of that context."""
    vectorise: bool
    """Whether ``vmap`` may run the module."""

    def of_rows(self, rows: slice) -> _Call:
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
        args, kwargs = self.inputs
        rule = self._rule() if len(args) + len(kwargs) == 1 and len(tensors) == 1 else None
        if rule is None:
            return self._replay(grad, tensors)
        x, grad = self.layout.batch_first(tensors[0]), self.layout.batch_first(grad)
        # In an autocast that spans the backward, sums over positions would be rounded.
        with torch.autocast(grad.device.type, enabled=False):
            return rule(self.module, x, grad)

    def _rule(self) -> Rule | None:
        """The rule for the own parameters; None if the module may compute something else."""
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

        def forward(tensors: Sequence[Tensor], parameters: dict[str, Tensor] | None) -> Tensor:
            rest = iter(tensors)
            args, kwargs = _map_tensors(self.inputs, lambda _: next(rest))
            if parameters is None:
                output = self.module(*args, **kwargs)
            else:
                output = torch.func.functional_call(self.module, parameters, args, kwargs)
            return _tensors_in(output)[self.output]

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
            if not output.requires_grad:
                return {name: torch.zeros_like(p) for name, p in trainable.items()}
            return autograd_gradients(output, trainable, grad[i])

        gradients: dict[str, Tensor] | None = None
        # Casts that autocast keeps for later would outlive the replay.
        enabled = self.autocast is not None
        with torch.autocast(grad.device.type, self.autocast, enabled=enabled, cache_enabled=False):
            if self.vectorise:
                in_dims = ([0 if by_example else None for by_example in splits], 0)
                try:
                    gradients = torch.func.vmap(vectorised, in_dims)(tensors, grad)
                except RuntimeError as error:
                    # Kernels that vmap knows no rule for, what is changed in place, or branches on
                    # data: each raises its own message, of no class of its own.
                    if is_out_of_memory(error):
                        raise
                    _log_one_by_one(self.path, type(self.module).__name__, str(error))
            if gradients is None:
                each = [alone(i) for i in range(self.layout.batch_size)]
                gradients = {name: torch.stack([g[name] for g in each]) for name in trainable}
        return {name: at_least_float32(gradient) for name, gradient in gradients.items()}


@functools.cache  # once, not in every batch
def _log_one_by_one(path: str, kind: str, reason: str) -> None:
    logger.info(
        "per-example gradients of the module %r (%s) are computed example by example, which is "
        "slower, because vmap says: %s",
        path,
        kind,
        reason,
    )


def _reaches_below(module: nn.Module) -> bool:
    """Whether a module's forward uses trainable parameters below it without calling their owner."""
    in_lists = any(
        isinstance(child, _LISTS) and any(p.requires_grad for p in child.parameters())
        for child in module.children()
    )
    # DoRA takes the bias of its base layer off that layer's output.
    bias = getattr(getattr(module, "base_layer", None), "bias", None)
    has_dora = len(getattr(module, "lora_magnitude_vector", ())) > 0
    return in_lists or (has_dora and isinstance(bias, Tensor) and bias.requires_grad)


def _parameters_of_parts(module: nn.Module) -> set[int]:
    """Ids of the parameters of a module that are also those of a module below it."""
    own = {id(p) for p in module.parameters(recurse=False)}
    if not own:
        return own
    below = {id(p) for child in module.children() for p in child.parameters()}
    return own & below


class RegroupedError(Exception):
    """Parameters were assigned to modules around their own; the batch must run once more."""


class GradientHooks:
    """While open, hands the per-example gradient of each trainable parameter to a function.

    ``receive(name, gradients)`` is called during backward, for every call of a module that owns
    trainable parameters, with ``gradients`` [B, *parameter.shape]: the derivative of the
    differentiated sum with respect to the parameter, split by example. A parameter may be received
    several times (tied weights, modules called twice): its gradient is the sum. The model is left
    as it was.

    A call splits by example if its tensors, in and out, are [B, ...] or [B*S, ...] (the S positions
    of one example after another), or, among the inputs, [1, ...] for all examples. For a module
    whose calls do not, or that another module uses without calling it, :meth:`backward` lets a
    module around it own its parameters: that one runs again for each example.

    Args:
        model: any model with trainable parameters. A module with a ``ParameterDict`` or
            ``ParameterList`` (as in LoRA on embeddings) owns those and all that is below it.
        receive: called with the parameter's name in ``model.named_parameters()``.
        whole: ``whole`` of earlier hooks on the model, to begin with what they found.

    Raises:
        UnsupportedModuleError: a trainable parameter cannot be captured.
    """

    def __init__(
        self, model: nn.Module, receive: ReceiveFn, *, whole: frozenset[str] = frozenset()
    ) -> None:
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.batch_size: int | None = None
        """B of the batch that runs; None: the first dimension of the model's first tensor."""
        self.half_precision = any(p.dtype not in _FULL for p in model.parameters())
        """Whether half precision, or less, was seen in parameters, outputs or autocast."""
        self.whole = whole
        """Paths of modules that own all that is below them, since a part of it does not split."""
        self.in_parts = False
        """Whether large gradients are handed over for some examples at a time, in order."""
        self.first_row = 0
        """Row of the batch that the first of the gradients handed over belongs to."""
        self._model = model
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._receive = receive
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaying = False
        self._owners: dict[str, set[str]] = {}
        """Paths of the modules that own each trainable parameter, by its name."""
        self._batch: tuple[int, frozenset[int]] | None = None
        """Batch size and sequence lengths of the model's inputs."""
        self._complaints: dict[str, str] | None = None
        """While :meth:`backward` runs: what is wrong with calls that do not split, by path."""
        self._received: set[str] = set()

    def __enter__(self) -> GradientHooks:
        watch = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._handles.append(watch)
        self._owners = {name: set() for name in self._trainable}
        whole = {self._model.get_submodule(path) for path in self.whole}
        below: set[nn.Module] = set()
        for path, module in self._model.named_modules():
            if module in below:
                continue
            owns_all = module in whole or _reaches_below(module)
            if owns_all:
                below.update(module.modules())
            # A head may hold the bias that a layer below it uses: of both, the layer owns it.
            of_parts = set() if owns_all else _parameters_of_parts(module)
            own = {
                local: self.names[id(parameter)]
                for local, parameter in module.named_parameters(recurse=owns_all)
                if parameter.requires_grad and id(parameter) not in of_parts
            }
            for name in own.values():
                self._owners[name].add(path)
            if own:
                # vmap is for modules that are known to be small and simple; and a recurrent
                # module computes with references to its parameters that vmap cannot replace.
                vectorise = module not in whole and not isinstance(module, nn.RNNBase)
                hook = partial(self._after_forward, path, own, vectorise)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def capture(self, run: Callable[[], T]) -> T:
        """The result of ``run``: a forward and its :meth:`backward`, until all calls split."""
        while True:
            try:
                return run()
            except RegroupedError:
                continue

    def backward(self, values: Tensor, *, retain_graph: bool = False) -> None:
        """Differentiate the sum of a scalar of every example [B]; ``p.grad`` stays as it is.

        Raises:
            RegroupedError: some parameters have other owners from now on; what was received is
                incomplete and the batch must run once more, see :meth:`capture`.
            InseparableError: that would be of no use.
            UnsupportedModuleError: no gradient reaches a trainable parameter.
        """
        self._complaints, self._received = {}, set()
        try:
            # The parameters' own gradients are the price of reaching them. They are dropped: p.grad
            # stays untouched, and no gradient reducer of a distributed wrapper wakes up.
            gradients = differentiate(values.sum(), self._trainable, retain_graph=retain_graph)
            complaints = self._complaints
        finally:
            self._complaints = None
        if not complaints:
            for name in gradients:
                for path in sorted(self._owners[name]) if name not in self._received else ():
                    complaints.setdefault(
                        path,
                        f"the trainable parameter {name!r} is used outside of its module {path!r}",
                    )
        if complaints:
            self._regroup(complaints)
            raise RegroupedError

    def widen(self, names: Iterable[str]) -> None:
        """Let modules around the owners of these parameters own them, which were captured wrong.

        Raises:
            InseparableError: that would be of no use.
        """
        self._regroup(
            {
                path: f"the gradients of {name!r} are not those of its examples alone"
                for name in names
                for path in sorted(self._owners[name])
            }
        )

    def _regroup(self, complaints: Mapping[str, str]) -> None:
        """Let modules around those in the complaints own all that is below them."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        num_modules = {path: len(list(module.modules())) for path, module in modules.items()}
        whole = {modules[path] for path in self.whole}

        def is_inside(path: str) -> bool:
            parts = path.split(".")
            return any(modules[".".join(parts[:n])] in whole for n in range(len(parts)))

        def widen(path: str, complaint: str) -> None:
            around = path
            while around and (around == path or isinstance(modules[around], _CONTAINERS)):
                around = around.rpartition(".")[0]
            # To run most of the model once more for each example helps less than to run all of it.
            if num_modules[around] > num_modules[""] / 2:
                raise InseparableError(complaint)
            if modules[around] not in whole:
                whole.add(modules[around])
                logger.info(
                    "%s: its gradients are computed by running the module %r (%s) once more for "
                    "each example",
                    *(complaint, around, type(modules[around]).__name__),
                )

        # A module may be in several places. It has one owner or, inside of others, none.
        for failed, complaint in complaints.items():
            for path, module in modules.items():
                if module is modules[failed]:
                    widen(path, complaint)
        num_whole = 0
        while num_whole < len(whole):
            num_whole = len(whole)
            inside = {module for path, module in modules.items() if is_inside(path)}
            for path, module in modules.items():
                has_trainable = any(p.requires_grad for p in module.parameters())
                if has_trainable and module in inside and not is_inside(path):
                    widen(path, f"the module {path!r} is also a part of another")
        self.whole = frozenset(path for path, module in modules.items() if module in whole)
        self.__exit__()
        self.__enter__()

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._replaying:
            return
        tensors = [tensor for tensor in _tensors_in((args, kwargs)) if tensor.ndim > 0]
        batch_size = self.batch_size or (len(tensors[0]) if tensors else 0)
        lengths = {t.shape[1] for t in tensors if t.ndim > 1 and len(t) == batch_size}
        self._batch = (batch_size, frozenset(lengths)) if batch_size else None

    def _after_forward(
        self,
        path: str,
        own: dict[str, str],
        vectorise: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if self._replaying or not torch.is_grad_enabled():
            return output
        tensors = _tensors_in((args, kwargs))
        handed_on = {id(tensor) for tensor in tensors}
        values = _tensors_in(output)
        numbers = [
            number
            for number, value in enumerate(values)
            if value.requires_grad and id(value) not in handed_on
        ]
        if len(numbers) > 1:
            # One may be computed from another: outside, aliases are used, whose gradients do not
            # hold those that arrive within the module.
            values = [v.view_as(v) if n in numbers else v for n, v in enumerate(values)]
            rest = iter(values)
            output = _map_tensors(output, lambda _: next(rest))
        for number in numbers:
            value = values[number]
            batch_size, lengths = self._batch or (self.batch_size or len(value), frozenset())
            call = _Call(
                path=path,
                module=module,
                own=own,
                inputs=_map_tensors((args, kwargs), lambda _: torch.empty(0)),
                output=number,
                layout=_Layout(batch_size, lengths),
                autocast=_autocast_dtype(value),
                vectorise=vectorise,
            )
            self.half_precision |= value.dtype in HALF or call.autocast is not None
            if call.splits_by_example(tensors, value):
                kept = _Kept.keep(tensors)
                value.register_hook(partial(self._after_backward, call, kept))
            else:
                # Harmless unless a gradient arrives: DoRA, for one, runs LoRA's layers on a unit
                # matrix.
                complaint = self._complaint(call, (args, kwargs), output)
                value.register_hook(partial(self._complain, path, complaint))
        return output

    def _complain(self, path: str, complaint: str, grad: Tensor) -> None:
        if self._complaints is None:  # not in self.backward
            raise UnsupportedModuleError(f"{complaint}. {_HOW_TO_SPLIT}")
        self._complaints[path] = complaint

    def _complaint(self, call: _Call, inputs: Any, output: Any) -> str:
        def shapes(value: Any) -> str:
            return ", ".join(str(list(tensor.shape)) for tensor in _tensors_in(value))

        return (
            f"the trainable parameter {next(iter(call.own.values()))!r} belongs to the module "
            f"{call.path!r} ({type(call.module).__name__}), which maps {shapes(inputs)} to "
            f"{shapes(output)}, which does not split into {call.layout.batch_size} examples"
        )

    def _after_backward(self, call: _Call, kept: Any, grad: Tensor) -> None:
        self._received.update(call.own.values())
        if self._complaints:
            return  # the batch will run again
        tensors = kept.grad_fn.saved_tensors  # inside of a checkpoint, its layer runs again now
        size = call.layout.batch_size
        at_once = size
        if self.in_parts:
            entries = sum(self._trainable[name].numel() for name in call.own.values())
            at_once = min(max(_ENTRIES_AT_ONCE // entries, 1), size)
        for self.first_row in range(0, size, at_once):
            rows = slice(self.first_row, min(self.first_row + at_once, size))
            part = call if at_once == size else call.of_rows(rows)
            self._replaying = True
            try:
                gradients = part.gradients(
                    call.layout.rows(grad, rows), [call.layout.rows(t, rows) for t in tensors]
                )
            finally:
                self._replaying = False
            for local, name in call.own.items():
                self._receive(name, gradients[local])
            del gradients  # before those of the next examples are computed
        self.first_row = 0
