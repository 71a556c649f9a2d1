"""Agreement between estimates and ground-truth runs, and what a perfect estimate reaches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy.ground_truth import (
    TRUTH,
    digest,
    switch_loss,
    warm_up,
)
from benchmarks.families import FAMILIES
from hf_auxselect.estimators import Estimate, FittedEstimator
from hf_auxselect.estimators.diagnostics import rank_correlation


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was measured of a family and mode."""

    family: str
    mode: str
    weights: np.ndarray
    """Mixtures [M, K] that were trained on."""
    losses: np.ndarray
    """Of every seed [seeds, M]; NaN where it has not been run."""
    moved: float = 0.0
    """What has been added to the losses: the loss at the switch here, less that where
    they were measured. Other processors round otherwise: the same warm-up ends elsewhere there."""

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds [M]: what estimates are compared with."""
        return np.nanmean(self.losses, axis=0)

    @property
    def is_without_shuffled(self) -> np.ndarray:
        """Which of the mixtures leave out the task of shuffled answers: booleans [M]."""
        return self.weights[:, FAMILIES[self.family].tasks.index("shuffled")] == 0


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; 0 if one of them is constant, or nothing is compared."""
    return rank_correlation(one, other) if len(one) else 0.0


def read_truth(family: str, mode: str) -> Truth:
    """What ``ground_truth.py`` has written; runs from another warm-up are moved to this one."""
    record = json.loads((TRUTH / f"{family}-{mode}.json").read_text())
    runs, moved = record["runs"], 0.0
    if mode == "continue" and record["warm_up"] != digest(warm_up(family)):
        moved = switch_loss(family) - record["switch_loss"]
    losses: dict[tuple[float, ...], dict[int, float]] = {}
    for run in runs:
        losses.setdefault(tuple(run["weights"]), {})[run["seed"]] = run["loss"]
    seeds = sorted({run["seed"] for run in runs})
    table = [[of.get(seed, np.nan) for seed in seeds] for of in losses.values()]
    return Truth(
        family=family,
        mode=mode,
        weights=np.array(list(losses)),
        losses=np.array(table).T + moved,
        moved=moved,
    )


def noise_ceiling(losses: np.ndarray) -> float | None:
    """Expected Spearman of a perfect estimate with the mean over seeds; None with one seed.

    From the mixtures that all seeds have run.

    With r the correlation of two seeds, the mean of n of them has the reliability
    n r / (1 + (n - 1) r) (Spearman-Brown), whose root is its correlation with the expectation.
    """
    count = len(losses)
    losses = losses[:, np.isfinite(losses).all(0)]
    if count < 2 or losses.shape[1] < 3:
        return None
    pairs = [spearman(losses[i], losses[j]) for i in range(count) for j in range(i)]
    r = max(float(np.mean(pairs)), 0.0)
    return float(np.sqrt(count * r / (1 + (count - 1) * r)))


def measures(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How estimates [M] agree with the truth [M].

    The regret is that of a mixture drawn from those that are estimated as the best.
    """
    chosen = true[loss == loss.min()].mean()
    return {
        "spearman": spearman(loss, true),
        "regret": float((chosen - true.min()) / np.ptp(true)),
    }


def measures_in_nats(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Further measures of estimates that are losses, not scores."""
    return {
        "r2": float(1 - ((loss - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()),
        "error": float(np.mean(np.abs(loss - true) / true)),
        "offset": float(np.mean(loss - true)),
    }


def is_inside(estimate: Estimate, true: np.ndarray) -> np.ndarray:
    """Which of the true values [M] lie in their intervals: booleans [M]."""
    return (estimate.low <= true) & (true <= estimate.high)


def coverage_of_differences(
    fitted: FittedEstimator, weights: np.ndarray, true: np.ndarray
) -> float:
    """Share of all pairs of mixtures whose difference lies in its 90% interval."""
    inside = []
    for j in range(1, len(weights)):
        difference = fitted.difference(weights[:j], weights[j])
        inside.append(is_inside(difference, true[:j] - true[j]))
    return float(np.concatenate(inside).mean())


def describe(truth: Truth) -> dict[str, Any]:
    """The truth in numbers."""
    losses = truth.losses
    is_left, mean = truth.is_without_shuffled, truth.mean
    return {
        "family": truth.family,
        "mode": truth.mode,
        "mixtures": len(truth.weights),
        "mixtures_without_shuffled": int(is_left.sum()),
        "seeds": len(losses),
        "moved": truth.moved,
        "range": [float(mean.min()), float(mean.max())],
        "spread": float(mean.std()),
        "noise_ceiling": noise_ceiling(losses),
        "noise_ceiling_without_shuffled": noise_ceiling(losses[:, is_left]),
        "error_of_a_constant": float(np.mean(np.abs(mean / mean.mean() - 1))),
        **ceilings_in_nats(losses),
    }


def ceilings_in_nats(losses: np.ndarray) -> dict[str, float | None]:
    """Expected R^2 and relative error of a perfect estimate, against the mean over seeds.

    With one seed they are not known (None). Seeds differ by sqrt(2) times the deviation of one, the
    mean of n of them from the expectation by 1/sqrt(n) times it.
    """
    count = len(losses)
    losses = losses[:, np.isfinite(losses).all(0)]
    if count < 2 or losses.shape[1] < 3:
        return {"r2_ceiling": None, "error_floor": None}
    pairs = [(i, j) for i in range(count) for j in range(i)]
    squares = np.mean([np.mean((losses[i] - losses[j]) ** 2) for i, j in pairs])
    gaps = np.mean([np.mean(np.abs(losses[i] - losses[j]) / losses.mean(0)) for i, j in pairs])
    return {
        "r2_ceiling": float(1 - squares / (2 * count) / losses.mean(0).var()),
        "error_floor": float(gaps / np.sqrt(2 * count)),
    }
