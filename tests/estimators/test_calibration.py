"""Calibrated estimates: the arithmetic, and the training run that makes them."""

import dataclasses

import numpy as np
import pytest
import tiny
from tiny import callback, trained

from hf_auxselect import FixedSelection, SelectionReport
from hf_auxselect.estimators import (
    Estimate,
    FittedCalibrated,
    FittedEstimator,
    normalize_mixtures,
)
from hf_auxselect.estimators.base import random_subsets
from hf_auxselect.tasks import TaskRows
from hf_auxselect.verification import mixtures_to_calibrate


class Plain(FittedEstimator):
    """The loss is a sum over tasks, with a known error; that of no training is known."""

    def __init__(self, deviation=0.1):
        self.deviation = deviation

    def estimate(self, weights):
        weights = normalize_mixtures(weights, np.ones(3))
        loss = 3 - weights @ np.array([1.0, 0.5, 0.2])
        half = 1.6448536269514722 * self.deviation * weights.any(1)
        return Estimate(loss=loss, low=loss - half, high=loss + half, weights=weights)

    def diagnostics(self):
        return {"loss_at_theta_0_nats": 3.0}


ANCHORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0.5, 0.5]])
NEW = np.array([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0]])


def by_hand(plain, runs, measured, new):
    """The same, one number at a time; the ridge regression in its primal form."""
    estimated = [float(plain.estimate([row]).loss[0]) for row in runs]
    random = [plain.estimate([row]) for row in random_subsets(3)]
    spread = float(np.var([one.loss[0] for one in random]))
    roots = [[one.weights[0][k] ** 0.5 for k in range(3)] for one in random]
    means = [sum(row[k] for row in roots) / len(roots) for k in range(3)]
    square = sum((row[k] - means[k]) ** 2 for row in roots for k in range(3)) / len(roots)

    def features(row):
        return [((row[k] / sum(row)) ** 0.5 - means[k]) / square**0.5 for k in range(3)]

    def fit(chosen):
        count = len(chosen)
        if count == 0:
            return lambda loss, row: loss
        middle = sum(estimated[a] for a in chosen) / count
        mean = sum(measured[a] - estimated[a] for a in chosen) / count
        above = sum((estimated[a] - middle) * (measured[a] - estimated[a]) for a in chosen)
        below = sum((estimated[a] - middle) ** 2 for a in chosen) + 2 * spread

        def line(loss):
            return loss + count / (count + 2) * mean + above / below * (loss - middle)

        f = np.array([features(runs[a]) for a in chosen])
        left = np.array([measured[a] - line(estimated[a]) for a in chosen])
        u = np.linalg.inv(f.T @ f + 3 * np.eye(3)) @ f.T @ left
        return lambda loss, row: line(loss) + sum(features(row)[k] * u[k] for k in range(3))

    everyone = list(range(len(runs)))
    squares = []
    for a in everyone:
        without = fit([b for b in everyone if b != a])
        squares.append(((measured[a] - without(estimated[a], runs[a])) / 0.1) ** 2)
    factor = ((2 + sum(squares)) / (2 + len(runs))) ** 0.5
    put_right = fit(everyone)
    losses = [put_right(float(plain.estimate([row]).loss[0]), row) for row in new]
    return losses, factor * 0.1 * 1.6448536269514722


def test_it_is_ridge_regression_of_the_error():
    plain = Plain()
    measured = plain.estimate(ANCHORS).loss * 1.3 - 0.5 + [0.02, -0.05, 0.01, 0.0, 0.04]
    fitted = FittedCalibrated(plain, ANCHORS, measured)
    estimate = fitted.estimate(NEW)
    losses, half = by_hand(plain, ANCHORS.tolist(), measured.tolist(), NEW.tolist())
    assert estimate.loss == pytest.approx(losses)
    assert estimate.high - estimate.loss == pytest.approx(half)
    assert estimate.loss - estimate.low == pytest.approx(half)
    difference = fitted.difference(NEW[:1], NEW[1])
    assert difference.loss[0] == pytest.approx(losses[0] - losses[1])


def test_many_runs_tell_scale_offset_and_error():
    rng = np.random.default_rng(0)
    runs = rng.dirichlet(np.ones(3), 400)
    plain = Plain(deviation=0.1)
    measured = 0.7 * plain.estimate(runs).loss + 0.4 + rng.normal(0, 0.02, 400)
    fitted = FittedCalibrated(plain, runs, measured)
    estimate = fitted.estimate(NEW)
    assert estimate.loss == pytest.approx(0.7 * plain.estimate(NEW).loss + 0.4, abs=0.01)
    diagnostics = fitted.diagnostics()
    assert diagnostics["calibration_scale"] == pytest.approx(0.7, abs=0.02)
    assert diagnostics["calibration_interval_factor"] == pytest.approx(0.2, abs=0.02)
    assert diagnostics["loss_at_theta_0_nats"] == 3.0
    difference = fitted.difference(NEW, ANCHORS[0])
    expected = 0.7 * (plain.estimate(NEW).loss - plain.estimate(ANCHORS[:1]).loss)
    assert difference.loss == pytest.approx(expected, abs=0.01)


def test_intervals_that_end_at_0_go_on_below_it():
    wide = Plain(deviation=3.0)
    measured = wide.estimate(ANCHORS).loss + 9
    estimate = FittedCalibrated(wide, ANCHORS, measured).estimate(NEW)
    cut = wide.estimate

    def cut_off(weights):
        whole = cut(weights)
        assert (whole.low < 0).any()
        return dataclasses.replace(whole, low=np.maximum(whole.low, 0))

    wide.estimate = cut_off
    same = FittedCalibrated(wide, ANCHORS, measured).estimate(NEW)
    assert same.low == pytest.approx(estimate.low)
    assert same.high == pytest.approx(estimate.high)


def test_no_training_is_left_alone():
    plain = Plain()
    measured = plain.estimate(ANCHORS).loss + 1
    estimate = FittedCalibrated(plain, ANCHORS, measured).estimate(np.zeros((1, 3)))
    assert (estimate.loss, estimate.low, estimate.high) == (3.0, 3.0, 3.0)


def test_one_run_moves_the_offset_by_a_third():
    plain = Plain()
    fitted = FittedCalibrated(plain, ANCHORS[:1], plain.estimate(ANCHORS[:1]).loss + 0.3)
    assert fitted.diagnostics()["calibration_offset_nats"] == pytest.approx(0.1)
    measured = (plain.estimate(ANCHORS[:1]).loss + 0.3).tolist()
    losses, _ = by_hand(plain, ANCHORS[:1].tolist(), measured, NEW.tolist())
    assert fitted.estimate(NEW).loss == pytest.approx(losses)


def test_what_one_task_adds_is_told_by_many_runs():
    """Three quarters of an error that scale and offset cannot explain are found on new mixtures."""
    rng = np.random.default_rng(0)
    runs, new = np.split(rng.dirichlet(np.ones(3), 500), [400])
    plain = Plain()

    def measured(mixtures):
        return plain.estimate(mixtures).loss + np.sqrt(mixtures[:, 1]) / 2

    fitted = FittedCalibrated(plain, runs, measured(runs))
    line = np.poly1d(np.polyfit(plain.estimate(runs).loss, measured(runs), 1))
    of_line = measured(new) - line(plain.estimate(new).loss)
    left = measured(new) - fitted.estimate(new).loss
    assert np.abs(left).mean() < np.abs(of_line).mean() / 4


@pytest.mark.parametrize("count", [0, 2])
def test_losses_without_mixtures(count):
    with pytest.raises(ValueError, match="losses must be those of the mixtures in weights"):
        FittedCalibrated(Plain(), np.ones((0 if count == 0 else 3, 3)), np.ones(count))


def test_runs_are_spread_out():
    tasks = TaskRows.from_labels(["a"] * 5 + ["b"] * 10 + ["c"] * 5 + ["d"] * 5)
    runs = mixtures_to_calibrate(tasks, 6, 0)
    shares = np.array([*runs.values()])
    assert next(iter(runs)) == "all tasks"
    assert shares[0].tolist() == [0.2, 0.4, 0.2, 0.2]
    assert shares.sum(1) == pytest.approx(np.ones(6))
    # The corners are the farthest from each other.
    assert {"a", "b", "c", "d"} < set(runs)
    assert len(mixtures_to_calibrate(tasks, 100, 0)) <= 15


class TestARun:
    def test_the_report_tells_of_it(self, run_dir):
        cb = callback(calibrate=3)
        trained(tiny.sft_trainer, run_dir, cb)
        assert len(cb.report.calibration) == 3
        assert "## Calibration runs" in cb.report.to_markdown()
        assert "calibration_scale" in cb.report.diagnostics
        loaded = SelectionReport.load(run_dir / "_task_selection")
        assert loaded.to_dict() == cb.report.to_dict()
        assert loaded.estimate(["a", "c"]).loss == cb.report.estimate(["a", "c"]).loss
        again = callback(calibrate=3, selector=FixedSelection(["b"]), verify=1)
        assert "ground-truth runs: 24 training steps" in str(
            again.preview(tiny.sft_trainer(run_dir / "again", again))
        )

    def test_the_run_goes_on_as_without(self, run_dir):
        weights = []
        for calibrate in (0, 2):
            cb = callback(calibrate=calibrate, selector=FixedSelection(["b", "c"]))
            weights.append(tiny.weights(trained(tiny.sft_trainer, run_dir / str(calibrate), cb)))
        assert tiny.same(*weights)

    def test_a_run_that_is_resumed_at_the_switch_measures_the_same(self, run_dir):
        options = {"save_strategy": "steps", "save_steps": 4}
        whole = callback(calibrate=2)
        trained(tiny.sft_trainer, run_dir, whole, **options)
        (run_dir / "checkpoint-4" / "task_selection.json").unlink()
        (run_dir / "_task_selection" / "selection.json").unlink()
        again = callback(calibrate=2)
        trained(tiny.sft_trainer, run_dir, again, str(run_dir / "checkpoint-4"), **options)
        assert [one.measured for one in again.report.calibration] == [
            one.measured for one in whole.report.calibration
        ]
        assert again.report.weights == whole.report.weights


def test_bad_options():
    with pytest.raises(ValueError, match="calibrate must be a number of mixtures"):
        callback(calibrate=-1)
    with pytest.raises(ValueError, match="calibrate=2 compares estimates"):
        callback(selector=FixedSelection(["a"], estimate=False), calibrate=2)
