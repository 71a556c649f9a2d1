"""Gradient stores with something taken away or put in its place, to see what it is worth.

Shapes: N examples, D projection_dim; B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_auxselect import GradientStore
from hf_auxselect.capture.scalars import LabelLogits, token_margins


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What LinearizedTraining(probes=False) is shown in place of what it asks for."""

    curvature: Literal["sampled_loss", "token_margins", "loss", "margin", "none"] = "sampled_loss"
    """Whose gradients give it. ``margin``: those of the loss come from the margin too, as in a
    logistic model of whole examples (``GradExLogistic``), whose loss is softplus(-margin).
    ``token_margins``: see :func:`signed_token_margins`."""
    preconditioned: bool = True
    """If not, a step is as long as makes the loss on all tasks fall, to first order, as fast as the
    optimizer's own does; and there is no momentum, which is kept with the preconditioner only."""
    momentum: bool = True
    """That of the optimizer at the switch."""
    target_axes: int | None = None
    """So many principal axes of the target's gradients, onto which all others are projected, as in
    GIST; None: they are left as they are."""


ABLATIONS = {
    "without probes": Ablation(),
    "no curvature": Ablation(curvature="none"),
    "empirical Fisher": Ablation(curvature="loss"),
    "margins of tokens": Ablation(curvature="token_margins"),
    "not preconditioned": Ablation(preconditioned=False),
    "not precond., empirical Fisher": Ablation(preconditioned=False, curvature="loss"),
    "not precond., margin": Ablation(preconditioned=False, curvature="margin"),
    "no momentum": Ablation(momentum=False),
    "in the target's 64 main axes": Ablation(target_axes=64),
}


def signed_token_margins(output: LabelLogits) -> Tensor:
    """Has the curvature of a logistic model of every label token, in place of drawn labels [B].

    Such a model's loss is softplus(-margin), of curvature p (1 - p) g g^T in the gradient g of the
    token's margin. With n label tokens of an example it is the sum of their margins times
    sqrt(p (1 - p) / n) and a random sign, so that E[phi phi^T] is the mean over the tokens.
    """
    assert output.uniforms is not None
    margins = token_margins(output)
    p = margins.detach().sigmoid()
    signs = torch.where(output.uniforms < 0.5, -1.0, 1.0)
    return output.mean_over_tokens(signs * (p * (1 - p)).sqrt() * margins) * (
        output.num_label_tokens.sqrt()
    )


def ablated(store: GradientStore, ablation: Ablation) -> GradientStore:
    """The store with other gradients and momentum where LinearizedTraining looks for its own."""
    factor = 1.0 if ablation.preconditioned else _step_length(store)
    suffix = "@optimizer" if ablation.preconditioned else ""
    project = _onto_target(store, ablation.target_axes)

    def part(of: GradientStore, **target: GradientStore) -> GradientStore:
        g_ND = of.scalar("loss" + suffix)[1]
        if ablation.curvature == "none":
            phi_ND = np.zeros_like(g_ND)
        elif ablation.curvature == "margin":
            margin_N, gradient_ND = of.scalar("margin" + suffix)
            missed_N1 = 1 / (1 + np.exp(margin_N.astype(np.float64)))[:, None]
            g_ND = -missed_N1 * gradient_ND
            phi_ND = np.sqrt(missed_N1 * (1 - missed_N1)) * gradient_ND
        else:
            phi_ND = of.scalar(ablation.curvature + suffix)[1]
        scalars = {
            "loss": of.scalar("loss"),
            "loss@optimizer": (of.losses, factor * project(g_ND)),
            "sampled_loss@optimizer": (of.losses, factor * project(phi_ND)),
        }
        return replaced(of, scalars=scalars, **target)

    vectors = _projected(store.vectors, project)
    if not (ablation.momentum and ablation.preconditioned):
        vectors["momentum"] = np.zeros_like(vectors["momentum"])
    return replaced(part(store, target=part(store.target)), vectors=vectors)


PROBES = {
    "probe gradients, no endpoint losses": ("ends", "end_changes"),
    "endpoint losses, no probe gradients": ("second_points", "gradient_changes"),
}
"""Which measurements of the probes are left out."""


def with_some_probes(store: GradientStore, left_out: Sequence[str]) -> GradientStore:
    """The store with some measurements of the probes replaced by zeros, which correct nothing."""
    return store.with_vectors({name: np.zeros_like(store.vectors[name]) for name in left_out})


def _projected(
    vectors: Mapping[str, np.ndarray], project: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """A store's vectors, projected anew; losses are none of the gradients' space."""
    losses = ("end_changes", "initial_losses")
    return {n: v if n in losses else project(v) for n, v in vectors.items()}


def _onto_target(store: GradientStore, num_axes: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """The projection of vectors [., D] onto the target's axes."""
    if num_axes is None:
        return lambda vectors: vectors
    gradients_TD = store.target.scalar("loss@optimizer")[1].astype(np.float64)
    axes_AD = np.linalg.svd(gradients_TD, full_matrices=False)[2][:num_axes]
    return lambda vectors: (vectors @ axes_AD.T) @ axes_AD


def _step_length(store: GradientStore) -> float:
    """The root of the scalar that stands for the preconditioner."""
    weights_N = store.num_label_tokens / store.num_label_tokens.sum()
    lengths = [
        np.linalg.norm(weights_N @ store.scalar(name)[1].astype(np.float64))
        for name in ("loss@optimizer", "loss")
    ]
    return float(lengths[0] / lengths[1])


def before_restart(store: GradientStore, initial_losses_T: np.ndarray) -> GradientStore:
    """The store of a run that goes on, as if it were to restart, where losses are as given."""
    training = store.metadata["training"] | {"after": "restart"}
    return replaced(
        store,
        metadata=store.metadata | {"training": training},
        vectors=store.vectors | {"initial_losses": initial_losses_T.astype(np.float32)},
    )


def projected_again(store: GradientStore, dim: int, seed: int) -> GradientStore:
    """The store with fewer numbers per gradient: cells of the sketch added up with random signs."""
    rng = np.random.default_rng(seed)
    size = store.gradients.shape[1]
    order, signs = rng.permutation(size), rng.choice([-1.0, 1.0], size)

    def project(vectors: np.ndarray) -> np.ndarray:
        cells = (vectors * signs)[..., order].reshape(*vectors.shape[:-1], -1, dim)
        return cells.sum(-2).astype(np.float32)

    def part(of: GradientStore, **target: GradientStore) -> GradientStore:
        return replaced(
            of,
            scalars={
                name: (of.scalar(name)[0], project(of.scalar(name)[1])) for name in of.scalars
            },
            vectors=_projected(of.vectors, project),
            **target,
        )

    return part(store, target=part(store.target))


def replaced(store: GradientStore, **changes: Any) -> GradientStore:
    """A copy of a store with some of its parts replaced."""
    parts: dict[str, Any] = {
        "task_names": store.task_names,
        "task_ids": store.task_ids,
        "example_ids": store.example_ids,
        "losses": store.losses,
        "num_label_tokens": store.num_label_tokens,
        "example_weights": store.example_weights,
        "scalars": {name: store.scalar(name) for name in store.scalars},
        "target": getattr(store, "target", None),  # a target has none of its own
        "groups": store.groups,
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
        example_weights=None,
        scalars={
            name: tuple(part[chosen] for part in store.scalar(name)) for name in store.scalars
        },
    )
