"""Runs whose every loss is known: quadratic tasks, a target that changes, and re-selection.

The loss of task k is |parameters - optimum_k|^2 / 2, of the target likewise, so that steps on a
mixture lead towards the mean of its tasks' optima. Training adds the noise of minibatches; what a
selection sees of the optima has errors of captured examples, which stay, and errors of the model,
which are new at each selection.

Shapes: K tasks, D parameters, M mixtures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect import Estimate, ForwardSelection, Reselection, SelectionProblem
from hf_auxselect.estimators import FittedEstimator, normalize_mixtures
from hf_auxselect.reselection import averaged, credited, drift_p_value, score_of

Array = np.ndarray

NUM_TASKS, DIM, ROWS, RATE, BATCH_SIZE = 6, 16, 96, 0.03, 16
WARM_UP, STEPS, EVERY = 20, 140, 20
NUM_CAPTURED = 32
_Z = 1.645
"""Of a 90% interval."""


class Fitted(FittedEstimator):
    """Estimates of the loss at the end from noisy optima; errors are propagated to first order."""

    def __init__(self, start_D: Array, optima_KD: Array, target_D: Array, steps: int, error: float):
        self.start_D, self.optima_KD, self.target_D = start_D, optima_KD, target_D
        self.kept = (1 - RATE) ** steps
        self.error = error

    def _ends(self, weights: ArrayLike) -> tuple[Array, Array]:
        shares_MK = normalize_mixtures(weights, [ROWS] * NUM_TASKS)
        means_MD = shares_MK @ self.optima_KD
        return shares_MK, means_MD + self.kept * (self.start_D - means_MD)

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK, ends_MD = self._ends(weights)
        missing_MD = ends_MD - self.target_D
        loss = (missing_MD**2).sum(1) / 2
        spread = 1 + (1 - self.kept) ** 2 * (shares_MK**2).sum(1)
        half = _Z * self.error * np.sqrt(spread * (missing_MD**2).sum(1))
        return Estimate(loss=loss, low=loss - half, high=loss + half, weights=shares_MK)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        ours, other = self.estimate(weights), self.estimate(np.asarray(reference)[None])
        shares_MK, ends_MD = self._ends(weights)
        shares_1K, ends_1D = self._ends(np.asarray(reference)[None])
        step = 1 - self.kept
        by_task = step * (
            shares_MK[:, :, None] * (ends_MD - self.target_D)[:, None]
            - shares_1K[:, :, None] * (ends_1D - self.target_D)[:, None]
        )
        variance = (by_task**2).sum((1, 2)) + ((ends_MD - ends_1D) ** 2).sum(1)
        loss, half = ours.loss - other.loss, _Z * self.error * np.sqrt(variance)
        return Estimate(loss=loss, low=loss - half, high=loss + half, weights=ours.weights)

    def diagnostics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class World:
    """What is true, and what a run reads of it.

    Attributes:
        seed: of the optima and of all noise.
        examples: standard deviation of an example's optimum.
        model: standard deviation of the estimator's own error of an optimum.
    """

    seed: int
    examples: float = 2.0
    model: float = 0.35

    def rng(self, *key: int) -> np.random.Generator:
        """A stream of random numbers of its own."""
        return np.random.default_rng([self.seed, *key])

    @property
    def optima_KD(self) -> Array:
        """Of the tasks."""
        return self.rng(0).normal(size=(NUM_TASKS, DIM))

    def target_D(self, share: float) -> Array:
        """Optimum of a target: two tasks serve it; of the second target others do."""
        own = self.rng(1).normal(0, 0.2, (2, DIM))
        first, second = self.optima_KD[:2].mean(0) + own[0], self.optima_KD[2:4].mean(0) + own[1]
        return (1 - share) * first + share * second

    def examples_ND(self, share: float, name: int, count: int = NUM_CAPTURED) -> Array:
        """Optima of examples of a target; each version has examples of its own."""
        rng = self.rng(2, name)
        later = rng.random(count) < share
        centres = np.where(later[:, None], self.target_D(1.0), self.target_D(0.0))
        return centres + rng.normal(0, self.examples, (count, DIM))

    def fitted(self, start_D: Array, share: float, name: int, step: int) -> Fitted:
        """What a selection after a step sees."""
        error = self.examples / np.sqrt(NUM_CAPTURED)
        captured = self.optima_KD + self.rng(3).normal(0, error, (NUM_TASKS, DIM))
        captured = captured + self.rng(4, step).normal(0, self.model, (NUM_TASKS, DIM))
        target = self.examples_ND(share, name).mean(0)
        return Fitted(start_D, captured, target, STEPS - step, float(np.hypot(error, self.model)))

    def best(self, start_D: Array, share: float, steps: int) -> Array:
        """The subset that is really best for these steps: shares [K]."""
        masks = np.array([*itertools.product([False, True], repeat=NUM_TASKS)][1:])
        true = Fitted(start_D, self.optima_KD, self.target_D(share), steps, 0.0)
        return normalize_mixtures(masks[[np.argmin(true.estimate(masks).loss)]], [1] * NUM_TASKS)[0]


def simulate(
    world: World,
    dates: Sequence[tuple[int, float]],
    reselection: Reselection | None,
    *,
    selects: bool = True,
    knows: bool = False,
    same_rows: bool = True,
) -> dict[str, Any]:
    """One run.

    Args:
        world: what is true.
        dates: step and share of the second target from there on; that of step 0 is 0.
        reselection: as of the callback; its own targets are left alone. None: one selection.
        selects: False: all tasks to the end.
        knows: choose by the truth, whenever the target changes.
        same_rows: whether dates of the same share are one target; else each has rows of its own.

    Returns:
        ``losses`` of the target of the time after each step, and ``selections``.
    """
    names = [str(k) for k in range(NUM_TASKS)]
    versions = [(0, 0.0), *dates]
    shares_K = np.full(NUM_TASKS, 1 / NUM_TASKS)
    theta_D = world.rng(5).normal(0, 2.0, DIM)
    noise = world.rng(6)
    due = {WARM_UP}
    if reselection is not None:
        due = {*reselection.steps(WARM_UP, STEPS), *(date for date, _ in dates)}
    if knows:
        due = {WARM_UP, *(date for date, _ in dates)}
    decisions: dict[int, tuple[int, dict[str, float], float]] = {}
    scores: Mapping[str, Mapping[str, float]] = {}
    losses, selections = [], []
    for step in range(STEPS):
        name, share = max((i, s) for i, (date, s) in enumerate(versions) if date <= step)
        if same_rows:
            name = next(i for i, (_, s) in enumerate(versions) if s == share)
        if step in due and selects:
            shares, last = None, max(decisions, default=-1)
            is_due = True
            if reselection is not None and reselection.significance is not None and decisions:
                before = decisions[last][0]
                p_value = 1.0
                if before != name:
                    old = world.examples_ND(versions[before][1], before)
                    new = world.examples_ND(share, name)
                    p_value = drift_p_value(old, new, seed=step)
                is_due = p_value <= reselection.significance
            if knows:
                shares = world.best(theta_D, share, STEPS - step)
            elif is_due:
                memory = 0.0 if reselection is None else reselection.memory
                if last >= 0:
                    of, mixture, loss = decisions[last]
                    now = ((theta_D - world.target_D(versions[of][1])) ** 2).sum() / 2
                    gain = (loss - now) / (step - last)
                    scores = credited(scores, str(of), mixture, gain, memory=memory)
                fitted = world.fitted(theta_D, share, name, step)
                selection = ForwardSelection().select(
                    SelectionProblem(fitted.estimate, names, [ROWS] * NUM_TASKS)
                )
                chosen = selection.weights
                earlier = [m for _, (n, m, _) in sorted(decisions.items()) if n == name]
                if memory and earlier and score_of(earlier[-1], scores[str(name)]) > 0:
                    chosen = averaged(
                        chosen,
                        earlier[-1],
                        memory=memory,
                        rows_to_read=BATCH_SIZE * (STEPS - step),
                    )
                now = ((theta_D - world.target_D(share)) ** 2).sum() / 2
                decisions[step] = name, chosen, float(now)
                shares = np.array([*chosen.values()])
            if shares is not None:
                shares_K = shares
                selections.append(step)
        pull = theta_D - shares_K @ world.optima_KD
        theta_D = theta_D - RATE * (
            pull + noise.normal(0, world.examples / np.sqrt(BATCH_SIZE), DIM)
        )
        _, share = max((i, s) for i, (date, s) in enumerate(versions) if date <= step + 1)
        losses.append(float(((theta_D - world.target_D(share)) ** 2).sum() / 2))
    return {"losses": losses, "selections": selections}
