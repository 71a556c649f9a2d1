"""Where the data of a task come from: an entry of TRL's ``datasets:``, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_auxselect.report.exports.syntax import is_list

FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""Values of ``path`` that are no data set, but tell ``load_dataset`` how to read ``data_files``."""

_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns")
_PLAIN_SPLIT = re.compile(r"[\w.]+")
_SLICE = re.compile(r"([\w.]+)\[(\d*):(\d*)\]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data of a task: arguments of ``datasets.load_dataset``, and columns to select."""

    task: str
    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    """A file, several, or files by split."""
    split: str = "train"
    columns: list[str] | None = None
    is_placeholder: bool = False
    """Whether nobody told where the data are; ``path`` is then the task's name."""

    @classmethod
    def of(cls, task: str, entry: Mapping[str, Any] | None, examples: int) -> Source:
        """The source of a task.

        Args:
            task: its name.
            entry: with keys of an entry of TRL's ``datasets:``; None: the source is not known.
            examples: number of rows that the run had of it. Where the entry has a ``fraction``,
                these are its first ones.

        Raises:
            ValueError, TypeError: the entry is not such a mapping; names the task and the key.
        """
        if entry is None:
            return cls(task=task, path=task, is_placeholder=True)
        where = f"sources[{task!r}]"
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"{where} must be a mapping with a path, such as {{'path': 'org/data'}}, got "
                f"{entry!r}."
            )
        given = {key: value for key, value in entry.items() if value is not None}
        is_part = given.pop("fraction", None) is not None
        unknown = [key for key in given if key not in _KEYS]
        if unknown:
            raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {[*_KEYS]}.")
        if "path" not in given:
            raise ValueError(f"{where} has no 'path'; add {{'path': 'org/data'}} or the like.")
        for key, value in given.items():
            if not _is_valid(key, value):
                kind = "a list of strings" if key == "columns" else "a string"
                kind = "a file, files, or files by split" if key == "data_files" else kind
                raise TypeError(f"{where}[{key!r}] must be {kind}, got {value!r}.")
        source = cls(task=task, **given)
        if is_part:
            split = source.first(examples)
            if split is None:
                raise ValueError(
                    f"{where} has a fraction and the split {source.split!r}; give the rows that "
                    "the run had as a split such as 'train[:1000]', without a fraction."
                )
            source = replace(source, split=split)
        return source

    def first(self, count: int) -> str | None:
        """The split that holds the first rows alone; None if ``datasets`` has no name for it."""
        if _PLAIN_SPLIT.fullmatch(self.split):
            return f"{self.split}[:{count}]"
        if match := _SLICE.fullmatch(self.split):
            name, start = match[1], int(match[2] or 0)
            return f"{name}[{start or ''}:{start + count}]"
        return None

    def fields(self) -> dict[str, Any]:
        """The entry; keys without a value are left out."""
        return {key: value for key in _KEYS if (value := getattr(self, key)) is not None}

    def refused(self, tool: str, key: str) -> ValueError:
        """The error for a source that a tool cannot read."""
        return ValueError(
            f"sources[{self.task!r}]: {tool} cannot express {key}={getattr(self, key)!r}. Save the "
            "rows of the task to one file (dataset.to_json('FILE.jsonl')), and pass "
            f"sources={{{self.task!r}: {{'path': 'json', 'data_files': 'FILE.jsonl'}}}}."
        )

    def files(self, tool: str) -> tuple[list[str], str] | None:
        """Local files, and the split among their rows; None if the source is no list of files.

        Raises:
            ValueError: files by split, and a split that is not one of them.
        """
        if self.path not in FILE_FORMATS or self.data_files is None:
            return None
        files, split = self.data_files, self.split
        if isinstance(files, Mapping):
            base = re.match(r"[\w.]*", split)
            assert base is not None
            if base[0] not in files or "+" in split:
                raise self.refused(tool, "split")
            files, split = files[base[0]], "train" + split[base.end() :]
        return ([*files] if is_list(files) else [files]), split


def _is_valid(key: str, value: Any) -> bool:
    def is_files(value: Any) -> bool:
        return isinstance(value, str) or (
            is_list(value) and bool(value) and all(isinstance(item, str) for item in value)
        )

    if key == "columns":
        return is_list(value) and all(isinstance(item, str) for item in value)
    if key == "data_files" and isinstance(value, Mapping):
        return all(isinstance(name, str) and is_files(files) for name, files in value.items())
    return is_files(value) if key == "data_files" else isinstance(value, str)
