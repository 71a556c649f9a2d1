"""Training sets whose tasks stay apart when TRL packs their rows.

``SFTTrainer`` packs while it is made, before any callback hears of it: it selects the columns of
tokens and labels, perhaps shuffles, and maps a packing function over batches of rows. The task
column is gone by then, and a packed row holds documents of several tasks. What the trainer calls
are methods of the dataset, so here is a dataset that remembers the tasks of its rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, concatenate_datasets


class TaskDataset(Dataset):
    """A ``datasets.Dataset`` with a task column, packed by TRL within each task.

    Returned by :func:`hf_auxselect.concatenate_tasks`. It is an ordinary dataset but for this:
    where ``trl.pack_dataset`` packs it, as ``SFTTrainer`` does under ``packing=True``, the rows of
    each task are packed by themselves, task after task, and the task column is kept. That holds
    also after ``select_columns`` has left out the task column, and then ``shuffle`` or ``select``.

    What its methods return (``map``, ``filter``, ``select``, ``train_test_split``, ...) is such a
    dataset again, as long as it has the task column. What ``datasets.concatenate_datasets`` and
    ``datasets.load_from_disk`` return is a plain ``Dataset``.
    """

    rows_with_task: TaskDataset | None = None
    """The same rows with their task column, where ``select_columns`` has left it out."""
    _task_column: str = ""
    _is_just_packed = False

    @classmethod
    def of(cls, dataset: Any, task_column: str) -> TaskDataset:
        """Turn a dataset, which nobody else holds, into one that is packed within its tasks."""
        result: TaskDataset = _become(dataset, task_column)
        return result

    def map(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """``Dataset.map``; TRL's packing functions are mapped over each task by itself."""
        with_task = self if self.rows_with_task is None else self.rows_with_task
        feature = with_task.features.get(self._task_column)
        if len(self) and _is_packing(function) and isinstance(feature, Value | ClassLabel):
            return self._packed_by_task(function, *args, **kwargs)
        return self._like_self(Dataset.map(self, function, *args, **kwargs))

    def _packed_by_task(self, pack: Any, *args: Any, **kwargs: Any) -> TaskDataset:
        for name in ("cache_file_name", "new_fingerprint"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"map_kwargs: {name} would name the packed rows of every task alike; leave it "
                    "out."
                )
        kwargs["fn_kwargs"] = {"pack": pack, "options": kwargs.get("fn_kwargs") or {}}
        name, rows, with_task = self._task_column, self, self
        if self.rows_with_task is not None:
            with_task = self.rows_with_task
        else:
            rows = Dataset.remove_columns(self, name)
        rows_of: dict[Any, list[int]] = {}
        for i, label in enumerate(Dataset.with_format(with_task, None)[name]):
            rows_of.setdefault(label, []).append(i)
        parts = []
        for label, own in rows_of.items():
            part = Dataset.map(Dataset.select(rows, own), _pack_copy, *args, **kwargs)
            column = [label] * len(part)
            parts.append(part.add_column(name, column, feature=with_task.features[name]))
        result = TaskDataset.of(concatenate_datasets(parts), name)
        result._is_just_packed = True
        return result

    def select_columns(self, column_names: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """``Dataset.select_columns``; if the task column is left out, packing still knows it."""
        result = Dataset.select_columns(self, column_names, *args, **kwargs)
        with_task = self if self.rows_with_task is None else self.rows_with_task
        is_left_out = self._task_column not in result.column_names
        return _become(result, self._task_column, with_task if is_left_out else None)

    def shuffle(self, *args: Any, **kwargs: Any) -> Any:
        """``Dataset.shuffle``."""
        return self._reordered(Dataset.shuffle, *args, **kwargs)

    def select(self, *args: Any, **kwargs: Any) -> Any:
        """``Dataset.select``."""
        return self._reordered(Dataset.select, *args, **kwargs)

    def _reordered(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with_task = self.rows_with_task
        if with_task is None:
            return self._like_self(method(self, *args, **kwargs))
        # The order is given to the rows with their task, so that the two stay the same rows.
        reordered = _become(method(with_task, *args, **kwargs), self._task_column)
        result = reordered.select_columns(self.column_names)
        how = self.format
        options = how.pop("format_kwargs")
        result.set_format(**how, **options)
        return result

    def with_format(
        self, type: str | None = None, columns: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """``Dataset.with_format``; of rows that were just packed, the task stays in sight."""
        # ``trl.pack_dataset`` puts the format back, with the columns that it knows of.
        if self._is_just_packed and columns is not None and self._task_column not in columns:
            columns = [*columns, self._task_column]
        result = Dataset.with_format(self, type, columns, *args, **kwargs)
        return _become(result, self._task_column, self.rows_with_task)

    def rename_column(
        self, original_column_name: str, new_column_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """``Dataset.rename_column``."""
        result = Dataset.rename_column(self, original_column_name, new_column_name, *args, **kwargs)
        is_task = original_column_name == self._task_column
        return _become(result, new_column_name if is_task else self._task_column)

    def rename_columns(self, column_mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        """``Dataset.rename_columns``."""
        result = Dataset.rename_columns(self, column_mapping, *args, **kwargs)
        return _become(result, column_mapping.get(self._task_column, self._task_column))

    def _like_self(self, result: Any) -> Any:
        """What a method of ``Dataset`` has returned, its datasets made ours."""
        for part in result.values() if isinstance(result, DatasetDict) else [result]:
            if isinstance(part, Dataset) and part is not self:
                _become(part, self._task_column)
        return result


def _become(dataset: Any, task_column: str, rows_with_task: TaskDataset | None = None) -> Any:
    """Make a dataset, which nobody else holds, one of ours; if it has no tasks, a plain one."""
    has_tasks = rows_with_task is not None or task_column in dataset.column_names
    dataset.__class__ = TaskDataset if has_tasks else Dataset
    for name in ("_task_column", "rows_with_task", "_is_just_packed"):
        vars(dataset).pop(name, None)  # those of the dataset that it is a copy of
    if has_tasks:
        dataset._task_column = task_column
        dataset.rows_with_task = rows_with_task
    return dataset


def _returns_task_dataset(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``Dataset`` whose datasets are ours."""

    @functools.wraps(method)
    def wrapper(self: TaskDataset, *args: Any, **kwargs: Any) -> Any:
        return self._like_self(method(self, *args, **kwargs))

    return wrapper


for _name, _method in vars(Dataset).items():
    if not _name.startswith("_") and inspect.isfunction(_method) and _name not in vars(TaskDataset):
        setattr(TaskDataset, _name, _returns_task_dataset(_method))


def _is_packing(function: Any) -> bool:
    """Whether it is what ``trl.pack_dataset`` maps over batches of rows."""
    module = getattr(function, "__module__", None) or ""
    return module.partition(".")[0] == "trl" and "pack" in getattr(function, "__name__", "")


def _pack_copy(examples: Any, *, pack: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Pack a copy of a batch: in older versions of TRL 'wrapped' misreads part of a table."""
    return pack(examples.take(list(range(len(examples)))), **options)
