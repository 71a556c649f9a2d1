"""Shell completion by argcomplete, where it is installed (the extra ``cli``)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and exit; does nothing otherwise."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            return
        argcomplete.autocomplete(parser)


def complete_with_tasks(action: argparse.Action, *, separated: bool = False) -> None:
    """Let an option be completed with the names of the stored run's tasks.

    Args:
        action: the option.
        separated: it takes several names, separated by commas.
    """

    def names(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
        before = prefix.rpartition(",")[0] if separated else ""
        used = before.split(",") if before else []
        known = _tasks_of(vars(parsed_args).get("directory"))
        if separated:  # a name with a comma is given by an option of its own
            known = [name for name in known if name not in used and "," not in name]
        return [",".join([*used, name]) for name in known]

    action.completer = names  # type: ignore[attr-defined]  # as argcomplete looks for it


def complete_with_selectors(action: argparse.Action) -> None:
    """Let an option be completed with the names of selectors."""

    def names(**_: Any) -> list[str]:
        from hf_auxselect.selectors.registry import SELECTORS

        return [*SELECTORS]

    action.completer = names  # type: ignore[attr-defined]


def _tasks_of(directory: Path | None) -> list[str]:
    """The tasks of a stored run; none if it cannot be read: a shell shows no errors."""
    from hf_auxselect.report import SelectionReport

    try:
        return [*SelectionReport.load(directory or ".").weights]
    except (OSError, ValueError):
        return []
