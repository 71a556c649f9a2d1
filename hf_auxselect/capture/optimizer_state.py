"""What an optimizer's state says of the steps it will take: preconditioner, momentum, decay.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from hf_auxselect.capture.schedule import Schedule, momentum_coefficient, reference_group

_BLOCK_SIZES = (256, 512, 1024, 2048, 4096)
"""Entries that share a scale in the 8-bit states of bitsandbytes: 256 today, 2048 in old ones."""

_SAME_RATE = 1e-6
"""Schedules of two groups are multiples of each other up to this share of the largest rate."""

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

    Parameters that have never had a gradient are left out; such entries of others have scale 0.

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
        decay_ratios: the decay of each parameter as a share of ``weight_decay``. It is exact for
            the parameters at the anchor; what they move by later decays by ``weight_decay``.
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


def underlying(optimizer: Any) -> Any:
    """The optimizer below accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


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
    optimizer = underlying(optimizer)
    name, family = type(optimizer).__name__, _family(optimizer)
    if family is None:
        return (
            f"the steps of {name} are not modelled; supported are AdamW and Adam of torch, "
            "bitsandbytes, torchao, apex and torchdistx, torch's SGD, and Adafactor. "
            f"{_ADVICE}."
        )
    trained = [g for g, _, held in _trained_groups(model, optimizer) if held]
    if not trained:
        return f"{name} holds no trainable parameter of the model."
    for g in trained:
        option = _FAMILIES[family].unsupported(optimizer, optimizer.param_groups[g])
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
    model: torch.nn.Module, optimizer: Any, group_rates: Sequence[float] | None = None
) -> OptimizerState:
    """Read the state of an optimizer, also below accelerate's wrapper.

    Args:
        model: whose trainable parameters it trains.
        optimizer: one for which :func:`why_not_modelled` knows no reason.
        group_rates: learning rate of each parameter group in the steps to come, up to a common
            factor, such as its sum. None, or all 0: as the groups were made (``initial_lr``).

    Raises:
        ValueError: another optimizer; or no trainable parameter has a state yet, because the
            optimizer has not stepped.
    """
    optimizer = underlying(optimizer)
    reason = why_not_modelled(model, optimizer)
    if reason is not None:
        raise ValueError(f"optimizer: {reason}")
    family = _family(optimizer)
    assert family is not None
    read = _FAMILIES[family].read
    ratios = _relative_rates(optimizer, group_rates)
    scales: dict[str, Tensor] = {}
    momentum: dict[str, Tensor] = {}
    decays: dict[str, float] = {}
    groups: list[ParameterGroup] = []
    beta: float | None = None
    steps = 0
    for g, group, held in _trained_groups(model, optimizer):
        ratio = ratios[g]
        for name, parameter in held if ratio else ():
            state = read(optimizer, group, parameter, optimizer.state.get(parameter, {}))
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
                num_parameters=sum(parameter.numel() for _, parameter in held),
                relative_rate=ratio,
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
        num_fixed=sum(p.numel() for p in model.parameters() if p.requires_grad) - num_trained,
    )


def copy_of_state(optimizer: Any) -> dict[Any, dict[str, Any]]:
    """The state of every parameter, by the parameter itself; to put back after trial steps."""
    return {
        parameter: {name: _copied(value) for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


def _copied(value: Any) -> Any:
    if not hasattr(value, "__tensor_flatten__"):
        return copy.deepcopy(value)
    # A quantized state of torchao does not know how to be copied, but what it is made of.
    names, context = value.__tensor_flatten__()
    parts = {name: getattr(value, name).clone() for name in names}
    return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


def _relative_rates(optimizer: Any, group_rates: Sequence[float] | None) -> list[float]:
    """Learning rates as multiples of the reference group's."""
    rates = list(group_rates or ())
    if not any(rates):
        rates = [float(g.get("initial_lr", g["lr"]) or 0.0) for g in optimizer.param_groups]
    reference = rates[reference_group(rates)]
    return [rate / reference if reference else 1.0 for rate in rates]


def _trained_groups(
    model: torch.nn.Module, optimizer: Any
) -> Iterator[tuple[int, dict[str, Any], list[tuple[str, Tensor]]]]:
    """Of each group: its number, itself, and the model's trainable parameters in it."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    for g, group in enumerate(optimizer.param_groups):
        yield g, group, [(names[p], p) for p in group["params"] if p in names]


def _epsilon(group: Mapping[str, Any]) -> float | list[float | None] | None:
    epsilon = group.get("eps")
    if isinstance(epsilon, tuple | list):
        return [None if value is None else float(value) for value in epsilon]
    return None if epsilon is None else float(epsilon)


class _State(NamedTuple):
    """What is read of one parameter."""

    scale: Tensor
    """P^(1/2) in float32; 0 where there has never been a gradient."""
    momentum: Tensor
    steps: int | None = None
    decay_factor: float = 1.0
    """Weight decay of this parameter is so many times that of its group."""


class _Family(NamedTuple):
    """How to read optimizers with the same rule.

    ``read`` returns None for a parameter that has never had a gradient; ``unsupported`` names an
    option, set in a group, with which the rule is another.
    """

    read: Callable[[Any, Mapping[str, Any], Tensor, Mapping[str, Any]], _State | None]
    unsupported: Callable[[Any, Mapping[str, Any]], str | None]


def _family(optimizer: Any) -> str | None:
    """Name of its rule; None if it is not known."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return "adam"
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    if isinstance(optimizer, torch.optim.Adafactor):
        return "adafactor"
    # Others are told by name: they are imported where they are in use.
    for cls in type(optimizer).__mro__:
        for (package, names), family in _ELSEWHERE.items():
            if cls.__module__.partition(".")[0] == package and cls.__name__ in names:
                return family
    return None


_ELSEWHERE: dict[tuple[str, tuple[str, ...]], str] = {
    ("transformers", ("Adafactor",)): "adafactor",
    (
        "bitsandbytes",
        tuple(
            f"{paged}Adam{kind}{bits}"
            for paged in ("", "Paged")
            for kind in ("", "W")
            for bits in ("", "8bit", "32bit")
        ),
    ): "adam",
    (
        "torchao",
        tuple(f"Adam{kind}{bits}" for kind in ("", "W") for bits in ("8bit", "4bit", "Fp8")),
    ): "adam",
    ("apex", ("FusedAdam",)): "adam",
    ("torchdistx", ("AnyPrecisionAdamW",)): "adam",
}


def is_changed(optimizer: Any) -> bool:
    """Whether it is of a class of the user's own that replaces the step of a known optimizer."""
    optimizer = underlying(optimizer)
    packages = {"torch", *(package for package, _ in _ELSEWHERE)}
    # Optimizer wraps the step of each class anew; the wrapper says where it is from.
    owner = type(optimizer).step.__module__.partition(".")[0]
    return _family(optimizer) is not None and owner not in packages


def _read_adam(
    optimizer: Any, group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Any]
) -> _State | None:
    if "state2" in state:  # bitsandbytes
        average, squares = (_blockwise(state, i) for i in (1, 2))
    elif "exp_avg_sq" in state:
        average = _dense(state["exp_avg"])
        # amsgrad divides by the largest that there has been.
        squares = _dense(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
    else:
        return None
    steps = float(state["step"] if "step" in state else group["step"])  # apex: of the group
    is_corrected = group.get("bias_correction", True)  # apex again
    first, second = ((1 - float(b) ** steps if is_corrected else 1.0) for b in group["betas"][:2])
    denominator = (squares / second).sqrt() + group["eps"]
    return _State(
        scale=torch.where(squares > 0, denominator.rsqrt(), 0.0),
        momentum=average / first,
        steps=int(steps) if is_corrected else None,
    )


def _unsupported_in_adam(optimizer: Any, group: Mapping[str, Any]) -> str | None:
    if group.get("maximize"):
        return "maximize=True climbs where the estimates descend."
    is_decoupled = {
        "torch": group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)),
        "torchao": getattr(optimizer, "is_adamw", True),
        "apex": getattr(optimizer, "adam_w_mode", True),
        "bitsandbytes": True,  # its Adam, too
        "torchdistx": True,
    }
    packages = [cls.__module__.partition(".")[0] for cls in type(optimizer).__mro__]
    kind = next(package for package in packages if package in is_decoupled)
    if group["weight_decay"] and not is_decoupled[kind]:
        return (
            f"weight_decay={float(group['weight_decay']):g} adds the decay to the gradient, which "
            "is not modelled; AdamW's is. Set weight_decay=0, or use AdamW."
        )
    return None


def _read_sgd(
    optimizer: Any, group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Any]
) -> _State:
    # Without a gradient there is no buffer; the first gradient is then taken as it is, with P = 1.
    buffer = state.get("momentum_buffer")
    scale = torch.ones_like(parameter, dtype=torch.float32)
    return _State(
        scale=scale,
        momentum=torch.zeros_like(scale)
        if buffer is None
        else (1 - float(group["momentum"])) * buffer.float(),
    )


def _unsupported_in_sgd(optimizer: Any, group: Mapping[str, Any]) -> str | None:
    for option in ("nesterov", "maximize", "dampening"):
        if group.get(option):
            return f"{option}={group[option]!r} is not modelled. Leave it out."
    return None


def _read_adafactor(
    optimizer: Any, group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Any]
) -> _State | None:
    """1 / sqrt(v) with v = row * column / mean(row); of vectors v itself.

    Updates are also shortened to a root mean square of ``clip_threshold`` (``d``), which depends on
    each gradient: that is left out.
    """
    size = float(parameter.detach().float().pow(2).mean().sqrt())
    decay_factor = 1.0
    if isinstance(optimizer, torch.optim.Adafactor):
        eps, least = group["eps"]
        eps = torch.finfo(parameter.dtype).eps if eps is None else eps
        if "row_var" in state:
            row, column = state["row_var"].float(), state["col_var"].float()
            squares = row @ column / row.mean(-2, keepdim=True).clamp(min=eps)
        elif "variance" in state:
            squares = state["variance"].float()
        else:
            return None
        is_fixed = squares <= 0
        squares = squares.clamp(min=eps * eps)
        factor = max(least, size)
    else:
        eps, least = group["eps"]
        if "exp_avg_sq_row" in state:
            row, column = state["exp_avg_sq_row"].float(), state["exp_avg_sq_col"].float()
            # Its own order of operations: row * column may underflow.
            relative = (row / row.mean(-1, keepdim=True)).unsqueeze(-1)
            squares = relative * column.unsqueeze(-2)
            is_fixed = (row <= 2 * eps).unsqueeze(-1) | (column <= 2 * eps).unsqueeze(-2)
        elif "exp_avg_sq" in state:
            squares = state["exp_avg_sq"].float()
            is_fixed = squares <= 2 * eps  # eps is added to every square
        else:
            return None
        factor = max(least, size) if group["scale_parameter"] else 1.0
        decay_factor = factor
    scale = torch.where(is_fixed, 0.0, (factor * squares.rsqrt()).sqrt())
    return _State(scale=scale, momentum=torch.zeros_like(scale), decay_factor=decay_factor)


def _unsupported_in_adafactor(optimizer: Any, group: Mapping[str, Any]) -> str | None:
    if group.get("relative_step"):
        return (
            "relative_step=True sets its own learning rates, which are not modelled. Pass "
            "relative_step=False and lr=...."
        )
    if group.get("beta1") is not None:
        return f"beta1={group['beta1']} averages steps, not gradients. Pass beta1=None."
    if group.get("maximize"):
        return "maximize=True climbs where the estimates descend."
    return None


_FAMILIES = {
    "adam": _Family(_read_adam, _unsupported_in_adam),
    "sgd": _Family(_read_sgd, _unsupported_in_sgd),
    "adafactor": _Family(_read_adafactor, _unsupported_in_adafactor),
}


def _dense(value: Tensor) -> Tensor:
    """In float32; torchao's states are quantized tensors of their own types."""
    if type(value).dequantize is not Tensor.dequantize:
        value = value.dequantize()
    return value.float()


def _blockwise(state: Mapping[str, Any], i: int) -> Tensor:
    """A state of bitsandbytes: codes in a table of values, each block of them with a scale."""
    codes: Tensor = state[f"state{i}"]
    if codes.dtype != torch.uint8:  # small parameters stay as they are
        return codes.float()
    largest = state[f"absmax{i}"].float()
    size = next((s for s in _BLOCK_SIZES if -(-codes.numel() // s) == len(largest)), None)
    if size is None:
        raise ValueError(
            f"optimizer: its 8-bit state has {len(largest)} scales for {codes.numel()} entries, "
            "which is not the layout of bitsandbytes. Use optim='adamw_torch'."
        )
    values = state[f"qmap{i}"].float()[codes.flatten().long()]
    return values * largest.repeat_interleave(size)[: codes.numel()]
