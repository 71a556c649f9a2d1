"""The target's loss as a quadratic function of the displacement.

Shapes: T examples of the target, M mixtures, E endpoints, D projection_dim, R vectors of the basis,
S sources of a displacement.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_auxselect.estimators.base import TINY, Array
from hf_auxselect.estimators.captured_gradients import WeightedGradients
from hf_auxselect.estimators.curvature_corrections import fit_to_endpoint_losses
from hf_auxselect.estimators.krylov_basis import KrylovBasis
from hf_auxselect.store.records import Probes


class TargetChange(NamedTuple):
    """How the loss answers to displacements, in nats per label token, and its derivatives."""

    linear_MT: Array
    """Linear term of each example's loss."""
    quadratic_M: Array
    """Quadratic term of their weighted mean."""
    of_delta_MR: Array
    """Gradient with respect to the displacement in the basis."""
    of_sources_S: Array
    """Derivatives with respect to the coefficients of the sources; the same for all."""


class TargetQuadratic:
    """L_T(delta) = L_T + b_T . delta + delta^T H_T delta / 2 around the linearization point.

    A displacement is given by its coordinates in the basis and, in the orthogonal complement, by
    its S sources: vectors of which it is a linear combination there. In the complement the loss is
    linear.

    Args:
        gradients: those of the target's examples.
        basis: in which curvature is modelled.
        b_D, trace: mean gradient, and trace of the curvature.
        complement_SD: what the sources have in the orthogonal complement of the basis.

    Attributes:
        weights_T: weight of each example in the loss.
        losses_T: losses of the examples at the linearization point, nats per label token.
        loss: their weighted mean.
        g_TR, phi_TR: gradients of the examples in the basis.
        lower_bound: of the quadratic term. A Gauss-Newton matrix makes it 0 at least: what falls
            below is noise. Curvature that was fitted to measured losses has no bound.
    """

    def __init__(
        self,
        gradients: WeightedGradients,
        basis: KrylovBasis,
        b_D: Array,
        trace: float,
        complement_SD: Array,
    ) -> None:
        self._gradients, self._basis = gradients, basis
        target = gradients.store
        self.weights_T = gradients.weights_N
        self.losses_T = target.losses.astype(np.float64)
        self.loss = float(target.task_losses[0])
        self.lower_bound = 0.0
        self._b_R = basis.coordinates(b_D)
        self._source_gradients_TS = np.empty((len(target), len(complement_SD)))
        self.g_TR = np.empty((len(target), basis.rank))
        self.phi_TR = np.empty((len(target), basis.rank))
        for _, examples, g_TD, phi_TD in gradients.chunks():
            self.g_TR[examples] = basis.coordinates(g_TD)
            self.phi_TR[examples] = basis.coordinates(phi_TD)
            self._source_gradients_TS[examples] = g_TD @ complement_SD.T
        self._H_RR = (self.phi_TR * self.weights_T[:, None]).T @ self.phi_TR
        self._H_RR -= trace / basis.dim * np.eye(basis.rank)

    def correct(self, probes: Probes) -> float:
        """Fit H_T to losses that were measured at predicted endpoints.

        Returns:
            By how much the quadratic had missed their changes: the root mean square over the
            endpoints, as a share of the loss at the linearization point.
        """
        basis, endpoints_ED = self._basis, probes.endpoints_ED
        linear_TE = np.empty((len(self.weights_T), len(endpoints_ED)))
        for _, examples, g_TD, _ in self._gradients.chunks():
            linear_TE[examples] = g_TD @ endpoints_ED.T
        endpoints_ER = basis.coordinates(endpoints_ED)
        curvature_E = ((endpoints_ER @ self._H_RR) * endpoints_ER).sum(1)
        read, weights_T = self.weights_of(probes.target_example_ids)
        measured_E = probes.loss_changes_ET @ weights_T
        missed_E = measured_E - weights_T @ linear_TE[read] - curvature_E / 2
        self._H_RR = fit_to_endpoint_losses(self._H_RR, endpoints_ER, missed_E)
        self.lower_bound = -np.inf
        return float(np.sqrt(np.mean(missed_E**2))) / max(self.loss, TINY)

    def weights_of(self, example_ids: Array) -> tuple[Array, Array]:
        """Rows of some examples, and their weights in the mean over these examples."""
        rows = self._gradients.store.rows_of(example_ids)
        return rows, self.weights_T[rows] / max(self.weights_T[rows].sum(), TINY)

    def change(self, delta_MR: Array, sources_MS: Array) -> TargetChange:
        """How the loss answers to displacements.

        Args:
            delta_MR: their coordinates in the basis.
            sources_MS: coefficients of their sources; all 0 without training.
        """
        linear_MT = delta_MR @ self.g_TR.T + sources_MS @ self._source_gradients_TS.T
        H_delta_MR = delta_MR @ self._H_RR
        quadratic_M = (delta_MR * H_delta_MR).sum(1) / 2
        is_free_M1 = quadratic_M[:, None] > self.lower_bound
        return TargetChange(
            linear_MT=linear_MT,
            quadratic_M=np.maximum(quadratic_M, self.lower_bound),
            of_delta_MR=self._b_R + np.where(is_free_M1, H_delta_MR, 0.0),
            of_sources_S=self.weights_T @ self._source_gradients_TS,
        )
