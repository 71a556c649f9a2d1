"""Find the bad data sources, and train without them: the paper's own experiment.

A two-layer GPT learns five-digit addition, with the intermediate lines, from 300 right examples and
200 whose output digits are random, in 20 groups of 25. The groups are the tasks, 200 other right
examples are the target, and gradients of all parameters are captured. The scores of a random
ensemble (50 subsets of 7 groups) should rank all 12 right groups before the 8 random ones: an AUROC
of 1. The groups above the widest gap between two scores are dropped.

Groups are scored early, after 30 steps, when the model knows the format and a little of the sums.
Here ``GradExLogistic`` ranks right and the default estimator often does not: 30 more steps of all
parameters go farther than its quadratic model is accurate, of which most reports warn. In four of
seven families of fine-tunes it was the other way round: see ``docs/recipes/noisy_groups.md``.

    python -m recipes.noisy_groups [--seeds 5]

Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024).
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Collection
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_auxselect import (
    AbstractEstimator,
    GradExLogistic,
    LinearizedTraining,
    RandomEnsemble,
    TaskSelectionCallback,
    concatenate_tasks,
)

WARM_UP_STEPS, STEPS, WIDTH = 30, 60, 128
CHARACTERS = "\n+0123456789"
GROUP_SIZE, RIGHT_GROUPS, RANDOM_GROUPS, TARGET_SIZE = 25, 12, 8, 200


def addition(rng: random.Random, *, is_right: bool) -> dict[str, list[int]]:
    """One example: the sum, then a line for each digit from the right.

    ``97990+53728`` is followed by ``08``, ``118``, ``1718``, ``11718`` and ``151718``: the carry,
    then the digits found so far. A random example has random digits in their place.
    """
    a, b = (rng.randrange(10_000, 100_000) for _ in range(2))
    lines, result, carry = [], "", 0
    for place in range(5):
        carry, digit = divmod(a // 10**place % 10 + b // 10**place % 10 + carry, 10)
        result = f"{digit}{result}"
        lines.append(f"{carry}{result}")
    if not is_right:
        lines = ["".join(rng.choice("0123456789") for _ in line) for line in lines]
    prompt, answer = (
        [CHARACTERS.index(c) for c in text] for text in (f"{a}+{b}\n", "\n".join(lines) + "\n")
    )
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def groups(seed: int) -> dict[str, Dataset]:
    """20 groups of 25 examples, the right ones first."""
    rng = random.Random(seed)
    kinds = [True] * RIGHT_GROUPS + [False] * RANDOM_GROUPS
    return {
        f"{'right' if is_right else 'random'} {i}": Dataset.from_list(
            [addition(rng, is_right=is_right) for _ in range(GROUP_SIZE)]
        )
        for i, is_right in enumerate(kinds)
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """All rows have the same length; positions are given, so that they are captured per example."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    shape = batch["input_ids"].shape
    return batch | {"position_ids": torch.arange(shape[1]).expand(shape)}


def build(
    seed: int,
    callback: TaskSelectionCallback | None,
    output_dir: str,
    *,
    without: Collection[str] = (),
    **options: Any,
) -> Trainer:
    """The trainer, on all groups but some; other options are those of TrainingArguments."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(CHARACTERS),
            n_positions=64,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "warmup_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "seed": seed,
    }
    rng = random.Random(1000 + seed)
    kept = {name: rows for name, rows in groups(seed).items() if name not in without}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir, **arguments | options),
        train_dataset=concatenate_tasks(kept),  # <- remembers each row's group
        eval_dataset=Dataset.from_list(
            [addition(rng, is_right=True) for _ in range(TARGET_SIZE)]
        ),  # <- the target
        data_collator=collate,
        callbacks=[callback] if callback else [],  # <- scores the groups
    )


def auroc(scores: dict[str, float]) -> float:
    """Share of (right, random) pairs of groups in which the right one has the lower score."""
    right = [score for name, score in scores.items() if name.startswith("right")]
    wrong = [score for name, score in scores.items() if name.startswith("random")]
    return sum((a < b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))


def above_the_gap(scores: dict[str, float]) -> list[str]:
    """The groups above the widest gap between two neighbouring scores: those to drop."""
    names = sorted(scores, key=scores.__getitem__)
    gaps = [scores[after] - scores[before] for before, after in itertools.pairwise(names)]
    return names[gaps.index(max(gaps)) + 1 :]


def scoring(
    seed: int, estimator: AbstractEstimator, warmup: int | None = None
) -> TaskSelectionCallback:
    """Scores the groups after the warm-up, by 50 subsets of 7, and changes nothing in the run."""
    return TaskSelectionCallback(
        warmup=warmup or WARM_UP_STEPS,
        estimator=estimator,
        selector=RandomEnsemble(num_subsets=50, subset_size=7, seed=seed),
        after="observe",
        projection_dim=512,
    )


def score_groups(
    seed: int, estimator: AbstractEstimator, output_dir: str, **options: Any
) -> tuple[dict[str, float], float]:
    """Train on all groups: the score of each, and the target's loss at the end."""
    steps = options.get("max_steps", STEPS)
    callback = scoring(seed, estimator, None if steps == STEPS else steps // 2)
    trainer = build(seed, callback, output_dir, **options)
    trainer.train()
    assert callback.report is not None
    return callback.report.scores, trainer.evaluate()["eval_loss"]


def main() -> None:
    """Print the AUROC of every seed by both estimators, and what dropping groups is worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds: 0, 1, ...")
    parser.add_argument(
        "--max_steps", type=int, default=STEPS, help="training steps; half of them warm up"
    )
    parser.add_argument("--output_dir", default="outputs/noisy_groups", help="for all runs")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be a number of seeds, 1 or more, got {options.seeds}.")
    if options.max_steps < 2:
        parser.error(f"--max_steps must be 2 or more, got {options.max_steps}.")
    quiet: dict[str, Any] = {
        "max_steps": options.max_steps,
        "logging_steps": 100,
        "disable_tqdm": True,
    }
    lines = []
    for seed in range(options.seeds):
        directory = f"{options.output_dir}/{seed}"
        scores, of_all = score_groups(seed, GradExLogistic(), f"{directory}/gradex", **quiet)
        others, _ = score_groups(seed, LinearizedTraining(), f"{directory}/default", **quiet)
        bad = above_the_gap(scores)
        trainer = build(seed, None, f"{directory}/dropped", without=bad, **quiet)
        trainer.train()
        num_random = sum(name.startswith("random") for name in bad)
        lines.append(
            f"seed {seed}: AUROC GradExLogistic() {auroc(scores):.3f}, LinearizedTraining() "
            f"{auroc(others):.3f}; dropped {num_random} random groups of {RANDOM_GROUPS}, "
            f"{len(bad) - num_random} right ones: target loss "
            f"{trainer.evaluate()['eval_loss']:.3f}, with all groups {of_all:.3f}"
        )
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
