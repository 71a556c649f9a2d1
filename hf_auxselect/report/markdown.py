"""A report as a Markdown page. The page is the template ``page.md.jinja``."""

from __future__ import annotations

import functools

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_auxselect.report.content import NUM_RANDOM_SUBSETS, ReportContent
from hf_auxselect.report.text import (
    agreement_sentence,
    calibration_sentence,
    comparison_sentence,
    confirmation_sentence,
    layers_sentence,
    mixture,
    nats,
    printable,
    selected_shares,
    shown,
)


def to_markdown(content: ReportContent) -> str:
    """The report as a Markdown page."""
    return (
        _environment()
        .get_template("page.md.jinja")
        .render(
            report=content,
            selected=selected_shares(content),
            comparison=comparison_sentence(content),
            confirmation=confirmation_sentence(content),
            layers=layers_sentence(content),
            agreement=agreement_sentence(content),
            calibration=calibration_sentence(content),
            num_random_subsets=NUM_RANDOM_SUBSETS,
        )
    )


def escape_markdown(text: str) -> str:
    """A text that Markdown, and HTML within it, shows as it is."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|~$" else c for c in text)


@functools.cache
def _environment() -> Environment:
    """Templates in which every value is escaped."""
    environment = Environment(
        loader=PackageLoader("hf_auxselect.report", ""),
        finalize=lambda value: escape_markdown(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"mixture": mixture, "nats": nats, "shown": shown}
    return environment
