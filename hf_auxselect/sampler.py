"""The order in which a training loop reads a mixture of tasks; any position can be the first.

Shapes: K tasks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from hf_auxselect.seeds import random_permutation
from hf_auxselect.tasks import TaskRows

MIN_SHARE = 1e-6
"""Smallest share of a task in a mixture. A convention: a run of a million rows reads a smaller one
less than once, and the sampler's blocks would hold more rows than that."""


class MixtureSampler(Sampler[int]):
    """Reads the rows of several tasks in given shares, from any position of a fixed order.

    The order is a pure function of (tasks, shares, seed) and position, so that every process of
    a run sees the same one and a resumed run goes on exactly where it was. It comes in blocks
    as long as the mixture has rows; a block holds each task in its share (rounded so that the
    shares are exact over the blocks) and is shuffled. Within a task rows are drawn without
    replacement until all are used, then again in a new order. With shares in proportion to the
    tasks' rows a block is an ordinary shuffled epoch over them.

    Args:
        tasks: the rows' tasks.
        shares: float [K], share of the drawn rows that comes from each task; sums to 1, and 0
            leaves a task out.
        seed: determines the order.
        length: how many row numbers an iteration yields.
        start: position of the first one.

    Raises:
        ValueError: shares that do not sum to 1, or are negative or below 1e-6 without being 0.
    """

    def __init__(
        self, tasks: TaskRows, shares: np.ndarray, seed: int, *, length: int = 0, start: int = 0
    ) -> None:
        shares = np.asarray(shares, np.float64)
        if shares.shape != (len(tasks.names),) or not abs(shares.sum() - 1) < 1e-9:
            raise ValueError(
                f"shares must hold one number per task ({len(tasks.names)}) and sum to 1, got "
                f"{shares}."
            )
        if not ((shares == 0) | (shares >= MIN_SHARE)).all():
            name = tasks.names[int(np.argmax((shares != 0) & ~(shares >= MIN_SHARE)))]
            raise ValueError(
                f"the share of task {name!r} is below {MIN_SHARE:g}; raise it, or leave the task "
                "out (0)."
            )
        self.start = start
        self.length = length
        self._tasks = tasks
        self._shares = shares
        self._seed = seed
        chosen = shares > 0
        # A task's number of draws after whole blocks is then at least one larger per block, so that
        # rounding can never take a draw back.
        self._block_length = max(
            int(tasks.counts[chosen].sum()), int(np.ceil(1 / shares[chosen].min()))
        )

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for rows in self._blocks():
            yield from rows.tolist()

    def reads(self) -> np.ndarray:
        """How often an iteration yields each row of the training set: int64 [N]."""
        reads = np.zeros(len(self._tasks.ids), np.int64)
        for rows in self._blocks():
            np.add.at(reads, rows, 1)
        return reads

    def _blocks(self) -> Iterator[np.ndarray]:
        """The row numbers of an iteration, in pieces that end where a block ends."""
        position, end = self.start, self.start + self.length
        while position < end:
            block, offset = divmod(position, self._block_length)
            rows = self._block(block)[offset : offset + end - position]
            yield rows
            position += len(rows)

    def _draws_before(self, block: int) -> np.ndarray:
        """Draws from each task in the blocks before this one: shares, largest remainders up."""
        exact = self._shares * (self._block_length * block)
        draws = np.floor(exact).astype(np.int64)
        missing = self._block_length * block - int(draws.sum())
        draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
        return draws

    def _block(self, block: int) -> np.ndarray:
        """Row numbers of one block."""
        first, after = self._draws_before(block), self._draws_before(block + 1)
        tasks = np.repeat(np.arange(len(first)), after - first)
        tasks = tasks[random_permutation(len(tasks), self._seed, "block", block)]
        rows = np.empty(len(tasks), np.int64)
        for task in np.flatnonzero(after > first):
            rows[tasks == task] = self._draw(int(task), int(first[task]), int(after[task]))
        return rows

    def _draw(self, task: int, first: int, after: int) -> np.ndarray:
        """The draws first .. after - 1 from a task: row numbers."""
        own = self._tasks.rows[task]
        passes = range(first // len(own), -(-after // len(own)))
        order = np.concatenate(
            [own[random_permutation(len(own), self._seed, "pass", task, p)] for p in passes]
        )
        offset = first - passes.start * len(own)
        return order[offset : offset + after - first]
