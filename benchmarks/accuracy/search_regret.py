"""How far the answers of searches are from the best of all subsets, and what they ask for.

Each problem has at most 12 tasks. All its subsets are estimated once; the searches then look their
estimates up. The regret of an answer is its estimated loss minus the lowest of all subsets, as a
share of the range of all subsets. It says how well a search does on the estimates, not how well
they agree with ground truth.

- ``random``: quadratic models of training with random gradients and curvatures, 8 and 12 tasks.
- ``demo``: the gradients of ``make demo``, all tasks and random collections of 8 of them.
- ``recorded``: the tiny runs of ``tests/recorded``, with their own estimators.

Lazy searches are compared with full ones over more tasks, of random quadratic models. They rely on
tangents as lower bounds, which a loss has that is convex in the shares; it is counted how often a
subset's estimate is below the tangent at a subset that differs in one task.

    make demo
    python -m benchmarks.accuracy.search_regret [--demo DIR] [--problems 50]

Shapes: K tasks, M mixtures, D dimensions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import RESULTS
from hf_auxselect import (
    BackwardElimination,
    BeamSearch,
    ForwardSelection,
    GradientStore,
    RandomEnsemble,
    SelectionProblem,
    SelectionReport,
)
from hf_auxselect.estimators import Estimate, normalize_mixtures
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import AbstractSelector, selection_problem

RECORDED = Path(__file__).parents[2] / "tests" / "recorded"
SELECTORS: list[AbstractSelector] = [
    ForwardSelection(),
    ForwardSelection(lazy=True),
    BackwardElimination(),
    BackwardElimination(lazy=True),
    BeamSearch(width=1),
    BeamSearch(swaps=False),
    BeamSearch(),
    RandomEnsemble(),
    RandomEnsemble(num_subsets=None),
    RandomEnsemble(num_subsets=100),
    RandomEnsemble(num_subsets=100, threshold="cross-validation"),
]
COLLECTION = 8
MANY_TASKS = (38, 150)
NUM_LAZY = 20
NUM_TANGENTS = 60
"""Random subsets at which tangents are taken."""

Array = np.ndarray
LossFn = Callable[[Array], Array]


def quadratic_training(seed: int, num_tasks: int, dim: int = 24) -> tuple[LossFn, LossFn]:
    """The target's loss after training on mixtures, in a random quadratic model, and its gradient.

    Training on shares w ends at delta = -(H_w + I / 2)^-1 b_w, with b_w and H_w the means of the
    tasks' gradients and curvatures; the target's loss there is quadratic in delta. Tasks pull
    towards the target or away from it, with noise of their own.

    Returns:
        Loss [M] and derivatives with respect to the shares [M, K] for shares [M, K].
    """
    rng = np.random.default_rng(seed)
    target_D = rng.normal(size=dim)
    roots_KQD = rng.normal(size=(num_tasks, 4, dim)) / 2
    H_KDD = roots_KQD.transpose(0, 2, 1) @ roots_KQD + 0.2 * np.eye(dim)
    pull_K = rng.normal(size=num_tasks)
    b_KD = 0.4 * pull_K[:, None] * target_D + 0.8 * rng.normal(size=(num_tasks, dim))
    H_DD = H_KDD[:3].mean(0)

    def solve(shares_MK: Array, vectors_MD: Array) -> Array:
        H_MDD = np.tensordot(shares_MK, H_KDD, 1) + 0.5 * np.eye(dim)
        return np.linalg.solve(H_MDD, vectors_MD[..., None])[..., 0]

    def loss(shares_MK: Array) -> Array:
        delta_MD = -solve(shares_MK, shares_MK @ b_KD)
        return 5 + delta_MD @ target_D + ((delta_MD @ H_DD) * delta_MD).sum(1) / 2

    def gradient(shares_MK: Array) -> Array:
        delta_MD = -solve(shares_MK, shares_MK @ b_KD)
        adjoint_MD = -solve(shares_MK, target_D + delta_MD @ H_DD)
        bent_MK = np.einsum("md,kde,me->mk", adjoint_MD, H_KDD, delta_MD, optimize=True)
        return adjoint_MD @ b_KD.T + bent_MK

    return loss, gradient


def random_problem(seed: int, num_tasks: int) -> SelectionProblem:
    """A problem with the losses of :func:`quadratic_training`, and tasks of different sizes."""
    loss, slope = quadratic_training(seed, num_tasks)
    sizes = np.random.default_rng(seed).integers(20, 200, num_tasks)

    def estimate(weights: Any) -> Estimate:
        shares_MK = normalize_mixtures(weights, sizes)
        losses = loss(shares_MK)
        return Estimate(loss=losses, low=losses, high=losses, weights=shares_MK)

    def gradient(weights: Any) -> Array:
        slope_MK = slope(normalize_mixtures(weights, sizes))
        return slope_MK - slope_MK.mean(1, keepdims=True)

    names = [f"task {k}" for k in range(num_tasks)]
    return SelectionProblem(estimate, names, sizes.tolist(), gradient=gradient)


def collection(problem: SelectionProblem, tasks: Array) -> SelectionProblem:
    """The problem of some of the tasks, as if there were no others."""
    sizes = np.asarray(problem.task_sizes)[tasks]

    def widened(weights: Any) -> Array:
        shares = normalize_mixtures(weights, sizes)
        wide = np.zeros((len(shares), len(problem.task_names)))
        wide[:, tasks] = shares
        return wide

    def gradient(weights: Any) -> Array:
        assert problem.gradient is not None
        slope = problem.gradient(widened(weights))[:, tasks]
        return slope - slope.mean(1, keepdims=True)

    def estimate(weights: Any) -> Any:
        result = problem.estimate(widened(weights))
        return Estimate(loss=result.loss, low=result.low, high=result.high)

    return SelectionProblem(
        estimate,
        [problem.task_names[k] for k in tasks],
        sizes.tolist(),
        gradient=None if problem.gradient is None else gradient,
    )


def stored_problem(directory: Path) -> SelectionProblem:
    """The problem of a stored run, with the estimator that it was made with."""
    fitted = SelectionReport.load(directory).fitted()
    return selection_problem(fitted, GradientStore.load(directory / "gradients"))


def problems(demo: Path, count: int) -> Iterator[tuple[str, SelectionProblem]]:
    """Problems with the name of their set."""
    for num_tasks in (8, 12):
        for seed in range(count):
            yield f"random, {num_tasks} tasks", random_problem(seed, num_tasks)
    whole = stored_problem(demo)
    num_tasks = len(whole.task_names)
    yield f"demo, all {num_tasks} tasks", whole
    rng = np.random.default_rng(0)
    for _ in range(count):
        tasks = np.sort(rng.permutation(num_tasks)[:COLLECTION])
        yield f"demo, {COLLECTION} of its tasks", collection(whole, tasks)
    for directory in sorted(RECORDED.glob("*/gradients")):
        yield "recorded, 4 tasks", stored_problem(directory.parent)


class Counted:
    """A problem, and how many estimates and gradients a search has asked for."""

    def __init__(self, problem: SelectionProblem) -> None:
        self.asked = self.gradients = 0
        self._problem = problem

    def losses(self, masks: Array) -> Array:
        """Estimated losses of subsets [M]."""
        return self._problem.estimate(masks).loss

    def problem(self) -> SelectionProblem:
        """What a search sees."""

        def estimate(masks: Array) -> Estimate:
            self.asked += len(masks)
            losses = self.losses(masks)
            return Estimate(loss=losses, low=losses, high=losses)

        def gradient(weights: Array) -> Array:
            assert self._problem.gradient is not None
            self.gradients += len(weights)
            return self._problem.gradient(weights)

        return SelectionProblem(
            estimate,
            self._problem.task_names,
            self._problem.task_sizes,
            gradient=None if self._problem.gradient is None else gradient,
        )


class Table(Counted):
    """A problem of few tasks with the estimates of all its subsets, which are made once."""

    def __init__(self, problem: SelectionProblem) -> None:
        super().__init__(problem)
        self._powers = 1 << np.arange(len(problem.task_names))
        masks = (np.arange(1, 2 ** len(self._powers))[:, None] & self._powers) > 0
        self._losses = np.append(np.nan, problem.estimate(masks).loss)
        self.lowest, self.highest = np.nanmin(self._losses), np.nanmax(self._losses)

    def losses(self, masks: Array) -> Array:
        return self._losses[masks @ self._powers]


def measure(demo: Path, count: int) -> list[dict[str, Any]]:
    """One line for each set of problems and selector."""
    results: dict[tuple[str, str], list[tuple[float, int, int, bool]]] = {}
    for name, problem in problems(demo, count):
        table = Table(problem)
        for selector in SELECTORS:
            table.asked = table.gradients = 0
            estimate = selector.select(table.problem()).estimate
            assert estimate is not None
            regret = float(estimate.loss[0] - table.lowest) / (table.highest - table.lowest)
            results.setdefault((name, shown(selector)), []).append(
                (regret, table.asked, table.gradients, problem.gradient is not None)
            )
    lines = []
    for (name, search), found in results.items():
        regrets = [regret for regret, *_ in found]
        lines.append(
            {
                "problems": name,
                "number": len(found),
                "selector": search,
                "best_found_share": float(np.mean([regret < 1e-9 for regret in regrets])),
                "mean_regret": float(np.mean(regrets)),
                "largest_regret": float(max(regrets)),
                "mean_estimates": float(np.mean([asked for _, asked, _, _ in found])),
                "mean_gradients": float(np.mean([asked for _, _, asked, _ in found])),
                "with_gradient": all(has for *_, has in found),
            }
        )
    return lines


def compare_lazy(num_tasks: int) -> list[dict[str, Any]]:
    """How often lazy searches find what full ones find, and how many estimates they ask for."""
    lines = []
    for kind in (ForwardSelection, BackwardElimination):
        same, asked = 0, np.zeros(3)
        for seed in range(NUM_LAZY):
            problem = random_problem(seed, num_tasks)
            full, lazy = Counted(problem), Counted(problem)
            one = kind().select(full.problem())
            other = kind(lazy=True).select(lazy.problem())
            same += one.weights == other.weights
            asked += [full.asked, lazy.asked, lazy.gradients]
        full_asked, lazy_asked, gradients = (asked / NUM_LAZY).tolist()
        lines.append(
            {
                "search": kind.__name__,
                "tasks": num_tasks,
                "number": NUM_LAZY,
                "same_share": same / NUM_LAZY,
                "mean_estimates_full": full_asked,
                "mean_estimates_lazy": lazy_asked,
                "mean_gradients": gradients,
            }
        )
    return lines


def below_tangents(problem: SelectionProblem) -> dict[str, float]:
    """How often and how far adding or dropping a task ends below the tangent, in nats."""
    assert problem.gradient is not None
    rng = np.random.default_rng(0)
    sizes, num_tasks = np.asarray(problem.task_sizes), len(problem.task_names)
    below, changes = [], []
    for _ in range(NUM_TANGENTS):
        mask = rng.random(num_tasks) < rng.uniform(0.15, 0.9)
        if not mask.any():
            continue
        changed = mask ^ np.eye(num_tasks, dtype=bool)
        changed = changed[changed.any(1)]
        here, there = (normalize_mixtures(masks, sizes) for masks in (mask[None], changed))
        loss = problem.estimate(mask[None]).loss
        tangents = loss + (there - here) @ problem.gradient(here)[0]
        losses = problem.estimate(changed).loss
        below += (tangents - losses).tolist()
        changes += (losses - loss).tolist()
    return {
        "below_share": float(np.mean(np.array(below) > 1e-9)),
        "largest": float(max(below)),
        "root_mean_square_change": float(np.sqrt(np.mean(np.square(changes)))),
    }


def shown(selector: AbstractSelector) -> str:
    """A selector as it is typed, without the options that have their defaults."""
    options = [
        f"{name}={value!r}"
        for name, value in vars(selector).items()
        if value != getattr(type(selector)(), name)
    ]
    return f"{type(selector).__name__}({', '.join(options)})"


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--demo", type=Path, default=Path("outputs/demo/selected/_task_selection"), metavar="DIR"
    )
    parser.add_argument("--problems", type=int, default=50)
    options = parser.parse_args()
    lines = measure(options.demo, options.problems)
    print(f"{'':78} best found  mean regret  largest  estimates  gradients")
    for line in lines:
        print(
            f"{line['problems']:22} {line['selector']:55} {line['best_found_share']:10.0%}  "
            f"{line['mean_regret']:11.2%}  {line['largest_regret']:7.1%}  "
            f"{line['mean_estimates']:9.0f}  {line['mean_gradients']:9.1f}"
        )
    lazy = [line for num_tasks in MANY_TASKS for line in compare_lazy(num_tasks)]
    for line in lazy:
        print(
            f"{line['tasks']:4} tasks, {line['search']:20} lazy finds the same in "
            f"{line['same_share']:.0%}, of {line['mean_estimates_full']:.0f} estimates asks for "
            f"{line['mean_estimates_lazy']:.0f}, and {line['mean_gradients']:.1f} gradients"
        )
    tangents = {}
    for name, problem in (
        ("random", random_problem(0, 12)),
        ("demo", stored_problem(options.demo)),
    ):
        if problem.gradient is not None:
            tangents[name] = below_tangents(problem)
            print(f"below tangents, {name}: {tangents[name]}")
    record = {
        "command": f"python -m benchmarks.accuracy.search_regret --problems {options.problems}",
        "lines": lines,
        "lazy": lazy,
        "tangents": tangents,
    }
    write_atomically(RESULTS / "search_regret.json", to_json(record))


if __name__ == "__main__":
    main()
