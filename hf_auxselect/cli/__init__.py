# PYTHON_ARGCOMPLETE_OK
"""The command line ``hf-auxselect``: stored selections, and training with TRL's ``sft``.

Each command is a function of a module that is imported when the command runs, so that a question
about a stored run imports neither PyTorch nor Transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_auxselect._version import __version__
from hf_auxselect.cli.completion import complete, complete_with_selectors, complete_with_tasks
from hf_auxselect.cli.options import UsageError

FORMATS = ("trl", "axolotl", "llamafactory", "open-instruct", "ms-swift", "datasets", "rows")
"""Of ``export``; see :meth:`hf_auxselect.SelectionReport.export`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``hf-auxselect``; None: those of this process.

    Returns:
        The exit code: 0; 1 if the command failed, and 2 after wrong usage, with a one-line reason
        on stderr.

    Raises:
        SystemExit: with code 2 after wrong usage, with code 0 after ``--help`` or ``--version``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["sft"]:  # its options are those of TRL, whose import takes seconds
            _sft(arguments[1:])
        else:
            parser = _parser()
            complete(parser)
            options = parser.parse_args(arguments)
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"hf-auxselect: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _sft(arguments: Sequence[str]) -> None:
    try:
        from hf_auxselect.cli import sft
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sft needs the package {error.name!r}: pip install 'hf-auxselect[trl]'."
        ) from error
    sft.run(arguments)


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the line of an example whole, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        is_example = text.startswith("example:")
        return text if is_example else super()._fill_text(text, width, indent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-auxselect",
        description="Show a selection of training tasks, estimate other mixtures, verify and "
        "publish it, or train with a selection.",
        epilog="example: hf-auxselect report outputs/_task_selection",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-auxselect {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_report, _add_what_if, _add_select, _add_verify, _add_export, _add_push):
        add(commands)
    commands.add_parser(
        "sft", help="train with TRL's sft, each dataset a task, and select the tasks on the way"
    )
    return parser


def _command(
    commands: Any, name: str, title: str, example: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A command on the directory of a run."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=title,
        description=description or f"{title[0].upper()}{title[1:]}.",
        epilog=f"example: hf-auxselect {name} {example}",
        formatter_class=_HelpFormatter,
    )
    command.add_argument("directory", metavar="DIR", type=Path, help="a _task_selection directory")
    command.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return command


def _add_report(commands: Any) -> None:
    command = _command(
        commands,
        "report",
        "show a selection and render its report again",
        "outputs/_task_selection",
    )
    command.set_defaults(run=_later("report"))


def _add_what_if(commands: Any) -> None:
    command = _command(
        commands,
        "what-if",
        "estimate the loss after training on other tasks",
        "outputs/_task_selection --tasks gsm,code --tasks gsm=3,code=1",
    )
    tasks = command.add_argument(
        "--tasks",
        action="append",
        default=[],
        metavar="a,b,c",
        help="a subset (names) or mixture (name=weight), separated by commas; may be repeated",
    )
    task = command.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="one task of a subset or mixture; repeat it for each of its tasks. For names that "
        "contain commas or =",
    )
    complete_with_tasks(tasks, separated=True)
    complete_with_tasks(task)

    def run(options: argparse.Namespace) -> None:
        if not (options.tasks or options.task):
            command.error("give --tasks a,b,c, or --task NAME once for each task")
        _later("what_if")(options)

    command.set_defaults(run=run)


def _add_select(commands: Any) -> None:
    command = _command(
        commands,
        "select",
        "choose again from a stored run, with another selector or other options",
        "outputs/_task_selection --selector ForwardSelection --option max_tasks=2",
        "Asks a selector for a mixture, with the stored gradients and the run's estimator. Writes "
        "the choice to a file that a training run follows by FixedSelection.from_file(FILE). The "
        "run's own selection.json stays as it is.",
    )
    selector = command.add_argument(
        "--selector", required=True, metavar="NAME", help="ForwardSelection, RandomEnsemble, ..."
    )
    complete_with_selectors(selector)
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the selector, such as max_tasks=2; may be repeated",
    )
    keep = command.add_argument(
        "--keep",
        action="append",
        metavar="TASK",
        help="a task that must be selected; may be repeated. Default: the tasks that the run kept",
    )
    complete_with_tasks(keep)
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the choice is written; default: selection.NAME.json in DIR",
    )

    def run(options: argparse.Namespace) -> None:
        from hf_auxselect.cli.select import select

        select(options)

    command.set_defaults(run=run)


def _add_verify(commands: Any) -> None:
    command = _command(
        commands,
        "verify",
        "compare the estimates with ground-truth runs, and add the result to the report",
        "--num 4 outputs/_task_selection train.py --learning_rate 1e-4",
        "Runs your training script from its checkpoint at the switch. Instead of continuing the "
        "run, it trains on the chosen mixture, on all tasks and on random mixtures, and adds the "
        "measured losses to the report. Nothing else in the output directory changes.",
    )
    command.add_argument(
        "--num", type=int, default=4, metavar="N", help="number of mixtures (default 4)"
    )
    command.add_argument("script", metavar="SCRIPT", type=Path, help="the script that made the run")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the script")

    def run(options: argparse.Namespace) -> None:
        if options.num < 1:
            command.error(f"--num must be at least 1, got {options.num}")
        _later("verify")(options)

    command.set_defaults(run=run)


def _add_export(commands: Any) -> None:
    command = _command(
        commands,
        "export",
        "write the chosen mixture in the form of another training tool",
        "outputs/_task_selection --format axolotl --output mixture.yaml",
    )
    command.add_argument("--format", required=True, choices=FORMATS, help="the tool's form")
    command.add_argument(
        "--sources",
        type=Path,
        metavar="FILE",
        help="JSON: task -> where its data come from, as an entry of TRL's datasets: (path, name, "
        "split, ...). Default: what the report knows",
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="default: print it")
    command.set_defaults(run=_later("export"))


def _add_push(commands: Any) -> None:
    command = _command(
        commands,
        "push",
        "publish the report on the Hugging Face Hub",
        "outputs/_task_selection my-name/my-model",
        "Publishes the report on the Hugging Face Hub. The token is that of `hf auth login` or of "
        "the environment variable HF_TOKEN.",
    )
    command.add_argument("repo_id", metavar="REPO_ID", help="such as my-name/my-model")
    command.add_argument(
        "--repo-type",
        choices=("model", "dataset", "space"),
        default="model",
        help="model: the model card gets a section; dataset: the report as a data set; space: the "
        "report's page (default model)",
    )
    command.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a repository that is made now is private; default: as your account has it",
    )
    command.add_argument("--revision", metavar="NAME", help="branch; default: main")
    command.add_argument("--token", help=argparse.SUPPRESS)  # else argparse would repeat it

    def run(options: argparse.Namespace) -> None:
        if options.token is not None:
            command.error(
                "--token is not taken, as others can see command lines: run `hf auth login`, or "
                "set HF_TOKEN"
            )
        _later("push")(options)

    command.set_defaults(run=run)


def _later(name: str) -> Any:
    """A command of :mod:`hf_auxselect.cli.stored`, imported when it runs."""

    def run(options: argparse.Namespace) -> None:
        from hf_auxselect.cli import stored

        getattr(stored, name)(options)

    return run
