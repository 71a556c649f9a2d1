"""Verification of a selection after the fact, with the training script that made it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_auxselect.callback import TaskSelectionCallback, changed_options, in_words
from hf_auxselect.files import read_json
from hf_auxselect.plan import PlanRecord
from hf_auxselect.report import SelectionReport
from hf_auxselect.report.report import later_switch_step
from hf_auxselect.run_directory import DIRECTORY_NAME, decision_of


class _Verified(BaseException):
    """Stops the script after the verification; not an Exception, which the script might catch."""


class _StopBeforeTraining(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _Verified


def verify_with_script(
    directory: Path, num_mixtures: int, script: Path, arguments: Sequence[str]
) -> SelectionReport:
    """Run a training script from its checkpoint at the switch; verify there instead of training.

    Args:
        directory: the ``_task_selection`` directory of the run.
        num_mixtures: see ``TaskSelectionCallback(verify=...)``.
        script: the script that made the run, which is run in this process.
        arguments: its command line.

    Returns:
        The report with its ``verification``, which is also written to ``directory``.

    Raises:
        FileNotFoundError: the script or the checkpoint at the switch is missing.
        ValueError: the directory is not that of a run; or the script made another run, or none.
    """
    directory = directory.resolve()
    if not script.is_file():
        raise FileNotFoundError(f"no such script: {str(script)!r}.")
    if directory.name != DIRECTORY_NAME or not (directory / "plan.json").is_file():
        raise ValueError(f"{str(directory)!r} is not the {DIRECTORY_NAME} directory of a run.")
    first = read_json(directory / "plan.json", PlanRecord)["switch_step"]
    step = later_switch_step(directory) or first
    with _training_replaced(directory, num_mixtures, step), _command_line(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Verified:
            return SelectionReport.load(directory)
    raise ValueError(
        f"{str(script)!r} ended without training with a TaskSelectionCallback whose files are in "
        f"{str(directory)!r}; is it the script of that run, with the same arguments?"
    )


@contextmanager
def _training_replaced(directory: Path, num_mixtures: int, step: int) -> Iterator[None]:
    """Let ``Trainer.train`` resume at the switch, verify, and raise :class:`_Verified`.

    Replaced for all trainers: the script makes its own, and may add the callback just before.
    """
    original = Trainer.train

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TaskSelectionCallback):
                output_dir = Path(callback.output_dir or self.args.output_dir)
                if (output_dir / DIRECTORY_NAME).resolve() == directory:
                    checkpoint = _checkpoint(self, step, num_mixtures)
                    _require_same_options(callback, SelectionReport.load(directory))
                    callback.verify, callback._verify_again = num_mixtures, True
                    self.add_callback(_StopBeforeTraining())
                    return original(self, resume_from_checkpoint=str(checkpoint))
        return original(self, *args, **kwargs)

    Trainer.train = train
    try:
        yield
    finally:
        Trainer.train = original


def _checkpoint(trainer: Trainer, step: int, num_mixtures: int) -> Path:
    """The checkpoint at the switch, which is the trainer's: the callback's files may be elsewhere.

    Raises:
        FileNotFoundError: it is missing.
    """
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"there is no {str(checkpoint)!r}: verification starts from the checkpoint at the "
            f"switch. Keep it (save_steps={step}), or pass verify={num_mixtures} to the callback."
        )
    return checkpoint


def _require_same_options(callback: TaskSelectionCallback, report: SelectionReport) -> None:
    """Raise ValueError if the script would select anew instead of checking what was selected."""
    if changed := changed_options(decision_of(report), callback):
        raise ValueError(
            f"the script's options differ from those of the selection: {in_words(changed)}. Run "
            "the script with the options of that run."
        )


@contextmanager
def _command_line(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """As if the script had been called with these arguments."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
