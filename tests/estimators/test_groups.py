"""Losses of further targets (groups) beside that of the target."""

import numpy as np
import pytest
from reference import random_store, rebuilt

from hf_auxselect import (
    GaussNewton,
    GradExLogistic,
    KernelSurrogate,
    LinearizedTraining,
    RidgeSurrogate,
)
from hf_auxselect.estimators import FittedCalibrated

MASKS = np.array([[True, False, False], [True, True, False], [True, True, True], [False] * 3])
ESTIMATORS = [
    LinearizedTraining(),
    GaussNewton(),
    GaussNewton(curvature="empirical"),
    GradExLogistic(),
    RidgeSurrogate(),
    KernelSurrogate(),
]


def other_targets(num_target):
    return random_store(11, num_target=num_target).target, random_store(12, num_target=4).target


@pytest.fixture
def store():
    one, other = other_targets(7)
    return rebuilt(random_store(3), groups={"one": one, "other": other})


@pytest.mark.parametrize("options", ESTIMATORS, ids=repr)
class TestGroupLosses:
    def test_they_are_those_of_a_fit_with_the_group_as_the_target(self, options, store):
        fitted = options.fit(store)
        found = fitted.estimate(MASKS).group_losses
        differences = fitted.difference(MASKS, MASKS[2]).group_losses
        assert found.shape == differences.shape == (4, 2)
        for g, group in enumerate(store.groups.values()):
            alone = options.fit(rebuilt(store, target=group, groups={}))
            assert found[:, g] == pytest.approx(alone.estimate(MASKS).loss, abs=1e-12)
            expected = alone.difference(MASKS, MASKS[2]).loss
            assert differences[:, g] == pytest.approx(expected, abs=1e-12)

    def test_the_target_is_estimated_as_without_groups(self, options, store):
        with_groups = options.fit(store).estimate(MASKS)
        without = options.fit(rebuilt(store, groups={})).estimate(MASKS)
        assert without.group_losses is None
        for name in ("loss", "low", "high"):
            assert getattr(with_groups, name).tolist() == getattr(without, name).tolist()

    def test_no_mixtures(self, options, store):
        assert options.fit(store).estimate(np.zeros((0, 3), bool)).group_losses.shape == (0, 2)


def test_calibration_leaves_them_as_they_are(store):
    fitted = LinearizedTraining().fit(store)
    calibrated = FittedCalibrated(fitted, MASKS[:2], [2.0, 1.5]).estimate(MASKS)
    assert calibrated.group_losses.tolist() == fitted.estimate(MASKS).group_losses.tolist()


def test_measured_runs_know_no_groups():
    fitted = RidgeSurrogate().fit_runs(np.eye(3), [1.0, 2.0, 3.0])
    assert fitted.estimate(np.eye(3)).group_losses is None
