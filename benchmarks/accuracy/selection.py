"""What choices are worth: every strategy's mixture is trained on, at equal steps.

From a family's warm-up checkpoint each strategy chooses a mixture, and every different mixture is
trained to the end of the run with several seeds, as in ``ground_truth.py``. The gain of a strategy
is the target's loss after training on all tasks less that after its own mixture, of the same seed.
A confirmed choice is the best of its finalists, by the loss that the run ends with. It takes hours
on a CPU; it can be stopped at any time and goes on where it stopped. Processes with other families
can run at the same time.

    python -m benchmarks.accuracy.selection [--families small,demo] [--seeds 1,2,3]
        [--strategies "all tasks;LESS"] [--only-choose]

Shapes: K tasks, D projection_dim.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.baselines import (
    MeanCosine,
    NgramOverlap,
    RepresentationSimilarity,
    task_rows,
    trainer_at_switch,
)
from benchmarks.accuracy.captured import gradients
from benchmarks.accuracy.ground_truth import TRUTH, digest, train_on, warm_up
from benchmarks.accuracy.measures import read_truth
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import (
    AbstractEstimator,
    AbstractSelector,
    ForwardSelection,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    MixtureOptimization,
)
from hf_auxselect.confirmation import finalists
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import selection_problem
from hf_auxselect.tasks import TaskRows

SELECTION = RESULTS / "selection"
DEFAULT = LinearizedTraining()
ROUNDED = 6
"""Digits of a weight; mixtures that agree in them are the same."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family's gradients, with what its strategies share."""

    family: str
    store: GradientStore
    size: int
    """Number of tasks that ``ForwardSelection`` chooses: strategies that rank tasks take as many of
    them, and random subsets have as many."""

    def ours(
        self,
        selector: AbstractSelector,
        estimator: AbstractEstimator = DEFAULT,
        *,
        confirm: int | None = None,
    ) -> list[np.ndarray]:
        """Weights [K] that a selector of the package chooses, or those of its finalists."""
        fitted, names = estimator.fit(self.store), self.store.task_names
        selection = selector.select(selection_problem(fitted, self.store))
        if confirm is None:
            return [np.array([selection.weights[name] for name in names])]
        tasks = TaskRows(tuple(names), np.repeat(np.arange(len(names)), self.store.task_sizes))
        return list(finalists(selection, tasks, (), confirm).values())

    def best(self, estimator: AbstractEstimator) -> list[np.ndarray]:
        """The tasks of the lowest estimates alone, pooled."""
        scores_K = estimator.fit(self.store).estimate(np.eye(len(self.store.task_names))).loss
        return [self.pooled(np.argsort(scores_K, kind="stable")[: self.size])]

    def pooled(self, tasks: np.ndarray) -> np.ndarray:
        """Weights [K] of some tasks in proportion to their rows."""
        weights_K = np.zeros(len(self.store.task_names))
        weights_K[tasks] = self.store.task_sizes[tasks]
        return weights_K / weights_K.sum()


def _random(case: Case, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [case.pooled(rng.permutation(len(case.store.task_names))[: case.size])]


def _nearest_length(case: Case) -> list[np.ndarray]:
    """The tasks whose rows are about as long as the target's."""
    with trainer_at_switch(case.family) as trainer:
        lengths = [np.mean([*map(len, rows)]) for rows in task_rows(case.family, trainer).values()]
        target = np.mean([len(ids) for ids in trainer.eval_dataset["input_ids"]])
    distances = np.abs(np.log(np.array(lengths) / target))
    return [case.pooled(np.argsort(distances, kind="stable")[: case.size])]


def _kernel_mean_matching(case: Case, penalty: float = 0.1) -> list[np.ndarray]:
    """The weights whose mean gradient is nearest to the target's, with an L1 penalty.

    Solves min over x >= 0 of ``|sum_k x_k g_k - g_T|^2 / 2 + penalty * max_k(g_k . g_T) |x|_1`` by
    coordinate descent over unit gradients, and scales x to sum to 1.

    Source: "Convex Dataset Valuation" (arXiv 2605.16704), its objective over mean gradients.
    """

    def unit(means: np.ndarray) -> np.ndarray:
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-300)

    g_KD, target_D = unit(case.store.mean_gradients()), unit(case.store.target.mean_gradients())[0]
    gram_KK, product_K = g_KD @ g_KD.T, g_KD @ target_D
    x_K, threshold = np.zeros(len(g_KD)), penalty * max(float(product_K.max()), 0.0)
    for _ in range(1000):
        for k in range(len(x_K)):
            rest = product_K[k] - gram_KK[k] @ x_K + gram_KK[k, k] * x_K[k]
            x_K[k] = max(rest - threshold, 0.0) / gram_KK[k, k]
    return [x_K / x_K.sum() if x_K.any() else case.pooled(np.arange(len(x_K)))]


ALL_TASKS = "all tasks"
STRATEGIES: dict[str, Callable[[Case], list[np.ndarray]]] = {
    ALL_TASKS: lambda case: [case.pooled(np.arange(len(case.store.task_names)))],
    "ForwardSelection()": lambda case: case.ours(ForwardSelection()),
    "MixtureOptimization()": lambda case: case.ours(MixtureOptimization()),
    "MixtureOptimization(round_to_subset=True)": lambda case: case.ours(
        MixtureOptimization(round_to_subset=True)
    ),
    "MixtureOptimization(shrinkage=0.0)": lambda case: case.ours(
        MixtureOptimization(shrinkage=0.0)
    ),
    "MixtureOptimization(), confirm=3": lambda case: case.ours(MixtureOptimization(), confirm=3),
    "LESS": lambda case: case.best(MeanCosine(preconditioned=True)),
    "GradEx, corrected": lambda case: case.ours(ForwardSelection(), GradExLogistic()),
    **{f"random {seed}": partial(_random, seed=seed) for seed in (1, 2, 3)},
    "representations (RDS+)": lambda case: case.best(RepresentationSimilarity(family=case.family)),
    "n-grams, importance (DSIR)": lambda case: case.best(
        NgramOverlap(family=case.family, importance=True)
    ),
    "kernel mean matching (KMM-L1)": _kernel_mean_matching,
    "cosine of mean gradients": lambda case: case.best(MeanCosine()),
    "nearest length": _nearest_length,
}
"""Strategy -> the weights [K] of one or more mixtures, the best of which goes on."""


def read(family: str) -> dict[str, Any]:
    """The record of a family; a new one if there is none from this checkpoint."""
    path, own = SELECTION / f"{family}.json", digest(warm_up(family))
    if path.is_file() and (record := json.loads(path.read_text()))["warm_up"] == own:
        return record
    return {
        "family": family,
        "unit": "nats per label token, the trainer's eval_loss",
        "command": "python -m benchmarks.accuracy.selection",
        "warm_up": own,
        "tasks": [*FAMILIES[family].tasks],
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "choices": {},
        "runs": [],
    }


def choose(family: str) -> dict[str, list[list[float]]]:
    """What each strategy chooses: weights [K] of one or more mixtures."""
    case = Case(family=family, store=gradients(family, "continue"), size=0)
    size = int((case.ours(ForwardSelection())[0] > 0).sum())
    case = replace(case, size=size)
    return {
        name: [weights_K.round(ROUNDED).tolist() for weights_K in of(case)]
        for name, of in STRATEGIES.items()
        if "margin" in case.store.scalars or not name.startswith("GradEx")
    }


def losses(record: dict[str, Any], mixture: list[float]) -> dict[int, float]:
    """Seed -> loss of a mixture, where it has been trained on."""
    return {
        run["seed"]: run["loss"]
        for run in record["runs"]
        if np.abs(np.array(run["weights"]) - mixture).max() < 2 * 10.0**-ROUNDED
    }


def losses_of_strategy(record: dict[str, Any], strategy: str) -> dict[int, float]:
    """Seed -> loss of the best of a strategy's mixtures, where all have been trained on."""
    each = [losses(record, mixture) for mixture in record["choices"][strategy]]
    seeds = set.intersection(*map(set, each))
    return {seed: min(of[seed] for of in each) for seed in sorted(seeds)}


def summarize(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per strategy: mean gain over all tasks, its standard error, and the share of seeds worse.

    The regret is the mean loss above that of the best mixture known, as a share of the range of all
    mixtures that were trained on here and in ``ground_truth.py``.
    """
    by_mixture: dict[tuple[float, ...], list[float]] = {}
    for run in record["runs"]:
        by_mixture.setdefault(tuple(run["weights"]), []).append(run["loss"])
    known = [float(np.mean(of)) for of in by_mixture.values()]
    if (TRUTH / f"{record['family']}-continue.json").is_file():
        known += read_truth(record["family"], "continue").mean.tolist()
    everything = losses_of_strategy(record, ALL_TASKS)
    result = {}
    for name in record["choices"]:
        own = losses_of_strategy(record, name)
        shared = [seed for seed in own if seed in everything]
        if not shared:
            continue
        gains = np.array([everything[seed] - own[seed] for seed in shared])
        loss = float(np.mean([own[seed] for seed in shared]))
        result[name] = {
            "loss": loss,
            "gain": float(gains.mean()),
            "gain_se": float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0,
            "worse_than_all_tasks": float(np.mean(gains < 0)),
            "regret": (loss - min(known)) / (max(known) - min(known)),
            "seeds": len(shared),
        }
    return result


def run_family(family: str, seeds: list[int], strategies: list[str], *, only_choose: bool) -> None:
    """Choose, train on what is missing, and write each run as it ends."""
    path, record = SELECTION / f"{family}.json", read(family)
    if not record["choices"]:
        record["choices"] = choose(family)
    names = record["tasks"]
    wanted = [
        (seed, strategy, mixture)
        for seed in seeds
        for strategy in strategies
        for mixture in record["choices"].get(strategy, [])
    ]
    for seed, strategy, mixture in [] if only_choose else wanted:
        if seed in losses(record, mixture):
            continue
        run = train_on(family, dict(zip(names, mixture, strict=True)), "continue", seed)
        record["runs"].append(run)
        write_atomically(path, to_json(record))
        print(
            f"{family} seed {seed} {strategy}: {run['loss']:.4f} ({run['seconds']:.0f} s)",
            flush=True,
        )
    record["summary"] = summarize(record)
    write_atomically(path, to_json(record))
    for name, line in record["summary"].items():
        print(
            f"{family:10} {name:42} loss {line['loss']:.4f}, gain {line['gain']:+.4f} ± "
            f"{line['gain_se']:.4f}, worse in {line['worse_than_all_tasks']:.0%} of "
            f"{line['seeds']}, regret {line['regret']:.0%}",
            flush=True,
        )


def main() -> None:
    """Run what is missing, family by family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", default=",".join(f for f in FAMILIES if f not in VARIANTS), metavar="a,b"
    )
    parser.add_argument("--seeds", default="1,2,3", metavar="1,2")
    parser.add_argument("--strategies", metavar='"a;b"', help="default: all of them")
    parser.add_argument("--only-choose", action="store_true", help="train on nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seeds = [*map(int, options.seeds.split(","))]
    strategies = options.strategies.split(";") if options.strategies else list(STRATEGIES)
    for family in options.families.split(","):
        run_family(family, seeds, strategies, only_choose=options.only_choose)


if __name__ == "__main__":
    with_fixed_hashes()
    main()
