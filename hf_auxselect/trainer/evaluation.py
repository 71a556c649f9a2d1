"""The evaluation of a trainer: its logged loss, and how that weighs the examples of the target."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Subset
from transformers import Seq2SeqTrainer, Trainer

from hf_auxselect.capture.scalars import count_label_tokens
from hf_auxselect.trainer import access, data
from hf_auxselect.trainer.data import ModelRows
from hf_auxselect.trainer.loss import (
    TrainerLoss,
    evaluating,
    example_losses,
    likely_reason,
    tolerance,
)

logger = logging.getLogger(__name__)


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

    Call it within ``access.undisturbed``, since it sets ``gather_function``.

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


class Measured(NamedTuple):
    """What an evaluation has measured."""

    loss: float
    """``eval_loss``; may be infinite or NaN."""
    metrics: dict[str, float]
    """Finite numbers that ``compute_metrics`` has returned, by the names it gave them."""


def evaluation_metrics(trainer: Trainer, target: Any) -> Measured:
    """Evaluate as ``trainer.evaluate`` does, metrics included; nothing is logged.

    Every process must call it. The trainer must have ``compute_metrics``.

    Args:
        trainer: the trainer.
        target: a key of its ``eval_dataset`` dict, or None for its ``eval_dataset``.
    """
    returned: dict[str, Any] = {}
    compute = trainer.compute_metrics

    def remember(*args: Any, **kwargs: Any) -> Any:
        # With batch_eval_metrics it is called for each batch; the last call returns the totals.
        metrics = compute(*args, **kwargs)
        returned.clear()
        returned.update(metrics or {})
        return metrics

    trainer.compute_metrics = remember
    try:
        with evaluating(trainer), access.unlogged(trainer):
            loss = float(trainer.evaluate(target)["eval_loss"])
    finally:
        trainer.compute_metrics = compute
    return Measured(loss, _finite_numbers(returned))


def _finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are finite numbers; a metric may also return lists, texts or None."""
    numbers = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):  # of an array with several elements
            if not isinstance(value, str | bytes) and math.isfinite(value):
                numbers[str(name)] = float(value)
    return numbers


def compare_evaluation(
    trainer: Trainer, dataset: Any, loss: TrainerLoss, what: str = "the target"
) -> list[str]:
    """Evaluate some rows with the trainer, and compare with the weighted losses of the examples.

    Args:
        trainer: during its training; all processes must call this.
        dataset: the evaluation set whose loss is estimated.
        loss: from :func:`settle_loss`.
        what: whose examples these are, for the sentence.

    Returns:
        A sentence for the report, with both numbers, if they differ; else nothing.
    """
    # A full batch for each process, and one that is not full.
    size = min(len(dataset), trainer.args.eval_batch_size * trainer.args.world_size + 1)
    has_select = hasattr(dataset, "select")
    some = dataset.select(range(size)) if has_select else Subset(dataset, range(size))
    rows = ModelRows(trainer, some)
    collate = data.collate_function(trainer)
    with evaluating(trainer):
        own = evaluation_loss(trainer, some)
        weights = evaluation_weights(trainer, some, rows, range(len(rows)), loss)
        at_once = trainer.args.eval_batch_size if loss.of_example.of_batch is None else 1
        losses = [
            example_losses(trainer, collate([rows[i] for i in chunk]), loss.of_example)[0]
            for chunk in np.split(np.arange(len(rows)), range(at_once, len(rows), at_once))
        ]
    # Batches without a label token have no loss, and the trainer leaves them out.
    ours = float(np.concatenate(losses) @ weights) / max(sum(weights), 1e-12)
    if loss.notes or np.isclose(ours, own, rtol=tolerance(trainer), atol=tolerance(trainer)):
        return []
    note = (
        f"the trainer's evaluation of {size} rows of {what} gives {own:.4f}, the weighted mean "
        f"of the losses of their examples {ours:.4f} ({likely_reason(trainer)}?). The estimates "
        "differ from the logged loss by about as much."
    )
    logger.warning("%s", note)
    return [note]


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
