"""Which loss of an example a trainer trains on and logs; found by comparing with the trainer's own.

The estimates are about that number, so the comparison comes before the first step.

Shapes: B batches that are compared, C candidates, P processes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import (
    IGNORE_INDEX,
    NEXT_TOKEN_LOSS,
    SCALARS,
    Batch,
    ExampleLoss,
    UnsupportedLossError,
    base_model,
    forward_label_logits,
    is_encoder_decoder,
)
from hf_auxselect.distributed import gather
from hf_auxselect.trainer import access, data
from hf_auxselect.trainer.data import ModelRows

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
"""Largest difference between two computations of a loss, as a share of it and in nats. Rounding in
float32 stays below 1e-6 in models of 2 to 30 layers; what is to be found is of order 1e-4 to 1."""

_HALF_TOLERANCE = 5e-2
"""The same in half precision, where 1e-2 was seen between an example in a batch and alone."""

_TIE = 1e-7
"""Errors that differ by less, in the same units, differ by rounding in float32."""

_SMALL_DIFFERENCE = 0.05
"""Up to this share of the loss a term that does not split by example is warned of, not refused: the
estimates themselves err by 1 to 3%."""

_NUM_ROWS = 4
"""Rows of the larger batch that is compared, of the training set and of the target each: enough to
differ in length and label tokens, at the cost of four training rows."""

_NUM_CANDIDATES = 16
"""Rows that are collated at most to find those."""


@dataclass(frozen=True, kw_only=True)
class TrainerLoss:
    """How this package computes the loss that a trainer trains on and logs.

    Attributes:
        of_example: how the loss of an example follows from the model.
        pools_processes: whether an evaluation step averages over the label tokens of all processes
            (Trainer with ``average_tokens_across_devices``), or each process over its own.
        notes: how the logged loss differs all the same, in sentences for the report.
    """

    of_example: ExampleLoss = NEXT_TOKEN_LOSS
    pools_processes: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ComparedBatch:
    """A batch of rows, with the loss that the trainer has for it."""

    batch: Batch
    alone: list[Batch]
    """The same examples, each in a batch of its own."""
    own: float


def settle_loss(trainer: Trainer, train_rows: ModelRows, target_rows: ModelRows) -> TrainerLoss:
    """Find how to compute the trainer's loss of an example, by comparing with the trainer's own.

    In evaluation mode, a batch and a single row of the training set and of the target each run
    through ``Trainer.prediction_step``. Tried in turn are the negative log-likelihood of the next
    token's label and of the position's own, averaged over label tokens or over examples; then the
    trainer's own loss, of each example alone. Takes about 35 forward passes of at most 4 rows. With
    several processes all must call it.

    Args:
        trainer: the trainer, with its data prepared.
        train_rows: of its training set.
        target_rows: of the evaluation set whose loss is estimated.

    Raises:
        UnsupportedLossError: none agrees, or the loss of an example depends on the other examples
            of its batch; names both numbers, the likely reason and a remedy.
    """
    with evaluating(trainer):
        batches = [
            *_batches_to_compare(trainer, train_rows),
            *_batches_to_compare(trainer, target_rows),
        ]
        if not all(gather(bool(batches))):  # the plan says which rows have no labels
            return TrainerLoss()
        if not np.isfinite(gather([compared.own for compared in batches])).all():
            return TrainerLoss()  # the gradient pass names the row
        candidates = [
            ExampleLoss(shift=shift, per_token=per_token)
            for per_token in (True, False)
            for shift in _shifts(trainer, batches[0])
        ]
        found = _closest(trainer, batches, candidates)
        if found is not None:
            _refuse_dependent_examples(trainer, batches, found.of_example)
            return found
        return _settle_other_loss(trainer, batches, candidates)


def _settle_other_loss(
    trainer: Trainer, batches: Sequence[_ComparedBatch], candidates: Sequence[ExampleLoss]
) -> TrainerLoss:
    """The rest of :func:`settle_loss`, where no negative log-likelihood is the trainer's loss."""
    own_B = np.array([compared.own for compared in batches])
    losses_CB = np.array(
        [[_batch_mean(trainer, compared, loss) for compared in batches] for loss in candidates]
    )
    difference_CB = np.abs(losses_CB - own_B) / np.abs(own_B)
    difference_C = np.max(gather(difference_CB.max(1)), axis=0)
    best = int(difference_C.argmin())
    closest, worst = candidates[best], int(difference_CB[best].argmax())
    numbers = (
        f"the trainer's evaluation loss of some rows is {own_B[worst]:.4f}, the mean negative "
        f"log-likelihood of their labels {losses_CB[best, worst]:.4f} ({likely_reason(trainer)})"
    )
    world_size = trainer.args.world_size
    doubled_C = np.max(np.abs(losses_CB * world_size / own_B - 1), axis=1)
    if world_size > 1 and max(gather(float(doubled_C.min()))) <= tolerance(trainer):
        raise UnsupportedLossError(
            f"the trainer's loss and its gradient are {world_size} times those of one process: it "
            "multiplies by the number of processes, for models that divide by the label tokens of "
            f"all of them, which {type(base_model(trainer.model)).__name__} does not. Set "
            "average_tokens_across_devices=False in the training arguments."
        )
    # TRL's compute_loss waits for all processes at every call.
    waits = any(
        c.__module__.startswith("trl.") and "compute_loss" in vars(c) for c in type(trainer).__mro__
    )
    splits = trainer.args.world_size == 1 or not waits
    if splits:
        own_loss = _own_loss_function(trainer)
        alone = [
            ExampleLoss(
                shift=closest.shift,
                per_token=per_token,
                of_batch=own_loss,
                of_batch_name=likely_reason(trainer),
            )
            for per_token in (True, False)
        ]
        found = _closest(trainer, batches, alone)
        if found is not None and min(gather(float(own_B.min()))) < 0:
            raise UnsupportedLossError(
                f"the trainer's evaluation loss of some rows is {own_B.min():.4f}, below 0 "
                f"({likely_reason(trainer)}). The estimates take losses for positive. Add a "
                "constant that keeps it above 0."
            )
        if found is not None:
            logger.warning(
                "%s. The estimates are about the trainer's loss; to split it by example, each "
                "example runs alone, which takes longer.",
                numbers,
            )
            return found
    if difference_C[best] <= _SMALL_DIFFERENCE:
        note = f"{numbers}; the difference does not split by example and is not estimated."
        logger.warning("%s", note)
        return TrainerLoss(of_example=closest, notes=(note,))
    if not splits:
        raise UnsupportedLossError(
            f"{numbers}. Such a loss can be split by example only in a run of one process, since "
            f"{type(trainer).__name__}.compute_loss waits for all processes. Use the model's own "
            "loss, or one process."
        )
    raise UnsupportedLossError(
        f"{numbers}, and the trainer's is no mean over label tokens or examples either, so the "
        "estimates would be about another loss than the run. Use the model's own loss (without "
        "compute_loss_func or a compute_loss of your own), or one that is such a mean."
    )


@contextlib.contextmanager
def evaluating(trainer: Trainer) -> Iterator[None]:
    """Evaluate as the trainer does, of which its run notices nothing."""
    with (
        access.undisturbed(trainer),
        evaluation_mode(trainer.model),
        torch.no_grad(),
        trainer.compute_loss_context_manager(),
    ):
        yield


def _batches_to_compare(trainer: Trainer, rows: ModelRows) -> list[_ComparedBatch]:
    """A batch of some rows that have labels, and the first of them alone.

    Rows are read once: a transform may make others each time.
    """
    collate = data.collate_function(trainer)
    dataset_rows = np.unique(rows.packed_rows)
    candidates = dataset_rows[
        np.unique(np.linspace(0, len(dataset_rows) - 1, _NUM_CANDIDATES).astype(int))
    ]
    # Of all parts of the data set, so that several tasks take part.
    candidates = candidates[np.argsort(np.arange(len(candidates)) % _NUM_ROWS, kind="stable")]
    examples_of: dict[int, list[Any]] = {}
    counts: dict[int, int] = {}
    for row in candidates.tolist():
        examples = [rows[int(i)] for i in np.flatnonzero(rows.packed_rows == row)]
        count = int((collate(_copies(examples))["labels"] != IGNORE_INDEX).sum())
        if count:
            examples_of[row], counts[row] = examples, count
        # Different numbers of label tokens tell a mean over them from a mean over examples.
        if len(counts) >= _NUM_ROWS and len(set(counts.values())) > 1:
            break
    if not counts:
        return []
    # The first row, then those whose number of label tokens differs from its, then the others.
    first, *others = counts
    chosen = [first, *sorted(others, key=lambda row: counts[row] == counts[first])][:_NUM_ROWS]
    _refuse_random_batches(collate, [e for row in chosen for e in examples_of[row]])
    if trainer.args.process_index % 2:
        # Another number of label tokens in every other process tells how they are averaged.
        chosen = chosen[:1] * len(chosen)
    batches = []
    for some in (chosen, chosen[:1]):
        examples = [example for row in some for example in examples_of[row]]
        as_read = [rows.dataset[row] for row in some] if rows.is_packed else _copies(examples)
        batches.append(
            _ComparedBatch(
                batch=collate(_copies(examples)),
                alone=[collate(_copies([example])) for example in examples],
                own=_own_loss(trainer, as_read),
            )
        )
    return batches


def _copies(examples: Sequence[Any]) -> list[Any]:
    """Collators may change the rows that they are given."""
    return [copy.copy(example) for example in examples]


def _refuse_random_batches(collate: Callable[[list[Any]], Batch], examples: Sequence[Any]) -> None:
    """Raise if a collator makes other batches of the same rows each time."""
    one, other = (collate(_copies(examples)) for _ in range(2))
    if all(torch.equal(one[k], other[k]) for k in one if isinstance(one[k], Tensor)):
        return
    raise UnsupportedLossError(
        "the data_collator makes other inputs or labels of the same rows each time (mlm=True?), "
        "so that an example has no one loss. Mask the rows once, with dataset.map, and use a "
        "data_collator that only pads."
    )


def _own_loss(trainer: Trainer, rows: list[Any]) -> float:
    """The trainer's evaluation loss of a batch of rows of a dataset, by its own collator."""
    batch = data.own_collate_function(trainer)(rows)
    loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    if loss is None:
        raise UnsupportedLossError(
            f"{type(trainer).__name__} computes no loss in evaluation: it looks for the labels "
            f"{trainer.label_names}, but its data_collator returns {sorted(batch)}. Let the "
            "collator return labels, or set label_names in the training arguments."
        )
    return float(loss.mean())


def _own_loss_function(trainer: Trainer) -> Callable[[Batch], Tensor]:
    """``Trainer.compute_loss`` of a batch, differentiable; it keeps no trainer alive."""
    reference = weakref.ref(trainer)

    def of_batch(batch: Batch) -> Tensor:
        trainer = access.met(reference)
        with access.preserved_counters(trainer):
            return trainer.compute_loss(trainer.model, dict(batch))

    return of_batch


def example_losses(
    trainer: Trainer, batch: Batch, loss: ExampleLoss
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a batch's examples, and what they weigh in its mean; float64 [B] each."""
    output = forward_label_logits(trainer.model, batch, loss)
    losses = SCALARS["loss"](output).double().cpu().numpy()
    return losses, loss.count(output.num_label_tokens).double().cpu().numpy()


def _sums(trainer: Trainer, compared: _ComparedBatch, loss: ExampleLoss) -> tuple[float, float]:
    """The weighted sum of the losses of a batch's examples, and the sum of the weights."""
    batches = [compared.batch] if loss.of_batch is None else compared.alone
    parts = [example_losses(trainer, batch, loss) for batch in batches]
    losses, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    return float(losses @ weights), float(weights.sum())


def _batch_mean(trainer: Trainer, compared: _ComparedBatch, loss: ExampleLoss) -> float:
    total, weight = _sums(trainer, compared, loss)
    return total / max(weight, 1.0)


def _closest(
    trainer: Trainer, batches: Sequence[_ComparedBatch], candidates: Sequence[ExampleLoss]
) -> TrainerLoss | None:
    """The candidate that is closest to the trainer's loss; None if none agrees with it."""
    errors: dict[TrainerLoss, float] = {}
    own = np.array([compared.own for compared in batches])
    for loss in candidates:
        sums = np.array([_sums(trainer, compared, loss) for compared in batches])
        by_process = gather((sums, own))
        # [P, B]: the trainer's losses, and sums and weights of those of the examples.
        own_PB = np.array([own for _, own in by_process])
        sum_PB, weight_PB = np.moveaxis(np.array([sums for sums, _ in by_process]), 2, 0)
        for pools in (False, True) if len(own_PB) > 1 else (False,):
            divisor_PB = weight_PB.mean(0) if pools else weight_PB
            mean_PB = sum_PB / np.maximum(divisor_PB, 1)
            error_PB = np.abs(mean_PB - own_PB) / (1 + np.abs(own_PB))
            errors[TrainerLoss(of_example=loss, pools_processes=pools)] = float(error_PB.max())
    least = min(errors.values())
    if not least <= tolerance(trainer):
        return None
    # Several agree where all rows have as many label tokens; the first is the likeliest.
    return next(loss for loss, error in errors.items() if error <= least + _TIE)


def _refuse_dependent_examples(
    trainer: Trainer, batches: Sequence[_ComparedBatch], loss: ExampleLoss
) -> None:
    """Raise if an example's loss is another one in a batch than alone."""
    worst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    for compared in batches:
        together, _ = example_losses(trainer, compared.batch, loss)
        for one, batch in zip(together, compared.alone, strict=True):
            alone = float(example_losses(trainer, batch, loss)[0][0])
            error = abs(one - alone) / (1 + abs(alone))
            worst = max(worst, (error, float(one), alone))
    by_process = gather((worst, any(_pads_left(compared.batch) for compared in batches)))
    error, one, alone = max(worst for worst, _ in by_process)
    if error <= tolerance(trainer):
        return
    numbers = f"the loss of an example is {one:.4f} in a batch and {alone:.4f} alone"
    if any(pads_left for _, pads_left in by_process):
        raise UnsupportedLossError(
            f"{numbers}: its batch is padded on the left, and this model's positions count the "
            "padding. Set padding_side='right' in the tokenizer (processing_class), or let the "
            "data_collator return position_ids."
        )
    raise UnsupportedLossError(
        f"{numbers}: examples of a batch influence each other (padding that is attended to, batch "
        "statistics, a limited capacity of experts), so a task has no gradient of its own. Return "
        "an attention_mask from the data_collator, or replace the layer that mixes examples."
    )


def _pads_left(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def _shifts(trainer: Trainer, compared: _ComparedBatch) -> tuple[bool, ...]:
    """Whether labels may be those of the next position, of the own, or both; the likelier first."""
    one_label = compared.batch["labels"].ndim == 1
    return (True,) if one_label or is_encoder_decoder(trainer.model) else (True, False)


def tolerance(trainer: Trainer) -> float:
    """Largest difference between two computations of a loss that rounding explains."""
    args = trainer.args
    full = (torch.float32, torch.float64)
    is_half = any(p.dtype not in full for p in trainer.model.parameters() if p.is_floating_point())
    return _HALF_TOLERANCE if is_half or args.bf16 or args.fp16 else _TOLERANCE


def likely_reason(trainer: Trainer) -> str:
    """Why the trainer's loss may be no negative log-likelihood of labels."""
    owner = next(c for c in type(trainer).__mro__ if "compute_loss" in vars(c))
    base = base_model(trainer.model)
    adapter = getattr(trainer.model, "active_peft_config", None)
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    if owner.__module__.partition(".")[0] not in ("transformers", "trl"):
        return f"{owner.__name__}.compute_loss"
    if trainer.args.label_smoothing_factor:
        return f"label_smoothing_factor={trainer.args.label_smoothing_factor}"
    if str(getattr(adapter, "peft_type", "")).upper().endswith("ADALORA"):
        return "AdaLoRA's regularizer"
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        return "the router's auxiliary loss, output_router_logits=True"
    if getattr(trainer.data_collator, "padding_free", False):
        return "padding_free=True without flash attention, so that documents see each other?"
    return f"a loss function, or a term beside it, of {type(base).__name__}"
