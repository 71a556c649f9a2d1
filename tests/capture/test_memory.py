"""Checkpointed passes, batches that do not fit, and what the preview says of memory."""

import logging
import weakref

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from test_adapters import captured_gradients
from test_probes import probed, stepped
from tiny import VOCABULARY, adapted, lora, randomized, rows_of
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_auxselect import capture_gradients
from hf_auxselect.capture.batching import FittingBatches
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.memory import PeakMemory, evaluation_mode, is_out_of_memory, take_rows
from hf_auxselect.capture.scalars import SCALARS, LabelLogits

V = len(VOCABULARY)
HALF = 0.5
HEADS = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2}

RANDOM_MODELS = {
    "llama": lambda: tiny.llama(attention_dropout=HALF),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            attn_pdrop=HALF,
            embd_pdrop=HALF,
            resid_pdrop=HALF,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=V,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=HALF,
            decoder_start_token_id=0,
        )
    ),
    "bert": lambda: BertLMHeadModel(
        BertConfig(
            vocab_size=V,
            intermediate_size=24,
            is_decoder=True,
            hidden_dropout_prob=HALF,
            attention_probs_dropout_prob=HALF,
            **HEADS,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=V,
            ffn_dim=24,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
            dropout=HALF,
            attention_dropout=HALF,
            layerdrop=HALF,
            **HEADS,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=V,
            intermediate_size=24,
            num_key_value_heads=1,
            num_local_experts=3,
            attention_dropout=HALF,
            router_jitter_noise=HALF,
            **HEADS,
        )
    ),
}
TARGETS = {
    "llama": "all-linear",
    "gpt2": "all-linear",
    "t5": "all-linear",
    "bert": "all-linear",
    "opt": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
}
ROWS = rows_of([(6, 5), (4, 3), (7, 9)])


def random_model(kind):
    """With all kinds of dropout, in training mode."""
    torch.manual_seed(0)
    config = lora(lora_dropout=HALF, target_modules=TARGETS[kind])
    model = randomized(get_peft_model(RANDOM_MODELS[kind](), config)).train()
    return model.float() if kind == "mixtral" else model  # its experts know no float64


def checkpointing(model, use_reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def calls_of_first_projection(model):
    """Counts the calls of a module within a layer."""
    calls = []
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("lora_A.default"))
    module.register_forward_hook(lambda *_: calls.append(name))
    return calls


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("kind", RANDOM_MODELS)
    def test_gradients_are_those_without_it_and_without_dropout(self, kind, use_reentrant):
        plain, model = random_model(kind), checkpointing(random_model(kind), use_reentrant)
        batch = tiny.collate(ROWS)
        with evaluation_mode(plain):
            expected = captured_gradients(plain, batch)
        state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
        calls = calls_of_first_projection(model)
        with evaluation_mode(model):
            captured = captured_gradients(model, batch)
        assert len(calls) == 2  # forward, and again in the backward pass
        assert torch.equal(state, torch.get_rng_state())
        assert modes == [m.training for m in model.modules()]
        assert not any("forward" in vars(m) for m in model.modules())
        assert captured.keys() == expected.keys()
        for name, gradients in expected.items():
            assert torch.allclose(captured[name], gradients, rtol=1e-6, atol=1e-12), name

    def test_several_scalars_from_one_forward(self, tmp_path):
        stores = [
            capture_gradients(
                model,
                {"a": ROWS},
                ROWS[:2],
                tiny.collate,
                directory=tmp_path / str(i),
                projection_dim=8,
                scalars=("margin", "loss", "sampled_loss"),
                progress=False,
            )
            for i, model in enumerate([adapted(tiny.llama()), checkpointing(adapted(tiny.llama()))])
        ]
        for scalar in ("margin", "loss", "sampled_loss"):
            for one, other in zip(*(store.scalar(scalar) for store in stores), strict=True):
                assert np.array_equal(one, other)

    def test_a_model_that_runs_its_layers_checkpointed_itself(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.gradient_checkpointing = True
                self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        model = Model()
        with evaluation_mode(model):
            x = torch.ones(2, 3, requires_grad=True)
            received = {}
            with GradientHooks(model, received.__setitem__):
                for layer in model.layers:
                    x = layer(x)
                assert {"forward"} <= set(vars(model.layers[0]))
                x.sum().backward()
        expected = model.layers[0].weight.grad
        assert torch.allclose(received["layers.0.weight"].sum(0), expected)
        assert "forward" not in vars(model.layers[0])

    def test_key_value_caches_are_off_and_come_back(self):
        model = checkpointing(adapted(tiny.llama(use_cache=True)))
        with evaluation_mode(model):
            assert model.config.use_cache is False
            assert model(**tiny.collate(ROWS)).past_key_values is None
        assert model.config.use_cache is True


def large_model(**options):
    """Activations, logits and gradients of a few MiB."""
    base = tiny.llama(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        max_position_embeddings=128,
    )
    return get_peft_model(base, lora(**options))


def long_rows(count, length=96):
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 2048, length).tolist() for _ in range(count)]
    return [{"input_ids": i, "attention_mask": [1] * length, "labels": i} for i in ids]


def peak_of_pass(model, rows, directory):
    with PeakMemory(torch.device("cpu")) as peak:
        capture_gradients(
            model,
            {"a": rows},
            rows[:1],
            tiny.collate,
            directory=directory,
            projection_dim=64,
            batch_size=8,
            scalars=("loss", "sampled_loss"),
            progress=False,
        )
    return peak.bytes


def peak_of_training(model, rows):
    model.train()
    with PeakMemory(torch.device("cpu")) as peak:
        model(**tiny.collate(rows)).loss.backward()
    model.zero_grad()
    return peak.bytes


class TestMemory:
    def test_the_pass_takes_what_training_takes(self, tmp_path):
        model, rows = checkpointing(large_model()), long_rows(8)
        assert peak_of_pass(model, rows, tmp_path) < 1.2 * peak_of_training(model, rows)

    def test_large_gradients_are_projected_a_few_at_a_time(self, tmp_path):
        model, rows = checkpointing(large_model(modules_to_save=["lm_head"])), long_rows(8)
        head = 4 * 2048 * 128
        peak = peak_of_pass(model, rows, tmp_path)
        assert peak < 1.2 * peak_of_training(model, rows) + 3 * 4 * head  # not 3 * 8

    @pytest.mark.parametrize("scalar", SCALARS)
    def test_large_logits_are_worked_on_in_parts_to_the_same_bits(self, scalar, monkeypatch):
        def gradient():
            torch.manual_seed(0)
            logits = torch.randn(20, 50, requires_grad=True)
            output = LabelLogits(
                logits=logits,
                labels=torch.randint(50, (20,)),
                examples=torch.arange(20) // 4,
                num_label_tokens=torch.full((5,), 4),
                uniforms=torch.rand(20),
            )
            values = SCALARS[scalar](output)
            return values, torch.autograd.grad(values.sum(), logits)[0]

        whole = gradient()
        monkeypatch.setattr("hf_auxselect.capture.memory._ENTRIES_OF_ROWS", 150)
        for one, other in zip(whole, gradient(), strict=True):
            assert torch.equal(one, other)

    def test_gradients_in_parts_are_the_same(self, tmp_path, monkeypatch):
        def captured(directory):
            return capture_gradients(
                adapted(tiny.llama()),
                {"a": ROWS},
                ROWS,
                tiny.collate,
                directory=directory,
                projection_dim=8,
                progress=False,
            ).gradients

        whole = captured(tmp_path / "whole")
        monkeypatch.setattr("hf_auxselect.capture.hooks._ENTRIES_AT_ONCE", 70)
        assert captured(tmp_path / "parts") == pytest.approx(whole, rel=1e-6, abs=1e-9)

    def test_rows_taken(self):
        matrix, rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), [3, 0]
        assert torch.equal(take_rows(matrix, torch.tensor(rows)), matrix[rows])
        assert torch.autograd.gradcheck(lambda m: take_rows(m, torch.tensor(rows)), matrix)

    def test_the_peak_of_tensors(self):
        before = torch.ones(1000)
        with PeakMemory(torch.device("cpu")) as peak:
            one = before * 2
            views = [one.view(10, 100), before.view(-1), one[3:]]
            two = one + 1
            del one, views
            three = two + 1
            del two, three
        assert peak.bytes == 8000


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": MemoryError("Unable to allocate 3.1 GiB for an array"),
}


def with_room_for(model, examples, error):
    """The model runs out of memory at more examples; the sizes of the batches it is given."""
    sizes = []

    def refuse(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > examples:
            raise type(error)(*error.args)

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return sizes


class TestBatchesThatDoNotFit:
    def capture(self, model, rows, directory):
        return capture_gradients(
            model,
            {"a": rows, "b": rows[:3]},
            rows[:5],
            tiny.collate,
            directory=directory,
            projection_dim=16,
            batch_size=8,
            progress=False,
        )

    @pytest.mark.parametrize("kind", ERRORS)
    def test_they_are_halved_to_the_same_numbers(self, kind, tmp_path, caplog):
        rows = rows_of([(6, mask) for mask in range(16)])
        expected = self.capture(adapted(tiny.llama()), rows, tmp_path / "whole")
        model = adapted(tiny.llama())
        sizes = with_room_for(model, 2, ERRORS[kind])
        store = self.capture(model, rows, tmp_path / "parts")
        assert store.gradients == pytest.approx(expected.gradients, rel=1e-5, abs=1e-7)
        assert store.losses == pytest.approx(expected.losses, rel=1e-6)
        assert [size for size in sizes if size > 2] == [8, 4]  # each limit is met once
        messages = [r.getMessage() for r in caplog.records if "does not suffice" in r.getMessage()]
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
        assert "a batch of 8 examples (48 tokens" in messages[0]

    def test_probes_too(self, tmp_path):
        rows = {"a": rows_of([(6, mask) for mask in range(12)]), "b": rows_of([(6, 1)] * 4)}
        whole = stepped()
        expected = probed(whole[0], whole[1], rows, tmp_path / "whole")
        model, optimizer = stepped()
        sizes = with_room_for(model, 2, ERRORS["cuda"])
        store = probed(model, optimizer, rows, tmp_path / "parts")
        assert max(sizes) > 2
        for name, vectors in expected.vectors.items():
            assert store.vectors[name] == pytest.approx(vectors, rel=1e-2, abs=1e-4), name

    def test_one_example_that_does_not_fit(self, tmp_path):
        model = adapted(tiny.llama())
        with_room_for(model, 0, ERRORS["cuda"])
        with pytest.raises(torch.OutOfMemoryError, match=r"one example of 6 tokens.*max_length"):
            list(FittingBatches().run(rows_of([(6, 1)] * 4), lambda r: model(**tiny.collate(r))))

    def test_tensors_of_the_attempt_are_freed(self):
        references = []

        def run(rows):
            assert not any(reference() is not None for reference in references)
            tensor = torch.ones(len(rows))
            references.append(weakref.ref(tensor))
            if len(rows) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return 1

        assert len(list(FittingBatches().run(rows_of([(3, 1)] * 2), run))) == 2

    @pytest.mark.parametrize(
        "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")]
    )
    def test_other_errors_are_raised_at_once(self, error):
        def run(rows):
            calls.append(rows)
            raise error

        calls = []
        with pytest.raises(type(error), match=str(error)):
            list(FittingBatches().run(rows_of([(3, 1)] * 4), run))
        assert len(calls) == 1

    def test_a_cpu_that_is_out_of_memory_says_so(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**50)
        assert is_out_of_memory(caught.value)


class Odd(nn.Module):
    """vmap knows no rule for what it does."""

    def __init__(self, error=None):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.tensor([1.0, 2.0])), error

    def forward(self, x):
        if self.error and torch._C._are_functorch_transforms_active():
            raise self.error
        return x * self.weight * (1 if float(x.detach().sum()) > -1e9 else 2)


class TestModulesThatAreReplayedOneByOne:
    def gradients(self, module):
        received = {}
        with GradientHooks(module, received.__setitem__):
            module(torch.tensor([[1.0, 3.0], [2.0, 5.0]])).sum().backward()
        return received["weight"].tolist()

    def test_it_is_said_once(self, caplog):
        caplog.set_level(logging.INFO)
        module = Odd(RuntimeError("a kernel of this test without a rule"))
        for _ in range(2):
            assert self.gradients(module) == [[1, 3], [2, 5]]
        said = [r for r in caplog.records if "example by example" in r.getMessage()]
        assert len(said) == 1
        assert said[0].levelno == logging.INFO
        assert "(Odd)" in said[0].getMessage()

    def test_running_out_of_memory_is_not_swallowed(self):
        with pytest.raises(torch.OutOfMemoryError):
            self.gradients(Odd(ERRORS["cuda"]))
