"""Agreement of estimates with truth: every estimator, family and mode, next to the noise ceiling.

The truth is what ``truth.py`` measured (committed in ``results/truth``). The gradients are captured
once per family and mode at the warm-up's checkpoint, and cached; then the table takes seconds.

    python benchmarks/agreement.py [--families small] [--modes continue]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from baselines import MeanCosine, MeanDotProduct, NumberOfTasks, StepNorm
from families import FAMILIES
from scipy.stats import rankdata
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from truth import CACHE, RESULTS, make_trainer, warm_up

from hf_auxselect import (
    AbstractEstimator,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    TaskSelectionCallback,
)
from hf_auxselect.store import to_json, write_atomically

ESTIMATORS: dict[str, AbstractEstimator] = {
    "LinearizedTraining()": LinearizedTraining(),
    "LinearizedTraining(rank=256)": LinearizedTraining(rank=256),
    "GradExLogistic()": GradExLogistic(),
    "mean dot product": MeanDotProduct(),
    "mean dot product, preconditioned": MeanDotProduct(preconditioned=True),
    "mean cosine": MeanCosine(),
    "mean cosine, preconditioned": MeanCosine(preconditioned=True),
    "step norm": StepNorm(),
    "number of tasks": NumberOfTasks(),
}
IN_NATS = (LinearizedTraining, GradExLogistic)
NUM_BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class _Everything(LinearizedTraining):
    """Captures what any of the estimators needs."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "margin")


class _Stop(TrainerCallback):
    """Ends the run after one step: the gradients are captured before it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        control.should_training_stop = True


def gradients(family: str, mode: str, dim: int = 512) -> GradientStore:
    """The gradients at the warm-up's checkpoint, captured when they are first asked for."""
    directory = CACHE / family / f"{mode}-{dim}"
    store = directory / "_task_selection" / "gradients"
    if (
        not (store / "index.json").is_file()
        or not json.loads((store / "index.json").read_text())["complete"]
    ):
        callback = TaskSelectionCallback(
            warmup=FAMILIES[family].warm_up_steps,
            after=mode,
            estimator=_Everything(),
            projection_dim=dim,
            seed=0,
        )
        trainer = make_trainer(family, directory, [callback, _Stop()])
        trainer.train(resume_from_checkpoint=str(warm_up(family)))
    return GradientStore.load(store)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; 0 if one of them is constant."""
    ranks = rankdata(one), rankdata(other)
    if min(np.ptp(ranks[0]), np.ptp(ranks[1])) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def truth(family: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures [M, K], and their losses [seeds, M], of those that every seed has run."""
    runs = json.loads((RESULTS / f"{family}-{mode}.json").read_text())["runs"]
    losses: dict[tuple[float, ...], dict[int, float]] = {}
    for run in runs:
        losses.setdefault(tuple(run["weights"]), {})[run["seed"]] = run["loss"]
    num_seeds = max(len(of_mixture) for of_mixture in losses.values())
    complete = {w: of for w, of in losses.items() if len(of) == num_seeds}
    table = [[of[seed] for seed in sorted(of)] for of in complete.values()]
    return np.array(list(complete)), np.array(table).T


def noise_ceiling(losses: np.ndarray) -> float:
    """Expected Spearman of a perfect estimate with the mean over seeds; NaN with one seed.

    With r the correlation of two seeds, the mean of n of them has the reliability
    n r / (1 + (n - 1) r) (Spearman-Brown), whose root is its correlation with the expectation.
    """
    count = len(losses)
    if count < 2:
        return float("nan")
    pairs = [spearman(losses[i], losses[j]) for i in range(count) for j in range(i)]
    r = max(float(np.mean(pairs)), 0.0)
    return float(np.sqrt(count * r / (1 + (count - 1) * r)))


def measures(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How estimates [M] agree with the truth [M]."""
    return {
        "spearman": spearman(loss, true),
        "regret": float((true[np.argmin(loss)] - true.min()) / np.ptp(true)),
    }


def measures_in_nats(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Further measures of estimates that are losses, not scores."""
    return {
        "r2": float(1 - ((loss - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()),
        "error": float(np.mean(np.abs(loss - true) / true)),
        "offset": float(np.mean(loss - true)),
    }


def compare(family: str, mode: str, name: str) -> dict[str, Any]:
    """One line of the table: an estimator on a family and mode, with 90% bootstrap intervals."""
    weights, losses = truth(family, mode)
    true = losses.mean(0)
    store = gradients(family, mode)
    fitted = ESTIMATORS[name].fit(store)
    start = time.perf_counter()
    estimate = fitted.estimate(weights)
    seconds = time.perf_counter() - start
    line: dict[str, Any] = {"family": family, "mode": mode, "estimator": name}
    line |= measures(estimate.loss, true)
    equal = np.isclose((weights > 0).sum(1), 5) & np.isclose(weights.max(1), 0.2, atol=1e-3)
    line["spearman_equal_size"] = spearman(estimate.loss[equal], true[equal])
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(true), len(true)) for _ in range(NUM_BOOTSTRAP)]
    ranks = [spearman(estimate.loss[i], true[i]) for i in draws]
    line["spearman_interval"] = np.quantile(ranks, [0.05, 0.95]).tolist()
    if isinstance(ESTIMATORS[name], IN_NATS):
        line |= measures_in_nats(estimate.loss, true)
        line["coverage"] = float(((estimate.low <= true) & (true <= estimate.high)).mean())
        line["width"] = float(np.mean(estimate.high - estimate.low))
    line["ms_per_estimate"] = 1000 * seconds / len(true)
    return line


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small", metavar="a,b")
    parser.add_argument("--modes", default="continue", metavar="continue,restart")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for family in options.families.split(","):
        for mode in options.modes.split(","):
            weights, losses = truth(family, mode)
            header = {
                "family": family,
                "mode": mode,
                "mixtures": len(weights),
                "seeds": len(losses),
                "range": [float(losses.mean(0).min()), float(losses.mean(0).max())],
                "spread": float(losses.mean(0).std()),
                "noise_ceiling": noise_ceiling(losses),
                "error_of_a_constant": float(np.mean(np.abs(losses.mean(0) / losses.mean() - 1))),
            }
            lines = [compare(family, mode, name) for name in ESTIMATORS]
            print(
                f"\n{family}, {mode}: {len(weights)} mixtures, {len(losses)} seed(s), losses "
                f"{header['range'][0]:.3f} to {header['range'][1]:.3f}, noise ceiling "
                f"{header['noise_ceiling']:.3f}; a constant errs by "
                f"{header['error_of_a_constant']:.1%}"
            )
            print(
                f"{'':34} spearman  [90%]           same size     R2   error  regret  coverage"
                "  ms/estimate"
            )
            for line in lines:
                low, high = line["spearman_interval"]
                nats = f"{line['r2']:6.2f}  {line['error']:6.2%}" if "r2" in line else " " * 14
                coverage = f"{line['coverage']:8.0%}" if "coverage" in line else " " * 8
                print(
                    f"{line['estimator']:34} {line['spearman']:8.3f}  [{low:.3f}, {high:.3f}]  "
                    f"{line['spearman_equal_size']:9.3f}  {nats}  {line['regret']:6.1%}  "
                    f"{coverage}  {line['ms_per_estimate']:10.2f}"
                )
            record = header | {"command": "python benchmarks/agreement.py", "lines": lines}
            path = RESULTS.parent / "agreement" / f"{family}-{mode}.json"
            write_atomically(path, to_json(record))


if __name__ == "__main__":
    main()
