"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from hf_auxselect.store.arrays import GradientStore


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


def layer_scores(gradients: np.ndarray, tokens: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Scores of one layer, from its gradients [T, P], by their definitions."""
    shares = tokens / tokens.sum()
    mean = sum(share * g for share, g in zip(shares, gradients, strict=True))
    noise = sum(s * np.sum((g - mean) ** 2) for s, g in zip(shares, gradients, strict=True))
    noise /= 1 - np.sum(shares**2)
    signal = mean @ mean - np.sum(shares**2) * noise
    halves = []
    for first in (0, 1):
        fitted, other = gradients[first::2], gradients[1 - first :: 2]
        ridge = 0.01 * np.sum(fitted**2)
        direction = np.linalg.solve(
            fitted.T @ fitted + ridge * np.eye(fitted.shape[1]), fitted.T @ np.ones(len(fitted))
        )
        decreases = other @ direction
        halves.append(max(np.mean(decreases), 0) ** 2 / np.mean(decreases**2))
    return {
        "rgn": float(np.linalg.norm(mean) / np.linalg.norm(weight)),
        "snr": float(signal / noise),
        "cross_validation": float(np.mean(halves)),
    }


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


def clipping_factor(store: GradientStore, pooled: np.ndarray) -> float:
    """The factor for gradients of batches of the mean square length, from every pair of rows."""
    limit, size = (store.metadata["training"][n] for n in ("max_grad_norm", "examples_per_step"))
    if not limit:
        return 1.0
    rows = store.num_label_tokens[:, None] * store.scalar("loss")[1].astype(np.float64)
    chance = (pooled / np.bincount(store.task_ids))[store.task_ids]
    total = chance @ store.num_label_tokens
    square = 0.0
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            both = chance[i] * chance[j] * (1 - 1 / size) + chance[i] * (i == j) / size
            square += both * (one @ other) / total**2
    return float(min(1.0, limit / np.sqrt(square)))


def krylov_axes(starts: Sequence[np.ndarray], matrix: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal basis [D, R] of the starts, H times them, H^2 times them, ..., cut at R."""
    axes = np.zeros((len(matrix), 0))
    block = list(starts)
    while axes.shape[1] < min(rank, len(matrix)):
        outside = np.eye(len(matrix)) - axes @ axes.T
        unit = [outside @ (v / np.linalg.norm(v)) for v in block if v.any()]
        directions, sizes, _ = np.linalg.svd(np.array(unit).T.reshape(len(matrix), -1))
        new = directions[:, : (sizes > 1e-7).sum()][:, : rank - axes.shape[1]]
        if not new.size:
            break
        axes = np.hstack([axes, new])
        block = list((matrix @ new).T)
    return axes if axes.size else np.eye(len(matrix))[:, :1]


def symmetric_basis(size: int) -> list[np.ndarray]:
    """An orthonormal basis of the symmetric matrices."""
    basis = []
    for i in range(size):
        for j in range(i + 1):
            matrix = np.zeros((size, size))
            matrix[i, j] = matrix[j, i] = 1.0
            basis.append(matrix / np.linalg.norm(matrix))
    return basis


def least_symmetric_change(vector: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The symmetric matrix A of the smallest Frobenius norm with A vector = change."""
    basis = symmetric_basis(len(vector))
    columns = np.array([matrix @ vector for matrix in basis]).T
    return np.tensordot(np.linalg.lstsq(columns, change, rcond=None)[0], basis, 1)


def secant_correction(
    matrix: np.ndarray,
    b: np.ndarray,
    axes: np.ndarray,
    displacement: np.ndarray,
    change: np.ndarray,
) -> np.ndarray:
    """What makes a task's curvature agree, within the axes, half with a change of its gradient b."""
    if np.linalg.norm(axes.T @ change) <= 0.01 * np.linalg.norm(axes.T @ b):
        return np.zeros_like(matrix)
    noise = np.trace(matrix) / len(matrix) * np.eye(axes.shape[1])
    before = axes.T @ matrix @ axes - noise
    v, measured = axes.T @ displacement, axes.T @ change
    after = before + least_symmetric_change(v, (measured + before @ v) / 2 - before @ v)
    values, vectors = np.linalg.eigh(after)
    values = np.maximum(values, min(np.linalg.eigvalsh(before)[0], 0.0))
    return axes @ ((vectors * values) @ vectors.T - before) @ axes.T


def ends_correction(
    matrix: np.ndarray,
    axes: np.ndarray,
    target: GradientStore,
    ahead: dict[str, np.ndarray],
) -> np.ndarray:
    """What makes the target's curvature agree, within the axes, with its measured losses."""
    ends, changes = (ahead[name].astype(np.float64) for name in ("ends", "end_changes"))
    count = changes.shape[1]
    read = [i * (len(target) - 1) // (count - 1) for i in range(count)]
    weights = target.example_weights[read] / target.example_weights[read].sum()
    gradients = target.scalar("loss@optimizer")[1].astype(np.float64)[read]
    # In coordinates in which changes of the curvature are equally cheap in all directions.
    values, vectors = np.linalg.eigh(axes.T @ matrix @ axes)
    to_them = (vectors * np.abs(values) ** 0.25) @ vectors.T @ axes.T
    penalty = 0.3 * np.mean([np.linalg.norm(to_them @ end) ** 4 for end in ends])
    basis, rows, missed = symmetric_basis(axes.shape[1]), [], []
    for end, change in zip(ends, changes, strict=True):
        inner = to_them @ end
        rows.append([inner @ part @ inner / 2 for part in basis])
        missed.append(weights @ (change - gradients @ end) - end @ matrix @ end / 2)
    rows += list(np.sqrt(penalty / 4) * np.eye(len(basis)))
    values = np.linalg.lstsq(np.array(rows), np.array(missed + [0.0] * len(basis)), rcond=None)[0]
    return to_them.T @ np.tensordot(values, basis, 1) @ to_them


def linearized_training(
    store: GradientStore, pooled: np.ndarray, *, rank: int | None, learning_rates: Sequence[float]
) -> float:
    """The estimate of ``LinearizedTraining`` for one mixture, step by step in all D dimensions.

    ``pooled`` [K] are the shares of the tasks' rows in the mixture; they sum to 1.
    """
    optimizer, target = store.metadata["optimizer"], store.target
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
    steps_taken = optimizer["steps_taken"]
    gradients = store.scalar("loss@optimizer")[1].astype(np.float64)
    target_b = target.example_weights @ target.scalar("loss@optimizer")[1].astype(np.float64)
    parameters = store.vectors["parameters"].astype(np.float64)
    momentum = store.vectors["momentum"].astype(np.float64)

    starts = [share_in_task * (store.task_ids == k) @ gradients for k in range(len(pooled))]
    starts += [target_b, momentum, parameters if optimizer["weight_decay"] else np.zeros(dim)]
    looks_ahead = "second_points" in store.vectors
    if looks_ahead:
        second_points = store.vectors["second_points"].astype(np.float64)
        starts.append(second_points.mean(0))
    overall = curvature(store, share_in_task / len(pooled))
    overall += curvature(target, target.example_weights)
    if rank is None:
        rank = min(96, len(store) // len(pooled))
    axes = krylov_axes(starts, overall, rank)

    everything = store.task_sizes / store.task_sizes.sum()
    clip = clipping_factor(store, everything)
    w = clip * w
    beta, decay = optimizer["momentum_coefficient"], optimizer["weight_decay"]
    rates = np.array(learning_rates) * optimizer["learning_rate_factor"]
    # Training has just begun to converge along this curvature.
    slowest = 1 / sum(rate * (1 - beta**t) for t, rate in enumerate(rates, start=1))

    corrections = np.zeros((len(w), dim, dim))
    if looks_ahead:
        for k in range(len(w)):
            own = curvature(store, share_in_task * (store.task_ids == k))
            change = store.vectors["gradient_changes"][k].astype(np.float64)
            corrections[k] = secant_correction(own, starts[k], axes, second_points[k], change)

    def denoised(matrix: np.ndarray, *, least: float, correction: Any = 0.0) -> np.ndarray:
        """Within the axes, less what the projection adds to each eigenvalue; 0 outside."""
        noise = np.trace(matrix) / dim
        values, vectors = np.linalg.eigh(axes.T @ (matrix + correction) @ axes)
        return axes @ (vectors * np.maximum(values - noise, least)) @ vectors.T @ axes.T

    b = (w[store.task_ids] * share_in_task) @ gradients

    def mixed(weights: np.ndarray) -> np.ndarray:
        overall = curvature(store, weights[store.task_ids] * share_in_task)
        correction = np.tensordot(weights, corrections, 1)
        return denoised(overall, least=-slowest, correction=correction)

    H = mixed(w)
    delta = np.zeros(dim)
    if steps_taken is not None:
        momentum = momentum * (1 - beta**steps_taken)
    for t, rate in enumerate(rates, start=1):
        momentum = beta * momentum + (1 - beta) * (b + H @ delta)
        divisor = 1 if steps_taken is None else 1 - beta ** (steps_taken + t)
        delta = delta - rate * (momentum / divisor + decay * (parameters + delta))
    target_H = denoised(curvature(target, target.example_weights), least=-np.inf)
    if looks_ahead:
        target_H = target_H + ends_correction(target_H, axes, target, store.vectors)

    bend = delta @ target_H @ delta / 2
    if not looks_ahead:
        bend = max(bend, 0.0)
    return max(float(target.example_weights @ target.losses + target_b @ delta + bend), 0.0)


def gauss_newton(
    store: GradientStore, pooled: np.ndarray, *, curvature: str, damping: float, rank: int | None
) -> float:
    """The estimate of ``GaussNewton`` for one mixture, with whole matrices.

    ``pooled`` [K] are the shares of the tasks' rows in the mixture; they sum to 1 or are 0.
    """
    target, dim = store.target, store.gradients.shape[1]

    def second_moment(part: GradientStore, weights: np.ndarray) -> np.ndarray:
        name = "loss" if curvature == "empirical" else "sampled_loss"
        total = np.zeros((dim, dim))
        for weight, g, n in zip(weights, part.scalar(name)[1], part.num_label_tokens, strict=True):
            tokens = n if curvature == "empirical" else 1
            total += weight * tokens * np.outer(g.astype(np.float64), g.astype(np.float64))
        return total

    def by_tokens(rows: np.ndarray) -> np.ndarray:
        """Share of each example in the loss of a mixture of rows."""
        counts = np.bincount(store.task_ids)
        tokens = (rows / counts)[store.task_ids] * store.num_label_tokens
        return tokens / tokens.sum()

    each = [second_moment(store, by_tokens(row)) for row in np.eye(len(pooled))]
    target_H = second_moment(target, target.example_weights)
    target_b = target.example_weights @ target.scalar("loss")[1].astype(np.float64)
    gradients = store.scalar("loss")[1].astype(np.float64)
    starts = [by_tokens(row) @ gradients for row in np.eye(len(pooled))]
    if rank is None:
        rank = min(96, len(store) // len(pooled))
    axes = krylov_axes([*starts, target_b], sum(each) / len(each) + target_H, rank)
    inside = axes @ axes.T

    def denoised(matrix: np.ndarray, *, keep_positive: bool) -> np.ndarray:
        """Within the axes, less what the projection adds to each eigenvalue; 0 outside."""
        within = inside @ (matrix - np.trace(matrix) / dim * np.eye(dim)) @ inside
        values, vectors = np.linalg.eigh(within)
        if keep_positive:
            values = np.maximum(values, 0.0)
        return (vectors * values) @ vectors.T

    sizes = store.task_sizes / store.task_sizes.sum()
    everything = inside @ second_moment(store, by_tokens(sizes)) @ inside
    matrix, b = damping * np.linalg.eigvalsh(everything)[-1] * np.eye(dim), np.zeros(dim)
    if pooled.any():
        shares = by_tokens(pooled)
        matrix = matrix + denoised(second_moment(store, shares), keep_positive=True)
        b = shares @ gradients
    delta = -np.linalg.solve(matrix, b)
    bend = max(delta @ denoised(target_H, keep_positive=False) @ delta / 2, 0.0)
    return max(float(target.example_weights @ target.losses + target_b @ delta + bend), 0.0)


def ridge_on_roots(
    shares: np.ndarray, losses: np.ndarray, asked: np.ndarray, *, penalty: float
) -> np.ndarray:
    """Linear ridge regression on the roots of shares at ``asked`` [Q, K], from its normal equations.

    The features are scaled so that their mean squared deviation is 1.
    """
    roots, roots_asked = np.sqrt(shares), np.sqrt(asked)
    scale = ((roots - roots.mean(0)) ** 2).sum(1).mean()
    return solve_kernel_ridge(
        roots @ roots.T / scale, losses, roots_asked @ roots.T / scale, penalty
    )


def matern(one: np.ndarray, other: np.ndarray, rates: np.ndarray) -> float:
    """The Matern kernel of smoothness 5/2 of two mixtures [K]."""
    r = np.sqrt(5 * sum(rates * (np.sqrt(one) - np.sqrt(other)) ** 2))
    return float((1 + r + r**2 / 3) * np.exp(-r))


def log_posterior(
    shares: np.ndarray, losses: np.ndarray, logs: np.ndarray, *, deviation: float, least: float
) -> float:
    """Of the logarithms of factors of rates, their common rate, signal and noise, up to a constant."""
    roots, y = np.sqrt(shares), (losses - losses.mean()) / losses.std()
    rates = np.exp(logs[:-3] + logs[-3]) / (2 * roots.var(0).mean())
    signal, noise = np.exp(logs[-2:])
    K = np.array([[matern(one, other, rates) for other in shares] for one in shares])
    C = signal * K + (noise + least) * np.eye(len(y)) + 1.0
    likelihood = -0.5 * (y @ np.linalg.solve(C, y) + np.linalg.slogdet(C)[1])
    return float(likelihood - 0.5 * (logs**2).sum() / deviation**2)


def solve_kernel_ridge(
    K: np.ndarray, losses: np.ndarray, K_asked: np.ndarray, penalty: float
) -> np.ndarray:
    """Kernel ridge with an intercept that has no penalty: prediction at the asked points."""
    count = len(K)
    system = np.block([[K + penalty * np.eye(count), np.ones((count, 1))], [np.ones(count), 0.0]])
    solution = np.linalg.solve(system, np.append(losses, 0.0))
    return K_asked @ solution[:-1] + solution[-1]


def random_store(
    seed: int = 0,
    *,
    counts: Sequence[int] = (7, 12, 5),
    num_target: int = 9,
    dim: int = 6,
    after: str = "continue",
    max_grad_norm: float = 1.0,
    steps_taken: int | None = 7,
    look_ahead: bool = False,
) -> GradientStore:
    """A store of random numbers with the structure of a real one."""
    rng = np.random.default_rng(seed)
    other_rng = np.random.default_rng([seed, 1])  # leaves the other numbers as they were

    def arrays(count: int) -> dict[str, Any]:
        outputs = rng.normal(0.5, 1.5, count).astype(np.float32)
        gap = rng.exponential(0.2, count).astype(np.float32)
        return {
            "losses": np.logaddexp(0, -outputs) + gap,
            "num_label_tokens": rng.integers(1, 5, count),
            "scalars": {
                name: (outputs, rng.normal(size=(count, dim)).astype(np.float32))
                for name in ("margin", "loss", "loss@optimizer", "sampled_loss@optimizer")
            }
            | {"sampled_loss": (outputs, other_rng.normal(size=(count, dim)).astype(np.float32))},
        }

    ahead: dict[str, np.ndarray] = {}
    if look_ahead:
        ahead_rng = np.random.default_rng([seed, 2])
        ahead = {
            "second_points": ahead_rng.normal(size=(len(counts), dim)),
            "gradient_changes": ahead_rng.normal(size=(len(counts), dim)),
            "ends": ahead_rng.normal(size=(4, dim)),
            "end_changes": ahead_rng.normal(size=(4, num_target - 2)),
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
                "steps_taken": steps_taken,
            },
            "training": {
                "learning_rates": [0.02, 0.01, 0.005],
                "max_grad_norm": max_grad_norm,
                "examples_per_step": 4,
                "after": after,
            },
        },
        vectors={
            name: rng.normal(size=dim).astype(np.float32) for name in ("momentum", "parameters")
        }
        | ahead,
        **arrays(sum(counts)),
    )


def rebuilt(store: GradientStore, **changes: Any) -> GradientStore:
    """A copy of a store with some of its arrays replaced."""
    return GradientStore(
        **{
            "task_names": store.task_names,
            "task_ids": store.task_ids,
            "example_ids": store.example_ids,
            "losses": store.losses,
            "num_label_tokens": store.num_label_tokens,
            "example_weights": store.example_weights,
            "scalars": store._scalars,
            "task_sizes": store.task_sizes,
            "target": store._target,
            "groups": store.groups,
            "metadata": store.metadata,
            "vectors": store.vectors,
        }
        | changes
    )


def of_rows(store: GradientStore, rows: np.ndarray) -> GradientStore:
    """The same tasks, of which only these rows were captured; the target as it is."""
    return rebuilt(
        store,
        task_ids=store.task_ids[rows],
        example_ids=store.example_ids[rows],
        losses=store.losses[rows],
        num_label_tokens=store.num_label_tokens[rows],
        example_weights=None,
        scalars={name: (a[rows], g[rows]) for name, (a, g) in store._scalars.items()},
    )


def resampled(
    store: GradientStore, rng: np.random.Generator, *, is_target: bool = False
) -> GradientStore:
    """Draw a store's examples anew, with replacement, task by task."""
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(store.task_ids == k), (store.task_ids == k).sum())
            for k in range(len(store.task_names))
        ]
    )
    target = None if is_target else resampled(store.target, rng, is_target=True)
    return rebuilt(of_rows(store, chosen), target=target)


def store_of_few_rows() -> GradientStore:
    """Random numbers, captured of a small part of all rows of the tasks and of the target."""
    store = random_store(4, counts=(60, 80), num_target=90, dim=4, max_grad_norm=0.0)
    return rebuilt(
        store, task_sizes=[10**6, 10**6], target=rebuilt(store.target, task_sizes=[10**6])
    )


def bootstrap_width(store: GradientStore, loss: Callable[[GradientStore], float]) -> float:
    """Width of the 90% interval of a number, over 400 resamplings of a store's examples."""
    rng = np.random.default_rng(0)
    low, high = np.quantile([loss(resampled(store, rng)) for _ in range(400)], [0.05, 0.95])
    return float(high - low)


def drift_p_value(before: np.ndarray, after: np.ndarray, *, num_permutations: int) -> float:
    """Permutation test on the maximum mean discrepancy, pair by pair."""
    pooled = np.concatenate([before, after])
    total = len(pooled)
    squares = np.array([[((a - b) ** 2).sum() for b in pooled] for a in pooled])
    width = np.median([squares[i, j] for i in range(total) for j in range(i)])
    kernel = np.exp(-squares / width)

    def discrepancy(first: np.ndarray, second: np.ndarray) -> float:
        return (
            kernel[np.ix_(first, first)].mean()
            + kernel[np.ix_(second, second)].mean()
            - 2 * kernel[np.ix_(first, second)].mean()
        )

    rng = np.random.default_rng(0)
    found = discrepancy(np.arange(len(before)), np.arange(len(before), total))
    above = 1
    for _ in range(num_permutations):
        order = rng.permutation(total)
        above += discrepancy(order[: len(before)], order[len(before) :]) >= found
    return above / (num_permutations + 1)
