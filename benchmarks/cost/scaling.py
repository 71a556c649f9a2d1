"""How time and memory of the gradient pass grow: examples, length, LoRA rank, projection_dim.

Each point is a child process that captures gradients of random tokens with SmolLM2-135M into a
temporary store, with one thread and one setting changed from the default. Time is that of the CPU,
which other users of the machine change least. The exponent is the slope of the logarithms by least
squares: 1 is linear, 0 constant. Memory is the peak above that of the loaded model.

    python -m benchmarks.cost.scaling
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import RESULTS
from hf_auxselect import capture_gradients
from hf_auxselect.files import to_json, write_atomically
from recipes.models import smollm2

DEFAULTS = {"examples": 32, "length": 64, "rank": 8, "projection_dim": 512}
VALUES = {
    "examples": [16, 32, 64],
    "length": [32, 64, 128, 256],
    "rank": [4, 16, 64],
    "projection_dim": [256, 2048, 16384],
}
BATCH_SIZE, LABEL_TOKENS = 8, 8


def measure(*, examples: int, length: int, rank: int, projection_dim: int) -> dict[str, float]:
    """CPU seconds of a pass once it is warm, and peak memory in MiB above the loaded model."""
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    tokens = torch.randint(
        2, 40_000, (examples, length), generator=torch.Generator().manual_seed(0)
    )
    rows = [{"input_ids": row} for row in tokens.tolist()]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        labels = ids.clone()
        labels[:, :-LABEL_TOKENS] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def capture(rows: list[dict[str, Any]]) -> float:
        with tempfile.TemporaryDirectory() as directory:
            start = time.process_time()
            capture_gradients(
                model,
                {"a": rows},
                rows[:1],
                collate,
                directory=directory,
                projection_dim=projection_dim,
                batch_size=BATCH_SIZE,
                scalars=("loss",),
                progress=False,
            )
            return time.process_time() - start

    torch.set_num_threads(1)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    overhead = min(capture(rows[:1]) for _ in range(2))  # check and tables: the same for any size
    seconds = capture(rows) - overhead
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "memory_mib": (peak - loaded) / 1024}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against each setting, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(2, len(VALUES), sharey="row")
    for column, setting in enumerate(VALUES):
        points = [line for line in lines if line["setting"] == setting]
        for row, (quantity, label) in enumerate(
            [("seconds", "CPU seconds"), ("memory_mib", "peak memory, MiB")]
        ):
            ax = axes[row][column]
            ax.loglog([p["value"] for p in points], [p[quantity] for p in points], "o-")
            ax.set_xlabel(setting.replace("_", " "))
            ax.grid(alpha=0.3, which="both")
            if column == 0:
                ax.set_ylabel(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def exponent(points: list[dict[str, Any]], quantity: str) -> float:
    """Slope of log quantity against log value."""
    x = np.log([p["value"] for p in points])
    return float(np.polyfit(x, np.log([p[quantity] for p in points]), 1)[0])


def main() -> None:
    """Print the table; write it as JSON, and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--point", help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(**json.loads(options.point))))
        return
    lines: list[dict[str, Any]] = []
    exponents: dict[str, dict[str, float]] = {}
    print(f"{'':16} {'value':>6}  seconds  peak MiB   (otherwise {DEFAULTS})")
    for setting, values in VALUES.items():
        for value in values:
            point = json.dumps(DEFAULTS | {setting: value})
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.cost.scaling", "--point", point],
                capture_output=True,
                text=True,
                check=True,
            )
            result = json.loads(child.stdout.splitlines()[-1])
            lines.append({"setting": setting, "value": value, **result})
            print(
                f"{setting:16} {value:6}  {result['seconds']:7.2f}  {result['memory_mib']:8.0f}",
                flush=True,
            )
        points = [line for line in lines if line["setting"] == setting]
        exponents[setting] = {q: exponent(points, q) for q in ("seconds", "memory_mib")}
        print(
            f"{setting:16} exponent {exponents[setting]['seconds']:5.2f}  "
            f"{exponents[setting]['memory_mib']:8.2f}"
        )
    record = {
        "command": "python -m benchmarks.cost.scaling",
        "defaults": DEFAULTS,
        "batch_size": BATCH_SIZE,
        "exponents": exponents,
        "lines": lines,
    }
    write_atomically(RESULTS / "scaling.json", to_json(record))
    draw(lines, RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
