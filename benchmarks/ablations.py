"""Gradient stores with something taken away or put in its place, to see what it is worth.

Shapes: N examples, D projection_dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_auxselect import GradientStore

Array = np.ndarray

SCALARS = (
    "no curvature",
    "empirical Fisher",
    "not preconditioned",
    "not precond., empirical Fisher",
    "not precond., margin",
    "no momentum",
)
"""What :func:`with_scalar` puts in place of the loss and the losses of drawn labels."""


def with_scalar(store: GradientStore, name: str) -> GradientStore:
    """The store with other gradients where LinearizedTraining looks for those of its scalars.

    Without the preconditioner a step is as long as makes the loss on all tasks fall, to first
    order, as fast as the optimizer's own step does; and there is no momentum at the switch, since
    it is kept with the preconditioner only. The margin is that of a logistic model of a whole
    example, as in ``GradExLogistic``: its loss is softplus(-margin).
    """
    if name == "no momentum":
        vectors = store.vectors | {"momentum": np.zeros_like(store.vectors["momentum"])}
        return replaced(
            store,
            scalars={name: store.scalar(name) for name in store.scalars},
            vectors=vectors,
            target=store.target,
        )
    plain = name.startswith("not precond")
    factor = _step_length(store) if plain else 1.0

    def part(of: GradientStore, target: GradientStore | None) -> GradientStore:
        g_ND = of.scalar("loss" if plain else "loss@optimizer")[1].astype(np.float64)
        phi_ND = of.scalar("sampled_loss" if plain else "sampled_loss@optimizer")[1]
        if name.endswith("empirical Fisher"):
            phi_ND = g_ND
        elif name == "no curvature":
            phi_ND = np.zeros_like(g_ND)
        elif name.endswith("margin"):
            margin_N, gradient_ND = of.scalar("margin")
            missed_N1 = 1 / (1 + np.exp(margin_N.astype(np.float64)))[:, None]
            g_ND = -missed_N1 * gradient_ND
            phi_ND = np.sqrt(missed_N1 * (1 - missed_N1)) * gradient_ND
        scalars = {
            "loss": of.scalar("loss"),
            "loss@optimizer": (of.losses, _as_stored(factor * g_ND)),
            "sampled_loss@optimizer": (of.losses, _as_stored(factor * phi_ND)),
        }
        vectors = {key: np.zeros_like(v) if plain else v for key, v in of.vectors.items()}
        return replaced(of, scalars=scalars, vectors=vectors, target=target)

    return part(store, part(store.target, None))


def _step_length(store: GradientStore) -> float:
    """The root of the scalar that stands for the preconditioner."""
    weights_N = store.num_label_tokens / store.num_label_tokens.sum()
    lengths = [
        np.linalg.norm(weights_N @ store.scalar(name)[1].astype(np.float64))
        for name in ("loss@optimizer", "loss")
    ]
    return float(lengths[0] / lengths[1])


def _as_stored(gradients_ND: Array) -> Array:
    return gradients_ND.astype(np.float32)


def before_restart(store: GradientStore, steps: int) -> GradientStore:
    """The store of a run that goes on, as if it were to restart.

    The schedules are linear, so that the rates of the rest of a run of ``steps`` and those of its
    restart differ by a factor.
    """
    training = dict(store.metadata["training"])
    rates = np.array(training["learning_rates"])
    training |= {"learning_rates": (rates * steps / len(rates)).tolist(), "after": "restart"}
    return replaced(
        store,
        scalars={name: store.scalar(name) for name in store.scalars},
        metadata=store.metadata | {"training": training},
        target=store.target,
    )


def projected_again(store: GradientStore, dim: int, seed: int) -> GradientStore:
    """The store with fewer numbers per gradient: cells of the sketch added up with random signs."""
    rng = np.random.default_rng(seed)
    size = store.gradients.shape[1]
    order, signs = rng.permutation(size), rng.choice([-1.0, 1.0], size)

    def project(vectors: np.ndarray) -> np.ndarray:
        cells = (vectors * signs)[..., order].reshape(*vectors.shape[:-1], -1, dim)
        return cells.sum(-2).astype(np.float32)

    def part(of: GradientStore, target: GradientStore | None) -> GradientStore:
        return replaced(
            of,
            scalars={
                name: (of.scalar(name)[0], project(of.scalar(name)[1])) for name in of.scalars
            },
            vectors={name: project(vector) for name, vector in of.vectors.items()},
            target=target,
        )

    return part(store, part(store.target, None))


def replaced(store: GradientStore, **changes: Any) -> GradientStore:
    """A copy of a store with some of its parts replaced."""
    parts = {
        "task_names": store.task_names,
        "task_ids": store.task_ids,
        "example_ids": store.example_ids,
        "losses": store.losses,
        "num_label_tokens": store.num_label_tokens,
        "task_sizes": store.task_sizes,
        "metadata": store.metadata,
        "vectors": store.vectors,
    }
    return GradientStore(**parts | changes)


def thinned(store: GradientStore, examples_per_task: int) -> GradientStore:
    """The first examples of each task alone; the target as it is."""
    first = np.searchsorted(store.task_ids, store.task_ids)
    chosen = np.flatnonzero(np.arange(len(store)) - first < examples_per_task)
    return replaced(
        store,
        task_ids=store.task_ids[chosen],
        example_ids=store.example_ids[chosen],
        losses=store.losses[chosen],
        num_label_tokens=store.num_label_tokens[chosen],
        scalars={
            name: tuple(part[chosen] for part in store.scalar(name)) for name in store.scalars
        },
        target=store.target,
    )
