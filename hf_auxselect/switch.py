"""What the package knows of Trainer's insides: its data, its batches, its optimizer.

Only ``verification``, which steps through a training loop of its own, knows more of them.
`make test-versions` runs it on the oldest and the newest Transformers, TRL and Accelerate.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import DataCollatorWithFlattening, Trainer, get_scheduler

from hf_auxselect.mixture import (
    GROUP_EACH_TASK,
    MixtureSampler,
    TaskRows,
    are_characters_of,
    joined_tasks,
    task_name,
)
from hf_auxselect.optimizer_state import underlying
from hf_auxselect.scalars import IGNORE_INDEX, Batch
from hf_auxselect.schedule import Schedule, schedule_to_come

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def callers() -> Iterator[FrameType]:
    """The frames of the call stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling ``callback`` right now, found on the call stack; None if none is.

    The Trainer hands its callbacks no reference to itself (huggingface/transformers#38181).
    """
    for frame in callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(
            known is callback for known in caller.callback_handler.callbacks
        ):
            return caller
    return None


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put Python's, NumPy's and PyTorch's global random states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def preserved_counters(trainer: Trainer) -> Iterator[None]:
    """Put back what a trainer counts and gathers for its log (SFTTrainer: in ``_metrics``)."""
    before = {
        name: copy.deepcopy(value)
        for name, value in vars(trainer).items()
        if name == "_metrics" or isinstance(value, int | float)
    }
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Run steps of a trainer without callbacks, logs or counters of the run noticing.

    Callbacks are not called; random states, counters and the trainer's own evaluation loaders are
    put back.
    """
    handler, missing = trainer.callback_handler, object()
    callbacks, handler.callbacks = handler.callbacks, []
    loader = handler.eval_dataloader
    kept = {
        name: vars(trainer).pop(name, missing) for name in ("_eval_dataloaders", "gather_function")
    }
    if kept["gather_function"] is not missing:
        trainer.gather_function = kept["gather_function"]
    try:
        with preserved_rng(), preserved_counters(trainer):
            yield
    finally:
        handler.callbacks, handler.eval_dataloader = callbacks, loader
        for name, value in kept.items():
            vars(trainer).pop(name, None)
            if value is not missing:
                setattr(trainer, name, value)


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for settings under which the selection would be wrong or impossible.

    Raises:
        ValueError: names the setting, and what to do.
    """
    args = trainer.args
    of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if of_trl and "SFTTrainer" not in of_trl:
        raise ValueError(
            f"{type(trainer).__name__} trains on preferences, rewards or generated answers, not on "
            "a mean of losses of label tokens, which is what is estimated. Use SFTTrainer or "
            "Trainer: select there with the preferred answers as the target, and give "
            f"{type(trainer).__name__} the tasks that were selected."
        )
    sharded = [name for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise ValueError(
            f"the model's parameter {sharded[0]!r} is sharded over processes (a DTensor, as "
            "distributed_config or tp_plan in from_pretrained make it), so one process cannot "
            "capture gradients alone. Load the model whole on each process and launch with DDP."
        )
    if trainer.train_dataset is None:
        raise ValueError("the trainer has no train_dataset; there are no tasks to select from.")
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(
        trainer.train_dataset, "__len__"
    ):
        raise ValueError(
            "train_dataset is an iterable dataset; rows of a dropped task could not be left out. "
            "Join the tasks' streams with concatenate_tasks({name: stream, ...}, take=n), which "
            "reads the first n rows of each."
        )
    if trainer.hp_search_backend is not None:
        raise ValueError(
            "hyperparameter_search makes a model and an output directory for each trial, so that "
            "one selection would be written over another. Search without TaskSelectionCallback "
            "(trainer.remove_callback), then train with the best values and with it."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{kind} shards parameters, whose per-example gradients cannot be captured. Use DDP "
            "(torchrun or `accelerate launch --multi_gpu`); a LoRA adapter seldom needs sharding."
        )
    if getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(
            f"loss_type={args.loss_type!r} is a loss whose gradient is not that of its value, so "
            "the value after training cannot be estimated; set loss_type='nll'."
        )


def warn_of_differences(trainer: Trainer, *, is_rewritten: bool) -> None:
    """Say where a run will not be quite what the user's settings say.

    Args:
        trainer: before its first step.
        is_rewritten: whether the mixture is, after the switch.
    """
    strategy = sampling_strategy(trainer)
    if is_rewritten and strategy != "random":
        logger.warning(
            "train_sampling_strategy=%r rules the warm-up; the mixture after it is drawn at "
            "random, in the shares of the selection.",
            strategy,
        )


def sampling_strategy(trainer: Trainer) -> str:
    """How the trainer draws its rows: ``train_sampling_strategy``.

    Before transformers 5.2 ``group_by_length=True`` stood for the value of that name.
    """
    if getattr(trainer.args, "group_by_length", False):
        return "group_by_length"
    return getattr(trainer.args, "train_sampling_strategy", "random")


def read_tasks(trainer: Trainer, task_column: str) -> TaskRows:
    """The task of every row of the training set, after the trainer has prepared it.

    Preparation may drop or reorder rows (truncation, shuffling), so only the trainer's own copy
    tells which row belongs to which task. Tasks that were left out before the trainer was made
    (``filter``, ``select``) are none of the run.

    Raises:
        ValueError: there is no task column, a row names no task, a task has lost all its rows in
            the trainer's preparation, or fewer than two tasks are left.
    """
    dataset = trainer.train_dataset
    with_task = getattr(dataset, "rows_with_task", None)
    if with_task is not None:  # concatenate_tasks, then select_columns without the task column
        dataset = with_task
    columns = getattr(dataset, "column_names", None) or [task_column]
    if task_column not in columns and getattr(trainer.args, "packing", False):
        raise ValueError(
            "packing=True has packed rows of all tasks together and dropped their column "
            f"{task_column!r}. Make train_dataset with concatenate_tasks({{name: dataset, ...}}), "
            "whose tasks are packed each by itself, also after map, filter and the like (what "
            "datasets.concatenate_datasets or load_from_disk return is a plain Dataset); or set "
            "packing=False."
        )
    labels, class_names = _task_labels(dataset, task_column)
    tasks = TaskRows.from_labels(labels, class_names=class_names, column=task_column)
    joined = joined_tasks(dataset)
    if joined and are_characters_of(tasks.names, joined):
        raise ValueError(
            f"the column {task_column!r} of train_dataset holds single characters "
            f"{list(tasks.names)} of the tasks' names {joined}: a map over batches, such as "
            f"group_texts of run_clm, has chained it. {GROUP_EACH_TASK}"
        )
    _note_missing_tasks(trainer, dataset, task_column, tasks, class_names)
    if len(tasks.names) < 2:
        raise ValueError(
            f"train_dataset holds {len(tasks.names)} task(s) {list(tasks.names)} in its column "
            f"{task_column!r}; a selection needs at least two."
        )
    return tasks


def _task_labels(dataset: Any, column: str) -> tuple[Sequence[Any], Sequence[str] | None]:
    """The label of each row as it is stored, and the names of its classes if it has some.

    Of a ``datasets.Dataset`` neither its format nor its transform matter; what PyTorch's ``Subset``
    and ``ConcatDataset`` are made of is read without reading whole rows.
    """
    if isinstance(dataset, Dataset):
        if column not in dataset.column_names:
            raise _no_task_column(column, dataset.column_names)
        labels = dataset.with_format(None).select_columns([column])[:][column]
        return labels, getattr(dataset.features[column], "names", None)
    if isinstance(dataset, Subset):
        labels, class_names = _task_labels(dataset.dataset, column)
        return [labels[int(i)] for i in dataset.indices], class_names
    if isinstance(dataset, ConcatDataset):
        parts = [_task_labels(part, column) for part in dataset.datasets]
        class_names = parts[0][1]
        if any(names != class_names for _, names in parts):
            raise ValueError(
                f"the parts of train_dataset name the classes of their column {column!r} in "
                f"different ways: {[names for _, names in parts]}. Cast the column to strings."
            )
        return [label for labels, _ in parts for label in labels], class_names
    labels = []
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"the rows of train_dataset ({type(dataset).__name__}) name no task: row {i} is "
                f"a {type(row).__name__}. Let them be dicts with a key {column!r}, such as those "
                "of concatenate_tasks({name: dataset, ...})."
            )
        if column not in row:
            raise _no_task_column(column, list(row), None if i == 0 else i)
        labels.append(row[column])
    return labels, None


def _no_task_column(column: str, columns: Sequence[str], row: int | None = None) -> ValueError:
    where = "train_dataset" if row is None else f"row {row} of train_dataset"
    return ValueError(
        f"{where} has no column {column!r} (it has {list(columns)}). Join the tasks "
        "with concatenate_tasks({name: dataset, ...}), keep that column when you map the "
        "dataset, or pass task_column=... if it has another name."
    )


def _note_missing_tasks(
    trainer: Trainer,
    dataset: Any,
    column: str,
    tasks: TaskRows,
    class_names: Sequence[str] | None,
) -> None:
    """Refuse if the trainer has dropped all rows of a task; say which tasks were left out before.

    A filtered ``Dataset`` still holds the rows that it does not show. SFTTrainer maps what it is
    given, which writes a table of just those rows, and then filters it: what is in the table and
    not shown was dropped by the trainer.
    """
    args = trainer.args
    if not isinstance(dataset, Dataset):
        return
    hidden: list[str] = []
    if len(dataset.data) > len(dataset):
        labels = dataset.data.column(column).unique().to_pylist()
        names = [task_name(label, class_names) for label in labels]
        hidden = [name for name in names if name is not None and name not in tasks.names]
    options = getattr(args, "dataset_kwargs", None) or {}
    prepare = getattr(type(trainer), "_prepare_dataset", None)
    truncates = (
        prepare is not None
        and getattr(args, "max_length", None) is not None
        and not getattr(trainer, "_skip_prepare_dataset", options.get("skip_prepare_dataset"))
    )
    if hidden and truncates and prepare.__module__.startswith("trl."):
        one = len(hidden) == 1
        raise ValueError(
            f"the task{'' if one else 's'} {', '.join(map(repr, hidden))} "
            f"{'has lost all its' if one else 'have lost all their'} rows in the trainer's "
            "preparation: no label token is left in any of them after truncation to "
            f"max_length={args.max_length}. Raise max_length, shorten the prompts, or leave "
            f"the task{'' if one else 's'} out."
        )
    missing = [name for name in joined_tasks(dataset) if name not in tasks.names]
    missing += [name for name in hidden if name not in missing]
    if missing:
        # Of a trainer that prepares its data in a way of its own it is not known who left them out.
        is_known = type(trainer).__module__.partition(".")[0] in ("transformers", "trl")
        logger.log(
            logging.INFO if is_known else logging.WARNING,
            "no row of the tasks %s is in train_dataset; the selection is among %s.",
            missing,
            list(tasks.names),
        )


def target_key(trainer: Trainer, target: str | None) -> str | None:
    """The key of ``eval_dataset`` whose loss is minimised, None if that is no dict.

    Args:
        trainer: a trainer.
        target: as given to the callback; a dict of one key needs none.
    """
    datasets = trainer.eval_dataset
    if target is None and isinstance(datasets, Mapping) and len(datasets) == 1:
        return str(next(iter(datasets)))
    return target


def target_dataset(trainer: Trainer, target: str | None) -> Any:
    """The evaluation set whose loss is minimised: ``eval_dataset``, or one of its dict.

    Raises:
        ValueError: there is none, or ``target`` does not name one.
    """
    datasets = trainer.eval_dataset
    if datasets is None:
        raise ValueError(
            "the trainer has no eval_dataset; pass eval_dataset=... with examples of the target."
        )
    target = target_key(trainer, target)
    if isinstance(datasets, Mapping):
        if target not in datasets:
            raise ValueError(
                f"target={target!r} is not a key of eval_dataset, which has {sorted(datasets)}; "
                "pass target=... with one of them."
            )
        dataset = datasets[target]
    elif target is not None:
        raise ValueError(
            f"target={target!r} asks for a key of eval_dataset, which is not a dict. Leave target "
            "out, or pass eval_dataset={name: dataset, ...}."
        )
    else:
        dataset = datasets
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "the target's eval_dataset is an iterable dataset, of which no example can be read "
            "twice. Pass its first rows: Dataset.from_list(list(stream.take(n)))."
        )
    if len(dataset) == 0:
        raise ValueError("the target's eval_dataset has no rows.")
    return dataset


class ModelRows(Sequence[Any]):
    """Rows of a dataset with the columns that the trainer hands to its collator.

    Where documents that were packed into a row (``seq_lengths``) do not attend to each other, as
    under ``padding_free``, an example is one document, and ``packed_rows`` tells the row that each
    came from. Else an example is a whole row.
    """

    def __init__(self, trainer: Trainer, dataset: Any) -> None:
        if isinstance(dataset, Dataset) and trainer.args.remove_unused_columns:
            whole = dataset
            dataset = trainer._remove_unused_columns(whole, description="gradient pass")
            _require_readable(whole, dataset)
        trainer._set_signature_columns_if_needed()
        self._signature = tuple(trainer._signature_columns)
        self._only_signature = trainer.args.remove_unused_columns
        self._dataset = dataset
        self._starts: np.ndarray | None = None
        is_padding_free = getattr(trainer.data_collator, "padding_free", False)
        is_packed = isinstance(dataset, Dataset) and "seq_lengths" in dataset.column_names
        if is_padding_free and is_packed:
            lengths = dataset.with_format(None).select_columns(["seq_lengths"])[:]["seq_lengths"]
            self.packed_rows = np.repeat(np.arange(len(dataset)), [len(row) for row in lengths])
            self._lengths = np.concatenate([np.asarray(row, np.int64) for row in lengths])
            self._starts = np.concatenate([np.cumsum([0, *row[:-1]]) for row in lengths])
        else:
            self.packed_rows = np.arange(len(dataset))

    @property
    def dataset(self) -> Any:
        """The dataset as the trainer reads it, with rows that are still packed."""
        return self._dataset

    def __len__(self) -> int:
        return len(self.packed_rows)

    def __getitem__(self, index: Any) -> Any:
        return self._document(self._dataset[int(self.packed_rows[index])], index)

    def _document(self, row: Any, index: int) -> Any:
        """The part of a row that is the example ``index``."""
        if self._starts is None:
            return row
        part = slice(self._starts[index], self._starts[index] + self._lengths[index])
        # In older versions of TRL a document has masks instead of labels.
        names = ("input_ids", "labels", "completion_mask", "assistant_masks")
        return {name: row[name][part] for name in names if name in row}

    def without_format(self, index: int) -> Any:
        """An example as it is stored, whatever the dataset's format and transform."""
        if not isinstance(self._dataset, Dataset):
            return self[index]
        row = self._dataset.with_format(None)[int(self.packed_rows[index])]
        return self._document(row, index)

    @property
    def is_stored(self) -> bool:
        """Whether :meth:`without_format` reads what is stored, the same each time."""
        return isinstance(self._dataset, Dataset)

    @property
    def is_table(self) -> bool:
        """Whether rows are read from a table, many at a time, and not made one by one."""
        return isinstance(self._dataset, Dataset) and self._dataset.format["type"] != "custom"

    @property
    def columns(self) -> set[str]:
        """The columns that reach the collator; none if the rows are no dicts."""
        first = self[0]
        columns = set(first) if isinstance(first, Mapping) else set()
        return columns & set(self._signature) if self._only_signature else columns

    def input_columns(self, columns: set[str], task_column: str) -> list[str]:
        """Of some columns, those that make an example: the model's, or else all but the task's.

        Returns:
            Ascending; empty if there is no input among them, labels alone.
        """
        others = {"labels", "label", "label_ids", "attention_mask"}
        for_model = columns & set(self._signature)
        chosen = for_model if for_model - others else columns - {task_column}
        return sorted(chosen) if chosen - others else []

    def num_images(self, ids: Sequence[int]) -> np.ndarray:
        """int64: how many images each of some examples has in its list ``images``; 1 without one.

        Of a table, images are not decoded.
        """
        if "images" not in self.columns:
            return np.ones(len(ids), np.int64)
        if self.is_table:
            table = self._dataset.select_columns(["images"]).with_format("arrow")
            rows = [table[int(self.packed_rows[i])].column("images").to_pylist()[0] for i in ids]
        else:
            rows = [self[i]["images"] for i in ids]
        return np.array([len(images) if isinstance(images, list) else 1 for images in rows])

    def stored(self, ids: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Consecutive examples, for comparing: of a table as they are stored, media undecoded."""
        if not self.is_table:
            for i in ids:
                row = self[i]
                yield {name: row[name] for name in columns if name in row}
            return
        rows = self.packed_rows[ids.start : ids.stop]
        table = self._dataset.select_columns(list(columns)).with_format("arrow")
        chunk = table[int(rows[0]) : int(rows[-1]) + 1]
        values = {name: _values(chunk.column(name)) for name in columns}
        for i, row in zip(ids, (rows - rows[0]).tolist(), strict=True):
            yield self._document({name: values[name][row] for name in columns}, i)


def _values(column: Any) -> Sequence[Any]:
    """The values of a column of an Arrow table; lists of numbers as arrays, which is quick."""
    is_extension = hasattr(column.type, "storage_type")
    return column.to_pylist() if is_extension else column.to_numpy()


def _require_readable(dataset: Dataset, remaining: Dataset) -> None:
    """Raise if a transform reads columns that the trainer removes."""
    if remaining.format["type"] != "custom" or not len(remaining):
        return
    try:
        remaining[0]
    except KeyError as error:
        removed = [name for name in dataset.column_names if name not in remaining.column_names]
        raise ValueError(
            f"the dataset's transform (with_transform, set_transform) reads {error}, but "
            f"remove_unused_columns=True removes the columns {removed} before it is called. Pass "
            "remove_unused_columns=False."
        ) from error


def own_collate_function(trainer: Trainer) -> Callable[[list[Any]], Batch]:
    """Batches just as the trainer makes them."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def collate_function(trainer: Trainer) -> Callable[[list[Any]], Batch]:
    """Batches as the trainer makes them, padded: one row per example.

    Collators that write a batch into one long row (``padding_free``,
    ``DataCollatorWithFlattening``) pad instead, which gives each example the same losses.
    """
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False):
        collator = dataclasses.replace(collator, padding_free=False)
    elif isinstance(collator, DataCollatorWithFlattening):
        collator = _padding_instead_of(collator, trainer)
    collator = trainer._get_collator_with_removed_columns(collator)

    def collate(rows: list[Any]) -> Batch:
        batch = collator(rows)
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"the trainer's data_collator returns a {type(batch).__name__}; a dict of the "
                "model's arguments is needed, with labels."
            )
        if "labels" not in batch:
            raise ValueError(
                f"the trainer's data_collator returns no labels (it returns {sorted(batch)}); use "
                "one that does, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        if len(batch["labels"]) != len(rows):
            raise ValueError(
                f"the trainer's data_collator ({type(trainer.data_collator).__name__}) returns "
                f"labels of {len(batch['labels'])} rows for {len(rows)} examples, so that their "
                "losses could not be told apart. Use one that pads, with a row for each example."
            )
        return trainer._prepare_inputs(batch)

    return collate


def _padding_instead_of(
    collator: DataCollatorWithFlattening, trainer: Trainer
) -> Callable[[list[Any]], Batch]:
    """Pads on the right what ``DataCollatorWithFlattening`` writes into one row."""
    pad_id = getattr(trainer.model.config.get_text_config(), "pad_token_id", None) or 0

    def collate(rows: list[Any]) -> Batch:
        flat = [collator([row], return_tensors="pt") for row in rows]
        ids = [row["input_ids"][0] for row in flat]
        labels = [row["labels"][0] for row in flat]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }

    return collate


class MixtureBatches:
    """Batches of a mixture, from a loader that the trainer itself builds."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.loader: Any = None
        self.iterator: Iterator[Any] | None = None

    def start(
        self, tasks: TaskRows, shares: np.ndarray, seed: int, *, consumed: int, total: int
    ) -> None:
        """Draw rows of ``tasks`` in the given shares [K] from here on.

        Args:
            tasks: task of each row of the training set.
            shares: float [K], summing to 1.
            seed: rules the order.
            consumed: micro-batches (per process) that were drawn before.
            total: micro-batches (per process) that may still be asked for.

        Raises:
            ValueError: the trainer builds its loader without ``_get_train_sampler``.
        """
        self.close()
        sampler = MixtureSampler(tasks, shares, seed)
        self.loader = self.build_loader(sampler)
        rows_per_batch = self.loader.total_batch_size
        sampler.start = consumed * rows_per_batch
        # Loaders fetch ahead; two more batches keep the end of the sampler out of sight.
        sampler.length = (total + 2) * rows_per_batch
        self.iterator = self._iterate()

    def _iterate(self) -> Iterator[Any]:
        # Starting a loader draws a seed from the global generator. On resume the loader starts
        # before the trainer loads its random state, in an unbroken run after: neither may tell.
        with preserved_rng():
            batches = iter(self.loader)
            batch = next(batches)
        while True:
            yield batch
            batch = next(batches)

    def build_loader(self, sampler: MixtureSampler) -> Any:
        """A training loader as the trainer would make it, but with this sampler.

        Raises:
            ValueError: the trainer's loader does not take its sampler from ``_get_train_sampler``.
        """
        trainer = self._trainer
        shadowed = vars(trainer).get("_get_train_sampler")
        trainer._get_train_sampler = lambda *args, **kwargs: sampler
        try:
            loader = trainer.get_train_dataloader()
        finally:
            del trainer._get_train_sampler
            if shadowed is not None:
                trainer._get_train_sampler = shadowed
        if trainer.accelerator.dispatch_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches=True lets the first process read for all, "
                "and its loader cannot be moved to a position; leave it out, or use "
                "after='observe'."
            )
        batch_sampler = loader.batch_sampler
        while hasattr(batch_sampler, "batch_sampler"):  # accelerate's shard of a process
            batch_sampler = batch_sampler.batch_sampler
        if batch_sampler.sampler is not sampler:
            raise ValueError(
                f"{type(trainer).__name__}.get_train_dataloader does not take its sampler from "
                "_get_train_sampler, so the mixture could not be rewritten. Use Trainer's own, or "
                "after='observe'."
            )
        return loader

    def close(self) -> None:
        """Stop the loader."""
        if self.iterator is not None:
            self.iterator.close()  # type: ignore[attr-defined]
            self.loader.end()
        self.iterator = self.loader = None


class BatchSource:
    """Feeds a trainer from its own data loader until the switch, and from a mixture after it.

    ``Trainer.get_batch_samples`` is the one place where the training loop draws batches. It is
    shadowed on this trainer alone. Until ``mixture`` is started it passes the call through, so that
    the warm-up is the run without this package. From then on it passes the mixture's iterator; the
    trainer's loader, whose length rules epochs, schedule and resume, is left in place and never
    read again, with what its workers had fetched ahead.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.mixture = MixtureBatches(trainer)
        self._trainer = trainer
        self._original = trainer.get_batch_samples
        trainer.get_batch_samples = self._get_batch_samples

    def remove(self) -> None:
        """Give the trainer its own method back, and stop the loader."""
        self.mixture.close()
        if vars(self._trainer).get("get_batch_samples") == self._get_batch_samples:
            del self._trainer.get_batch_samples

    def _get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.mixture.iterator is None:
            return self._original(epoch_iterator, num_batches, device)
        self._retire(epoch_iterator)
        return self._original(self.mixture.iterator, num_batches, device)

    def _retire(self, epoch_iterator: Any) -> None:
        """Stop the trainer's own loader, which is read no more, with its workers."""
        epoch_iterator.close()
        base = getattr(self._trainer.callback_handler.train_dataloader, "base_dataloader", None)
        if base is not None:
            base._iterator = None  # persistent workers live as long as this
        for loader in self._trainer.accelerator.gradient_state.dataloader_references:
            if loader is not None and loader is not self.mixture.loader:
                loader.end()


def consumed_batches(step: int, batches_per_epoch: int, accumulation: int) -> int:
    """Micro-batches per process that the training loop has drawn after ``step`` optimizer steps.

    The last step of an epoch draws what is left of it, which may be less than ``accumulation``.
    """
    steps_per_epoch = max(-(-batches_per_epoch // accumulation), 1)
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs * batches_per_epoch + rest * accumulation


def total_steps(trainer: Trainer, loader: Any) -> int:
    """Optimizer steps of the whole run, as ``Trainer.train`` will count them with this loader.

    Its own ``set_initial_training_values`` took one argument more until transformers 5.2.
    """
    args = trainer.args
    if args.max_steps > 0:  # the loader of an iterable dataset has no length
        return int(args.max_steps)
    steps_per_epoch = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def clip_gradients(trainer: Trainer, model: torch.nn.Module) -> None:
    """Clip the gradients to ``max_grad_norm`` as the training loop does."""
    if hasattr(trainer, "_clip_grad_norm"):
        trainer._clip_grad_norm(model)
    else:  # until transformers 5.0
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)


def torch_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer below accelerate's wrapper."""
    optimizer: torch.optim.Optimizer = underlying(trainer.optimizer)
    return optimizer


def optimizer_name(trainer: Trainer) -> str:
    """The class of the optimizer, and the training argument by which Trainer made it, if it did."""
    name = type(torch_optimizer(trainer)).__name__
    with contextlib.suppress(ImportError, ValueError):  # one that is not installed was not made
        made, _ = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if made is type(torch_optimizer(trainer)):
            return f"{name} (optim={option_value(trainer.args.optim)!r})"
    return name


def option_value(option: Any) -> Any:
    """A training argument as the user writes it: the value of an enumeration."""
    return getattr(option, "value", option)


def trainable_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters on the CPU, by name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restart(trainer: Trainer, initial: Mapping[str, Tensor]) -> None:
    """Put the trainable parameters back, and forget optimizer state and best checkpoint.

    In place, since the optimizer and distributed wrappers hold references.

    Raises:
        ValueError: ``initial`` does not match the trainable parameters.
    """
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {name: list(tensor.shape) for name, tensor in initial.items()}
    if shapes != {name: list(p.shape) for name, p in trainable.items()}:
        raise ValueError(
            "after='restart': the initial parameters on disk are not those of this model; the run "
            "was started with another adapter. Start again, in another output_dir."
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(initial[name])
            parameter.grad = None
    torch_optimizer(trainer).state.clear()
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def schedule_restart(trainer: Trainer, switch_step: int) -> None:
    """Let the learning rate run through its schedule once more, over the steps after the switch.

    The factors become a function of the global step alone, lambda(s) = first(s) before the switch
    and second(s - switch_step) after it, so that a resumed run needs nothing else.

    Raises:
        ValueError: the scheduler is not a ``LambdaLR`` made by Trainer.
    """
    scheduler = trainer.lr_scheduler
    # Trainer notes which schedules are its own; lr_scheduler_type says nothing of others.
    if not getattr(trainer, "_created_lr_scheduler", True):
        raise ValueError(
            "after='restart' starts the learning-rate schedule again, which is known for those "
            f"that Trainer makes, not for the {type(scheduler).__name__} that it was given. Pass "
            "lr_scheduler_type=... and optimizers=(optimizer, None), or use after='continue'."
        )
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"after='restart' starts the learning-rate schedule again, which is supported for "
            f"schedules made of a LambdaLR, not for {type(scheduler).__name__} "
            f"(lr_scheduler_type={option_value(trainer.args.lr_scheduler_type)!r}). Use another "
            "lr_scheduler_type, or after='continue'."
        )
    remaining = trainer.state.max_steps - switch_step
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in scheduler.base_lrs
    ]
    second = get_scheduler(
        trainer.args.lr_scheduler_type,
        optimizer=torch.optim.SGD(groups),
        num_warmup_steps=trainer.args.get_warmup_steps(remaining),
        num_training_steps=remaining,
        scheduler_specific_kwargs=trainer.args.lr_scheduler_kwargs,
    )

    def joined(first: Any, later: Any) -> Callable[[int], float]:
        def factor(step: int) -> float:
            return first(step) if step < switch_step else later(step - switch_step)

        factor.without_restart = first  # type: ignore[attr-defined]
        return factor

    scheduler.lr_lambdas = [
        joined(first, later)
        for first, later in zip(scheduler.lr_lambdas, second.lr_lambdas, strict=True)
    ]
    # A run that resumes from a checkpoint without this schedule has still its old rate.
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        if isinstance(group["lr"], Tensor):  # compiled steps refer to it
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate


def schedule_after(trainer: Trainer, switch_step: int) -> Schedule:
    """The rates of the steps after the switch; if training restarts, those without the restart.

    In a run that was resumed after it, those of the steps that are left.
    """
    first = max(switch_step, trainer.state.global_step)
    with preserved_rng():
        return schedule_to_come(
            trainer.lr_scheduler,
            torch_optimizer(trainer),
            skip=first - trainer.state.global_step,
            count=trainer.state.max_steps - first,
            shared=(trainer, trainer.model, trainer.optimizer),
        )


def training_to_come(trainer: Trainer, switch_step: int, *, restarts: bool) -> dict[str, Any]:
    """What the optimizer will be told in the steps after the switch, for estimators that model it.

    Returns:
        ``learning_rates`` of each remaining step (if it restarts, those without the restart) of the
        reference group, ``group_learning_rates`` of all groups, ``learning_rates_are_known`` (else
        they are those of now), ``momentum_coefficients`` of each step if the scheduler changes
        them, else None, ``max_grad_norm`` (0: no clipping), ``examples_per_step`` over all
        processes, and ``after``, as JSON values.
    """
    schedule = schedule_after(trainer, switch_step)
    momentum = schedule.momentum_coefficients[schedule.reference_group]
    return {
        "learning_rates": schedule.learning_rates[schedule.reference_group],
        "group_learning_rates": schedule.learning_rates,
        "learning_rates_are_known": schedule.unknown_because is None,
        "momentum_coefficients": momentum if len(set(momentum)) > 1 else None,
        "max_grad_norm": float(trainer.args.max_grad_norm or 0.0),
        "examples_per_step": int(trainer.get_total_train_batch_size(trainer.args)),
        "after": "restart" if restarts else "continue",
    }


def model_name(trainer: Trainer) -> str:
    """The model's name; of a local directory the last part, since reports are for others' eyes."""
    name = str(trainer.model.config.name_or_path)
    return Path(name).name if Path(name).is_dir() else name


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log through the trainer without closing a subclass's own logging window.

    SFTTrainer.log averages and clears the metrics gathered since the last log; its base does not.
    """
    Trainer.log(trainer, metrics)
