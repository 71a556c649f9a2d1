"""The trainer's model repo on the Hub, and the model card that trainers write anew again and again.

TRL's trainers write it at every checkpoint, and every trainer does in ``push_to_hub``, without
reading what was there. So what we add is put in right after each time.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_auxselect.trainer.access import met
from hf_auxselect.trainer.data import target_key


def model_repo(trainer: Trainer) -> str:
    """The id of the model repo that the trainer pushes to, without its owner if the user gave none.

    Raises:
        ValueError: the training arguments name none.
    """
    args = trainer.args
    if args.hub_model_id:
        return str(args.hub_model_id)
    if args.push_to_hub:  # as Trainer names it
        return Path(args.output_dir).absolute().name
    raise ValueError(
        "report_to_hub=True pushes the report to the trainer's model repo, but the training "
        "arguments name none. Set hub_model_id='user/name' (or push_to_hub=True) in them, or pass "
        "report_to_hub='user/name' to TaskSelectionCallback."
    )


def edit_model_card(trainer: Trainer, edit: Callable[[Trainer, Path], None]) -> None:
    """Let ``edit`` change the file of the model card each time that the trainer has written it.

    It stays so after the training, when users call ``trainer.push_to_hub()``. Set on the instance;
    a second call replaces ``edit``.

    Args:
        trainer: whose ``create_model_card`` is replaced.
        edit: called with the trainer and the file, on the main process alone. It should not refer
            to the trainer, which refers to it.
    """
    original = vars(trainer).get("create_model_card", type(trainer).create_model_card)
    if isinstance(original, _WithEdit):
        original = original.original
    trainer.create_model_card = _WithEdit(trainer, original, edit)


class _WithEdit:
    """``create_model_card`` of one trainer, with an edit. Does not keep the trainer alive."""

    def __init__(
        self, trainer: Trainer, original: Any, edit: Callable[[Trainer, Path], None]
    ) -> None:
        self.original, self._edit = original, edit
        self._trainer = weakref.ref(trainer)
        self._is_method = original is type(trainer).create_model_card
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer = met(self._trainer)
        result = self.original(*([trainer] if self._is_method else []), *args, **kwargs)
        path = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and path.is_file():
            self._edit(trainer, path)
        return result


def add_model_tags(trainer: Trainer, tags: tuple[str, ...]) -> None:
    """Let cards that are made of the model itself have our tags, too."""
    present = list(getattr(trainer.model, "model_tags", None) or [])
    trainer.model.model_tags = present + [tag for tag in tags if tag not in present]


def final_step(trainer: Trainer) -> int:
    """Steps of the model that training ended with: those of a checkpoint, if one was loaded."""
    args, state = trainer.args, trainer.state
    if args.load_best_model_at_end and state.best_global_step is not None:
        return int(state.best_global_step)
    return int(state.global_step)


def final_loss(trainer: Trainer, target: str | None) -> float | None:
    """The target's loss that was logged for the model as training ended.

    None if none was logged, or it is not finite, as after training has diverged. The loss is that
    of the last step, or of the step whose checkpoint was loaded at the end.
    """
    step, history = final_step(trainer), trainer.state.log_history
    key = target_key(trainer, target)
    name = "_".join(["eval", *([] if key is None else [key]), "loss"])
    losses = [entry[name] for entry in history if entry["step"] == step and name in entry]
    return float(losses[-1]) if losses and math.isfinite(losses[-1]) else None


def finish_uploads(trainer: Trainer) -> None:
    """Wait for the upload of the last checkpoint, as the trainer does after ``on_train_end``."""
    if trainer.args.push_to_hub:
        trainer._finish_current_push()
