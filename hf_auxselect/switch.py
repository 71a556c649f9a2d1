"""What the package knows of Trainer's insides: its data, its batches, its optimizer.

Only ``verification``, which steps through a training loop of its own, knows more of them.
Everything here was checked against the source of transformers 5.23, trl 1.16 and accelerate 1.15.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, get_scheduler

from hf_auxselect.mixture import MixtureSampler, TaskRows, joined_tasks
from hf_auxselect.optimizer_state import underlying
from hf_auxselect.per_example import IGNORE_INDEX, Batch
from hf_auxselect.schedule import Schedule, schedule_to_come

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

PACKING_RECIPE = (
    "Set packing=False; or pack each task by itself before making the trainer: "
    "trl.pack_dataset(tokenized, max_length, 'bfd') for each task, concatenate_tasks(...), and "
    "SFTConfig(packing=False, padding_free=True, max_length=None)."
)


def callers() -> Iterator[FrameType]:
    """The frames of the call stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
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


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for settings under which the selection would be wrong or impossible.

    Raises:
        ValueError: names the setting, and what to do.
    """
    args = trainer.args
    if trainer.train_dataset is None:
        raise ValueError("the trainer has no train_dataset; there are no tasks to select from.")
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(
        trainer.train_dataset, "__len__"
    ):
        raise ValueError(
            "train_dataset is an iterable dataset; rows of a dropped task could not be left out. "
            "Materialise the tasks (Dataset.from_list(list(stream.take(n)))) and join them with "
            "concatenate_tasks."
        )
    if getattr(args, "packing", False):
        raise ValueError(
            f"packing=True mixes tasks within a row and drops the task column. {PACKING_RECIPE}"
        )
    if getattr(args, "eval_packing", False):
        raise ValueError(
            "eval_packing=True packs the target's examples into rows. Set eval_packing=False."
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
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func replaces the token loss that the estimates are about; remove it."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} changes the eval loss, which "
            "the estimates take for the mean negative log-likelihood; set it to 0."
        )
    if getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(
            f"loss_type={args.loss_type!r} changes the eval loss, which the estimates take for the "
            "mean negative log-likelihood; set loss_type='nll'."
        )


def warn_of_differences(trainer: Trainer, *, is_rewritten: bool) -> None:
    """Say where a run will not be quite what the user's settings say.

    Args:
        trainer: before its first step.
        is_rewritten: whether the mixture is, after the switch.
    """
    strategy = trainer.args.train_sampling_strategy
    if is_rewritten and strategy != "random":
        logger.warning(
            "train_sampling_strategy=%r rules the warm-up; the mixture after it is drawn at "
            "random, in the shares of the selection.",
            strategy,
        )
    owner = next(c for c in type(trainer).__mro__ if "compute_loss" in vars(c))
    if owner.__module__.partition(".")[0] not in ("transformers", "trl"):
        logger.warning(
            "%s.compute_loss replaces the trainer's; the estimates are about the model's own mean "
            "negative log-likelihood per label token.",
            owner.__name__,
        )


def read_tasks(trainer: Trainer, task_column: str) -> TaskRows:
    """The task of every row of the training set, after the trainer has prepared it.

    Preparation may drop or reorder rows (truncation, shuffling), so only the trainer's own copy
    tells which row belongs to which task.

    Raises:
        ValueError: there is no task column, or fewer than two tasks are left.
    """
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a map-style dataset of PyTorch
        first = dataset[0] if len(dataset) else {}
        columns = list(first) if isinstance(first, Mapping) else []
        labels = (
            [dataset[i][task_column] for i in range(len(dataset))] if task_column in columns else []
        )
    elif task_column in columns:
        labels = dataset[task_column]
    if task_column not in columns:
        raise ValueError(
            f"train_dataset has no column {task_column!r} (it has {list(columns)}). Join the tasks "
            "with concatenate_tasks({name: dataset, ...}), keep that column when you map the "
            "dataset, or pass task_column=... if it has another name."
        )
    tasks = TaskRows.from_labels(labels)
    gone = [name for name in joined_tasks(dataset) if name not in tasks.names]
    if gone:
        raise ValueError(
            f"the task {gone[0]!r} has lost all its rows in the trainer's preparation: no label "
            "token is left of any after truncation. Raise max_length, shorten its prompts, or "
            "leave the task out."
        )
    if len(tasks.names) < 2:
        raise ValueError(
            f"train_dataset holds {len(tasks.names)} task(s) {list(tasks.names)} in its column "
            f"{task_column!r}; a selection needs at least two."
        )
    return tasks


def target_dataset(trainer: Trainer, target: str | None) -> Any:
    """The evaluation set whose loss is minimised.

    Raises:
        ValueError: there is none, or ``target`` does not name one.
    """
    datasets = trainer.eval_dataset
    if datasets is None:
        raise ValueError(
            "the trainer has no eval_dataset; pass eval_dataset=... with examples of the target."
        )
    if isinstance(datasets, Mapping):
        if target not in datasets:
            raise ValueError(
                f"target={target!r} is not a key of eval_dataset, which has {sorted(datasets)}; "
                "pass target=... with one of them."
            )
        dataset = datasets[target]
    elif target is not None:
        raise ValueError(
            f"target={target!r} asks for a key of eval_dataset, which is not a dict. Leave target "
            "out, or pass eval_dataset={name: dataset, ...}."
        )
    else:
        dataset = datasets
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError("the target's eval_dataset is an iterable dataset; materialise it first.")
    if len(dataset) == 0:
        raise ValueError("the target's eval_dataset has no rows.")
    return dataset


class ModelRows(Sequence[Any]):
    """Rows of a dataset with the columns that the trainer hands to its collator.

    Rows that were packed within their task (``seq_lengths``) are taken apart: an example is then
    one document, and ``packed_rows`` tells the row that each came from.
    """

    def __init__(self, trainer: Trainer, dataset: Any) -> None:
        columns = getattr(dataset, "column_names", None)
        if columns is not None and trainer.args.remove_unused_columns:
            dataset = trainer._remove_unused_columns(dataset, description="gradient pass")
            columns = dataset.column_names
        self._dataset = dataset
        self._starts: np.ndarray | None = None
        if columns is not None and "seq_lengths" in columns:
            lengths = dataset["seq_lengths"]
            self.packed_rows = np.repeat(np.arange(len(dataset)), [len(row) for row in lengths])
            self._lengths = np.concatenate([np.asarray(row, np.int64) for row in lengths])
            self._starts = np.concatenate([np.cumsum([0, *row[:-1]]) for row in lengths])
        else:
            self.packed_rows = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self.packed_rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._dataset[int(self.packed_rows[index])]
        if self._starts is None:
            return row
        part = slice(self._starts[index], self._starts[index] + self._lengths[index])
        return {name: row[name][part] for name in ("input_ids", "labels") if name in row}


def collate_function(trainer: Trainer) -> Callable[[list[Any]], Batch]:
    """Batches as the trainer makes them, padded (one row per example) even under padding_free."""
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False):
        collator = dataclasses.replace(collator, padding_free=False)
    collator = trainer._get_collator_with_removed_columns(collator)

    def collate(rows: list[Any]) -> Batch:
        batch = collator(rows)
        if "labels" not in batch:
            raise ValueError(
                "the trainer's data_collator returns no labels; use one that does, such as "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False)."
            )
        return trainer._prepare_inputs(batch)

    return collate


def count_label_tokens(trainer: Trainer, batch: Batch) -> np.ndarray:
    """int64 [B]: positions of each row of a batch that carry loss."""
    labels = batch["labels"]
    if not trainer.model.config.is_encoder_decoder:
        labels = labels[:, 1:]
    return (labels != IGNORE_INDEX).sum(1).cpu().numpy()


def evaluation_weights(
    trainer: Trainer, rows: ModelRows, example_ids: Sequence[int]
) -> list[float]:
    """Weight of each example in the eval loss that the trainer logs, up to a common factor.

    The trainer averages over label tokens within an evaluation batch, and over batches by their
    number of rows: an example with n label tokens in a batch of b rows with n_b label tokens has
    the weight b * n / n_b.
    """
    collate, size = collate_function(trainer), trainer.args.eval_batch_size
    if trainer.args.train_sampling_strategy == "group_by_length":
        size = len(rows)  # evaluation batches are then drawn at random
    weights = []
    counts: np.ndarray | None = None
    first = -1
    for example in example_ids:
        if counts is None or example >= first + len(counts):
            first = example - example % size
            chunk = range(first, min(first + size, len(rows)))
            counts = np.concatenate(
                [
                    count_label_tokens(trainer, collate([rows[i] for i in chunk[j : j + 64]]))
                    for j in range(0, len(chunk), 64)
                ]
            )
        weights.append(float(counts[example - first] * len(counts) / max(counts.sum(), 1)))
    return weights


class MixtureBatches:
    """Batches of a mixture, from a loader that the trainer itself builds."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
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
        trainer = self._trainer
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
        self._trainer = trainer
        self._original = trainer.get_batch_samples
        trainer.get_batch_samples = self._get_batch_samples

    def remove(self) -> None:
        """Give the trainer its own method back, and stop the loader."""
        self.mixture.close()
        if vars(self._trainer).get("get_batch_samples") == self._get_batch_samples:
            del self._trainer.get_batch_samples

    def _get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.mixture.iterator is None:
            return self._original(epoch_iterator, num_batches, device)
        self._retire(epoch_iterator)
        return self._original(self.mixture.iterator, num_batches, device)

    def _retire(self, epoch_iterator: Any) -> None:
        """Stop the trainer's own loader, which is read no more, with its workers."""
        epoch_iterator.close()
        base = getattr(self._trainer.callback_handler.train_dataloader, "base_dataloader", None)
        if base is not None:
            base._iterator = None  # persistent workers live as long as this
        for loader in self._trainer.accelerator.gradient_state.dataloader_references:
            if loader is not None and loader is not self.mixture.loader:
                loader.end()


def consumed_batches(step: int, batches_per_epoch: int, accumulation: int) -> int:
    """Micro-batches per process that the training loop has drawn after ``step`` optimizer steps.

    The last step of an epoch draws what is left of it, which may be less than ``accumulation``.
    """
    steps_per_epoch = max(-(-batches_per_epoch // accumulation), 1)
    epochs, rest = divmod(step, steps_per_epoch)
    return epochs * batches_per_epoch + rest * accumulation


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
