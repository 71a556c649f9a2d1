"""Clusters of examples as tasks: linkage against SciPy, planted clusters, and what is refused."""

import json
import random
import shutil

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from hf_auxselect import (
    FixedSelection,
    GaussNewton,
    GradientStore,
    capture_gradients,
    cluster_tasks,
    concatenate_tasks,
)
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
        (store_of(np.eye(4)), {}, "num_clusters must be an int of at least 1, got None"),
        (
            store_of(np.eye(4)),
            {"num_clusters": 0},
            "num_clusters must be an int of at least 1, got 0",
        ),
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


def mixed_strings(num_each=12):
    """Rows of three kinds of strings, mixed and without a task column; and each row's kind."""
    parts = [row for kind in ("digits", "first", "last") for row in string_task(kind, num_each)]
    order = np.random.default_rng(1).permutation(len(parts))
    return tiny.tokenize(Dataset.from_list([parts[i] for i in order])), order // num_each


def of_clusters(directory, cb, resume=None, **options):
    """A run over mixed strings, and the rows that its training steps read."""
    dataset, _ = mixed_strings()
    number = {tuple(row["input_ids"]): i for i, row in enumerate(dataset)}
    read = []

    def look(module, args, kwargs):
        if module.training:
            for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
                read.append(number[tuple(ids[mask == 1].tolist())])

    torch.manual_seed(3)
    trainer = tiny.plain_trainer(
        directory,
        cb,
        model=tiny.llama(hidden_size=32, intermediate_size=48),
        train_dataset=dataset,
        **{
            "eval_dataset": tiny.tokenize(string_task("digits", 20).select(range(12, 20))),
            "max_steps": 8,
            "learning_rate": 1e-3,
        }
        | options,
    )
    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, read


def clustering(**options):
    return tiny.callback(
        **{"clusters": 3, "warmup": 1, "projection_dim": 512, "estimator": GaussNewton()} | options
    )


class TestClustersOfARun:
    def test_planted_clusters_are_the_tasks(self, tmp_path):
        cb = clustering(after="observe")
        of_clusters(tmp_path, cb)
        _, truth = mixed_strings()
        assert set(cb.report.weights) == {"cluster 1", "cluster 2", "cluster 3"}
        written = json.loads((tmp_path / "_task_selection/clusters.json").read_text())
        assert adjusted_rand(written["cluster_of_row"], truth) >= 0.9
        store = cb.report.gradients()
        assert store.task_names == ["cluster 1", "cluster 2", "cluster 3"]
        for k in range(3):
            ids = store.example_ids[store.task_ids == k]
            assert {written["cluster_of_row"][i] for i in ids} == {k + 1}

    @pytest.mark.parametrize("estimate", [True, False])
    def test_the_rest_of_the_run_reads_the_chosen_clusters(self, estimate, tmp_path):
        selector = FixedSelection({"cluster 1": 1, "cluster 3": 3}, estimate=estimate)
        cb = clustering(selector=selector, warmup=4)
        _, read = of_clusters(tmp_path, cb)
        written = json.loads((tmp_path / "_task_selection/clusters.json").read_text())
        of_row = np.array(written["cluster_of_row"])
        assert len(read) == 8 * 4
        assert np.bincount(of_row[read[16:]], minlength=4).tolist() == [0, 4, 0, 12]
        assert cb.report.run["rows_per_task"] == {
            f"cluster {k}": int((of_row == k).sum()) for k in (1, 2, 3)
        }

    @pytest.mark.slow
    def test_they_have_groups_and_run_a_race(self, tmp_path):
        sets = {
            "target": tiny.tokenize(string_task("digits", 20).select(range(12, 20))),
            "other": tiny.tokenize(string_task("digits", 20).select(range(4))),
        }
        cb = clustering(target="target", groups=["other"], confirm=2, warmup=4)
        trainer, _ = of_clusters(tmp_path, cb, eval_dataset=sets)
        report, race = cb.report, cb.report.confirmation
        assert {name for one in race.finalists for name in one.weights} == set(report.weights)
        assert all(row.group_losses is not None for row in report.rows)
        assert trainer.evaluate()["eval_target_loss"] == race.measured(race.winner)

    @pytest.mark.slow
    def test_a_resumed_run_is_bitwise_the_same(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 1}
        whole, _ = of_clusters(tmp_path / "whole", clustering(warmup=3), **options)
        decision = json.loads((tmp_path / "whole/_task_selection/selection.json").read_text())
        for step in (2, 3, 5):
            copy = tmp_path / f"resumed{step}"
            shutil.copytree(tmp_path / "whole", copy)
            for later in range(step + 1, 9):
                shutil.rmtree(copy / f"checkpoint-{later}")
            if step == 5:  # the checkpoint's own copy is enough
                shutil.rmtree(copy / "_task_selection")
            cb = clustering(warmup=3)
            resumed, _ = of_clusters(copy, cb, resume=True, **options)
            assert tiny.same(tiny.weights(whole), tiny.weights(resumed)), f"from step {step}"
            assert cb.report.selected == decision["selected"]

    @pytest.mark.slow
    def test_what_a_resumed_run_refuses(self, tmp_path):
        of_clusters(tmp_path, clustering(), save_strategy="steps", save_steps=4)
        checkpoint = tmp_path / "checkpoint-4"
        with pytest.raises(ValueError, match=r"cannot resume.*clusters \(3 before, 2 now\)"):
            of_clusters(tmp_path, clustering(clusters=2), resume=str(checkpoint))
        path = checkpoint / "task_selection_clusters.json"
        kept = json.loads(path.read_text())["cluster_of_row"]
        for changed, message in [
            (kept[1:], "holds 35 rows, but the training set has 36"),
            ([2, *kept[1:]], "numbered by first appearance"),
            (["x"], "damaged"),
        ]:
            path.write_text(json.dumps({"cluster_of_row": changed}))
            with pytest.raises(ValueError, match=f"task_selection_clusters.json: .*{message}"):
                of_clusters(tmp_path, clustering(), resume=str(checkpoint))

    def test_the_preview_knows_the_second_pass(self, tmp_path):
        dataset, _ = mixed_strings()
        cb = clustering(estimator=None, examples_per_task=8)
        trainer = tiny.plain_trainer(tmp_path, cb, train_dataset=dataset)
        preview = cb.preview(trainer)
        assert preview.num_examples == (3 * 8 + 8) + (36 + 8)
        assert preview.seconds > 0 and preview.memory_mib > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"clusters": 1}, "clusters must be a number of clusters, 2 or more, or None; got 1"),
            ({"clusters": True}, "clusters must be a number of clusters"),
            ({"keep": ["a"]}, r"keep=\['a'\] names tasks, but with clusters=3"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            clustering(**options)

    def test_packed_documents_are_refused(self, tmp_path):
        dataset = concatenate_tasks({"a": tiny.sums(12, 1), "b": tiny.sums(12, 2, letters=True)})
        trainer = tiny.sft_trainer(
            tmp_path, clustering(), train_dataset=dataset, packing=True, max_length=24
        )
        with pytest.raises(
            ValueError, match=r"clusters=3 splits .* by rows.*packed.*cluster_tasks"
        ):
            trainer.train()

    def test_what_cannot_work_is_refused_before_the_first_step(self, tmp_path):
        with pytest.raises(ValueError, match="clusters=37, but train_dataset has only 36 rows"):
            of_clusters(tmp_path, clustering(clusters=37))
        with pytest.raises(ValueError, match="names the unknown task 'digits'"):
            of_clusters(tmp_path, clustering(selector=FixedSelection(["digits"])))
