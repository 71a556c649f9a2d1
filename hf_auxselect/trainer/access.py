"""Access to a running Trainer: finding it, its optimizer, and leaving no trace in its run.

`make test-versions` runs it on the oldest and the newest Transformers, TRL and Accelerate.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from transformers import Trainer

from hf_auxselect.capture.optimizer_families import underlying
from hf_auxselect.sharding import trainable_parameters, whole

if TYPE_CHECKING:
    from transformers import TrainerCallback


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


def random_states() -> Any:
    """Python's, NumPy's and PyTorch's global random states."""
    devices = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def set_random_states(states: Any) -> None:
    """Put back what :func:`random_states` has returned."""
    python, numpy, torch_state, devices = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)
    for i, device_state in enumerate(devices):
        torch.cuda.set_rng_state(device_state, i)


@contextlib.contextmanager
def preserved_counters(trainer: Trainer) -> Iterator[None]:
    """Put back what a trainer counts and gathers for its log (SFTTrainer: in ``_metrics``)."""
    # DeepSpeed's engine counts steps and samples, too.
    counting = [trainer, trainer.model_wrapped] if trainer.is_deepspeed_enabled else [trainer]
    before = [
        (owner, name, copy.deepcopy(value))
        for owner in counting
        for name, value in vars(owner).items()
        if name == "_metrics" or isinstance(value, int | float)
    ]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Run steps of a trainer without callbacks, logs or counters of the run noticing.

    Callbacks are not called; random states, counters and the trainer's own evaluation loaders are
    put back. Persistent workers of evaluation loaders that are made meanwhile are stopped.
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
        for made in vars(trainer).get("_eval_dataloaders", {}).values():
            stop_workers(made)
        for name, value in kept.items():
            vars(trainer).pop(name, None)
            if value is not missing:
                setattr(trainer, name, value)


@contextlib.contextmanager
def unlogged(trainer: Trainer) -> Iterator[None]:
    """Keep an evaluation out of the log of the run; one that is due still takes place."""
    history = trainer.state.log_history
    trainer.state.log_history = list(history)
    try:
        with _still_due(trainer):
            yield
    finally:
        trainer.state.log_history = history


def stop_workers(loader: Any) -> None:
    """Stop the persistent workers of a loader that Trainer made, which would outlive its use.

    The accelerator keeps every loader. When its garbage is collected, each worker is waited for.
    """
    base = getattr(loader, "base_dataloader", None)
    iterator = getattr(base, "_iterator", None)
    if base is not None and iterator is not None:
        iterator._shutdown_workers()
        base._iterator = None


def data_seed(trainer: Trainer) -> tuple[str, int]:
    """Name and value of the training argument that determines the order of the trainer's data."""
    name = "seed" if trainer.args.data_seed is None else "data_seed"
    return name, getattr(trainer.args, name)


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
    else:  # until transformers 5.2
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)


def torch_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer below accelerate's wrapper."""
    optimizer: torch.optim.Optimizer = underlying(trainer.optimizer)
    return optimizer


def scheduler(trainer: Trainer) -> Any:
    """The learning-rate scheduler below accelerate's wrapper.

    Of one that DeepSpeed has made itself or was given, the wrapper takes no step.
    """
    outer = trainer.lr_scheduler
    return outer.scheduler if isinstance(outer, AcceleratedScheduler) else outer


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
    return {name: whole(p).cpu().clone() for name, p in trainable_parameters(model).items()}


def model_name(trainer: Trainer) -> str:
    """The model's name; of a local directory the last part, since reports are for others' eyes."""
    name = str(trainer.model.config.name_or_path)
    return Path(name).name if Path(name).is_dir() else name


def trains_adapter(trainer: Trainer) -> bool:
    """Whether an adapter is trained rather than the model itself."""
    return bool(getattr(trainer.model, "peft_config", None))


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log through the trainer without closing a subclass's own logging window.

    SFTTrainer.log averages and clears the metrics gathered since the last log; its base does not.
    A log of the trainer's own that is due after this step still takes place.
    """
    with _still_due(trainer):
        Trainer.log(trainer, metrics)


@contextlib.contextmanager
def _still_due(trainer: Trainer) -> Iterator[None]:
    """Let a log and an evaluation that are due take place: the trainer takes these for them."""
    log_is_due, evaluation_is_due = trainer.control.should_log, trainer.control.should_evaluate
    try:
        yield
    finally:
        trainer.control.should_log |= log_is_due
        trainer.control.should_evaluate |= evaluation_is_due
