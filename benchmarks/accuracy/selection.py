"""What choices are worth: every strategy's mixture is trained on, at equal steps.

From a family's warm-up checkpoint each strategy chooses a mixture, and every different mixture is
trained to the end of the run with several seeds, as in ``ground_truth.py``. The gain of a strategy
is the target's loss after training on all tasks less that after its own mixture, of the same seed.
A confirmed choice is the best of its finalists, by the loss that the run ends with. Online mixing
and training on the target alone have no mixture, and are runs of their own. It takes hours on a
CPU; it can be stopped at any time and goes on where it stopped. Processes with other families can
run at the same time. ``--costs`` measures the seconds of the gradient passes that strategies need.

    python -m benchmarks.accuracy.selection [--families small,demo] [--seeds 1,2,3]
        [--strategies "all tasks;LESS"] [--only-choose] [--costs]

Shapes: K tasks, D projection_dim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy import gradex_reference
from benchmarks.accuracy.baselines import (
    MeanCosine,
    NgramOverlap,
    RepresentationSimilarity,
    task_rows,
    trainer_at_switch,
)
from benchmarks.accuracy.captured import StopAfterOneStep, gradients
from benchmarks.accuracy.ground_truth import TRUTH, digest, make_trainer, train_on, warm_up
from benchmarks.accuracy.measures import read_truth
from benchmarks.accuracy.rivals import TRAINED_BY_ITSELF, interpolated_adapters
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import (
    AbstractEstimator,
    AbstractSelector,
    ForwardSelection,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    MixtureOptimization,
    TaskSelectionCallback,
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
    "GradEx, as published": lambda case: [gradex_reference.forward_selection(case.family)],
    "interpolated adapters (OP-Mix)": lambda case: [interpolated_adapters(case.family)],
    **{f"random {seed}": partial(_random, seed=seed) for seed in (1, 2, 3)},
    "best of three random subsets": lambda case: [_random(case, i)[0] for i in (1, 2, 3)],
    "representations (RDS+)": lambda case: case.best(RepresentationSimilarity(family=case.family)),
    "n-grams, importance (DSIR)": lambda case: case.best(
        NgramOverlap(family=case.family, importance=True)
    ),
    "kernel mean matching (KMM-L1)": _kernel_mean_matching,
    "cosine of mean gradients": lambda case: case.best(MeanCosine()),
    "nearest length": _nearest_length,
}
"""Strategy -> the weights [K] of one or more mixtures, the best of which goes on."""

PASSES: dict[str, AbstractEstimator] = {
    "default": DEFAULT,
    "gradients of the loss": MeanCosine(preconditioned=True),
    "gradients of margins": GradExLogistic(),
}
"""What a gradient pass may capture, by an estimator that asks for it."""


def pass_of(strategy: str) -> str | None:
    """Which of ``PASSES`` a strategy needs before it chooses; None: none, or one of its own."""
    if strategy.startswith(("ForwardSelection", "MixtureOptimization")):
        return "default"
    if strategy in ("LESS", "cosine of mean gradients", "kernel mean matching (KMM-L1)"):
        return "gradients of the loss"
    return "gradients of margins" if strategy == "GradEx, corrected" else None


def read(family: str) -> dict[str, Any]:
    """The record of a family; a new one if there is none from this checkpoint."""
    path = SELECTION / f"{family}.json"
    new = {
        "family": family,
        "unit": "nats per label token, the trainer's eval_loss",
        "command": "python -m benchmarks.accuracy.selection",
        "warm_up": digest(warm_up(family)),
        "tasks": [*FAMILIES[family].tasks],
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "choices": {},
        "seconds": {},
        "pass_seconds": {},
        "runs": [],
        "own_runs": [],
    }
    before = json.loads(path.read_text()) if path.is_file() else {}
    return new | before if before.get("warm_up") == new["warm_up"] else new


def choose(record: dict[str, Any], strategies: Iterable[str]) -> None:
    """Add what strategies choose, weights [K] of one or more mixtures, and the seconds it took."""
    family = record["family"]
    case = Case(family=family, store=gradients(family, "continue"), size=0)
    case = replace(case, size=int((case.ours(ForwardSelection())[0] > 0).sum()))
    for name in strategies:
        if name == "GradEx, corrected" and "margin" not in case.store.scalars:
            continue
        start = time.perf_counter()
        mixtures = STRATEGIES[name](case)
        record["seconds"][name] = round(time.perf_counter() - start, 2)
        record["choices"][name] = [weights_K.round(ROUNDED).tolist() for weights_K in mixtures]


def measure_passes(record: dict[str, Any]) -> None:
    """Add the seconds of the gradient passes, each in a run of its own."""
    family = record["family"]
    for name, estimator in PASSES.items():
        if name in record["pass_seconds"]:
            continue
        callback = TaskSelectionCallback(
            warmup=FAMILIES[family].warm_up_steps,
            estimator=estimator,
            examples_per_task=FAMILIES[family].examples_per_task,
            seed=0,
        )
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(family, Path(directory), [callback, StopAfterOneStep()])
            trainer.train(resume_from_checkpoint=str(warm_up(family)))
        assert callback.report is not None
        record["pass_seconds"][name] = callback.report.run["gradient_pass_seconds"]


def runs_of_mixture(record: dict[str, Any], mixture: list[float]) -> dict[int, dict[str, Any]]:
    """Seed -> run of a mixture, where it has been trained on."""
    return {
        run["seed"]: run
        for run in record["runs"]
        if np.abs(np.array(run["weights"]) - mixture).max() < 2 * 10.0**-ROUNDED
    }


def runs_of_strategy(record: dict[str, Any], strategy: str) -> dict[int, dict[str, Any]]:
    """Seed -> run of the best of a strategy's mixtures, where all have been trained on."""
    if strategy in TRAINED_BY_ITSELF:
        return {run["seed"]: run for run in record["own_runs"] if run["strategy"] == strategy}
    each = [runs_of_mixture(record, mixture) for mixture in record["choices"][strategy]]
    seeds = set.intersection(*map(set, each))
    return {seed: min((of[seed] for of in each), key=itemgetter("loss")) for seed in sorted(seeds)}


def summarize(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per strategy: mean gain over all tasks, its standard error, and the share of seeds worse.

    The regret is the mean loss above that of the best mixture known, as a share of the range of all
    mixtures that were trained on here and in ``ground_truth.py``; training on the target alone is
    none. The gain of exact matches is over those seeds in which they were counted. The cost is the
    time of choosing, in runs of the steps after the switch.
    """
    by_mixture: dict[tuple[float, ...], list[float]] = {}
    for run in record["runs"]:
        by_mixture.setdefault(tuple(run["weights"]), []).append(run["loss"])
    known = [float(np.mean(of)) for of in by_mixture.values()]
    if (TRUTH / f"{record['family']}-continue.json").is_file():
        known += read_truth(record["family"], "continue").mean.tolist()
    everything = runs_of_strategy(record, ALL_TASKS)
    seconds_of_run = float(np.median([run["seconds"] for run in record["runs"]]))
    result = {}
    for name in [*record["choices"], *TRAINED_BY_ITSELF]:
        own = runs_of_strategy(record, name)
        shared = [seed for seed in own if seed in everything]
        if not shared:
            continue
        gains = np.array([everything[seed]["loss"] - own[seed]["loss"] for seed in shared])
        loss = float(np.mean([own[seed]["loss"] for seed in shared]))
        matches = [
            own[seed]["exact_match"] - everything[seed]["exact_match"]
            for seed in shared
            if "exact_match" in own[seed] and "exact_match" in everything[seed]
        ]
        result[name] = {
            "loss": loss,
            "gain": float(gains.mean()),
            "gain_se": float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0,
            "worse_than_all_tasks": float(np.mean(gains < 0)),
            "regret": (loss - min(known)) / (max(known) - min(known)),
            "seeds": len(shared),
        }
        if matches:
            result[name] |= {
                "exact_match_gain": float(np.mean(matches)),
                "seeds_with_exact_match": len(matches),
            }
        if (seconds := _seconds(record, name)) is not None:
            result[name]["cost"] = seconds / seconds_of_run + _further_runs(record, name)
    return result


def _further_runs(record: dict[str, Any], strategy: str) -> int:
    """Runs that a strategy trains besides the one that it ends with.

    A confirmation trains all finalists, and then the run that goes on; of other mixtures the best
    one's model is kept.
    """
    number = len(record["choices"].get(strategy, [()]))
    return number if "confirm=" in strategy and number > 1 else number - 1


def _seconds(record: dict[str, Any], strategy: str) -> float | None:
    """Of choosing, with the gradient pass; None where they were not measured."""
    if strategy in TRAINED_BY_ITSELF:
        return 0.0
    kind, own = pass_of(strategy), record["seconds"].get(strategy)
    of_pass = record["pass_seconds"].get(kind) if kind else 0.0
    return None if own is None or of_pass is None else own + of_pass


def run_family(
    family: str, seeds: list[int], strategies: list[str], *, only_choose: bool, costs: bool
) -> None:
    """Choose, train on what is missing, and write each run as it ends."""
    path, record = SELECTION / f"{family}.json", read(family)
    missing = [s for s in strategies if s in STRATEGIES and s not in record["choices"]]
    if missing:
        choose(record, missing)
        write_atomically(path, to_json(record))
    if costs:
        measure_passes(record)
        write_atomically(path, to_json(record))
    for seed, strategy in [] if only_choose else itertools.product(seeds, strategies):
        for run in _missing_runs(record, seed, strategy):
            write_atomically(path, to_json(record))
            print(
                f"{family} seed {seed} {strategy}: {run['loss']:.4f}, "
                f"{run['exact_match']:.0%} ({run['seconds']:.0f} s)",
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


def _missing_runs(record: dict[str, Any], seed: int, strategy: str) -> Iterator[dict[str, Any]]:
    """Train as a strategy does, where that has not been done, and add the runs to the record."""
    family, names = record["family"], record["tasks"]
    if strategy in TRAINED_BY_ITSELF:
        if seed not in runs_of_strategy(record, strategy):
            run = TRAINED_BY_ITSELF[strategy](family, seed)
            record["own_runs"].append({"strategy": strategy, "seed": seed} | run)
            yield run
        return
    for mixture in record["choices"].get(strategy, []):
        if seed not in runs_of_mixture(record, mixture):
            run = train_on(family, dict(zip(names, mixture, strict=True)), "continue", seed)
            record["runs"].append(run)
            yield run


def main() -> None:
    """Run what is missing, family by family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", default=",".join(f for f in FAMILIES if f not in VARIANTS), metavar="a,b"
    )
    parser.add_argument("--seeds", default="1,2,3", metavar="1,2")
    parser.add_argument("--strategies", metavar='"a;b"', help="default: all of them")
    parser.add_argument("--only-choose", action="store_true", help="train on nothing")
    parser.add_argument("--costs", action="store_true", help="time the gradient passes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seeds = [*map(int, options.seeds.split(","))]
    strategies = [*STRATEGIES, *TRAINED_BY_ITSELF]
    if options.strategies:
        strategies = options.strategies.split(";")
    for family in options.families.split(","):
        run_family(family, seeds, strategies, only_choose=options.only_choose, costs=options.costs)


if __name__ == "__main__":
    with_fixed_hashes()
    main()
