"""The loss of an example: from a batch's logits and labels, or from a loss function of the trainer.

Labels may be tokens that the position before predicts (language models), tokens or classes of the
position itself (encoder-decoders, masked language models, token classification), or one class for
each example (sequence classification). A class counts as a token.

Shapes: B examples of a batch, S positions, V vocabulary or classes, L label tokens of a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_auxselect.capture.memory import row_by_row, take_rows

Batch = Mapping[str, Any]
"""Keyword arguments of a model, with labels."""

CollateFn = Callable[[list[Any]], Batch]
"""Makes a batch of examples."""

IGNORE_INDEX = -100
"""Label of positions that carry no loss, in all of Transformers."""

_TOLERANCE, _HALF_PRECISION_TOLERANCE = 1e-3, 5e-2
"""Relative difference from the model's own loss up to which a loss counts as the same, in float32
and where half precision takes part. A convention: rounding stays below it."""

HALF = (torch.float16, torch.bfloat16)
"""Floating-point types in which sums over many terms lose precision."""


class UnsupportedLossError(ValueError):
    """Labels or logits of a shape or kind whose loss is not supported; names them."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; leave anything else as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


@dataclass(frozen=True)
class ExampleLoss:
    """How the loss of an example follows from the model.

    Attributes:
        shift: whether the logits of a position predict the label of the next one. Without effect
            where a model has one label for each example.
        of_batch: the mean loss of a batch, for losses that are not the negative log-likelihood of
            the labels: label smoothing, a loss function of the user's, a regularizer. Examples then
            run one at a time. None: the negative log-likelihood.
        per_token: whether the loss of a batch is a mean over label tokens (True) or over examples.
        of_batch_name: tells ``of_batch`` from others, such as ``"label_smoothing_factor=0.1"``. A
            store that was captured with a loss of another name is captured again.
    """

    shift: bool = True
    of_batch: Callable[[Batch], Tensor] | None = None
    per_token: bool = True
    of_batch_name: str = ""

    def __str__(self) -> str:
        """What it is, in words; equal for losses that are taken for the same."""
        what = "next token" if self.shift else "position"
        per = "label tokens" if self.per_token else "examples"
        if self.of_batch is None:
            return f"negative log-likelihood of the label of the {what}, mean over {per}"
        return f"another loss ({self.of_batch_name or 'unnamed'}), mean over {per}"

    def count(self, label_tokens: Tensor) -> Tensor:
        """Weight of examples in the loss of their batch [B], from their numbers of label tokens."""
        return label_tokens if self.per_token else label_tokens.clamp(max=1)


NEXT_TOKEN_LOSS = ExampleLoss()
"""Negative log-likelihood of the next token, averaged over label tokens: that of causal models."""


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
    own_loss: Tensor | None = None
    """[B]: the loss of each example, where it is not that of the labels; see ``ExampleLoss``."""

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean over each example's label tokens [B] of per-token values [L]; 0 without any."""
        sums = values.new_zeros(len(self.num_label_tokens)).index_add(0, self.examples, values)
        return sums / self.num_label_tokens.clamp(min=1)


def base_model(model: nn.Module) -> Any:
    """The model below a PEFT wrapper."""
    return getattr(model, "get_base_model", lambda: model)()


def labels_of(model: nn.Module, batch: Batch, loss: ExampleLoss) -> Tensor:
    """The labels that a batch's logits predict, int64 [B, S]; -100 carries no loss.

    Labels of one class for each example become [B, 1].

    Raises:
        UnsupportedLossError: labels that are no class numbers, as in regression.
    """
    labels = batch.get("labels")
    if labels is None:
        raise UnsupportedLossError(
            f"the batch has no labels (it has {sorted(batch)}); supported are losses of labels, "
            "one for each example [B] or one for each position [B, S]."
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim > 2:
        got = (
            f"{labels.dtype} labels of shape {list(labels.shape)}"
            if isinstance(labels, Tensor)
            else f"labels of type {type(labels).__name__}"
        )
        raise UnsupportedLossError(
            f"the batch has {got}; supported are integer labels, one for each example [B] or one "
            "for each position [B, S]. Regression, multi-label classification and segmentation are "
            "not supported: train without TaskSelectionCallback."
        )
    labels = labels.long()
    if labels.ndim == 1:
        return labels.unsqueeze(1)
    if loss.shift and not is_encoder_decoder(model):
        return labels[:, 1:]
    return labels


def count_label_tokens(model: nn.Module, batch: Batch, loss: ExampleLoss) -> Tensor:
    """Number of positions of each example that carry loss, int64 [B]."""
    return (labels_of(model, batch, loss) != IGNORE_INDEX).sum(1)


def forward_label_logits(
    model: nn.Module, batch: Batch, loss: ExampleLoss = NEXT_TOKEN_LOSS
) -> LabelLogits:
    """Run the model on a batch and keep the logits that predict a label.

    The head runs at the positions where some example has a label, if the model's forward takes
    ``logits_to_keep``: with a large vocabulary it would otherwise dominate the pass.

    Args:
        model: a model whose forward returns ``logits`` [B, S, V], or [B, V] for one label an
            example.
        batch: its keyword arguments, with ``labels`` int64 [B, S] or [B]; -100 carries no loss.
        loss: how labels and logits belong together; where it has an ``of_batch``, the batch holds
            one example and the result its ``own_loss``, too.

    Raises:
        UnsupportedLossError: labels or logits of another shape; names both.
    """
    labels = labels_of(model, batch, loss)
    num_positions = batch["labels"].shape[-1]
    is_label = labels != IGNORE_INDEX
    counts = is_label.sum(1)
    inputs = _inputs(model, batch)
    # Prompt tuning and its like put virtual tokens before the others.
    virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    takes_positions = (
        "logits_to_keep" in inspect.signature(type(base_model(model)).forward).parameters
    )
    if batch["labels"].ndim == 2 and takes_positions and not virtual:
        positions = is_label.any(0).nonzero().squeeze(1)
        labels, is_label = labels[:, positions], is_label[:, positions]
        inputs["logits_to_keep"] = positions
    examples, columns = is_label.nonzero(as_tuple=True)
    logits = _logits(model(**inputs))
    if logits.ndim == 2:
        logits = logits.unsqueeze(1)
    elif batch["labels"].ndim == 2:
        logits = logits[:, -num_positions:]
    if logits.ndim != 3 or len(logits) != len(labels) or logits.shape[1] < labels.shape[1]:
        raise UnsupportedLossError(
            f"labels of shape {list(batch['labels'].shape)} and logits of shape "
            f"{list(logits.shape)} do not belong together: expected logits [B, S, V] for labels "
            "[B, S], or [B, V] for labels [B]."
        )
    if logits.shape[-1] < 2:
        raise UnsupportedLossError(
            f"logits of shape {list(logits.shape)} tell one class from no other (num_labels=1 is a "
            "regression), which is not supported: train without TaskSelectionCallback."
        )
    return LabelLogits(
        logits=at_least_float32(
            take_rows(logits.flatten(0, 1), examples * logits.shape[1] + columns)
        ),
        labels=labels[examples, columns],
        examples=examples,
        num_label_tokens=counts,
        own_loss=None if loss.of_batch is None else loss.of_batch(batch).reshape(1),
    )


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments with which the model returns logits at the positions of the labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = base_model(model)
    parameters = inspect.signature(type(base).forward).parameters.values()
    # Before transformers 5, encoders have the setting, but their heads take no such argument.
    takes_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_cache and getattr(getattr(base, "config", None), "use_cache", False):
        inputs["use_cache"] = False
    made_of_labels = is_encoder_decoder(model) and batch["labels"].ndim == 2
    if made_of_labels and inputs.get("decoder_input_ids") is None:
        make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if make is not None:
            inputs["decoder_input_ids"] = make(labels=batch["labels"])
        else:  # such models shift the labels themselves (Whisper)
            inputs["labels"] = batch["labels"]
    return inputs


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are the decoder's, which shifts its inputs and not its outputs."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def _logits(output: Any) -> Tensor:
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if not isinstance(logits, Tensor):
        raise UnsupportedLossError(
            f"the model's output, a {type(output).__name__}, has no tensor 'logits'; losses of "
            "label tokens need them. Use a model with a language-modelling or classification head "
            "(and return_dict=True)."
        )
    return logits


def match_model_loss(model: nn.Module, batch: Batch) -> ExampleLoss:
    """Find how labels and logits belong together, by the model's own loss of a batch.

    Args:
        model: a model in evaluation mode. One that takes no labels, or returns no loss, is taken
            for a causal language model.
        batch: its keyword arguments, with labels.

    Raises:
        UnsupportedLossError: the model's loss is no negative log-likelihood of labels.
    """
    parameters = inspect.signature(type(base_model(model)).forward).parameters
    with torch.no_grad():
        output = model(**batch) if "labels" in parameters else None
        own = getattr(output, "loss", None)
        if own is None or not own.isfinite():  # NaN: no label tokens, which is refused elsewhere
            return NEXT_TOKEN_LOSS
        found: dict[bool, float] = {}
        for shift in (True, False):
            result = forward_label_logits(model, batch, ExampleLoss(shift=shift))
            total = SCALARS["loss"](result) @ result.num_label_tokens.to(result.logits.dtype)
            found[shift] = float(total / result.num_label_tokens.sum().clamp(min=1))
    # In PyTorch 2.6, casts that autocast keeps from here would let no gradient through.
    torch.clear_autocast_cache()
    closest = min(found, key=lambda shift: abs(found[shift] - float(own)))
    is_half = torch.is_autocast_enabled(own.device.type) or any(
        p.dtype in HALF for p in model.parameters()
    )
    tolerance = _HALF_PRECISION_TOLERANCE if is_half else _TOLERANCE
    if math.isclose(found[closest], float(own), rel_tol=tolerance):
        return ExampleLoss(shift=closest)
    raise UnsupportedLossError(
        f"the model's own loss of a batch is {float(own):.4f}, the negative log-likelihood of its "
        f"labels {found[True]:.4f} (of the position's own: {found[False]:.4f}). Pass "
        "loss=ExampleLoss(of_batch=lambda batch: model(**batch).loss) for a loss that is a mean "
        "over label tokens, or leave the extra term out of the model's loss."
    )


def token_margins(output: LabelLogits) -> Tensor:
    """The log-odds of each label token [L]: log p - log(1 - p), in nats.

    Computed as ``z_y - logsumexp(z_j for j != y)``, which is exact where p is near 0 or 1. The
    token's loss is ``-log p = softplus(-margin)``.
    """
    return row_by_row(_margins, output.logits, output.labels)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    gold = labels.unsqueeze(1)
    others = logits.scatter(1, gold, -torch.inf).logsumexp(1)
    return logits.gather(1, gold).squeeze(1) - others


def _draw_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw labels [L] from the model itself, by uniform random numbers."""
    cumulative = logits.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(cumulative).unsqueeze(1))
    return drawn.clamp(max=cumulative.shape[-1] - 1).squeeze(1)


def _sampled_loss(output: LabelLogits) -> Tensor:
    """The loss of labels drawn from the model itself, scaled for the Fisher matrix [B].

    With n label tokens of an example and drawn labels y, it is the sum of -log p(y) over the tokens
    divided by sqrt(n). Its gradient phi has mean 0, and E[phi phi^T] is the mean over the tokens of
    their Fisher matrices, which is the Gauss-Newton matrix of the example's loss (the mean over
    its label tokens): the cross terms of independent draws vanish.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020),
    sections 5 and 9.
    """
    assert output.uniforms is not None
    with torch.no_grad():
        drawn = row_by_row(_draw_labels, output.logits, output.uniforms)
    cross_entropy = partial(nn.functional.cross_entropy, reduction="none")
    losses = row_by_row(cross_entropy, output.logits, drawn)
    return output.mean_over_tokens(losses) * output.num_label_tokens.sqrt()


def _training_loss(output: LabelLogits) -> Tensor:
    """The training loss of each example [B], nats per label token."""
    if output.own_loss is not None:
        return output.own_loss
    return output.mean_over_tokens(nn.functional.softplus(-token_margins(output)))


def add_scalar(name: str, of_examples: Callable[[LabelLogits], Tensor]) -> None:
    """Let the pass differentiate another scalar of an example, too, in this process.

    Args:
        name: what an estimator's ``scalars`` call it.
        of_examples: gives the scalar of each example [B] from the logits of a batch.

    Raises:
        ValueError: another scalar has that name.
    """
    if SCALARS.setdefault(name, of_examples) is not of_examples:
        raise ValueError(f"name {name!r} is that of another scalar; choose a new one.")


SCALARS: dict[str, Callable[[LabelLogits], Tensor]] = {
    # The paper's output f(s): the mean over label tokens of log p/(1 - p) (section 3).
    "margin": lambda output: output.mean_over_tokens(token_margins(output)),
    "loss": _training_loss,
    "sampled_loss": _sampled_loss,
}
"""Scalars of an example [B] that the pass can differentiate, by name."""

AT_OPTIMIZER = "@optimizer"
"""Suffix of a scalar whose gradient is taken in the coordinates of the optimizer's steps."""
