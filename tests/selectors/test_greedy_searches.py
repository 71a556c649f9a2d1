"""Forward selection and backward elimination against slow versions of them."""

from typing import Any

import numpy as np
import pytest
from analytic import backward, convex, forward, loss_of, problem_of, rugged, sizes_of
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.search_regret import RECORDED, quadratic_training, stored_problem
from hf_auxselect import BackwardElimination, ForwardSelection, RandomEnsemble

SEARCHES: list[Any] = [ForwardSelection, BackwardElimination]
SLOW = {ForwardSelection: forward, BackwardElimination: backward}


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: s.__name__)
class TestGreedySearches:
    @given(
        seed=st.integers(0, 200),
        kind=st.sampled_from([convex, quadratic_training, rugged]),
        num_kept=st.integers(0, 3),
        limit=st.integers(1, 7),
        min_improvement=st.sampled_from([0.0, 0.01, 0.3]),
        lazy=st.booleans(),
    )
    def test_the_result_is_that_of_one_estimate_at_a_time(
        self, search, seed, kind, num_kept, limit, min_improvement, lazy
    ):
        loss, gradient = kind(seed, 7)
        keep = [f"t{k}" for k in range(num_kept)]
        if search is ForwardSelection:
            limit = max(limit, num_kept)
        # Only a convex loss has bounds; without a gradient a lazy search tries all.
        problem = problem_of(
            loss, gradient if kind is convex else None, sizes=sizes_of(seed, 7), keep=keep
        )
        limits = {"max_tasks" if search is ForwardSelection else "min_tasks": limit}
        limits["min_improvement"] = min_improvement
        found = search(**limits, lazy=lazy).select(problem)
        assert found.selected == SLOW[search](problem, **limits)
        assert found.estimate.loss[0] == loss_of(problem, found.selected)

    @pytest.mark.parametrize("seed", range(1, 6))
    def test_a_lazy_search_of_a_convex_loss_asks_less_and_finds_the_same(self, search, seed):
        (loss, gradient), sizes = convex(seed, 80), sizes_of(seed, 80)
        asked, asked_lazily = [], []
        full = search().select(problem_of(loss, gradient, sizes=sizes, calls=asked))
        lazy = search(lazy=True).select(problem_of(loss, gradient, sizes=sizes, calls=asked_lazily))
        assert lazy.weights == full.weights
        accepted, accepted_lazily = ([s for s in r.history if s.accepted] for r in (full, lazy))
        assert [s.tasks for s in accepted] == [s.tasks for s in accepted_lazily]
        assert len(asked_lazily) < len(asked) / (1.2 if search is ForwardSelection else 3)

    @given(st.integers(0, 200))
    def test_a_lazy_search_ends_only_where_no_change_helps_whatever_the_bounds_say(
        self, search, seed
    ):
        problem = problem_of(*rugged(seed, 7), sizes=sizes_of(seed, 7))
        found = search(lazy=True).select(problem)
        loss, chosen = found.estimate.loss[0], set(found.selected)
        for name in problem.task_names:
            changed = chosen ^ {name}
            if changed and (name in chosen) == (search is BackwardElimination):
                assert loss_of(problem, changed) >= loss

    @pytest.mark.parametrize("run", ["continue", "restart", "gauss_newton", "logistic"])
    def test_a_lazy_search_of_a_recorded_run_finds_the_same(self, search, run):
        problem = stored_problem(RECORDED / run)
        assert search(lazy=True).select(problem).weights == search().select(problem).weights

    @given(st.integers(0, 50), st.booleans())
    def test_among_equal_tasks_the_first_is_added_or_dropped(self, search, seed, lazy):
        """Tasks are in pairs of equals, also for rounding that differs between them."""
        loss, gradient = convex(seed, 4)

        def pairs(weights):
            return weights[:, ::2] + weights[:, 1::2]

        problem = problem_of(
            lambda w: loss(pairs(w)),
            lambda w: np.repeat(gradient(pairs(w)), 2, axis=1),
            sizes=[10] * 8,
        )
        found = search(lazy=lazy).select(problem)
        for first in range(0, 8, 2):
            pair = [f"t{k}" in found.selected for k in (first, first + 1)]
            assert pair[0] != pair[1] or pair in ([True, True], [False, False])
            if pair[0] != pair[1]:
                assert pair == [search is ForwardSelection, search is BackwardElimination]


def history_of(num_tasks, selector, *, slopes=None):
    slopes = np.linspace(-1, 1, num_tasks) if slopes is None else slopes
    problem = problem_of(lambda w: (w > 0) @ slopes, sizes=[1] * num_tasks)
    return selector.select(problem).history


class TestHistory:
    def test_up_to_64_tasks_it_has_every_try(self):
        assert len(history_of(64, ForwardSelection(max_tasks=3))) == 64 + 63 + 62

    def test_with_more_tasks_it_has_the_ten_best_of_each_step(self):
        history = history_of(65, ForwardSelection(max_tasks=3))
        assert [len(step.tasks) for step in history] == [1] * 10 + [2] * 10 + [3] * 10
        assert [step.tasks for step in history if step.accepted] == [
            ("t0",),
            ("t0", "t1"),
            ("t0", "t1", "t2"),
        ]
        assert {step.tasks for step in history[:10]} == {(f"t{k}",) for k in range(10)}

    def test_it_stays_short_where_tries_are_many(self):
        search = RandomEnsemble(num_subsets=6400, subset_size=19, top_k=1)
        history = history_of(38, search)
        assert sum(len(step.tasks) for step in history) <= 100_000
        assert len(history) == 3200 + 1
        assert [step.tasks for step in history if step.accepted] == [history[-1].tasks]

    def test_it_stays_short_where_subsets_are_large(self):
        num_tasks = 500
        history = history_of(num_tasks, BackwardElimination(), slopes=np.ones(num_tasks))
        assert sum(len(step.tasks) for step in history) < 110_000
        assert all(step.accepted for step in history)
        assert history[-1].tasks == ("t499",)
        lengths = [len(step.tasks) for step in history]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > 490
