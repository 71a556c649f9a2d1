"""Trainer's internals: its batches, optimizer and schedule, and what of it is refused.

Its data sets are in ``data``, its evaluation loop in ``evaluation``, its training step in
``verification``. `make test-versions` runs all of them on the oldest and the newest Transformers,
TRL and Accelerate.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, get_scheduler

from hf_auxselect.mixture import (
    MixtureSampler,
    TaskRows,
)
from hf_auxselect.optimizer_state import underlying
from hf_auxselect.schedule import Schedule, schedule_to_come

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def callers() -> Iterator[FrameType]:
    """The frames of the call stack above the function that iterates, the innermost first."""
    # Its own frame would refer to itself, through f_locals, and keep what it found alive.
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling ``callback`` right now, found on the call stack; None if none is.

    The Trainer hands its callbacks no reference to itself (huggingface/transformers#38181).
    """
    for frame in callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(
            known is callback for known in caller.callback_handler.callbacks
        ):
            return caller
    return None


def met(reference: weakref.ref[Trainer]) -> Trainer:
    """The trainer of a weak reference that one of its own methods follows."""
    trainer = reference()
    assert trainer is not None, "a method outlives the trainer that it is called on"
    return trainer


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put Python's, NumPy's and PyTorch's global random states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def preserved_counters(trainer: Trainer) -> Iterator[None]:
    """Put back what a trainer counts and gathers for its log (SFTTrainer: in ``_metrics``)."""
    before = {
        name: copy.deepcopy(value)
        for name, value in vars(trainer).items()
        if name == "_metrics" or isinstance(value, int | float)
    }
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Run steps of a trainer without callbacks, logs or counters of the run noticing.

    Callbacks are not called; random states, counters and the trainer's own evaluation loaders are
    put back.
    """
    handler, missing = trainer.callback_handler, object()
    callbacks, handler.callbacks = handler.callbacks, []
    loader = handler.eval_dataloader
    kept = {
        name: vars(trainer).pop(name, missing) for name in ("_eval_dataloaders", "gather_function")
    }
    if kept["gather_function"] is not missing:
        trainer.gather_function = kept["gather_function"]
    try:
        with preserved_rng(), preserved_counters(trainer):
            yield
    finally:
        handler.callbacks, handler.eval_dataloader = callbacks, loader
        for name, value in kept.items():
            vars(trainer).pop(name, None)
            if value is not missing:
                setattr(trainer, name, value)


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for settings under which the selection would be wrong or impossible.

    Raises:
        ValueError: names the setting, and what to do.
    """
    args = trainer.args
    of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if of_trl and "SFTTrainer" not in of_trl:
        raise ValueError(
            f"{type(trainer).__name__} trains on preferences, rewards or generated answers, not on "
            "a mean of losses of label tokens, which is what is estimated. Use SFTTrainer or "
            "Trainer: select there with the preferred answers as the target, and give "
            f"{type(trainer).__name__} the tasks that were selected."
        )
    sharded = [name for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise ValueError(
            f"the model's parameter {sharded[0]!r} is sharded over processes (a DTensor, as "
            "distributed_config or tp_plan in from_pretrained make it), so one process cannot "
            "capture gradients alone. Load the model whole on each process and launch with DDP."
        )
    if trainer.train_dataset is None:
        raise ValueError("the trainer has no train_dataset; there are no tasks to select from.")
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(
        trainer.train_dataset, "__len__"
    ):
        raise ValueError(
            "train_dataset is an iterable dataset; rows of a dropped task could not be left out. "
            "Join the tasks' streams with concatenate_tasks({name: stream, ...}, take=n), which "
            "reads the first n rows of each."
        )
    if trainer.hp_search_backend is not None:
        raise ValueError(
            "hyperparameter_search makes a model and an output directory for each trial, so that "
            "one selection would be written over another. Search without TaskSelectionCallback "
            "(trainer.remove_callback), then train with the best values and with it."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{kind} shards parameters, whose per-example gradients cannot be captured. Use DDP "
            "(torchrun or `accelerate launch --multi_gpu`); a LoRA adapter seldom needs sharding."
        )
    if getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(
            f"loss_type={args.loss_type!r} is a loss whose gradient is not that of its value, so "
            "the value after training cannot be estimated; set loss_type='nll'."
        )


def warn_of_differences(trainer: Trainer, *, is_rewritten: bool) -> None:
    """Say where a run will not be quite what the user's settings say.

    Args:
        trainer: before its first step.
        is_rewritten: whether the mixture is, after the switch.
    """
    strategy = sampling_strategy(trainer)
    if is_rewritten and strategy != "random":
        logger.warning(
            "train_sampling_strategy=%r rules the warm-up; the mixture after it is drawn at "
            "random, in the shares of the selection.",
            strategy,
        )


def sampling_strategy(trainer: Trainer) -> str:
    """How the trainer draws its rows: ``train_sampling_strategy``.

    Before transformers 5.2 ``group_by_length=True`` stood for the value of that name.
    """
    if getattr(trainer.args, "group_by_length", False):
        return "group_by_length"
    return getattr(trainer.args, "train_sampling_strategy", "random")


class MixtureBatches:
    """Batches of a mixture, from a loader that the trainer itself builds."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.loader: Any = None
        self.iterator: Iterator[Any] | None = None

    def start(
        self, tasks: TaskRows, shares: np.ndarray, seed: int, *, consumed: int, total: int
    ) -> None:
        """Draw rows of ``tasks`` in the given shares [K] from here on.

        Args:
            tasks: task of each row of the training set.
            shares: float [K], summing to 1.
            seed: rules the order.
            consumed: micro-batches (per process) that were drawn before.
            total: micro-batches (per process) that may still be asked for.

        Raises:
            ValueError: the trainer builds its loader without ``_get_train_sampler``.
        """
        self.close()
        sampler = MixtureSampler(tasks, shares, seed)
        self.loader = self.build_loader(sampler)
        rows_per_batch = self.loader.total_batch_size
        sampler.start = consumed * rows_per_batch
        # Loaders fetch ahead; two more batches keep the end of the sampler out of sight.
        sampler.length = (total + 2) * rows_per_batch
        self.iterator = self._iterate()

    def _iterate(self) -> Iterator[Any]:
        # Starting a loader draws a seed from the global generator. On resume the loader starts
        # before the trainer loads its random state, in an unbroken run after: neither may tell.
        with preserved_rng():
            batches = iter(self.loader)
            batch = next(batches)
        while True:
            yield batch
            batch = next(batches)

    def build_loader(self, sampler: MixtureSampler) -> Any:
        """A training loader as the trainer would make it, but with this sampler.

        Raises:
            ValueError: the trainer's loader does not take its sampler from ``_get_train_sampler``.
        """
        trainer = met(self._trainer)
        shadowed = vars(trainer).get("_get_train_sampler")
        trainer._get_train_sampler = lambda *args, **kwargs: sampler
        try:
            loader = trainer.get_train_dataloader()
        finally:
            del trainer._get_train_sampler
            if shadowed is not None:
                trainer._get_train_sampler = shadowed
        if trainer.accelerator.dispatch_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches=True lets the first process read for all, "
                "and its loader cannot be moved to a position; leave it out, or use "
                "after='observe'."
            )
        batch_sampler = loader.batch_sampler
        while hasattr(batch_sampler, "batch_sampler"):  # accelerate's shard of a process
            batch_sampler = batch_sampler.batch_sampler
        if batch_sampler.sampler is not sampler:
            raise ValueError(
                f"{type(trainer).__name__}.get_train_dataloader does not take its sampler from "
                "_get_train_sampler, so the mixture could not be rewritten. Use Trainer's own, or "
                "after='observe'."
            )
        return loader

    def close(self) -> None:
        """Stop the loader."""
        if self.iterator is not None:
            self.iterator.close()  # type: ignore[attr-defined]
            self.loader.end()
        self.iterator = self.loader = None


class BatchSource:
    """Feeds a trainer from its own data loader until the switch, and from a mixture after it.

    ``Trainer.get_batch_samples`` is the one place where the training loop draws batches. It is
    shadowed on this trainer alone. Until ``mixture`` is started it passes the call through, so that
    the warm-up is the run without this package. From then on it passes the mixture's iterator; the
    trainer's loader, whose length rules epochs, schedule and resume, is left in place and never
    read again, with what its workers had fetched ahead.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.mixture = MixtureBatches(trainer)
        # After an error in train() this object lives on; the trainer need not.
        self._trainer = weakref.ref(trainer)
        self._shadowed = vars(trainer).get("get_batch_samples")
        trainer.get_batch_samples = self._get_batch_samples

    def remove(self) -> None:
        """Give the trainer its own method back, and stop the loader."""
        self.mixture.close()
        trainer = self._trainer()
        if trainer is None or vars(trainer).get("get_batch_samples") != self._get_batch_samples:
            return
        del trainer.get_batch_samples
        if self._shadowed is not None:
            trainer.get_batch_samples = self._shadowed

    def _get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        trainer = met(self._trainer)
        if self.mixture.iterator is not None:
            self._retire(trainer, epoch_iterator)
            epoch_iterator = self.mixture.iterator
        if self._shadowed is not None:
            return self._shadowed(epoch_iterator, num_batches, device)
        return type(trainer).get_batch_samples(trainer, epoch_iterator, num_batches, device)

    def _retire(self, trainer: Trainer, epoch_iterator: Any) -> None:
        """Stop the trainer's own loader, which is read no more, with its workers."""
        epoch_iterator.close()
        base = getattr(trainer.callback_handler.train_dataloader, "base_dataloader", None)
        if base is not None:
            base._iterator = None  # persistent workers live as long as this
        for loader in trainer.accelerator.gradient_state.dataloader_references:
            if loader is not None and loader is not self.mixture.loader:
                loader.end()


def consumed_batches(step: int, batches_per_epoch: int, accumulation: int) -> int:
    """Micro-batches per process that the training loop has drawn after ``step`` optimizer steps.

    The last step of an epoch draws what is left of it, which may be less than ``accumulation``.
    """
    steps_per_epoch = max(-(-batches_per_epoch // accumulation), 1)
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs * batches_per_epoch + rest * accumulation


def total_steps(trainer: Trainer, loader: Any) -> int:
    """Optimizer steps of the whole run, as ``Trainer.train`` will count them with this loader.

    Its own ``set_initial_training_values`` took one argument more until transformers 5.2.
    """
    args = trainer.args
    if args.max_steps > 0:  # the loader of an iterable dataset has no length
        return int(args.max_steps)
    steps_per_epoch = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def clip_gradients(trainer: Trainer, model: torch.nn.Module) -> None:
    """Clip the gradients to ``max_grad_norm`` as the training loop does."""
    if hasattr(trainer, "_clip_grad_norm"):
        trainer._clip_grad_norm(model)
    else:  # until transformers 5.0
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)


def torch_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer below accelerate's wrapper."""
    optimizer: torch.optim.Optimizer = underlying(trainer.optimizer)
    return optimizer


def optimizer_name(trainer: Trainer) -> str:
    """The class of the optimizer, and the training argument by which Trainer made it, if it did."""
    name = type(torch_optimizer(trainer)).__name__
    with contextlib.suppress(ImportError, ValueError):  # one that is not installed was not made
        made, _ = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if made is type(torch_optimizer(trainer)):
            return f"{name} (optim={option_value(trainer.args.optim)!r})"
    return name


def option_value(option: Any) -> Any:
    """A training argument as the user writes it: the value of an enumeration."""
    return getattr(option, "value", option)


def trainable_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters on the CPU, by name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restart(trainer: Trainer, initial: Mapping[str, Tensor]) -> None:
    """Put the trainable parameters back, and forget optimizer state and best checkpoint.

    In place, since the optimizer and distributed wrappers hold references.

    Raises:
        ValueError: ``initial`` does not match the trainable parameters.
    """
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    shapes = {name: list(tensor.shape) for name, tensor in initial.items()}
    if shapes != {name: list(p.shape) for name, p in trainable.items()}:
        raise ValueError(
            "after='restart': the initial parameters on disk are not those of this model; the run "
            "was started with another adapter. Start again, in another output_dir."
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(initial[name])
            parameter.grad = None
    torch_optimizer(trainer).state.clear()
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def schedule_restart(trainer: Trainer, switch_step: int) -> None:
    """Let the learning rate run through its schedule once more, over the steps after the switch.

    The factors become a function of the global step alone, lambda(s) = first(s) before the switch
    and second(s - switch_step) after it, so that a resumed run needs nothing else.

    Raises:
        ValueError: the scheduler is not a ``LambdaLR`` made by Trainer.
    """
    scheduler = trainer.lr_scheduler
    # Trainer notes which schedules are its own; lr_scheduler_type says nothing of others.
    if not getattr(trainer, "_created_lr_scheduler", True):
        raise ValueError(
            "after='restart' starts the learning-rate schedule again, which is known for those "
            f"that Trainer makes, not for the {type(scheduler).__name__} that it was given. Pass "
            "lr_scheduler_type=... and optimizers=(optimizer, None), or use after='continue'."
        )
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"after='restart' starts the learning-rate schedule again, which is supported for "
            f"schedules made of a LambdaLR, not for {type(scheduler).__name__} "
            f"(lr_scheduler_type={option_value(trainer.args.lr_scheduler_type)!r}). Use another "
            "lr_scheduler_type, or after='continue'."
        )
    remaining = trainer.state.max_steps - switch_step
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in scheduler.base_lrs
    ]
    second = get_scheduler(
        trainer.args.lr_scheduler_type,
        optimizer=torch.optim.SGD(groups),
        num_warmup_steps=trainer.args.get_warmup_steps(remaining),
        num_training_steps=remaining,
        scheduler_specific_kwargs=trainer.args.lr_scheduler_kwargs,
    )

    def joined(first: Any, later: Any) -> Callable[[int], float]:
        def factor(step: int) -> float:
            return first(step) if step < switch_step else later(step - switch_step)

        factor.without_restart = first  # type: ignore[attr-defined]
        return factor

    scheduler.lr_lambdas = [
        joined(first, later)
        for first, later in zip(scheduler.lr_lambdas, second.lr_lambdas, strict=True)
    ]
    # A run that resumes from a checkpoint without this schedule has still its old rate.
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        if isinstance(group["lr"], Tensor):  # compiled steps refer to it
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate


def schedule_after(trainer: Trainer, switch_step: int) -> Schedule:
    """The rates of the steps after the switch; if training restarts, those without the restart.

    In a run that was resumed after it, those of the steps that are left.
    """
    first = max(switch_step, trainer.state.global_step)
    with preserved_rng():
        return schedule_to_come(
            trainer.lr_scheduler,
            torch_optimizer(trainer),
            skip=first - trainer.state.global_step,
            count=trainer.state.max_steps - first,
            shared=(trainer, trainer.model, trainer.optimizer),
        )


def training_to_come(trainer: Trainer, switch_step: int, *, restarts: bool) -> dict[str, Any]:
    """What the optimizer will be told in the steps after the switch, for estimators that model it.

    Returns:
        ``learning_rates`` of each remaining step (if it restarts, those without the restart) of the
        reference group, ``group_learning_rates`` of all groups, ``learning_rates_are_known`` (else
        they are those of now), ``momentum_coefficients`` of each step if the scheduler changes
        them, else None, ``max_grad_norm`` (0: no clipping), ``examples_per_step`` over all
        processes, and ``after``, as JSON values.
    """
    schedule = schedule_after(trainer, switch_step)
    momentum = schedule.momentum_coefficients[schedule.reference_group]
    return {
        "learning_rates": schedule.learning_rates[schedule.reference_group],
        "group_learning_rates": schedule.learning_rates,
        "learning_rates_are_known": schedule.unknown_because is None,
        "momentum_coefficients": momentum if len(set(momentum)) > 1 else None,
        "max_grad_norm": float(trainer.args.max_grad_norm or 0.0),
        "examples_per_step": int(trainer.get_total_train_batch_size(trainer.args)),
        "after": "restart" if restarts else "continue",
    }


def model_name(trainer: Trainer) -> str:
    """The model's name; of a local directory the last part, since reports are for others' eyes."""
    name = str(trainer.model.config.name_or_path)
    return Path(name).name if Path(name).is_dir() else name


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log through the trainer without closing a subclass's own logging window.

    SFTTrainer.log averages and clears the metrics gathered since the last log; its base does not.
    """
    Trainer.log(trainer, metrics)
