"""The gradient store: what the gradient pass measured, on disk and in memory.

A store is a directory of safetensors files and an ``index.json`` that lists the shards, with the
file, the rows and the checksum of each. A shard is first a file of its own; once all are there, the
shards of the tasks are merged into one file, and those of the target into another, which are mapped
into memory and never read as a whole. Every file is written under a temporary name and renamed, and
the index is renewed after each shard and after the merge, before what it no longer lists is
removed: an interrupted pass leaves a valid, incomplete store that can be completed.

Shapes: N examples, K tasks, D projection_dim.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
from safetensors.numpy import save

from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically

logger = logging.getLogger(__name__)

FORMAT = "hf_auxselect.gradients"
FORMAT_VERSION = 2
INDEX_NAME = "index.json"

Arrays = dict[str, np.ndarray]

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
}
"""What a store holds, by the names of safetensors."""

_MAX_HEADER_BYTES = 2**20
"""A longer header of a safetensors file is damage, and not worth reading."""


class StoreError(ValueError):
    """A gradient store that is damaged, incomplete or of a foreign format; names the file."""


class TaskEntry(TypedDict):
    """A task, or the target, in the index."""

    name: str
    target: bool
    num_rows: int
    """Of the dataset; not all need be captured."""


class ShardEntry(TypedDict):
    """A shard in the index."""

    fingerprint: str
    task: str
    target: bool
    file: str
    first_row: int
    """Within the file."""
    num_examples: int
    sha256: str


class VectorsEntry(TypedDict):
    """The file of vectors in the index."""

    file: str
    sha256: str


class Index(TypedDict):
    """What is written to ``index.json``."""

    format: str
    format_version: int
    complete: bool
    scalars: list[str]
    tasks: list[TaskEntry]
    metadata: JsonDict
    vectors: VectorsEntry | None
    shards: list[ShardEntry]


class GradientStore:
    """Projected gradients, outputs and losses of examples at the anchor, grouped by task.

    Rows are ordered by task, then by example id; the arrays are read only. Made by
    :func:`hf_auxselect.capture_gradients`, read back by :meth:`load`. Gradients that were loaded
    stay on disk, mapped into memory: take some rows at a time to use little of it.

    Attributes:
        task_names: names of the K tasks, in the order of ``task_ids``.
        task_ids: int64 [N], task of each example.
        example_ids: int64 [N], row number of the example in the dataset that was given.
        losses: float32 [N], nats per label token, mean over the example's label tokens.
        num_label_tokens: int64 [N].
        example_weights: float64 [N], share of the example in the loss of its task; sums to 1
            within a task. In proportion to the label tokens, unless given otherwise.
        task_sizes: int64 [K], rows that each task has for training (the store may hold fewer).
        metadata: what is known of the capture: projection, anchor, optimizer, the training to come.
        vectors: float32 [D] each, projected: the optimizer's ``momentum`` and the ``parameters``,
            in the optimizer's coordinates; empty if the store was captured without it. And, where
            an estimator asked for it, what :func:`hf_auxselect.capture.probes.look_ahead` adds;
            before a restart also ``initial_losses``, of the target's examples that are read again,
            at the initial parameters.
    """

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        task_ids: np.ndarray,
        example_ids: np.ndarray,
        losses: np.ndarray,
        num_label_tokens: np.ndarray,
        scalars: Mapping[str, tuple[np.ndarray, np.ndarray]],
        example_weights: np.ndarray | None = None,
        task_sizes: Sequence[int] | np.ndarray | None = None,
        target: GradientStore | None = None,
        metadata: JsonDict | None = None,
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.task_names = list(task_names)
        self.task_ids = _read_only(task_ids, np.int64)
        self.example_ids = _read_only(example_ids, np.int64)
        self.losses = _read_only(losses, np.float32)
        self.num_label_tokens = _read_only(num_label_tokens, np.int64)
        self._scalars = {
            name: (_read_only(outputs, np.float32), _read_only(gradients, np.float32))
            for name, (outputs, gradients) in scalars.items()
        }
        if task_sizes is None:
            task_sizes = np.bincount(self.task_ids, minlength=len(self.task_names))
        self.task_sizes = _read_only(task_sizes, np.int64)
        weights = self.num_label_tokens if example_weights is None else example_weights
        totals = self._sum_by_task(weights)
        for name, total in zip(self.task_names, totals, strict=True):
            if not total > 0:
                raise ValueError(
                    f"task {name!r} has no label tokens; nothing could be learnt from it."
                )
        self.example_weights = _read_only(weights / totals[self.task_ids])
        self._target = target
        self.metadata: JsonDict = metadata or {}
        self.vectors = {name: _read_only(v, np.float32) for name, v in (vectors or {}).items()}

    def with_vectors(self, vectors: Arrays) -> GradientStore:
        """The same store with further vectors, for what :func:`add_vectors` writes."""
        store = copy.copy(self)
        store.vectors = self.vectors | {n: _read_only(v, np.float32) for n, v in vectors.items()}
        return store

    def __len__(self) -> int:
        return len(self.task_ids)

    def __repr__(self) -> str:
        return (
            f"GradientStore({len(self)} examples of {len(self.task_names)} tasks, "
            f"projection_dim={self.gradients.shape[1]}, scalars={list(self.scalars)})"
        )

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the differentiated scalars; the first is that of ``gradients``."""
        return tuple(self._scalars)

    def scalar(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Outputs float32 [N] and projected gradients float32 [N, D] of one differentiated scalar.

        Raises:
            KeyError: the scalar was not captured; the message lists those that were.
        """
        if name not in self._scalars:
            raise KeyError(
                f"scalar {name!r} was not captured; this store has {list(self.scalars)}."
            )
        return self._scalars[name]

    @property
    def outputs(self) -> np.ndarray:
        """float32 [N]: the first scalar at the anchor."""
        return self.scalar(self.scalars[0])[0]

    @property
    def gradients(self) -> np.ndarray:
        """float32 [N, D]: the projected gradient of the first scalar."""
        return self.scalar(self.scalars[0])[1]

    @property
    def target(self) -> GradientStore:
        """The target's examples: a store of the same form with one task."""
        if self._target is None:
            raise AttributeError("this is the store of a target; it has no target of its own.")
        return self._target

    @property
    def examples_per_row(self) -> np.ndarray:
        """float64 [K]: mean examples in a row that training draws; 1 but where rows are packed."""
        packed = (self.metadata.get("training") or {}).get("examples_per_row") or {}
        return np.array([float(packed.get(name, 1.0)) for name in self.task_names])

    @cached_property
    def task_losses(self) -> np.ndarray:
        """float64 [K]: loss of each task at the anchor, nats per label token."""
        return self._sum_by_task(self.example_weights * self.losses)

    def _sum_by_task(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.task_ids, weights=values, minlength=len(self.task_names))

    @classmethod
    def load(cls, directory: str | Path) -> GradientStore:
        """Map a complete store into memory, and check every shard against its checksum.

        Raises:
            FileNotFoundError: there is no store in ``directory``.
            StoreError: a file is damaged, missing or of a foreign format; the message names it, and
                the rows and the task where it is damaged.
        """
        directory = Path(directory)
        index = _read_index(directory)
        if not index["complete"]:
            raise StoreError(
                f"{directory / INDEX_NAME}: the gradient pass was interrupted. Resume the run (or "
                "capture into the same directory again): it goes on where it stopped."
            )

        def assemble(is_target: bool, target: GradientStore | None) -> GradientStore:
            tasks = [task for task in index["tasks"] if task["target"] == is_target]
            shards = [entry for entry in index["shards"] if entry["target"] == is_target]
            position = {task["name"]: k for k, task in enumerate(tasks)}
            column = _read_part(directory, shards, index["scalars"])
            return cls(
                task_names=list(position),
                task_ids=np.repeat(
                    [position[entry["task"]] for entry in shards],
                    [entry["num_examples"] for entry in shards],
                ),
                example_ids=column["example_ids"],
                losses=column["losses"],
                num_label_tokens=column["num_label_tokens"],
                example_weights=column["example_weights"],
                scalars={
                    name: (column[f"outputs.{name}"], column[f"gradients.{name}"])
                    for name in index["scalars"]
                },
                task_sizes=[task["num_rows"] for task in tasks],
                target=target,
                metadata=index["metadata"],
                vectors=vectors,
            )

        vectors = _read_vectors(directory, index["vectors"]) if index["vectors"] else {}
        return assemble(False, assemble(True, None))


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A contiguous part of one task's examples, captured, written and checked as one."""

    task: str
    is_target: bool
    example_ids: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Tells what the shard holds, so that a later pass recognises it on disk."""
        content = f"{self.is_target}/{self.task}/{self.example_ids}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class StoreWriter:
    """Writes a store shard by shard, keeping what an interrupted or an earlier pass has left.

    Args:
        directory: where the store goes; created if need be. Shards found there that are not wanted,
            or of another capture (other ``metadata``), are removed, since their numbers do not
            belong together.
        scalars: names of the differentiated scalars.
        tasks: a dict with ``name``, ``target`` (bool) and ``num_rows`` for each task.
        shards: all that the store is to hold, in the order of the tasks.
        metadata: identifies the capture; equal metadata means that equal shards hold equal numbers.
        vectors: arrays that belong to the whole store.

    Attributes:
        pending: the shards that are still to be captured, in order.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        scalars: Sequence[str],
        tasks: Sequence[TaskEntry],
        shards: Sequence[ShardSpec],
        metadata: JsonDict,
        vectors: Arrays | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shards = list(shards)
        self._index: Index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": False,
            "scalars": list(scalars),
            "tasks": list(tasks),
            "metadata": metadata,
            "vectors": None,
            "shards": [],
        }
        self._written = self._find_written()
        if vectors:
            self._index["vectors"] = _write_vectors(self._directory, vectors)
        self._settle()

    @property
    def pending(self) -> list[ShardSpec]:
        return [shard for shard in self._shards if shard.fingerprint not in self._written]

    def write(self, shard: ShardSpec, arrays: Arrays) -> None:
        """Store one shard: example_ids, losses, num_label_tokens, example_weights, scalars.

        The last one completes the store, which takes as much space again while shards are merged.
        """
        columns = _columns(self._index["scalars"])
        arrays = {name: _as_stored(array, columns[name]) for name, array in arrays.items()}
        file = f"{shard.fingerprint}.safetensors"
        write_atomically(self._directory / file, save(arrays))
        self._written[shard.fingerprint] = {
            "fingerprint": shard.fingerprint,
            "task": shard.task,
            "target": shard.is_target,
            "file": file,
            "first_row": 0,
            "num_examples": len(shard.example_ids),
            "sha256": _digest(arrays),
        }
        self._write_index(complete=False)
        if not self.pending:
            self._settle()

    def _settle(self) -> None:
        """Merge the shards if all are there, renew the index, remove what it does not list."""
        if not self.pending:
            self._merge(is_target=False)
            self._merge(is_target=True)
        self._write_index(complete=not self.pending)
        listed = {entry["file"] for entry in self._written.values()}
        if self._index["vectors"]:
            listed.add(self._index["vectors"]["file"])
        # What a killed process was writing is not listed either.
        for file in [*self._directory.glob("*.safetensors"), *self._directory.glob(".*.tmp")]:
            if file.name not in listed:
                file.unlink()

    def _merge(self, *, is_target: bool) -> None:
        """Put the rows of all shards, in order, into one file, unless that is where they are."""
        fingerprints = [s.fingerprint for s in self._shards if s.is_target == is_target]
        # Another order of other shards gets another name, so that what the index on disk says of
        # the files that it lists stays true until it is renewed.
        name = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
        file = f"{'target' if is_target else 'tasks'}.{name}.safetensors"
        entries = [self._written[fingerprint] for fingerprint in fingerprints]
        merged = _in_one_file(entries, file)
        if merged != entries:
            write_atomically(self._directory / file, _merged_content(self._directory, entries))
            self._written.update(zip(fingerprints, merged, strict=True))

    def _write_index(self, *, complete: bool) -> None:
        self._index["complete"] = complete
        self._index["shards"] = [
            self._written[shard.fingerprint]
            for shard in self._shards
            if shard.fingerprint in self._written
        ]
        write_atomically(self._directory / INDEX_NAME, to_json(self._index))

    def _find_written(self) -> dict[str, ShardEntry]:
        try:
            index = _read_index(self._directory)
        except FileNotFoundError:
            return {}
        except StoreError as error:
            logger.warning("%s What is there is replaced.", error)
            return {}
        same_scalars = index["scalars"] == self._index["scalars"]
        if not same_scalars or index["metadata"] != self._index["metadata"]:
            return {}
        wanted = {shard.fingerprint for shard in self._shards}
        written = {}
        for entry in index["shards"]:
            if entry["fingerprint"] in wanted:
                try:
                    _check_rows(self._directory, entry, index["scalars"])
                except StoreError:
                    continue  # damaged: it is captured again
                written[entry["fingerprint"]] = entry
        return written


def add_vectors(directory: str | Path, vectors: Arrays) -> None:
    """Add arrays that belong to the whole store to one that is complete."""
    directory = Path(directory)
    index = _read_index(directory)
    before = index["vectors"]
    known = _read_vectors(directory, before) if before else {}
    index["vectors"] = _write_vectors(directory, {**known, **vectors})
    write_atomically(directory / INDEX_NAME, to_json(index))
    if before and before != index["vectors"]:
        (directory / before["file"]).unlink(missing_ok=True)


def evenly_spread(count: int, at_most: int) -> np.ndarray:
    """Places of at most so many of ``count`` examples, spread evenly over all: int64 [.]."""
    size = min(count, at_most)
    return np.arange(size) * (count - 1) // max(size - 1, 1)


def _read_only(array: np.ndarray | Sequence[int], dtype: type | None = None) -> np.ndarray:
    view = np.asarray(array, dtype).view()
    view.flags.writeable = False
    return view


def _read_index(directory: Path) -> Index:
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
    if index["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {index['format_version']}, this package reads "
            f"{FORMAT_VERSION}. Capture the gradients again."
        )
    files = [entry["file"] for entry in index["shards"]]
    if index["vectors"]:
        files.append(index["vectors"]["file"])
    for file in files:
        if Path(file).name != file:
            raise StoreError(f"{path}: file {file!r} leaves the directory.")
    tasks = {(task["name"], task["target"]) for task in index["tasks"]}
    for entry in index["shards"]:
        if (entry["task"], entry["target"]) not in tasks:
            raise StoreError(f"{path}: a shard of task {entry['task']!r}, which is not listed.")
        if entry["first_row"] < 0 or entry["num_examples"] < 1:
            raise StoreError(f"{path}: damaged (a shard of {entry['num_examples']} rows).")
    return index


def _columns(scalars: Sequence[str]) -> dict[str, str]:
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


def _as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(array, _DTYPES[dtype])


def _digest(arrays: Arrays) -> str:
    """Checksum of arrays, whatever file they are in."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _in_one_file(entries: list[ShardEntry], file: str) -> list[ShardEntry]:
    """The shards' entries in the index when their rows follow each other in ``file``."""
    ends = np.cumsum([entry["num_examples"] for entry in entries]).tolist()
    return [
        {**entry, "file": file, "first_row": end - entry["num_examples"]}
        for entry, end in zip(entries, ends, strict=True)
    ]


def _merged_content(directory: Path, entries: list[ShardEntry]) -> Iterator[bytes | memoryview]:
    """A safetensors file of the rows of all shards, as pieces of at most one shard's column."""
    first = _map_rows(directory, entries[0])
    num_rows = sum(entry["num_examples"] for entry in entries)
    types = {dtype: name for name, dtype in _DTYPES.items()}
    # The widest types come first, and the header is padded, so that all numbers are aligned.
    names = sorted(first, key=lambda name: (-first[name].itemsize, name))
    header, end = {}, 0
    for name in names:
        dtype, shape = first[name].dtype, [num_rows, *first[name].shape[1:]]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": types[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        for entry in entries:
            yield _map_rows(directory, entry)[name].data


def _read_part(directory: Path, entries: list[ShardEntry], scalars: list[str]) -> Arrays:
    """Map the merged rows of the tasks, or of the target, and check every shard of them."""
    if not entries or entries != _in_one_file(entries, entries[0]["file"]):
        raise StoreError(f"{directory / INDEX_NAME}: damaged (not all shards are merged).")
    for entry in entries:
        _check_rows(directory, entry, scalars)
    return _map_arrays(directory / entries[0]["file"])


def _check_rows(directory: Path, entry: ShardEntry, scalars: list[str]) -> None:
    """Check one shard, in whatever file it is."""
    path = directory / entry["file"]
    rows = _map_rows(directory, entry)
    expected = _columns(scalars)
    if set(rows) != set(expected):
        raise StoreError(f"{path}: holds {sorted(rows)}, expected {sorted(expected)}.")
    if _digest(rows) != entry["sha256"]:
        first, last = entry["first_row"], entry["first_row"] + entry["num_examples"] - 1
        kind = "target" if entry["target"] else "task"
        raise StoreError(
            f"{path}: damaged (the checksum of rows {first} to {last}, of {kind} "
            f"{entry['task']!r}, differs from the index). Capture into the same directory again: "
            "what is whole is kept."
        )


def _map_rows(directory: Path, entry: ShardEntry) -> Arrays:
    rows = slice(entry["first_row"], entry["first_row"] + entry["num_examples"])
    return {name: array[rows] for name, array in _map_arrays(directory / entry["file"]).items()}


def _read_vectors(directory: Path, entry: VectorsEntry) -> Arrays:
    path = directory / entry["file"]
    vectors = _map_arrays(path)
    if _digest(vectors) != entry["sha256"]:
        raise StoreError(f"{path}: damaged (its checksum differs from the index).")
    return vectors


def _write_vectors(directory: Path, vectors: Arrays) -> VectorsEntry:
    vectors = {name: _as_stored(vector, "F32") for name, vector in vectors.items()}
    checksum = _digest(vectors)
    # Named after what it holds: the index on disk may still list another.
    file = f"vectors.{checksum[:16]}.safetensors"
    write_atomically(directory / file, save(vectors))
    return {"file": file, "sha256": checksum}


def _map_arrays(path: Path) -> Arrays:
    """Map a safetensors file into memory, read only; its own package would copy the arrays."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
        start = 8 + min(int.from_bytes(content[:8].tobytes(), "little"), _MAX_HEADER_BYTES)
        header = json.loads(content[8:start].tobytes())
        size = start + max(array["data_offsets"][1] for array in header.values())
        if size != len(content):
            raise ValueError(f"{len(content)} bytes long, expected {size}")
        return {
            name: content[start:][slice(*array["data_offsets"])]
            .view(_DTYPES[array["dtype"]])
            .reshape(array["shape"])
            for name, array in header.items()
        }
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: damaged, or not a safetensors file ({error}).") from error
