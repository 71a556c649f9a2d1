"""Scores of layers, the choice by them, and training of some of them."""

import json
import math
import shutil

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from benchmarks import RESULTS
from hf_auxselect import (
    FixedSelection,
    GaussNewton,
    GradientStore,
    LayerSelection,
    SelectionReport,
    capture_gradients,
    score_layers,
)
from hf_auxselect.capture.layer_gradients import layers_of
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.cli import main
from hf_auxselect.layers import layer_scores
from hf_auxselect.store.format import StoreError
from hf_auxselect.store.records import LayerGradients
from hf_auxselect.trainer.layer_rates import LayerRates

METHODS = ["cross_validation", "snr", "rgn"]
BLOCKS = ["model.layers.0", "model.layers.1"]


def of_gradients(gradients_LTP, weights=None, squared_weights=None):
    """Layers with these gradients."""
    number, count, _ = gradients_LTP.shape
    weights = np.ones(count) if weights is None else weights
    return LayerGradients(
        names=tuple(f"layer {n}" for n in range(number)),
        rates={f"layer {n}": 1.0 for n in range(number)},
        gram_LTT=gradients_LTP @ gradients_LTP.transpose(0, 2, 1),
        squared_weights_L=np.ones(number) if squared_weights is None else squared_weights,
        weights_T=weights / weights.sum(),
        example_ids=np.arange(count),
    )


def random_layers(seed, number=4, count=9, size=6):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(number, count, size)) + rng.normal(size=(number, 1, size))
    return gradients, rng.uniform(0.5, 2, count), rng.uniform(1, 9, number)


def two_modules():
    """A model of which one matrix in each block is trained, so small that projections are exact."""
    model = tiny.llama()
    model.requires_grad_(False)
    for block in model.model.layers:
        block.mlp.down_proj.requires_grad_(True)
    return model


def captured(model, directory, layers=None, **options):
    return capture_gradients(
        model,
        {"sums": list(tiny.tokenize(tiny.sums(6, 1)))},
        list(tiny.tokenize(tiny.sums(9, 5, letters=True))),
        tiny.collate,
        directory=directory,
        projection_dim=512,
        progress=False,
        layers=layers,
        **options,
    )


class TestScores:
    def test_they_are_those_of_gradients_one_by_one(self, tmp_path):
        model = two_modules()
        store = captured(model, tmp_path, LayerSelection())
        rows = tiny.tokenize(tiny.sums(9, 5, letters=True))
        alone = reference.per_example_gradients(
            model, list(rows), tiny.collate, reference.loss_of_example
        )
        tokens = np.array([sum(label != -100 for label in row["labels"]) for row in rows])
        for name, parameter in zip(BLOCKS, alone[0], strict=True):
            gradients = np.stack([one[parameter].double().numpy().ravel() for one in alone])
            weight = model.get_parameter(parameter).detach().double().numpy()
            slow = reference.layer_scores(gradients, tokens, weight)
            for method in METHODS:
                assert score_layers(store, method)[name] == pytest.approx(slow[method], rel=1e-4)

    @given(st.integers(0, 1000))
    def test_they_follow_their_definitions(self, seed):
        gradients, weights, squared = random_layers(seed)
        layers = of_gradients(gradients, weights, squared)
        for n, name in enumerate(layers.names):
            slow = reference.layer_scores(gradients[n], weights, np.array([squared[n] ** 0.5]))
            for method in METHODS:
                assert layer_scores(layers, method)[name] == pytest.approx(slow[method], rel=1e-6)

    @given(st.integers(0, 1000), st.permutations(range(4)), st.floats(0.1, 10))
    def test_what_does_not_matter(self, seed, order, factor):
        gradients, weights, squared = random_layers(seed)
        scores = {
            m: [*layer_scores(of_gradients(gradients, weights, squared), m).values()]
            for m in METHODS
        }
        other = of_gradients(factor * gradients[order], weights, squared[order])
        for method in METHODS:
            expected = np.array(scores[method])[order] * (factor if method == "rgn" else 1)
            assert [*layer_scores(other, method).values()] == pytest.approx(expected, rel=1e-6)
        assert all(0 <= score <= 1 for score in scores["cross_validation"])

    def test_the_signal_to_noise_ratio_has_no_bias(self):
        rng = np.random.default_rng(0)
        mean, scale = rng.normal(size=20), 3.0
        truth = mean @ mean / (20 * scale**2)
        gradients = mean + scale * rng.normal(size=(4000, 10, 20))
        ratios = np.array([*layer_scores(of_gradients(gradients), "snr").values()])
        # The noise is a sum of 9 * 20 squares: its inverse is larger than that of its mean by 1 %.
        assert ratios.mean() == pytest.approx(truth, rel=0.05)
        assert (ratios < 0).any()

    def test_extremes(self):
        same = np.ones((1, 6, 3))
        assert layer_scores(of_gradients(same), "cross_validation")["layer 0"] == pytest.approx(1)
        assert layer_scores(of_gradients(same), "snr")["layer 0"] > 1e9
        assert layer_scores(of_gradients(0 * same), "cross_validation") == {"layer 0": 0}
        assert layer_scores(of_gradients(0 * same), "snr") == {"layer 0": 0}
        opposite = same * np.array([1, -1, 1, -1, 1, -1])[:, None]
        assert layer_scores(of_gradients(opposite), "cross_validation") == {"layer 0": 0}

    def test_a_signal_that_all_examples_share_scores_above_noise(self):
        rng = np.random.default_rng(0)
        gradients = rng.normal(size=(3, 40, 50))
        gradients[1] += 0.5
        for method in METHODS:
            scores = layer_scores(of_gradients(gradients), method)
            assert max(scores, key=scores.get) == "layer 1"

    def test_what_they_need(self, tmp_path):
        with pytest.raises(ValueError, match=r"no gradients of layers; capture it with layers="):
            score_layers(captured(two_modules(), tmp_path / "one"))
        layers = of_gradients(np.ones((1, 1, 3)))
        for method in ("snr", "cross_validation"):
            with pytest.raises(ValueError, match="needs 2 or more examples of the target"):
                layer_scores(layers, method)
        with pytest.raises(ValueError, match=r"method must be one of .*got 'best'"):
            layer_scores(layers, "best")
        for weight, message in ((0.0, "are 0"), (math.nan, "are quantized")):
            wrong = of_gradients(np.ones((1, 3, 3)), squared_weights=np.array([weight]))
            with pytest.raises(ValueError, match=f"layer 'layer 0', which .*{message}"):
                layer_scores(wrong, "rgn")

    def test_rgn_divides_by_the_weights_below_an_adapter(self, tmp_path):
        model = get_peft_model(tiny.llama(), tiny.lora(target_modules=["down_proj"]))
        store = captured(model, tmp_path, LayerSelection(by="module"))
        for name, square in zip(store.layers.names, store.layers.squared_weights_L, strict=True):
            base = model.base_model.model.get_submodule(name).base_layer.weight
            assert square == pytest.approx(float(base.square().sum()), rel=1e-6)
        assert all(math.isfinite(score) for score in score_layers(store, "rgn").values())

    def test_a_damaged_store_is_named(self, tmp_path):
        store = captured(two_modules(), tmp_path, LayerSelection())
        vectors = {name: vector for name, vector in store.vectors.items() if name != "layer_gram"}
        with pytest.raises(StoreError, match="layers are incomplete"):
            LayerGradients.read(store.metadata["layers"], vectors)
        with pytest.raises(StoreError, match="do not fit together"):
            LayerGradients.read({"names": ["a"], "rates": {"a": 1.0}}, store.vectors)


def test_what_the_page_says_of_planted_shifts():
    """Measured by ``benchmarks/accuracy/layers.py``; no score finds the best layer of each."""
    found = json.loads((RESULTS / "layers.json").read_text())
    rows = [row for by_shift in found.values() for row in by_shift.values()]
    mean = {m: np.mean([row[m]["rank_correlation"] for row in rows]) for m in METHODS}
    assert [round(mean[m], 2) for m in ("cross_validation", "snr")] == [0.63, 0.52]
    assert sum(row["rgn"]["rank_correlation"] < 0 for row in rows) == 5
    # Of five layers, numbered from 1: permuted labels need later ones than permuted inputs.
    chain = found["chain"]
    assert min(chain["output"]["best_layer"]) > np.mean(chain["input"]["best_layer"])
    late = np.array(chain["output"]["cross_validation"]["layer"])
    assert np.mean(late) > np.mean(chain["input"]["cross_validation"]["layer"])
    for shift in ("input", "feature", "output"):
        assert set(chain[shift]["rgn"]["layer"]) == {5}


class TestNames:
    def test_blocks_and_modules(self):
        model = get_peft_model(
            tiny.llama(), tiny.lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        assert [*dict.fromkeys(layers_of(model, "block").values())] == [*BLOCKS, "lm_head"]
        modules = layers_of(model, "module")
        assert modules.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        assert [*dict.fromkeys(modules.values())] == [
            *(f"{block}.self_attn.q_proj" for block in BLOCKS),
            "lm_head",
        ]

    def test_without_adapters(self):
        names = [*dict.fromkeys(layers_of(tiny.gpt2(), "block").values())]
        assert names == [
            "transformer.wte",
            "transformer.wpe",
            "transformer.h.0",
            "transformer.h.1",
            "transformer.ln_f",
        ]


class TestChoice:
    @given(
        st.lists(st.floats(-2, 2), min_size=1, max_size=9),
        st.floats(0.01, 1.0),
        st.sampled_from(["all", "freeze", "scale"]),
    )
    def test_the_best_are_kept(self, values, keep, training):
        scores = {f"layer {n}": value for n, value in enumerate(values)}
        rates = LayerSelection(keep=keep, training=training).rates(scores)
        number = math.ceil(keep * len(values))
        best = sorted(scores, key=lambda name: -scores[name])[:number]
        assert list(rates) == list(scores)
        assert all(rates[name] == 0 for name in scores if name not in best)
        highest = max(values)
        for name in best:
            share = max(scores[name], 0) / highest if highest > 0 else 1
            assert rates[name] == (share if training == "scale" else 1)

    def test_ties_and_numbers(self):
        hundred = {str(n): float(n) for n in range(100)}
        assert sum(LayerSelection(keep=0.07).rates(hundred).values()) == 7
        scores = dict.fromkeys("abcd", 1.0)
        assert LayerSelection(keep=2).rates(scores) == {"a": 1, "b": 1, "c": 0, "d": 0}
        assert LayerSelection(names=["d"]).rates(scores) == {"a": 0, "b": 0, "c": 0, "d": 1}

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "best"}, ValueError, r"^layers: method must be one of .*got 'best'"),
            (
                {"by": "head"},
                ValueError,
                r"^layers: by must be one of \['block', 'module'\], got 'head'",
            ),
            ({"training": "some"}, ValueError, r"^layers: training must be one of .*got 'some'"),
            ({"keep": 0}, ValueError, "^layers: keep must be a share of the layers, .*got 0"),
            ({"keep": 1.5}, ValueError, r"keep must be a share .*got 1.5"),
            ({"keep": True}, ValueError, r"keep must be a share .*got True"),
            ({"names": "model.layers.0"}, TypeError, "^layers: names must be a sequence of names"),
            ({"names": None}, TypeError, "^layers: names must be a sequence of names .*got None"),
            ({"names": ["a", "a"]}, ValueError, "^layers: names has 'a' more than once"),
        ],
    )
    def test_bad_options(self, options, error, message):
        with pytest.raises(error, match=message):
            LayerSelection(**options)


class TestCapture:
    """What a store leaves out is what frozen parameters leave out."""

    @pytest.mark.parametrize("with_optimizer", [False, True])
    def test_gradients_are_those_of_the_kept_layers(self, with_optimizer, tmp_path):
        def model_and_options(frozen):
            model = tiny.llama()
            options = {"scalars": ["loss"]}
            if with_optimizer:
                optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
                model(**tiny.collate(list(tiny.tokenize(tiny.sums(4, 3))))).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                options = {"scalars": ["loss", "loss@optimizer"], "optimizer": optimizer}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not frozen or name.startswith("model.layers.1."))
            return model, options

        model, options = model_and_options(frozen=False)
        selection = LayerSelection(names=["model.layers.1"])
        ours = captured(model, tmp_path / "ours", selection, **options)
        model, options = model_and_options(frozen=True)
        frozen = captured(model, tmp_path / "frozen", **options)
        scalar = options["scalars"][-1]
        assert np.array_equal(ours.scalar(scalar)[1], frozen.scalar(scalar)[1])
        assert np.array_equal(ours.target.scalar(scalar)[1], frozen.target.scalar(scalar)[1])
        if with_optimizer:
            assert np.array_equal(ours.optimizer.momentum_D, frozen.optimizer.momentum_D)
            assert np.array_equal(ours.optimizer.parameters_D, frozen.optimizer.parameters_D)
            # They tell how batches are clipped, by their whole length.
            model, options = model_and_options(frozen=False)
            whole = captured(model, tmp_path / "whole", **options)
            assert np.array_equal(ours.scalar("loss")[1], whole.scalar("loss")[1])

    def test_rates_are_those_of_parameter_groups(self):
        model = two_modules()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        grouped = torch.optim.AdamW(
            [
                {"params": [p], "lr": rate}
                for p, rate in zip(parameters.values(), (1e-2, 4e-3), strict=True)
            ],
            weight_decay=0.1,
        )
        plain = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
        grouped.step(), plain.step()
        rates = dict(zip(parameters, (1.0, 0.4), strict=True))
        one, other = read_optimizer(model, grouped), read_optimizer(model, plain, None, rates)
        assert one.weight_decay == other.weight_decay and one.decay_ratios == other.decay_ratios
        for name in parameters:
            assert torch.allclose(one.scales[name], other.scales[name], rtol=1e-6)

    def test_the_scores_stay_the_same_when_a_pass_goes_on(self, tmp_path):
        model = two_modules()
        before = captured(model, tmp_path, LayerSelection(keep=1))
        again = captured(model, tmp_path, LayerSelection(keep=1))
        assert score_layers(before) == score_layers(again)
        assert np.array_equal(before.gradients, again.gradients)
        other = captured(model, tmp_path, LayerSelection(keep=1.0))
        assert not np.array_equal(before.gradients, other.gradients)


def steps(model, optimizer, count=4):
    rng = torch.Generator().manual_seed(0)
    for _ in range(count):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
            parameter.grad = parameter.detach() + noise
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3),
    ],
    ids=["AdamW", "SGD"],
)
def test_shortened_steps_are_those_of_lower_learning_rates(make):
    class Holder:
        def __init__(self, optimizer, model):
            self.optimizer, self.model = optimizer, model

    torch.manual_seed(0)
    ours = torch.nn.Sequential(*[torch.nn.Linear(3, 3, bias=False) for _ in range(3)]).double()
    other = torch.nn.Sequential(*[torch.nn.Linear(3, 3, bias=False) for _ in range(3)]).double()
    other.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in ours.parameters()]
    optimizer = make(ours.parameters())
    rates = LayerRates(Holder(optimizer, ours), {"0.weight": 0.25, "1.weight": 0.0, "2.weight": 1})
    shares = zip(other.parameters(), (0.25, 0.0, 1.0), strict=True)
    grouped = make([{"params": [p], "lr": 0.1 * share} for p, share in shares])
    steps(ours, optimizer), steps(other, grouped)
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)
    frozen, free = [*ours.parameters()][1:]
    assert torch.equal(frozen, start[1]) and torch.equal(free, [*other.parameters()][2])
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        for name, value in grouped.state[two].items():  # the same moments, also of what is frozen
            assert torch.allclose(
                torch.as_tensor(optimizer.state[one][name]), torch.as_tensor(value)
            )
    rates.remove()
    steps(ours, optimizer, 1)
    assert not torch.equal(frozen, start[1])


def callback(**options):
    chosen = LayerSelection(names=["model.layers.1"], training="freeze")
    return tiny.callback(**{"layers": chosen, "estimator": GaussNewton()} | options)


SAVING = {"save_strategy": "steps", "save_steps": 1}


def at(directory, step):
    from safetensors.torch import load_file

    return load_file(directory / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.slow
class TestRuns:
    @pytest.mark.parametrize("after", ["continue", "restart"])
    def test_frozen_layers_keep_their_values(self, after, tmp_path):
        cb = callback(after=after, verify=1, estimator=None)
        trainer = tiny.trained(tiny.plain_trainer, tmp_path, cb, **SAVING)
        # A restart goes back before the checkpoint of the switch is saved.
        switch, last = at(tmp_path, 4), at(tmp_path, 10)
        for name, value in switch.items():
            assert torch.equal(value, last[name]) == ("layers.0." in name)
        # A ground-truth run trains the same layers.
        assert trainer.evaluate()["eval_loss"] == cb.report.verification[0].measured
        optimizer = trainer.optimizer.optimizer
        assert len(optimizer.param_groups) == 2
        assert len(optimizer.state) == len(tiny.weights(trainer))
        assert not optimizer._optimizer_step_post_hooks

    def test_scaled_layers_move_by_their_rate(self, tmp_path):
        cb = callback(layers=LayerSelection(keep=1.0, training="scale", method="rgn"))
        selector = FixedSelection(["a"])
        options = SAVING | {"max_steps": 5}
        cb.selector = selector
        tiny.trained(tiny.plain_trainer, tmp_path / "one", cb, **options)
        other = callback(layers=None, selector=selector)
        tiny.trained(tiny.plain_trainer, tmp_path / "two", other, **options)
        rates = cb.report.layers["rates"]
        assert sorted(rates.values())[1] == 1 and 0 < min(rates.values()) < 1
        before, after, whole = (
            at(tmp_path / name, step) for name, step in (("one", 4), ("one", 5), ("two", 5))
        )
        for name, start in before.items():
            rate = rates[f"model.layers.{0 if 'layers.0.' in name else 1}"]
            expected = rate * (whole[name] - start)
            assert torch.allclose(after[name] - start, expected, rtol=1e-4, atol=1e-7)
            if rate == 1:
                assert torch.equal(after[name], whole[name])

    @pytest.mark.parametrize("training", ["freeze", "scale"])
    def test_a_resumed_run_is_bitwise_the_same(self, training, tmp_path):
        selection = LayerSelection(keep=1.0, method="rgn", training="scale")
        if training == "freeze":
            selection = LayerSelection(keep=1, method="snr", training="freeze")
        options = {"layers": selection, "verify": 1}
        whole = tiny.trained(tiny.plain_trainer, tmp_path / "whole", callback(**options), **SAVING)
        for step in (2, 4, 7):
            copy = tmp_path / f"resumed{step}"
            shutil.copytree(tmp_path / "whole", copy)
            for later in range(step + 1, 11):
                shutil.rmtree(copy / f"checkpoint-{later}")
            if step == 7:  # the checkpoint's own copy of the decision is enough
                shutil.rmtree(copy / "_task_selection")
            cb = callback(**options)
            resumed = tiny.trained(tiny.plain_trainer, copy, cb, resume=True, **SAVING)
            assert tiny.same(tiny.weights(whole), tiny.weights(resumed)), f"from step {step}"

    def test_the_estimates_alone(self, tmp_path):
        plain = tiny.trained(tiny.plain_trainer, tmp_path / "plain", tiny.callback(after="observe"))
        cb = callback(after="observe", layers=LayerSelection(keep=1))
        trainer = tiny.trained(tiny.plain_trainer, tmp_path / "layers", cb)
        assert tiny.same(tiny.weights(plain), tiny.weights(trainer))
        store = cb.report.gradients()
        assert cb.report.layers["scores"] == score_layers(store)
        assert sorted(store.layers.rates.values()) == [0, 1]

    def test_the_report(self, tmp_path):
        cb = callback()
        tiny.trained(tiny.plain_trainer, tmp_path, cb)
        loaded = SelectionReport.load(tmp_path / "_task_selection")
        assert loaded.layers == cb.report.layers
        assert list(loaded.layers["rates"].items()) == [(BLOCKS[0], 0), (BLOCKS[1], 1)]
        sentence = "1 of 2 layers are named: the others keep their values from the switch on."
        for text in (loaded.to_markdown(), loaded.to_html(), loaded.to_text()):
            assert sentence in text
        assert "model.layers.1" in loaded.to_html()
        loaded.layers = None
        assert "ayers" not in loaded.to_markdown()
        decision = json.loads((tmp_path / "_task_selection/selection.json").read_text())
        assert decision["layers"] == cb.report.layers
        path = tmp_path / "_task_selection/report/report.json"
        content = json.loads(path.read_text())
        content["layers"]["rates"]["model.layers.0"] = 2.0
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"report.json: damaged .*between 0 and 1"):
            SelectionReport.load(tmp_path / "_task_selection")

    def test_a_decision_on_other_layers_is_refused(self, tmp_path):
        tiny.trained(tiny.plain_trainer, tmp_path, callback(), save_strategy="steps", save_steps=6)
        checkpoint = tmp_path / "checkpoint-6"
        path = checkpoint / "task_selection.json"
        decision = json.loads(path.read_text())
        decision["layers"]["rates"] = decision["layers"]["scores"] = {"model.layers.7": 1.0}
        path.write_text(json.dumps(decision))
        with pytest.raises(ValueError, match=r"rates for \['model.layers.7'\], but the layers"):
            tiny.trained(tiny.plain_trainer, tmp_path, callback(), resume=str(checkpoint))
        decision["layers"]["rates"] = {"model.layers.7": -1.0}
        path.write_text(json.dumps(decision))
        with pytest.raises(ValueError, match=r"task_selection.json: damaged .*between 0 and 1"):
            tiny.trained(tiny.plain_trainer, tmp_path, callback(), resume=str(checkpoint))

    def test_other_options_do_not_change_a_decision(self, tmp_path, caplog):
        options = {"save_strategy": "steps", "save_steps": 6}
        whole = tiny.trained(tiny.plain_trainer, tmp_path, callback(), **options)
        checkpoint = str(tmp_path / "checkpoint-6")
        other = callback(layers=LayerSelection(names=["model.layers.0"]))
        resumed = tiny.trained(tiny.plain_trainer, tmp_path, other, resume=checkpoint)
        assert "options of the selection have changed" in caplog.text
        assert tiny.same(tiny.weights(whole), tiny.weights(resumed))

    def test_the_preview_knows_the_scores(self, tmp_path):
        cb = callback()
        trainer = tiny.plain_trainer(tmp_path, cb)
        assert cb.preview(trainer).seconds > 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"layers": "snr"},
                TypeError,
                r"layers must be a LayerSelection\(...\) or None, got 'snr'",
            ),
            (
                {"selector": FixedSelection(["a"], estimate=False)},
                ValueError,
                r"layers=LayerSelection\(...\) scores layers by gradients",
            ),
            (
                {"after": "observe"},
                ValueError,
                "layers: training='freeze' changes the rest of the run",
            ),
        ],
    )
    def test_bad_options(self, options, error, message):
        with pytest.raises(error, match=message):
            callback(**options)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (
                LayerSelection(names=["model.layers.7"]),
                r"names has 'model.layers.7', but the layers",
            ),
            (LayerSelection(keep=3), r"layers: keep=3, but only 2 layers are trained"),
        ],
    )
    def test_before_the_first_step(self, layers, message, tmp_path):
        trainer = tiny.plain_trainer(tmp_path, callback(layers=layers))
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_an_optimizer_that_may_keep_parameters(self, tmp_path):
        trainer = tiny.plain_trainer(tmp_path, callback())
        trainer.optimizer = torch.optim.Adagrad(
            [p for p in trainer.model.parameters() if p.requires_grad]
        )
        with pytest.raises(ValueError, match="training='freeze': the steps of Adagrad cannot be"):
            trainer.train()

    @pytest.mark.parametrize("rows", [1, 2])
    def test_a_target_of_one_example(self, rows, tmp_path):
        """Of two rows one is masked: only one counts."""
        target = tiny.tokenize(tiny.sums(2, 9)).select(range(rows))
        masked = [[-100] * len(row) if i else row for i, row in enumerate(target["labels"])]
        target = target.remove_columns("labels").add_column("labels", masked)
        trainer = tiny.plain_trainer(
            tmp_path, callback(layers=LayerSelection()), eval_dataset=target
        )
        with pytest.raises(ValueError, match=r"method='cross_validation' compares .*only 1 has"):
            trainer.train()

    def test_weights_that_cannot_be_read(self, tmp_path):
        model = get_peft_model(tiny.llama(), tiny.lora(target_modules=["down_proj"]))
        base = model.base_model.model.model.layers[0].mlp.down_proj.base_layer
        base.weight = torch.nn.Parameter(base.weight.data.mul(0), requires_grad=False)
        trainer = tiny.plain_trainer(
            tmp_path, callback(layers=LayerSelection(method="rgn")), model=model
        )
        with pytest.raises(ValueError, match=r"'model\.layers\.0', which are 0"):
            trainer.train()


def test_the_command_line_has_them(capsys):
    from hf_auxselect.cli.sft_arguments import SelectionArguments

    arguments = SelectionArguments(layers=["method=snr", "keep=2", "training=freeze"])
    chosen = LayerSelection(method="snr", keep=2, training="freeze")
    assert arguments.callback({}).layers == chosen
    assert SelectionArguments(layers=["keep=0.25"]).callback({}).layers.keep == 0.25
    assert SelectionArguments().callback({}).layers is None
    from hf_auxselect.cli.options import UsageError

    with pytest.raises(UsageError, match=r"^--layers: keep must be a share"):
        SelectionArguments(layers=["keep=0"]).callback({})


@pytest.mark.slow
def test_a_stored_run_is_asked_again(tmp_path, capsys):
    """``hf-auxselect select`` reads a store of some layers as any other."""
    tiny.trained(tiny.plain_trainer, tmp_path, callback())
    of_run = str(tmp_path / "_task_selection")
    capsys.readouterr()
    assert main(["select", of_run, "--selector", "BackwardElimination", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["selected"]
    assert GradientStore.load(tmp_path / "_task_selection/gradients").layers is not None
