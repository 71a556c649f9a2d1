"""Tasks of a training set: joining their datasets, and which task each row belongs to.

Shapes: N rows of the training set, K tasks.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

_TASKS_MARK = "hf_auxselect tasks: "

GROUP_EACH_TASK = (
    "Tokenize and group the texts of each task by itself, then join the tasks: "
    "concatenate_tasks({name: dataset.map(group_texts, batched=True), ...})."
)


def concatenate_tasks(
    tasks: Mapping[str, Dataset | IterableDataset]
    | Iterable[tuple[str, Dataset | IterableDataset]],
    *,
    task_column: str = "task",
    take: int | Mapping[str, int] | None = None,
) -> Dataset:
    """Join the datasets of several tasks into one training set that remembers each row's task.

    Args:
        tasks: task name -> dataset, or (name, dataset) pairs. Columns of the same name must have
            the same type. As in ``datasets.concatenate_datasets``, a column that a task lacks, or
            has without any value (of type null), is filled with None; a warning says so.
            A ``datasets.IterableDataset`` (a stream) needs ``take``.
        task_column: name of the string column that is added.
        take: number of rows to take of each task, its first ones, or all if there are fewer; from
            streams they are read here and kept. A mapping (task name -> number) takes from the
            tasks that it names, and must name every stream. None: all rows; no task is a stream.
            A resumed run reads the same rows if the streams are deterministic, and is refused if
            they were not (shuffle a stream with a seed).

    Returns:
        The rows of all tasks, task after task and in their own order. Where TRL packs them, as
        ``SFTConfig(packing=True)`` lets it, the rows of each task are packed by themselves.

    Raises:
        ValueError: no task, an empty task, a name that is empty or used twice, an existing
            column ``task_column``, columns whose types differ (the message names tasks and
            columns), or a ``take`` that is no positive number or names what is not a task.
        TypeError: a value is not a ``datasets.Dataset`` (of a ``DatasetDict`` the message names the
            splits), or is a stream without ``take``, or a name is not a string.

    Examples:
        >>> from datasets import Dataset
        >>> a = Dataset.from_dict({"text": ["1+1=2", "2+2=4"]})
        >>> b = Dataset.from_dict({"text": ["The sky is blue."]})
        >>> concatenate_tasks({"sums": a, "facts": b})["task"][:]
        ['sums', 'sums', 'facts']
    """
    from datasets import Dataset, Features, Value, concatenate_datasets

    from hf_auxselect.packing import TaskDataset

    pairs = _first_rows(_pairs_of(tasks), take)
    seen: set[str] = set()
    labelled = []
    for name, dataset in pairs:
        if not isinstance(name, str):
            raise TypeError(f"tasks: names must be strings, got {name!r}.")
        if not name.strip() or name in seen:
            problem = "used twice" if name in seen else "empty"
            raise ValueError(f"tasks: the name {name!r} is {problem}; give each task its own name.")
        seen.add(name)
        if isinstance(dataset, Mapping):
            raise _is_several(name, dataset)
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"tasks[{name!r}] must be a datasets.Dataset, got {type(dataset).__name__} (of a "
                "datasets.IterableDataset, take=n reads the first rows)."
            )
        if len(dataset) == 0:
            raise ValueError(f"tasks[{name!r}] has no rows; leave the task out.")
        if task_column in dataset.column_names:
            raise ValueError(
                f"tasks[{name!r}] already has a column {task_column!r}; rename it, or pass another "
                "task_column here and to TaskSelectionCallback."
            )
        features = Features({**dataset.features, task_column: Value("string")})
        labelled.append(dataset.add_column(task_column, [name] * len(dataset)).cast(features))
    columns = _common_columns(dict(pairs))
    joined = TaskDataset.of(
        concatenate_datasets(labelled).select_columns([*columns, task_column]), task_column
    )
    # The description outlives map and filter, and tells later which tasks have lost all their rows.
    joined.info.description = _TASKS_MARK + json.dumps([name for name, _ in pairs])
    return joined


def _first_rows(
    pairs: list[tuple[str, Any]], take: int | Mapping[str, int] | None
) -> list[tuple[str, Any]]:
    """The tasks, of which ``take`` names some, with their first rows alone, and without streams."""
    from datasets import Dataset, IterableDataset

    names = [name for name, _ in pairs]
    if isinstance(take, Mapping):
        unknown = [name for name in take if name not in names]
        if unknown:
            raise ValueError(f"take names {unknown}, which are not among the tasks {names}.")
        number_of = dict(take)
    else:
        number_of = {} if take is None else dict.fromkeys(names, take)
    for name, number in number_of.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            what = f"take[{name!r}]" if isinstance(take, Mapping) else "take"
            raise ValueError(f"{what} must be a number of rows, 1 or more; got {number!r}.")
    for name, dataset in pairs:
        if isinstance(dataset, IterableDataset) and name not in number_of:
            raise TypeError(
                f"tasks[{name!r}] is a stream (datasets.IterableDataset); rows of a dropped task "
                "could not be left out. Pass take=n, which reads the first n rows of each task, or "
                "take={name: n, ...}."
            )

    def shortened(name: str, dataset: Any) -> Any:
        number, is_stream = number_of.get(name), isinstance(dataset, IterableDataset)
        if number is None or not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        if is_stream:
            first = _read_stream(dataset, int(number))
        else:
            first = dataset.select(range(min(number, len(dataset))))
        if is_stream and len(first) < number:
            logger.warning(
                "tasks[%r]: the stream ended after %d rows; take asks for %d.",
                name,
                len(first),
                number,
            )
        else:
            logger.info("tasks[%r]: took the first %d rows.", name, len(first))
        return first

    return [(name, shortened(name, dataset)) for name, dataset in pairs]


def _read_stream(stream: IterableDataset, number: int) -> Dataset:
    """The first rows, as they are stored, with the stream's features, else those of the rows."""
    from datasets import Dataset

    features = stream.features
    if features is not None and hasattr(stream, "decode"):
        stream = stream.decode(False)  # images and sound stay the bytes that they are
    rows = list(stream.with_format(None).take(number))
    columns = features or dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_dict(
        {column: [row.get(column) for row in rows] for column in columns}, features=features
    )


def joined_tasks(dataset: Any) -> list[str]:
    """The tasks that :func:`concatenate_tasks` joined in a dataset; empty if it did not."""
    description = getattr(getattr(dataset, "info", None), "description", "") or ""
    return (
        json.loads(description[len(_TASKS_MARK) :]) if description.startswith(_TASKS_MARK) else []
    )


def _pairs_of(tasks: Any) -> list[tuple[Any, Any]]:
    """Names and datasets, as they were given."""
    pairs = list(tasks.items() if isinstance(tasks, Mapping) else tasks)
    if not pairs:
        raise ValueError("tasks is empty; expected a mapping from task names to datasets.")
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            "tasks must be a mapping from task names to datasets, or (name, dataset) pairs; got "
            f"a {type(tasks).__name__} of {type(pairs[0]).__name__}. Pass "
            "{'name': dataset, ...}."
        )
    return [(name, dataset) for name, dataset in pairs]


def _is_several(name: str, datasets: Mapping[Any, Any]) -> TypeError:
    """The error for a task that is given as several datasets, such as the splits of a download."""
    kind, keys = type(datasets).__name__, list(datasets)
    splits = "splits" if kind.endswith("DatasetDict") else "keys"
    first = "train" if "train" in keys else keys[0] if keys else "train"
    return TypeError(
        f"tasks[{name!r}] is a {kind} with the {splits} {keys}; pass one of its datasets, such as "
        f"tasks[{name!r}][{first!r}]."
    )


def _common_columns(tasks: Mapping[str, Dataset]) -> list[str]:
    """The columns of all tasks, in order of first appearance; says which will be filled with None.

    Raises:
        ValueError: tasks have a column in types that ``datasets`` does not join.
    """
    columns = list(dict.fromkeys(c for dataset in tasks.values() for c in dataset.column_names))
    clashes: list[tuple[str, str, Any, str, Any]] = []
    fills: list[tuple[str, list[str]]] = []
    for column in columns:
        having = {name: data for name, data in tasks.items() if column in data.column_names}
        different: list[str] = []  # tasks that have it in types of their own
        for name, data in having.items():
            feature = data.features[column]
            if any(feature == tasks[other].features[column] for other in different):
                continue
            clashes += [
                (column, other, tasks[other].features[column], name, feature)
                for other in different
                if not _can_be_joined(tasks[other], data, column)
            ]
            different.append(name)
        filled = [name for name in tasks if name not in having]
        if len(different) > 1:
            filled += [name for name, data in having.items() if _is_null(data.features[column])]
        if filled:
            fills.append((column, filled))
    if clashes:
        _, one, _, other, _ = clashes[0]
        details = "; ".join(
            f"{column!r} is {feature} in {first!r} and {other_feature} in {name!r}"
            for column, first, feature, name, other_feature in clashes
        )
        raise ValueError(
            f"tasks {one!r} and {other!r} differ in the columns "
            f"{list(dict.fromkeys(clash[0] for clash in clashes))}: {details}. Rename, remove or "
            "cast columns so that all tasks agree."
        )
    for column, filled in fills:
        logger.warning(
            "concatenate_tasks fills the column %r with None in the tasks that have no value in "
            "it: %s. If training reads that column, let all tasks have it.",
            column,
            ", ".join(map(repr, filled)),
        )
    return columns


def _is_null(feature: Any) -> bool:
    """Whether a column's type holds nothing but None."""
    return getattr(feature, "dtype", None) == "null"


def _can_be_joined(one: Dataset, other: Dataset, column: str) -> bool:
    """Whether ``datasets`` joins a column of two datasets whose types differ."""
    from datasets import concatenate_datasets

    try:
        concatenate_datasets([data.select_columns([column]).select([0]) for data in (one, other)])
    except (ValueError, TypeError, NotImplementedError):  # of Arrow, too
        return False
    return True


def task_name(label: Any, class_names: Sequence[str] | None) -> str | None:
    """The name of the task that a label stands for; None if it stands for none."""
    if isinstance(label, str):
        return str.__str__(label) if label.strip() else None  # of a member of an enumeration, too
    if getattr(label, "shape", None) == () and hasattr(label, "item"):
        label = label.item()  # of an array or tensor without dimensions
    if not isinstance(label, int) or isinstance(label, bool):
        return None
    if class_names is None:
        return str(int(label))
    return class_names[label] if 0 <= label < len(class_names) else None


def _no_task(label: Any, row: int, column: str) -> ValueError:
    advice = "Let each row have its task's name: a string, an integer, or a class of a ClassLabel"
    if isinstance(label, list | tuple):
        advice = (
            "A map over batches, such as group_texts of run_clm, chains the column into lists. "
            + GROUP_EACH_TASK
        )
    elif label is None or isinstance(label, str | int):
        advice += "; or leave the rows without one out (dataset.filter)."
    else:
        advice += "."
    return ValueError(
        f"row {row} of train_dataset names no task in its column {column!r}: got "
        f"{reprlib.repr(label)} ({type(label).__name__}). {advice}"
    )


def are_characters_of(names: Sequence[str], tasks: Sequence[str]) -> bool:
    """Whether some names are no tasks' names, but single characters of them."""
    return (
        not set(names) & set(tasks)
        and all(len(name) == 1 for name in names)
        and set(names) <= set("".join(tasks))
    )


@dataclass(frozen=True)
class TaskRows:
    """Which task each row of a training set belongs to."""

    names: tuple[str, ...]
    """The K tasks, in order of first appearance."""
    ids: np.ndarray
    """int64 [N]: position in ``names`` of each row's task."""

    @classmethod
    def from_labels(
        cls,
        labels: Iterable[Any],
        *,
        class_names: Sequence[str] | None = None,
        column: str = "task",
    ) -> TaskRows:
        """From the label of each row, as in the training set's task column.

        Args:
            labels: strings; or integers, whose tasks are named by their class, or by their digits
                where there are no classes.
            class_names: names of a ``ClassLabel`` column.
            column: what an error calls the column.

        Raises:
            ValueError: a label is neither (None, a float, a list, ...); names the row.
        """
        positions: dict[str, int] = {}
        ids = []
        for row, label in enumerate(labels):
            name = task_name(label, class_names)
            if name is None:
                raise _no_task(label, row, column)
            ids.append(positions.setdefault(name, len(positions)))
        return cls(tuple(positions), np.array(ids, np.int64))

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """Row numbers of each task, ascending."""
        return [np.flatnonzero(self.ids == k) for k in range(len(self.names))]

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [K]: number of rows of each task."""
        return np.bincount(self.ids, minlength=len(self.names))
