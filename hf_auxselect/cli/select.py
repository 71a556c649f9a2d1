"""``select``: another choice from a stored run, in a file that a training run can follow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypedDict

import numpy as np

from hf_auxselect.cli.options import UsageError, make_strategy, split_options
from hf_auxselect.cli.stored import show, show_json
from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically
from hf_auxselect.report import SelectionReport, strategy_record
from hf_auxselect.report.content import Row
from hf_auxselect.report.text import comparison_sentence, printable
from hf_auxselect.selectors import AbstractSelector, selection_problem
from hf_auxselect.selectors.registry import SELECTORS

MADE_BY = "hf-auxselect select"


class _Choice(TypedDict):
    """By what a file of this command is known, which it may replace."""

    made_by: str


def select(options: argparse.Namespace) -> None:
    """Choose again, and write the choice to a file."""
    if options.selector not in SELECTORS:
        raise UsageError(
            f"--selector {options.selector!r} is unknown; known are {', '.join(SELECTORS)}."
        )
    selector = make_strategy(
        SELECTORS[options.selector], split_options(options.option, "--option"), "--option"
    )
    output = options.output or options.directory / f"selection.{options.selector}.json"
    _require_replaceable(output)
    report = SelectionReport.load(options.directory)
    keep = report.run.get("keep", []) if options.keep is None else options.keep
    choice = choose_again(report, selector, keep)
    write_atomically(output, to_json(choice))
    if options.json:
        show_json({**choice, "output": str(output)})
    else:
        show(_in_words(choice, selector))
        show(f"Wrote {printable(str(output))}. A training run follows it by")
        show(f"  selector=FixedSelection.from_file({str(output)!r})")


def choose_again(report: SelectionReport, selector: AbstractSelector, keep: list[str]) -> JsonDict:
    """What a selector chooses with the gradients and the estimator of a stored run.

    Args:
        report: of the run.
        selector: makes the choice.
        keep: tasks that must be selected.

    Returns:
        The content of the file: ``selected``, ``weights`` and what else ``selection.json`` of a run
        has, with ``difference``, the chosen mixture's loss minus that of all tasks, nats per label
        token.

    Raises:
        ValueError: the gradients are not available, an option does not fit the tasks, or ``keep``
            names an unknown task.
    """
    fitted = report.fitted()
    names = [*report.weights]
    problem = selection_problem(
        fitted, report.gradients(), keep=keep, rows_to_read=_rows_to_read(report)
    )
    selection = selector.select(problem)
    chosen = np.array([[selection.weights[name] for name in names]])
    everything = np.ones(len(names), bool)
    estimate, all_tasks = fitted.estimate(chosen), fitted.estimate(everything[None])
    difference = fitted.difference(chosen, everything)
    return {
        "made_by": MADE_BY,
        "selected": selection.selected,
        "weights": selection.weights,
        "estimated_loss": float(estimate.loss[0]),
        "low": float(estimate.low[0]),
        "high": float(estimate.high[0]),
        "estimated_loss_all": float(all_tasks.loss[0]),
        "difference": {
            "loss": float(difference.loss[0]),
            "low": float(difference.low[0]),
            "high": float(difference.high[0]),
        },
        "shadow_prices": selection.shadow_prices,
        "notes": list(selection.notes),
        "keep": list(keep),
        "estimator": report.estimator,
        "selector": strategy_record(selector),
    }


def _rows_to_read(report: SelectionReport) -> int | None:
    """Rows that the steps after the switch read; None if the report does not tell.

    Earlier releases wrote only how often each row is read.
    """
    if "rows_to_read" in report.run or not report.tasks:
        return report.run.get("rows_to_read")
    reads = report.run.get("reads_per_row", {})
    return round(sum(reads.get(task.name, 0.0) * task.rows for task in report.tasks)) or None


def _in_words(choice: JsonDict, selector: AbstractSelector) -> str:
    weights, selected = choice["weights"], choice["selected"]
    width = max(len(printable(name)) for name in selected)
    lines = [f"{printable(repr(selector))} selects {len(selected)} of {len(weights)} tasks:"]
    lines += [f"  {printable(name):<{width}}  {weights[name]:6.1%}" for name in selected]
    lines.append(
        f"Estimated target loss: {choice['estimated_loss']:.4f} [{choice['low']:.4f}, "
        f"{choice['high']:.4f}] nats per label token; all tasks: "
        f"{choice['estimated_loss_all']:.4f}."
    )
    difference = Row(name="chosen minus all tasks", **choice["difference"])
    lines.append(comparison_sentence(SelectionReport(weights=weights, difference=difference)))
    lines += [
        f"Shadow price of {printable(name)}: {price:.4g}"
        for name, price in choice["shadow_prices"].items()
    ]
    lines += [printable(note) for note in choice["notes"]]
    return "\n".join(lines)


def _require_replaceable(output: Path) -> None:
    """Raise ValueError if a file is there that this command has not made."""
    if not output.exists():
        return
    try:
        is_ours = read_json(output, _Choice)["made_by"] == MADE_BY
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"--output: {str(output)!r} exists, and was not written by this command; give the name "
            "of another file."
        )
