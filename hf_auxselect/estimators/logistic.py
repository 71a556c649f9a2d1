"""The paper's estimator, put right.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
R rank of the gradients (at most projection_dim and N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators.base import (
    NORMAL_95,
    AbstractEstimator,
    Array,
    Estimate,
    FittedEstimator,
    normalize_mixtures,
    outlier_share,
)
from hf_auxselect.store.arrays import GradientStore

_MAX_NEWTON_STEPS = 100

_ELEMENTS_AT_ONCE = 4_000_000
"""Mixtures are processed in chunks of about this many M x N numbers (32 MB in float64)."""


@dataclass(frozen=True, kw_only=True)
class GradExLogistic(AbstractEstimator):
    """The paper's estimator, put right: logistic regression on projected gradients, with offset.

    Every example i has an output at the anchor, the mean margin of its label tokens
    f_i = mean log p/(1 - p), and that output's projected gradient g_i. For a mixture that gives
    task k the share s_k, split evenly among the task's n_k captured examples (a_i = s_k / n_k; for
    a subset of equally captured tasks a_i = 1/|S|), the displacement of the parameters solves

        w = argmin  sum_i a_i log(1 + exp(-(f_i + g_i . w))) + regularization * |w|^2,

    which is convex; Newton's method runs until the objective is within ``tolerance`` (relative) of
    its minimum. The target's example j with margin f_j and loss l_j then moves to

        l_j(w) = l_j + softplus(-(f_j + g_j . w)) - softplus(-f_j),     softplus(x) = log(1 + e^x),

    and the estimate is the mean of l_j(w) by the target's example weights. The first term anchors
    it: a label token with margin m costs softplus(-m) nats, but the softplus of the *mean* margin
    is lower than the mean of the softplus (Jensen), so the difference l_j - softplus(-f_j) >= 0 of
    the anchor is kept. With one label token per example, or equal margins of an example's tokens,
    this is exact in nats per token; otherwise it assumes that the spread of margins stays.

    The interval is the delta method over a resampling of the examples, of the target and (within
    tasks, through the solution's sensitivity) of the auxiliary tasks. It does not cover the
    error of the first-order model itself.

    What differs from the authors' code: the model's own outputs f_i take part, no random labels,
    no rescaling of w, and the target is evaluated with its own gradients instead of a forward
    pass per subset.

    Cost: about 100 products with the N x R gradient matrix per mixture. Memory: up to
    three such matrices in float64.

    Args:
        regularization: lambda, per squared unit of w. None: 0.1 times the mean squared norm of g_i,
            which makes the solution independent of the scale of the gradients. A larger
            value shortens the step; ranks hardly depend on it.
        tolerance: relative distance of the objective from its minimum at which Newton's method
            takes its last step.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024),
    section 3, with the offset of Li et al., "Efficient Ensemble for Fine-tuning Language Models on
    Multiple Datasets" (ACL 2025).
    """

    scalars: ClassVar[tuple[str, ...]] = ("margin",)

    regularization: float | None = None
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        if self.regularization is not None and not self.regularization > 0:
            raise ValueError(f"regularization must be positive, got {self.regularization}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance}.")

    def fit(self, store: GradientStore) -> FittedGradExLogistic:
        return FittedGradExLogistic(self, store)


class FittedGradExLogistic(FittedEstimator):
    """See :class:`GradExLogistic`. All vectors are kept in the basis of the gradients' own axes."""

    def __init__(self, options: GradExLogistic, store: GradientStore) -> None:
        outputs, gradients = store.scalar("margin")
        target_outputs, target_gradients = store.target.scalar("margin")
        gradients = gradients.astype(np.float64)
        self._options = options
        self._store = store
        self.regularization = (
            0.1 * (gradients**2).sum(1).mean()
            if options.regularization is None
            else options.regularization
        )
        # w lies in the span of the gradients. In its principal axes the Hessian is nearly diagonal,
        # which is all the preconditioning that conjugate gradients need.
        self._variances_R, axes_DR = _principal_axes(gradients)
        self._gradients_NR = gradients @ axes_DR
        self._target_gradients_TR = target_gradients.astype(np.float64) @ axes_DR
        self._outputs_N = outputs.astype(np.float64)
        self._target_outputs_T = target_outputs.astype(np.float64)
        self._gap_T = store.target.losses.astype(np.float64) - _softplus(-self._target_outputs_T)
        self._counts_K = np.bincount(store.task_ids, minlength=len(store.task_names))

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        size = max(1, _ELEMENTS_AT_ONCE // len(self._store))
        chunks = [
            self._estimate_chunk(shares_MK[i : i + size]) for i in range(0, len(shares_MK), size)
        ]
        loss, deviation = (np.concatenate(column) for column in zip(*chunks, strict=True))
        return Estimate(
            loss=loss,
            low=np.maximum(loss - NORMAL_95 * deviation, 0.0),
            high=loss + NORMAL_95 * deviation,
            weights=shares_MK,
        )

    def displacement(self, weights: ArrayLike) -> Array:
        """The solution w of each mixture, in principal axes (a rotation): float64 [M, R]."""
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        return self._solve(self._example_shares(shares_MK))

    def diagnostics(self) -> dict[str, float]:
        norms = np.linalg.norm(self._gradients_NR, axis=1)
        spectrum = self._variances_R
        return {
            "anchor_loss_nats": float(self._store.target.task_losses[0]),
            "regularization": float(self.regularization),
            "gradient_norm_median": float(np.median(norms)),
            "outlier_gradient_share": outlier_share(self._gradients_NR, self._store.task_ids),
            "effective_dimension": float(spectrum.sum() ** 2 / (spectrum**2).sum()),
        }

    def _example_shares(self, shares_MK: Array) -> Array:
        examples_MK = shares_MK * self._store.examples_per_row
        total_M = np.where(shares_MK.any(1), examples_MK.sum(1), 1.0)
        scale_M = np.where(shares_MK.any(1), shares_MK.sum(1), 1.0) / total_M
        return (examples_MK * scale_M[:, None] / self._counts_K)[:, self._store.task_ids]

    def _estimate_chunk(self, shares_MK: Array) -> tuple[Array, Array]:
        """Loss and its standard deviation, float64 [M] each."""
        weights_T = self._store.target.example_weights
        a_MN = self._example_shares(shares_MK)
        w_MR = self._solve(a_MN)
        moved_MT = self._target_outputs_T + w_MR @ self._target_gradients_TR.T
        losses_MT = self._gap_T + _softplus(-moved_MT)
        loss_M = losses_MT @ weights_T
        num_target = len(weights_T)
        variance_M = ((losses_MT - loss_M[:, None]) ** 2 @ weights_T**2) * (
            num_target / max(num_target - 1, 1)
        )
        # How the estimate answers to the weight of each auxiliary example.
        slope_MR = -(_sigmoid(-moved_MT) * weights_T) @ self._target_gradients_TR
        p_MN = _sigmoid(-(self._outputs_N + w_MR @ self._gradients_NR.T))
        response_MR = self._solve_newton_system(a_MN * p_MN * (1 - p_MN), slope_MR)
        influence_MN = a_MN * p_MN * (response_MR @ self._gradients_NR.T)
        for k, count in enumerate(self._counts_K):
            if count > 1:
                of_task = influence_MN[:, self._store.task_ids == k]
                variance_M += of_task.var(1) * count * count / (count - 1)
        return loss_M, np.sqrt(variance_M)

    def _solve(self, a_MN: Array) -> Array:
        """Minimise the regularised logistic loss for each row of example weights: w [M, R]."""
        damping = 2 * self.regularization
        w_MR = np.zeros((len(a_MN), self._gradients_NR.shape[1]))
        margins_MN = np.broadcast_to(self._outputs_N, a_MN.shape)
        active_M = a_MN.any(1)
        for _ in range(_MAX_NEWTON_STEPS):
            if not active_M.any():
                return w_MR
            p_MN = _sigmoid(-margins_MN)
            gradient_MR = -(a_MN * p_MN) @ self._gradients_NR + damping * w_MR
            gradient_MR[~active_M] = 0.0
            step_MR = self._solve_newton_system(a_MN * p_MN * (1 - p_MN), -gradient_MR)
            w_MR, margins_MN, objective_M = self._damped_step(
                a_MN, w_MR, margins_MN, step_MR, gradient_MR
            )
            # Half of this is how far the objective was from its minimum before the step, whatever
            # the scale of w; the step itself has then squared the distance.
            decrement_M = -(gradient_MR * step_MR).sum(1)
            active_M &= decrement_M / 2 > self._options.tolerance * objective_M
        raise ArithmeticError(
            f"Newton's method did not converge in {_MAX_NEWTON_STEPS} steps with "
            f"regularization={self.regularization:g}; raise it."
        )

    def _damped_step(
        self, a_MN: Array, w_MR: Array, margins_MN: Array, step_MR: Array, gradient_MR: Array
    ) -> tuple[Array, Array, Array]:
        """Halve each Newton step until it lowers the objective enough: w, margins, objective."""
        moved_MN = step_MR @ self._gradients_NR.T

        def objective(w: Array, margins: Array) -> Array:
            return (a_MN * _softplus(-margins)).sum(1) + self.regularization * (w**2).sum(1)

        start_M = objective(w_MR, margins_MN)
        decrease_M = (gradient_MR * step_MR).sum(1)
        length_M = np.ones(len(w_MR))
        for _ in range(60):
            w, margins = (
                w_MR + length_M[:, None] * step_MR,
                margins_MN + length_M[:, None] * moved_MN,
            )
            # The last term allows for rounding once steps no longer change the objective.
            bound_M = start_M + 1e-4 * length_M * decrease_M + 1e-14 * np.abs(start_M)
            objective_M = objective(w, margins)
            too_long = objective_M > bound_M
            if not too_long.any():
                break
            length_M[too_long] /= 2
        return w, margins, objective_M

    def _solve_newton_system(self, curvature_MN: Array, rhs_MR: Array) -> Array:
        """Solve (G^T diag(curvature) G + 2 regularization) x = rhs: x [M, R]."""
        damping = 2 * self.regularization
        mean_curvature_M = curvature_MN.sum(1, keepdims=True)
        inverse_MR = 1 / (mean_curvature_M * self._variances_R + damping)
        x_MR = np.zeros_like(rhs_MR)
        residual_MR = rhs_MR.copy()
        z_MR = inverse_MR * residual_MR
        direction_MR = z_MR.copy()
        rho_M = (residual_MR * z_MR).sum(1)
        goal_M = 1e-10 * rho_M
        for _ in range(10 * rhs_MR.shape[1]):
            active = rho_M > goal_M
            if not active.any():
                break
            product_MR = (
                curvature_MN * (direction_MR @ self._gradients_NR.T)
            ) @ self._gradients_NR + damping * direction_MR
            curvature_M = (direction_MR * product_MR).sum(1)
            alpha_M = np.divide(rho_M, curvature_M, out=np.zeros_like(rho_M), where=active)
            x_MR += alpha_M[:, None] * direction_MR
            residual_MR -= alpha_M[:, None] * product_MR
            z_MR = inverse_MR * residual_MR
            new_rho_M = (residual_MR * z_MR).sum(1)
            beta_M = np.divide(new_rho_M, rho_M, out=np.zeros_like(rho_M), where=active)
            direction_MR = z_MR + beta_M[:, None] * direction_MR
            rho_M = new_rho_M
        return x_MR


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _principal_axes(gradients: Array) -> tuple[Array, Array]:
    """Second moments [R] of gradients [N, D] along their principal axes, and the axes [D, R]."""
    num_examples, dim = gradients.shape
    is_wide = num_examples < dim  # then their inner products are the smaller matrix
    moments = gradients @ gradients.T if is_wide else gradients.T @ gradients
    values, vectors = np.linalg.eigh(moments / num_examples)
    kept = values > values[-1] * 1e-12
    values, vectors = values[kept], vectors[:, kept]
    if is_wide:
        vectors = gradients.T @ (vectors / np.sqrt(num_examples * values))
    return values, vectors
