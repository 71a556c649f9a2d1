"""A run that kills its own process at a given moment; started by test_resume.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import tiny
import torch
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint


def kill() -> None:
    """As a machine does that is taken away: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int) -> Callable[[], None]:
    """Before an optimizer step is taken."""

    def arm() -> None:
        original = Trainer.training_step

        def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                kill()
            return original(self, *args, **kwargs)

        Trainer.training_step = training_step  # type: ignore[method-assign]

    return arm


def at_call(owner: Any, name: str, *, count: int) -> Callable[[], None]:
    """Before a method is called for the ``count``-th time."""

    def arm() -> None:
        original, calls = getattr(owner, name), []

        def method(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == count:
                kill()
            return original(*args, **kwargs)

        setattr(owner, name, method)

    return arm


def at_file(ending: str, *, count: int = 1, after: bool = False) -> Callable[[], None]:
    """Before or after a file is put in its place for the ``count``-th time."""

    def arm() -> None:
        original, calls = os.replace, []

        def replace(source: Any, destination: Any) -> None:
            if ending in str(destination):
                calls.append(destination)
            if len(calls) == count and not after:
                kill()
            original(source, destination)
            if len(calls) == count:
                kill()

        os.replace = replace  # type: ignore[assignment]

    return arm


MOMENTS = {
    "in the gradient pass": at_file("/gradients/", count=4),
    "between pass and decision": at_file("/selection.json"),
    "right after the decision": at_file("/selection.json", after=True),
    "in the switch's checkpoint": at_call(Trainer, "_save_optimizer_and_scheduler", count=2),
    "before the checkpoint's decision": at_file("/task_selection.json"),
    "after the switch": at_step(5),
    "before the later one's decision": at_file("/task_selection.json", count=2),
}
"""By name, what arms the kill. Checkpoints are saved every other step, the selection follows the
fourth."""


def train(directory: Path, kind: str, after: str, moment: str | None) -> None:
    """Train, or resume if there is a checkpoint, up to the moment or to the end."""
    torch.set_num_threads(1)
    if moment is not None:
        MOMENTS[moment]()
    torch.manual_seed(3)
    trainer = tiny.TRAINERS[kind](
        directory,
        tiny.callback(after=after),
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
    )
    can_resume = directory.is_dir() and get_last_checkpoint(str(directory)) is not None
    trainer.train(resume_from_checkpoint=can_resume)
    save_file(tiny.weights(trainer), directory / "final.safetensors")
