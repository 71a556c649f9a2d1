"""The basis in which curvature is modelled: a block Krylov space of the tasks' mean gradients.

Shapes: D projection_dim, R vectors of the basis, S vectors that the space starts from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_auxselect.estimators.base import Array

# Constants that shape estimates.
MAX_DEFAULT_RANK = 96
"""The largest default size of a basis.

Measured on the families arithmetic, logic, text, small, spelling and sparse of benchmarks/: with 32
estimates rank worse in text (Spearman 0.76 instead of 0.81), small (0.89, 0.93) and spelling (0.86,
0.94); 128 changes little, but in sparse (0.44 instead of 0.52).
"""

_INDEPENDENT_LENGTH = 1e-7
"""A unit vector adds a direction if more than this length of it is outside the span of the others.

A convention, well above the rounding of float64 and of gradients in float32.
"""


class KrylovBasis:
    """Orthonormal vectors that span where curvature acts on a displacement, as far as R allows.

    They span a block Krylov space: first the starting vectors, then the curvature H times those, H
    twice, and so on. What training makes of a starting vector is a function of H times that vector,
    so that it lies in the first of these almost entirely. A block with more directions than are
    left gives its leading ones: the singular vectors of its normalized vectors.

    Args:
        starts_SD: the starting vectors.
        curvature_times: multiplies vectors [D, S] by H.
        rank: R at most; it is less where the space has fewer dimensions.

    Attributes:
        vectors_DR: the basis.
        dim: D.
        rank: R.

    Source: Saad, "Analysis of Some Krylov Subspace Approximations to the Matrix Exponential
    Operator" (SIAM J. Numer. Anal. 1992), section 2, for blocks of vectors.
    """

    def __init__(
        self, starts_SD: Array, curvature_times: Callable[[Array], Array], rank: int
    ) -> None:
        self.dim = starts_SD.shape[1]
        rank = min(rank, self.dim)
        vectors_DR, block_DS = np.zeros((self.dim, 0)), starts_SD.T
        while True:
            lengths_S = np.linalg.norm(block_DS, axis=0)
            block_DS = block_DS[:, lengths_S > 0] / lengths_S[lengths_S > 0]
            for _ in range(2):  # once leaves what rounding leaves
                block_DS = block_DS - vectors_DR @ (vectors_DR.T @ block_DS)
            directions, sizes, _ = np.linalg.svd(block_DS, full_matrices=False)
            new_DS = directions[:, sizes > _INDEPENDENT_LENGTH][:, : rank - vectors_DR.shape[1]]
            vectors_DR = np.hstack([vectors_DR, new_DS])
            if not new_DS.size or vectors_DR.shape[1] == rank:
                break
            block_DS = curvature_times(new_DS)
        self.vectors_DR = vectors_DR if vectors_DR.size else np.eye(self.dim, 1)
        self.rank = self.vectors_DR.shape[1]

    def coordinates(self, vectors: Array) -> Array:
        """Coordinates [., R] of vectors [., D] in the basis."""
        return vectors @ self.vectors_DR

    def expand(self, coordinates: Array) -> Array:
        """The vectors [., D] that have these coordinates [., R]."""
        return coordinates @ self.vectors_DR.T

    def complement(self, vectors: Array) -> Array:
        """What vectors [., D] have in the orthogonal complement of the basis."""
        return vectors - (vectors @ self.vectors_DR) @ self.vectors_DR.T


def default_rank(num_examples: int, num_tasks: int) -> int:
    """The mean number of a task's examples, at most ``MAX_DEFAULT_RANK``.

    A larger basis than a task has examples would describe which examples were captured.
    """
    return max(min(num_examples // num_tasks, MAX_DEFAULT_RANK), 1)
