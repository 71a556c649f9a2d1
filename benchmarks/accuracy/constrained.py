"""A protected task under a ceiling: does really training on the choice keep it?

The family ``small``: a model of 3 million parameters learns to rotate words backward. Two other
tasks are protected, rotating forward, which it is learning, and sorting, which it could do before:
their losses on new rows may end 0.05 nats above those after training on all tasks. As estimates
have errors, ceilings are also set lower by these 0.05 nats. From one warm-up, gradients are
captured once; then each mixture is trained to the end, with several seeds, and the trainer's own
losses are compared.

    python -m benchmarks.accuracy.constrained [--seeds 1,2,3]
        [--protected rotate,sort] [--no-probes]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.captured import StopAfterOneStep
from benchmarks.accuracy.ground_truth import make_trainer, warm_up
from benchmarks.families import FAMILIES
from benchmarks.small_family import examples
from hf_auxselect import (
    AbstractSelector,
    ConstrainedSelection,
    FixedSelection,
    ForwardSelection,
    LinearizedTraining,
    MixtureOptimization,
    SelectionReport,
    TaskSelectionCallback,
)
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors import selection_problem

FAMILY = "small"
NUM_ROWS, SEED_OF_ROWS = 128, 5000
LIMIT = 0.05
"""Nats above the loss after all tasks that a protected task may have; a convention."""
MARGIN = 0.05
"""Nats by which ceilings are set lower than the limit; a convention."""


def evaluation(protected: list[str]) -> dict[str, Dataset]:
    """The target, and new rows of the protected tasks."""
    groups = {name: examples(name, NUM_ROWS, SEED_OF_ROWS) for name in protected}
    return {"target": FAMILIES[FAMILY].make_target(0), **groups}


def captured(protected: list[str], directory: Path, *, probes: bool) -> SelectionReport:
    """A report with the gradients at the end of the warm-up."""
    callback = TaskSelectionCallback(
        target="target",
        groups=protected,
        estimator=LinearizedTraining(probes=probes),
        warmup=FAMILIES[FAMILY].warm_up_steps,
        examples_per_task=None,
        seed=0,
    )
    trainer = make_trainer(
        FAMILY, directory, [callback, StopAfterOneStep()], eval_dataset=evaluation(protected)
    )
    trainer.train(resume_from_checkpoint=str(warm_up(FAMILY)))
    assert callback.report is not None
    return callback.report


def trained(weights: dict[str, float], protected: list[str], seed: int) -> dict[str, float]:
    """Really train on a mixture: the losses that the trainer logs, nats per label token."""
    with tempfile.TemporaryDirectory() as directory:
        callback = TaskSelectionCallback(
            target="target",
            warmup=FAMILIES[FAMILY].warm_up_steps,
            selector=FixedSelection({k: w for k, w in weights.items() if w > 0}, estimate=False),
            seed=seed,
        )
        trainer = make_trainer(
            FAMILY, Path(directory), [callback], eval_dataset=evaluation(protected)
        )
        trainer.train(resume_from_checkpoint=str(warm_up(FAMILY)))
        metrics = trainer.evaluate()
    return {name: float(metrics[f"eval_{name}_loss"]) for name in ("target", *protected)}


def main() -> None:
    """Choose, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--protected", default="rotate,sort")
    parser.add_argument("--no-probes", action="store_true", help="capture in half of the time")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    protected, seeds = options.protected.split(","), [int(s) for s in options.seeds.split(",")]
    start = time.perf_counter()
    selectors: dict[str, AbstractSelector] = {
        "all tasks": FixedSelection(FAMILIES[FAMILY].tasks),
        "ForwardSelection()": ForwardSelection(),
        "MixtureOptimization()": MixtureOptimization(),
        "ConstrainedSelection, ceilings at the limit": ConstrainedSelection(
            ceilings=dict.fromkeys(protected, LIMIT), relative_to="all tasks"
        ),
        f"ConstrainedSelection, ceilings {MARGIN} lower": ConstrainedSelection(
            ceilings=dict.fromkeys(protected, LIMIT - MARGIN), relative_to="all tasks"
        ),
    }
    with tempfile.TemporaryDirectory() as directory:
        report = captured(protected, Path(directory), probes=not options.no_probes)
        print(f"captured after {time.perf_counter() - start:.0f} s", flush=True)
        problem = selection_problem(
            report.fitted(), report.gradients(), rows_to_read=report.run["rows_to_read"]
        )
        chosen = {name: selector.select(problem) for name, selector in selectors.items()}
    lines = []
    for name, selection in chosen.items():
        estimate = selection.estimate
        assert estimate is not None and estimate.group_losses is not None
        runs = [trained(selection.weights, protected, seed) for seed in seeds]
        measured = {of: [round(run[of], 5) for run in runs] for of in ("target", *protected)}
        line = {
            "selector": name,
            "weights": {k: round(w, 4) for k, w in selection.weights.items() if w > 0},
            "shadow_prices": selection.shadow_prices,
            "notes": list(selection.notes),
            "estimated": dict(
                zip(
                    ("target", *protected),
                    [float(estimate.loss[0]), *estimate.group_losses[0].tolist()],
                    strict=True,
                )
            ),
            "measured": measured,
        }
        lines.append(line)
        means = {of: round(float(np.mean(values)), 4) for of, values in measured.items()}
        print(f"{name}: {means} ({time.perf_counter() - start:.0f} s)", flush=True)
    result = {
        "family": FAMILY,
        "protected": protected,
        "limit_nats": LIMIT,
        "seeds": seeds,
        "probes": not options.no_probes,
        "lines": lines,
    }
    write_atomically(RESULTS / "constrained.json", to_json(result))


if __name__ == "__main__":
    main()
