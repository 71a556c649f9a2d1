"""Gradients of the target with respect to each layer, by which layers are scored.

Shapes: L layers, T examples of the target, D projection_dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.hooks import NonFiniteError
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.module_gradients import differentiate
from hf_auxselect.capture.probes import examples_to_probe
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    SCALARS,
    CollateFn,
    ExampleLoss,
    at_least_float32,
    forward_label_logits,
)
from hf_auxselect.distributed import gather, on_main_process, process_rank
from hf_auxselect.layers import Grouping, LayerSelection, layer_scores, require_weights
from hf_auxselect.sharding import (
    parameters_of_graph,
    passes_to_add,
    squared_length,
    trainable_parameters,
)
from hf_auxselect.store.records import LayerGradients

_BELOW_ADAPTERS = ("base_layer", "original_module")
"""What PEFT calls the module that an adapter, or a copy that is trained, belongs to."""

_BLOCK = re.compile(r"(?:.+?\.)??\d+(?=\.|$)")
"""The path of a block: up to the first number, its place in a list of blocks."""

_PREFIX = "base_model.model."
"""What PEFT puts before all names."""


def layers_of(model: nn.Module, by: Grouping) -> dict[str, str]:
    """The layer of each trainable parameter, by name, in the order of the model.

    A layer is named as in the model without adapters.
    """
    names = {}
    for name in trainable_parameters(model):
        path = _module_of(model, name).removeprefix(_PREFIX)
        block = _BLOCK.match(path) if by == "block" else None
        names[name] = path if block is None else block[0]
    return names


def parameter_rates(
    model: nn.Module, by: Grouping, layer_rates: Mapping[str, float]
) -> dict[str, float]:
    """The rate of each trainable parameter, by name, given those of the layers.

    Raises:
        ValueError: the layers are not those of the model.
    """
    layers = layers_of(model, by)
    if set(layers.values()) != set(layer_rates):
        raise ValueError(
            f"layers: there are rates for {list(layer_rates)}, but the layers that are trained are "
            f"{list(dict.fromkeys(layers.values()))}."
        )
    return {name: layer_rates[layer] for name, layer in layers.items()}


def require_layers(model: nn.Module, selection: LayerSelection) -> None:
    """Raise ValueError if layers of the model cannot be selected so."""
    layers = layers_of(model, selection.by)
    selection.require(list(dict.fromkeys(layers.values())))
    if selection.method == "rgn":
        require_weights(_squared_weights(model, layers))


def examples_to_score(target: TaskExamples) -> TaskExamples:
    """At most 64 of the examples that count in the target's loss, spread evenly over all."""
    if target.example_weights is None:
        return examples_to_probe(target)
    counted = np.flatnonzero(target.example_weights)
    return examples_to_probe(
        replace(
            target,
            example_ids=np.asarray(target.example_ids)[counted].tolist(),
            example_weights=None,
        )
    )


def measure_layers(
    model: nn.Module,
    target: TaskExamples,
    collate_fn: CollateFn,
    selection: LayerSelection,
    *,
    sketch: CountSketch,
    loss: ExampleLoss,
) -> LayerGradients:
    """Capture gradients of the target with respect to each layer, and choose layers by them.

    At most 64 examples run forward and backward, each alone, which any model allows; with
    ``torch.distributed`` set up they are shared out. The model is left as it was. T float32 numbers
    times L and D are kept on the CPU.

    Args:
        model: the model at the linearization point.
        target: the examples.
        collate_fn: as for ``capture_gradients``.
        selection: how layers are chosen.
        sketch: the projection.
        loss: how the loss of an example is computed.

    Returns:
        The gradients, and the rates of the layers.

    Raises:
        NonFiniteError: a gradient is NaN or infinite; names task and row.
        ValueError: fewer than 2 examples have label tokens.
    """
    chosen = examples_to_score(target)
    layers = layers_of(model, selection.by)
    names = tuple(dict.fromkeys(layers.values()))
    parameters = trainable_parameters(model)
    rank, world_size = process_rank()
    places = range(rank, len(chosen.example_ids), world_size)
    tokens_T = np.zeros(len(chosen.example_ids))
    projected = np.zeros((len(names), len(chosen.example_ids), sketch.dim), np.float32)

    def gradient_of(place: int) -> tuple[float, dict[str, Tensor]]:
        """Label tokens and gradients of an example alone."""
        row = chosen.rows[chosen.example_ids[place]]
        with parameters_of_graph(model, parameters) as of_graph:
            output = forward_label_logits(model, collate_fn([row]), loss)
        gradients = differentiate(SCALARS["loss"](output).sum(), of_graph)
        return float(loss.count(output.num_label_tokens)[0]), gradients

    with evaluation_mode(model):
        for place in places:
            tokens, gradients = gradient_of(place)
            tokens_T[place] = tokens
            if tokens:
                for number, value in enumerate(_by_layer(gradients, layers, names, sketch)):
                    projected[number, place] = value
        for _ in range(passes_to_add(len(places), model)):
            gradient_of(0)
    tokens_T, projected = np.sum(gather(tokens_T), axis=0), np.sum(gather(projected), axis=0)
    finite = np.isfinite(projected).all((0, 2))
    if not finite.all():
        row = chosen.example_ids[int(np.flatnonzero(~finite)[0])]
        raise NonFiniteError.of("gradient of the loss", target.name, row)
    weights_T = tokens_T if target.example_weights is None else _weights(target, chosen)
    counted = np.flatnonzero(tokens_T)
    squared_weights = _squared_weights(model, layers)

    def measured() -> LayerGradients:
        used = projected[:, counted].astype(np.float64)
        record = LayerGradients(
            names=names,
            rates=dict.fromkeys(names, 1.0),
            gram_LTT=used @ used.transpose(0, 2, 1),
            squared_weights_L=np.array([squared_weights[name] for name in names]),
            weights_T=weights_T[counted] / weights_T[counted].sum(),
            example_ids=np.array(chosen.example_ids, np.int64)[counted],
        )
        scores = layer_scores(record, selection.method)
        return replace(record, rates=selection.rates(scores))

    return on_main_process(measured)


def _by_layer(
    gradients: Mapping[str, Tensor],
    layers: Mapping[str, str],
    names: Sequence[str],
    sketch: CountSketch,
) -> list[np.ndarray]:
    """The projected gradient [D] of each layer."""
    total = {name: np.zeros(sketch.dim, np.float32) for name in names}
    for name, gradient in gradients.items():
        flat = at_least_float32(gradient).flatten().unsqueeze(0)
        total[layers[name]] += sketch.project(name, flat)[0].float().cpu().numpy()
    return [total[name] for name in names]


def _weights(target: TaskExamples, chosen: TaskExamples) -> np.ndarray:
    assert target.example_weights is not None
    weight = dict(zip(target.example_ids, target.example_weights, strict=True))
    return np.array([weight[i] for i in chosen.example_ids], np.float64)


def _module_of(model: nn.Module, parameter: str) -> str:
    """Path of the module that a parameter belongs to; of an adapter, that of the adapted module."""
    parts = parameter.split(".")[:-1]
    module = model
    for number, part in enumerate(parts):
        module = module.get_submodule(part)
        if any(isinstance(getattr(module, name, None), nn.Module) for name in _BELOW_ADAPTERS):
            return ".".join(parts[: number + 1])
    return ".".join(parts)


def _squared_weights(model: nn.Module, layers: Mapping[str, str]) -> dict[str, float]:
    """Squared length of the weights of each layer; NaN if they are quantized."""
    parameters = trainable_parameters(model)
    weights: dict[str, dict[int, Tensor]] = {name: {} for name in layers.values()}
    for name, layer in layers.items():
        module = model.get_submodule(_module_of(model, name))
        below = getattr(module, _BELOW_ADAPTERS[0], None)
        own = below.parameters() if isinstance(below, nn.Module) else [parameters[name]]
        weights[layer] |= {id(parameter): parameter for parameter in own}
    return {layer: _squared_length(list(of.values())) for layer, of in weights.items()}


def _squared_length(parameters: Sequence[Tensor]) -> float:
    if not all(parameter.is_floating_point() for parameter in parameters):
        return float("nan")
    with torch.no_grad():
        return sum(float(squared_length(p)) for p in parameters)
