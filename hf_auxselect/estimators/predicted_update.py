"""The predicted update of the parameters by training, and what it makes of the target's loss.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures, R vectors
of the basis.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.estimators.base import (
    NORMAL_95,
    TINY,
    Array,
    Estimate,
    FittedEstimator,
    normalize_mixtures,
    random_subsets,
)
from hf_auxselect.estimators.captured_gradients import chunks_of_tasks
from hf_auxselect.estimators.diagnostics import outlier_share, rank_correlation
from hf_auxselect.estimators.parallel import in_chunks, one_blas_thread
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.estimators.target_quadratic import TargetQuadratic
from hf_auxselect.store.arrays import GradientStore

# Bounds memory; shapes no estimate but for rounding.
_MIXTURES_AT_ONCE = 32
"""Mixtures that one thread works on at a time. A convention."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedUpdate:
    """By how much training on M mixtures moves the parameters, and the target's loss with them.

    The loss changes with the tasks' b and H by
    ``-sum_k w_k (s . (db_k + curvature_share * dH_k delta) + s_complement * b_T . db_k)``, where s
    is the sensitivity, and the last term is that in the orthogonal complement of the basis.

    Attributes:
        w_MK: weight of each task in the gradient, by label tokens; 0 without training.
        delta_MR: displacement in the basis.
        sensitivity_MR: s, in the basis.
        complement_sensitivity_M: s_complement.
        linear_MT: linear term of the loss of each example of the target.
        quadratic_M: quadratic term of their weighted mean.
        group_change_MG: change of the loss of each of the store's groups.
    """

    w_MK: Array
    delta_MR: Array
    sensitivity_MR: Array
    complement_sensitivity_M: Array
    linear_MT: Array
    quadratic_M: Array
    group_change_MG: Array


def check_options(rank: int | None, model_error: float) -> None:
    """Raise ValueError unless these options of an estimator make sense."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if not model_error >= 0:
        raise ValueError(f"model_error must not be negative, got {model_error}.")


class FittedQuadratic(FittedEstimator):
    """An estimator that predicts an update and evaluates the target's quadratic there."""

    curvature_share: ClassVar[float]
    """See :class:`PredictedUpdate`."""
    _store: GradientStore
    _model: QuadraticModel
    _model_error: float
    """Standard error of each term of the predicted change, as a share of the term."""

    @abstractmethod
    def _predict(self, shares_MK: Array) -> PredictedUpdate:
        """The update by training on mixtures, given the share of each task in their rows."""

    def estimate(self, weights: ArrayLike) -> Estimate:
        return self._estimate(weights)

    def difference(self, weights: ArrayLike, reference: ArrayLike) -> Estimate:
        reference_1K = normalize_mixtures(np.asarray(reference)[None], self._store.task_sizes)
        return self._estimate(weights, reference_1K[0])

    def _estimate(self, weights: ArrayLike, reference_K: Array | None = None) -> Estimate:
        """Losses of mixtures with 90% intervals; or differences from the loss of a reference.

        The interval joins two independent errors: over which examples were captured, by the delta
        method, and of the model. The latter is ``model_error`` times each of the linear term, the
        quadratic term and, where training restarts, the warm-up gain that it gives up.
        """
        target, groups = self._model.target, self._model.groups
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        reference = None if reference_K is None else self._predict(reference_K[None])

        def terms(update: PredictedUpdate) -> Array:  # linear, quadratic, warm-up gain: [3, M]
            gain_M = update.w_MK.any(1) * self._model.warm_up_gain
            return np.stack([update.linear_MT @ target.weights_T, update.quadratic_M, gain_M])

        def work(shares: Array) -> tuple[Array, Array, Array]:
            update = self._predict(shares)
            terms_3M, group_change_MG = terms(update), update.group_change_MG
            unlike_M: Array | float = 0.0
            if reference is not None:
                others_31 = terms(reference)
                # Errors of two mixtures are correlated by the cosine of their displacements, if it
                # is positive. This is one less their cosine, and exactly 0 where they are the same.
                apart_MR = _unit(update.delta_MR) - _unit(reference.delta_MR)
                unlike_M = np.minimum((apart_MR**2).sum(1) / 2, 1.0)
                unlike_M *= 2 * (terms_3M * others_31).sum(0)
                terms_3M = terms_3M - others_31
                group_change_MG = group_change_MG - reference.group_change_MG
            variance_M = self._model_error**2 * ((terms_3M**2).sum(0) + unlike_M)
            variance_M += self._target_variance(update, reference)
            variance_M += self._task_variance(update, reference)
            if reference is None:
                variance_M[~shares.any(1)] = 0.0  # the loss without training is known
            return terms_3M[:2].sum(0), np.sqrt(np.maximum(variance_M, 0.0)), group_change_MG

        change_M, deviation_M, group_MG = in_chunks(shares_MK, work, size=_MIXTURES_AT_ONCE)
        before, lowest = (target.loss, 0.0) if reference is None else (0.0, -np.inf)
        loss_M = before + change_M
        low_M, high_M = (loss_M + sign * NORMAL_95 * deviation_M for sign in (-1, 1))
        loss_M, low_M, high_M = (np.maximum(x, lowest) for x in (loss_M, low_M, high_M))
        if reference is None:
            group_MG = np.maximum(group_MG + [group.loss for group in groups], lowest)
        return Estimate(
            loss=loss_M,
            low=low_M,
            high=high_M,
            weights=shares_MK,
            group_losses=group_MG if groups else None,
        )

    def task_losses(self, weights: ArrayLike) -> Array | None:
        training = self._store.remaining_training
        if training is not None and training.restarts:
            return None  # the quadratic model is about a run that continues
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        with one_blas_thread():
            change_MK = self._model.tasks.loss_changes(self._predict(shares_MK).delta_MR)
        return np.maximum(self._store.task_losses + change_MK, 0.0)

    @staticmethod
    def _mean_changes(
        targets: Sequence[TargetQuadratic],
        change: Callable[[TargetQuadratic], tuple[Array, Array, Array]],
        num_mixtures: int,
    ) -> Array:
        """Change of the mean loss of several targets, from their terms [M, targets]."""
        result = np.empty((num_mixtures, len(targets)))
        for g, target in enumerate(targets):
            linear_MT, quadratic_M, _ = change(target)
            result[:, g] = linear_MT @ target.weights_T + quadratic_M
        return result

    def diagnostics(self) -> dict[str, float]:
        """Numbers that say how far to trust the estimates; most are over random subsets of tasks.

        ``loss_at_theta_0_nats``: the target's loss at the linearization point.
        ``terms_over_loss``: root mean square of the linear and quadratic terms, as a share of that
        loss. Near 1, training goes farther than a quadratic model can.
        ``sampling_error_over_spread``: standard error by which examples of the tasks were captured,
        as a share of the estimates' standard deviation. Near 1, the ranking depends on them.
        ``rank_correlation_with_step_norm``, ``rank_correlation_with_number_of_tasks``: of the
        estimated loss with the length of the displacement, and with the number of tasks. Near 1 or
        -1, the estimates say little more than that.
        ``outlier_gradient_share``: see ``outlier_share``.
        ``largest_target_example_share``: largest share of one example in the lengths of the
        target's gradients. Near 1, the estimates are about that example.
        Further ones are those of the probes, see ``QuadraticModel.probe_diagnostics``.
        """
        tasks, target = self._model.tasks, self._model.target
        masks_MK = random_subsets(len(tasks.b_KD))
        with one_blas_thread():
            update = self._predict(normalize_mixtures(masks_MK, self._store.task_sizes))
            sampling = np.sqrt(self._task_variance(update, None).mean())
        linear_M = update.linear_MT @ target.weights_T
        loss_M = linear_M + update.quadratic_M
        square = float(np.mean(linear_M**2 + update.quadratic_M**2))
        spread = loss_M.std() if len(masks_MK[0]) > 1 else np.inf  # one task: nothing to rank
        lengths_T = target.weights_T * np.linalg.norm(target.g_TR, axis=1)
        return {
            "loss_at_theta_0_nats": target.loss,
            "terms_over_loss": float(np.sqrt(square)) / max(target.loss, TINY),
            "sampling_error_over_spread": float(sampling / max(spread, TINY)),
            "rank_correlation_with_step_norm": rank_correlation(
                loss_M, np.linalg.norm(update.delta_MR, axis=1)
            ),
            "rank_correlation_with_number_of_tasks": rank_correlation(loss_M, masks_MK.sum(1)),
            "outlier_gradient_share": outlier_share(
                tasks.norm_N[:, None],  # the norm of a norm is itself
                self._store.task_ids,
            ),
            "largest_target_example_share": float(lengths_T.max() / max(lengths_T.sum(), TINY)),
            **self._model.probe_diagnostics(),
        }

    def _target_variance(self, update: PredictedUpdate, reference: PredictedUpdate | None) -> Array:
        """Variance of the loss over which examples of the target were captured [M]."""
        target = self._model.target
        count = len(target.weights_T)
        missing = 1 - count / max(int(self._store.target.task_sizes[0]), count)
        if missing == 0 or count < 2:
            return np.zeros(len(update.delta_MR))

        def change(of: PredictedUpdate) -> Array:
            return of.linear_MT + (of.delta_MR @ target.phi_TR.T) ** 2 / 2

        losses_MT = change(update) + (target.losses_T if reference is None else -change(reference))
        mean_M = losses_MT @ target.weights_T
        spread_M = ((losses_MT - mean_M[:, None]) ** 2) @ target.weights_T**2
        return missing * spread_M * count / (count - 1)

    def _task_variance(self, update: PredictedUpdate, reference: PredictedUpdate | None) -> Array:
        """Variance of the loss over which examples of the tasks were captured [M]."""
        tasks, counts = self._model.tasks, self._model.counts
        curvature_share = self.curvature_share
        factor_K = counts.missing_K * counts.counts_K / np.maximum(counts.counts_K - 1, 1)

        def mean(of: PredictedUpdate) -> Array:
            mean_MK = of.sensitivity_MR @ tasks.b_KR.T
            mean_MK = mean_MK + of.complement_sensitivity_M[:, None] * tasks.complement_response_K
            mean_MK += curvature_share * np.einsum(
                "mr,krs,ms->mk",
                of.sensitivity_MR,
                tasks.uncorrected_H_KRR,
                of.delta_MR,
                optimize=True,
            )
            return mean_MK

        def influence(of: PredictedUpdate, mean_MK: Array, k: int, examples: slice) -> Array:
            phi_NR = tasks.phi_NR[examples].astype(np.float64)
            influence_MN = (
                curvature_share * (of.sensitivity_MR @ phi_NR.T) * (of.delta_MR @ phi_NR.T)
            )
            influence_MN += of.sensitivity_MR @ tasks.g_NR[examples].T
            influence_MN += (
                of.complement_sensitivity_M[:, None] * tasks.complement_response_N[examples]
            )
            return of.w_MK[:, [k]] * (influence_MN - mean_MK[:, [k]])

        sides = [(of, mean(of)) for of in (update, reference) if of is not None]
        variance_M = np.zeros(len(update.delta_MR))
        for k, examples in chunks_of_tasks(self._store):
            if factor_K[k]:
                influence_MN = influence(*sides[0], k, examples)
                if reference is not None:
                    influence_MN -= influence(*sides[1], k, examples)
                weights_N = counts.example_weights_N[examples]
                variance_M += factor_K[k] * (influence_MN**2 @ weights_N**2)
        return variance_M


def _unit(vectors: Array) -> Array:
    """Vectors [M, R] divided by their lengths; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
