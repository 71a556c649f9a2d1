"""The predicted update of the parameters by training, and what it makes of the target's loss.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures, G groups,
R vectors of the basis, C components of an update: the mean gradient and further vectors; S sources
of a displacement: the tasks' mean gradients and the further vectors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.checks import is_number, require_count
from hf_auxselect.estimators.base import (
    NORMAL_95,
    TINY,
    Array,
    Estimate,
    FittedEstimator,
    normalize_mixtures,
    random_subsets,
    unit_vectors,
    used_columns,
)
from hf_auxselect.estimators.diagnostics import outlier_share
from hf_auxselect.estimators.matrix_functions import back, derivative, turned
from hf_auxselect.estimators.parallel import in_chunks, one_blas_thread
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.estimators.target_quadratic import TargetChange, TargetQuadratic
from hf_auxselect.store.arrays import GradientStore

# Bounds memory; shapes no estimate but for rounding.
_MIXTURES_AT_ONCE = 32
"""Mixtures that one thread works on at a time. A convention."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedUpdate:
    """By how much training on M mixtures moves the parameters.

    With b = sum_k u_k b_k and H = sum_k u_k H_k for the weights u of the tasks in the gradient, and
    x_c for b and the further vectors, the displacement is

        delta = sum_c f_c(H) x_c,

    where f(H) has the eigenvectors of H, and f(h) for its eigenvalues h. In the orthogonal
    complement of the basis, H is 0.

    Attributes:
        w_MK: share of each task in the label tokens; 0 without training.
        u_MK: weight of each task in the gradient: less than w where gradients are clipped.
        values_MR, vectors_MRR: eigenvalues of H in the basis, and their vectors in columns.
        x_CMR: the vectors x_c, in the eigenvectors.
        f_CMR, complement_f_C: f_c(h) in the basis, and f_c(0) in the complement.
        delta_MR: the displacement in the basis.
        sources_MS: in the complement, coefficients of the tasks' mean gradients and of the further
            vectors.
    """

    w_MK: Array
    u_MK: Array
    values_MR: Array
    vectors_MRR: Array
    x_CMR: Array
    f_CMR: Array
    complement_f_C: Array
    delta_MR: Array
    sources_MS: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class _Side:
    """An update, what it makes of the target's loss, and how that answers to the tasks' b and H.

    The loss changes with them by
    ``-sum_k u_k (s . (db_k + curvature_share * dH_k delta) + s_complement * b_T . db_k)``.
    """

    update: PredictedUpdate
    change: TargetChange
    group_change_MG: Array
    """Change of the mean loss of each of the store's groups."""

    @property
    def sensitivity_MR(self) -> Array:
        """s, in the basis."""
        update = self.update
        own_MR = update.f_CMR[0] * turned(update.vectors_MRR, self.change.of_delta_MR)
        return -back(update.vectors_MRR, own_MR)

    @property
    def complement_sensitivity(self) -> float:
        """s_complement, in the orthogonal complement of the basis."""
        return -float(self.update.complement_f_C[0])


def check_options(rank: int | None, model_error: float) -> None:
    """Raise ValueError unless these options of an estimator make sense."""
    require_count("rank", rank, 1, optional=True)
    if not (is_number(model_error) and model_error >= 0):
        raise ValueError(f"model_error must be 0 or more, got {model_error!r}.")


class FittedQuadratic(FittedEstimator):
    """An estimator that predicts an update and evaluates the target's quadratic there."""

    curvature_share: ClassVar[float]
    """See :class:`_Side`."""
    _store: GradientStore
    _model: QuadraticModel
    _clipping: float = 1.0
    """The factor by which clipping shortens gradients."""
    _model_error: float
    """Standard error of each term of the predicted change, as a share of the term."""

    @abstractmethod
    def _response(self, values: Array) -> Array:
        """The functions f_c of eigenvalues of any shape [...]: [C, ...]."""

    @abstractmethod
    def _response_slope(self, values: Array) -> Array:
        """The derivatives of the functions f_c [C, ...]."""

    def _predict(self, shares_MK: Array) -> PredictedUpdate:
        """The update by training on mixtures, given the share of each task in their rows."""
        model, is_idle_M = self._model, ~shares_MK.any(1)
        w_MK = model.counts.token_weights(shares_MK)
        u_MK = self._clipping * w_MK
        values_MR, vectors_MRR = model.tasks.eigendecomposition(u_MK)
        used = used_columns(u_MK)
        b_MR = u_MK[:, used] @ model.tasks.b_KR[used]
        x_CMR = np.stack(
            [
                turned(vectors_MRR, b_MR),
                *(np.einsum("mrs,r->ms", vectors_MRR, x_R) for x_R in model.vectors_VR),
            ]
        )
        f_CMR, complement_f_C = self._response(values_MR), self._response(np.zeros(()))
        delta_MR = back(vectors_MRR, (f_CMR * x_CMR).sum(0))
        further_MV = np.tile(complement_f_C[1:], (len(u_MK), 1))
        sources_MS = np.hstack([complement_f_C[0] * u_MK, further_MV])
        delta_MR[is_idle_M] = sources_MS[is_idle_M] = 0.0
        return PredictedUpdate(
            w_MK=w_MK,
            u_MK=u_MK,
            values_MR=values_MR,
            vectors_MRR=vectors_MRR,
            x_CMR=x_CMR,
            f_CMR=f_CMR,
            complement_f_C=complement_f_C,
            delta_MR=delta_MR,
            sources_MS=sources_MS,
        )

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
        reference = None if reference_K is None else self._side(reference_K[None])

        def terms(side: _Side) -> Array:  # linear, quadratic, warm-up gain: [3, M]
            gain_M = side.update.u_MK.any(1) * self._model.warm_up_gain
            change = side.change
            return np.stack([change.linear_MT @ target.weights_T, change.quadratic_M, gain_M])

        def work(shares: Array) -> tuple[Array, Array, Array]:
            side = self._side(shares)
            terms_3M, group_change_MG = terms(side), side.group_change_MG
            unlike_M: Array | float = 0.0
            if reference is not None:
                others_31 = terms(reference)
                # Errors of two mixtures are correlated by the cosine of their displacements, if it
                # is positive. This is one less their cosine, and exactly 0 where they are the same.
                apart_MR = unit_vectors(side.update.delta_MR)
                apart_MR -= unit_vectors(reference.update.delta_MR)
                unlike_M = np.minimum((apart_MR**2).sum(1) / 2, 1.0)
                unlike_M *= 2 * (terms_3M * others_31).sum(0)
                terms_3M = terms_3M - others_31
                group_change_MG = group_change_MG - reference.group_change_MG
            variance_M = self._model_error**2 * ((terms_3M**2).sum(0) + unlike_M)
            variance_M += self._target_variance(side, reference)
            variance_M += self._task_variance(side, reference)
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

    def _side(self, shares_MK: Array) -> _Side:
        update, groups = self._predict(shares_MK), self._model.groups
        change, *of_groups = (
            target.change(update.delta_MR, update.sources_MS)
            for target in (self._model.target, *groups)
        )
        group_change_MG = np.empty((len(shares_MK), len(groups)))
        for g, (group, of_group) in enumerate(zip(groups, of_groups, strict=True)):
            group_change_MG[:, g] = of_group.linear_MT @ group.weights_T + of_group.quadratic_M
        return _Side(update=update, change=change, group_change_MG=group_change_MG)

    @property
    def has_gradient(self) -> bool:
        return True

    def gradient(self, weights: ArrayLike) -> Array:
        return self._gradients(weights, [self._model.target])[:, 0]

    def group_gradients(self, weights: ArrayLike) -> Array:
        return self._gradients(weights, self._model.groups)

    def _gradients(self, weights: ArrayLike, targets: Sequence[TargetQuadratic]) -> Array:
        """Derivatives of the losses of some targets with respect to the tasks' shares of the rows.

        By the adjoint: backwards from the loss through the displacement, its functions of H, and
        the weights u, for all K tasks together.
        """
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)

        def work(shares: Array) -> tuple[Array]:
            update = self._predict(shares)
            of_MGK = np.empty((len(shares), len(targets), shares.shape[1]))
            for g, target in enumerate(targets):
                change = target.change(update.delta_MR, update.sources_MS)
                of_MGK[:, g] = self._pull_back(update, change, shares)
                # An estimate of less than 0 is one of 0.
                loss_M = target.loss + change.linear_MT @ target.weights_T + change.quadratic_M
                of_MGK[loss_M <= 0, g] = 0.0
            return (of_MGK,)

        (result_MGK,) = in_chunks(shares_MK, work, size=_MIXTURES_AT_ONCE)
        return result_MGK

    def _pull_back(self, update: PredictedUpdate, change: TargetChange, shares_MK: Array) -> Array:
        """Derivatives of a target's loss along the simplex [M, K]."""
        tasks = self._model.tasks
        of_delta_MR = turned(update.vectors_MRR, change.of_delta_MR)
        of_b_MR = back(update.vectors_MRR, update.f_CMR[0] * of_delta_MR)
        of_H_MRR = derivative(
            update.values_MR,
            update.vectors_MRR,
            update.f_CMR,
            self._response_slope(update.values_MR),
            of_delta_MR,
            update.x_CMR,
        )
        of_u_MK = of_b_MR @ tasks.b_KR.T
        of_u_MK += update.complement_f_C[0] * change.of_sources_S[: len(tasks.b_KR)]
        of_u_MK += tasks.pull_back(of_H_MRR)
        # The weights w are in proportion to the shares of the rows times their label tokens.
        tokens_K = self._model.counts.tokens_per_row_K
        of_w_MK = self._clipping * of_u_MK
        of_w_MK -= (of_w_MK * update.w_MK).sum(1, keepdims=True)
        of_shares_MK = of_w_MK * tokens_K / np.maximum(shares_MK @ tokens_K, TINY)[:, None]
        of_shares_MK[~shares_MK.any(1)] = 0.0
        return of_shares_MK - of_shares_MK.mean(1, keepdims=True)

    def task_losses(self, weights: ArrayLike) -> Array | None:
        training = self._store.remaining_training
        if training is not None and training.restarts:
            return None  # the quadratic model is about a run that continues
        shares_MK = normalize_mixtures(weights, self._store.task_sizes)
        with one_blas_thread():
            change_MK = self._model.tasks.loss_changes(self._predict(shares_MK).delta_MR)
        return np.maximum(self._store.task_losses + change_MK, 0.0)

    def diagnostics(self) -> dict[str, float]:
        """Numbers that say how far to trust the estimates; most are over random subsets of tasks.

        ``loss_at_theta_0_nats``: the target's loss at the linearization point.
        ``terms_over_loss``: root mean square of the linear and quadratic terms, as a share of that
        loss. Near 1, training goes farther than a quadratic model can.
        ``sampling_error_over_spread``: standard error by which examples of the tasks were captured,
        as a share of the estimates' standard deviation. Near 1, the ranking depends on them.
        ``outlier_gradient_share``: see ``outlier_share``.
        ``largest_target_example_share``: largest share of one example in the lengths of the
        target's gradients. Near 1, the estimates are about that example.
        Further ones are those of the probes, see ``QuadraticModel.probe_diagnostics``.
        """
        tasks, target = self._model.tasks, self._model.target
        masks_MK = random_subsets(len(tasks.b_KD))
        with one_blas_thread():
            side = self._side(normalize_mixtures(masks_MK, self._store.task_sizes))
            sampling = np.sqrt(self._task_variance(side, None).mean())
        linear_M, quadratic_M = side.change.linear_MT @ target.weights_T, side.change.quadratic_M
        loss_M = linear_M + quadratic_M
        square = float(np.mean(linear_M**2 + quadratic_M**2))
        spread = loss_M.std() if len(masks_MK[0]) > 1 else np.inf  # one task: nothing to rank
        lengths_T = target.weights_T * np.linalg.norm(target.g_TR, axis=1)
        return {
            "loss_at_theta_0_nats": target.loss,
            "terms_over_loss": float(np.sqrt(square)) / max(target.loss, TINY),
            "sampling_error_over_spread": float(sampling / max(spread, TINY)),
            "outlier_gradient_share": outlier_share(
                tasks.norm_N[:, None],  # the norm of a norm is itself
                self._store.task_ids,
            ),
            "largest_target_example_share": float(lengths_T.max() / max(lengths_T.sum(), TINY)),
            **self._model.probe_diagnostics(),
        }

    def _target_variance(self, side: _Side, reference: _Side | None) -> Array:
        """Variance of the loss over which examples of the target were captured [M]."""
        target = self._model.target
        count = len(target.weights_T)
        missing = 1 - count / max(int(self._store.target.task_sizes[0]), count)
        if missing == 0 or count < 2:
            return np.zeros(len(side.update.delta_MR))

        def change(of: _Side) -> Array:
            return of.change.linear_MT + (of.update.delta_MR @ target.phi_TR.T) ** 2 / 2

        losses_MT = change(side) + (target.losses_T if reference is None else -change(reference))
        mean_M = losses_MT @ target.weights_T
        spread_M = ((losses_MT - mean_M[:, None]) ** 2) @ target.weights_T**2
        return missing * spread_M * count / (count - 1)

    def _task_variance(self, side: _Side, reference: _Side | None) -> Array:
        """Variance of the loss over which examples of the tasks were captured [M]."""
        tasks, counts = self._model.tasks, self._model.counts
        factor_K = counts.missing_K * counts.counts_K / np.maximum(counts.counts_K - 1, 1)
        sides = [of for of in (side, reference) if of is not None]
        factor_K = factor_K * np.any([of.update.u_MK.any(0) for of in sides], axis=0)
        influences = [self._influence(of, factor_K > 0) for of in sides]
        variance_M = np.zeros(len(side.update.delta_MR))
        for k, examples in tasks.chunks:
            if factor_K[k]:
                influence_MN = influences[0](k, examples)
                if reference is not None:
                    influence_MN = influence_MN - influences[1](k, examples)
                weights_N = counts.example_weights_N[examples]
                variance_M += factor_K[k] * (influence_MN**2 @ weights_N**2)
        return variance_M

    def _influence(self, of: _Side, of_K: Array) -> Callable[[int, slice], Array]:
        """What some examples of a task change of the loss [M, N]; for the tasks of a mask [K]."""
        tasks, share = self._model.tasks, self.curvature_share
        s_MR, delta_MR, u_MK = of.sensitivity_MR, of.update.delta_MR, of.update.u_MK
        complement = of.complement_sensitivity
        mean_MK = np.zeros(u_MK.shape)
        mean_MK[:, of_K] = (
            s_MR @ tasks.b_KR[of_K].T
            + complement * tasks.complement_response_K[of_K]
            + share
            * np.einsum(
                "mr,krs,ms->mk", s_MR, tasks.uncorrected_H_KRR[of_K], delta_MR, optimize=True
            )
        )

        def influence(k: int, examples: slice) -> Array:
            phi_NR = tasks.phi_NR[examples].astype(np.float64)
            influence_MN = share * (s_MR @ phi_NR.T) * (delta_MR @ phi_NR.T)
            influence_MN += s_MR @ tasks.g_NR[examples].T
            influence_MN += complement * tasks.complement_response_N[examples]
            return u_MK[:, [k]] * (influence_MN - mean_MK[:, [k]])

        return influence
