"""The default estimator: the run's remaining steps, in a quadratic model of its losses.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
D projection_dim, R vectors of the basis, S sources of a displacement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hf_auxselect.estimators.base import (
    NUM_ENDPOINTS,
    TINY,
    AbstractEstimator,
    Array,
    ProbePoints,
    all_tasks_pooled,
    normalize_mixtures,
    random_subsets,
)
from hf_auxselect.estimators.clipping import clipping_factor
from hf_auxselect.estimators.parallel import one_blas_thread
from hf_auxselect.estimators.predicted_update import FittedQuadratic, check_options
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.estimators.unrolled_optimizer import Response, UnrolledOptimizer
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.store.records import RemainingTraining

# Constants that shape estimates. The families are those of benchmarks/.
SECANT_FRACTION = 2 / 3
"""Where between the linearization point and the predicted endpoint the tasks' gradients are probed.

Derived: it makes the mean gradient on a straight path right to third order. For a gradient
h x + t x^2 / 2, its mean on [0, a] is (h + t a / 3) a / 2, and the secant to x is h + t x / 2. It
was also compared with other fractions, on arithmetic, logic, text, small, spelling and sparse.
"""

MODEL_ERROR = 0.5
"""The default of ``LinearizedTraining(model_error=...)``.

Measured on arithmetic, logic, text, small, spelling and sparse: 90% intervals then hold about nine
in ten losses of ground-truth runs.
"""


@dataclass(frozen=True, kw_only=True)
class LinearizedTraining(AbstractEstimator):
    """Predicts the loss after the run's own remaining steps. The default estimator.

    Choose it for every run whose optimizer it can follow (AdamW, Adam, SGD, Adafactor). Its limit:
    losses are quadratic only near the linearization point theta_0. Where the remaining training
    goes farther, diagnostics tell, and the report warns. It works in coordinates in which a step of
    the optimizer is a plain gradient step (preconditioned, see ``OptimizerState``):

    1. Per task k, take the mean gradient b_k = E[g] and the Gauss-Newton curvature
       H_k = E[phi phi^T] at theta_0, over gradients g of the loss and phi of losses of labels drawn
       from the model, in a basis of R vectors (``KrylovBasis``). Probes correct H_k.
    2. Mix: b_w = sum_k w_k b_k and H_w = sum_k w_k H_k. The weights w_k are shares of label tokens,
       times the factor by which clipping shortens gradients (``clipping_factor``).
    3. Eigendecompose H_w = V diag(h) V^T.
    4. Filter each eigenvalue: the remaining steps, with their learning rates, momentum and weight
       decay, turn V^T b_w into the displacement -r(h) V^T b_w (``UnrolledOptimizer``).
    5. Evaluate the target's quadratic, L_T(delta) = L_T + b_T . delta + delta^T H_T delta / 2.
       Probes correct H_T.

    A restart is estimated as if the run went on from theta_0: that ranks mixtures, but does not
    tell their losses. Cost: two products of R^2 numbers per task, an eigendecomposition and six
    products of R x R matrices per mixture; in memory stay 2 R float32 numbers per example.

    Args:
        rank: R; None: the mean number of a task's examples, at most 96.
        learning_rates: those of the remaining steps; None: as the trainer told the store.
        probes: measure gradients and losses where training is predicted to lead, too. It takes two
            passes of forward and backward over at most 64 examples of each task, and 17 of forward
            over as many of the target. Without a trainer nothing is measured.
        model_error: standard error of the predicted change of the loss, as a share of its terms.

    Source: gradient descent on the linearized network: Lee et al. (NeurIPS 2019), section 2.2;
    Gauss-Newton curvature: Martens (JMLR 2020), section 8.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer", "sampled_loss@optimizer")

    rank: int | None = None
    learning_rates: tuple[float, ...] | None = None
    probes: bool = True
    model_error: float = MODEL_ERROR

    def __post_init__(self) -> None:
        check_options(self.rank, self.model_error)
        if self.learning_rates is not None:
            object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
            if not self.learning_rates or min(self.learning_rates) < 0:
                raise ValueError(
                    "learning_rates must be the rates of one or more steps, none negative, got "
                    f"{self.learning_rates}."
                )

    @property
    def needs_probes(self) -> bool:
        return self.probes

    def probe_points(self, store: GradientStore) -> ProbePoints | None:
        """Predicted displacements by training on random subsets of tasks.

        The endpoints are the first of these. A task's secant point is a fraction of their mean,
        each counted by its share of that task.
        """
        if not self.probes:
            return None
        shares_MK, displacements_MD = replace(self, probes=False).fit(store).displacements()
        weights_MK = shares_MK / shares_MK.sum(0)
        return ProbePoints(
            SECANT_FRACTION * weights_MK.T @ displacements_MD, displacements_MD[:NUM_ENDPOINTS]
        )

    def fit(self, store: GradientStore) -> FittedLinearizedTraining:
        return FittedLinearizedTraining(self, store)


class FittedLinearizedTraining(FittedQuadratic):
    """See :class:`LinearizedTraining`."""

    # Curvature acts on the displacement, which grows from 0: half of it on average.
    curvature_share = 0.5

    def __init__(self, options: LinearizedTraining, store: GradientStore) -> None:
        self._model_error = options.model_error
        self._store = store
        optimizer = store.optimizer
        if optimizer is None:
            raise ValueError(
                "LinearizedTraining needs a store that was captured with the optimizer of the run; "
                "pass optimizer=... to capture_gradients."
            )
        training = store.remaining_training or RemainingTraining()
        given = options.learning_rates or training.learning_rates
        if not given:
            raise ValueError(
                "LinearizedTraining does not know the remaining steps: the store was captured "
                "without a trainer. Pass learning_rates=..., the rate of each remaining step."
            )
        rates = np.asarray(given, np.float64) * optimizer.learning_rate_factor
        # A scheduler's momentum coefficients hold for the steps of the trainer alone.
        betas = training.momentum_coefficients
        if betas is not None and len(betas) != len(rates):
            betas = None
        self._unrolled = UnrolledOptimizer(
            rates,
            momentum_coefficient=optimizer.momentum_coefficient,
            steps_taken=optimizer.steps_taken,
            weight_decay=optimizer.weight_decay,
            decay_is_coupled=optimizer.decay_is_coupled,
            momentum_coefficients=None if betas is None else np.asarray(betas, np.float64),
        )
        parameters_D = (optimizer.weight_decay > 0) * optimizer.parameters_D
        self._model = QuadraticModel(
            store,
            _read_gradients,
            rank=options.rank,
            vectors_VD=np.stack([optimizer.momentum_D, parameters_D]),
            probes=store.probes if options.probes else None,
        )
        if training.max_grad_norm:
            self._clipping = clipping_factor(
                store,
                self._model.counts,
                max_grad_norm=training.max_grad_norm,
                rows_per_step=training.examples_per_step,
            )

    def displacements(self) -> tuple[Array, Array]:
        """Random subsets as shares [M, K], and the predicted displacement of each [M, D]."""
        masks_MK = random_subsets(len(self._store.task_names))
        shares_MK = normalize_mixtures(masks_MK, self._store.task_sizes)
        with one_blas_thread():
            return shares_MK, self._model.basis.expand(self._predict(shares_MK).delta_MR)

    def _response(self, values: Array) -> Array:
        return _components(self._unrolled.response(values))

    def _response_slope(self, values: Array) -> Array:
        return _components(self._unrolled.response_slope(values))

    def diagnostics(self) -> dict[str, float]:
        """Those of ``FittedQuadratic``, and of training on all tasks pooled.

        ``summed_learning_rate``: see ``UnrolledOptimizer``.
        ``clipping_factor_all_tasks``: by how much clipping shortens gradients.
        ``largest_curvature_times_summed_learning_rate``: over 1, training converges along the
        steepest direction.
        ``largest_curvature_over_stable``: over 1, steps overshoot along the steepest direction.
        ``effective_dimension``: number of directions that hold the curvature.
        """
        shares_1K = all_tasks_pooled(self._store.task_sizes)
        clipped_1K = self._clipping * self._model.counts.token_weights(shares_1K)
        values_1R, _ = self._model.tasks.eigendecomposition(clipped_1K)
        spectrum = np.maximum(values_1R[0], 0.0)
        summed_rate = self._unrolled.summed_learning_rate
        return {
            **super().diagnostics(),
            "summed_learning_rate": summed_rate,
            "clipping_factor_all_tasks": self._clipping,
            "largest_curvature_times_summed_learning_rate": float(spectrum.max() * summed_rate),
            "largest_curvature_over_stable": float(
                spectrum.max() / self._unrolled.stable_curvature
            ),
            "effective_dimension": float(spectrum.sum() ** 2 / max((spectrum**2).sum(), TINY)),
        }


def _components(response: Response) -> Array:
    """Per unit of the mean gradient, of momentum and of the parameters: [3, ...]."""
    return np.stack([-response.gradient, response.momentum, -response.parameters])


def _read_gradients(store: GradientStore, examples: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and of losses of drawn labels, in the optimizer's coordinates."""
    g_ND, phi_ND = store.scalar("loss@optimizer")[1], store.scalar("sampled_loss@optimizer")[1]
    return g_ND[examples].astype(np.float64), phi_ND[examples].astype(np.float64)
