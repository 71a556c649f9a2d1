"""What an optimizer's state says of the steps it will take: preconditioner, momentum, decay.

One step of the optimizers that are supported is, up to the schedule eta_t of the learning rate,

    m_t = beta * m_{t-1} + (1 - beta) * g_t,
    theta_t = theta_{t-1} - eta_t * (P * m_t + decay * theta_{t-1}),

with a diagonal preconditioner P that changes slowly. In the coordinates u = P^(-1/2) * theta it is
plain gradient descent with momentum, on gradients P^(1/2) * g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """State of an optimizer for the trainable parameters of a model, by parameter name.

    Attributes:
        name: ``"adam"`` or ``"sgd"``.
        scales: P^(1/2) of each parameter, flat, in float32. For Adam P = 1 / (sqrt(v) + epsilon)
            with bias-corrected second moments v; for SGD P = 1.
        momentum: m, flat, bias-corrected; zero for SGD without momentum.
        momentum_coefficient: beta.
        learning_rate_factor: by which the learning rate is multiplied (1 / (1 - beta) for SGD,
            whose momentum adds gradients up instead of averaging them).
        weight_decay: decoupled decay, per unit of learning rate; 0 if none.
        steps_taken: steps by which the momentum's bias towards 0 is corrected; None where it is
            not (SGD).
    """

    name: str
    scales: dict[str, Tensor]
    momentum: dict[str, Tensor]
    momentum_coefficient: float
    learning_rate_factor: float
    weight_decay: float
    steps_taken: int | None = None


def is_supported(optimizer: Any) -> bool:
    """Whether :func:`read_optimizer` will understand this optimizer once it has stepped."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # below accelerate's wrapper
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD)


def read_optimizer(model: torch.nn.Module, optimizer: Any) -> OptimizerState:
    """Read the state of torch's AdamW, Adam or SGD, also below accelerate's wrapper.

    Raises:
        ValueError: another optimizer; or a trainable parameter has no state yet, because the
            optimizer has not stepped.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not is_supported(optimizer):
        raise ValueError(
            f"optimizer: the steps of {type(optimizer).__name__} are not modelled; supported are "
            "torch's AdamW, Adam and SGD (optim='adamw_torch' in the training arguments)."
        )
    is_adam = not isinstance(optimizer, torch.optim.SGD)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    scales, momentum = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                continue
            name, state = names[parameter], optimizer.state.get(parameter, {})
            if is_adam:
                if "exp_avg_sq" not in state:
                    raise ValueError(
                        f"optimizer: no second moments for the trainable parameter {name!r}; it "
                        "has not been stepped since training began."
                    )
                step = float(state["step"])
                first, second = (1 - beta**step for beta in group["betas"])
                denominator = (state["exp_avg_sq"].float() / second).sqrt() + group["eps"]
                scales[name] = denominator.rsqrt().flatten()
                momentum[name] = (state["exp_avg"].float() / first).flatten()
            else:
                buffer = state.get("momentum_buffer")
                scales[name] = torch.ones_like(parameter, dtype=torch.float32).flatten()
                momentum[name] = (
                    torch.zeros_like(scales[name])
                    if buffer is None
                    else (1 - group["momentum"]) * buffer.float().flatten()
                )
    missing = set(names.values()) - set(scales)
    if missing:
        raise ValueError(f"optimizer does not hold the trainable parameter {sorted(missing)[0]!r}.")
    group = optimizer.param_groups[0]
    beta = float(group["betas"][0] if is_adam else group["momentum"])
    return OptimizerState(
        name="adam" if is_adam else "sgd",
        scales=scales,
        momentum=momentum,
        momentum_coefficient=beta,
        learning_rate_factor=1.0 if is_adam else 1 / (1 - beta),
        weight_decay=float(group["weight_decay"]),
        steps_taken=int(step) if is_adam else None,
    )
