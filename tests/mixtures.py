"""Problems of choosing a mixture whose answers are known: quadratic losses, and a fine grid."""

import itertools
from dataclasses import dataclass, replace

import numpy as np

from hf_auxselect import Estimate, SelectionProblem
from hf_auxselect.estimators import normalize_mixtures


@dataclass(frozen=True)
class Quadratic:
    """Losses w'Hw / 2 + c'w + constant of a target (first) and of groups, of mixtures w."""

    H: np.ndarray  # [1 + G, K, K]
    c: np.ndarray  # [1 + G, K]
    constant: float = 1.0
    sizes: tuple = ()
    error: np.ndarray | None = None  # [K]: standard deviation of each task's contribution

    @classmethod
    def random(cls, seed, num_tasks, *, convex=True, num_groups=0, scale=1.0):
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(1 + num_groups, num_tasks, num_tasks))
        H = roots @ roots.transpose(0, 2, 1) / num_tasks
        if not convex:
            H = (roots + roots.transpose(0, 2, 1)) / 2
        c = rng.normal(size=(1 + num_groups, num_tasks))
        sizes = tuple(rng.integers(5, 60, num_tasks).tolist())
        return cls(scale * H, scale * c, sizes=sizes)

    @property
    def shares(self):
        return np.array(self.sizes) / sum(self.sizes)

    def losses(self, w):
        quadratic = np.einsum("mi,gij,mj->mg", w, self.H, w) / 2
        return quadratic + w @ self.c.T + self.constant

    def slopes(self, w):
        found = np.einsum("gij,mj->mgi", self.H, w) + self.c
        return found - found.mean(2, keepdims=True)

    def width(self, moved):
        """Half of a 90% interval of the error of a change of the weights."""
        error = np.zeros(moved.shape[1]) if self.error is None else self.error
        return 1.645 * np.sqrt((moved * error) ** 2 @ np.ones(moved.shape[1]))

    def estimate(self, weights):
        w = normalize_mixtures(weights, self.sizes)
        losses, width = self.losses(w), self.width(w)
        groups = losses[:, 1:] if losses.shape[1] > 1 else None
        return Estimate(
            loss=losses[:, 0],
            low=losses[:, 0] - width,
            high=losses[:, 0] + width,
            weights=w,
            group_losses=groups,
        )

    def difference(self, weights, reference):
        w, other = (normalize_mixtures(x, self.sizes) for x in (weights, reference[None]))
        loss = self.losses(w)[:, 0] - self.losses(other)[:, 0]
        width = self.width(w - other)
        return Estimate(loss=loss, low=loss - width, high=loss + width)

    def problem(self, *, gradient=True, **options):
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

    def permuted(self, order):
        error = None if self.error is None else self.error[order]
        return replace(
            self,
            H=self.H[:, order][:, :, order],
            c=self.c[:, order],
            sizes=tuple(np.array(self.sizes)[order].tolist()),
            error=error,
        )

    def split(self, task, first):
        """Task ``task`` in two, of ``first`` rows and of the others; the second comes last."""
        copy = [*range(len(self.sizes)), task]
        sizes = [*self.sizes, self.sizes[task] - first]
        sizes[task] = first
        return replace(self.permuted(copy), sizes=tuple(sizes))


def grid(num_tasks, parts):
    """All mixtures whose weights are multiples of 1 / parts."""
    cuts = itertools.combinations(range(parts + num_tasks - 1), num_tasks - 1)
    rows = [np.diff([-1, *cut, parts + num_tasks - 1]) - 1 for cut in cuts]
    return np.array(rows) / parts


def weights_of(selection):
    return np.array([*selection.weights.values()])
