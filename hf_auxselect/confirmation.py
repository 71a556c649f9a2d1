"""The race of ``confirm=n``: which mixtures are trained before the switch, and which one goes on.

Shapes: K tasks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.ground_truth import GroundTruthRuns
from hf_auxselect.options import Confirmation
from hf_auxselect.report.content import Finalist, Race
from hf_auxselect.sampler import MIN_SHARE
from hf_auxselect.selectors import Selection, Step
from hf_auxselect.tasks import TaskRows

MIN_DISTANCE = 0.05
"""Share of the examples in which a runner-up must differ from every other finalist.

A convention: mixtures that are closer to each other differ in loss by too little to be worth a run.
"""

_TO_THE_END = 3
"""At most so many finalists are trained to the end of the race; of more, the worse half is dropped
on the way. A convention."""

_LOOKED_AT = 1000
"""Mixtures of a search, the best estimated ones, among which runner-ups are looked for."""

_NAMED = 6
"""Tasks that a runner-up's name has."""

_ALL_TASKS = "all tasks"
_CHOICE = "selector's choice"


def rungs(finalists: int, first: int, last: int, share: float) -> list[tuple[int, int]]:
    """How many finalists are trained up to which optimizer steps; successive halving.

    The numbers are halved, rounded up, until three or fewer are left; these are trained up to
    ``share`` of the remaining steps, those of the rung before up to half of that, and so on.

    Args:
        finalists: number of mixtures.
        first: step of the switch.
        last: last step of the run.
        share: of the remaining steps, that the race is about.

    Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
    Optimization" (AISTATS 2016), algorithm 1.
    """
    counts = [finalists]
    while counts[-1] > _TO_THE_END:
        counts.append(-(-counts[-1] // 2))
    length = (last - first) * share
    return [
        (count, first + max(1, round(length / 2 ** (len(counts) - 1 - rung))))
        for rung, count in enumerate(counts)
    ]


def training_steps(confirmation: Confirmation | None, first: int, last: int) -> int:
    """Largest number of training steps of a race; the arguments are those of :func:`rungs`."""
    if confirmation is None:
        return 0
    total, done = 0, first
    for count, step in rungs(confirmation.finalists, first, last, confirmation.share):
        total, done = total + count * (step - done), step
    return total


def finalists(
    selection: Selection, tasks: TaskRows, keep: Sequence[str], number: int
) -> dict[str, np.ndarray]:
    """The mixtures of a race: the choice, all tasks, runner-ups, mixtures between the first two.

    Runner-ups are the best estimated mixtures that the selector has tried. They, and the mixtures
    between, differ from every other finalist by ``MIN_DISTANCE``.

    Args:
        selection: the selector's.
        tasks: of the training set.
        keep: tasks that every mixture must have.
        number: of mixtures wanted; there may be fewer.

    Returns:
        Shares [K] by the name of the mixture.
    """
    choice = np.array([selection.weights[name] for name in tasks.names])
    everything = tasks.counts / tasks.counts.sum()
    found = {_CHOICE: choice}
    if np.allclose(choice, everything):
        found = {_ALL_TASKS: choice}
    else:
        found[_ALL_TASKS] = everything
    kept = np.isin(tasks.names, list(keep))
    number_of_runner_ups = 0
    others = chain(_runner_ups(selection.history, tasks), _between(choice, everything))
    for name, shares in others:
        if len(found) == number:
            break
        can_be_drawn = ((shares == 0) | (shares >= MIN_SHARE)).all() and (shares[kept] > 0).all()
        distance = min(np.abs(shares - other).sum() / 2 for other in found.values())
        if not can_be_drawn or distance < MIN_DISTANCE:
            continue
        if name is None:
            number_of_runner_ups += 1
            name = f"runner-up {number_of_runner_ups}: {_named(tasks.names, shares)}"
        found[name] = shares
    return found


def _runner_ups(history: Sequence[Step], tasks: TaskRows) -> Iterator[tuple[None, np.ndarray]]:
    """What a selector has tried, the lowest estimates first."""
    position = {name: k for k, name in enumerate(tasks.names)}
    for step in heapq.nsmallest(_LOOKED_AT, history, key=lambda step: step.loss):
        shares = np.zeros(len(tasks.names))
        of_task = step.weights or {name: float(tasks.counts[position[name]]) for name in step.tasks}
        for name, weight in of_task.items():
            shares[position[name]] = weight
        if shares.sum() > 0:
            yield None, shares / shares.sum()


def _between(choice: np.ndarray, everything: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Mixtures on the way from the choice to all tasks: half way, then quarters, then eighths."""
    for parts in (2, 4, 8):
        for part in range(1, parts, 2):
            way = part / parts
            yield f"{way:.4g} of the way to all tasks", (1 - way) * choice + way * everything


def _named(names: Sequence[str], shares: np.ndarray) -> str:
    chosen = [name for name, share in zip(names, shares, strict=True) if share > 0]
    more = len(chosen) - _NAMED
    return ", ".join(chosen[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def run_race(
    runs: GroundTruthRuns, mixtures: Mapping[str, np.ndarray], confirmation: Confirmation
) -> Race:
    """Train the finalists; the record of the race. Every process must call this.

    The lowest measured loss goes on; a loss that is not finite is the highest, and of equal ones
    the first is better.

    Args:
        runs: trains; has the steps of the rungs among its stops.
        mixtures: the finalists, from :func:`finalists`.
        confirmation: the callback's option.
    """
    rest, names = runs.rest, [*mixtures]
    losses: dict[str, list[float | None]] = {name: [] for name in names}
    steps: list[int] = []
    if len(names) > 1:
        plan = rungs(len(names), rest.first_step, rest.last_step, confirmation.share)
        total, done = 0, rest.first_step
        for count, step in plan:
            total, done = total + count * (step - done), step
        in_race = names
        with runs.bar("confirmation", total) as progress:
            for number, (_, step) in enumerate(plan):
                is_last = number == len(plan) - 1
                for name in in_race:
                    loss = runs.loss(mixtures[name], step, progress, pause=not is_last)
                    losses[name].append(loss if math.isfinite(loss) else None)
                steps.append(step)
                going_on = 1 if is_last else plan[number + 1][0]
                ranked = sorted(in_race, key=lambda name: _rank(losses[name][-1]))[:going_on]
                for name in in_race:
                    if name not in ranked:
                        runs.forget_state(mixtures[name])
                in_race = [name for name in in_race if name in ranked]
        names = in_race
    return Race(
        finalists=[
            Finalist(
                name=name,
                weights=dict(zip(rest.tasks.names, shares.tolist(), strict=True)),
                losses=losses[name],
                seconds=runs.seconds(shares),
            )
            for name, shares in mixtures.items()
        ],
        steps=steps,
        winner=names[0],
        choice=next(iter(mixtures)),
        asked=confirmation.finalists,
        share=confirmation.share,
    )


def _rank(loss: float | None) -> float:
    return math.inf if loss is None else loss


def confirmed(
    selection: Selection, race: Race, fitted: FittedEstimator | None
) -> tuple[Selection, Race]:
    """The selection of the winner, and the race with estimates beside what was measured.

    Args:
        selection: the selector's. It stays as it is if its choice has won.
        race: the record.
        fitted: the estimator; None: there are no estimates.
    """
    if fitted is not None:
        estimate = fitted.estimate(np.array([[*one.weights.values()] for one in race.finalists]))
        estimated = [
            replace(one, estimated=float(loss), low=float(low), high=float(high))
            for one, loss, low, high in zip(
                race.finalists, estimate.loss, estimate.low, estimate.high, strict=True
            )
        ]
        race = replace(race, finalists=estimated)
    if race.winner == race.choice:
        return selection, race
    weights = race.finalist(race.winner).weights
    won = None if fitted is None else fitted.estimate(np.array([[*weights.values()]]))
    return replace(selection, weights=weights, estimate=won), race
