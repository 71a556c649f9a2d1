"""What a gradient store carries beside its arrays, as typed records.

On disk these are JSON values in the ``metadata`` of the store's index, and arrays in its file of
vectors. The records read both, and say how they are written.

Shapes: K tasks, T examples of the target, E endpoints, L layers, D projection_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from hf_auxselect.files import JsonDict
from hf_auxselect.store.format import StoreError

MAX_PROBE_EXAMPLES = 64
"""At most this many examples of a task, and of the target, are read again by the probes.

A convention: the mean of gradients takes fewer examples than their covariance. Stores that were
written before the ids of these examples do not say which they are; this number then tells.
"""


@dataclass(frozen=True, kw_only=True)
class RemainingTraining:
    """What the optimizer will be told in the training steps after the switch.

    Attributes:
        learning_rates: of each remaining step, for the reference group (the one whose rates the
            optimizer's coordinates refer to). If training restarts: those without the restart.
        group_learning_rates: the same for every parameter group; None if it is not known.
        learning_rates_are_known: False where the scheduler cannot tell; the rates are then those at
            the switch.
        momentum_coefficients: of each step, if the scheduler changes them; else None.
        max_grad_norm: where gradients are clipped; 0: they are not.
        examples_per_step: rows of one optimizer step, over all processes; 0: not known.
        after: whether training continues or restarts.
        examples_per_row: mean number of examples in a row of each task, where rows are packed.
    """

    learning_rates: tuple[float, ...] = ()
    group_learning_rates: tuple[tuple[float, ...], ...] | None = None
    learning_rates_are_known: bool = True
    momentum_coefficients: tuple[float, ...] | None = None
    max_grad_norm: float = 0.0
    examples_per_step: int = 0
    after: Literal["continue", "restart"] = "continue"
    examples_per_row: Mapping[str, float] = field(default_factory=dict)

    @property
    def restarts(self) -> bool:
        """Whether training begins again from the initial parameters."""
        return self.after == "restart"

    @property
    def total_group_rates(self) -> list[float] | None:
        """Sum of the learning rates of each parameter group; None if they are not known."""
        if self.group_learning_rates is None:
            return None
        return [sum(rates) for rates in self.group_learning_rates]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RemainingTraining:
        """Read what :meth:`to_json` has written; keys that it does not know are left alone.

        Raises:
            StoreError: a value is of another type; names its key.
        """
        readers = {
            "learning_rates": _numbers,
            "group_learning_rates": lambda groups: _optional(
                groups, lambda value: tuple(_numbers(rates) for rates in value)
            ),
            "learning_rates_are_known": bool,
            "momentum_coefficients": lambda value: _optional(value, _numbers),
            "max_grad_norm": float,
            "examples_per_step": int,
            "after": _after,
            "examples_per_row": lambda value: {name: float(m) for name, m in value.items()},
        }
        return cls(**_read_fields(content, readers, "training"))

    def to_json(self) -> JsonDict:
        """Its JSON values: what :meth:`from_json` reads."""
        content: JsonDict = {f.name: _as_lists(getattr(self, f.name)) for f in fields(self)}
        if not self.examples_per_row:
            del content["examples_per_row"]
        return content


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerRecord:
    """The run's optimizer at the linearization point, as far as estimators model its steps.

    See :class:`hf_auxselect.capture.optimizer_state.OptimizerState`, from which it is made.

    Attributes:
        name: ``"adam"``, ``"sgd"`` or ``"adafactor"``; empty if the store does not say.
        momentum_coefficient: beta.
        learning_rate_factor: by which learning rates are multiplied.
        weight_decay: per unit of learning rate.
        decay_is_coupled: whether weight decay is added to the gradient, not to the step.
        steps_taken: steps by which the momentum's bias towards 0 is corrected; None: it is not.
        momentum_D: float64, the projected momentum, in the optimizer's coordinates.
        parameters_D: float64, the projected parameters, likewise.
    """

    name: str = ""
    momentum_coefficient: float
    learning_rate_factor: float = 1.0
    weight_decay: float
    decay_is_coupled: bool = False
    steps_taken: int | None = None
    momentum_D: np.ndarray
    parameters_D: np.ndarray

    @classmethod
    def read(cls, content: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> OptimizerRecord:
        """Read it from a store's ``metadata["optimizer"]`` and vectors.

        Raises:
            StoreError: a value is missing or of another type; names its key.
        """
        readers = {
            "name": str,
            "momentum_coefficient": float,
            "learning_rate_factor": float,
            "weight_decay": float,
            "decay_is_coupled": bool,
            "steps_taken": lambda value: _optional(value, int),
        }
        known = _read_fields(content, readers, "optimizer")
        required = ("momentum_coefficient", "weight_decay")
        missing = [name for name in required if name not in known]
        missing += [name for name in ("momentum", "parameters") if name not in vectors]
        if missing:
            raise StoreError(
                f"the store's optimizer has no {missing[0]!r}: it is damaged. "
                "Capture the gradients again."
            )
        return cls(
            momentum_D=_float64(vectors["momentum"]),
            parameters_D=_float64(vectors["parameters"]),
            **known,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Gradients and losses that were measured at displaced parameters.

    Displacements and gradients are projected, in the optimizer's coordinates. All arrays but the
    ids are float64.

    Attributes:
        secant_points_KD: the displacement at which each task's mean gradient was measured again.
        gradient_changes_KD: by how much it differs there from that at the linearization point.
        endpoints_ED: the predicted endpoints of training: displacements at which losses of the
            target were measured.
        loss_changes_ET: by how much they differ there, nats per label token of each example.
        task_example_ids: for each task, the ids int64 of the examples in its mean gradient.
        target_example_ids: int64 [T], ids of the target's examples that were read.
    """

    secant_points_KD: np.ndarray
    gradient_changes_KD: np.ndarray
    endpoints_ED: np.ndarray
    loss_changes_ET: np.ndarray
    task_example_ids: Sequence[np.ndarray]
    target_example_ids: np.ndarray

    @staticmethod
    def are_in(vectors: Mapping[str, np.ndarray]) -> bool:
        """Whether a store's vectors hold them."""
        return all(name in vectors for name in _PROBE_VECTORS.values())

    @classmethod
    def read(
        cls,
        vectors: Mapping[str, np.ndarray],
        *,
        task_example_ids: Sequence[np.ndarray],
        target_example_ids: np.ndarray,
    ) -> Probes:
        """Read them from a store's vectors; the ids given are for stores that have none."""
        if _TARGET_IDS in vectors:
            target_example_ids = vectors[_TARGET_IDS]
            of_task = vectors[_TASKS_OF_IDS]
            task_example_ids = [
                vectors[_TASK_IDS][of_task == k] for k in range(len(task_example_ids))
            ]
        arrays = {field: _float64(vectors[name]) for field, name in _PROBE_VECTORS.items()}
        return cls(
            **arrays, task_example_ids=task_example_ids, target_example_ids=target_example_ids
        )

    def to_vectors(self) -> dict[str, np.ndarray]:
        """Arrays by the names that they have on disk: what :meth:`read` reads."""
        counts = [len(ids) for ids in self.task_example_ids]
        return {name: getattr(self, field) for field, name in _PROBE_VECTORS.items()} | {
            _TASK_IDS: np.concatenate(self.task_example_ids),
            _TASKS_OF_IDS: np.repeat(np.arange(len(counts)), counts),
            _TARGET_IDS: self.target_example_ids,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialLosses:
    """Losses of examples of the target at the initial parameters, from which training restarts.

    Attributes:
        losses_T: float64, nats per label token.
        example_ids: int64 [T].
    """

    losses_T: np.ndarray
    example_ids: np.ndarray

    @staticmethod
    def are_in(vectors: Mapping[str, np.ndarray]) -> bool:
        """Whether a store's vectors hold them."""
        return _INITIAL_LOSSES in vectors

    @classmethod
    def read(cls, vectors: Mapping[str, np.ndarray], *, example_ids: np.ndarray) -> InitialLosses:
        """Read them from a store's vectors; the ids given are for stores that have none."""
        return cls(
            losses_T=_float64(vectors[_INITIAL_LOSSES]),
            example_ids=vectors.get(_INITIAL_IDS, example_ids),
        )

    def to_vectors(self) -> dict[str, np.ndarray]:
        """Arrays by the names that they have on disk: what :meth:`read` reads."""
        return {_INITIAL_LOSSES: self.losses_T, _INITIAL_IDS: self.example_ids}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGradients:
    """Gradients of the target's examples with respect to each layer, by their inner products.

    Attributes:
        names: of the L layers, in the order of the model.
        rates: layer -> by what its steps in the rest of training are multiplied; 0 for layers
            whose gradients the store leaves out.
        gram_LTT: float64, inner products of the projected gradients of T examples; nats per label
            token, squared, per squared unit of the parameters.
        squared_weights_L: float64, squared length of the layer's weights, of adapted layers that of
            the weights below the adapter; NaN if they cannot be read.
        weights_T: float64, weight of each example in the target's loss; they sum to 1.
        example_ids: int64 [T].
    """

    names: tuple[str, ...]
    rates: dict[str, float]
    gram_LTT: np.ndarray
    squared_weights_L: np.ndarray
    weights_T: np.ndarray
    example_ids: np.ndarray

    @classmethod
    def read(cls, content: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> LayerGradients:
        """Read them from a store's ``metadata["layers"]`` and vectors.

        Raises:
            StoreError: a value is missing, of another type or of another shape.
        """
        readers = {
            "names": lambda value: tuple(str(name) for name in value),
            "rates": lambda value: {name: float(rate) for name, rate in value.items()},
        }
        known = _read_fields(content, readers, "layers")
        if len(known) < len(readers) or not vectors.keys() >= set(_LAYER_VECTORS.values()):
            raise StoreError(
                "the store's layers are incomplete: it is damaged. Capture the gradients again."
            )
        arrays = {field: vectors[name] for field, name in _LAYER_VECTORS.items()}
        number, count = len(known["names"]), len(arrays["weights_T"])
        fits = (
            list(known["rates"]) == list(known["names"])
            and arrays["gram_LTT"].shape == (number, count, count)
            and arrays["squared_weights_L"].shape == (number,)
            and arrays["example_ids"].shape == (count,)
        )
        if not fits:
            raise StoreError(
                "the store's layers do not fit together: it is damaged. Capture the gradients "
                "again."
            )
        return cls(
            gram_LTT=_float64(arrays["gram_LTT"]),
            squared_weights_L=_float64(arrays["squared_weights_L"]),
            weights_T=_float64(arrays["weights_T"] / arrays["weights_T"].sum(dtype=np.float64)),
            example_ids=arrays["example_ids"],
            **known,
        )

    def to_json(self) -> JsonDict:
        """What of it is JSON: what :meth:`read` reads beside the vectors."""
        return {"names": list(self.names), "rates": self.rates}

    def to_vectors(self) -> dict[str, np.ndarray]:
        """Arrays by the names that they have on disk."""
        return {name: getattr(self, field) for field, name in _LAYER_VECTORS.items()}


_LAYER_VECTORS = {
    "gram_LTT": "layer_gram",
    "squared_weights_L": "layer_squared_weights",
    "weights_T": "layer_example_weights",
    "example_ids": "layer_example_ids",
}
"""Names on disk of the arrays of LayerGradients."""

_PROBE_VECTORS = {
    "secant_points_KD": "second_points",
    "gradient_changes_KD": "gradient_changes",
    "endpoints_ED": "ends",
    "loss_changes_ET": "end_changes",
}
"""Names on disk of the fields of Probes."""

_TASK_IDS, _TASKS_OF_IDS = "probe_task_example_ids", "probe_task_of_example_ids"
_TARGET_IDS = "probe_target_example_ids"
_INITIAL_LOSSES, _INITIAL_IDS = "initial_losses", "initial_losses_example_ids"


def is_integer_vector(name: str) -> bool:
    """Whether a vector of a store holds integers (ids); others hold float32."""
    return name.endswith("_ids")


def _read_fields(content: Mapping[str, Any], readers: Mapping[str, Any], kind: str) -> JsonDict:
    known = {}
    for name, read in readers.items():
        if name in content:
            try:
                known[name] = read(content[name])
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                raise StoreError(
                    f"the store's {kind} has {name}={content[name]!r}: it is damaged. "
                    "Capture the gradients again."
                ) from error
    return known


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _optional(value: Any, read: Any) -> Any:
    return None if value is None else read(value)


def _after(value: str) -> str:
    if value not in ("continue", "restart"):
        raise ValueError
    return value


def _as_lists(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_lists(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _float64(array: np.ndarray) -> np.ndarray:
    result = np.asarray(array).astype(np.float64)
    result.flags.writeable = False
    return result
