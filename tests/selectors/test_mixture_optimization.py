from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quadratics import Quadratic, grid, weights_of
from hf_auxselect import Estimate, MixtureOptimization, SelectionProblem
from hf_auxselect.selectors.shrinkage import FRACTIONS, LEAST_SHRINKAGE
from hf_auxselect.selectors.simplex import KEPT_SHARE, Box

OPTIMUM = MixtureOptimization(shrinkage=0)
PARTS = {2: 2000, 3: 200, 4: 60, 5: 36}


class TestTheOptimum:
    @pytest.mark.parametrize("convex", [True, False], ids=["convex", "other"])
    @pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "measured"])
    @pytest.mark.parametrize("num_tasks", PARTS)
    def test_no_mixture_of_a_fine_grid_is_better(self, num_tasks, gradient, convex):
        mixtures = grid(num_tasks, PARTS[num_tasks])
        for seed in range(6):
            quadratic = Quadratic.random(seed, num_tasks, convex=convex)
            selection = OPTIMUM.select(quadratic.problem(gradient=gradient))
            assert selection.estimate.loss[0] <= quadratic.losses(mixtures)[:, 0].min() + 1e-4

    def test_gradient_and_measured_slopes_agree(self):
        for seed in range(10):
            quadratic = Quadratic.random(seed, 6)
            one, other = (OPTIMUM.select(quadratic.problem(gradient=g)) for g in (True, False))
            assert one.estimate.loss[0] == pytest.approx(other.estimate.loss[0], abs=2e-5)
            assert one.scores == pytest.approx(other.scores, abs=1e-6)

    def test_scores_are_slopes_from_all_tasks(self):
        quadratic = Quadratic.random(2, 4)
        scores = [*OPTIMUM.select(quadratic.problem()).scores.values()]
        for k, score in enumerate(scores):
            there = quadratic.shares + 1e-6 * (np.eye(4)[k] - quadratic.shares)
            loss = quadratic.losses(np.array([quadratic.shares, there]))[:, 0]
            assert score == pytest.approx((loss[1] - loss[0]) / 1e-6, abs=1e-4)

    def test_it_is_the_same_for_many_tasks_from_any_start(self):
        quadratic = Quadratic.random(1, 200)
        losses = [
            MixtureOptimization(shrinkage=0, starts=n).select(quadratic.problem()).estimate.loss[0]
            for n in (1, 5)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)


quadratics = st.builds(
    Quadratic.random, st.integers(0, 10_000), st.integers(2, 6), convex=st.just(True)
)


class TestProperties:
    @settings(max_examples=15)
    @given(quadratics, st.data())
    def test_permuting_the_tasks_permutes_the_answer(self, quadratic, data):
        order = data.draw(st.permutations(range(len(quadratic.sizes))))
        for selector in (MixtureOptimization(), OPTIMUM, MixtureOptimization(round_to_subset=True)):
            one = weights_of(selector.select(quadratic.problem()))
            other = weights_of(selector.select(quadratic.permuted(order).problem()))
            assert other == pytest.approx(one[list(order)], abs=1e-3)

    @settings(max_examples=15)
    @given(quadratics, st.data())
    def test_duplicates_share_the_weight(self, quadratic, data):
        task = data.draw(st.integers(0, len(quadratic.sizes) - 1))
        first = data.draw(st.integers(1, quadratic.sizes[task] - 1))
        for selector in (MixtureOptimization(shrinkage=0.3), OPTIMUM):
            one = weights_of(selector.select(quadratic.problem()))
            both = weights_of(selector.select(quadratic.split(task, first).problem()))
            both[task] += both[-1]
            assert both[:-1] == pytest.approx(one, abs=5e-3)

    @settings(max_examples=15)
    @given(quadratics, st.floats(-3, 3))
    def test_a_constant_changes_nothing(self, quadratic, constant):
        shifted = replace(quadratic, constant=quadratic.constant + constant)
        for gradient in (True, False):
            one, other = (
                MixtureOptimization().select(q.problem(gradient=gradient))
                for q in (quadratic, shifted)
            )
            assert weights_of(other) == pytest.approx(weights_of(one), abs=1e-3)

    @settings(max_examples=15)
    @given(quadratics, st.data())
    def test_kept_tasks_have_half_their_share_and_caps_hold(self, quadratic, data):
        num_tasks = len(quadratic.sizes)
        names = [f"task {k}" for k in range(num_tasks)]
        keep = data.draw(st.lists(st.sampled_from(names), unique=True))
        most, rows = data.draw(st.floats(1, 8)), data.draw(st.integers(1, 300))
        problem = quadratic.problem(keep=keep, rows_to_read=rows)
        for options in ({"shrinkage": 0}, {}, {"round_to_subset": True}):
            selector = MixtureOptimization(max_repetitions=most, **options)
            weights = weights_of(selector.select(problem))
            assert weights.sum() == pytest.approx(1)
            for k, name in enumerate(names):
                if name in keep:
                    assert weights[k] >= KEPT_SHARE * quadratic.shares[k] - 1e-9
            least = rows / sum(quadratic.sizes)  # what reading all alike takes
            reads = rows * weights / quadratic.sizes
            assert (reads <= max(most, least) + 1e-6).all()

    def test_it_is_deterministic(self):
        problem = Quadratic.random(3, 5, convex=False).problem()
        one, other = (MixtureOptimization().select(problem) for _ in range(2))
        assert one.weights == other.weights and one.history == other.history


class TestShrinkage:
    def test_a_share_goes_back_so_far(self):
        quadratic = Quadratic.random(4, 4)
        optimum = weights_of(OPTIMUM.select(quadratic.problem()))
        for share in (0.25, 1):
            found = MixtureOptimization(shrinkage=share).select(quadratic.problem())
            expected = (1 - share) * optimum + share * quadratic.shares
            assert weights_of(found) == pytest.approx(expected)

    def test_the_default_takes_the_largest_lower_gain_on_the_ways(self):
        """Against a slow version of the rule, for two tasks, where the ways are a line."""
        for seed in range(8):
            quadratic = Quadratic.random(seed, 2)
            quadratic = replace(quadratic, error=np.array([0.2, 0.1]))
            problem = quadratic.problem()
            found = weights_of(MixtureOptimization().select(problem))
            optimum = weights_of(OPTIMUM.select(problem))
            best, lowest = quadratic.shares, 0.0
            for end in (optimum, *np.eye(2)):
                for fraction in FRACTIONS:
                    w = quadratic.shares + fraction * (end - quadratic.shares)
                    gain = problem.difference(w[None], quadratic.shares)
                    upper = gain.loss[0] + 0.25 * (gain.high[0] - gain.loss[0])
                    if upper < lowest - 1e-9:
                        best, lowest = w, upper
            assert found == pytest.approx(best, abs=2e-3)

    def test_noise_alone_keeps_all_tasks(self):
        """Tasks that do not differ, seen through errors that the intervals know of."""
        kept, size = 0, 40
        for seed in range(size):
            noise = np.random.default_rng(seed).normal(size=(1, 12))
            quadratic = Quadratic(np.zeros((1, 12, 12)), 0.1 * noise, sizes=(20,) * 12)
            quadratic = replace(quadratic, error=np.full(12, 0.1))
            selection = MixtureOptimization(risk_aversion=1.75).select(quadratic.problem())
            is_all = np.allclose(weights_of(selection), quadratic.shares)
            assert is_all == ("all tasks were kept" in " ".join(selection.notes))
            kept += is_all
        assert kept >= 0.9 * size

    def test_no_single_task_ever_takes_all(self):
        for seed in range(20):
            noise = np.random.default_rng(seed).normal(size=(1, 6))
            quadratic = Quadratic(np.zeros((1, 6, 6)), noise, sizes=(20,) * 6)
            for error in (0.0, 0.3):
                quadratic = replace(quadratic, error=np.full(6, error))
                weights = weights_of(MixtureOptimization().select(quadratic.problem()))
                assert weights.max() <= 1 - LEAST_SHRINKAGE * (1 - 1 / 6) + 1e-9
                assert (weights > 0).all()

    def test_a_clear_gain_is_taken(self):
        quadratic = Quadratic.random(4, 4)
        quadratic = replace(quadratic, error=np.full(4, 1e-6))
        selection = MixtureOptimization().select(quadratic.problem())
        gain = quadratic.losses(quadratic.shares[None])[0, 0] - selection.estimate.loss[0]
        optimum = OPTIMUM.select(quadratic.problem()).estimate.loss[0]
        assert gain >= 0.85 * (quadratic.losses(quadratic.shares[None])[0, 0] - optimum)

    def test_more_risk_aversion_goes_less_far_from_all_tasks(self):
        quadratic = replace(Quadratic.random(4, 4), error=np.full(4, 0.1))
        distances = []
        for risk_aversion in (0, 0.5, 1, 2, 100):
            selector = MixtureOptimization(risk_aversion=risk_aversion)
            selection = selector.select(quadratic.problem())
            distances.append(np.abs(weights_of(selection) - quadratic.shares).sum())
            is_kept = np.allclose(weights_of(selection), quadratic.shares)
            assert is_kept == any("No significant difference" in note for note in selection.notes)
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.5
        assert distances[-1] == 0

    def test_without_differences_the_intervals_of_the_losses_count(self):
        quadratic = replace(Quadratic.random(4, 3, scale=0.1), error=np.full(3, 0.3))
        bare = SelectionProblem(quadratic.estimate, ["a", "b", "c"], quadratic.sizes)
        selection = MixtureOptimization().select(bare)
        assert weights_of(selection) == pytest.approx(quadratic.shares)


class TestRounding:
    def test_the_best_subset_in_the_order_of_the_optimum(self):
        quadratic = Quadratic.random(7, 5)
        problem = quadratic.problem(keep=["task 3"])
        optimum = weights_of(OPTIMUM.select(problem))
        order = np.argsort(-optimum / quadratic.shares)
        order = [3, *(k for k in order if k != 3)]
        masks = [np.isin(np.arange(5), order[:n]) for n in range(1, 6)]
        losses = problem.estimate(np.array(masks)).loss
        selection = MixtureOptimization(shrinkage=0, round_to_subset=True).select(problem)
        expected = masks[int(np.argmin(losses))] * quadratic.shares
        assert weights_of(selection) == pytest.approx(expected / expected.sum())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_repetitions": 0}, "max_repetitions must be a positive number or None, got 0"),
            ({"max_repetitions": float("nan")}, "max_repetitions must be a positive"),
            ({"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\] or None, got 1.5"),
            ({"shrinkage": True}, "shrinkage must be in"),
            ({"risk_aversion": -1}, "risk_aversion must be 0 or more, got -1"),
            ({"starts": 0}, "starts must be a number of starts, 1 or more, got 0"),
            ({"tolerance": 0}, "tolerance must be positive"),
            ({"tolerance": "0.1"}, "tolerance must be positive .*, got '0.1'"),
            ({"shrinkage": "0.1"}, "shrinkage must be in .* or None, got '0.1'"),
            ({"risk_aversion": float("nan")}, "risk_aversion must be 0 or more, got nan"),
            (
                {"max_repetitions": "4"},
                "max_repetitions must be a positive number or None, got '4'",
            ),
        ],
    )
    def test_wrong_ones(self, options, message):
        with pytest.raises(ValueError, match=message):
            MixtureOptimization(**options)

    def test_a_cap_needs_the_rows_to_read(self):
        with pytest.raises(ValueError, match="max_repetitions needs the number of rows"):
            MixtureOptimization(max_repetitions=2).select(Quadratic.random(0, 3).problem())

    def test_a_cap_that_cannot_hold_keeps_all_tasks_and_says_so(self):
        quadratic = Quadratic.random(0, 3)
        problem = quadratic.problem(rows_to_read=4 * sum(quadratic.sizes))
        selection = MixtureOptimization(max_repetitions=2, shrinkage=0).select(problem)
        assert weights_of(selection) == pytest.approx(quadratic.shares)
        assert "max_repetitions=2 cannot hold" in selection.notes[0]
        assert "reads each row 4.0 times" in selection.notes[0]

    def test_an_estimate_that_is_nan_is_refused(self):
        def estimate(weights):
            loss = np.where(np.asarray(weights)[:, 0] > 0.5, np.nan, 1.0)
            return Estimate(loss=loss, low=loss, high=loss)

        with pytest.raises(ValueError, match=r"estimate for the tasks \['a'\] is NaN"):
            MixtureOptimization().select(SelectionProblem(estimate, ["a", "b"], [1, 1]))


def test_weights_too_small_to_draw_become_zero():
    quadratic = Quadratic.random(3, 4)
    box = Box.of(quadratic.problem(keep=["task 1"]), None)
    found = box.drawable(np.array([0.5, 0.3, 0.2 - 1e-7, 1e-7]))
    assert found[3] == 0 and found.sum() == pytest.approx(1)
    assert found[:3] == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)
    one = np.array([0.5, 0.3, 0.2, 0.0])
    assert box.drawable(one) is one


def test_a_search_ends_at_a_kink_where_no_gap_becomes_small() -> None:
    rng = np.random.default_rng(0)
    a_RK = rng.normal(size=(8, 40))
    asked = []

    def estimate(weights_MK: np.ndarray) -> Estimate:
        loss_M = np.abs(weights_MK @ a_RK.T - 0.05).sum(1)
        return Estimate(loss=loss_M, low=loss_M - 0.01, high=loss_M + 0.01)

    def gradient(weights_MK: np.ndarray) -> np.ndarray:
        asked.append(len(weights_MK))
        return np.sign(weights_MK @ a_RK.T - 0.05) @ a_RK

    names = [f"task {k}" for k in range(40)]
    problem = SelectionProblem(estimate, names, [1] * 40, gradient=gradient)
    chosen = MixtureOptimization(shrinkage=0.0, starts=1).select(problem)
    assert chosen.estimate is not None
    assert chosen.estimate.loss[0] < estimate(np.full((1, 40), 1 / 40)).loss[0]
    assert sum(asked) < 250
