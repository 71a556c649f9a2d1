"""Random ensembles: which subsets, how many, intervals of scores, and where to cut."""

import itertools
from typing import ClassVar

import numpy as np
import pytest
from analytic import convex, problem_of, rugged, sizes_of
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect import RandomEnsemble
from hf_auxselect.seeds import random_permutation
from hf_auxselect.selectors import random_alternatives, random_ensemble


def make(kind, seed, num_tasks, **options):
    return problem_of(*kind(seed, num_tasks), sizes=sizes_of(seed, num_tasks), **options)


def balanced_subsets(num_tasks, size, count, seed):
    """The subsets, with every count made anew."""
    masks = np.zeros((count, num_tasks), bool)
    for number, mask in enumerate(masks):
        order = random_permutation(num_tasks, seed, "subset", number)
        before = masks[:number].astype(int)
        for _ in range(size):
            free = [k for k in order if not mask[k]]
            keys = [
                (before[:, k].sum(), (before[:, k] @ before[:, mask]).sum(), place)
                for place, k in enumerate(free)
            ]
            mask[free[min(keys)[2]]] = True
    return masks


class TestSubsets:
    @given(st.integers(1, 8), st.data(), st.integers(1, 25), st.integers(0, 5))
    def test_they_are_balanced_as_in_a_slow_version(self, num_tasks, data, count, seed):
        size = data.draw(st.integers(1, num_tasks))
        found = RandomEnsemble(num_subsets=count, subset_size=size, seed=seed).subsets(num_tasks)
        np.testing.assert_array_equal(found, balanced_subsets(num_tasks, size, count, seed))

    def test_fewer_are_the_first_of_more(self):
        more = RandomEnsemble(num_subsets=None, seed=3).subsets(6)
        assert more.shape == (6400, 6)
        fewer = RandomEnsemble(num_subsets=50, seed=3).subsets(6)
        np.testing.assert_array_equal(fewer, more[:50])


class TestStability:
    """``num_subsets=None``."""

    @staticmethod
    def asked(problem_seed=0, *, slopes=None, noise=0.0):
        calls: list[tuple[int, ...]] = []
        rng = np.random.default_rng(0)
        slopes = np.arange(10.0) if slopes is None else slopes
        problem = problem_of(
            lambda w: w @ slopes + noise * rng.normal(size=len(w)), sizes=[1] * 10, calls=calls
        )
        found = RandomEnsemble(num_subsets=None, top_k=1).select(problem)
        return found, len(calls) - 2  # the choice, for the history and for the selection

    def test_a_clear_ranking_takes_the_first_hundred(self):
        found, num_subsets = self.asked()
        assert num_subsets == 100
        assert found.selected == ["t0"]

    def test_noise_takes_more_until_scores_are_stable(self):
        found, num_subsets = self.asked(noise=1.5)
        assert 100 < num_subsets < 6400
        assert [*found.scores.values()] == pytest.approx(
            [*self.asked()[0].scores.values()], abs=0.3
        )

    def test_tasks_that_are_alike_take_no_more_than_the_limit(self, monkeypatch):
        monkeypatch.setattr(random_ensemble, "_MOST_SUBSETS", 400)
        assert self.asked(slopes=np.zeros(10), noise=1.0)[1] == 400

    @pytest.mark.parametrize("level", [0.0, 1 / 3])
    def test_where_all_estimates_are_the_same_there_is_nothing_to_rank(self, level):
        assert self.asked(slopes=np.full(10, level))[1] == 100

    def test_one_task_alone(self):
        problem = problem_of(lambda w: w.sum(1), sizes=[3])
        assert RandomEnsemble(num_subsets=None).select(problem).selected == ["t0"]


class TestIntervals:
    def test_they_hold_the_scores_over_all_subsets_nine_times_in_ten(self):
        covered, narrower = [], []
        everything = np.array(
            [[k in chosen for k in range(9)] for chosen in itertools.combinations(range(9), 4)]
        )
        for seed in range(30):
            problem = make(convex, seed, 9)
            losses = problem.estimate(everything).loss
            expected = losses @ everything / everything.sum(0)
            selector = RandomEnsemble(num_subsets=60, subset_size=4, seed=seed, top_k=1)
            found = selector.select(problem)
            subsets = selector.subsets(9)
            drawn = problem.estimate(subsets).loss
            for k, (low, high) in enumerate(found.score_intervals.values()):
                covered.append(low <= expected[k] <= high)
                own = drawn[subsets[:, k]]
                narrower.append((high - low) / (2 * 1.645 * own.std() / np.sqrt(len(own))))
        assert np.mean(covered) > 0.88
        assert np.mean(narrower) < 0.5

    def test_where_few_subsets_fit_an_additive_model_they_are_those_of_means(self):
        losses = np.array([1.0, 2.0, 4.0])
        problem = problem_of(lambda w: losses[: len(w)], sizes=[1] * 4)
        selector = RandomEnsemble(num_subsets=3, subset_size=2, top_k=1)
        found = selector.select(problem)
        subsets = selector.subsets(4)
        for k, name in enumerate(problem.task_names):
            own = losses[subsets[:, k]]
            if len(own) < 2:
                assert name not in found.score_intervals
                continue
            half = 1.645 * own.std(ddof=1) / np.sqrt(len(own))
            expected = (own.mean() - half, own.mean() + half)
            assert found.score_intervals[name] == pytest.approx(expected, abs=1e-3)

    def test_an_additive_loss_has_narrow_ones(self):
        problem = problem_of(lambda w: (w > 0) @ np.arange(6.0), sizes=[1] * 6)
        selector = RandomEnsemble(num_subsets=300, subset_size=3, top_k=1)
        found = selector.select(problem)
        for k, (name, score) in enumerate(found.scores.items()):
            low, high = found.score_intervals[name]
            expected = k + 2 / 5 * (15 - k)  # its own, and that of two of the five others
            assert low - 1e-9 <= expected <= high + 1e-9
            assert low <= score <= high < low + 0.2


class TestCrossValidation:
    @given(st.integers(0, 100), st.integers(5, 30), st.integers(0, 2))
    def test_the_number_of_tasks_is_that_of_a_slow_version(self, seed, num_subsets, num_kept):
        keep = [f"t{k}" for k in range(num_kept)]
        problem = make(rugged, seed, 6, keep=keep)
        selector = RandomEnsemble(
            num_subsets=num_subsets, subset_size=3, seed=seed, threshold="cross-validation"
        )
        subsets = selector.subsets(6)
        losses = problem.estimate(subsets).loss

        def order(rows):
            def score(k):
                own = [losses[row] for row in rows if subsets[row, k]]
                return -np.inf if k < num_kept else np.mean(own) if own else np.inf

            return sorted(range(6), key=score)

        by_size = []
        for size in range(max(1, num_kept), 7):
            tried = []
            for fold in range(5):
                rest = [row for row in range(num_subsets) if row * 5 // num_subsets != fold]
                mask = np.isin(np.arange(6), order(rest)[:size])
                tried.append(problem.estimate(mask[None]).loss[0])
            by_size.append((np.mean(tried), size))
        best = min(loss for loss, _ in by_size)
        size = next(size for loss, size in by_size if loss <= best + 1e-12)
        expected = {f"t{k}" for k in order(range(num_subsets))[:size]}
        assert set(selector.select(problem).selected) == expected

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"threshold": "cv"},
                "threshold must be a number, \"cross-validation\" or None, got 'cv'",
            ),
            (
                {"threshold": "cross-validation", "num_subsets": 4},
                "num_subsets must be at least 5 for a cross-validation, got 4",
            ),
            ({"threshold": "cross-validation", "top_k": 1}, "exclude each other"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            RandomEnsemble(**options)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"threshold": 0.0}, {"threshold": "cross-validation"}], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_alone_is_accepted_in_the_history(options, seed):
    found = RandomEnsemble(num_subsets=40, subset_size=3, **options).select(make(rugged, seed, 6))
    (step,) = [step for step in found.history if step.accepted]
    assert step.tasks == tuple(found.selected)
    assert step.loss == found.estimate.loss[0]


class TestRandomAlternatives:
    sizes: ClassVar = np.array([10, 20, 30, 40])

    def test_of_a_subset_they_are_subsets_of_as_many_tasks(self):
        subset = np.array([0, 1, 0, 1]) * self.sizes / 60
        masks, are_subsets = random_alternatives(subset, self.sizes, 5, seed=1)
        expected = RandomEnsemble(num_subsets=5, subset_size=2, seed=1).subsets(4)
        assert are_subsets and np.array_equal(masks, expected)

    def test_of_weights_they_have_the_same_weights(self):
        weights = np.array([0.7, 0.0, 0.2, 0.1])
        found, are_subsets = random_alternatives(weights, self.sizes, 20, seed=1)
        assert not are_subsets
        assert np.array_equal(np.sort(found, axis=1), np.tile(np.sort(weights), (20, 1)))
        assert len(np.unique(found, axis=0)) > 5
        assert np.array_equal(found, random_alternatives(weights, self.sizes, 20, seed=1)[0])
