"""The training after the switch: its learning rates, and the restart of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from hf_auxselect.capture.schedule import Schedule, schedule_to_come
from hf_auxselect.sharding import assign, shape_of, trainable_parameters
from hf_auxselect.store.records import RemainingTraining
from hf_auxselect.trainer import access
from hf_auxselect.trainer.access import option_value, preserved_rng, torch_optimizer
from hf_auxselect.zero import ZeroOptimizer


def restart(trainer: Trainer, initial: Mapping[str, Tensor]) -> None:
    """Put the trainable parameters back, and forget optimizer state and best checkpoint.

    In place, since the optimizer and distributed wrappers hold references.

    Raises:
        ValueError: ``initial`` does not match the trainable parameters.
    """
    trainable = trainable_parameters(trainer.model)
    shapes = {name: list(tensor.shape) for name, tensor in initial.items()}
    if shapes != {name: list(shape_of(p)) for name, p in trainable.items()}:
        raise ValueError(
            "after='restart': the initial parameters on disk are not those of this model; the run "
            "was started with another adapter. Start again, in another output_dir."
        )
    assign(trainer.model, trainable, initial)
    for parameter in trainable.values():
        parameter.grad = None
    zero = ZeroOptimizer.of(trainer.optimizer)
    if zero is None:
        torch_optimizer(trainer).state.clear()
    else:
        zero.set_masters(trainable, initial)
        zero.forget()
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def schedule_restart(trainer: Trainer, switch_step: int) -> None:
    """Let the learning rate run through its schedule once more, over the steps after the switch.

    The factors become a function of the global step alone, lambda(s) = first(s) before the switch
    and second(s - switch_step) after it, so that a resumed run needs nothing else.

    Raises:
        ValueError: the scheduler is not a ``LambdaLR`` made by Trainer.
    """
    scheduler = access.scheduler(trainer)
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
            access.scheduler(trainer),
            torch_optimizer(trainer),
            skip=first - trainer.state.global_step,
            count=trainer.state.max_steps - first,
            shared=(trainer, trainer.model, trainer.optimizer),
        )


def training_to_come(trainer: Trainer, switch_step: int, *, restarts: bool) -> RemainingTraining:
    """What the optimizer will be told in the steps after the switch."""
    schedule = schedule_after(trainer, switch_step)
    momentum = schedule.momentum_coefficients[schedule.reference_group]
    return RemainingTraining(
        learning_rates=tuple(schedule.learning_rates[schedule.reference_group]),
        group_learning_rates=tuple(map(tuple, schedule.learning_rates)),
        learning_rates_are_known=schedule.unknown_because is None,
        momentum_coefficients=tuple(momentum) if len(set(momentum)) > 1 else None,
        max_grad_norm=float(trainer.args.max_grad_norm or 0.0),
        examples_per_step=int(trainer.get_total_train_batch_size(trainer.args)),
        after="restart" if restarts else "continue",
    )
