"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from hf_auxselect.store import GradientStore


def margin_of_example(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over label tokens of log p - log(1 - p), token by token, for a batch of one."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    labels = batch["labels"][0]
    margins = []
    for position in range(1, len(labels)):
        if labels[position] != -100:
            probability = logits[position - 1].double().softmax(-1)[labels[position]]
            margins.append(torch.log(probability) - torch.log1p(-probability))
    return torch.stack(margins).mean()


def loss_of_example(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss on a batch of one: nats per label token."""
    return model(**batch).loss


def per_example_gradients(
    model: torch.nn.Module,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    scalar: Callable[[torch.nn.Module, Any], torch.Tensor] = margin_of_example,
) -> list[dict[str, torch.Tensor]]:
    """The gradient of every trainable parameter, one example at a time."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for row in rows:
        values = torch.autograd.grad(
            scalar(model, collate([row])), list(trainable.values()), allow_unused=True
        )
        gradients.append(
            {
                name: torch.zeros_like(p) if value is None else value
                for (name, p), value in zip(trainable.items(), values, strict=True)
            }
        )
    return gradients


def logistic_displacement(
    outputs: np.ndarray, gradients: np.ndarray, shares: np.ndarray, regularization: float
) -> np.ndarray:
    """argmin_w sum_i a_i log(1 + exp(-(f_i + g_i . w))) + regularization |w|^2, by SciPy."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = outputs + gradients @ w
        losses = np.logaddexp(0, -margins)
        slope = -shares / (1 + np.exp(margins))
        value = shares @ losses + regularization * w @ w
        return float(value), gradients.T @ slope + 2 * regularization * w

    result = minimize(
        objective,
        np.zeros(gradients.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-12},
    )
    return result.x


def logistic_estimate(store: GradientStore, mask: np.ndarray, regularization: float) -> float:
    """The estimate of ``GradExLogistic`` for one subset of tasks, from its definition."""
    chosen = mask[store.task_ids]
    w = logistic_displacement(
        store.outputs[chosen].astype(np.float64),
        store.gradients[chosen].astype(np.float64),
        np.full(chosen.sum(), 1 / chosen.sum()),
        regularization,
    )
    total = 0.0
    target = store.target
    for output, gradient, loss, weight in zip(
        target.outputs, target.gradients, target.losses, target.example_weights, strict=True
    ):
        before = np.logaddexp(0, -float(output))
        after = np.logaddexp(0, -(float(output) + gradient.astype(np.float64) @ w))
        total += weight * (float(loss) + after - before)
    return total


def random_store(
    seed: int = 0, *, counts: Sequence[int] = (7, 12, 5), num_target: int = 9, dim: int = 6
) -> GradientStore:
    """A store of random numbers with the structure of a real one."""
    rng = np.random.default_rng(seed)

    def arrays(count: int) -> dict[str, Any]:
        outputs = rng.normal(0.5, 1.5, count).astype(np.float32)
        gap = rng.exponential(0.2, count).astype(np.float32)
        return {
            "losses": np.logaddexp(0, -outputs) + gap,
            "num_label_tokens": rng.integers(1, 5, count),
            "scalars": {
                "margin": (outputs, rng.normal(size=(count, dim)).astype(np.float32)),
            },
        }

    target = GradientStore(
        task_names=["target"],
        task_ids=np.zeros(num_target),
        example_ids=np.arange(num_target),
        **arrays(num_target),
    )
    return GradientStore(
        task_names=[f"task{k}" for k in range(len(counts))],
        task_ids=np.repeat(np.arange(len(counts)), counts),
        example_ids=np.arange(sum(counts)),
        target=target,
        **arrays(sum(counts)),
    )
