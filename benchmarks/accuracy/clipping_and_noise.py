"""What clipping and the noise of batches are worth in the default estimator, family by family.

Each is left out in turn. A version that had terms of each mixture's own, in place of those of
training on all tasks, is compared too: ``--write NAME`` in a checkout of it adds its lines under
that name, from the same gradients.

    python -m benchmarks.accuracy.clipping_and_noise [--families small,demo] [--write NAME]
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import numpy as np

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
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import GradientStore, LinearizedTraining
from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.files import to_json, write_atomically

PATH = RESULTS / "clipping_and_noise.json"


def fitted(store: GradientStore, left_out: str, *, probes: bool) -> FittedEstimator:
    """The default estimator without a term, ``"clipping"`` or ``"noise"``."""
    if left_out == "clipping":
        training = store.metadata["training"] | {"max_grad_norm": 0.0}
        store.metadata["training"] = training
    estimator = LinearizedTraining(probes=probes).fit(store)
    if left_out == "noise":
        estimator._model.target.noise = 0.0
    return estimator


def line(truth: Truth, left_out: str, *, probes: bool) -> dict[str, float]:
    """Agreement with ground truth."""
    estimator = fitted(gradients(truth.family, "continue"), left_out, probes=probes)
    estimate, is_left = estimator.estimate(truth.weights), truth.is_without_shuffled
    return {
        **measures(estimate.loss, truth.mean),
        **measures_in_nats(estimate.loss, truth.mean),
        "spearman_without_shuffled": measures(estimate.loss[is_left], truth.mean[is_left])[
            "spearman"
        ],
        "coverage": float(is_inside(estimate, truth.mean).mean()),
        "difference_coverage": coverage_of_differences(estimator, truth.weights, truth.mean),
    }


def main() -> None:
    """Measure, and add to what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", default=",".join(f for f in FAMILIES if f not in VARIANTS), metavar="a,b"
    )
    parser.add_argument("--write", metavar="NAME", help="write the present version's lines as NAME")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    record: dict[str, Any] = {"command": "python -m benchmarks.accuracy.clipping_and_noise"}
    if PATH.is_file():
        record = json.loads(PATH.read_text())
    names = {"default": "", "without clipping": "clipping", "without noise": "noise"}
    if options.write:
        names = {options.write: ""}
    for family in options.families.split(","):
        truth = read_truth(family, "continue")
        for name, left_out in names.items():
            for probes in (True, False):
                key = name + ("" if probes else ", no probes")
                found = line(truth, left_out, probes=probes)
                record.setdefault("families", {}).setdefault(family, {})[key] = found
                print(family, key, rounded(found))
        write_atomically(PATH, to_json(record))
    for key in next(iter(record["families"].values())):
        lines = [of[key] for of in record["families"].values() if key in of]
        means = {what: float(np.mean([of[what] for of in lines])) for what in lines[0]}
        print(f"mean of {len(lines)}", key, rounded(means))


def rounded(found: dict[str, float]) -> dict[str, float]:
    """For the eye."""
    return {what: round(value, 3) for what, value in found.items()}


if __name__ == "__main__":
    with_fixed_hashes()
    main()
