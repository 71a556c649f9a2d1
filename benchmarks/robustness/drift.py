"""Which diagnostics tell that estimates are bad: how gradients change during and after the warm-up.

The estimator probes by how much gradients change up to its secant point, in the direction of the
remaining training. How they changed during the warm-up is known without probes: here the warm-up is
trained again, each example's gradient is captured after half and three quarters of its steps, and
compared with the one at the linearization point, in the same coordinates. For every family, next to
how estimates agree with ground-truth runs:

- the linearization residual: the part of the change of the mean gradient that the quadratic model
  misses;
- the rank correlation of estimates whose secant leads to that point.

    python -m benchmarks.robustness.drift [--families text]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

from benchmarks import RESULTS
from benchmarks.accuracy.baselines import task_means, trainer_at_switch
from benchmarks.accuracy.captured import captured_examples, complete_store, gradients
from benchmarks.accuracy.ground_truth import CACHE, StopAt, digest, make_trainer, warm_up
from benchmarks.accuracy.measures import Truth, measures, measures_in_nats, read_truth
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import GradientStore, LinearizedTraining
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.examples import capture_examples
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.store.arrays import evenly_spread
from hf_auxselect.store.records import MAX_PROBE_EXAMPLES
from hf_auxselect.store.writer import add_vectors
from hf_auxselect.trainer.access import trainable_state
from hf_auxselect.trainer.data import collate_function

POINTS = (0.5, 0.75)
"""Of the warm-up."""
DIAGNOSTICS = (
    "terms_over_loss",
    "largest_curvature_over_stable",
    "linearization_residual",
    "target_residual",
)


class KeepAt(TrainerCallback):
    """Keeps the trainable parameters after some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.kept: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        if state.global_step in self.steps:
            self.kept[state.global_step] = trainable_state(kwargs["model"])


def passed(family: str, steps: list[int]) -> dict[int, dict[str, Tensor]]:
    """The trainable parameters after those steps of a warm-up that ends at the switch, bitwise."""
    keep = KeepAt(steps)
    torch.set_num_threads(1)  # as in the warm-up itself
    with tempfile.TemporaryDirectory() as directory:
        stop = StopAt(FAMILIES[family].warm_up_steps)
        make_trainer(family, Path(directory), [keep, stop]).train()
        (again,) = Path(directory).glob("checkpoint-*")
        if digest(again) != digest(warm_up(family)):
            raise SystemExit(f"{family}: the warm-up came out otherwise than {warm_up(family)}.")
    return keep.kept


def captured(family: str) -> dict[int, GradientStore]:
    """The gradients after some steps of the warm-up, captured when they are first asked for."""
    steps = [max(1, int(share * FAMILIES[family].warm_up_steps)) for share in POINTS]
    directories = {step: CACHE / family / f"step-{step}" for step in steps}
    if not all(complete_store(path, "displacement") for path in directories.values()):
        with trainer_at_switch(family) as trainer:
            trainer.create_optimizer()
            state = torch.load(warm_up(family) / "optimizer.pt", weights_only=True)
            trainer.optimizer.load_state_dict(state)
            for step, values in passed(family, steps).items():
                capture(trainer, gradients(family, "continue"), values, directories[step])
    return {step: GradientStore.load(path) for step, path in directories.items()}


def capture(
    trainer: SFTTrainer, at_switch: GradientStore, values: dict[str, Tensor], directory: Path
) -> None:
    """Gradients of some examples of each task elsewhere, in the coordinates of the switch."""
    model, metadata = trainer.model, at_switch.metadata
    sketch = CountSketch(metadata["projection_dim"], metadata["seed"])
    scales = read_optimizer(model, trainer.optimizer).scales
    at_start, parameters = trainable_state(model), dict(model.named_parameters())
    displacement = sum(
        sketch.project(name, ((values[name] - at_start[name]).flatten() / scales[name])[None])[0]
        for name in at_start
    )

    def examples(store: GradientStore, k: int, dataset: Any) -> TaskExamples:
        captured = captured_examples(trainer, store, k, dataset)
        spread = evenly_spread(len(captured.example_ids), MAX_PROBE_EXAMPLES)
        return replace(captured, example_ids=[captured.example_ids[i] for i in spread])

    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    capture_examples(
        model,
        [examples(at_switch, k, trainer.train_dataset) for k in range(len(at_switch.task_names))],
        examples(at_switch.target, 0, trainer.eval_dataset),
        collate_function(trainer),
        directory=directory,
        projection_dim=sketch.dim,
        batch_size=16,
        seed=metadata["seed"],
        scalars=("loss@optimizer",),
        optimizer=trainer.optimizer,
    )
    add_vectors(directory, {"displacement": torch.as_tensor(displacement).numpy()})
    with torch.no_grad():
        for name, value in at_start.items():
            parameters[name].copy_(value)


def compare(family: str) -> dict[str, Any]:
    """How well estimates agree with the truth, and what changes on each way."""
    truth, store = read_truth(family, "continue"), gradients(family, "continue")
    line: dict[str, Any] = {"family": family, "probes": with_probes(truth, store)}
    for step, elsewhere in captured(family).items():
        change_ND = elsewhere.gradients.astype(np.float64) - rows_of(store, elsewhere)
        changes_KD = task_means(elsewhere, change_ND)
        second_points_KD = np.tile(elsewhere.vectors["displacement"], (len(changes_KD), 1))
        secant = {"second_points": second_points_KD, "gradient_changes": changes_KD}
        line[f"step {step}"] = with_probes(truth, store.with_vectors(secant))
    return line


def rows_of(store: GradientStore, some: GradientStore) -> np.ndarray:
    """The store's gradients of the examples that another one holds [N, D]."""
    place = {key: i for i, key in enumerate(zip(store.task_ids, store.example_ids, strict=True))}
    rows = [place[key] for key in zip(some.task_ids, some.example_ids, strict=True)]
    return store.scalar("loss@optimizer")[1][rows].astype(np.float64)


def with_probes(truth: Truth, store: GradientStore) -> dict[str, float]:
    """Agreement and diagnostics with the store's second point."""
    fitted = LinearizedTraining().fit(store)
    loss, diagnostics = fitted.estimate(truth.weights).loss, fitted.diagnostics()
    return {
        **measures(loss, truth.mean),
        **measures_in_nats(loss, truth.mean),
        **{name: diagnostics[name] for name in DIAGNOSTICS},
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(["small", *VARIANTS]), metavar="a,b")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    lines = [compare(family) for family in options.families.split(",")]
    print(
        "                                              terms  curvature        residual\n"
        "family           way        Spearman   error  /loss    /stable  gradient  loss"
    )
    for line in lines:
        for way, values in list(line.items())[1:]:
            print(
                f"{line['family']:16} {way:9} {values['spearman']:9.3f}  {values['error']:6.1%} "
                f"{values['terms_over_loss']:6.0%} {values['largest_curvature_over_stable']:10.2f} "
                f"{values['linearization_residual']:9.2f} {values['target_residual']:5.0%}"
            )
    record = {"command": "python -m benchmarks.robustness.drift", "lines": lines}
    write_atomically(RESULTS / "drift.json", to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
