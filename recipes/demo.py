"""The main job from end to end: select tasks in one run, then check the choice by training.

One run of ``arithmetic.py`` warms up, selects and goes on. From its checkpoint at the switch two
more runs go on for as many steps: with all tasks, and with the chosen weights in a random order.
The table at the end is measured, on examples of the target that no run has seen.

    python -m recipes.demo [--model NAME] [--output_dir DIR]
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
import warnings
from pathlib import Path

from trl import SFTTrainer

from hf_auxselect import FixedSelection, TaskSelectionCallback
from hf_auxselect.files import to_json, write_atomically
from recipes.arithmetic import build, target_examples
from recipes.models import smollm2

WARM_UP_STEPS, STEPS, BATCH_SIZE = 24, 48, 8
NUM_ROWS, NUM_HELD_OUT, SEED = 48, 64, 0
ALL, RANDOM = "all tasks", "weights in random order"


def held_out_loss(trainer: SFTTrainer) -> float:
    """Loss of new target examples, nats per label token."""
    return float(trainer.evaluate(target_examples(NUM_HELD_OUT, seed=7))["eval_loss"])


def make(model: str, callback: TaskSelectionCallback, directory: Path) -> SFTTrainer:
    """The trainer of the recipe, which keeps the checkpoint at the switch."""
    return build(
        model,
        callback,
        output_dir=str(directory),
        num_rows=NUM_ROWS,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        save_strategy="steps",
        save_steps=WARM_UP_STEPS,
    )


def main() -> None:
    """Run everything and print the measured table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory; default: SmolLM2 from PyPI")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    model = options.model or smollm2()
    start = time.perf_counter()
    shutil.rmtree(options.output_dir, ignore_errors=True)  # of an earlier demo

    print("\n1. One run: warm-up on all tasks, selection, training on the selected ones\n")
    callback = TaskSelectionCallback(warmup=WARM_UP_STEPS)
    trainer = make(model, callback, options.output_dir / "selected")
    print(callback.preview(trainer))
    measured = {"before training": held_out_loss(trainer)}
    trainer.train()
    measured["chosen by hf-auxselect"] = held_out_loss(trainer)
    report = callback.report
    assert report is not None
    checkpoint = options.output_dir / "selected" / f"checkpoint-{WARM_UP_STEPS}"

    tasks = list(report.weights)
    weights = [report.weights[name] for name in tasks]
    chance = dict(zip(tasks, random.Random(SEED).sample(weights, len(weights)), strict=True))
    chance = {name: weight for name, weight in chance.items() if weight > 0}
    for number, (name, mixture) in enumerate({ALL: tasks, RANDOM: chance}.items(), start=2):
        print(f"\n{number}. For comparison, from the same checkpoint: {name}\n")
        fixed = TaskSelectionCallback(
            warmup=WARM_UP_STEPS, selector=FixedSelection(mixture, estimate=False)
        )
        trainer = make(model, fixed, options.output_dir / name.replace(" ", "-"))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        measured[name] = held_out_loss(trainer)

    rows = ["before training", ALL, RANDOM, "chosen by hf-auxselect"]
    seconds = time.perf_counter() - start
    lines = [
        f"Measured loss of {NUM_HELD_OUT} new three-term sums, nats per label token ({STEPS} steps",
        f"each, of which the first {WARM_UP_STEPS} are shared):",
        "",
        *(f"  {name:<24} {measured[name]:.4f}" for name in rows),
        "",
        f"Chosen: {shares(report.weights)}.",
        f"In random order: {shares(chance)}.",
        verdict(measured),
        f"Everything took {seconds / 60:.1f} minutes; the selection itself "
        f"{report.run['seconds']:.0f} seconds of them.",
    ]
    print("\n" + "\n".join(lines))
    write_atomically(
        options.output_dir / "measured.json",
        to_json({"measured": measured, "selected": report.selected, "seconds": round(seconds, 1)}),
    )
    page = options.output_dir / "selected" / "_task_selection" / "report" / "README.md"
    print(f"\nThe report: {page}")


def shares(weights: dict[str, float]) -> str:
    """A mixture, the largest share first, in percent."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {weight:.0%}" for name, weight in ordered if weight > 0)


def verdict(measured: dict[str, float]) -> str:
    """Say plainly whether the choice won."""
    chosen = measured["chosen by hf-auxselect"]
    better = [name for name, loss in measured.items() if loss < chosen]
    if better:
        return f"The choice did NOT win: {' and '.join(better)} had a lower loss."
    gain = measured["all tasks"] - chosen
    return f"The choice won; it is {gain:.4f} nats below training on all tasks."


if __name__ == "__main__":
    main()
