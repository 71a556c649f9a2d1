"""Classification heads: loss, margin and gradients of an example against slow, obvious versions."""

import pytest
import tiny
import torch
from peft import get_peft_model
from reference import per_example_gradients
from tiny import callback, randomized, rows_of
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from hf_auxselect import GradExLogistic, UnsupportedLossError, check_per_example_gradients
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.scalars import SCALARS, ExampleLoss, forward_label_logits

SIZES = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
}
IDS = {"cls_token_id": 1, "sep_token_id": 1, "bos_token_id": None, "eos_token_id": None}
POSITION_LOSS = ExampleLoss(shift=False)


def with_lora(model, task_type):
    """LoRA on the encoder; the head is trained as a whole."""
    options = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return get_peft_model(model, tiny.lora(task_type=task_type, **options))


def bert(kind, task_type, **options):
    torch.manual_seed(0)
    return with_lora(kind(BertConfig(**SIZES | options)), task_type)


def sequences():
    return bert(BertForSequenceClassification, "SEQ_CLS")


def tokens():
    return bert(BertForTokenClassification, "TOKEN_CLS")


def modern(**options):
    """All parameters are trained: rotary positions have none of their own."""
    torch.manual_seed(0)
    return ModernBertForSequenceClassification(ModernBertConfig(**SIZES | IDS | options))


def of_sequences(rows):
    """One of three classes for each row."""
    batch = tiny.collate(rows)
    return batch | {"labels": batch["input_ids"][:, 0] % 3}


def of_tokens(rows):
    """One of three classes for each token that has a label."""
    batch = tiny.collate(rows)
    return batch | {"labels": torch.where(batch["labels"] == -100, -100, batch["input_ids"] % 3)}


HEADS = {
    "a class of each sequence": (sequences, of_sequences),
    "a class of each sequence, no adapter": (modern, of_sequences),
    "a class of each token": (tokens, of_tokens),
}
ROWS = rows_of([(9, 500), (4, 2), (6, 0), (7, 33)])


def probabilities(model, batch):
    """Of the labels of a batch of one, label by label."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    labels = batch["labels"][0].reshape(-1)
    by_label = zip(logits.reshape(len(labels), -1), labels, strict=True)
    return torch.stack([row.double().softmax(-1)[y] for row, y in by_label if y != -100])


def slow_loss(model, batch):
    return -probabilities(model, batch).log().mean()


def slow_margin(model, batch):
    p = probabilities(model, batch)
    return (p.log() - torch.log1p(-p)).mean()


SLOW = {"loss": slow_loss, "margin": slow_margin}


@pytest.fixture(params=HEADS)
def head(request):
    make, collate = HEADS[request.param]
    return randomized(make()), collate


@pytest.mark.parametrize("scalar", SLOW)
def test_loss_and_margin_of_each_example(head, scalar):
    model, collate = head
    with torch.no_grad():
        found = SCALARS[scalar](forward_label_logits(model, collate(ROWS), POSITION_LOSS))
        expected = [SLOW[scalar](model, collate([row])).item() for row in ROWS]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scalar", SLOW)
def test_their_gradients_also_of_a_head_that_is_trained_as_a_whole(head, scalar):
    model, collate = head
    captured = {}

    def run():
        captured.clear()
        output = forward_label_logits(model, collate(ROWS), POSITION_LOSS)
        hooks.backward(SCALARS[scalar](output))

    def receive(name, gradients):
        captured[name] = captured.get(name, 0) + gradients

    with GradientHooks(model, receive) as hooks:
        hooks.capture(run)
    assert any("classifier" in name for name in captured)
    assert set(captured) == {n for n, p in model.named_parameters() if p.requires_grad}
    for i, expected in enumerate(per_example_gradients(model, ROWS, collate, SLOW[scalar])):
        whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            assert (captured[name][i] - gradient).norm() < 1e-5 * whole, name


def test_the_models_own_loss_is_the_mean_over_labels(head):
    model, collate = head
    output = forward_label_logits(model, collate(ROWS), POSITION_LOSS)
    shares = output.num_label_tokens / output.num_label_tokens.sum()
    mean = (SCALARS["loss"](output) * shares).sum()
    assert mean.item() == pytest.approx(model(**collate(ROWS)).loss.item(), rel=1e-5)
    assert check_per_example_gradients(model, ROWS[:2], collate) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_a_trainer_logs_the_mean_that_is_estimated_at_the_switch(name, run_dir):
    make, collate = HEADS[name]
    cb = callback(after="observe", estimator=GradExLogistic())
    trainer = tiny.plain_trainer(
        run_dir,
        cb,
        model=make(),
        data_collator=collate,
        eval_dataset=tiny.tokenize(tiny.sums(11, 9)),
        eval_strategy="steps",
        eval_steps=4,
        max_steps=5,
    )
    trainer.train()
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert cb.report.row("no further training").loss == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("labels", [torch.linspace(0, 1, 99), torch.arange(99)])
def test_a_regression_is_refused_before_a_step_is_taken(labels, run_dir):
    def collate(rows):
        return tiny.collate(rows) | {"labels": labels[: len(rows)]}

    model = modern(num_labels=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    trainer = tiny.plain_trainer(run_dir, callback(), model=model, data_collator=collate)
    with pytest.raises(UnsupportedLossError, match=r"[Rr]egression"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert True not in modes
    assert tiny.same(before, dict(model.named_parameters()))
