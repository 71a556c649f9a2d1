import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    bootstrap_width,
    linearized_training,
    logistic_displacement,
    logistic_estimate,
    random_store,
    rebuilt,
    store_of_few_rows,
)
from scipy.stats import spearmanr

from hf_auxselect import (
    GaussNewton,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    RidgeSurrogate,
    capture_gradients,
)
from hf_auxselect.estimators import normalize_mixtures
from hf_auxselect.estimators.base import NORMAL_95, NUM_ENDPOINTS, random_subsets
from hf_auxselect.estimators.clipping import clipping_factor
from hf_auxselect.estimators.diagnostics import rank_correlation
from hf_auxselect.estimators.quadratic_model import QuadraticModel
from hf_auxselect.estimators.unrolled_optimizer import UnrolledOptimizer


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1, 1)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_scipy(pairs):
    one, other = np.array(pairs).T
    expected = 0.0 if min(np.ptp(one), np.ptp(other)) == 0 else spearmanr(one, other).statistic
    assert rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)


class TestNormalizeMixtures:
    def test_subsets_pool_rows_and_weights_are_shares(self):
        sizes = [30, 10, 60]
        subset = normalize_mixtures([[True, True, False]], sizes)
        weights = normalize_mixtures([[3, 1, 0]], sizes)
        assert subset.tolist() == weights.tolist() == [[0.75, 0.25, 0]]
        assert normalize_mixtures([[1.0, 1.0, 0.0]], sizes).tolist() == [[0.5, 0.5, 0]]

    def test_a_row_of_zeros_stays(self):
        assert normalize_mixtures(np.zeros((1, 2)), [1, 1]).tolist() == [[0, 0]]

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([True, False], r"shape \[mixtures, 2\], one column per task, got \[2\]"),
            ([[1, 1, 1]], r"got \[1, 3\]"),
            ([[1, -1]], "not negative"),
            ([[np.nan, 1]], "finite"),
        ],
    )
    def test_bad_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            normalize_mixtures(weights, [1, 1])


masks = st.lists(st.booleans(), min_size=3, max_size=3).filter(any)


class TestGradExLogistic:
    @given(st.integers(0, 5), st.lists(masks, min_size=1, max_size=4))
    def test_it_is_its_definition(self, seed, subsets):
        store = random_store(seed)
        fitted = GradExLogistic(regularization=0.03).fit(store)
        expected = [logistic_estimate(store, np.array(mask), 0.03) for mask in subsets]
        assert fitted.estimate(subsets).loss == pytest.approx(expected, rel=1e-6)

    def test_mixture_weights_share_the_loss_among_tasks(self):
        store = random_store(1)
        weights = np.array([0.2, 0.0, 0.8])
        shares = weights[store.task_ids] / np.array([7, 12, 5])[store.task_ids]
        w = logistic_displacement(
            store.outputs.astype(float), store.gradients.astype(float), shares, 0.05
        )
        fitted = GradExLogistic(regularization=0.05).fit(store)
        # The fitted displacement is a rotation of the reference.
        assert np.linalg.norm(fitted.displacement([10 * weights])) == pytest.approx(
            np.linalg.norm(w), rel=1e-6
        )
        moved = store.target.outputs + store.target.gradients @ w
        losses = (
            store.target.losses + np.logaddexp(0, -moved) - np.logaddexp(0, -store.target.outputs)
        )
        assert fitted.estimate([weights]).loss[0] == pytest.approx(
            losses @ store.target.example_weights, rel=1e-6
        )

    def test_it_solves_badly_conditioned_and_separable_problems_to_its_tolerance(self):
        store = random_store(2, counts=(4, 5), dim=40)
        scaled = dict(store._scalars)
        outputs, gradients = scaled["margin"]
        gradients = gradients * np.logspace(-3, 3, 40, dtype=np.float32)
        hard = rebuilt(store, scalars={"margin": (outputs, gradients)})
        fitted = GradExLogistic(regularization=1e-6, tolerance=1e-9).fit(hard)
        mask = np.array([True, True])
        w = logistic_displacement(
            outputs.astype(float), gradients.astype(float), np.full(9, 1 / 9), 1e-6
        )
        margins = outputs + gradients @ w
        objective = np.logaddexp(0, -margins).mean() + 1e-6 * w @ w
        mine = fitted.displacement([mask])[0]
        mine_margins = outputs + fitted._gradients_NR @ mine
        assert np.logaddexp(0, -mine_margins).mean() + 1e-6 * mine @ mine <= objective * (1 + 1e-9)

    def test_no_training_leaves_the_loss_as_it_is(self):
        store = random_store(3)
        estimate = GradExLogistic().fit(store).estimate(np.zeros((1, 3)))
        assert estimate.loss[0] == pytest.approx(store.target.task_losses[0], rel=1e-6)
        assert estimate.weights.tolist() == [[0, 0, 0]]

    def test_a_margin_of_one_token_is_exact_in_nats(self):
        """With one label token each, loss = softplus(-margin), and so it stays after a step."""
        store = random_store(4)
        target = store.target
        exact = rebuilt(
            target,
            losses=np.logaddexp(0, -target.outputs),
            num_label_tokens=np.ones(len(target), int),
            example_weights=None,
        )
        store = rebuilt(store, target=exact)
        w = logistic_displacement(
            store.outputs.astype(float), store.gradients.astype(float), np.full(24, 1 / 24), 0.1
        )
        nats = np.logaddexp(0, -(exact.outputs + exact.gradients @ w)).mean()
        estimate = GradExLogistic(regularization=0.1).fit(store).estimate(np.ones((1, 3), bool))
        assert estimate.loss[0] == pytest.approx(nats, rel=1e-6)

    def test_the_mean_margin_is_turned_into_nats_with_the_spread_at_theta_0(self):
        """Two tokens with margins m +- d: the gap to the softplus of the mean is kept."""
        mean, spread, step = 0.3, 2.0, 0.5
        before = np.logaddexp(0, -np.array([mean - spread, mean + spread])).mean()
        target = GradientStore(
            task_names=["target"],
            task_ids=[0],
            example_ids=[0],
            losses=np.array([before]),
            num_label_tokens=np.array([2]),
            scalars={"margin": (np.array([mean]), np.array([[1.0]]))},
        )
        store = GradientStore(
            task_names=["a"],
            task_ids=[0],
            example_ids=[0],
            losses=np.array([1.0]),
            num_label_tokens=np.array([1]),
            scalars={"margin": (np.array([0.0]), np.array([[1.0]]))},
            target=target,
        )
        # The regularization that makes the solution w = step: 2 lambda w = 1 / (1 + e^w).
        regularization = 1 / (1 + np.exp(step)) / (2 * step)
        estimate = GradExLogistic(regularization=regularization).fit(store).estimate([[True]])
        moved = before + np.logaddexp(0, -(mean + step)) - np.logaddexp(0, -mean)
        assert estimate.loss[0] == pytest.approx(moved, rel=1e-6)

    def test_the_default_does_not_depend_on_the_scale_of_gradients(self):
        store = random_store(6)
        outputs, gradients = store.scalar("margin")
        target_outputs, target_gradients = store.target.scalar("margin")
        scaled = rebuilt(
            store,
            scalars={"margin": (outputs, 100 * gradients)},
            target=rebuilt(
                store.target, scalars={"margin": (target_outputs, 100 * target_gradients)}
            ),
        )
        one, other = (GradExLogistic().fit(s).estimate([[True] * 3]) for s in (store, scaled))
        assert one.loss == pytest.approx(other.loss, rel=1e-5)

    def test_the_interval_is_that_of_a_bootstrap(self):
        store = random_store(7, counts=(40, 60), num_target=80, dim=4)
        options = GradExLogistic(regularization=0.1)
        mask = np.array([[True, True]])
        estimate = options.fit(store).estimate(mask)
        expected = bootstrap_width(store, lambda drawn: options.fit(drawn).estimate(mask).loss[0])
        assert estimate.high[0] - estimate.low[0] == pytest.approx(expected, rel=0.15)
        assert estimate.low[0] < estimate.loss[0] < estimate.high[0]

    def test_diagnostics_are_numbers(self):
        outputs, gradients = random_store(8).scalar("margin")
        gradients = gradients.copy()
        gradients[3] *= 1000
        store = rebuilt(random_store(8), scalars={"margin": (outputs, gradients)})
        diagnostics = GradExLogistic().fit(store).diagnostics()
        assert all(isinstance(value, float) for value in diagnostics.values())
        assert diagnostics["outlier_gradient_share"] == pytest.approx(1 / 24)
        assert diagnostics["loss_at_theta_0_nats"] == pytest.approx(store.target.task_losses[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"regularization": 0}, "regularization must be positive or None, got 0"),
            ({"tolerance": 1}, "tolerance must be between 0 and 1, got 1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            GradExLogistic(**options)

    def test_options_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            GradExLogistic().tolerance = 1


def without_curvature(seed, counts):
    """Rows of one token in 4 of 60 dimensions; gradients alone move, and only the target bends."""
    store = random_store(seed, counts=counts, dim=60, max_grad_norm=0.0)
    few = (np.arange(60) < 4).astype(np.float32)

    def scalars(part, bend):
        gradients = {"loss@optimizer": 0.3, "sampled_loss@optimizer": bend}
        return part._scalars | {
            name: (part.outputs, factor * few * (1 + part.scalar(name)[1]))
            for name, factor in gradients.items()
        }

    return rebuilt(
        store,
        scalars=scalars(store, 0.0),
        num_label_tokens=np.ones_like(store.num_label_tokens),
        example_weights=None,
        metadata={
            "optimizer": store.metadata["optimizer"] | {"steps_taken": None, "weight_decay": 0.0},
            "training": store.metadata["training"],
        },
        vectors={name: np.zeros(60, np.float32) for name in store.vectors},
        target=rebuilt(store.target, scalars=scalars(store.target, 1.0)),
    )


def at(model, displacements):
    """Displacements in the basis of a model, with no sources in its complement."""
    coordinates = model.basis.coordinates(displacements)
    return coordinates, np.zeros((len(coordinates), len(model.tasks.b_KD) + len(model.vectors_VR)))


class TestLinearizedTraining:
    @given(
        seed=st.integers(0, 20),
        subsets=st.lists(masks, min_size=1, max_size=3),
        rank=st.sampled_from([1, 3, 6, None]),
        max_grad_norm=st.sampled_from([0.0, 0.5, 100.0]),
        steps_taken=st.sampled_from([None, 1, 30]),
        task_sizes=st.sampled_from([(7, 12, 5), (7, 20, 90)]),
        look_ahead=st.booleans(),
    )
    def test_it_is_its_definition(
        self, seed, subsets, rank, max_grad_norm, steps_taken, task_sizes, look_ahead
    ):
        store = random_store(
            seed,
            max_grad_norm=max_grad_norm,
            steps_taken=steps_taken,
            look_ahead=look_ahead,
        )
        store = rebuilt(store, task_sizes=task_sizes)
        rates = [0.3, 0.2, 0.1]
        expected = [
            linearized_training(
                store, normalize_mixtures([mask], task_sizes)[0], rank=rank, learning_rates=rates
            )
            for mask in subsets
        ]
        fitted = LinearizedTraining(rank=rank, learning_rates=rates).fit(store)
        assert fitted.estimate(subsets).loss == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_it_probes_along_its_own_displacements(self):
        store = random_store(3, dim=40)
        fitted = LinearizedTraining().fit(store)
        displacements, subsets = [], normalize_mixtures(random_subsets(3), store.task_sizes)
        for rows in subsets:
            update = fitted._predict(rows[None])
            displacements.append(fitted._model.basis.expand(update.delta_MR[0]))
        secant_points, endpoints = LinearizedTraining().probe_points(store)
        for k, found in enumerate(secant_points):
            mean = np.average(displacements, axis=0, weights=subsets[:, k])
            assert found == pytest.approx(2 / 3 * mean, rel=1e-9)
        assert endpoints == pytest.approx(np.array(displacements[:NUM_ENDPOINTS]), rel=1e-9)

    def test_nothing_is_probed_unless_it_is_asked_for(self):
        assert LinearizedTraining(probes=False).probe_points(random_store()) is None
        assert GaussNewton().probe_points(random_store()) is None
        surrogate = RidgeSurrogate(base=LinearizedTraining())
        expected = LinearizedTraining().probe_points(random_store())
        for found, of_base in zip(surrogate.probe_points(random_store()), expected, strict=True):
            assert np.array_equal(found, of_base)

    def test_probes_are_left_alone_unless_they_are_asked_for(self):
        store = random_store(5, look_ahead=True)
        plain = LinearizedTraining().fit(random_store(5)).estimate(np.eye(3, dtype=bool)).loss
        left_alone = LinearizedTraining(probes=False).fit(store)
        assert left_alone.estimate(np.eye(3, dtype=bool)).loss.tolist() == plain.tolist()
        used = LinearizedTraining().fit(store)
        assert used.estimate(np.eye(3, dtype=bool)).loss.tolist() != plain.tolist()

    def test_the_target_agrees_with_losses_at_the_endpoints(self):
        # With one end, and all of the target's examples read there, the ridge leaves 0.3 / 1.3 of
        # what the model had missed.
        plain = random_store(5)
        end = LinearizedTraining(rank=6).probe_points(plain)[1][:1]
        target = plain.target
        b = target.example_weights @ target.scalar("loss@optimizer")[1].astype(np.float64)
        model = LinearizedTraining(rank=6).fit(plain)._model
        model.target.lower_bound = -np.inf  # as with probes
        before = float(b @ end[0]) + float(model.target.change(*at(model, end))[1][0])
        probes = {
            "second_points": np.zeros((3, 6)),
            "gradient_changes": np.zeros((3, 6)),
            "ends": end,
            "end_changes": np.full((1, len(target)), before + 0.3),
        }
        model = LinearizedTraining(rank=6).fit(plain.with_vectors(probes))._model
        after = float(b @ end[0]) + float(model.target.change(*at(model, end))[1][0])
        assert after == pytest.approx(before + 0.3 / 1.3, rel=1e-5)
        residual = model.probe_diagnostics()["target_residual"]
        assert residual == pytest.approx(0.3 / model.target.loss, rel=1e-5)

    def test_changes_that_rounding_could_make_are_no_secant(self):
        store, losses = random_store(5, look_ahead=True), []
        for change in (0.0, 1e-7):
            at_rest = np.zeros((3, 6))
            probes = {"second_points": at_rest, "gradient_changes": at_rest + change}
            fitted = LinearizedTraining(rank=6).fit(store.with_vectors(probes))
            losses.append(fitted.estimate(np.eye(3, dtype=bool)).loss)
        assert losses[1].tolist() == losses[0].tolist()

    def test_the_residual_is_what_curvature_missed_of_the_change(self):
        store = random_store(6, dim=40, counts=(30, 30, 30), look_ahead=True)
        fitted = LinearizedTraining(probes=False).fit(store)
        displacements = np.random.default_rng(0).normal(size=(3, 40))
        phi = store.scalar("sampled_loss@optimizer")[1].astype(np.float64)
        changes = []
        for k in range(3):
            own = store.task_ids == k
            H = (phi[own] * fitted._model.counts.example_weights_N[own, None]).T @ phi[own]
            changes.append((H - np.trace(H) / 40 * np.eye(40)) @ displacements[k])

        def diagnostics(gradient_changes):
            probes = {"second_points": displacements, "gradient_changes": gradient_changes}
            return LinearizedTraining(rank=40).fit(store.with_vectors(probes)).diagnostics()

        assert diagnostics(np.array(changes))["linearization_residual"] < 1e-5
        assert diagnostics(2 * np.array(changes))["linearization_residual"] == pytest.approx(0.5)
        assert "linearization_residual" not in fitted.diagnostics()

    def test_clipping_is_that_of_many_batches(self):
        store = random_store(2, counts=(40, 60, 50), dim=200, max_grad_norm=6.0)
        factor = LinearizedTraining().fit(store).diagnostics()["clipping_factor_all_tasks"]
        g, tokens = store.scalar("loss")[1].astype(np.float64), store.num_label_tokens
        rng = np.random.default_rng(0)
        batches = rng.integers(len(store), size=(4000, 4))
        norms = [np.linalg.norm(tokens[rows] @ g[rows] / tokens[rows].sum()) for rows in batches]
        clipped = np.minimum(1.0, 6.0 / np.array(norms))
        assert 0.5 < factor < 0.9
        assert factor == pytest.approx(clipped.mean(), rel=0.1)

    def test_no_mixtures(self):
        assert len(LinearizedTraining().fit(random_store(2)).estimate(np.zeros((0, 3)))) == 0

    def test_rates_come_from_the_trainer_unless_given(self):
        store = random_store(1)
        rates = store.metadata["training"]["learning_rates"]
        given = LinearizedTraining(learning_rates=rates).fit(store).estimate([[True] * 3])
        assert LinearizedTraining().fit(store).estimate([[True] * 3]).loss == given.loss
        longer = LinearizedTraining(learning_rates=[0.02] * 9).fit(store)
        assert longer.estimate([[True] * 3]).loss != given.loss

    def test_no_training_leaves_the_loss_as_it_is_and_is_certain(self):
        store = random_store(2)
        estimate = LinearizedTraining().fit(store).estimate(np.zeros((1, 3)))
        assert estimate.loss[0] == pytest.approx(store.target.task_losses[0], rel=1e-6)
        assert estimate.low[0] == estimate.high[0] == estimate.loss[0]

    def test_steps_that_would_overshoot_for_good_end_where_training_just_converges(self):
        unrolled = UnrolledOptimizer(
            np.full(500, 2.0),
            momentum_coefficient=0.9,
            steps_taken=None,
            weight_decay=0.0,
        )
        stable = 2 * 1.9 / (0.1 * 2.0)  # heavy-ball momentum diverges above
        response = unrolled.response(np.array([0.1, 0.5 * stable, 2 * stable, 1e9]))
        expected = 1 / np.array([0.1, 0.5 * stable, 0.9 * stable, 0.9 * stable])
        assert response.gradient == pytest.approx(expected, rel=1e-3)

    def test_it_predicts_short_real_training(self, tmp_path):
        """A few steps of SGD with momentum on a tiny model, in the range of its first order."""
        model, tasks, target = tiny.exactly_projected()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        rate, steps = 2.0, 6
        sgd = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], rate, momentum=0.5
        )
        store = capture_gradients(
            model,
            tasks,
            target,
            tiny.collate,
            directory=tmp_path,
            projection_dim=512,
            optimizer=sgd,
            progress=False,
        )
        fitted = LinearizedTraining(rank=36, learning_rates=[rate] * steps).fit(store)
        estimated = fitted.estimate(np.eye(2, dtype=bool)).loss - fitted.estimate([[0, 0]]).loss

        measured = []
        for task in tasks.values():
            model.load_state_dict(start)
            sgd.state.clear()
            batch = tiny.collate(task)
            for _ in range(steps):
                sgd.zero_grad()
                model(**batch).loss.backward()
                sgd.step()
            with torch.no_grad():
                measured.append(float(model(**tiny.collate(target)).loss))
        change = np.array(measured) - store.target.task_losses[0]
        assert abs(change).min() > 1e-4
        assert estimated == pytest.approx(change, rel=0.1)

    def test_the_interval_is_that_of_a_bootstrap(self):
        """Without model error, when the captured rows are a small part of all."""
        store = store_of_few_rows()
        options = LinearizedTraining(model_error=0.0, learning_rates=[0.2] * 2)
        mask = np.array([[True, True]])
        estimate = options.fit(store).estimate(mask)
        expected = bootstrap_width(store, lambda drawn: options.fit(drawn).estimate(mask).loss[0])
        assert estimate.high[0] - estimate.low[0] == pytest.approx(expected, rel=0.25)

    def test_nothing_is_left_to_chance_if_all_rows_were_captured(self):
        estimate = LinearizedTraining(model_error=0.0).fit(random_store(5)).estimate([[True] * 3])
        assert estimate.low[0] == estimate.high[0] == estimate.loss[0]

    def test_diagnostics_are_numbers(self):
        diagnostics = LinearizedTraining().fit(random_store(7)).diagnostics()
        assert all(isinstance(value, float) for value in diagnostics.values())
        assert 0 < diagnostics["clipping_factor_all_tasks"] <= 1
        assert 1 / 9 < diagnostics["largest_target_example_share"] < 1

    def test_the_sampling_error_is_told_next_to_what_mixtures_differ_by(self):
        """That of the intervals, in the root mean square; none if all rows were captured."""
        store = random_store(4, counts=(60, 80), num_target=90, dim=4, max_grad_norm=0.0)
        store = rebuilt(store, task_sizes=[90, 10**6])
        few = LinearizedTraining(model_error=0.0, learning_rates=[0.2] * 2).fit(store)
        estimate = few.estimate(random_subsets(len(store.task_names)))
        errors = (estimate.high - estimate.low) / (2 * NORMAL_95)
        expected = np.sqrt((errors**2).mean()) / estimate.loss.std()
        told = few.diagnostics()["sampling_error_over_spread"]
        assert told == pytest.approx(expected, rel=1e-6) and told > 0
        every_row = LinearizedTraining().fit(random_store(7)).diagnostics()
        assert every_row["sampling_error_over_spread"] == 0
        only = LinearizedTraining().fit(random_store(7, counts=(9,))).diagnostics()
        assert only["sampling_error_over_spread"] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank must be an int of at least 1, or None; got 0"),
            ({"model_error": -1}, "model_error must be 0 or more, got -1"),
            ({"learning_rates": []}, "learning_rates must be the rates of one or more steps"),
            ({"learning_rates": [0.1, -0.1]}, "learning_rates must be the rates"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            LinearizedTraining(**options)

    def test_a_store_without_the_optimizer(self):
        store = rebuilt(random_store(8), metadata={})
        with pytest.raises(ValueError, match="captured with the optimizer"):
            LinearizedTraining().fit(store)

    def test_a_store_without_the_steps_to_come(self):
        store = random_store(8)
        store = rebuilt(store, metadata={"optimizer": store.metadata["optimizer"]})
        with pytest.raises(ValueError, match="does not know the remaining steps"):
            LinearizedTraining().fit(store)


@pytest.mark.parametrize("options", [GradExLogistic(), LinearizedTraining()], ids=repr)
def test_order_of_tasks_and_number_of_mixtures_do_not_matter(options, monkeypatch):
    store = random_store(5)
    subsets = np.random.default_rng(0).random((50, 3)) < 0.5
    whole = options.fit(store).estimate(subsets)
    order = np.array([2, 0, 1])
    permuted = rebuilt(
        store,
        task_names=[store.task_names[k] for k in order],
        task_ids=np.argsort(order)[store.task_ids],
        task_sizes=store.task_sizes[order],
    )
    other = options.fit(permuted).estimate(subsets[:, order])
    assert other.loss == pytest.approx(whole.loss, rel=1e-9)
    monkeypatch.setattr("hf_auxselect.estimators.logistic._ELEMENTS_AT_ONCE", 100)
    monkeypatch.setattr("hf_auxselect.estimators.predicted_update._MIXTURES_AT_ONCE", 7)
    chunked = options.fit(store).estimate(subsets)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-9)
    assert chunked.high == pytest.approx(whole.high, rel=1e-9)


DIFFERENCES = [GradExLogistic(), LinearizedTraining(), GaussNewton(), RidgeSurrogate()]


@pytest.mark.parametrize("options", DIFFERENCES, ids=lambda options: type(options).__name__)
@pytest.mark.parametrize("reference", [[True, True, True], [0.2, 0.0, 0.8], [0.0, 0.0, 0.0]])
def test_a_difference_is_one_of_losses(options, reference):
    store = random_store(6, max_grad_norm=0.0)
    store = rebuilt(store, losses=store.losses + 5)  # no loss is cut at 0
    store = rebuilt(store, target=rebuilt(store.target, losses=store.target.losses + 5))
    fitted = options.fit(store)
    masks = np.array([[True, False, False], [False, True, True], [True, True, True]])
    difference = fitted.difference(masks, reference)
    losses = fitted.estimate(masks).loss - fitted.estimate([reference]).loss
    assert difference.loss == pytest.approx(losses, abs=1e-9)
    assert (difference.low <= difference.loss).all()
    assert (difference.loss <= difference.high).all()


class TestDifferencesOfQuadraticModels:
    @pytest.mark.parametrize("options", [LinearizedTraining(), GaussNewton()], ids=repr)
    def test_nothing_differs_from_itself(self, options):
        store = rebuilt(random_store(6), task_sizes=[10**6] * 3)
        difference = options.fit(store).difference([[True, True, False]], [True, True, False])
        assert difference.low == pytest.approx(0, abs=1e-12)
        assert difference.high == pytest.approx(0, abs=1e-12)

    def test_the_interval_is_that_of_a_bootstrap(self):
        store = store_of_few_rows()
        options = LinearizedTraining(model_error=0.0, learning_rates=[0.2] * 2)
        masks, reference = np.array([[True, True]]), [True, False]
        fitted = options.fit(store)
        difference = fitted.difference(masks, reference)
        expected = bootstrap_width(
            store, lambda drawn: options.fit(drawn).difference(masks, reference).loss[0]
        )
        width = difference.high[0] - difference.low[0]
        assert width == pytest.approx(expected, rel=0.25)
        of_loss = fitted.estimate(masks)
        assert width < 0.9 * (of_loss.high[0] - of_loss.low[0])  # what is shared cancels

    @pytest.mark.parametrize("gain", [0.0, 2.0])
    def test_errors_of_the_model_are_shared_as_far_as_displacements_are_aligned(self, gain):
        store = random_store(6)  # every row was captured: the model's error is all there is
        if gain:  # by a restart
            store = store.with_vectors({"initial_losses": store.target.losses + gain})
            losses = store.vectors["initial_losses"].astype(np.float64)  # rounded to float32
            gain = store.target.example_weights @ (losses - store.target.losses)
        fitted = LinearizedTraining(model_error=0.3).fit(store)
        masks = np.array([[True, True, False], [True, False, True], [False, False, False]])
        one = fitted._side(normalize_mixtures(masks, store.task_sizes))
        other = fitted._side(normalize_mixtures(masks[:1], store.task_sizes))
        difference = fitted.difference(masks, masks[0])
        weights = store.target.example_weights
        for m in range(3):
            delta, reference = one.update.delta_MR[m], other.update.delta_MR[0]
            lengths = np.linalg.norm(delta) * np.linalg.norm(reference)
            cosine = delta @ reference / lengths if lengths > 0 else 0.0
            variance = 0.0
            for x, y in (
                (one.change.linear_MT[m] @ weights, other.change.linear_MT[0] @ weights),
                (one.change.quadratic_M[m], other.change.quadratic_M[0]),
                (gain * masks[m].any(), gain),
            ):
                variance += x**2 + y**2 - 2 * max(cosine, 0.0) * x * y
            width = 2 * 1.6448536 * 0.3 * np.sqrt(max(variance, 0.0))
            assert difference.high[m] - difference.low[m] == pytest.approx(width, abs=1e-7)

    def test_a_restart_is_less_certain_by_the_warm_up_gain_it_gives_up(self):
        store, masks = random_store(6), np.array([[True, False, True], [False, False, False]])
        losses = store.target.losses.copy()
        losses[[0, 8]] += [1.0, 2.0]  # those that are read there are spread over all
        gain = store.target.example_weights[[0, 8]] @ [1.0, 2.0]
        gain /= store.target.example_weights[[0, 2, 5, 8]].sum()
        there = store.with_vectors({"initial_losses": losses[[0, 2, 5, 8]]})
        estimates = [
            LinearizedTraining(model_error=0.3).fit(s).estimate(masks) for s in (store, there)
        ]
        assert estimates[1].loss.tolist() == estimates[0].loss.tolist()
        added = [(e.high - e.loss)[0] / 1.6448536 / 0.3 for e in estimates]
        assert added[1] ** 2 - added[0] ** 2 == pytest.approx(gain**2, rel=1e-5)
        assert estimates[1].high[1] == estimates[1].low[1]  # no training, no restart


class TestPackedRows:
    """A row of several examples is one draw of the trainer's, and several of the store's."""

    PER_ROW = (2, 1, 3)

    @pytest.fixture
    def store(self):
        store = random_store(3, counts=(4, 5, 3))
        packed = {f"task{k}": float(m) for k, m in enumerate(self.PER_ROW)}
        training = store.metadata["training"] | {"examples_per_row": packed}
        return rebuilt(
            store,
            task_sizes=[2, 5, 1],
            metadata=store.metadata | {"training": training},
        )

    def test_a_row_has_the_label_tokens_of_its_examples(self, store):
        model = QuadraticModel(store, _read_loss, rank=None)
        tokens = [store.num_label_tokens[store.task_ids == k].mean() for k in range(3)]
        share = np.array([0.5, 0.3, 0.2]) * self.PER_ROW * tokens
        weights = model.counts.token_weights(np.array([[0.5, 0.3, 0.2]]))
        assert weights[0] == pytest.approx(share / share.sum(), rel=1e-12)

    def test_nothing_is_missing_where_all_examples_of_the_rows_were_captured(self, store):
        model = QuadraticModel(store, _read_loss, rank=None)
        assert model.counts.missing_K.tolist() == [0, 0, 0]
        half = rebuilt(store, task_sizes=[4, 10, 2])
        model = QuadraticModel(half, _read_loss, rank=None)
        assert model.counts.missing_K.tolist() == [0.5, 0.5, 0.5]

    def test_the_logistic_model_weighs_examples_not_rows(self, store):
        fitted = GradExLogistic(regularization=0.05).fit(store)
        shares = np.array([0.5, 0.3, 0.2]) * self.PER_ROW
        plain = GradExLogistic(regularization=0.05).fit(random_store(3, counts=(4, 5, 3)))
        assert fitted.estimate([[0.5, 0.3, 0.2]]).loss == pytest.approx(
            plain.estimate([shares]).loss, rel=1e-9
        )

    def test_clipping_is_that_of_whole_rows(self, store):
        """Against all rows that could be made of the captured examples."""
        model = QuadraticModel(store, _read_loss, rank=6)
        gradients = store.scalar("loss")[1].astype(float)
        everything, square_of_row = np.array([2, 5, 1]) / 8, []
        for k, m in enumerate(self.PER_ROW):
            own = np.flatnonzero(store.task_ids == k)
            sums = [
                (store.num_label_tokens[list(row), None] * gradients[list(row)]).sum(0)
                for row in itertools.product(own, repeat=m)
            ]
            square_of_row.append(np.mean([s @ s for s in sums]))
        tokens = everything @ model.counts.tokens_per_row_K
        b = model.counts.token_weights(everything[None])[0] @ model.tasks.b_KD
        variance = everything @ square_of_row / tokens**2 - b @ b
        expected = 1 / np.sqrt(b @ b + variance / 4)
        factor = clipping_factor(store, model.counts, max_grad_norm=1.0, rows_per_step=4)
        assert factor == pytest.approx(expected, rel=1e-9)
        assert factor < 1


def _read_loss(store, rows):
    g = store.scalar("loss")[1][rows].astype(float)
    return g, g
