"""Writing a gradient store: shard by shard while gradients are captured, then merged.

Every file is written under a temporary name and renamed, and the index is renewed after each shard
and after the merge, before the files that it no longer lists are removed. An interrupted pass so
leaves a valid, incomplete store that can be completed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from hf_auxselect.files import JsonDict, to_json, write_atomically
from hf_auxselect.store.format import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    FORMAT_VERSION_WITH_GROUPS,
    INDEX_NAME,
    Arrays,
    Index,
    Role,
    ShardEntry,
    StoreError,
    TaskEntry,
    VectorsEntry,
    as_stored,
    check_shard,
    checksum,
    in_one_file,
    map_shard,
    read_index,
    read_vectors,
    role_of,
    shard_columns,
)
from hf_auxselect.store.records import is_integer_vector

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """A contiguous part of one task's examples, captured, written and checked as one.

    Attributes:
        task: name of the task, of the target or of the group.
        role: which of the three it is.
        example_ids: ids of the examples, in order.
    """

    task: str
    role: Role = "task"
    example_ids: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the shard holds, by which a later pass recognises it on disk."""
        # Before there were groups this was whether it is the target's.
        kind = self.role if self.role == "group" else self.role == "target"
        content = f"{kind}/{self.task}/{self.example_ids}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class StoreWriter:
    """Writes a store shard by shard, keeping what an interrupted or an earlier pass has left.

    Args:
        directory: where the store goes; created if need be. Shards found there that are not wanted,
            or of another capture (other ``metadata``), are removed, since their numbers do not
            belong together.
        scalars: names of the differentiated scalars.
        tasks: an entry for each task, the target and each group; see
            :func:`hf_auxselect.store.format.task_entry`.
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
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shards = list(shards)
        has_groups = any(role_of(task) == "group" for task in tasks)
        self._index: Index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION_WITH_GROUPS if has_groups else FORMAT_VERSION,
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
        columns = shard_columns(self._index["scalars"])
        arrays = {name: as_stored(array, columns[name]) for name, array in arrays.items()}
        file = f"{shard.fingerprint}.safetensors"
        write_atomically(self._directory / file, save(arrays))
        entry: ShardEntry = {
            "fingerprint": shard.fingerprint,
            "task": shard.task,
            "target": shard.role == "target",
            "file": file,
            "first_row": 0,
            "num_examples": len(shard.example_ids),
            "sha256": checksum(arrays),
        }
        if shard.role == "group":
            entry["group"] = True
        self._written[shard.fingerprint] = entry
        self._write_index(complete=False)
        if not self.pending:
            self._settle()

    def _settle(self) -> None:
        """Merge the shards if all are there, renew the index, remove what it does not list."""
        if not self.pending:
            # All tasks share a file; the target has its own, and so has each group.
            parts: dict[tuple[Role, str], list[ShardSpec]] = {}
            for shard in self._shards:
                name = shard.task if shard.role == "group" else ""
                parts.setdefault((shard.role, name), []).append(shard)
            for (role, _), shards in parts.items():
                self._merge(role, shards)
        self._write_index(complete=not self.pending)
        listed = {entry["file"] for entry in self._written.values()}
        if self._index["vectors"]:
            listed.add(self._index["vectors"]["file"])
        # What a killed process was writing is not listed either.
        for file in [*self._directory.glob("*.safetensors"), *self._directory.glob(".*.tmp")]:
            if file.name not in listed:
                file.unlink()

    def _merge(self, role: Role, shards: list[ShardSpec]) -> None:
        """Put the rows of shards, in order, into one file, unless that is where they are."""
        fingerprints = [shard.fingerprint for shard in shards]
        # Another order of other shards gets another name, so that what the index on disk says of
        # the files that it lists stays true until it is renewed.
        name = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16]
        file = f"{'tasks' if role == 'task' else role}.{name}.safetensors"
        entries = [self._written[fingerprint] for fingerprint in fingerprints]
        merged = in_one_file(entries, file)
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
            index = read_index(self._directory)
        except FileNotFoundError:
            return {}
        except StoreError as error:
            logger.warning("%s The files there are replaced.", error)
            return {}
        same_scalars = index["scalars"] == self._index["scalars"]
        if not same_scalars or index["metadata"] != self._index["metadata"]:
            return {}
        wanted = {shard.fingerprint for shard in self._shards}
        written = {}
        for entry in index["shards"]:
            if entry["fingerprint"] in wanted:
                try:
                    check_shard(self._directory, entry, index["scalars"])
                except StoreError:
                    continue  # damaged: it is captured again
                written[entry["fingerprint"]] = entry
        return written


def add_vectors(directory: str | Path, vectors: Mapping[str, np.ndarray]) -> None:
    """Add arrays that belong to the whole store to one that is complete."""
    directory = Path(directory)
    index = read_index(directory)
    before = index["vectors"]
    index["vectors"] = _write_vectors(directory, {**read_vectors(directory, before), **vectors})
    write_atomically(directory / INDEX_NAME, to_json(index))
    if before and before != index["vectors"]:
        (directory / before["file"]).unlink(missing_ok=True)


def _write_vectors(directory: Path, vectors: Mapping[str, np.ndarray]) -> VectorsEntry:
    arrays = {
        name: as_stored(vector, "I64" if is_integer_vector(name) else "F32")
        for name, vector in vectors.items()
    }
    digest = checksum(arrays)
    # Named after what it holds: the index on disk may still list another.
    file = f"vectors.{digest[:16]}.safetensors"
    write_atomically(directory / file, save(arrays))
    return {"file": file, "sha256": digest}


def _merged_content(directory: Path, entries: list[ShardEntry]) -> Iterator[bytes | memoryview]:
    """A safetensors file of the rows of all shards, as pieces of at most one shard's column."""
    first = map_shard(directory, entries[0])
    num_rows = sum(entry["num_examples"] for entry in entries)
    types = {dtype: name for name, dtype in DTYPES.items()}
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
            yield map_shard(directory, entry)[name].data
