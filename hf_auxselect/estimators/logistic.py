"""The paper's estimator, corrected: logistic regression on projected gradients.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
R rank of the gradients (at most projection_dim and N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.checks import is_number
from hf_auxselect.estimators.base import (
    NORMAL_95,
    AbstractEstimator,
    Array,
    Estimate,
    FittedEstimator,
    normalize_mixtures,
)
from hf_auxselect.estimators.diagnostics import outlier_share
from hf_auxselect.store.arrays import GradientStore

# Constants that shape estimates. The tolerances are far below the error of the model.
REGULARIZATION_SHARE = 0.1
"""The default regularization, as a share of the mean squared norm of the gradients.

No record says on what it was chosen. It scales with the gradients, so that the solution does not
depend on their unit. Ranks hardly depend on it; the size of the predicted changes does.
"""

_MAX_NEWTON_STEPS = 100
"""Newton's method gives up after this many steps. A convention."""

_MAX_HALVINGS = 60
"""A Newton step is halved this many times at most. A convention."""

_SUFFICIENT_DECREASE = 1e-4
"""A step must lower the objective by this share of its linear prediction (Armijo's rule).

A convention: Nocedal and Wright, "Numerical Optimization" (2006), section 3.1.
"""

_ROUNDING = 1e-14
"""Objectives that differ by less than this share are the same. A convention, for float64."""

_CONJUGATE_GRADIENT_TOLERANCE = 1e-10
"""A Newton system is solved down to this share of its squared residual. A convention."""

_MIN_VARIANCE = 1e-12
"""Principal directions of less than this share of the largest variance are dropped.

A convention, above the rounding of float64.
"""

# Bounds memory; shapes no estimate but for rounding.
_ELEMENTS_AT_ONCE = 4_000_000
"""Mixtures are processed in chunks of about this many M x N numbers (32 MB in float64)."""


@dataclass(frozen=True, kw_only=True)
class GradExLogistic(AbstractEstimator):
    """The paper's estimator, corrected: logistic regression on projected gradients, with offset.

    Choose it to compare with the paper; ``LinearizedTraining`` ranks mixtures better. Its limit: it
    knows neither the optimizer nor how long training goes on, so that regularization alone decides
    how far parameters move. Its interval does not cover that error.

    Each example i has an output f_i, the mean margin log p / (1 - p) of its label tokens, and that
    output's projected gradient g_i. Its weight a_i in a mixture is the share of its task, split
    evenly among the task's captured examples. The displacement of the parameters solves the convex

        w = argmin  sum_i a_i log(1 + exp(-(f_i + g_i . w))) + regularization * |w|^2.

    The estimate is the weighted mean over the target's examples j, with loss l_j, of

        l_j(w) = l_j + softplus(-(f_j + g_j . w)) - softplus(-f_j),     softplus(x) = log(1 + e^x).

    What differs from the authors' code: the model's own outputs f_i take part, there are no random
    labels and no rescaling of w, and the target is evaluated with its own gradients instead of a
    forward pass per subset.

    Cost: about 100 products with the N x R gradient matrix per mixture. Memory: up to three such
    matrices in float64.

    Args:
        regularization: lambda, per squared unit of w. None: 0.1 times the mean squared norm of g_i,
            which makes the solution independent of the scale of the gradients. A larger value
            shortens the step.
        tolerance: Newton's method takes its last step at this relative distance of the objective
            from its minimum. A convention.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024),
    section 3, with the offset of Li et al., "Efficient Ensemble for Fine-tuning Language Models on
    Multiple Datasets" (ACL 2025).
    """

    scalars: ClassVar[tuple[str, ...]] = ("margin",)

    regularization: float | None = None
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        strength = self.regularization
        if strength is not None and not (is_number(strength) and strength > 0):
            raise ValueError(f"regularization must be positive or None, got {strength!r}.")
        if not (is_number(self.tolerance) and 0 < self.tolerance < 1):
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance!r}.")

    def fit(self, store: GradientStore) -> FittedGradExLogistic:
        return FittedGradExLogistic(self, store)


class FittedGradExLogistic(FittedEstimator):
    """See :class:`GradExLogistic`. All vectors are kept in the gradients' principal directions."""

    def __init__(self, options: GradExLogistic, store: GradientStore) -> None:
        outputs, gradients = store.scalar("margin")
        gradients = gradients.astype(np.float64)
        self._options = options
        self._store = store
        self.regularization = (
            REGULARIZATION_SHARE * (gradients**2).sum(1).mean()
            if options.regularization is None
            else options.regularization
        )
        # w lies in the span of the gradients. In their principal directions the Hessian is nearly
        # diagonal, which is all the preconditioning that conjugate gradients need.
        self._variances_R, basis_DR = _principal_directions(gradients)
        self._gradients_NR = gradients @ basis_DR
        self._outputs_N = outputs.astype(np.float64)
        self._target = _LogisticTarget(store.target, basis_DR)
        self._groups = [_LogisticTarget(group, basis_DR) for group in store.groups.values()]
        self._counts_K = np.bincount(store.task_ids, minlength=len(store.task_names))

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        size = max(1, _ELEMENTS_AT_ONCE // len(self._store))
        chunks = [
            self._estimate_chunk(shares_MK[i : i + size])
            for i in range(0, max(len(shares_MK), 1), size)
        ]
        loss, deviation, group_MG = (np.concatenate(c) for c in zip(*chunks, strict=True))
        return Estimate(
            loss=loss,
            low=np.maximum(loss - NORMAL_95 * deviation, 0.0),
            high=loss + NORMAL_95 * deviation,
            weights=shares_MK,
            group_losses=group_MG if self._groups else None,
        )

    def displacement(self, weights: ArrayLike) -> Array:
        """The solution w of each mixture, in principal directions (a rotation): float64 [M, R]."""
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        return self._solve(self._example_shares(shares_MK))

    def diagnostics(self) -> dict[str, float]:
        """The target's loss, the regularization, and what the gradients are like.

        ``effective_dimension``: number of directions that hold the gradients' variance.
        """
        norms = np.linalg.norm(self._gradients_NR, axis=1)
        spectrum = self._variances_R
        return {
            "loss_at_theta_0_nats": float(self._store.target.task_losses[0]),
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

    def _estimate_chunk(self, shares_MK: Array) -> tuple[Array, Array, Array]:
        """Loss and its standard deviation, float64 [M] each; losses of groups [M, G].

        The deviation is that of the delta method over a resampling of the examples: of the target,
        and within auxiliary tasks, through the sensitivity of the solution.
        """
        target, weights_T = self._target, self._target.weights_T
        a_MN = self._example_shares(shares_MK)
        w_MR = self._solve(a_MN)
        moved_MT = target.outputs(w_MR)
        losses_MT = target.losses(moved_MT)
        loss_M = losses_MT @ weights_T
        num_target = len(weights_T)
        variance_M = ((losses_MT - loss_M[:, None]) ** 2 @ weights_T**2) * (
            num_target / max(num_target - 1, 1)
        )
        # How the estimate answers to the weight of each auxiliary example.
        slope_MR = -(_sigmoid(-moved_MT) * weights_T) @ target.gradients_TR
        p_MN = _sigmoid(-(self._outputs_N + w_MR @ self._gradients_NR.T))
        response_MR = self._solve_newton_system(a_MN * p_MN * (1 - p_MN), slope_MR)
        influence_MN = a_MN * p_MN * (response_MR @ self._gradients_NR.T)
        for k, count in enumerate(self._counts_K):
            if count > 1:
                of_task = influence_MN[:, self._store.task_ids == k]
                variance_M += of_task.var(1) * count * count / (count - 1)
        group_MG = np.empty((len(shares_MK), len(self._groups)))
        for g, group in enumerate(self._groups):
            group_MG[:, g] = group.losses(group.outputs(w_MR)) @ group.weights_T
        return loss_M, np.sqrt(variance_M), group_MG

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
        for _ in range(_MAX_HALVINGS):
            w, margins = (
                w_MR + length_M[:, None] * step_MR,
                margins_MN + length_M[:, None] * moved_MN,
            )
            # The last term allows for rounding once steps no longer change the objective.
            bound_M = start_M + _SUFFICIENT_DECREASE * length_M * decrease_M
            bound_M = bound_M + _ROUNDING * np.abs(start_M)
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
        goal_M = _CONJUGATE_GRADIENT_TOLERANCE * rho_M
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


class _LogisticTarget:
    """The target's examples, or a group's: their outputs and losses after a displacement w.

    Args:
        store: holds these examples.
        basis_DR: principal directions in which displacements are given.
    """

    def __init__(self, store: GradientStore, basis_DR: Array) -> None:
        outputs, gradients = store.scalar("margin")
        self.weights_T = store.example_weights
        self.gradients_TR = gradients.astype(np.float64) @ basis_DR
        self._outputs_T = outputs.astype(np.float64)
        # A label token with margin m costs softplus(-m) nats, but the softplus of the mean margin
        # is lower than the mean of the softplus (Jensen). The difference, at least 0, is kept. That
        # is exact with one label token per example; else it assumes that margins stay as spread.
        self._gap_T = store.losses.astype(np.float64) - _softplus(-self._outputs_T)

    def outputs(self, w_MR: Array) -> Array:
        """Outputs of the examples after displacements [M, T]."""
        return self._outputs_T + w_MR @ self.gradients_TR.T

    def losses(self, outputs_MT: Array) -> Array:
        """Losses of the examples with these outputs [M, T]."""
        return self._gap_T + _softplus(-outputs_MT)


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def _principal_directions(gradients: Array) -> tuple[Array, Array]:
    """Second moments [R] of gradients [N, D] along principal directions; these [D, R]."""
    num_examples, dim = gradients.shape
    is_wide = num_examples < dim  # then their inner products are the smaller matrix
    moments = gradients @ gradients.T if is_wide else gradients.T @ gradients
    values, vectors = np.linalg.eigh(moments / num_examples)
    kept = values > values[-1] * _MIN_VARIANCE
    values, vectors = values[kept], vectors[:, kept]
    if is_wide:
        vectors = gradients.T @ (vectors / np.sqrt(num_examples * values))
    return values, vectors
