"""Quadratic models of the losses around the anchor, from projected gradients.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
D projection_dim, R dimensions in which curvature is modelled, S sources of a displacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from hf_auxselect.estimators.base import Array
from hf_auxselect.store import GradientStore

_ROWS_AT_ONCE = 4096
"""Rows of gradients that are in memory at once in float64 (16 MB for 512 numbers each)."""


def chunks_of_tasks(task_ids: Array) -> Iterator[tuple[int, slice]]:
    """Rows of one task that follow each other, few at a time: the task, and which rows."""
    ends = [*(np.flatnonzero(np.diff(task_ids)) + 1).tolist(), len(task_ids)]
    start = 0
    for end in ends:
        for first in range(start, end, _ROWS_AT_ONCE):
            yield int(task_ids[start]), slice(first, min(first + _ROWS_AT_ONCE, end))
        start = end


ReadGradients = Callable[[GradientStore, slice], tuple[Array, Array]]
"""Of some rows of a store: gradients g of the loss, and phi with H = E[phi phi^T]; float64 [., D]
each."""


class QuadraticModel:
    """Quadratic models of the tasks' losses and of the target's around the anchor, from a store.

        L_w(delta) = L_w + b_w . delta + delta^T H_w delta / 2,      the same with T for the target,

    where b = E[g] and H = E[phi phi^T]. Both are linear in the mixture w, and means are weighted by
    label tokens as in the trainer's loss: b_w = sum_k w_k b_k. A random projection to D dimensions
    adds trace(H)/D to every eigenvalue in expectation, which is subtracted. Outside the R leading
    axes of the tasks' and the target's H, curvature is the same in all directions, with the trace
    that is left; there a displacement is known by its S = K + V sources, which are the tasks' mean
    gradients and the further vectors.

    The gradients are read twice, some rows at a time; in memory stay 2 R float32 numbers per
    example of the tasks.

    Args:
        store: the examples.
        read_gradients: g and phi of some of them.
        rank: R; D if that is less.
        vectors_VD: further vectors that displacements are made of.

    Attributes:
        rank: R.
        share_N: share of an example in its task's loss.
        counts_K, tokens_per_row_K: captured examples of a task, and their mean label tokens.
        b_KD, b_KR: mean gradients of the tasks, whole and within the axes.
        vectors_VR: the further vectors within the axes.
        norm_N: norms of the gradients g within the axes.
        anchor_loss: of the target, nats per label token.
    """

    def __init__(
        self,
        store: GradientStore,
        read_gradients: ReadGradients,
        *,
        rank: int,
        vectors_VD: Array | None = None,
    ) -> None:
        self._store = store
        self._read = read_gradients
        self.counts_K = np.bincount(store.task_ids)
        tokens_N = store.num_label_tokens.astype(np.float64)
        tokens_K = np.bincount(store.task_ids, tokens_N)
        self.tokens_per_row_K = tokens_K / self.counts_K
        self.share_N = tokens_N / tokens_K[store.task_ids]
        self.b_KD, self._trace_K, sum_H_DD = self._moments(store, self.share_N)
        self._dim = len(sum_H_DD)

        self._omega_T = store.target.example_weights
        self._losses_T = store.target.losses.astype(np.float64)
        self.anchor_loss = float(store.target.task_losses[0])
        target_b_1D, (target_trace,), target_H_DD = self._moments(store.target, self._omega_T)

        _, axes = np.linalg.eigh(sum_H_DD / len(self.b_KD) + target_H_DD)
        self._axes_DR = axes[:, ::-1][:, : min(rank, self._dim)]
        self.rank = self._axes_DR.shape[1]
        self._reduce_tasks(target_b_1D[0])
        self._target_b_R = self._inside(target_b_1D[0])
        self._target_H_RR = self._inside(self._inside(target_H_DD).T)
        self._target_outer_curvature = self._curvature_left(self._target_H_RR, target_trace)
        self._target_H_RR -= target_trace / self._dim * np.eye(self.rank)
        self._reduce_target(np.zeros((0, self._dim)) if vectors_VD is None else vectors_VD)

    def token_weights(self, rows_MK: Array) -> Array:
        """Share of each task in the label tokens of mixtures of rows; each sums to 1 or is 0."""
        w_MK = rows_MK * self.tokens_per_row_K
        return w_MK / np.where(rows_MK.any(1), w_MK.sum(1), 1.0)[:, None]

    def curvature(self, w_MK: Array) -> tuple[Array, Array, Array]:
        """Curvature of mixtures: sum_k w_k H_k less what the projection adds, so perhaps negative.

        Returns:
            Eigenvalues within the axes, in ascending order [M, R]; their vectors, in columns
            [M, R, R]; the curvature outside [M].
        """
        values_MR, vectors_MRR = np.linalg.eigh(np.tensordot(w_MK, self._H_KRR, 1))
        added_M = self.added_curvature(w_MK)
        return values_MR - added_M[:, None], vectors_MRR, w_MK @ self._outer_curvature_K

    def added_curvature(self, w_MK: Array) -> Array:
        """What the projection adds to every eigenvalue of mixtures, in expectation [M]."""
        return w_MK @ self._trace_K / self._dim

    def target_change(self, delta_MR: Array, sources_MS: Array) -> tuple[Array, Array, Array]:
        """How the target's loss answers to displacements.

        Args:
            delta_MR: the displacements within the axes.
            sources_MS: their coefficients outside: of the tasks' gradients, then of the vectors.

        Returns:
            Linear term of each example [M, T]; quadratic term of their mean [M], not negative; both
            in nats per label token. Gradient of the loss at the displacement, in the axes [M, R].
        """
        linear_MT = delta_MR @ self._target_g_TR.T + sources_MS @ self._target_outer_TS.T
        H_delta_MR = delta_MR @ self._target_H_RR
        square_M = np.einsum("ms,st,mt->m", sources_MS, self._outer_gram_SS, sources_MS)
        quadratic_M = (delta_MR * H_delta_MR).sum(1) + self._target_outer_curvature * square_M
        return linear_MT, np.maximum(quadratic_M / 2, 0.0), self._target_b_R + H_delta_MR

    def target_mean(self, values_MT: Array) -> Array:
        """Mean over the target's examples, weighted as in its loss [M]."""
        return values_MT @ self._omega_T

    def target_variance(self, delta_MR: Array, linear_MT: Array) -> Array:
        """Variance of the loss over which rows of the target were captured [M]."""
        count = len(self._omega_T)
        missing = 1 - count / max(int(self._store.target.task_sizes[0]), count)
        if missing == 0 or count < 2:
            return np.zeros(len(delta_MR))
        losses_MT = self._losses_T + linear_MT + (delta_MR @ self._target_phi_TR.T) ** 2 / 2
        mean_M = losses_MT @ self._omega_T
        spread_M = ((losses_MT - mean_M[:, None]) ** 2) @ self._omega_T**2
        return missing * spread_M * count / (count - 1)

    def task_variance(
        self,
        w_MK: Array,
        slope_MR: Array,
        outer_slope_M: Array,
        delta_MR: Array,
        *,
        curvature_share: float,
    ) -> Array:
        """Variance of the loss over which rows of the tasks were captured [M].

        By the delta method, from how the loss answers to changes of b_w and H_w:
        ``-slope . (db + curvature_share * dH delta)`` within the axes, and outside of them
        ``-outer_slope * b_T . db``.
        """
        missing_K = 1 - self.counts_K / np.maximum(self._store.task_sizes, self.counts_K)
        missing_K[self.counts_K < 2] = 0.0
        mean_MK = slope_MR @ self.b_KR.T + outer_slope_M[:, None] * self._outer_response_K
        mean_MK += curvature_share * np.einsum(
            "mr,krs,ms->mk", slope_MR, self._H_KRR, delta_MR, optimize=True
        )
        spread_MK = np.zeros_like(mean_MK)
        for k, rows in chunks_of_tasks(self._store.task_ids):
            if missing_K[k]:
                phi_NR = self._phi_NR[rows].astype(np.float64)
                influence_MN = curvature_share * (slope_MR @ phi_NR.T) * (delta_MR @ phi_NR.T)
                influence_MN += slope_MR @ self._g_NR[rows].T
                influence_MN += outer_slope_M[:, None] * self._outer_response_N[rows]
                influence_MN -= mean_MK[:, [k]]
                spread_MK[:, k] += influence_MN**2 @ self.share_N[rows] ** 2
        factor_K = missing_K * self.counts_K / np.maximum(self.counts_K - 1, 1)
        return (w_MK**2 * spread_MK) @ factor_K

    def _moments(self, store: GradientStore, weights_N: Array) -> tuple[Array, Array, Array]:
        """Of each task b [K, D] and the trace of H [K]; the sum over tasks of H [D, D]."""
        dim = store.gradients.shape[1]
        b_KD = np.zeros((len(store.task_names), dim))
        trace_K = np.zeros(len(b_KD))
        sum_H_DD = np.zeros((dim, dim))
        for k, rows in chunks_of_tasks(store.task_ids):
            g, phi = self._read(store, rows)
            b_KD[k] += weights_N[rows] @ g
            trace_K[k] += weights_N[rows] @ (phi**2).sum(1)
            sum_H_DD += (phi * weights_N[rows, None]).T @ phi
        return b_KD, trace_K, sum_H_DD

    def _inside(self, vectors: Array) -> Array:
        return vectors @ self._axes_DR

    def _outside(self, vectors: Array) -> Array:
        return vectors - (vectors @ self._axes_DR) @ self._axes_DR.T

    def _curvature_left(self, H_RR: Array, trace: Array | float) -> Array:
        """Mean eigenvalue outside the axes, less what the projection adds; shaped as ``trace``."""
        if self.rank == self._dim:
            return np.zeros_like(trace)
        left = trace - np.trace(H_RR, axis1=-2, axis2=-1)
        return left / (self._dim - self.rank) - np.asarray(trace) / self._dim

    def _reduce_tasks(self, target_b_D: Array) -> None:
        """Turn the tasks into the axes."""
        num_examples = len(self._store)
        outer_target_b_D = self._outside(target_b_D)
        self.b_KR = self._inside(self.b_KD)
        self._H_KRR = np.zeros((len(self.b_KD), self.rank, self.rank))
        # For the interval alone, and no less precise than the gradients were.
        self._phi_NR = np.empty((num_examples, self.rank), np.float32)
        self._g_NR = np.empty((num_examples, self.rank), np.float32)
        self._outer_response_N = np.empty(num_examples)
        self.norm_N = np.empty(num_examples)
        for k, rows in chunks_of_tasks(self._store.task_ids):
            g_ND, phi_ND = self._read(self._store, rows)
            g, phi = self._inside(g_ND), self._inside(phi_ND)
            self._H_KRR[k] += (phi * self.share_N[rows, None]).T @ phi
            self._g_NR[rows], self._phi_NR[rows] = g, phi
            self.norm_N[rows] = np.linalg.norm(g, axis=1)
            self._outer_response_N[rows] = g_ND @ outer_target_b_D
        self._outer_response_K = self.b_KD @ outer_target_b_D
        self._outer_curvature_K = self._curvature_left(self._H_KRR, self._trace_K)

    def _reduce_target(self, vectors_VD: Array) -> None:
        """Turn the target into the axes, and keep its inner products outside of them."""
        target = self._store.target
        self.vectors_VR = self._inside(vectors_VD)
        outer_SD = self._outside(np.vstack([self.b_KD, vectors_VD]))
        self._outer_gram_SS = outer_SD @ outer_SD.T
        self._target_outer_TS = np.empty((len(target), len(outer_SD)))
        self._target_g_TR = np.empty((len(target), self.rank))
        self._target_phi_TR = np.empty((len(target), self.rank))
        for _, rows in chunks_of_tasks(target.task_ids):
            g_TD, phi_TD = self._read(target, rows)
            self._target_g_TR[rows], self._target_phi_TR[rows] = (
                self._inside(g_TD),
                self._inside(phi_TD),
            )
            self._target_outer_TS[rows] = g_TD @ outer_SD.T
