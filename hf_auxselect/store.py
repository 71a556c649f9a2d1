"""The gradient store: what the gradient pass measured, on disk and in memory.

A store is a directory of safetensors shards and an ``index.json`` that lists them with their
checksums. Every file is written under a temporary name and renamed, and the index is renewed after
each shard, so that an interrupted pass leaves a valid, incomplete store that can be completed.

Shapes: N examples, K tasks, D projection_dim.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

FORMAT = "hf_auxselect.gradients"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"

JsonDict = dict[str, Any]
Arrays = dict[str, np.ndarray]


class StoreError(ValueError):
    """A gradient store that is damaged, incomplete or of a foreign format; names the file."""


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file under a temporary name and rename it: it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(content: JsonDict) -> str:
    """Render a JSON file of this package: readable, sorted as given, never NaN."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class GradientStore:
    """Projected gradients, outputs and losses of examples at the anchor, grouped by task.

    Rows are ordered by task, then by example id; the arrays are read only. Made by
    :func:`hf_auxselect.capture_gradients`, read back by :meth:`load`.

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
        vectors: float32 [D] each, projected: the optimizer's ``momentum``, the ``parameters`` and
            the ``initial_displacement`` (initial values minus anchor), in the optimizer's
            coordinates; empty if the store was captured without it.
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

    @cached_property
    def task_losses(self) -> np.ndarray:
        """float64 [K]: loss of each task at the anchor, nats per label token."""
        return self._sum_by_task(self.example_weights * self.losses)

    def _sum_by_task(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.task_ids, weights=values, minlength=len(self.task_names))

    @classmethod
    def load(cls, directory: str | Path) -> GradientStore:
        """Read a complete store and check every shard against its checksum.

        Raises:
            FileNotFoundError: there is no store in ``directory``.
            StoreError: a file is damaged, missing or of a foreign format; the message names it.
        """
        directory = Path(directory)
        index = _read_index(directory)
        if not index["complete"]:
            raise StoreError(
                f"{directory / INDEX_NAME}: the gradient pass was interrupted. Resume the run (or "
                "capture into the same directory again): it goes on where it stopped."
            )

        def assemble(tasks: list[JsonDict], target: GradientStore | None) -> GradientStore:
            parts = [
                (position, _read_shard(directory, entry, index))
                for position, task in enumerate(tasks)
                for entry in index["shards"]
                if entry["task"] == task["name"] and entry["target"] == task["target"]
            ]
            column = {
                name: np.concatenate([part[name] for _, part in parts]) for name in parts[0][1]
            }
            return cls(
                task_names=[task["name"] for task in tasks],
                task_ids=np.repeat(
                    [position for position, _ in parts], [len(part["losses"]) for _, part in parts]
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

        vectors = _read_arrays(directory, index["vectors"]) if index["vectors"] else {}
        target = assemble([task for task in index["tasks"] if task["target"]], None)
        return assemble([task for task in index["tasks"] if not task["target"]], target)


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A contiguous part of one task's examples, captured and written as one file."""

    task: str
    is_target: bool
    example_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Tells what the shard holds, so that a resumed pass recognises it on disk."""
        content = f"{self.is_target}/{self.task}/{self.example_ids}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class StoreWriter:
    """Writes a store shard by shard, keeping what an interrupted pass has left.

    Args:
        directory: where the store goes; created if need be. Shards of another capture (other
            ``metadata``) found there are removed, since their numbers do not belong together.
        scalars: names of the differentiated scalars.
        tasks: a dict with ``name``, ``target`` (bool) and ``num_rows`` for each task.
        shards: all that the store is to hold, in order.
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
        tasks: Sequence[JsonDict],
        shards: Sequence[ShardSpec],
        metadata: JsonDict,
        vectors: Arrays | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shards = list(shards)
        self._index: JsonDict = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": False,
            "scalars": list(scalars),
            "tasks": list(tasks),
            "metadata": metadata,
            "vectors": None,
        }
        self._written = self._find_written()
        self._write_index()
        for file in self._directory.glob("*.safetensors"):
            if file.name not in {entry["file"] for entry in self._written.values()}:
                file.unlink()
        if vectors:
            self._index["vectors"] = self._write_arrays("vectors.safetensors", vectors)
            self._write_index()

    @property
    def pending(self) -> list[ShardSpec]:
        return [shard for shard in self._shards if shard.fingerprint not in self._written]

    def write(self, shard: ShardSpec, arrays: Arrays) -> None:
        """Store one shard: example_ids, losses, num_label_tokens, example_weights, scalars."""
        self._written[shard.fingerprint] = {
            **self._write_arrays(f"{shard.fingerprint}.safetensors", arrays),
            "task": shard.task,
            "target": shard.is_target,
            "num_examples": len(shard.example_ids),
        }
        self._write_index()

    def _write_arrays(self, file: str, arrays: Arrays) -> JsonDict:
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        write_atomically(self._directory / file, content)
        return {"file": file, "sha256": hashlib.sha256(content).hexdigest()}

    def _write_index(self) -> None:
        index = self._index | {
            "complete": not self.pending,
            "shards": [
                self._written[shard.fingerprint]
                for shard in self._shards
                if shard.fingerprint in self._written
            ],
        }
        write_atomically(self._directory / INDEX_NAME, to_json(index))

    def _find_written(self) -> dict[str, JsonDict]:
        try:
            index = _read_index(self._directory)
        except (FileNotFoundError, StoreError):
            return {}
        if any(index[key] != self._index[key] for key in ("scalars", "metadata")):
            return {}
        written = {}
        for entry in index["shards"]:
            try:
                _read_shard(self._directory, entry, index)
            except StoreError:
                continue  # damaged: it is captured again
            written[Path(entry["file"]).stem] = entry
        wanted = {shard.fingerprint for shard in self._shards}
        return {
            fingerprint: written[fingerprint] for fingerprint in written if fingerprint in wanted
        }


def _read_only(array: np.ndarray | Sequence[int], dtype: type | None = None) -> np.ndarray:
    view = np.asarray(array, dtype).view()
    view.flags.writeable = False
    return view


def _read_index(directory: Path) -> JsonDict:
    path = directory / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no gradient store in {str(directory)!r}: {INDEX_NAME} is missing."
        )
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict) or index["format"] != FORMAT:
            raise StoreError(f"{path}: not the index of a gradient store.")
        if index["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format version {index['format_version']}, this package reads "
                f"{FORMAT_VERSION}. Capture the gradients again."
            )
        for key, kind in {
            "complete": bool,
            "scalars": list,
            "tasks": list,
            "metadata": dict,
        }.items():
            if not isinstance(index[key], kind):
                raise StoreError(f"{path}: {key!r} is not a {kind.__name__}.")
        for entry in [*index["shards"], *([index["vectors"]] if index["vectors"] else [])]:
            if Path(entry["file"]).name != entry["file"]:
                raise StoreError(f"{path}: file {entry['file']!r} leaves the directory.")
            _ = entry["sha256"]
        for entry in index["shards"]:
            _ = entry["task"], entry["target"], entry["num_examples"]
        for task in index["tasks"]:
            _ = task["name"], task["target"], task["num_rows"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({type(error).__name__}: {error}).") from error
    return index


def _read_shard(directory: Path, entry: JsonDict, index: JsonDict) -> Arrays:
    arrays = _read_arrays(directory, entry)
    expected = {"example_ids", "losses", "num_label_tokens", "example_weights"}
    expected |= {f"{part}.{name}" for name in index["scalars"] for part in ("outputs", "gradients")}
    if set(arrays) != expected:
        path = directory / entry["file"]
        raise StoreError(f"{path}: holds {sorted(arrays)}, expected {sorted(expected)}.")
    return arrays


def _read_arrays(directory: Path, entry: JsonDict) -> Arrays:
    path = directory / entry["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from error
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise StoreError(f"{path}: damaged (its checksum differs from the index).")
    try:
        return load(content)
    except SafetensorError as error:
        raise StoreError(f"{path}: not a safetensors file ({error}).") from error
