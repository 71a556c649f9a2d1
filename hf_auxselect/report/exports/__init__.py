"""Exports: the chosen mixture as a file that another training tool reads.

Every file promises the same: how many rows of each task an epoch reads (``mixture``). A module per
tool writes it down by the tool's own rules. They see the content of a report, and read no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_auxselect.report.content import ReportContent
from hf_auxselect.report.exports import (
    axolotl,
    llamafactory,
    ms_swift,
    open_instruct,
    python_snippet,
    trl,
)
from hf_auxselect.report.exports.mixture import mixture_of

RENDERERS = {
    "trl": trl.render,
    "axolotl": axolotl.render,
    "llamafactory": llamafactory.render,
    "open-instruct": open_instruct.render,
    "ms-swift": ms_swift.render,
    "datasets": python_snippet.render,
}

FORMATS = (*RENDERERS, "rows")
"""What :meth:`hf_auxselect.SelectionReport.export` knows; ``rows`` is the file of the run."""


def export(
    content: ReportContent, format: str, sources: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The chosen mixture for a tool; arguments are those of ``SelectionReport.export``."""
    # The callback may know sources of tasks that the run did not have.
    own = {task: source for task, source in content.sources.items() if task in content.weights}
    return RENDERERS[format](mixture_of(content, {**own, **(sources or {})}))
