"""Labelled texts of several domains, from a folder of JSONL files or from the Hub.

``classification.py`` trains on them. For your own rows, replace :func:`load` with a function that
makes :class:`Domains` of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

Rows = list[dict[str, Any]]
"""Rows with ``text``, perhaps ``text_pair``, and ``label``."""


@dataclass
class DataArguments:
    """Where the domains come from."""

    target: str = field(default="phones", metadata={"help": "the domain whose loss is to be low"})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder of TASK.jsonl and TARGET.heldout.jsonl; default: the Hub"},
    )
    dataset_name: str = field(
        default="nyu-mll/multi_nli", metadata={"help": "data set on the Hub, without --data_dir"}
    )
    task_column: str = field(default="genre", metadata={"help": "column with the domain's name"})
    text_column: str = field(
        default="premise,hypothesis", metadata={"help": "column of the text; for pairs, two"}
    )
    label_column: str = field(default="label", metadata={"help": "column of the class number"})
    heldout_split: str = field(
        default="validation_matched", metadata={"help": "split with the held-out rows"}
    )
    train_on_target: bool = field(
        default=False,
        metadata={"help": "make the target's training rows a task, instead of held-out rows"},
    )
    max_rows: int = field(default=1000, metadata={"help": "rows of each task, at most"})


@dataclass(frozen=True)
class Domains:
    """Rows with a label, as text or tokenized."""

    tasks: Mapping[str, Dataset]
    target: Dataset
    """Rows of the target that the selection sees."""
    measured: Dataset
    """Other rows of the target, to measure what training has reached."""

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        datasets = [*self.tasks.values(), self.target, self.measured]
        return 1 + max(max(dataset["label"]) for dataset in datasets)

    def training_texts(self) -> Iterator[str]:
        """The texts of all tasks."""
        for dataset in self.tasks.values():
            for name in ("text", "text_pair"):
                yield from dataset[name] if name in dataset.column_names else []


def load(args: DataArguments) -> Domains:
    """The tasks, and the rows of the target that are not trained on, in two halves.

    These are its held-out rows and, unless they are a task, its training rows.

    Raises:
        ValueError: names the argument that is wrong, what was got, and what there is.
    """
    if args.data_dir is not None:
        source, (tasks, heldout) = f"--data_dir {args.data_dir}", _from_folder(Path(args.data_dir))
    else:
        source, (tasks, heldout) = f"--dataset_name {args.dataset_name}", _from_hub(args)
    for name, rows in [*tasks.items(), *heldout.items()]:
        _check(rows, f"{source}, task {name}")
    if args.target not in heldout:
        raise ValueError(
            f"--target {args.target}: {source} has no held-out rows of it, only of "
            f"{', '.join(sorted(heldout)) or 'no task'}."
        )
    rows = heldout[args.target]
    if not args.train_on_target:
        rows = rows + tasks.pop(args.target, [])
    if len(tasks) < 2 or len(rows) < 4:
        raise ValueError(
            f"--target {args.target}: {source} leaves {len(tasks)} task(s) "
            f"({', '.join(tasks) or 'none'}) and {len(rows)} row(s) of the target; expected "
            "2 tasks and 4 rows, or more."
        )
    random.Random(0).shuffle(rows)
    return Domains(
        tasks={name: Dataset.from_list(rows[: args.max_rows]) for name, rows in tasks.items()},
        target=Dataset.from_list(rows[::2]),
        measured=Dataset.from_list(rows[1::2]),
    )


def _from_folder(folder: Path) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Rows of each task, and held-out rows, from JSONL files."""
    found: dict[str, dict[str, Rows]] = {"": {}, "heldout": {}}
    for path in sorted(folder.glob("*.jsonl")):
        name, _, kind = path.stem.partition(".")
        rows: Rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append({key: row[key] for key in ("text", "label")})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'--data_dir {folder}: line {number} of {path.name} is no row like {{"text": '
                    f'"I like it", "label": 1}} ({type(error).__name__}: {error}).'
                ) from error
        found.setdefault(kind, {})[name] = rows
    if not found[""]:
        kind = "has no" if folder.is_dir() else "is no folder of"
        raise ValueError(
            f'--data_dir {folder} {kind} files TASK.jsonl, with rows like {{"text": "I like it", '
            '"label": 1}, and TASK.heldout.jsonl.'
        )
    return found[""], found["heldout"]


def _from_hub(args: DataArguments) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Rows of each domain, and held-out rows, from a data set with a column that names it."""
    texts = zip(("text", "text_pair"), args.text_column.split(","), strict=False)
    columns = {**dict(texts), "label": args.label_column}
    needed = [args.task_column, *columns.values()]
    splits = load_dataset(args.dataset_name)
    found: list[dict[str, Rows]] = []
    for split in ("train", args.heldout_split):
        if split not in splits:
            raise ValueError(
                f"--heldout_split {args.heldout_split}: {args.dataset_name} has the splits "
                f"{', '.join(splits)}; expected 'train' and the one of the held-out rows."
            )
        if missing := set(needed) - set(splits[split].column_names):
            raise ValueError(
                f"--task_column, --text_column, --label_column: {args.dataset_name} has no column "
                f"{', '.join(sorted(missing))}; it has {', '.join(splits[split].column_names)}."
            )
        domains: dict[str, Rows] = {}
        for row in splits[split].select_columns(needed).shuffle(seed=0):
            rows = domains.setdefault(str(row[args.task_column]), [])
            if row[args.label_column] != -1 and len(rows) < args.max_rows:  # -1: no label
                rows.append({key: row[column] for key, column in columns.items()})
        found.append(domains)
    return found[0], found[1]


def _check(rows: Rows, where: str) -> None:
    """Refuse what is no text with a class number."""
    for number, row in enumerate(rows, start=1):
        texts, label = [row[key] for key in row if key != "label"], row["label"]
        is_class = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not is_class or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}, row {number}: got the label {label!r} and "
                f"{' and '.join(type(text).__name__ for text in texts)}; expected a class number "
                "0, 1, ... and text. Regression is not supported."
            )
