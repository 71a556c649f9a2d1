"""What an NVIDIA GPU computes, and what the gradient pass costs there, in a few minutes.

Checks: projected gradients of a CPU and of the GPU; captured gradients against autograd's, in
float32 and bfloat16, for each kind of attention and for a compiled model; a batch that does not fit
into memory; and a run with ``after="observe"`` against one without the callback, bit by bit.
Costs, relative to a forward and backward as in training: the pass for one scalar and for those of
the default estimator, and the probes, with the memory of each; the projection's share of the pass.
Models have random weights, in the shapes of SmolLM2-135M and Llama-3.2-1B, with LoRA.

It needs torch, transformers, peft and accelerate, and no network. Without ``datasets`` the run of a
Trainer is left out; its wheels can be brought along, on a machine that reaches PyPI:

    pip download --dest wheels --only-binary :all: --python-version 3.12 datasets

and on the machine with the GPU:

    pip install --no-index --find-links wheels datasets
    python -m benchmarks.gpu.measure [--output benchmarks/results/gpu.json]

``--device cpu --sizes tiny`` tries the script itself, without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

# Before CUDA starts: without it matrix products on a GPU are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks import RESULTS
from hf_auxselect import LinearizedTraining
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.check import check_per_example_gradients
from hf_auxselect.capture.example_gradients import ExampleGradients
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.capture.probes import ProbeReader
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import IGNORE_INDEX, NEXT_TOKEN_LOSS
from hf_auxselect.files import to_json, write_atomically

DIM = 4096
"""The default of the callback."""

GROUPED = {"tie_word_embeddings": True, "pad_token_id": 0, "max_position_embeddings": 2048}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")

Row = dict[str, list[int]]
Batch = dict[str, Tensor]


def build(
    size: str, device: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> Any:
    """A model with LoRA on all linear layers, whose B is not 0."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size] | GROUPED, attn_implementation=attention)
    base = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    return model.to(device)


def rows_of(size: str, number: int, length: int, *, equal: bool = True) -> list[Row]:
    """Random tokens, labels on the last half; of different lengths if not ``equal``."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        tokens = length if equal else max(length - 3 * (i % 5), 4)
        ids = rng.integers(1, SIZES[size]["vocab_size"], tokens).tolist()
        labels = [IGNORE_INDEX] * (tokens // 2) + ids[tokens // 2 :]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * tokens})
    return rows


@dataclass(frozen=True)
class Collate:
    """Rows, padded on the right, on a device."""

    device: str

    def __call__(self, rows: list[Row]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        padded = [
            {
                name: torch.tensor(row[name] + [value] * (longest - len(row[name])))
                for name, value in padding.items()
            }
            for row in rows
        ]
        return {name: value.to(self.device) for name, value in default_collate(padded).items()}


@contextmanager
def capturing(
    model: nn.Module, scalars: tuple[str, ...], device: str, *, dim: int = DIM
) -> Iterator[ExampleGradients]:
    """The gradient pass, in the coordinates of an AdamW that has stepped once."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = torch.optim.AdamW(trainable, lr=0.0)
    optimizer.step()
    optimizer.zero_grad()
    state = read_optimizer(model, optimizer)
    with ExampleGradients(
        model, Collate(device), CountSketch(dim, 0), scalars, 0, state
    ) as capture:
        yield capture


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def compare_with_cpu(device: str) -> dict[str, float]:
    """Largest relative differences of what is captured on the GPU and on a CPU, in float32."""
    rows = list(enumerate(rows_of("tiny", 6, 24, equal=False)))
    found = []
    for where in ("cpu", device):
        with capturing(build("tiny", where), LinearizedTraining.scalars, where) as capture:
            (arrays,) = capture.batches("task", rows)
            found.append(arrays)
    result = {name: difference(found[0][name], found[1][name]) for name in found[0]}
    gradients = torch.randn(4, 1000)
    of_cpu, of_gpu = (
        CountSketch(64, 3).project("p", gradients.to(where)).cpu() for where in ("cpu", device)
    )
    return result | {"projection": difference(of_cpu.numpy(), of_gpu.numpy())}


def compare_with_autograd(device: str, *, is_compiled: bool = False) -> dict[str, float | str]:
    """Relative errors of captured gradients, by kind of attention and type; or why not."""
    rows = rows_of("tiny", 2, 24, equal=False)
    result: dict[str, float | str] = {}
    for attention in ATTENTIONS[1:2] if is_compiled else ATTENTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{attention}, {str(dtype).removeprefix('torch.')}"
            try:
                model = build("tiny", device, dtype=dtype, attention=attention)
                if is_compiled:
                    model = torch.compile(model)
                result[name] = check_per_example_gradients(model, rows, Collate(device))
            except (ImportError, ValueError, RuntimeError) as error:
                result[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return result


def run_out_of_memory(device: str) -> dict[str, Any]:
    """A batch that needs more memory than there is: in how many parts, and to which numbers?"""
    size = "135M"
    rows = list(enumerate(rows_of(size, 32, 512)))
    model = build(size, device, dtype=torch.bfloat16)
    total = torch.cuda.get_device_properties(0).total_memory
    with capturing(model, ("loss",), device) as capture:
        expected = [capture.batches("task", rows[i : i + 8])[0] for i in range(0, 32, 8)]
        torch.cuda.reset_peak_memory_stats()
        capture.batches("task", rows[:8])
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        try:
            torch.cuda.set_per_process_memory_fraction(2 * peak / total)
            parts = capture.batches("task", rows)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    one, other = (
        np.concatenate([part["gradients.loss"] for part in some]) for some in (expected, parts)
    )
    return {"parts": len(parts), "difference": difference(one, other)}


def observe(device: str) -> dict[str, Any]:
    """Whether a run with ``after="observe"`` ends with the weights of one without the callback."""
    if find_spec("datasets") is None:
        return {"left out": "datasets is not installed"}
    from datasets import Dataset

    from hf_auxselect import TaskSelectionCallback, concatenate_tasks

    rows = rows_of("tiny", 48, 24, equal=False)
    tasks = {name: Dataset.from_list(rows[i : i + 16]) for i, name in ((0, "a"), (16, "b"))}
    weights, reports = [], []
    torch.use_deterministic_algorithms(True)
    try:
        for observed in (False, True):
            callback = TaskSelectionCallback(warmup=4, after="observe")
            with tempfile.TemporaryDirectory() as directory:
                trainer = Trainer(
                    model=build("tiny", device),
                    args=TrainingArguments(
                        directory,
                        max_steps=8,
                        per_device_train_batch_size=4,
                        report_to="none",
                        save_strategy="no",
                        disable_tqdm=True,
                        remove_unused_columns=False,
                        use_cpu=device == "cpu",
                        bf16=device != "cpu",
                    ),
                    train_dataset=concatenate_tasks(tasks),
                    eval_dataset=Dataset.from_list(rows[32:]),
                    data_collator=_without_tasks,
                    callbacks=[callback] if observed else [],
                )
                trainer.train()
                weights.append([p.detach().cpu() for p in trainer.model.parameters()])
                reports.append(callback.report)
    finally:
        torch.use_deterministic_algorithms(False)
    return {
        "bitwise": all(torch.equal(a, b) for a, b in zip(*weights, strict=True)),
        "selected": None if reports[1] is None else reports[1].selected,
    }


def _without_tasks(rows: list[dict[str, Any]]) -> Batch:
    return Collate("cpu")([{k: v for k, v in row.items() if k != "task"} for row in rows])


@dataclass
class Stopwatch:
    """Seconds and peak memory of calls, on the device."""

    device: str

    def __call__(self, run: Callable[[], object]) -> tuple[float, int]:
        is_cuda = self.device != "cpu"
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, torch.cuda.max_memory_allocated() if is_cuda else 0


def measure_cost(
    size: str, device: str, *, checkpointing: bool, batch_size: int, length: int, repetitions: int
) -> dict[str, Any]:
    """Costs of the pass and of probes, relative to a forward and backward as in training.

    All take turns in each repetition; medians. Memory counts the model.
    """
    model = build(size, device, dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    rows = rows_of(size, batch_size, length)
    batch, watch = Collate(device)(rows), Stopwatch(device)
    task = TaskExamples(name="task", rows=rows, example_ids=range(batch_size), num_rows=batch_size)

    def train() -> None:
        model.train()
        model(**batch).loss.backward()
        model.zero_grad()

    reader = ProbeReader(model, Collate(device), [task], batch_size, NEXT_TOKEN_LOSS)
    weighted = [(row, 1.0 / batch_size) for row in rows]
    found: dict[str, list[tuple[float, int]]] = {}

    def note(name: str, run: Callable[[], object]) -> None:
        found.setdefault(name, []).append(watch(run))

    for _ in range(repetitions + 1):
        note("training", train)
        for name, scalars in {
            "one scalar": ("loss",),
            "default": LinearizedTraining.scalars,
        }.items():
            with capturing(model, scalars, device) as capture:
                run = partial(capture.batches, "task", list(enumerate(rows)))
                note(name, run)
                with mock.patch.object(CountSketch, "project", _not_projected):
                    note(f"{name}, not projected", run)
        with evaluation_mode(model):
            note("gradient at a probe", lambda: list(reader.run_gradients(weighted)))
            note("losses at a probe", lambda: list(reader.run_losses(weighted)))
    found = {name: values[1:] for name, values in found.items()}  # the first warms up
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    memory = {name: max(m for _, m in values) for name, values in found.items()}
    result: dict[str, Any] = {
        "batch_size": batch_size,
        "length": length,
        "gradient_checkpointing": checkpointing,
        "seconds_of_training": seconds["training"],
        "time_ratio": {name: value / seconds["training"] for name, value in seconds.items()},
        "projection_share": {
            name: 1 - seconds[f"{name}, not projected"] / seconds[name]
            for name in ("one scalar", "default")
        },
    }
    if device != "cpu":
        result["memory_ratio"] = {name: m / memory["training"] for name, m in memory.items()}
    return result


def _not_projected(sketch: CountSketch, name: str, gradients: Tensor) -> Tensor:
    return gradients.new_zeros(len(gradients), sketch.dim)


def main() -> None:
    """Check and measure, and write what was found after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", default="135M,1B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    device = options.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "versions": {
            name: _version(name) for name in ("torch", "transformers", "peft", "accelerate")
        },
    }

    def note(name: str, value: Any) -> None:
        results[name] = value
        write_atomically(options.output, to_json(results))
        print(f"{name}: {value}", flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    note("differences from a CPU", compare_with_cpu(device))
    note("errors", compare_with_autograd(device))
    note("errors of a compiled model", compare_with_autograd(device, is_compiled=True))
    note("observe", observe(device))
    for size in options.sizes.split(","):
        for checkpointing in (False, True):
            cost = measure_cost(
                size,
                device,
                checkpointing=checkpointing,
                batch_size=options.batch_size,
                length=options.length,
                repetitions=options.repetitions,
            )
            note(f"cost, {size}" + (", checkpointing" if checkpointing else ""), cost)
    if device == "cuda":
        note("out of memory", run_out_of_memory(device))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
