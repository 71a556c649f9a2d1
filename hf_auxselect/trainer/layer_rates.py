"""Steps of some layers are shortened or undone, and the optimizer does not notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_auxselect.capture.optimizer_families import family_of
from hf_auxselect.sharding import trainable_parameters
from hf_auxselect.trainer import access
from hf_auxselect.zero import ZeroOptimizer


class LayerRates:
    """Multiplies what each optimizer step changes in some parameters, weight decay included.

    With rate r a parameter goes from its value before the step by r times the way that the
    optimizer went; with r = 0 it is bitwise what it was. That is what a learning rate that is r
    times as high would do, but parameter groups, schedule and state of the optimizer are those of a
    run without rates: they are saved and resumed as ever, and gradients of all layers count in
    clipping. A copy of these parameters exists during each step.

    Args:
        trainer: its optimizer is one of those whose state holds no copy of the parameters; see
            :func:`why_no_rates`.
        rates: of the trainable parameters, by name; others have rate 1.
    """

    def __init__(self, trainer: Trainer, rates: Mapping[str, float]) -> None:
        self.rates = {name: rate for name, rate in rates.items() if rate != 1}
        trainable = trainable_parameters(trainer.model)
        zero = ZeroOptimizer.of(trainer.optimizer)
        self._parameters = [
            (part, rate)
            for name, rate in self.rates.items()
            for part in (zero.local_masters(trainable[name]) if zero else [trainable[name]])
        ]
        self._before: list[Tensor] = []
        optimizer = access.torch_optimizer(trainer)
        self._handles = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._shorten),
        ]

    def remove(self) -> None:
        """Let the optimizer's steps be whole again."""
        while self._handles:
            self._handles.pop().remove()

    def _keep(self, *_: Any) -> None:
        self._before = [parameter.detach().clone() for parameter, _ in self._parameters]

    def _shorten(self, *_: Any) -> None:
        with torch.no_grad():
            for (parameter, rate), before in zip(self._parameters, self._before, strict=True):
                if rate:
                    before.lerp_(parameter, rate)
                parameter.copy_(before)
        self._before = []


def why_no_rates(trainer: Trainer) -> str | None:
    """Why the steps of this trainer's optimizer cannot be shortened, in a sentence; None: they can.

    Others than the known ones may keep a copy of the parameters in their state, as schedule-free
    ones do, from which they would go on.
    """
    if family_of(access.torch_optimizer(trainer)) is not None:
        return None
    return (
        f"the steps of {access.optimizer_name(trainer)} cannot be shortened, since its state may "
        "hold a copy of the parameters. Use optim='adamw_torch', or training='all'."
    )
