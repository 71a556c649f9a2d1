"""The command line: look at a selection again, and check it by training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_auxselect.report import SelectionReport, printable


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
        required=True,
        metavar="a,b,c",
        help="a subset (names) or mixture (name=weight), separated by commas; may be repeated",
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
    choices = [(text, _parse_tasks(text)) for text in options.tasks]
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


def _parse_tasks(text: str) -> list[str] | dict[str, float]:
    """``a,b`` is a subset, ``a=2,b=1`` a mixture."""
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return parts
    weights = {}
    for part in parts:
        name, _, weight = part.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(
                f"--tasks {text!r}: {part!r} is not name=weight; give names, or a weight to each."
            ) from None
    return weights


def _show(text: str) -> None:
    print(text)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
