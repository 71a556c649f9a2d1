"""Worst-group selection: the mixture whose largest loss among several targets is lowest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_auxselect.selectors.base import (
    AbstractSelector,
    Selection,
    SelectionProblem,
    normalized_weights,
)
from hf_auxselect.selectors.constrained_selection import (
    RelativeTo,
    base_losses,
    columns_of,
    require_relative_to,
)
from hf_auxselect.selectors.mixture_optimization import require_mixture_options, without_negligible
from hf_auxselect.selectors.saddle_point import Losses, on_simplex, saddle_point
from hf_auxselect.selectors.shrinkage import LEAST_SHRINKAGE, is_shrinkage, shrink
from hf_auxselect.selectors.simplex import Box, steps_of


@dataclass(frozen=True, kw_only=True)
class WorstGroupSelection(AbstractSelector):
    """Finds the mixture whose largest loss among the target and the groups is lowest.

    Choose it where several targets count and none may be left behind, such as languages or user
    groups. The groups are those of the callback's ``groups``. Losses of texts that differ in
    difficulty are not comparable; compare their changes with ``relative_to``.

    Solves ``min over w of max over g of L_g(w)`` by the proximal method of multipliers. The shadow
    price of a group is its weight in the worst case: 0 if it is not among the worst. Those of the
    groups and of the target sum to 1.

    Losses of groups have no intervals, so that how far the result is shrunk towards all tasks does
    not depend on noise, as it does in :class:`MixtureOptimization`.

    Cost: K estimates, and from each start about 100 gradients.

    Args:
        relative_to: what is compared: None: the losses; ``"before"``: their changes by further
            training; ``"all tasks"``: their differences from training on all tasks.
        include_target: whether the target is one of those compared.
        max_repetitions: how often the remaining steps may read a row of a task at most; None: no
            cap.
        shrinkage: share of the way from the optimum to all tasks that is gone back.
        starts: number of starts: all tasks, then the best single tasks.
        tolerance: nats by which the least largest loss may be missed.

    Source: the objective is that of Sagawa et al., "Distributionally Robust Neural Networks for
    Group Shifts" (ICLR 2020), section 2, over mixtures instead of parameters.
    """

    asks_for_target_only: ClassVar[bool] = False

    relative_to: RelativeTo | None = None
    include_target: bool = True
    max_repetitions: float | None = None
    shrinkage: float = LEAST_SHRINKAGE
    starts: int = 8
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_relative_to(self.relative_to)
        require_mixture_options(self.max_repetitions, self.starts, self.tolerance)
        if self.shrinkage is None or not is_shrinkage(self.shrinkage):
            raise ValueError(f"shrinkage must be in [0, 1], got {self.shrinkage!r}.")

    def select(self, problem: SelectionProblem) -> Selection:
        groups = list(problem.groups)
        if not groups:
            raise ValueError(
                "WorstGroupSelection needs groups: keys of the eval_dataset dict, as in "
                "TaskSelectionCallback(groups=[...])."
            )
        columns = columns_of(groups, problem, "groups")
        columns = (0, *columns) if self.include_target else columns
        base_C = base_losses(self.relative_to, problem, columns)
        box = Box.of(problem, self.max_repetitions)
        losses = Losses(problem, base_C, columns, weight=0.0)
        singles_KK = box.singles()
        worst_K = losses.values(singles_KK)[1].max(1)
        order = np.argsort(worst_K, kind="stable")[: self.starts - 1]
        found = saddle_point(
            losses,
            np.vstack([box.shares_K[None], singles_KK[order]]),
            np.full(len(columns), 1 / len(columns)),
            box,
            on_simplex,
            tolerance=self.tolerance,
        )
        best = int(np.argmin(found.violations))
        optimum_K = without_negligible(found.weights[best], box)
        weights_K = box.drawable(shrink(optimum_K, box.shares_K, self.shrinkage))
        estimate = problem.estimate(weights_K[None])
        prices_G = found.prices[best][-len(groups) :]
        return Selection(
            weights=normalized_weights(weights_K[None], estimate, problem),
            estimate=estimate,
            history=(*steps_of(weights_K[None], estimate, problem, accepted=True),),
            shadow_prices=dict(zip(groups, prices_G.tolist(), strict=True)),
            notes=box.notes,
        )
