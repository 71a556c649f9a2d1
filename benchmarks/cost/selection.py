"""Cost of choosing: warm-up, gradient pass and search, next to choosing by training.

Everything is measured on one machine, in one run: seconds of a training step, of the selection
(gradient pass, estimates, search), and of the search alone. Forward selection by training would
fine-tune every mixture that the same search asks about; a random ensemble (Li et al., EMNLP
Findings 2024) as many as it scores, 1,000 in the authors' scripts.

A fine-tune here is 32 or 60 steps, as many as fit into hours; its cost grows with the steps, that
of the pass does not. The last columns are therefore for runs of 1,000 steps of the same batches.

    python -m benchmarks.cost.selection [--families small,arithmetic,logic,text]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.captured import gradients
from benchmarks.accuracy.ground_truth import make_trainer, warm_up
from benchmarks.families import FAMILIES, with_fixed_hashes
from hf_auxselect import (
    ForwardSelection,
    LinearizedTraining,
    SelectionProblem,
    TaskSelectionCallback,
)
from hf_auxselect.estimators import Estimate
from hf_auxselect.files import to_json, write_atomically

NUM_STEPS = 8
LONG_RUN = 1000
ENSEMBLE = 1000


class Stopwatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, and stop when there is enough."""
        self.moments.append(time.perf_counter())
        control.should_training_stop = len(self.moments) > NUM_STEPS


def seconds_of_step(family: str) -> float:
    """Median over some steps of training on all tasks."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as directory:
        make_trainer(family, Path(directory), [watch]).train()
    return statistics.median(np.diff(watch.moments))


def seconds_of_pass(family: str) -> float:
    """The selection of a run from the warm-up's checkpoint: gradient pass, estimates, search."""
    with tempfile.TemporaryDirectory() as directory:
        callback = TaskSelectionCallback(warmup=FAMILIES[family].warm_up_steps, seed=0)
        watch = Stopwatch()
        watch.moments = [0.0] * NUM_STEPS  # stops after the first step
        trainer = make_trainer(family, Path(directory), [callback, watch])
        trainer.train(resume_from_checkpoint=str(warm_up(family)))
        assert callback.report is not None
        return float(callback.report.run["seconds"])


def mixtures_asked_about(family: str) -> tuple[int, float]:
    """How many different mixtures forward selection asks about, and the seconds it takes."""
    store = gradients(family, "continue")
    fitted = LinearizedTraining().fit(store)
    seen: set[bytes] = set()

    def estimate(weights: np.ndarray) -> Estimate:
        seen.update(row.tobytes() for row in np.asarray(weights))
        return fitted.estimate(weights)

    start = time.perf_counter()
    sizes = store.task_sizes.tolist()
    ForwardSelection().select(SelectionProblem(estimate, store.task_names, sizes))
    return len(seen), time.perf_counter() - start


def measure(family: str) -> dict[str, Any]:
    """One line of the table; all times in seconds."""
    own = FAMILIES[family]
    step, selection = seconds_of_step(family), seconds_of_pass(family)
    num_mixtures, search = mixtures_asked_about(family)
    rest = own.steps - own.warm_up_steps
    ours = own.warm_up_steps * step + selection

    def ratio(num_fine_tunes: int, steps: int) -> float:
        return num_fine_tunes * steps * step / ours

    return {
        "family": family,
        "seconds_per_step": step,
        "seconds_of_selection": selection,
        "seconds_of_search": search,
        "seconds_of_warm_up": own.warm_up_steps * step,
        "steps_of_a_fine_tune": rest,
        "mixtures_of_forward_selection": num_mixtures,
        "forward_selection_times": ratio(num_mixtures, rest),
        "random_ensemble_times": ratio(ENSEMBLE, rest),
        "forward_selection_times_long": ratio(num_mixtures, LONG_RUN),
        "random_ensemble_times_long": ratio(ENSEMBLE, LONG_RUN),
    }


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small,arithmetic,logic,text", metavar="a,b")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    lines = [measure(family) for family in options.families.split(",")]
    print(
        f"{'':12} warm-up, s  selection, s  of it search  mixtures  "
        f"times cheaper: forward selection  random ensemble   at {LONG_RUN} steps: both"
    )
    for line in lines:
        print(
            f"{line['family']:12} {line['seconds_of_warm_up']:10.0f}  "
            f"{line['seconds_of_selection']:12.0f}  {line['seconds_of_search']:12.2f}  "
            f"{line['mixtures_of_forward_selection']:8}  {line['forward_selection_times']:33.1f}  "
            f"{line['random_ensemble_times']:15.0f}  {line['forward_selection_times_long']:12.0f} "
            f"{line['random_ensemble_times_long']:12.0f}"
        )
    record = {
        "command": f"python -m benchmarks.cost.selection --families {options.families}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "lines": lines,
    }
    write_atomically(RESULTS / "cost.json", to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
