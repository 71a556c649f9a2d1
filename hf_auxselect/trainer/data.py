"""The data of a trainer: tasks and rows of its training set, its target, and batches of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import DataCollatorWithFlattening, Trainer

from hf_auxselect.capture.scalars import IGNORE_INDEX, Batch
from hf_auxselect.sampler import MIN_SHARE
from hf_auxselect.tasks import GROUP_EACH_TASK, TaskRows, are_characters_of, joined_tasks, task_name

logger = logging.getLogger(__name__)


def read_tasks(trainer: Trainer, task_column: str) -> TaskRows:
    """The task of every row of the training set, after the trainer has prepared it.

    Preparation may drop or reorder rows (truncation, shuffling), so only the trainer's own copy
    tells which row belongs to which task. Tasks that were left out before the trainer was made
    (``filter``, ``select``) are none of the run.

    Raises:
        ValueError: there is no task column, a row names no task, a task has lost all its rows in
            the trainer's preparation, fewer than two tasks are left, or one of them is too small a
            part of the training set.
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
    smallest = int(tasks.counts.argmin())
    count, total = int(tasks.counts[smallest]), len(tasks.ids)
    if count / total < MIN_SHARE:
        raise ValueError(
            f"the task {tasks.names[smallest]!r} has {count} of the {total} rows of train_dataset, "
            f"a share below {MIN_SHARE:g}, the least that a mixture can hold. Leave the task out, "
            "or join it with another one."
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
        "dataset, or pass task_column=... if it has another name; clusters=n does without."
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
        # Another trainer may have left them out itself, in its own preparation.
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


def target_dataset(trainer: Trainer, target: str | None, *, of_reselect: bool = False) -> Any:
    """The evaluation set whose loss is minimised: ``eval_dataset``, or one of its dict.

    Args:
        trainer: a trainer.
        target: key of its ``eval_dataset`` dict, or None.
        of_reselect: whether ``reselect=`` names the target; else ``target=`` does.

    Raises:
        ValueError: there is none, or ``target`` does not name one.
    """
    datasets = trainer.eval_dataset
    if datasets is None:
        raise ValueError(
            "the trainer has no eval_dataset; pass eval_dataset=... with examples of the target."
        )
    target = target_key(trainer, target)
    if of_reselect and not (isinstance(datasets, Mapping) and target in datasets):
        has = f"has {sorted(datasets)}" if isinstance(datasets, Mapping) else "is not a dict"
        raise ValueError(
            f"reselect: targets names {target!r}, which is not a key of eval_dataset: that {has}. "
            "Name a key that is there, or pass eval_dataset={name: dataset, ...} with it."
        )
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
    return _with_rows(dataset, "the target's eval_dataset")


def group_dataset(trainer: Trainer, group: str, targets: Sequence[str | None]) -> Any:
    """The evaluation set of a group: one of the ``eval_dataset`` dict, other than the targets'.

    Args:
        trainer: a trainer.
        group: a key of its ``eval_dataset`` dict.
        targets: all that the run may have, each from :func:`target_key`.

    Raises:
        ValueError: there is none of this name, or it is a target.
    """
    datasets = trainer.eval_dataset
    if not isinstance(datasets, Mapping):
        raise ValueError(
            f"groups names {group!r}, a key of eval_dataset, which is not a dict. Pass "
            "eval_dataset={name: dataset, ...} with the target and the groups, and target=..."
        )
    if group not in datasets:
        raise ValueError(
            f"groups names {group!r}, which is not a key of eval_dataset; it has "
            f"{sorted(datasets)}."
        )
    if group in targets:
        raise ValueError(f"groups names the target {group!r}; leave it out of groups.")
    return _with_rows(datasets[group], f"the eval_dataset of the group {group!r}")


def _with_rows(dataset: Any, name: str) -> Any:
    """The dataset; raises ValueError if it cannot be read twice or is empty."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name} is an iterable dataset, of which no example can be read twice. Pass its first "
            "rows: Dataset.from_list(list(stream.take(n)))."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows.")
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
    def is_packed(self) -> bool:
        """Whether a row may hold several examples."""
        return self._starts is not None

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
        return self._document(self._unformatted[int(self.packed_rows[index])], index)

    @cached_property
    def _unformatted(self) -> Any:
        return self._dataset.with_format(None) if self.is_stored else self._dataset

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
        spans = [name for name in ("start_positions", "end_positions") if name in batch]
        if "labels" not in batch and spans:
            raise ValueError(
                f"the trainer's data_collator returns {spans}: losses of spans (question "
                "answering) are not supported, only those of labels, one for each position or for "
                "each example. Train without TaskSelectionCallback."
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
