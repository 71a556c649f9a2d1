"""Optimizers and learning-rate schedules: what is read of them is what they really do."""

from __future__ import annotations

import copy
import logging
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tiny import callback
from torch.optim import lr_scheduler as schedulers
from transformers.optimization import Adafactor, get_scheduler

from hf_auxselect import GradExLogistic, LinearizedTraining
from hf_auxselect.capture.optimizer_state import copy_of_state, read_optimizer, why_not_modelled
from hf_auxselect.capture.schedule import schedule_to_come
from hf_auxselect.estimators.unrolled_optimizer import UnrolledOptimizer
from hf_auxselect.store.arrays import GradientStore
from hf_auxselect.trainer import access

QUANTIZED_MAP = torch.linspace(-1, 1, 256)


class Small(torch.nn.Module):
    """A matrix, a vector, and one of each that gets no gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype))

        self.matrix, self.vector = parameter(4, 3), parameter(5)
        self.idle_matrix, self.idle_vector = parameter(2, 3), parameter(2)


def gradients_of(model: torch.nn.Module, seed: int, *, only_some: bool = True) -> None:
    """Random ones, as a backward pass leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = None
        if not (only_some and name.startswith("idle")):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def values_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().float().flatten().clone() for n, p in model.named_parameters()}


def assert_last_step_is_foreseen(
    model: torch.nn.Module,
    optimizer: Any,
    *,
    rate: float,
    rel: float = 2e-6,
    momentum_is_gradient: bool = False,
    num_steps: int = 5,
    group_rates: list[float] | None = None,
) -> None:
    """The state after a step, and that step's rate, give the step: -eta (P m + decay theta)."""
    for seed in range(num_steps):
        gradients_of(model, seed)
        before = values_of(model)
        optimizer.step()
    state = read_optimizer(model, optimizer, group_rates)
    after = values_of(model)
    assert "idle_matrix" not in state.scales
    for name in ("matrix", "vector"):
        momentum = state.momentum[name]
        if momentum_is_gradient:
            momentum = dict(model.named_parameters())[name].grad.float().flatten()
        decay = state.weight_decay * state.decay_ratios[name]
        step = -rate * (state.scales[name] ** 2 * momentum + decay * before[name])
        assert (after[name] - before[name]).numpy() == pytest.approx(
            step.numpy(), rel=rel * 100, abs=rel * float(step.abs().max()) + 3e-7
        )


class TestAdam:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"weight_decay": 0.3},
            {"amsgrad": True},
            {"foreach": True, "eps": 0.01},
            {"fused": True},
            {"lr": torch.tensor(0.1), "foreach": False},
        ],
        ids=str,
    )
    def test_its_step(self, options):
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.1} | options)
        assert_last_step_is_foreseen(model, optimizer, rate=0.1)

    def test_a_state_in_half_precision(self):
        model = Small(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
        for seed in range(5):
            gradients_of(model, seed)
            optimizer.step()
        state = read_optimizer(model, optimizer)
        moments = optimizer.state[model.matrix]
        v = moments["exp_avg_sq"].float() / (1 - 0.999**5)
        assert state.scales["matrix"].dtype == torch.float32
        assert torch.allclose(
            state.scales["matrix"], (1 / (v.sqrt() + 1e-8)).sqrt().flatten(), rtol=1e-5
        )

    def test_below_the_wrapper_of_accelerate(self):
        Accelerator(cpu=True)
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters())
        gradients_of(model, 0)
        optimizer.step()
        one, other = (
            read_optimizer(model, known) for known in (optimizer, AcceleratedOptimizer(optimizer))
        )
        assert tiny.same(one.scales, other.scales)

    def test_no_other_wrapper_is_looked_below(self):
        """An optimizer that uses another one may take quite other steps."""

        class Lookahead(torch.optim.Optimizer):
            def __init__(self, optimizer: Any) -> None:
                self.optimizer, self.param_groups = optimizer, optimizer.param_groups
                self.state = optimizer.state

        model = Small()
        reason = why_not_modelled(model, Lookahead(torch.optim.AdamW(model.parameters())))
        assert reason is not None and "Lookahead" in reason

    def test_entries_that_never_had_a_gradient_are_fixed(self):
        """Of an embedding, say: P would be 1 / epsilon, which no step ever is."""
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters())
        for seed in range(3):
            gradients_of(model, seed)
            model.matrix.grad[1] = 0
            optimizer.step()
        state = read_optimizer(model, optimizer)
        assert torch.equal(state.scales["matrix"].view(4, 3)[1], torch.zeros(3))
        assert (state.scales["matrix"].view(4, 3)[[0, 2, 3]] > 0).all()
        assert state.num_fixed == 3 + model.idle_matrix.numel() + model.idle_vector.numel()
        assert torch.isfinite(state.to_coordinates("matrix", torch.ones(12))).all()

    def test_parameters_that_step_at_different_times(self):
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters())
        gradients_of(model, 0)
        optimizer.step()
        model.vector.grad = None
        optimizer.step()
        state = read_optimizer(model, optimizer)
        assert state.steps_taken == 2
        exact = optimizer.state[model.vector]["exp_avg"] / (1 - 0.9)
        assert torch.allclose(state.momentum["vector"], exact)

    def test_parameters_that_the_optimizer_does_not_hold(self):
        model = Small()
        optimizer = torch.optim.AdamW([model.matrix])
        gradients_of(model, 0)
        optimizer.step()
        state = read_optimizer(model, optimizer)
        assert set(state.scales) == {"matrix"}
        other = torch.optim.AdamW(Small().parameters())
        with pytest.raises(ValueError, match="AdamW holds no trainable parameter of the model"):
            read_optimizer(model, other)

    def test_nothing_has_been_stepped(self):
        model = Small()
        with pytest.raises(ValueError, match="optimizer: no second moments"):
            read_optimizer(model, torch.optim.AdamW(model.parameters()))


class TestGroups:
    def test_rates_decay_and_epsilon_of_each_group(self):
        """As with LoRA+: the rate of one group is 16 times that of the other."""
        model = Small()
        groups = [
            {"params": [model.matrix, model.idle_matrix], "weight_decay": 0.2},
            {"params": [model.vector], "lr": 1.6, "eps": 0.01, "weight_decay": 0.0},
            {"params": []},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        assert_last_step_is_foreseen(model, optimizer, rate=0.1)
        state = read_optimizer(model, optimizer)
        assert state.weight_decay == pytest.approx(0.2)
        assert state.decay_ratios == {"matrix": 1.0, "vector": 0.0}
        assert [group.relative_rate for group in state.groups] == [1.0, 16.0, 1.0]
        assert [group.weight_decay for group in state.groups] == [0.2, 0.0, 0.01]
        assert [group.epsilon for group in state.groups] == [1e-8, 0.01, 1e-8]
        assert [group.num_parameters for group in state.groups] == [18, 5, 0]

    def test_rates_to_come_count_not_those_of_now(self):
        model = Small()
        groups = [{"params": [model.matrix]}, {"params": [model.vector], "lr": 0.4}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        assert_last_step_is_foreseen(model, optimizer, rate=0.1, group_rates=[2.0, 8.0])
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # in a warm-up
        one = read_optimizer(model, optimizer, [2.0, 8.0])
        assert one.groups[1].relative_rate == 4
        # A group that is not trained any more is fixed, also the first.
        other = read_optimizer(model, optimizer, [0.0, 8.0])
        assert set(other.scales) == {"vector"}
        assert other.groups[1].relative_rate == 1

    def test_the_two_groups_of_trainer_are_as_one_without_decay(self):
        states = []
        for split in (False, True):
            model = Small()
            parts = [[model.matrix], [model.vector]] if split else [[model.matrix, model.vector]]
            groups = [{"params": part, "weight_decay": 0.0} for part in parts]
            optimizer = torch.optim.AdamW(groups, lr=0.3)
            gradients_of(model, 0)
            optimizer.step()
            states.append(read_optimizer(model, optimizer, [0.7] * len(groups)))
        one, other = states
        assert tiny.same(one.scales, other.scales) and tiny.same(one.momentum, other.momentum)
        assert (one.weight_decay, one.decay_ratios) == (other.weight_decay, other.decay_ratios)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (
                lambda a, b: torch.optim.AdamW([a, b | {"betas": (0.5, 0.9)}]),
                "parameter groups of AdamW have different momentum, 0.5 and 0.9",
            ),
            (
                lambda a, b: torch.optim.Adam([a, b], weight_decay=0.1),
                "Adam with weight_decay=0.1 adds the decay to the gradient",
            ),
            (lambda a, b: torch.optim.AdamW([a, b], maximize=True), "AdamW with maximize=True"),
            (
                lambda a, b: torch.optim.SGD([a, b], lr=1, momentum=0.5, nesterov=True),
                "SGD with nesterov=True",
            ),
            (
                lambda a, b: torch.optim.SGD([a, b], lr=1, momentum=0.5, dampening=0.1),
                "SGD with dampening=0.1",
            ),
            (lambda a, b: Adafactor([a, b]), "Adafactor with relative_step=True"),
            (
                lambda a, b: Adafactor([a, b], lr=0.1, relative_step=False, beta1=0.9),
                "Adafactor with beta1=0.9",
            ),
        ],
    )
    def test_what_is_not_modelled(self, make, reason):
        model = Small()
        first, second = {"params": [model.matrix]}, {"params": [model.vector]}
        told = why_not_modelled(model, make(first, second))
        assert told is not None and reason in told

    def test_second_betas_may_differ(self):
        model = Small()
        groups = [{"params": [model.matrix]}, {"params": [model.vector], "betas": (0.9, 0.5)}]
        assert_last_step_is_foreseen(model, torch.optim.AdamW(groups, lr=0.1), rate=0.1)

    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.NAdam(p),
            lambda p: torch.optim.RAdam(p),
            lambda p: torch.optim.Adagrad(p),
            lambda p: torch.optim.RMSprop(p),
            lambda p: torch.optim.Adamax(p),
            lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
        ],
    )
    def test_others_are_refused_by_name(self, make):
        model = Small()
        optimizer = make(list(model.parameters()))
        reason = why_not_modelled(model, optimizer)
        assert reason is not None
        assert f"the steps of {type(optimizer).__name__} are not modelled" in reason
        assert "optim='adamw_torch'" in reason


class TestAdafactor:
    @pytest.mark.parametrize(
        "options",
        [{}, {"scale_parameter": True}, {"scale_parameter": True, "weight_decay": 0.2}],
        ids=str,
    )
    def test_the_step_of_transformers(self, options):
        model = Small()
        options = {"scale_parameter": False, "relative_step": False} | options
        # Its clipping of the update is left out of the model.
        optimizer = Adafactor(model.parameters(), lr=0.01, clip_threshold=1e9, **options)
        if not options["scale_parameter"]:
            assert_last_step_is_foreseen(model, optimizer, rate=0.01, momentum_is_gradient=True)
            return
        # Relative to the size of the parameter before the step, which changes slowly.
        optimizer.param_groups[0]["lr"] = 1e-4
        assert_last_step_is_foreseen(
            model, optimizer, rate=1e-4, momentum_is_gradient=True, rel=1e-3
        )

    def test_the_step_of_torch(self):
        model = Small()
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-4, weight_decay=0.5, d=1e9)
        assert_last_step_is_foreseen(
            model, optimizer, rate=1e-4, momentum_is_gradient=True, rel=1e-3
        )

    @pytest.mark.parametrize("cls", [Adafactor, torch.optim.Adafactor])
    def test_rows_that_never_had_a_gradient_are_fixed(self, cls):
        model = Small()
        options = {"relative_step": False} if cls is Adafactor else {}
        optimizer = cls(model.parameters(), lr=0.01, **options)
        for seed in range(3):
            gradients_of(model, seed)
            model.matrix.grad[1] = 0
            model.vector.grad[2] = 0
            optimizer.step()
        state = read_optimizer(model, optimizer)
        assert (state.scales["matrix"].view(4, 3) > 0).all(1).tolist() == [True, False, True, True]
        assert (state.scales["vector"] > 0).tolist() == [True, True, False, True, True]

    def test_rates_that_torch_does_not_take(self):
        model = Small()
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
        constant = schedulers.LambdaLR(optimizer, lambda step: 1.0)

        def reason(count: int) -> str | None:
            schedule = schedule_to_come(constant, optimizer, skip=0, count=count)
            return why_not_modelled(model, optimizer, schedule, first_step=20)

        assert reason(0) is None  # in a run that is resumed at its end
        assert reason(80) is None
        told = reason(81)
        assert told is not None and "no more than 1 / sqrt(101) at step 101" in told


def quantized(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks of 256, as bitsandbytes keeps them."""
    flat = values.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    largest = padded.abs().amax(1)
    codes = (padded / largest[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1)
    return codes.flatten()[: len(flat)].view(values.shape).to(torch.uint8), largest


@pytest.fixture
def bitsandbytes_adamw(monkeypatch):
    """A stand-in with the layout of AdamW8bit's state; its steps are AdamW's own."""
    module = types.ModuleType("bitsandbytes")

    class AdamW8bit(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            self._inner = torch.optim.AdamW(params, **options)
            own = [dict(group) for group in self._inner.param_groups]
            own[0].pop("decoupled_weight_decay")
            super().__init__(own, {})

        def step(self) -> None:  # type: ignore[override]
            self._inner.step()
            for p, moments in self._inner.state.items():
                state = self.state[p]
                state["step"] = int(moments["step"])
                for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
                    state[f"state{i}"] = moments[name]
                    if p.numel() >= 600:
                        codes, largest = quantized(moments[name], QUANTIZED_MAP)
                        state |= {
                            f"state{i}": codes,
                            f"qmap{i}": QUANTIZED_MAP,
                            f"absmax{i}": largest,
                        }

    AdamW8bit.__module__ = "bitsandbytes.optim.adamw"
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return AdamW8bit


class TestQuantized:
    def test_states_of_bitsandbytes(self, bitsandbytes_adamw):
        model = Small()
        model.matrix = torch.nn.Parameter(torch.randn(30, 20))
        optimizer = bitsandbytes_adamw(list(model.parameters()), lr=0.1, weight_decay=0.1)
        for seed in range(5):
            gradients_of(model, seed)
            optimizer.step()
        state = read_optimizer(model, optimizer)
        exact = read_optimizer(model, optimizer._inner)
        assert torch.equal(state.scales["vector"], exact.scales["vector"])
        moments = optimizer._inner.state[model.matrix]
        for name, ours, factor in (
            ("exp_avg", state.momentum["matrix"], 1 - 0.9**5),
            ("exp_avg_sq", (state.scales["matrix"] ** -2 - 1e-8) ** 2, 1 - 0.999**5),
        ):
            largest = float(moments[name].abs().max()) / factor
            error = (ours - moments[name].flatten() / factor).abs()
            assert float(error[state.scales["matrix"] > 0].max()) < 0.01 * largest
        assert state.weight_decay == pytest.approx(0.1)

    @pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "AdamW", "Adam"])
    def test_bitsandbytes_itself(self, name):
        optimizers = pytest.importorskip("bitsandbytes").optim
        model = Small()
        model.matrix = torch.nn.Parameter(0.1 * torch.randn(100, 60))
        cls = getattr(optimizers, name)
        if name.startswith("Paged") and not torch.cuda.is_available():
            pytest.skip("pages are those of a GPU")
        optimizer = cls(list(model.parameters()), lr=0.1, weight_decay=0.1)
        rel = 0.05 if "8bit" in name else 1e-4
        assert_last_step_is_foreseen(model, optimizer, rate=0.1, rel=rel)

    @pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
    def test_states_of_torchao(self, name, monkeypatch):
        optimizers = pytest.importorskip("torchao.optim")
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes long
        model = Small()
        model.matrix = torch.nn.Parameter(0.1 * torch.randn(64, 128))
        optimizer = getattr(optimizers, name)(list(model.parameters()), lr=0.1, weight_decay=0.1)
        exact_model = copy.deepcopy(model)
        exact = torch.optim.AdamW(exact_model.parameters(), lr=0.1, weight_decay=0.1)
        for seed in range(5):
            for own, stepper in ((model, optimizer), (exact_model, exact)):
                gradients_of(own, seed)
                stepper.step()
        ours, theirs = read_optimizer(model, optimizer), read_optimizer(exact_model, exact)
        assert torch.allclose(ours.scales["vector"], theirs.scales["vector"], rtol=1e-5)
        known = ours.scales["matrix"] > 0
        assert known.float().mean() > 0.9
        error = (ours.scales["matrix"] / theirs.scales["matrix"])[known].log().abs().median()
        assert float(error) < (0.25 if "4bit" in name else 0.03)
        before = optimizer.state[model.matrix]["exp_avg"].dequantize()
        copied = copy_of_state(optimizer)[model.matrix]
        optimizer.step()
        assert torch.equal(copied["exp_avg"].dequantize(), before)
        assert type(copied["exp_avg"]) is type(optimizer.state[model.matrix]["exp_avg"])

    def test_layouts_of_apex_and_torchdistx(self):
        """States of AdamW, with the steps in the group (apex) or without (torchdistx)."""
        model = Small()
        exact = torch.optim.AdamW(model.parameters())
        for seed in range(3):
            gradients_of(model, seed)
            exact.step()
        known = read_optimizer(model, exact)
        for module, name in (("apex.optimizers", "FusedAdam"), ("torchdistx.optimizers", None)):
            cls = type(
                name or "AnyPrecisionAdamW", (torch.optim.Optimizer,), {"__module__": module}
            )
            options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
            optimizer = cls(list(model.parameters()), options)
            for p, state in exact.state.items():
                optimizer.state[p] = dict(state)
                if name:
                    del optimizer.state[p]["step"]
                    optimizer.param_groups[0] |= {"step": 3, "bias_correction": True}
            state = read_optimizer(model, optimizer)
            assert tiny.same(state.scales, known.scales)
            assert tiny.same(state.momentum, known.momentum)
            assert (state.weight_decay, state.steps_taken) == (0.01, 3)


ANY_SCHEDULER = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda s: 1 / (1 + s), lambda s: 0.9**s]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda s: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5, 9]),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 12, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.3, 0.6], total_steps=12),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 0.4, step_size_up=3, mode="exp_range"),
    "CyclicLR.scale_fn": lambda o: schedulers.CyclicLR(
        o, 0.1, 0.4, step_size_up=3, scale_fn=lambda x: 0.5**x, scale_mode="cycle"
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
}
for _name, _options in {
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}.items():
    ANY_SCHEDULER[_name] = lambda o, name=_name, options=_options: get_scheduler(
        name, o, num_warmup_steps=3, num_training_steps=12, scheduler_specific_kwargs=options
    )


def two_groups(**options: Any) -> torch.optim.Optimizer:
    model = Small()
    groups = [{"params": [model.matrix]}, {"params": [model.vector], "lr": 0.4}]
    return torch.optim.AdamW(groups, **{"lr": 0.2} | options)


class TestSchedules:
    @pytest.mark.parametrize("name", ANY_SCHEDULER)
    def test_rates_to_come_are_those_that_come(self, name):
        optimizer = two_groups()
        scheduler = ANY_SCHEDULER[name](optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        groups = [dict(group) for group in optimizer.param_groups]
        record = repr(scheduler.state_dict())
        schedule = schedule_to_come(scheduler, optimizer, skip=2, count=7)
        assert schedule.unknown_because is None
        assert [dict(group) for group in optimizer.param_groups] == groups
        assert repr(scheduler.state_dict()) == record
        rates: list[list[float]] = []
        betas: list[list[float]] = []
        for _ in range(9):
            rates.append([group["lr"] for group in optimizer.param_groups])
            betas.append([group["betas"][0] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        assert schedule.learning_rates == [list(own) for own in zip(*rates[2:], strict=True)]
        assert schedule.momentum_coefficients == [list(own) for own in zip(*betas[2:], strict=True)]

    def test_a_rate_that_is_a_tensor(self):
        optimizer = two_groups(lr=torch.tensor(0.2), capturable=True, foreach=False)
        optimizer.param_groups[1]["lr"] = torch.tensor(0.4)
        scheduler = schedulers.ExponentialLR(optimizer, 0.5)
        schedule = schedule_to_come(scheduler, optimizer, skip=0, count=3)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.2)
        assert schedule.learning_rates[1] == pytest.approx([0.4, 0.2, 0.1])

    def test_a_schedule_that_belongs_to_a_large_object(self):
        """A bound method is copied with its object, unless that is shared."""

        class Owner:
            def __init__(self) -> None:
                self.factor = 0.5

            def __deepcopy__(self, memo: Any) -> Any:
                raise AssertionError("copied")

            def rule(self, step: int) -> float:
                return self.factor

        owner, optimizer = Owner(), two_groups()
        scheduler = schedulers.MultiplicativeLR(optimizer, owner.rule)
        schedule = schedule_to_come(scheduler, optimizer, skip=0, count=3, shared=[owner])
        assert schedule.learning_rates[0] == [0.2, 0.1, 0.05]

    def test_one_that_cannot_be_stepped_ahead(self):
        class Own:
            def __init__(self, optimizer: Any) -> None:
                self.optimizer = optimizer

            def step(self) -> None:
                raise RuntimeError("not now")

        optimizer = two_groups()
        schedule = schedule_to_come(Own(optimizer), optimizer, skip=1, count=2)
        assert schedule.learning_rates == [[0.2, 0.2], [0.4, 0.4]]
        assert schedule.unknown_because is not None
        assert "Own cannot be stepped (RuntimeError: not now)" in schedule.unknown_because

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("LambdaLR", "groups 0 and 1 of AdamW do not stay in proportion"),
            ("CosineAnnealingLR", "do not stay in proportion"),  # because of its smallest rate
            ("OneCycleLR", None),
            ("StepLR", None),
        ],
    )
    def test_groups_whose_rates_do_not_stay_in_proportion(self, name, reason):
        model = Small()
        optimizer = torch.optim.AdamW(
            [{"params": [model.matrix]}, {"params": [model.vector], "lr": 0.4}], lr=0.2
        )
        scheduler = ANY_SCHEDULER[name](optimizer)
        schedule = schedule_to_come(scheduler, optimizer, skip=0, count=12)
        told = why_not_modelled(model, optimizer, schedule)
        assert told is None if reason is None else told is not None and reason in told

    def test_a_momentum_of_sgd_that_is_cycled(self):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for cycle, expected in ((True, "cycle_momentum=False"), (False, None)):
            scheduler = schedulers.OneCycleLR(optimizer, 0.3, total_steps=12, cycle_momentum=cycle)
            schedule = schedule_to_come(scheduler, optimizer, skip=0, count=12)
            told = why_not_modelled(model, optimizer, schedule)
            assert told is None if expected is None else told is not None and expected in told


class TestUnrolledOptimizer:
    """Against real steps on a parabola: the loss is lambda (theta)^2 / 2 + b theta there."""

    def test_coupled_decay_is_that_of_sgd(self):
        curvature, slope, start, rates = 0.7, 0.3, 1.5, np.linspace(0.2, 0.02, 12)
        parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.8, weight_decay=0.25)
        parameter.grad = torch.tensor([0.4], dtype=torch.float64)
        optimizer.step()
        anchor = float(parameter.detach())
        momentum = 0.2 * float(optimizer.state[parameter]["momentum_buffer"])
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = slope + curvature * (parameter.detach() - anchor)
            optimizer.step()
        response = UnrolledOptimizer(
            rates / (1 - 0.8),
            momentum_coefficient=0.8,
            steps_taken=None,
            weight_decay=0.25,
            decay_is_coupled=True,
        ).response(np.array([curvature]))
        foreseen = (
            response.momentum * momentum - response.gradient * slope - response.parameters * anchor
        )
        assert foreseen[0] == pytest.approx(float(parameter.detach()) - anchor, rel=1e-5)

    def test_momentum_that_a_scheduler_changes(self):
        """Adam's own, with a preconditioner of 1."""
        curvature, slope, momentum, decay = 0.7, 0.3, -0.2, 0.1
        rates, betas = np.linspace(0.2, 0.02, 12), np.linspace(0.85, 0.95, 12)
        m, delta, start = momentum * (1 - betas[0] ** 4), 0.0, 1.5
        for t, (rate, beta) in enumerate(zip(rates, betas, strict=True), start=5):
            m = beta * m + (1 - beta) * (slope + curvature * delta)
            delta -= rate * (m / (1 - beta**t) + decay * (start + delta))
        recursion = UnrolledOptimizer(
            rates,
            momentum_coefficient=betas[0],
            steps_taken=4,
            weight_decay=decay,
            momentum_coefficients=betas,
        )
        response = recursion.response(np.array([curvature]))
        foreseen = (
            response.momentum * momentum - response.gradient * slope - response.parameters * start
        )
        assert foreseen[0] == pytest.approx(delta, rel=1e-5)

    def test_slopes_are_those_of_finite_differences(self):
        unrolled = UnrolledOptimizer(
            np.linspace(0.2, 0.02, 12), momentum_coefficient=0.9, steps_taken=4, weight_decay=0.1
        )
        values, step = np.array([-0.05, 0.0, 0.3, 5.0, 1e9]), 1e-7
        up, down = (np.stack(unrolled.response(values + sign * step)) for sign in (1, -1))
        slopes = np.stack(unrolled.response_slope(values))
        assert slopes == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)
        assert not slopes[:, -1].any()

    def test_momentum_coefficients_that_do_not_change_change_nothing(self):
        rates, values = np.linspace(0.2, 0.02, 12), np.array([0.0, 0.3, 5.0])
        options = {"momentum_coefficient": 0.9, "steps_taken": 4, "weight_decay": 0.1}
        one = UnrolledOptimizer(rates, **options).response(values)
        other = UnrolledOptimizer(
            rates, **options, momentum_coefficients=np.full(12, 0.9)
        ).response(values)
        assert np.allclose(one, other, rtol=1e-9)


def adapted_llama() -> Any:
    return get_peft_model(tiny.llama(), tiny.lora())


def captured(cb: Any) -> GradientStore:
    return GradientStore.load(cb.report.gradients_directory)


def recorded_rates(trainer: Any) -> list[list[float]]:
    """Rates of the groups at each later step of the optimizer."""
    seen: list[list[float]] = []
    optimizer = access.torch_optimizer(trainer)
    optimizer.register_step_pre_hook(
        lambda own, args, kwargs: seen.append([float(g["lr"]) for g in own.param_groups])
    )
    return seen


class TestInARun:
    """Through the callback, which selects after the fourth of ten steps."""

    def test_lora_plus_and_one_cycle(self, run_dir):
        model = adapted_llama()
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
        )
        scheduler = schedulers.OneCycleLR(optimizer, [1e-3, 1e-6, 1.6e-2, 1.6e-2], total_steps=10)
        cb = callback(verify=1)
        trainer = tiny.plain_trainer(run_dir, cb, model=model, optimizers=(optimizer, scheduler))
        seen = recorded_rates(trainer)
        trainer.train()
        store = captured(cb)
        training, facts = store.metadata["training"], store.metadata["optimizer"]
        # Verification took the six steps once more, at the same rates.
        assert len(seen) == 10 + 6 and seen[4:10] == seen[10:]
        assert training["group_learning_rates"] == [
            list(own) for own in zip(*seen[-6:], strict=True)
        ]
        assert training["learning_rates"] == training["group_learning_rates"][0]
        assert training["learning_rates_are_known"] is True
        assert len(set(training["momentum_coefficients"])) > 1
        assert [g["relative_rate"] for g in facts["groups"]] == pytest.approx(
            [1.0, 1e-3, 16.0, 16.0]
        )
        assert [g["num_parameters"] > 0 for g in facts["groups"]] == [True, False, True, False]

    @pytest.mark.parametrize("kind", ["cosine_with_restarts", "inverse_sqrt"])
    def test_schedules_of_trainer(self, run_dir, kind):
        cb = callback()
        trainer = tiny.plain_trainer(run_dir, cb, lr_scheduler_type=kind, warmup_steps=2)
        trainer.create_optimizer_and_scheduler(10)
        seen = recorded_rates(trainer)
        trainer.train()
        training = captured(cb).metadata["training"]
        assert training["learning_rates"] == [rates[0] for rates in seen[4:]]
        assert training["momentum_coefficients"] is None

    @pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
    def test_a_schedule_that_follows_a_metric(self, run_dir, caplog, kind):
        cb = callback(verify=1)
        options = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss"}
        trainer = tiny.plain_trainer(run_dir, cb, lr_scheduler_type=kind, **options)
        trainer.train()
        training = captured(cb).metadata["training"]
        assert training["learning_rates"] == [0.01] * 6
        assert training["learning_rates_are_known"] is False
        assert "learning rates of the steps after the switch are not known" in caplog.text
        assert len(cb.report.verification) == 1

    @pytest.mark.parametrize("optim", ["adafactor", "sgd"])
    def test_optimizers_of_trainer(self, run_dir, optim):
        cb = callback(verify=1)
        trainer = tiny.plain_trainer(run_dir, cb, optim=optim, weight_decay=0.01)
        trainer.train()
        assert math.isfinite(cb.report.row("chosen").loss)
        assert len(cb.report.verification) == 1

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"optim": "rmsprop"}, r"RMSprop \(optim='rmsprop'\): the steps of RMSprop"),
            ({"make": torch.optim.NAdam}, r"optimizer, NAdam: the steps of NAdam are not modelled"),
            (
                {"make": lambda p: torch.optim.Adam(p, weight_decay=0.1)},
                "Adam with weight_decay=0.1 adds the decay to the gradient",
            ),
        ],
    )
    def test_what_is_refused_before_the_first_step(self, run_dir, options, match):
        model = adapted_llama()
        if "make" in options:
            trained = [p for p in model.parameters() if p.requires_grad]
            options = {"optimizers": (options["make"](trained), None)}
        trainer = tiny.plain_trainer(run_dir, callback(), model=model, **options)
        with pytest.raises(ValueError, match=match) as caught:
            trainer.train()
        assert "pass estimator=GradExLogistic()" in str(caught.value)
        assert "OptimizerNames" not in str(caught.value)
        assert "fused" not in str(caught.value)
        assert trainer.state.global_step == 0

    def test_an_estimator_that_does_not_need_the_optimizer(self, run_dir):
        cb = callback(estimator=GradExLogistic())
        tiny.plain_trainer(run_dir, cb, optim="rmsprop").train()
        assert cb.report is not None

    def test_a_step_of_the_users_own(self, run_dir, caplog):
        class Cautious(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        model = adapted_llama()
        optimizer = Cautious([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        caplog.set_level(logging.WARNING)
        tiny.plain_trainer(run_dir, callback(), model=model, optimizers=(optimizer, None)).train()
        assert "Cautious replaces step of the optimizer" in caplog.text

    def test_parameters_that_get_no_gradient(self, run_dir):
        """A second adapter's, say; they are in the optimizer, which skips them."""
        model = adapted_llama()
        model.idle = torch.nn.Linear(3, 2)
        before = copy.deepcopy(model.idle.state_dict())
        cb = callback(verify=1, estimator=LinearizedTraining())
        trainer = tiny.plain_trainer(run_dir, cb, model=model)
        trainer.train()
        facts = captured(cb).metadata["optimizer"]
        assert facts["num_fixed_parameters"] == 8
        assert tiny.same(before, model.idle.state_dict())

    def test_a_run_that_is_resumed_after_the_switch(self, run_dir):
        def trainer_of(cb: Any) -> Any:
            model = adapted_llama()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.01)
            scheduler = schedulers.CosineAnnealingLR(optimizer, 10)
            return tiny.plain_trainer(
                run_dir,
                cb,
                model=model,
                optimizers=(optimizer, scheduler),
                save_strategy="steps",
                save_steps=6,
            )

        first, second = callback(), callback()
        whole, resumed = trainer_of(first), trainer_of(second)
        seen = recorded_rates(whole)
        whole.train()
        seen_again = recorded_rates(resumed)
        resumed.train(resume_from_checkpoint=str(run_dir / "checkpoint-6"))
        assert captured(first).metadata["training"]["learning_rates"] == [r[0] for r in seen[4:]]
        assert seen_again == seen[6:]
        assert second.report.weights == first.report.weights

    def test_a_restart_of_a_schedule_that_trainer_did_not_make(self, run_dir):
        model = adapted_llama()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.5)
        trainer = tiny.plain_trainer(
            run_dir, callback(after="restart"), model=model, optimizers=(optimizer, scheduler)
        )
        with pytest.raises(ValueError, match="not for the LambdaLR that it was given"):
            trainer.train()
