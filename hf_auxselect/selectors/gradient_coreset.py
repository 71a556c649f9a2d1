"""A gradient coreset: few weighted tasks whose gradient stands for that of all tasks.

Shapes: K tasks, J medoids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hf_auxselect.checks import is_count, require_count
from hf_auxselect.seeds import random_permutation
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Array,
    Selection,
    SelectionProblem,
    require_room,
)
from hf_auxselect.selectors.subset_search import SubsetSearch

_ROUNDING = 1e-12
"""Squared distances below this share of the squared norms, and gains that differ by less, are
rounding: some thousand products of float64 (2e-16) are summed. Derived."""
_BLOCK = 64
"""Candidates whose gains are computed at once; a convention."""


@dataclass(frozen=True, kw_only=True)
class GradientCoreset(AbstractSelector):
    """Keeps few tasks, weighted so that their gradient is close to that of all tasks.

    Choose it where tasks repeat each other, or where single tasks are wrong in ways of their own,
    and no target says what is wanted: the estimates play no part in the choice (the chosen
    mixture's is reported). With the target at hand, a search is the better choice. Tasks that are
    wrong in the same way (answers that are shuffled, say) have similar gradients, and gain weight.

    Each task is mapped to the nearest chosen task, its medoid, and a medoid weighs as much as the
    rows of the tasks that are mapped to it. Medoids are chosen greedily to minimise the sum over
    all rows of the distance between the mean gradient of the row's task and that of its medoid.
    This sum bounds the difference between the two gradients. The decrease of the sum, counted from
    the largest distance between two tasks, is at least 1 - 1/e of the largest possible one.

    The scores are the distances of tasks to their medoids, as shares of the largest distance
    between two tasks. ``diagnostics["coreset_gradient_error"]`` is the length of the difference
    between the mixture's mean gradient and that of all rows, as a share of the latter's length.

    Cost: estimates of the chosen mixture alone; K x K distances in memory, of which each medoid
    reads as many columns as can still be the best.

    Args:
        size: largest number of tasks, or their share in (0, 1). Fewer are selected where they
            already have the gradients of all tasks.
        min_members: medoids of fewer tasks, themselves included, are dropped with these tasks: 2
            leaves out tasks that are near no other one. Where none has as many, all stay. Tasks of
            ``keep`` always stay.
        num_candidates: number of tasks that are tried for a medoid, drawn by ``seed``; None: all.
            With K / size ln(1 / e) of them, the expected decrease is at least 1 - 1/e - e of the
            largest possible one.
        seed: determines what is drawn.

    Source: Mirzasoleiman et al., "Coresets for Data-efficient Training of Machine Learning Models"
    (ICML 2020), section 3; of tasks, Zhan and Anderson, "Data-Efficient and Robust Task Selection
    for Meta-Learning" (CVPR Workshops 2024). Random candidates: Mirzasoleiman et al., "Lazier Than
    Lazy Greedy" (AAAI 2015).
    """

    size: int | float
    min_members: int = 1
    num_candidates: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        is_share = isinstance(self.size, float) and 0 < self.size < 1
        if not is_share and not is_count(self.size, 1):
            raise ValueError(
                f"size must be a number of tasks or a share in (0, 1), got {self.size!r}."
            )
        require_count("min_members", self.min_members, 1)
        require_count("num_candidates", self.num_candidates, 1, optional=True)

    def select(self, problem: SelectionProblem) -> Selection:
        num_tasks = len(problem.task_names)
        size = self.size if isinstance(self.size, int) else max(1, round(self.size * num_tasks))
        if size > num_tasks:
            raise ValueError(f"size is {size}, but there are {num_tasks} tasks.")
        require_room("size", size, problem)
        gram_KK = _gram_of(problem)
        distances_KK = _distances(gram_KK)
        rows_K = np.asarray(problem.task_sizes, np.float64)
        medoids_J = self._medoids(distances_KK, rows_K, problem.kept, size)
        medoid_K = _nearest(distances_KK, medoids_J)
        is_member = np.isin(medoid_K, self._large_enough(medoid_K, problem.kept))
        weights_K = np.bincount(medoid_K, rows_K * is_member, num_tasks) / rows_K[is_member].sum()
        scores_K = distances_KK[np.arange(num_tasks), medoid_K] / (distances_KK.max() or 1.0)
        search = SubsetSearch(problem)
        search.try_masks(weights_K[None])
        search.accept(weights_K)
        scores = dict(zip(problem.task_names, scores_K.tolist(), strict=True))
        return replace(
            search.selection(weights_K, scores),
            diagnostics=_gradient_error(gram_KK, weights_K, rows_K / rows_K.sum()),
        )

    def _medoids(self, distances_KK: Array, rows_K: Array, kept_K: Array, size: int) -> Array:
        """The chosen tasks, ascending: int64 [J]; greedy, each gain bounded by its former value."""
        medoids = np.flatnonzero(kept_K).tolist()
        farthest = distances_KK.max()
        nearest_K = distances_KK[:, medoids].min(1, initial=farthest)
        bounds_K = np.full(len(rows_K), np.inf)
        while len(medoids) < size:
            # Others are chosen, or have the gradient of one that is, and would gain nothing.
            candidates = np.flatnonzero(nearest_K > 0)
            if not len(candidates):
                break
            if self.num_candidates is not None:
                order = random_permutation(len(candidates), self.seed, "coreset", len(medoids))
                candidates = np.sort(candidates[order[: self.num_candidates]])
            best = 0.0
            order = candidates[np.argsort(-bounds_K[candidates], kind="stable")]
            for start in range(0, len(order), _BLOCK):
                block = order[start : start + _BLOCK]
                if bounds_K[block[0]] < best * (1 - _ROUNDING):
                    break
                gains_KB = np.maximum(nearest_K[:, None] - distances_KK[:, block], 0)
                bounds_K[block] = rows_K @ gains_KB
                best = max(best, bounds_K[block].max())
            is_best = bounds_K[candidates] >= best * (1 - _ROUNDING)
            medoids.append(int(candidates[np.argmax(is_best)]))
            nearest_K = np.minimum(nearest_K, distances_KK[:, medoids[-1]])
        return np.sort(medoids or [0])

    def _large_enough(self, medoid_K: Array, kept_K: Array) -> Array:
        """The medoids that stay: int64 [.]."""
        medoids_J, members_J = np.unique(medoid_K, return_counts=True)
        stays_J = (members_J >= self.min_members) | kept_K[medoids_J]
        return medoids_J[stays_J] if stays_J.any() else medoids_J


def _gram_of(problem: SelectionProblem) -> Array:
    """Inner products of the tasks' mean gradients, float64 [K, K]."""
    num_tasks = len(problem.task_names)
    if problem.gram is None:
        raise ValueError(
            "GradientCoreset needs the tasks' gradients, and this problem has none (gram is None). "
            "Give it the gradients of a run, selection_problem(fitted, store), or use a selector "
            "that works with estimates alone, such as ForwardSelection()."
        )
    gram_KK = np.asarray(problem.gram, np.float64)
    if gram_KK.shape != (num_tasks, num_tasks) or not np.isfinite(gram_KK).all():
        raise ValueError(
            f"gram must have shape [{num_tasks}, {num_tasks}] and finite numbers, got "
            f"{list(gram_KK.shape)}."
        )
    return gram_KK


def _distances(gram_KK: Array) -> Array:
    """Distances between the tasks' mean gradients [K, K]."""
    squares_KK = np.add.outer(np.diagonal(gram_KK), np.diagonal(gram_KK))
    distances_KK = squares_KK - gram_KK - gram_KK.T
    return np.sqrt(np.where(distances_KK > _ROUNDING * squares_KK, distances_KK, 0.0))


def _nearest(distances_KK: Array, medoids_J: Array) -> Array:
    """The medoid of each task, itself if it is one: int64 [K]."""
    medoid_K = medoids_J[np.argmin(distances_KK[:, medoids_J], axis=1)]
    medoid_K[medoids_J] = medoids_J
    return medoid_K


def _gradient_error(gram_KK: Array, weights_K: Array, shares_K: Array) -> dict[str, float]:
    """How far a mixture's mean gradient is from that of all rows; empty if the latter is 0."""
    square = shares_K @ gram_KK @ shares_K
    if not square > 0:
        return {}
    difference_K = weights_K - shares_K
    error = np.sqrt(max(difference_K @ gram_KK @ difference_K, 0.0) / square)
    return {"coreset_gradient_error": float(error)}
