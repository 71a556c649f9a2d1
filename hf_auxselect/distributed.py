"""The few collective operations of the package; each is a plain call without torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


def process_rank() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """The value of every process, in order of rank, on all of them."""
    _, world_size = process_rank()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in all of them; it is overwritten by it."""
    if process_rank()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main_process(function: Callable[[], T]) -> T:
    """Call ``function`` on the main process; return its result, or raise its error, on all."""
    rank, world_size = process_rank()
    if world_size == 1:
        return function()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = function()
        except Exception as error:  # raised below, in every process
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class MainProcessValue(Generic[T]):
    """A value that the main process computes and keeps, and every process may ask about.

    Args:
        make: computes the value; called on the main process alone. All processes raise its error.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._values: list[T] = []
        on_main_process(lambda: self._values.append(make()))

    @property
    def value(self) -> T:
        """The value; on the main process only."""
        return self._values[0]

    def ask(self, question: Callable[[T], U]) -> U:
        """What the main process answers, on all processes; each of them must ask."""
        return on_main_process(lambda: question(self.value))

    def local(self) -> T | None:
        """The value on the main process, None on the others."""
        return self._values[0] if self._values else None
