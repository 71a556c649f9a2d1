"""Which layer to train after a planted shift, and whether scores of layers know it.

Two models are trained from scratch, and then meet data that differ in one respect:

* input: the tokens are permuted;
* feature: pairs of tokens that training never had (the subpopulation that was left out);
* output: the labels are permuted.

"chain" is a feed-forward classifier of five linear layers without residual connections; each is a
layer. "transformer" is a Llama of four blocks with LoRA, which adds neighbouring tokens; each block
is a layer.

Ground truth: each layer alone, and all layers, are trained on 64 examples of the shifted data; the
loss of 1,000 others counts, at the best of some learning rates and lengths for each. Then, for each
score of ``score_layers``: the place of the layer it ranks first, its Spearman correlation with the
ground truth over layers, and the loss of the layer it ranks first minus that of the best.

    python -m benchmarks.accuracy.layers [--seeds 5] [--transformer_seeds 3]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks import RESULTS
from benchmarks.accuracy.measures import spearman
from hf_auxselect import LayerSelection, capture_gradients, score_layers
from hf_auxselect.capture.layer_gradients import layers_of
from hf_auxselect.capture.scalars import NEXT_TOKEN_LOSS
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.layers import Grouping, ScoreMethod

Batch = dict[str, Tensor]
Shift = dict[str, Any]

SHIFTS = ("input", "feature", "output")
NUM_TARGET, NUM_TEST = 64, 1000


class Chain(nn.Module):
    """Four tokens of eight kinds; the class is a weighted sum of them, coarsened, modulo 8."""

    TOKENS, LENGTH, CLASSES, WIDTH, DEPTH = 8, 4, 8, 64, 5
    STEPS, RATES = (30, 100), (1e-3, 3e-3, 1e-2)

    def __init__(self) -> None:
        super().__init__()
        widths = [self.TOKENS * self.LENGTH, *[self.WIDTH] * (self.DEPTH - 1), self.CLASSES]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        hidden = nn.functional.one_hot(input_ids, self.TOKENS).float().flatten(1)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden if number == 0 else hidden.relu())
        loss = None if labels is None else nn.functional.cross_entropy(hidden, labels)
        return SequenceClassifierOutput(loss=loss, logits=hidden)

    @classmethod
    def pretrained(cls, seed: int, new_pairs: Tensor, rng: torch.Generator) -> nn.Module:
        torch.manual_seed(seed)
        model = cls()
        train(model, None, lambda: cls.batch(128, rng, {"pairs": ~new_pairs}), 1500, 3e-3)
        return model

    @classmethod
    def batch(cls, count: int, rng: torch.Generator, shift: Shift) -> Batch:
        tokens = torch.randint(cls.TOKENS, (8 * count, cls.LENGTH), generator=rng)
        # Only rows whose first two tokens are an allowed pair.
        tokens = tokens[shift["pairs"][tokens[:, 0], tokens[:, 1]]][:count]
        labels = (tokens * torch.tensor([1, 2, 1, 3])).sum(1) // 5 % cls.CLASSES
        return _permuted(tokens, labels, shift)


class Transformer:
    """Eight tokens of ten kinds; the label of each is its sum with the token before it."""

    TOKENS, LENGTH, CLASSES = 10, 8, 19
    STEPS, RATES = (30,), (3e-3, 1e-2)

    @classmethod
    def pretrained(cls, seed: int, new_pairs: Tensor, rng: torch.Generator) -> nn.Module:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=31,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)

        def batch(count: int) -> Batch:
            return cls.batch(count, rng, {"pairs": ~new_pairs})

        train(model, None, lambda: batch(64), 1000, 3e-3)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        adapted = get_peft_model(model, adapter)
        train(adapted, None, lambda: batch(16), 20, 3e-3)  # the warm-up of a run
        return adapted

    @classmethod
    def batch(cls, count: int, rng: torch.Generator, shift: Shift) -> Batch:
        tokens = torch.randint(cls.TOKENS, (count, cls.LENGTH), generator=rng)
        before = tokens.roll(1, 1)
        labels = torch.where(shift["pairs"][tokens, before], tokens + before, -100)
        labels[:, 0] = -100
        batch = _permuted(tokens, labels, shift)
        labels = torch.where(batch["labels"] >= 0, batch["labels"] + cls.TOKENS, -100)
        # The model predicts the label of a position from that position: a causal language model
        # shifts labels by one.
        pad = torch.zeros((count, 1), dtype=torch.int64)
        return {
            "input_ids": torch.cat([batch["input_ids"], pad + 31], 1),
            "labels": torch.cat([pad - 100, labels], 1),
        }


def _permuted(tokens: Tensor, labels: Tensor, shift: Shift) -> Batch:
    if "tokens" in shift:
        tokens = shift["tokens"][tokens]
    if "labels" in shift:
        labels = torch.where(labels >= 0, shift["labels"][labels.clamp(min=0)], labels)
    return {"input_ids": tokens, "labels": labels}


def train(
    model: nn.Module,
    names: Sequence[str] | None,
    batch: Callable[[], Batch],
    steps: int,
    rate: float,
) -> None:
    """AdamW on these parameters, or on all that are trainable; the rate falls to 0."""
    parameters = [
        p for name, p in model.named_parameters() if p.requires_grad and name in (names or [name])
    ]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


def loss_after(
    family: Any, model: nn.Module, names: Sequence[str] | None, target: Batch, test: Batch
) -> float:
    """The lowest test loss over learning rates and lengths of training on some parameters."""
    losses = []
    for steps in family.STEPS:
        for rate in family.RATES:
            trained = copy.deepcopy(model)
            train(trained, names, lambda: target, steps, rate)
            with torch.no_grad():
                losses.append(float(trained(**test).loss))
    return min(losses)


def scores_of(model: nn.Module, by: Any, target: Batch, usual: Batch) -> dict[str, list[float]]:
    """Each score of the layers, in the order of the model."""

    def rows(batch: Batch) -> list[dict[str, Tensor]]:
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]

    def collate(rows: list[dict[str, Tensor]]) -> Batch:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    with tempfile.TemporaryDirectory() as directory:
        store = capture_gradients(
            model,
            {"usual": rows(usual)},
            rows(target),
            collate,
            directory=directory,
            scalars=["loss"],
            loss=NEXT_TOKEN_LOSS,
            layers=LayerSelection(by=by, keep=1.0),
            progress=False,
        )
        return {
            method: list(score_layers(store, method).values()) for method in get_args(ScoreMethod)
        }


def measure(family: Any, seed: int) -> dict[str, Any]:
    """All shifts of one family and seed."""
    rng = torch.Generator().manual_seed(seed)
    new_pairs = torch.rand(family.TOKENS, family.TOKENS, generator=rng) < 0.3
    model = family.pretrained(seed, new_pairs, rng)
    by: Grouping = "module" if family is Chain else "block"
    names: dict[str, list[str]] = {}
    for name, layer in layers_of(model, by).items():
        names.setdefault(layer, []).append(name)
    usual = {"pairs": ~new_pairs}
    shifts: Mapping[str, Shift] = {
        "input": usual | {"tokens": torch.randperm(family.TOKENS, generator=rng)},
        "feature": {"pairs": new_pairs},
        "output": usual | {"labels": torch.randperm(family.CLASSES, generator=rng)},
    }
    results = {}
    for shift, options in shifts.items():
        target, test = (family.batch(count, rng, options) for count in (NUM_TARGET, NUM_TEST))
        with torch.no_grad():
            before = float(model(**test).loss)
        alone = [loss_after(family, model, own, target, test) for own in names.values()]
        scores = scores_of(model, by, target, family.batch(8, rng, usual))
        results[shift] = {
            "before": before,
            "all_layers": loss_after(family, model, None, target, test),
            "one_layer": alone,
            "scores": scores,
        }
        best = {method: int(np.argmax(values)) + 1 for method, values in scores.items()}
        print(family.__name__, seed, shift, f"best {np.argmin(alone) + 1}", best, flush=True)
    return results


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, by shift."""
    found: dict[str, Any] = {}
    for shift in SHIFTS:
        of_shift = [run[shift] for run in runs]
        alone = np.array([one["one_layer"] for one in of_shift])
        found[shift] = {
            "loss_before": float(np.mean([one["before"] for one in of_shift])),
            "loss_all_layers": float(np.mean([one["all_layers"] for one in of_shift])),
            "loss_best_layer": float(alone.min(1).mean()),
            "best_layer": (alone.argmin(1) + 1).tolist(),
        }
        for method in get_args(ScoreMethod):
            scores = np.array([one["scores"][method] for one in of_shift])
            first = scores.argmax(1)
            chosen = alone[np.arange(len(alone)), first]
            found[shift][method] = {
                "layer": (first + 1).tolist(),
                "rank_correlation": float(
                    np.mean([spearman(*pair) for pair in zip(scores, -alone, strict=True)])
                ),
                "loss": float(chosen.mean()),
            }
    return found


def main() -> None:
    """Measure both families, and write the means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--transformer_seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "chain": summary([measure(Chain, seed) for seed in range(args.seeds)]),
        "transformer": summary([measure(Transformer, n) for n in range(args.transformer_seeds)]),
    }
    write_atomically(RESULTS / "layers.json", to_json(results))


if __name__ == "__main__":
    main()
