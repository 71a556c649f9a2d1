"""Estimates per second, next to a regression per subset and to the authors' forward passes.

A synthetic store of 38 tasks with 100 examples each (the size of the paper's Alpaca experiment),
256 target examples and 512 numbers per gradient; random halves of the tasks. In each repetition all
take their turn; the table gives medians. The regression is scikit-learn's, as the authors call it
(liblinear, C = 1e-4). Their loop then evaluates the moved model: a forward pass over the target,
here SmolLM2-135M and 64 examples of the arithmetic recipe, with logits at label positions only.

    pip install -e '.[bench]'
    python -m benchmarks.cost.estimate_time [--repetitions 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks import RESULTS
from benchmarks.cost.synthetic_store import synthetic_store
from benchmarks.families import FAMILIES
from hf_auxselect import GradExLogistic, GradientStore, LinearizedTraining
from hf_auxselect.capture.scalars import SCALARS, forward_label_logits
from hf_auxselect.files import to_json, write_atomically
from recipes.models import smollm2

NUM_TASKS, NUM_PER_TASK = 38, 100
NUM_SUBSETS = 1000
NUM_REGRESSIONS, NUM_FORWARDS = 20, 2


def regression(store: GradientStore) -> Callable[[np.ndarray], None]:
    """Solves one logistic regression on the gradients of a subset's examples."""
    gradients = store.scalar("margin")[1]
    labels = np.random.default_rng(0).random(len(gradients)) < 0.7

    def solve(mask: np.ndarray) -> None:
        rows = mask[store.task_ids]
        signed = np.where(labels[rows], 1, -1)[:, None] * gradients[rows]
        LogisticRegression(solver="liblinear", C=1e-4).fit(signed, labels[rows])

    return solve


def forward_pass() -> Callable[[], None]:
    """Runs SmolLM2 over 64 examples of the arithmetic target."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    rows = FAMILIES["arithmetic"].make_target(0)
    batch = dict(
        tokenizer(
            [row["prompt"] + row["completion"] for row in rows], padding=True, return_tensors="pt"
        )
    )
    prompts = torch.tensor([len(tokenizer(row["prompt"])["input_ids"]) for row in rows])
    positions = torch.arange(batch["input_ids"].shape[1])
    is_label = (positions >= prompts[:, None]) & (batch["attention_mask"] == 1)
    batch["labels"] = torch.where(is_label, batch["input_ids"], -100)

    def run() -> None:
        with torch.no_grad():
            SCALARS["loss"](forward_label_logits(model, batch))

    return run


def seconds(function: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    store = synthetic_store(0)
    masks = np.random.default_rng(1).random((NUM_SUBSETS, NUM_TASKS)) < 0.5
    linearized, logistic = LinearizedTraining().fit(store), GradExLogistic().fit(store)
    solve, forward = regression(store), forward_pass()
    # Each with the number of estimates that one call makes.
    methods: dict[str, tuple[Callable[[], Any], int]] = {
        "LinearizedTraining(), batch": (lambda: linearized.estimate(masks), NUM_SUBSETS),
        "LinearizedTraining(), one": (lambda: linearized.estimate(masks[:1]), 1),
        "GradExLogistic(), batch": (lambda: logistic.estimate(masks), NUM_SUBSETS),
        "scikit-learn, per subset": (
            lambda: [solve(mask) for mask in masks[:NUM_REGRESSIONS]],
            NUM_REGRESSIONS,
        ),
        "the same and a forward pass": (
            lambda: [(solve(mask), forward()) for mask in masks[:NUM_FORWARDS]],
            NUM_FORWARDS,
        ),
    }
    for function, _ in methods.values():
        function()  # warms up
    times = {name: [] for name in methods}  # type: dict[str, list[float]]
    for _ in range(options.repetitions):
        for name, (function, count) in methods.items():
            times[name].append(seconds(function) / count)
    medians = {name: float(np.median(own)) for name, own in times.items()}
    fastest = medians["LinearizedTraining(), batch"]
    print(f"{'':30} estimates/s  ms each  times the first")
    for name, median in medians.items():
        print(f"{name:30} {1 / median:11.1f}  {1000 * median:7.2f}  {median / fastest:15.1f}")
    record = {
        "command": f"python -m benchmarks.cost.estimate_time --repetitions {options.repetitions}",
        "tasks": NUM_TASKS,
        "examples": NUM_TASKS * NUM_PER_TASK,
        "target_examples": len(store.target),
        "dim": store.gradients.shape[1],
        "seconds_to_fit": round(seconds(lambda: LinearizedTraining().fit(store)), 3),
        "seconds_per_estimate": medians,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    write_atomically(RESULTS / "estimates.json", to_json(record))


if __name__ == "__main__":
    main()
