"""Fine-tunes inside the run: they are what the run would do, and leave no trace in it."""

import logging
import math
import multiprocessing

import numpy as np
import pytest
import tiny

from hf_auxselect import (
    FixedSelection,
    RandomEnsemble,
    SelectionReport,
    TaskSelectionCallback,
)
from hf_auxselect.trainer.trial_runs import TrialRun
from hf_auxselect.verification import mixtures_to_verify


def callback(**options):
    return TaskSelectionCallback(
        **{"warmup": 4, "selector": FixedSelection(["a", "c"]), "projection_dim": 16, "seed": 3}
        | options
    )


@pytest.mark.parametrize(("kind", "after"), [("SFTTrainer", "continue"), ("Trainer", "restart")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        {
            "max_steps": -1,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,  # 81 rows: 11 batches, and 11 mod 3 = 2
            "gradient_accumulation_steps": 3,
        },
    ],
    ids=["steps", "accumulation and workers", "checkpointing", "epochs with a remainder"],
)
def test_the_measured_loss_of_the_choice_is_that_of_the_run(kind, after, options, run_dir):
    """Bit by bit, with dropout: the trial starts where the run goes on."""
    cb = callback(after=after, verify=1)
    trainer = tiny.TRAINERS[kind](run_dir, cb, **options)
    trainer.train()
    (chosen,) = cb.report.verification
    assert chosen.name == "chosen"
    assert chosen.weights == cb.report.weights
    assert chosen.measured == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "after"),
    [("SFTTrainer", "continue"), ("Trainer", "restart"), ("SFTTrainer", "observe")],
)
def test_the_run_is_the_same_with_and_without(kind, after, run_dir):
    results, workers = [], 2 if (kind, after) == ("SFTTrainer", "continue") else 0
    for verify in (0, 3):
        cb = callback(after=after, verify=verify)
        trainer = tiny.TRAINERS[kind](
            run_dir / str(verify),
            cb,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )
        trainer.train()
        log = [
            {name: value for name, value in line.items() if "seconds" not in name}
            for line in trainer.state.log_history
        ]
        log = [
            {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
            for line in log
        ]
        results.append((tiny.weights(trainer), log))
        own = trainer.get_eval_dataloader().base_dataloader  # persistent: made once, and kept
        own._iterator = None
        assert not multiprocessing.active_children(), "workers outlive the loader that started them"
    (one, log), (other, other_log) = results
    assert tiny.same(one, other)
    assert log == other_log


def test_the_report_tells_how_the_estimates_agree(run_dir):
    cb = callback(verify=3)
    trainer = tiny.sft_trainer(run_dir, cb)
    trainer.train()
    report = cb.report
    names = [one.name for one in report.verification]
    assert names[:2] == ["chosen", "all tasks"]
    assert names[2].startswith("random: ")
    for one in report.verification:
        assert one.estimated == pytest.approx(report.estimate(one.weights).loss[0], rel=1e-12)
        assert one.low <= one.estimated <= one.high
    assert "Mean absolute error of the estimates" in report.agreement()
    assert report.agreement() in report.to_text()
    assert "## Ground-truth runs" in report.to_markdown()
    loaded = SelectionReport.load(run_dir / "_task_selection")
    assert loaded.verification == report.verification


def test_a_choice_that_does_not_win_is_called_so(run_dir):
    cb = callback(verify=2)
    tiny.sft_trainer(run_dir, cb).train()
    chosen, everything = cb.report.verification
    gain = everything.measured - chosen.measured
    verdict = "below all tasks" if gain > 0 else "the choice did not win"
    assert verdict in cb.report.agreement()


class TestRunsThatDiverge:
    def train(self, directory, monkeypatch, losses):
        """Two calibration runs, all tasks first; then the choice is verified, and all tasks."""
        losses = iter(losses)
        monkeypatch.setattr(TrialRun, "train_to", lambda self, step, progress=None: next(losses))
        cb = callback(calibrate=2, verify=2)
        trainer = tiny.plain_trainer(directory, cb)
        trainer.train()
        assert trainer.state.global_step == 10
        assert next(losses, None) is None
        loaded = SelectionReport.load(directory / "_task_selection")
        assert loaded.to_dict() == cb.report.to_dict()
        return cb.report

    def test_they_are_left_out(self, run_dir, monkeypatch, caplog):
        with caplog.at_level(logging.WARNING):
            report = self.train(run_dir, monkeypatch, [1.5, math.nan, math.inf])
        assert [one.name for one in report.calibration] == ["all tasks"]
        assert [one.name for one in report.verification] == ["all tasks"]
        assert "calibration_scale" in report.diagnostics
        assert math.isfinite(report.row("chosen").loss)
        left_out = [text for text in report.warnings if "ground-truth runs are left out" in text]
        assert left_out[0].startswith("calibration: 1 of 2")
        assert left_out[1].startswith("verification: 1 of 2")
        assert "training diverges (the loss is not finite) on: chosen. Lower" in left_out[1]
        assert all(text in caplog.text for text in left_out)

    def test_if_all_do_the_run_goes_on_without_any(self, run_dir, monkeypatch):
        report = self.train(run_dir, monkeypatch, [math.nan] * 3)
        assert report.calibration == report.verification == []
        assert "calibration_scale" not in report.diagnostics
        assert any("verification: 2 of 2" in text for text in report.warnings)


class TestMixturesToVerify:
    counts = np.array([10, 20, 30, 40])

    def test_the_choice_then_all_then_random_subsets_of_its_size(self):
        weights = {"a": 0.25, "b": 0.0, "c": 0.75, "d": 0.0}
        mixtures = mixtures_to_verify(weights, self.counts, 5, 0)
        assert [*mixtures][:2] == ["chosen", "all tasks"]
        assert mixtures["chosen"].tolist() == [0.25, 0, 0.75, 0]
        assert mixtures["all tasks"].tolist() == [0.1, 0.2, 0.3, 0.4]
        for name, shares in [*mixtures.items()][2:]:
            tasks = name.removeprefix("random: ").split(", ")
            mask = np.isin(["a", "b", "c", "d"], tasks)
            assert mask.sum() == 2
            assert shares == pytest.approx(mask * self.counts / (mask @ self.counts))

    def test_of_weights_the_same_weights_in_a_random_order(self):
        weights = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}
        mixtures = mixtures_to_verify(weights, self.counts, 4, 0)
        assert [*mixtures][:2] == ["chosen", "all tasks"]
        assert [*mixtures][2].startswith("chosen weights in random order")
        for shares in [*mixtures.values()][2:]:
            assert sorted(shares) == pytest.approx([0.1, 0.1, 0.3, 0.5])

    def test_no_mixture_twice(self):
        everything = dict(zip("abcd", self.counts / 100, strict=True))
        mixtures = mixtures_to_verify(everything, self.counts, 3, 0)
        assert [*mixtures] == ["chosen"]


def test_the_preview_counts_its_steps(run_dir):
    cb = callback(verify=3)
    preview = cb.preview(tiny.sft_trainer(run_dir, cb))
    assert preview.verification_steps == 3 * (10 - 4)
    assert "ground-truth runs: 18 training steps" in str(preview)
    assert "verification" not in str(callback().preview(tiny.sft_trainer(run_dir, callback())))


@pytest.mark.parametrize("verify", [-1, 1.5, True])
def test_bad_options(verify):
    with pytest.raises(ValueError, match="verify must be a number of mixtures, 0 or more"):
        TaskSelectionCallback(verify=verify)


def test_without_estimates_there_is_nothing_to_verify():
    with pytest.raises(ValueError, match="verify=2 compares estimates"):
        callback(selector=FixedSelection(["a"], estimate=False), verify=2)
    callback(selector=RandomEnsemble(num_subsets=4), verify=2)
