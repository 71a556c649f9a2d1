"""The loss that a trainer logs for an evaluation set: which loss, and how it weighs examples.

The estimates are about that number. So before the first step the losses of some examples, as this
package computes them, are compared with the trainer's own.

Shapes: B examples of a batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import Subset
from transformers import Seq2SeqTrainer, Trainer

from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import (
    IGNORE_INDEX,
    NEXT_TOKEN_LOSS,
    SCALARS,
    Batch,
    ExampleLoss,
    UnsupportedLossError,
    base_model,
    count_label_tokens,
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
class _Probe:
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
    with _evaluating(trainer):
        probes = [*_probes(trainer, train_rows), *_probes(trainer, target_rows)]
        if not all(gather(bool(probes))):  # the plan says which rows have no labels
            return TrainerLoss()
        if not np.isfinite(gather([probe.own for probe in probes])).all():
            return TrainerLoss()  # the gradient pass names the row
        candidates = [
            ExampleLoss(shift=shift, per_token=per_token)
            for per_token in (True, False)
            for shift in _shifts(trainer, probes[0])
        ]
        found = _closest(trainer, probes, candidates)
        if found is not None:
            _refuse_dependent_examples(trainer, probes, found.of_example)
            return found
        return _settle_other_loss(trainer, probes, candidates)


def _settle_other_loss(
    trainer: Trainer, probes: Sequence[_Probe], candidates: Sequence[ExampleLoss]
) -> TrainerLoss:
    """The rest of :func:`settle_loss`, where no negative log-likelihood is the trainer's loss."""
    own_B = np.array([probe.own for probe in probes])
    losses_CB = np.array(
        [[_batch_mean(trainer, probe, loss) for probe in probes] for loss in candidates]
    )
    difference_CB = np.abs(losses_CB - own_B) / np.abs(own_B)
    difference_C = np.max(gather(difference_CB.max(1)), axis=0)
    best = int(difference_C.argmin())
    closest, worst = candidates[best], int(difference_CB[best].argmax())
    numbers = (
        f"the trainer's evaluation loss of some rows is {own_B[worst]:.4f}, the mean negative "
        f"log-likelihood of their labels {losses_CB[best, worst]:.4f} ({_likely_reason(trainer)})"
    )
    # TRL's compute_loss waits for all processes at every call.
    waits = any(
        c.__module__.startswith("trl.") and "compute_loss" in vars(c) for c in type(trainer).__mro__
    )
    splits = trainer.args.world_size == 1 or not waits
    if splits:
        own_loss = _own_loss_function(trainer)
        alone = [
            ExampleLoss(shift=closest.shift, per_token=per_token, of_batch=own_loss)
            for per_token in (True, False)
        ]
        found = _closest(trainer, probes, alone)
        if found is not None and min(gather(float(own_B.min()))) < 0:
            raise UnsupportedLossError(
                f"the trainer's evaluation loss of some rows is {own_B.min():.4f}, below 0 "
                f"({_likely_reason(trainer)}). The estimates take losses for positive. Add a "
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


def evaluation_weights(
    trainer: Trainer,
    target: Any,
    rows: ModelRows,
    example_ids: Sequence[int],
    loss: TrainerLoss,
) -> list[float]:
    """Weight of each example in the loss that the trainer logs for an evaluation set.

    The trainer takes the loss of each process's batch, repeats it as often as a full batch has
    rows, cuts the repetitions of the last step off after the rows that are left (Seq2SeqTrainer
    does not), and averages. Rows that fill up the last batches of several processes count again.
    The weights of all examples sum to 1.

    Args:
        trainer: the trainer.
        target: a dataset, a key of its ``eval_dataset`` dict, or None for its ``eval_dataset``.
        rows: of that evaluation set.
        example_ids: the examples that are asked for.
        loss: from :func:`settle_loss`.
    """
    collate = data.collate_function(trainer)
    examples_of_row: dict[int, list[int]] = {}
    for example, row in enumerate(rows.packed_rows.tolist()):
        examples_of_row.setdefault(row, []).append(example)
    tokens: dict[int, float] = {}

    def count(examples: Iterable[int]) -> float:
        unknown = [example for example in examples if example not in tokens]
        for start in range(0, len(unknown), 64):
            some = unknown[start : start + 64]
            batch = collate([rows[i] for i in some])
            counts = count_label_tokens(trainer.model, batch, loss.of_example)
            tokens.update(zip(some, loss.of_example.count(counts).tolist(), strict=True))
        return sum(tokens[example] for example in examples)

    weights = dict.fromkeys(example_ids, 0.0)
    for batches, shares in _evaluation_steps(trainer, target):
        step = [[e for row in batch for e in examples_of_row[row]] for batch in batches]
        if weights.keys().isdisjoint(itertools.chain(*step)):
            continue
        sums = [count(examples) for examples in step]
        if loss.pools_processes:
            sums = [sum(sums) / len(sums)] * len(sums)
        for examples, share, total in zip(step, shares, sums, strict=True):
            for example, times in Counter(examples).items():
                if example in weights:
                    weights[example] += share * times * tokens[example] / max(total, 1.0)
    return [weights[example] for example in example_ids]


def has_label_tokens(
    trainer: Trainer, rows: ModelRows, example_ids: Sequence[int], loss: TrainerLoss
) -> bool:
    """Whether any of these examples carries loss; reads no more of them than it takes to tell."""
    collate = data.collate_function(trainer)
    chunks = (example_ids[i : i + 8] for i in range(0, len(example_ids), 8))
    return any(
        count_label_tokens(trainer.model, collate([rows[i] for i in chunk]), loss.of_example).any()
        for chunk in chunks
    )


def evaluation_loss(trainer: Trainer, target: Any) -> float:
    """The loss that ``trainer.evaluate`` would log; nothing is logged, and nothing generated.

    Call it inside of ``access.undisturbed``, since it sets ``gather_function``.

    Args:
        trainer: the trainer.
        target: a dataset, a key of its ``eval_dataset`` dict, or None for its ``eval_dataset``.
    """
    if isinstance(trainer, Seq2SeqTrainer):  # as its evaluate() does
        trainer.gather_function = trainer.accelerator.gather
    output = trainer.evaluation_loop(
        trainer.get_eval_dataloader(target), "evaluation", prediction_loss_only=True
    )
    return float(output.metrics["eval_loss"])


def compare_evaluation(trainer: Trainer, dataset: Any, loss: TrainerLoss) -> list[str]:
    """Evaluate some rows with the trainer, and compare with the weighted losses of the examples.

    Args:
        trainer: during its training; all processes must call this.
        dataset: the evaluation set whose loss is estimated.
        loss: from :func:`settle_loss`.

    Returns:
        A sentence for the report, with both numbers, if they differ; else nothing.
    """
    # A full batch for each process, and one that is not full.
    size = min(len(dataset), trainer.args.eval_batch_size * trainer.args.world_size + 1)
    has_select = hasattr(dataset, "select")
    some = dataset.select(range(size)) if has_select else Subset(dataset, range(size))
    rows = ModelRows(trainer, some)
    collate = data.collate_function(trainer)
    with _evaluating(trainer):
        own = evaluation_loss(trainer, some)
        weights = evaluation_weights(trainer, some, rows, range(len(rows)), loss)
        at_once = trainer.args.eval_batch_size if loss.of_example.of_batch is None else 1
        losses = [
            _losses(trainer, collate([rows[i] for i in chunk]), loss.of_example)[0]
            for chunk in np.split(np.arange(len(rows)), range(at_once, len(rows), at_once))
        ]
    # Batches without a label token have no loss, and the trainer leaves them out.
    ours = float(np.concatenate(losses) @ weights) / max(sum(weights), 1e-12)
    if loss.notes or np.isclose(ours, own, rtol=_tolerance(trainer), atol=_tolerance(trainer)):
        return []
    note = (
        f"the trainer's evaluation of {size} rows of the target gives {own:.4f}, the weighted mean "
        f"of the losses of their examples {ours:.4f} ({_likely_reason(trainer)}?). The estimates "
        "differ from the logged loss by about as much."
    )
    logger.warning("%s", note)
    return [note]


@contextlib.contextmanager
def _evaluating(trainer: Trainer) -> Iterator[None]:
    """Evaluate as the trainer does, of which its run notices nothing."""
    with (
        access.undisturbed(trainer),
        evaluation_mode(trainer.model),
        torch.no_grad(),
        trainer.compute_loss_context_manager(),
    ):
        yield


def _evaluation_steps(trainer: Trainer, target: Any) -> list[tuple[list[list[int]], list[float]]]:
    """Of each evaluation step, the rows of each process's batch and the weight of its loss."""
    with access.undisturbed(trainer):
        loader = trainer.get_eval_dataloader(target)
    world_size = trainer.args.world_size
    sampler = loader.batch_sampler
    rows_per_step = sampler.batch_size
    if world_size == 1:
        by_process = [list(sampler)]
    else:
        sharded = sampler if isinstance(sampler, BatchSamplerShard) else BatchSamplerShard(sampler)
        rows_per_step *= 1 if sharded.split_batches else world_size
        batches = _Batches(sharded.batch_sampler)
        by_process = []
        for rank in range(world_size):
            shard = copy.copy(sharded)
            shard.batch_sampler = batches
            shard.num_processes, shard.process_index = world_size, rank
            by_process.append(list(shard))
    steps = [list(step) for step in itertools.zip_longest(*by_process, fillvalue=[])]
    size = trainer.args.eval_batch_size
    entries = np.full((len(steps), world_size), float(size))
    remainder = 0 if sampler.drop_last else len(loader.dataset) % rows_per_step
    if remainder and not isinstance(trainer, Seq2SeqTrainer):
        entries[-1] = np.clip(remainder - size * np.arange(world_size), 0, size)
    shares = entries / entries.sum()
    return list(zip(steps, shares.tolist(), strict=True))


class _Batches(list[list[int]]):
    """The batches of a sampler, drawn once, for several shards."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler)
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last


def _probes(trainer: Trainer, rows: ModelRows) -> list[_Probe]:
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
    probes = []
    for some in (chosen, chosen[:1]):
        examples = [example for row in some for example in examples_of[row]]
        as_read = [rows.dataset[row] for row in some] if rows.is_packed else _copies(examples)
        probes.append(
            _Probe(
                batch=collate(_copies(examples)),
                alone=[collate(_copies([example])) for example in examples],
                own=_own_loss(trainer, as_read),
            )
        )
    return probes


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


def _losses(trainer: Trainer, batch: Batch, loss: ExampleLoss) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a batch's examples, and what they weigh in its mean; float64 [B] each."""
    output = forward_label_logits(trainer.model, batch, loss)
    losses = SCALARS["loss"](output).double().cpu().numpy()
    return losses, loss.count(output.num_label_tokens).double().cpu().numpy()


def _sums(trainer: Trainer, probe: _Probe, loss: ExampleLoss) -> tuple[float, float]:
    """The weighted sum of the losses of a probe's examples, and the sum of the weights."""
    batches = [probe.batch] if loss.of_batch is None else probe.alone
    parts = [_losses(trainer, batch, loss) for batch in batches]
    losses, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    return float(losses @ weights), float(weights.sum())


def _batch_mean(trainer: Trainer, probe: _Probe, loss: ExampleLoss) -> float:
    total, weight = _sums(trainer, probe, loss)
    return total / max(weight, 1.0)


def _closest(
    trainer: Trainer, probes: Sequence[_Probe], candidates: Sequence[ExampleLoss]
) -> TrainerLoss | None:
    """The candidate that is closest to the trainer's loss; None if none agrees with it."""
    errors: dict[TrainerLoss, float] = {}
    own = np.array([probe.own for probe in probes])
    for loss in candidates:
        sums = np.array([_sums(trainer, probe, loss) for probe in probes])
        by_process = gather((sums, own))
        # [P, probes]: the trainer's losses, and sums and weights of those of the examples.
        own_PB = np.array([own for _, own in by_process])
        sum_PB, weight_PB = np.moveaxis(np.array([sums for sums, _ in by_process]), 2, 0)
        for pools in (False, True) if len(own_PB) > 1 else (False,):
            divisor_PB = weight_PB.mean(0) if pools else weight_PB
            mean_PB = sum_PB / np.maximum(divisor_PB, 1)
            error_PB = np.abs(mean_PB - own_PB) / (1 + np.abs(own_PB))
            errors[TrainerLoss(of_example=loss, pools_processes=pools)] = float(error_PB.max())
    least = min(errors.values())
    if not least <= _tolerance(trainer):
        return None
    # Several agree where all rows have as many label tokens; the first is the likeliest.
    return next(loss for loss, error in errors.items() if error <= least + _TIE)


def _refuse_dependent_examples(
    trainer: Trainer, probes: Sequence[_Probe], loss: ExampleLoss
) -> None:
    """Raise if an example's loss is another one in a batch than alone."""
    worst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    for probe in probes:
        together, _ = _losses(trainer, probe.batch, loss)
        for one, batch in zip(together, probe.alone, strict=True):
            alone = float(_losses(trainer, batch, loss)[0][0])
            error = abs(one - alone) / (1 + abs(alone))
            worst = max(worst, (error, float(one), alone))
    by_process = gather((worst, any(_pads_left(probe.batch) for probe in probes)))
    error, one, alone = max(worst for worst, _ in by_process)
    if error <= _tolerance(trainer):
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


def _shifts(trainer: Trainer, probe: _Probe) -> tuple[bool, ...]:
    """Which ways of matching logits with labels there are; the likelier first."""
    one_label = probe.batch["labels"].ndim == 1
    return (True,) if one_label or is_encoder_decoder(trainer.model) else (True, False)


def _tolerance(trainer: Trainer) -> float:
    args = trainer.args
    full = (torch.float32, torch.float64)
    is_half = any(p.dtype not in full for p in trainer.model.parameters() if p.is_floating_point())
    return _HALF_TOLERANCE if is_half or args.bf16 or args.fp16 else _TOLERANCE


def _likely_reason(trainer: Trainer) -> str:
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
