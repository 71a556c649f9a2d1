"""Memory of the gradient pass next to a training step and to what the preview says of it.

A Llama with random weights (hidden size 256, 4 layers, 4,096 tokens) with LoRA, in float32, on
batches of 8 rows of at most 128 tokens, with and without gradient checkpointing and with a head
that is trained whole. Peaks are those of live tensors on the CPU, in MiB, beyond what is there
before; the projection's tables, which NumPy makes, are in none of the columns but the preview's::

    python -m benchmarks.cost.pass_memory
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks import RESULTS
from hf_auxselect import TaskSelectionCallback, concatenate_tasks
from hf_auxselect.capture.memory import PeakMemory
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.gradient_pass import GradientPass

VOCABULARY, LONGEST, BATCH_SIZE, DIM = 4096, 128, 8, 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, checkpointing": {"checkpointing": True, "heads": None},
    "LoRA": {"checkpointing": False, "heads": None},
    "LoRA and lm_head, checkpointing": {"checkpointing": True, "heads": ["lm_head"]},
}


class TrainingPeak(TrainerCallback):
    """Measures the first training step, with the longest rows, and the gradient pass."""

    def __init__(self) -> None:
        self.training = self.capture = 0
        self._peak = PeakMemory(torch.device("cpu"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step's forward and backward; its batch exists already."""
        if state.global_step == 0:
            self._peak.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the backward."""
        if state.global_step == 0:
            self._peak.__exit__(None, None, None)
            self.training = self._peak.bytes


def rows(count: int, seed: int) -> Dataset:
    """Random tokens; all rows are as long as the longest."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, VOCABULARY, (count, LONGEST)).tolist()
    return Dataset.from_list(
        [{"input_ids": i, "attention_mask": [1] * LONGEST, "labels": i} for i in ids]
    )


def measure(directory: str, *, checkpointing: bool, heads: list[str] | None) -> dict[str, float]:
    """Peaks of a run, MiB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", modules_to_save=heads)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    callback = TaskSelectionCallback(warmup=1, projection_dim=DIM)
    peaks = TrainingPeak()
    trainer = Trainer(
        model,
        TrainingArguments(
            directory,
            max_steps=3,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=concatenate_tasks({"a": rows(16, 1), "b": rows(16, 2)}),
        eval_dataset=rows(8, 3),
        callbacks=[callback, peaks],
    )
    preview = callback.preview(trainer).memory_mib
    original = GradientPass.run

    def run(self: GradientPass, *args: Any) -> Any:
        with PeakMemory(torch.device("cpu")) as peak:
            store = original(self, *args)
        peaks.capture = peak.bytes
        return store

    GradientPass.run = run  # type: ignore[method-assign, assignment]
    try:
        trainer.train()
    finally:
        GradientPass.run = original  # type: ignore[method-assign]
    sketch = CountSketch(DIM, 0)
    tables = sum(sketch.table_bytes(p.numel()) for p in model.parameters() if p.requires_grad)
    return {
        "training step": round(peaks.training / 2**20, 1),
        "gradient pass": round(peaks.capture / 2**20, 1),
        "tables": round(tables / 2**20, 1),
        "preview": round(preview, 1),
    }


def main() -> None:
    """Print the table and write it as JSON."""
    results = {}
    for name, setting in SETTINGS.items():
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measure(directory, **setting)
        print(f"{name:<34}", results[name])
    (RESULTS / "memory.json").write_text(
        json.dumps({"torch": torch.__version__, "MiB": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
