"""Exhaustive search: estimate every subset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.selectors.base import AbstractSelector, Selection, SelectionProblem
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class ExhaustiveSearch(AbstractSelector):
    """Estimates every non-empty subset that contains ``keep`` and takes the best; up to 20 tasks.

    Choose it with up to 12 tasks. The lowest of so many estimates is likely too low: look at the
    interval of the difference to all tasks.

    Cost: 2^K - 1 estimates, in chunks of 4,096.
    """

    def select(self, problem: SelectionProblem) -> Selection:
        if len(problem.task_names) > 20:
            raise ValueError(
                f"ExhaustiveSearch takes at most 20 tasks, got {len(problem.task_names)}; use "
                "ForwardSelection or RandomEnsemble."
            )
        search = SubsetSearch(problem)
        free = np.flatnonzero(~search.kept)
        best, best_mask = np.inf, search.kept
        for start in range(0, 2 ** len(free), 4096):
            codes = np.arange(start, min(start + 4096, 2 ** len(free)))
            masks = np.repeat(search.kept[None], len(codes), 0)
            masks[:, free] = (codes[:, None] >> np.arange(len(free))) & 1 == 1
            masks = masks[masks.any(1)]
            losses = search.try_masks(masks, record=0)
            if len(losses) and losses.min() < best:
                best, best_mask = losses.min(), masks[int(np.argmin(losses))]
        search.try_masks(best_mask[None])
        search.accept(best_mask)
        return search.selection(best_mask)
