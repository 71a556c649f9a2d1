"""Statistics that estimators report as diagnostics.

Shapes: N examples, D projection_dim, M mixtures.
"""

from __future__ import annotations

import numpy as np

from hf_auxselect.estimators.base import Array

_OUTLIER_FACTOR = 10
"""A gradient is an outlier if its norm is over this many medians of its task. A convention."""


def outlier_share(gradients: Array, task_ids: Array) -> float:
    """Share of the examples whose gradient norm is over ten times the median of their task."""
    norms = np.linalg.norm(gradients, axis=1)
    medians = np.array([np.median(norms[task_ids == k]) for k in range(task_ids.max() + 1)])
    return float(np.mean(norms > _OUTLIER_FACTOR * medians[task_ids]))


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's correlation of two arrays [M], ties at their mean rank; 0 if one is constant."""

    def ranks(values: Array) -> Array:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    both = np.stack([ranks(np.asarray(one)), ranks(np.asarray(other))])
    both -= both.mean(1, keepdims=True)
    norms = np.linalg.norm(both, axis=1)
    return float(both[0] @ both[1] / norms.prod()) if norms.all() else 0.0
