import json

import numpy as np
import pytest
from safetensors.numpy import save

from hf_auxselect import GradientStore, StoreError
from hf_auxselect.store import INDEX_NAME, ShardSpec, StoreWriter, write_atomically

SHARDS = [
    ShardSpec(task="a", is_target=False, example_ids=(0, 2)),
    ShardSpec(task="a", is_target=False, example_ids=(5,)),
    ShardSpec(task="b", is_target=False, example_ids=(1, 3, 4)),
    ShardSpec(task="a", is_target=True, example_ids=(0, 1)),  # a target may share a task's name
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


@pytest.fixture
def directory(tmp_path):
    writer = open_writer(tmp_path)
    for shard in writer.pending:
        writer.write(shard, arrays(shard))
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


def test_a_new_task_leaves_the_others_as_they_are(directory):
    new = ShardSpec(task="c", is_target=False, example_ids=(7,))
    tasks = [*TASKS, {"name": "c", "target": False, "num_rows": 1}]
    writer = open_writer(directory, shards=[*SHARDS, new], tasks=tasks)
    assert writer.pending == [new]


def test_a_damaged_shard_is_captured_again(directory):
    entry = json.loads((directory / INDEX_NAME).read_text())["shards"][1]
    (directory / entry["file"]).write_bytes(b"garbage")
    assert open_writer(directory).pending == [SHARDS[1]]


class TestDamage:
    def shard(self, directory):
        return directory / json.loads((directory / INDEX_NAME).read_text())["shards"][1]["file"]

    def edit_index(self, directory, **changes):
        index = json.loads((directory / INDEX_NAME).read_text())
        (directory / INDEX_NAME).write_text(json.dumps(index | changes))

    def test_no_store(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
            GradientStore.load(tmp_path)

    def test_one_bit_of_a_shard(self, directory):
        path = self.shard(directory)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            GradientStore.load(directory)

    def test_a_missing_shard(self, directory):
        path = self.shard(directory)
        path.unlink()
        with pytest.raises(StoreError, match=f"{path.name}: cannot be read"):
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
        import hashlib

        content = save({"losses": np.zeros(1, np.float32)})
        index = json.loads((directory / INDEX_NAME).read_text())
        entry = index["shards"][0]
        (directory / entry["file"]).write_bytes(content)
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        (directory / INDEX_NAME).write_text(json.dumps(index))
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
