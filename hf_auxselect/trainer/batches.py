"""Where a Trainer gets its batches from: its own loader before the switch, a mixture after it."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from transformers import Trainer

from hf_auxselect.sampler import MixtureSampler
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.access import met, preserved_rng, stop_workers


class MixtureIterator(Iterator[Any]):
    """What :class:`MixtureBatches` is read by; by its type other iterators are told from it."""

    def __init__(self, batches: Generator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading."""
        self._batches.close()


class MixtureBatches:
    """Batches of a mixture, from a loader that the trainer itself builds."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)
        self.loader: Any = None
        self.iterator: MixtureIterator | None = None

    def start(
        self, tasks: TaskRows, shares: np.ndarray, seed: int, *, consumed: int, total: int
    ) -> None:
        """Draw rows of ``tasks`` in the given shares [K] from here on.

        Args:
            tasks: task of each row of the training set.
            shares: float [K], summing to 1.
            seed: determines the order.
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
        self.iterator = MixtureIterator(self._iterate())

    def _iterate(self) -> Generator[Any]:
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
            self.iterator.close()
            self.loader.end()
            stop_workers(self.loader)
        self.iterator = self.loader = None


class BatchSource:
    """Feeds a trainer from its own data loader until the switch, and from a mixture after it.

    ``Trainer.get_batch_samples`` is the one place where the training loop draws batches. It is
    shadowed on this trainer alone. Until :meth:`draw_mixture` it passes the call through, so that
    the warm-up is the run without this package. From then on it passes the mixture's iterator; the
    trainer's loader, whose length determines epochs, schedule and resume, is left in place and
    never read again, with what its workers had fetched ahead.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.mixture = MixtureBatches(trainer)
        # After an error in train() this object lives on; the trainer need not.
        self._trainer = weakref.ref(trainer)
        self._shadowed = vars(trainer).get("get_batch_samples")
        trainer.get_batch_samples = self._get_batch_samples

    def require_own_sampler(self, tasks: TaskRows, seed: int) -> None:
        """Check before the first step that :meth:`draw_mixture` will work.

        Raises:
            ValueError: the trainer's loader does not take its sampler from ``_get_train_sampler``.
        """
        try:
            sampler = MixtureSampler(tasks, tasks.counts / tasks.counts.sum(), seed)
            with preserved_rng():
                self.mixture.build_loader(sampler)
        except BaseException:  # whatever it is, the trainer's method must be its own again
            self.remove()
            raise

    def draw_mixture(self, tasks: TaskRows, shares: np.ndarray, seed: int, *, since: int) -> None:
        """Draw rows of ``tasks`` in the given shares from here on.

        Args:
            tasks: task of each row of the training set.
            shares: float [K], summing to 1.
            seed: determines the order.
            since: the switch step: optimizer step after which the mixture's first row came.
        """
        state = met(self._trainer).state
        consumed = self._batches_between(since, state.global_step)
        total = self._batches_between(state.global_step, state.max_steps)
        self.mixture.start(tasks, shares, seed, consumed=consumed, total=total)

    def rows_to_read(self, since: int) -> int:
        """Number of rows, over all processes, that the steps after ``since`` read of a mixture."""
        trainer = met(self._trainer)
        rows_per_batch = trainer.callback_handler.train_dataloader.total_batch_size
        return self._batches_between(since, trainer.state.max_steps) * rows_per_batch

    def reads(self, tasks: TaskRows, shares: np.ndarray, seed: int, *, since: int) -> np.ndarray:
        """How often the steps after ``since`` read each row of the training set: int64 [N].

        The arguments are those of :meth:`draw_mixture`, whose order this counts.
        """
        return MixtureSampler(tasks, shares, seed, length=self.rows_to_read(since)).reads()

    def _batches_between(self, first_step: int, last_step: int) -> int:
        """Micro-batches per process that the training loop draws in the steps between two."""
        trainer = met(self._trainer)
        per_epoch = len(trainer.callback_handler.train_dataloader)
        accumulation = trainer.args.gradient_accumulation_steps
        first, last = (
            consumed_batches(step, per_epoch, accumulation) for step in (first_step, last_step)
        )
        return last - first

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
        # A ground-truth run at a later switch brings a mixture of its own.
        if self.mixture.iterator is not None and not isinstance(epoch_iterator, MixtureIterator):
            self._retire(trainer, epoch_iterator)
            epoch_iterator = self.mixture.iterator
        if self._shadowed is not None:
            return self._shadowed(epoch_iterator, num_batches, device)
        return type(trainer).get_batch_samples(trainer, epoch_iterator, num_batches, device)

    def _retire(self, trainer: Trainer, epoch_iterator: Any) -> None:
        """Stop the trainer's own loader, which is read no more, with its workers."""
        epoch_iterator.close()
        stop_workers(trainer.callback_handler.train_dataloader)
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
