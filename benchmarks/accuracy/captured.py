"""Gradients at a family's warm-up checkpoint: captured when first asked for, then cached."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import TrainerCallback
from trl import SFTTrainer

from benchmarks.accuracy.ablations import (
    before_restart,
    replaced,
    signed_token_margins,
)
from benchmarks.accuracy.ground_truth import (
    CACHE,
    make_trainer,
    warm_up,
)
from benchmarks.families import FAMILIES
from hf_auxselect import (
    AbstractEstimator,
    GradientStore,
    LinearizedTraining,
    TaskSelectionCallback,
)
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.probes import losses_at
from hf_auxselect.capture.scalars import add_scalar
from hf_auxselect.trainer.access import trainable_state
from hf_auxselect.trainer.data import ModelRows, collate_function


@dataclass(frozen=True, kw_only=True)
class _Everything(LinearizedTraining):
    """Captures what any of the estimators needs."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "sampled_loss", "margin")


@dataclass(frozen=True, kw_only=True)
class _Tokens(LinearizedTraining):
    """Captures what one of the ablations needs beyond that, and no probes."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "token_margins@optimizer")
    probes: bool = False


class StopAfterOneStep(TrainerCallback):
    """Ends the run after one step: the gradients are captured before it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        control.should_training_stop = True


def gradients(family: str, mode: str, dim: int = 4096) -> GradientStore:
    """The gradients at the warm-up's checkpoint, captured when they are first asked for."""
    if mode == "restart":  # from the same checkpoint: the gradients are the same
        store = gradients(family, "continue", dim)
        return before_restart(store, losses_before_training(family, store))
    return _captured(family, f"{mode}-{dim}", _Everything(), dim, last="second_points")


def losses_before_training(family: str, store: GradientStore) -> np.ndarray:
    """Those of the store's examples of the target [T], at the adapter's initial values."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [])
        with trainer.compute_loss_context_manager():
            return losses_at(
                trainer.model,
                captured_examples(trainer, store.target, 0, trainer.eval_dataset),
                collate_function(trainer),
                trainable_state(trainer.model),
                batch_size=trainer.args.per_device_eval_batch_size,
            ).losses_T


def captured_examples(
    trainer: SFTTrainer, store: GradientStore, k: int, dataset: Any
) -> TaskExamples:
    """Those of its k-th task that a store holds, as rows for the model."""
    return TaskExamples(
        name=store.task_names[k],
        rows=ModelRows(trainer, dataset),
        example_ids=store.example_ids[store.task_ids == k].tolist(),
        num_rows=int(store.task_sizes[k]),
    )


def with_token_margins(family: str, store: GradientStore, *, capture: bool) -> GradientStore | None:
    """The store with the gradients of the tokens' margins; None if they are not to be had.

    They are of the same examples in the same order. It takes as long as the whole pass.
    """
    dim = store.metadata["projection_dim"]
    name = f"tokens-{dim}"
    if not (capture or complete_store(_place(family, name), "momentum")):
        return None
    add_scalar("token_margins", signed_token_margins)
    captured = _captured(family, name, _Tokens(), dim, last="momentum")

    def part(of: GradientStore, tokens: GradientStore, **target: GradientStore) -> GradientStore:
        assert np.array_equal(of.example_ids, tokens.example_ids)
        scalars = {name: of.scalar(name) for name in of.scalars}
        name = "token_margins@optimizer"
        return replaced(of, scalars=scalars | {name: tokens.scalar(name)}, **target)

    return part(store, captured, target=part(store.target, captured.target))


def _captured(
    family: str, name: str, estimator: AbstractEstimator, dim: int, *, last: str
) -> GradientStore:
    """What an estimator asks for, from the cache if it is there with the vector added ``last``."""
    directory, path = CACHE / family / name, _place(family, name)
    store = complete_store(path, last)
    if store is None:
        callback = TaskSelectionCallback(
            warmup=FAMILIES[family].warm_up_steps,
            estimator=estimator,
            examples_per_task=FAMILIES[family].examples_per_task,
            projection_dim=dim,
            seed=0,
        )
        trainer = make_trainer(family, directory, [callback, StopAfterOneStep()])
        trainer.train(resume_from_checkpoint=str(warm_up(family)))
        store = GradientStore.load(path)
    return store


def _place(family: str, name: str) -> Path:
    """Where gradients are cached."""
    return CACHE / family / name / "_task_selection" / "gradients"


def complete_store(path: Path, vector: str) -> GradientStore | None:
    """The store, if it is whole and has that vector, which is added last."""
    index = path / "index.json"
    if not index.is_file() or not json.loads(index.read_text())["complete"]:
        return None
    store = GradientStore.load(path)
    return store if vector in store.vectors else None
