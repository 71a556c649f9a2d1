"""How well mixtures are found: gaps to a fine grid, noise, ceilings, prices and time.

Losses are quadratic in the weights, with random coefficients, so that the best mixture is known
from a grid. The last part times the search on random gradients with the default estimator, if that
has gradients, for 38 and for 1,729 tasks.

    python -m benchmarks.accuracy.mixture_search [--problems 100] [--tasks 38,1729]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import RESULTS
from benchmarks.cost.synthetic_store import synthetic_store
from benchmarks.quadratics import Quadratic, grid, weights_of
from hf_auxselect import (
    ConstrainedSelection,
    LinearizedTraining,
    MixtureOptimization,
    WorstGroupSelection,
)
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import AbstractSelector, SelectionProblem, selection_problem
from hf_auxselect.selectors.saddle_point import Losses, not_negative, saddle_point
from hf_auxselect.selectors.simplex import Box

PARTS = {3: 200, 4: 60, 5: 36}
NUM_NOISY = 12
EXAMPLES_PER_TASK = {38: 100, 1729: 20}


def gaps_to_the_grid(number: int, *, convex: bool) -> dict[str, float]:
    """Largest loss above the best of the grid, nats, by the number of tasks."""
    found = {}
    for num_tasks, parts in PARTS.items():
        mixtures, gaps = grid(num_tasks, parts), []
        for seed in range(number):
            quadratic = Quadratic.random(seed, num_tasks, convex=convex)
            chosen = MixtureOptimization(shrinkage=0).select(quadratic.problem())
            loss = quadratic.losses(weights_of(chosen)[None])[0, 0]
            gaps.append(loss - quadratic.losses(mixtures)[:, 0].min())
        found[str(num_tasks)] = round(float(max(0.0, *gaps)), 6)
    return found


def kept_of_noise(number: int) -> dict[str, float]:
    """Share of problems without any difference in which all tasks are kept, by the selector."""
    selectors = {
        "default": MixtureOptimization(),
        "risk_aversion=1.75": MixtureOptimization(risk_aversion=1.75),
        "shrinkage=0": MixtureOptimization(shrinkage=0),
    }
    kept = dict.fromkeys(selectors, 0.0)
    for seed in range(number):
        noise = 0.1 * np.random.default_rng(seed).normal(size=(1, NUM_NOISY))
        quadratic = Quadratic(np.zeros((1, NUM_NOISY, NUM_NOISY)), noise, (20,) * NUM_NOISY)
        quadratic = replace(quadratic, error=np.full(NUM_NOISY, 0.1))
        for name, selector in selectors.items():
            weights = weights_of(selector.select(quadratic.problem()))
            kept[name] += np.allclose(weights, quadratic.shares) / number
    return {name: round(share, 3) for name, share in kept.items()}


def true_losses_under_noise(number: int) -> dict[str, float]:
    """Mean true loss minus that of all tasks, nats, where estimates err as their intervals say."""
    selectors = {
        "default": MixtureOptimization(),
        "risk_aversion=1.75": MixtureOptimization(risk_aversion=1.75),
        "shrinkage=0": MixtureOptimization(shrinkage=0),
        "round_to_subset": MixtureOptimization(round_to_subset=True),
    }
    gains: dict[str, list[float]] = {name: [] for name in selectors}
    for seed in range(number):
        true = Quadratic.random(seed, NUM_NOISY, scale=0.1)
        noise = 0.1 * np.random.default_rng([seed, 1]).normal(size=(1, NUM_NOISY))
        seen = replace(true, c=true.c + noise, error=np.full(NUM_NOISY, 0.1))
        base = true.losses(true.shares[None])[0, 0]
        for name, selector in selectors.items():
            weights = weights_of(selector.select(seen.problem()))
            gains[name].append(true.losses(weights[None])[0, 0] - base)
    means = {f"{name}: mean": np.mean(found) for name, found in gains.items()}
    worse = {f"{name}: worse": np.mean(np.array(found) > 1e-9) for name, found in gains.items()}
    return {name: round(float(value), 4) for name, value in (means | worse).items()}


def constrained(number: int) -> dict[str, float]:
    """Gaps as a share of the grid's range, violations, errors of prices, and saved steps."""
    mixtures = grid(4, 60)
    gaps, violations, prices, steps = [], [], [], []
    for seed in range(number):
        quadratic = Quadratic.random(seed, 4, num_groups=2)
        losses = quadratic.losses(mixtures)
        ceilings = np.quantile(losses[:, 1:], 0.5, axis=0)
        within = (losses[:, 1:] <= ceilings).all(1)
        if not within.any():
            continue

        def choose(ceilings: np.ndarray, tolerance: float, quadratic: Quadratic = quadratic) -> Any:
            named = {f"group {g}": float(ceiling) for g, ceiling in enumerate(ceilings)}
            selector = ConstrainedSelection(ceilings=named, shrinkage=0, tolerance=tolerance)
            return selector.select(quadratic.problem())

        chosen = choose(ceilings, 1e-4)
        loss, *groups = quadratic.losses(weights_of(chosen)[None])[0]
        gaps.append((loss - losses[within, 0].min()) / np.ptp(losses[:, 0]))
        violations.append((groups - ceilings).max())
        exact = [*choose(ceilings, 1e-7).shadow_prices.values()]
        for g, price in enumerate(exact):
            if price > 0.01:
                ends = [
                    choose(ceilings + change * np.eye(2)[g], 1e-7).estimate.loss[0]
                    for change in (-1e-4, 1e-4)
                ]
                prices.append(abs((ends[0] - ends[1]) / 2e-4 / price - 1))
        if max(exact) > 0.01:
            box = Box.of(quadratic.problem(), None)
            problem = Losses(quadratic.problem(), ceilings, (1, 2))
            steps.append(
                [
                    saddle_point(
                        problem, box.shares_K[None], first, box, not_negative, tolerance=1e-4
                    ).steps
                    for first in (np.zeros(2), np.array(exact))
                ]
            )
    cold, warm = np.mean(steps, 0)
    return {
        "problems": len(gaps),
        "largest_gap_of_range": round(float(max(0.0, *gaps)), 6),
        "largest_excess_nats": round(float(max(violations)), 6),
        "prices": len(prices),
        "largest_relative_error_of_a_price": round(float(max(prices)), 6),
        "steps_from_0": round(float(cold), 1),
        "steps_from_earlier_prices": round(float(warm), 1),
    }


def worst_group(number: int) -> float:
    """Largest gap of the worst loss to the grid's best, as a share of the grid's range."""
    mixtures, gaps = grid(4, 60), []
    for seed in range(number):
        quadratic = Quadratic.random(seed, 4, num_groups=2)
        chosen = WorstGroupSelection(shrinkage=0).select(quadratic.problem())
        worst = quadratic.losses(mixtures).max(1)
        found = quadratic.losses(weights_of(chosen)[None])[0].max()
        gaps.append((found - worst.min()) / np.ptp(worst))
    return round(float(max(0.0, *gaps)), 6)


def seconds(num_tasks: int) -> dict[str, float]:
    """Seconds of a search among random gradients, with the default estimator."""
    store = synthetic_store(
        0, num_tasks=num_tasks, num_per_task=EXAMPLES_PER_TASK.get(num_tasks, 20)
    )
    fitted = LinearizedTraining(probes=False).fit(store)
    problem: SelectionProblem = selection_problem(fitted, store, rows_to_read=6400)
    selectors: dict[str, AbstractSelector] = {
        "default": MixtureOptimization(),
        "starts=1": MixtureOptimization(starts=1),
        "max_repetitions=4": MixtureOptimization(max_repetitions=4),
    }
    found = {}
    for name, selector in selectors.items():
        start = time.perf_counter()
        selector.select(problem)
        found[name] = round(time.perf_counter() - start, 2)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--tasks", default="38,1729", help="numbers of tasks to time; '': none")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "problems": options.problems,
        "gap_to_grid_nats": {
            "convex": gaps_to_the_grid(options.problems, convex=True),
            "not convex": gaps_to_the_grid(options.problems, convex=False),
        },
        "all_tasks_kept_of_noise": kept_of_noise(options.problems),
        "true_loss_minus_all_tasks_nats": true_losses_under_noise(options.problems),
        "constrained": constrained(max(1, options.problems // 4)),
        "worst_group_gap_of_range": worst_group(max(1, options.problems // 4)),
        "seconds": {number: seconds(int(number)) for number in options.tasks.split(",") if number},
    }
    content = to_json(result)
    print(content)
    write_atomically(RESULTS / "mixture_search.json", content)


if __name__ == "__main__":
    main()
