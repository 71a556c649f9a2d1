"""What the callback requires of its options, before anything is spent on them."""

from __future__ import annotations

from collections.abc import Sequence

from hf_auxselect.estimators import AbstractEstimator
from hf_auxselect.selectors import AbstractSelector

MODES = ("continue", "restart", "observe")


def require_options(
    *,
    warmup: float | int,
    after: str,
    keep: Sequence[str],
    examples_per_task: int | None,
    projection_dim: int,
    batch_size: int | None,
    verify: int,
    calibrate: int,
    estimator: AbstractEstimator | None,
    selector: AbstractSelector | None,
) -> None:
    """Raise ValueError or TypeError for the first option of the callback that is wrong."""
    is_share = isinstance(warmup, float) and 0 < warmup < 1
    if isinstance(warmup, bool) or not (is_share or (isinstance(warmup, int) and warmup >= 1)):
        raise ValueError(
            f"warmup must be a share of the run in (0, 1) or a number of steps (an int of at "
            f"least 1), got {warmup!r}."
        )
    if after not in MODES:
        raise ValueError(f"after must be one of {list(MODES)}, got {after!r}.")
    if isinstance(keep, str):
        raise TypeError(f"keep must be a sequence of task names, got the string {keep!r}.")
    if examples_per_task is not None and examples_per_task < 2:
        raise ValueError(f"examples_per_task must be at least 2, or None; got {examples_per_task}.")
    if projection_dim < 2:
        raise ValueError(f"projection_dim must be at least 2, got {projection_dim}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None; got {batch_size}.")
    for name, number in (("verify", verify), ("calibrate", calibrate)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} must be a number of mixtures, 0 or more; got {number!r}.")
    if not isinstance(estimator, AbstractEstimator | None):
        raise TypeError(
            f"estimator must be an object such as LinearizedTraining(), got {estimator!r}."
        )
    if not isinstance(selector, AbstractSelector | None):
        raise TypeError(f"selector must be an object such as ForwardSelection(), got {selector!r}.")
