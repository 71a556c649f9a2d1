"""Tiny models and tasks, made from configurations: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers import (
    TrainerCallback as TrainerCallback,
)

from hf_auxselect import TaskSelectionCallback, concatenate_tasks

CHARACTERS = "0123456789+-=abcdefgh "
VOCABULARY = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(CHARACTERS)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="right"
    )


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(VOCABULARY),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        | options
    )
    return LlamaForCausalLM(config)


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, and its positions are embedded."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), **sizes | options))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | options
    )


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """In float64 with random parameters: LoRA's B starts at 0, where half the gradients vanish."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model.double().eval()


def adapted(base: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """With LoRA, in float64."""
    return randomized(get_peft_model(base, lora(**options)))


def rows_of(lengths_and_labels: Sequence[tuple[int, int]]) -> list[dict[str, list[int]]]:
    """Rows of given lengths with random tokens; labels by a bit mask, at least the last token."""
    rng = np.random.default_rng(0)
    rows = []
    for length, mask in lengths_and_labels:
        ids = rng.integers(2, len(VOCABULARY), length).tolist()
        labels = [t if mask >> i & 1 else -100 for i, t in enumerate(ids)]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def sums(
    num_rows: int, seed: int = 0, *, mark: str = "", shuffled: bool = False, letters: bool = False
) -> Dataset:
    """Prompt and completion of one-digit sums; or of letters; or with wrong answers.

    The first character of a prompt is ``mark``, by which a spy tells the task of a row.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        a, b = rng.randrange(10), rng.randrange(10)
        prompt, answer = f"{a}+{b}=", str(rng.randrange(19) if shuffled else a + b)
        if letters:
            prompt, answer = f"{'abcdefgh'[a % 8]}{'abcdefgh'[b % 8]}=", "abcdefgh"[a % 8]
        rows.append({"prompt": mark + prompt, "completion": answer})
    return Dataset.from_list(rows)


def tasks(num_rows: int = 24) -> Dataset:
    """Four tasks of different sizes: a and c sums, b letters, d wrong answers."""
    return concatenate_tasks(
        {
            "a": sums(num_rows, 1, mark="a"),
            "b": sums(num_rows // 2, 2, mark="b", letters=True),
            "c": sums(num_rows, 3, mark="c"),
            "d": sums(num_rows - 3, 4, mark="d", shuffled=True),
        }
    )


def tokenize(dataset: Dataset) -> Dataset:
    """Prompt and completion to input_ids, attention_mask and labels, for the plain Trainer."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = [VOCABULARY[c] for c in row["prompt"]]
        completion = [VOCABULARY[c] for c in row["completion"]] + [1]
        return {
            "input_ids": prompt + completion,
            "attention_mask": [1] * (len(prompt) + len(completion)),
            "labels": [-100] * len(prompt) + completion,
        }

    return dataset.map(encode, remove_columns=["prompt", "completion"])


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [value] * (length - len(row[name])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100),
    }


OLDER = Version(transformers.__version__).major < 5

ACROSS_PROCESSES = 1e-3 if OLDER else 1e-6
"""How far losses of one process and of two may be apart: with older releases the trainer averages
an evaluation step over the label tokens of all processes, so that what it logs differs."""

ARGUMENTS: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-2,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 5,
    "disable_tqdm": True,
}


def sft_trainer(output_dir: Path | str, *callbacks: Any, **options: Any) -> Any:
    """An SFTTrainer on the tiny tasks; options are its own or those of SFTConfig."""
    from trl import SFTConfig, SFTTrainer

    own = _pop(
        options,
        *("train_dataset", "eval_dataset", "peft_config", "model", "trainer_class"),
        *("compute_metrics", "preprocess_logits_for_metrics"),
    )
    trainer_class = own.pop("trainer_class", SFTTrainer)
    return trainer_class(
        **{
            "model": llama(),
            "args": SFTConfig(str(output_dir), **ARGUMENTS | {"max_length": 32} | options),
            "train_dataset": tasks(),
            "eval_dataset": sums(16, 9),
            "peft_config": lora(lora_dropout=0.1),
            "processing_class": tokenizer(),
            "callbacks": list(callbacks),
        }
        | own
    )


def plain_trainer(output_dir: Path | str, *callbacks: Any, **options: Any) -> Any:
    """A stock Trainer on the tiny tasks; options are its own or those of TrainingArguments."""
    own = _pop(options, "train_dataset", "eval_dataset", "model", "data_collator", "trainer_class")
    own |= _pop(options, "compute_loss_func", "optimizers", "compute_metrics")
    trainer_class = own.pop("trainer_class", Trainer)
    return trainer_class(
        **{
            "model": get_peft_model(llama(), lora(lora_dropout=0.1)),
            "args": TrainingArguments(str(output_dir), **ARGUMENTS | options),
            "train_dataset": tokenize(tasks()),
            "eval_dataset": tokenize(sums(16, 9)),
            "data_collator": collate,
            "callbacks": list(callbacks),
        }
        | own
    )


TRAINERS = {"Trainer": plain_trainer, "SFTTrainer": sft_trainer}


def _pop(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def spy(trainer: Any) -> list[str]:
    """The tasks of the rows of every training batch that reaches the model, a string each."""
    seen: list[str] = []
    characters = {i: c for c, i in VOCABULARY.items()}

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen.append("".join(characters[int(i)] for i in ids[:, 0]))

    trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def exactly_projected() -> tuple[LlamaForCausalLM, dict[str, list[Any]], list[Any]]:
    """A model, two tasks and a target whose gradients a projection to 512 numbers keeps exactly.

    One parameter of 384 entries is trained, which fits into 512 cells without a collision.
    """
    model = llama()
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    tasks = {
        "sums": list(tokenize(sums(12, 1))),
        "letters": list(tokenize(sums(12, 2, letters=True))),
    }
    return model, tasks, list(tokenize(sums(12, 5)))


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def callback(**options: Any) -> TaskSelectionCallback:
    """One that selects after the fourth step."""
    return TaskSelectionCallback(**{"warmup": 4, "projection_dim": 16} | options)


def trained(
    make: Any, directory: Path, cb: TaskSelectionCallback, resume: Any = None, **options: Any
) -> Any:
    """A trainer of ``TRAINERS`` after its run, the same in every run."""
    torch.manual_seed(3)
    trainer = make(directory, cb, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let Accelerate shard on a CPU, too, where it leaves models whole."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if plugin.cpu_offload:  # which pins memory for a GPU
                plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type

    with mock.patch.object(AcceleratorState, "__init__", init):
        try:
            yield
        finally:
            AcceleratorState._reset_state()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


@contextlib.contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """Let DeepSpeed run on gloo, without the operation in C++ that it would compile for a CPU."""
    torch_backend = importlib.import_module("deepspeed.comm.torch")
    of_transformers = importlib.import_module("transformers.integrations.deepspeed")
    AcceleratorState._reset_state()
    with (
        mock.patch.object(torch_backend, "build_shm_op", lambda: None),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate leaves DeepSpeed out
        try:
            yield
        finally:
            AcceleratorState._reset_state()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
            of_transformers.unset_hf_deepspeed_config()


def deepspeed(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed, as people write it for Trainer."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def leave(code: int = 0) -> None:
    """Exit without the interpreter's own end, in which gloo may hang or abort.

    PyTorch frees the process group while it holds the GIL, and joins a thread that may wait for it:
    one of about ten runs on two busy cores hung so.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
