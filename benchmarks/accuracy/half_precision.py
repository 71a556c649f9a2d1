"""Agreement of per-example gradients in mixed and half precision with float32.

SmolLM2-135M with LoRA (r = 8 on all linear layers) on examples of the arithmetic recipe, projected
to 512 numbers. The error of an example is ``|g - g32| / |g32|``; next to it stands the cosine.
Gradients are accumulated over positions in float32 in all cases.

    python -m benchmarks.accuracy.half_precision [--num_examples 16]
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import RESULTS
from hf_auxselect import capture_gradients
from hf_auxselect.files import to_json, write_atomically
from recipes.models import smollm2

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16 autocast": {"autocast": True},
    "bf16 model, float32 adapter": {"base": torch.bfloat16, "autocast": True},
    "bf16 model and adapter": {"base": torch.bfloat16, "adapter": torch.bfloat16},
}


def gradients(
    rows: list[dict[str, Any]],
    directory: Path,
    *,
    base: torch.dtype = torch.float32,
    adapter: torch.dtype = torch.float32,
    autocast: bool = False,
) -> np.ndarray:
    """Projected loss gradients [N, 512] of the rows."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=base)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
        if "lora_B" in name:  # it starts at 0, where the gradient of A vanishes
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        padded = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([row[key] + [pad] * (length - len(row[key])) for row in batch])
            for key, pad in padded.items()
        }

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        store = capture_gradients(
            model, {"a": rows}, rows[:1], collate, directory=directory, scalars=("loss",)
        )
    return store.gradients.astype(np.float64)


def main() -> None:
    """Print the table and write it as JSON."""
    import tempfile

    from recipes.arithmetic import training_tasks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_examples", type=int, default=16)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    texts = [row for task in training_tasks(2, seed=0).values() for row in task]
    rows = []
    for row in texts[: options.num_examples]:
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = prompt + answer
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * len(prompt) + answer,
            }
        )
    lines: list[dict[str, Any]] = []
    exact: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, setting) in enumerate(SETTINGS.items()):
            mine = gradients(rows, Path(directory) / str(number), **setting)
            exact = mine if exact is None else exact
            norms = np.linalg.norm(exact, axis=1)
            errors = np.linalg.norm(mine - exact, axis=1) / norms
            cosines = (mine * exact).sum(1) / norms / np.linalg.norm(mine, axis=1)
            lines.append(
                {
                    "setting": name,
                    "error_median": float(np.median(errors)),
                    "error_max": float(errors.max()),
                    "cosine_min": float(cosines.min()),
                }
            )
    print(f"{'':28} error: median     largest   smallest cosine  ({len(rows)} examples)")
    for line in lines:
        print(
            f"{line['setting']:28} {line['error_median']:13.4f}  {line['error_max']:10.4f}  "
            f"{line['cosine_min']:16.5f}"
        )
    record = {
        "command": "python -m benchmarks.accuracy.half_precision",
        "examples": len(rows),
        "lines": lines,
    }
    write_atomically(RESULTS / "precision.json", to_json(record))


if __name__ == "__main__":
    main()
