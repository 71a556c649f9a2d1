"""The main job from end to end: select tasks in one run, then check the choice by training.

A short run of ``arithmetic.py`` warms up, selects and goes on. From its checkpoint at the switch
two more runs train for as many steps: on all tasks, and on the chosen weights in a random order.
The losses in the table at the end are measured on examples of the target that no run has seen.

    python -m recipes.demo [--model NAME] [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from pathlib import Path

from transformers import Trainer

from hf_auxselect import SelectionReport, TaskSelectionCallback
from recipes.arithmetic import build, target_examples
from recipes.comparison import ALL, Comparison, all_tasks, random_order, shares, table, verdict
from recipes.models import smollm2

WARM_UP_STEPS, STEPS, BATCH_SIZE = 24, 48, 8
NUM_ROWS, NUM_HELD_OUT, SEED = 48, 64, 0


def measure(trainer: Trainer) -> dict[str, float]:
    """Loss of new target examples, nats per label token."""
    held_out = target_examples(NUM_HELD_OUT, seed=7)
    return {"loss": float(trainer.evaluate(held_out)["eval_loss"])}


def main() -> None:
    """Run everything and print the measured table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory; default: SmolLM2 from PyPI")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/demo"),
        help="for all runs; what is in it is deleted first",
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    model = options.model or smollm2()
    start = time.perf_counter()
    shutil.rmtree(options.output_dir, ignore_errors=True)  # of an earlier demo

    def make(callback: TaskSelectionCallback, directory: Path, seed: int) -> Trainer:
        return build(
            model,
            callback,
            output_dir=str(directory),
            num_rows=NUM_ROWS,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            save_strategy="steps",  # keeps the checkpoint at the switch
            save_steps=WARM_UP_STEPS,
            seed=seed,
        )

    comparison = Comparison(
        make=make,
        callback=lambda seed: TaskSelectionCallback(warmup=WARM_UP_STEPS),
        measure=measure,
        rivals={ALL: all_tasks, "weights in random order": random_order},
        output_dir=options.output_dir,
        settings={"model": model, "steps": STEPS},
    )
    runs = comparison.run(SEED)
    chosen = comparison.directory("chosen", SEED) / "_task_selection"
    report = SelectionReport.load(chosen)
    seconds = time.perf_counter() - start
    lines = [
        f"Measured loss of {NUM_HELD_OUT} new three-term sums, nats per label token ({STEPS} steps",
        f"each, of which the first {WARM_UP_STEPS} are shared):",
        "",
        *table(runs),
        "",
        f"Chosen: {shares(report.weights)}.",
        f"In random order: {shares(runs[-1].weights)}.",
        verdict(runs),
        f"Everything took {seconds / 60:.1f} minutes; the selection itself "
        f"{report.run['seconds']:.0f} seconds of them.",
        "",
        f"The report: {chosen / 'report' / 'index.html'}",
    ]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
