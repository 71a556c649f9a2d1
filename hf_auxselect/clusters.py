"""Clusters of examples by their projected gradients, as tasks of data that have none.

Shapes: N examples, D projection_dim, C clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_auxselect.checks import require_count
from hf_auxselect.seeds import random_permutation
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.tasks import TaskRows, task_name

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_LINKED = 10_000
"""Most examples whose pairs are all compared: 8 bytes for each of 10^8 pairs. A convention; about
the size of the paper's data sets."""


def cluster_tasks(
    dataset: Dataset,
    labels_or_store: GradientStore | Sequence[Any] | np.ndarray,
    *,
    num_clusters: int | None = None,
    task_column: str = "task",
    within: str | None = None,
    max_linked: int = MAX_LINKED,
    seed: int = 0,
) -> Dataset:
    """Give a training set a task column: clusters of its rows by gradient, or labels of your own.

    Choose it for a data set that has no tasks, or too coarse ones. Rows whose gradients point the
    same way, which train alike, become one task: the cosine distance of their projected loss
    gradients is clustered by average linkage.

    A cluster need not mean anything to a reader, and clusters are only as good as the gradients:
    capture them after some training on all rows, with some hundreds of numbers per gradient.

    Args:
        dataset: the training set [N rows].
        labels_or_store: the gradients of all rows, such as of a run with
            ``examples_per_task=None`` (``report.gradients()``), or of
            ``capture_gradients(model, {"all": rows}, ...)``. Or a label for each row, a string or
            an integer, of a clustering of your own.
        num_clusters: number of clusters; with ``within``, of each value's rows (or as many as there
            are rows). Not for labels.
        task_column: name of the string column that is added.
        within: a column; rows with different values are never joined. The value begins the names of
            the clusters. It may be ``task_column``, which is replaced. None: all rows together.
        max_linked: most rows that are linked, drawn by ``seed``. The others join the cluster to
            whose linked rows their mean distance is least.
        seed: determines what is drawn.

    Returns:
        The rows in their order with the new column, ``"cluster 1"`` and so on, numbered by first
        appearance. Rows with a gradient of 0, which have no label tokens, join the largest cluster.

    Raises:
        ValueError: the number of labels is not N, a row has no gradient in the store, the column
            exists, or ``num_clusters`` does not fit.

    Cost: memory for all pairs of ``max_linked`` rows, 8 bytes each, and time for a few passes over
    them.

    Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024),
    whose authors cluster chain-of-thought data so; linkage by nearest-neighbor chains: Murtagh, "A
    Survey of Recent Advances in Hierarchical Clustering Algorithms" (1983).

    Examples:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"text": ["1+1=2", "2+2=4", "The sky is blue."]})
        >>> cluster_tasks(data, [0, 0, 1])["task"][:]
        ['cluster 0', 'cluster 0', 'cluster 1']
    """
    from datasets import Features, Value

    from hf_auxselect.packing import TaskDataset

    columns = dataset.column_names
    if within is not None and within not in columns:
        raise ValueError(f"within={within!r} is no column of dataset; its columns are {columns}.")
    if task_column in columns and task_column != within:
        raise ValueError(
            f"dataset already has a column {task_column!r}; pass within={task_column!r} to split "
            "its tasks, or another task_column here and to TaskSelectionCallback."
        )
    parts = np.zeros(len(dataset), np.int64), [""]
    if within is not None:
        groups = _tasks_of(dataset, within)
        parts = groups.ids, [f"{name} " for name in groups.names]
    if isinstance(labels_or_store, GradientStore):
        gradients_ND = _gradients_of_rows(labels_or_store, dataset)
        labels = _cluster_parts(gradients_ND, parts[0], num_clusters, max_linked, seed)
        names = [f"cluster {label + 1}" for label in labels]
    else:
        if num_clusters is not None:
            raise ValueError(
                f"num_clusters={num_clusters} is for a store of gradients; labels are taken as "
                "they are. Leave it out."
            )
        names = _names_of(labels_or_store, len(dataset))
    names = [parts[1][part] + name for part, name in zip(parts[0], names, strict=True)]
    if task_column in columns:
        dataset = dataset.remove_columns(task_column)
    features = Features({**dataset.features, task_column: Value("string")})
    labelled = dataset.add_column(task_column, names).cast(features)
    return TaskDataset.of(labelled, task_column)


def cluster_rows(labels_N: np.ndarray) -> TaskRows:
    """Tasks from the clusters 0, 1, ... of N rows: ``"cluster 1"`` is that of the first row."""
    ids_N = _by_appearance(labels_N)
    return TaskRows(tuple(f"cluster {c + 1}" for c in range(ids_N.max() + 1)), ids_N)


def _by_appearance(labels_N: np.ndarray) -> np.ndarray:
    """The same partition of N examples, numbered by first appearance: int64 [N]."""
    _, first, ids_N = np.unique(labels_N, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[ids_N]


def evenly_split(num_rows: int, number: int) -> TaskRows:
    """Clusters of about one size, to stand for those that are still to be found.

    Raises:
        ValueError: there are more clusters than rows.
    """
    if number > num_rows:
        raise ValueError(
            f"clusters={number}, but train_dataset has only {num_rows} rows; ask for fewer."
        )
    return cluster_rows(np.arange(num_rows) % number)


def _tasks_of(dataset: Dataset, column: str) -> TaskRows:
    """The values of a column as tasks."""
    class_names = getattr(dataset.features[column], "names", None)
    labels = dataset.with_format(None)[column]
    return TaskRows.from_labels(labels, class_names=class_names, column=column)


def _names_of(labels: Sequence[Any] | np.ndarray, num_rows: int) -> list[str]:
    """The names of the clusters that a user's labels stand for."""
    if len(labels) != num_rows:
        raise ValueError(
            f"labels_or_store has {len(labels)} labels, but dataset has {num_rows} rows; give one "
            "label for each row."
        )
    names = []
    for row, label in enumerate(labels):
        name = task_name(label, None)
        if name is None:
            raise ValueError(
                f"labels_or_store: the label of row {row} must be a string or an integer, got "
                f"{label!r}."
            )
        names.append(name if isinstance(label, str) else f"cluster {name}")
    return names


def _gradients_of_rows(store: GradientStore, dataset: Dataset) -> np.ndarray:
    """The loss gradient of each row of a dataset: float32 [N, D]."""
    count, ids = len(dataset), store.example_ids
    capture = (
        "Capture all rows: with examples_per_task=None, or as one task, "
        "capture_gradients(model, {'all': rows}, ...)."
    )
    if len(np.unique(ids)) < len(ids) or (store.examples_per_row != 1).any():
        raise ValueError(
            "labels_or_store: the examples of this store are not rows of one dataset (several "
            f"tasks were captured each for itself, or rows are packed). {capture}"
        )
    known = int(store.task_sizes.sum())
    if known != count:
        raise ValueError(
            f"labels_or_store: the store is about a training set of {known} rows, but dataset has "
            f"{count}; give the one that was captured (trainer.train_dataset)."
        )
    missing = np.setdiff1d(np.arange(count), ids)
    if len(missing):
        raise ValueError(
            f"labels_or_store: {len(missing)} of {count} rows have no gradient in the store, the "
            f"first is row {missing[0]}. {capture}"
        )
    return store.loss_gradients[np.argsort(ids)]


def _cluster_parts(
    gradients_ND: np.ndarray,
    part_N: np.ndarray,
    num_clusters: int | None,
    max_linked: int,
    seed: int,
) -> np.ndarray:
    """The cluster of each row among those of its part, which are clustered each for itself."""
    require_count("num_clusters", num_clusters, 1)
    require_count("max_linked", max_linked, 1)
    assert num_clusters is not None
    if max_linked < num_clusters:
        raise ValueError(
            f"max_linked must be at least num_clusters={num_clusters}, got {max_linked}."
        )
    labels_N = np.zeros(len(part_N), np.int64)
    for part in np.unique(part_N):
        rows = np.flatnonzero(part_N == part)
        labels_N[rows] = cluster_gradients(
            gradients_ND[rows], num_clusters, max_linked=max_linked, seed=seed
        )
    return labels_N


def cluster_gradients(
    gradients_ND: np.ndarray, num_clusters: int, *, max_linked: int = MAX_LINKED, seed: int = 0
) -> np.ndarray:
    """The cluster of each of N gradients, numbered by first appearance: int64 [N].

    See :func:`cluster_tasks`. There are fewer than ``num_clusters`` only where fewer gradients
    differ from 0.
    """
    norms_N = np.sqrt(np.einsum("nd,nd->n", gradients_ND, gradients_ND, dtype=np.float64))
    pointing = np.flatnonzero(norms_N > 0)
    if not len(pointing):
        return np.zeros(len(norms_N), np.int64)
    if len(pointing) < len(norms_N):
        logger.warning(
            "%d of %d rows have a gradient of 0, as without label tokens; they join the largest "
            "cluster.",
            len(norms_N) - len(pointing),
            len(norms_N),
        )
    linked = pointing
    if len(pointing) > max_linked:
        linked = np.sort(pointing[random_permutation(len(pointing), seed, "linked")[:max_linked]])
    units_LD = gradients_ND[linked] / norms_N[linked, None]
    labels_L = average_linkage(units_LD @ units_LD.T, min(num_clusters, len(linked)))
    labels_N = np.full(len(norms_N), -1, np.int64)
    labels_N[linked] = labels_L
    counts_C = np.bincount(labels_L)
    # The mean cosine of an example with the members of a cluster is that with their mean.
    means_CD = np.stack([units_LD[labels_L == c].mean(0) for c in range(len(counts_C))])
    rest = np.setdiff1d(pointing, linked, assume_unique=True)
    for start in range(0, len(rest), max_linked):
        block = rest[start : start + max_linked]
        labels_N[block] = np.argmax(gradients_ND[block] @ means_CD.T, axis=1)
    labels_N[labels_N < 0] = np.argmax(np.bincount(labels_N[pointing]))
    return _by_appearance(labels_N)


def average_linkage(similarity_NN: np.ndarray, num_clusters: int) -> np.ndarray:
    """Join the two clusters of the largest mean similarity until ``num_clusters`` are left.

    Args:
        similarity_NN: of N examples, symmetric; it is overwritten.
        num_clusters: 1 to N.

    Returns:
        The cluster of each example, numbered by first appearance: int64 [N].
    """
    count = len(similarity_NN)
    # Sums of similarities between clusters, each of which lives in the row of one of its members.
    # Following nearest neighbors until two clusters are each other's finds joins that a search for
    # the closest pair makes, too, though in another order; they are put in order at the end.
    sums_NN, sizes_N = similarity_NN, np.ones(count)
    np.fill_diagonal(sums_NN, -np.inf)
    joins: list[tuple[float, int, int]] = []
    chain: list[int] = []
    alive = np.ones(count, bool)
    while len(joins) < count - 1:
        if not chain:
            chain.append(int(np.argmax(alive)))
        tip = chain[-1]
        mean_N = np.where(alive, sums_NN[tip] / sizes_N, -np.inf)
        mean_N[tip] = -np.inf
        nearest = int(np.argmax(mean_N))
        if len(chain) > 1 and mean_N[chain[-2]] >= mean_N[nearest]:
            chain.pop()
            other = chain.pop()
            joins.append((float(mean_N[other] / sizes_N[tip]), tip, other))
            sums_NN[tip] += sums_NN[other]
            sums_NN[:, tip] = sums_NN[tip]
            sizes_N[tip] += sizes_N[other]
            alive[other] = False
        else:
            chain.append(nearest)
    # A join of a cluster comes after those that made it: its similarity is no larger.
    order = sorted(range(len(joins)), key=lambda i: (-joins[i][0], i))
    parent_N = np.arange(count)
    for i in order[: count - num_clusters]:
        _, one, other = joins[i]
        parent_N[parent_N == parent_N[other]] = parent_N[one]
    return _by_appearance(parent_N)
