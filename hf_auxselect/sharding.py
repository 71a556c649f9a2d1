"""Parameters of which each process holds a part (a shard), as FSDP2 and ZeRO-3 keep them.

Both gather a parameter for the length of its layer's call. Under FSDP2 a sharded parameter is a
``DTensor``, and a plain tensor takes its place in the graph; under ZeRO-3 it is the same object,
without entries meanwhile. Inputs and outputs of layers are plain tensors, so hooks see there what
they see without sharding. Whatever reads, writes or differentiates by a parameter itself goes
through this module.

A forward or backward through a sharded layer is a collective operation: all processes run it, each
as often as the others.

Source: PyTorch, ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_auxselect import zero
from hf_auxselect.distributed import gather, process_rank

Owned = list[tuple[nn.Module, str, str]]
"""Modules, names of their parameters in them, and in the model."""

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What activation checkpointing of FSDP puts into names; projections depend on names."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, as the optimizer holds them."""
    reshard(model)
    return {
        name.replace(_CHECKPOINT_WRAPPER, ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of parameters, so that they run their passes in step."""
    # Not by its parameters: after a forward, all of them may be gathered.
    return process_rank()[1] > 1 and (
        zero.has_engine(model) or any(isinstance(m, FSDPModule) for m in model.modules())
    )


def reshard(model: nn.Module) -> None:
    """Let parameters be sharded again, which FSDP2 and ZeRO-3 leave gathered at times.

    Else they would not gather them again when the sharded ones have been changed.
    """
    zero.drop_gathered(model.parameters())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shape_of(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    return zero.shape_of(parameter)


def runs_backward_once(model: nn.Module) -> bool:
    """Whether each backward needs a forward of its own: ZeRO-3 drops what the first one used."""
    return zero.has_engine(model)


def device_of(parameter: Tensor) -> torch.device:
    """Where layers compute with a parameter; sharded ones may be kept on the CPU meanwhile."""
    if isinstance(parameter, DTensor):
        return torch.empty(0, device=parameter.device_mesh.device_type).device
    return parameter.device


def whole(tensor: Tensor) -> Tensor:
    """A parameter, or a state of it, as one plain tensor, detached; collective if it is sharded."""
    if zero.is_partitioned(tensor):
        return zero.whole_parameter(tensor)
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return tensor.full_tensor().detach().to(device_of(tensor))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, detached; what changes it in place changes the tensor."""
    if zero.is_partitioned(tensor):
        return zero.piece_of(tensor).detach()
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assign(
    model: nn.Module, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Give parameters of a model other values, in place.

    Args:
        model: its gathered copies of parameters are dropped.
        parameters: by name.
        values: whole tensors, by the same names and more; each process has all of each.
    """
    for name, p in parameters.items():
        write(p, values[name])
    reshard(model)


def write(parameter: Tensor, value: Tensor) -> None:
    """Give one parameter another value; to be followed by :func:`reshard` of its model."""
    if zero.is_partitioned(parameter):
        zero.write_piece(parameter, value)
        return
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.detach(), mesh, placements).to_local()
    local(parameter).copy_(value)


@contextlib.contextmanager
def parameters_of_graph(
    model: nn.Module, trainable: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """The tensors that stand for the trainable parameters in a graph, by name.

    Without sharding these are the parameters. Else they are found while the model runs, within the
    context.
    """
    if not any(isinstance(p, DTensor) for p in trainable.values()):
        yield trainable
        return
    reshard(model)
    found = {name: p for name, p in trainable.items() if not isinstance(p, DTensor)}
    names = {id(p): name for name, p in trainable.items()}

    def look(owned: Owned, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            held = ((getattr(owner, key), name) for owner, key, name in owned)
            found.update({name: p for p, name in held if not isinstance(p, DTensor)})

    handles = []
    for module in model.modules():
        if isinstance(module, FSDPModule):  # its own hook, which gathers, comes before
            owned: Owned = [
                (owner, key, names[id(p)])
                for owner in module.modules()
                for key, p in owner.named_parameters(recurse=False, remove_duplicate=False)
                if id(p) in names
            ]
            handles.append(module.register_forward_pre_hook(partial(look, owned)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def passes_to_add(own: int, model: nn.Module) -> int:
    """How many passes over a model a process adds to its own, so that all run as many.

    Collective where the model is sharded: all ask before their first pass.
    """
    return max(gather(own)) - own if is_sharded(model) else 0


def squared_length(parameter: Tensor) -> Tensor:
    """Sum of the squares of a parameter's entries, at least in float32; collective if sharded."""
    if zero.is_partitioned(parameter):
        parameter = zero.whole_parameter(parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return whole(parameter.to(dtype).square().sum())
