"""Batches of examples: what they are made of, how large they are, and what fits into memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from hf_auxselect.capture.memory import is_out_of_memory

logger = logging.getLogger(__name__)

_MOST_EXAMPLES = 4
"""Batches of short examples hold at most this multiple of ``batch_size``. A convention: it bounds
the memory of per-example gradients, which grow with the number of examples."""

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """The examples of one task that the pass reads."""

    name: str
    rows: Sequence[Any]
    """All rows of a dataset; ``example_ids`` picks some."""
    example_ids: Sequence[int]
    """Ascending row numbers."""
    num_rows: int
    """Rows that the task has for training."""
    example_weights: Sequence[float] | None = None
    """Weight of each example in the task's loss; None: in proportion to its label tokens."""


def row_length(row: Any) -> int:
    """Number of tokens of a tokenized example; 0 if it is not known."""
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0


def num_tokens(rows: Sequence[Any]) -> int:
    """Number of tokens of a batch, padding included; that of its rows if lengths are unknown."""
    return len(rows) * max(max(map(row_length, rows)), 1)


@dataclass(frozen=True)
class BatchLimits:
    """How many examples fit into a batch: as many tokens as in one of the longest examples."""

    tokens: int
    """Padding included."""
    examples: int

    @classmethod
    def of(cls, batch_size: int, tasks: Sequence[TaskExamples]) -> BatchLimits:
        """Limits for the examples of some tasks.

        A batch of any length then needs no more memory for activations than ``batch_size`` of the
        longest examples do.
        """
        if batch_size == 1:
            return cls(0, 1)
        longest = max(row_length(task.rows[i]) for task in tasks for i in task.example_ids)
        return cls(batch_size * longest, _MOST_EXAMPLES * batch_size if longest else batch_size)

    def cut(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of the examples of each batch, by ascending length."""
        order = np.argsort(lengths, kind="stable")
        start = 0
        for end in range(1, len(order) + 1):
            size = end + 1 - start
            if (
                end == len(order)
                or size > self.examples
                or size * lengths[order[end]] > self.tokens
            ):
                yield order[start:end]
                start = end


def _counted(examples: int) -> str:
    return "one example" if examples == 1 else f"a batch of {examples} examples"


class FittingBatches:
    """Runs batches, in parts where memory does not suffice for a whole one.

    A batch for which memory does not suffice is halved until it does; later batches of more tokens
    than half of it has are cut beforehand. A warning is logged when the limit is met first.

    Args:
        can_split: False raises in place of halving: where processes run their passes in step, none
            can run more of them.
    """

    def __init__(self, *, can_split: bool = True) -> None:
        self._can_split = can_split
        self.tokens: float = math.inf
        """The largest number of tokens that is tried at once, padding included."""

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
                if len(rows) == 1 or not self._can_split:
                    length = max(row_length(example(row)) for row in rows)
                    advice = (
                        "a lower per_device_train_batch_size, or batch_size of the callback"
                        if len(rows) > 1
                        else "gradient_checkpointing=True"
                    )
                    raise torch.OutOfMemoryError(
                        f"memory does not suffice for {_counted(len(rows))}"
                        + (f" of {length} tokens" if length else "")
                        + f" in the gradient pass. Set {advice}, truncate rows "
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
