import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quadratics import Quadratic, grid, weights_of
from hf_auxselect import ConstrainedSelection, SelectionProblem, WorstGroupSelection
from hf_auxselect.selectors.saddle_point import (
    Losses,
    not_negative,
    on_simplex,
    saddle_point,
)
from hf_auxselect.selectors.shrinkage import LEAST_SHRINKAGE
from hf_auxselect.selectors.simplex import Box

PARTS = {3: 200, 4: 60, 8: 8}


def ceilings_of(quadratic, mixtures, quantile=0.3):
    """Ceilings that so many of the mixtures keep, each alone."""
    losses = quadratic.losses(mixtures)[:, 1:]
    found = np.quantile(losses, quantile, axis=0)
    return found, (losses <= found).all(1)


def constrained(ceilings, **options):
    named = {f"group {g}": float(ceiling) for g, ceiling in enumerate(ceilings)}
    return ConstrainedSelection(ceilings=named, **{"shrinkage": 0, **options})


def excess(quadratic, selection, ceilings):
    return (quadratic.losses(weights_of(selection)[None])[0, 1:] - ceilings).max()


class TestTheOptimum:
    @pytest.mark.parametrize("convex", [True, False], ids=["convex", "other"])
    @pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "measured"])
    @pytest.mark.parametrize("num_tasks", PARTS)
    def test_no_mixture_of_a_grid_within_the_ceilings_is_better(self, num_tasks, gradient, convex):
        mixtures, compared = grid(num_tasks, PARTS[num_tasks]), 0
        for seed in range(3):
            quadratic = Quadratic.random(seed, num_tasks, convex=convex, num_groups=2)
            ceilings, within = ceilings_of(quadratic, mixtures, 0.5)
            if not within.any():
                continue
            selector = constrained(ceilings, starts=4)
            selection = selector.select(quadratic.problem(gradient=gradient))
            assert excess(quadratic, selection, ceilings) <= 1.1e-4
            losses = quadratic.losses(mixtures)[:, 0]
            gap = selection.estimate.loss[0] - losses[within].min()
            assert gap <= 0.01 * np.ptp(losses)
            assert selection.notes == ()
            compared += 1
        assert compared >= 2

    def test_ceilings_that_do_not_bind_change_nothing_and_cost_nothing(self):
        quadratic = Quadratic.random(1, 4, num_groups=2)
        selection = constrained([99, 99]).select(quadratic.problem())
        best = quadratic.losses(grid(4, 60))[:, 0].min()
        assert selection.estimate.loss[0] <= best + 1e-4
        assert selection.shadow_prices == {"group 0": 0, "group 1": 0}

    def test_only_groups_with_a_ceiling_count(self):
        quadratic = Quadratic.random(1, 4, num_groups=2)
        (_, ceiling), _ = ceilings_of(quadratic, grid(4, 30))
        selection = ConstrainedSelection(ceilings={"group 1": ceiling}, shrinkage=0).select(
            quadratic.problem()
        )
        assert [*selection.shadow_prices] == ["group 1"]
        assert quadratic.losses(weights_of(selection)[None])[0, 2] <= ceiling + 1.1e-4


class TestShadowPrices:
    def test_they_are_slopes_of_the_least_loss(self):
        checked = 0
        for seed in range(4):
            quadratic = Quadratic.random(seed, 5, num_groups=2)
            ceilings, within = ceilings_of(quadratic, grid(5, 12))
            if not within.any():
                continue

            def least(change, quadratic=quadratic, ceilings=ceilings):
                selector = constrained(ceilings + change, tolerance=1e-7, starts=1)
                return selector.select(quadratic.problem())

            for g, price in enumerate(least(0).shadow_prices.values()):
                change = 1e-4 * np.eye(2)[g]
                slope = (least(change).estimate.loss[0] - least(-change).estimate.loss[0]) / 2e-4
                assert -slope == pytest.approx(price, rel=0.05, abs=1e-3)
                checked += price > 0.01
        assert checked >= 2

    def test_prices_of_an_earlier_selection_save_steps(self):
        fewer = []
        for seed in range(6):
            quadratic = Quadratic.random(seed, 6, num_groups=2)
            ceilings, within = ceilings_of(quadratic, grid(6, 8))
            if not within.any():
                continue
            prices = [*constrained(ceilings).select(quadratic.problem()).shadow_prices.values()]
            if max(prices) < 0.01:
                continue
            box = Box.of(quadratic.problem(), None)
            losses = Losses(quadratic.problem(), ceilings, (1, 2))
            cold, warm = (
                saddle_point(losses, box.shares_K[None], p, box, not_negative, tolerance=1e-4)
                for p in (np.zeros(2), np.array(prices))
            )
            fewer.append(warm.rounds[0] < cold.rounds[0] and warm.steps <= cold.steps)
        assert len(fewer) >= 3 and np.mean(fewer) >= 0.8

    def test_they_are_read_from_a_decision(self, tmp_path):
        path = tmp_path / "selection.json"
        path.write_text(json.dumps({"weights": {"a": 1}, "shadow_prices": {"group 0": 0.5}}))
        selector = ConstrainedSelection(ceilings={"group 1": 2}, initial_prices=str(path))
        assert selector.initial_prices == {"group 0": 0.5}
        quadratic = Quadratic.random(1, 3, num_groups=2)
        assert sum(selector.select(quadratic.problem()).weights.values()) == pytest.approx(1)

    def test_a_decision_without_prices_has_none_to_start_from(self, tmp_path):
        """As where no mixture kept all ceilings."""
        path = tmp_path / "selection.json"
        path.write_text(json.dumps({"weights": {"a": 1}}))
        selector = ConstrainedSelection(ceilings={"group 1": 2}, initial_prices=str(path))
        assert selector.initial_prices == {}
        path.write_text(json.dumps({"scores": {"a": 1}}))
        with pytest.raises(ValueError, match="has no 'weights'"):
            ConstrainedSelection(ceilings={"group 1": 2}, initial_prices=str(path))


class TestInfeasible:
    def test_a_cap_that_cannot_hold_is_told_too(self):
        problem = Quadratic.random(0, 3, num_groups=1).problem()
        problem = replace(problem, rows_to_read=100 * sum(problem.task_sizes))
        selector = ConstrainedSelection(ceilings={"group 0": -9}, max_repetitions=2)
        notes = selector.select(problem).notes
        assert len(notes) == 2
        assert "max_repetitions=2 cannot hold" in notes[0] and "No mixture is" in notes[1]

    def test_the_closest_mixture_is_chosen_and_named(self):
        for seed in range(4):
            quadratic = Quadratic.random(seed, 4, num_groups=2)
            mixtures = grid(4, 60)
            ceilings = quadratic.losses(mixtures)[:, 1:].min(0) - np.array([0.2, 0.1])
            selection = constrained(ceilings).select(quadratic.problem())
            closest = (quadratic.losses(mixtures)[:, 1:] - ceilings).max(1).min()
            assert excess(quadratic, selection, ceilings) <= closest + 1e-4
            assert selection.shadow_prices == {}
            assert min(w for w in selection.weights.values() if w > 0) >= 1e-6  # can be drawn
            assert "No mixture is estimated to keep all ceilings" in selection.notes[0]
            assert "'group 0'" in selection.notes[0] or "'group 1'" in selection.notes[0]


quadratics = st.builds(
    Quadratic.random,
    st.integers(0, 10_000),
    st.integers(2, 5),
    convex=st.just(True),
    num_groups=st.just(2),
)


def selectors(quadratic):
    ceilings, _ = ceilings_of(quadratic, grid(len(quadratic.sizes), 12), 0.5)
    return [
        constrained(ceilings, starts=1),
        constrained(ceilings, starts=1, shrinkage=None),
        WorstGroupSelection(starts=1),
    ]


class TestProperties:
    @settings(max_examples=4)
    @given(quadratics, st.data())
    def test_permuting_the_tasks_permutes_the_answer(self, quadratic, data):
        order = data.draw(st.permutations(range(len(quadratic.sizes))))
        for selector in selectors(quadratic):
            one = selector.select(quadratic.problem())
            other = weights_of(selector.select(quadratic.permuted(order).problem()))
            permuted = weights_of(one)[list(order)]
            losses = quadratic.permuted(order).losses(np.array([permuted, other]))
            assert losses[1] == pytest.approx(losses[0], abs=1e-2)

    @settings(max_examples=4)
    @given(quadratics, st.data())
    def test_duplicates_share_the_weight(self, quadratic, data):
        task = data.draw(st.integers(0, len(quadratic.sizes) - 1))
        first = data.draw(st.integers(1, quadratic.sizes[task] - 1))
        split = quadratic.split(task, first)
        for selector in selectors(quadratic):
            one = weights_of(selector.select(quadratic.problem()))
            both = weights_of(selector.select(split.problem()))
            both[task] += both[-1]
            losses = quadratic.losses(np.array([one, both[:-1]]))
            assert losses[1] == pytest.approx(losses[0], abs=1e-2)

    @settings(max_examples=4)
    @given(quadratics, st.data())
    def test_kept_tasks_stay_and_caps_hold(self, quadratic, data):
        names = [f"task {k}" for k in range(len(quadratic.sizes))]
        keep = data.draw(st.lists(st.sampled_from(names), unique=True))
        rows = data.draw(st.integers(1, sum(quadratic.sizes)))
        problem = quadratic.problem(keep=keep, rows_to_read=rows)
        for selector in selectors(quadratic):
            selection = replace(selector, max_repetitions=2.0).select(problem)
            assert set(keep) <= set(selection.selected)
            reads = rows * weights_of(selection) / quadratic.sizes
            assert reads.max() <= 2 + 1e-6
            assert weights_of(selection).sum() == pytest.approx(1)

    @settings(max_examples=4)
    @given(quadratics, st.floats(-1, 1))
    def test_a_constant_changes_nothing_if_ceilings_are_relative(self, quadratic, constant):
        shifted = replace(quadratic, constant=quadratic.constant + constant)
        relative = ConstrainedSelection(
            ceilings={"group 0": 0.02, "group 1": 0.0}, relative_to="all tasks", starts=1
        )
        for selector in (relative, WorstGroupSelection(starts=1)):
            one, other = (weights_of(selector.select(q.problem())) for q in (quadratic, shifted))
            losses = quadratic.losses(np.array([one, other]))
            assert losses[1] == pytest.approx(losses[0], abs=1e-3)


class TestShrinkage:
    def test_it_goes_no_farther_than_the_ceilings_allow(self):
        quadratic = Quadratic.random(1, 4, num_groups=2)
        at_all = quadratic.losses(quadratic.shares[None])[0, 1:]
        found = quadratic.losses(grid(4, 30))[:, 1:]
        ceilings = np.maximum(np.quantile(found, 0.4, axis=0), at_all - 0.05)
        ceilings[0] = at_all[0] - 0.02  # which all tasks break
        for shrinkage in (0.5, 1, None):
            selection = constrained(ceilings, shrinkage=shrinkage).select(quadratic.problem())
            assert excess(quadratic, selection, ceilings) <= 1.1e-4

    def test_noise_keeps_all_tasks_where_they_keep_the_ceilings(self):
        quadratic = replace(Quadratic.random(1, 4, num_groups=2, scale=0.1), error=np.full(4, 1.0))
        selection = constrained([99, 99], shrinkage=None).select(quadratic.problem())
        assert weights_of(selection) == pytest.approx(quadratic.shares)
        assert "all tasks were kept" in selection.notes[0]


class TestRelativeCeilings:
    def test_to_all_tasks_and_to_the_loss_before(self):
        quadratic = Quadratic.random(3, 4, num_groups=1)
        problem = quadratic.problem()
        for base, reference in (("all tasks", quadratic.shares), ("before", np.zeros(4))):
            at_base = problem.estimate(reference[None]).group_losses[0, 0]
            one = ConstrainedSelection(
                ceilings={"group 0": 0.01}, relative_to=base, shrinkage=0
            ).select(problem)
            other = constrained([at_base + 0.01]).select(problem)
            assert weights_of(one) == pytest.approx(weights_of(other), abs=1e-6)


class TestWorstGroup:
    @pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "measured"])
    @pytest.mark.parametrize("num_tasks", PARTS)
    def test_no_mixture_of_a_grid_has_a_lower_worst_loss(self, num_tasks, gradient):
        mixtures = grid(num_tasks, PARTS[num_tasks])
        for seed in range(2):
            quadratic = Quadratic.random(seed, num_tasks, num_groups=2)
            for with_target in (True, False):
                selector = WorstGroupSelection(shrinkage=0, include_target=with_target, starts=3)
                selection = selector.select(quadratic.problem(gradient=gradient))
                columns = slice(None) if with_target else slice(1, None)
                found = quadratic.losses(weights_of(selection)[None])[0, columns].max()
                worst = quadratic.losses(mixtures)[:, columns].max(1)
                assert found <= worst.min() + 0.01 * np.ptp(worst)
                prices = [*selection.shadow_prices.values()]
                assert min(prices) >= 0
                assert sum(prices) == pytest.approx(1) or with_target

    def test_it_is_shrunk_towards_all_tasks(self):
        quadratic = Quadratic.random(0, 3, num_groups=1)
        optimum, default = (
            weights_of(selector.select(quadratic.problem()))
            for selector in (WorstGroupSelection(shrinkage=0), WorstGroupSelection())
        )
        expected = (1 - LEAST_SHRINKAGE) * optimum + LEAST_SHRINKAGE * quadratic.shares
        assert default == pytest.approx(expected)

    def test_relative_to_the_losses_of_all_tasks(self):
        quadratic = Quadratic.random(5, 3, num_groups=2)
        base = quadratic.losses(quadratic.shares[None])
        selection = WorstGroupSelection(shrinkage=0, relative_to="all tasks").select(
            quadratic.problem()
        )
        found = (quadratic.losses(weights_of(selection)[None]) - base).max()
        assert found <= (quadratic.losses(grid(3, 100)) - base).max(1).min() + 1e-4
        assert found <= 0  # all tasks themselves


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_nearest_point_of_the_simplex(points):
    found = on_simplex(np.array(points))
    assert found.sum(1) == pytest.approx(1) and found.min() >= 0
    distance = ((np.array(points)[:, None] - grid(3, 20)) ** 2).sum(2).min(1)
    assert (((found - points) ** 2).sum(1) <= distance + 1e-9).all()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ceilings": {}}, "ceilings must map groups to their largest losses"),
            ({"ceilings": 2.0}, "ceilings must map groups"),
            ({"ceilings": {"a": float("nan")}}, r"ceilings\['a'\] must be a number of nats"),
            ({"ceilings": {"a": "2"}}, r"ceilings\['a'\] must be a number of nats"),
            ({"relative_to": "later"}, "relative_to must be 'before', 'all tasks' or None"),
            ({"initial_prices": {"a": -1}}, r"initial_prices\['a'\] must be 0 or more, got -1"),
            ({"initial_prices": 3}, "initial_prices must map groups to shadow prices, .*; got 3"),
            ({"initial_prices": "nowhere.json"}, "initial_prices: there is no file"),
            ({"shrinkage": 2}, "shrinkage must be in"),
            ({"starts": 0}, "starts must be"),
        ],
    )
    def test_wrong_ones(self, options, message):
        with pytest.raises(ValueError, match=message):
            ConstrainedSelection(**{"ceilings": {"a": 1}, **options})

    @pytest.mark.parametrize("options", [{"shrinkage": None}, {"relative_to": "x"}, {"starts": 0}])
    def test_wrong_ones_of_the_worst_group(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            WorstGroupSelection(**options)

    def test_an_unknown_group_and_none_at_all(self):
        problem = Quadratic.random(0, 3, num_groups=2).problem()
        with pytest.raises(
            ValueError, match=r"unknown group 'x'; known are \['group 0', 'group 1'\]"
        ):
            ConstrainedSelection(ceilings={"x": 1}).select(problem)
        with pytest.raises(ValueError, match="WorstGroupSelection needs groups"):
            WorstGroupSelection().select(Quadratic.random(0, 3).problem())

    def test_estimates_without_losses_of_groups(self):
        quadratic = Quadratic.random(0, 3)
        problem = SelectionProblem(
            quadratic.estimate, ["a", "b", "c"], quadratic.sizes, groups=["g"]
        )
        with pytest.raises(ValueError, match=r"no losses of the groups \['g'\]"):
            WorstGroupSelection().select(problem)
