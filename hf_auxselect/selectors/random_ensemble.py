"""Random ensembles: score each task by the mean estimate over random subsets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_auxselect.seeds import random_permutation
from hf_auxselect.selectors.base import AbstractSelector, Array, Selection, SelectionProblem
from hf_auxselect.selectors.subset_search import SubsetSearch


@dataclass(frozen=True, kw_only=True)
class RandomEnsemble(AbstractSelector):
    """Scores each task by the mean estimate over random subsets that contain it.

    Choose it for scores of single tasks that average over the other tasks of a mixture; a search is
    better at finding the lowest loss. The score of task i is

        T_i = (1 / m_i) sum of estimate(S_k) over the m_i subsets S_k that contain task i,

    nats per label token; lower is better. Tasks are taken in the order of their scores: those up to
    ``threshold``, or the best ``top_k``, or else as many as give the lowest estimate.

    Args:
        num_subsets: m, number of random subsets.
        subset_size: tasks per subset: a number, or a fraction of K in (0, 1).
        threshold: take the tasks with a score of at most this, at least one.
        top_k: take this many tasks.
        seed: determines the subsets. They are random but balanced: tasks are in nearly equally
            many of them, and so are pairs of tasks, so that the score of a task hardly
            depends on the tasks that it happens to be drawn with.

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

    def select(self, problem: SelectionProblem) -> Selection:
        search = SubsetSearch(problem)
        num_tasks = len(problem.task_names)
        subsets = self.subsets(num_tasks)
        losses = search.try_masks(subsets)
        members = subsets.sum(0)
        scores = np.divide(
            losses @ subsets, members, out=np.full(num_tasks, np.inf), where=members > 0
        )
        order = np.argsort(np.where(search.kept, -np.inf, scores), kind="stable")
        ranks = np.argsort(order, kind="stable")
        prefixes = ranks[None] < np.arange(1, num_tasks + 1)[:, None]
        smallest = max(1, int(search.kept.sum()))
        if self.threshold is not None:
            size = max(smallest, int(((scores <= self.threshold) | search.kept).sum()))
        elif self.top_k is not None:
            size = max(smallest, min(self.top_k, num_tasks))
        else:
            size = smallest + int(np.argmin(search.try_masks(prefixes[smallest - 1 :])))
        named = zip(problem.task_names, scores, strict=True)
        return search.selection(
            prefixes[size - 1], {name: float(score) for name, score in named if np.isfinite(score)}
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
