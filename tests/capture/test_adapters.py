"""Per-example gradients by hooks = autograd, one example at a time, for every kind of adapter."""

import functools
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import AdaLoraConfig, IA3Config, LoHaConfig, PromptTuningConfig, VeraConfig
from peft import get_peft_model as get_peft
from reference import loss_of_example, per_example_gradients
from tiny import adapted, gpt2, llama, randomized, rows_of
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_auxselect import (
    UnsupportedModuleError,
    capture_gradients,
    check_per_example_gradients,
)
from hf_auxselect.capture.check import compare_with_autograd, gradients_one_by_one
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.scalars import SCALARS, forward_label_logits

SIZES = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def gemma() -> Gemma3ForCausalLM:
    """Its embedding multiplies what it looks up."""
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES))


def qwen() -> Qwen3ForCausalLM:
    """It normalises queries and keys of each head."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(tiny.VOCABULARY), decoder_start_token_id=0, **sizes)
    )


def two_adapters(active: str | list[str]) -> nn.Module:
    model = get_peft(llama(), tiny.lora())
    model.add_adapter("other", tiny.lora(r=3, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(active)
    return randomized(model)


def other_adapter(kind: type, **options) -> nn.Module:
    return randomized(get_peft(llama(), kind(task_type="CAUSAL_LM", **options)))


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
TIED = {"tie_word_embeddings": True}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: adapted(llama()),
    "lora, all linear names": lambda: adapted(
        llama(),
        target_modules=[
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj", "lm_head"),
        ],
    ),
    "lora on Conv1D": lambda: adapted(gpt2(), **CONV1D),
    "lora on tied weights": lambda: adapted(llama(**TIED)),
    "lora on normalised queries": lambda: adapted(qwen()),
    "rslora": lambda: adapted(llama(), use_rslora=True),
    "dora": lambda: adapted(llama(), use_dora=True),
    "dora with biases": lambda: adapted(llama(attention_bias=True), use_dora=True, bias="all"),
    "dora with dropout": lambda: adapted(llama(), use_dora=True, lora_dropout=0.5),
    "dora on Conv1D": lambda: adapted(gpt2(), use_dora=True, **CONV1D),
    "lora_bias": lambda: adapted(llama(), lora_bias=True),
    "bias=lora_only": lambda: adapted(llama(attention_bias=True), bias="lora_only"),
    "bias=lora_only on Conv1D": lambda: adapted(gpt2(), bias="lora_only", **CONV1D),
    "modules_to_save": lambda: adapted(llama(), modules_to_save=["lm_head"]),
    "modules_to_save, embedding": lambda: adapted(
        llama(), modules_to_save=["embed_tokens", "lm_head", "norm"]
    ),
    "modules_to_save, tied": lambda: adapted(
        llama(**TIED), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "lora on embeddings": lambda: adapted(llama(), **EMBEDDING),
    "lora on embeddings alone": lambda: adapted(llama(), target_modules=["embed_tokens"]),
    "lora on embeddings, tied": lambda: adapted(llama(**TIED), **EMBEDDING),
    "lora on embeddings and head, tied": lambda: adapted(
        llama(**TIED), **EMBEDDING, ensure_weight_tying=True
    ),
    "lora on embeddings that are scaled": lambda: adapted(gemma(), **EMBEDDING),
    "dora on embeddings": lambda: adapted(llama(), use_dora=True, **EMBEDDING),
    "trainable tokens": lambda: adapted(llama(), trainable_token_indices=[3, 4, 5]),
    "trainable tokens, tied": lambda: adapted(llama(**TIED), trainable_token_indices=[3, 4, 5]),
    "two adapters, the first active": lambda: two_adapters("default"),
    "two adapters, the second active": lambda: two_adapters("other"),
    "two adapters, both active": lambda: two_adapters(["default", "other"]),
    "adalora": lambda: other_adapter(
        AdaLoraConfig, init_r=2, target_modules=["o_proj"], total_step=9
    ),
    "vera": lambda: other_adapter(VeraConfig, r=2, target_modules=["q_proj", "o_proj"]),
    # Its backward has no rule for vmap.
    "loha": lambda: other_adapter(LoHaConfig, r=2, target_modules=["v_proj", "up_proj"]),
    "ia3": lambda: other_adapter(
        IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "all of a Llama": lambda: randomized(llama(attention_bias=True)),
    "all of a Llama, tied": lambda: randomized(llama(**TIED)),
    "all of a Qwen": lambda: randomized(qwen()),
    "all of a GPT-2": lambda: randomized(gpt2()),
}


@functools.cache
def model_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model that tests share because they leave it as it is."""
    return MODELS[kind]().to(dtype)


def padded(rows, side="right"):
    """Padded on a side, with position_ids, without which GPT-2 has one row for all examples."""
    batch = tiny.collate(rows)
    if side == "left":
        shifts = [int((mask == 0).sum()) for mask in batch["attention_mask"]]
        batch = {
            name: torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)])
            for name, value in batch.items()
        }
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch | {"position_ids": positions}


@st.composite
def batches(draw):
    """Rows, and the side on which they are padded."""
    shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(0, 511)), min_size=1, max_size=5)
    rows = rows_of(draw(shapes))
    for row in rows:
        row["labels"][0] = -100  # nothing predicts it, unless a pad comes before
    return rows, draw(st.sampled_from(["right", "left"]))


def captured_gradients(model, batch, scalar="margin", rerun=frozenset()):
    """What the hooks see, summed over calls: name -> [B, *shape]."""
    captured: dict[str, torch.Tensor] = {}

    def receive(name, gradients):
        captured[name] = captured.get(name, 0) + gradients

    def run():
        captured.clear()
        hooks.backward(SCALARS[scalar](forward_label_logits(model, batch)))

    with GradientHooks(model, receive, rerun=rerun) as hooks:
        hooks.capture(run)
    assert all(parameter.grad is None for parameter in model.parameters())
    return captured


def largest_relative_error(captured, references, floor=1e-3):
    """Of the gradient of an example and parameter, in norms; ``floor`` is a share of the whole.

    A parameter with less than that share of the example's gradient is measured against it.
    """
    errors = []
    for i, reference in enumerate(references):
        norms = {name: expected.norm() for name, expected in reference.items()}
        whole = torch.stack(list(norms.values())).norm().clamp(min=1e-30)
        errors += [
            (captured[name][i] - expected).norm() / torch.maximum(norms[name], floor * whole)
            for name, expected in reference.items()
        ]
    return float(torch.stack(errors).max())  # NaN if any is


@pytest.mark.parametrize("kind", MODELS)
class TestAgainstAutograd:
    @settings(max_examples=8)
    @given(batch=batches())
    def test_in_float64_to_1e_9_of_each_parameter(self, kind, batch):
        model, (rows, side) = model_of(kind), batch
        references = per_example_gradients(model, rows, padded)
        captured = captured_gradients(model, padded(rows, side))
        assert set(captured) == {n for n, p in model.named_parameters() if p.requires_grad}
        assert largest_relative_error(captured, references) < 1e-9

    @settings(max_examples=5)
    @given(batch=batches())
    def test_in_float32_to_1e_5_of_the_gradient(self, kind, batch):
        model, (rows, side) = model_of(kind, torch.float32), batch
        references = per_example_gradients(model, rows, padded)
        captured = captured_gradients(model, padded(rows, side))
        assert largest_relative_error(captured, references, floor=1) < 1e-5


@given(batch=batches())
def test_the_loss_is_the_models_own(batch):
    model, (rows, side) = model_of("lora"), batch
    references = per_example_gradients(model, rows, tiny.collate, loss_of_example)
    captured = captured_gradients(model, padded(rows, side), scalar="loss")
    assert largest_relative_error(captured, references) < 1e-5  # its loss is in float32


def test_the_sum_over_examples_is_the_gradient_of_the_batch():
    model, rows = model_of("lora"), rows_of([(9, 500), (4, 3), (6, 0)])
    captured = captured_gradients(model, tiny.collate(rows))
    SCALARS["margin"](forward_label_logits(model, tiny.collate(rows))).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(captured[name].sum(0), parameter.grad, atol=1e-12)
    model.zero_grad()


def test_an_encoder_decoder_model():
    model = adapted(t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    rows = rows_of([(9, 500), (4, 3)])

    def margin(model, batch):
        logits = model(**batch).logits[0].log_softmax(-1)
        chosen = batch["labels"][0] != -100
        log_p = logits[chosen].gather(1, batch["labels"][0][chosen, None]).squeeze(1)
        return (log_p - torch.log1p(-log_p.exp())).mean()

    references = per_example_gradients(model, rows, tiny.collate, margin)
    captured = captured_gradients(model, tiny.collate(rows))
    # Transformers 4.57 takes T5's softmax in float32, 5.24 does not.
    tolerance = 1e-9 if Version(transformers.__version__) >= Version("5.24") else 1e-6
    assert largest_relative_error(captured, references) < tolerance


class Doubling(nn.Linear):
    """Looks like a linear layer and is none."""

    def forward(self, x):
        return 2 * super().forward(x)


class Gate(nn.Module):
    """Two tensors in, and a number; parameters of its own and in a list."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shifts = nn.ParameterList([torch.zeros(size), torch.zeros(size)])

    def forward(self, x, gate, power=1):
        return self.scale * x * torch.sigmoid(gate + self.shifts[0]) ** power + self.shifts[1]


class Custom(nn.Module):
    """What adapters and models of other authors may do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(tiny.VOCABULARY), 8, padding_idx=0)
        self.layer = nn.Linear(8, 8)
        self.doubling = Doubling(8, 8)
        self.gate = Gate(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, len(tiny.VOCABULARY), bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask, position_ids=None):
        x = self.embed(input_ids)
        x = self.norm(self.layer(torch.tanh(self.layer(x))))
        x = self.gate(x, gate=self.doubling(x), power=2)
        return type("Output", (), {"logits": self.head(x)})


class Recurrent(Custom):
    """A module with two outputs."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(8, 8, batch_first=True)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.recurrent(self.embed(input_ids))[0])
        loss = labels is not None and nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        return type("Output", (), {"logits": logits, "loss": loss})


@given(batch=batches())
def test_modules_that_run_twice_tied_weights_and_several_inputs(batch):
    torch.manual_seed(0)
    model, (rows, side) = randomized(Custom()), batch
    references = per_example_gradients(model, rows, padded)
    captured = captured_gradients(model, padded(rows, side))
    assert largest_relative_error(captured, references) < 1e-9


@pytest.mark.parametrize("kind", ["lora", "dora", "lora on embeddings", "trainable tokens"])
def test_a_merged_adapter_is_named(kind):
    model = MODELS[kind]()
    model.merge_adapter()
    with pytest.raises(UnsupportedModuleError, match=r"no gradient .* adapter is merged"):
        check_per_example_gradients(model, rows_of([(6, 5)]), tiny.collate)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MAMBA = {"mamba_d_state": 4, "use_mamba_kernels": False}


def architecture(name: str, **options) -> nn.Module:
    """A tiny model of Transformers; its experts can compute in float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES | {"max_position_embeddings": 64} | options
    )
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    if hasattr(model, "set_experts_implementation"):  # Transformers 4 knows eager ones alone
        model.set_experts_implementation("eager")
    return model


def experts_adapted(model: nn.Module) -> nn.Module:
    """LoRA on attention and on the parameters that hold the weights of all experts."""
    experts = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n]
    return adapted(model, target_modules=["q_proj", "v_proj"], target_parameters=experts)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    # Layers see the positions of all examples in one dimension.
    "OPT": lambda: architecture("OPT", ffn_dim=24, word_embed_proj_dim=16),
    "Mixtral": lambda: architecture("Mixtral", num_local_experts=4),
    "Qwen2-MoE": lambda: architecture("Qwen2Moe", shared_expert_intermediate_size=12, **EXPERTS),
    "DeepSeek-V3": lambda: architecture(
        "DeepseekV3",
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "v_head_dim": 8},
        **LATENT | {"head_dim": 4, "num_key_value_heads": 2},
    ),
    # A parameter of the attention; positions that are one for all examples.
    "GPT-OSS": lambda: architecture("GptOss", num_local_experts=4, num_experts_per_tok=2),
    # Tokens are repeated for each expert; the router's two outputs depend on each other.
    "Llama 4": lambda: architecture("Llama4Text", num_local_experts=4, intermediate_size_mlp=24),
    # State spaces, that use the parameters of modules which they do not call.
    "Jamba": lambda: architecture(
        "Jamba",
        **{"num_experts": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **MAMBA,
    ),
    # A block that several layers share, each with an adapter of its own.
    "Zamba2": lambda: architecture(
        "Zamba2",
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
        **{"mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 8, "chunk_size": 8},
        **{"num_mem_blocks": 1, "num_key_value_heads": 2, "adapter_rank": 4},
        **MAMBA | {"attention_head_dim": 16},
    ),
}


@pytest.mark.skipif(tiny.OLDER, reason="Transformers 4 computes these models otherwise")
class TestArchitectures:
    """Modules whose tensors do not have the batch as first dimension."""

    def compare(self, model, tolerance=1e-9):
        rows = rows_of([(9, 500), (4, 2), (6, 0)])
        references = per_example_gradients(model, rows, padded)
        captured = captured_gradients(model, padded(rows))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in captured:
                captured[name] = parameter.new_zeros(len(rows), *parameter.shape)
        assert largest_relative_error(captured, references) < tolerance
        assert check_per_example_gradients(model, rows[:2], tiny.collate) < tolerance

    @pytest.mark.parametrize("name", ["OPT", "Mixtral", "Qwen2-MoE", "Jamba", "Zamba2"])
    def test_lora_on_all_linear_layers(self, name):
        self.compare(adapted(ARCHITECTURES[name]()))

    @pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-OSS", "Llama 4"])
    def test_lora_on_experts(self, name):
        model = experts_adapted(ARCHITECTURES[name]())
        assert any(".experts." in n and p.requires_grad for n, p in model.named_parameters())
        self.compare(model)

    @pytest.mark.parametrize("name", ["GPT-OSS", "Llama 4", "Jamba"])
    def test_all_parameters(self, name):
        self.compare(randomized(ARCHITECTURES[name]()))

    def test_experts_that_are_multiplied_as_a_group(self):
        model = experts_adapted(ARCHITECTURES["Mixtral"]()).float()
        model.get_base_model().set_experts_implementation("grouped_mm")
        self.compare(model, tolerance=1e-4)


class Routed(Custom):
    """Experts in a list, each with the tokens that are routed to it, in an order of its own."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            flat = x.reshape(-1, 8)
            scores = self.router(flat).softmax(-1)
            routed = torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                tokens = (scores.argmax(-1) == i).nonzero().squeeze(1).flip(0)
                routed = routed.index_add(0, tokens, expert(flat[tokens]) * scores[tokens, i, None])
            return x + routed.reshape(x.shape)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, input_ids, attention_mask, position_ids=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"logits": self.head(x)})


class SequenceFirst(Custom):
    """Layers see [S, B, H] or [S*B, H]: positions come first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x_SBH = torch.tanh(self.first(x.transpose(0, 1)))
            return x + self.second(x_SBH.reshape(-1, 8)).reshape(x_SBH.shape).transpose(0, 1)

    def __init__(self, flat=False):
        super().__init__()
        self.block, self.flat = self.Block(), flat
        self.block.first.requires_grad_(not flat)

    def forward(self, input_ids, attention_mask, position_ids=None):
        return type("Output", (), {"logits": self.head(self.block(self.embed(input_ids)))})


class Attention(Custom):
    """Attention of PyTorch uses the parameters of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids, attention_mask, position_ids=None):
        x = self.embed(input_ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
        return type("Output", (), {"logits": self.head(x)})


class TestModulesThatDoNotSplitByExample:
    """Those around them run once more for each example, or all of the model does."""

    CASES: ClassVar = {
        "routed tokens": lambda: randomized(Routed()),
        "positions first": lambda: randomized(SequenceFirst()),
        "positions first, in one dimension": lambda: randomized(SequenceFirst(flat=True)),
        "multi-head attention": lambda: randomized(Attention()),
        # More than one output.
        "recurrent": lambda: randomized(Recurrent()),
    }

    @settings(max_examples=8)
    @given(batch=batches())
    @pytest.mark.parametrize("name", CASES)
    def test_their_gradients_are_exact(self, name, batch):
        """Also where sizes agree by chance, after the check has seen two other examples."""
        model, (rows, _) = self.CASES[name](), batch
        checked = compare_with_autograd(model, rows_of([(9, 5), (4, 0)]), tiny.collate)
        references = per_example_gradients(model, rows, tiny.collate)
        captured = captured_gradients(model, tiny.collate(rows), rerun=checked.rerun)
        for name, parameter in model.named_parameters():
            captured.setdefault(name, parameter.new_zeros(len(rows), *parameter.shape))
        assert largest_relative_error(captured, references) < 1e-9

    ALONE: ClassVar = {
        # One row for all examples, just below the whole model.
        "prompt_encoder": lambda: other_adapter(PromptTuningConfig, num_virtual_tokens=3),
        "transformer.wpe": lambda: randomized(gpt2()),
    }

    @pytest.mark.parametrize("name", ALONE)
    def test_examples_run_alone_and_the_reason_is_told(self, name, tmp_path, caplog):
        model, rows = self.ALONE[name](), rows_of([(9, 500), (4, 2), (6, 0), (5, 0)])
        assert check_per_example_gradients(model, rows, tiny.collate) == 0
        stores = [
            capture_gradients(
                model,
                {"a": rows},
                rows,
                tiny.collate,
                directory=tmp_path / str(one_by_one),
                projection_dim=16,
                one_by_one=one_by_one,
                progress=False,
            )
            for one_by_one in (False, True)
        ]
        assert np.array_equal(stores[0].gradients, stores[1].gradients)
        assert np.abs(stores[0].gradients).max() > 0
        assert f"runs each example alone, which is slower: the trainable parameter '{name}" in (
            caplog.text
        )

    @pytest.mark.parametrize("name", ALONE)
    def test_one_by_one_is_the_models_own_gradient(self, name):
        model, rows = self.ALONE[name](), rows_of([(9, 500), (4, 2), (6, 0)])
        references = per_example_gradients(model, rows, tiny.collate, loss_of_example)
        alone = list(gradients_one_by_one(model, rows, tiny.collate, scalar="loss"))
        stacked = {name: torch.stack([g[name] for g in alone]) for name in alone[0]}
        assert largest_relative_error(stacked, references) < 1e-5  # its loss is in float32

    def test_a_part_that_only_some_examples_use(self, tmp_path, caplog):
        """The check sees other examples; those that use it run alone all the same."""

        class Sometimes(Custom):
            def forward(self, input_ids, attention_mask):
                x = self.embed(input_ids)
                if input_ids.shape[1] == 7:
                    x = self.gate(x, gate=x.new_zeros(8))
                return type("Output", (), {"logits": self.head(x)})

        model, rows = randomized(Sometimes()), rows_of([(5, 2), (6, 0), (7, 3), (7, 5), (4, 0)])
        one, other = (
            capture_gradients(
                model,
                {"a": rows},
                rows[:1],
                tiny.collate,
                directory=tmp_path / str(one_by_one),
                projection_dim=16,
                one_by_one=one_by_one,
                progress=False,
            )
            for one_by_one in (False, True)
        )
        assert one.gradients == pytest.approx(other.gradients, abs=1e-5)
        assert "'gate' (Gate)" in caplog.text

    def test_hooks_of_a_plain_backward_name_the_module(self):
        """Without ``hooks.backward``, which knows what to do."""
        model, rows = randomized(gpt2()), rows_of([(6, 5), (6, 0)])
        output = None
        with (
            GradientHooks(model, lambda name, gradients: None),
            pytest.raises(UnsupportedModuleError, match=r"'transformer.wpe' .* position_ids"),
        ):
            output = forward_label_logits(model, tiny.collate(rows))
            SCALARS["margin"](output).sum().backward()
        model.zero_grad()


class TestGradientCheckpointing:
    """Layers run again in the backward pass."""

    @pytest.mark.parametrize("name", ["lora", "dora", "all of a Llama", "experts"])
    def test_nothing_is_received_twice(self, name):
        make = MODELS.get(name) or (lambda: experts_adapted(ARCHITECTURES["Mixtral"]()))
        model, batch = make(), padded(rows_of([(9, 500), (4, 2), (6, 0)]))
        expected = captured_gradients(model, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        captured = captured_gradients(model, batch)
        assert captured.keys() == expected.keys()
        assert all(
            torch.allclose(captured[name], value, rtol=1e-9, atol=1e-15)
            for name, value in expected.items()
        )

    def test_several_scalars_of_one_forward(self):
        model, batch = MODELS["lora"](), padded(rows_of([(9, 500), (4, 2), (6, 0)]))
        expected = [captured_gradients(model, batch, scalar) for scalar in ("loss", "margin")]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        seen = []
        with GradientHooks(model, lambda n, g: seen[-1].update({n: g})) as hooks:
            output = forward_label_logits(model, batch)
            for scalar in ("loss", "margin"):
                seen.append({})
                hooks.backward(SCALARS[scalar](output), retain_graph=scalar == "loss")
        for one, other in zip(seen, expected, strict=True):
            for name, value in other.items():
                assert torch.allclose(one[name], value, rtol=1e-9, atol=1e-15)


class TestHalfPrecision:
    """Of bfloat16's 8 bits; 1e-2 to 3e-2 were seen, for autograd alone as for the hooks."""

    KINDS = (
        *("lora", "dora", "dora with biases", "lora on embeddings", "dora on embeddings"),
        *("modules_to_save, embedding", "all of a Llama", "all of a GPT-2"),
    )

    def compare(self, kind, dtype, autocast):
        rows = rows_of([(9, 500), (4, 2), (6, 0), (30, 2**29), (20, 2**19)])
        expected = per_example_gradients(model_of(kind, torch.float32), rows, padded)
        model = MODELS[kind]().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            captured = captured_gradients(model, padded(rows))
            alone = per_example_gradients(model, rows, padded)
        assert {gradient.dtype for gradient in captured.values()} == {torch.float32}
        stacked = {name: torch.stack([g[name] for g in alone]).float() for name in alone[0]}
        error = largest_relative_error(captured, expected, floor=1)
        assert error < 5e-2
        # Each version of torch rounds otherwise: 1.64 times as much with 2.6.
        assert error < 2 * largest_relative_error(stacked, expected, floor=1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_under_autocast(self, kind):
        self.compare(kind, torch.float32, autocast=True)

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_bfloat16(self, kind):
        self.compare(kind, torch.bfloat16, autocast=False)

    @pytest.mark.parametrize("spans_backward", [True, False])
    def test_sums_over_positions_are_in_float32(self, spans_backward):
        """As if of the same bfloat16 numbers in float64; rounded once they would be off by 1e-3."""
        layer, seen = nn.Linear(4, 3).bfloat16(), {}
        x = torch.randn(2, 4096, 4).bfloat16()
        with GradientHooks(layer, seen.__setitem__) as hooks:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            grad = torch.randn(y.shape).bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=spans_backward):
                y.backward(grad)
        assert hooks.half_precision
        expected = {"weight": grad.double().mT @ x.double(), "bias": grad.double().sum(1)}
        for name, value in expected.items():
            assert (seen[name] - value).norm() < 1e-6 * value.norm()

    def test_the_check_allows_for_a_base_in_bfloat16(self):
        model = MODELS["lora"]().float()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        error = check_per_example_gradients(model, rows_of([(9, 500), (4, 2)]), tiny.collate)
        assert 2e-3 < error < 5e-2


def four_bits(bnb):
    return functools.partial(bnb.nn.Linear4bit, compute_dtype=torch.float32, quant_type="nf4")


def eight_bits(bnb):
    return functools.partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)


class TestQuantizedBase:
    """bitsandbytes on a CPU."""

    def model(self, kind, **options):
        bnb = pytest.importorskip("bitsandbytes")
        base = llama(hidden_size=64, intermediate_size=64, attention_bias=True)
        for module in list(base.model.modules()):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    quantized = kind(bnb)(
                        linear.in_features, linear.out_features, linear.bias is not None
                    )
                    quantized.load_state_dict(linear.state_dict())
                    setattr(module, name, quantized.to("cpu"))  # which quantizes it
        base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind is four_bits, kind is eight_bits
        model = randomized(get_peft(base, tiny.lora(**options))).float()
        assert any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
        return model

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (four_bits, {}),
            (four_bits, {"use_dora": True}),
            (four_bits, {"bias": "lora_only"}),
            (four_bits, {"use_dora": True, "bias": "lora_only"}),
            (eight_bits, {}),  # DoRA on it fails in PEFT's own forward on a CPU
            (eight_bits, {"bias": "lora_only"}),
        ],
    )
    def test_in_float32_to_1e_5_of_the_gradient(self, kind, options):
        model, rows = self.model(kind, **options), rows_of([(9, 500), (4, 2), (6, 0)])
        references = per_example_gradients(model, rows, padded)
        captured = captured_gradients(model, padded(rows))
        assert set(captured) == {n for n, p in model.named_parameters() if p.requires_grad}
        assert largest_relative_error(captured, references, floor=1) < 1e-5
        assert check_per_example_gradients(model, rows[:2], tiny.collate) < 1e-5
