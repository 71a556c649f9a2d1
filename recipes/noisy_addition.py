"""The paper's own experiment: tell groups of right examples from groups of random ones.

A two-layer GPT learns five-digit addition, with the intermediate lines, from 300 right examples and
200 whose output digits are random, in 20 groups of 25. Nothing tells it which are which. The
groups are the tasks, right examples held out are the target, and every parameter is captured. The
scores of a random ensemble (50 subsets of 7 groups) should rank all 12 right groups before the 8
random ones: an AUROC of 1.

The scores are taken early, after 30 steps, when the model knows the format and a little of the
sums. Later it has learned the right examples, whose margins then hardly move, and the mean
margin, which ``GradExLogistic`` works with, no longer tells the groups apart.

    python -m recipes.noisy_addition [--seeds 5]

Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024).
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_auxselect import GradExLogistic, RandomEnsemble, TaskSelectionCallback, concatenate_tasks

CHARACTERS = "\n+0123456789"
GROUP_SIZE, RIGHT_GROUPS, RANDOM_GROUPS = 25, 12, 8


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
    seed: int, callback: TaskSelectionCallback, output_dir: str, *, width: int = 128, **options: Any
) -> Trainer:
    """The trainer; other options are those of TrainingArguments."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(CHARACTERS),
            n_positions=64,
            n_embd=width,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    arguments: dict[str, Any] = {
        "max_steps": 30,
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
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir, **arguments | options),
        train_dataset=concatenate_tasks(groups(seed)),
        eval_dataset=Dataset.from_list([addition(rng, is_right=True) for _ in range(200)]),
        data_collator=collate,
        callbacks=[callback],
    )


def auroc(scores: dict[str, float]) -> float:
    """Share of (right, random) pairs of groups in which the right one has the lower score."""
    right = [score for name, score in scores.items() if name.startswith("right")]
    wrong = [score for name, score in scores.items() if name.startswith("random")]
    return sum((a < b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))


def score_groups(seed: int, output_dir: str, **options: Any) -> dict[str, float]:
    """Train on everything, capture, and score the groups by 50 subsets of 7."""
    callback = TaskSelectionCallback(
        warmup=options.get("max_steps", 30),
        estimator=GradExLogistic(),
        selector=RandomEnsemble(num_subsets=50, subset_size=7, seed=seed),
        after="observe",
        projection_dim=512,
    )
    build(seed, callback, output_dir, **options).train()
    assert callback.report is not None
    return callback.report.scores


def main() -> None:
    """Print the AUROC of every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", default="outputs/noisy_addition")
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        scores = score_groups(seed, f"{options.output_dir}/{seed}", logging_steps=100)
        results.append(auroc(scores))
        print(f"seed {seed}: AUROC {results[-1]:.3f}", flush=True)
    print("AUROC:", ", ".join(f"{value:.3f}" for value in results))


if __name__ == "__main__":
    main()
