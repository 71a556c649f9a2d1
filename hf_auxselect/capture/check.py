"""The check that captured per-example gradients are those of autograd, one example at a time.

Shapes: B examples of a batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.hooks import (
    ONE_BY_ONE,
    GradientHooks,
    InseparableError,
    NonFiniteError,
)
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.module_gradients import differentiate, with_zeros
from hf_auxselect.capture.scalars import (
    NEXT_TOKEN_LOSS,
    SCALARS,
    CollateFn,
    ExampleLoss,
    count_label_tokens,
    forward_label_logits,
    match_model_loss,
)
from hf_auxselect.sharding import parameters_of_graph, trainable_parameters

TOLERANCES = (2e-3, 5e-2)
HALF_PRECISION_TOLERANCES = (0.2, 0.8)
"""Largest relative error of an example's gradient, and of one parameter's part of it, that rounding
may cause; in float32, and where half precision takes part. Measured: in a model of 30 layers up to
3e-4 and 7e-4 in float32, and 0.1 and 0.35 in bfloat16, more on some processors than on others. A
fault is of order 0.1 to 1; that of a parameter without a hook, 1."""

_LEAST_NORM = 1e-3
"""A parameter whose gradient is a smaller part of the whole is measured against this part of it. A
convention: below it, rounding in the other parameters dominates."""

NUM_CANDIDATES = 32
"""How many examples of a task are searched for one with label tokens. A convention."""


class GradientCheckError(RuntimeError):
    """Captured gradients differ from autograd's; names the parameter."""


def gradients_one_by_one(
    model: nn.Module,
    examples: Sequence[Any],
    collate_fn: CollateFn,
    *,
    scalar: str = "margin",
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> Iterator[dict[str, Tensor]]:
    """Compute autograd's gradient of each example, run alone: slow, but right for any model.

    Args:
        model: a model with trainable parameters, in the mode in which it is to run.
        examples: rows for ``collate_fn``.
        collate_fn: turns a list of examples into the model's keyword arguments with labels.
        scalar: what is differentiated, a key of ``SCALARS``.
        loss: how labels and logits belong together.

    Yields:
        For each example, the gradient of every trainable parameter, of its shape, by name.

    Raises:
        UnsupportedModuleError: no trainable parameter gets a gradient.
    """
    trainable = trainable_parameters(model)
    with parameters_of_graph(model, trainable) as of_graph:
        for row in examples:
            value = SCALARS[scalar](forward_label_logits(model, collate_fn([row]), loss)).sum()
            yield with_zeros(differentiate(value, of_graph), trainable)


@dataclass(frozen=True)
class Comparison:
    """How the captured gradients of a batch compare with those of its examples alone."""

    error: float
    """Largest relative error of an example's gradient; 0 if examples must run alone."""
    rerun: frozenset[str]
    """``GradientHooks.rerun`` for this model."""
    inseparable: str | None
    """Why examples must run alone; None: they need not."""


def check_per_example_gradients(
    model: nn.Module,
    examples: Sequence[Any],
    collate_fn: CollateFn,
    *,
    scalar: str = "margin",
    loss: ExampleLoss | None = None,
) -> float:
    """Compare the captured gradients of a batch with autograd's, one example at a time.

    The examples run once as one batch, as in the gradient pass, and once each alone, which is slow
    but right. Two examples of different length show most faults (a module that mixes
    examples, padding that is attended to, a parameter without a hook).

    Args:
        model: a model with trainable parameters.
        examples: rows for ``collate_fn``, of which one or more have label tokens.
        collate_fn: turns a list of examples into the model's keyword arguments with labels.
        scalar: what is differentiated, a key of ``SCALARS``.
        loss: how labels and logits belong together; None: found by the model's own loss.

    Returns:
        The largest relative error |captured - autograd| / |autograd| of an example's gradient
        (Euclidean norms over all parameters). 0 for a model whose tensors do not split by example
        (position embeddings that are looked up once for all): the gradient pass runs each example
        alone, and warns of it.

    Raises:
        GradientCheckError: that error exceeds 2e-3 (0.2 where half precision takes part), or that
            of a single parameter exceeds 5e-2 (half precision: 0.8), which is more than rounding
            causes. Or no example has a label token, or all gradients are zero, so that there is
            nothing to compare.
        UnsupportedModuleError: no gradient reaches a trainable parameter.
        NonFiniteError: a gradient of autograd's is NaN or infinite.
    """
    if loss is None:
        with evaluation_mode(model):
            loss = match_model_loss(model, collate_fn(list(examples)))
    return compare_with_autograd(model, examples, collate_fn, scalar=scalar, loss=loss).error


def compare_with_autograd(
    model: nn.Module,
    examples: Sequence[Any],
    collate_fn: CollateFn,
    *,
    scalar: str = "margin",
    loss: ExampleLoss = NEXT_TOKEN_LOSS,
) -> Comparison:
    """:func:`check_per_example_gradients`; the gradient pass uses all of its result."""
    captured: dict[str, Tensor] = {}

    def receive(name: str, gradients: Tensor) -> None:
        captured[name] = captured[name] + gradients if name in captured else gradients

    def run() -> None:
        captured.clear()
        output = forward_label_logits(model, collate_fn(list(examples)), loss)
        if not output.num_label_tokens.any():
            raise GradientCheckError(
                f"none of the {len(examples)} examples that are checked has a label token (a label "
                "other than -100 that the model predicts): there is no gradient to compare. Pass "
                "examples that have some; look at the labels that the collator makes."
            )
        hooks.backward(SCALARS[scalar](output))

    hooks = GradientHooks(model, receive)
    hooks.batch_size = len(examples)
    inseparable = None
    with evaluation_mode(model):
        with hooks:
            try:
                hooks.capture(run)
            except InseparableError as caught:
                inseparable = str(caught)
        references = list(
            gradients_one_by_one(model, examples, collate_fn, scalar=scalar, loss=loss)
        )
        _refuse_references(references)
        if inseparable is not None:
            return Comparison(0.0, hooks.rerun, inseparable)
        largest, errors = found = _compare(captured, references)
        tolerance, of_parameter = HALF_PRECISION_TOLERANCES if hooks.half_precision else TOLERANCES
        with hooks, contextlib.suppress(InseparableError):
            # Sizes may agree by chance, or positions come before examples: modules around them
            # then give other gradients.
            while not (largest <= tolerance and max(errors.values()) <= of_parameter):
                hooks.move_owners_up(
                    name for name, error in errors.items() if not error <= tolerance
                )
                hooks.capture(run)
                largest, errors = _compare(captured, references)
            return Comparison(largest, hooks.rerun, None)
    largest, errors = found
    culprit = max(errors, key=errors.__getitem__)
    raise GradientCheckError(
        f"the captured per-example gradient differs from autograd's, one example at a time, by "
        f"{largest:.1e} of its norm (at most {tolerance:.0e} is expected), most of all for "
        f"{culprit!r} (by {errors[culprit]:.1e}). The parameter is used in a way that the hooks "
        "cannot see, or examples of a batch influence each other (padding that is attended to, "
        "packing, batch statistics). Freeze the parameter, leave its layer out of target_modules, "
        f"or {ONE_BY_ONE}."
    )


def _refuse_references(references: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise if autograd's gradients are not finite, or all 0."""
    norms = [math.hypot(*(float(g.double().norm()) for g in r.values())) for r in references]
    for row, norm in enumerate(norms):
        if not math.isfinite(norm):
            raise NonFiniteError(f"example {row} of those checked has a NaN or infinite gradient.")
    if not any(norms):
        raise GradientCheckError(
            f"the gradients of all {len(references[0])} trainable parameters are exactly zero for "
            "all examples that are checked: there is nothing to compare, and nothing that training "
            "could change. The trainable parameters do not act on the loss (an adapter whose other "
            "factor is zero and frozen, a branch that is off). Look at which ones are trainable."
        )


def _compare(
    captured: Mapping[str, Tensor], references: Sequence[Mapping[str, Tensor]]
) -> tuple[float, dict[str, float]]:
    """Largest relative error of an example's gradient, and of each parameter's part of it."""
    largest, errors = 0.0, dict.fromkeys(references[0], 0.0)
    for row, reference in enumerate(references):
        expected = {name: gradient.double() for name, gradient in reference.items()}
        norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
        norm = math.hypot(*norms.values())
        differences = {
            name: float((captured[name][row] - gradient if name in captured else gradient).norm())
            for name, gradient in expected.items()
        }
        of_example = math.hypot(*differences.values()) / (norm or 1.0)
        largest = largest if of_example <= largest else of_example
        for name, difference in differences.items():
            error = difference / (max(norms[name], _LEAST_NORM * norm) or 1.0)
            errors[name] = errors[name] if error <= errors[name] else error  # NaN stays
    return largest, errors


def examples_to_check(
    model: nn.Module,
    tasks: Sequence[TaskExamples],
    target: TaskExamples,
    collate_fn: CollateFn,
    loss: ExampleLoss,
) -> list[Any]:
    """The first example of the tasks, and the first of the target, that have label tokens.

    They are searched among the first 32 of each task. Where the keys of the two rows differ, so
    that one batch cannot hold both, the second one is of the tasks, too.
    """

    def with_labels(group: Sequence[TaskExamples]) -> Iterator[Any]:
        for task in group:
            for i in task.example_ids[:NUM_CANDIDATES]:
                row = task.rows[i]
                if count_label_tokens(model, collate_fn([row]), loss).any():
                    yield row

    of_tasks = with_labels(tasks)
    one = next(of_tasks, tasks[0].rows[tasks[0].example_ids[0]])
    other = next(with_labels([target]), target.rows[target.example_ids[0]])
    keys = [set(row) if isinstance(row, Mapping) else None for row in (one, other)]
    return [one, other] if keys[0] == keys[1] else [one, next(of_tasks, one)]
