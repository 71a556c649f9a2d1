"""What was measured where training is about to lead, and how curvature is made to agree with it.

Shapes: T examples of the target, K tasks, E ends, D projection_dim, R dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_auxselect.estimators.base import Array
from hf_auxselect.store.arrays import GradientStore

_LEAST_CHANGE = 0.01
"""Share of a gradient by which it must have changed for a secant to say more than rounding does."""

_BELIEVED = 0.5
"""Share that is believed of a change of gradients which H had not foreseen."""

_PENALTY = 1e-3
"""Of a measured loss, alone, this share is not believed."""

_NAMES = ("second_points", "gradient_changes", "ends", "end_changes")
"""Of the vectors of a store."""


class Ahead(NamedTuple):
    """What ``look_ahead`` has measured."""

    second_points_KD: Array
    gradient_changes_KD: Array
    """Of each task's mean gradient, to its own second point."""
    ends_ED: Array
    end_changes_ET: Array
    """Of the losses of examples of the target, spread evenly over all of them."""

    @classmethod
    def of(cls, store: GradientStore) -> Ahead | None:
        """What a store holds of it."""
        if not all(name in store.vectors for name in _NAMES):
            return None
        return cls(*(store.vectors[name].astype(np.float64) for name in _NAMES))


def with_secant(H_RR: Array, delta_R: Array, change_R: Array, gradient_R: Array) -> Array:
    """Curvature that agrees better with the change of a gradient along a displacement.

    H is changed by as little as makes H delta the mean of what it was and of the change (in the
    Frobenius norm; Powell's symmetric Broyden update), and then by as little as keeps its
    eigenvalues from falling below those of before, or 0: a direction of negative curvature would be
    followed without end. The mean, because training does not take the straight way to where the
    change was measured, and what is found there is that of few examples.

    Source: Dennis and Moré, "Quasi-Newton Methods, Motivation and Theory" (SIAM Review 1977),
    section 7.3.
    """
    if np.linalg.norm(change_R) <= _LEAST_CHANGE * np.linalg.norm(gradient_R):
        return H_RR
    length = max(float(np.linalg.norm(delta_R)), 1e-300)
    u = delta_R / length
    missing_R = _BELIEVED * (change_R - H_RR @ delta_R) / length
    least = min(float(np.linalg.eigvalsh(H_RR)[0]), 0.0)
    H_RR = H_RR + np.outer(missing_R, u) + np.outer(u, missing_R)
    H_RR -= (u @ missing_R) * np.outer(u, u)
    values_R, vectors_RR = np.linalg.eigh(H_RR)
    return (vectors_RR * np.maximum(values_R, least)) @ vectors_RR.T


def with_losses(H_RR: Array, delta_ER: Array, missed_E: Array) -> Array:
    """Curvature that agrees with changes of a loss at displacements.

    It may turn negative: H + C, with the symmetric matrix C that is least of those for which

        delta_e^T C delta_e / 2 = missed_e    for every e,

    where missed_e is what the model misses of the change at delta_e. Least is
    |M^-1/2 C M^-1/2| (Frobenius norm) with M = (H^2)^(1/4), which makes changes cheap where the
    loss is curved already, halfway between a metric of H and one that knows nothing of it: with the
    latter, what steep curvature misses on long ways is made up for by negative curvature in other
    directions, and selectors find them. Where displacements are so much alike that agreement asks
    for large changes, it is given up: least squares, with a penalty on C.
    """
    values_R, vectors_RR = np.linalg.eigh(H_RR)
    weighted_ER = (delta_ER @ vectors_RR * np.sqrt(np.abs(values_R))) @ vectors_RR.T
    # Kernel ridge regression: the functions delta^T C delta have the kernel (delta^T M delta')^2.
    kernel_EE = (weighted_ER @ delta_ER.T) ** 2
    penalty = max(_PENALTY * float(np.trace(kernel_EE)) / len(kernel_EE), 1e-300)
    factor_E = np.linalg.solve(kernel_EE + penalty * np.eye(len(kernel_EE)), missed_E)
    return H_RR + 2 * (weighted_ER.T * factor_E) @ weighted_ER
