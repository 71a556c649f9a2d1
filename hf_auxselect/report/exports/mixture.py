"""What every export promises: how many rows of each task one epoch of the mixture reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_auxselect._version import __version__
from hf_auxselect.report.content import ReportContent
from hf_auxselect.report.exports.sources import Source
from hf_auxselect.report.exports.syntax import quoted
from hf_auxselect.report.text import printable

MAX_REPEATS = 20
"""How often an epoch reads a row at most. A convention: some tools need an entry per repetition."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of one task in an epoch of the mixture."""

    task: str
    source: Source
    share: float
    """Fraction of the training examples, as the selection chose it."""
    examples: int
    """Rows of the source."""
    count: int
    """Rows that an epoch reads, repetitions included; at least 1."""

    @property
    def is_whole(self) -> bool:
        return self.count == self.examples

    @property
    def repeats(self) -> tuple[int, int]:
        """How often all rows are read, and how many are read once more."""
        return divmod(self.count, self.examples)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An epoch of the chosen mixture."""

    parts: Sequence[Part]
    """The selected tasks, in the order of the training set."""
    num_tasks: int
    created: str
    """When the selection was made: ISO 8601, UTC; may be empty."""
    epochs: float | None
    """How many of these epochs the steps after the switch are; None if it is not known."""
    is_packed: bool
    seed: int

    def header(self, tool: str, notes: Sequence[str], counts: Sequence[int] | None = None) -> str:
        """The comment at the top of a file.

        Args:
            tool: what reads the file.
            notes: sentences on how it reads it.
            counts: rows of each part that it will read, if they are not those of the mixture.
        """
        counts = counts or [part.count for part in self.parts]
        total = sum(counts)
        made = f"chosen {printable(self.created)}, " if self.created else ""
        lines = [
            f"Mixture of {len(self.parts)} of {self.num_tasks} tasks for {tool}.",
            f"({made}written by hf-auxselect {__version__})",
            "",
            f"One epoch reads {total} rows:",
            f"{'share':>9}{'chosen':>9}{'rows':>9}{'of':>9}  task",
        ]
        for part, count in zip(self.parts, counts, strict=True):
            shares = f"{100 * count / total:>8.4g}%{100 * part.share:>8.4g}%"
            lines.append(f"{shares}{count:>9}{part.examples:>9}  {quoted(part.task)}")
        if self.epochs is not None:
            lines.append(
                f"The steps after the selection are as long as {self.epochs:.4g} of these epochs."
            )
        if self.is_packed:
            lines += [
                "The run packed its rows. Its shares are of packed rows; these are of rows before",
                "packing, each of which is read as often as by the run.",
            ]
        for part in self.parts:
            if part.source.is_placeholder:
                lines.append(f"To do: replace the path {quoted(part.task)} by that of its data.")
        lines += ["", *notes]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def mixture_of(content: ReportContent, sources: Mapping[str, Mapping[str, Any]]) -> Mixture:
    """One epoch of the mixture that a report is about.

    The remaining steps can be cut into any number of epochs E: a task whose rows they read r times
    is then read r / E times per epoch. With E = max r no row is repeated within an epoch, but rows
    of the other tasks are left out; with E = min r no row is left out. Taken is the E between them
    that is closest to 1: an epoch then leaves out no row that the run reads, and repeats none that
    it need not. Where all tasks have the same r, as after the selection of a subset, an epoch is
    all their rows.

    Raises:
        ValueError: the report does not tell how many rows a task has; or a source is wrong.
    """
    unknown = [task for task in sources if task not in content.weights]
    if unknown:
        raise ValueError(
            f"sources names {unknown[0]!r}, which is no task of the report; its tasks are "
            f"{[*content.weights]}."
        )
    run, selected = content.run, content.selected
    rows = run.get("rows_per_task") or {task.name: task.rows for task in content.tasks}
    for name in selected:
        if rows.get(name, 0) < 1:
            raise ValueError(
                f"the report does not tell how many rows the task {name!r} has, so an export could "
                "not promise any counts. It was made without estimates, by an earlier version; "
                "select again."
            )
    packed = run.get("examples_per_row", {})
    examples = [max(round(rows[name] * packed.get(name, 1)), 1) for name in selected]
    shares = np.array([content.weights[name] for name in selected])
    to_read = run.get("rows_to_read") or sum(
        reads * rows.get(name, 0) for name, reads in run.get("reads_per_row", {}).items()
    )
    counts, epochs = _epoch(shares / [rows[name] for name in selected], examples, to_read)
    return Mixture(
        parts=[
            Part(
                task=name,
                source=Source.of(name, sources.get(name), examples[i]),
                share=content.weights[name],
                examples=examples[i],
                count=counts[i],
            )
            for i, name in enumerate(selected)
        ],
        num_tasks=len(content.weights),
        created=run.get("created", ""),
        epochs=epochs if to_read else None,
        is_packed=bool(packed),
        seed=run.get("seed", 0),
    )


def _epoch(
    share_per_row: np.ndarray, examples: Sequence[int], rows_to_read: float
) -> tuple[list[int], float]:
    """Rows of each task in an epoch, and how many epochs the remaining steps are.

    Args:
        share_per_row: float [K], share of a task over the number of its rows.
        examples: rows of each task, before packing.
        rows_to_read: rows that the remaining steps read; 0 if it is not known.
    """
    reads = share_per_row * rows_to_read if rows_to_read else share_per_row / share_per_row.max()
    least, most = reads.min(), reads.max()
    epochs = max(min(max(1.0, least), most), most / MAX_REPEATS)
    wanted = examples * reads / epochs
    return [max(round(number), 1) for number in wanted.tolist()], float(epochs)
