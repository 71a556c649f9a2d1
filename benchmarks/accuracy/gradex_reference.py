"""GradEx as published, to compare with: the authors' procedure, and a forward pass at its end.

Written anew from what their scripts do, for the families of ``families.py`` and from the warm-up's
checkpoint. It departs from the paper's text, and from ``GradExLogistic``, in what it leaves out
(the model's own outputs) and adds (random labels, a prescribed step length):

1. f_i is the mean over the label tokens of example i of log p/(1 - p); its gradient with respect to
   the adapter is projected, g_i = P^T grad f_i, where P [parameters, d] has entries +-1/sqrt(d) and
   d = 200.
2. For a mixture, labels y_i = 1 with probability 0.7, 0 otherwise, are drawn at random; a logistic
   regression of y_i on (2 y_i - 1) g_i, with intercept and an L2 penalty (C = 1e-4, liblinear), has
   the coefficients w [d].
3. The parameters move to theta + scale |theta| P w / |P w|, where theta is the whole adapter, and
   the target's loss there, nats per label token, is the estimate.

The scripts know subsets only: an example of a mixture with other weights counts in proportion to
its share, and as 1 on average. What comes after the switch does not enter, so that the estimates
for ``continue`` and ``restart`` are the same. P is drawn again, parameter by parameter, whenever it
is needed: nothing of its size is in memory.

    python -m benchmarks.accuracy.gradex_reference [--families small]
        [--modes continue] [--scale 0.4]

Shapes: N examples, B of a batch, K tasks, M mixtures, P entries of one parameter, d.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

from benchmarks import RESULTS
from benchmarks.accuracy.baselines import Array, trainer_at_switch
from benchmarks.accuracy.ground_truth import TRUTH, warm_up
from benchmarks.families import FAMILIES
from hf_auxselect import (
    AbstractEstimator,
    Estimate,
    FittedEstimator,
    ForwardSelection,
    GradientStore,
    SelectionProblem,
)
from hf_auxselect.capture.check import check_per_example_gradients
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import SCALARS, at_least_float32, forward_label_logits
from hf_auxselect.estimators import normalize_mixtures
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.seeds import random_words
from hf_auxselect.trainer.data import collate_function

MEASURED = RESULTS / "gradex_reference"

PROJECTION_DIM = 200
SHARE_OF_ONES = 0.7
INVERSE_PENALTY = 1e-4
ROWS_PROJECTED_AT_ONCE = 64
"""Rows whose gradients are in memory at once (630 MB for SmolLM2's adapter)."""

SCALES = (0.4, 0.1)
"""Lengths of the step as shares of the adapter's norm: the scripts' default, and a short one."""


@dataclass(frozen=True, kw_only=True)
class Rademacher:
    """A random matrix with entries +-1/sqrt(dim), a block [P, dim] of rows for every parameter."""

    dim: int
    seed: int

    def block(self, name: str, num_entries: int) -> Tensor:
        """float32 [P, dim]: the rows of a parameter; they depend on its name and the seed alone."""
        num_signs = num_entries * self.dim
        words = random_words(-(-num_signs // 64), "rademacher", self.seed, name)
        # Little-endian, so that the signs are the same on every platform.
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=num_signs)
        signs = torch.from_numpy(bits).float().mul_(2.0).sub_(1.0)
        return signs.mul_(self.dim**-0.5).view(num_entries, self.dim)


def trainable(trainer: SFTTrainer) -> dict[str, Tensor]:
    """The adapter's parameters, by name."""
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def projected_margins(trainer: SFTTrainer, rows: Any, projection: Rademacher) -> Array:
    """Projected gradients float64 [N, d] of the examples' mean-token margins."""
    model, parameters = trainer.model, trainable(trainer)
    collate, size = collate_function(trainer), trainer.args.per_device_train_batch_size
    check_per_example_gradients(model, [rows[0], rows[len(rows) - 1]], collate)
    received: dict[str, list[Tensor]] = {name: [] for name in parameters}

    def receive(name: str, gradients: Tensor) -> None:
        received[name].append(at_least_float32(gradients).flatten(1))

    def project() -> Array:
        parts = [
            torch.cat(gradients) @ projection.block(name, gradients[0].shape[1])
            for name, gradients in received.items()
        ]
        for gradients in received.values():
            gradients.clear()
        return torch.stack(parts).sum(0).double().numpy()

    chunks = []
    with evaluation_mode(model), GradientHooks(model, receive) as hooks:
        for start in range(0, len(rows), size):
            batch = [rows[i] for i in range(start, min(start + size, len(rows)))]
            hooks.batch_size = len(batch)
            margins = SCALARS["margin"](forward_label_logits(model, collate(batch)))
            torch.autograd.grad(margins.sum(), list(parameters.values()))
            end = start + len(batch)
            # To draw the matrix for every batch would take longer than the gradients.
            if end == len(rows) or end % ROWS_PROJECTED_AT_ONCE < size:
                chunks.append(project())
    return np.concatenate(chunks)


def regress(gradients_Nd: Array, weights_N: Array, labels_N: Array) -> Array:
    """Coefficients float64 [d] of the logistic regression on randomly signed gradients.

    Args:
        gradients_Nd: projected gradients.
        weights_N: how much an example counts; 1 on average over those that count.
        labels_N: booleans, drawn at random.
    """
    from sklearn.linear_model import LogisticRegression

    taken = weights_N > 0
    signs_N = np.where(labels_N, 1.0, -1.0)
    regression = LogisticRegression(C=INVERSE_PENALTY, solver="liblinear", random_state=0)
    regression.fit(
        signs_N[taken, None] * gradients_Nd[taken], labels_N[taken], sample_weight=weights_N[taken]
    )
    return regression.coef_[0]


def example_weights(shares_K: Array, task_ids_N: Array) -> Array:
    """How much each example counts [N]: by its task's share, and as 1 on average if it does."""
    counts_K = np.bincount(task_ids_N, minlength=len(shares_K))
    weights_N = (shares_K / counts_K)[task_ids_N]
    return weights_N * np.count_nonzero(weights_N) / weights_N.sum()


def direction(projection: Rademacher, parameters: dict[str, Tensor], w_d: Array) -> list[Tensor]:
    """P w, in the shapes of the parameters, with a norm of 1 over all of them."""
    w = torch.from_numpy(w_d / np.linalg.norm(w_d)).float()
    parts = [
        (projection.block(name, p.numel()) @ w).view(p.shape) for name, p in parameters.items()
    ]
    length = norm(parts)
    return [part / length for part in parts]


def norm(tensors: list[Tensor]) -> float:
    """Euclidean norm over all of them."""
    return float(np.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors)))


@dataclass(frozen=True, kw_only=True)
class GradExAsPublished(AbstractEstimator):
    """The losses that ``main`` has measured, with the interface of an estimator.

    Args:
        family: of ``families.py``.
        scale: length of the step, as a share of the adapter's norm.
        seed: of the projection and the labels.
    """

    scalars: ClassVar[tuple[str, ...]] = ()
    family: str
    scale: float
    seed: int = 0

    def fit(self, store: GradientStore) -> FittedEstimator:
        path = MEASURED / f"{self.family}.json"
        record = json.loads(path.read_text()) if path.is_file() else {"runs": []}
        runs = [r for r in record["runs"] if (r["scale"], r["seed"]) == (self.scale, self.seed)]
        return _Measured(runs, store)


class _Measured(FittedEstimator):
    def __init__(self, runs: list[dict[str, Any]], store: GradientStore) -> None:
        self._sizes = store.task_sizes
        self._weights = normalize_mixtures(
            np.reshape([run["weights"] for run in runs], (len(runs), len(self._sizes))), self._sizes
        )
        self._losses = np.array([run["loss"] for run in runs])
        self._seconds = [run["seconds"] for run in runs]

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK = normalize_mixtures(weights, self._sizes)
        positions = [self._find(shares) for shares in shares_MK]
        loss = self._losses[positions]
        return Estimate(loss=loss, low=loss, high=loss, weights=shares_MK)

    def _find(self, shares: Array) -> int:
        matches = np.flatnonzero(np.isclose(self._weights, shares, rtol=0, atol=1e-5).all(1))
        if not len(matches):
            raise KeyError(
                f"the mixture {shares.round(3).tolist()} was not measured; run "
                "benchmarks.accuracy.gradex_reference again, which adds what is missing."
            )
        return int(matches[0])

    def diagnostics(self) -> dict[str, float]:
        return {"seconds_per_estimate": float(np.mean(self._seconds))}


def measured_scales(family: str, weights: Array) -> list[float]:
    """Scales at which all mixtures [M, K] have been measured, with the seed 0."""
    path = MEASURED / f"{family}.json"
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    measured: dict[float, list[list[float]]] = {}
    for run in runs:
        if run["seed"] == 0:
            measured.setdefault(run["scale"], []).append(run["weights"])
    wanted = {tuple(row) for row in weights.tolist()}
    return [scale for scale in measured if wanted <= {tuple(row) for row in measured[scale]}]


def mixtures_of_truth(family: str, modes: list[str]) -> list[list[float]]:
    """The mixtures whose truth has been measured, each once."""
    rows: dict[tuple[float, ...], None] = {}
    for mode in modes:
        path = TRUTH / f"{family}-{mode}.json"
        for run in json.loads(path.read_text())["runs"] if path.is_file() else []:
            rows[tuple(run["weights"])] = None
    return [list(row) for row in rows]


def run_family(family: str, modes: list[str], scales: list[float], seed: int) -> None:
    """Measure what is missing of the mixtures' losses, and write each as it is known."""
    path = MEASURED / f"{family}.json"
    adapter = (warm_up(family) / "adapter_model.safetensors").read_bytes()
    record: dict[str, Any] = {
        "family": family,
        "tasks": list(FAMILIES[family].tasks),
        "unit": "nats per label token, the trainer's eval_loss",
        "command": "python -m benchmarks.accuracy.gradex_reference",
        "projection_dim": PROJECTION_DIM,
        "share_of_ones": SHARE_OF_ONES,
        "C": INVERSE_PENALTY,
        "checkpoint_sha256": hashlib.sha256(adapter).hexdigest(),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "trl", "peft", "accelerate", "scikit-learn")
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": [],
    }
    if path.is_file():
        before = json.loads(path.read_text())
        # From another checkpoint, the losses would not belong together.
        if before["checkpoint_sha256"] == record["checkpoint_sha256"]:
            record["runs"] = before["runs"]
    done = {(tuple(run["weights"]), run["scale"], run["seed"]) for run in record["runs"]}
    missing = {
        tuple(row): [scale for scale in scales if (tuple(row), scale, seed) not in done]
        for row in mixtures_of_truth(family, modes)
    }
    missing = {row: left for row, left in missing.items() if left}
    if not missing:
        return
    with trainer_at_switch(family) as trainer:
        _run_mixtures(trainer, record, missing, seed, path)


def _run_mixtures(
    trainer: SFTTrainer,
    record: dict[str, Any],
    missing: dict[tuple[float, ...], list[float]],
    seed: int,
    path: Path,
) -> None:
    steps = PrescribedSteps(trainer, record["tasks"], seed)
    record |= {
        "num_parameters": sum(p.numel() for p in steps.start_values),
        "adapter_norm": steps.adapter_norm,
        "switch_loss": round(trainer.evaluate()["eval_loss"], 6),
        "seconds_of_capture": round(steps.seconds_of_capture, 1),
    }
    for weights, scales in missing.items():
        for run in steps.measure(weights, scales):
            record["runs"].append(run)
            write_atomically(path, to_json(record))
            print(f"{record['family']} scale {run['scale']}: {run['loss']:.4f}", flush=True)


class PrescribedSteps:
    """Moves a trainer's adapter as the scripts do, and measures the target's loss there."""

    def __init__(self, trainer: SFTTrainer, tasks: Sequence[str], seed: int) -> None:
        trainer.remove_callback(PrinterCallback)
        self._trainer, self._seed = trainer, seed
        self._projection = Rademacher(dim=PROJECTION_DIM, seed=seed)
        self._parameters = trainable(trainer)
        self.start_values = [p.detach().clone() for p in self._parameters.values()]
        self.adapter_norm = norm(self.start_values)
        start = time.perf_counter()
        self._gradients_Nd = projected_margins(trainer, trainer.train_dataset, self._projection)
        self.seconds_of_capture = time.perf_counter() - start
        position = {name: k for k, name in enumerate(tasks)}
        self.task_ids_N = np.array([position[name] for name in trainer.train_dataset["task"]])

    def measure(self, weights: Sequence[float], scales: list[float]) -> Iterator[dict[str, Any]]:
        """The target's loss of a mixture [K] at each length of the step, with its particulars."""
        start = time.perf_counter()
        weights_N = example_weights(np.array(weights), self.task_ids_N)
        words = random_words(len(weights_N), "random labels", self._seed, tuple(weights))
        labels_N = words < SHARE_OF_ONES * 2.0**64
        w_d = regress(self._gradients_Nd, weights_N, labels_N)
        mean_d = weights_N @ self._gradients_Nd
        cosine = float(w_d @ mean_d / np.linalg.norm(w_d) / np.linalg.norm(mean_d))
        step = direction(self._projection, self._parameters, w_d)
        seconds_of_step = time.perf_counter() - start
        for scale in scales:
            start = time.perf_counter()
            _move(self._parameters, self.start_values, step, scale * self.adapter_norm)
            yield {
                "weights": list(weights),
                "scale": scale,
                "seed": self._seed,
                "loss": round(self._trainer.evaluate()["eval_loss"], 6),
                "cosine_to_mean_gradient": round(cosine, 4),
                "seconds": round(seconds_of_step + time.perf_counter() - start, 3),
            }


def forward_selection(family: str, scale: float = SCALES[0], seed: int = 0) -> Array:
    """Weights [K] of the subset that forward selection on these estimates chooses."""
    tasks = FAMILIES[family].tasks
    with trainer_at_switch(family) as trainer:
        steps = PrescribedSteps(trainer, tasks, seed)

        sizes_K = np.bincount(steps.task_ids_N)

        def estimate(masks: ArrayLike) -> Estimate:
            shares_MK = normalize_mixtures(masks, sizes_K)
            runs = [next(steps.measure(row.tolist(), [scale])) for row in shares_MK]
            loss_M = np.array([run["loss"] for run in runs])
            return Estimate(loss=loss_M, low=loss_M, high=loss_M, weights=shares_MK)

        selection = ForwardSelection().select(SelectionProblem(estimate, tasks, sizes_K.tolist()))
    return np.array([selection.weights[name] for name in tasks])


def _move(
    parameters: dict[str, Tensor], start_values: list[Tensor], step: list[Tensor], length: float
) -> None:
    """Set the parameters to start_values + length * step."""
    with torch.no_grad():
        for parameter, start, part in zip(parameters.values(), start_values, step, strict=True):
            parameter.copy_(start + length * part)


def main() -> None:
    """Measure the mixtures whose truth is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small", metavar="a,b")
    parser.add_argument("--modes", default="continue,restart")
    parser.add_argument("--scale", type=float, help="default: " + " and ".join(map(str, SCALES)))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    scales = list(SCALES) if options.scale is None else [options.scale]
    for family in options.families.split(","):
        run_family(family, options.modes.split(","), scales, options.seed)


if __name__ == "__main__":
    main()
