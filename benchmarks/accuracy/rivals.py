"""Published methods that train to choose, or while they choose, to compare with.

Each starts from a family's warm-up checkpoint and ends where every other run ends.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from benchmarks.accuracy.baselines import Array, trainer_at_switch
from benchmarks.accuracy.gradex_reference import trainable
from benchmarks.accuracy.ground_truth import make_trainer, train_and_measure
from benchmarks.families import FAMILIES
from hf_auxselect import FixedSelection, TaskSelectionCallback
from hf_auxselect.trainer.access import trainable_state

Run = dict[str, Any]


def target_only(family: str, seed: int) -> Run:
    """Train on rows of the target that are not evaluated, and on no task at all.

    It reads what no strategy of choosing has: rows of the target to train on, as many as are
    evaluated.
    """
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            family,
            Path(directory),
            [],
            train_dataset=FAMILIES[family].make_target(1),
            data_seed=seed,
            ignore_data_skip=True,
        )
        return train_and_measure(family, trainer)


def online_mixing(family: str, seed: int) -> Run:
    """Draw the task of every batch by EXP3, whose reward is the batch's training loss.

    With R the rewards' moving averages and eps_t = min(1/K, sqrt(log K / (K t))), task k is drawn
    with the probability

        pi_k = (1 - K eps_t) exp(eps_{t-1} R_k) / sum_j exp(eps_{t-1} R_j) + eps_t,

    and then R_k <- 0.9 R_k + 0.1 loss / pi_k. The target plays no part. The first batches of a run
    are drawn before their predecessors' losses are known: the data loader reads one batch ahead.

    Source: ODM (Albalak et al., "Efficient Online Data Mixing For Language Model Pre-Training",
    2023, arXiv 2312.02406), algorithm 1.
    """
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            family, Path(directory), [], logging_steps=1, data_seed=seed, ignore_data_skip=True
        )
        steps = trainer.args.max_steps - FAMILIES[family].warm_up_steps
        tasks = np.array([*map(FAMILIES[family].tasks.index, trainer.train_dataset["task"])])
        batches = Exp3Batches(tasks, trainer.args.per_device_train_batch_size, steps, seed)
        trainer._get_train_sampler = lambda *_: batches
        trainer.add_callback(_Rewards(batches))
        return train_and_measure(family, trainer)


class Exp3Batches(Sampler[int]):
    """Rows in batches of one task each, which EXP3 draws; see :func:`online_mixing`."""

    def __init__(self, tasks: Array, batch_size: int, num_batches: int, seed: int) -> None:
        self._rows = [np.flatnonzero(tasks == k) for k in range(int(tasks.max()) + 1)]
        self._batch_size, self._num_batches = batch_size, num_batches
        self._rng = np.random.default_rng(seed)
        self._rewards_K = np.zeros(len(self._rows))
        self._drawn: list[tuple[int, float]] = []
        self._rewarded = 0

    def __len__(self) -> int:
        return self._batch_size * self._num_batches

    def __iter__(self) -> Iterator[int]:
        for _ in range(self._num_batches):
            pi_K = self.probabilities()
            k = int(self._rng.choice(len(pi_K), p=pi_K))
            self._drawn.append((k, float(pi_K[k])))
            yield from self._rng.choice(self._rows[k], self._batch_size, replace=False).tolist()

    def probabilities(self) -> Array:
        """Of drawing each task for the next batch [K]."""
        num_tasks, t = len(self._rewards_K), len(self._drawn) + 1
        now, before = (
            min(1 / num_tasks, (np.log(num_tasks) / (num_tasks * max(1, at))) ** 0.5)
            for at in (t, t - 1)
        )
        power_K = np.exp(before * (self._rewards_K - self._rewards_K.max()))
        return (1 - num_tasks * now) * power_K / power_K.sum() + now

    def reward(self, loss: float) -> None:
        """Tell the loss of the oldest batch that has none yet."""
        k, probability = self._drawn[self._rewarded]
        self._rewards_K[k] = 0.9 * self._rewards_K[k] + 0.1 * loss / probability
        self._rewarded += 1


class _Rewards(TrainerCallback):
    """Passes the loss of each step on."""

    def __init__(self, batches: Exp3Batches) -> None:
        self._batches = batches

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A log of a step's training loss."""
        if "loss" in (logs or {}):
            self._batches.reward(float(logs["loss"]))


TRAINED_BY_ITSELF: dict[str, Callable[[str, int], Run]] = {
    "target only": target_only,
    "online mixing (EXP3)": online_mixing,
}
"""Strategies without one mixture: family and seed -> what ``train_and_measure`` returns."""


def interpolated_adapters(family: str, num_mixtures: int = 64) -> Array:
    """The weights [K] whose mean of one-task adapters has the lowest loss.

    From the warm-up's adapter theta, theta + Delta_k is trained on each task alone, to the end of
    the run. The target's loss is measured at theta + sum_k w_k Delta_k for the K tasks alone, all
    tasks, and mixtures w drawn from a Dirichlet(1); the lowest one counts. OP-Mix fits a log-linear
    law to them, the least value of which, for a single target, is always at a single task.

    Source: OP-Mix (arXiv 2605.15220), its proxies.
    """
    num_tasks = len(FAMILIES[family].tasks)
    adapters = [_adapter_of_task(family, k) for k in range(num_tasks)]
    rng = np.random.default_rng(0)
    weights_MK = np.vstack(
        [
            np.eye(num_tasks),
            np.full((1, num_tasks), 1 / num_tasks),
            rng.dirichlet(np.ones(num_tasks), num_mixtures - num_tasks - 1),
        ]
    )
    losses = []
    with trainer_at_switch(family) as trainer:
        for weights_K in weights_MK:
            with torch.no_grad():
                for name, p in trainable(trainer).items():
                    # The weights sum to 1: the mean of the adapters is theta + sum_k w_k Delta_k.
                    p.zero_()
                    for weight, adapter in zip(weights_K.tolist(), adapters, strict=True):
                        p.add_(adapter[name], alpha=weight)
            losses.append(trainer.evaluate()["eval_loss"])
    return weights_MK[int(np.argmin(losses))]


def _adapter_of_task(family: str, k: int) -> dict[str, torch.Tensor]:
    """The adapter after training on one task."""
    callback = TaskSelectionCallback(
        warmup=FAMILIES[family].warm_up_steps,
        selector=FixedSelection({FAMILIES[family].tasks[k]: 1.0}, estimate=False),
        seed=1,
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [callback])
        train_and_measure(family, trainer)
    return trainable_state(trainer.model)
