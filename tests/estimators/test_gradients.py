"""Derivatives of estimates with respect to the weights of a mixture."""

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
from hf_auxselect.estimators.matrix_functions import derivative, turned


def along_the_simplex(fitted, mixture, change, loss, step=1e-5):
    """The derivative of a loss along a change of the weights, by central differences."""
    ends = np.array([mixture + step * change, mixture - step * change])
    up, down = loss(fitted.estimate(ends))
    return (up - down) / (2 * step)


@pytest.fixture
def store():
    return rebuilt(random_store(3), groups={"one": random_store(11).target})


ESTIMATORS = [
    LinearizedTraining(),
    LinearizedTraining(rank=2),
    GaussNewton(),
    GaussNewton(rank=2),
    RidgeSurrogate(),
    KernelSurrogate(),
]


@pytest.mark.parametrize("options", ESTIMATORS, ids=repr)
class TestGradient:
    def test_it_is_that_of_finite_differences(self, options, store):
        fitted = options.fit(store)
        rng = np.random.default_rng(0)
        mixtures = rng.dirichlet(np.full(3, 5.0), 5)
        gradients, of_groups = fitted.gradient(mixtures), fitted.group_gradients(mixtures)
        assert gradients.shape == (5, 3) and of_groups.shape == (5, 1, 3)
        assert gradients.sum(1) == pytest.approx(0, abs=1e-12)
        for mixture, gradient, of_group in zip(mixtures, gradients, of_groups, strict=True):
            change = rng.standard_normal(3)
            change -= change.mean()
            # A regression adds up large numbers of both signs, whose rounding short steps magnify.
            step = 1e-3 if isinstance(options, RidgeSurrogate | KernelSurrogate) else 1e-5
            expected = along_the_simplex(fitted, mixture, change, lambda e: e.loss, step)
            assert gradient @ change == pytest.approx(expected, rel=1e-5, abs=2e-7)
            expected = along_the_simplex(
                fitted, mixture, change, lambda e: e.group_losses[:, 0], step
            )
            assert of_group[0] @ change == pytest.approx(expected, rel=1e-5, abs=2e-7)

    def test_no_training_has_no_derivative(self, options, store):
        assert not options.fit(store).gradient(np.zeros((1, 3))).any()

    def test_no_mixtures(self, options, store):
        fitted = options.fit(store)
        assert fitted.gradient(np.zeros((0, 3))).shape == (0, 3)
        assert fitted.group_gradients(np.zeros((0, 3))).shape == (0, 1, 3)


def test_a_subset_has_the_derivatives_of_its_shares(store):
    fitted = GaussNewton().fit(rebuilt(store, task_sizes=[10, 20, 30]))
    of_mask, of_shares = fitted.gradient([[True, False, True]]), fitted.gradient([[1, 0, 3]])
    assert of_mask == pytest.approx(of_shares, rel=1e-12)


def test_packed_rows_are_differentiated(store):
    training = store.metadata["training"] | {"examples_per_row": {"task0": 2.0, "task1": 3.0}}
    fitted = LinearizedTraining().fit(
        rebuilt(store, metadata=store.metadata | {"training": training}, task_sizes=[1, 1, 1])
    )
    mixture, change = np.array([0.2, 0.5, 0.3]), np.array([0.7, -0.9, 0.2])
    expected = along_the_simplex(fitted, mixture, change, lambda e: e.loss)
    assert fitted.gradient(mixture[None])[0] @ change == pytest.approx(expected, rel=1e-5)


def test_calibrated_estimates_are_differentiated(store):
    masks = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    base = LinearizedTraining().fit(store)
    losses = base.estimate(masks).loss * 1.2 + [0.1, -0.2, 0.3, 0.1]
    fitted = FittedCalibrated(base, masks, losses)
    mixture, change = np.array([0.2, 0.5, 0.3]), np.array([0.7, -0.9, 0.2])
    expected = along_the_simplex(fitted, mixture, change, lambda e: e.loss)
    assert fitted.gradient(mixture[None])[0] @ change == pytest.approx(expected, rel=1e-5)


def test_an_estimator_without_a_gradient_says_so(store):
    fitted = GradExLogistic().fit(store)
    assert not fitted.has_gradient
    with pytest.raises(NotImplementedError, match="FittedGradExLogistic has no gradient"):
        fitted.gradient([[1, 1, 1]])


@pytest.mark.parametrize("values", [[0.5, 1.0, 3.0], [1.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
def test_a_function_of_a_matrix_is_differentiated(values):
    """Against finite differences, with eigenvalues that are equal, too."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    matrix = basis * values @ basis.T
    x, y, change = rng.standard_normal((3, 3))[0], rng.standard_normal(3), np.zeros((3, 3))
    change[0, 1] = change[1, 0] = 1.0

    def decomposed(at):
        values_R, vectors_RR = np.linalg.eigh(at)
        return values_R[None], vectors_RR[None]

    def value(at):
        values_MR, vectors_MRR = decomposed(at)
        return y @ (vectors_MRR[0] * np.exp(-values_MR[0])) @ vectors_MRR[0].T @ x

    values_MR, vectors_MRR = decomposed(matrix)
    f_MR = np.exp(-values_MR)
    found = derivative(
        values_MR,
        vectors_MRR,
        f_MR[None],
        -f_MR[None],
        turned(vectors_MRR, y[None]),
        turned(vectors_MRR, x[None])[None],
    )[0]
    expected = (value(matrix + 1e-5 * change) - value(matrix - 1e-5 * change)) / 2e-5
    assert (found * change).sum() == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(found.T, abs=1e-12)


@pytest.mark.parametrize("options", ESTIMATORS[:4], ids=repr)
def test_mixtures_of_few_tasks_are_estimated_as_among_few(options):
    """Tasks that a mixture leaves out are left out of the work, and change no estimate of it."""
    store = random_store(3, counts=(4,) * 9)
    store = rebuilt(store, task_sizes=[40] * 9)
    fitted = options.fit(store)
    few = np.zeros((2, 9))
    few[0, [1, 7]], few[1, 4] = [0.3, 0.7], 1.0
    alone, together = fitted.estimate(few), fitted.estimate(np.vstack([few, np.ones((1, 9))]))
    for name in ("loss", "low", "high"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name)[:2], rel=1e-12)
