"""Runs that are stopped and resumed: nothing is lost, and nothing is different."""

import json
import logging
import multiprocessing
import shutil
import signal
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import ClassVar

import interrupted_run
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import callback, trained

from hf_auxselect import (
    AbstractEstimator,
    FixedSelection,
    ForwardSelection,
    GaussNewton,
    RandomEnsemble,
    SelectionReport,
)
from hf_auxselect.trainer.checkpoints import is_whole


@pytest.fixture(scope="module")
def in_a_process():
    """Runs interrupted_run.train in a process of its own, which it may kill; its exit code."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server; in Python 3.11 only the environment tells it where from.
    context.set_forkserver_preload(["interrupted_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(interrupted_run.__file__).parent))
        forkserver.ensure_running()

    def run(*args):
        process = context.Process(target=interrupted_run.train, args=args)
        process.start()
        process.join(120)
        return process.exitcode

    return run


class TestKills:
    @pytest.fixture(scope="class")
    def whole(self, in_a_process, tmp_path_factory):
        weights = {}

        def of(kind, after):
            if kind not in weights:
                directory = tmp_path_factory.mktemp("whole")
                assert in_a_process(directory, kind, after, None) == 0
                weights[kind] = load_file(directory / "final.safetensors")
            return weights[kind]

        return of

    @pytest.mark.parametrize(
        ("kind", "after", "moment"),
        [("SFTTrainer", "continue", moment) for moment in interrupted_run.MOMENTS]
        + [("Trainer", "restart", "in the switch's checkpoint")],
    )
    def test_the_run_goes_on_as_if_it_had_not_been_stopped(
        self, kind, after, moment, whole, in_a_process, run_dir
    ):
        assert in_a_process(run_dir, kind, after, moment) == -signal.SIGKILL
        assert not (run_dir / "final.safetensors").exists()
        assert in_a_process(run_dir, kind, after, None) == 0
        assert tiny.same(load_file(run_dir / "final.safetensors"), whole(kind, after))


class TestCheckpointsThatAreNotWhole:
    options: ClassVar = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("whole")
        trained(tiny.sft_trainer, directory, callback(), **self.options)
        return directory

    @pytest.fixture
    def stopped(self, whole, run_dir):
        """A run whose last checkpoint has no state."""
        shutil.copytree(whole, run_dir)
        (run_dir / "checkpoint-6" / "trainer_state.json").unlink()
        return run_dir

    def test_the_last_whole_one_is_taken(self, stopped, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = trained(tiny.sft_trainer, stopped, callback(), True, **self.options)
        assert trainer.state.global_step == 6
        assert "checkpoint-6 is not whole" in caplog.text
        assert "Resuming from" in caplog.text
        assert is_whole(stopped / "checkpoint-6")

    def test_one_that_is_asked_for_is_refused(self, stopped):
        path = str(stopped / "checkpoint-6")
        with pytest.raises(ValueError, match=r"checkpoint-6' is not whole.*earlier one"):
            trained(tiny.sft_trainer, stopped, callback(), path, **self.options)

    def test_without_any_the_run_starts_anew(self, stopped, caplog):
        for step in (2, 4):
            (stopped / f"checkpoint-{step}" / "trainer_state.json").write_text('{"epoch"')
        with caplog.at_level(logging.WARNING):
            trained(tiny.sft_trainer, stopped, callback(), True, **self.options)
        assert "starting anew" in caplog.text

    def test_without_checkpoints_the_trainer_says_so(self, run_dir):
        run_dir.mkdir()
        with pytest.raises(ValueError, match="No valid checkpoint"):
            trained(tiny.sft_trainer, run_dir, callback(), True)

    def test_of_several_processes_each_must_have_saved_its_random_state(self, stopped):
        checkpoint = stopped / "checkpoint-4"
        assert is_whole(checkpoint)
        assert not is_whole(checkpoint, num_processes=2)
        for rank in range(2):
            (checkpoint / f"rng_state_{rank}.pth").touch()
        assert is_whole(checkpoint, num_processes=2)


@pytest.mark.parametrize(
    ("kind", "after", "options"),
    [
        ("SFTTrainer", "continue", {}),
        ("Trainer", "restart", {}),
        ("SFTTrainer", "restart", {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2}),
        ("Trainer", "continue", {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2}),
    ],
)
class TestResume:
    def test_from_before_at_and_after_the_switch(self, kind, after, options, run_dir, tmp_path):
        make = tiny.TRAINERS[kind]
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9} | options
        selector = RandomEnsemble(num_subsets=8, subset_size=2, top_k=2)

        def make_callback():
            return callback(after=after, selector=selector, warmup=4)

        whole = trained(make, run_dir, make_callback(), **options)
        selected = json.loads((run_dir / "_task_selection/selection.json").read_text())["selected"]
        for step in (2, 4, 5, 7):
            copy = tmp_path / f"resumed{step}"
            shutil.copytree(run_dir, copy)
            for later in range(step + 1, 10):
                shutil.rmtree(copy / f"checkpoint-{later}")
            cb = make_callback()
            resumed = trained(make, copy, cb, resume=True, **options)
            assert tiny.same(tiny.weights(whole), tiny.weights(resumed)), f"from step {step}"
            assert cb.report.selected == selected


class TestResumption:
    """What a resumed run believes, and what it refuses."""

    options: ClassVar = {"save_strategy": "steps", "save_steps": 2}

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("whole")
        trained(tiny.sft_trainer, directory, callback(), **self.options)
        return directory

    @pytest.fixture
    def finished(self, whole, run_dir):
        """A copy of a finished run, for the test to change."""
        return shutil.copytree(whole, run_dir)

    def resume(self, directory, step, cb=None, **options):
        checkpoint = str(directory / f"checkpoint-{step}")
        options = self.options | options
        return trained(tiny.sft_trainer, directory, cb or callback(), checkpoint, **options)

    def test_a_decision_is_read_and_not_made_again(self, finished):
        path = finished / "checkpoint-6" / "task_selection.json"
        decision = json.loads(path.read_text())
        decision |= {"selected": ["b"], "weights": {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}}
        path.write_text(json.dumps(decision))
        shutil.rmtree(finished / "_task_selection" / "gradients")
        torch.manual_seed(3)
        trainer = tiny.sft_trainer(finished, callback(), **self.options)
        seen = tiny.spy(trainer)
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-6"))
        assert set("".join(seen)) == {"b"}

    def test_a_newer_decision_is_ignored_when_rolling_back(self, finished):
        path = finished / "_task_selection" / "selection.json"
        before = json.loads(path.read_text())
        path.write_text(json.dumps(before | {"selected": ["d"], "weights": {"d": 1.0}}))
        self.resume(finished, 2)
        assert json.loads(path.read_text()) == before

    def test_a_checkpoint_past_the_switch_without_a_decision(self, finished):
        (finished / "checkpoint-6" / "task_selection.json").unlink()
        (finished / "_task_selection" / "selection.json").unlink()
        with pytest.raises(
            ValueError, match="cannot resume at step 6: the selection was due after"
        ):
            self.resume(finished, 6)

    def test_a_damaged_decision_is_named(self, finished):
        (finished / "checkpoint-6" / "task_selection.json").write_text("{")
        with pytest.raises(ValueError, match=r"checkpoint-6/task_selection.json: damaged"):
            self.resume(finished, 6)

    @pytest.mark.parametrize(
        ("options", "changed"),
        [
            ({"per_device_train_batch_size": 2}, "per_device_train_batch_size .4 before, 2 now."),
            ({"label_smoothing_factor": 0.1}, "loss .negative log-.*label_smoothing_factor=0.1"),
            ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
            ({"train_dataset": tiny.tasks(20)}, "tasks .*training rows"),
            ({"eval_dataset": tiny.sums(16, 10)}, "target rows"),
        ],
    )
    def test_a_changed_run_is_refused(self, finished, options, changed):
        with pytest.raises(ValueError, match=f"cannot resume: the run differs.*{changed}"):
            self.resume(finished, 6, **options)

    @pytest.mark.parametrize("what", ["number of processes", "trainable parameters"])
    def test_what_the_plan_says_of_the_run_must_hold(self, finished, what):
        path = finished / "_task_selection" / "plan.json"
        plan = json.loads(path.read_text())
        plan["fingerprint"][what] = 2
        path.write_text(json.dumps(plan))
        with pytest.raises(ValueError, match=rf"differs .* in {what} \(2 before, .* now\)"):
            self.resume(finished, 6)

    def test_other_strategies_right_after_the_warm_up_make_a_branch(self, finished):
        cb = callback(selector=FixedSelection(["d"], estimate=False))
        torch.manual_seed(3)
        trainer = tiny.sft_trainer(finished, cb, **self.options)
        seen = tiny.spy(trainer)
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
        assert set("".join(seen)) == {"d"}

    def test_a_kept_task_that_was_dropped_makes_a_branch(self, run_dir, caplog):
        selector = ForwardSelection(max_tasks=1)
        trained(tiny.sft_trainer, run_dir, callback(selector=selector), **self.options)
        record = json.loads((run_dir / "_task_selection/selection.json").read_text())
        dropped = next(name for name in record["weights"] if name not in record["selected"])
        cb = callback(selector=selector, keep=[dropped])
        with caplog.at_level(logging.WARNING):
            self.resume(run_dir, 4, cb)
        assert cb.report.selected == [dropped]
        assert f"other options: keep (['{dropped}'] dropped before, ['{dropped}'] now)" in (
            caplog.text
        )

    def test_other_strategies_later_change_nothing(self, finished, caplog):
        cb = callback(selector=FixedSelection(["d"], estimate=False))
        selected = json.loads((finished / "_task_selection/selection.json").read_text())["selected"]
        with caplog.at_level(logging.WARNING):
            self.resume(finished, 6, cb)
        assert cb.report.selected == selected
        assert "the decision of the resumed run" in caplog.text
        assert "since it was made: selector ({'name': 'MixtureOptimization'" in caplog.text

    def test_the_seed_and_the_warm_up_are_those_of_the_run(self, run_dir, tmp_path, caplog):
        def few(**options):
            return callback(examples_per_task=5, seed=1, **options)

        whole = few()
        trained(tiny.sft_trainer, run_dir / "whole", whole, **self.options)
        shutil.copytree(run_dir / "whole", run_dir / "resumed")
        other = few()
        other.seed, other.warmup = 2, 6
        with caplog.at_level(logging.WARNING):
            self.resume(run_dir / "resumed", 2, other)
        assert other.report.to_dict()["rows"] == whole.report.to_dict()["rows"]
        stores = [cb.report.gradients() for cb in (whole, other)]
        assert stores[0].example_ids.tolist() == stores[1].example_ids.tolist()
        assert "seed=2, but the run that is resumed was started with 1" in caplog.text
        assert "warmup asks for a first selection after step 6, but" in caplog.text

    @pytest.mark.parametrize("step", [2, 4])
    def test_a_run_that_was_started_without_the_callback(self, run_dir, step):
        torch.manual_seed(3)
        tiny.sft_trainer(run_dir, **self.options).train()
        cb = callback()
        self.resume(run_dir, step, cb)
        whole = callback()
        trained(tiny.sft_trainer, run_dir / "whole", whole)
        assert cb.report.to_dict()["rows"] == whole.report.to_dict()["rows"]

    def test_a_moved_checkpoint_brings_its_decision(self, finished, tmp_path):
        moved = tmp_path / "moved"
        shutil.copytree(finished / "checkpoint-6", moved / "checkpoint-6")
        cb = callback()
        self.resume(moved, 6, cb)
        assert cb.report.selected == SelectionReport.load(finished / "_task_selection").selected

    def test_verifying_without_the_gradients(self, finished, tmp_path, caplog):
        moved = tmp_path / "moved"
        shutil.copytree(finished / "checkpoint-4", moved / "checkpoint-4")
        with caplog.at_level(logging.WARNING):
            trainer = self.resume(moved, 4, callback(verify=1))
        assert trainer.state.global_step == 10
        assert "verify=1: the selection is not verified" in caplog.text
        assert (
            f"gradient store is not available, so nothing can be estimated (looked for {moved}"
            in (caplog.text)
        )

    def test_verifying_the_estimates_of_an_estimator_of_the_user(self, run_dir):
        @dataclass(frozen=True)
        class Doubled(AbstractEstimator):
            factor: float = 2.0
            scalars: ClassVar = GaussNewton().scalars

            def fit(self, store):
                return GaussNewton().fit(store)

        trained(tiny.sft_trainer, run_dir, callback(estimator=Doubled()), **self.options)
        cb = callback(estimator=Doubled(), verify=1)
        self.resume(run_dir, 4, cb)
        assert [one.name for one in cb.report.verification] == ["chosen"]

    def test_an_observed_run_goes_on_without(self, run_dir, caplog):
        torch.manual_seed(3)
        tiny.sft_trainer(run_dir, **self.options).train()
        with caplog.at_level(logging.WARNING):
            self.resume(run_dir, 6, callback(after="observe"))
        assert "nothing is selected" in caplog.text
