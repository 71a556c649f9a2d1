"""Each task's gradient and curvature at the linearization point, and how its examples vary.

Shapes: N examples of the auxiliary tasks, K tasks, M mixtures, D projection_dim, R vectors of the
basis.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, Array, used_columns
from hf_auxselect.estimators.captured_gradients import CaptureCounts, WeightedGradients
from hf_auxselect.estimators.curvature_corrections import psb_update
from hf_auxselect.estimators.krylov_basis import KrylovBasis
from hf_auxselect.store.records import Probes


class TaskCurvature:
    """Mean gradient b_k and Gauss-Newton curvature H_k of each task's loss, in the basis.

    The loss of a mixture has the sums of both over the tasks, weighted by label tokens:
    b_w = sum_k w_k b_k, H_w = sum_k w_k H_k. In the orthogonal complement of the basis there is no
    curvature.

    Args:
        gradients: those of the tasks' examples.
        counts: how the examples were captured.
        basis: in which curvature is modelled.
        b_KD, trace_K: mean gradient and trace of the curvature of each task.
        target_b_D: mean gradient of the target.

    Attributes:
        b_KD, b_KR: the tasks' mean gradients; their coordinates in the basis.
        uncorrected_H_KRR: the tasks' curvature before probes have corrected it.
        chunks: a task, and some of its examples, in turn.
        g_NR, phi_NR: gradients of the examples in the basis (float32: no less precise than they
            were captured, and for the interval alone); norm_N: norms of g.
        complement_response_K, complement_response_N: inner products, in the orthogonal complement,
            of the target's mean gradient with the tasks' b and with each g.
    """

    def __init__(
        self,
        gradients: WeightedGradients,
        counts: CaptureCounts,
        basis: KrylovBasis,
        b_KD: Array,
        trace_K: Array,
        target_b_D: Array,
    ) -> None:
        self._basis, self._trace_K = basis, trace_K
        num_tasks, num_examples = len(b_KD), len(gradients.store)
        complement_b_D = basis.complement(target_b_D)
        self.b_KD = b_KD
        self.b_KR = basis.coordinates(b_KD)
        self._H_KRR = np.zeros((num_tasks, basis.rank, basis.rank))
        self.phi_NR = np.empty((num_examples, basis.rank), np.float32)
        self.g_NR = np.empty((num_examples, basis.rank), np.float32)
        self.complement_response_N = np.empty(num_examples)
        self.norm_N = np.empty(num_examples)
        self.chunks: list[tuple[int, slice]] = []
        for k, examples, g_ND, phi_ND in gradients.chunks():
            self.chunks.append((k, examples))
            g, phi = basis.coordinates(g_ND), basis.coordinates(phi_ND)
            self._H_KRR[k] += (phi * counts.example_weights_N[examples, None]).T @ phi
            self.g_NR[examples], self.phi_NR[examples] = g, phi
            self.norm_N[examples] = np.linalg.norm(g, axis=1)
            self.complement_response_N[examples] = g_ND @ complement_b_D
        self.complement_response_K = b_KD @ complement_b_D
        self.uncorrected_H_KRR = self._H_KRR

    def correct(self, probes: Probes) -> float:
        """Correct each H_k by how its gradient was measured to change (``psb_update``).

        Returns:
            By how much the curvature had missed these changes: the length of what it missed of a
            change, as a share of the change, in the basis, and the median over tasks.
        """
        delta_KR = self._basis.coordinates(probes.secant_points_KD)
        change_KR = self._basis.coordinates(probes.gradient_changes_KD)
        missed_KR = change_KR.copy()
        result_KRR = self.uncorrected_H_KRR.copy()
        for k, added in enumerate(self._trace_K / self._basis.dim):
            added_RR = added * np.eye(self._basis.rank)
            H_RR = result_KRR[k] - added_RR
            missed_KR[k] -= H_RR @ delta_KR[k]
            H_RR = psb_update(H_RR, delta_KR[k], change_KR[k], self.b_KR[k])
            result_KRR[k] = H_RR + added_RR
        missed_K, length_K = (np.linalg.norm(x, axis=1) for x in (missed_KR, change_KR))
        self._H_KRR = result_KRR
        return float(np.median(missed_K / np.maximum(length_K, TINY)))

    def loss_changes(self, delta_MR: Array) -> Array:
        """By how much displacements change each task's own loss, b . delta + delta^T H delta / 2.

        Returns:
            Nats per label token [M, K]. Displacements out of the basis are left out; the tasks'
            mean gradients lie in it unless there are more of them than its rank.
        """
        added_K = self._trace_K / self._basis.dim
        squares_MK = (
            np.einsum("mr,krs,ms->mk", delta_MR, self._H_KRR, delta_MR, optimize=True)
            - (delta_MR**2).sum(1)[:, None] * added_K
        )
        return delta_MR @ self.b_KR.T + squares_MK / 2

    def eigendecomposition(self, w_MK: Array) -> tuple[Array, Array]:
        """Eigenvalues of mixtures' H_w, less what the projection adds; they may be negative.

        Returns:
            Eigenvalues in the basis, in ascending order [M, R]; their vectors, in columns
            [M, R, R].
        """
        used = used_columns(w_MK)
        H_MRR = np.tensordot(w_MK[:, used], self._H_KRR[used], 1)
        values_MR, vectors_MRR = np.linalg.eigh(H_MRR)
        added_M = self.projection_curvature(w_MK)
        return values_MR - added_M[:, None], vectors_MRR

    def pull_back(self, of_H_MRR: Array) -> Array:
        """Derivatives with respect to w [M, K], of what :meth:`eigendecomposition` decomposes.

        Args:
            of_H_MRR: derivatives with respect to H_w in the basis, less what the projection adds;
                symmetric.
        """
        num_tasks, size = len(self._H_KRR), self._basis.rank**2
        of_w_MK = of_H_MRR.reshape(-1, size) @ self._H_KRR.reshape(num_tasks, size).T
        trace_M1 = np.trace(of_H_MRR, axis1=1, axis2=2)[:, None]
        return of_w_MK - trace_M1 * self._trace_K / self._basis.dim

    def projection_curvature(self, w_MK: Array) -> Array:
        """What a random projection adds to every eigenvalue in expectation: trace(H_w) / D [M]."""
        return w_MK @ self._trace_K / self._basis.dim
