"""The command line: look at a selection again, and check it by training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_auxselect.report.report import SelectionReport, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 with a one-line reason on stderr."""
    parser = argparse.ArgumentParser(prog="hf-auxselect", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="show a selection and render its report again")
    report.add_argument("directory", metavar="DIR", type=Path, help="a _task_selection directory")
    report.set_defaults(run=_report)

    what_if = commands.add_parser("what-if", help="estimate the loss after training on other tasks")
    what_if.add_argument("directory", metavar="DIR", type=Path, help="a _task_selection directory")
    what_if.add_argument(
        "--tasks",
        action="append",
        default=[],
        metavar="a,b,c",
        help="a subset (names) or mixture (name=weight), separated by commas; may be repeated",
    )
    what_if.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="one task of one subset or mixture, repeated for each of its tasks: for names with "
        "commas or =",
    )
    what_if.set_defaults(run=_what_if)

    verify = commands.add_parser(
        "verify",
        help="fine-tune on some mixtures for real, and put the agreement into the report",
        description="Runs your training script from its checkpoint at the switch, but instead of "
        "going on it fine-tunes on the chosen mixture, on all tasks and on random subsets, and "
        "adds the measured losses to the report. Nothing else in the output directory changes.",
    )
    verify.add_argument("directory", metavar="DIR", type=Path, help="a _task_selection directory")
    verify.add_argument("--num", type=int, default=4, metavar="N", help="mixtures (default 4)")
    verify.add_argument("script", metavar="SCRIPT", type=Path, help="the script that made the run")
    verify.add_argument("arguments", nargs=argparse.REMAINDER, help="and its arguments")
    verify.set_defaults(run=_verify)

    options = parser.parse_args(arguments)
    if options.run is _what_if and not (options.tasks or options.task):
        what_if.error("give --tasks a,b,c, or --task NAME once for each task")
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"hf-auxselect: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    report = SelectionReport.load(options.directory)
    report.save(options.directory / "report")
    _show(report.to_text())


def _what_if(options: argparse.Namespace) -> None:
    report = SelectionReport.load(options.directory)
    names = set(report.weights)
    choices = [
        (text, _parse_tasks([part.strip() for part in text.split(",")], names, f"--tasks {text!r}"))
        for text in options.tasks
    ]
    if options.task:
        choices.append((", ".join(options.task), _parse_tasks(options.task, names, "--task")))
    estimates = [(text, report.estimate(tasks)) for text, tasks in choices]
    width = max(len(printable(text)) for text, _ in estimates)
    for text, estimate in estimates:
        interval = f"[{estimate.low[0]:.4f}, {estimate.high[0]:.4f}]"
        _show(f"{printable(text):<{width}}  {estimate.loss[0]:7.4f}  {interval}")


def _verify(options: argparse.Namespace) -> None:
    from hf_auxselect.script import verify_with_script

    if options.num < 1:
        raise ValueError(f"--num must be at least 1, got {options.num}.")
    report = verify_with_script(options.directory, options.num, options.script, options.arguments)
    _show(report.to_text())


def _parse_tasks(
    parts: Sequence[str], known: Collection[str], option: str
) -> list[str] | dict[str, float]:
    """``a``, ``b`` is a subset; ``a=2``, ``b=1`` a mixture. A task's whole name is the task.

    Args:
        parts: names, or names with weights.
        known: the run's tasks.
        option: what an error calls the parts.
    """
    if all(part in known or "=" not in part for part in parts):
        names = list(parts)
        weights = None
    else:
        names, weights = [], []
        for part in parts:
            name, _, weight = part.rpartition("=")
            try:
                weights.append(float(weight))
            except ValueError:
                raise ValueError(
                    f"{option}: {part!r} is not name=weight; give names, or a weight to each."
                ) from None
            names.append(name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{option} names the task {twice[0]!r} more than once.")
    return names if weights is None else dict(zip(names, weights, strict=True))


def _show(text: str) -> None:
    print(text)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
