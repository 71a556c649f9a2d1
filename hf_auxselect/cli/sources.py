"""The data sets of ``sft``: entries of TRL's ``datasets:`` as tasks, and the target."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_split_names
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from hf_auxselect.cli.options import UsageError
from hf_auxselect.files import JsonDict

_SPLIT = r"\w[\w.-]*(?:\[[^\]]*\])?"
_PATH_AND_SPLIT = re.compile(rf"(.+?):({_SPLIT}(?:\+{_SPLIT})*)", re.DOTALL)
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Suffix of a local file -> the loader of datasets that reads it."""


@dataclasses.dataclass
class TaskMixture(DatasetMixtureConfig):
    """TRL's ``datasets:``, whose entries may also name their task: ``task: gsm``."""

    datasets: list[DatasetConfig] = dataclasses.field(
        default_factory=list, metadata={"help": "Data sets, each a task."}
    )
    names: list[str] = dataclasses.field(default_factory=list, init=False)
    """The task of each entry."""

    def __post_init__(self) -> None:
        entries: list[Any] = [dict(e) if isinstance(e, Mapping) else e for e in self.datasets]
        given = [e.pop("task", None) if isinstance(e, dict) else None for e in entries]
        self.datasets = entries
        super().__post_init__()
        made: list[Any] = self.datasets  # DatasetConfig
        self.datasets = [_of_file(entry) for entry in made]
        self.names = _unique_names(self.datasets, given)

    @property
    def sources(self) -> dict[str, JsonDict]:
        """Task -> its entry, for the report: as in YAML, without the keys that are not given."""
        return {
            name: {
                key: value
                for key, value in dataclasses.asdict(entry).items()
                if value is not None and key != "fraction"
            }
            for name, entry in zip(self.names, self.datasets, strict=True)
        }

    def load(self) -> dict[str, Dataset]:
        """The rows of each task, as TRL would take them.

        Raises:
            UsageError: the tasks are streams, or only some of them have a ``fraction``.
        """
        if self.streaming:
            raise UsageError("--streaming: tasks must have a length; leave it out.")
        tasks = {n: load(e) for n, e in zip(self.names, self.datasets, strict=True)}
        given = [vars(entry).get("fraction") for entry in self.datasets]  # not in TRL 1.0
        if all(fraction is None for fraction in given):
            return tasks
        fractions = [fraction for fraction in given if fraction is not None and fraction > 0]
        if len(fractions) < len(given):
            raise UsageError("datasets: give each entry a positive `fraction`, or none of them.")
        shares = {n: f / sum(fractions) for n, f in zip(tasks, fractions, strict=True)}
        total = min(len(rows) / shares[name] for name, rows in tasks.items())
        return {n: rows.select(range(round(shares[n] * total))) for n, rows in tasks.items()}


def load(entry: DatasetConfig) -> Dataset:
    """The rows of one entry."""
    return get_dataset(DatasetMixtureConfig(datasets=[entry]))["train"]


def target_entry(
    target: str | Mapping[str, Any], mixture: TaskMixture, *, config: str | None, split: str
) -> DatasetConfig:
    """The entry of the target.

    Args:
        target: ``path[:split]``, where ``path`` is a task, the path of an entry of the mixture, a
            local file or folder, or a data set on the Hub; or an entry, as in YAML.
        mixture: the tasks.
        config: the data set's configuration; None: that of the entry with the same path, if any.
        split: the split of a data set with several ones, where ``target`` gives none.

    Raises:
        UsageError: an entry has an unknown key; or there is no such split.
    """
    if isinstance(target, Mapping):
        try:
            entry, has_split = _of_file(DatasetConfig(**target)), "split" in target
        except TypeError as error:
            raise UsageError(f"target: {error}") from None
    else:
        entry, has_split = _parse_target(target, mixture)
    if config is not None:
        entry = dataclasses.replace(entry, name=config)
    if has_split:
        return entry
    files = {"data_dir": entry.data_dir, "data_files": entry.data_files}
    known = get_dataset_split_names(
        entry.path, entry.name, **{key: value for key, value in files.items() if value is not None}
    )
    if split not in known and len(known) > 1:
        raise UsageError(
            f"--target {target!r} has no split {split!r}, but {known}; give one of them "
            f"(--target {entry.path}:{known[-1]})."
        )
    return dataclasses.replace(entry, split=split if split in known else known[0])


def _parse_target(text: str, mixture: TaskMixture) -> tuple[DatasetConfig, bool]:
    """The entry of ``path[:split]``, and whether it has a split."""
    path, split = text, None
    if not Path(text).exists() and (found := _PATH_AND_SPLIT.fullmatch(text)):
        path, split = found.groups()
    entry = DatasetConfig(path)
    for name, other in zip(mixture.names, mixture.datasets, strict=True):
        if path in (name, other.path):
            entry = dataclasses.replace(other)
            break
    if split is not None:
        entry = dataclasses.replace(entry, split=split)
    return _of_file(entry), split is not None


def _of_file(entry: DatasetConfig) -> DatasetConfig:
    """An entry whose path is a local file, as the loader of its format takes it."""
    path = Path(entry.path)
    if path.suffix in _FILES and entry.data_files is None and path.is_file():
        return dataclasses.replace(entry, path=_FILES[path.suffix], data_files=entry.path)
    return entry


def _unique_names(entries: Sequence[DatasetConfig], given: Sequence[str | None]) -> list[str]:
    """The task of each entry: as it is given, or ``path[/name]``.

    Raises:
        UsageError: a given name occurs twice.
    """
    twice = [name for name in given if name is not None and given.count(name) > 1]
    if twice:
        raise UsageError(
            f"datasets: `task: {twice[0]}` is there more than once; names must differ."
        )
    names: list[str] = []
    for entry, name in zip(entries, given, strict=True):
        if name is None:
            first, number = _name(entry), 1
            name = first
            while name in names or name in given:
                number += 1
                name = f"{first} ({number})"
        names.append(str(name))
    return names


def _name(entry: DatasetConfig) -> str:
    """Path and configuration, without the loader of local files; the split if it is not train."""
    files = entry.data_files
    while isinstance(files, Mapping | list):
        files = next(iter(files.values() if isinstance(files, Mapping) else files))
    is_loader = "/" not in entry.path and (files or entry.data_dir)
    parts = [None if is_loader else entry.path, entry.name, entry.data_dir]
    parts.append(files and str(Path(files).with_suffix("")))
    name = "/".join(part.rstrip("/") for part in parts if part)
    return name if entry.split == "train" else f"{name}:{entry.split}"
