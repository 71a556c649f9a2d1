"""The callback's options, and what is required of them before anything is spent on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_auxselect.estimators import AbstractEstimator
from hf_auxselect.files import JsonDict
from hf_auxselect.selectors import AbstractSelector, FixedSelection

MODES = ("continue", "restart", "observe")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``TaskSelectionCallback``, by the same names.

    Raises:
        ValueError, TypeError: for the first option that is wrong.
    """

    target: str | None
    task_column: str
    warmup: float | int
    estimator: AbstractEstimator
    selector: AbstractSelector
    after: str
    keep: tuple[str, ...]
    examples_per_task: int | None
    projection_dim: int
    batch_size: int | None
    one_by_one: bool
    verify: int
    calibrate: int
    clusters: int | None
    sources: dict[str, JsonDict]
    output_dir: str | Path | None
    seed: int | None

    def __post_init__(self) -> None:
        warmup = self.warmup
        is_share = isinstance(warmup, float) and 0 < warmup < 1
        if isinstance(warmup, bool) or not (is_share or (isinstance(warmup, int) and warmup >= 1)):
            raise ValueError(
                f"warmup must be a share of the run in (0, 1) or a number of steps (an int of at "
                f"least 1), got {warmup!r}."
            )
        if self.after not in MODES:
            raise ValueError(f"after must be one of {list(MODES)}, got {self.after!r}.")
        if self.examples_per_task is not None and self.examples_per_task < 2:
            raise ValueError(
                f"examples_per_task must be at least 2, or None; got {self.examples_per_task}."
            )
        if self.projection_dim < 2:
            raise ValueError(f"projection_dim must be at least 2, got {self.projection_dim}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None; got {self.batch_size}.")
        for name, number in (("verify", self.verify), ("calibrate", self.calibrate)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name} must be a number of mixtures, 0 or more; got {number!r}.")
        if self.clusters is not None:
            self._require_clusters(self.clusters)
        if not isinstance(self.estimator, AbstractEstimator):
            raise TypeError(
                f"estimator must be an object such as LinearizedTraining(), got {self.estimator!r}."
            )
        if not isinstance(self.selector, AbstractSelector):
            raise TypeError(
                f"selector must be an object such as ForwardSelection(), got {self.selector!r}."
            )
        if (self.verify or self.calibrate) and not self.needs_estimates:
            option = f"verify={self.verify}" if self.verify else f"calibrate={self.calibrate}"
            raise ValueError(
                f"{option} compares estimates with ground-truth runs, but "
                "FixedSelection(estimate=False) makes no estimates; leave one of the two out."
            )

    def _require_clusters(self, number: int) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 2:
            raise ValueError(
                f"clusters must be a number of clusters, 2 or more, or None; got {number!r}."
            )
        if self.keep:
            raise ValueError(
                f"keep={list(self.keep)} names tasks, but with clusters={number} the tasks are "
                "clusters that are found at the switch; leave one of the two out."
            )

    @property
    def needs_estimates(self) -> bool:
        """Whether gradients are captured and losses estimated."""
        return not isinstance(self.selector, FixedSelection) or self.selector.estimate


def kept_tasks(keep: Sequence[str]) -> tuple[str, ...]:
    """The names in ``keep``, as tasks are named.

    Raises:
        TypeError: it is one name instead of a sequence of names.
    """
    if isinstance(keep, str):
        raise TypeError(f"keep must be a sequence of task names, got the string {keep!r}.")
    return tuple(str(name) if isinstance(name, int) else name for name in keep)
