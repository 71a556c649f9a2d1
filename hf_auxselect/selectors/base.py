"""What a selector sees, a :class:`SelectionProblem`, and what it returns, a :class:`Selection`.

Shapes: K tasks, M mixtures, G further targets ("groups").
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

Array = np.ndarray


class LossEstimate(Protocol):
    """What a selector reads of an estimate; :class:`hf_auxselect.Estimate` is one."""

    @property
    def loss(self) -> Array: ...
    @property
    def low(self) -> Array: ...
    @property
    def high(self) -> Array: ...
    @property
    def weights(self) -> Array | None: ...
    @property
    def group_losses(self) -> Array | None: ...


EstimateFn = Callable[[Array], LossEstimate]
"""Weights or subset masks [M, K] -> estimates of M losses, nats per label token."""
DifferenceFn = Callable[[Array, Array], LossEstimate]
"""Weights [M, K] and one reference [K] -> estimates of M differences of losses to it."""
GradientFn = Callable[[Array], Array]
"""Weights [M, K] -> derivatives along the simplex of the target's loss, [M, K], or of the groups'
losses, [M, G, K]; nats per label token."""


@dataclass(frozen=True)
class SelectionProblem:
    """All that a selector may use; selectors look nothing up elsewhere.

    Args:
        estimate: estimates the target's loss for weights or boolean subset masks [M, K].
        task_names: names of the K tasks, all different.
        task_sizes: number of training rows of each task [K].
        difference: estimates the loss of mixtures minus that of a reference mixture. Its intervals
            are narrower than those of two estimates, whose errors are shared. None: not available.
        gradient: derivative of the estimated loss with respect to the weights, along the simplex
            (``FittedEstimator.gradient``). None: the estimator has none.
        group_gradients: the same for the losses of the groups.
        keep: names of tasks that must be selected.
        groups: names of further targets, in the order of an estimate's group losses.
        gram: inner products of the tasks' mean gradients [K, K], in the optimizer's coordinates
            where they were captured. None: there are no gradients.
        rows_to_read: number of training rows that the remaining steps read. None: not known.

    Raises:
        ValueError: there are no tasks, a name occurs twice, ``task_sizes`` has another length, or
            ``keep`` names an unknown task.
    """

    estimate: EstimateFn
    task_names: Sequence[str]
    task_sizes: Sequence[int]
    _: KW_ONLY
    difference: DifferenceFn | None = None
    gradient: GradientFn | None = None
    group_gradients: GradientFn | None = None
    keep: Sequence[str] = ()
    groups: Sequence[str] = ()
    gram: Array | None = None
    rows_to_read: int | None = None

    def __post_init__(self) -> None:
        names = list(self.task_names)
        if not names:
            raise ValueError("task_names is empty; there is nothing to select from.")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"task_names has {twice[0]!r} more than once; names must differ.")
        if len(self.task_sizes) != len(names):
            raise ValueError(
                f"task_sizes must have one number of rows for each of the {len(names)} tasks, got "
                f"{len(self.task_sizes)}."
            )
        require_known(self.keep, names, "keep")

    @property
    def kept(self) -> Array:
        """Mask [K] of the tasks that must be selected."""
        return np.array([name in self.keep for name in self.task_names], bool)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One mixture that a selector tried, with its estimate in nats per label token."""

    tasks: tuple[str, ...]
    loss: float
    low: float
    high: float
    accepted: bool
    weights: dict[str, float] | None = None
    """Task -> weight, of those with a positive one; None: weights as the tasks' sizes."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selector chose.

    Attributes:
        weights: task -> weight in the training mixture; sums to 1, 0 for dropped tasks.
        estimate: the estimate of the chosen mixture (M = 1); None if none was made.
        history: the mixtures tried, in order; searches over more than 64 tasks leave some out.
        scores: task -> score, where the method has scores (their meaning is the selector's).
        score_intervals: task -> low and high of the score's 90% interval, where the method has one.
        shadow_prices: group -> decrease of the target's loss, in nats per label token, for each nat
            by which the group's ceiling rises; only for methods with ceilings.
        notes: sentences on the choice for the report, such as what of an option could not hold.
        diagnostics: numbers that say how far to trust the choice, where the method has some.
    """

    weights: dict[str, float]
    estimate: LossEstimate | None = None
    history: tuple[Step, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    score_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    shadow_prices: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    diagnostics: dict[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> list[str]:
        """The tasks with a positive weight, in the order of the training set."""
        return [task for task, weight in self.weights.items() if weight > 0]


class AbstractSelector(ABC):
    """A method of choosing a mixture: a frozen dataclass whose fields are its options.

    Every search is deterministic. Among equal estimates the first one wins.
    """

    asks_for_target_only: ClassVar[bool] = True
    """Whether a lower loss of the target is always better, so that ``confirm=`` may overrule the
    choice by it. False for methods that promise something of other losses."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        parameters = [*inspect.signature(cls.select).parameters.values()][1:]
        required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if len(required) > 1:
            raise TypeError(
                f"{cls.__name__}.select{inspect.signature(cls.select)} has the signature of an "
                "earlier version. Define select(self, problem), and read problem.estimate, "
                "problem.task_names and problem.keep."
            )

    def starting_from(self, prices: Mapping[str, float]) -> AbstractSelector:
        """The same method, which may start from the shadow prices of an earlier selection."""
        return self

    @abstractmethod
    def select(self, problem: SelectionProblem) -> Selection:
        """Choose a mixture of the problem's tasks in which the tasks of ``keep`` take part.

        Raises:
            ValueError: an option does not fit the tasks, or an estimate is NaN.
        """


def require_known(names: Iterable[str], task_names: Sequence[str], argument: str) -> None:
    """Raise ValueError for the first name that is not a task; ``argument`` is named in it."""
    for name in names:
        if name not in task_names:
            raise ValueError(
                f"{argument} names the unknown task {name!r}; known are {list(task_names)}."
            )


def require_room(option: str, limit: int, problem: SelectionProblem) -> None:
    """Raise ValueError if more tasks must be selected than an option allows."""
    if (number := int(problem.kept.sum())) > limit:
        raise ValueError(
            f"{option} allows {limit} tasks, but keep={list(problem.keep)} asks for {number}; "
            f"raise {option}, or keep fewer."
        )


def checked(losses: Array, weights_MK: Array, problem: SelectionProblem) -> Array:
    """Estimated losses, of which none is NaN.

    Args:
        losses: float [M, ...].
        weights_MK: of their mixtures, or masks of subsets.
        problem: whose tasks these are.

    Raises:
        ValueError: one is NaN; names the tasks of its mixture.
    """
    wrong_M = np.isnan(losses).any(axis=tuple(range(1, losses.ndim)))
    if wrong_M.any():
        tasks = tasks_of(weights_MK[int(np.argmax(wrong_M))], problem)
        raise ValueError(
            f"the estimate for the tasks {list(tasks)} is NaN. Leave out the task whose losses or "
            "gradients are far larger than those of the others, or use another estimator."
        )
    return losses


def tasks_of(weights_K: Array, problem: SelectionProblem) -> tuple[str, ...]:
    """Names of the tasks with a positive weight, or of a mask."""
    return tuple(problem.task_names[k] for k in np.flatnonzero(weights_K > 0).tolist())


def normalized_weights(
    weights: Array, estimate: LossEstimate | None, problem: SelectionProblem
) -> dict[str, float]:
    """The weights of one mixture by task, scaled to sum to 1.

    Args:
        weights: of the mixture, or a boolean mask of a subset, whose tasks then have weights
            proportional to their sizes; [1, K].
        estimate: of this mixture. Its ``weights``, if it has some, are the estimator's reading of
            the mixture, and count instead.
        problem: whose tasks these are.

    Raises:
        ValueError: the weights are not finite, negative, or all 0.
    """
    if estimate is not None and estimate.weights is not None:
        row = np.asarray(estimate.weights[0], float)
    elif weights.dtype == bool:
        row = weights[0] * np.asarray(problem.task_sizes, float)
    else:
        row = np.asarray(weights[0], float)
    if not (np.isfinite(row).all() and (row >= 0).all() and row.sum() > 0):
        raise ValueError(f"weights must be finite, not negative and not all 0, got {row.tolist()}.")
    return {name: float(w) for name, w in zip(problem.task_names, row / row.sum(), strict=True)}
