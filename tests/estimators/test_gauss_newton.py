import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import bootstrap_width, gauss_newton, random_store, rebuilt, store_of_few_rows

from hf_auxselect import GaussNewton, LinearizedTraining, capture_gradients
from hf_auxselect.estimators import normalize_mixtures

SIZES = [7, 12, 5]
EVERYTHING = [[True] * 3]
masks = st.lists(st.booleans(), min_size=3, max_size=3)
kinds = pytest.mark.parametrize("curvature", ["sampled", "empirical"])


def scaled(store, factor):
    """The same examples in other units of the parameters."""
    scalars = {name: (f, factor * g) for name, (f, g) in store._scalars.items()}
    target = None if store._target is None else scaled(store.target, factor)
    return rebuilt(store, scalars=scalars, target=target)


class TestTheEstimate:
    @given(
        seed=st.integers(0, 20),
        subsets=st.lists(masks, min_size=1, max_size=3),
        rank=st.sampled_from([1, 3, 6, 99, None]),
        curvature=st.sampled_from(["sampled", "empirical"]),
        damping=st.sampled_from([0.01, 0.3, 5.0]),
    )
    def test_it_is_its_definition(self, seed, subsets, rank, curvature, damping):
        store = random_store(seed)
        options = {"curvature": curvature, "damping": damping}
        expected = [
            gauss_newton(store, normalize_mixtures([mask], SIZES)[0], rank=rank, **options)
            for mask in subsets
        ]
        fitted = GaussNewton(rank=rank, **options).fit(store)
        assert fitted.estimate(subsets).loss == pytest.approx(expected, rel=1e-6, abs=1e-9)

    @kinds
    def test_mixture_weights(self, curvature):
        store = random_store(1)
        fitted = GaussNewton(curvature=curvature, damping=1.0).fit(store)
        weights = np.array([0.2, 0.0, 0.8])
        expected = gauss_newton(store, weights, curvature=curvature, damping=1.0, rank=6)
        estimate = fitted.estimate([10 * weights])
        assert estimate.loss == pytest.approx([expected], rel=1e-6)
        assert estimate.weights == pytest.approx(weights[None])

    def test_subsets_pool_rows(self):
        store = rebuilt(random_store(2), task_sizes=[30, 10, 60])
        fitted = GaussNewton(damping=1.0).fit(store)
        pooled, mixed = fitted.estimate([[True, True, False]]), fitted.estimate([[3, 1, 0]])
        assert (pooled.loss, pooled.low, pooled.high) == (mixed.loss, mixed.low, mixed.high)
        assert pooled.loss != fitted.estimate([[1, 1, 0]]).loss

    @kinds
    @pytest.mark.parametrize("factor", [1e-4, 1e4])
    def test_the_scale_of_gradients_does_not_matter(self, curvature, factor):
        store = random_store(3)
        options = GaussNewton(curvature=curvature, damping=0.5)
        one, other = (options.fit(s).estimate(EVERYTHING) for s in (store, scaled(store, factor)))
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.high == pytest.approx(one.high, rel=1e-5)

    @kinds
    def test_no_training_leaves_the_loss_as_it_is_and_is_certain(self, curvature):
        store = random_store(4)
        estimate = GaussNewton(curvature=curvature).fit(store).estimate([[0, 0, 0], [1, 0, 0]])
        assert estimate.loss[0] == store.target.task_losses[0]
        assert estimate.low[0] == estimate.high[0] == estimate.loss[0]
        assert estimate.low[1] < estimate.high[1]

    def test_no_mixtures(self):
        assert len(GaussNewton().fit(random_store(4)).estimate(np.zeros((0, 3)))) == 0

    def test_gradients_of_zero_leave_the_loss_as_it_is(self):
        store = random_store(5)
        estimate = GaussNewton().fit(scaled(store, 0)).estimate(EVERYTHING)
        assert estimate.loss == estimate.high == store.target.task_losses[0]

    def test_empirical_curvature_is_that_of_drawn_labels_if_the_labels_were_drawn(self):
        """Tokens' gradients that are independent with mean 0, in two ways of drawing them."""
        rng = np.random.default_rng(0)
        store = random_store(6, counts=(3000, 3000), num_target=3000, dim=2)

        def drawn(part):
            scalars = dict(part._scalars)
            n = part.num_label_tokens
            shape = np.array([[1.0, 0.4], [0.0, 0.2]])
            # The loss is a mean over n tokens; sampled_loss is the mean times the root of n.
            loss = np.stack([rng.normal(size=(k, 2)).mean(0) @ shape for k in n])
            sampled = np.stack([rng.normal(size=(k, 2)).sum(0) @ shape for k in n])
            scalars["loss"] = (part.outputs, loss)
            scalars["sampled_loss"] = (part.outputs, sampled / np.sqrt(n)[:, None])
            return rebuilt(part, scalars=scalars)

        store = rebuilt(drawn(store), target=drawn(store.target))
        sampled, empirical = (
            GaussNewton(curvature=curvature).fit(store) for curvature in ("sampled", "empirical")
        )
        assert empirical.damping == pytest.approx(sampled.damping, rel=0.1)
        w = np.array([[0.5, 0.5]])
        values = [fitted._model.tasks.eigendecomposition(w)[0] for fitted in (sampled, empirical)]
        assert values[1] == pytest.approx(values[0], rel=0.1)

    @kinds
    def test_it_ends_where_damped_training_of_the_quadratic_model_does(self, curvature):
        """In the limit of large damping, one step of gradient descent at the rate 1 / lambda."""
        store = random_store(7)
        fitted = GaussNewton(curvature=curvature, damping=1e4).fit(store)
        tokens = store.num_label_tokens
        b = tokens / tokens.sum() @ store.scalar("loss")[1].astype(float)
        target = store.target
        target_b = target.example_weights @ target.scalar("loss")[1].astype(float)
        change = fitted.estimate(EVERYTHING).loss[0] - target.task_losses[0]
        assert change == pytest.approx(-target_b @ b / fitted.damping, rel=1e-2)

    @kinds
    def test_it_predicts_real_training(self, curvature, tmp_path):
        """Gradient descent on a tiny model with a penalty of lambda/2 per squared step, to its end.

        That far, the first order alone errs by a quarter.
        """
        model, tasks, target = tiny.exactly_projected()
        (parameter,) = [p for p in model.parameters() if p.requires_grad]
        start = parameter.detach().clone()
        store = capture_gradients(
            model,
            tasks,
            target,
            tiny.collate,
            directory=tmp_path,
            projection_dim=512,
            scalars=GaussNewton(curvature=curvature).scalars,
            progress=False,
        )
        fitted = GaussNewton(curvature=curvature, damping=8.0).fit(store)
        estimated = fitted.estimate(np.eye(2, dtype=bool)).loss - store.target.task_losses[0]

        measured = []
        for task in tasks.values():
            with torch.no_grad():
                parameter.copy_(start)
            batch = tiny.collate(task)
            for _ in range(60):
                parameter.grad = None
                penalty = fitted.damping / 2 * ((parameter - start) ** 2).sum()
                (model(**batch).loss + penalty).backward()
                with torch.no_grad():
                    parameter -= 0.3 / fitted.damping * parameter.grad
            with torch.no_grad():
                measured.append(float(model(**tiny.collate(target)).loss))
        change = np.array(measured) - store.target.task_losses[0]
        assert abs(change).min() > 1e-4
        assert estimated == pytest.approx(change, rel=0.1)

    @kinds
    def test_order_of_tasks_and_number_of_mixtures_do_not_matter(self, curvature, monkeypatch):
        store = rebuilt(random_store(5), task_sizes=[20, 20, 20])
        options = GaussNewton(curvature=curvature)
        subsets = np.random.default_rng(0).random((50, 3)) < 0.5
        whole = options.fit(store).estimate(subsets)
        order = np.array([2, 0, 1])
        permuted = rebuilt(
            store,
            task_names=[store.task_names[k] for k in order],
            task_ids=np.argsort(order)[store.task_ids],
        )
        other = options.fit(permuted).estimate(subsets[:, order])
        assert other.loss == pytest.approx(whole.loss, rel=1e-9)
        monkeypatch.setattr("hf_auxselect.estimators.predicted_update._MIXTURES_AT_ONCE", 7)
        monkeypatch.setattr("hf_auxselect.estimators.captured_gradients._NUMBERS_AT_ONCE", 20)
        chunked = options.fit(store).estimate(subsets)
        assert chunked.loss == pytest.approx(whole.loss, rel=1e-9)
        assert chunked.high == pytest.approx(whole.high, rel=1e-7)


class TestTheInterval:
    @kinds
    @pytest.mark.parametrize("rank", [4, 2])
    def test_it_is_that_of_a_bootstrap(self, curvature, rank):
        """Without model error, when the captured rows are a small part of all."""
        store = store_of_few_rows()
        options = GaussNewton(curvature=curvature, model_error=0.0, damping=1.0, rank=rank)
        mask = np.array([[True, True]])
        estimate = options.fit(store).estimate(mask)
        expected = bootstrap_width(store, lambda drawn: options.fit(drawn).estimate(mask).loss[0])
        assert estimate.high[0] - estimate.low[0] == pytest.approx(expected, rel=0.25)

    def test_nothing_is_left_to_chance_if_all_rows_were_captured(self):
        estimate = GaussNewton(model_error=0.0).fit(random_store(5)).estimate(EVERYTHING)
        assert estimate.low[0] == estimate.high[0] == estimate.loss[0]

    def test_the_error_of_the_model_is_a_share_of_the_change(self):
        store = random_store(6)
        widths = [
            np.ptp([estimate.low[0], estimate.high[0]])
            for error in (0.1, 0.2)
            for estimate in [
                GaussNewton(model_error=error, damping=9.0).fit(store).estimate(EVERYTHING)
            ]
        ]
        assert widths[1] == pytest.approx(2 * widths[0])


class TestOptions:
    def test_what_the_pass_must_capture(self):
        assert GaussNewton().scalars == ("loss", "sampled_loss")
        assert GaussNewton(curvature="empirical").scalars == ("loss",)
        assert LinearizedTraining.scalars == LinearizedTraining().scalars

    def test_a_store_that_lacks_it(self):
        store = random_store(8)
        scalars = {"loss": store.scalar("loss")}
        target = rebuilt(store.target, scalars={"loss": store.target.scalar("loss")})
        store = rebuilt(store, scalars=scalars, target=target, metadata={}, vectors={})
        assert len(GaussNewton(curvature="empirical").fit(store).estimate(EVERYTHING)) == 1
        with pytest.raises(KeyError, match="'sampled_loss' was not captured"):
            GaussNewton().fit(store)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"curvature": "exact"}, r"one of \['sampled', 'empirical'\], got 'exact'"),
            ({"damping": 0}, "damping must be positive and finite, got 0"),
            ({"damping": float("inf")}, "damping must be positive and finite, got inf"),
            ({"rank": 0}, "rank must be an int of at least 1, or None; got 0"),
            ({"rank": 2.5}, "rank must be an int of at least 1, or None; got 2.5"),
            ({"damping": "1"}, "damping must be positive and finite, got '1'"),
            ({"model_error": float("inf")}, "model_error must be 0 or more, got inf"),
            ({"model_error": -1}, "model_error must be 0 or more, got -1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            GaussNewton(**options)

    def test_diagnostics_are_numbers(self):
        fitted = GaussNewton(damping=0.1).fit(random_store(7))
        diagnostics = fitted.diagnostics()
        assert all(isinstance(value, float) for value in diagnostics.values())
        assert diagnostics["damping"] == pytest.approx(0.1 * diagnostics["largest_curvature"])
        assert 0 < diagnostics["effective_dimension"] < 6
