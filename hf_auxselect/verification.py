"""Ground-truth runs beside the estimates: which mixtures to train on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hf_auxselect.estimators import normalize_mixtures
from hf_auxselect.selectors import random_alternatives
from hf_auxselect.tasks import TaskRows


def mixtures_to_verify(
    weights: Mapping[str, float], counts: np.ndarray, num_mixtures: int, seed: int
) -> dict[str, np.ndarray]:
    """The chosen mixture, all tasks, then random alternatives; different ones only.

    Args:
        weights: share of each task in the chosen mixture.
        counts: number of rows of each task [K].
        num_mixtures: number of mixtures wanted; there may be fewer different ones.
        seed: determines the alternatives: see :func:`random_alternatives`.

    Returns:
        Shares [K] by the name of the mixture.
    """
    chosen = np.array([*weights.values()])
    random, are_subsets = random_alternatives(chosen, counts, num_mixtures, seed)
    names = [f"chosen weights in random order, {i}" for i in range(1, len(random) + 1)]
    if are_subsets:
        names = ["random: " + ", ".join(np.array([*weights])[mask]) for mask in random]
    candidates = [("chosen", chosen), ("all tasks", counts / counts.sum())]
    candidates += zip(names, normalize_mixtures(random, counts), strict=True)
    different: dict[str, np.ndarray] = {}
    for name, shares in candidates:
        if not any(np.allclose(shares, known) for known in different.values()):
            different[name] = shares
    return dict([*different.items()][:num_mixtures])


def mixtures_to_calibrate(tasks: TaskRows, num_mixtures: int, seed: int) -> dict[str, np.ndarray]:
    """All tasks, then random subsets of all sizes; each the farthest from those before it.

    Args:
        tasks: of the training set.
        num_mixtures: number of mixtures wanted; there may be fewer different ones.
        seed: determines which subsets are looked at.

    Returns:
        Shares [K] by the name of the mixture.
    """
    num_tasks, rng = len(tasks.names), np.random.default_rng(seed)
    sizes = rng.integers(1, num_tasks, 512)
    masks = np.vstack(
        [np.ones(num_tasks, bool), rng.random((512, num_tasks)).argsort(1) < sizes[:, None]]
    )
    shares = normalize_mixtures(masks, tasks.counts)
    chosen = [0]
    distance = np.linalg.norm(shares - shares[0], axis=1)
    while len(chosen) < num_mixtures and distance.max() > 1e-9:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(shares - shares[chosen[-1]], axis=1))
    names = [", ".join(np.array(tasks.names)[mask]) for mask in masks]
    return {"all tasks" if i == 0 else names[i]: shares[i] for i in chosen}
