"""Surrogates: regressions of the target's loss on the mixture.

They are fitted to what another estimator says, or to measured runs.

Shapes: K tasks, M mixtures that the loss is known of, Q mixtures that it is asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_auxselect.checks import require_count
from hf_auxselect.estimators.base import (
    NORMAL_95,
    TINY,
    AbstractEstimator,
    Array,
    Estimate,
    FittedEstimator,
    ProbePoints,
    normalize_mixtures,
)
from hf_auxselect.estimators.kernels import Kernel, LinearKernel, most_likely_matern
from hf_auxselect.estimators.linearized import LinearizedTraining
from hf_auxselect.estimators.parallel import in_chunks
from hf_auxselect.seeds import random_permutation, random_words
from hf_auxselect.store.arrays import GradientStore

# Constants that shape estimates.
_MIN_MIXTURES = 3
"""The least number of mixtures to fit to.

Derived: with two, each that is left out is predicted by the other alone, whatever the penalty.
"""

_TAIL = 0.1
"""Quantile at which the jackknife+ cuts its predictions, on either side.

A convention: the jackknife+ promises a coverage of 1 - 2 * 0.1, and reaches 90% in practice (Barber
et al.).
"""

NUM_SUBSETS = 512
"""The default of ``num_subsets``. A convention: many per task, at a cost of seconds."""

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
"""The default of ``penalties``. A convention: from nearly none to nearly the mean of all losses."""

_LEAST_SHARE = 1e-3
"""At smaller shares of a task the derivative is that at this share; at 0 it is infinite.

A convention, as in calibration.py. It shapes derivatives alone.
"""

# Bounds memory; shapes no estimate but for rounding.
_ELEMENTS_AT_ONCE = 1_000_000
"""Mixtures are processed in chunks of about this many Q x M numbers (8 MB in float64)."""


@dataclass(frozen=True, kw_only=True)
class AbstractSurrogate(AbstractEstimator):
    """Options of a regression on the tasks' shares; see :class:`RidgeSurrogate`."""

    base: AbstractEstimator = field(default_factory=LinearizedTraining)
    num_subsets: int = NUM_SUBSETS
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.base, AbstractEstimator):
            raise TypeError(
                f"base must be an estimator such as LinearizedTraining(), got {self.base!r}."
            )
        require_count("num_subsets", self.num_subsets, _MIN_MIXTURES)

    @property
    def scalars(self) -> tuple[str, ...]:
        return self.base.scalars

    @property
    def needs_probes(self) -> bool:
        return self.base.needs_probes

    def probe_points(self, store: GradientStore) -> ProbePoints | None:
        return self.base.probe_points(store)

    @abstractmethod
    def regress(self, roots_MK: Array, losses_M: Array) -> _Choice:
        """The kernel and penalty for losses of mixtures, given the roots of their shares."""

    def fit(self, store: GradientStore) -> FittedSurrogate:
        """Fit to the estimates that ``base`` makes of random subsets of the store's tasks.

        Raises:
            ValueError: the store has one task.
        """
        fitted = self.base.fit(store)
        subsets = self.subsets(len(store.task_names))
        return FittedSurrogate(
            self,
            normalize_mixtures(subsets, store.task_sizes),
            fitted.estimate(subsets),
            task_sizes=store.task_sizes,
            base=fitted,
        )

    def fit_runs(
        self, weights: ArrayLike, losses: ArrayLike, *, task_sizes: ArrayLike | None = None
    ) -> FittedSurrogate:
        """Fit to measured runs, without a store; ``base``, ``num_subsets`` and ``seed`` are unused.

        Runs of the same mixture (with other seeds) count as one with their mean loss: else each
        would be predicted by the others when it is left out. Runs without further training (weights
        of zeros) stay out of the regression. Their mean is the answer to such weights, which raise
        ValueError if there were none.

        Args:
            weights: [M, K], boolean subset masks or mixture weights; see
                :func:`normalize_mixtures`.
            losses: [M], measured loss of the target, nats per label token.
            task_sizes: [K], number of examples of each task, by which masks are pooled, here and in
                ``estimate``; None: tasks of equal size.

        Raises:
            ValueError: shapes do not fit, a number is not finite, or fewer than 3 mixtures differ.
        """
        given, losses_M = np.asarray(weights), np.asarray(losses, np.float64)
        if given.ndim != 2 or losses_M.shape != given.shape[:1]:
            raise ValueError(
                "weights must have shape [runs, tasks] and losses [runs], got "
                f"{list(given.shape)} and {list(losses_M.shape)}."
            )
        if not np.isfinite(losses_M).all():
            raise ValueError("losses must be finite; leave out the runs that diverged.")
        sizes_K = np.ones(given.shape[1]) if task_sizes is None else np.asarray(task_sizes, float)
        if sizes_K.shape != given.shape[1:] or not (np.isfinite(sizes_K) & (sizes_K > 0)).all():
            raise ValueError(
                f"task_sizes must be {given.shape[1]} positive numbers, one per column of weights, "
                f"got {task_sizes!r}."
            )
        shares_MK = normalize_mixtures(given, sizes_K)
        # Shares that differ by rounding alone are the same mixture.
        _, first, group = np.unique(
            np.round(shares_MK, 9), axis=0, return_index=True, return_inverse=True
        )
        mean_M = np.bincount(group, losses_M) / np.bincount(group)
        measured = Estimate(loss=mean_M, low=mean_M, high=mean_M)
        return FittedSurrogate(self, shares_MK[first], measured, task_sizes=sizes_K)

    def subsets(self, num_tasks: int) -> Array:
        """The random subsets of K tasks: bool [num_subsets, K], or all 2^K - 1 if that is fewer.

        No two are the same, and their sizes are drawn uniformly from 1 to K.
        """
        if num_tasks < 63 and 2**num_tasks - 1 <= self.num_subsets:
            return (np.arange(1, 2**num_tasks)[:, None] >> np.arange(num_tasks)) % 2 == 1
        masks = np.zeros((self.num_subsets, num_tasks), bool)
        known: set[bytes] = set()
        draw = 0
        while len(known) < len(masks):
            mask = masks[len(known)]
            mask[:] = False
            size = 1 + int(random_words(1, self.seed, "surrogate size", draw)[0]) % num_tasks
            mask[random_permutation(num_tasks, self.seed, "surrogate subset", draw)[:size]] = True
            known.add(mask.tobytes())
            draw += 1
        return masks


@dataclass(frozen=True, kw_only=True)
class RidgeSurrogate(AbstractSurrogate):
    """Linear regression of the loss on the roots of the tasks' shares, with an L2 penalty.

    Choose it to answer for very many mixtures: fitted to what ``base`` estimates of random subsets,
    it answers many times faster. Or choose it where there are a few measured runs and no gradients
    (``fit_runs``). Its limit: every task has one score, so that it misses what tasks do together;
    ``KernelSurrogate`` does not.

    From M mixtures with shares s_m (K numbers that sum to 1), their roots r_m and losses y_m, it
    fits

        c, theta = argmin  sum_m (y_m - c - theta . r_m)^2 + penalty * v |theta|^2,
        estimate = c + theta . r,

    where v is the mean of |r_m - mean|^2, so that ``penalty`` has no unit. The penalty is the one
    with the least mean square of leave-one-out residuals. The 90% interval is that of the
    jackknife+, too narrow with fewer than 9 mixtures, joined with the interval of ``base``.
    Without further training the answer is that of ``base``, or the mean of such runs.

    Cost: once, ``num_subsets`` estimates of ``base`` and an eigendecomposition M x M; then a few
    vectors of M numbers, and one product with an M x M matrix, per mixture.

    Args:
        base: estimates the losses of the subsets.
        num_subsets: M.
        seed: determines the subsets.
        penalties: from which leave-one-out chooses.

    Source: Li et al., "Identification of Negative Transfers in Multitask Learning Using Surrogate
    Models" (TMLR 2023), section 3, with roots of shares for indicators; leave-one-out: Allen, "The
    Relationship between Variable Selection and Data Augmentation and a Method for Prediction"
    (Technometrics 1974); interval: Barber et al., "Predictive Inference with the Jackknife+"
    (Annals of Statistics 2021), eq. 1.2.
    """

    penalties: tuple[float, ...] = PENALTIES

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "penalties", _positive("penalties", self.penalties))

    def regress(self, roots_MK: Array, losses_M: Array) -> _Choice:
        kernel = LinearKernel(roots_MK.mean(0))
        gram = _Gram(kernel(roots_MK, roots_MK))
        squares = [(gram.left_out_residuals(losses_M, p) ** 2).mean() for p in self.penalties]
        if not np.isfinite(squares).any():
            raise ArithmeticError("no penalty gives a finite leave-one-out error.")
        return _Choice(kernel, gram, self.penalties[int(np.nanargmin(squares))])


@dataclass(frozen=True, kw_only=True)
class KernelSurrogate(AbstractSurrogate):
    """Gaussian process regression of the loss on the tasks' shares, with an unknown mean.

    Choose it over ``RidgeSurrogate``, whose arguments (but for ``penalties``) and uses it shares,
    where there are more than a few dozen runs, or where tasks interact, such as a pair that helps
    where each alone does harm. Its limit: far from all mixtures it has seen, it tends to their mean
    loss. With r the roots of the shares,

        k(s, s') = (1 + d + d^2 / 3) exp(-d),            d^2 = 5 sum_k rate_k (r_k - r'_k)^2.

    A task that does not matter gets a rate near 0. Rates and the variance of the noise are those of
    the largest marginal likelihood; see :func:`most_likely_matern`. The 90% interval is that of
    the Gaussian process for one further run, noise included, joined with the interval of ``base``.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2, 4
    and 5; surrogates with a kernel on mixtures: KernelSM (arXiv 2602.03783, ICLR 2026).
    """

    def regress(self, roots_MK: Array, losses_M: Array) -> _Choice:
        kernel, signal, noise = most_likely_matern(roots_MK, losses_M)
        gram = _Gram(kernel(roots_MK, roots_MK))
        return _Choice(kernel, gram, noise / gram.scale, signal)


class FittedSurrogate(FittedEstimator):
    """See :class:`RidgeSurrogate`."""

    def __init__(
        self,
        options: AbstractSurrogate,
        shares_MK: Array,
        known: Estimate,
        *,
        task_sizes: Array,
        base: FittedEstimator | None = None,
    ) -> None:
        self._task_sizes = task_sizes
        self._base = base
        is_idle_M = ~shares_MK.any(1)
        self._idle: Estimate | None = None
        if base is not None:
            self._idle = base.estimate(np.zeros((1, len(task_sizes))))
        elif is_idle_M.any():
            self._idle = Estimate(
                loss=known.loss[is_idle_M], low=known.low[is_idle_M], high=known.high[is_idle_M]
            )
        shares_MK = shares_MK[~is_idle_M]
        losses_M = known.loss[~is_idle_M]
        if len(losses_M) < _MIN_MIXTURES:
            raise ValueError(
                f"a surrogate needs at least {_MIN_MIXTURES} different mixtures, got "
                f"{len(losses_M)} of {len(task_sizes)} task(s)."
            )
        self._regression = _Regression(options, shares_MK, losses_M)
        self._below_M = losses_M - known.low[~is_idle_M]
        self._above_M = known.high[~is_idle_M] - losses_M
        self._groups: list[_Regression] | None = None
        if known.group_losses is not None:
            self._groups = [
                _Regression(options, shares_MK, group_losses_M)
                for group_losses_M in known.group_losses[~is_idle_M].T
            ]

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_QK = normalize_mixtures(weights, self._task_sizes)
        is_idle_Q = ~shares_QK.any(1)
        if is_idle_Q.any() and self._idle is None:
            raise ValueError(
                f"weights has a row of zeros (row {int(np.argmax(is_idle_Q))}), no further "
                "training, and none of the measured runs was one; add such a run to fit_runs."
            )
        size = max(1, _ELEMENTS_AT_ONCE // len(self._below_M))
        loss, low, high, group_QG = in_chunks(shares_QK, self._estimate_chunk, size=size)
        if self._idle is not None:
            loss[is_idle_Q], low[is_idle_Q] = self._idle.loss[0], self._idle.low[0]
            high[is_idle_Q] = self._idle.high[0]
            if self._idle.group_losses is not None:
                group_QG[is_idle_Q] = self._idle.group_losses[0]
        return Estimate(
            loss=loss,
            low=low,
            high=high,
            weights=shares_QK,
            group_losses=None if self._groups is None else group_QG,
        )

    @property
    def has_gradient(self) -> bool:
        return True

    def gradient(self, weights: ArrayLike) -> Array:
        return self._gradients(weights, [self._regression])[:, 0]

    def group_gradients(self, weights: ArrayLike) -> Array:
        return self._gradients(weights, self._groups or [])

    def _gradients(self, weights: ArrayLike, regressions: Sequence[_Regression]) -> Array:
        shares_QK = normalize_mixtures(weights, self._task_sizes)
        result_QGK = np.empty((len(shares_QK), len(regressions), shares_QK.shape[1]))
        for g, regression in enumerate(regressions):
            result_QGK[:, g] = regression.gradient(shares_QK)
        result_QGK[~shares_QK.any(1)] = 0.0
        return result_QGK - result_QGK.mean(2, keepdims=True)

    def _estimate_chunk(self, shares_QK: Array) -> tuple[Array, Array, Array, Array]:
        """Loss and the ends of its interval, float64 [Q] each; losses of groups [Q, G]."""
        parts_QM = self._regression.parts(shares_QK)
        loss_Q, low_Q, high_Q = self._regression.interval(shares_QK, parts_QM)

        def joined(own_Q: Array, of_base_M: Array) -> Array:
            # Errors that all estimates of the base share do not average out: its half-widths are
            # predicted at the mixture as losses are, and added as an independent error.
            of_base_Q = np.maximum(parts_QM @ of_base_M, of_base_M.min())
            return np.hypot(np.maximum(own_Q, 0.0), of_base_Q)

        low_Q = loss_Q - joined(loss_Q - low_Q, self._below_M)
        high_Q = loss_Q + joined(high_Q - loss_Q, self._above_M)
        lowest = self._regression.lowest
        loss_Q, low_Q, high_Q = (np.maximum(x, lowest) for x in (loss_Q, low_Q, high_Q))
        groups = self._groups or []
        group_QG = np.empty((len(shares_QK), len(groups)))
        for g, regression in enumerate(groups):
            group_loss_Q = regression.parts(shares_QK) @ regression.losses_M
            group_QG[:, g] = np.maximum(group_loss_Q, regression.lowest)
        return loss_Q, low_Q, high_Q, group_QG

    def diagnostics(self) -> dict[str, float]:
        """Those of ``base``, and how well the regression predicts mixtures that it leaves out.

        ``num_mixtures``: number of mixtures it was fitted to. ``leave_one_out_r2``,
        ``leave_one_out_rmse_nats``: of its leave-one-out predictions. ``penalty``.
        """
        losses_M, residuals_M = self._regression.losses_M, self._regression.residuals_M
        square = float((residuals_M**2).sum())
        spread = float(((losses_M - losses_M.mean()) ** 2).sum())
        return {
            **(self._base.diagnostics() if self._base is not None else {}),
            "num_mixtures": float(len(losses_M)),
            "leave_one_out_r2": 1 - square / spread if spread > 0 else 0.0,
            "leave_one_out_rmse_nats": float(np.sqrt(square / len(losses_M))),
            "penalty": self._regression.penalty,
        }


class _Regression:
    """Regression of losses on the roots of shares, as a surrogate's options make it.

    Attributes:
        losses_M: the known losses.
        residuals_M: their leave-one-out residuals, with the same kernel and penalty.
        penalty: what is added to the diagonal of a kernel matrix of trace M.
        lowest: 0 if all known losses are non-negative, as losses of a model must be; else -inf.
    """

    def __init__(self, options: AbstractSurrogate, shares_MK: Array, losses_M: Array) -> None:
        self._roots_MK, self.losses_M = np.sqrt(shares_MK), losses_M
        self.lowest = 0.0 if losses_M.min() >= 0 else -np.inf
        choice = options.regress(self._roots_MK, losses_M)
        self._kernel, self._gram, self.penalty, self._signal = choice
        self.residuals_M = self._gram.left_out_residuals(losses_M, self.penalty)
        self._inverse_MM = self._gram.inverse(self.penalty)

    def parts(self, shares_QK: Array) -> Array:
        """What each known loss contributes to the prediction for other mixtures [Q, M]."""
        kernel_QM = self._kernel(np.sqrt(shares_QK), self._roots_MK)
        return self._gram.centered(kernel_QM) @ self._inverse_MM + 1 / len(self.losses_M)

    def gradient(self, shares_QK: Array) -> Array:
        """Derivatives of the prediction with respect to the shares [Q, K]; 0 where it is cut."""
        factors_M = self._inverse_MM @ self.losses_M / self._gram.scale
        roots_QK = np.sqrt(shares_QK)
        of_roots_QK = self._kernel.gradient(roots_QK, self._roots_MK, factors_M)
        result_QK = of_roots_QK / (2 * np.maximum(roots_QK, np.sqrt(_LEAST_SHARE)))
        result_QK[self.parts(shares_QK) @ self.losses_M <= self.lowest] = 0.0
        return result_QK

    def interval(self, shares_QK: Array, parts_QM: Array) -> tuple[Array, Array, Array]:
        """Predictions and the ends of their 90% intervals [Q], given :meth:`parts`."""
        loss_Q = parts_QM @ self.losses_M
        if self._signal is None:
            return loss_Q, *self._jackknife(loss_Q, parts_QM)
        half_Q = NORMAL_95 * np.sqrt(self._variance(self._signal, shares_QK, parts_QM))
        return loss_Q, loss_Q - half_Q, loss_Q + half_Q

    def _variance(self, signal: float, shares_QK: Array, parts_QM: Array) -> Array:
        """Of a further run, less its prediction [Q], under the Gaussian process.

        That of any prediction which is linear in the known losses, with parts that sum to 1: the
        covariances of what is known and asked for, and the noise of all runs.
        """
        kernel_QM = self._kernel(np.sqrt(shares_QK), self._roots_MK)
        own_Q = 1 + ((parts_QM @ self._gram.kernel_MM - 2 * kernel_QM) * parts_QM).sum(1)
        noise = self.penalty * self._gram.scale
        return signal * (np.maximum(own_Q, 0.0) + noise * (1 + (parts_QM**2).sum(1)))

    def _jackknife(self, loss_Q: Array, parts_QM: Array) -> tuple[Array, Array]:
        """The ends of jackknife+ intervals [Q]."""
        # Without mixture m its loss is as good as replaced by what the others predict for it.
        left_out_QM = loss_Q[:, None] - parts_QM * self.residuals_M
        rank = max(1, int(_TAIL * (len(self.losses_M) + 1)))
        size_M = np.abs(self.residuals_M)
        low_Q = np.partition(left_out_QM - size_M, rank - 1, axis=1)[:, rank - 1]
        high_Q = np.partition(left_out_QM + size_M, -rank, axis=1)[:, -rank]
        return low_Q, high_Q


class _Choice(NamedTuple):
    """What a surrogate's options make of known losses."""

    kernel: Kernel
    gram: _Gram
    penalty: float
    signal: float | None = None
    """Variance of the process, nats^2, of which the kernel is the correlation; None: of none."""


class _Gram:
    """The kernel matrix of the known mixtures, centred for the intercept, with trace M.

    Attributes:
        kernel_MM: the matrix as it was given.
        scale: what it was divided by.
    """

    def __init__(self, kernel_MM: Array) -> None:
        count, self.kernel_MM = len(kernel_MM), kernel_MM
        self._mean_M = kernel_MM.mean(0)
        centered_MM = kernel_MM - self._mean_M - self._mean_M[:, None] + self._mean_M.mean()
        self.scale = max(float(np.trace(centered_MM)) / count, TINY)
        # The intercept has no penalty. Its axis, the constant vector, is told from others with the
        # eigenvalue 0 by making its eigenvalue the largest, and dropped.
        values, vectors = np.linalg.eigh(centered_MM / self.scale + (count + 1) / count)
        self._values, self._vectors = np.maximum(values[:-1], 0.0), vectors[:, :-1]

    def centered(self, kernel_QM: Array) -> Array:
        """The kernel between other mixtures and the known ones, scaled and centred [Q, M].

        Up to a constant per row, which :meth:`inverse` maps to 0.
        """
        return (kernel_QM - self._mean_M) / self.scale

    def inverse(self, penalty: float) -> Array:
        """(centred kernel + penalty)^-1, and 0 for a constant [M, M]."""
        return (self._vectors / (self._values + penalty)) @ self._vectors.T

    def left_out_residuals(self, losses_M: Array, penalty: float) -> Array:
        """Loss of each mixture, less what the regression on the others predicts for it [M].

        (y_m - estimate_m) / (1 - h_mm); numerator and denominator are sums over the eigenvectors u
        with eigenvalues v of penalty / (v + penalty) times u_m (u . y) and u_m^2.
        """
        left = penalty / (self._values + penalty)
        return (self._vectors * left) @ (self._vectors.T @ losses_M) / (self._vectors**2 @ left)


def _positive(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """The values as a tuple, one or more positive numbers."""
    result = tuple(values)
    if not result or not all(0 < value < np.inf for value in result):
        raise ValueError(f"{name} must be one or more positive numbers, got {values!r}.")
    return result
