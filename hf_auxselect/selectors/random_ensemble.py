"""Random ensembles: score each task by the mean estimate over random subsets.

Shapes: K tasks, M subsets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hf_auxselect.checks import is_count, is_number, require_count
from hf_auxselect.estimators.base import NORMAL_95
from hf_auxselect.estimators.diagnostics import rank_correlation
from hf_auxselect.seeds import random_permutation
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Array,
    Selection,
    SelectionProblem,
    require_room,
)
from hf_auxselect.selectors.subset_search import SubsetSearch

# With num_subsets=None.
_FIRST_SUBSETS = 100
"""Subsets before the ranking is looked at for the first time; the number doubles. A convention."""
_MOST_SUBSETS = 6400
"""Subsets after which scores are taken as they are. A convention: seconds for 38 tasks."""
_STABLE = 0.95
"""Rank correlation at which scores are stable. A convention."""

_ROUNDING = 1e-9
"""By how much rounding may move a score of 1 nat, or of a nat of a larger score."""

_FOLDS = 5
"""Parts of the subsets in a cross-validation. A convention."""


@dataclass(frozen=True, kw_only=True)
class RandomEnsemble(AbstractSelector):
    """Scores each task by the mean estimate over random subsets that contain it.

    Choose it for scores of single tasks that average over the other tasks of a mixture; a search is
    better at finding the lowest loss. The score of task i is

        T_i = (1 / m_i) sum of estimate(S_k) over the m_i subsets S_k that contain task i,

    nats per label token; lower is better. Tasks are taken in the order of their scores: those up to
    ``threshold``, or the best ``top_k``, or else as many as give the lowest estimate. The interval
    of a score (``Selection.score_intervals``, 90%) is about which subsets were drawn, not about the
    errors of the estimates.

    Args:
        num_subsets: m, number of random subsets. None: 100, doubled until the ranking is stable, at
            most 6,400. It is stable when the scores of all subsets would have a rank correlation of
            0.95 with those of as many others: 2 r / (1 + r), with r that of the two halves.
        subset_size: tasks per subset: a number, or a fraction of K in (0, 1).
        threshold: take the tasks with a score of at most this, at least one. Or
            ``"cross-validation"``: take the number of tasks with the lowest mean estimate over five
            orders of the tasks, each from four fifths of the subsets. It is for few subsets, whose
            order is partly chance.
        top_k: take this many tasks.
        seed: determines the subsets. They are random but balanced: tasks are in nearly equally
            many of them, and so are pairs of tasks, so that the score of a task hardly
            depends on the tasks that it happens to be drawn with.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024),
    section 3, step 3; the score is that of Li et al., "Identification of Negative Transfers in
    Multitask Learning Using Surrogate Models" (TMLR 2023).
    """

    num_subsets: int | None = 1000
    subset_size: int | float = 0.5
    threshold: float | Literal["cross-validation"] | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_count("num_subsets", self.num_subsets, 1, optional=True)
        is_share = isinstance(self.subset_size, float) and 0 < self.subset_size < 1
        if not is_share and not is_count(self.subset_size, 1):
            raise ValueError(
                "subset_size must be a number of tasks or a share in (0, 1), got "
                f"{self.subset_size!r}."
            )
        if self.threshold is not None and self.top_k is not None:
            raise ValueError("threshold and top_k exclude each other; give one of them.")
        is_limit = self.threshold is None or is_number(self.threshold, finite=False)
        if not is_limit and self.threshold != "cross-validation":
            raise ValueError(
                f'threshold must be a number, "cross-validation" or None, got {self.threshold!r}.'
            )
        is_too_few = self.num_subsets is not None and self.num_subsets < _FOLDS
        if self.threshold == "cross-validation" and is_too_few:
            raise ValueError(
                f"num_subsets must be at least {_FOLDS} for a cross-validation, got "
                f"{self.num_subsets}."
            )
        require_count("top_k", self.top_k, 1, optional=True)

    def select(self, problem: SelectionProblem) -> Selection:
        if self.top_k is not None:
            require_room("top_k", self.top_k, problem)
        search = SubsetSearch(problem)
        subsets, losses = self._estimated_subsets(search, len(problem.task_names))
        scores = _scores(subsets, losses)
        prefixes = _prefixes(scores, search.kept)
        smallest = max(1, int(search.kept.sum()))
        if self.threshold == "cross-validation":
            size = smallest + self._best_prefix(search, subsets, losses, smallest)
        elif self.threshold is not None:
            size = max(smallest, int(((scores <= self.threshold) | search.kept).sum()))
        elif self.top_k is not None:
            size = min(self.top_k, len(scores))
        else:
            size = smallest + int(np.argmin(search.try_masks(prefixes[smallest - 1 :])))
        search.accept(prefixes[size - 1])
        named = zip(problem.task_names, scores, _half_widths(subsets, losses), strict=True)
        found = [(name, float(score), float(half)) for name, score, half in named]
        return replace(
            search.selection(
                prefixes[size - 1],
                {name: score for name, score, _ in found if np.isfinite(score)},
            ),
            score_intervals={
                name: (score - half, score + half)
                for name, score, half in found
                if np.isfinite(score) and np.isfinite(half)
            },
        )

    def subsets(self, num_tasks: int) -> Array:
        """The random subsets of K tasks: bool [m, K]; with ``num_subsets=None`` all 6,400."""
        drawn = _BalancedSubsets(num_tasks, self._size(num_tasks), self.seed)
        return drawn.first(_MOST_SUBSETS if self.num_subsets is None else self.num_subsets)

    def _size(self, num_tasks: int) -> int:
        size = self.subset_size
        count = size if isinstance(size, int) else max(1, round(size * num_tasks))
        if count > num_tasks:
            raise ValueError(f"subset_size is {count}, but there are {num_tasks} tasks.")
        return count

    def _estimated_subsets(self, search: SubsetSearch, num_tasks: int) -> tuple[Array, Array]:
        """The subsets [M, K] and their losses [M]."""
        if self.num_subsets is not None:
            subsets = self.subsets(num_tasks)
            return subsets, search.try_masks(subsets)
        drawn = _BalancedSubsets(num_tasks, self._size(num_tasks), self.seed)
        subsets = drawn.first(_FIRST_SUBSETS)
        losses = search.try_masks(subsets)
        while len(subsets) < _MOST_SUBSETS and not _is_stable(subsets, losses):
            more = drawn.first(2 * len(subsets))
            losses = np.append(losses, search.try_masks(more[len(subsets) :]))
            subsets = more
        return subsets, losses

    def _best_prefix(
        self, search: SubsetSearch, subsets: Array, losses: Array, smallest: int
    ) -> int:
        """By how many tasks the best prefix in a cross-validation is larger than the smallest."""
        # Consecutive subsets complement each other, so that a fold has those that follow.
        folds = np.arange(len(subsets)) * _FOLDS // len(subsets)
        means = np.zeros(subsets.shape[1] - smallest + 1)
        for fold in range(_FOLDS):
            rest = folds != fold
            order = _prefixes(_scores(subsets[rest], losses[rest]), search.kept)
            means += search.try_masks(order[smallest - 1 :]) / _FOLDS
        return int(np.argmin(means))


class _BalancedSubsets:
    """Random subsets of one size, in which tasks and pairs of tasks are nearly equally often.

    Args:
        num_tasks: K.
        size: tasks per subset.
        seed: determines what is random.
    """

    def __init__(self, num_tasks: int, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._masks = np.zeros((0, num_tasks), bool)
        self._pairs = np.zeros((num_tasks, num_tasks), np.int64)  # subsets that hold both tasks

    def first(self, count: int) -> Array:
        """The first subsets of an endless row of them: bool [count, K]."""
        start, num_tasks = self._masks.shape
        more = np.zeros((max(0, count - start), num_tasks), bool)
        for number, mask in enumerate(more, start):
            order = random_permutation(num_tasks, self._seed, "subset", number)
            # Tasks in fewest subsets come first; among them, those met least by the others.
            rank = self._pairs.diagonal()[order] * (number * num_tasks + 1)
            for _ in range(self._size):
                first = int(np.argmin(rank))
                mask[order[first]] = True
                rank += self._pairs[order[first]][order]
                rank[first] = np.iinfo(np.int64).max // 2
            self._pairs += np.outer(mask, mask)
        self._masks = np.concatenate([self._masks, more])
        return self._masks[:count]


def _scores(subsets_MK: Array, losses_M: Array) -> Array:
    """Mean loss of the subsets with each task [K]; infinity for a task that is in none."""
    members_K = subsets_MK.sum(0)
    return np.divide(
        losses_M @ subsets_MK, members_K, out=np.full(len(members_K), np.inf), where=members_K > 0
    )


def _prefixes(scores_K: Array, kept_K: Array) -> Array:
    """The subsets of the 1, 2, ..., K best tasks; kept ones come first [K, K]."""
    order_K = np.argsort(np.where(kept_K, -np.inf, scores_K), kind="stable")
    ranks_K = np.argsort(order_K, kind="stable")
    return ranks_K[None] < np.arange(1, len(order_K) + 1)[:, None]


def _is_stable(subsets_MK: Array, losses_M: Array) -> bool:
    """Whether other subsets would rank the tasks the same."""
    half = len(losses_M) // 2
    one, other = (
        _scores(subsets_MK[part], losses_M[part])
        for part in np.split(np.arange(len(losses_M)), [half])
    )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return False
    scores = np.append(one, other)
    if np.ptp(scores) <= _ROUNDING * max(1.0, float(np.abs(scores).max())):
        return True  # nothing to rank
    correlation = rank_correlation(one, other)
    return correlation > 0 and 2 * correlation / (1 + correlation) >= _STABLE


def _half_widths(subsets_MK: Array, losses_M: Array) -> Array:
    """Half the width of each score's 90% interval [K]; infinity where it is not known.

    Subsets are balanced, so that what single tasks add to the loss nearly cancels in a score. The
    error is that of the rest: of what an additive model of the loss leaves, over the subsets with
    the task. To it comes what the additive part, which is known, misses by for want of balance.
    Standard errors of plain means would be several times too wide.
    """
    num_subsets, num_tasks = subsets_MK.shape
    members_K = subsets_MK.sum(0)
    design = np.column_stack([np.ones(num_subsets), subsets_MK])
    effects, _, rank, _ = np.linalg.lstsq(design, losses_M, rcond=None)
    if num_subsets <= rank:  # no residuals: as if subsets were drawn independently
        square_K = np.where(subsets_MK, (losses_M[:, None] - _scores(subsets_MK, losses_M)) ** 2, 0)
        variance_K = square_K.sum(0) / np.maximum(members_K - 1, 1)
        imbalance_K = np.zeros(num_tasks)
    else:
        fitted_M = design @ effects
        variance_K = np.full(num_tasks, ((losses_M - fitted_M) ** 2).sum() / (num_subsets - rank))
        own_K, size = effects[1:], int(subsets_MK[0].sum())
        others_K = (size - 1) / max(num_tasks - 1, 1) * (own_K.sum() - own_K)
        imbalance_K = _scores(subsets_MK, fitted_M) - (effects[0] + own_K + others_K)
    error_K = NORMAL_95 * np.sqrt(variance_K / np.maximum(members_K, 1))
    return np.where(members_K > 1, np.hypot(error_K, imbalance_K), np.inf)


def random_alternatives(
    weights_K: Array, sizes_K: Array, number: int, seed: int
) -> tuple[Array, bool]:
    """Mixtures that differ from a chosen one by which tasks they prefer, at random.

    Args:
        weights_K: the chosen mixture; sums to 1.
        sizes_K: rows of each task.
        number: of mixtures.
        seed: determines them.

    Returns:
        Of a subset whose tasks are weighted by their sizes: random subsets of as many tasks, bool
        [number, K], and True. Of other weights: the same weights in a random order, [number, K],
        and False.
    """
    subset_K = weights_K > 0
    if np.allclose(weights_K, subset_K * sizes_K / (subset_K * sizes_K).sum(), atol=1e-6):
        ensemble = RandomEnsemble(num_subsets=number, subset_size=int(subset_K.sum()), seed=seed)
        return ensemble.subsets(len(weights_K)), True
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(weights_K) for _ in range(number)]), False
