"""What each term of the default estimator is worth: it is taken away, or made larger or smaller.

For each family of ``ground_truth.py``, from the same gradients: agreement with ground-truth runs,
also after ``calibrate=8``. The means over the families decide what stays. Results are added to
those of other families. Under ``before`` they are of an earlier version (commit 0224053), in which
the default had the noise of batches, curvature outside the basis, and a ridge of 0.001.

    python -m benchmarks.accuracy.terms [--families small,demo]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.captured import gradients
from benchmarks.accuracy.measures import (
    Truth,
    coverage_of_differences,
    is_inside,
    measures,
    measures_in_nats,
    read_truth,
)
from benchmarks.families import with_fixed_hashes
from hf_auxselect import GradientStore, LinearizedTraining
from hf_auxselect.estimators import FittedCalibrated, FittedEstimator
from hf_auxselect.estimators.base import random_subsets
from hf_auxselect.estimators.linearized import FittedLinearizedTraining
from hf_auxselect.files import to_json, write_atomically

PATH = RESULTS / "terms.json"
FAMILIES = ("arithmetic", "logic", "text", "spelling", "demo", "sparse", "sorting", "small")
"""Those that constants were decided on."""
NUM_CALIBRATION_RUNS, NUM_CALIBRATION_DRAWS = 8, 8

Patches = dict[str, Any]
PACKAGE = "hf_auxselect.estimators"
NO_SECANT: Patches = {"task_curvature.psb_update": lambda H, delta, change, gradient: H}
NO_ENDPOINTS: Patches = {"target_quadratic.TargetQuadratic.correct": lambda target, probes: 0.0}
VARIANTS: dict[str, Patches] = {
    "the default": {},
    "no secant": NO_SECANT,
    "undamped secant": {"curvature_corrections.SECANT_DAMPING": 1.0},
    "no endpoint losses": NO_ENDPOINTS,
    "neither": NO_SECANT | NO_ENDPOINTS,
    "undamped secant, no endpoint losses": {"curvature_corrections.SECANT_DAMPING": 1.0}
    | NO_ENDPOINTS,
    "endpoint losses as calibration": NO_ENDPOINTS,
    "endpoint losses as calibration of scale and offset": NO_ENDPOINTS,
    "ridge of the fit to endpoint losses: 0.001": {"curvature_corrections.LOSS_FIT_RIDGE": 1e-3},
    "ridge of the fit to endpoint losses: 0.1": {"curvature_corrections.LOSS_FIT_RIDGE": 0.1},
    "ridge of the fit to endpoint losses: 1": {"curvature_corrections.LOSS_FIT_RIDGE": 1.0},
    "no clipping": {"linearized.clipping_factor": lambda *args, **kwargs: 1.0},
    "basis of 32": {"krylov_basis.MAX_DEFAULT_RANK": 32},
    "basis of 64": {"krylov_basis.MAX_DEFAULT_RANK": 64},
    "basis of 128": {"krylov_basis.MAX_DEFAULT_RANK": 128},
}
"""What is put in place of what in the package, by variant."""


@contextlib.contextmanager
def put_in_place(patches: Patches) -> Iterator[None]:
    """The package with other terms, for a while."""
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(patch(f"{PACKAGE}.{name}", value))
        yield


def fitted(store: GradientStore, name: str) -> FittedEstimator:
    """The default estimator with a variant in place."""
    with put_in_place(VARIANTS[name]):
        estimator = LinearizedTraining().fit(store)
    if "calibration" not in name:
        return estimator
    single_tasks = {"calibration.TASK_VARIANCE_SHARE": 1e-9} if "scale and offset" in name else {}
    with put_in_place(single_tasks):
        return calibrated_at_endpoints(estimator, store)


def calibrated_at_endpoints(
    estimator: FittedLinearizedTraining, store: GradientStore
) -> FittedEstimator:
    """Calibrated by the losses at the endpoints, as if they came from ground-truth runs."""
    probes, target = store.probes, estimator._model.target
    assert probes is not None
    _, weights_T = target.weights_of(probes.target_example_ids)
    measured_E = target.loss + probes.loss_changes_ET @ weights_T
    subsets_EK = random_subsets(len(store.task_names))[: len(measured_E)]
    return FittedCalibrated(estimator, subsets_EK, measured_E)


def line(truth: Truth, store: GradientStore, name: str) -> dict[str, float]:
    """Agreement of a variant with ground truth."""
    estimator = fitted(store, name)
    estimate, is_left = estimator.estimate(truth.weights), truth.is_without_shuffled
    of_left = measures(estimate.loss[is_left], truth.mean[is_left])
    return {
        **measures(estimate.loss, truth.mean),
        **measures_in_nats(estimate.loss, truth.mean),
        "spearman_without_shuffled": of_left["spearman"],
        "coverage": float(is_inside(estimate, truth.mean).mean()),
        "difference_coverage": coverage_of_differences(estimator, truth.weights, truth.mean),
        **after_calibration(truth, estimator),
    }


def after_calibration(truth: Truth, estimator: FittedEstimator) -> dict[str, float]:
    """Error and coverage on the other mixtures after some of the runs; mean over random choices."""
    rng, lines = np.random.default_rng(0), []
    for _ in range(NUM_CALIBRATION_DRAWS):
        known = rng.choice(len(truth.mean), NUM_CALIBRATION_RUNS, replace=False)
        others = np.setdiff1d(np.arange(len(truth.mean)), known)
        calibrated = FittedCalibrated(estimator, truth.weights[known], truth.mean[known])
        estimate, true = calibrated.estimate(truth.weights[others]), truth.mean[others]
        lines.append((measures_in_nats(estimate.loss, true)["error"], is_inside(estimate, true)))
    return {
        "error_calibrated": float(np.mean([error for error, _ in lines])),
        "coverage_calibrated": float(np.mean([inside for _, inside in lines])),
    }


def main() -> None:
    """Measure, add to what was measured before, and print means over the families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="a,b")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    record: dict[str, Any] = {"command": "python -m benchmarks.accuracy.terms", "families": {}}
    if PATH.is_file():
        record = json.loads(PATH.read_text())
    for family in options.families.split(","):
        truth, store = read_truth(family, "continue"), gradients(family, "continue")
        lines = {name: line(truth, store, name) for name in VARIANTS}
        record["families"].setdefault(family, {}).update(lines)
        write_atomically(PATH, to_json(record))
    means = mean_lines(record)
    print(f"means over {', '.join(f for f in FAMILIES if f in record['families'])}")
    for name, found in means.items():
        print(f"{name:52}", *(f"{what} {value:.3f}" for what, value in found.items()))


def mean_lines(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Means over the families that constants were decided on, by variant that all of them have."""
    families = [of for name, of in record["families"].items() if name in FAMILIES]
    return {
        name: {what: float(np.mean([of[name][what] for of in families])) for what in found}
        for name, found in families[0].items()
        if all(name in of for of in families)
    }


if __name__ == "__main__":
    with_fixed_hashes()
    main()
