"""Records tiny runs, and what is estimated from their stores, for `tests/test_recorded.py`.

Run it (``PYTHONPATH=. python tests/recorded/record.py``) only when numbers are meant to change, and
say why in the commit. With ``--estimates`` the runs stay as they are, and are estimated anew.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiny
import torch

from hf_auxselect import (
    ForwardSelection,
    GaussNewton,
    GradExLogistic,
    GradientStore,
    KernelSurrogate,
    LinearizedTraining,
    RidgeSurrogate,
)

HERE = Path(__file__).parent
RUNS: dict[str, dict[str, Any]] = {
    "continue": {"calibrate": 3, "verify": 2},
    "restart": {"after": "restart"},
    "gauss_newton": {"estimator": GaussNewton()},
    "logistic": {"estimator": GradExLogistic()},
}
ESTIMATORS: dict[str, list[Any]] = {
    "continue": [LinearizedTraining(), RidgeSurrogate(), KernelSurrogate()],
    "restart": [LinearizedTraining()],
    "gauss_newton": [GaussNewton()],
    "logistic": [GradExLogistic()],
}
WEIGHTS = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 3, 1, 0], [0, 0, 0, 0]])


def train(name, directory):
    """A run whose files are kept."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cb = tiny.callback(selector=ForwardSelection(), **RUNS[name])
    tiny.trained(tiny.sft_trainer, directory, cb)
    return directory / "_task_selection"


def estimates(name, directory):
    """What every estimator says of the store of a run; lists of floats by estimator."""
    store = GradientStore.load(directory / "gradients")
    found = {}
    for estimator in ESTIMATORS[name]:
        fitted = estimator.fit(store)
        estimate = fitted.estimate(WEIGHTS)
        difference = fitted.difference(WEIGHTS[1:3], WEIGHTS[0])
        found[type(estimator).__name__] = {
            "loss": estimate.loss.tolist(),
            "low": estimate.low.tolist(),
            "high": estimate.high.tolist(),
            "difference": difference.loss.tolist(),
            "difference_high": difference.high.tolist(),
        }
    return found


if __name__ == "__main__":
    recorded = {}
    for name in RUNS:
        if "--estimates" not in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as scratch:
                files = train(name, Path(scratch))
                shutil.rmtree(HERE / name, ignore_errors=True)
                without = shutil.ignore_patterns("*.png", "*.svg", "*.html")
                shutil.copytree(files, HERE / name, ignore=without)
        recorded[name] = estimates(name, HERE / name)
    (HERE / "estimates.json").write_text(json.dumps(recorded, indent=1) + "\n")
