"""Command line: show a selection, estimate other choices, and verify it by ground-truth runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hf_auxselect.files import to_json
from hf_auxselect.report import SelectionReport
from hf_auxselect.report.text import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 1 if the command failed, with a one-line reason on stderr.

    Raises:
        SystemExit: with code 2 after wrong usage, with code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(prog="hf-auxselect", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("directory", metavar="DIR", type=Path, help="a _task_selection directory")
    common.add_argument("--json", action="store_true", help="print JSON, for scripts")

    report = commands.add_parser(
        "report", parents=[common], help="show a selection and render its report again"
    )
    report.set_defaults(run=_report)

    what_if = commands.add_parser(
        "what-if", parents=[common], help="estimate the loss after training on other tasks"
    )
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
        help="one task of a subset or mixture; repeat it for each of its tasks. For names that "
        "contain commas or =",
    )
    what_if.set_defaults(run=_what_if)

    verify = commands.add_parser(
        "verify",
        parents=[common],
        help="compare the estimates with ground-truth runs, and add the result to the report",
        description="Runs your training script from its checkpoint at the switch. Instead of "
        "continuing the run, it trains on the chosen mixture, on all tasks and on random subsets, "
        "and adds the measured losses to the report. Nothing else in the output directory changes.",
    )
    verify.add_argument(
        "--num", type=int, default=4, metavar="N", help="number of mixtures (default 4)"
    )
    verify.add_argument("script", metavar="SCRIPT", type=Path, help="the script that made the run")
    verify.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the script")
    verify.set_defaults(run=_verify)

    options = parser.parse_args(arguments)
    if options.run is _what_if and not (options.tasks or options.task):
        what_if.error("give --tasks a,b,c, or --task NAME once for each task")
    if options.run is _verify and options.num < 1:
        verify.error(f"--num must be at least 1, got {options.num}")
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"hf-auxselect: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    report = SelectionReport.load(options.directory)
    report.save(options.directory / "report")
    _show_report(report, options)


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
    if options.json:
        losses = [
            {
                "tasks": tasks,
                "loss": float(estimate.loss[0]),
                "low": float(estimate.low[0]),
                "high": float(estimate.high[0]),
            }
            for (_, tasks), (_, estimate) in zip(choices, estimates, strict=True)
        ]
        _show(json.dumps(losses, indent=1, ensure_ascii=False))
        return
    width = max(len(printable(text)) for text, _ in estimates)
    for text, estimate in estimates:
        interval = f"[{estimate.low[0]:.4f}, {estimate.high[0]:.4f}]"
        _show(f"{printable(text):<{width}}  {estimate.loss[0]:7.4f}  {interval}")


def _verify(options: argparse.Namespace) -> None:
    from hf_auxselect.script import verify_with_script

    # What the script prints must not stand among the JSON.
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        report = verify_with_script(
            options.directory, options.num, options.script, options.arguments
        )
    _show_report(report, options)


def _parse_tasks(
    parts: Sequence[str], known: Collection[str], option: str
) -> list[str] | dict[str, float]:
    """A subset (``a``, ``b``) or a mixture (``a=2``, ``b=1``). Names of tasks may contain ``=``.

    Args:
        parts: names, or names with weights.
        known: the run's tasks.
        option: how errors name the parts.
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


def _show_report(report: SelectionReport, options: argparse.Namespace) -> None:
    _show(to_json(report.to_dict()).rstrip() if options.json else report.to_text())


def _show(text: str) -> None:
    print(text)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
