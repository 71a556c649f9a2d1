"""Per-example gradients of every trainable parameter, from one backward of a batch.

Hooks on the modules that own trainable parameters see each module's input x and the gradient g of
its output, from which the gradient of every example follows (see ``module_gradients``). Where the
tensors of a module do not split by example (experts that get routed tokens, say), those of a module
around it do, and that one is run again for each example.

Shapes: B examples of a batch, S positions.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_auxselect.capture.module_gradients import (
    BatchLayout,
    ModuleCall,
    UnsupportedModuleError,
    differentiate,
    map_tensors,
    tensors_in,
)
from hf_auxselect.capture.scalars import HALF
from hf_auxselect.sharding import (
    parameters_of_graph,
    runs_backward_once,
    shape_of,
    trainable_parameters,
)

ReceiveFn = Callable[[str, Tensor], None]
T = TypeVar("T")

logger = logging.getLogger(__name__)

_FULL = (torch.float32, torch.float64)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

_ENTRIES_AT_ONCE = 2**20
"""The largest number of entries of a module's per-example gradients that exist at once, unless one
example has more. A convention, 4 MiB in float32: a LoRA matrix of rank 16 on 4096 features, for a
batch of 16, is done at once; a head of 4096 x 256 entries example by example."""

_LARGEST_RERUN = 0.5
"""The largest part of the model's modules that may run again for each example. A convention: above
it, to run the example alone is faster."""

ONE_BY_ONE = "pass one_by_one=True, which runs each example alone: slow, but right for any model"
_HOW_TO_SPLIT = (
    "Freeze the parameter or, for position embeddings, let the collator return position_ids of the "
    "shape of input_ids."
)


class InseparableError(UnsupportedModuleError):
    """Only examples that run alone have gradients of their own; says why."""


class NonFiniteError(ValueError):
    """A loss or gradient of an example that is NaN or infinite; names task and row."""

    @classmethod
    def of(cls, what: str, task: str, row: int) -> NonFiniteError:
        """The error about the loss or a gradient of one row."""
        return cls(
            f"task {task!r}, row {row}: the {what} is NaN or infinite. Look at that row (a token "
            "id out of range?) and at the learning rate: training may have diverged before the "
            "gradient pass."
        )


def _autocast_dtype(output: Any) -> torch.dtype | None:
    """The type to which operations on the device of a tensor are autocast; None: they are not."""
    device = output.device.type if isinstance(output, Tensor) else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


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
        raise AssertionError("nothing depends on kept tensors")


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


class RetryBatchError(Exception):
    """Parameters have other owners, for the reason that it says: the batch must run once more."""


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
        rerun: ``rerun`` of earlier hooks on the model, to begin with what they found.

    Raises:
        UnsupportedModuleError: a trainable parameter cannot be captured.
    """

    def __init__(
        self, model: nn.Module, receive: ReceiveFn, *, rerun: frozenset[str] = frozenset()
    ) -> None:
        self.names = {id(p): name for name, p in trainable_parameters(model).items()}
        self.batch_size: int | None = None
        """B of the batch that runs; None: the first dimension of the model's first tensor."""
        self.half_precision = any(p.dtype not in _FULL for p in model.parameters())
        """Whether half precision, or less, was seen in parameters, outputs or autocast."""
        self.rerun = rerun
        """Paths of the modules that own all parameters below them and run again for each example,
        since a part of them does not split."""
        self.in_parts = False
        """Whether large gradients are handed over for some examples at a time, in order."""
        self.first_row = 0
        """Row of the batch that the first of the gradients handed over belongs to."""
        self._model = model
        self._trainable = trainable_parameters(model)
        self._receive = receive
        self._stack = contextlib.ExitStack()
        self._of_graph: Mapping[str, Tensor] = {}
        self._replaying = False
        self._owners: dict[str, set[str]] = {}
        """Paths of the modules that own each trainable parameter, by its name."""
        self._batch: tuple[int, frozenset[int]] | None = None
        """Batch size and sequence lengths of the model's inputs."""
        self._reasons: dict[str, str] | None = None
        """While :meth:`backward` runs: why calls do not split, by path."""
        self._received: set[str] = set()
        self._runs_once = runs_backward_once(model)
        self._unrepeatable: str | None = None
        """Why the last backward is incomplete, and no other owners would help."""

    def __enter__(self) -> GradientHooks:
        self._of_graph = self._stack.enter_context(
            parameters_of_graph(self._model, self._trainable)
        )
        self._add(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._owners = {name: set() for name in self._trainable}
        rerun = {self._model.get_submodule(path) for path in self.rerun}
        below: set[nn.Module] = set()
        for path, module in self._model.named_modules():
            if module in below:
                continue
            owns_all = module in rerun or _reaches_below(module)
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
                vectorise = module not in rerun and not isinstance(module, nn.RNNBase)
                hook = partial(self._after_forward, path, own, vectorise)
                self._add(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def capture(self, run: Callable[[], T]) -> T:
        """Call ``run``, a forward and its :meth:`backward`, until all calls split; its result."""
        while True:
            try:
                return run()
            except RetryBatchError:
                continue

    def backward(self, values: Tensor, *, retain_graph: bool = False) -> None:
        """Differentiate the sum of a scalar of every example [B]; ``p.grad`` stays as it is.

        Raises:
            RetryBatchError: some parameters have other owners from now on; what was received is
                incomplete and the batch must run once more, see :meth:`capture`.
            InseparableError: that would be of no use.
            UnsupportedModuleError: no gradient reaches a trainable parameter.
        """
        self._reasons, self._received = {}, set()
        try:
            # The parameters' own gradients are the price of reaching them. They are dropped: p.grad
            # stays untouched, and no gradient reducer of a distributed wrapper wakes up.
            gradients = differentiate(values.sum(), self._of_graph, retain_graph=retain_graph)
            reasons, unrepeatable = self._reasons, self._unrepeatable
        finally:
            self._reasons = self._unrepeatable = None
        if unrepeatable is not None:
            raise InseparableError(unrepeatable)
        if not reasons:
            for name in gradients:
                for path in sorted(self._owners[name]) if name not in self._received else ():
                    reasons.setdefault(
                        path,
                        f"the trainable parameter {name!r} is used outside of its module {path!r}",
                    )
        if reasons:
            self._move_owners_up(reasons)
            raise RetryBatchError("; ".join(dict.fromkeys(reasons.values())))

    def move_owners_up(self, names: Iterable[str]) -> None:
        """Let modules around their owners own these parameters, whose gradients were wrong.

        Raises:
            InseparableError: that would be of no use.
        """
        self._move_owners_up(
            {
                path: f"the gradients of {name!r} are not those of its examples alone"
                for name in names
                for path in sorted(self._owners[name])
            }
        )

    def _move_owners_up(self, reasons: Mapping[str, str]) -> None:
        """Let modules around these, given with reasons, own all parameters below them."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        num_modules = {path: len(list(module.modules())) for path, module in modules.items()}
        rerun = {modules[path] for path in self.rerun}

        def is_inside(path: str) -> bool:
            parts = path.split(".")
            return any(modules[".".join(parts[:n])] in rerun for n in range(len(parts)))

        def move_up(path: str, reason: str) -> None:
            around = path
            while around and (around == path or isinstance(modules[around], _CONTAINERS)):
                around = around.rpartition(".")[0]
            if num_modules[around] > _LARGEST_RERUN * num_modules[""]:
                raise InseparableError(reason)
            if modules[around] not in rerun:
                rerun.add(modules[around])
                logger.info(
                    "%s: its gradients are computed by running the module %r (%s) once more for "
                    "each example",
                    *(reason, around, type(modules[around]).__name__),
                )

        # A module may be in several places. It has one owner or, inside of others, none.
        for failed, reason in reasons.items():
            for path, module in modules.items():
                if module is modules[failed]:
                    move_up(path, reason)
        num_rerun = 0
        while num_rerun < len(rerun):
            num_rerun = len(rerun)
            inside = {module for path, module in modules.items() if is_inside(path)}
            for path, module in modules.items():
                has_trainable = any(p.requires_grad for p in module.parameters())
                if has_trainable and module in inside and not is_inside(path):
                    move_up(path, f"the module {path!r} is also a part of another")
        self.rerun = frozenset(path for path, module in modules.items() if module in rerun)
        self.__exit__()
        self.__enter__()

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._replaying:
            return
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim > 0]
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
        tensors = tensors_in((args, kwargs))
        handed_on = {id(tensor) for tensor in tensors}
        values = tensors_in(output)
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
            output = map_tensors(output, lambda _: next(rest))
        for number in numbers:
            value = values[number]
            batch_size, lengths = self._batch or (self.batch_size or len(value), frozenset())
            call = ModuleCall(
                path=path,
                module=module,
                own=own,
                inputs=map_tensors((args, kwargs), lambda _: torch.empty(0)),
                output=number,
                layout=BatchLayout(batch_size, lengths),
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
                reason = self._why_unsplit(call, (args, kwargs), output)
                value.register_hook(partial(self._note_reason, path, reason))
        return output

    def _note_reason(self, path: str, reason: str, grad: Tensor) -> None:
        if self._reasons is None:  # not in self.backward
            raise UnsupportedModuleError(f"{reason}. {_HOW_TO_SPLIT}")
        self._reasons[path] = reason

    def _why_unsplit(self, call: ModuleCall, inputs: Any, output: Any) -> str:
        def shapes(value: Any) -> str:
            return ", ".join(str(list(tensor.shape)) for tensor in tensors_in(value))

        return (
            f"the trainable parameter {next(iter(call.own.values()))!r} belongs to the module "
            f"{call.path!r} ({type(call.module).__name__}), which maps {shapes(inputs)} to "
            f"{shapes(output)}, which does not split into {call.layout.batch_size} examples"
        )

    def _after_backward(self, call: ModuleCall, kept: Any, grad: Tensor) -> None:
        self._received.update(call.own.values())
        if self._reasons or self._unrepeatable is not None:
            return  # the batch will run again
        tensors = kept.grad_fn.saved_tensors  # inside of a checkpoint, its layer runs again now
        if self._runs_once and call.rule(len(tensors)) is None:
            self._unrepeatable = (
                f"the module {call.path!r} ({type(call.module).__name__}) would have to run again "
                "within a backward, for which ZeRO-3 does not gather its parameters"
            )
            return
        size = call.layout.batch_size
        at_once = size
        if self.in_parts:
            entries = sum(shape_of(self._trainable[name]).numel() for name in call.own.values())
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
