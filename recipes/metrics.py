"""Metrics of the recipes, as local ``evaluate.Metric`` classes that need no network.

``evaluate.load("accuracy")`` fetches a script from the Hub; a subclass of ``evaluate.Metric`` is
used in the same way. :class:`CompletionMetric` is the ``compute_metrics`` of an ``SFTTrainer``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100
"""Label of positions without loss; the Trainer pads predictions with it, too."""

_ANSWER = re.compile(r"answer is:?\s*(.*?)\s*(?:\.(?=\s|$)|\n|$)", re.IGNORECASE)
"""Up to the end of the sentence or of the line."""


class _PairMetric(evaluate.Metric):
    """A metric over pairs of values: ``compute(predictions=[...], references=[...])``."""

    dtype: ClassVar[str]
    """Of the values, as ``datasets`` names it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description=f"predictions and references: lists of {self.dtype}",
            features=Features({name: Value(self.dtype) for name in ("predictions", "references")}),
        )


class ExactMatch(_PairMetric):
    """Share of predictions that are the reference, except for space around them."""

    dtype = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([a.strip() == b.strip() for a, b in pairs]))}


class AnswerAccuracy(_PairMetric):
    """Share of generated rationales whose final answer is that of the reference.

    The answer is what follows the last "the answer is"; see :func:`answer_of`.
    """

    dtype = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        right = [(found := answer_of(a)) is not None and found == answer_of(b) for a, b in pairs]
        return {"answer_accuracy": float(np.mean(right))}


def answer_of(text: str) -> str | None:
    """The final answer of a rationale: lower case, numbers without commas and trailing zeros.

    None if the text does not say "the answer is".
    """
    found = _ANSWER.findall(text)
    if not found:
        return None
    answer = str(found[-1]).lower().strip(" .$%()")
    number = answer.replace(",", "")
    if re.fullmatch(r"-?\d+(\.\d+)?", number):
        return number.rstrip("0").rstrip(".") if "." in number else number
    return answer


def most_likely_tokens(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The ``preprocess_logits_for_metrics`` of these metrics: keeps [B, S] instead of [B, S, V]."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


@dataclass(frozen=True)
class CompletionMetric:
    """A ``compute_metrics``: compares each completion with what the model would write.

    Each token is the most likely one after the tokens of the reference before it. So a completion
    matches exactly if, and only if, greedy decoding writes it. Pass :func:`most_likely_tokens` as
    ``preprocess_logits_for_metrics``.

    Attributes:
        metric: of pairs of texts.
        tokenizer: the model's.
    """

    metric: evaluate.Metric
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metric of an evaluation: predictions and labels are int64 [N, S]."""
        predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        result: dict[str, float] = self.metric.compute(
            predictions=self._texts(predicted, labels), references=self._texts(labels, labels)
        )
        return result

    def _texts(self, tokens: np.ndarray, labels: np.ndarray) -> list[str]:
        rows = [row[label != IGNORED] for row, label in zip(tokens, labels, strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts


def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """What the model writes after each prompt, by greedy decoding, up to its end-of-text token."""
    texts: list[str] = []
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for first in range(0, len(prompts), batch_size):
            batch = tokenizer(
                prompts[first : first + batch_size], return_tensors="pt", padding=True
            )
            batch = batch.to(model.device)
            with torch.no_grad():
                output = model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = output[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return texts


class Accuracy(_PairMetric):
    """Share of predictions that are the reference."""

    dtype = "int64"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class F1(_PairMetric):
    """F1 of a class, or its mean over the classes that occur: ``compute(..., average="macro")``."""

    dtype = "int64"

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        *,
        pos_label: int = 1,
        average: str = "binary",
    ) -> dict[str, float]:
        if average not in ("binary", "macro"):
            raise ValueError(f"average={average!r}: expected 'binary' or 'macro'.")
        classes = sorted({*predictions, *references}) if average == "macro" else [pos_label]
        return {"f1": float(np.mean([_f1(predictions, references, c) for c in classes]))}


def _f1(predictions: list[int], references: list[int], label: int) -> float:
    """2 TP / (2 TP + FP + FN); 0 for a class that does not occur."""
    predicted, actual = np.equal(predictions, label), np.equal(references, label)
    total = int(predicted.sum() + actual.sum())
    return 2 * int((predicted & actual).sum()) / total if total else 0.0
