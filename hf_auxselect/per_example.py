"""Per-example gradients of every trainable parameter, from one backward of a batch.

Hooks on the modules that own trainable parameters see each module's input x and the gradient g of
its output, from which the gradient of every example follows: for a linear layer the sum over
positions of the outer products g x^T, for any other module its own vector-Jacobian product.

Shapes: B examples of a batch, S positions, V vocabulary, L label tokens of a batch.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_auxselect.memory import (
    SavedInputs,
    checkpointed,
    is_out_of_memory,
    row_by_row,
    take_rows,
)

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
CollateFn = Callable[[list[Any]], Batch]
ReceiveFn = Callable[[str, Tensor], None]
Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]

IGNORE_INDEX = -100
"""Label of positions that carry no loss, in all of Transformers."""

_HALF = (torch.float16, torch.bfloat16)
_FULL = (torch.float32, torch.float64)
_LISTS = (nn.ParameterList, nn.ParameterDict)

_TENSOR = object()
"""Stands for a tensor among a call's inputs that is kept elsewhere."""

_ENTRIES_AT_ONCE = 2**20
"""Entries of a module's per-example gradients that exist at once, at least those of an example.

4 MiB in float32. Those of a LoRA matrix of rank 16 on 4096 features, for a batch of 16, exist at
once; of a head of 4096 x 256 entries, one example's."""

_ONE_BY_ONE = "pass one_by_one=True, which runs each example alone: slow, but right for any model"


class UnsupportedModuleError(ValueError):
    """A trainable parameter whose per-example gradient cannot be captured; names it."""


class GradientCheckError(RuntimeError):
    """Captured gradients that differ from autograd's; names the parameter."""


class NonFiniteError(ValueError):
    """A loss or gradient of an example that is NaN or infinite; names task and row."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return tensor.float() if tensor.dtype in _HALF else tensor


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


def _autograd_gradients(
    output: Tensor, parameters: Mapping[str, Tensor], grad: Tensor | None = None
) -> dict[str, Tensor]:
    """Autograd's gradient, by name; 0 for parameters that the output does not depend on.

    Raises:
        UnsupportedModuleError: it depends on none.
    """
    if not output.requires_grad:
        raise UnsupportedModuleError(
            "no gradient reaches a trainable parameter: the model has none, or its adapter is "
            "merged or disabled. Train a LoRA adapter (peft_config=...) or unfreeze parameters."
        )
    gradients = torch.autograd.grad(output, list(parameters.values()), grad, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


@dataclass(frozen=True)
class _Call:
    """A call of a module that owns trainable parameters."""

    path: str
    module: nn.Module
    own: Mapping[str, str]
    """Names of those parameters, in the module -> in the model."""
    inputs: Sequence[Any]
    """Positional arguments, then keyword arguments; tensors are detached."""
    keywords: Sequence[str]
    autocast: torch.dtype | None
    """What the call was autocast to; a backward often runs outside of that context."""

    def tensors(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor)]

    def without_tensors(self) -> _Call:
        """The call with ``_TENSOR`` in place of each tensor."""
        return replace(self, inputs=[_TENSOR if isinstance(v, Tensor) else v for v in self.inputs])

    def with_tensors(self, tensors: Sequence[Tensor]) -> _Call:
        """Undoes ``without_tensors``."""
        rest = iter(tensors)
        return replace(self, inputs=[next(rest) if v is _TENSOR else v for v in self.inputs])

    def splits_by_example(self, output: Tensor) -> bool:
        """Whether every tensor, in and out, has the batch as its first dimension."""
        plain = (Tensor, nn.Module, str, int, float, type(None))
        tensors = self.tensors()
        return (
            len(tensors) > 0
            and output.ndim > 0
            and all(tensor.shape[:1] == output.shape[:1] for tensor in tensors)
            and all(isinstance(value, plain) for value in self.inputs)
        )

    def gradients(self, grad: Tensor) -> dict[str, Tensor]:
        """Gradients [B, *shape] of the own parameters from that of the output [B, ...]."""
        rule = self._rule() if len(self.inputs) == 1 else None
        if rule is None:
            return self._replay(grad)
        # In an autocast that spans the backward, sums over positions would be rounded.
        with torch.autocast(grad.device.type, enabled=False):
            return rule(self.module, self.tensors()[0], grad)

    def _rule(self) -> Rule | None:
        """The rule for the own parameters; None if the module may compute something else."""
        for kind, rule in _RULES.items():
            # Subclasses that compute otherwise (quantized layers do) add their bias all the same.
            known = type(self.module).forward is kind.forward or self.own.keys() == {"bias"}
            if isinstance(self.module, kind) and known and self.own.keys() <= {"weight", "bias"}:
                return rule
        return None

    def _replay(self, grad: Tensor) -> dict[str, Tensor]:
        """The module's vector-Jacobian product of each example."""
        trainable = {
            name: parameter.detach()
            for name, parameter in self.module.named_parameters()
            if name in self.own
        }
        num_positional = len(self.inputs) - len(self.keywords)

        def forward(parameters: dict[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
            rest = iter(tensors)
            inputs = [
                next(rest).unsqueeze(0) if isinstance(value, Tensor) else value
                for value in self.inputs
            ]
            args = tuple(inputs[:num_positional])
            kwargs = dict(zip(self.keywords, inputs[num_positional:], strict=True))
            return torch.func.functional_call(self.module, parameters, args, kwargs)

        def vectorised(tensors: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
            pull_back = torch.func.vjp(partial(forward, tensors=tensors), trainable)[1]
            return pull_back(grad.unsqueeze(0))[0]

        def alone(tensors: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
            parameters = {name: p.detach().requires_grad_() for name, p in trainable.items()}
            with torch.enable_grad():
                output = forward(parameters, tensors)
            return _autograd_gradients(output, parameters, grad.unsqueeze(0))

        tensors, enabled = self.tensors(), self.autocast is not None
        # Casts that autocast keeps for later would outlive the replay.
        with torch.autocast(grad.device.type, self.autocast, enabled=enabled, cache_enabled=False):
            try:
                gradients = torch.func.vmap(vectorised)(tensors, grad)
            except RuntimeError as error:
                # Kernels that vmap knows no rule for, what is changed in place, or branches on
                # data: each raises its own message, of no class of its own.
                if is_out_of_memory(error):
                    raise
                _log_one_by_one(self.path, type(self.module).__name__, str(error))
                each = [alone([t[i] for t in tensors], grad[i]) for i in range(len(grad))]
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


class GradientHooks:
    """While open, hands the per-example gradient of each trainable parameter to a function.

    ``receive(name, gradients)`` is called during backward, for every call of a module that owns
    trainable parameters, with ``gradients`` [B, *parameter.shape]: the derivative of the
    differentiated sum with respect to the parameter, split by example. A parameter may be received
    several times (tied weights, modules called twice): its gradient is the sum. The model is left
    as it was.

    Args:
        model: any model whose trainable parameters belong to modules that map tensors [B, ...] to
            one tensor [B, ...]. A module with a ``ParameterDict`` or ``ParameterList`` (as in LoRA
            on embeddings) owns those and all that is below it.
        receive: called with the parameter's name in ``model.named_parameters()``.

    Raises:
        UnsupportedModuleError: a trainable parameter cannot be captured.
    """

    def __init__(self, model: nn.Module, receive: ReceiveFn) -> None:
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.batch_size: int | None = None
        """B of the batch that runs, to refuse modules that mix examples; None: not checked."""
        self.half_precision = any(p.dtype not in _FULL for p in model.parameters())
        """Whether half precision, or less, was seen in parameters, outputs or autocast."""
        self.in_parts = False
        """Whether large gradients are handed over for some examples at a time, in order."""
        self.first_row = 0
        """Row of the batch that the first of the gradients handed over belongs to."""
        self._model = model
        self._receive = receive
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaying = False

    def __enter__(self) -> GradientHooks:
        below: set[nn.Module] = set()
        for path, module in self._model.named_modules():
            if module in below:
                continue
            whole = _reaches_below(module)
            if whole:
                below.update(module.modules())
            own = {
                local: self.names[id(parameter)]
                for local, parameter in module.named_parameters(recurse=whole)
                if parameter.requires_grad
            }
            if own:
                hook = partial(self._after_forward, path, own)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _after_forward(
        self,
        path: str,
        own: dict[str, str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if self._replaying or not torch.is_grad_enabled():
            return
        inputs = [v.detach() if isinstance(v, Tensor) else v for v in [*args, *kwargs.values()]]
        call = _Call(path, module, own, inputs, list(kwargs), _autocast_dtype(output))
        if not isinstance(output, Tensor):
            raise UnsupportedModuleError(self._complaint(call, output))
        if not output.requires_grad:
            return
        self.half_precision |= output.dtype in _HALF or call.autocast is not None
        if call.splits_by_example(output) and self.batch_size in (None, len(output)):
            # The inputs are kept as autograd keeps its own, so that checkpoints can drop them.
            saved = SavedInputs.keep(call.tensors())
            output.register_hook(partial(self._after_backward, call.without_tensors(), saved))
            return

        complaint = self._complaint(call, output)

        def refuse(grad: Tensor) -> None:
            raise UnsupportedModuleError(complaint)

        # Harmless unless a gradient arrives: DoRA, for one, runs LoRA's layers on a unit matrix.
        output.register_hook(refuse)

    def _complaint(self, call: _Call, output: Any) -> str:
        def shape(value: Any) -> str:
            return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

        return (
            f"the trainable parameter {next(iter(call.own.values()))!r} belongs to the module "
            f"{call.path!r} ({type(call.module).__name__}), which maps "
            f"{', '.join(map(shape, call.inputs))} to {shape(output)}; a per-example gradient can "
            "be captured only if it maps tensors to one tensor, all with the batch size "
            f"({self.batch_size}) as first dimension. Freeze the parameter; or, for position "
            "embeddings, let the collator return position_ids of the shape of input_ids; or "
            f"{_ONE_BY_ONE}."
        )

    def _after_backward(self, call: _Call, saved: Any, grad: Tensor) -> None:
        tensors = saved.saved_tensors  # inside of a checkpoint, its layer runs again now
        rows = len(grad)
        if self.in_parts:
            entries = sum(
                parameter.numel()
                for name, parameter in call.module.named_parameters()
                if name in call.own
            )
            rows = min(max(_ENTRIES_AT_ONCE // entries, 1), rows)
        for start in range(0, len(grad), rows):
            self.first_row, part = start, slice(start, start + rows)
            part_of_call = call.with_tensors([tensor[part] for tensor in tensors])
            self._replaying = True
            try:
                gradients = part_of_call.gradients(grad[part])
            finally:
                self._replaying = False
            for local, name in call.own.items():
                self._receive(name, gradients[local])
            del gradients  # before those of the next examples are computed
        self.first_row = 0


@dataclass(frozen=True)
class LabelLogits:
    """Logits at the label positions of a batch."""

    logits: Tensor
    """[L, V], at least float32."""
    labels: Tensor
    """int64 [L]."""
    examples: Tensor
    """int64 [L], row of the batch that each label token belongs to."""
    num_label_tokens: Tensor
    """int64 [B]."""
    uniforms: Tensor | None = None
    """float32 [L] in [0, 1): the random numbers by which labels are drawn, for ``sampled_loss``."""

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean over each example's label tokens [B] of per-token values [L]; 0 without any."""
        sums = values.new_zeros(len(self.num_label_tokens)).index_add(0, self.examples, values)
        return sums / self.num_label_tokens.clamp(min=1)


def forward_label_logits(model: nn.Module, batch: Batch) -> LabelLogits:
    """Run the model on a batch and keep the logits that predict a label.

    The head runs at the positions where some example has a label, if the model's forward takes
    ``logits_to_keep``: with a large vocabulary it would otherwise dominate the pass.

    Args:
        model: a model whose forward returns ``logits`` [B, S, V].
        batch: its keyword arguments, with ``labels`` int64 [B, S]; -100 carries no loss. Labels
            are shifted (position s predicts label s + 1), except for encoder-decoder models.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()  # below a PEFT wrapper
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        labels = labels[:, 1:]
    if getattr(config, "use_cache", False):
        inputs["use_cache"] = False
    is_label = labels != IGNORE_INDEX
    # Prompt tuning and its like put virtual tokens before the others.
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if not virtual and "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        positions = is_label.any(0).nonzero().squeeze(1)
        labels, is_label = labels[:, positions], is_label[:, positions]
        inputs["logits_to_keep"] = positions
    examples, columns = is_label.nonzero(as_tuple=True)
    logits = model(**inputs).logits[:, -batch["labels"].shape[1] :]
    return LabelLogits(
        logits=at_least_float32(
            take_rows(logits.flatten(0, 1), examples * logits.shape[1] + columns)
        ),
        labels=labels[examples, columns],
        examples=examples,
        num_label_tokens=is_label.sum(1),
    )


def token_margins(output: LabelLogits) -> Tensor:
    """Log-odds of each label token [L]: log p - log(1 - p), in nats.

    Computed as ``z_y - logsumexp(z_j for j != y)``, which is exact where p is near 0 or 1. The
    token's loss is ``-log p = softplus(-margin)``.
    """
    return row_by_row(_margins, output.logits, output.labels)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    gold = labels.unsqueeze(1)
    others = logits.scatter(1, gold, -torch.inf).logsumexp(1)
    return logits.gather(1, gold).squeeze(1) - others


def _draws(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels drawn from the model itself [L], by uniform random numbers."""
    cumulative = logits.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(cumulative).unsqueeze(1))
    return drawn.clamp(max=cumulative.shape[-1] - 1).squeeze(1)


def _sampled_loss(output: LabelLogits) -> Tensor:
    """Loss of labels drawn from the model itself, scaled for the Fisher matrix [B].

    With n label tokens of an example and drawn labels y, it is the sum of -log p(y) over the tokens
    divided by sqrt(n). Its gradient phi has mean 0, and E[phi phi^T] is the mean over the tokens of
    their Fisher matrices, which is the Gauss-Newton matrix of the example's loss (the mean over
    its label tokens): the cross terms of independent draws vanish.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020),
    sections 5 and 9.
    """
    assert output.uniforms is not None
    with torch.no_grad():
        drawn = row_by_row(_draws, output.logits, output.uniforms)
    cross_entropy = partial(nn.functional.cross_entropy, reduction="none")
    losses = row_by_row(cross_entropy, output.logits, drawn)
    return output.mean_over_tokens(losses) * output.num_label_tokens.sqrt()


SCALARS: dict[str, Callable[[LabelLogits], Tensor]] = {
    # The paper's output f(s): the mean over label tokens of log p/(1 - p) (section 3).
    "margin": lambda output: output.mean_over_tokens(token_margins(output)),
    # The training loss of the example, nats per label token.
    "loss": lambda output: output.mean_over_tokens(nn.functional.softplus(-token_margins(output))),
    "sampled_loss": _sampled_loss,
}
"""Scalars of an example [B] that the pass can differentiate, by name."""


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


def gradients_one_by_one(
    model: nn.Module, examples: Sequence[Any], collate_fn: CollateFn, *, scalar: str = "margin"
) -> Iterator[dict[str, Tensor]]:
    """Autograd's gradient of each example, run alone: slow, obviously right, for any model.

    Args:
        model: a model with trainable parameters, in the mode that is meant.
        examples: rows for ``collate_fn``.
        collate_fn: turns a list of examples into the model's keyword arguments with labels.
        scalar: what is differentiated, a key of ``SCALARS``.

    Yields:
        For each example, the gradient of every trainable parameter, of its shape, by name.

    Raises:
        UnsupportedModuleError: no trainable parameter gets a gradient.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for row in examples:
        value = SCALARS[scalar](forward_label_logits(model, collate_fn([row]))).sum()
        yield _autograd_gradients(value, trainable)


def check_per_example_gradients(
    model: nn.Module, examples: Sequence[Any], collate_fn: CollateFn, *, scalar: str = "margin"
) -> float:
    """Compare the captured gradients of a batch with autograd's, one example at a time.

    The examples run once as one batch, as in the gradient pass, and once each alone, which is slow
    and obviously right. Two examples of different length show most faults (a module that mixes
    examples, padding that is attended to, a parameter without a hook).

    Args:
        model: a model with trainable parameters.
        examples: rows for ``collate_fn``.
        collate_fn: turns a list of examples into the model's keyword arguments with labels.
        scalar: what is differentiated, a key of ``SCALARS``.

    Returns:
        The largest relative error |captured - autograd| / |autograd| of an example's gradient
        (Euclidean norms over all parameters).

    Raises:
        GradientCheckError: that error exceeds 2e-3 (0.2 where half precision takes part), or that
            of a single parameter exceeds 5e-2 (half precision: 0.8). Rounding stays below: in a
            model of 30 layers up to 3e-4 and 7e-4 were seen in float32, and 0.1 and 0.35 in
            bfloat16, more on some processors than on others. A fault is of order 0.1 to 1; of a
            parameter that has no hook, 1.
        UnsupportedModuleError: a trainable parameter cannot be captured, or none gets a gradient.
        NonFiniteError: a gradient of autograd's is NaN or infinite.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    captured: dict[str, Tensor] = {}

    def receive(name: str, gradients: Tensor) -> None:
        captured[name] = captured[name] + gradients if name in captured else gradients

    with evaluation_mode(model):
        with GradientHooks(model, receive) as hooks:
            hooks.batch_size = len(examples)
            output = forward_label_logits(model, collate_fn(list(examples)))
            _autograd_gradients(SCALARS[scalar](output).sum(), trainable)
        references = list(gradients_one_by_one(model, examples, collate_fn, scalar=scalar))

    largest, largest_of_parameter, culprit = 0.0, 0.0, ""
    for row, reference in enumerate(references):
        expected = {name: gradient.double() for name, gradient in reference.items()}
        norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
        norm = math.hypot(*norms.values())
        if not math.isfinite(norm):
            raise NonFiniteError(f"example {row} of those checked has a NaN or infinite gradient.")
        differences = {
            name: float((captured[name][row] - gradient if name in captured else gradient).norm())
            for name, gradient in expected.items()
        }
        largest = max(largest, math.hypot(*differences.values()) / (norm or 1.0))
        for name, difference in differences.items():
            # A parameter with next to no gradient is measured against 0.1% of the whole.
            error = difference / (max(norms[name], 1e-3 * norm) or 1.0)
            if not error <= largest_of_parameter:
                largest_of_parameter, culprit = error, name
    tolerances = (0.2, 0.8) if hooks.half_precision else (2e-3, 5e-2)
    if not (largest <= tolerances[0] and largest_of_parameter <= tolerances[1]):
        raise GradientCheckError(
            f"the captured per-example gradient differs from autograd's, one example at a time, by "
            f"{largest:.1e} of its norm (at most {tolerances[0]:.0e} is expected), most of all for "
            f"{culprit!r} (by {largest_of_parameter:.1e}). The parameter is used in a way that the "
            "hooks cannot see, or examples of a batch influence each other (padding that is "
            "attended to, packing, batch statistics). Freeze the parameter, leave its layer out of "
            f"target_modules, or {_ONE_BY_ONE}."
        )
    return largest
