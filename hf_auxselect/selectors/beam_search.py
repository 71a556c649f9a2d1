"""Beam search: several forward selections at once, then single changes of the best subset.

Shapes: K tasks, P pairs of a member and an addition, M subsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import require_count
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Array,
    Selection,
    SelectionProblem,
    require_room,
)
from hf_auxselect.selectors.subset_search import SubsetSearch

_AT_ONCE = 4096
"""Changes of a subset that are tried in one call. A convention that bounds memory."""


@dataclass(frozen=True, kw_only=True)
class BeamSearch(AbstractSelector):
    """Keeps the ``width`` best subsets of each size, then improves the best of all by exchanges.

    Choose it where tasks help together rather than alone, or stand for each other, and a thousand
    estimates are cheap. It starts from ``keep``, or else from no task. A step adds each further
    task to each member of the beam and keeps the best of the results, and that of forward selection
    in any case. It ends when no addition lowers the estimate of any member. Then (``swaps``) one
    task is exchanged for another, added or dropped, whichever lowers the estimate of the best
    subset most, until nothing does. The estimate of the result is never above that of
    ``ForwardSelection`` with the same ``max_tasks``.

    Cost for n selected tasks: up to (width + 1) K (n + 1) estimates, and n (K - n) + K for each
    exchange.

    The history has the best ``width`` subsets of each size, and the exchanges; those that lowered
    the lowest estimate are accepted.

    Args:
        width: number of subsets of the same size that are kept.
        max_tasks: largest number of selected tasks; None: no limit.
        swaps: whether the best subset is improved by exchanges, additions and removals.
    """

    width: int = 8
    max_tasks: int | None = None
    swaps: bool = True

    def __post_init__(self) -> None:
        require_count("width", self.width, 1)
        require_count("max_tasks", self.max_tasks, 1, optional=True)

    def select(self, problem: SelectionProblem) -> Selection:
        limit = len(problem.task_names) if self.max_tasks is None else self.max_tasks
        require_room("max_tasks", limit, problem)
        search = SubsetSearch(problem)
        mask, loss = self._grow(search, limit)
        while self.swaps:
            better, lower = self._best_change(search, mask, limit)
            if not lower < loss:
                break
            search.try_masks(better[None])
            search.accept(better)
            mask, loss = better, lower
        return search.selection(mask)

    def _grow(self, search: SubsetSearch, limit: int) -> tuple[Array, float]:
        """The best subset that a beam of growing subsets meets, and its loss."""
        beam_MK = search.kept[None]
        best = search.kept
        loss = float(search.try_masks(beam_MK)[0]) if best.any() else np.inf
        loss_M = np.array([loss])
        greedy: int | None = 0  # which member forward selection would have reached
        while beam_MK[0].sum() < min(limit, beam_MK.shape[1]):
            member_P, task_P = np.nonzero(~beam_MK)
            grown_PK = beam_MK[member_P]
            grown_PK[np.arange(len(task_P)), task_P] = True
            grown_MK, which_P = _distinct(grown_PK)
            grown_M = search.try_masks(grown_MK, record=self.width)
            if not (grown_M[which_P] < loss_M[member_P]).any():
                break
            kept_M = np.argsort(grown_M, kind="stable")[: self.width]
            if greedy is not None:
                own_P = which_P[member_P == greedy]
                follower = own_P[int(np.argmin(grown_M[own_P]))]
                if not grown_M[follower] < loss_M[greedy]:
                    greedy = None
                else:
                    if follower not in kept_M:
                        kept_M = np.append(kept_M, follower)
                    greedy = int(np.flatnonzero(kept_M == follower)[0])
            beam_MK, loss_M = grown_MK[kept_M], grown_M[kept_M]
            if loss_M[0] < loss:
                best, loss = beam_MK[0], float(loss_M[0])
                search.accept(best)
        return best, loss

    def _best_change(self, search: SubsetSearch, mask: Array, limit: int) -> tuple[Array, float]:
        """The best subset by one removal, addition or exchange, and its loss."""
        best, loss = mask, np.inf
        for masks_MK in _changes(mask, search.kept, limit):
            loss_M = search.try_masks(masks_MK, record=0)
            if loss_M.min() < loss:
                best, loss = masks_MK[int(np.argmin(loss_M))], float(loss_M.min())
        return best, loss


def _changes(mask: Array, kept: Array, limit: int) -> Iterator[Array]:
    """Subsets by one removal, addition or exchange of tasks, some at a time [., K]."""
    droppable, addable = np.flatnonzero(mask & ~kept), np.flatnonzero(~mask)
    drops = np.column_stack([droppable, droppable])[: len(droppable) if mask.sum() > 1 else 0]
    adds = np.column_stack([addable, addable])[: len(addable) if mask.sum() < limit else 0]
    swaps = np.stack(np.meshgrid(droppable, addable, indexing="ij"), axis=-1).reshape(-1, 2)
    flips = np.concatenate([drops, adds, swaps])
    for start in range(0, len(flips), _AT_ONCE):
        flip_M2 = flips[start : start + _AT_ONCE]
        masks_MK = np.repeat(mask[None], len(flip_M2), 0)
        for task_M in flip_M2.T:
            masks_MK[np.arange(len(flip_M2)), task_M] = ~mask[task_M]
        yield masks_MK


def _distinct(masks_PK: Array) -> tuple[Array, Array]:
    """Distinct masks in the order of their first appearance [M, K], and which is which [P]."""
    places: dict[bytes, int] = {}
    which_P = np.array(
        [places.setdefault(row.tobytes(), len(places)) for row in np.packbits(masks_PK, axis=1)]
    )
    _, first_M = np.unique(which_P, return_index=True)
    return masks_PK[first_M], which_P
