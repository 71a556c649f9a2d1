"""Ground-truth runs: the remaining steps on a given mixture, without a trace in the run."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from hf_auxselect.capture.optimizer_state import copy_of_state
from hf_auxselect.capture.schedule import follows_metrics
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer import access
from hf_auxselect.trainer.batches import MixtureBatches, consumed_batches
from hf_auxselect.trainer.evaluation import evaluation_loss
from hf_auxselect.trainer.schedule import restart


@dataclass(frozen=True)
class RestOfRun:
    """The remaining steps of a run, which can be trained on several mixtures in turn.

    Attributes:
        trainer: a trainer between two optimizer steps, at the switch.
        tasks: task of each row of its training set.
        target: key of its ``eval_dataset`` dict, or None.
        seed: rules the order of the rows, as it will in the run itself.
        initial: trainable parameters at step 0 if training restarts there, else None.
    """

    trainer: Trainer
    tasks: TaskRows
    target: str | None
    seed: int
    initial: Mapping[str, Tensor] | None = None

    def fine_tune(self, shares: np.ndarray, progress: tqdm | None = None) -> float:
        """The target's loss after the remaining steps on a mixture, as the trainer logs it.

        Restores the trainer: parameters, optimizer, schedule, random states and logs. No callback
        is called. A run that goes on with this mixture ends with the same loss, bit by bit, since
        it starts from the same random states.

        Args:
            shares: float [K], summing to 1.
            progress: is told of every step.

        Returns:
            Nats per label token.
        """
        trainer = self.trainer
        batches = MixtureBatches(trainer)
        with _preserved(trainer):
            if self.initial is not None:
                restart(trainer, self.initial)
            try:
                self._train(batches, shares, progress)
            finally:
                batches.close()
            return evaluation_loss(trainer, self.target)

    def _train(self, batches: MixtureBatches, shares: np.ndarray, progress: tqdm | None) -> None:
        trainer, args = self.trainer, self.trainer.args
        per_epoch = len(trainer.callback_handler.train_dataloader)
        steps = range(trainer.state.global_step, trainer.state.max_steps + 1)
        consumed = [
            consumed_batches(step, per_epoch, args.gradient_accumulation_steps) for step in steps
        ]
        batches.start(self.tasks, shares, self.seed, consumed=0, total=consumed[-1] - consumed[0])
        for num_batches in np.diff(consumed).tolist():
            samples, num_items = trainer.get_batch_samples(
                batches.iterator, num_batches, args.device
            )
            self._step(samples, num_items)
            if progress is not None:
                progress.update()

    def _step(self, samples: list[object], num_items: Tensor | int | None) -> None:
        """One optimizer step, as in ``Trainer._run_epoch``."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        model = trainer.model_wrapped
        trainer.current_gradient_accumulation_steps = len(samples)
        for i, inputs in enumerate(samples):
            is_last = i == len(samples) - 1
            accelerator.gradient_state._set_sync_gradients(is_last)
            synchronized = (
                contextlib.nullcontext
                if is_last
                else functools.partial(accelerator.no_sync, model=model)
            )
            with synchronized():
                trainer.training_step(model, inputs, num_items)
        if trainer.args.max_grad_norm > 0:
            access.clip_gradients(trainer, model)
        trainer.optimizer.step()
        waits = follows_metrics(trainer.lr_scheduler)
        if not (accelerator.optimizer_step_was_skipped or waits):
            trainer.lr_scheduler.step()
        model.zero_grad()


@contextlib.contextmanager
def _preserved(trainer: Trainer) -> Iterator[None]:
    """Put everything back that training and evaluating change."""
    model, state = trainer.model, trainer.state
    optimizer = access.torch_optimizer(trainer)
    scaler = trainer.accelerator.scaler
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
    }
    moments = copy_of_state(optimizer)
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    schedule = copy.deepcopy(trainer.lr_scheduler.state_dict())
    scale = copy.deepcopy(scaler.state_dict()) if scaler is not None else None
    best = state.best_metric, state.best_global_step, state.best_model_checkpoint
    training = [module for module in model.modules() if module.training]
    try:
        with access.undisturbed(trainer):
            yield
    finally:
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        trainer.lr_scheduler.load_state_dict(schedule)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for name, value in values.items():
                if isinstance(group[name], Tensor):  # compiled steps refer to it
                    group[name].copy_(value)
                else:
                    group[name] = value
        optimizer.state.clear()
        optimizer.state.update(moments)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in tensors:
                    tensor.copy_(tensors[name])
        model.zero_grad()
        model.eval()
        for module in training:
            module.training = True
        trainer.accelerator.gradient_state._set_sync_gradients(True)
