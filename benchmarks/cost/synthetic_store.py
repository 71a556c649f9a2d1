"""A store of random gradients, for benchmarks of what follows the gradient pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_auxselect import GradExLogistic, GradientStore, LinearizedTraining
from hf_auxselect.store.format import Arrays

NUM_TARGET = 256
SPECTRUM = np.exp(-np.arange(64) / 12)
"""Gradients have some leading axes, and noise around them."""


def synthetic_store(
    seed: int, *, num_tasks: int = 38, num_per_task: int = 100, dim: int = 512
) -> GradientStore:
    """Random gradients with what the default and the paper's estimator need, without probes.

    Args:
        seed: determines all numbers.
        num_tasks: number of tasks.
        num_per_task: number of captured examples of each, a tenth of its rows.
        dim: numbers per gradient.
    """
    rng = np.random.default_rng(seed)
    axes = SPECTRUM[:, None] * rng.normal(size=(len(SPECTRUM), dim))
    specs = (*LinearizedTraining.scalars, *GradExLogistic.scalars)

    def arrays(count: int) -> dict[str, Any]:
        def gradients() -> np.ndarray:
            inside = rng.normal(size=(count, len(axes))) @ axes
            return (inside + 0.05 * rng.normal(size=(count, dim))).astype(np.float32)

        outputs = rng.normal(size=count).astype(np.float32)
        return {
            "losses": np.logaddexp(0, -outputs),
            "num_label_tokens": rng.integers(1, 8, count),
            "scalars": {spec: (outputs, gradients()) for spec in specs},
        }

    vectors: Arrays = {
        name: rng.normal(size=dim).astype(np.float32) for name in ("momentum", "parameters")
    }
    return GradientStore(
        task_names=[f"task {k}" for k in range(num_tasks)],
        task_ids=np.repeat(np.arange(num_tasks), num_per_task),
        example_ids=np.arange(num_tasks * num_per_task),
        task_sizes=np.full(num_tasks, 10 * num_per_task),
        target=GradientStore(
            task_names=["target"],
            task_ids=np.zeros(NUM_TARGET, int),
            example_ids=np.arange(NUM_TARGET),
            **arrays(NUM_TARGET),
        ),
        metadata={
            "optimizer": {
                "learning_rate_factor": 1.0,
                "momentum_coefficient": 0.9,
                "weight_decay": 0.0,
                "steps_taken": 100,
            },
            "training": {
                "learning_rates": [1e-3] * 400,
                "max_grad_norm": 1.0,
                "examples_per_step": 16,
                "after": "continue",
            },
        },
        vectors=vectors,
        **arrays(num_tasks * num_per_task),
    )
