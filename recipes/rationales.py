"""Questions, rationales and answers: from a folder of JSONL files, or from the Hub.

``chain_of_thought.py`` trains on them. A row has a prompt, a completion that ends in "Therefore,
the answer is X.", and the answer X.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

COLUMNS = ("prompt", "completion", "answer")
HELD_OUT = ".heldout.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rationales:
    """Training sets by task, and rows of the target that no run trains on."""

    tasks: dict[str, Dataset]
    target: Dataset
    """Rows for the selection: the trainer's ``eval_dataset``."""
    held_out: Dataset
    """Further rows of the target, to measure what a choice is worth."""


@dataclass(frozen=True)
class HubTask:
    """A data set of the Hub, and how its rows become a question, a rationale and an answer."""

    path: str
    name: str | None
    held_out: str
    """The split that training leaves alone."""
    parts: Callable[[Row], tuple[str, str, str]]


def _gsm8k(row: Row) -> tuple[str, str, str]:
    rationale, answer = row["answer"].split("####")
    lines = [_without_calculator(line) for line in rationale.strip().splitlines()]
    return row["question"], " ".join(lines), answer.strip()


def _without_calculator(line: str) -> str:
    """``<<3*4=12>>`` stands for calls of a calculator."""
    parts = line.strip().split("<<")
    return parts[0] + "".join(part.partition(">>")[2] for part in parts[1:])


def _strategyqa(row: Row) -> tuple[str, str, str]:
    facts = row["facts"] if isinstance(row["facts"], str) else " ".join(row["facts"])
    return row["question"], facts, "yes" if row["answer"] else "no"


def _svamp(row: Row) -> tuple[str, str, str]:
    return row["question_concat"], f"{row['Equation']} = {row['Answer']}.", str(row["Answer"])


def _aqua(row: Row) -> tuple[str, str, str]:
    options = "\n".join(f"({option}" for option in row["options"])  # "A)21" and so on
    return f"{row['question']}\nOptions:\n{options}", row["rationale"], f"({row['correct']})"


def _qasc(row: Row) -> tuple[str, str, str]:
    facts = [str(row[name]).rstrip(" .") for name in ("fact1", "fact2", "combinedfact")]
    return row["formatted_question"], ". ".join(facts) + ".", f"({row['answerKey']})"


def _ecqa(row: Row) -> tuple[str, str, str]:
    options = "\n".join(f"- {row[f'q_op{i}']}" for i in range(1, 6))
    rationale = " ".join(row["taskB"].split())
    return f"{row['q_text']}\nOptions:\n{options}", rationale, row["q_ans"]


def _creak(row: Row) -> tuple[str, str, str]:
    answer = "yes" if row["label"] == "true" else "no"
    return f'Is this true? "{row["sentence"]}"', row["explanation"], answer


HUB = {
    "strategyqa": HubTask("ChilleD/StrategyQA", None, "test", _strategyqa),
    "gsm8k": HubTask("openai/gsm8k", "main", "test", _gsm8k),
    "svamp": HubTask("ChilleD/SVAMP", None, "test", _svamp),
    "aqua": HubTask("deepmind/aqua_rat", "raw", "test", _aqua),
    "qasc": HubTask("allenai/qasc", None, "validation", _qasc),
    "ecqa": HubTask("tasksource/ecqa", None, "test", _ecqa),
    "creak": HubTask("amydeng2000/CREAK", None, "validation", _creak),
}


def load(
    target: str,
    *,
    data_dir: str | None,
    num_rows: int,
    num_target: int,
    num_held_out: int,
    include_target: bool = False,
) -> Rationales:
    """The tasks and the target, the first rows of each.

    Args:
        target: name of the task that the others are to help.
        data_dir: a folder with ``TASK.jsonl`` for each task and ``TARGET.heldout.jsonl``, whose
            rows have a prompt, a completion and an answer; None: the data sets of ``HUB``.
        num_rows: rows of each task, at most.
        num_target: rows of the target for the selection.
        num_held_out: further ones.
        include_target: whether the target's own training rows are a task.

    Raises:
        ValueError: there is no such folder or target, a row is not as it should be, or the target
            has too few rows held out.
    """
    for option, number in (
        ("--num_rows", num_rows),
        ("--num_target", num_target),
        ("--num_held_out", num_held_out),
    ):
        if number < 1:
            raise ValueError(f"{option} must be 1 or more, got {number}.")
    if data_dir is None:
        names, read = list(HUB), _from_hub
    else:
        folder = Path(data_dir)
        files = folder.glob("*.jsonl")
        names = sorted(file.stem for file in files if not file.name.endswith(HELD_OUT))
        if not names:
            raise ValueError(
                f"--data_dir {data_dir} has no files TASK.jsonl. Give a folder with one for each "
                "task, or leave --data_dir out to read data sets from the Hub."
            )
        has_held_out = {file.name.removesuffix(HELD_OUT) for file in folder.glob(f"*{HELD_OUT}")}

        def read(name: str, number: int, is_held_out: bool) -> list[Row]:
            return _from_file(folder / (name + (HELD_OUT if is_held_out else ".jsonl")), number)

    targets = names if data_dir is None else sorted(has_held_out)
    if target not in targets:
        raise ValueError(f"--target must be one of {', '.join(targets) or 'none'}; got {target!r}.")
    needed = num_target + num_held_out
    rows = read(target, needed, True)
    if len(rows) < needed:
        raise ValueError(
            f"{target} has {len(rows)} rows held out, but --num_target {num_target} and "
            f"--num_held_out {num_held_out} need {needed}; ask for fewer."
        )
    return Rationales(
        tasks={
            name: Dataset.from_list(read(name, num_rows, False))
            for name in names
            if include_target or name != target
        },
        target=Dataset.from_list(rows[:num_target]),
        held_out=Dataset.from_list(rows[num_target:]),
    )


def _from_file(path: Path, number: int) -> list[Row]:
    """The first rows of a file of JSON lines."""
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for i, line in enumerate(islice(file, number), 1):
            try:
                row = json.loads(line)
                rows.append({name: row[name] for name in COLUMNS})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {i}: expected a JSON object with the fields "
                    f"{', '.join(COLUMNS)}, got {line[:80].strip()!r}."
                ) from error
    return rows


def _from_hub(name: str, number: int, is_held_out: bool) -> list[Row]:
    """The first rows of a data set of the Hub, as prompts, completions and answers."""
    task = HUB[name]
    split = f"{task.held_out if is_held_out else 'train'}[:{number}]"
    rows = []
    for row in load_dataset(task.path, task.name, split=split):
        question, rationale, answer = task.parts(row)
        completion = f" {rationale.strip()} Therefore, the answer is {answer}."
        rows.append(
            {"prompt": f"Q: {question.strip()}\nA:", "completion": completion, "answer": answer}
        )
    return rows
