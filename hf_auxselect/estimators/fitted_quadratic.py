"""What estimators on a quadratic model say: estimates with intervals, and diagnostics.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
R dimensions in which curvature is modelled.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators.base import (
    NORMAL_95,
    Array,
    Estimate,
    FittedEstimator,
    in_chunks,
    normalize_mixtures,
    one_blas_thread,
    outlier_share,
    random_subsets,
    rank_correlation,
)
from hf_auxselect.estimators.quadratic import QuadraticModel, chunks_of_tasks
from hf_auxselect.store.arrays import GradientStore

_MIXTURES_AT_ONCE = 32


class Effects(NamedTuple):
    """What training on M mixtures does, in a quadratic model.

    The loss answers to changes of the tasks' b and H by
    ``-sum_k w_k (slope . (db_k + curvature_share * dH_k delta) + outer_slope * b_T . db_k)``,
    the last term outside the axes.
    """

    w_MK: Array
    """Weight of each task's label tokens in the gradient; 0 without training."""
    delta_MR: Array
    """Displacement within the axes."""
    slope_MR: Array
    outer_slope_M: Array
    linear_MT: Array
    """Linear change of the loss of each example of the target."""
    quadratic_M: Array
    """Quadratic change of their mean."""


def check_options(rank: int | None, model_error: float) -> None:
    """Raise ValueError unless these options make sense; see :class:`QuadraticModel`."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if not model_error >= 0:
        raise ValueError(f"model_error must not be negative, got {model_error}.")


class FittedQuadratic(FittedEstimator):
    """An estimator whose estimate is that of a displacement in a quadratic model."""

    curvature_share: ClassVar[float]
    """See :class:`Effects`."""
    _store: GradientStore
    _model: QuadraticModel
    _model_error: float
    """Standard error of the terms of the predicted change, as a share of them."""

    @abstractmethod
    def _effects(self, rows_MK: Array) -> Effects:
        """What training on mixtures does, given the share of each task in their rows."""

    def estimate(self, weights: ArrayLike) -> Estimate:
        return self._estimate(weights)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        reference_1K = normalize_mixtures(np.asarray(reference)[None], self._store.task_sizes)
        return self._estimate(weights, reference_1K[0])

    def _estimate(self, weights: ArrayLike, reference_K: Array | None = None) -> Estimate:
        """Losses of mixtures with 90% intervals; or differences from the loss of a reference.

        The interval joins which examples were captured, by the delta method, and an error of the
        model: ``model_error`` times the linear term, the same of the quadratic one and, where
        training restarts, of what it gives up: the target's loss at the initial parameters less
        that at the anchor. Errors of two mixtures are correlated as their displacements are aligned
        (by the cosine, if positive).
        """
        model = self._model
        rows_MK = normalize_mixtures(weights, self._store.task_sizes)
        reference = None if reference_K is None else self._effects(reference_K[None])

        def terms(of: Effects) -> Array:  # linear, quadratic, and what a restart gives up: [3, M]
            given_up_M = of.w_MK.any(1) * model.given_up
            return np.stack([of.linear_MT @ model.omega_T, of.quadratic_M, given_up_M])

        def work(rows: Array) -> tuple[Array, Array]:
            own = self._effects(rows)
            terms_3M = terms(own)
            unlike_M: Array | float = 0.0
            if reference is not None:
                others_31 = terms(reference)
                # One less their cosine, and where they are the same, exactly 0.
                apart_MR = unit(own.delta_MR) - unit(reference.delta_MR)
                unlike_M = np.minimum((apart_MR**2).sum(1) / 2, 1.0)
                unlike_M *= 2 * (terms_3M * others_31).sum(0)
                terms_3M = terms_3M - others_31
            variance_M = self._model_error**2 * ((terms_3M**2).sum(0) + unlike_M)
            variance_M += self._target_variance(own, reference)
            variance_M += self._task_variance(own, reference)
            if reference is None:
                variance_M[~rows.any(1)] = 0.0  # the loss of today is known
            return terms_3M[:2].sum(0), np.sqrt(np.maximum(variance_M, 0.0))

        change_M, deviation_M = in_chunks(rows_MK, work, size=_MIXTURES_AT_ONCE)
        anchor, lowest = (model.anchor_loss, 0.0) if reference is None else (0.0, -np.inf)
        loss_M = anchor + change_M
        low_M, high_M = (loss_M + sign * NORMAL_95 * deviation_M for sign in (-1, 1))
        loss_M, low_M, high_M = (np.maximum(x, lowest) for x in (loss_M, low_M, high_M))
        return Estimate(loss=loss_M, low=low_M, high=high_M, weights=rows_MK)

    def diagnostics(self) -> dict[str, float]:
        """Numbers that all estimators on such a model give.

        Over 200 random subsets of all sizes, the rank correlation of the estimated loss with the
        length of the displacement and with the number of tasks: near 1 or -1, the estimates say
        little more than that; the standard error by which of the tasks' rows were captured, as a
        share of the estimates' standard deviation: near 1, other rows would rank otherwise; and the
        root mean square of the linear and quadratic terms as a share of the loss itself: near 1,
        training goes farther than a quadratic model can. And the largest share of one example in
        the lengths of the target's gradients: near 1, they are about that example.
        """
        model = self._model
        masks_MK = random_subsets(len(model.b_KD))
        with one_blas_thread():
            own = self._effects(normalize_mixtures(masks_MK, self._store.task_sizes))
            sampling = np.sqrt(self._task_variance(own, None).mean())
        linear_M = own.linear_MT @ model.omega_T
        loss_M = linear_M + own.quadratic_M
        square = float(np.mean(linear_M**2 + own.quadratic_M**2))
        spread = loss_M.std() if len(masks_MK[0]) > 1 else np.inf  # one task: nothing to rank
        lengths_T = model.omega_T * np.linalg.norm(model.target_g_TR, axis=1)
        return {
            "anchor_loss_nats": model.anchor_loss,
            "terms_over_loss": float(np.sqrt(square)) / max(model.anchor_loss, 1e-300),
            "sampling_error_over_spread": float(sampling / max(spread, 1e-300)),
            "rank_correlation_with_step_norm": rank_correlation(
                loss_M, np.linalg.norm(own.delta_MR, axis=1)
            ),
            "rank_correlation_with_number_of_tasks": rank_correlation(loss_M, masks_MK.sum(1)),
            "outlier_gradient_share": outlier_share(
                model.norm_N[:, None],  # the norm of a norm is itself
                self._store.task_ids,
            ),
            "largest_target_example_share": float(lengths_T.max() / max(lengths_T.sum(), 1e-300)),
            **model.diagnostics_ahead(),
        }

    def _target_variance(self, own: Effects, reference: Effects | None) -> Array:
        """Variance of the loss over which rows of the target were captured [M]."""
        model = self._model
        count = len(model.omega_T)
        missing = 1 - count / max(int(self._store.target.task_sizes[0]), count)
        if missing == 0 or count < 2:
            return np.zeros(len(own.delta_MR))

        def change(effects: Effects) -> Array:
            return effects.linear_MT + (effects.delta_MR @ model.target_phi_TR.T) ** 2 / 2

        losses_MT = change(own) + (model.losses_T if reference is None else -change(reference))
        mean_M = losses_MT @ model.omega_T
        spread_M = ((losses_MT - mean_M[:, None]) ** 2) @ model.omega_T**2
        return missing * spread_M * count / (count - 1)

    def _task_variance(self, own: Effects, reference: Effects | None) -> Array:
        """Variance of the loss over which rows of the tasks were captured [M]."""
        model, curvature_share = self._model, self.curvature_share
        factor_K = model.missing_K * model.counts_K / np.maximum(model.counts_K - 1, 1)

        def mean(e: Effects) -> Array:
            mean_MK = e.slope_MR @ model.b_KR.T + e.outer_slope_M[:, None] * model.outer_response_K
            mean_MK += curvature_share * np.einsum(
                "mr,krs,ms->mk", e.slope_MR, model.captured_H_KRR, e.delta_MR, optimize=True
            )
            return mean_MK

        def influence(e: Effects, mean_MK: Array, k: int, rows: slice) -> Array:
            phi_NR = model.phi_NR[rows].astype(np.float64)
            influence_MN = curvature_share * (e.slope_MR @ phi_NR.T) * (e.delta_MR @ phi_NR.T)
            influence_MN += e.slope_MR @ model.g_NR[rows].T
            influence_MN += e.outer_slope_M[:, None] * model.outer_response_N[rows]
            return e.w_MK[:, [k]] * (influence_MN - mean_MK[:, [k]])

        sides = [(e, mean(e)) for e in (own, reference) if e is not None]
        variance_M = np.zeros(len(own.delta_MR))
        for k, rows in chunks_of_tasks(self._store):
            if factor_K[k]:
                influence_MN = influence(*sides[0], k, rows)
                if reference is not None:
                    influence_MN -= influence(*sides[1], k, rows)
                variance_M += factor_K[k] * (influence_MN**2 @ model.share_N[rows] ** 2)
        return variance_M


def unit(vectors: Array) -> Array:
    """Rows divided by their lengths; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
