"""How the state of each family of optimizers is read.

The optimizers of a family take the same steps. :mod:`hf_auxselect.capture.optimizer_state` writes
these down, and defines the preconditioner P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from hf_auxselect.zero import ZeroOptimizer

_BLOCK_SIZES = (256, 512, 1024, 2048, 4096)
"""Numbers of entries that may share a scale in the 8-bit states of bitsandbytes: 256 today, 2048 in
old releases. The state does not say which."""


def underlying(optimizer: Any) -> Any:
    """The optimizer below the wrappers of accelerate and ZeRO."""
    zero = ZeroOptimizer.of(optimizer)
    if zero is not None:
        return zero.inner
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


class ParameterState(NamedTuple):
    """The state of one parameter."""

    scale: Tensor
    """P^(1/2) in float32; 0 where there has never been a gradient."""
    momentum: Tensor
    steps: int | None = None
    decay_factor: float = 1.0
    """The weight decay of this parameter as a multiple of its group's."""


class OptimizerFamily(NamedTuple):
    """How to read the optimizers of a family.

    ``read`` returns None for a parameter that has never had a gradient; ``unsupported`` names an
    option of a group with which steps are others than those of the family.
    """

    read: Callable[[Any, Mapping[str, Any], Tensor, Mapping[str, Any]], ParameterState | None]
    unsupported: Callable[[Any, Mapping[str, Any]], str | None]


def family_of(optimizer: Any) -> str | None:
    """The family of an optimizer; None if its steps are not modelled."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return "adam"
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    if isinstance(optimizer, torch.optim.Adafactor):
        return "adafactor"
    # Others are recognised by name, so that their packages need not be imported.
    for cls in type(optimizer).__mro__:
        for (package, names), family in _OTHER_PACKAGES.items():
            if cls.__module__.partition(".")[0] == package and cls.__name__ in names:
                return family
    return None


_OTHER_PACKAGES: dict[tuple[str, tuple[str, ...]], str] = {
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
    ("deepspeed", ("FusedAdam", "DeepSpeedCPUAdam")): "adam",
}


def is_changed(optimizer: Any) -> bool:
    """Whether it is of a class of the user's own that replaces the step of a known optimizer."""
    optimizer = underlying(optimizer)
    packages = {"torch", *(package for package, _ in _OTHER_PACKAGES)}
    # Optimizer wraps the step of each class anew; the wrapper says where it is from.
    owner = type(optimizer).step.__module__.partition(".")[0]
    return family_of(optimizer) is not None and owner not in packages


def _read_adam(
    optimizer: Any, group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Any]
) -> ParameterState | None:
    if "state2" in state:  # bitsandbytes
        average, squares = (_blockwise(state, i) for i in (1, 2))
    elif "exp_avg_sq" in state:
        average = _dense(state["exp_avg"])
        # amsgrad divides by the largest that there has been.
        squares = _dense(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
    else:
        return None
    steps = float(state["step"] if "step" in state else group["step"])  # apex keeps it in the group
    is_corrected = group.get("bias_correction", True)  # an option of apex
    first, second = ((1 - float(b) ** steps if is_corrected else 1.0) for b in group["betas"][:2])
    denominator = (squares / second).sqrt() + group["eps"]
    return ParameterState(
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
        "deepspeed": getattr(optimizer, "adam_w_mode", True),
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
) -> ParameterState:
    # Without a gradient there is no buffer; the first gradient is then taken as it is, with P = 1.
    buffer = state.get("momentum_buffer")
    scale = torch.ones_like(parameter, dtype=torch.float32)
    return ParameterState(
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
) -> ParameterState | None:
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
    return ParameterState(scale=scale, momentum=torch.zeros_like(scale), decay_factor=decay_factor)


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


FAMILIES = {
    "adam": OptimizerFamily(_read_adam, _unsupported_in_adam),
    "sgd": OptimizerFamily(_read_sgd, _unsupported_in_sgd),
    "adafactor": OptimizerFamily(_read_adafactor, _unsupported_in_adafactor),
}


def _dense(value: Tensor) -> Tensor:
    """A state in float32; torchao's states are quantized tensors of their own types."""
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
