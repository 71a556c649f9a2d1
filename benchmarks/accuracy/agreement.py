"""Agreement of estimates with truth: every estimator, family and mode, next to the noise ceiling.

The truth is what ``ground_truth.py`` measured (committed in ``results/truth``). The gradients are
captured once per family and mode at the warm-up's checkpoint, and cached, as is what the baselines
find out about the texts; then the table takes seconds. The authors' own procedure is in it if
``gradex_reference.py`` has measured it on all mixtures. Where the truth was measured on a processor
that rounds otherwise, its warm-up ended elsewhere than the one here: the losses are moved by what
those at the two checkpoints differ by, and the table says so.

A mixture with the task of shuffled answers is easily told from one without, and shuffled answers
from others; what matters is how estimates rank the mixtures that are left.

    python -m benchmarks.accuracy.agreement [--families small] [--modes continue] [--brief]
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.ablations import (
    ABLATIONS,
    PROBES,
    ablated,
    projected_again,
    thinned,
    with_some_probes,
)
from benchmarks.accuracy.baselines import (
    Constant,
    MeanCosine,
    MeanDotProduct,
    MeanGradientStep,
    NgramOverlap,
    NumberOfTasks,
    RepresentationSimilarity,
    StepNorm,
)
from benchmarks.accuracy.captured import gradients, with_token_margins
from benchmarks.accuracy.gradex_reference import GradExAsPublished, measured_scales
from benchmarks.accuracy.measures import (
    Truth,
    coverage_of_differences,
    describe,
    is_inside,
    measures,
    measures_in_nats,
    read_truth,
    spearman,
)
from benchmarks.families import with_fixed_hashes
from hf_auxselect import (
    AbstractEstimator,
    GaussNewton,
    GradExLogistic,
    GradientStore,
    KernelSurrogate,
    LinearizedTraining,
    RidgeSurrogate,
)
from hf_auxselect.estimators import FittedCalibrated, FittedEstimator
from hf_auxselect.files import to_json, write_atomically

IN_NATS = (
    LinearizedTraining,
    GaussNewton,
    KernelSurrogate,
    RidgeSurrogate,
    GradExLogistic,
    GradExAsPublished,
    Constant,
)
NUM_BOOTSTRAP = 1000
NUM_CALIBRATION_RUNS = (2, 4, 8, 16)
NUM_CALIBRATION_DRAWS = 50
EXAMPLES_PER_TASK = (8, 16, 32, 64)
DIMS = (256, 512, 1024, 2048)
NUM_PROJECTIONS = 8
RANKS = (16, 32, 128, 256)


def estimators(family: str, weights: np.ndarray) -> dict[str, AbstractEstimator]:
    """What is compared on mixtures [M, K] of a family, by the name of its line."""
    return {
        "LinearizedTraining()": LinearizedTraining(),
        "GaussNewton()": GaussNewton(),
        'GaussNewton(curvature="empirical")': GaussNewton(curvature="empirical"),
        "KernelSurrogate()": KernelSurrogate(),
        "RidgeSurrogate()": RidgeSurrogate(),
        "GradExLogistic()": GradExLogistic(),
        **{
            f"GradEx as published, scale {scale}": GradExAsPublished(family=family, scale=scale)
            for scale in measured_scales(family, weights)
        },
        "constant: loss at the switch": Constant(),
        "mean dot product": MeanDotProduct(),
        "mean dot product, preconditioned": MeanDotProduct(preconditioned=True),
        "mean cosine": MeanCosine(),
        "mean cosine, preconditioned": MeanCosine(preconditioned=True),
        "mean gradient step": MeanGradientStep(),
        "mean gradient step, precond.": MeanGradientStep(preconditioned=True),
        "step norm": StepNorm(),
        "number of tasks": NumberOfTasks(),
        "representations (RDS+)": RepresentationSimilarity(family=family),
        "n-grams, cosine": NgramOverlap(family=family),
        "n-grams, importance (DSIR)": NgramOverlap(family=family, importance=True),
    }


def compare(
    truth: Truth, store: GradientStore, name: str, estimator: AbstractEstimator
) -> dict[str, Any]:
    """One line of the table: an estimator on a family and mode, with 90% bootstrap intervals."""
    weights, true = truth.weights, truth.mean
    fitted = estimator.fit(store)
    start = time.perf_counter()
    estimate = fitted.estimate(weights)
    seconds = (time.perf_counter() - start) / len(true)
    line: dict[str, Any] = {"family": truth.family, "mode": truth.mode, "estimator": name}
    line |= measures(estimate.loss, true)
    equal = np.isclose((weights > 0).sum(1), 5) & np.isclose(weights.max(1), 0.2, atol=1e-3)
    line["spearman_equal_size"] = spearman(estimate.loss[equal], true[equal])
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(true), len(true)) for _ in range(NUM_BOOTSTRAP)]
    ranks = [spearman(estimate.loss[i], true[i]) for i in draws]
    line["spearman_interval"] = np.quantile(ranks, [0.05, 0.95]).tolist()
    is_left = truth.is_without_shuffled
    of_left = measures(estimate.loss[is_left], true[is_left])
    if isinstance(estimator, IN_NATS):
        line |= measures_in_nats(estimate.loss, true)
        of_left |= measures_in_nats(estimate.loss[is_left], true[is_left])
        if (estimate.low < estimate.high).any():  # it gives intervals
            line["coverage"] = float(is_inside(estimate, true).mean())
            line["width"] = float(np.mean(estimate.high - estimate.low))
            line["difference_coverage"] = coverage_of_differences(fitted, weights, true)
    line |= {f"{measure}_without_shuffled": value for measure, value in of_left.items()}
    diagnostics = fitted.diagnostics()
    # What was measured before says itself how long it took.
    seconds = diagnostics.get("seconds_per_estimate", seconds)
    if "sampling_error_over_spread" in diagnostics:
        line["sampling"] = diagnostics["sampling_error_over_spread"]
    line["ms_per_estimate"] = 1000 * seconds
    return line


def compare_calibrated(
    truth: Truth, fitted: FittedEstimator, name: str, num_runs: int
) -> dict[str, Any]:
    """As :func:`compare`, with estimates calibrated to ``num_runs`` of the runs.

    The mean over random choices of these runs, each compared on all other mixtures.
    """
    rng, true, lines = np.random.default_rng(0), truth.mean, []
    for _ in range(NUM_CALIBRATION_DRAWS):
        known = rng.choice(len(true), num_runs, replace=False)
        others = np.setdiff1d(np.arange(len(true)), known)
        calibrated = FittedCalibrated(fitted, truth.weights[known], true[known])
        estimate = calibrated.estimate(truth.weights[others])
        lines.append(
            measures(estimate.loss, true[others])
            | measures_in_nats(estimate.loss, true[others])
            | {"coverage": float(is_inside(estimate, true[others]).mean())}
        )
    return {
        "family": truth.family,
        "mode": truth.mode,
        "estimator": name,
        "calibration_runs": num_runs,
        **{key: float(np.mean([line[key] for line in lines])) for key in lines[0]},
    }


def compare_projections(truth: Truth, store: GradientStore, dim: int) -> dict[str, Any]:
    """As :func:`compare`, with gradients of ``dim`` numbers: mean and spread over projections.

    And what the mean of their estimates comes to.
    """
    losses, lines = [], []
    for seed in range(NUM_PROJECTIONS):
        fitted = LinearizedTraining().fit(projected_again(store, dim, seed))
        losses.append(fitted.estimate(truth.weights).loss)
        lines.append(measures(losses[-1], truth.mean) | measures_in_nats(losses[-1], truth.mean))
    return {
        "dim": dim,
        **{key: float(np.mean([line[key] for line in lines])) for key in lines[0]},
        "spearman_range": [f(line["spearman"] for line in lines) for f in (min, max)],
        "spearman_of_the_mean": spearman(np.mean(losses, axis=0), truth.mean),
    }


def print_table(header: dict[str, Any]) -> None:
    """What was measured of one family and mode: the estimators, line by line, and the rest."""
    ceiling, of_left = (
        "unknown" if value is None else f"{value:.3f}"
        for value in (header["noise_ceiling"], header["noise_ceiling_without_shuffled"])
    )
    low, high = header["range"]
    print(
        f"\n{header['family']}, {header['mode']}: {header['mixtures']} mixtures "
        f"({header['mixtures_without_shuffled']} without shuffled), {header['seeds']} seed(s), "
        f"losses {low:.3f} to {high:.3f};\nnoise ceiling {ceiling}, without shuffled {of_left}; "
        f"the mean of the truth errs by {header['error_of_a_constant']:.1%}"
    )
    if header["moved"]:
        print(f"measured from another warm-up, and moved by {header['moved']:+.4f}")
    if header["error_floor"] is not None:
        print(
            f"a perfect estimate would have R2 {header['r2_ceiling']:.2f} and err by "
            f"{header['error_floor']:.1%}: seeds differ"
        )
    print(
        f"{'':34} spearman  [90%]            w/o shuffled  same size     R2   error  regret"
        "  coverage (of differences)  ms/estimate  sampling error"
    )
    further = [name for name in ("ablations", "ranks", "fewer_examples") if name in header]
    for line in header["lines"] + [line for name in further for line in header[name]]:
        interval = "[{:.3f}, {:.3f}]".format(*line["spearman_interval"])
        nats = f"{line['r2']:6.2f}  {line['error']:6.2%}" if "r2" in line else " " * 14
        coverage = f"{line['coverage']:8.0%}" if "coverage" in line else " " * 8
        if "difference_coverage" in line:
            coverage += f" ({line['difference_coverage']:.0%})"
        print(
            f"{line['estimator']:34} {line['spearman']:8.3f}  {interval:16} "
            f"{line['spearman_without_shuffled']:13.3f}  {line['spearman_equal_size']:9.3f}  "
            f"{nats}  {line['regret']:6.1%}  {coverage:14}  {line['ms_per_estimate']:22.2f}"
            + (f"{line['sampling']:16.2f}" if line.get("sampling") else "")
        )
    for line in header.get("dims", []):
        low, high = line["spearman_range"]
        print(
            f"{line['dim']:4} numbers per gradient, {NUM_PROJECTIONS} projections: Spearman "
            f"{line['spearman']:.3f} ({low:.3f} to {high:.3f}), of their mean "
            f"{line['spearman_of_the_mean']:.3f}, R2 {line['r2']:.2f}, error {line['error']:.2%}, "
            f"regret {line['regret']:.1%}"
        )
    for line in header["calibrated"]:
        print(
            f"{line['estimator']} with {line['calibration_runs']:2} calibration runs: Spearman "
            f"{line['spearman']:.3f}, R2 {line['r2']:.2f}, error {line['error']:.2%}, regret "
            f"{line['regret']:.1%}, coverage {line['coverage']:.0%}"
        )


def what_matters(
    truth: Truth, store: GradientStore, *, capture_tokens: bool
) -> dict[str, list[dict[str, Any]]]:
    """Lines of the default with something taken away, or less or more of it."""
    ablations = ABLATIONS
    with_tokens = with_token_margins(truth.family, store, capture=capture_tokens)
    if with_tokens is None:
        ablations = {n: a for n, a in ABLATIONS.items() if a.curvature != "token_margins"}
    at_one_point = LinearizedTraining(probes=False)
    lines = [
        compare(truth, ablated(with_tokens or store, ablation), name, at_one_point)
        for name, ablation in ablations.items()
    ]
    lines += [
        compare(truth, with_some_probes(store, left_out), name, LinearizedTraining())
        for name, left_out in PROBES.items()
    ]
    return {
        "ablations": lines,
        "ranks": [
            compare(truth, store, f"rank {rank}", LinearizedTraining(rank=rank)) for rank in RANKS
        ],
        "fewer_examples": [
            compare(truth, thinned(store, n), f"{n} examples a task", at_one_point)
            for n in EXAMPLES_PER_TASK
        ],
        "dims": [compare_projections(truth, store, dim) for dim in DIMS],
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small", metavar="a,b")
    parser.add_argument("--modes", default="continue", metavar="continue,restart")
    parser.add_argument(
        "--token-margins", action="store_true", help="capture them for one more of the lines"
    )
    parser.add_argument(
        "--brief", action="store_true", help="the estimators alone: neither calibrated nor ablated"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for family in options.families.split(","):
        for mode in options.modes.split(","):
            truth, store = read_truth(family, mode), gradients(family, mode)
            lines = [
                compare(truth, store, name, estimator)
                for name, estimator in estimators(family, truth.weights).items()
            ]
            fitted = LinearizedTraining().fit(store)
            calibrated = [
                compare_calibrated(truth, fitted, "LinearizedTraining()", num_runs)
                for num_runs in (() if options.brief else NUM_CALIBRATION_RUNS)
            ]
            header = describe(truth)
            record = header | {"command": "python -m benchmarks.accuracy.agreement", "lines": lines}
            record |= {"calibrated": calibrated, "diagnostics": fitted.diagnostics()}
            if mode == "continue" and not options.brief:
                record |= what_matters(truth, store, capture_tokens=options.token_margins)
            print_table(record)
            path = RESULTS / "agreement" / f"{family}-{mode}.json"
            write_atomically(path, to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
