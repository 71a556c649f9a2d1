"""Quadratic models of the losses around the anchor, from projected gradients.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures, E ends,
D projection_dim, R dimensions in which curvature is modelled, S sources of a displacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hf_auxselect.estimators.ahead import Ahead, with_losses, with_secant
from hf_auxselect.estimators.base import Array, kernel_distance, one_blas_thread
from hf_auxselect.store.arrays import GradientStore, evenly_spread

_NUMBERS_AT_ONCE = 2**21
"""Numbers of gradients that are in memory at once (16 MB in float64)."""

_MOST_AXES = 96
"""Unless told otherwise."""

_INDEPENDENT = 1e-7
"""Length that is left of a unit vector which still counts as a direction of its own."""


def chunks_of_tasks(store: GradientStore) -> Iterator[tuple[int, slice]]:
    """Rows of one task that follow each other, few at a time: the task, and which rows."""
    task_ids, size = store.task_ids, max(1, _NUMBERS_AT_ONCE // store.gradients.shape[1])
    ends = [*(np.flatnonzero(np.diff(task_ids)) + 1).tolist(), len(task_ids)]
    start = 0
    for end in ends:
        for first in range(start, end, size):
            yield int(task_ids[start]), slice(first, min(first + size, end))
        start = end


class Covariance(NamedTuple):
    """Of gradients: within the axes [M, R, R], and its trace outside [M]."""

    inner: Array
    outer: Array


ReadGradients = Callable[[GradientStore, slice], tuple[Array, Array]]
"""Of some rows of a store: gradients g of the loss, and phi with H = E[phi phi^T]; float64 [., D]
each."""


class QuadraticModel:
    """Quadratic models of the tasks' losses and of the target's around the anchor, from a store.

        L_w(delta) = L_w + b_w . delta + delta^T H_w delta / 2,      the same with T for the target,

    where b = E[g] and H = E[phi phi^T]. Both are linear in the mixture w, and means are weighted by
    label tokens as in the trainer's loss: b_w = sum_k w_k b_k. A random projection to D dimensions
    adds trace(H)/D to every eigenvalue in expectation, which is subtracted.

    Curvature is modelled in R axes, a block Krylov space: the directions of all b, of the target's
    too, and of the further vectors; then those of H applied to them, H twice, and so on, H being
    the mean of the tasks' and the target's. What training makes of b, a function of H times b,
    lies in the first of them almost entirely. Where there are more directions than R, the leading
    ones (singular vectors of the normalised vectors) are taken. Outside the axes, curvature is the
    same in all directions, with the trace that is left; there a displacement is known by its
    S = K + V sources, which are the tasks' mean gradients and the further vectors.

    The gradients are read some rows at a time, 2 + R / (K + V + 1) times; in memory stay 2 R
    float32 numbers per example of the tasks.

    Args:
        store: the examples.
        read_gradients: g and phi of some of them.
        rank: R; D if that is less. None: the mean number of a task's examples, at most 96: more
            axes than a task has examples would describe which examples were captured.
        vectors_VD: further vectors that displacements are made of.
        ahead: by how much the tasks' b, and the target's losses, were measured to change. Each H_k,
            within the axes, is made to agree with it (``with_secant``), and so is the target's H,
            which is not followed (``with_losses``).

    Attributes:
        rank: R.
        share_N: share of an example in its task's loss.
        counts_K: captured examples of a task.
        examples_per_row_K, tokens_per_row_K: mean examples and label tokens in a row of a task;
            several examples where rows are packed, else one.
        b_KD, b_KR: mean gradients of the tasks, whole and within the axes.
        missing_K: share of a task's examples that were not captured.
        vectors_VR: the further vectors within the axes.
        g_NR, phi_NR, norm_N: gradients of the examples within the axes (float32); norms of g.
        outer_response_K, outer_response_N: inner products with the target's b outside the axes, of
            the tasks' b and of each g.
        captured_H_KRR: curvature of the tasks before anything ahead has changed it.
        omega_T, losses_T: share of an example in the target's loss; its loss.
        target_g_TR, target_phi_TR: gradients of the target's examples within the axes.
        anchor_loss: of the target, nats per label token.
        given_up: what training up to the anchor has taken from it, if training restarts.

    Source: Saad, "Analysis of Some Krylov Subspace Approximations to the Matrix Exponential
    Operator" (SIAM J. Numer. Anal. 1992), section 2, for blocks of vectors.
    """

    def __init__(
        self,
        store: GradientStore,
        read_gradients: ReadGradients,
        *,
        rank: int | None,
        vectors_VD: Array | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._store = store
        self._read = read_gradients
        self._ahead = ahead
        with one_blas_thread():
            self._build(rank, vectors_VD)

    def _build(self, rank: int | None, vectors_VD: Array | None) -> None:
        store = self._store
        self.counts_K = np.bincount(store.task_ids)
        tokens_N = store.num_label_tokens.astype(np.float64)
        tokens_K = np.bincount(store.task_ids, tokens_N)
        self.examples_per_row_K = store.examples_per_row
        self.tokens_per_row_K = tokens_K / self.counts_K * self.examples_per_row_K
        self.share_N = tokens_N / tokens_K[store.task_ids]
        num_examples_K = store.task_sizes * self.examples_per_row_K
        self.missing_K = 1 - self.counts_K / np.maximum(num_examples_K, self.counts_K)
        self.missing_K[self.counts_K < 2] = 0.0  # one does not tell how they differ
        self.b_KD, self._trace_K = self._moments(store, self.share_N)
        self._dim = self.b_KD.shape[1]

        self.omega_T = store.target.example_weights
        self.losses_T = store.target.losses.astype(np.float64)
        self.anchor_loss = float(store.target.task_losses[0])
        self.given_up = self._loss_given_up()
        target_b_1D, (target_trace,) = self._moments(store.target, self.omega_T)

        if vectors_VD is None:
            vectors_VD = np.zeros((0, self._dim))
        starts = [self.b_KD, target_b_1D, vectors_VD]
        if self._ahead is not None:
            # All of them lead in almost the same direction.
            starts.append(self._ahead.second_points_KD.mean(0, keepdims=True))
        self._axes_DR = self._krylov_axes(np.vstack(starts), rank)
        self.rank = self._axes_DR.shape[1]
        self._target_b_R = self._inside(target_b_1D[0])
        self._reduce_tasks(target_b_1D[0])
        self._reduce_target(vectors_VD, target_trace)
        if self._ahead is not None:
            self._H_KRR = self._agreeing_with_gradients(self._ahead)
            self._target_H_RR = self._agreeing_with_losses(self._ahead)

    def _krylov_axes(self, starts_SD: Array, rank: int | None) -> Array:
        """Orthonormal axes [D, R]; fewer if they already hold all that H makes of the starts."""
        if rank is None:
            rank = max(min(len(self._store) // len(self.b_KD), _MOST_AXES), 1)
        rank = min(rank, self._dim)
        axes_DR, block_DS = np.zeros((self._dim, 0)), starts_SD.T
        while True:
            lengths_S = np.linalg.norm(block_DS, axis=0)
            block_DS = block_DS[:, lengths_S > 0] / lengths_S[lengths_S > 0]
            for _ in range(2):  # once leaves what rounding leaves
                block_DS = block_DS - axes_DR @ (axes_DR.T @ block_DS)
            directions, sizes, _ = np.linalg.svd(block_DS, full_matrices=False)
            new_DS = directions[:, sizes > _INDEPENDENT][:, : rank - axes_DR.shape[1]]
            axes_DR = np.hstack([axes_DR, new_DS])
            if not new_DS.size or axes_DR.shape[1] == rank:
                break
            block_DS = self._curve(self._store, self.share_N / len(self.b_KD), new_DS)
            block_DS += self._curve(self._store.target, self.omega_T, new_DS)
        return axes_DR if axes_DR.size else np.eye(self._dim, 1)

    def _curve(self, store: GradientStore, weights_N: Array, vectors_DS: Array) -> Array:
        """The weighted sum of phi phi^T, times some vectors [D, S]."""
        result_DS = np.zeros_like(vectors_DS)
        for _, rows in chunks_of_tasks(store):
            phi = self._read(store, rows)[1]
            result_DS += phi.T @ (weights_N[rows, None] * (phi @ vectors_DS))
        return result_DS

    def outwards(self, vectors: Array) -> Array:
        """Vectors within the axes [., R], in all D dimensions."""
        return vectors @ self._axes_DR.T

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

    def row_covariance(self, rows_MK: Array, w_MK: Array) -> Covariance:
        """Of the gradient of one row of a mixture, in the loss of a batch."""
        w_per_row_MK = w_MK * self.tokens_per_row_K
        w_per_row_MK /= np.where(rows_MK.any(1), rows_MK @ self.tokens_per_row_K, 1.0)[:, None]
        b_MR, b_MD = w_MK @ self.b_KR, w_MK @ self.b_KD
        return Covariance(
            np.tensordot(w_per_row_MK, self._moment_KRR, 1) - b_MR[:, :, None] * b_MR[:, None, :],
            w_per_row_MK @ self._outer_moment_K - (b_MD**2).sum(1) + (b_MR**2).sum(1),
        )

    def capture_covariance(self, w_MK: Array) -> Covariance | None:
        """Of the error of the mean gradient, by which examples were captured; None if all were."""
        if not self.missing_K.any():
            return None
        # A row of m independent examples has an m-th of the variance of one.
        per_example_K = self.examples_per_row_K / np.maximum(self.counts_K - 1, 1)
        w_MK = w_MK**2 * self.missing_K * per_example_K
        outer_K = self._outer_moment_K - (self.b_KD**2).sum(1) + (self.b_KR**2).sum(1)
        moment_MRR = np.tensordot(w_MK, self._moment_KRR, 1)
        return Covariance(
            moment_MRR - np.einsum("mk,kr,ks->mrs", w_MK, self.b_KR, self.b_KR, optimize=True),
            w_MK @ outer_K,
        )

    def mean_target_curves(
        self, vectors_MRR: Array, randoms: Iterable[tuple[Covariance, Array]]
    ) -> list[Array]:
        """Mean quadratic changes of the target's loss by random displacements, [M, Q] each.

        Args:
            vectors_MRR: eigenvectors of the mixtures' curvature, in columns.
            randoms: covariance of a random gradient, and Q displacements per unit of it along each
                of these vectors and last outside of the axes, [M, R + 1, Q].
        """
        turned_MRR = vectors_MRR.transpose(0, 2, 1)
        H_MRR = turned_MRR @ self._target_H_RR @ vectors_MRR
        curves = []
        for covariance, displacement_MRQ in randoms:
            both_MRR = H_MRR * (turned_MRR @ covariance.inner @ vectors_MRR)
            inner_MRQ, outer_MQ = displacement_MRQ[:, :-1], displacement_MRQ[:, -1]
            outer_M = self._target_outer_curvature * covariance.outer
            curves.append(
                ((inner_MRQ * (both_MRR @ inner_MRQ)).sum(1) + outer_M[:, None] * outer_MQ**2) / 2
            )
        return curves

    def target_change(self, delta_MR: Array, sources_MS: Array) -> tuple[Array, Array, Array]:
        """How the target's loss answers to displacements.

        Args:
            delta_MR: the displacements within the axes.
            sources_MS: their coefficients outside: of the tasks' gradients, then of the vectors.

        Returns:
            Linear term of each example [M, T]; quadratic term of their mean [M]; both in nats per
            label token. Gradient of the loss at the displacement, in the axes [M, R].
        """
        linear_MT = delta_MR @ self.target_g_TR.T + sources_MS @ self._target_outer_TS.T
        H_delta_MR = delta_MR @ self._target_H_RR
        square_M = np.einsum("ms,st,mt->m", sources_MS, self._outer_gram_SS, sources_MS)
        quadratic_M = (delta_MR * H_delta_MR).sum(1) + self._target_outer_curvature * square_M
        return linear_MT, quadratic_M / 2, self._target_b_R + H_delta_MR

    def diagnostics_ahead(self) -> dict[str, float]:
        """How gradients changed where they were measured a second time; nothing if they were not.

        The share of the change of a task's gradient, within the axes, that its Gauss-Newton matrix
        had not foreseen, in the median over tasks; what it had not foreseen of the target's loss at
        the ends, in the root mean square and as a share of the loss at the anchor; and the
        ``kernel_distance`` of the tasks' mean gradients.
        """
        if self._ahead is None:
            return {}
        return {
            "linearization_residual": self._linearization_residual,
            "target_residual": self._target_residual,
            "kernel_drift": kernel_distance(self.b_KD, self.b_KD + self._ahead.gradient_changes_KD),
        }

    def _moments(self, store: GradientStore, weights_N: Array) -> tuple[Array, Array]:
        """Of each task b [K, D] and the trace of H [K]."""
        b_KD = np.zeros((len(store.task_names), store.gradients.shape[1]))
        trace_K = np.zeros(len(b_KD))
        for k, rows in chunks_of_tasks(store):
            g, phi = self._read(store, rows)
            b_KD[k] += weights_N[rows] @ g
            trace_K[k] += weights_N[rows] @ (phi**2).sum(1)
        return b_KD, trace_K

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
        # H, and the second moment of a row's contribution to b.
        self._H_KRR, self._moment_KRR = np.zeros((2, len(self.b_KD), self.rank, self.rank))
        self._outer_moment_K = np.zeros(len(self.b_KD))
        tokens_N = self._store.num_label_tokens.astype(np.float64)
        # For the interval alone, and no less precise than the gradients were.
        self.phi_NR = np.empty((num_examples, self.rank), np.float32)
        self.g_NR = np.empty((num_examples, self.rank), np.float32)
        self.outer_response_N = np.empty(num_examples)
        self.norm_N = np.empty(num_examples)
        for k, rows in chunks_of_tasks(self._store):
            g_ND, phi_ND = self._read(self._store, rows)
            g, phi = self._inside(g_ND), self._inside(phi_ND)
            self._H_KRR[k] += (phi * self.share_N[rows, None]).T @ phi
            self.g_NR[rows], self.phi_NR[rows] = g, phi
            self.norm_N[rows] = np.linalg.norm(g, axis=1)
            self.outer_response_N[rows] = g_ND @ outer_target_b_D
            contribution_N = tokens_N[rows] / self.tokens_per_row_K[k]
            weights_N = contribution_N**2 / self.counts_K[k] * self.examples_per_row_K[k]
            self._moment_KRR[k] += (g * weights_N[:, None]).T @ g
            self._outer_moment_K[k] += weights_N @ ((g_ND**2).sum(1) - (g**2).sum(1))
        # A row is a sum of m examples. They are taken as independent, each with the mean b / m: so
        # the products of two different ones are (m - 1) / m of b b^T in expectation.
        pairs_K = 1 - 1 / self.examples_per_row_K
        self._moment_KRR += pairs_K[:, None, None] * self.b_KR[:, :, None] * self.b_KR[:, None, :]
        self._outer_moment_K += pairs_K * ((self.b_KD**2).sum(1) - (self.b_KR**2).sum(1))
        self.outer_response_K = self.b_KD @ outer_target_b_D
        self._outer_curvature_K = self._curvature_left(self._H_KRR, self._trace_K)
        self.captured_H_KRR = self._H_KRR

    def _agreeing_with_gradients(self, ahead: Ahead) -> Array:
        """Curvature of the tasks [K, R, R] that agrees with how their gradients change."""
        delta_KR = self._inside(ahead.second_points_KD)
        change_KR = self._inside(ahead.gradient_changes_KD)
        missed_KR = change_KR.copy()
        result_KRR = self.captured_H_KRR.copy()
        for k, added in enumerate(self._trace_K / self._dim):
            added_RR = added * np.eye(self.rank)
            H_RR = result_KRR[k] - added_RR
            missed_KR[k] -= H_RR @ delta_KR[k]
            H_RR = with_secant(H_RR, delta_KR[k], change_KR[k], self.b_KR[k])
            result_KRR[k] = H_RR + added_RR
        missed_K, length_K = (np.linalg.norm(x, axis=1) for x in (missed_KR, change_KR))
        self._linearization_residual = float(np.median(missed_K / np.maximum(length_K, 1e-300)))
        return result_KRR

    def _agreeing_with_losses(self, ahead: Ahead) -> Array:
        """Curvature of the target [R, R] that agrees with how its losses change."""
        linear_TE = np.empty((len(self.omega_T), len(ahead.ends_ED)))
        for _, rows in chunks_of_tasks(self._store.target):
            linear_TE[rows] = self._read(self._store.target, rows)[0] @ ahead.ends_ED.T
        ends_ER = self._inside(ahead.ends_ED)
        outer_E = np.maximum((ahead.ends_ED**2).sum(1) - (ends_ER**2).sum(1), 0.0)
        bend_E = ((ends_ER @ self._target_H_RR) * ends_ER).sum(1)
        bend_E += self._target_outer_curvature * outer_E
        read, omega_T = self._read_again(ahead.end_changes_ET.shape[1])
        measured_E = ahead.end_changes_ET @ omega_T
        missed_E = measured_E - omega_T @ linear_TE[read] - bend_E / 2
        missed = float(np.sqrt(np.mean(missed_E**2)))
        self._target_residual = missed / max(self.anchor_loss, 1e-300)
        return with_losses(self._target_H_RR, ends_ER, missed_E)

    def _read_again(self, count: int) -> tuple[Array, Array]:
        """Which examples of the target were read a second time, and their shares in the mean."""
        read = evenly_spread(len(self.omega_T), count)
        return read, self.omega_T[read] / max(self.omega_T[read].sum(), 1e-300)

    def _loss_given_up(self) -> float:
        """What training up to the anchor has taken from the target's loss, if it restarts."""
        initial_T = self._store.vectors.get("initial_losses")
        if initial_T is None:
            return 0.0
        read, omega_T = self._read_again(len(initial_T))
        return float(omega_T @ (initial_T - self.losses_T[read]))

    def _reduce_target(self, vectors_VD: Array, trace: float) -> None:
        """Turn the target into the axes, and keep its inner products outside of them."""
        target = self._store.target
        self.vectors_VR = self._inside(vectors_VD)
        outer_SD = self._outside(np.vstack([self.b_KD, vectors_VD]))
        self._outer_gram_SS = outer_SD @ outer_SD.T
        self._target_outer_TS = np.empty((len(target), len(outer_SD)))
        self.target_g_TR = np.empty((len(target), self.rank))
        self.target_phi_TR = np.empty((len(target), self.rank))
        for _, rows in chunks_of_tasks(target):
            g_TD, phi_TD = self._read(target, rows)
            self.target_g_TR[rows], self.target_phi_TR[rows] = (
                self._inside(g_TD),
                self._inside(phi_TD),
            )
            self._target_outer_TS[rows] = g_TD @ outer_SD.T
        self._target_H_RR = (self.target_phi_TR * self.omega_T[:, None]).T @ self.target_phi_TR
        self._target_outer_curvature = self._curvature_left(self._target_H_RR, trace)
        self._target_H_RR -= trace / self._dim * np.eye(self.rank)
