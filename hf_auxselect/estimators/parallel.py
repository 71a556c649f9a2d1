"""Work on many mixtures, some at a time, on all cores.

Shapes: K tasks, M mixtures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
from threadpoolctl import ThreadpoolController

from hf_auxselect.estimators.base import Array


def in_chunks(
    rows_MK: Array, function: Callable[[Array], tuple[Array, ...]], *, size: int
) -> tuple[Array, ...]:
    """Arrays [M] of M mixtures, worked out ``size`` mixtures at a time and in parallel."""
    parts = [rows_MK[first : first + size] for first in range(0, max(len(rows_MK), 1), size)]
    with one_blas_thread(), ThreadPoolExecutor(_num_cores()) as pool:
        chunks = list(pool.map(function, parts))
    return tuple(np.concatenate(column) for column in zip(*chunks, strict=True))


def one_blas_thread() -> AbstractContextManager[object]:
    """Keeps NumPy's products and decompositions to one thread each.

    The matrices here are small: further threads cost more than they give, and many times more where
    other processes use the cores, too.
    """
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
