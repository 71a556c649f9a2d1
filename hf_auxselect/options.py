"""The callback's options, and what is required of them before anything is spent on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_auxselect.checks import is_count, is_number, require_count
from hf_auxselect.estimators import AbstractEstimator
from hf_auxselect.files import JsonDict, to_json
from hf_auxselect.layers import LayerSelection
from hf_auxselect.reselection import Reselection, reselection_of
from hf_auxselect.selectors import AbstractSelector, FixedSelection

MODES = ("continue", "restart", "observe")


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """How ``TaskSelectionCallback(confirm=...)`` lets ground-truth runs decide among finalists.

    Choose it where a wrong choice would cost more than the runs: n finalists cost up to n times the
    steps that are left. ``confirm=n`` is short for ``Confirmation(finalists=n)``. Of more than
    three finalists the worse half is dropped on the way, until three or fewer are left.

    Args:
        finalists: number of mixtures: the selector's choice, all tasks, then the best estimated
            others that the selector has tried, then mixtures between the first two.
        share: of the remaining steps that finalists are trained for. Below 1 the order of the
            finalists may still change in the steps that are not trained.

    Raises:
        ValueError: there are fewer than two finalists, or ``share`` is not in (0, 1].
    """

    finalists: int = 3
    share: float = 1.0

    def __post_init__(self) -> None:
        number, share = self.finalists, self.share
        if not is_count(number, 2):
            raise ValueError(
                "confirm must be a number of finalists, 2 or more (the choice and all tasks are "
                f"always among them), or 0; got {number!r}."
            )
        if not (is_number(share) and 0 < share <= 1):
            raise ValueError(
                f"confirm: share must be a share of the remaining steps in (0, 1], got {share!r}."
            )


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
    groups: tuple[str, ...]
    examples_per_task: int | None
    projection_dim: int
    batch_size: int | None
    one_by_one: bool
    verify: int
    calibrate: int
    confirm: int | Confirmation
    reselect: int | Reselection | None
    clusters: int | None
    layers: LayerSelection | None
    sources: dict[str, JsonDict]
    output_dir: str | Path | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.target is not None and not isinstance(self.target, str):
            raise TypeError(f"target must be a key of eval_dataset or None, got {self.target!r}.")
        if not isinstance(self.task_column, str):
            raise TypeError(f"task_column must be the name of a column, got {self.task_column!r}.")
        warmup = self.warmup
        is_share = isinstance(warmup, float) and 0 < warmup < 1
        if not (is_share or is_count(warmup, 1)):
            raise ValueError(
                f"warmup must be a share of the run in (0, 1) or a number of steps (an int of at "
                f"least 1), got {warmup!r}."
            )
        if self.after not in MODES:
            raise ValueError(f"after must be one of {list(MODES)}, got {self.after!r}.")
        for name in self.groups:
            if not isinstance(name, str):
                raise TypeError(f"groups must be keys of eval_dataset, got {name!r} among them.")
            if self.groups.count(name) > 1:
                raise ValueError(f"groups names {name!r} more than once.")
            if name == self.target:
                raise ValueError(f"groups names the target {name!r}; leave it out of groups.")
        if self.groups and not self.needs_estimates:
            raise ValueError(
                f"groups={list(self.groups)} asks for estimates, but FixedSelection(estimate=False)"
                " makes none; leave one of the two out."
            )
        require_count("examples_per_task", self.examples_per_task, 2, optional=True)
        require_count("projection_dim", self.projection_dim, 2)
        require_count("batch_size", self.batch_size, 1, optional=True)
        require_count("seed", self.seed, 0, optional=True)
        if self.output_dir is not None and not isinstance(self.output_dir, str | Path):
            raise TypeError(f"output_dir must be a path or None, got {self.output_dir!r}.")
        for name, number in (("verify", self.verify), ("calibrate", self.calibrate)):
            if not is_count(number, 0):
                raise ValueError(f"{name} must be a number of mixtures, 0 or more; got {number!r}.")
        _ = self.confirmation
        if self.reselection is not None:
            self._require_reselection(self.reselection)
        if self.clusters is not None:
            self._require_clusters(self.clusters)
        if self.layers is not None:
            self._require_layers(self.layers)
        if not isinstance(self.estimator, AbstractEstimator):
            raise TypeError(
                f"estimator must be an object such as LinearizedTraining(), got {self.estimator!r}."
            )
        if not isinstance(self.selector, AbstractSelector):
            raise TypeError(
                f"selector must be an object such as ForwardSelection(), got {self.selector!r}."
            )
        if self.confirmation is not None and not self.selector.asks_for_target_only:
            raise ValueError(
                f"confirm={self.confirm} goes on with the lowest measured loss of the target, but "
                f"{type(self.selector).__name__} asks for more than that, and would be overruled; "
                "leave one of the two out."
            )
        if (self.verify or self.calibrate) and not self.needs_estimates:
            option = f"verify={self.verify}" if self.verify else f"calibrate={self.calibrate}"
            raise ValueError(
                f"{option} compares estimates with ground-truth runs, but "
                "FixedSelection(estimate=False) makes no estimates; leave one of the two out."
            )

    def _require_layers(self, layers: LayerSelection) -> None:
        if not isinstance(layers, LayerSelection):
            raise TypeError(f"layers must be a LayerSelection(...) or None, got {layers!r}.")
        if not self.needs_estimates:
            raise ValueError(
                "layers=LayerSelection(...) scores layers by gradients, but "
                "FixedSelection(estimate=False) captures none; leave one of the two out."
            )
        if self.after == "observe" and layers.training != "all":
            raise ValueError(
                f"layers: training={layers.training!r} changes the rest of the run, but "
                "after='observe' leaves it as it is; pass training='all', or another mode."
            )

    def _require_reselection(self, reselection: Reselection) -> None:
        if self.after == "restart":
            raise ValueError(
                f"reselect={self.reselect!r} selects again while the run goes on, but "
                "after='restart' lets a selection throw the steps before it away; pass "
                "after='continue', or leave reselect out."
            )
        if not self.needs_estimates:
            raise ValueError(
                f"reselect={self.reselect!r} selects again by new estimates, but "
                "FixedSelection(estimate=False) makes none; leave one of the two out."
            )
        if self.layers is not None and self.layers.training != "all":
            raise ValueError(
                f"reselect={self.reselect!r} selects again by gradients of all layers, but "
                f"layers: training={self.layers.training!r} holds some back from the first "
                "selection on; pass training='all', or leave reselect out."
            )
        for name in self.groups:
            if name in reselection.named_targets:
                raise ValueError(
                    f"groups names {name!r}, which is one of the targets of reselect; leave it out "
                    "of one of the two."
                )

    def _require_clusters(self, number: int) -> None:
        if not is_count(number, 2):
            raise ValueError(
                f"clusters must be a number of clusters, 2 or more, or None; got {number!r}."
            )
        if self.keep:
            raise ValueError(
                f"keep={list(self.keep)} names tasks, but with clusters={number} the tasks are "
                "clusters that are found at the switch; leave one of the two out."
            )

    @property
    def confirmation(self) -> Confirmation | None:
        """The race that was asked for; None: there is none."""
        return confirmation_of(self.confirm)

    @property
    def reselection(self) -> Reselection | None:
        """The re-selection that was asked for; None: there is one selection."""
        return reselection_of(self.reselect)

    @property
    def needs_estimates(self) -> bool:
        """Whether gradients are captured and losses estimated."""
        return not isinstance(self.selector, FixedSelection) or self.selector.estimate


def named_groups(groups: Sequence[str]) -> tuple[str, ...]:
    """The names in ``groups``.

    Raises:
        TypeError: it is one name, or no sequence.
    """
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a sequence of keys of eval_dataset, got {groups!r}.")
    return tuple(groups)


def confirmation_of(confirm: int | Confirmation) -> Confirmation | None:
    """The race that ``confirm=`` asks for; None: there is none.

    Raises:
        ValueError: it is no number of finalists.
    """
    if isinstance(confirm, Confirmation):
        return confirm
    is_off = confirm == 0 and not isinstance(confirm, bool)
    return None if is_off else Confirmation(finalists=confirm)


def kept_tasks(keep: Sequence[str]) -> tuple[str, ...]:
    """The names in ``keep``, as tasks are named.

    Raises:
        TypeError: it is one name, no sequence, or holds something else.
    """
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise TypeError(f"keep must be a sequence of task names, got {keep!r}.")
    names = tuple(keep)
    for name in names:
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise TypeError(f"keep must be a sequence of task names, got {name!r} among them.")
    return tuple(map(str, names))


def checked_sources(sources: Mapping[str, Mapping[str, Any]] | None) -> dict[str, JsonDict]:
    """The callback's ``sources`` as JSON values, as the report keeps them.

    Raises:
        TypeError: a source is no entry of ``datasets:``, or holds what JSON cannot express.
    """
    if sources is not None and not isinstance(sources, Mapping):
        raise TypeError(
            "sources must map tasks to entries of TRL's datasets:, such as "
            f"{{'my_task': {{'path': 'me/data'}}}}, got {sources!r}."
        )
    for name, source in (sources or {}).items():
        if not isinstance(source, Mapping):
            raise TypeError(
                f"sources[{name!r}] must be an entry of TRL's datasets:, such as "
                f"{{'path': 'me/data'}}, got {source!r}."
            )
    try:
        return {name: json.loads(to_json(source)) for name, source in (sources or {}).items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"sources must hold texts, numbers and lists only ({error}).") from error
