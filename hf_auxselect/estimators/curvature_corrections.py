"""Corrections of a curvature matrix by what probes measured: a secant, or losses.

Shapes: E endpoints, R vectors of the basis.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import TINY, Array

# Constants that shape estimates. The families are those of benchmarks/.
MIN_GRADIENT_CHANGE = 0.01
"""A secant is used if the gradient changed by more than this share of its length.

A convention: a smaller change is not told from the rounding of gradients and models.
"""

SECANT_DAMPING = 0.5
"""The share of a gradient's unforeseen change that corrects the curvature; 1: an undamped update.

Measured: chosen over 1 by a look at all eight families and at the variants of small. No family is
held out from it.
"""

LOSS_FIT_RIDGE = 0.3
"""The ridge of the fit to endpoint losses, as a share of the mean diagonal of its kernel matrix.

Measured on all eight families (``benchmarks/accuracy/terms.py``): from 0.001 to 0.3 the mean rank
correlation rises from 0.84 to 0.86; 0.1 and 1 are between. No family is held out from it.
"""


def psb_update(H_RR: Array, delta_R: Array, change_R: Array, gradient_R: Array) -> Array:
    """Correct a curvature matrix by the change of its gradient along a displacement.

    This is Powell's symmetric Broyden (PSB) update, damped: the matrix nearest to H in the
    Frobenius norm that maps delta to a mean of H delta and the measured change. It is damped since
    training does not take the straight line to where the change was measured, and since the change
    is that of few examples. Then eigenvalues are raised as little as keeps them from falling below
    the least one of before, or 0: training would follow a direction of negative curvature forever.

    Args:
        H_RR: the curvature.
        delta_R: the displacement.
        change_R: by how much the gradient was measured to change along it.
        gradient_R: the gradient before, to tell whether the change is more than rounding.

    Source: Dennis and Moré, "Quasi-Newton Methods, Motivation and Theory" (SIAM Review 1977),
    section 7.3.
    """
    if np.linalg.norm(change_R) <= MIN_GRADIENT_CHANGE * np.linalg.norm(gradient_R):
        return H_RR
    length = max(float(np.linalg.norm(delta_R)), TINY)
    u = delta_R / length
    missing_R = SECANT_DAMPING * (change_R - H_RR @ delta_R) / length
    least = min(float(np.linalg.eigvalsh(H_RR)[0]), 0.0)
    H_RR = H_RR + np.outer(missing_R, u) + np.outer(u, missing_R)
    H_RR -= (u @ missing_R) * np.outer(u, u)
    values_R, vectors_RR = np.linalg.eigh(H_RR)
    return (vectors_RR * np.maximum(values_R, least)) @ vectors_RR.T


def fit_to_endpoint_losses(H_RR: Array, delta_ER: Array, missed_E: Array) -> Array:
    """Correct a curvature matrix by losses that were measured at displacements.

    The result is H + C, with the least symmetric matrix C for which

        delta_e^T C delta_e / 2 = missed_e    for every e,

    up to a small ridge. C may turn curvature negative. Where displacements are so much alike that
    agreement would ask for large changes, the ridge gives up agreement.

    Args:
        H_RR: the curvature.
        delta_ER: the displacements.
        missed_E: by how much the losses there exceed what the quadratic with H predicts.
    """
    # Least is |M^-1/2 C M^-1/2| (Frobenius norm) with M = (H^2)^(1/4), which makes changes cheap
    # where the loss is curved already. M = I would make up for what steep curvature misses at long
    # displacements by negative curvature in other directions, which selectors would find. M = |H|
    # would leave flat directions alone. The exponent lies halfway, which was better in every
    # variant of the family small.
    values_R, vectors_RR = np.linalg.eigh(H_RR)
    weighted_ER = (delta_ER @ vectors_RR * np.sqrt(np.abs(values_R))) @ vectors_RR.T
    # Kernel ridge regression: the functions delta^T C delta have the kernel (delta^T M delta')^2.
    kernel_EE = (weighted_ER @ delta_ER.T) ** 2
    ridge = max(LOSS_FIT_RIDGE * float(np.trace(kernel_EE)) / len(kernel_EE), TINY)
    factor_E = np.linalg.solve(kernel_EE + ridge * np.eye(len(kernel_EE)), missed_E)
    return H_RR + 2 * (weighted_ER.T * factor_E) @ weighted_ER
