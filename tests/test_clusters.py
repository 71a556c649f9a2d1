"""Clusters of examples as tasks: linkage against SciPy, planted clusters, and what is refused."""

import random

import numpy as np
import pytest
import tiny
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from hf_auxselect import GaussNewton, GradientStore, capture_gradients, cluster_tasks
from hf_auxselect.clusters import average_linkage, cluster_gradients


def adjusted_rand(one, other):
    """Agreement of two partitions: 1 if they are the same, 0 on average if they are random."""
    pairs = lambda counts: (counts * (counts - 1) / 2).sum()  # noqa: E731
    positions = [np.unique(labels, return_inverse=True)[1] for labels in (one, other)]
    table = np.zeros([p.max() + 1 for p in positions])
    np.add.at(table, tuple(positions), 1)
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / pairs(np.array([len(positions[0])]))
    return (both - chance) / ((rows + columns) / 2 - chance)


def planted(seed, *, num_clusters=6, count=300, dim=64, noise=0.8):
    """Gradients of clusters of different sizes, whose lengths vary; and their clusters."""
    rng = np.random.default_rng(seed)
    truth = np.minimum(rng.geometric(0.3, count) - 1, num_clusters - 1)
    centers = rng.normal(size=(num_clusters, dim))
    gradients = centers[truth] + noise * rng.normal(size=(count, dim))
    return (gradients * rng.lognormal(size=(count, 1))).astype(np.float32), truth


def store_of(gradients, ids=None, sizes=None, task_ids=None):
    """A store of one task, or of several."""
    count = len(gradients)
    task_ids = np.zeros(count, int) if task_ids is None else np.asarray(task_ids)
    names = [f"t{k}" for k in range(task_ids.max() + 1)]
    return GradientStore(
        task_names=names,
        task_ids=task_ids,
        example_ids=np.arange(count) if ids is None else ids,
        losses=np.ones(count),
        num_label_tokens=np.ones(count, int),
        scalars={"loss": (np.ones(count), np.asarray(gradients, np.float32))},
        task_sizes=[count] if sizes is None else sizes,
    )


def rows(count):
    return Dataset.from_dict({"text": [f"row {i}" for i in range(count)]})


@settings(max_examples=40)
@given(st.integers(0, 500), st.integers(2, 25), st.data())
def test_clusters_are_those_of_average_linkage(seed, count, data):
    gradients = np.random.default_rng(seed).normal(size=(count, 4))
    number = data.draw(st.integers(1, count))
    expected = fcluster(linkage(gradients, "average", metric="cosine"), number, "maxclust")
    found = cluster_gradients(gradients, number)
    assert len(np.unique(found)) == number
    assert number in (1, count) or adjusted_rand(found, expected) == pytest.approx(1)
    assert sorted(np.unique(found, return_index=True)[1]) == [
        np.flatnonzero(found == c)[0] for c in range(number)
    ]


def test_similarities_alone_are_enough():
    similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    assert average_linkage(similarity.copy(), 2).tolist() == [0, 0, 1]
    assert average_linkage(similarity.copy(), 1).tolist() == [0, 0, 0]
    assert average_linkage(similarity.copy(), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(seed):
    gradients, truth = planted(seed)
    labelled = cluster_tasks(rows(300), store_of(gradients), num_clusters=6)
    assert labelled.column_names == ["text", "task"]
    assert labelled["text"][:] == rows(300)["text"][:]
    assert adjusted_rand(labelled["task"][:], truth) >= 0.9
    assert labelled["task"][0] == "cluster 1"


def test_rows_beyond_the_largest_number_join_the_nearest_cluster():
    gradients, truth = planted(3, noise=0.6)
    options = {"num_clusters": 6, "max_linked": 120}
    some, again = (
        cluster_tasks(rows(300), store_of(gradients), **options)["task"][:] for _ in range(2)
    )
    assert some == again
    assert adjusted_rand(some, truth) >= 0.9


def test_rows_without_a_gradient_join_the_largest_cluster(caplog):
    gradients, _ = planted(1, num_clusters=3)
    gradients[[5, 70]] = 0
    labels = cluster_gradients(gradients, 3)
    largest = np.argmax(np.bincount(labels))
    assert labels[5] == labels[70] == largest
    assert "2 of 300 rows have a gradient of 0" in caplog.text
    assert cluster_gradients(np.zeros((4, 2)), 2).tolist() == [0, 0, 0, 0]


def string_task(kind, count):
    """Strings of digits, or of one of two alphabets, to copy or to spell backward."""
    rng = random.Random(kind)
    alphabet = {"digits": "0123456789", "first": "abcd", "last": "efgh"}[kind]
    words = ["".join(rng.choice(alphabet) for _ in range(6)) for _ in range(count)]
    return Dataset.from_list(
        [{"prompt": f"{w}=", "completion": w if kind == "digits" else w[::-1]} for w in words]
    )


def test_tasks_of_a_model_are_found(tmp_path):
    kinds = ["digits", "first", "last"]
    mixed = [row for kind in kinds for row in tiny.tokenize(string_task(kind, 20))]
    order = np.random.default_rng(0).permutation(len(mixed))
    dataset = Dataset.from_list([mixed[i] for i in order])
    store = capture_gradients(
        tiny.llama(hidden_size=32, intermediate_size=48),
        {"all": list(dataset)},
        mixed[:2],
        tiny.collate,
        directory=tmp_path,
        projection_dim=512,
        scalars=("loss",),
        progress=False,
    )
    labelled = cluster_tasks(dataset, store, num_clusters=3)
    assert adjusted_rand(labelled["task"][:], order // 20) >= 0.9


def test_the_store_of_a_run_serves(tmp_path):
    """Examples of all tasks, numbered as the rows of the training set."""
    callback = tiny.callback(examples_per_task=None, after="observe", estimator=GaussNewton())
    trainer = tiny.plain_trainer(tmp_path, callback, max_steps=5)
    trainer.train()
    dataset = trainer.train_dataset
    labelled = cluster_tasks(
        dataset, callback.report.gradients(), num_clusters=3, task_column="cluster"
    )
    assert labelled.column_names == [*dataset.column_names, "cluster"]
    assert set(labelled["cluster"][:]) == {"cluster 1", "cluster 2", "cluster 3"}
    split = cluster_tasks(dataset, callback.report.gradients(), num_clusters=2, within="task")
    for before, after in zip(dataset["task"][:], split["task"][:], strict=True):
        assert after in (f"{before} cluster 1", f"{before} cluster 2")
    assert len(set(split["task"][:])) == 8


def test_each_value_is_clustered_for_itself():
    gradients, _ = planted(0, count=60)
    kind = ["x" if i % 3 else "y" for i in range(60)]
    dataset = rows(60).add_column("kind", kind).cast_column("kind", ClassLabel(names=["x", "y"]))
    labelled = cluster_tasks(dataset, store_of(gradients), num_clusters=4, within="kind")
    own = [i for i in range(60) if kind[i] == "x"]
    expected = cluster_gradients(gradients[own], 4)
    assert [labelled["task"][i] for i in own] == [f"x cluster {c + 1}" for c in expected]
    assert {name.split()[0] for name in labelled["task"][:]} == {"x", "y"}


def test_labels_of_ones_own():
    labels = np.array([2, 0, 2])
    assert cluster_tasks(rows(3), labels)["task"][:] == ["cluster 2", "cluster 0", "cluster 2"]
    named = cluster_tasks(rows(3), ["a", "b", "a"], task_column="skill")
    assert named["skill"][:] == ["a", "b", "a"]
    split = cluster_tasks(named, [1, 1, 2], task_column="skill", within="skill")
    assert split["skill"][:] == ["a cluster 1", "b cluster 1", "a cluster 2"]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([0, 1], {}, "has 2 labels, but dataset has 4 rows"),
        ([0, 1, None, 2], {}, "label of row 2 must be a string or an integer, got None"),
        ([0, 1, 0.5, 2], {}, "label of row 2 must be a string or an integer, got 0.5"),
        ([0, 1, 0, 1], {"num_clusters": 2}, "num_clusters=2 is for a store of gradients"),
        ([0, 1, 0, 1], {"task_column": "text"}, r"already has a column 'text'.*within='text'"),
        ([0, 1, 0, 1], {"within": "x"}, r"within='x' is no column of dataset.*\['text'\]"),
        (store_of(np.eye(4)), {}, "num_clusters must be at least 1, got None"),
        (store_of(np.eye(4)), {"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        (store_of(np.eye(4)), {"num_clusters": 3, "max_linked": 2}, "max_linked must be at least"),
        (
            store_of(np.eye(2), ids=[0, 3], sizes=[4]),
            {"num_clusters": 2},
            "2 of 4 rows have no gradient in the store, the first is row 1.*examples_per_task=None",
        ),
        (
            store_of(np.eye(4), sizes=[9]),
            {"num_clusters": 2},
            "a training set of 9 rows, but dataset has 4",
        ),
        (
            store_of(np.eye(4), ids=[0, 1, 0, 1], task_ids=[0, 0, 1, 1], sizes=[2, 2]),
            {"num_clusters": 2},
            "not rows of one dataset",
        ),
    ],
)
def test_what_does_not_fit_is_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_tasks(rows(4), given, **options)
