"""One damped Gauss-Newton step: where training on a mixture tends to, without its optimizer.

Shapes: N examples, K tasks, M mixtures, D projection_dim, R vectors of the basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hf_auxselect.checks import is_number
from hf_auxselect.estimators.base import TINY, AbstractEstimator, Array, all_tasks_pooled
from hf_auxselect.estimators.predicted_update import FittedQuadratic, check_options
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.store.arrays import GradientStore

Curvature = Literal["sampled", "empirical"]

# Constants that shape estimates.
DAMPING = 0.03
"""The default of ``GaussNewton(damping=...)``. No record says on what it was chosen.

A share of the largest eigenvalue makes the estimate independent of the scale of the losses and, but
for noise, of D.
"""

MODEL_ERROR = 1.0
"""The default of ``GaussNewton(model_error=...)``.

A convention: the length of the training is a guess, so that a term may be off by all of itself.
"""


@dataclass(frozen=True, kw_only=True)
class GaussNewton(AbstractEstimator):
    """Predicts the loss after one damped Gauss-Newton step on the mixture.

    Choose it where ``LinearizedTraining`` cannot be used: with any other optimizer, without its
    state, or with a model whose training is over. Its limit: it does not know how far training will
    go, for which ``damping`` stands, and parameters are not preconditioned.

    Around the linearization point, in the model's own parameters, the losses of a mixture w and of
    the target are quadratics with mean gradients b and curvatures H (see ``QuadraticModel``).
    Training is taken to end near the minimum of the mixture's loss, but no farther than damping
    lets it:

        delta = -(H_w + lambda I)^-1 b_w,        lambda = damping * (largest eigenvalue of H_all),
        L_T(delta) = L_T + b_T . delta + delta^T H_T delta / 2.

    1 / lambda stands for the sum of the learning rates.

    Cost: one product of R^2 numbers per task, and one eigendecomposition R x R, per mixture. The
    gradients are read some examples at a time; in memory stay 2 R float32 numbers per example.

    Args:
        curvature: what H is the mean of. ``"sampled"``: outer products of gradients of labels drawn
            from the model, in expectation the Gauss-Newton (and Fisher) matrix; few examples miss
            curvature in directions that no draw has. ``"empirical"``: n g g^T of an example's loss
            gradient g and its n label tokens, which needs no other gradients; it is too large where
            labels surprise the model.
        damping: lambda as a share of the largest eigenvalue of the curvature of all tasks pooled.
            Directions of less curvature than lambda are not followed to their minimum. Below about
            trace(H) / D the noise of the projection decides.
        rank: R; None: the mean number of a task's examples, at most 96.
        model_error: standard error of the predicted change of the loss, as a share of its terms.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (JMLR 2020),
    sections 6 (damping), 8 and 9 (curvature); Kunstner et al., "Limitations of the Empirical Fisher
    Approximation for Natural Gradient Descent" (NeurIPS 2019), on ``"empirical"``.
    """

    curvature: Curvature = "sampled"
    damping: float = DAMPING
    rank: int | None = None
    model_error: float = MODEL_ERROR

    def __post_init__(self) -> None:
        if self.curvature not in get_args(Curvature):
            raise ValueError(
                f"curvature must be one of {list(get_args(Curvature))}, got {self.curvature!r}."
            )
        if not (is_number(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be positive and finite, got {self.damping!r}.")
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
        self._w_all_1K = self._model.counts.token_weights(all_tasks_pooled(store.task_sizes))
        tasks = self._model.tasks
        values_1R, _ = tasks.eigendecomposition(self._w_all_1K)
        # As projected: without what the projection adds, it could be 0 where D is very small.
        self._largest = float(values_1R[0, -1] + tasks.projection_curvature(self._w_all_1K)[0])
        self.damping = max(options.damping * self._largest, TINY)
        """lambda, nats per label token and squared unit of the parameters."""

    def diagnostics(self) -> dict[str, float]:
        """Those of ``FittedQuadratic``, and of training on all tasks pooled.

        ``damping``: lambda. ``largest_curvature``: its largest eigenvalue.
        ``effective_dimension``: number of directions that are followed to their minimum.
        """
        values_1R, _ = self._model.tasks.eigendecomposition(self._w_all_1K)
        spectrum = np.maximum(values_1R[0], 0.0)
        return {
            **super().diagnostics(),
            "damping": self.damping,
            "largest_curvature": self._largest,
            "effective_dimension": float((spectrum / (spectrum + self.damping)).sum()),
        }

    def _response(self, values: Array) -> Array:
        return -1 / (np.maximum(values, 0.0) + self.damping)[None]

    def _response_slope(self, values: Array) -> Array:
        return np.where(values > 0, self._response(values) ** 2, 0.0)


def _read_sampled(store: GradientStore, examples: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and of losses of drawn labels."""
    g_ND, phi_ND = store.scalar("loss")[1], store.scalar("sampled_loss")[1]
    return g_ND[examples].astype(np.float64), phi_ND[examples].astype(np.float64)


def _read_empirical(store: GradientStore, examples: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and the same scaled as those of drawn labels are.

    The loss is a mean over an example's n label tokens. If their gradients are independent with
    mean 0, as those of drawn labels, n g g^T is in expectation the mean of their outer products.
    """
    g_ND = store.scalar("loss")[1][examples].astype(np.float64)
    return g_ND, g_ND * np.sqrt(store.num_label_tokens[examples, None])
