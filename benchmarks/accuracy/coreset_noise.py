"""Gradient coresets and wrong tasks: what is kept of right and of wrong ones, beside a loss filter.

20 tasks, of which 10, 20 or 40% are wrong, in three ways:

* random: each answer is random, as in the noisy addition of the paper (``recipes/noisy_groups``);
* shuffled: the answers of a task's examples are exchanged among them;
* own rule: each wrong task replaces the digits of its answers by a rule of its own.

The model is that of the noisy addition, half as wide, after 100 steps on all tasks. Synthetic
gradients stand beside it: right tasks around one mean; wrong ones around one mean of their own
("cluster"), or each in a direction of its own ("isolated").

Precision is the share of the mixture that goes to right tasks. Recall is the share of the right
tasks that the mixture holds, or that are mapped to a right task in it. The loss filter drops the
tasks with the highest losses, and is told how many are wrong.

    python -m benchmarks.accuracy.coreset_noise [--seeds 3]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import RESULTS
from hf_auxselect import GradientCoreset, SelectionProblem
from hf_auxselect.estimators import Estimate
from hf_auxselect.files import to_json, write_atomically
from recipes.noisy_groups import CHARACTERS, GROUP_SIZE, addition, collate

NUM_TASKS = 20
NUM_STEPS, BATCH_SIZE = 100, 64
SHARES = (0.1, 0.2, 0.4)
KINDS = ("random", "shuffled", "own rule")
SYNTHETIC = ("cluster", "isolated")
SELECTORS = {
    "coreset, 4 tasks": GradientCoreset(size=4),
    "coreset, 10 tasks": GradientCoreset(size=10),
    "coreset, 10 tasks, min_members=2": GradientCoreset(size=10, min_members=2),
}
_DIGITS = [CHARACTERS.index(c) for c in "0123456789"]


def tasks(kind: str, num_wrong: int, seed: int) -> list[list[dict[str, list[int]]]]:
    """Examples of 20 tasks of the noisy addition, the wrong ones last."""
    rng = random.Random(seed)
    made = []
    for k in range(NUM_TASKS):
        is_wrong = k >= NUM_TASKS - num_wrong
        rows = [
            addition(rng, is_right=not (is_wrong and kind == "random")) for _ in range(GROUP_SIZE)
        ]
        if is_wrong and kind == "shuffled":
            rows = _with_answers(rows, rng.sample([row["labels"] for row in rows], GROUP_SIZE))
        if is_wrong and kind == "own rule":
            rule = dict(zip(_DIGITS, rng.sample(_DIGITS, len(_DIGITS)), strict=True))
            answers = [[rule.get(token, token) for token in row["labels"]] for row in rows]
            rows = _with_answers(rows, answers)
        made.append(rows)
    return made


def _with_answers(
    rows: list[dict[str, list[int]]], answers: list[list[int]]
) -> list[dict[str, list[int]]]:
    """Rows with other labels; prompts, whose labels are masked, stay. All have one length."""
    return [
        {
            "input_ids": [
                token if label == -100 else label
                for token, label in zip(row["input_ids"], answer, strict=True)
            ],
            "labels": answer,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def trained(kind: str, num_wrong: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradients [K, P] and losses [K] of the tasks after a short training on all of them.

    Exact ones, of all P parameters: all rows have as many label tokens.
    """
    torch.manual_seed(seed)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(CHARACTERS), **sizes, **dropout))
    batches = [collate(rows) for rows in tasks(kind, num_wrong, seed)]
    every = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(NUM_STEPS):
        rows = torch.randperm(len(every["labels"]), generator=generator)[:BATCH_SIZE]
        model(**{name: tensor[rows] for name, tensor in every.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    means, losses = [], []
    for batch in batches:
        loss = model(**batch).loss
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        means.append(torch.cat([g.flatten() for g in gradients]).double().numpy())
        losses.append(loss.item())
    return np.stack(means), np.array(losses)


def synthetic(kind: str, num_wrong: int, seed: int, dim: int = 400) -> np.ndarray:
    """Mean gradients [K, D], all of about one length; the wrong tasks are the last ones.

    The tasks of a group share half of their squared length, which is what the right tasks of the
    noisy addition share.
    """
    rng = np.random.default_rng(seed)
    own_KD = rng.normal(size=(NUM_TASKS, dim)) / np.sqrt(2 * dim)
    right_D, wrong_D = rng.normal(size=(2, dim)) / np.sqrt(2 * dim)
    is_wrong = np.arange(NUM_TASKS) >= NUM_TASKS - num_wrong
    if kind == "isolated":
        own_KD[is_wrong] *= np.sqrt(2)
        wrong_D = np.zeros(dim)
    return own_KD + np.where(is_wrong[:, None], wrong_D, right_D)


def coreset(selector: GradientCoreset, means_KD: np.ndarray, num_wrong: int) -> dict[str, float]:
    """Precision, recall and gradient error of one coreset."""
    names = [str(k) for k in range(NUM_TASKS)]
    sizes = [GROUP_SIZE] * NUM_TASKS
    problem = SelectionProblem(_no_estimates, names, sizes, gram=means_KD @ means_KD.T)
    chosen = selector.select(problem)
    weights_K = np.array([*chosen.weights.values()])
    medoids = [int(name) for name in GradientCoreset(size=selector.size).select(problem).selected]
    nearest_K = np.array(
        [min(medoids, key=lambda j: np.linalg.norm(means_KD[k] - means_KD[j])) for k in range(20)]
    )
    is_right = np.arange(NUM_TASKS) < NUM_TASKS - num_wrong
    stands_right = is_right[nearest_K] & (weights_K[nearest_K] > 0)
    return {
        "precision": float(weights_K[is_right].sum()),
        "recall": float(stands_right[is_right].mean()),
        "error": chosen.diagnostics["coreset_gradient_error"],
    }


def loss_filter(losses_K: np.ndarray, num_wrong: int) -> dict[str, float]:
    """Precision and recall of all tasks but those of the highest losses."""
    kept = np.argsort(losses_K, kind="stable")[: NUM_TASKS - num_wrong]
    num_right = float((kept < NUM_TASKS - num_wrong).sum())
    return {
        "precision": num_right / len(kept),
        "recall": num_right / (NUM_TASKS - num_wrong),
    }


def _no_estimates(weights: np.ndarray) -> Estimate:
    zeros = np.zeros(len(weights))
    return Estimate(loss=zeros, low=zeros, high=zeros)


def measure(num_seeds: int) -> Iterator[dict[str, Any]]:
    """Mean over seeds for each kind, share of wrong tasks and method."""
    for kind in (*KINDS, *SYNTHETIC):
        for share in SHARES:
            num_wrong = round(share * NUM_TASKS)
            found: dict[str, list[dict[str, float]]] = {}
            for seed in range(num_seeds):
                if kind in KINDS:
                    means_KD, losses_K = trained(kind, num_wrong, seed)
                    found.setdefault("loss filter", []).append(loss_filter(losses_K, num_wrong))
                else:
                    means_KD = synthetic(kind, num_wrong, seed)
                for name, selector in SELECTORS.items():
                    found.setdefault(name, []).append(coreset(selector, means_KD, num_wrong))
            for name, results in found.items():
                means = {key: float(np.mean([r[key] for r in results])) for key in results[0]}
                yield {"kind": kind, "wrong": share, "method": name, **means}


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    lines = []
    print(f"{'kind':10} {'wrong':>5}  {'method':34} precision recall  error")
    for line in measure(options.seeds):
        lines.append(line)
        error = f"{line['error']:6.2f}" if "error" in line else ""
        print(
            f"{line['kind']:10} {line['wrong']:5.0%}  {line['method']:34} "
            f"{line['precision']:9.2f} {line['recall']:6.2f} {error}",
            flush=True,
        )
    command = f"python -m benchmarks.accuracy.coreset_noise --seeds {options.seeds}"
    write_atomically(RESULTS / "coreset_noise.json", to_json({"command": command, "lines": lines}))


if __name__ == "__main__":
    main()
