"""Functions of symmetric matrices that are given by their eigenvectors, and their derivatives.

Shapes: M matrices, R their size, C functions.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import Array

_EQUAL = 1e-7
"""Eigenvalues that differ by less than this share of the largest one count as equal. A convention:
for those just above, the quotient of differences keeps about as many digits as the slope would."""


def turned(vectors_MRR: Array, x_MR: Array) -> Array:
    """Vectors in the coordinates of the eigenvectors [M, R]."""
    return np.einsum("mrs,mr->ms", vectors_MRR, x_MR)


def back(vectors_MRR: Array, x_MR: Array) -> Array:
    """Vectors in the coordinates of the eigenvectors, in those of the matrix [M, R]."""
    return np.einsum("mrs,ms->mr", vectors_MRR, x_MR)


def derivative(
    values_MR: Array, vectors_MRR: Array, f_CMR: Array, slope_CMR: Array, y_MR: Array, x_CMR: Array
) -> Array:
    """The derivative of ``sum_c y . f_c(H) x_c`` with respect to the symmetric matrix H.

    Args:
        values_MR: eigenvalues of H.
        vectors_MRR: its eigenvectors, in columns.
        f_CMR: the functions at the eigenvalues.
        slope_CMR: their derivatives.
        y_MR: y, in the coordinates of the eigenvectors.
        x_CMR: the vectors x_c in the same.

    Returns:
        [M, R, R], symmetric.

    Source: Daleckii and Krein's formula; Higham, "Functions of Matrices" (SIAM 2008), theorem 3.11.
    """
    gap_MRR = values_MR[:, :, None] - values_MR[:, None, :]
    scale_M = np.abs(values_MR).max(1, initial=0.0)[:, None, None]
    is_equal_MRR = np.abs(gap_MRR) <= _EQUAL * scale_M
    own_MRR = np.zeros_like(vectors_MRR)
    for f_MR, slope_MR, x_MR in zip(f_CMR, slope_CMR, x_CMR, strict=True):
        quotient_MRR = (slope_MR[:, :, None] + slope_MR[:, None, :]) / 2
        np.divide(
            f_MR[:, :, None] - f_MR[:, None, :], gap_MRR, out=quotient_MRR, where=~is_equal_MRR
        )
        own_MRR += quotient_MRR * (y_MR[:, :, None] * x_MR[:, None, :])
    own_MRR = (own_MRR + own_MRR.transpose(0, 2, 1)) / 2
    return vectors_MRR @ own_MRR @ vectors_MRR.transpose(0, 2, 1)
