"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
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
        slope = -shares * np.exp(-np.logaddexp(0, margins))
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


def expected_gradient_norm(store: GradientStore, pooled: np.ndarray) -> float:
    """Root of E|g|^2 for the gradient g of a batch of rows drawn with probability ``pooled`` [K]."""
    counts = np.bincount(store.task_ids)
    chance = (pooled / counts)[store.task_ids]  # of each example to be drawn
    tokens, gradients = store.num_label_tokens, store.scalar("loss")[1].astype(np.float64)
    tokens_per_row = chance @ tokens
    mean = (chance * tokens) @ gradients / tokens_per_row
    second = chance @ (tokens**2 * (gradients**2).sum(1)) / tokens_per_row**2
    size = store.metadata["training"]["examples_per_step"]
    return float(np.sqrt(mean @ mean + (second - mean @ mean) / size))


def linearized_training(
    store: GradientStore, pooled: np.ndarray, *, rank: int, learning_rates: Sequence[float]
) -> float:
    """The estimate of ``LinearizedTraining`` for one mixture, by integrating its flow in time.

    ``pooled`` [K] are the shares of the tasks' rows in the mixture; they sum to 1.
    """
    optimizer, training = store.metadata["optimizer"], store.metadata["training"]
    target = store.target
    dim = store.gradients.shape[1]

    def curvature(part: GradientStore, weights: np.ndarray) -> np.ndarray:
        total = np.zeros((dim, dim))
        for weight, phi in zip(weights, part.scalar("sampled_loss@optimizer")[1], strict=True):
            total += weight * np.outer(phi.astype(np.float64), phi.astype(np.float64))
        return total

    share_in_task = np.array(
        [
            n / store.num_label_tokens[store.task_ids == k].sum()
            for n, k in zip(store.num_label_tokens, store.task_ids, strict=True)
        ]
    )
    tokens_per_row = [
        store.num_label_tokens[store.task_ids == k].mean() for k in range(len(pooled))
    ]
    w = pooled * tokens_per_row / (pooled @ tokens_per_row)
    # The leading axes, and the projector on them.
    overall = curvature(store, share_in_task / len(pooled))
    overall += curvature(target, target.example_weights)
    axes = np.linalg.svd(overall)[0][:, :rank]
    inside = axes @ axes.T

    def denoised(matrix: np.ndarray, *, keep_positive: bool) -> np.ndarray:
        """Within the axes, less what the projection adds to each eigenvalue."""
        values, vectors = np.linalg.eigh(axes.T @ matrix @ axes)
        values = values - np.trace(matrix) / dim
        if keep_positive:
            values = np.maximum(values, 0)
        return axes @ (vectors * values) @ vectors.T @ axes.T

    clip = 1.0
    if training.get("max_grad_norm"):
        clip = min(1.0, training["max_grad_norm"] / expected_gradient_norm(store, pooled))
    b = (w[store.task_ids] * share_in_task) @ store.scalar("loss@optimizer")[1].astype(np.float64)
    H = clip * denoised(curvature(store, w[store.task_ids] * share_in_task), keep_positive=True)
    decay = optimizer["weight_decay"]
    pull = clip * b + decay * store.vectors["parameters"].astype(np.float64)

    duration, start = 0.0, np.zeros(dim)
    for t, rate in enumerate(learning_rates, start=1):
        rate = rate * optimizer["learning_rate_factor"]
        late = 0 if training["after"] == "restart" else optimizer["momentum_coefficient"] ** t
        duration += rate * (1 - late)
        start -= rate * late * store.vectors["momentum"].astype(np.float64)
    if training["after"] == "restart":
        start = store.vectors["initial_displacement"].astype(np.float64)
    flow = solve_ivp(
        lambda _, delta: -pull - H @ delta - decay * (inside @ delta),
        (0, duration),
        start,
        method="LSODA",
        rtol=1e-10,
        atol=1e-12,
    )
    delta = flow.y[:, -1]
    target_b = target.example_weights @ target.scalar("loss@optimizer")[1].astype(np.float64)
    target_H = denoised(curvature(target, target.example_weights), keep_positive=False)
    bend = max(delta @ target_H @ delta / 2, 0.0)
    return max(float(target.example_weights @ target.losses + target_b @ delta + bend), 0.0)


def random_store(
    seed: int = 0,
    *,
    counts: Sequence[int] = (7, 12, 5),
    num_target: int = 9,
    dim: int = 6,
    after: str = "continue",
    max_grad_norm: float = 1.0,
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
                name: (outputs, rng.normal(size=(count, dim)).astype(np.float32))
                for name in ("margin", "loss", "loss@optimizer", "sampled_loss@optimizer")
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
        metadata={
            "optimizer": {
                "learning_rate_factor": 1.0,
                "momentum_coefficient": 0.9,
                "weight_decay": 0.01,
            },
            "training": {
                "learning_rates": [0.02, 0.01, 0.005],
                "max_grad_norm": max_grad_norm,
                "examples_per_step": 4,
                "after": after,
            },
        },
        vectors={
            name: rng.normal(size=dim).astype(np.float32)
            for name in ("momentum", "parameters", "initial_displacement")
        },
        **arrays(sum(counts)),
    )
