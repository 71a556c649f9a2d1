"""Problems of choosing a mixture whose answers are known: quadratic losses, and a fine grid.

Shapes: K tasks, M mixtures, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_auxselect import Estimate, Selection, SelectionProblem
from hf_auxselect.estimators import normalize_mixtures

Array = np.ndarray


@dataclass(frozen=True)
class Quadratic:
    """Losses ``w'Hw / 2 + c'w + constant`` of a target (first) and of groups, of mixtures w.

    Attributes:
        H: [1 + G, K, K].
        c: [1 + G, K].
        sizes: rows of each task.
        constant: of all losses.
        error: standard deviation of what a unit of each task's weight adds to the loss [K].
    """

    H: Array
    c: Array
    sizes: tuple[int, ...]
    constant: float = 1.0
    error: Array | None = None

    @classmethod
    def random(
        cls,
        seed: int,
        num_tasks: int,
        *,
        convex: bool = True,
        num_groups: int = 0,
        scale: float = 1.0,
    ) -> Quadratic:
        """Coefficients from normal distributions."""
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(1 + num_groups, num_tasks, num_tasks))
        transposed = roots.transpose(0, 2, 1)
        H = roots @ transposed / num_tasks if convex else (roots + transposed) / 2
        c = rng.normal(size=(1 + num_groups, num_tasks))
        sizes = tuple(rng.integers(5, 60, num_tasks).tolist())
        return cls(scale * H, scale * c, sizes)

    @property
    def shares(self) -> Array:
        """Of all tasks by their sizes [K]."""
        return np.array(self.sizes) / sum(self.sizes)

    def losses(self, weights_MK: Array) -> Array:
        """Of the target and the groups [M, 1 + G]."""
        quadratic = np.einsum("mi,gij,mj->mg", weights_MK, self.H, weights_MK, optimize=True) / 2
        return quadratic + weights_MK @ self.c.T + self.constant

    def slopes(self, weights_MK: Array) -> Array:
        """Their derivatives along the simplex [M, 1 + G, K]."""
        found = np.einsum("gij,mj->mgi", self.H, weights_MK, optimize=True) + self.c
        return found - found.mean(2, keepdims=True)

    def _width(self, changes_MK: Array) -> Array:
        """Half of a 90% interval of the loss's error for a change of the weights."""
        error = np.zeros(changes_MK.shape[1]) if self.error is None else self.error
        return 1.645 * np.sqrt(((changes_MK * error) ** 2).sum(1))

    def estimate(self, weights: Any) -> Estimate:
        """As an estimator's."""
        w = normalize_mixtures(weights, self.sizes)
        losses, width = self.losses(w), self._width(w)
        return Estimate(
            loss=losses[:, 0],
            low=losses[:, 0] - width,
            high=losses[:, 0] + width,
            weights=w,
            group_losses=losses[:, 1:] if losses.shape[1] > 1 else None,
        )

    def difference(self, weights: Any, reference: Any) -> Estimate:
        """As an estimator's."""
        w = normalize_mixtures(weights, self.sizes)
        other = normalize_mixtures(np.asarray(reference)[None], self.sizes)
        loss = self.losses(w)[:, 0] - self.losses(other)[:, 0]
        width = self._width(w - other)
        return Estimate(loss=loss, low=loss - width, high=loss + width)

    def problem(self, *, gradient: bool = True, **options: Any) -> SelectionProblem:
        """What a selector sees; ``options`` are further fields."""
        num_groups, num_tasks = len(self.c) - 1, self.c.shape[1]
        return SelectionProblem(
            self.estimate,
            [f"task {k}" for k in range(num_tasks)],
            self.sizes,
            difference=self.difference,
            gradient=(lambda w: self.slopes(w)[:, 0]) if gradient else None,
            group_gradients=(lambda w: self.slopes(w)[:, 1:]) if gradient and num_groups else None,
            groups=[f"group {g}" for g in range(num_groups)],
            **options,
        )

    def permuted(self, order: Sequence[int]) -> Quadratic:
        """The same tasks in another order; one may occur twice."""
        chosen = list(order)
        return replace(
            self,
            H=self.H[:, chosen][:, :, chosen],
            c=self.c[:, chosen],
            sizes=tuple(np.array(self.sizes)[chosen].tolist()),
            error=None if self.error is None else self.error[chosen],
        )

    def split(self, task: int, first: int) -> Quadratic:
        """One task in two, of ``first`` rows and of the others; the second comes last."""
        sizes = [*self.sizes, self.sizes[task] - first]
        sizes[task] = first
        copied = self.permuted([*range(len(self.sizes)), task])
        return replace(copied, sizes=tuple(sizes))


def grid(num_tasks: int, parts: int) -> Array:
    """All mixtures whose weights are multiples of ``1 / parts``: [M, K]."""
    cuts = itertools.combinations(range(parts + num_tasks - 1), num_tasks - 1)
    rows = [np.diff([-1, *cut, parts + num_tasks - 1]) - 1 for cut in cuts]
    return np.array(rows) / parts


def weights_of(selection: Selection) -> Array:
    """The weights of a selection [K]."""
    return np.array([*selection.weights.values()])
