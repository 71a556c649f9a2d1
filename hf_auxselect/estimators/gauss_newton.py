"""One damped Gauss-Newton step: where training on a mixture tends to, without its optimizer.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
D projection_dim, R dimensions in which curvature is modelled, S sources of a displacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hf_auxselect.estimators.base import (
    AbstractEstimator,
    Array,
    normalize_mixtures,
)
from hf_auxselect.estimators.fitted_quadratic import Effects, FittedQuadratic, check_options
from hf_auxselect.estimators.quadratic import QuadraticModel
from hf_auxselect.store.arrays import GradientStore

Curvature = Literal["sampled", "empirical"]


@dataclass(frozen=True, kw_only=True)
class GaussNewton(AbstractEstimator):
    """Takes one damped Gauss-Newton step on the mixture, in a quadratic model of the losses.

    Around the anchor, in the model's own parameters, the training loss of a mixture w and the
    target's loss are

        L_w(delta) = L_w + b_w . delta + delta^T H_w delta / 2,      the same with T for the target,

    where b is the mean loss gradient and H the mean curvature, both weighted by label tokens as in
    the trainer's loss. Training is taken to end near the minimum of the mixture's loss, but no
    farther than curvature and ``damping`` let it, and that is where the target's loss is estimated:

        delta = -(H_w + lambda I)^-1 b_w,        lambda = damping * (largest eigenvalue of H_all),
        L_T(delta) = L_T + b_T . delta + delta^T H_T delta / 2.

    It needs neither the state of an optimizer nor the steps to come, so that it serves any
    optimizer, and a model whose training is over. In return it does not know how far training will
    go: 1 / lambda stands for the sum of the learning rates, and parameters are not preconditioned.
    Where ``LinearizedTraining`` can be had, that knows more.

    A random projection to D dimensions adds trace(H)/D to every eigenvalue in expectation, which is
    subtracted; what is left of H_w is not negative. Outside the R leading axes of the tasks' and
    the target's H, curvature is the same in all directions, with the trace that is left.

    The interval joins two independent errors: which examples were captured (the delta method; none
    if all rows were), and that of the model itself, taken for a share ``model_error`` of the root
    mean square of the linear and the quadratic term.

    Cost: one product of R^2 numbers per task, and one eigendecomposition R x R, per mixture. The
    gradients are read twice, some rows at a time; in memory stay 2 R float32 numbers per example.

    Args:
        curvature: what H is the mean of, over label tokens. ``"sampled"``: the outer product of
            gradients of labels that are drawn from the model, in expectation the Gauss-Newton (and
            Fisher) matrix; with few examples, curvature is missed in directions that no draw has,
            and steps there are too long. ``"empirical"``: n g g^T of an example's loss gradient g
            and its n label tokens, which needs no gradients but those of the loss. That is the same
            in expectation where the labels are as the model expects them, and too much where they
            surprise it.
        damping: lambda as a share of the largest eigenvalue of the curvature of all tasks pooled,
            which makes the estimate independent of the scale of the losses and, but for noise, of
            D: directions of less than this share of the steepest one's curvature are not followed
            to their minimum. Below about trace(H)/D the projection's noise decides.
        rank: R; None: see ``QuadraticModel``.
        model_error: standard error of the predicted change of the loss, as a share of its terms. 1
            says that the length of the training is a guess.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020),
    sections 6 (damping), 8 and 9 (curvature); Kunstner et al., "Limitations of the Empirical Fisher
    Approximation for Natural Gradient Descent" (NeurIPS 2019), on ``"empirical"``.
    """

    curvature: Curvature = "sampled"
    damping: float = 0.03
    rank: int | None = None
    model_error: float = 1.0

    def __post_init__(self) -> None:
        if self.curvature not in get_args(Curvature):
            raise ValueError(
                f"curvature must be one of {list(get_args(Curvature))}, got {self.curvature!r}."
            )
        if not 0 < self.damping < np.inf:
            raise ValueError(f"damping must be positive and finite, got {self.damping}.")
        check_options(self.rank, self.model_error)

    @property
    def scalars(self) -> tuple[str, ...]:
        return ("loss", "sampled_loss") if self.curvature == "sampled" else ("loss",)

    def fit(self, store: GradientStore) -> FittedGaussNewton:
        return FittedGaussNewton(self, store)


class FittedGaussNewton(FittedQuadratic):
    """See :class:`GaussNewton`."""

    curvature_share = 1.0

    def __init__(self, options: GaussNewton, store: GradientStore) -> None:
        self._model_error = options.model_error
        self._store = store
        read = _read_sampled if options.curvature == "sampled" else _read_empirical
        self._model = QuadraticModel(store, read, rank=options.rank)
        everything = np.ones((1, len(store.task_names)), bool)
        self._w_all_1K = self._model.token_weights(normalize_mixtures(everything, store.task_sizes))
        values_1R, _, _ = self._model.curvature(self._w_all_1K)
        # As projected: without what the projection adds, it could be 0 where D is very small.
        self._largest = float(values_1R[0, -1] + self._model.added_curvature(self._w_all_1K)[0])
        self.damping = max(options.damping * self._largest, 1e-300)
        """lambda, nats per label token and squared unit of the parameters."""

    def diagnostics(self) -> dict[str, float]:
        values_1R, _, _ = self._model.curvature(self._w_all_1K)
        spectrum = np.maximum(values_1R[0], 0.0)
        return {
            **super().diagnostics(),
            "damping": self.damping,
            "largest_curvature": self._largest,
            "effective_dimension": float((spectrum / (spectrum + self.damping)).sum()),
        }

    def _effects(self, rows_MK: Array) -> Effects:
        """What training on some mixtures does."""
        model = self._model
        w_MK = model.token_weights(rows_MK)
        values_MR, vectors_MRR, outer_M = model.curvature(w_MK)
        inverse_MR = 1 / (np.maximum(values_MR, 0.0) + self.damping)
        outer_inverse_M = 1 / (np.maximum(outer_M, 0.0) + self.damping)

        def solve(x_MR: Array) -> Array:  # (H_w + lambda I)^-1 x, within the axes
            own_MR = inverse_MR * np.einsum("mrs,mr->ms", vectors_MRR, x_MR)
            return np.einsum("mrs,ms->mr", vectors_MRR, own_MR)

        delta_MR = -solve(w_MK @ model.b_KR)
        sources_MS = -outer_inverse_M[:, None] * w_MK
        linear_MT, quadratic_M, target_slope_MR = model.target_change(delta_MR, sources_MS)
        return Effects(
            w_MK=w_MK,
            delta_MR=delta_MR,
            slope_MR=solve(target_slope_MR),
            outer_slope_M=outer_inverse_M,
            linear_MT=linear_MT,
            quadratic_M=np.maximum(quadratic_M, 0.0),
        )


def _read_sampled(store: GradientStore, rows: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and of losses of drawn labels."""
    g_ND, phi_ND = store.scalar("loss")[1], store.scalar("sampled_loss")[1]
    return g_ND[rows].astype(np.float64), phi_ND[rows].astype(np.float64)


def _read_empirical(store: GradientStore, rows: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and the same scaled as those of drawn labels are.

    The loss is a mean over an example's n label tokens. If their gradients are independent with
    mean 0, as those of drawn labels, n g g^T is in expectation the mean of their outer products.
    """
    g_ND = store.scalar("loss")[1][rows].astype(np.float64)
    return g_ND, g_ND * np.sqrt(store.num_label_tokens[rows, None])
