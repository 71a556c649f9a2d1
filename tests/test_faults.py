"""Full disks, damaged files, clocks and numbers that are none: nothing is lost, nothing silent."""

import errno
import json
import logging
import os
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import callback, trained

from hf_auxselect import NonFiniteError
from hf_auxselect.store.writer import StoreWriter

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The adapter of a run to which nothing happened."""
    directory = tmp_path_factory.mktemp("whole")
    return tiny.weights(trained(tiny.sft_trainer, directory, callback(), **OPTIONS))


def resumed(directory, cb=None):
    trainer = trained(tiny.sft_trainer, directory, cb or callback(), True, **OPTIONS)
    return tiny.weights(trainer)


@pytest.fixture
def written(monkeypatch):
    """The shards that are captured, by task."""
    shards = []
    original = StoreWriter.write

    def write(self, shard, arrays):
        original(self, shard, arrays)
        shards.append("the target" if shard.role == "target" else shard.task)

    monkeypatch.setattr(StoreWriter, "write", write)
    return shards


def broken_off(directory, monkeypatch, num_syncs):
    """A run whose disk is full after some files of the selection have been written."""
    synced = []
    original = os.fsync

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) > num_syncs:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            trained(tiny.sft_trainer, directory, callback(), **OPTIONS)
    assert not list(directory.rglob("*.tmp"))


class TestAFullDisk:
    @pytest.mark.parametrize("num_syncs", [4, 7, 14, 16])
    def test_what_was_written_is_kept(self, num_syncs, run_dir, monkeypatch, whole, written):
        broken_off(run_dir, monkeypatch, num_syncs)
        before = len(written)
        assert tiny.same(resumed(run_dir), whole)
        # None is captured twice; a fifth may be on disk when the merge after it fails.
        assert len(set(written)) == len(written) >= 4
        assert before == {4: 0, 7: 2, 14: 4, 16: 5}[num_syncs]

    def test_before_the_first_step(self, run_dir, monkeypatch):
        with monkeypatch.context() as patch:

            def fsync(descriptor):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, "fsync", fsync)
            with pytest.raises(OSError, match=r"output_dir: cannot write to.*No space left"):
                trained(tiny.sft_trainer, run_dir, callback(), **OPTIONS)


class TestDamage:
    @pytest.fixture
    def interrupted(self, run_dir, monkeypatch):
        """In the middle of the pass."""
        broken_off(run_dir, monkeypatch, 7)
        return run_dir / "_task_selection"

    def test_of_a_shard(self, interrupted, whole, written):
        index = json.loads((interrupted / "gradients/index.json").read_text())
        path = interrupted / "gradients" / index["shards"][0]["file"]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert tiny.same(resumed(interrupted.parent), whole)
        assert index["shards"][0]["task"] in written  # and only that one again
        assert len(written) == 5 - len(index["shards"]) + 1

    @pytest.mark.parametrize("content", ["{", '{"format_version": 99}', ""])
    def test_of_the_index(self, content, interrupted, whole, written, caplog):
        (interrupted / "gradients/index.json").write_text(content)
        with caplog.at_level(logging.WARNING):
            assert tiny.same(resumed(interrupted.parent), whole)
        assert "index.json: damaged" in caplog.text
        assert len(written) == 5

    def test_of_a_store_of_another_version(self, interrupted, whole, caplog):
        path = interrupted / "gradients/index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
        with caplog.at_level(logging.WARNING):
            assert tiny.same(resumed(interrupted.parent), whole)
        assert "format version 99" in caplog.text

    @pytest.mark.parametrize("name", ["plan.json", "selection.json", "report/report.json"])
    def test_of_what_a_resumed_run_believes(self, name, run_dir):
        trained(tiny.sft_trainer, run_dir, callback(), **OPTIONS)
        (run_dir / "checkpoint-6" / "task_selection.json").unlink()
        path = run_dir / "_task_selection" / name
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            resumed(run_dir)

    def test_of_the_initial_parameters(self, run_dir):
        trained(tiny.sft_trainer, run_dir, callback(after="restart"), **OPTIONS)
        path = run_dir / "_task_selection" / "initial_adapter.safetensors"
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(ValueError, match=r"initial_adapter\.safetensors: damaged"):
            resumed(run_dir, callback(after="restart"))

    def test_of_a_decision_about_other_tasks(self, run_dir):
        trained(tiny.sft_trainer, run_dir, callback(), **OPTIONS)
        path = run_dir / "checkpoint-6" / "task_selection.json"
        decision = json.loads(path.read_text()) | {"weights": {"a": 1.0}}
        path.write_text(json.dumps(decision))
        with pytest.raises(ValueError, match=r"decides on the tasks \['a'\], but the run has"):
            resumed(run_dir)


def test_a_clock_that_goes_back(run_dir, monkeypatch, whole):
    now = [1e9]

    def earlier():
        now[0] -= 10
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    trainer = trained(tiny.sft_trainer, run_dir, callback(), **OPTIONS)
    assert tiny.same(tiny.weights(trainer), whole)
    assert tiny.same(resumed(run_dir), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_no_numbers(value, run_dir):
    """As after a run that has diverged; the decision would be about nothing."""

    class Diverge(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(value)

    trainer = tiny.sft_trainer(run_dir, Diverge(), callback(), **OPTIONS)
    with pytest.raises(NonFiniteError, match=r"task 'a', row \d+: the loss is"):
        trainer.train()
    assert not (run_dir / "_task_selection" / "selection.json").exists()
    assert load_file(run_dir / "checkpoint-2" / "adapter_model.safetensors")


def test_outliers_are_reported(run_dir, monkeypatch):
    original, counts = StoreWriter.write, []

    def write(self, shard, arrays):
        if shard.role == "task":
            counts.append(len(shard.example_ids))
            if len(counts) == 1:  # of its gradients, one is far longer than the others
                arrays = dict(arrays)
                for name in arrays:
                    if name.startswith("gradients."):
                        arrays[name] = arrays[name].copy()
                        arrays[name][0] *= 1000
        original(self, shard, arrays)

    monkeypatch.setattr(StoreWriter, "write", write)
    cb = callback()
    trained(tiny.sft_trainer, run_dir, cb, **OPTIONS)
    assert cb.report.diagnostics["outlier_gradient_share"] == pytest.approx(1 / sum(counts))
    assert "outlier\\_gradient\\_share | 0.012" in cb.report.to_markdown()
