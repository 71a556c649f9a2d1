"""What holds for every selector; a selector of the package needs a row in ``CASES``.

Losses are quadratic in the shares of the tasks, of seeded random numbers, so that no two subsets
have nearly the same loss unless they are meant to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from analytic import convex, sizes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_auxselect import (
    BackwardElimination,
    BeamSearch,
    ConstrainedSelection,
    Estimate,
    ExhaustiveSearch,
    FixedSelection,
    ForwardSelection,
    GradientCoreset,
    MixtureOptimization,
    RandomEnsemble,
    SelectionProblem,
    WorstGroupSelection,
)
from hf_auxselect.estimators import normalize_mixtures
from hf_auxselect.selectors import SELECTORS

NUM_TASKS = 6


@dataclass(frozen=True)
class Case:
    """One instance of a selector, and which of the properties it has."""

    selector: Any
    permutes: bool = True
    """Tasks in another order lead to the same answer. Not where positions decide what is drawn."""
    splits: bool = False
    """Two halves of a task get together what the whole task got.

    Selectors of weights must have it. A search over subsets cannot: half a task is a mixture that
    the whole one did not offer. See ``test_splitting_a_task_offers_more_subsets``.
    """
    splits_tolerance: float = 1e-6
    """Of weights, where they are the result of an iteration."""
    shifted: Callable[[Any, float], Any] = lambda selector, shift: selector
    """The selector with the losses among its options moved like the estimates."""


CASES = {
    "ForwardSelection": [
        Case(ForwardSelection()),
        Case(ForwardSelection(max_tasks=2)),
        Case(ForwardSelection(lazy=True, min_improvement=0.01)),
    ],
    "BackwardElimination": [
        Case(BackwardElimination()),
        Case(BackwardElimination(lazy=True, min_tasks=2)),
    ],
    "BeamSearch": [Case(BeamSearch()), Case(BeamSearch(width=2, max_tasks=3, swaps=False))],
    "RandomEnsemble": [
        Case(RandomEnsemble(num_subsets=None, subset_size=3, top_k=2), permutes=False),
        Case(RandomEnsemble(num_subsets=60, threshold="cross-validation"), permutes=False),
        Case(
            RandomEnsemble(num_subsets=30, threshold=3.0),
            permutes=False,
            shifted=lambda selector, shift: replace(selector, threshold=selector.threshold + shift),
        ),
    ],
    "ExhaustiveSearch": [Case(ExhaustiveSearch())],
    "MixtureOptimization": [
        Case(MixtureOptimization(starts=2), splits=True, splits_tolerance=1e-3),
        Case(MixtureOptimization(shrinkage=0, starts=2), splits=True, splits_tolerance=1e-3),
        Case(MixtureOptimization(round_to_subset=True, starts=2)),
    ],
    "ConstrainedSelection": [
        Case(
            ConstrainedSelection(ceilings={"other": 3.0}, starts=1),
            splits=True,
            splits_tolerance=1e-3,
            shifted=lambda selector, shift: replace(
                selector, ceilings={"other": selector.ceilings["other"] + shift}
            ),
        ),
        Case(
            ConstrainedSelection(ceilings={"other": 0.0}, relative_to="all tasks", starts=1),
            splits=True,
            splits_tolerance=1e-3,
        ),
    ],
    "WorstGroupSelection": [
        Case(WorstGroupSelection(starts=1), splits=True, splits_tolerance=1e-3)
    ],
    "GradientCoreset": [
        Case(GradientCoreset(size=3)),
        Case(GradientCoreset(size=2), splits=True),
    ],
    "FixedSelection": [
        Case(FixedSelection(["t0", "t3"]), splits=True),
        Case(FixedSelection({"t0": 2, "t5": 1}), splits=True),
    ],
}
PAIRS = [(name, case) for name, cases in CASES.items() for case in cases]
SEEDS = st.integers(0, 10_000)
quick = settings(max_examples=15, deadline=None)


def cases_that(holds: Callable[[Case], bool]) -> Any:
    """Parametrizes a test by the cases that have a property."""
    found = [(name, i, case) for i, (name, case) in enumerate(PAIRS) if holds(case)]
    return pytest.mark.parametrize(
        "case", [case for *_, case in found], ids=[f"{name}-{i}" for name, i, _ in found]
    )


def problem_of(
    seed: int,
    *,
    order: Sequence[int] = range(NUM_TASKS),
    shift: float = 0.0,
    keep: Sequence[str] = (),
    split: bool = False,
) -> SelectionProblem:
    """A problem with all that a selector may use.

    Args:
        seed: rules the losses of the target and of one group.
        order: the order in which the problem has the tasks.
        shift: is added to all estimates.
        keep: tasks that must be selected.
        split: the last task comes as two halves, each with half of its rows.
    """
    (loss, slope), (group_loss, group_slope) = (
        convex(seed + 20_000 * i, NUM_TASKS) for i in (0, 1)
    )
    sizes = [2 * size for size in sizes_of(seed, NUM_TASKS)]
    names = [f"t{k}" for k in range(NUM_TASKS)]
    parts = np.eye(NUM_TASKS)[list(order)]  # [tasks of the problem, tasks of the losses]
    names, sizes = [names[k] for k in order], [sizes[k] for k in order]
    if split:
        names, sizes = [*names, names[-1] + "'"], [*sizes[:-1], sizes[-1] // 2, sizes[-1] // 2]
        parts = np.vstack([parts, parts[-1]])

    def estimate(weights: Any) -> Estimate:
        shares = normalize_mixtures(weights, sizes)
        losses = loss(shares @ parts) + shift
        return Estimate(
            loss=losses,
            low=losses - 0.05,
            high=losses + 0.05,
            weights=shares,
            group_losses=group_loss(shares @ parts)[:, None] + shift,
        )

    def difference(weights: Any, reference: Any) -> Estimate:
        one, other = estimate(weights), estimate(np.asarray(reference)[None])
        losses = one.loss - other.loss
        return Estimate(
            loss=losses,
            low=losses - 0.02,
            high=losses + 0.02,
            weights=one.weights,
            group_losses=one.group_losses - other.group_losses,
        )

    def along_the_simplex(slopes: Any, weights: Any) -> Any:
        raw = slopes(normalize_mixtures(weights, sizes) @ parts) @ parts.T
        return raw - raw.mean(-1, keepdims=True)

    means = np.random.default_rng(seed).normal(size=(NUM_TASKS, 8))
    return SelectionProblem(
        estimate,
        names,
        sizes,
        difference=difference,
        gradient=lambda weights: along_the_simplex(slope, weights),
        group_gradients=lambda weights: along_the_simplex(group_slope, weights)[:, None],
        keep=keep,
        groups=["other"],
        gram=parts @ means @ means.T @ parts.T,
    )


def test_every_selector_is_here():
    assert set(CASES) == set(SELECTORS), "give each selector of the registry a row in CASES"
    assert all(type(case.selector) is SELECTORS[name] for name, case in PAIRS)


@cases_that(lambda case: True)
class TestEverySelector:
    @quick
    @given(seed=SEEDS)
    def test_weights_sum_to_one_and_something_is_selected(self, case, seed):
        problem = problem_of(seed)
        selection = case.selector.select(problem)
        assert [*selection.weights] == problem.task_names
        assert sum(selection.weights.values()) == pytest.approx(1)
        assert min(selection.weights.values()) >= 0
        assert selection.selected
        np.testing.assert_allclose(
            selection.estimate.loss, problem.estimate([[*selection.weights.values()]]).loss
        )

    @quick
    @given(seed=SEEDS, kept=st.sets(st.integers(0, NUM_TASKS - 1), max_size=3))
    def test_kept_tasks_are_selected(self, case, seed, kept):
        keep = [f"t{k}" for k in kept]
        if isinstance(case.selector, FixedSelection):
            keep = [name for name in keep if name in case.selector.tasks]
        limits = (getattr(case.selector, name, None) for name in ("max_tasks", "top_k", "size"))
        keep = keep[: next(filter(None, limits), None)]
        selection = case.selector.select(problem_of(seed, keep=keep))
        assert set(keep) <= set(selection.selected)

    @quick
    @given(seed=SEEDS)
    def test_the_same_problem_has_the_same_answer(self, case, seed):
        one, other = (case.selector.select(problem_of(seed)) for _ in range(2))
        assert one.weights == other.weights
        assert one.history == other.history
        assert one.scores == other.scores

    @quick
    @given(seed=SEEDS, shift=st.floats(-100, 100))
    def test_a_constant_added_to_all_estimates_changes_nothing(self, case, seed, shift):
        one = case.selector.select(problem_of(seed))
        other = case.shifted(case.selector, shift).select(problem_of(seed, shift=shift))
        assert other.weights == pytest.approx(one.weights, abs=1e-6)

    @pytest.mark.parametrize("level", [0.0, 1 / 3])
    def test_where_all_estimates_are_the_same_it_ends(self, case, level):
        """As in the dry run before training, which has no gradient of the loss either."""

        def estimate(weights: Any) -> Estimate:
            losses = np.full(len(np.asarray(weights)), level)
            return Estimate(loss=losses, low=losses, high=losses, group_losses=losses[:, None])

        names = [f"t{k}" for k in range(NUM_TASKS)]
        problem = SelectionProblem(
            estimate, names, [1] * NUM_TASKS, groups=["other"], gram=np.eye(NUM_TASKS)
        )
        selection = case.selector.select(problem)
        assert selection.selected
        assert sum(selection.weights.values()) == pytest.approx(1)


@cases_that(lambda case: case.permutes)
@quick
@given(seed=SEEDS, order=st.permutations(range(NUM_TASKS)))
def test_the_order_of_the_tasks_does_not_matter(case, seed, order):
    one = case.selector.select(problem_of(seed))
    other = case.selector.select(problem_of(seed, order=order))
    assert other.weights == pytest.approx(one.weights, abs=1e-6)


@cases_that(lambda case: case.splits)
@quick
@given(seed=SEEDS)
def test_the_halves_of_a_task_share_its_weight(case, seed):
    whole = case.selector.select(problem_of(seed)).weights
    halves = case.selector.select(problem_of(seed, split=True)).weights
    last = [*whole][-1]
    halves[last] += halves.pop(f"{last}'")
    assert halves == pytest.approx(whole, abs=case.splits_tolerance)


@quick
@given(seed=SEEDS)
def test_splitting_a_task_offers_more_subsets(seed):
    """The halves together are the task, so that the best of all subsets never gets worse."""
    whole = ExhaustiveSearch().select(problem_of(seed))
    halves = ExhaustiveSearch().select(problem_of(seed, split=True))
    assert halves.estimate.loss[0] <= whole.estimate.loss[0] + 1e-12


@pytest.mark.parametrize(
    "search",
    [ForwardSelection(), ForwardSelection(lazy=True), BeamSearch(swaps=False), ExhaustiveSearch()],
    ids=repr,
)
@quick
@given(seed=SEEDS)
def test_of_two_equal_halves_the_first_is_chosen_before_the_second(search, seed):
    """Of equals the first wins; backward elimination drops the first one first."""
    selected = search.select(problem_of(seed, split=True)).selected
    last = f"t{NUM_TASKS - 1}"
    assert last in selected or f"{last}'" not in selected


@quick
@given(SEEDS)
def test_equal_tasks_have_nearly_the_same_score(seed):
    problem = problem_of(seed, split=True)
    selection = RandomEnsemble(num_subsets=200, subset_size=3, top_k=1).select(problem)
    last = f"t{NUM_TASKS - 1}"
    (low, high), (other_low, other_high) = (
        selection.score_intervals[name] for name in (last, f"{last}'")
    )
    distance = abs(selection.scores[last] - selection.scores[f"{last}'"])
    assert distance <= 2 * (high - low + other_high - other_low)
