"""The report on the Hub, for a training run: its section in the model card, and a push at the end.

Nothing here ends a run or makes other processes wait: the main process alone pushes, and a failure
is a warning that says what to do.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Protocol

from transformers import Trainer

from hf_auxselect.files import write_atomically
from hf_auxselect.report import SelectionReport, card
from hf_auxselect.trainer import hub

logger = logging.getLogger(__name__)


class HasReport(Protocol):
    """What owns the report, which may be large: nothing else keeps it alive."""

    report: SelectionReport | None


class Publication:
    """Pushes the report of a run.

    Args:
        repo: ``True``: the trainer's model repo; a repo id; or None: nothing is pushed.
        target: as given to the callback; may be set anew where the target changes.
        owner: has the run's report, None before the selection.

    Raises:
        ValueError: ``repo`` is something else.
    """

    def __init__(
        self,
        repo: bool | str | None,
        target: str | None,
        owner: weakref.ref[HasReport],
    ) -> None:
        if not (repo is None or repo is True or (isinstance(repo, str) and repo)):
            raise ValueError(
                "report_to_hub must be None, True (the trainer's model repo) or a repo id such as "
                f"'user/name', got {repo!r}."
            )
        self._repo = repo
        self.target = target
        self._owner = owner
        self._has_ended = False
        self._files: list[str] = []  # of the report, once they are in the repo

    def begin(self, trainer: Trainer) -> None:
        """Before the first step: have the trainer's model card edited.

        Raises:
            ValueError: the trainer has no model repo to push to.
        """
        self._has_ended, self._files = False, []
        if self._is_of(trainer):
            self._repo_id(trainer)
            hub.edit_model_card(trainer, self._edit_card)

    def end(self, trainer: Trainer) -> None:
        """After the last step: push the report."""
        self._has_ended = True
        report = self._report()
        if self._repo is None or report is None or not trainer.is_world_process_zero():
            return
        repo_id, is_of_trainer = self._repo_id(trainer), self._is_of(trainer)
        assert report.gradients_directory is not None, "the callback has attached it"
        directory = report.gradients_directory.parent
        try:
            if is_of_trainer:
                hub.finish_uploads(trainer)
                hub.add_model_tags(trainer, card.TAGS)
            self._note_final_loss(trainer, report)
            report.save(directory / "report")
            url = report.push_to_hub(
                repo_id,
                private=trainer.args.hub_private_repo,
                token=trainer.args.hub_token,
                revision=trainer.args.hub_revision if is_of_trainer else None,
            )
        except Exception as error:  # the run is worth more than its report
            logger.warning(
                "report_to_hub: %s The report is in %s; push it with `hf-auxselect push %s %s`.",
                str(error),
                directory / "report",
                directory,
                repo_id,
            )
        else:
            files = sorted((directory / "report").iterdir())
            self._files = [f"{card.FOLDER}/{path.name}" for path in files]
            logger.info("report_to_hub: the report is at %s.", url)

    def _edit_card(self, trainer: Trainer, path: Path) -> None:
        """Put the section into the model card; nothing before the selection."""
        report = self._report()
        if report is None:
            return
        try:
            self._note_final_loss(trainer, report)
            metadata = card.model_metadata(
                report, self._repo_id(trainer), trainer.args.hub_revision
            )
            text = path.read_bytes().decode()
            edited = card.edit_card(text, card.section(report, self._files), metadata)
            write_atomically(path, edited)
        except Exception as error:  # as above
            logger.warning("report_to_hub: the model card stays as it is; %s.", str(error))

    def _report(self) -> SelectionReport | None:
        owner = self._owner()
        return None if owner is None else owner.report

    def _note_final_loss(self, trainer: Trainer, report: SelectionReport) -> None:
        """Let the report have the target's loss after training, and none of an earlier run's."""
        report.run.pop("final_loss", None)
        loss = hub.final_loss(trainer, self.target) if self._has_ended else None
        if loss is not None:
            report.run["final_loss"] = loss

    def _repo_id(self, trainer: Trainer) -> str:
        if isinstance(self._repo, str):
            return self._repo
        return trainer.hub_model_id or hub.model_repo(trainer)

    def _is_of(self, trainer: Trainer) -> bool:
        """Whether the repo is the one that the trainer pushes its model to."""
        ids = (trainer.hub_model_id, trainer.args.hub_model_id)
        return self._repo is True or (self._repo is not None and self._repo in ids)
