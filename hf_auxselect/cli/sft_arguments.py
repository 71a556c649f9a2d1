"""The flags that ``hf-auxselect sft`` adds to those of ``trl sft``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_auxselect.callback import TaskSelectionCallback
from hf_auxselect.cli.options import T, UsageError, make_strategy, split_options
from hf_auxselect.estimators import ESTIMATORS
from hf_auxselect.files import JsonDict
from hf_auxselect.layers import LayerSelection
from hf_auxselect.options import MODES
from hf_auxselect.selectors import AbstractSelector, FixedSelection
from hf_auxselect.selectors.registry import SELECTORS

_PASSED_ON: tuple[str, ...] = (
    "task_column",
    "after",
    "keep",
    "examples_per_task",
    "projection_dim",
    "batch_size",
    "one_by_one",
    "verify",
    "calibrate",
    "confirm",
    "reselect",
    "clusters",
)
"""Options that the callback takes as they are."""


@dataclass
class SelectionArguments:
    """The flags that are added to TRL's: the target, and the options of the callback."""

    target: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The evaluation set whose loss is minimised: path[:split] of a task, a local "
            "file or folder, or a data set on the Hub. In YAML also an entry as in `datasets:`. "
            "Default: what --test_split_size holds out, or the test split of --dataset_name."
        },
    )
    target_config: str | None = field(
        default=None, metadata={"help": "Configuration name of the target's data set."}
    )
    task_column: str = field(
        default="task", metadata={"help": "Column of the training set with each row's task."}
    )
    warmup: float = field(
        default=0.2,
        metadata={
            "help": "Steps on all tasks before the selection: a share of the run, or a number (1 "
            "or more)."
        },
    )
    estimator: str | None = field(
        default=None,
        metadata={"help": f"What predicts the loss of a mixture: {', '.join(ESTIMATORS)}."},
    )
    estimator_options: list[str] = field(
        default_factory=list, metadata={"help": "Options of the estimator, as name=value."}
    )
    selector: str | None = field(
        default=None,
        metadata={
            "help": f"What searches for a mixture: {', '.join(SELECTORS)}; or the file of a "
            "decision to follow, as `hf-auxselect select` writes it (*.json)."
        },
    )
    selector_options: list[str] = field(
        default_factory=list, metadata={"help": "Options of the selector, as name=value."}
    )
    after: str = field(
        default="continue", metadata={"help": f"What follows the selection: {', '.join(MODES)}."}
    )
    keep: list[str] = field(default_factory=list, metadata={"help": "Tasks that always stay."})
    examples_per_task: int | None = field(
        default=256,
        metadata={"help": "Examples of each task that the gradient pass reads at most; none: all."},
    )
    projection_dim: int = field(default=4096, metadata={"help": "Length of a projected gradient."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of a forward pass of the gradient pass; default: as in training."
        },
    )
    one_by_one: bool = field(default=False, metadata={"help": "Capture each example alone."})
    verify: int = field(
        default=0, metadata={"help": "Number of ground-truth runs after the choice."}
    )
    calibrate: int = field(
        default=0, metadata={"help": "Number of ground-truth runs before the choice."}
    )
    confirm: int = field(
        default=0,
        metadata={
            "help": "Number of finalists that are trained at the switch; the best measured goes on."
        },
    )
    reselect: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps from one selection to the next; default: one selection."
        },
    )
    clusters: int | None = field(
        default=None,
        metadata={
            "help": "Number of clusters of all training rows, by gradient, that are the tasks "
            "instead of the entries of `datasets:`."
        },
    )
    layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which layers count in the estimates, and are trained: options of "
            "LayerSelection, as name=value, such as method=snr training=freeze. Default: all."
        },
    )
    report_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Push the report after training: true (to the trainer's model repo), or a "
            "repo id."
        },
    )
    json: bool = field(
        default=False, metadata={"help": "Print the report as JSON, and all else on stderr."}
    )

    def callback(self, sources: Mapping[str, JsonDict]) -> TaskSelectionCallback:
        """The callback with these options.

        Args:
            sources: where the data of each task come from, for the report.

        Raises:
            UsageError: an option is wrong.
        """
        is_share = 0 < self.warmup < 1
        if not is_share and self.warmup != int(self.warmup):
            raise UsageError(
                f"--warmup must be a share in (0, 1) or a whole number of steps, got {self.warmup}."
            )
        options = {name: getattr(self, name) for name in _PASSED_ON}
        estimator = _strategy(self.estimator, self.estimator_options, ESTIMATORS, "estimator")
        selector = self._selector()
        given = _typed(self.layers, "--layers")
        layers = make_strategy(LayerSelection, given, "--layers") if given else None
        try:
            return TaskSelectionCallback(
                warmup=self.warmup if is_share else int(self.warmup),
                estimator=estimator,
                selector=selector,
                layers=layers,
                sources=sources,
                report_to_hub=True if self.report_to_hub == "true" else self.report_to_hub,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(f"--{error}") from error  # they begin with the name of the option

    def _selector(self) -> AbstractSelector | None:
        if self.selector is None or not self.selector.endswith(".json"):
            return _strategy(self.selector, self.selector_options, SELECTORS, "selector")
        options = _typed(self.selector_options, "--selector_options")
        if options:
            raise UsageError("--selector_options: a decision that is followed has no options.")
        return FixedSelection.from_file(self.selector)


def _strategy(name: str | None, options: Any, known: Mapping[str, type[T]], flag: str) -> T | None:
    """An estimator or selector by its name and options; None if neither is given."""
    given = _typed(options, f"--{flag}_options")
    if name is None and not given:
        return None
    if name is None or name not in known:
        raise UsageError(f"--{flag} {name!r} is unknown; known are {', '.join(known)}.")
    return make_strategy(known[name], given, f"--{flag}_options")


def _typed(options: Any, flag: str) -> Mapping[str, Any]:
    """Options as YAML's mapping or the command line's name=value."""
    return options if isinstance(options, Mapping) else split_options(options, flag)
