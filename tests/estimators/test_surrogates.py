import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    log_posterior,
    matern,
    random_store,
    rebuilt,
    ridge_on_roots,
    solve_kernel_ridge,
)

from hf_auxselect import (
    Estimate,
    FittedEstimator,
    ForwardSelection,
    GaussNewton,
    GradExLogistic,
    KernelSurrogate,
    LinearizedTraining,
    RidgeSurrogate,
    SelectionProblem,
)
from hf_auxselect.estimators import AbstractEstimator, kernels, normalize_mixtures

both = pytest.mark.parametrize("kind", [RidgeSurrogate, KernelSurrogate])


def subsets_of(num_tasks, count, seed=0):
    """Different random subsets, none of them empty."""
    return RidgeSurrogate(num_subsets=count, seed=seed).subsets(num_tasks)


def runs(count, num_tasks, *, noise=0.1, seed=0):
    """Random mixtures, and losses that depend on them in no simple way."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(num_tasks), count)
    losses = 2 + np.sin(4 * shares @ rng.normal(size=num_tasks)) + noise * rng.normal(size=count)
    return shares, losses


def sorted_runs(count, *, seed=0):
    """Runs of 3 tasks in the order in which a surrogate keeps them."""
    shares, losses = runs(count, 3, seed=seed)
    order = np.lexsort(np.round(shares, 9).T[::-1])
    return shares[order], losses[order]


def scaled_kernel(fitted, one, other):
    """The kernel that a surrogate has chosen, between shares, in units of its matrix's trace."""
    kernel, gram = fitted._regression._kernel, fitted._regression._gram
    return kernel(np.sqrt(one), np.sqrt(other)) / gram.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known(AbstractEstimator):
    """Knows the loss as a function of the shares, with an interval of a fixed width."""

    scalars = ("margin",)
    function: object = None
    half_width: float = 0.0

    def fit(self, store):
        return FittedKnown(self, store.task_sizes)


class FittedKnown(FittedEstimator):
    def __init__(self, options, task_sizes):
        self._options, self._task_sizes = options, task_sizes

    def estimate(self, weights):
        shares = normalize_mixtures(weights, self._task_sizes)
        loss, half = self._options.function(shares), self._options.half_width
        return Estimate(loss=loss, low=loss - half, high=loss + half, weights=shares)

    def diagnostics(self):
        return {"known_nats": 1.0}


class TestTheRegression:
    @given(
        seed=st.integers(0, 50),
        count=st.integers(3, 12),
        num_tasks=st.integers(2, 5),
        penalty=st.sampled_from([1e-3, 0.1, 10.0]),
    )
    def test_ridge_is_its_definition(self, seed, count, num_tasks, penalty):
        shares, losses = runs(count, num_tasks, seed=seed)
        asked, _ = runs(4, num_tasks, seed=seed + 1)
        fitted = RidgeSurrogate(penalties=[penalty]).fit_runs(shares, losses)
        expected = ridge_on_roots(shares, losses, asked, penalty=penalty)
        assert fitted.estimate(asked).loss == pytest.approx(np.maximum(expected, 0), rel=1e-6)

    @given(seed=st.integers(0, 50), penalty=st.sampled_from([1e-3, 0.1, 10.0]))
    def test_ridge_is_least_squares_with_a_penalty(self, seed, penalty):
        """In its own form: a column for the intercept, and rows for the penalty."""
        shares, losses = runs(9, 4, seed=seed)
        roots = np.sqrt(shares)
        variance = ((roots - roots.mean(0)) ** 2).sum(1).mean()
        top = np.column_stack([np.ones(9), roots])
        bottom = np.column_stack([np.zeros(4), np.sqrt(penalty * variance) * np.eye(4)])
        solution = np.linalg.lstsq(
            np.vstack([top, bottom]), np.append(losses, np.zeros(4)), rcond=None
        )[0]
        fitted = RidgeSurrogate(penalties=[penalty]).fit_runs(shares, losses)
        assert fitted.estimate(shares).loss == pytest.approx(top @ solution, rel=1e-6)

    @both
    @pytest.mark.parametrize("seed", range(3))
    def test_leaving_one_out_is_fitting_again_without_it(self, kind, seed):
        """With the kernel and the penalty of the whole."""
        shares, losses = sorted_runs(8, seed=seed)
        fitted = kind().fit_runs(shares, losses)
        K, penalty = scaled_kernel(fitted, shares, shares), fitted.diagnostics()["penalty"]
        expected = []
        for m in range(8):
            others = np.arange(8) != m
            (predicted,) = solve_kernel_ridge(
                K[np.ix_(others, others)], losses[others], K[[m]][:, others], penalty
            )
            expected.append(losses[m] - predicted)
        residuals = fitted._regression.residuals_M
        assert residuals == pytest.approx(expected, rel=1e-5, abs=1e-8)
        rmse = np.sqrt(np.mean(np.square(expected)))
        diagnostics = fitted.diagnostics()
        assert diagnostics["leave_one_out_rmse_nats"] == pytest.approx(rmse, rel=1e-5)
        assert diagnostics["leave_one_out_r2"] == pytest.approx(
            1 - rmse**2 / losses.var(), rel=1e-5
        )

    def test_the_best_penalty_of_the_ridge_is_chosen(self):
        shares, losses = runs(30, 4, noise=0.3)
        chosen = RidgeSurrogate().fit_runs(shares, losses).diagnostics()
        errors = {}
        for penalty in RidgeSurrogate().penalties:
            fitted = RidgeSurrogate(penalties=[penalty]).fit_runs(shares, losses)
            errors[penalty] = fitted.diagnostics()["leave_one_out_rmse_nats"]
        assert chosen["penalty"] == min(errors, key=errors.get)
        assert chosen["leave_one_out_rmse_nats"] == min(errors.values())
        assert len(set(errors.values())) == len(errors)

    @both
    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_the_scale_of_losses_does_not_matter(self, kind, factor):
        shares, losses = runs(20, 3)
        one, other = (
            kind().fit_runs(shares, y).estimate(np.eye(3)) for y in (losses, factor * losses)
        )
        for name in ("loss", "low", "high"):
            assert getattr(other, name) == pytest.approx(factor * getattr(one, name), rel=1e-5)

    @both
    def test_the_order_of_runs_and_tasks_does_not_matter(self, kind):
        shares, losses = runs(20, 3)
        whole = kind().fit_runs(shares, losses).estimate(np.eye(3))
        rows, columns = np.random.default_rng(1).permutation(20), np.array([2, 0, 1])
        other = (
            kind().fit_runs(shares[rows][:, columns], losses[rows]).estimate(np.eye(3)[:, columns])
        )
        for name in ("loss", "low", "high"):
            assert getattr(other, name) == pytest.approx(getattr(whole, name), rel=1e-6)


class TestTheKernel:
    def test_it_is_its_definition(self):
        shares, _ = runs(5, 3)
        rates = np.array([0.0, 0.3, 20.0])
        found = kernels.MaternKernel(rates)(np.sqrt(shares[:2]), np.sqrt(shares))
        expected = [[matern(one, other, rates) for other in shares] for one in shares[:2]]
        assert found == pytest.approx(np.array(expected), rel=1e-12)

    def test_rates_signal_and_noise_are_the_likeliest(self):
        """No step away from them is likelier."""
        shares, losses = runs(25, 3)
        kernel, signal, noise = kernels.most_likely_matern(np.sqrt(shares), losses)
        variance, least = losses.var(), kernels._LEAST_NOISE
        unit = 1 / (2 * np.sqrt(shares).var(0).mean())
        of_rates = np.log(kernel.rates_K / unit)
        # Priors of the same width make the common rate the sum of the three factors.
        common = of_rates.sum() / 4
        others = np.log([signal / variance, noise * signal / variance - least])
        logs = np.array([*(of_rates - common), common, *others])
        options = {"deviation": kernels._PRIOR_DEVIATION, "least": least}
        best = log_posterior(shares, losses, logs, **options)
        for p in range(6):
            for step in (-0.1, 0.1):
                changed = logs + step * (np.arange(6) == p)
                assert log_posterior(shares, losses, changed, **options) < best

    def test_a_task_that_does_not_matter_gets_a_low_rate(self):
        shares, _ = runs(60, 4)
        losses = 2 + np.sin(4 * shares[:, 1]) + shares[:, 2]
        rates = kernels.most_likely_matern(np.sqrt(shares), losses)[0].rates_K
        assert rates[[0, 3]].max() < 0.3 * rates[[1, 2]].min()

    def test_many_tasks_are_told_apart(self):
        """None of a hundred matters less than the others, so that all rates must be low."""
        rng = np.random.default_rng(0)
        scores, masks, asked = rng.normal(size=100), subsets_of(100, 300), subsets_of(100, 50, 1)

        def losses(masks):
            return 2 + np.tanh(np.sqrt(masks / masks.sum(1, keepdims=True)) @ scores)

        estimate = KernelSurrogate().fit_runs(masks, losses(masks)).estimate(asked)
        assert np.corrcoef(estimate.loss, losses(asked))[0, 1] > 0.8


class TestWhatTheyLearn:
    def test_both_recover_a_linear_function_of_roots(self):
        masks = subsets_of(6, 40)
        slope = np.array([0.5, -0.3, 0.2, 0.0, -0.8, 0.1])
        losses = 2 + np.sqrt(masks / masks.sum(1, keepdims=True)) @ slope
        others = np.array([[True] * 6, [True, True] + [False] * 4])
        for kind, error in [(RidgeSurrogate, 1e-4), (KernelSurrogate, 0.02)]:
            fitted = kind().fit_runs(masks, losses)
            expected = 2 + np.sqrt(others / others.sum(1, keepdims=True)) @ slope
            assert fitted.estimate(others).loss == pytest.approx(expected, abs=error)
            assert fitted.diagnostics()["leave_one_out_r2"] > 0.98

    def test_an_exclusive_or_takes_a_kernel(self):
        """Either of two tasks alone does harm, and none or both do good."""
        masks = np.array([mask for mask in np.ndindex(2, 2, 2, 2, 2, 2) if sum(mask) == 3], bool)
        losses = 1.0 + (masks[:, 0] ^ masks[:, 1])
        ridge = RidgeSurrogate().fit_runs(masks, losses).diagnostics()
        kernel = KernelSurrogate().fit_runs(masks, losses).diagnostics()
        assert ridge["leave_one_out_r2"] < 0.1
        assert kernel["leave_one_out_r2"] > 0.9

    def test_equal_losses_are_estimated_as_they_are(self):
        shares, _ = runs(12, 3)
        for kind in (RidgeSurrogate, KernelSurrogate):
            fitted = kind().fit_runs(shares, np.full(12, 1.5))
            assert fitted.estimate(np.eye(3)).loss == pytest.approx([1.5] * 3)
            assert np.isfinite(list(fitted.diagnostics().values())).all()


class TestTheInterval:
    def test_that_of_a_ridge_is_the_jackknife_plus(self):
        shares, losses = sorted_runs(21)
        asked, _ = runs(5, 3, seed=1)
        fitted = RidgeSurrogate(penalties=[0.1]).fit_runs(shares, losses)
        K, K_asked = (scaled_kernel(fitted, one, shares) for one in (shares, asked))
        low, high = [], []
        for m in range(21):
            others = np.arange(21) != m
            predicted = solve_kernel_ridge(
                K[np.ix_(others, others)],
                losses[others],
                np.vstack([K[[m]], K_asked])[:, others],
                0.1,
            )
            error = abs(losses[m] - predicted[0])
            low.append(predicted[1:] - error)
            high.append(predicted[1:] + error)
        # Of 21 runs: the second lowest and the second highest.
        estimate = fitted.estimate(asked)
        assert estimate.low == pytest.approx(np.sort(low, 0)[1], rel=1e-6)
        assert estimate.high == pytest.approx(np.sort(high, 0)[-2], rel=1e-6)

    def test_that_of_a_kernel_is_the_posterior(self):
        """Conditioned on the known losses, with a mean of nearly infinite variance."""
        shares, losses = sorted_runs(21)
        asked, _ = runs(5, 3, seed=1)
        kernel, signal, noise = kernels.most_likely_matern(np.sqrt(shares), losses)
        everything, unknown = np.sqrt(np.vstack([shares, asked])), 1e4 * signal
        C = signal * (kernel(everything, everything) + noise * np.eye(26)) + unknown
        solved = np.linalg.solve(C[:21, :21], C[:21, 21:])
        mean = losses.mean() + solved.T @ (losses - losses.mean())
        half = 1.6449 * np.sqrt(np.diag(C[21:, 21:] - C[21:, :21] @ solved))
        estimate = KernelSurrogate().fit_runs(shares, losses).estimate(asked)
        assert estimate.loss == pytest.approx(mean, rel=1e-4)
        assert estimate.loss - estimate.low == pytest.approx(half, rel=1e-3)
        assert estimate.high - estimate.loss == pytest.approx(half, rel=1e-3)

    @both
    def test_it_holds_the_measured_loss_as_often_as_it_says(self, kind):
        held = []
        for seed in range(20):
            shares, losses = runs(60, 3, seed=seed)
            estimate = kind().fit_runs(shares[:40], losses[:40]).estimate(shares[40:])
            held.append((estimate.low <= losses[40:]) & (losses[40:] <= estimate.high))
        assert 0.84 < np.mean(held) < 0.96

    @both
    def test_the_error_of_the_base_is_added_to_its_own(self, kind):
        store, asked = random_store(1, counts=(4, 4, 4, 4)), np.eye(4) + 0.3
        widths = {}
        for half in (0.0, 0.4):
            base = Known(function=lambda s: 5 + np.sin(3 * s[:, 0]) + s[:, 1] ** 2, half_width=half)
            estimate = kind(base=base).fit(store).estimate(asked)
            widths[half] = estimate.loss - estimate.low
        assert widths[0.4] == pytest.approx(np.hypot(widths[0.0], 0.4), rel=1e-6)

    def test_no_loss_is_below_zero_unless_one_was(self):
        shares = np.array([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.45, 0.55]])
        fallen = 4 * (np.sqrt(shares[:, 0]) - np.sqrt(shares[:, 1]))
        estimate = RidgeSurrogate().fit_runs(shares, fallen + 0.5).estimate([[0, 1.0]])
        assert estimate.loss[0] == estimate.low[0] == 0.0
        estimate = RidgeSurrogate().fit_runs(shares, fallen).estimate([[0, 1.0]])
        assert estimate.loss[0] == pytest.approx(-4.0, abs=0.01)


class TestOverAnEstimator:
    @both
    def test_it_follows_the_base(self, kind):
        store = random_store(2, counts=(8, 5, 6, 7, 9), dim=4)
        base = GradExLogistic(regularization=0.5)
        fitted = kind(base=base).fit(store)
        whole = base.fit(store)
        asked = np.random.default_rng(0).dirichlet(np.ones(5), 40)
        true, estimate = whole.estimate(asked), fitted.estimate(asked)
        assert np.corrcoef(true.loss, estimate.loss)[0, 1] > 0.9
        assert (estimate.high - estimate.low).min() > 0.5 * (true.high - true.low).min()
        diagnostics = fitted.diagnostics()
        assert diagnostics["num_mixtures"] == 31
        assert diagnostics["leave_one_out_r2"] > 0.5
        assert diagnostics["loss_at_theta_0_nats"] == whole.diagnostics()["loss_at_theta_0_nats"]
        assert all(isinstance(value, float) for value in diagnostics.values())

    @both
    def test_no_training_is_what_the_base_says(self, kind):
        store = random_store(3)
        base = LinearizedTraining()
        asked = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]])
        estimate = kind(base=base).fit(store).estimate(asked)
        expected = base.fit(store).estimate([[0, 0, 0]])
        assert estimate.loss[1] == estimate.low[1] == estimate.high[1] == expected.loss[0]
        assert estimate.loss[0] != expected.loss[0]

    @both
    def test_subsets_pool_rows(self, kind):
        store = rebuilt(random_store(4), task_sizes=[30, 10, 60])
        fitted = kind().fit(store)
        pooled, mixed = fitted.estimate([[True, True, False]]), fitted.estimate([[3, 1, 0]])
        assert (pooled.loss, pooled.low, pooled.high) == (mixed.loss, mixed.low, mixed.high)
        assert pooled.weights.tolist() == [[0.75, 0.25, 0]]
        assert pooled.loss != fitted.estimate([[1, 1, 0]]).loss

    @both
    def test_the_number_of_mixtures_does_not_matter(self, kind, monkeypatch):
        store = random_store(5)
        fitted = kind(base=GaussNewton()).fit(store)
        asked = np.random.default_rng(0).random((50, 3))
        whole = fitted.estimate(asked)
        monkeypatch.setattr("hf_auxselect.estimators.surrogates._ELEMENTS_AT_ONCE", 30)
        chunked = fitted.estimate(asked)
        assert chunked.loss == pytest.approx(whole.loss, rel=1e-12)
        assert chunked.high == pytest.approx(whole.high, rel=1e-12)
        assert len(fitted.estimate(np.zeros((0, 3)))) == 0

    def test_a_selector_can_use_it(self):
        store = random_store(6)
        fitted = KernelSurrogate().fit(store)
        selection = ForwardSelection().select(
            SelectionProblem(fitted.estimate, store.task_names, store.task_sizes)
        )
        assert selection.selected

    @both
    def test_what_the_pass_must_capture_is_what_the_base_needs(self, kind):
        assert kind().scalars == LinearizedTraining.scalars
        assert kind(base=GaussNewton(curvature="empirical")).scalars == ("loss",)
        assert kind(base=kind(base=GradExLogistic())).scalars == ("margin",)


class TestSubsets:
    def test_all_of_them_if_they_are_few(self):
        masks = RidgeSurrogate(num_subsets=15).subsets(4)
        assert len({tuple(mask) for mask in masks.tolist()}) == len(masks) == 15
        assert masks.any(1).all()

    def test_random_ones_are_different_and_of_all_sizes(self):
        masks = RidgeSurrogate(num_subsets=300, seed=1).subsets(20)
        assert len({tuple(mask) for mask in masks.tolist()}) == len(masks) == 300
        sizes = np.bincount(masks.sum(1), minlength=21)
        assert sizes[0] == 0
        assert (sizes[2:20] >= 5).all()
        assert abs(masks.sum(0) / 300 - 0.5).max() < 0.12

    def test_the_seed_rules_them(self):
        first, again, other = (subsets_of(10, 30, seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_many_tasks(self):
        assert RidgeSurrogate(num_subsets=5).subsets(200).shape == (5, 200)


class TestOverRuns:
    @both
    def test_masks_are_pooled_by_the_sizes_of_tasks(self, kind):
        masks = subsets_of(4, 12)
        losses = np.random.default_rng(0).random(12)
        sizes = [10, 40, 30, 20]
        by_mask = kind().fit_runs(masks, losses, task_sizes=sizes)
        by_share = kind().fit_runs(normalize_mixtures(masks, sizes), losses)
        asked = [[True, True, False, False]]
        expected = by_share.estimate([[1, 4, 0, 0]])
        assert by_mask.estimate(asked).loss == pytest.approx(expected.loss, rel=1e-9)
        equal = kind().fit_runs(masks, losses)
        assert equal.estimate(asked).weights.tolist() == [[0.5, 0.5, 0, 0]]

    @both
    def test_runs_of_one_mixture_count_as_one(self, kind):
        """Otherwise leave-one-out would predict each from its copies, and trust too much."""
        shares, losses = runs(12, 3)
        copies = np.vstack([shares, shares / 3, 7 * shares])
        noisy = np.concatenate([losses, losses + 0.3, losses - 0.3])
        fitted, expected = kind().fit_runs(copies, noisy), kind().fit_runs(shares, losses)
        assert fitted.diagnostics() == pytest.approx(expected.diagnostics(), rel=1e-6)
        one, other = fitted.estimate(np.eye(3)), expected.estimate(np.eye(3))
        assert one.high == pytest.approx(other.high, rel=1e-6)

    @both
    def test_runs_without_training_answer_for_themselves(self, kind):
        shares, losses = runs(12, 3)
        fitted = kind().fit_runs(np.vstack([np.zeros((2, 3)), shares]), [9.0, 8.0, *losses])
        estimate = fitted.estimate(np.vstack([np.zeros(3), shares[0]]))
        assert estimate.loss[0] == estimate.low[0] == estimate.high[0] == 8.5
        expected = kind().fit_runs(shares, losses).estimate(shares[:1])
        assert estimate.loss[1] == pytest.approx(expected.loss[0], rel=1e-9)

    def test_without_such_a_run_there_is_no_answer(self):
        fitted = RidgeSurrogate().fit_runs(*runs(12, 3))
        with pytest.raises(ValueError, match=r"row of zeros \(row 1\).*add such a run"):
            fitted.estimate([[1, 0, 0], [0, 0, 0]])

    def test_they_need_no_store(self):
        shares, losses = runs(12, 3)
        diagnostics = KernelSurrogate().fit_runs(shares.tolist(), losses.tolist()).diagnostics()
        assert set(diagnostics) == {
            "num_mixtures",
            "leave_one_out_r2",
            "leave_one_out_rmse_nats",
            "penalty",
        }


class TestBadInput:
    @both
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"base": "LinearizedTraining"}, TypeError, "base must be an estimator such as"),
            ({"num_subsets": 2}, ValueError, "num_subsets must be an int of at least 3, got 2"),
        ],
    )
    def test_options(self, kind, options, error, message):
        with pytest.raises(error, match=message):
            kind(**options)

    @pytest.mark.parametrize("penalties", [[], [1, 0]])
    def test_penalties(self, penalties):
        message = (
            rf"penalties must be one or more positive numbers, got {re.escape(str(penalties))}"
        )
        with pytest.raises(ValueError, match=message):
            RidgeSurrogate(penalties=penalties)

    @pytest.mark.parametrize(
        ("weights", "losses", "sizes", "message"),
        [
            ([1, 2], [1, 2], None, r"got \[2\] and \[2\]"),
            (
                np.eye(3),
                [1, 2],
                None,
                r"\[runs, tasks\] and losses \[runs\], got \[3, 3\] and \[2\]",
            ),
            (np.eye(3), [1, np.nan, 2], None, "losses must be finite"),
            (-np.eye(3), [1, 2, 3], None, "weights must be finite and not negative"),
            (np.eye(3), [1, 2, 3], [1, 2], r"task_sizes must be 3 positive numbers.*\[1, 2\]"),
            (np.eye(3), [1, 2, 3], [1, 2, 0], "task_sizes must be 3 positive numbers"),
            (np.eye(2), [1, 2], None, r"at least 3 different mixtures, got 2 of 2 task\(s\)"),
            (np.ones((9, 2)), np.arange(9), None, "got 1 of 2"),
            (np.vstack([np.eye(2), [[0, 0]]]), [1, 2, 3], None, "got 2 of 2"),
        ],
    )
    def test_runs(self, weights, losses, sizes, message):
        with pytest.raises(ValueError, match=message):
            RidgeSurrogate().fit_runs(weights, losses, task_sizes=sizes)

    def test_one_task(self):
        with pytest.raises(ValueError, match=r"got 1 of 1 task\(s\)"):
            RidgeSurrogate().fit(random_store(1, counts=(9,)))

    def test_mixtures_of_other_tasks(self):
        with pytest.raises(ValueError, match=r"\[mixtures, 3\], one column per task, got \[1, 2\]"):
            RidgeSurrogate().fit_runs(*runs(12, 3)).estimate([[1, 1]])
