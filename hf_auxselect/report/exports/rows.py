"""``rows.jsonl``: which rows the rest of a run reads, and how often. The exact export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

ROWS_NAME = "rows.jsonl"

_CHUNK = 10_000
"""Lines that are in memory at once; a convention."""


def row_lines(
    task_names: Sequence[str], indices_K: Sequence[np.ndarray], reads: np.ndarray
) -> Iterator[bytes]:
    """A line of JSON for each row that is read, task after task.

    Args:
        task_names: the K tasks.
        indices_K: int64 arrays, rows of the training set that belong to each task, ascending.
        reads: int64 [N], how often each row of the training set is read.

    Yields:
        Lines such as ``{"task": "sums", "row": 3, "index": 51, "reads": 2}``, some at a time: the
        fourth row of the task is row 51 of the training set, and is read twice.
    """
    for name, indices in zip(task_names, indices_K, strict=True):
        rows = np.flatnonzero(reads[indices])
        start = f'{{"task": {json.dumps(name)}, "row": '
        for first in range(0, len(rows), _CHUNK):
            some = rows[first : first + _CHUNK]
            columns = (some, indices[some], reads[indices[some]])
            numbers = zip(*(column.tolist() for column in columns), strict=True)
            lines = (f'{start}{row}, "index": {i}, "reads": {n}}}\n' for row, i, n in numbers)
            yield "".join(lines).encode()
