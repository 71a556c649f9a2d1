"""A gradient coreset: against exhaustive search, the definition, and what is planted."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from hf_auxselect import GaussNewton, GradientCoreset, SelectionProblem, SelectionReport
from hf_auxselect.estimators import Estimate


def estimate(weights):
    loss = np.linspace(1, 2, len(weights[0])) @ np.asarray(weights).T
    return Estimate(loss=loss, low=loss, high=loss)


def problem(gradients, sizes=None, **options):
    """Of the tasks' mean gradients [K, D]."""
    names = [f"t{k}" for k in range(len(gradients))]
    sizes = [10] * len(names) if sizes is None else list(sizes)
    return SelectionProblem(estimate, names, sizes, gram=gradients @ gradients.T, **options)


def random_gradients(seed, num_tasks=8, dim=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_tasks, dim)), rng.integers(1, 100, num_tasks)


def decrease(gradients, sizes, chosen):
    """The objective by its definition: what medoids take off the summed distance."""
    distances = np.linalg.norm(gradients[:, None] - gradients[None], axis=2)
    nearest = distances[:, list(chosen)].min(1)
    return np.sum(np.asarray(sizes) * (distances.max() - nearest))


def positions(selection):
    return [int(name[1:]) for name in selection.selected]


def greedy(gradients, sizes, size):
    """Slow and obvious: try every task, take the first best."""
    chosen = []
    for _ in range(size):
        rest = [k for k in range(len(gradients)) if k not in chosen]
        chosen.append(max(rest, key=lambda k: decrease(gradients, sizes, [*chosen, k])))
    return sorted(chosen)


@given(st.integers(0, 500), st.integers(2, 9), st.data())
def test_it_is_the_greedy_search(seed, num_tasks, data):
    size = data.draw(st.integers(1, num_tasks))
    gradients, sizes = random_gradients(seed, num_tasks)
    selection = GradientCoreset(size=size).select(problem(gradients, sizes))
    if num_tasks > 2:  # two tasks of one size gain the same up to rounding
        assert positions(selection) == greedy(gradients, sizes, size)


def test_lazy_bounds_change_nothing_with_many_tasks():
    gradients, sizes = random_gradients(0, 150, 3)
    selection = GradientCoreset(size=12).select(problem(gradients, sizes))
    assert positions(selection) == greedy(gradients, sizes, 12)


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(3, 12), st.integers(1, 5))
def test_the_objective_is_at_least_its_bound_of_the_optimum(seed, num_tasks, size):
    size = min(size, num_tasks)
    gradients, sizes = random_gradients(seed, num_tasks, 4)
    chosen = positions(GradientCoreset(size=size).select(problem(gradients, sizes)))
    subsets = itertools.combinations(range(num_tasks), size)
    best = max(decrease(gradients, sizes, subset) for subset in subsets)
    assert decrease(gradients, sizes, chosen) >= (1 - 1 / np.e) * best


def test_weights_are_the_rows_that_are_mapped_to_a_medoid():
    gradients = np.array([[0.0], [1.0], [1.1], [9.0], [9.2]])
    selection = GradientCoreset(size=2).select(problem(gradients, [1, 10, 2, 3, 4]))
    assert selection.weights == pytest.approx({"t0": 0, "t1": 0.65, "t2": 0, "t3": 0, "t4": 0.35})
    assert selection.scores == pytest.approx(
        {"t0": 1 / 9.2, "t1": 0, "t2": 0.1 / 9.2, "t3": 0.2 / 9.2, "t4": 0}
    )
    (step,) = selection.history
    assert step.tasks == ("t1", "t4") and step.accepted
    assert step.weights == {name: w for name, w in selection.weights.items() if w > 0}
    assert selection.estimate.loss[0] == pytest.approx(0.65 * 1.25 + 0.35 * 2)


@given(st.integers(0, 200), st.integers(1, 7))
def test_the_error_is_that_of_the_gradient_and_below_the_summed_distance(seed, size):
    gradients, sizes = random_gradients(seed)
    selection = GradientCoreset(size=size).select(problem(gradients, sizes))
    shares, weights = sizes / sizes.sum(), np.array([*selection.weights.values()])
    full = np.linalg.norm(shares @ gradients)
    error = selection.diagnostics["coreset_gradient_error"]
    assert error == pytest.approx(np.linalg.norm((weights - shares) @ gradients) / full)
    distances = np.linalg.norm(gradients[:, None] - gradients[None], axis=2)
    bound = shares @ distances[:, positions(selection)].min(1) / full
    assert error <= bound + 1e-9


def test_the_error_lies_between_random_and_optimal_weights():
    """In clusters of tasks: random tasks, weighted by their rows, are farther from all tasks."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(5, 20))
    gradients = centers[np.arange(30) % 5] + 0.2 * rng.normal(size=(30, 20))
    gradients += 0.5  # a direction that all share
    sizes = rng.integers(10, 100, 30)
    shares = sizes / sizes.sum()
    full = shares @ gradients
    errors = []
    for size in (1, 3, 5, 10, 20):
        selection = GradientCoreset(size=size).select(problem(gradients, sizes))
        error = selection.diagnostics["coreset_gradient_error"]
        best = nnls(gradients[positions(selection)].T, full)[1] / np.linalg.norm(full)
        drawn = []
        for _ in range(50):
            subset = rng.permutation(30)[:size]
            mixture = shares[subset] / shares[subset].sum()
            drawn.append(np.linalg.norm(mixture @ gradients[subset] - full) / np.linalg.norm(full))
        assert best <= error + 1e-9
        assert error < np.mean(drawn)
        errors.append(error)
    assert errors[2] < 0.2 * errors[0]  # one medoid for each cluster
    everything = GradientCoreset(size=30).select(problem(gradients, sizes))
    assert everything.diagnostics["coreset_gradient_error"] == pytest.approx(0, abs=1e-7)


@given(st.integers(0, 300), st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_permutation_of_the_tasks_permutes_the_answer(seed, size, random):
    gradients, sizes = random_gradients(seed)
    order = np.array(random.sample(range(8), 8))
    one = GradientCoreset(size=size).select(problem(gradients, sizes))
    other = GradientCoreset(size=size).select(problem(gradients[order], sizes[order]))
    weights = np.array([*one.weights.values()])
    assert [*other.weights.values()] == pytest.approx(weights[order])


@given(st.integers(0, 300), st.integers(1, 6))
def test_two_halves_of_a_task_share_its_weight(seed, size):
    gradients, sizes = random_gradients(seed)
    sizes = 2 * sizes
    one = GradientCoreset(size=size).select(problem(gradients, sizes))
    halves = np.append(sizes, sizes[3] // 2)
    halves[3] //= 2
    split = GradientCoreset(size=size).select(problem(np.vstack([gradients, gradients[3]]), halves))
    weights = np.array([*split.weights.values()])
    weights[3] += weights[8]
    assert weights[:8] == pytest.approx([*one.weights.values()])


@given(
    st.integers(0, 300),
    st.lists(st.sampled_from(range(8)), unique=True, max_size=3),
    st.integers(1, 4),
)
def test_kept_tasks_stay(seed, keep, min_members):
    gradients, sizes = random_gradients(seed)
    gradients[5] = gradients[2]
    names = [f"t{k}" for k in keep]
    selector = GradientCoreset(size=3, min_members=min_members)
    selection = selector.select(problem(gradients, sizes, keep=names))
    assert set(names) <= set(selection.selected)
    assert len(selection.selected) <= 3
    assert sum(selection.weights.values()) == pytest.approx(1)


def test_estimates_play_no_part():
    gradients, sizes = random_gradients(1)
    one = problem(gradients, sizes)
    worst = replace(one, estimate=lambda weights: estimate(1 - np.asarray(weights, float)))
    selector = GradientCoreset(size=3)
    assert selector.select(one).weights == selector.select(worst).weights


def test_equal_gradients_need_one_medoid():
    gradients = np.repeat(np.eye(2), [3, 2], axis=0)
    selection = GradientCoreset(size=4).select(problem(gradients))
    assert selection.weights == pytest.approx({"t0": 0.6, "t1": 0, "t2": 0, "t3": 0.4, "t4": 0})
    nothing = GradientCoreset(size=0.5).select(problem(np.zeros((4, 2))))
    assert nothing.selected == ["t0"] and nothing.diagnostics == {}


def test_isolated_tasks_are_left_out_on_demand():
    """Noise in directions of its own gets medoids of its own; they stand for no other task."""
    rng = np.random.default_rng(0)
    good = np.array([1.0] + [0] * 39) + 0.01 * rng.normal(size=(12, 40))
    noise = np.eye(40)[1:5] * 2
    asked = problem(np.vstack([good, noise]))
    plain = GradientCoreset(size=6).select(asked)
    robust = GradientCoreset(size=6, min_members=2).select(asked)
    assert set(positions(plain)) > {12, 13, 14, 15}
    assert max(positions(robust)) < 12
    alone = GradientCoreset(size=16, min_members=2).select(asked)  # where all stand alone, all stay
    assert len(alone.selected) == 16


def test_random_candidates_are_deterministic_and_nearly_as_good():
    gradients, sizes = random_gradients(2, 200, 5)
    asked = problem(gradients, sizes)
    exact = decrease(gradients, sizes, positions(GradientCoreset(size=20).select(asked)))
    for seed in range(5):
        selector = GradientCoreset(size=20, num_candidates=23, seed=seed)  # e = 0.1
        chosen = positions(selector.select(asked))
        assert chosen == positions(selector.select(asked)) and len(chosen) == 20
        assert decrease(gradients, sizes, chosen) >= 0.9 * exact
    every = GradientCoreset(size=20, num_candidates=200)
    assert every.select(asked).weights == GradientCoreset(size=20).select(asked).weights


def test_a_run_follows_it_and_reports_the_error(tmp_path):
    callback = tiny.callback(selector=GradientCoreset(size=0.5), estimator=GaussNewton())
    tiny.plain_trainer(tmp_path, callback, max_steps=6).train()
    report = callback.report
    assert len(report.selected) == 2 and set(report.scores) == {"a", "b", "c", "d"}
    assert 0 < report.diagnostics["coreset_gradient_error"] < 5
    again = SelectionReport.load(tmp_path / "_task_selection")
    assert again.diagnostics == report.diagnostics
    too_many = tiny.callback(selector=GradientCoreset(size=5), estimator=GaussNewton())
    with pytest.raises(ValueError, match="size is 5, but there are 4 tasks"):
        tiny.plain_trainer(tmp_path / "other", too_many).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must be a number of tasks or a share in \(0, 1\), got 0"),
        ({"size": 1.5}, "number of tasks or a share"),
        ({"size": True}, "number of tasks or a share"),
        ({"size": "2"}, "number of tasks or a share in .*, got '2'"),
        ({"size": 2, "min_members": 1.5}, "min_members must be an int of at least 1, got 1.5"),
        ({"size": 2, "min_members": 0}, "min_members must be an int of at least 1, got 0"),
        (
            {"size": 2, "num_candidates": 0},
            "num_candidates must be an int of at least 1, or None; got 0",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCoreset(**options)


def test_what_does_not_fit_the_problem():
    gradients, sizes = random_gradients(0)
    asked = problem(gradients, sizes)
    with pytest.raises(ValueError, match="size is 9, but there are 8 tasks"):
        GradientCoreset(size=9).select(asked)
    with pytest.raises(ValueError, match=r"gram is None.*selection_problem\(fitted, store\)"):
        GradientCoreset(size=2).select(replace(asked, gram=None))
    with pytest.raises(ValueError, match=r"gram must have shape \[8, 8\]"):
        GradientCoreset(size=2).select(replace(asked, gram=np.eye(3)))
