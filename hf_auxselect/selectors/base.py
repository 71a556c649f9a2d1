"""Selectors: choose a subset or mixture of tasks, given nothing but a way to estimate its loss.

A selector is a frozen dataclass whose fields are its options. ``select`` sees a callable that maps
weights [M, K] to an estimate of M losses, and the tasks' names; every search is deterministic, and
among equal estimates the first one wins.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from hf_auxselect.seeds import random_permutation

Array = np.ndarray


class LossEstimate(Protocol):
    """What a selector reads of an estimate; :class:`hf_auxselect.Estimate` is one."""

    @property
    def loss(self) -> Array: ...
    @property
    def low(self) -> Array: ...
    @property
    def high(self) -> Array: ...
    @property
    def weights(self) -> Array | None: ...


EstimateFn = Callable[[Array], LossEstimate]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One mixture that a selector tried, with its estimate in nats per label token."""

    tasks: tuple[str, ...]
    loss: float
    low: float
    high: float
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selector chose.

    Attributes:
        weights: task -> share of the training examples; sums to 1, 0 for dropped tasks.
        estimate: the estimate of the chosen mixture (M = 1); None if none was made.
        history: every mixture tried, in order.
        scores: task -> score, where the method has them (their meaning is the selector's).
    """

    weights: dict[str, float]
    estimate: LossEstimate | None = None
    history: tuple[Step, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> list[str]:
        """The tasks with a share, in the order of the training set."""
        return [task for task, weight in self.weights.items() if weight > 0]


class AbstractSelector(ABC):
    """Options of a search."""

    @abstractmethod
    def select(
        self, estimate: EstimateFn, task_names: Sequence[str], *, keep: Sequence[str] = ()
    ) -> Selection:
        """Choose a mixture of the tasks ``task_names`` (K) in which the tasks ``keep`` take part.

        Raises:
            ValueError: an option or ``keep`` does not fit the tasks.
        """


@dataclass(frozen=True, kw_only=True)
class ForwardSelection(AbstractSelector):
    """Adds the task that lowers the estimated loss most, until none lowers it.

    Starts from ``keep``, or else from no task. At each step all remaining tasks are tried and the
    best is taken ("best first"), unlike the single pass in index order of the authors' code. At
    least one task is always selected.

    Cost: at most K (K + 1) / 2 estimates.

    Args:
        max_tasks: largest number of selected tasks; None: no limit.
        min_improvement: nats per label token by which a task must lower the estimate to be added.
    """

    max_tasks: int | None = None
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, got {self.max_tasks}.")

    def select(
        self, estimate: EstimateFn, task_names: Sequence[str], *, keep: Sequence[str] = ()
    ) -> Selection:
        search = _Search(estimate, task_names, keep)
        mask = search.kept.copy()
        best = search.try_masks(mask[None])[0] if mask.any() else np.inf
        limit = len(task_names) if self.max_tasks is None else self.max_tasks
        while mask.sum() < limit and not mask.all():
            candidates = np.flatnonzero(~mask)
            masks = np.repeat(mask[None], len(candidates), 0)
            masks[np.arange(len(candidates)), candidates] = True
            losses = search.try_masks(masks)
            first = int(np.argmin(losses))
            if not losses[first] < best - (self.min_improvement if mask.any() else 0.0):
                break
            mask, best = masks[first], losses[first]
            search.accept(mask)
        return search.selection(mask)


@dataclass(frozen=True, kw_only=True)
class BackwardElimination(AbstractSelector):
    """Starts from all tasks and drops the one whose absence lowers the estimated loss most.

    Stops when no absence lowers it, or one task (or only ``keep``) is left.

    Cost: at most K (K + 1) / 2 estimates.

    Args:
        min_tasks: smallest number of selected tasks.
        min_improvement: nats per label token by which dropping a task must lower the estimate.
    """

    min_tasks: int = 1
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        if self.min_tasks < 1:
            raise ValueError(f"min_tasks must be at least 1, got {self.min_tasks}.")

    def select(
        self, estimate: EstimateFn, task_names: Sequence[str], *, keep: Sequence[str] = ()
    ) -> Selection:
        search = _Search(estimate, task_names, keep)
        mask = np.ones(len(task_names), bool)
        best = search.try_masks(mask[None])[0]
        while mask.sum() > self.min_tasks and (mask & ~search.kept).any():
            candidates = np.flatnonzero(mask & ~search.kept)
            masks = np.repeat(mask[None], len(candidates), 0)
            masks[np.arange(len(candidates)), candidates] = False
            losses = search.try_masks(masks)
            first = int(np.argmin(losses))
            if not losses[first] < best - self.min_improvement:
                break
            mask, best = masks[first], losses[first]
            search.accept(mask)
        return search.selection(mask)


@dataclass(frozen=True, kw_only=True)
class RandomEnsemble(AbstractSelector):
    """Scores each task by the mean estimate over random subsets that hold it.

        T_i = (1 / m_i) sum of estimate(S_k) over the m_i subsets S_k that contain task i,

    nats per label token, lower is better. Tasks are taken in the order of their scores: those below
    ``threshold``, or the best ``top_k``, or, with neither, as many as the estimate is lowest for.

    Args:
        num_subsets: m, number of random subsets.
        subset_size: tasks per subset: a number, or a share of K in (0, 1).
        threshold: take the tasks with a score of at most this, at least one.
        top_k: take this many tasks.
        seed: rules the subsets. They are random but balanced: every task is in as many of them (to
            one), and pairs of tasks are in nearly as many, which keeps the company that a task
            happens to be in out of its score.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024),
    section 3, step 3; the score is that of Li et al., "Identification of Negative Transfers in
    Multitask Learning Using Surrogate Models" (TMLR 2023).
    """

    num_subsets: int = 1000
    subset_size: int | float = 0.5
    threshold: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_subsets < 1:
            raise ValueError(f"num_subsets must be at least 1, got {self.num_subsets}.")
        is_share = isinstance(self.subset_size, float) and 0 < self.subset_size < 1
        if not is_share and not (isinstance(self.subset_size, int) and self.subset_size >= 1):
            raise ValueError(
                "subset_size must be a number of tasks or a share in (0, 1), got "
                f"{self.subset_size}."
            )
        if self.threshold is not None and self.top_k is not None:
            raise ValueError("threshold and top_k exclude each other; give one of them.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")

    def select(
        self, estimate: EstimateFn, task_names: Sequence[str], *, keep: Sequence[str] = ()
    ) -> Selection:
        search = _Search(estimate, task_names, keep)
        subsets = self.subsets(len(task_names))
        losses = search.try_masks(subsets)
        members = subsets.sum(0)
        scores = np.divide(
            losses @ subsets, members, out=np.full(len(task_names), np.inf), where=members > 0
        )
        order = np.argsort(np.where(search.kept, -np.inf, scores), kind="stable")
        ranks = np.argsort(order, kind="stable")
        prefixes = ranks[None] < np.arange(1, len(task_names) + 1)[:, None]
        smallest = max(1, int(search.kept.sum()))
        if self.threshold is not None:
            size = max(smallest, int(((scores <= self.threshold) | search.kept).sum()))
        elif self.top_k is not None:
            size = max(smallest, min(self.top_k, len(task_names)))
        else:
            size = smallest + int(np.argmin(search.try_masks(prefixes[smallest - 1 :])))
        mask = prefixes[size - 1]
        return search.selection(
            mask, {n: float(s) for n, s in zip(task_names, scores, strict=True) if np.isfinite(s)}
        )

    def subsets(self, num_tasks: int) -> Array:
        """The random subsets of K tasks: bool [m, K]."""
        size = self.subset_size
        count = size if isinstance(size, int) else max(1, round(size * num_tasks))
        if count > num_tasks:
            raise ValueError(f"subset_size is {count}, but there are {num_tasks} tasks.")
        masks = np.zeros((self.num_subsets, num_tasks), bool)
        pairs = np.zeros((num_tasks, num_tasks), np.int64)  # subsets that hold both tasks
        for number, mask in enumerate(masks):
            order = random_permutation(num_tasks, self.seed, "subset", number)
            for _ in range(count):
                # Tasks in fewest subsets come first; among them, those met least by the others.
                free = order[~mask[order]]
                met = pairs[free][:, mask].sum(1)
                best = free[np.lexsort((met, pairs[free, free]))[0]]
                mask[best] = True
            pairs += np.outer(mask, mask)
        return masks


@dataclass(frozen=True, kw_only=True)
class ExhaustiveSearch(AbstractSelector):
    """Tries every non-empty subset that holds ``keep`` and takes the best; up to 20 tasks.

    Cost: 2^K - 1 estimates, in chunks of 4,096.
    """

    def select(
        self, estimate: EstimateFn, task_names: Sequence[str], *, keep: Sequence[str] = ()
    ) -> Selection:
        if len(task_names) > 20:
            raise ValueError(
                f"ExhaustiveSearch takes at most 20 tasks, got {len(task_names)}; use "
                "ForwardSelection or RandomEnsemble."
            )
        search = _Search(estimate, task_names, keep)
        free = np.flatnonzero(~search.kept)
        best, best_mask = np.inf, search.kept
        for start in range(0, 2 ** len(free), 4096):
            codes = np.arange(start, min(start + 4096, 2 ** len(free)))
            masks = np.repeat(search.kept[None], len(codes), 0)
            masks[:, free] = (codes[:, None] >> np.arange(len(free))) & 1 == 1
            masks = masks[masks.any(1)]
            losses = search.try_masks(masks, record=False)
            if len(losses) and losses.min() < best:
                best, best_mask = losses.min(), masks[int(np.argmin(losses))]
        search.try_masks(best_mask[None])
        search.accept(best_mask)
        return search.selection(best_mask)


@dataclass(frozen=True)
class FixedSelection(AbstractSelector):
    """A given subset or mixture; chooses nothing itself. For checks and ablations.

    Args:
        tasks: names (a subset: the tasks' rows are pooled), or a mapping from names to weights
            (shares of the examples, up to a common factor).
        estimate: whether the mixture is estimated. False spares a training run the gradient pass.
    """

    tasks: tuple[str, ...] | Mapping[str, float]
    estimate: bool = True

    def __init__(
        self, tasks: Iterable[str] | Mapping[str, float], *, estimate: bool = True
    ) -> None:
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be several names or a mapping, got the string {tasks!r}.")
        given = dict(tasks) if isinstance(tasks, Mapping) else tuple(tasks)
        if not given:
            raise ValueError("tasks is empty; give at least one task.")
        object.__setattr__(self, "tasks", given)
        object.__setattr__(self, "estimate", estimate)

    def select(
        self,
        estimate: EstimateFn,
        task_names: Sequence[str],
        *,
        keep: Sequence[str] = (),
        task_sizes: Sequence[int] | None = None,
    ) -> Selection:
        """As :meth:`AbstractSelector.select`.

        Args beyond those:
            task_sizes: rows of each task [K], in proportion to which the tasks of a subset are
                shared out if nothing is estimated; an estimate knows them itself.
        """
        _positions(self.tasks, task_names, "FixedSelection")
        _positions(keep, task_names, "keep")
        left_out = sorted(set(keep) - set(self.tasks))
        if left_out:
            raise ValueError(f"FixedSelection leaves out {left_out}, which keep asks for.")
        if isinstance(self.tasks, Mapping):
            weights = np.array([[float(self.tasks.get(name, 0.0)) for name in task_names]])
        else:
            weights = np.array([[name in self.tasks for name in task_names]])
        if self.estimate:
            result = estimate(weights)
            return Selection(weights=_shares(weights, result.weights, task_names), estimate=result)
        if not isinstance(self.tasks, Mapping) and weights.sum() > 1:
            if task_sizes is None:
                raise ValueError(
                    "task_sizes is missing: FixedSelection(names, estimate=False) pools the rows "
                    "of its tasks, and must know how many each has. Pass the number of rows of "
                    "each task, or give FixedSelection a mapping from names to weights."
                )
            weights = weights * np.asarray(task_sizes, float)
        return Selection(weights=_shares(weights, None, task_names))


SELECTORS: dict[str, type[AbstractSelector]] = {
    kind.__name__: kind
    for kind in (
        ForwardSelection,
        BackwardElimination,
        RandomEnsemble,
        ExhaustiveSearch,
        FixedSelection,
    )
}
"""Selectors by class name, to read them back from files and command lines."""


class _Search:
    """The bookkeeping that all searches over subsets share."""

    def __init__(
        self, estimate: EstimateFn, task_names: Sequence[str], keep: Sequence[str]
    ) -> None:
        if not task_names:
            raise ValueError("task_names is empty; there is nothing to select from.")
        self._estimate = estimate
        self._names = tuple(task_names)
        self._steps: list[Step] = []
        self.kept = np.zeros(len(task_names), bool)
        self.kept[_positions(keep, task_names, "keep")] = True

    def try_masks(self, masks: Array, *, record: bool = True) -> Array:
        """Estimated losses [M] of subset masks [M, K].

        Raises:
            ValueError: an estimate is NaN.
        """
        result = self._estimate(masks)
        if np.isnan(result.loss).any():
            tasks = self._of(masks[int(np.argmax(np.isnan(result.loss)))])
            raise ValueError(f"the estimate for the tasks {list(tasks)} is NaN.")
        if record:
            self._steps += [
                Step(tasks=self._of(m), loss=float(a), low=float(b), high=float(c), accepted=False)
                for m, a, b, c in zip(masks, result.loss, result.low, result.high, strict=True)
            ]
        return result.loss

    def accept(self, mask: Array) -> None:
        """Mark the last try of this subset as taken."""
        tasks = self._of(mask)
        for i in reversed(range(len(self._steps))):
            if self._steps[i].tasks == tasks:
                self._steps[i] = replace(self._steps[i], accepted=True)
                return

    def selection(self, mask: Array, scores: dict[str, float] | None = None) -> Selection:
        result = self._estimate(mask[None])
        return Selection(
            weights=_shares(mask[None], result.weights, self._names),
            estimate=result,
            history=tuple(self._steps),
            scores=scores or {},
        )

    def _of(self, mask: Array) -> tuple[str, ...]:
        return tuple(name for name, chosen in zip(self._names, mask, strict=True) if chosen)


def _positions(names: Iterable[str], task_names: Sequence[str], argument: str) -> list[int]:
    known = {name: position for position, name in enumerate(task_names)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"{argument} names the unknown task {name!r}; known are {list(known)}."
            )
    return [known[name] for name in names]


def _shares(
    weights: Array, normalized: Array | None, task_names: Sequence[str]
) -> dict[str, float]:
    """Shares of one mixture: as the estimator understood it, or else as given."""
    row = np.asarray(weights[0], float) if normalized is None else normalized[0]
    if not (np.isfinite(row).all() and (row >= 0).all() and row.sum() > 0):
        raise ValueError(f"weights must be finite, not negative and not all 0, got {row.tolist()}.")
    return {name: float(w) for name, w in zip(task_names, row / row.sum(), strict=True)}
