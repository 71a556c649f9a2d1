"""Constrained selection: the lowest loss of the target under ceilings on other losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypedDict

import numpy as np

from hf_auxselect.checks import is_number
from hf_auxselect.files import read_json
from hf_auxselect.selectors.base import (
    AbstractSelector,
    Array,
    Selection,
    SelectionProblem,
    normalized_weights,
)
from hf_auxselect.selectors.mixture_optimization import require_mixture_options, without_negligible
from hf_auxselect.selectors.saddle_point import (
    FIRST_PENALTY,
    Losses,
    not_negative,
    on_simplex,
    saddle_point,
)
from hf_auxselect.selectors.shrinkage import (
    KEPT_ALL,
    GainBounds,
    is_shrinkage,
    points_on_segments,
    shrink,
)
from hf_auxselect.selectors.simplex import Box, steps_of

RelativeTo = Literal["before", "all tasks"]

_HALVINGS = 40


class _Decision(TypedDict):
    """What every decision has."""

    weights: dict[str, float]


class _PricesFile(_Decision, total=False):
    """What is read of an earlier decision; other keys are left alone."""

    shadow_prices: dict[str, float]
    """Missing where there are none, as where no mixture kept all ceilings."""


@dataclass(frozen=True, kw_only=True)
class ConstrainedSelection(AbstractSelector):
    """Finds the mixture with the lowest loss of the target that keeps other losses under ceilings.

    Choose it where training for the target must not make something else worse: a language, safety,
    what the model could do before. The other losses are those of the callback's ``groups``. The
    ceilings hold for estimates, which have errors: set them lower by what you cannot risk.

    Solves ``min T(w)`` subject to ``L_g(w) <= ceiling_g`` over mixtures w, by the method of
    multipliers. The shadow price of a ceiling is the decrease of T, in nats, for each nat by which
    it rises; it is 0 where the ceiling does not bind. If no mixture keeps all ceilings, the one is
    chosen whose largest excess is least, and the report says so.

    The optimum is shrunk towards all tasks as in :class:`MixtureOptimization`, but no farther than
    the ceilings allow. Prices are those of the optimum.

    Cost: K estimates, and from each start about 100 gradients.

    Args:
        ceilings: group -> largest loss, nats per label token of the group.
        relative_to: what the ceilings are added to: None: nothing; ``"before"``: the group's loss
            before further training, so that 0 means that it must not get worse; ``"all tasks"``:
            its estimated loss after training on all tasks.
        initial_prices: group -> shadow price to start from, such as ``shadow_prices`` of an earlier
            selection, or the path of its ``selection.json``. Good ones save steps; groups without a
            ceiling are ignored.
        max_repetitions: how often the remaining steps may read a row of a task at most; None: no
            cap.
        shrinkage: share of the way from the optimum to all tasks that is gone back, if the ceilings
            hold there; None: as far as the estimates are noise.
        starts: number of starts: all tasks, then the best single tasks.
        tolerance: nats by which a ceiling may be exceeded, and the least loss missed.

    Source: "A Primal-Dual Subgradient Approach for Fair Meta Learning" (PDFM, arXiv 2009.12675),
    whose first prices are learned, too.
    """

    asks_for_target_only: ClassVar[bool] = False

    ceilings: Mapping[str, float]
    relative_to: RelativeTo | None = None
    initial_prices: Mapping[str, float] | str = field(default_factory=dict)
    max_repetitions: float | None = None
    shrinkage: float | None = None
    starts: int = 8
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.ceilings, Mapping) or not self.ceilings:
            raise ValueError(
                f"ceilings must map groups to their largest losses, got {self.ceilings!r}."
            )
        for name, ceiling in self.ceilings.items():
            if not is_number(ceiling):
                raise ValueError(
                    f"ceilings[{name!r}] must be a number of nats per label token, got {ceiling!r}."
                )
        require_relative_to(self.relative_to)
        require_mixture_options(self.max_repetitions, self.starts, self.tolerance)
        if not is_shrinkage(self.shrinkage):
            raise ValueError(f"shrinkage must be in [0, 1] or None, got {self.shrinkage!r}.")
        prices = self.initial_prices
        if isinstance(prices, str | Path):
            path = Path(prices)
            if not path.is_file():
                raise ValueError(f"initial_prices: there is no file {str(path)!r}.")
            prices = read_json(path, _PricesFile).get("shadow_prices", {})
        if not isinstance(prices, Mapping):
            raise ValueError(
                "initial_prices must map groups to shadow prices, or be the path of a "
                f"selection.json; got {prices!r}."
            )
        for name, price in prices.items():
            if not (is_number(price) and price >= 0):
                raise ValueError(f"initial_prices[{name!r}] must be 0 or more, got {price!r}.")
        object.__setattr__(self, "ceilings", dict(self.ceilings))
        object.__setattr__(self, "initial_prices", dict(prices))

    def starting_from(self, prices: Mapping[str, float]) -> ConstrainedSelection:
        assert isinstance(self.initial_prices, Mapping)
        return replace(self, initial_prices={**self.initial_prices, **prices})

    def select(self, problem: SelectionProblem) -> Selection:
        names = [*self.ceilings]
        columns = columns_of(names, problem, "ceilings")
        box = Box.of(problem, self.max_repetitions)
        given_G = np.array([float(self.ceilings[name]) for name in names])
        losses = Losses(problem, given_G + base_losses(self.relative_to, problem, columns), columns)
        singles_KK = box.singles()
        candidates_MK = np.vstack([box.shares_K[None], singles_KK])
        objective_M, excess_MG = losses.values(candidates_MK)
        violation_M = excess_MG.max(1)
        order = np.argsort(
            objective_M[1:] + FIRST_PENALTY * np.maximum(violation_M[1:], 0), kind="stable"
        )
        starts_MK = candidates_MK[[0, *(1 + order[: self.starts - 1])]]
        closest_K = candidates_MK[int(np.argmin(violation_M))]
        if violation_M.min() > 0:
            closest_K = box.drawable(self._closest(losses, starts_MK, box))
            if (excess_G := losses.values(closest_K[None])[1][0]).max() > self.tolerance:
                return self._infeasible(problem, box, closest_K, excess_G, losses.ceilings_G)
            starts_MK = np.vstack([starts_MK, closest_K])
        assert isinstance(self.initial_prices, Mapping)
        found = saddle_point(
            losses,
            starts_MK,
            np.array([self.initial_prices.get(name, 0.0) for name in names]),
            box,
            not_negative,
            tolerance=self.tolerance,
        )
        ends_MK = np.array([self._within(w_K, closest_K, losses) for w_K in found.weights])
        best = int(np.argmin(losses.values(ends_MK)[0]))
        optimum_K = without_negligible(ends_MK[best], box)
        optimum_K = self._within(optimum_K, ends_MK[best], losses)
        weights_K = box.drawable(self._shrunk(optimum_K, problem, losses, box, singles_KK))
        kept_all = self.shrinkage is None and np.allclose(weights_K, box.shares_K)
        estimate = problem.estimate(weights_K[None])
        return Selection(
            weights=normalized_weights(weights_K[None], estimate, problem),
            estimate=estimate,
            history=(*steps_of(weights_K[None], estimate, problem, accepted=True),),
            shadow_prices=dict(zip(names, found.prices[best].tolist(), strict=True)),
            notes=box.notes or ((KEPT_ALL,) if kept_all else ()),
        )

    def _closest(self, losses: Losses, starts_MK: Array, box: Box) -> Array:
        """The mixture with the least largest excess [K]."""
        only_excess = Losses(losses.problem, losses.ceilings_G, losses.columns, weight=0.0)
        uniform_G = np.full(len(losses.columns), 1 / len(losses.columns))
        found = saddle_point(
            only_excess, starts_MK, uniform_G, box, on_simplex, tolerance=self.tolerance / 4
        )
        return found.weights[int(np.argmin(found.violations))]

    def _within(self, weights_K: Array, inside_K: Array, losses: Losses) -> Array:
        """A mixture, moved towards one that keeps the ceilings as far as it takes to keep them."""
        if self._keeps(weights_K[None], losses)[0]:
            return weights_K
        least, most = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (least + most) / 2
            keeps = self._keeps(shrink(weights_K, inside_K, middle)[None], losses)[0]
            least, most = (least, middle) if keeps else (middle, most)
        return shrink(weights_K, inside_K, most)

    def _keeps(self, weights_MK: Array, losses: Losses) -> Array:
        return losses.values(weights_MK)[1].max(1) <= self.tolerance

    def _shrunk(
        self,
        optimum_K: Array,
        problem: SelectionProblem,
        losses: Losses,
        box: Box,
        singles_KK: Array,
    ) -> Array:
        shares_K = box.shares_K
        if self.shrinkage is not None:
            return self._within(shrink(optimum_K, shares_K, self.shrinkage), optimum_K, losses)
        usable = self._keeps(points_on_segments(optimum_K[None], shares_K), losses)[None]
        keeps_all = self._keeps(shares_K[None], losses)[0]
        if not usable.any():
            return shares_K if keeps_all else optimum_K
        bounds = GainBounds(problem, shares_K)
        weights_K, upper = bounds.best_on_segments(optimum_K[None], usable)
        return shares_K if keeps_all and upper >= 0 else weights_K

    def _infeasible(
        self,
        problem: SelectionProblem,
        box: Box,
        weights_K: Array,
        excess_G: Array,
        ceilings_G: Array,
    ) -> Selection:
        broken = ", ".join(
            f"{name!r} by {excess:.4f} above {ceiling:.4f}"
            for name, excess, ceiling in zip(self.ceilings, excess_G, ceilings_G, strict=True)
            if excess > self.tolerance
        )
        estimate = problem.estimate(weights_K[None])
        return Selection(
            weights=normalized_weights(weights_K[None], estimate, problem),
            estimate=estimate,
            history=(*steps_of(weights_K[None], estimate, problem, accepted=True),),
            notes=(
                *box.notes,
                "No mixture is estimated to keep all ceilings. The one with the least largest "
                f"excess was chosen; it exceeds the ceilings of {broken} nats per label token.",
            ),
        )


def require_relative_to(value: str | None) -> None:
    """Raise ValueError if it is none of the losses that others can be relative to."""
    if value not in (None, "before", "all tasks"):
        raise ValueError(f"relative_to must be 'before', 'all tasks' or None, got {value!r}.")


def columns_of(names: list[str], problem: SelectionProblem, option: str) -> tuple[int, ...]:
    """Where groups are among the losses ``[target, *groups]``.

    Raises:
        ValueError: one is no group of the problem; ``option`` is named in it.
    """
    for name in names:
        if name not in problem.groups:
            raise ValueError(
                f"{option} names the unknown group {name!r}; known are {list(problem.groups)}. "
                "Groups are keys of the eval_dataset dict: pass "
                f"TaskSelectionCallback(groups=[{name!r}, ...])."
            )
    return tuple(1 + list(problem.groups).index(name) for name in names)


def base_losses(
    relative_to: RelativeTo | None, problem: SelectionProblem, columns: tuple[int, ...]
) -> Array:
    """What ceilings are relative to: the losses of these columns, or zeros: [G]."""
    if relative_to is None:
        return np.zeros(len(columns))
    sizes_K = np.asarray(problem.task_sizes, float)
    mixture_K = np.zeros(len(sizes_K)) if relative_to == "before" else sizes_K / sizes_K.sum()
    everything = Losses(problem, np.zeros(len(columns)), columns)
    return everything.all(mixture_K[None])[0][list(columns)]
