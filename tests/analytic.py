"""Problems of choosing whose losses are formulas, with exact gradients; and slow searches of them.

Shapes: K tasks, M mixtures.
"""

import itertools

import numpy as np

from hf_auxselect import Estimate, SelectionProblem
from hf_auxselect.estimators import normalize_mixtures


def problem_of(loss, gradient=None, *, sizes, keep=(), names=None, calls=None):
    """A problem whose estimates are ``loss`` of shares [M, K]; ``calls`` collects what is asked."""

    def estimate(weights):
        shares = normalize_mixtures(weights, sizes)
        if calls is not None:
            calls.extend(tuple(np.flatnonzero(row)) for row in shares)
        losses = loss(shares)
        return Estimate(loss=losses, low=losses - 0.1, high=losses + 0.1, weights=shares)

    def along_the_simplex(weights):
        slopes = gradient(normalize_mixtures(weights, sizes))
        return slopes - slopes.mean(1, keepdims=True)

    return SelectionProblem(
        estimate,
        [f"t{k}" for k in range(len(sizes))] if names is None else names,
        sizes,
        gradient=None if gradient is None else along_the_simplex,
        keep=keep,
    )


def convex(seed, num_tasks):
    """A convex quadratic loss of the shares, and its gradient."""
    rng = np.random.default_rng(seed)
    moves = rng.normal(size=(8, num_tasks))
    goal = moves @ rng.dirichlet(np.full(num_tasks, 0.2)) + 0.3 * rng.normal(size=8)
    slopes = 0.5 * rng.normal(size=num_tasks)
    return (
        lambda w: 3 + w @ slopes + ((w @ moves.T - goal) ** 2).sum(1) / 16,
        lambda w: slopes + (w @ moves.T - goal) @ moves / 8,
    )


def rugged(seed, num_tasks):
    """An unrelated loss for every subset, with a gradient that says nothing of it."""
    table = np.random.default_rng(seed).random(2**num_tasks)
    powers = 2 ** np.arange(num_tasks)
    return (
        lambda w: table[(w > 0) @ powers],
        lambda w: np.random.default_rng(seed).normal(size=w.shape),
    )


def sizes_of(seed, num_tasks):
    """Numbers of rows, all different."""
    return (10 + np.random.default_rng(seed).permutation(10 * num_tasks)[:num_tasks]).tolist()


def loss_of(problem, tasks):
    """The estimate of one subset, alone."""
    names = problem.task_names
    return float(problem.estimate(np.array([[name in tasks for name in names]])).loss[0])


def forward(problem, *, max_tasks=None, min_improvement=0.0):
    """The tasks of forward selection, one estimate at a time."""
    chosen = [name for name in problem.task_names if name in problem.keep]
    best = loss_of(problem, chosen) if chosen else np.inf
    while len(chosen) < (max_tasks or len(problem.task_names)):
        tries = [
            (loss_of(problem, [*chosen, name]), i)
            for i, name in enumerate(problem.task_names)
            if name not in chosen
        ]
        if not tries or not min(tries)[0] < best - (min_improvement if chosen else 0):
            break
        best, i = min(tries)
        chosen.append(problem.task_names[i])
    return sorted(chosen, key=list(problem.task_names).index)


def backward(problem, *, min_tasks=1, min_improvement=0.0):
    """The tasks of backward elimination, one estimate at a time."""
    chosen = list(problem.task_names)
    best = loss_of(problem, chosen)
    while len(chosen) > min_tasks:
        tries = [
            (loss_of(problem, [other for other in chosen if other != name]), i)
            for i, name in enumerate(chosen)
            if name not in problem.keep
        ]
        if not tries or not min(tries)[0] < best - min_improvement:
            break
        best, i = min(tries)
        del chosen[i]
    return chosen


def exhaustive(problem):
    """The lowest estimate of all subsets with the kept tasks."""
    names = problem.task_names
    return min(
        loss_of(problem, subset)
        for size in range(1, len(names) + 1)
        for subset in itertools.combinations(names, size)
        if set(problem.keep) <= set(subset)
    )
