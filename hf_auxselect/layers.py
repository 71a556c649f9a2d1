"""Which layers to train: scores of layers by gradients of the target, and a choice by them.

Shapes: L layers, T examples of the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from hf_auxselect.checks import is_count
from hf_auxselect.files import JsonDict
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.store.records import LayerGradients

ScoreMethod = Literal["cross_validation", "snr", "rgn"]
Grouping = Literal["block", "module"]
TrainingOfLayers = Literal["all", "freeze", "scale"]

# Constants that shape scores.
_RIDGE = 0.01
"""The ridge of ``cross_validation``, as a share of the sum of squared lengths of the gradients that
are fitted. Set on the planted shifts of ``benchmarks/accuracy/layers.py``, where the ranks with 0.1
and with 0.001 were about as good."""


_ROUNDING = 1e-9
"""A share of the layers counts as a whole number of them up to this."""


def score_layers(
    store: GradientStore, method: ScoreMethod = "cross_validation"
) -> dict[str, float]:
    """Score layers by how well training each of them would serve the target.

    With g_i the gradient of the loss of the target's example i with respect to one layer, w_i its
    weight in the target's loss, and g the mean gradient sum_i w_i g_i:

    * ``"cross_validation"``: a direction d is fitted that lowers all losses of one half of the
      examples alike (ridge regression of 1 on g_i . d). The score is (mean of g_i . d)^2 / (mean of
      (g_i . d)^2) over the other half, 0 where the mean is negative; the mean of both roles of the
      halves. From 0 to 1, which is a step that lowers all losses of the other half alike.
    * ``"snr"``: signal-to-noise ratio |E g|^2 / tr Var(g_i), both without bias: s = |g|^2 - q v
      over v = sum_i w_i |g_i - g|^2 / (1 - q), where q = sum_i w_i^2. It may be negative.
    * ``"rgn"``: relative gradient norm |g| / |theta|. Of an adapted layer theta is the weight that
      is adapted, since an adapter starts at 0.

    Scores compare the layers of one target at one moment. None of them names the right layer
    reliably: see the page on layers in the documentation.

    Args:
        store: captured with ``layers=LayerSelection(...)``, which says what a layer is.
        method: the score.

    Returns:
        The score of each layer, in the order of the model. Gradients are projected to D numbers
        with a relative error of inner products of about 1 / sqrt(D), unless D exceeds the number
        of entries of the layer.

    Raises:
        ValueError: the store has no gradients of layers; an unknown method; or ``"rgn"`` of weights
            that are 0 or cannot be read, since they are quantized.

    Source: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (ICLR
    2023), section 5, for the relative gradient norm and a signal-to-noise ratio, which there is
    taken over the entries of a tensor, here over examples.
    """
    layers = store.layers
    if layers is None:
        raise ValueError(
            "the store has no gradients of layers; capture it with layers=LayerSelection(...)."
        )
    return layer_scores(layers, method)


def layer_scores(layers: LayerGradients, method: ScoreMethod) -> dict[str, float]:
    """:func:`score_layers` of the gradients of layers."""
    _require_one_of("method", method, ScoreMethod)
    if method == "rgn":
        require_weights(dict(zip(layers.names, layers.squared_weights_L.tolist(), strict=True)))
        scores_L = np.sqrt(_squared_mean(layers) / layers.squared_weights_L)
    elif method == "snr":
        scores_L = _signal_to_noise(layers)
    else:
        scores_L = np.array([_cross_validated(gram_TT) for gram_TT in layers.gram_LTT])
    return dict(zip(layers.names, scores_L.tolist(), strict=True))


def require_weights(squared_weights: Mapping[str, float]) -> None:
    """Raise ValueError if ``"rgn"`` cannot divide by the weights of a layer."""
    for name, value in squared_weights.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"layers: method='rgn' divides by the weights of the layer {name!r}, which "
                + ("are 0." if value == 0 else "cannot be read: they are quantized.")
                + " Use method='snr' or 'cross_validation'."
            )


def _squared_mean(layers: LayerGradients) -> np.ndarray:
    w_T = layers.weights_T
    return np.maximum(np.einsum("t,ltu,u->l", w_T, layers.gram_LTT, w_T), 0.0)


def _signal_to_noise(layers: LayerGradients) -> np.ndarray:
    w_T, squared_mean_L = layers.weights_T, _squared_mean(layers)
    square_sum = float(w_T @ w_T)
    mean_square_L = np.einsum("t,ltt->l", w_T, layers.gram_LTT)
    if square_sum >= 1:
        raise ValueError("method='snr' needs 2 or more examples of the target with label tokens.")
    noise_L = np.maximum(mean_square_L - squared_mean_L, 0.0) / (1 - square_sum)
    signal_L = squared_mean_L - square_sum * noise_L
    # Examples whose gradients are all the same have no noise; where all are 0, there is no signal.
    least = 1e-12 * np.maximum(mean_square_L, 1e-300)
    return signal_L / np.maximum(noise_L, least)


def _cross_validated(gram_TT: np.ndarray) -> float:
    """The mean over both roles of two halves: examples at even places, and those at odd ones."""
    halves = np.arange(0, len(gram_TT), 2), np.arange(1, len(gram_TT), 2)
    if not len(halves[1]):
        raise ValueError(
            "method='cross_validation' needs 2 or more examples of the target with label tokens."
        )
    return float(
        np.mean(
            [_of_other_half(gram_TT, *halves), _of_other_half(gram_TT, *reversed(halves))],
        )
    )


def _of_other_half(gram_TT: np.ndarray, fitted: np.ndarray, other: np.ndarray) -> float:
    gram = gram_TT[np.ix_(fitted, fitted)]
    ridge = _RIDGE * float(np.trace(gram))
    if ridge <= 0:
        return 0.0
    coefficients = np.linalg.solve(gram + ridge * np.eye(len(fitted)), np.ones(len(fitted)))
    decreases = gram_TT[np.ix_(other, fitted)] @ coefficients
    mean_square = float(np.mean(decreases**2))
    return max(float(decreases.mean()), 0.0) ** 2 / mean_square if mean_square > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Chooses layers by the target's gradients: for the estimates, and for the rest of training.

    Choose it where the target differs from the training data in one respect, few examples of it
    are at hand, and training all layers would overfit; or to see the scores. The gradient pass
    reads at most 64 examples of the target once more, each alone.

    Args:
        method: the score, see :func:`score_layers`.
        keep: the layers with the highest scores are kept: a share of all (a float up to 1.0), or a
            number (int). Of equal scores, the layer that comes first in the model.
        names: the layers to keep, whatever their scores; ``keep`` then counts for nothing.
        by: ``"block"`` takes the parameters of a block of the model (``model.layers.3``) together;
            ``"module"`` those of a module (``model.layers.3.mlp.up_proj``).
        training: the rest of training. ``"all"``: all layers train; gradients for the estimates are
            those of the kept layers alone. ``"freeze"``: the other layers stay as they are.
            ``"scale"``: also, the steps of a kept layer are multiplied by its score, relative to
            the highest one; by 0 if the score is negative, and by 1 if none is positive. The
            estimates are about such training.

    Raises:
        ValueError, TypeError: for the first option that is wrong.

    Source: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (ICLR
    2023): one block is trained (section 3); Auto-RGN (section 5) is ``method="rgn", keep=1.0,
    training="scale"``, scored once instead of every epoch.
    """

    method: ScoreMethod = "cross_validation"
    keep: float | int = 0.5
    names: tuple[str, ...] = ()
    by: Grouping = "block"
    training: TrainingOfLayers = "all"

    def __post_init__(self) -> None:
        _require_one_of("layers: method", self.method, ScoreMethod)
        _require_one_of("layers: by", self.by, Grouping)
        _require_one_of("layers: training", self.training, TrainingOfLayers)
        keep = self.keep
        is_share = isinstance(keep, float) and 0 < keep <= 1
        if not is_share and not is_count(keep, 1):
            raise ValueError(
                "layers: keep must be a share of the layers, a float in (0, 1], or a number of "
                f"layers, an int of at least 1; got {keep!r}."
            )
        if isinstance(self.names, str) or not isinstance(self.names, Iterable):
            raise TypeError(
                f"layers: names must be a sequence of names of layers, got {self.names!r}."
            )
        object.__setattr__(self, "names", tuple(self.names))
        if twice := [name for name in self.names if self.names.count(name) > 1]:
            raise ValueError(f"layers: names has {twice[0]!r} more than once.")

    def require(self, layers: Sequence[str]) -> None:
        """Raise ValueError if the options do not fit the layers of a model."""
        unknown = [name for name in self.names if name not in layers]
        if unknown:
            raise ValueError(
                f"layers: names has {unknown[0]!r}, but the layers that are trained are "
                f"{list(layers)}."
            )
        if isinstance(self.keep, int) and not self.names and self.keep > len(layers):
            raise ValueError(
                f"layers: keep={self.keep}, but only {len(layers)} layers are trained: "
                f"{list(layers)}."
            )

    def require_examples(self, count: int) -> None:
        """Raise ValueError if so few examples of the target have no score of this method."""
        if count < 2 and self.method != "rgn":
            raise ValueError(
                f"layers: method={self.method!r} compares examples of the target, of which only "
                f"{count} has label tokens. Use method='rgn', or a larger eval_dataset."
            )

    def rates(self, scores: Mapping[str, float]) -> dict[str, float]:
        """By what the steps of each layer are multiplied, from 0 to 1; 0: it is not kept.

        Args:
            scores: of each layer, in the order of the model.

        Raises:
            ValueError: the options do not fit the layers.
        """
        layers = list(scores)
        self.require(layers)
        number = self.keep
        if isinstance(number, float):
            number = max(math.ceil(number * len(layers) - _ROUNDING), 1)
        best = sorted(layers, key=lambda name: -scores[name])[:number]  # stable
        kept = set(self.names or best)
        highest = max(scores[name] for name in kept)
        if self.training != "scale" or highest <= 0:
            return {name: float(name in kept) for name in layers}
        return {name: max(scores[name], 0.0) / highest if name in kept else 0.0 for name in layers}


class LayersRecord(TypedDict):
    """What is written of a choice of layers: into decisions and reports."""

    selection: JsonDict
    """The options of the :class:`LayerSelection`, by name."""
    scores: dict[str, float]
    """Of each layer, in the order of the model."""
    rates: dict[str, float]
    """By what its steps are multiplied; 0: it is not kept."""


def require_layers_record(record: LayersRecord) -> None:
    """Raise ValueError for a record that no choice of layers leaves behind."""
    options: Any = record["selection"]
    _require_one_of("by", options.get("by"), Grouping)
    _require_one_of("method", options.get("method"), ScoreMethod)
    _require_one_of("training", options.get("training"), TrainingOfLayers)
    if not isinstance(options.get("names"), list) or set(record["scores"]) != set(record["rates"]):
        raise ValueError("the layers do not fit together")
    if not all(0 <= rate <= 1 for rate in record["rates"].values()):
        raise ValueError("the rates of layers are not between 0 and 1")


def rates_in_training(record: LayersRecord | None) -> dict[str, float]:
    """By what the steps of each layer are multiplied in the rest of training; empty: by 1."""
    if record is None or record["selection"]["training"] == "all":
        return {}
    return record["rates"]


def _require_one_of(option: str, value: object, kind: object) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{option} must be one of {list(get_args(kind))}, got {value!r}.")
