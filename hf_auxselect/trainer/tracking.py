"""Tables and pictures in the run of an experiment tracker: TensorBoard, trackio, W&B.

Trainer logs numbers alone. What else there is to see goes to the writer or run that Trainer's
integration of ``report_to`` has opened; none is opened here.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_auxselect.trainer import access

logger = logging.getLogger(__name__)

Tables = Mapping[str, Sequence[Mapping[str, str | float | bool]]]


class _Shown(NamedTuple):
    """What trackers are given, each thing under ``auxselect/<name>``."""

    step: int
    tables: Tables
    summary: Sequence[str]
    page: str
    """Markdown without pictures."""
    pictures: list[Path]
    html: str | None


def show(
    trainer: Trainer, *, tables: Tables, summary: Sequence[str], markdown: str, directory: Path
) -> None:
    """Show a report in the trackers that the trainer logs to. Only the main process does so.

    A tracker that fails is warned of, and training goes on.

    Args:
        trainer: its ``report_to`` names the trackers.
        tables: name -> rows of at least one; a row maps the same columns to values.
        summary: the report in sentences, for trackers whose texts have no tables.
        markdown: the report as a page, for trackers whose texts have tables.
        directory: of the report's files, of which pictures and ``index.html`` are shown.
    """
    if not trainer.is_world_process_zero():
        return
    for callback in trainer.callback_handler.callbacks:
        for integration, send in _TRACKERS.items():
            if not isinstance(callback, integration):
                continue
            try:
                html = directory / "index.html"
                shown = _Shown(
                    step=trainer.state.global_step,
                    tables=tables,
                    summary=summary,
                    # Its pictures are files beside it, which a tracker does not have.
                    page=re.sub(r"^!\[.*\]\(.*\)\n+", "", markdown, flags=re.MULTILINE),
                    # Without estimates, those that are there are an earlier run's.
                    pictures=sorted(directory.glob("*.png")) if "estimates" in tables else [],
                    html=html.read_text(encoding="utf-8") if html.is_file() else None,
                )
                with access.preserved_rng():
                    send(callback, shown)
            except Exception as error:
                logger.warning(
                    "%s does not show the tables and pictures of the selection (%s: %s); they "
                    "are in %s.",
                    integration.__name__.removesuffix("Callback"),
                    type(error).__name__,
                    error,
                    directory,
                )


def _to_tensorboard(callback: Any, shown: _Shown) -> None:
    from matplotlib.image import imread

    writer = callback.tb_writer
    if writer is None:
        return
    writer.add_text("auxselect/report", shown.page, shown.step)
    for path in shown.pictures:
        writer.add_image(f"auxselect/{path.stem}", imread(path), shown.step, dataformats="HWC")
    writer.flush()


def _to_trackio(callback: Any, shown: _Shown) -> None:
    import trackio

    things = _tables_and_pictures(trackio, shown)
    # Its Markdown has headings and lists, but no tables and no escapes.
    things["auxselect/report"] = trackio.Markdown("\n".join(f"- {text}" for text in shown.summary))
    trackio.log(things)


def _to_wandb(callback: Any, shown: _Shown) -> None:
    import wandb

    if wandb.run is None:
        return
    things = _tables_and_pictures(wandb, shown)
    if shown.html is not None:
        # As a file, for a string may be read as a path; as it is, without W&B's style sheet.
        things["auxselect/report"] = wandb.Html(io.StringIO(shown.html), inject=False)
    wandb.run.log(things)


def _tables_and_pictures(tracker: Any, shown: _Shown) -> dict[str, Any]:
    """By name, in the types of trackio or W&B, which are called and used alike."""
    things: dict[str, Any] = {"train/global_step": shown.step}  # what charts count by
    for name, rows in shown.tables.items():
        data = [list(row.values()) for row in rows]
        things[f"auxselect/{name}"] = tracker.Table(columns=list(rows[0]), data=data)
    for path in shown.pictures:
        things[f"auxselect/{path.stem}"] = tracker.Image(str(path))
    return things


_TRACKERS: dict[type[TrainerCallback], Callable[[Any, _Shown], None]] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
    WandbCallback: _to_wandb,
}
