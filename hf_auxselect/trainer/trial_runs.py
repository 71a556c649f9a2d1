"""Ground-truth runs: the remaining steps on a given mixture, without a trace in the run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from hf_auxselect.capture.schedule import follows_metrics
from hf_auxselect.distributed import gather
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer import access
from hf_auxselect.trainer.batches import MixtureBatches, consumed_batches
from hf_auxselect.trainer.evaluation import evaluation_loss
from hf_auxselect.trainer.schedule import restart
from hf_auxselect.trainer.snapshot import Snapshot, digest_of_training


@dataclass(frozen=True)
class RestOfRun:
    """The remaining steps of a run, which can be trained on several mixtures in turn.

    Attributes:
        trainer: a trainer between two optimizer steps, at the switch.
        tasks: task of each row of its training set.
        target: key of its ``eval_dataset`` dict, or None.
        seed: determines the order of the rows, as it will in the run itself.
        initial: trainable parameters at step 0 if training restarts there, else None.
        layer_rates: by what the trainer's steps are multiplied, by name of the parameter, where it
            is not 1; see :class:`hf_auxselect.trainer.layer_rates.LayerRates`.
    """

    trainer: Trainer
    tasks: TaskRows
    target: str | None
    seed: int
    initial: Mapping[str, Tensor] | None = None
    layer_rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        """Number of optimizer steps before the switch."""
        return self.trainer.state.global_step

    @property
    def last_step(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.trainer.state.max_steps

    def digest(self) -> str:
        """A hash of what determines these steps, rows and mixture aside; every process must ask."""
        options = (self.seed, self.target, *sorted(self.layer_rates.items()))
        digest = digest_of_training(self.trainer, self.initial, options)
        return "-".join(gather(digest))


class TrialRun:
    """One ground-truth run: the remaining steps on one mixture, in one part or in several.

    A run that goes on with this mixture has the same losses, bit by bit, since it starts from the
    same random states. Between two parts the state is kept in the memory of the CPU: trainable
    parameters and optimizer.

    Args:
        rest: the remaining steps.
        shares: float [K], summing to 1.
    """

    def __init__(self, rest: RestOfRun, shares: np.ndarray) -> None:
        self._rest = rest
        self._shares = shares
        self._paused: tuple[Snapshot, Any] | None = None
        self.step = rest.first_step
        """Number of optimizer steps of the run that are done."""

    def train_to(self, step: int, progress: tqdm | None = None) -> float:
        """The target's loss after this step of the run, as the trainer logs it.

        Restores the trainer: parameters, optimizer, schedule, random states and logs. No callback
        is called.

        Args:
            step: of the whole run; not before ``self.step``.
            progress: is told of every step.

        Returns:
            Nats per label token.
        """
        rest, trainer = self._rest, self._rest.trainer
        batches = MixtureBatches(trainer)
        with _preserved(trainer):
            if self._paused is not None:
                snapshot, random_states = self._paused
                snapshot.put_back(trainer)
                access.set_random_states(random_states)
            elif rest.initial is not None:
                restart(trainer, rest.initial)
            try:
                self._train(batches, step, progress)
            finally:
                batches.close()
            random_states = access.random_states()
            loss = evaluation_loss(trainer, rest.target)
            is_over = step >= rest.last_step
            self._paused = None if is_over else (Snapshot.parked(trainer), random_states)
        self.step = step
        return loss

    def _train(self, batches: MixtureBatches, last: int, progress: tqdm | None) -> None:
        rest, trainer, args = self._rest, self._rest.trainer, self._rest.trainer.args
        per_epoch = len(trainer.callback_handler.train_dataloader)
        first, *consumed = (
            consumed_batches(step, per_epoch, args.gradient_accumulation_steps)
            for step in (rest.first_step, *range(self.step, last + 1))
        )
        if self.step == last:
            return
        batches.start(
            rest.tasks,
            self._shares,
            rest.seed,
            consumed=consumed[0] - first,
            total=consumed[-1] - consumed[0],
        )
        for num_batches in np.diff(consumed).tolist():
            samples, num_items = trainer.get_batch_samples(
                batches.iterator, num_batches, args.device
            )
            self._step(samples, num_items)
            if progress is not None:
                progress.update()

    def _step(self, samples: list[object], num_items: Tensor | int | None) -> None:
        """One optimizer step, as in ``Trainer._run_epoch``."""
        trainer, accelerator = self._rest.trainer, self._rest.trainer.accelerator
        model = trainer.model_wrapped
        trainer.current_gradient_accumulation_steps = len(samples)
        for i, inputs in enumerate(samples):
            is_last = i == len(samples) - 1
            accelerator.gradient_state._set_sync_gradients(is_last)
            synchronized = (
                contextlib.nullcontext
                if is_last or trainer.is_deepspeed_enabled  # which counts the batches itself
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
    snapshot = Snapshot.copied(trainer)
    best = state.best_metric, state.best_global_step, state.best_model_checkpoint
    training = [module for module in model.modules() if module.training]
    try:
        with access.undisturbed(trainer):
            yield
    finally:
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best
        snapshot.put_back(trainer)
        model.zero_grad()
        model.eval()
        for module in training:
            module.training = True
        trainer.accelerator.gradient_state._set_sync_gradients(True)
