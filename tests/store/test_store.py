import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from reference import random_store
from safetensors.numpy import load_file, save

from hf_auxselect import GradientStore, LinearizedTraining, StoreError, capture_gradients
from hf_auxselect.files import write_atomically
from hf_auxselect.store.format import INDEX_NAME, task_entry
from hf_auxselect.store.writer import ShardSpec, StoreWriter

SHARDS = [
    ShardSpec(task="a", example_ids=(0, 2)),
    ShardSpec(task="a", example_ids=(5,)),
    ShardSpec(task="b", example_ids=(1, 3, 4)),
    ShardSpec(task="a", role="target", example_ids=(0, 1)),  # a target may share a task's name
]
TASKS = [
    {"name": "a", "target": False, "num_rows": 30},
    {"name": "b", "target": False, "num_rows": 3},
    {"name": "a", "target": True, "num_rows": 2},
]


def open_writer(directory, **options):
    return StoreWriter(
        directory,
        **{"scalars": ["margin"], "tasks": TASKS, "shards": SHARDS, "metadata": {"seed": 1}}
        | options,
    )


def arrays(shard):
    ids = np.array(shard.example_ids, np.int64)
    return {
        "example_ids": ids,
        "losses": (ids + 0.5).astype(np.float32),
        "num_label_tokens": ids + 1,
        "example_weights": (ids + 1).astype(np.float64),
        "outputs.margin": -ids.astype(np.float32),
        "gradients.margin": np.stack([ids, 10 * ids], 1).astype(np.float32),
    }


def complete(directory, **options):
    """Write all that is pending, and tell what it was."""
    writer = open_writer(directory, **options)
    pending = writer.pending
    for shard in pending:
        writer.write(shard, arrays(shard))
    return pending


def index_of(directory):
    return json.loads((directory / INDEX_NAME).read_text())


def files_of(directory):
    """What the files are, by the first part of their names."""
    return sorted(path.name.split(".")[0] or path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path):
    complete(tmp_path)
    return tmp_path


def test_what_is_written_is_read(directory):
    store = GradientStore.load(directory)
    assert store.task_names == ["a", "b"]
    assert store.task_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.example_ids.tolist() == [0, 2, 5, 1, 3, 4]
    assert store.task_sizes.tolist() == [30, 3]
    assert store.gradients[2].tolist() == [5, 50]
    assert store.outputs.tolist() == [0, -2, -5, -1, -3, -4]
    assert store.scalars == ("margin",)
    assert store.metadata == {"seed": 1}
    assert store.target.task_names == ["a"]
    assert store.target.losses.tolist() == [0.5, 1.5]
    assert {store.gradients.dtype, store.losses.dtype, store.outputs.dtype} == {np.dtype("float32")}
    assert {store.task_ids.dtype, store.example_ids.dtype} == {np.dtype("int64")}


def test_task_losses_are_means_over_label_tokens(directory):
    store = GradientStore.load(directory)
    expected = (0.5 * 1 + 2.5 * 3 + 5.5 * 6) / 10
    assert store.task_losses[0] == pytest.approx(expected)
    assert store.example_weights[:3].tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_a_store_is_read_only(directory):
    store = GradientStore.load(directory)
    with pytest.raises(ValueError, match="read-only"):
        store.gradients[0, 0] = 1


def test_an_unknown_scalar_is_named_with_those_there_are(directory):
    with pytest.raises(KeyError, match=r"'loss' was not captured.*\['margin'\]"):
        GradientStore.load(directory).scalar("loss")


def test_an_interrupted_store_says_so_and_goes_on_where_it_stopped(tmp_path):
    writer = open_writer(tmp_path)
    for shard in writer.pending[:2]:
        writer.write(shard, arrays(shard))
    with pytest.raises(StoreError, match="interrupted"):
        GradientStore.load(tmp_path)
    again = open_writer(tmp_path)
    assert again.pending == SHARDS[2:]
    for shard in again.pending:
        again.write(shard, arrays(shard))
    assert len(GradientStore.load(tmp_path)) == 6


def test_shards_of_another_capture_are_not_mixed_in(directory):
    assert open_writer(directory, metadata={"seed": 2}).pending == SHARDS
    assert not list(directory.glob("*.safetensors"))


class TestMergedFiles:
    def test_there_is_one_for_the_tasks_and_one_for_the_target(self, directory):
        assert files_of(directory) == ["index", "target", "tasks"]
        (tasks,) = directory.glob("tasks.*")
        store, read = GradientStore.load(directory), load_file(tasks)
        assert np.array_equal(read["gradients.margin"], store.gradients)
        assert np.array_equal(read["example_ids"], store.example_ids)

    def test_gradients_are_mapped_not_read(self, directory):
        store = GradientStore.load(directory)
        for part in (store, store.target):
            base = part.gradients
            assert type(base) is np.ndarray
            while base is not None and not isinstance(base, np.memmap):
                base = base.base
            assert base.mode == "r"
            assert part.gradients.flags.c_contiguous
            assert part.gradients.flags.aligned

    def test_a_loaded_store_outlives_another_capture_in_its_directory(self, directory):
        store = GradientStore.load(directory)
        before = store.gradients.copy()
        complete(directory, metadata={"seed": 2}, shards=SHARDS[1:])
        assert np.array_equal(store.gradients, before)

    def test_a_new_task_leaves_the_others_as_they_are(self, directory):
        old = GradientStore.load(directory)
        new = ShardSpec(task="c", example_ids=(7,))
        tasks = [*TASKS[:2], {"name": "c", "target": False, "num_rows": 1}, TASKS[2]]
        shards = [*SHARDS[:3], new, SHARDS[3]]
        assert complete(directory, shards=shards, tasks=tasks) == [new]
        store = GradientStore.load(directory)
        assert store.task_names == ["a", "b", "c"]
        assert np.array_equal(store.gradients[:-1], old.gradients)
        assert store.gradients[-1].tolist() == [7, 70]
        assert np.array_equal(store.target.gradients, old.target.gradients)
        assert files_of(directory) == ["index", "target", "tasks"]

    def test_a_task_that_goes_leaves_the_others_as_they_are(self, directory):
        assert complete(directory, shards=SHARDS[2:], tasks=TASKS[1:]) == []
        store = GradientStore.load(directory)
        assert store.task_names == ["b"]
        assert store.example_ids.tolist() == [1, 3, 4]
        assert store.target.example_ids.tolist() == [0, 1]
        assert files_of(directory) == ["index", "target", "tasks"]

    def test_another_order_of_tasks_captures_nothing(self, directory):
        shards = [SHARDS[2], *SHARDS[:2], SHARDS[3]]
        assert complete(directory, shards=shards, tasks=[TASKS[1], TASKS[0], TASKS[2]]) == []
        store = GradientStore.load(directory)
        assert store.task_names == ["b", "a"]
        assert store.example_ids.tolist() == [1, 3, 4, 0, 2, 5]
        assert store.task_ids.tolist() == [0, 0, 0, 1, 1, 1]

    def test_an_unchanged_store_is_not_written_again(self, directory):
        before = {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}
        assert complete(directory) == []
        after = {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}
        assert before == after

    def test_a_damaged_shard_is_captured_again(self, directory):
        entry = index_of(directory)["shards"][1]
        damage(directory, entry)
        assert complete(directory) == [SHARDS[1]]
        assert GradientStore.load(directory).gradients[2].tolist() == [5, 50]


GROUP_SHARDS = [
    ShardSpec(task="a", role="group", example_ids=(0, 1)),
    ShardSpec(task="x/y", role="group", example_ids=(2, 4)),
    ShardSpec(task="x/y", role="group", example_ids=(7,)),
]
WITH_GROUPS = {
    "tasks": [*TASKS, *(task_entry(name, "group", 9) for name in ("a", "x/y"))],
    "shards": [*SHARDS, *GROUP_SHARDS],
}


class TestGroups:
    @pytest.fixture
    def with_groups(self, tmp_path):
        complete(tmp_path, **WITH_GROUPS)
        return tmp_path

    def test_they_are_read_as_they_were_written(self, with_groups):
        store = GradientStore.load(with_groups)
        assert list(store.groups) == ["a", "x/y"]
        group = store.groups["x/y"]
        assert group.task_names == ["x/y"]
        assert group.example_ids.tolist() == [2, 4, 7]
        assert group.gradients[:, 1].tolist() == [20, 40, 70]
        assert group.task_sizes.tolist() == [9]
        assert (len(store), store.target.example_ids.tolist()) == (6, [0, 1])
        assert group.groups == {}
        assert files_of(with_groups) == ["group", "group", "index", "target", "tasks"]

    def test_they_are_added_to_a_store_without(self, directory):
        assert index_of(directory)["format_version"] == 2  # which earlier releases read
        assert complete(directory, **WITH_GROUPS) == GROUP_SHARDS
        assert index_of(directory)["format_version"] == 3
        assert list(GradientStore.load(directory).groups) == ["a", "x/y"]

    def test_they_are_left_out_again(self, with_groups):
        assert complete(with_groups) == []
        assert GradientStore.load(with_groups).groups == {}
        assert files_of(with_groups) == ["index", "target", "tasks"]

    def test_an_interrupted_pass_goes_on_within_them(self, tmp_path):
        writer = open_writer(tmp_path, **WITH_GROUPS)
        for shard in writer.pending[:5]:
            writer.write(shard, arrays(shard))
        assert complete(tmp_path, **WITH_GROUPS) == GROUP_SHARDS[1:]
        assert len(GradientStore.load(tmp_path).groups["x/y"]) == 3

    def test_damage_is_named(self, with_groups):
        damage(with_groups, index_of(with_groups)["shards"][-1])
        with pytest.raises(StoreError, match="rows 2 to 2, of group 'x/y'"):
            GradientStore.load(with_groups)


class Killed(BaseException):
    pass


class Killer:
    """Ends the process, as far as files can tell, when it next changes a file for the n-th time."""

    def __init__(self, monkeypatch, after):
        self.left = after
        for owner, name in [(os, "replace"), (os, "fsync"), (Path, "unlink")]:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function):
        def call(*args, **kwargs):
            if self.left <= 0:  # nothing is tidied up after a kill
                raise Killed
            self.left -= 1
            return function(*args, **kwargs)

        return call


def kills(tmp_path, monkeypatch, prepare, act):
    """Prepare a directory, and act on it until a kill, at each change of a file; yields it."""
    for after in range(100):
        directory = tmp_path / str(after)
        prepare(directory)
        with monkeypatch.context() as patch:
            Killer(patch, after)
            try:
                act(directory)
            except Killed:
                killed = True
            else:
                killed = False
        if not killed:
            assert after > 8
            return
        for file in directory.glob("*.safetensors"):
            load_file(file)  # whole
        yield directory


VECTORS = {"momentum": np.array([1, 2], np.float32)}


class TestKills:
    def test_while_the_last_shard_is_written_and_merged(self, tmp_path, monkeypatch):
        def prepare(directory):
            writer = open_writer(directory, vectors=VECTORS)
            for shard in SHARDS[:-1]:
                writer.write(shard, arrays(shard))

        def act(directory):
            writer = open_writer(directory, vectors=VECTORS)
            writer.write(SHARDS[-1], arrays(SHARDS[-1]))

        complete(tmp_path / "whole", vectors=VECTORS)
        whole = GradientStore.load(tmp_path / "whole")
        captured_again = []
        for directory in kills(tmp_path, monkeypatch, prepare, act):
            self.check(directory, [whole], may_be_incomplete=True)
            captured_again.append(complete(directory, vectors=VECTORS))
            self.check(directory, [whole])
            assert files_of(directory) == ["index", "target", "tasks", "vectors"]
        assert captured_again.count([SHARDS[-1]]) + captured_again.count([]) == len(captured_again)
        # Once it is listed, nothing is captured again, however far the merge has come.
        listed = captured_again.index([])
        assert captured_again[listed:] == [[]] * (len(captured_again) - listed)
        assert len(captured_again) - listed > 8

    def test_while_a_task_is_removed(self, tmp_path, monkeypatch):
        fewer = {"shards": SHARDS[2:], "tasks": TASKS[1:], "vectors": VECTORS}
        complete(tmp_path / "before", vectors=VECTORS)
        complete(tmp_path / "after", **fewer)
        stores = [GradientStore.load(tmp_path / name) for name in ("before", "after")]
        for directory in kills(
            tmp_path,
            monkeypatch,
            prepare=lambda directory: complete(directory, vectors=VECTORS),
            act=lambda directory: complete(directory, **fewer),
        ):
            self.check(directory, stores)
            assert complete(directory, **fewer) == []
            self.check(directory, stores[1:])
            assert files_of(directory) == ["index", "target", "tasks", "vectors"]

    def test_while_a_damaged_shard_is_put_in_its_place(self, tmp_path, monkeypatch):
        complete(tmp_path / "whole")
        whole = GradientStore.load(tmp_path / "whole")

        def prepare(directory):
            complete(directory)
            damage(directory, index_of(directory)["shards"][1])
            open_writer(directory)

        for directory in kills(tmp_path, monkeypatch, prepare, complete):
            self.check(directory, [whole], may_be_incomplete=True)
            assert complete(directory) in ([SHARDS[1]], [])
            self.check(directory, [whole])

    def check(self, directory, stores, *, may_be_incomplete=False):
        """The directory holds one of these stores, whole."""
        try:
            found = GradientStore.load(directory)
        except StoreError as error:
            assert may_be_incomplete
            assert "interrupted" in str(error)
            return
        assert any(
            found.task_names == store.task_names
            and np.array_equal(found.gradients, store.gradients)
            and np.array_equal(found.target.gradients, store.target.gradients)
            and found.vectors.keys() == store.vectors.keys()
            for store in stores
        )


class TestAddingATask:
    """With the real pass: how many examples the model sees."""

    @pytest.fixture
    def capture(self, tmp_path):
        tasks = {
            name: list(tiny.tokenize(tiny.sums(num_rows, num_rows)))
            for name, num_rows in {"x": 70, "y": 40, "z": 5}.items()
        }
        target = list(tiny.tokenize(tiny.sums(6, 4)))
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), tiny.lora())

        def run(names, directory="store"):
            seen = []

            def collate(rows):
                seen.extend(rows)
                return tiny.collate(rows)

            store = capture_gradients(
                model,
                {name: tasks[name] for name in names},
                target,
                collate,
                directory=tmp_path / directory,
                projection_dim=16,
                progress=False,
            )
            return store, len(seen)

        return run

    def test_only_the_new_task_is_captured(self, capture):
        _, all_of_two = capture("xy")
        _, only_check = capture("xy")
        assert all_of_two - only_check == 70 + 40 + 6
        added, seen = capture("xyz")
        assert seen - only_check == 5
        fresh, _ = capture("xyz", "fresh")
        assert np.array_equal(added.gradients, fresh.gradients)
        assert np.array_equal(added.target.gradients, fresh.target.gradients)
        removed, seen = capture("xz")
        assert seen == only_check
        assert np.array_equal(removed.gradients, fresh.gradients[fresh.task_ids != 1])


def test_estimates_do_not_depend_on_how_many_rows_are_read_at_once(monkeypatch):
    store = random_store(3, counts=(30, 50, 1), num_target=17, dim=12)
    store.task_sizes = np.array([90, 60, 7])  # not all rows were captured
    subsets = np.random.default_rng(0).random((10, 3)) < 0.5
    whole = LinearizedTraining(rank=5).fit(store)
    monkeypatch.setattr("hf_auxselect.estimators.captured_gradients._NUMBERS_AT_ONCE", 50)
    chunked = LinearizedTraining(rank=5).fit(store)
    for name in ("loss", "low", "high"):
        expected = getattr(whole.estimate(subsets), name)
        assert getattr(chunked.estimate(subsets), name) == pytest.approx(expected, rel=1e-9)
    assert chunked.diagnostics() == pytest.approx(whole.diagnostics(), rel=1e-9)


def damage(directory, entry):
    """Change one bit of the last gradient of a shard."""
    path = directory / entry["file"]
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = len(content) - max(array["data_offsets"][1] for array in header.values())
    gradients = header["gradients.margin"]
    row_bytes = 4 * gradients["shape"][1]
    end = (entry["first_row"] + entry["num_examples"]) * row_bytes
    content[start + gradients["data_offsets"][0] + end - 1] ^= 1
    path.write_bytes(content)


class TestDamage:
    def edit_index(self, directory, **changes):
        (directory / INDEX_NAME).write_text(json.dumps(index_of(directory) | changes))

    def test_no_store(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
            GradientStore.load(tmp_path)

    @pytest.mark.parametrize(
        ("shard", "where"),
        [
            (1, "rows 2 to 2, of task 'a'"),
            (2, "rows 3 to 5, of task 'b'"),
            (3, "rows 0 to 1, of target 'a'"),
        ],
    )
    def test_one_bit_of_a_merged_file(self, directory, shard, where):
        entry = index_of(directory)["shards"][shard]
        damage(directory, entry)
        with pytest.raises(StoreError, match=rf"{entry['file']}: damaged \(.*{where}, differs"):
            GradientStore.load(directory)

    def test_every_byte_counts(self, directory):
        (path,) = directory.glob("tasks.*")
        content = path.read_bytes()
        for position in range(len(content)):
            path.write_bytes(
                content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
            )
            with pytest.raises(StoreError, match=path.name):
                GradientStore.load(directory)

    @pytest.mark.parametrize("size", [0, 7, 100, -1])
    def test_a_truncated_merged_file(self, directory, size):
        (path,) = directory.glob("tasks.*")
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            GradientStore.load(directory)
        assert complete(directory) == SHARDS[:3]

    def test_a_missing_merged_file(self, directory):
        (path,) = directory.glob("target.*")
        path.unlink()
        with pytest.raises(StoreError, match=f"{path.name}: cannot be read"):
            GradientStore.load(directory)

    def test_damaged_vectors(self, tmp_path):
        complete(tmp_path, vectors=VECTORS)
        (path,) = tmp_path.glob("vectors.*")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            GradientStore.load(tmp_path)
        assert complete(tmp_path, vectors=VECTORS) == []
        assert GradientStore.load(tmp_path).vectors["momentum"].tolist() == [1, 2]

    def test_shards_that_do_not_follow_each_other(self, directory):
        shards = index_of(directory)["shards"]
        self.edit_index(directory, shards=[shards[1], shards[0], *shards[2:]])
        with pytest.raises(StoreError, match=r"index\.json: damaged \(not all shards"):
            GradientStore.load(directory)

    def test_a_shard_of_an_unknown_task(self, directory):
        self.edit_index(directory, tasks=TASKS[1:])
        with pytest.raises(StoreError, match=r"index\.json: a shard of task 'a'"):
            GradientStore.load(directory)

    def test_a_truncated_index(self, directory):
        path = directory / INDEX_NAME
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(StoreError, match=r"index\.json: damaged"):
            GradientStore.load(directory)

    def test_a_foreign_format(self, directory):
        self.edit_index(directory, format="something else")
        with pytest.raises(StoreError, match="not the index of a gradient store"):
            GradientStore.load(directory)

    def test_another_version(self, directory):
        self.edit_index(directory, format_version=99)
        with pytest.raises(StoreError, match="format version 99"):
            GradientStore.load(directory)

    def test_a_path_out_of_the_directory(self, directory):
        index = json.loads((directory / INDEX_NAME).read_text())
        index["shards"][0]["file"] = "../evil.safetensors"
        (directory / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(StoreError, match="leaves the directory"):
            GradientStore.load(directory)

    def test_other_arrays_than_expected(self, directory):
        (path,) = directory.glob("tasks.*")
        path.write_bytes(save({"losses": np.zeros(6, np.float32)}))
        with pytest.raises(StoreError, match=r"holds \['losses'\], expected"):
            GradientStore.load(directory)


class TestWriteAtomically:
    def test_a_failed_write_leaves_the_old_file_and_no_rest(self, tmp_path, monkeypatch):
        path = tmp_path / "file.json"
        write_atomically(path, "old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["file.json"]

    def test_pieces_are_written_one_after_another(self, tmp_path):
        write_atomically(tmp_path / "file", iter([b"one", np.ones((1, 2), np.uint8).data]))
        assert (tmp_path / "file").read_bytes() == b"one\1\1"


def test_a_task_without_label_tokens_is_refused():
    with pytest.raises(ValueError, match="task 'b' has no label tokens"):
        GradientStore(
            task_names=["a", "b"],
            task_ids=np.array([0, 1]),
            example_ids=np.array([0, 0]),
            losses=np.zeros(2),
            num_label_tokens=np.array([1, 0]),
            scalars={"margin": (np.zeros(2), np.zeros((2, 2)))},
        )
