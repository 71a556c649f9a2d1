"""The files of a gradient store: their index, their checksums, and how they are mapped.

A store is a directory of safetensors files and an ``index.json``, which lists the shards with the
file, the rows and the checksum of each. While gradients are captured every shard is a file of its
own. A complete store has one file for all tasks, one for the target, one for each group (a further
target), and one for vectors that belong to the whole store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from hf_auxselect.files import JsonDict, read_json

FORMAT = "hf_auxselect.gradients"
FORMAT_VERSION = 2
FORMAT_VERSION_WITH_GROUPS = 3
"""The versions of stores without and with groups. Releases that know no groups can read the first,
and must refuse the second."""
INDEX_NAME = "index.json"

Arrays = dict[str, np.ndarray]

Role = Literal["task", "target", "group"]
"""What examples are to a run: of an auxiliary task, of the target, or of a further target."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
}
"""The types that a store holds, by their names in safetensors."""

MAX_HEADER_BYTES = 2**20
"""A safetensors file with a longer header is damaged, and is not read any further. A convention:
headers of stores take a few hundred bytes."""


class StoreError(ValueError):
    """A gradient store that is damaged, incomplete or of a foreign format; names the file."""


class _OfGroup(TypedDict, total=False):
    """What the entries of a group have beside those of others."""

    group: bool


class TaskEntry(_OfGroup):
    """A task, the target or a group in the index."""

    name: str
    target: bool
    num_rows: int
    """Rows of the dataset; the store may hold fewer."""


class ShardEntry(_OfGroup):
    """A shard in the index."""

    fingerprint: str
    task: str
    target: bool
    file: str
    first_row: int
    """Its first row within the file."""
    num_examples: int
    sha256: str


class VectorsEntry(TypedDict):
    """The file of vectors in the index."""

    file: str
    sha256: str


class Index(TypedDict):
    """The content of ``index.json``."""

    format: str
    format_version: int
    complete: bool
    scalars: list[str]
    tasks: list[TaskEntry]
    metadata: JsonDict
    vectors: VectorsEntry | None
    shards: list[ShardEntry]


def role_of(entry: TaskEntry | ShardEntry) -> Role:
    """What the examples of an entry are to the run."""
    if entry.get("group"):
        return "group"
    return "target" if entry["target"] else "task"


def task_entry(name: str, role: Role, num_rows: int) -> TaskEntry:
    """An entry of the index."""
    entry: TaskEntry = {"name": name, "target": role == "target", "num_rows": num_rows}
    return {**entry, "group": True} if role == "group" else entry


def read_index(directory: Path) -> Index:
    """Read and check the index of a store, complete or not.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged or of a foreign format.
    """
    path = directory / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no gradient store in {str(directory)!r}: {INDEX_NAME} is missing."
        )
    try:
        index = read_json(path, Index)
    except ValueError as error:
        raise StoreError(str(error)) from error
    if index["format"] != FORMAT:
        raise StoreError(f"{path}: not the index of a gradient store.")
    if index["format_version"] not in (FORMAT_VERSION, FORMAT_VERSION_WITH_GROUPS):
        raise StoreError(
            f"{path}: format version {index['format_version']}, this package reads "
            f"{FORMAT_VERSION} and {FORMAT_VERSION_WITH_GROUPS}. Capture the gradients again."
        )
    files = [entry["file"] for entry in index["shards"]]
    if index["vectors"]:
        files.append(index["vectors"]["file"])
    for file in files:
        if Path(file).name != file:
            raise StoreError(f"{path}: file {file!r} leaves the directory.")
    tasks = {(task["name"], role_of(task)) for task in index["tasks"]}
    if len(tasks) != len(index["tasks"]):
        raise StoreError(f"{path}: damaged (a task is listed twice).")
    for entry in index["shards"]:
        if (entry["task"], role_of(entry)) not in tasks:
            raise StoreError(f"{path}: a shard of task {entry['task']!r}, which is not listed.")
        if entry["first_row"] < 0 or entry["num_examples"] < 1:
            raise StoreError(f"{path}: damaged (a shard of {entry['num_examples']} rows).")
    captured = {(entry["task"], role_of(entry)) for entry in index["shards"]}
    if index["complete"] and captured != tasks:
        raise StoreError(f"{path}: damaged (complete, but not all tasks have a shard).")
    return index


def shard_columns(scalars: Sequence[str]) -> dict[str, str]:
    """Name and type of every column of a shard."""
    columns = {
        "example_ids": "I64",
        "losses": "F32",
        "num_label_tokens": "I64",
        "example_weights": "F64",
    }
    return columns | {
        f"{part}.{name}": "F32" for name in scalars for part in ("outputs", "gradients")
    }


def as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in the type in which it is stored."""
    return np.ascontiguousarray(array, DTYPES[dtype])


def checksum(arrays: Arrays) -> str:
    """Checksum of arrays and their names, in whatever file they are."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def in_one_file(entries: list[ShardEntry], file: str) -> list[ShardEntry]:
    """The entries of shards whose rows follow each other in ``file``."""
    ends = np.cumsum([entry["num_examples"] for entry in entries]).tolist()
    return [
        {**entry, "file": file, "first_row": end - entry["num_examples"]}
        for entry, end in zip(entries, ends, strict=True)
    ]


def read_merged(directory: Path, entries: list[ShardEntry], scalars: list[str]) -> Arrays:
    """Map the merged rows of some shards into memory, and check every shard.

    Raises:
        StoreError: they are not merged, or a shard is damaged.
    """
    if not entries or entries != in_one_file(entries, entries[0]["file"]):
        raise StoreError(f"{directory / INDEX_NAME}: damaged (not all shards are merged).")
    for entry in entries:
        check_shard(directory, entry, scalars)
    return map_arrays(directory / entries[0]["file"])


def check_shard(directory: Path, entry: ShardEntry, scalars: list[str]) -> None:
    """Compare one shard with its checksum, in whatever file it is.

    Raises:
        StoreError: they differ, or the file cannot be read.
    """
    path = directory / entry["file"]
    rows = map_shard(directory, entry)
    expected = shard_columns(scalars)
    if set(rows) != set(expected):
        raise StoreError(f"{path}: holds {sorted(rows)}, expected {sorted(expected)}.")
    if checksum(rows) != entry["sha256"]:
        first, last = entry["first_row"], entry["first_row"] + entry["num_examples"] - 1
        raise StoreError(
            f"{path}: damaged (the checksum of rows {first} to {last}, of {role_of(entry)} "
            f"{entry['task']!r}, differs from the index). Capture into the same directory again: "
            "undamaged shards are kept."
        )


def map_shard(directory: Path, entry: ShardEntry) -> Arrays:
    """Map the rows of one shard into memory."""
    rows = slice(entry["first_row"], entry["first_row"] + entry["num_examples"])
    return {name: array[rows] for name, array in map_arrays(directory / entry["file"]).items()}


def read_vectors(directory: Path, entry: VectorsEntry | None) -> Arrays:
    """Map a store's vectors into memory, and check them; empty if it has none.

    Raises:
        StoreError: they are damaged.
    """
    if entry is None:
        return {}
    path = directory / entry["file"]
    vectors = map_arrays(path)
    if checksum(vectors) != entry["sha256"]:
        raise StoreError(f"{path}: damaged (its checksum differs from the index).")
    return vectors


def map_arrays(path: Path) -> Arrays:
    """Map a safetensors file into memory, read only; its own package would copy the arrays.

    Raises:
        StoreError: the file is damaged, or cannot be read.
    """
    try:
        content = np.memmap(path, np.uint8, mode="r")
        start = 8 + min(int.from_bytes(content[:8].tobytes(), "little"), MAX_HEADER_BYTES)
        header = json.loads(content[8:start].tobytes())
        size = start + max(array["data_offsets"][1] for array in header.values())
        if size != len(content):
            raise ValueError(f"{len(content)} bytes long, expected {size}")
        return {
            name: content[start:][slice(*array["data_offsets"])]
            .view(DTYPES[array["dtype"]])
            .reshape(array["shape"])
            for name, array in header.items()
        }
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: damaged, or not a safetensors file ({error}).") from error
