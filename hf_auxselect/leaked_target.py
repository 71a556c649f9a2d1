"""Warns of rows of the target that are trained on, before the first step."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.fingerprint import digest
from hf_auxselect.plan import Plan
from hf_auxselect.seeds import random_permutation
from hf_auxselect.trainer import data

logger = logging.getLogger(__name__)

SECONDS_TO_COMPARE = 30.0
"""Time limit of the comparison of training rows with the target's; a convention."""
_CHUNK = 1000
"""Training rows that the comparison reads at once; a convention."""
_TOO_OPTIMISTIC = (
    "the estimates are about rows that are trained on, too optimistic for new ones. Hold rows out "
    "for the target."
)


def warn_of_leaked_target(plan: Plan, task_column: str) -> None:
    """Warn if rows of a target or of a group are trained on: of which tasks, and how many.

    Rows are compared by the values of the columns that both sets have and the model reads (see
    :func:`hf_auxselect.fingerprint.digest`). Training rows are looked at for ``SECONDS_TO_COMPARE``
    at most, in chunks from all over the training set.
    """
    seconds = SECONDS_TO_COMPARE / (len(plan.targets) + len(plan.groups))
    for target in plan.targets.values():
        what = "the target" if len(plan.targets) == 1 else f"the target {target.name!r}"
        _warn_of_leak(plan, target, what, task_column, seconds)
    for group in plan.groups:
        _warn_of_leak(plan, group, f"the group {group.name!r}", task_column, seconds)


def _warn_of_leak(
    plan: Plan, examples: TaskExamples, what: str, task_column: str, seconds: float
) -> None:
    train, target = plan.examples[0].rows, examples.rows
    assert isinstance(train, data.ModelRows) and isinstance(target, data.ModelRows)
    columns = train.input_columns(train.columns & target.columns, task_column)
    if not columns:
        return
    copies = collections.Counter(_hashes(target, range(len(target)), columns))
    found: list[set[bytes]] = [set() for _ in plan.tasks.names]
    found_rows = np.zeros(len(found), np.int64)
    starts = range(0, len(train), _CHUNK)
    deadline, num_read = time.monotonic() + seconds, 0
    for chunk in random_permutation(len(starts), plan.seed, "rows compared with the target"):
        ids = range(starts[chunk], min(starts[chunk] + _CHUNK, len(train)))
        for i, row_hash in zip(ids, _hashes(train, ids, columns), strict=True):
            if row_hash in copies:
                task = plan.tasks.ids[train.packed_rows[i]]
                found[task].add(row_hash)
                found_rows[task] += 1
            num_read += 1
            if time.monotonic() > deadline:
                break
        if time.monotonic() > deadline:
            break
    counts = [sum(copies[row_hash] for row_hash in own) for own in found]
    for name, count, rows, size in zip(
        plan.tasks.names, counts, found_rows, plan.tasks.counts, strict=True
    ):
        if count == len(target) == rows == size:
            logger.warning(
                "%s equals the training task %r row for row: %s", what, name, _TOO_OPTIMISTIC
            )
            return
    if any(counts):
        total = sum(copies[row_hash] for row_hash in set().union(*found))
        logger.warning(
            "%d of %s's %d rows are also rows of training tasks (%s)%s: %s",
            total,
            what,
            len(target),
            ", ".join(
                f"{count} of task {name!r}"
                for name, count in zip(plan.tasks.names, counts, strict=True)
                if count
            ),
            f", of whose {len(train)} rows {num_read} were looked at"
            if num_read < len(train)
            else "",
            _TOO_OPTIMISTIC,
        )


def _hashes(rows: data.ModelRows, ids: range, columns: Sequence[str]) -> Iterator[bytes]:
    """A hash of each of some consecutive examples, by the values of some columns."""
    for row in rows.stored(ids, columns):
        yield digest(*(row.get(name) for name in columns))
