"""Seeded random projection of per-example gradients to a few thousand numbers.

Shapes: B examples of a batch, P entries of one parameter, D projection_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hf_auxselect.checks import require_count
from hf_auxselect.seeds import random_words

PROJECTION_VERSION = 1
"""The version of the projection, stored with projected gradients: it changes whenever the same seed
would give other numbers."""

_BYTES_PER_SLOT = 12
"""Memory of one slot in the tables: an int64 position and a float32 sign."""


class CountSketch:
    """Projects gradients by adding each entry, with a random sign, to one of ``dim`` cells.

    The projection of a whole gradient is the sum of the projections of its parameters,

        ``project(g)[d] = sum of sign_p(i) * g_p[i] over all p, i with cell_p(i) = d``,

    where the P entries of a parameter are dealt to the D cells by a random permutation, so that no
    two cells differ by more than one entry per parameter. Inner products are kept in expectation,
    with the variance of a dense Rademacher matrix of the same D,

        ``E[project(g) . project(h)] = g . h``,
        ``Var <= ((g . h)**2 + |g|**2 * |h|**2) / D``,

    at a cost of O(P) per example whatever D is; nothing of size P x D exists. Because the
    projection is linear, contributions to a parameter may be projected one by one: tied weights
    and modules that run twice need no special care.

    Permutation and signs depend on ``seed``, the parameter's name and its size alone, so that they
    are the same on every device, platform and number of processes. They cost 12 bytes per entry of
    a parameter, the number of entries rounded up to a multiple of D.

    Args:
        dim: D, the length of a projected gradient.
        seed: determines the permutations and signs.

    Source: Charikar, Chen and Farach-Colton, "Finding Frequent Items in Data Streams" (2002);
    the variance is that of Weinberger et al., "Feature Hashing for Large Scale Multitask
    Learning" (2009), appendix A.
    """

    def __init__(self, dim: int, seed: int) -> None:
        require_count("projection_dim", dim, 2)
        self.dim = dim
        self.seed = seed
        self._tables: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def table_bytes(self, num_entries: int) -> int:
        """Memory in bytes of the tables of a parameter."""
        return self._num_slots(num_entries) * _BYTES_PER_SLOT

    def _num_slots(self, num_entries: int) -> int:
        return -(-num_entries // self.dim) * self.dim

    def prepare(self, name: str, num_entries: int, like: Tensor) -> None:
        """Build the tables of a parameter now, for gradients of the device and dtype of ``like``.

        While they are built, they take as much again.
        """
        self._table(name, num_entries, like)

    def project(self, name: str, gradients: Tensor) -> Tensor:
        """Project ``gradients`` [B, P] of the parameter called ``name``: [B, D]."""
        entry, sign = self._table(name, gradients.shape[1], gradients)
        dealt = gradients.index_select(1, entry).mul_(sign)
        return dealt.view(len(gradients), -1, self.dim).sum(1)

    def project_all(self, values: Mapping[str, Tensor]) -> Tensor:
        """Project a flat tensor [P] of each of some parameters, by name; their sum: [D]."""
        parts = [self.project(name, value.unsqueeze(0))[0] for name, value in values.items()]
        return torch.stack(parts).sum(0) if parts else torch.zeros(self.dim)

    def _table(self, name: str, num_entries: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Entry that each of the q*D slots (slot s belongs to cell s mod D) takes, and its sign."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            num_slots = self._num_slots(num_entries)
            words = random_words(num_slots, "count sketch", PROJECTION_VERSION, self.seed, name)
            # The order of the words is ruled by their high bits, the sign by the lowest one.
            entry = np.argsort(words, kind="stable")
            negative = (words & np.uint64(1)).astype(bool)[entry]
            del words
            sign = np.where(negative, np.float32(-1), np.float32(1))
            sign[entry >= num_entries] = 0.0  # slots beyond the last entry stay empty
            np.minimum(entry, num_entries - 1, out=entry)
            self._tables[key] = (
                torch.from_numpy(entry).to(like.device),
                torch.from_numpy(sign).to(like.device, like.dtype),
            )
        return self._tables[key]
