"""The approximation that a page evaluates, against the estimator and against a slow loop."""

import base64
from dataclasses import replace

import numpy as np
import pytest
from reference import random_store

from hf_auxselect import GradExLogistic, LinearizedTraining
from hf_auxselect.report.what_if import OUTPUTS, approximate, random_mixtures


@pytest.fixture(scope="module")
def store():
    return random_store(4, counts=(3, 8, 5, 6))


@pytest.fixture(scope="module")
def fitted(store):
    return LinearizedTraining().fit(store)


@pytest.fixture(scope="module")
def what_if(store, fitted):
    return approximate(fitted, store.task_names, store.task_sizes.tolist(), range(4), seed=0)


def slow_outputs(record, shares):
    """Every output, one anchor and one task at a time."""
    units = base64.b64decode(record.anchors)
    coefficients = np.frombuffer(base64.b64decode(record.coefficients), "<f8")
    count, num_tasks = len(units) // len(record.tasks), len(record.tasks)
    outputs = []
    for o in range(len(OUTPUTS)):
        total = record.means[o]
        for a in range(count):
            square = sum(
                (shares[k] ** 0.5 - (units[a * num_tasks + k] / 255) ** 0.5) ** 2
                for k in range(num_tasks)
            )
            u = (record.scale * square) ** 0.5
            total += coefficients[o * count + a] * (1 + u) * np.exp(-u)
        outputs.append(total if o == 0 else max(total, 0.0))
    return outputs


def test_it_is_the_sum_over_anchors(what_if):
    for shares in ([1.0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]):
        fast = what_if.outputs(np.array([shares]))[0]
        assert fast == pytest.approx(slow_outputs(what_if, shares), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", [LinearizedTraining(), GradExLogistic()], ids=repr)
def test_nine_of_ten_further_mixtures_are_within_the_error(store, estimator):
    fitted = estimator.fit(store)
    record = approximate(fitted, store.task_names, store.task_sizes.tolist(), range(4), seed=0)
    shares = random_mixtures(store.task_sizes, 400, seed=5) / 255
    estimate = fitted.estimate(shares)
    outputs = record.outputs(shares)
    within = np.abs(outputs[:, 0] - estimate.loss) <= record.error
    assert within.mean() >= 0.8
    assert record.error < 0.5 * estimate.loss.std()
    widths = estimate.high - estimate.low
    assert outputs[:, 1] + outputs[:, 2] == pytest.approx(widths, abs=0.5 * widths.mean())
    assert record.all_tasks == fitted.estimate(np.ones((1, 4), bool)).loss[0]


def test_tasks_that_are_not_varied_have_no_share(store, fitted):
    record = approximate(fitted, store.task_names, store.task_sizes.tolist(), [1, 3], seed=0)
    assert record.tasks == ["task1", "task3"]
    estimate = fitted.estimate([[0, 0.5, 0, 0.5]]).loss[0]
    assert record.outputs(np.array([[0.5, 0.5]]))[0, 0] == pytest.approx(estimate, abs=1e-3)


def test_the_same_seed_gives_the_same_record(store, fitted, what_if):
    sizes = store.task_sizes.tolist()
    assert approximate(fitted, store.task_names, sizes, range(4), seed=0) == what_if
    assert approximate(fitted, store.task_names, sizes, range(4), seed=1) != what_if


def test_random_mixtures_are_whole_units_that_sum_to_one():
    units = random_mixtures(np.array([1.0, 50.0, 7.0]), 90, seed=3)
    assert units.min() >= 0 and (units.sum(1) == 255).all()
    masks = {tuple(row > 0) for row in units}
    assert len(masks) == 7  # each subset of three tasks


def test_a_damaged_record_is_an_error(what_if):
    with pytest.raises(ValueError, match="do not belong together"):
        replace(what_if, tasks=what_if.tasks[:2]).outputs(np.array([[0.5, 0.5]]))
