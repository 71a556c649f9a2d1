"""The learning rates of the steps to come.

A copy of the scheduler is stepped, which sets the rates of a stand-in for the optimizer. The
scheduler of the run, its optimizer and their rates stay as they are.

Shapes: G parameter groups, S steps.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The rates of every parameter group in some steps to come.

    Attributes:
        learning_rates: [G][S].
        momentum_coefficients: [G][S], Adam's first beta or SGD's momentum, which some schedulers
            change, too; 0 for optimizers without.
        unknown_because: None if the rates are known; else why not. They are then those of now.
    """

    learning_rates: list[list[float]]
    momentum_coefficients: list[list[float]]
    unknown_because: str | None = None

    @property
    def reference_group(self) -> int:
        """The group in whose rates those of the others are given; see :func:`reference_group`."""
        return reference_group([sum(rates) for rates in self.learning_rates])


def reference_group(rates: Sequence[float]) -> int:
    """The first group whose rate [G] is not 0; if there is none, the first."""
    return next((g for g, rate in enumerate(rates) if rate > 0), 0)


def momentum_coefficient(group: Mapping[str, Any]) -> float:
    """Adam's first beta, SGD's momentum, or 0 for a parameter group without."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def follows_metrics(scheduler: Any) -> bool:
    """Whether a scheduler follows a metric, so that its rates are not known beforehand.

    ``ReduceLROnPlateau`` and ``GreedyLR`` do.
    """
    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


def schedule_to_come(
    scheduler: Any, optimizer: Any, *, skip: int, count: int, shared: Sequence[object] = ()
) -> Schedule:
    """The rates of ``count`` steps, the first of them ``skip`` steps from now.

    Args:
        scheduler: any that is stepped once after each optimizer step.
        optimizer: the one whose groups it sets.
        skip: steps before the first that is asked for.
        count: S.
        shared: objects that its copy may refer to and that are not copied, such as the model.
    """
    if type(scheduler) is LambdaLR:
        return _of_lambdas(scheduler, optimizer, skip, count)
    reason: str | None = None
    if follows_metrics(scheduler):
        reason = f"{type(scheduler).__name__} sets them by a metric"
    else:
        try:
            return _of_copy(scheduler, optimizer, skip, count, shared)
        except Exception as error:  # whatever a scheduler of the user's own may raise
            reason = (
                f"a copy of {type(scheduler).__name__} cannot be stepped "
                f"({type(error).__name__}: {error})"
            )
    return Schedule(
        learning_rates=[[_rate(group)] * count for group in optimizer.param_groups],
        momentum_coefficients=_constant_momentum(optimizer, count),
        unknown_because=reason,
    )


def _of_lambdas(scheduler: LambdaLR, optimizer: Any, skip: int, count: int) -> Schedule:
    """The rates of a LambdaLR, from its functions of the step.

    This needs no copy, and can leave out the restart that ``schedule_restart`` has built in.
    """
    first = scheduler.last_epoch + skip
    rates = []
    for base, given in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        factor = getattr(given, "without_restart", given)
        rates.append([float(base * factor(step)) for step in range(first, first + count)])
    return Schedule(
        learning_rates=rates, momentum_coefficients=_constant_momentum(optimizer, count)
    )


def _of_copy(
    scheduler: Any, optimizer: Any, skip: int, count: int, shared: Sequence[object]
) -> Schedule:
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    stand_in = SimpleNamespace(
        param_groups=[group | {"params": []} for group in groups],
        defaults=copy.deepcopy(optimizer.defaults),
        state={},
        step=lambda: None,
    )
    # The copy refers to the stand-in wherever the scheduler, or one within it, does to the
    # optimizer; it shares with the run what is listed as shared.
    memo: dict[int, Any] = {id(known): known for known in shared}
    for known in (optimizer, getattr(scheduler, "optimizer", optimizer)):
        memo[id(known)] = stand_in
    stepped = copy.deepcopy(scheduler, memo)
    learning_rates: list[list[float]] = [[] for _ in groups]
    momentum: list[list[float]] = [[] for _ in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without an optimizer's
        for step in range(skip + count):
            if step:
                stepped.step()
            if step >= skip:
                for g, group in enumerate(stand_in.param_groups):
                    learning_rates[g].append(_rate(group))
                    momentum[g].append(momentum_coefficient(group))
    return Schedule(learning_rates=learning_rates, momentum_coefficients=momentum)


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"] or 0.0)  # None: Adafactor with relative steps


def _constant_momentum(optimizer: Any, count: int) -> list[list[float]]:
    return [[momentum_coefficient(group)] * count for group in optimizer.param_groups]
