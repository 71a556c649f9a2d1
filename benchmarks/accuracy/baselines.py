"""What an estimator must beat: simple ways to rank mixtures, with the interface of an estimator.

They order mixtures and do not know by how much the loss will move (but for ``Constant``, which says
that it will not); ``loss`` is therefore a score on an arbitrary scale (lower is better), without an
interval. Most read the gradient store alone. Those that compare a family's texts with its target's
keep the scores of the tasks in the cache, for as long as the checkpoint stays the same.

Shapes: K tasks, M mixtures, D projection_dim; B rows of a batch, S positions, H hidden size.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from trl import SFTTrainer

from benchmarks.accuracy.ground_truth import CACHE, make_trainer, warm_up
from benchmarks.families import FAMILIES
from hf_auxselect import AbstractEstimator, Estimate, FittedEstimator, GradientStore
from hf_auxselect.capture.scalars import Batch
from hf_auxselect.estimators import normalize_mixtures
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.trainer.data import collate_function

Array = np.ndarray
Rows = list[list[int]]
"""Token ids of some rows, prompt and completion."""

ROWS_AT_ONCE = 16


class _Score(FittedEstimator):
    """A function of the shares of the tasks [M, K] -> [M]."""

    def __init__(self, store: GradientStore, function: Callable[[Array], Array]) -> None:
        self._sizes = store.task_sizes
        self._function = function

    def estimate(self, weights: ArrayLike) -> Estimate:
        shares_MK = normalize_mixtures(weights, self._sizes)
        score_M = self._function(shares_MK)
        return Estimate(loss=score_M, low=score_M, high=score_M, weights=shares_MK)

    def diagnostics(self) -> dict[str, float]:
        return {}


def task_means(store: GradientStore, vectors_ND: Array) -> Array:
    """Mean over each task's examples, weighted as in its loss: [K, D]."""
    means_KD = np.zeros((len(store.task_names), vectors_ND.shape[1]))
    np.add.at(means_KD, store.task_ids, store.example_weights[:, None] * vectors_ND)
    return means_KD


def _gradients(store: GradientStore, *, preconditioned: bool) -> Array:
    """Loss gradients [N, D], with or without the optimizer's preconditioner."""
    return store.scalar("loss@optimizer" if preconditioned else "loss")[1].astype(np.float64)


def _score_of_tasks(store: GradientStore, scores: Mapping[str, float]) -> _Score:
    """Minus the mean of the tasks' scores (more is better) by their shares in the mixture."""
    score_K = np.array([scores[name] for name in store.task_names])
    return _Score(store, lambda shares: -(shares @ score_K))


@dataclass(frozen=True, kw_only=True)
class Constant(AbstractEstimator):
    """The target's loss at the switch, for every mixture: that training changes nothing.

    In nats per label token. What an error has to be compared with.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss",)

    def fit(self, store: GradientStore) -> FittedEstimator:
        loss = float(store.target.task_losses[0])
        return _Score(store, lambda shares: np.full(len(shares), loss))


@dataclass(frozen=True, kw_only=True)
class MeanDotProduct(AbstractEstimator):
    """Minus the dot product of the mixture's and the target's mean loss gradient.

    The first-order change of the target's loss under one small step of gradient descent.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer")
    preconditioned: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        means = task_means(store, _gradients(store, preconditioned=self.preconditioned))
        of_target = _gradients(store.target, preconditioned=self.preconditioned)
        score = -means @ (store.target.example_weights @ of_target)
        return _Score(store, lambda shares: shares @ score)


@dataclass(frozen=True, kw_only=True)
class MeanCosine(AbstractEstimator):
    """Minus the mean cosine between an example's and the target's mean loss gradient.

    Source: LESS (Xia et al., ICML 2024), section 3, with task means in place of examples.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer")
    preconditioned: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        gradients = _gradients(store, preconditioned=self.preconditioned)
        gradients /= np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-300)
        of_target = _gradients(store.target, preconditioned=self.preconditioned)
        score = -task_means(store, gradients) @ (store.target.example_weights @ of_target)
        return _Score(store, lambda shares: shares @ score)


@dataclass(frozen=True, kw_only=True)
class MeanGradientStep(AbstractEstimator):
    """Change of the target's loss, to first order, by one step of fixed length down the mixture.

    For a step of length s along the mean gradient b_w of the mixture's training loss (weighted by
    label tokens, as the trainer does), with b_T that of the target's loss,

        delta = -s b_w / |b_w|,    L_T(delta) - L_T = b_T . delta = -s |b_T| cos(b_T, b_w).

    To first order s is a factor, and taken for 1. Unlike in ``MeanDotProduct``, large gradients, or
    tasks that agree, gain nothing. The authors' procedure (``gradex_reference.py``) comes to such a
    step, of the margins: their regression is penalised so strongly that its coefficients are nearly
    the mean gradient, and then rescaled.

    Preconditioned: the step has its length, and the gradients their angle, in the coordinates of
    the optimizer.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss", "loss@optimizer")
    preconditioned: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        means = task_means(store, _gradients(store, preconditioned=self.preconditioned))
        of_target = _gradients(store.target, preconditioned=self.preconditioned)
        mean_of_target = store.target.example_weights @ of_target
        num_rows = np.bincount(store.task_ids)
        tokens_per_row = np.bincount(store.task_ids, store.num_label_tokens) / num_rows

        def change(shares: Array) -> Array:
            # The common factor of a mixture does not matter: its gradient is normalised.
            of_mixtures = (shares * tokens_per_row) @ means
            norms = np.linalg.norm(of_mixtures, axis=1)
            return -(of_mixtures @ mean_of_target) / np.maximum(norms, 1e-300)

        return _Score(store, change)


@dataclass(frozen=True, kw_only=True)
class StepNorm(AbstractEstimator):
    """Minus the norm of the mixture's mean gradient: how far a step goes, wherever it leads."""

    scalars: ClassVar[tuple[str, ...]] = ("loss@optimizer",)

    def fit(self, store: GradientStore) -> FittedEstimator:
        means = task_means(store, _gradients(store, preconditioned=True))
        return _Score(store, lambda shares: -np.linalg.norm(shares @ means, axis=1))


@dataclass(frozen=True, kw_only=True)
class NumberOfTasks(AbstractEstimator):
    """Minus the effective number of tasks, 1 / (sum of squared shares): more is better."""

    scalars: ClassVar[tuple[str, ...]] = ("loss",)

    def fit(self, store: GradientStore) -> FittedEstimator:
        return _Score(store, lambda shares: -1 / (shares**2).sum(1))


@dataclass(frozen=True, kw_only=True)
class RepresentationSimilarity(AbstractEstimator):
    """Minus the mean cosine between a task's and the target's rows in the model's representation.

    A row, prompt and completion, is represented by the mean of the S last hidden states h_i at the
    checkpoint, later positions counting more, as they have seen more of the row:

        r = sum_i i h_i / sum_i i,    i = 1 ... S.

    A task scores the mean cosine over all pairs of one of its rows and one of the target's, and a
    mixture the mean of its tasks by their shares.

    Args:
        family: whose rows and model.

    Source: RDS+ (Ivison et al., "Large-Scale Data Selection for Instruction Tuning", 2025,
    arXiv 2503.01807), with task means in place of picking rows in turn; the weights are those of
    SGPT (Muennighoff, 2022, arXiv 2202.08904).
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss",)
    family: str

    def fit(self, store: GradientStore) -> FittedEstimator:
        return _score_of_tasks(store, _cached(self.family, "representations", store, _mean_cosines))


@dataclass(frozen=True, kw_only=True)
class NgramOverlap(AbstractEstimator):
    """How much a task's rows look like the target's, by their tokens and pairs of tokens.

    With c the counts of the n-grams (n = 1 and 2, together) in all rows of a task, prompts and
    completions, and t those of the target, a task scores their cosine c . t / (|c| |t|); or, with
    ``importance``, the mean logarithm of the importance weight of its n-grams,

        sum_j c_j log(p_j / q_j) / sum_j c_j,

    where p are the frequencies of the target and q those of all tasks, with 1 added to every count.

    Args:
        family: whose rows.
        importance: the second score.

    Source: for the importance weight, DSIR (Xie et al., "Data Selection for Language Models via
    Importance Resampling", NeurIPS 2023, section 4), per n-gram since rows differ in length, and
    without hashing, which saves memory that is not short here.
    """

    scalars: ClassVar[tuple[str, ...]] = ("loss",)
    family: str
    importance: bool = False

    def fit(self, store: GradientStore) -> FittedEstimator:
        name, compute = (
            ("ngram_importance", _mean_importances)
            if self.importance
            else ("ngram_cosines", _ngram_cosines)
        )
        return _score_of_tasks(store, _cached(self.family, name, store, compute))


@contextlib.contextmanager
def trainer_at_switch(family: str) -> Iterator[SFTTrainer]:
    """The family's trainer with the parameters of the warm-up's checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [])
        trainer._load_from_checkpoint(str(warm_up(family)))
        yield trainer


def _cached(
    family: str,
    name: str,
    store: GradientStore,
    compute: Callable[[str, SFTTrainer], dict[str, float]],
) -> dict[str, float]:
    """Score of each task, from the cache if it is of the store's checkpoint."""
    path = CACHE / family / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("parameters") != store.metadata["parameters"]:
        with trainer_at_switch(family) as trainer:
            record = {
                "parameters": store.metadata["parameters"],
                "scores": compute(family, trainer),
            }
        write_atomically(path, to_json(record))
    return record["scores"]


def task_rows(family: str, trainer: SFTTrainer) -> dict[str, Rows]:
    """Token ids of every task's rows, as the trainer has prepared them."""
    rows: dict[str, Rows] = {name: [] for name in FAMILIES[family].tasks}
    for name, ids in zip(
        trainer.train_dataset["task"], trainer.train_dataset["input_ids"], strict=True
    ):
        rows[name].append(ids)
    return rows


def represent(trainer: SFTTrainer, rows: Rows) -> Array:
    """Position-weighted means of the last hidden states: float64 [rows, H]."""
    collate = collate_function(trainer)
    decoder = trainer.model.get_base_model().get_decoder()  # with the adapter, without the head
    trainer.model.eval()

    def weighted_mean(batch: Batch) -> torch.Tensor:
        mask_BS = batch["attention_mask"]
        hidden_BSH = decoder(
            input_ids=batch["input_ids"], attention_mask=mask_BS
        ).last_hidden_state.double()
        weights_BS = mask_BS.cumsum(1) * mask_BS
        return (weights_BS.unsqueeze(-1) * hidden_BSH).sum(1) / weights_BS.sum(1, keepdim=True)

    with torch.no_grad():
        parts = [
            weighted_mean(
                collate([{"input_ids": ids, "labels": ids} for ids in rows[i : i + ROWS_AT_ONCE]])
            )
            for i in range(0, len(rows), ROWS_AT_ONCE)
        ]
    return torch.cat(parts).cpu().numpy()


def _mean_cosines(family: str, trainer: SFTTrainer) -> dict[str, float]:
    def mean_direction(rows: Rows) -> Array:
        vectors = represent(trainer, rows)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)

    # The mean of a product over all pairs is the product of the means.
    target = mean_direction(trainer.eval_dataset["input_ids"])
    return {
        name: float(mean_direction(rows) @ target)
        for name, rows in task_rows(family, trainer).items()
    }


def count_ngrams(family: str, trainer: SFTTrainer) -> tuple[Array, Array]:
    """Counts of every token and pair of tokens: of the tasks [K, n-grams], of the target."""

    def count(rows: Rows) -> Counter[tuple[int, ...]]:
        return Counter(ngram for ids in rows for ngram in [*((i,) for i in ids), *pairwise(ids)])

    counts = [count(rows) for rows in task_rows(family, trainer).values()]
    target = count(trainer.eval_dataset["input_ids"])
    ngrams = sorted(target.keys() | set[tuple[int, ...]]().union(*counts))
    table = np.array([[of[ngram] for ngram in ngrams] for of in [*counts, target]], np.float64)
    return table[:-1], table[-1]


def _ngram_cosines(family: str, trainer: SFTTrainer) -> dict[str, float]:
    tasks, target = count_ngrams(family, trainer)
    cosines = tasks @ target / np.linalg.norm(tasks, axis=1) / np.linalg.norm(target)
    return dict(zip(FAMILIES[family].tasks, cosines.tolist(), strict=True))


def _mean_importances(family: str, trainer: SFTTrainer) -> dict[str, float]:
    tasks, target = count_ngrams(family, trainer)
    pool = tasks.sum(0)
    log_importance = np.log((target + 1) / (target + 1).sum()) - np.log(
        (pool + 1) / (pool + 1).sum()
    )
    scores = tasks @ log_importance / tasks.sum(1)
    return dict(zip(FAMILIES[family].tasks, scores.tolist(), strict=True))
