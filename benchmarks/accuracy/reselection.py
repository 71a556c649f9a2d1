"""A target that changes in the middle of a run: how soon does re-selection follow, and how far?

The model of the family ``small`` learns six string tasks. The target is new rows of one of them,
then of another one. Compared are the losses of the target of the time, as the trainer logs them:

    abrupt     rotate, and from step 60 on shift back
    gradual    from step 60 on, a quarter more of the rows every ten steps
    return     rotate, from step 60 on shift back, from step 90 on rotate again

"oracle" trains on the target's own task from the moment of each change on.

    python -m benchmarks.accuracy.reselection [--scenarios abrupt,gradual,return] [--seeds 1,2,3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from benchmarks import RESULTS
from benchmarks.accuracy.ground_truth import ARGUMENTS
from benchmarks.small_family import examples, small_model
from hf_auxselect import (
    AbstractSelector,
    FixedSelection,
    ForwardSelection,
    LinearizedTraining,
    Reselection,
    Selection,
    SelectionProblem,
    TaskSelectionCallback,
    concatenate_tasks,
)
from hf_auxselect.files import to_json, write_atomically

TASKS = ("rotate", "shift back", "reverse", "even places", "largest", "shift")
FIRST, SECOND = "rotate", "shift back"
WARM_UP, CHANGE, STEPS, EVERY = 20, 60, 120, 10
SCENARIOS: dict[str, list[tuple[int, str]]] = {
    "abrupt": [(CHANGE, "second")],
    "gradual": [
        (60, "quarter"),
        (70, "half"),
        (80, "three quarters"),
        (90, "second"),
    ],
    "return": [(60, "second"), (90, "first")],
}
SHARES = {"first": 0.0, "quarter": 0.25, "half": 0.5, "three quarters": 0.75, "second": 1.0}
PATH = RESULTS / "reselection.json"


def target(share: float, seed: int, num_rows: int = 64) -> Dataset:
    """New rows, this share of which are of the second task."""
    later = round(share * num_rows)
    rows = {name: examples(name, num_rows, 7000 + seed) for name in (FIRST, SECOND)}
    return concatenate_datasets(
        [rows[SECOND].select([*range(later)]), rows[FIRST].select([*range(later, num_rows)])]
    )


def target_at(scenario: str, step: int) -> str:
    """The target of a step."""
    dated = [key for date, key in SCENARIOS[scenario] if date <= step]
    return dated[-1] if dated else "first"


@dataclass(frozen=True, kw_only=True)
class Oracle(AbstractSelector):
    """Knows which task serves the target: told by the number of rows that are left."""

    scenario: str

    def select(self, problem: SelectionProblem) -> Selection:
        """All of the weight on the tasks of the target, in its shares."""
        assert problem.rows_to_read is not None
        step = STEPS - problem.rows_to_read // ARGUMENTS["per_device_train_batch_size"]
        share = SHARES[target_at(self.scenario, step)]
        weights = dict.fromkeys(problem.task_names, 0.0)
        weights |= {name: w for name, w in ((FIRST, 1 - share), (SECOND, share)) if name in weights}
        return Selection(
            weights=weights, estimate=problem.estimate(np.array([[*weights.values()]]))
        )


def strategies(scenario: str) -> dict[str, dict[str, Any]]:
    """Options of the callback by name."""
    dated = SCENARIOS[scenario]

    def again(**options: Any) -> dict[str, Any]:
        return {"reselect": Reselection(**{"targets": dated} | options)}

    found = {
        "all tasks": {"selector": FixedSelection(TASKS, estimate=False)},
        "one selection": {},
        f"every {EVERY} steps": again(every=EVERY),
        f"every {EVERY} steps, without memory": again(every=EVERY, memory=0),
        f"every {EVERY} steps, if the target has changed (p <= 0.05)": again(
            every=EVERY, significance=0.05
        ),
        "oracle": again(memory=0) | {"selector": Oracle(scenario=scenario)},
    }
    return {name: {"selector": ForwardSelection()} | options for name, options in found.items()}


def run(scenario: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Losses of the target of the time every five steps, and the selections."""
    trl.trainer.utils._use_triton = lambda device: True
    torch.manual_seed(seed)
    keys = {"first", *(key for _, key in SCENARIOS[scenario])}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        callback = TaskSelectionCallback(
            target="first",
            warmup=WARM_UP,
            estimator=LinearizedTraining(probes=False),
            examples_per_task=32,
            projection_dim=1024,
            **options,
        )
        arguments = ARGUMENTS | {
            "max_steps": STEPS,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 5,
            "seed": seed,
        }
        trainer = SFTTrainer(
            model=small_model(),
            args=SFTConfig(output_dir=directory, **arguments),
            train_dataset=concatenate_tasks(
                {name: examples(name, 96, 100 * seed + i) for i, name in enumerate(TASKS)}
            ),
            eval_dataset={key: target(SHARES[key], seed) for key in sorted(keys)},
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            callbacks=[callback],
        )
        trainer.train()
        report = callback.report
        assert report is not None
        losses = {}
        for entry in trainer.state.log_history:
            step = int(entry["step"])
            if (name := f"eval_{target_at(scenario, step)}_loss") in entry:
                losses[step] = round(float(entry[name]), 5)
    lines = [
        {
            "step": line.step,
            "target": line.target,
            "weights": {name: round(weight, 4) for name, weight in line.weights.items()},
            "p_value": line.p_value,
            "is_selection": line.is_selection,
            "carried_over_from": line.carried_over_from,
        }
        for line in report.decisions
    ]
    return {"losses": losses, "selections": lines, "seconds": round(time.perf_counter() - start)}


def steps_to_follow(losses: dict[str, float], oracle: dict[str, float], change: int) -> int | None:
    """Steps from a change on until the loss is within 5% of the oracle's last; None: never."""
    goal = 1.05 * oracle[str(STEPS)]
    reached = [int(step) for step, loss in losses.items() if int(step) > change and loss <= goal]
    return min(reached) - change if reached else None


def main() -> None:
    """Train what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    found: dict[str, Any] = json.loads(PATH.read_text()) if PATH.is_file() else {"runs": []}
    done = {(one["scenario"], one["strategy"], one["seed"]) for one in found["runs"]}
    for seed in map(int, options.seeds.split(",")):
        for scenario in options.scenarios.split(","):
            for name, how in strategies(scenario).items():
                if (scenario, name, seed) not in done:
                    one = run(scenario, how, seed)
                    found["runs"].append(
                        {"scenario": scenario, "strategy": name, "seed": seed} | one
                    )
                    print(scenario, seed, name, one["losses"][STEPS], one["seconds"], flush=True)
                    write_atomically(PATH, to_json(found))


if __name__ == "__main__":
    main()
