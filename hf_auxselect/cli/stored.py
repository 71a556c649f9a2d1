"""Commands on a stored run: show it, estimate other mixtures, verify, export and publish it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from hf_auxselect.cli.options import parse_tasks
from hf_auxselect.files import JsonDict, read_json, to_json, write_atomically
from hf_auxselect.report import SelectionReport
from hf_auxselect.report.console import for_stream
from hf_auxselect.report.text import printable


def report(options: argparse.Namespace) -> None:
    """Show a selection, and render its report again."""
    loaded = SelectionReport.load(options.directory)
    loaded.save(_report_directory(loaded, options.directory))
    _show_report(loaded, options)


def what_if(options: argparse.Namespace) -> None:
    """Estimate the loss of other mixtures."""
    loaded = SelectionReport.load(options.directory)
    names = set(loaded.weights)
    choices = [
        (text, parse_tasks([part.strip() for part in text.split(",")], names, f"--tasks {text!r}"))
        for text in options.tasks
    ]
    if options.task:
        choices.append((", ".join(options.task), parse_tasks(options.task, names, "--task")))
    estimates = [(text, loaded.estimate(tasks)) for text, tasks in choices]
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
        show(json.dumps(losses, indent=1, ensure_ascii=False))
        return
    width = max(len(printable(text)) for text, _ in estimates)
    for text, estimate in estimates:
        interval = f"[{estimate.low[0]:.4f}, {estimate.high[0]:.4f}]"
        show(f"{printable(text):<{width}}  {estimate.loss[0]:7.4f}  {interval}")


def verify(options: argparse.Namespace) -> None:
    """Compare the estimates with ground-truth runs of the training script."""
    from hf_auxselect.script import verify_with_script

    # What the script prints must not stand among the JSON.
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        verified = verify_with_script(
            options.directory, options.num, options.script, options.arguments
        )
    _show_report(verified, options)


def export(options: argparse.Namespace) -> None:
    """Write the chosen mixture in the form of another tool."""
    loaded: Any = SelectionReport.load(options.directory)
    sources = None
    if options.sources is not None:
        sources = read_json(options.sources, dict[str, dict[str, Any]])
    text = loaded.export(options.format, sources=sources)
    if options.output is not None:
        write_atomically(options.output, text)
    if options.json:
        output = None if options.output is None else str(options.output)
        content = text if options.output is None else None
        show_json({"format": options.format, "output": output, "content": content})
    elif options.output is None:
        show(text.rstrip("\n"))
    else:
        show(f"Wrote {printable(str(options.output))}")


def push(options: argparse.Namespace) -> None:
    """Publish the report on the Hub."""
    loaded: Any = SelectionReport.load(options.directory)
    url = loaded.push_to_hub(
        options.repo_id,
        repo_type=options.repo_type,
        private=options.private,
        revision=options.revision,
    )
    if options.json:
        show_json({"repo_id": options.repo_id, "repo_type": options.repo_type, "url": url})
    else:
        show(url)


def show(text: str) -> None:
    """Print a result."""
    print(text)  # noqa: T201


def show_json(content: JsonDict) -> None:
    """Print a result for scripts."""
    show(to_json(content).rstrip())


def _report_directory(loaded: SelectionReport, asked: Path) -> Path:
    """Where a report is rendered again: of several selections of a run, where it was read."""
    found = loaded.gradients_directory
    is_later = found is not None and found.parent != asked and found.parent.parent == asked
    return (found.parent if is_later and found is not None else asked) / "report"


def _show_report(shown: SelectionReport, options: argparse.Namespace) -> None:
    if options.json:
        show(to_json(shown.to_dict()).rstrip())
    else:
        show(for_stream(shown, sys.stdout))
