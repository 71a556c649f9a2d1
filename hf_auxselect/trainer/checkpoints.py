"""A run's checkpoints: which of them are whole, and the decision that each carries."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_auxselect.clusters import cluster_rows
from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically
from hf_auxselect.layers import LayersRecord, require_layers_record
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.access import callers, preserved_rng

logger = logging.getLogger(__name__)

DECISION_FILE = "task_selection.json"
"""In each checkpoint from the switch on."""
CLUSTERS_FILE = "task_selection_clusters.json"
"""Beside it, where the tasks are clusters."""
STATE_FILE = "trainer_state.json"
_GUARDED = "_auxselect_resumes_from_whole_checkpoints"


class ConfirmationRecord(TypedDict):
    """What a race has measured; losses of the target, nats per label token."""

    finalists: int
    """The number that was asked for."""
    share: float
    winner: str
    measured_loss: float | None
    """Of the mixture that has won; None if it was not trained or is not finite."""
    measured_loss_all: float | None
    """Of all tasks; None also if they were dropped before the end."""


class ReselectionRecord(TypedDict):
    """What a later selection takes from a decision; losses are nats per label token."""

    target: str
    loss: float | None
    """Of this target at the switch, as the trainer logs it; None: not measured or not finite."""
    scores: dict[str, dict[str, float]]
    """Target -> task -> decrease of the target's loss for each step, up to here."""
    averaged_with: int | None
    """Switch step of the earlier decision whose mixture is part of this one; None: none is."""


class DriftTest(TypedDict):
    """A test of whether the target has changed since the last decision."""

    step: int
    target: str
    p_value: float


class _Decision(TypedDict):
    """What every decision has."""

    selected: list[str]
    weights: dict[str, float]
    """Task -> share of the training examples; sums to 1."""
    estimated_loss: float | None
    """Of the target with this mixture, with its interval; nats per label token."""
    low: float | None
    high: float | None
    estimated_loss_all: float | None
    switch_step: int
    after: str
    seed: int
    estimator: JsonDict
    selector: JsonDict


class Decision(_Decision, total=False):
    """One decision of a run."""

    confirmation: ConfirmationRecord
    """Of ``confirm=n``."""
    shadow_prices: dict[str, float]
    """Group -> shadow price of its ceiling, which a later selection may start from."""
    layers: LayersRecord
    """Of ``layers=LayerSelection(...)``."""
    reselection: ReselectionRecord
    """Of ``reselect=``."""


class SavedDecision(Decision, total=False):
    """What is written to ``selection.json``, and into each checkpoint from the switch on.

    The last decision, and, where a run selects more than once, what was before it.
    """

    earlier: list[Decision]
    """The decisions before, in their order."""
    drift_tests: list[DriftTest]
    """Those of the target, in their order."""


class Clusters(TypedDict):
    """What is written of tasks that are clusters: to ``clusters.json``, and into checkpoints."""

    cluster_of_row: list[int]
    """Of each row of the training set, from 1 on, numbered by first appearance."""


def clusters_of(tasks: TaskRows) -> Clusters:
    """What is written of clusters."""
    return {"cluster_of_row": (tasks.ids + 1).tolist()}


def guard_resumption(trainer: Trainer) -> None:
    """Let ``trainer.train(resume_from_checkpoint=True)`` take the last checkpoint that is whole.

    Trainer saves a checkpoint file by file, and takes the one with the highest step: a process that
    was killed while it saved could not be resumed. The class of this trainer alone is replaced by
    one with such a ``train``: an attribute of the trainer would have to refer to it, and keep it
    alive in a cycle.
    """
    if not hasattr(trainer, _GUARDED):
        trainer.__class__ = _guarded(type(trainer))  # type: ignore[arg-type]


@functools.cache
def _guarded(of: type[Trainer]) -> type[Trainer]:
    """The class, by the same name, with a ``train`` that resolves what to resume from."""

    @functools.wraps(of.train)
    def train(
        self: Trainer, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        return of.train(self, resolve(self, resume_from_checkpoint), *args, **kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    return type(
        of.__name__,
        (of,),
        {name: getattr(of, name) for name in names} | {"train": train, _GUARDED: True},
    )


def resolve(trainer: Trainer, resume: str | bool | None) -> str | bool | None:
    """The checkpoint to resume from, given what the user asked for.

    Raises:
        ValueError: the user asked for a checkpoint by name that is not whole.
    """
    if not resume:
        return resume
    if resume is not True:
        path = Path(resume)
        if path.is_dir() and not is_whole(path):
            raise ValueError(
                f"resume_from_checkpoint={str(resume)!r} is not whole: its {STATE_FILE} is missing "
                "or damaged, as after a stop while it was saved. Pass an earlier one, or "
                "resume_from_checkpoint=True for the last that is whole."
            )
        return resume
    found = saved_checkpoints(Path(trainer.args.output_dir))
    whole = [path for path in found if is_whole(path, trainer.args.world_size)]
    if found and found[-1] not in whole:
        logger.warning(
            "%s is not whole: the run was stopped while it saved it. %s.",
            found[-1],
            f"Resuming from {whole[-1]}" if whole else "There is no other; starting anew",
        )
        return str(whole[-1]) if whole else None
    return resume


def is_whole(checkpoint: Path, num_processes: int = 1) -> bool:
    """Whether a checkpoint was saved to its end: Trainer writes its state last."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    # FSDP saves the optimizer's state as optimizer.bin, or in parts in a folder; DeepSpeed saves
    # what it has in a folder of its own.
    saved = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]
    if num_processes == 1 or not saved:
        return True
    # Of several processes the first may be done before the others have saved theirs.
    return all((checkpoint / f"rng_state_{rank}.pth").is_file() for rank in range(num_processes))


def saved_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in the order of their steps."""
    steps = {
        int(step): path
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit()
    }
    return [steps[step] for step in sorted(steps)]


def resumed_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint that the running ``trainer.train()`` resumes from, found on the call stack."""
    for frame in callers():
        if frame.f_locals.get("self") is trainer and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return Path(checkpoint) if checkpoint else None
    return None


@contextlib.contextmanager
def random_states_of_checkpoint(trainer: Trainer) -> Iterator[None]:
    """Those of an unbroken run; a resumed trainer takes them up only later, at its first batch."""
    with preserved_rng():
        trainer._load_rng_state(resumed_checkpoint(trainer))
        yield


def save_decision(trainer: Trainer, decision: SavedDecision) -> None:
    """Put a copy of the decisions into the checkpoint that has just been saved."""
    write_atomically(_saved_checkpoint(trainer) / DECISION_FILE, to_json(decision))


def save_clusters(trainer: Trainer, tasks: TaskRows) -> None:
    """Put a copy of the rows' clusters into the checkpoint that has just been saved."""
    write_atomically(_saved_checkpoint(trainer) / CLUSTERS_FILE, to_json(clusters_of(tasks)))


def _saved_checkpoint(trainer: Trainer) -> Path:
    """The directory of the checkpoint that has just been saved."""
    folder = Path(trainer._get_output_dir(trial=None))
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


def _resumed_copy(trainer: Trainer, name: str, of_run: Path) -> Path | None:
    """The resumed checkpoint's copy of a file, or else the run's; None if there is neither."""
    checkpoint = resumed_checkpoint(trainer)
    places = [*([checkpoint / name] if checkpoint else []), of_run]
    return next((path for path in places if path.is_file()), None)


def read_clusters(trainer: Trainer, of_run: Path, tasks: TaskRows) -> TaskRows:
    """The clusters that belong to the resumed checkpoint: its own copy, or else the run's.

    Args:
        trainer: whose ``train()`` is running.
        of_run: path of the run's clusters.
        tasks: of the training set before it was split; what is returned where no clusters have
            been found yet.

    Raises:
        ValueError: the file is damaged, or about another training set; names it.
    """
    path = _resumed_copy(trainer, CLUSTERS_FILE, of_run)
    return tasks if path is None else load_clusters(path, len(tasks.ids))


def load_clusters(path: Path, num_rows: int) -> TaskRows:
    """Clusters of so many rows as tasks.

    Raises:
        ValueError: the file is damaged, or about another training set; names it.
    """
    numbers = read_json(path, Clusters)["cluster_of_row"]
    if len(numbers) != num_rows:
        raise ValueError(f"{path}: holds {len(numbers)} rows, but the training set has {num_rows}.")
    tasks = cluster_rows(np.array(numbers, np.int64) - 1)
    if clusters_of(tasks)["cluster_of_row"] != numbers:
        raise ValueError(f"{path}: damaged (clusters are not numbered by first appearance).")
    return tasks


def read_decision(
    trainer: Trainer, of_run: Path, task_names: Sequence[str]
) -> SavedDecision | None:
    """The decisions that belong to the resumed checkpoint: its own copy, or else the run's.

    Args:
        trainer: whose ``train()`` is running.
        of_run: path of the run's decision.
        task_names: of the run.

    Raises:
        ValueError: the file is damaged, or about other tasks; names it.
    """
    path = _resumed_copy(trainer, DECISION_FILE, of_run)
    return None if path is None else load_decision(path, task_names)


def load_decision(path: Path, task_names: Sequence[str]) -> SavedDecision:
    """A decision on these tasks, with those before it.

    Raises:
        ValueError: the file is damaged, or about other tasks; names it.
    """
    saved = read_json(path, SavedDecision)
    for one in (*saved.get("earlier", []), saved):
        weights = one["weights"]
        if set(weights) != set(task_names):
            raise ValueError(
                f"{path}: decides on the tasks {sorted(weights)}, but the run has "
                f"{sorted(task_names)}."
            )
        total = sum(weights.values())
        if min(weights.values()) < 0 or not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"{path}: damaged (the weights are no shares that sum to 1).")
        if "layers" in one:
            try:
                require_layers_record(one["layers"])
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}).") from error
    return saved
