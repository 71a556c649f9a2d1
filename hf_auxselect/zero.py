"""What each process keeps of parameters and optimizer state under ZeRO of DeepSpeed.

ZeRO steps a float32 copy of the parameters, its masters: each process has a piece of them, and the
optimizer's state for that piece, as a flat tensor for each parameter group. Under ZeRO-1 and -2 the
model's own parameters are whole. Under ZeRO-3 they are pieces, too, and whole only for the length
of their layer's call.

DeepSpeed itself is not imported: what is here reads objects that it has made. They have no public
interface for all of it; the private names are in this module alone.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(2020); DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_auxselect.distributed import sum_over_processes

_OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
"""Those of ZeRO-1 and -2, and of ZeRO-3. Their subclasses step in other ways."""


def is_partitioned(parameter: Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3."""
    return hasattr(parameter, "ds_id")


def has_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed gathers the parameters of this model when its layers are called."""
    return any(hasattr(p, "_z3_optimizer") for p in model.parameters())


def drop_gathered(parameters: Iterable[Tensor]) -> None:
    """Let ZeRO-3 keep pieces alone.

    It holds on to whole parameters after a backward that does not end in their own gradients, and
    would not see that their pieces have been changed.
    """
    for p in parameters:
        if hasattr(p, "_z3_optimizer"):
            p._z3_optimizer.empty_partition_cache()  # of the whole model
            return


def piece_of(parameter: Any) -> Tensor:
    """This process's piece of a parameter of ZeRO-3, flat, with padding at its end."""
    piece: Tensor = parameter.ds_tensor
    return piece


def whole_parameter(parameter: Any) -> Tensor:
    """A parameter of ZeRO-3 on its device; collective."""
    piece, first = piece_of(parameter).detach(), _first_of_piece(parameter)
    return _joined(parameter, piece.dtype, [(piece, first)])


def write_piece(parameter: Any, value: Tensor) -> None:
    """Give a parameter of ZeRO-3 another value, of which every process takes its piece."""
    _fill(piece_of(parameter), value, _first_of_piece(parameter))


def _first_of_piece(parameter: Any) -> int:
    """Where in the flat parameter this process's piece begins."""
    return dist.get_rank(parameter.ds_process_group) * int(parameter.ds_tensor.ds_numel)


def shape_of(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def _fill(piece: Tensor, value: Tensor, first: int) -> None:
    """Copy the part of a whole value that begins there into a piece, padding left as it is."""
    part = value.detach().flatten()[first : first + piece.numel()]
    piece.detach()[: len(part)].copy_(part)


def _joined(parameter: Tensor, dtype: torch.dtype, pieces: Iterable[tuple[Tensor, int]]) -> Tensor:
    """The whole of what processes have pieces of, each with its place; collective."""
    shape = shape_of(parameter)
    joined = torch.zeros(shape.numel(), dtype=dtype, device=parameter.device)
    for piece, first in pieces:
        end = min(first + piece.numel(), shape.numel())
        if first < end:
            joined[first:end] = piece[: end - first].to(parameter.device)
    return sum_over_processes(joined).view(shape)


@dataclass(frozen=True)
class ZeroOptimizer:
    """The optimizer of ZeRO-1, -2 or -3, as far as its state is concerned."""

    _zero: Any

    @classmethod
    def of(cls, optimizer: Any) -> ZeroOptimizer | None:
        """Found below accelerate's wrapper; None if it is another."""
        while optimizer is not None:
            if type(optimizer).__name__ in _OPTIMIZERS:
                return cls(optimizer)
            optimizer = vars(optimizer).get("optimizer") if hasattr(optimizer, "__dict__") else None
        return None

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that steps the masters."""
        inner: torch.optim.Optimizer = self._zero.optimizer
        return inner

    @property
    def masters(self) -> list[Tensor]:
        """This process's flat pieces of the masters."""
        if self._is_stage_3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    @property
    def _is_stage_3(self) -> bool:
        return type(self._zero).__name__ == _OPTIMIZERS[1]

    def parameters_of_groups(self) -> list[list[Tensor]]:
        """The model's parameters in each parameter group."""
        if not self._is_stage_3:
            return [list(group) for group in self._zero.bit16_groups]
        groups: list[list[Tensor]] = [[] for _ in self.inner.param_groups]
        for number, part in enumerate(self._zero.fp16_groups):
            groups[self._zero.sub_group_to_group_id[number]] += part
        return groups

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The state of one of the model's parameters, whole; collective."""
        flat, _, _, _ = self._place(parameter)
        own = self.inner.state.get(flat, {})
        return {
            key: _joined(parameter, value.dtype, self._pieces(parameter, key))
            if isinstance(value, Tensor) and value.ndim
            else value
            for key, value in own.items()
        }

    def set_masters(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Give masters other values, of which every process takes its pieces."""
        for name, parameter in parameters.items():
            for piece, first in self._pieces(parameter):
                _fill(piece, values[name], first)

    def forget(self) -> None:
        """Set the state to what it was before the first step, in place: DeepSpeed has views."""
        for own in self.inner.state.values():
            for key, value in own.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif isinstance(value, int):
                    own[key] = 0

    def set_state(self, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Put a copy of the inner optimizer's state back, in place: DeepSpeed has views."""
        for flat, values in state.items():
            own = self.inner.state[flat]
            for key, value in values.items():
                if isinstance(own.get(key), Tensor):
                    own[key].copy_(value)
                else:
                    own[key] = value

    def local_masters(self, parameter: Tensor) -> list[Tensor]:
        """This process's part of a parameter's masters: one view, or none."""
        return [piece for piece, _ in self._pieces(parameter)]

    @property
    def has_state_by_entry(self) -> bool:
        """Whether the state of each entry of a parameter depends on that entry alone."""
        own = type(self.inner)
        known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
        return issubclass(own, known) or own.__module__.startswith("deepspeed.")

    def loss_scale(self) -> dict[str, Any]:
        """What the scaler of losses counts."""
        return vars(self._zero.loss_scaler)

    def _pieces(self, parameter: Tensor, key: str | None = None) -> Iterator[tuple[Tensor, int]]:
        """Views of this process's part of the masters, or of a state, and its place; or nothing."""
        flat, start, size, first = self._place(parameter)
        if size:
            tensor = flat if key is None else self.inner.state[flat][key]
            yield tensor.detach().narrow(0, start, size), first

    def _place(self, parameter: Any) -> tuple[Tensor, int, int, int]:
        """The flat tensor that has a parameter's part, where it begins, its size, and its place."""
        if self._is_stage_3:
            number, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return self.masters[number], start, size, _first_of_piece(parameter)
        mapping = parameter._hp_mapping
        if mapping is not None:
            of_master, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            flat = self.masters[mapping.param_group_index]
            return flat, of_master.start, of_master.numel, of_parameter.start
        for flat, group in zip(self.masters, self._zero.bit16_groups, strict=True):
            if any(parameter is p for p in group):
                return flat, 0, 0, 0
        raise AssertionError("the parameter is in no group")
