"""The optimizer's state, as far as it determines its next steps: preconditioner, momentum, decay.

One step of the optimizers that are supported is, up to the schedule eta_t of the learning rate,

    m_t = beta * m_{t-1} + (1 - beta) * g_t,
    theta_t = theta_{t-1} - eta_t * (P * m_t + decay * theta_{t-1}),

with a diagonal preconditioner P that changes slowly. In the coordinates u = P^(-1/2) * theta it is
plain gradient descent with momentum, on gradients P^(1/2) * g.

Parameter groups whose learning rates are multiples r of those of a reference group take the same
steps with r * P in place of P and r * decay in place of decay: so do these here.

What has never had a gradient has no P: parameters without a state, which the optimizer skips, and
entries whose second moment is 0, such as rows of an embedding whose tokens were not seen. They are
taken as fixed: P = 0. (On its first gradient Adam would move such an entry by about its learning
rate, whatever the gradient's size; no linear model says that.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_auxselect.capture.optimizer_families import FAMILIES, family_of, underlying
from hf_auxselect.capture.schedule import Schedule, momentum_coefficient, reference_group
from hf_auxselect.sharding import shape_of, trainable_parameters, whole
from hf_auxselect.zero import ZeroOptimizer

_SAME_RATE = 1e-6
"""The rates of two groups count as proportional if they differ from a constant ratio by less than
this, relative to the largest rate. A convention, far above the rounding of float64."""

_ADVICE = "Use optim='adamw_torch'"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """What differs between the groups of an optimizer.

    Attributes:
        num_parameters: trainable entries in it.
        relative_rate: its learning rate as a multiple of the reference group's.
        weight_decay: as it was set, per unit of the group's own learning rate.
        momentum_coefficient: beta.
        epsilon: as it was set; None for SGD, two numbers for Adafactor.
    """

    num_parameters: int
    relative_rate: float
    weight_decay: float
    momentum_coefficient: float
    epsilon: float | list[float | None] | None


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """State of an optimizer for the parameters that it trains, by name.

    Parameters that have never had a gradient are left out; entries that have had none have scale 0.

    Attributes:
        name: ``"adam"``, ``"sgd"`` or ``"adafactor"``.
        scales: P^(1/2) of each parameter, flat, in float32. For Adam P = 1 / (sqrt(v) + epsilon)
            with bias-corrected second moments v; for SGD P = 1; for Adafactor P = 1 / sqrt(v) with
            v from its factors, times the size of the parameter if its steps are relative to it.
            Each times the group's learning rate relative to the reference group's.
        momentum: m, flat, bias-corrected; zero for SGD without momentum and for Adafactor.
        momentum_coefficient: beta.
        learning_rate_factor: by which the learning rate is multiplied (1 / (1 - beta) for SGD,
            whose momentum adds gradients up instead of averaging them).
        weight_decay: per unit of the reference group's learning rate, the largest of all
            parameters; 0 if none.
        decay_ratios: the decay of each parameter relative to ``weight_decay``. It is exact for the
            parameters as they are; displacements from there decay by ``weight_decay``.
        decay_is_coupled: whether weight decay is added to the gradient (SGD), not to the step.
        steps_taken: steps by which the momentum's bias towards 0 is corrected; None where it is
            not.
        groups: the optimizer's parameter groups.
        num_fixed: trainable entries that have never had a gradient.
    """

    name: str
    scales: dict[str, Tensor]
    momentum: dict[str, Tensor]
    momentum_coefficient: float
    learning_rate_factor: float
    weight_decay: float
    decay_ratios: dict[str, float]
    decay_is_coupled: bool
    steps_taken: int | None
    groups: tuple[ParameterGroup, ...]
    num_fixed: int

    def to_coordinates(self, name: str, values: Tensor) -> Tensor:
        """A flat displacement of a parameter in the coordinates u; 0 where it is fixed."""
        scale = self.scales[name]
        return torch.where(scale > 0, values / scale, 0.0)


def why_not_modelled(
    model: torch.nn.Module,
    optimizer: Any,
    schedule: Schedule | None = None,
    *,
    first_step: int = 0,
) -> str | None:
    """Why :func:`read_optimizer` will not understand this optimizer, in a sentence with advice.

    Args:
        model: its trainable parameters are those that count.
        optimizer: also before its first step, also below accelerate's wrapper.
        schedule: the rates of its steps to come, if they are known.
        first_step: how many steps it will have taken before those.

    Returns:
        None if its steps are modelled.
    """
    zero, trained_groups = ZeroOptimizer.of(optimizer), list(_trained_groups(model, optimizer))
    optimizer = underlying(optimizer)
    name, family = type(optimizer).__name__, family_of(optimizer)
    if family is None:
        return (
            f"the steps of {name} are not modelled; supported are AdamW and Adam of torch, "
            "bitsandbytes, torchao, apex and torchdistx, torch's SGD, and Adafactor. "
            f"{_ADVICE}."
        )
    if zero is not None and not zero.has_state_by_entry:
        return f"under ZeRO {name} keeps its state for many parameters together. {_ADVICE}."
    trained = [g for g, _, held in trained_groups if held]
    if not trained:
        return f"{name} holds no trainable parameter of the model."
    for g in trained:
        option = FAMILIES[family].unsupported(optimizer, optimizer.param_groups[g])
        if option is not None:
            return f"{name} with {option} {_ADVICE}."
    betas = sorted({momentum_coefficient(optimizer.param_groups[g]) for g in trained})
    if len(betas) > 1:
        return (
            f"the parameter groups of {name} have different momentum, {betas[0]:g} and "
            f"{betas[1]:g}; they are modelled with the same. Give all groups the same."
        )
    if schedule is None:
        return None
    if isinstance(optimizer, torch.optim.Adafactor):
        by_step = zip(*schedule.learning_rates, strict=True)
        for step, rate in enumerate(map(max, by_step), start=first_step + 1):
            if rate > step**-0.5:
                return (
                    f"{name} steps by no more than 1 / sqrt({step}) at step {step}, not by its "
                    f"learning rate of {rate:.3g}; that is not modelled. Lower the learning rate."
                )
    return _why_not_scheduled(name, family, trained, schedule)


def _why_not_scheduled(
    name: str, family: str, trained: list[int], schedule: Schedule
) -> str | None:
    """Why the rates of groups cannot be taken together, in a sentence; None if they can."""
    reference = schedule.learning_rates[schedule.reference_group]
    total, largest = sum(reference), max(reference, default=0.0)
    for g in trained:
        own = schedule.learning_rates[g]
        ratio = sum(own) / total if total else 0.0
        least = _SAME_RATE * max(ratio * largest, 1e-300)
        if any(abs(a - ratio * b) > least for a, b in zip(own, reference, strict=True)):
            return (
                f"the learning rates of the parameter groups {schedule.reference_group} and {g} of "
                f"{name} do not stay in proportion ({reference[0]:.3g} and {own[0]:.3g} at the "
                f"switch, {reference[-1]:.3g} and {own[-1]:.3g} at the end); only constant ratios "
                "are modelled. Use a schedule that multiplies all rates by the same factor, such "
                "as LambdaLR."
            )
    momentum = [schedule.momentum_coefficients[g] for g in trained]
    if family != "adam" and any(len(set(values)) > 1 for values in momentum):
        return (
            f"the scheduler changes the momentum of {name}, which is modelled for Adam only. Pass "
            "cycle_momentum=False to it."
        )
    if any(values != momentum[0] for values in momentum):
        return (
            f"the scheduler changes the momentum of the parameter groups of {name} in different "
            "ways; they are modelled with the same. Pass cycle_momentum=False to it."
        )
    return None


def read_optimizer(
    model: torch.nn.Module,
    optimizer: Any,
    group_rates: Sequence[float] | None = None,
    parameter_rates: Mapping[str, float] | None = None,
) -> OptimizerState:
    """Read the state of an optimizer, also below accelerate's wrapper.

    Args:
        model: whose trainable parameters it trains.
        optimizer: one for which :func:`why_not_modelled` knows no reason.
        group_rates: learning rate of each parameter group in the steps to come, up to a common
            factor, such as its sum. None, or all 0: as the groups were made (``initial_lr``).
        parameter_rates: by what the steps to come of a parameter are multiplied, where it is not 1;
            a parameter with 0 is taken as fixed.

    Raises:
        ValueError: another optimizer; or no trainable parameter has a state yet, because the
            optimizer has not stepped.
    """
    zero, trained_groups = ZeroOptimizer.of(optimizer), list(_trained_groups(model, optimizer))
    reason = why_not_modelled(model, optimizer)
    optimizer = underlying(optimizer)
    if reason is not None:
        raise ValueError(f"optimizer: {reason}")
    family = family_of(optimizer)
    assert family is not None
    read = FAMILIES[family].read
    ratios = _relative_rates(optimizer, group_rates)
    scales: dict[str, Tensor] = {}
    momentum: dict[str, Tensor] = {}
    decays: dict[str, float] = {}
    groups: list[ParameterGroup] = []
    beta: float | None = None
    steps = 0
    for g, group, held in trained_groups:
        for name, parameter in held:
            ratio = ratios[g] * (parameter_rates or {}).get(name, 1.0)
            if not ratio:
                continue
            if zero is not None:
                own = zero.state_of(parameter)
            else:
                own = optimizer.state.get(parameter, {})
                own = {key: whole(v) if isinstance(v, DTensor) else v for key, v in own.items()}
            parameter = whole(parameter)
            state = read(optimizer, group, parameter, own)
            if state is None:
                continue
            scale = state.scale.flatten()
            scales[name] = scale if ratio == 1 else scale * ratio**0.5
            momentum[name] = state.momentum.flatten()
            decays[name] = ratio * float(group["weight_decay"]) * state.decay_factor
            beta = momentum_coefficient(group) if beta is None else beta
            steps = max(steps, state.steps or 0)
        groups.append(
            ParameterGroup(
                num_parameters=sum(shape_of(parameter).numel() for _, parameter in held),
                relative_rate=ratios[g],
                weight_decay=float(group["weight_decay"]),
                momentum_coefficient=momentum_coefficient(group),
                epsilon=_epsilon(group),
            )
        )
    if beta is None:
        raise ValueError(
            "optimizer: no second moments for any trainable parameter; it has not been stepped "
            "since training began."
        )
    decay = max(decays.values())
    num_trained = sum(int((scale > 0).sum()) for scale in scales.values())
    return OptimizerState(
        name=family,
        scales=scales,
        momentum=momentum,
        momentum_coefficient=beta,
        learning_rate_factor=1 / (1 - beta) if family == "sgd" else 1.0,
        weight_decay=decay,
        decay_ratios={name: own / decay if decay else 1.0 for name, own in decays.items()},
        decay_is_coupled=family == "sgd",
        steps_taken=steps or None,
        groups=tuple(groups),
        num_fixed=sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)
        - num_trained,
    )


def copy_of_state(optimizer: Any) -> dict[Any, dict[str, Any]]:
    """Copy the state of every parameter, to restore it after trial steps."""
    return {
        parameter: {name: _copied(value) for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.detach().clone()
    if not hasattr(value, "__tensor_flatten__"):
        return copy.deepcopy(value)
    # A quantized state of torchao does not know how to be copied, but what it is made of.
    names, context = value.__tensor_flatten__()
    parts = {name: getattr(value, name).clone() for name in names}
    return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


def _relative_rates(optimizer: Any, group_rates: Sequence[float] | None) -> list[float]:
    """The learning rate of each group as a multiple of the reference group's."""
    rates = list(group_rates or ())
    if not any(rates):
        rates = [float(g.get("initial_lr", g["lr"]) or 0.0) for g in optimizer.param_groups]
    reference = rates[reference_group(rates)]
    return [rate / reference if reference else 1.0 for rate in rates]


def _trained_groups(
    model: torch.nn.Module, optimizer: Any
) -> Iterator[tuple[int, dict[str, Any], list[tuple[str, Tensor]]]]:
    """Number, options and trainable parameters of the model of each parameter group."""
    names: dict[Tensor, str] = {p: name for name, p in trainable_parameters(model).items()}
    zero, groups = ZeroOptimizer.of(optimizer), underlying(optimizer).param_groups
    held = [group["params"] for group in groups] if zero is None else zero.parameters_of_groups()
    for g, (group, parameters) in enumerate(zip(groups, held, strict=True)):
        yield g, group, [(names[p], p) for p in parameters if p in names]


def _epsilon(group: Mapping[str, Any]) -> float | list[float | None] | None:
    epsilon = group.get("eps")
    if isinstance(epsilon, tuple | list):
        return [None if value is None else float(value) for value in epsilon]
    return None if epsilon is None else float(epsilon)
