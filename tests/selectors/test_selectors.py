import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect import (
    BackwardElimination,
    BeamSearch,
    ConstrainedSelection,
    ExhaustiveSearch,
    FixedSelection,
    ForwardSelection,
    GradientCoreset,
    MixtureOptimization,
    RandomEnsemble,
    WorstGroupSelection,
)
from hf_auxselect.estimators import Estimate
from hf_auxselect.selectors import SELECTORS, AbstractSelector, Selection, SelectionProblem

NAMES = ["a", "b", "c", "d", "e"]


def problem(estimate, *, task_names=NAMES, task_sizes=None, keep=()):
    """What a selector sees; the tasks are of one size unless told otherwise."""
    sizes = [10] * len(task_names) if task_sizes is None else task_sizes
    return SelectionProblem(estimate, task_names, sizes, keep=keep)


def estimate_of(function):
    """An estimate callable from a function of a subset (a tuple of positions)."""

    def estimate(weights):
        masks = np.asarray(weights) > 0
        loss = np.array([float(function(tuple(np.flatnonzero(mask)))) for mask in masks])
        return Estimate(loss=loss, low=loss - 0.1, high=loss + 0.1)

    return estimate


def additive(values):
    return estimate_of(lambda subset: 1 + sum(values[k] for k in subset))


def table(seed, num_tasks=5):
    """A loss for every subset, without structure."""
    rng = np.random.default_rng(seed)
    losses = {
        subset: rng.random()
        for size in range(num_tasks + 1)
        for subset in itertools.combinations(range(num_tasks), size)
    }
    return losses, estimate_of(losses.__getitem__)


ALL = [
    ForwardSelection(),
    BackwardElimination(),
    BeamSearch(),
    RandomEnsemble(num_subsets=40, subset_size=2),
    ExhaustiveSearch(),
]


@pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
class TestEverySearch:
    @given(st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-3), min_size=5, max_size=5))
    def test_tasks_that_each_help_alone_are_found(self, selector, values):
        values = np.array(values)
        selection = selector.select(problem(additive(values)))
        best = values[values < 0].sum() if (values < 0).any() else values.min()
        found = sum(values[NAMES.index(name)] for name in selection.selected)
        assert selection.estimate.loss[0] == pytest.approx(1 + found)
        if not isinstance(selector, RandomEnsemble):  # whose scores mix in the other tasks
            assert found == pytest.approx(best)

    @given(st.integers(0, 30), st.lists(st.sampled_from(NAMES), max_size=5, unique=True))
    def test_kept_tasks_stay_and_weights_sum_to_one(self, selector, seed, keep):
        selection = selector.select(problem(table(seed)[1], keep=keep))
        assert set(keep) <= set(selection.selected)
        assert list(selection.weights) == NAMES
        assert sum(selection.weights.values()) == pytest.approx(1)

    def test_an_unknown_kept_task_is_named(self, selector):
        with pytest.raises(ValueError, match="keep names the unknown task 'x'; known are"):
            selector.select(problem(additive(np.ones(5)), keep=["x"]))

    def test_weights_are_as_the_estimator_understood_them(self, selector):
        def estimate(weights):
            shares = np.asarray(weights) * np.array([1, 2, 3, 4, 5])
            loss = shares.sum(1).astype(float)
            totals = np.maximum(shares.sum(1, keepdims=True), 1)
            return Estimate(loss=loss, low=loss, high=loss, weights=shares / totals)

        selection = selector.select(problem(estimate, keep=["b", "c"]))
        assert selection.weights["b"] == pytest.approx(2 / 5)
        assert selection.weights["c"] == pytest.approx(3 / 5)

    def test_a_subset_is_weighted_by_its_sizes_if_the_estimator_has_no_weights(self, selector):
        sizes = [10, 20, 30, 40, 50]
        asked = problem(additive([1, -1, 1, 1, -1]), task_sizes=sizes, keep=["b", "e"])
        weights = selector.select(asked).weights
        chosen = np.array([weights[name] > 0 for name in NAMES])
        assert [*weights.values()] == pytest.approx(chosen * sizes / (chosen @ sizes))

    def test_it_is_deterministic(self, selector):
        one, other = (selector.select(problem(table(3)[1])) for _ in range(2))
        assert one.weights == other.weights
        assert one.history == other.history

    def test_an_estimate_that_is_nan_is_refused(self, selector):
        estimate = estimate_of(lambda subset: np.nan if 0 in subset else 1 - len(subset))
        with pytest.raises(ValueError, match=r"tasks \['a'.*\] is NaN\. Leave out .* another"):
            selector.select(problem(estimate))

    def test_it_sees_nothing_but_the_problem(self, selector):
        """The further fields of a problem do not change a search that has no use for them."""
        estimate = table(4)[1]
        full = SelectionProblem(
            estimate,
            NAMES,
            [10] * 5,
            difference=lambda weights, reference: estimate(weights),
            gradient=np.zeros_like,
            groups=["other"],
            gram=np.eye(5),
        )
        selection = selector.select(full)
        assert selection.weights == selector.select(problem(estimate)).weights
        assert selection.shadow_prices == {}


class TestSelectionProblem:
    @pytest.mark.parametrize(
        ("names", "sizes", "keep", "message"),
        [
            ([], [], (), "task_names is empty"),
            (["a", "b", "a"], [1, 2, 3], (), "task_names has 'a' more than once"),
            (["a", "b"], [1], (), "one number of rows for each of the 2 tasks, got 1"),
            (["a", "b"], [1, 2], ["c"], r"keep names the unknown task 'c'; known are \['a', 'b'\]"),
        ],
    )
    def test_what_does_not_fit_is_named(self, names, sizes, keep, message):
        with pytest.raises(ValueError, match=message):
            SelectionProblem(additive([]), names, sizes, keep=keep)

    def test_kept_tasks_are_a_mask(self):
        kept = problem(additive(np.ones(5)), keep=["e", "b"]).kept
        assert kept.tolist() == [False, True, False, False, True]


class TestOwnSelectors:
    """Selectors that a user writes."""

    def test_one_that_takes_the_problem(self):
        class First(AbstractSelector):
            def select(self, problem):
                return Selection(weights={problem.task_names[0]: 1.0})

        assert First().select(problem(additive(np.ones(5)))).selected == ["a"]

    def test_one_with_the_earlier_signature_says_what_to_change(self):
        with pytest.raises(TypeError, match=r"Old\.select.*Define select\(self, problem\)"):

            class Old(AbstractSelector):
                def select(self, estimate, task_names, *, keep=()):
                    return Selection(weights={})


class TestExhaustiveSearch:
    @given(st.integers(0, 50))
    def test_it_finds_the_best_of_all_subsets(self, seed):
        losses, estimate = table(seed)
        best = min((loss, subset) for subset, loss in losses.items() if subset)[1]
        assert ExhaustiveSearch().select(problem(estimate)).selected == [NAMES[k] for k in best]

    def test_too_many_tasks(self):
        with pytest.raises(ValueError, match="at most 20 tasks, got 21"):
            names = [str(k) for k in range(21)]
            ExhaustiveSearch().select(problem(additive(np.ones(21)), task_names=names))


class TestForwardSelection:
    def test_the_best_comes_first_not_the_first_index(self):
        # After b nothing helps; a pass in index order would have taken a first and kept it.
        losses = {(1,): 0.5, (0,): 0.9, (0, 1): 0.8}
        estimate = estimate_of(lambda subset: losses.get(subset, 2.0))
        selection = ForwardSelection().select(problem(estimate))
        assert selection.selected == ["b"]
        accepted = [step.tasks for step in selection.history if step.accepted]
        assert accepted == [("b",)]
        assert len(selection.history) == 5 + 4

    def test_ties_go_to_the_first_task(self):
        estimate = estimate_of(lambda subset: 1.0)
        assert ForwardSelection().select(problem(estimate)).selected == ["a"]

    def test_limits(self):
        estimate = additive([-0.4, -0.3, -0.2, -0.1, -0.01])
        assert ForwardSelection(max_tasks=2).select(problem(estimate)).selected == ["a", "b"]
        fussy = ForwardSelection(min_improvement=0.15)
        assert fussy.select(problem(estimate)).selected == ["a", "b", "c"]
        with pytest.raises(
            ValueError, match="max_tasks must be an int of at least 1, or None; got 0"
        ):
            ForwardSelection(max_tasks=0)

    @pytest.mark.parametrize("kind", [ForwardSelection, BackwardElimination])
    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (1.5, "tasks"),
            (True, "tasks"),
            ("2", "tasks"),
            ("0", "improvement"),
            (np.nan, "improve"),
        ],
    )
    def test_options_that_are_no_numbers(self, kind, value, name):
        option = next(field.name for field in fields(kind) if name in field.name)
        with pytest.raises(ValueError, match=f"{option} must be .*got {value!r}"):
            kind(**{option: value})


@pytest.mark.parametrize(
    ("selector", "option"),
    [
        (ForwardSelection(max_tasks=2), "max_tasks"),
        (BeamSearch(max_tasks=2), "max_tasks"),
        (RandomEnsemble(top_k=2), "top_k"),
        (GradientCoreset(size=2), "size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_more_kept_tasks_than_an_option_allows_are_refused(selector, option):
    asked = replace(problem(additive(np.ones(5)), keep=["a", "c", "d"]), gram=np.eye(5))
    message = rf"{option} allows 2 tasks, but keep=\['a', 'c', 'd'\] asks for 3; raise {option}, or"
    with pytest.raises(ValueError, match=message):
        selector.select(asked)
    assert selector.select(replace(asked, keep=["c", "d"])).selected == ["c", "d"]


class TestBackwardElimination:
    def test_it_stops_when_dropping_does_not_help(self):
        estimate = additive([-0.4, 0.3, -0.2, 0.1, 0.01])
        assert BackwardElimination().select(problem(estimate)).selected == ["a", "c"]
        fussy = BackwardElimination(min_improvement=0.2)
        assert fussy.select(problem(estimate)).selected == ["a", "c", "d", "e"]
        assert len(BackwardElimination(min_tasks=4).select(problem(estimate)).selected) == 4
        with pytest.raises(ValueError, match="min_tasks must be an int of at least 1"):
            BackwardElimination(min_tasks=0)


class TestRandomEnsemble:
    def test_scores_are_means_over_the_subsets_that_hold_a_task(self):
        losses, estimate = table(0)
        selector = RandomEnsemble(num_subsets=30, subset_size=2, seed=5)
        subsets = selector.subsets(5)
        scores = selector.select(problem(estimate)).scores
        for k, name in enumerate(NAMES):
            of_task = [losses[tuple(np.flatnonzero(mask))] for mask in subsets if mask[k]]
            assert scores[name] == pytest.approx(np.mean(of_task))

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
    def test_subsets_have_their_size_and_hold_tasks_evenly(self, size, num_tasks, count, seed):
        selector = RandomEnsemble(num_subsets=count, subset_size=size, seed=seed)
        if size > num_tasks:
            with pytest.raises(
                ValueError, match=f"subset_size is {size}, but there are {num_tasks}"
            ):
                selector.subsets(num_tasks)
            return
        subsets = selector.subsets(num_tasks)
        assert subsets.shape == (count, num_tasks)
        assert (subsets.sum(1) == size).all()
        assert np.ptp(subsets.sum(0)) <= 2

    def test_a_share_is_rounded_to_tasks(self):
        assert RandomEnsemble(num_subsets=1, subset_size=0.35).subsets(20).sum() == 7

    def test_threshold_and_top_k(self):
        estimate = additive([-0.4, 0.3, -0.2, 0.1, 0.01])
        best = RandomEnsemble(num_subsets=40, subset_size=2, top_k=3).select(problem(estimate))
        assert best.selected == ["a", "c", "e"]
        limit = sorted(best.scores.values())[1]
        at_most = RandomEnsemble(num_subsets=40, subset_size=2, threshold=limit)
        assert at_most.select(problem(estimate)).selected == ["a", "c"]
        none = RandomEnsemble(num_subsets=40, subset_size=2, threshold=-9)
        assert none.select(problem(estimate)).selected == ["a"]
        assert none.select(problem(estimate, keep=["b", "d"])).selected == ["b", "d"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_subsets": 0}, "num_subsets must be an int of at least 1"),
            ({"subset_size": 0}, "number of tasks or a share"),
            ({"subset_size": 1.5}, "number of tasks or a share"),
            ({"top_k": 1, "threshold": 1.0}, "exclude each other"),
            ({"top_k": 0}, "top_k must be an int of at least 1"),
            ({"top_k": "3"}, "top_k must be an int of at least 1, or None; got '3'"),
            ({"num_subsets": 10.5}, "num_subsets must be an int of at least 1, or None; got 10.5"),
            ({"subset_size": True}, "number of tasks or a share in .*, got True"),
            ({"threshold": float("nan")}, "threshold must be a number, .* or None, got nan"),
            ({"threshold": True}, "threshold must be a number, .* or None, got True"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            RandomEnsemble(**options)


class TestFixedSelection:
    def test_a_subset_and_a_mixture(self):
        estimate = additive(np.ones(5))
        subset = FixedSelection(["c", "a"]).select(problem(estimate))
        assert subset.selected == ["a", "c"]
        assert subset.estimate.loss[0] == 3
        mixture = FixedSelection({"a": 3, "e": 1}).select(problem(estimate))
        assert mixture.weights == {"a": 0.75, "b": 0, "c": 0, "d": 0, "e": 0.25}

    @pytest.mark.parametrize("tasks", [["a"], {"a": 1}, {"a": 1, "b": 0}])
    def test_it_must_have_the_kept_tasks(self, tasks):
        asked = problem(additive(np.ones(5)), keep=["a", "b"])
        with pytest.raises(ValueError, match=r"FixedSelection leaves out \['b'\], which keep asks"):
            FixedSelection(tasks).select(asked)

    def test_it_may_do_without_an_estimate(self):
        def never(weights):
            raise AssertionError

        selection = FixedSelection(["b"], estimate=False).select(problem(never))
        assert selection.selected == ["b"]
        assert selection.estimate is None

    def test_without_an_estimate_the_rows_of_a_subset_are_pooled(self):
        sizes = [10, 20, 30, 40, 50]
        subset = FixedSelection(["b", "e"], estimate=False)
        weights = subset.select(problem(None, task_sizes=sizes)).weights
        assert weights == pytest.approx({"a": 0, "b": 2 / 7, "c": 0, "d": 0, "e": 5 / 7})
        mixture = FixedSelection({"b": 1, "e": 1}, estimate=False)
        assert mixture.select(problem(None, task_sizes=sizes)).weights["b"] == 0.5

    @pytest.mark.parametrize(
        ("tasks", "keep", "error", "message"),
        [
            (["x"], (), ValueError, "FixedSelection names the unknown task 'x'"),
            (["a"], ["b"], ValueError, r"leaves out \['b'\], which keep asks for"),
            ([], (), ValueError, "tasks is empty"),
            ("abc", (), TypeError, "got the string 'abc'"),
            ({"a": 0}, (), ValueError, "not all 0"),
            ({"a": -1, "b": 2}, (), ValueError, "not negative"),
        ],
    )
    def test_bad_input(self, tasks, keep, error, message):
        with pytest.raises(error, match=message):
            FixedSelection(tasks).select(problem(additive(np.ones(5)), keep=keep))


class TestFixedSelectionFromFile:
    def test_it_follows_the_weights(self, tmp_path):
        path = tmp_path / "decision.json"
        # The run that follows need not have the dropped task x.
        path.write_text('{"weights": {"c": 1, "a": 3.0, "x": 0}, "after": "continue"}')
        selector = FixedSelection.from_file(path, estimate=False)
        assert selector == FixedSelection({"c": 1, "a": 3.0}, estimate=False)
        weights = selector.select(problem(additive(np.ones(5)))).weights
        assert weights == {"a": 0.75, "b": 0, "c": 0.25, "d": 0, "e": 0}

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("", "damaged"),
            ("[]", "damaged (it is [], expected an object)"),
            ('{"selected": ["a"]}', "has no 'weights'"),
            ('{"weights": {"a": "1"}}', "expected float"),
            ('{"weights": {"a": NaN}}', "expected a finite number"),
            ('{"weights": {"a": true}}', "expected float"),
            ('{"weights": {"a": 2, "b": -1}}', "the weight of 'b' is negative"),
            ('{"weights": {"a": 0}}', "no task has a positive weight"),
            ('{"weights": {}}', "no task has a positive weight"),
            ("[" * 100_000, "damaged"),
        ],
    )
    def test_what_is_no_decision(self, content, reason, tmp_path):
        path = tmp_path / "decision.json"
        path.write_text(content)
        with pytest.raises(ValueError) as raised:
            FixedSelection.from_file(path)
        assert reason in str(raised.value) and str(path) in str(raised.value)

    def test_there_is_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no decision file"):
            FixedSelection.from_file(tmp_path / "decision.json")


def test_all_selectors_are_known_by_name():
    others = [FixedSelection(["a"]), MixtureOptimization(), WorstGroupSelection()]
    others.append(ConstrainedSelection(ceilings={"a": 1}))
    others.append(GradientCoreset(size=1))
    assert set(SELECTORS) == {type(s).__name__ for s in [*ALL, *others]}
