"""Quadratic models of all losses around the linearization point, built from one store.

Shapes: N examples of the auxiliary tasks, K tasks, M mixtures, D projection_dim, R vectors of the
basis, V further vectors.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import Array
from hf_auxselect.estimators.captured_gradients import (
    CaptureCounts,
    ReadGradients,
    WeightedGradients,
)
from hf_auxselect.estimators.krylov_basis import KrylovBasis, default_rank
from hf_auxselect.estimators.parallel import one_blas_thread
from hf_auxselect.estimators.target_quadratic import TargetQuadratic
from hf_auxselect.estimators.task_curvature import TaskCurvature
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.store.records import Probes


class QuadraticModel:
    """Quadratic models of the tasks' losses and of the target's, in a common basis.

        L_w(delta) = L_w + b_w . delta + delta^T H_w delta / 2,      the same with T for the target,

    where b = E[g] and H = E[phi phi^T], means weighted by label tokens as in the trainer's loss. A
    random projection to D dimensions adds trace(H) / D to every eigenvalue in expectation, which is
    subtracted.

    The basis starts from all mean gradients, the target's too, and the further vectors. The H that
    it applies is the mean of the tasks' and the target's. A displacement has K + V sources: the
    tasks' mean gradients and the further vectors.

    The gradients are read some examples at a time, 2 + R / (K + V + 1) times; in memory stay 2 R
    float32 numbers per example of the tasks.

    Args:
        store: the examples.
        read_gradients: reads g and phi of some of them.
        rank: R at most; None: see ``default_rank``.
        vectors_VD: further vectors that displacements are made of.
        probes: what was measured at displaced parameters; corrects the curvature of the tasks and
            of the target.

    Attributes:
        counts: how the tasks' examples were captured.
        basis: in which curvature is modelled.
        tasks: gradients and curvature of the tasks.
        target: the target's loss.
        groups: the losses of the store's groups. Probes measure no loss of theirs, so that their
            curvature stays the Gauss-Newton matrix.
        vectors_VR: the further vectors in the basis.
        warm_up_gain: by how much training up to the linearization point has lowered the target's
            loss, if training restarts, and so gives it up; else 0.
    """

    def __init__(
        self,
        store: GradientStore,
        read_gradients: ReadGradients,
        *,
        rank: int | None,
        vectors_VD: Array | None = None,
        probes: Probes | None = None,
    ) -> None:
        self._probes = probes
        with one_blas_thread():
            self._build(store, read_gradients, rank, vectors_VD)

    def _build(
        self,
        store: GradientStore,
        read: ReadGradients,
        rank: int | None,
        vectors_VD: Array | None,
    ) -> None:
        self.counts = CaptureCounts(store)
        of_tasks = WeightedGradients(
            store=store, read=read, weights_N=self.counts.example_weights_N
        )
        of_target = WeightedGradients(
            store=store.target, read=read, weights_N=store.target.example_weights
        )
        b_KD, trace_K = of_tasks.moments()
        target_b_1D, (target_trace,) = of_target.moments()
        if vectors_VD is None:
            vectors_VD = np.zeros((0, b_KD.shape[1]))
        starts = [b_KD, target_b_1D, vectors_VD]
        if self._probes is not None:
            # All of them point in almost the same direction.
            starts.append(self._probes.secant_points_KD.mean(0, keepdims=True))

        def curvature_times(block_DS: Array) -> Array:
            product_DS = of_tasks.mean_curvature_times(block_DS)
            product_DS += of_target.mean_curvature_times(block_DS)
            return product_DS

        rank = default_rank(len(store), len(b_KD)) if rank is None else rank
        self.basis = basis = KrylovBasis(np.vstack(starts), curvature_times, rank)
        self.vectors_VR = basis.coordinates(vectors_VD)
        self.tasks = TaskCurvature(of_tasks, self.counts, basis, b_KD, trace_K, target_b_1D[0])
        complement_SD = basis.complement(np.vstack([b_KD, vectors_VD]))
        self.target = TargetQuadratic(of_target, basis, target_b_1D[0], target_trace, complement_SD)
        if self._probes is not None:
            self._linearization_residual = self.tasks.correct(self._probes)
            self._target_residual = self.target.correct(self._probes)
        self.groups: list[TargetQuadratic] = []
        for group in store.groups.values():
            of_group = WeightedGradients(store=group, read=read, weights_N=group.example_weights)
            group_b_1D, (group_trace,) = of_group.moments()
            self.groups.append(
                TargetQuadratic(of_group, basis, group_b_1D[0], group_trace, complement_SD)
            )
        self.warm_up_gain = 0.0
        initial = store.initial_losses
        if initial is not None:
            read_T, weights_T = self.target.weights_of(initial.example_ids)
            gain_T = initial.losses_T - self.target.losses_T[read_T]
            self.warm_up_gain = float(weights_T @ gain_T)

    def probe_diagnostics(self) -> dict[str, float]:
        """How far the model was from what the probes measured; empty without probes.

        ``linearization_residual``: what the curvature missed of the change of a task's gradient, as
        a share of the change (``TaskCurvature.correct``). ``target_residual``: what it missed of
        the target's loss at the endpoints, as a share of the loss (``TargetQuadratic.correct``).
        """
        if self._probes is None:
            return {}
        return {
            "linearization_residual": self._linearization_residual,
            "target_residual": self._target_residual,
        }
