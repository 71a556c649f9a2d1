"""The recipes' metrics: local classes of evaluate, which need no network."""

import numpy as np
import pytest
import tiny
import torch
from transformers import EvalPrediction

from recipes.metrics import (
    AnswerAccuracy,
    CompletionMetric,
    ExactMatch,
    answer_of,
    generated,
    most_likely_tokens,
)


def test_exact_match_ignores_space_around_an_answer():
    result = ExactMatch().compute(predictions=["a ", "b", "c"], references=[" a", "B", "c"])
    assert result == {"exact_match": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Two and two. Therefore, the answer is 4.", "4"),
        ("The answer is 1,000.50.", "1000.5"),
        ("the answer is: $5.", "5"),
        ("The answer is 3.\nThe answer is (B).", "b"),
        ("The answer is Yes", "yes"),
        ("The answer is 100.", "100"),
        ("The answer is no. Q: Is it 5.5?\nA: Yes.", "no"),
        ("It is four.", None),
    ],
)
def test_the_answer_of_a_rationale(text, answer):
    assert answer_of(text) == answer


def test_answer_accuracy_counts_no_rationale_without_answer():
    result = AnswerAccuracy().compute(
        predictions=["so the answer is 2.", "who knows", "the answer is 3."],
        references=["The answer is 2.", "who knows", "The answer is 4."],
    )
    assert result == {"answer_accuracy": pytest.approx(1 / 3)}


def test_a_trainer_reports_them(run_dir):
    tokenizer = tiny.tokenizer()
    trainer = tiny.sft_trainer(
        run_dir,
        compute_metrics=CompletionMetric(ExactMatch(), tokenizer),
        preprocess_logits_for_metrics=most_likely_tokens,
    )
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_exact_match"] <= 1


def test_a_completion_is_compared_with_the_most_likely_tokens():
    tokenizer = tiny.tokenizer()
    ids = tokenizer("3+4=7")["input_ids"]
    labels = np.array([[-100, *ids[1:]], [-100, *ids[1:]]])
    predicted = np.array([[*ids[1:], 0], [*ids[1:], 0]])
    predicted[1, 1] = ids[0]  # another token
    metric = CompletionMetric(ExactMatch(), tokenizer)
    found = metric(EvalPrediction(predictions=predicted, label_ids=labels))
    assert found == {"exact_match": 0.5}


def test_the_most_likely_tokens_of_logits():
    logits_BSV = torch.tensor([[[0.0, 2.0], [3.0, 1.0]]])
    assert most_likely_tokens(logits_BSV, torch.zeros(1, 2)).tolist() == [[1, 0]]
    assert most_likely_tokens((logits_BSV,), torch.zeros(1, 2)).tolist() == [[1, 0]]


def test_generation_of_several_prompts_is_that_of_each_alone():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.train()
    prompts = ["3+4=", "12+34="]
    together = generated(model, tokenizer, prompts, max_new_tokens=4)
    alone = [generated(model, tokenizer, [p], max_new_tokens=4)[0] for p in prompts]
    assert together == alone
    assert model.training
