"""The state of a training loop between two optimizer steps: kept, put back, and hashed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from hf_auxselect.capture.optimizer_state import copy_of_state
from hf_auxselect.sharding import local, reshard
from hf_auxselect.trainer import access
from hf_auxselect.zero import ZeroOptimizer


class _Parked(NamedTuple):
    """A tensor on the CPU, and the device that it belongs to."""

    tensor: Tensor
    device: torch.device


@dataclass(frozen=True)
class Snapshot:
    """Parameters, buffers, optimizer, schedule and gradient scaler of a trainer at one moment.

    It can be put back once.
    """

    _tensors: dict[str, Tensor]
    _moments: dict[Any, dict[str, Any]]
    _groups: list[dict[str, Any]]
    _schedule: dict[str, Any]
    _scale: dict[str, Any] | None
    """Of the gradient scaler, or of ZeRO's."""

    @classmethod
    def copied(cls, trainer: Trainer) -> Snapshot:
        """A copy of the present state, on the devices that it is on."""
        tensors = {name: tensor.detach().clone() for name, tensor in _changing(trainer)}
        return cls(tensors, copy_of_state(access.torch_optimizer(trainer)), *_plain(trainer))

    @classmethod
    def parked(cls, trainer: Trainer) -> Snapshot:
        """The present state on the CPU; takes the optimizer's own state, which it then lacks.

        Under ZeRO, which has views of that state, the optimizer keeps it and a copy is taken.
        """
        tensors = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in _changing(trainer)
        }
        optimizer = access.torch_optimizer(trainer)
        if ZeroOptimizer.of(trainer.optimizer) is not None:
            return cls(tensors, copy_of_state(optimizer), *_plain(trainer))
        moments = {
            parameter: {name: _parked(value) for name, value in own.items()}
            for parameter, own in optimizer.state.items()
        }
        optimizer.state.clear()
        return cls(tensors, moments, *_plain(trainer))

    def put_back(self, trainer: Trainer) -> None:
        """Let the trainer be in this state again."""
        optimizer, scaler = access.torch_optimizer(trainer), trainer.accelerator.scaler
        zero = ZeroOptimizer.of(trainer.optimizer)
        if zero is not None:
            zero.loss_scale().update(self._scale or {})
        elif scaler is not None and self._scale is not None:
            scaler.load_state_dict(self._scale)
        trainer.lr_scheduler.load_state_dict(self._schedule)
        for group, values in zip(optimizer.param_groups, self._groups, strict=True):
            for name, value in values.items():
                if isinstance(group[name], Tensor):  # compiled steps refer to it
                    group[name].copy_(value)
                else:
                    group[name] = value
        moments = {
            parameter: {
                name: value.tensor.to(value.device) if isinstance(value, _Parked) else value
                for name, value in own.items()
            }
            for parameter, own in self._moments.items()
        }
        if zero is None:
            optimizer.state.clear()
            optimizer.state.update(moments)
        else:
            zero.set_state(moments)
        with torch.no_grad():
            for name, tensor in _changing(trainer):
                tensor.copy_(self._tensors[name])


def _changing(trainer: Trainer) -> list[tuple[str, Tensor]]:
    """Trainable parameters, buffers and masters, by name; of sharded ones this process's part."""
    reshard(trainer.model)
    zero = ZeroOptimizer.of(trainer.optimizer)
    return [
        (name, local(tensor))
        for name, tensor in (
            *trainer.model.named_parameters(),
            *trainer.model.named_buffers(),
        )
        if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
    ] + [(f"masters {i}", t.detach()) for i, t in enumerate(zero.masters if zero else ())]


def _plain(trainer: Trainer) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any] | None]:
    """Parameter groups, schedule and gradient scaler."""
    scaler, zero = trainer.accelerator.scaler, ZeroOptimizer.of(trainer.optimizer)
    scale = zero.loss_scale() if zero else scaler.state_dict() if scaler is not None else None
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in access.torch_optimizer(trainer).param_groups
    ]
    return (
        groups,
        copy.deepcopy(trainer.lr_scheduler.state_dict()),
        copy.deepcopy(scale),
    )


def _parked(value: Any) -> Any:
    # A subclass, or a tensor with attributes of its own (paged states), may not survive the way.
    if type(value) is Tensor and value.device.type != "cpu" and not vars(value):
        return _Parked(value.cpu(), value.device)
    return value


def digest_of_training(
    trainer: Trainer, initial: Mapping[str, Tensor] | None, options: tuple[object, ...]
) -> str:
    """A hash of what determines the steps that follow, data aside: state and training arguments.

    Bit for bit: a resumed run has the hash of the unbroken one if it is in the same state.

    Args:
        trainer: between two optimizer steps.
        initial: parameters that training restarts from, if it does. The state counts all the same:
            it tells of what no parameter or argument does, such as the model that an adapter is on.
        options: what else counts; plain values.
    """
    state = hashlib.blake2b(digest_size=16)
    arguments = {
        name: value
        for name, value in trainer.args.to_dict().items()
        if not name.startswith(_UNRELATED)
    }
    steps = trainer.state.global_step, trainer.state.max_steps, *options
    groups, schedule, scale = _plain(trainer)
    _feed(state, [steps, arguments, access.random_states(), groups, schedule, scale])
    if initial is not None:
        _feed(state, initial)
    moments = access.torch_optimizer(trainer).state
    _feed(state, [dict(_changing(trainer)), [moments.get(p) for p in _trained(trainer)]])
    return state.hexdigest()


_UNRELATED = (
    "disable_tqdm",
    "do_",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "hub_",
    "load_best",
    "local_rank",
    "logging_",
    "output_dir",
    "overwrite",
    "project",
    "push_to_hub",
    "report_to",
    "resume_from",
    "run_name",
    "save_",
    "trackio",
)
"""Beginnings of training arguments that change no step."""


def _trained(trainer: Trainer) -> list[Tensor]:
    zero = ZeroOptimizer.of(trainer.optimizer)
    if zero is not None:
        return zero.masters
    return [p for group in access.torch_optimizer(trainer).param_groups for p in group["params"]]


def _feed(state: Any, value: Any) -> None:
    """Feed a value to a hash: tensors and arrays by their bytes, others by their ``repr``."""
    if isinstance(value, DTensor):
        value = local(value)
    if hasattr(value, "__tensor_flatten__"):  # quantized: by what it is made of
        names, _ = value.__tensor_flatten__()
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        _feed(state, (str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy()))
    elif isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode())
        state.update(np.ascontiguousarray(value))
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)}:".encode())
        # A file may have its entries in another order than what was written to it.
        for key, item in sorted(value.items(), key=lambda entry: str(entry[0])):
            _feed(state, (str(key), item))
    elif isinstance(value, list | tuple):
        state.update(f"list {len(value)}:".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(f"{value!r};".encode())
