"""Which estimator finds bad data: random groups of an addition, shuffled tasks of a fine-tune.

* addition: ``recipes/noisy_groups``, from scratch, with every parameter: 12 groups of right
  examples and 8 of random ones, after 30 of 60 steps. The AUROC of a score is the share of (right,
  random) pairs in which the right group has the lower one.
* families: a LoRA fine-tune in which one task has shuffled answers, at the switch, from gradients
  that were captured before (``benchmarks.accuracy.captured``). Its rank among the tasks by a score;
  1 is the worst.

The scores are those of ``RandomEnsemble``, the mean estimate over subsets with the group, and where
an estimator has a gradient its slopes at all tasks, which ``MixtureOptimization`` reports. Beside
them stands the group's own loss at the switch, which needs no gradient of anything.

Seeds 0 to 4 were looked at while the recipe was written, seeds 10 to 14 once, in the end.

    python -m benchmarks.accuracy.noisy_groups [--seeds 0,1,2,3,4,10,11,12,13,14]
        [--families small,text,demo,arithmetic,shifting,sentiment,analogies]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks import RESULTS
from benchmarks.accuracy.captured import gradients
from hf_auxselect import (
    AbstractEstimator,
    GaussNewton,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    MixtureOptimization,
    RandomEnsemble,
    TaskSelectionCallback,
)
from hf_auxselect.estimators.base import all_tasks_pooled
from hf_auxselect.estimators.reliability import reliability_warnings
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.selectors.problem import selection_problem
from recipes import noisy_groups

LOSS, GRADEX, DEFAULT = "loss of the group", "GradExLogistic()", "LinearizedTraining()"
NO_PROBES, NEXT_STEPS = "LinearizedTraining(probes=False)", "LinearizedTraining, next three steps"
GAUSS_NEWTON = "GaussNewton()"
NUM_NEXT_STEPS = 3
SEEDS = (*range(5), *range(10, 15))
FAMILIES = ("small", "text", "demo", "arithmetic", "shifting", "sentiment", "analogies")
AT_FLOOR = 1.05
"""A weight of up to this times the smallest one is at the floor: it got nothing in the optimum."""


@dataclass(frozen=True, kw_only=True)
class _Everything(LinearizedTraining):
    """The default, which captures what the other estimators need, too."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "sampled_loss", "margin")


def estimators(store: GradientStore) -> dict[str, AbstractEstimator]:
    """Those for which a store has gradients, by name."""
    assert store.remaining_training is not None
    rates = store.remaining_training.learning_rates
    made: dict[str, AbstractEstimator] = {
        GRADEX: GradExLogistic(),
        DEFAULT: LinearizedTraining(),
        NO_PROBES: LinearizedTraining(probes=False),
        NEXT_STEPS: LinearizedTraining(learning_rates=rates[:NUM_NEXT_STEPS], probes=False),
        GAUSS_NEWTON: GaussNewton(),
    }
    return {name: one for name, one in made.items() if set(one.scalars) <= set(store.scalars)}


def scored(store: GradientStore, ensemble: RandomEnsemble) -> dict[str, Any]:
    """The groups' scores and slopes by each estimator, and what the default selection does."""
    names, pooled_1K = store.task_names, all_tasks_pooled(store.task_sizes)
    scores = {LOSS: dict(zip(names, store.task_losses.tolist(), strict=True))}
    slopes: dict[str, dict[str, float]] = {}
    for name, estimator in estimators(store).items():
        fitted = estimator.fit(store)
        scores[name] = ensemble.select(selection_problem(fitted, store)).scores
        if fitted.has_gradient:
            slopes[name] = dict(zip(names, fitted.gradient(pooled_1K)[0].tolist(), strict=True))
        if name == DEFAULT:
            warnings = reliability_warnings(fitted.diagnostics(), restarts=False)
            chosen = MixtureOptimization().select(selection_problem(fitted, store))
    shares = dict(zip(names, pooled_1K[0].tolist(), strict=True))
    over_share = {name: chosen.weights[name] / share for name, share in shares.items()}
    return {
        "scores": scores,
        "slopes": slopes,
        "warnings": warnings,
        "weights_over_shares": over_share,
    }


def above_floor(over_share: dict[str, float]) -> list[str]:
    """Groups that the mixture took more of than the least that it leaves any."""
    floor = AT_FLOOR * min(over_share.values())
    return [name for name, value in over_share.items() if value > floor]


def count(names: list[str]) -> dict[str, int]:
    """How many of some groups are random, and how many right."""
    num_random = sum(name.startswith("random") for name in names)
    return {"random": num_random, "right": len(names) - num_random}


def trained(
    seed: int,
    directory: str,
    callback: TaskSelectionCallback | None = None,
    without: Collection[str] = (),
) -> float:
    """The target's loss after the whole run, on all groups but some."""
    quiet = {"logging_steps": 100, "disable_tqdm": True, "use_cpu": True}
    trainer = noisy_groups.build(seed, callback, directory, without=without, **quiet)
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


def of_addition(seed: int) -> dict[str, Any]:
    """What each estimator finds of the groups of one seed."""
    callback = noisy_groups.scoring(seed, _Everything())
    with tempfile.TemporaryDirectory() as directory:
        loss = trained(seed, directory, callback)
        assert callback.report is not None
        assert isinstance(callback.selector, RandomEnsemble)
        found = scored(callback.report.gradients(), callback.selector)
        bad = noisy_groups.above_the_gap(found["scores"][GRADEX])
        loss_without = trained(seed, f"{directory}/without", without=bad)
    over_share = found["weights_over_shares"]
    random = [value for name, value in over_share.items() if name.startswith("random")]
    return {
        "seed": seed,
        "auroc": {name: noisy_groups.auroc(s) for name, s in found["scores"].items()},
        "auroc_of_slopes": {name: noisy_groups.auroc(s) for name, s in found["slopes"].items()},
        "warnings": found["warnings"],
        "dropped": {
            name: count(noisy_groups.above_the_gap(s)) for name, s in found["scores"].items()
        },
        "loss": loss,
        "loss_without_dropped": loss_without,
        "mixture": {
            "above_floor": count(above_floor(over_share)),
            "floor": min(over_share.values()),
            "share_of_random": sum(random) / len(over_share),
        },
    }


def of_family(family: str) -> dict[str, Any]:
    """The rank of the shuffled task, the last one, by each score; 1 is the worst."""
    store = gradients(family, "continue")
    found = scored(store, RandomEnsemble(num_subsets=200))
    over_share = found["weights_over_shares"]

    def rank(scores: dict[str, float]) -> int:
        return 1 + sum(value > scores["shuffled"] for value in scores.values())

    return {
        "family": family,
        "tasks": len(store.task_names),
        "rank": {name: rank(scores) for name, scores in found["scores"].items()},
        "rank_of_slope": {name: rank(slopes) for name, slopes in found["slopes"].items()},
        "warnings": found["warnings"],
        "mixture": {
            "above_floor": len(above_floor(over_share)),
            "floor": min(over_share.values()),
            "shuffled": over_share["shuffled"],
        },
    }


def main() -> None:
    """Print each line and write all as JSON; lines of an earlier call are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    path = RESULTS / "noisy_groups.json"

    def keep(part: str, key: str, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        content: dict[str, Any] = {"command": "python -m benchmarks.accuracy.noisy_groups"}
        for name in ("addition", "families"):
            lines = known.get(name, [])
            if name == part:
                lines = [old for old in lines if old[key] != line[key]] + [line]
            content[name] = lines
        content["addition"].sort(key=lambda one: one["seed"])
        write_atomically(path, to_json(content))

    for seed in map(int, filter(None, options.seeds.split(","))):
        keep("addition", "seed", of_addition(seed))
    for family in filter(None, options.families.split(",")):
        keep("families", "family", of_family(family))


if __name__ == "__main__":
    main()
