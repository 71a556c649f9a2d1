import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from reference import loss_of_example, margin_of_example, per_example_gradients
from tiny import adapted, rows_of
from torch import nn

from hf_auxselect import (
    GradientCheckError,
    GradientStore,
    NonFiniteError,
    UnsupportedModuleError,
    capture_gradients,
    check_per_example_gradients,
)
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    NEXT_TOKEN_LOSS,
    SCALARS,
    ExampleLoss,
    LabelLogits,
    forward_label_logits,
)


class TestScalars:
    def output(self, logits, labels):
        return LabelLogits(
            logits=torch.tensor(logits, dtype=torch.float64),
            labels=torch.tensor(labels),
            examples=torch.zeros(len(labels), dtype=torch.int64),
            num_label_tokens=torch.tensor([len(labels)]),
        )

    def test_the_margin_is_the_log_odds_also_at_the_extremes(self):
        output = self.output([[1.0, 2.0, 0.0], [800.0, 0.0, 0.0], [-800.0, 0.0, 0.0]], [1, 0, 0])
        p = np.exp(2) / (np.exp(1) + np.exp(2) + 1)
        expected = [np.log(p / (1 - p)), 800 - np.log(2), -800 - np.log(2)]
        assert SCALARS["margin"](output).item() == pytest.approx(np.mean(expected))

    def test_the_loss_is_the_cross_entropy(self):
        output = self.output([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]], [1, 0])
        expected = nn.functional.cross_entropy(output.logits, output.labels)
        assert SCALARS["loss"](output).item() == pytest.approx(expected.item(), rel=1e-12)

    def test_logits_are_the_same_with_and_without_logits_to_keep(self):
        model, batch = adapted(tiny.llama()), tiny.collate(rows_of([(9, 320), (5, 2), (7, 0)]))

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids=input_ids, attention_mask=attention_mask)

        kept, whole = forward_label_logits(model, batch), forward_label_logits(Whole(), batch)
        assert torch.allclose(kept.logits, whole.logits, atol=1e-12)
        assert torch.equal(kept.labels, whole.labels)
        assert torch.equal(kept.examples, whole.examples)
        assert kept.num_label_tokens.tolist() == whole.num_label_tokens.tolist()

    def test_the_sampled_loss_gives_the_fisher_matrix(self):
        """Over many draws, E[phi phi^T] in logits is the mean over tokens of diag(p) - p p^T."""
        logits = torch.tensor([[1.0, 0.0, -1.0], [0.3, 0.2, 0.9]], dtype=torch.float64)
        draws = 20_000
        tiled = logits.repeat(draws, 1).requires_grad_(True)
        output = LabelLogits(
            logits=tiled,
            labels=torch.zeros(2 * draws, dtype=torch.int64),
            examples=torch.arange(draws).repeat_interleave(2),
            num_label_tokens=torch.full((draws,), 2),
            uniforms=torch.rand(2 * draws, generator=torch.Generator().manual_seed(0)),
        )
        (gradient,) = torch.autograd.grad(SCALARS["sampled_loss"](output).sum(), tiled)
        phi = gradient.view(draws, 6)
        p = logits.softmax(-1)
        expected = torch.block_diag(*[(torch.diag(q) - torch.outer(q, q)) / 2 for q in p])
        assert torch.allclose(phi.T @ phi / draws, expected, atol=0.01)
        assert torch.allclose(phi.mean(0), torch.zeros(6, dtype=torch.float64), atol=0.02)


class TestTheCheck:
    def test_it_passes_and_tells_the_error(self):
        model = adapted(tiny.llama()).float()
        assert (
            0 < check_per_example_gradients(model, rows_of([(9, 5), (4, 0)]), tiny.collate) < 1e-5
        )

    def test_it_allows_for_half_precision(self):
        model = adapted(tiny.llama()).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = check_per_example_gradients(model, rows_of([(9, 5), (4, 0)]), tiny.collate)
        assert 1e-4 < error < 5e-2

    @pytest.mark.parametrize("half_precision", [False, True])
    def test_examples_that_influence_each_other_are_found(self, half_precision):
        model = adapted(tiny.llama())
        layer = model.get_base_model().model.layers[0]
        share = 0.3 if half_precision else 0.1
        layer.register_forward_hook(
            lambda module, args, output: output + share * output.mean(0, keepdim=True)
        )
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half_precision),
            pytest.raises(GradientCheckError, match="influence each other"),
        ):
            check_per_example_gradients(model, rows_of([(6, 5), (6, 0)]), tiny.collate)

    @pytest.mark.parametrize("half_precision", [False, True])
    def test_a_parameter_used_outside_its_module_is_found(self, half_precision):
        model = adapted(tiny.llama())
        base = model.get_base_model()
        base.model.norm.weight.requires_grad_(True)
        base.lm_head.register_forward_hook(
            lambda module, args, output: (
                output + base.model.norm.weight.sum() * torch.arange(output.shape[-1])
            )
        )
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half_precision),
            pytest.raises(GradientCheckError, match=r"'base_model.model.model.norm.weight'"),
        ):
            check_per_example_gradients(model, rows_of([(6, 5), (6, 0)]), tiny.collate)

    def test_examples_without_label_tokens(self):
        rows = rows_of([(6, 5), (4, 0)])
        for row in rows:
            row["labels"] = [-100] * len(row["labels"])
        model = adapted(tiny.llama())
        with pytest.raises(
            GradientCheckError, match=r"none of the 2 examples .* has a label token"
        ):
            check_per_example_gradients(model, rows, tiny.collate)

    def test_one_example_without_label_tokens(self):
        rows = rows_of([(6, 5), (4, 0)])
        rows[0]["labels"] = [-100] * 6
        assert check_per_example_gradients(adapted(tiny.llama()).float(), rows, tiny.collate) > 0

    def test_gradients_that_are_all_zero(self):
        """Of LoRA's A while B is zero and frozen."""
        model = get_peft_model(tiny.llama(), tiny.lora())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
        with pytest.raises(GradientCheckError, match=r"exactly zero .* nothing to compare"):
            check_per_example_gradients(model, rows_of([(6, 5), (4, 0)]), tiny.collate)

    def test_a_new_adapter_whose_b_is_zero(self):
        model = get_peft_model(tiny.llama(), tiny.lora())
        error = check_per_example_gradients(model, rows_of([(6, 5), (4, 0)]), tiny.collate)
        assert 0 < error < 1e-5

    def test_no_trainable_parameters(self):
        model = tiny.llama().requires_grad_(False)
        with pytest.raises(UnsupportedModuleError, match="no gradient reaches a trainable"):
            check_per_example_gradients(model, rows_of([(6, 5)]), tiny.collate)

    def test_a_merged_adapter(self):
        model = adapted(tiny.llama())
        model.merge_adapter()
        with pytest.raises(UnsupportedModuleError, match="merged"):
            check_per_example_gradients(model, rows_of([(6, 5)]), tiny.collate)


def encoded(dataset):
    return list(tiny.tokenize(dataset))


@pytest.fixture
def tasks():
    return {
        "sums": encoded(tiny.sums(9, 1)),
        "letters": encoded(tiny.sums(5, 2, letters=True)),
        "wrong": encoded(tiny.sums(7, 3, shuffled=True)),
    }


@pytest.fixture
def target():
    return encoded(tiny.sums(6, 4))


class TestCaptureGradients:
    def capture(self, tasks, target, directory, model=None, **options):
        return capture_gradients(
            model or adapted(tiny.llama()),
            tasks,
            target,
            tiny.collate,
            directory=directory,
            **{"projection_dim": 32, "progress": False} | options,
        )

    def test_the_store_holds_projected_gradients_outputs_and_losses(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        store = self.capture(tasks, target, tmp_path, model, seed=3, batch_size=4)
        assert store.task_names == list(tasks)
        assert store.task_ids.tolist() == [0] * 9 + [1] * 5 + [2] * 7
        assert store.example_ids.tolist() == [*range(9), *range(5), *range(7)]
        assert store.target.task_names == ["target"]
        sketch = CountSketch(32, seed=3)
        all_rows = [row for rows in tasks.values() for row in rows]
        for part, rows in [(store, all_rows), (store.target, target)]:
            references = per_example_gradients(model, rows, tiny.collate)
            projected = [
                sum(sketch.project(name, g.flatten()[None])[0] for name, g in reference.items())
                for reference in references
            ]
            batches = [tiny.collate([row]) for row in rows]
            with torch.no_grad():
                losses = [loss_of_example(model, batch).item() for batch in batches]
                outputs = [margin_of_example(model, batch).item() for batch in batches]
            assert part.gradients == pytest.approx(torch.stack(projected).numpy(), abs=1e-5)
            assert part.losses == pytest.approx(losses, rel=1e-6)
            assert part.outputs == pytest.approx(outputs, rel=1e-5)
            tokens = [(np.array(row["labels"][1:]) != -100).sum() for row in rows]
            assert part.num_label_tokens.tolist() == tokens

    def test_the_batch_size_changes_rounding_only(self, tasks, target, tmp_path):
        one, other = (
            self.capture(tasks, target, tmp_path / str(size), batch_size=size) for size in (1, 16)
        )
        assert one.gradients == pytest.approx(other.gradients, abs=1e-6)
        assert one.example_ids.tolist() == other.example_ids.tolist()

    def test_batches_are_filled_up_to_the_tokens_of_the_longest(self, target, tmp_path):
        rows = rows_of([(3, 0)] * 11 + [(12, 0), (6, 0), (12, 0), (12, 0)])
        shapes = []

        def collate(batch):
            shapes.append((len(batch), max(len(row["input_ids"]) for row in batch)))
            return tiny.collate(batch)

        capture_gradients(
            adapted(tiny.llama()),
            {"a": rows},
            target,
            collate,
            directory=tmp_path,
            projection_dim=8,
            batch_size=2,
            loss=NEXT_TOKEN_LOSS,
            progress=False,
        )
        # At most 2 rows of 12 tokens, and at most 4 * 2 rows; the check comes first.
        first = shapes.index((8, 3))
        assert shapes[first : first + 4] == [(8, 3), (4, 6), (2, 12), (1, 12)]

    def test_one_by_one_gives_the_same_without_hooks(self, tasks, target, tmp_path):
        options = {"scalars": ("margin", "sampled_loss")}
        by_hooks = self.capture(tasks, target, tmp_path / "hooks", **options)
        alone = self.capture(tasks, target, tmp_path / "alone", one_by_one=True, **options)
        for scalar in options["scalars"]:
            for one, other in zip(alone.scalar(scalar), by_hooks.scalar(scalar), strict=True):
                assert one == pytest.approx(other, abs=1e-5)

    def test_one_by_one_takes_what_hooks_cannot(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        norm = model.get_base_model().model.norm
        norm.weight.requires_grad_(True)
        # The parameter acts outside of its module.
        model.get_base_model().lm_head.register_forward_hook(
            lambda module, args, output: output * norm.weight.mean()
        )
        with pytest.raises(GradientCheckError, match="one_by_one=True"):
            self.capture(tasks, target, tmp_path, model)
        store = self.capture(tasks, target, tmp_path, model, one_by_one=True)
        row = tasks["sums"][0]
        reference = per_example_gradients(model, [row], tiny.collate)[0]
        sketch = CountSketch(32, seed=0)
        expected = sum(sketch.project(name, g.flatten()[None])[0] for name, g in reference.items())
        assert store.gradients[0] == pytest.approx(expected.numpy(), abs=1e-5)

    def test_rows_without_label_tokens_are_not_those_that_are_checked(
        self, tasks, target, tmp_path
    ):
        tasks["sums"][0] = tasks["sums"][0] | {"labels": [-100] * len(tasks["sums"][0]["labels"])}
        store = self.capture(tasks, target, tmp_path)
        assert store.num_label_tokens[0] == 0
        assert not store.gradients[0].any()
        assert store.gradients[1].any()

    def test_parameters_without_a_gradient_count_as_zero(self, tasks, target, tmp_path):
        """As of a vision tower that text does not reach, or an adapter that is not active."""
        model = get_peft_model(tiny.llama(), tiny.lora())
        model.add_adapter("idle", tiny.lora(r=3))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        store = self.capture(tasks, target, tmp_path / "both", model)
        alone = self.capture(tasks, target, tmp_path / "alone", model, one_by_one=True)
        assert store.gradients == pytest.approx(alone.gradients, abs=1e-5)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and "idle" not in name)
        active = self.capture(tasks, target, tmp_path / "active", model)
        assert np.array_equal(store.gradients, active.gradients)

    def test_several_scalars_from_one_forward(self, tasks, target, tmp_path):
        store = self.capture(tasks, target, tmp_path, scalars=("loss", "margin"))
        alone = self.capture(tasks, target, tmp_path / "margin")
        assert store.scalars == ("loss", "margin")
        assert store.outputs == pytest.approx(store.losses, rel=1e-6)
        assert store.scalar("margin")[1] == pytest.approx(alone.gradients, abs=1e-6)
        assert not np.allclose(store.gradients, alone.gradients)

    def test_in_the_optimizers_coordinates_its_step_is_a_gradient_step(
        self, tasks, target, tmp_path
    ):
        model = adapted(tiny.llama())
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.95), eps=1e-6
        )
        for step in range(3):
            forward = forward_label_logits(model, tiny.collate(target[2 * step : 2 * step + 2]))
            SCALARS["loss"](forward).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        store = self.capture(
            tasks,
            target,
            tmp_path,
            model,
            optimizer=optimizer,
            scalars=("margin", "margin@optimizer"),
        )
        plain = self.capture(tasks, target, tmp_path / "plain", model)
        assert np.array_equal(store.gradients, plain.gradients)
        sketch = CountSketch(32, seed=0)
        row = tasks["sums"][0]
        reference = per_example_gradients(model, [row], tiny.collate)[0]
        expected = momentum = parameters = torch.zeros(())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                state = optimizer.state[parameter]
                v = state["exp_avg_sq"] / (1 - 0.95**3)
                scale = 1 / (v.sqrt() + 1e-6).sqrt()
                m = state["exp_avg"] / (1 - 0.9**3)
                expected = (
                    expected + sketch.project(name, (reference[name] * scale).flatten()[None])[0]
                )
                momentum = momentum + sketch.project(name, (m * scale).flatten()[None])[0]
                value = parameter.detach() / scale
                parameters = parameters + sketch.project(name, value.flatten()[None])[0]
        assert store.scalar("margin@optimizer")[1][0] == pytest.approx(
            expected.numpy(), rel=1e-4, abs=1e-3
        )
        assert store.vectors["momentum"] == pytest.approx(momentum.numpy(), rel=1e-3, abs=1e-4)
        assert store.vectors["parameters"] == pytest.approx(parameters.numpy(), rel=1e-3, abs=1e-5)
        assert store.metadata["optimizer"]["name"] == "adam"

    def test_sgd_has_its_momentum_and_no_scales(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.8, weight_decay=0.01)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        store = self.capture(
            tasks,
            target,
            tmp_path,
            model,
            optimizer=optimizer,
            scalars=("margin", "margin@optimizer"),
        )
        assert np.array_equal(store.gradients, store.scalar("margin@optimizer")[1])
        facts = store.metadata["optimizer"]
        assert facts["learning_rate_factor"] == pytest.approx(5)
        assert (facts["name"], facts["momentum_coefficient"], facts["weight_decay"]) == (
            "sgd",
            0.8,
            0.01,
        )
        sketch = CountSketch(32, seed=0)
        average = sum(
            sketch.project(n, 0.2 * optimizer.state[p]["momentum_buffer"].flatten()[None])[0]
            for n, p in model.named_parameters()
            if p.requires_grad
        )
        assert store.vectors["momentum"] == pytest.approx(average.numpy(), abs=1e-5)

    def test_an_optimizer_that_is_not_modelled(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        optimizer = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="steps of RMSprop are not modelled"):
            self.capture(tasks, target, tmp_path, model, optimizer=optimizer)

    def test_drawn_labels_belong_to_the_example_not_to_its_batch(self, tasks, target, tmp_path):
        one, other = (
            self.capture(tasks, target, tmp_path / str(b), batch_size=b, scalars=("sampled_loss",))
            for b in (1, 16)
        )
        assert one.gradients == pytest.approx(other.gradients, abs=1e-5)
        assert one.outputs == pytest.approx(other.outputs, rel=1e-5)
        another = self.capture(tasks, target, tmp_path / "seed", scalars=("sampled_loss",), seed=1)
        assert not np.allclose(another.outputs, one.outputs)

    def test_an_optimizer_that_has_not_stepped(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="optimizer: no second moments"):
            self.capture(tasks, target, tmp_path, model, optimizer=optimizer)

    def test_parameters_that_never_had_a_gradient_are_fixed(self, tasks, target, tmp_path, caplog):
        """The optimizer skips them: what is captured is that of the others alone."""
        stores = []
        for case in ("in the optimizer", "not trainable"):
            model = adapted(tiny.llama())
            parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
            skipped = {n: p for n, p in parameters.items() if "layers.1.mlp" in n}
            for name, parameter in parameters.items():
                if name not in skipped:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            if case == "not trainable":
                for parameter in skipped.values():
                    parameter.requires_grad_(False)
            stores.append(self.capture(tasks, target, tmp_path / case, model, optimizer=optimizer))
        one, other = stores
        for name in ("loss@optimizer", "sampled_loss@optimizer"):
            assert np.allclose(one.scalar(name)[1], other.scalar(name)[1], rtol=1e-5, atol=1e-7)
        for name in ("momentum", "parameters"):
            assert np.array_equal(one.vectors[name], other.vectors[name])
        assert one.metadata["optimizer"]["scales"] == other.metadata["optimizer"]["scales"]
        fixed = sum(parameter.numel() for parameter in skipped.values())
        assert one.metadata["optimizer"]["num_fixed_parameters"] == fixed
        assert "6 trainable parameter(s)" in caplog.text
        assert "the estimates take them as fixed" in caplog.text

    def test_the_model_is_left_as_it_was(self, tasks, target, tmp_path):
        model = adapted(tiny.llama(), lora_dropout=0.5).train()
        model.get_base_model().model.norm.eval()
        before = {
            "modes": [module.training for module in model.modules()],
            "values": [p.clone() for p in model.parameters()],
            "random": torch.get_rng_state(),
        }
        self.capture(tasks, target, tmp_path, model)
        assert [module.training for module in model.modules()] == before["modes"]
        assert all(map(torch.equal, model.parameters(), before["values"]))
        assert all(p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before["random"])

    @pytest.mark.parametrize("stop_after", [0, 1, 2])
    def test_a_pass_that_was_killed_goes_on_and_gives_the_same_bits(
        self, tasks, target, tmp_path, stop_after, monkeypatch
    ):
        whole = self.capture(tasks, target, tmp_path / "whole")
        seen = []

        def stop(rows):
            seen.append(len(rows))
            if len(seen) > 3 + stop_after:  # three batches belong to the check at the start
                raise KeyboardInterrupt
            return tiny.collate(rows)

        with pytest.raises(KeyboardInterrupt):
            capture_gradients(
                adapted(tiny.llama()),
                tasks,
                target,
                stop,
                directory=tmp_path / "killed",
                projection_dim=32,
                progress=False,
            )
        resumed = self.capture(tasks, target, tmp_path / "killed")
        assert np.array_equal(resumed.gradients, whole.gradients)
        assert np.array_equal(resumed.target.losses, whole.target.losses)

    def test_other_parameters_start_again(self, tasks, target, tmp_path):
        self.capture(tasks, target, tmp_path)
        model = adapted(tiny.llama())
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(0.1)
        again = self.capture(tasks, target, tmp_path, model)
        fresh = self.capture(tasks, target, tmp_path / "fresh", model)
        assert np.array_equal(again.gradients, fresh.gradients)

    def test_another_loss_starts_again(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())

        def losses(smoothing):
            def of_batch(batch):
                logits = model(**{n: v for n, v in batch.items() if n != "labels"}).logits
                logits, labels = logits[0, :-1], batch["labels"][0, 1:]
                return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)

            loss = ExampleLoss(of_batch=of_batch, of_batch_name=f"smoothing={smoothing}")
            store = self.capture(tasks, target, tmp_path, model, loss=loss, scalars=("loss",))
            return store.losses

        assert not np.allclose(losses(0.1), losses(0.3))

    def test_a_loss_that_is_nan_names_task_and_row(self, tasks, target, tmp_path):
        model = adapted(tiny.llama())
        token = tasks["letters"][3]["input_ids"][0]  # a letter, which no other task has
        row = next(i for i, r in enumerate(tasks["letters"]) if token in r["input_ids"])
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.weight[token] = torch.nan
        with pytest.raises(NonFiniteError, match=f"task 'letters', row {row}: the loss is NaN"):
            self.capture(tasks, target, tmp_path, model)

    def test_an_example_without_label_tokens_counts_nothing(self, tasks, target, tmp_path):
        row = tasks["sums"][2]
        tasks["sums"][2] = row | {"labels": [-100] * len(row["labels"])}
        store = self.capture(tasks, target, tmp_path)
        assert store.num_label_tokens[2] == 0
        assert store.losses[2] == store.example_weights[2] == 0
        assert (store.gradients[2] == 0).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": {}}, "tasks is empty"),
            ({"tasks": {"a": []}}, "task 'a' has no examples"),
            ({"target": []}, "target 'target' has no examples"),
            ({"groups": {"g": []}}, "group 'g' has no examples"),
            ({"scalars": ("loss", "nonsense")}, "unknown scalar 'nonsense'.*'margin'"),
            ({"scalars": ("loss@optimizer",)}, "scalar 'loss@optimizer' needs optimizer="),
            ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
            ({"projection_dim": 0}, "projection_dim must be an int of at least 2, got 0"),
        ],
    )
    def test_bad_input(self, options, message, tasks, target, tmp_path):
        arguments = {"tasks": tasks, "target": target, "directory": tmp_path} | options
        with pytest.raises(ValueError, match=message):
            self.capture(**arguments)

    def test_a_group_is_captured_as_if_it_were_the_target(self, tasks, target, tmp_path):
        rows = {"easy": tasks["sums"][:3], "hard/er": tasks["letters"][:5]}
        scalars = ("margin", "loss")
        store = self.capture(tasks, target, tmp_path / "one", groups=rows, scalars=scalars)
        without = self.capture(tasks, target, tmp_path / "none", scalars=scalars)
        assert np.array_equal(store.gradients, without.gradients)
        assert np.array_equal(store.target.gradients, without.target.gradients)
        assert list(store.groups) == ["easy", "hard/er"]
        for name, group in store.groups.items():
            alone = self.capture(tasks, rows[name], tmp_path / name, scalars=scalars).target
            assert group.task_names == [name]
            assert group.task_sizes.tolist() == [len(rows[name])]
            for scalar in scalars:
                for mine, its in zip(group.scalar(scalar), alone.scalar(scalar), strict=True):
                    assert np.allclose(mine, its, rtol=1e-4, atol=1e-6)
            assert np.allclose(group.losses, alone.losses, rtol=1e-5)
            assert np.array_equal(group.example_weights, alone.example_weights)

    def test_it_can_be_read_back(self, tasks, target, tmp_path):
        store = self.capture(tasks, target, tmp_path)
        again = GradientStore.load(tmp_path)
        assert np.array_equal(store.gradients, again.gradients)
        assert again.metadata == store.metadata
        assert again.metadata["projection_dim"] == 32
