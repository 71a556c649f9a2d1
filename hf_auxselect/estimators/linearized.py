"""The rest of the run, step by step, in a linearised model.

Shapes: N examples of the auxiliary tasks, T examples of the target, K tasks, M mixtures,
D projection_dim, R dimensions in which curvature is modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hf_auxselect.estimators.ahead import Ahead
from hf_auxselect.estimators.base import (
    NUM_ENDS,
    AbstractEstimator,
    Array,
    normalize_mixtures,
    one_blas_thread,
    random_subsets,
)
from hf_auxselect.estimators.fitted_quadratic import Effects, FittedQuadratic, check_options
from hf_auxselect.estimators.quadratic import QuadraticModel, chunks_of_tasks
from hf_auxselect.estimators.recursion import Recursion
from hf_auxselect.files import JsonDict
from hf_auxselect.store.arrays import GradientStore

_ROWS_OF_BATCHES = 2048
_LEAST_BATCHES = 8
"""How many rows are drawn of a mixture to see how its batches are clipped, or how many batches."""

_SHARE_OF_WAY = 2 / 3
"""Where on the way ahead curvature is measured."""


@dataclass(frozen=True, kw_only=True)
class LinearizedTraining(AbstractEstimator):
    """Takes the steps that the run has still to take, in a quadratic model of its losses.

    Around the anchor, and in the coordinates in which a step of the optimizer is a plain gradient
    step (see ``OptimizerState``), the training loss of a mixture w and the target's loss are

        L_w(delta) = L_w + b_w . delta + delta^T H_w delta / 2,         the same with T for the
        target,

    where b is the mean loss gradient and H the Gauss-Newton matrix, E[phi phi^T] over gradients phi
    of losses of labels drawn from the model. Both are linear in the mixture, weighted by label
    tokens as in the trainer's loss: b_w = sum_k w_k b_k. With the schedule eta_t of the steps to
    come, and the optimizer's momentum coefficient beta and weight decay, step t is

        m_t = beta m_{t-1} + (1 - beta) (b_w + H_w delta_{t-1}),
        delta_t = delta_{t-1} - eta_t (m_t / (1 - beta^(t_0 + t)) + decay (theta + delta_{t-1})),

    (decay that is part of the gradient, SGD's, is added to b_w + H_w delta instead),
    where gradient clipping puts c_wk w_k in place of w_k: c_wk is the mean of
    min(1, max_grad_norm / |g|) over batches, each counted by the label tokens that task k has in
    it, so that tasks with large gradients lose more. A few hundred batches of the mixture are drawn
    to take it, with |g|^2 of a batch as it is for its rows' own lengths and for inner products
    between different rows that are those of their tasks' mean gradients. The steps begin from the
    optimizer's own m_0 after its t_0 steps; SGD has no division by 1 - beta^(t_0 + t).
    A restart is estimated as if the run went on from the anchor: the way from the initial
    parameters is too long for a quadratic model, and what mixtures do to the target near the anchor
    ranks them better than steps as long as those of the restart.

    The recursion is linear, and in the eigenvectors of H_w it falls apart into one of two numbers
    per eigenvalue; what it makes of m_0, b_w and theta is tabulated once as a function of the
    eigenvalue. After the last step,

        L_T(delta) = L_T + b_T . delta + delta^T H_T delta / 2.

    H is Gauss-Newton's, which knows nothing of the model's own curvature and holds for small
    displacements. So more is measured where training is about to lead (``way_ahead``), or as near
    to it as mean gradients and momentum lead; ``QuadraticModel`` says what it makes of it. The
    mean gradient of each task is captured once more at a second point of its own, two thirds of the
    mean displacement by training on random subsets, each counted by its share of that task, and H_k
    is changed to map that displacement to the mean of what it had foreseen and of what is measured
    as the change of b_k.
    Two thirds, because that makes the mean gradient on a straight way right to third order: for a
    gradient h x + t x^2 / 2 its mean on [0, a] is (h + t a / 3) a / 2, and the secant to x is
    h + t x / 2. And the target's loss is measured at the ends of 16 of these displacements, and H_T
    changed to agree with it.

    Real steps see the gradient of B rows, not of all. What it adds to the displacement, epsilon, is
    0 in the mean, but bends the loss: the estimate is that of the mean displacement and

        E[epsilon^T H_T epsilon] / 2 = sum_st u_st trace(H_T A_s C_w A_t^T) / (2 B),

    where A_t is the displacement after the last step per unit of gradient in step t alone, C_w the
    covariance of one row's gradient (times the square of the mean c_wk), u_st = 1 for s = t, and
    less 1/P in addition for all s, t of the same pass over the mixture's rows, P steps long: rows
    are drawn without replacement, and after a whole pass their noise has cancelled out. In the same
    way the mean gradient of n captured rows of a task's N bends the loss by its own error, of
    covariance (1 - n/N) C_k / n, which the real run does not make: it is subtracted.

    Steps, rates, clipping and preconditioner are the run's own. A random projection to D dimensions
    adds trace(H)/D to every eigenvalue in expectation, which is subtracted. Curvature is modelled
    in R axes, which ``QuadraticModel`` describes.

    The interval joins two independent errors: which examples were captured (the delta method; none
    if all rows were), and that of the model itself, taken for a share ``model_error`` of the root
    of the sum of squares of the linear and the quadratic term and, where training restarts, of what
    it gives up, and of two mixtures for as alike as their displacements are.

    Cost: two products of R^2 numbers per task, an eigendecomposition and six products of R x R
    matrices per mixture. The gradients are read some rows at a time; in memory stay 2 R float32
    numbers per example.

    Args:
        rank: R; None: see ``QuadraticModel``.
        learning_rates: eta_t of the steps to come; None: as the trainer told the store.
        look_ahead: measure gradients and losses where training is about to lead. It takes two
            passes of forward and backward over at most 64 examples of each task, and 17 of forward
            over as many of the target. Without a trainer nothing is measured.
        model_error: standard error of the predicted change of the loss, as a share of its terms.
            One half, because then 90% intervals hold about nine in ten losses of real fine-tunes.

    Source: gradient descent on the linearised network as in Lee et al., "Wide Neural Networks of
    Any Depth Evolve as Linear Models" (NeurIPS 2019), section 2.2, with Gauss-Newton curvature
    (Martens, JMLR 2020, section 8) in place of the kernel, and momentum; noise as in Mandt et al.,
    "Stochastic Gradient Descent as Approximate Bayesian Inference" (JMLR 2017), section 3, for
    finitely many steps and drawing without replacement.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer", "sampled_loss@optimizer")

    rank: int | None = None
    learning_rates: tuple[float, ...] | None = None
    look_ahead: bool = True
    model_error: float = 0.5

    def __post_init__(self) -> None:
        check_options(self.rank, self.model_error)
        if self.learning_rates is not None:
            object.__setattr__(self, "learning_rates", tuple(self.learning_rates))
            if not self.learning_rates or min(self.learning_rates) < 0:
                raise ValueError("learning_rates must be rates of one or more steps, not negative.")

    def way_ahead(self, store: GradientStore) -> tuple[Array, Array] | None:
        if not self.look_ahead:
            return None
        rows_MK, ends_MD = replace(self, look_ahead=False).fit(store).displacements()
        share_MK = rows_MK / rows_MK.sum(0)
        return _SHARE_OF_WAY * share_MK.T @ ends_MD, ends_MD[:NUM_ENDS]

    def fit(self, store: GradientStore) -> FittedLinearizedTraining:
        return FittedLinearizedTraining(self, store)


class FittedLinearizedTraining(FittedQuadratic):
    """See :class:`LinearizedTraining`."""

    # Curvature acts on the displacement, which grows from 0: half of it on average.
    curvature_share = 0.5

    def __init__(self, options: LinearizedTraining, store: GradientStore) -> None:
        self._model_error = options.model_error
        self._store = store
        optimizer: JsonDict | None = store.metadata.get("optimizer")
        if optimizer is None:
            raise ValueError(
                "LinearizedTraining needs a store that was captured with the optimizer of the run; "
                "pass optimizer=... to capture_gradients."
            )
        self._training: JsonDict = store.metadata.get("training") or {}
        rates = options.learning_rates or self._training.get("learning_rates")
        if not rates:
            raise ValueError(
                "LinearizedTraining does not know the steps to come: the store was captured "
                "without a trainer. Pass learning_rates=..., the rate of each remaining step."
            )
        rates = np.asarray(rates, np.float64) * optimizer["learning_rate_factor"]
        self._recursion = Recursion(
            rates,
            momentum_coefficient=optimizer["momentum_coefficient"],
            steps_taken=optimizer.get("steps_taken"),
            weight_decay=optimizer["weight_decay"],
            decay_is_coupled=optimizer.get("decay_is_coupled", False),
            momentum_coefficients=self._momentum_coefficients(len(rates)),
        )
        self._decay = optimizer["weight_decay"]
        momentum_D = store.vectors["momentum"].astype(np.float64)
        parameters_D = (self._decay > 0) * store.vectors["parameters"].astype(np.float64)
        ahead = Ahead.of(store) if options.look_ahead else None
        # A Gauss-Newton matrix bends upwards; what it is said to bend downwards is noise.
        self._least_bend = 0.0 if ahead is None else -np.inf
        self._model = QuadraticModel(
            store,
            _read_gradients,
            rank=options.rank,
            vectors_VD=np.stack([momentum_D, parameters_D]),
            ahead=ahead,
        )
        self._momentum_R, self._parameters_R = self._model.vectors_VR
        if self._training.get("max_grad_norm"):
            self._read_plain_gradients()

    def _momentum_coefficients(self, num_steps: int) -> Array | None:
        """Of each step, if a scheduler changes them and the steps are those of the trainer."""
        coefficients = self._training.get("momentum_coefficients")
        if coefficients is None or len(coefficients) != num_steps:
            return None
        return np.asarray(coefficients, np.float64)

    def displacements(self) -> tuple[Array, Array]:
        """Random subsets [M, K], and by how much training on them displaces, in the axes [M, D]."""
        masks_MK = random_subsets(len(self._store.task_names))
        rows_MK = normalize_mixtures(masks_MK, self._store.task_sizes)
        with one_blas_thread():
            return rows_MK, self._model.outwards(self._effects(rows_MK).delta_MR)

    def _read_plain_gradients(self) -> None:
        """What clipping depends on: squared lengths of gradients, and inner products of b."""
        gradients_ND = self._store.scalar("loss")[1]
        b_KD = np.zeros_like(self._model.b_KD)
        self._square_N = np.empty(len(self._store))
        for k, rows in chunks_of_tasks(self._store):
            chunk = gradients_ND[rows].astype(np.float64)
            b_KD[k] += self._model.share_N[rows] @ chunk
            self._square_N[rows] = (chunk**2).sum(1)
        self._gram_KK = b_KD @ b_KD.T
        rng = np.random.default_rng(0)
        # Examples of a step: more than rows where these are packed, as in a mixture of all tasks.
        everything = np.ones((1, len(self._store.task_names)), bool)
        per_row_1 = normalize_mixtures(everything, self._store.task_sizes) @ (
            self._model.examples_per_row_K
        )
        self._batch_size = size = round(self._training["examples_per_step"] * float(per_row_1[0]))
        num_rows = size * max(_LEAST_BATCHES, _ROWS_OF_BATCHES // size)
        # The same random numbers for every mixture, so that mixtures differ by their shares alone;
        # those that say which task are spread out evenly, over the tasks in the order of names.
        self._which_task = (rng.permutation(num_rows) + rng.random(num_rows)) / num_rows
        self._which_row = rng.random(num_rows)
        self._by_name_K = np.argsort(self._store.task_names)
        self._by_task_N = np.argsort(self._store.task_ids, kind="stable")

    def _effects(self, rows_MK: Array) -> Effects:
        """What training on some mixtures does."""
        model = self._model
        idle_M = ~rows_MK.any(1)
        w_MK = model.token_weights(rows_MK)
        clipped_MK = self._clipping(rows_MK) * w_MK
        clip_M = clipped_MK.sum(1)
        values_MR, vectors_MRR, outer_M = model.curvature(clipped_MK)

        def turned(x: Array) -> Array:  # into each mixture's own axes
            return np.einsum("mrs,...r->ms" if x.ndim == 1 else "mrs,mr->ms", vectors_MRR, x)

        response = self._recursion.response(values_MR)
        own_MR = response.momentum * turned(self._momentum_R)
        own_MR = own_MR - response.gradient * turned(clipped_MK @ model.b_KR)
        own_MR -= response.parameters * turned(self._parameters_R)
        delta_MR = np.einsum("mrs,ms->mr", vectors_MRR, own_MR)
        delta_MR[idle_M] = 0.0

        outer = self._recursion.response(outer_M)
        sources_MS = np.column_stack(
            [-outer.gradient[:, None] * clipped_MK, outer.momentum, -outer.parameters]
        )
        sources_MS[idle_M] = 0.0

        linear_MT, quadratic_M, target_slope_MR = model.target_change(delta_MR, sources_MS)
        values_MR = np.column_stack([values_MR, outer_M])
        quadratic_M += clip_M**2 * self._noise(rows_MK, w_MK, values_MR, vectors_MRR)
        return Effects(
            w_MK=clipped_MK,
            delta_MR=delta_MR,
            slope_MR=np.einsum(
                "mrs,ms->mr", vectors_MRR, response.gradient * turned(target_slope_MR)
            ),
            outer_slope_M=outer.gradient,
            linear_MT=linear_MT,
            quadratic_M=np.where(idle_M, 0.0, np.maximum(quadratic_M, self._least_bend)),
        )

    def _noise(self, rows_MK: Array, w_MK: Array, values_MR: Array, vectors_MRR: Array) -> Array:
        """Quadratic change by what differs from batch to batch, less that of the capture [M].

        Without gradient clipping; the last of the eigenvalues is that outside the axes.
        """
        randoms, signs = [], []
        batch_size = self._training.get("examples_per_step")
        if batch_size:
            response = self._recursion.noise_response(
                values_MR, self._rows_per_pass(rows_MK) / batch_size
            )
            randoms.append((self._model.row_covariance(rows_MK, w_MK), np.dstack(response)))
            signs.append(np.repeat([1, -1], [part.shape[2] for part in response]) / batch_size)
        capture = self._model.capture_covariance(w_MK)
        if capture is not None:
            randoms.append((capture, self._recursion.response(values_MR).gradient[..., None]))
            signs.append(np.array([-1]))
        curves = self._model.mean_target_curves(vectors_MRR, randoms)
        return sum(
            (curve_MQ @ sign_Q for curve_MQ, sign_Q in zip(curves, signs, strict=True)),
            start=np.zeros(len(rows_MK)),
        )

    def _rows_per_pass(self, rows_MK: Array) -> Array:
        """How many rows of mixtures are read before they are shuffled anew [M]."""
        num_rows_M = (rows_MK > 0) @ self._store.task_sizes
        smallest_M = np.where(rows_MK > 0, rows_MK, 1.0).min(1)
        return np.maximum(num_rows_M, np.ceil(1 / smallest_M))

    def _batches(self, rows_MK: Array) -> tuple[Array, Array]:
        """J batches of B examples of each mixture: which, and their tasks; int64 [M, J, B]."""
        counts_K = self._model.counts_K
        first_K = np.cumsum(counts_K) - counts_K
        size = self._batch_size
        shape_MJB = (len(rows_MK), len(self._which_task) // size, size)
        per_row_K = self._model.examples_per_row_K
        if (per_row_K != 1).any():
            rows_MK = rows_MK * per_row_K
            rows_MK = rows_MK / np.where(rows_MK.any(1), rows_MK.sum(1), 1.0)[:, None]
        place_MJB = np.zeros(shape_MJB, np.int64)
        for m, ends_K in enumerate(np.cumsum(rows_MK[:, self._by_name_K], axis=1)):
            places = np.searchsorted(ends_K, self._which_task, side="right")
            place_MJB[m] = places.reshape(shape_MJB[1:])
        task_MJB = self._by_name_K[np.minimum(place_MJB, len(counts_K) - 1)]
        share_JB = self._which_row.reshape(shape_MJB[1:])
        within_MJB = (share_JB * counts_K[task_MJB]).astype(np.int64)
        return self._by_task_N[first_K[task_MJB] + within_MJB], task_MJB

    def _clipping(self, rows_MK: Array) -> Array:
        """Mean factor by which clipping shortens gradients of each task in each mixture [M, K]."""
        limit = self._training.get("max_grad_norm")
        if not limit:
            return np.ones(rows_MK.shape)
        num_tasks = rows_MK.shape[1]
        row_MJB, task_MJB = self._batches(rows_MK)
        tokens_MJB = self._store.num_label_tokens[row_MJB].astype(np.float64)
        num_batches = row_MJB.shape[0] * row_MJB.shape[1]
        cell_MJB = np.arange(num_batches).reshape(*row_MJB.shape[:2], 1) * num_tasks + task_MJB
        tokens_MJK = np.bincount(
            cell_MJB.ravel(), tokens_MJB.ravel(), minlength=num_batches * num_tasks
        ).reshape(*row_MJB.shape[:2], num_tasks)
        own_MJB = self._square_N[row_MJB] - np.diagonal(self._gram_KK)[task_MJB]
        square_MJ = (tokens_MJB**2 * own_MJB).sum(2)
        square_MJ += ((tokens_MJK @ self._gram_KK) * tokens_MJK).sum(2)
        tokens_MJ = tokens_MJB.sum(2)
        norm_MJ = np.sqrt(np.maximum(square_MJ, 0.0)) / tokens_MJ
        clip_MJ = np.minimum(1.0, limit / np.maximum(norm_MJ, 1e-300))
        share_MJK = tokens_MJK / tokens_MJ[..., None]
        total_MK = share_MJK.sum(1)
        return np.divide(
            np.einsum("mj,mjk->mk", clip_MJ, share_MJK),
            total_MK,
            out=np.repeat(clip_MJ.mean(1, keepdims=True), num_tasks, axis=1),
            where=total_MK > 0,
        )

    def diagnostics(self) -> dict[str, float]:
        everything = np.ones((1, len(self._store.task_names)), bool)
        rows_MK = normalize_mixtures(everything, self._store.task_sizes)
        w_MK = self._model.token_weights(rows_MK)
        clipped_MK = self._clipping(rows_MK) * w_MK
        values_MR, _, _ = self._model.curvature(clipped_MK)
        spectrum = np.maximum(values_MR[0], 0.0)
        return {
            **super().diagnostics(),
            "duration": self._recursion.duration,
            "clipping_factor_all_tasks": float(clipped_MK.sum()),
            "largest_curvature_times_duration": float(spectrum.max() * self._recursion.duration),
            "largest_curvature_over_stable": float(
                spectrum.max() / self._recursion.stable_curvature
            ),
            "effective_dimension": float(spectrum.sum() ** 2 / max((spectrum**2).sum(), 1e-300)),
        }


def _read_gradients(store: GradientStore, rows: slice) -> tuple[Array, Array]:
    """Gradients of the loss, and of losses of drawn labels, in the optimizer's coordinates."""
    g_ND, phi_ND = store.scalar("loss@optimizer")[1], store.scalar("sampled_loss@optimizer")[1]
    return g_ND[rows].astype(np.float64), phi_ND[rows].astype(np.float64)
