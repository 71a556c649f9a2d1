"""The loss of an example is the trainer's own: for each head, loss function and evaluation batch."""

import logging
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from tiny import callback
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_auxselect import (
    GradExLogistic,
    SelectionReport,
    UnsupportedLossError,
    capture_gradients,
    concatenate_tasks,
)
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import SCALARS, ExampleLoss, forward_label_logits
from hf_auxselect.selectors.shrinkage import KEPT_ALL
from hf_auxselect.trainer.evaluation import evaluation_metrics

VOCABULARY = len(tiny.VOCABULARY)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 5}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def estimated_and_logged(make, directory, cb=None, **options):
    """The loss at the switch, as the report estimates it and as the trainer logs it."""
    cb = cb or callback(after="observe", estimator=GradExLogistic())
    trainer = make(directory, cb, **EVALUATED | options)
    trainer.train()
    logged = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    return cb.report.row("no further training").loss, logged, cb


def adapted(base, **options):
    return get_peft_model(base, tiny.lora(**options))


def bert(kind, **options):
    torch.manual_seed(0)
    model = kind(BertConfig(**BERT, **options))
    return adapted(model, target_modules=["query", "value"], task_type=None)


def tagged(rows):
    """Each character is one of three kinds: digit, sign, other."""
    batch = tiny.collate(rows)
    ids = batch["input_ids"]
    kinds = torch.where(ids < 12, 0, torch.where(ids < 15, 1, 2))
    return batch | {"labels": kinds.masked_fill(batch["attention_mask"] == 0, -100)}


def masked(rows):
    """Every third character is to be guessed."""
    batch = tiny.collate(rows)
    hidden = (torch.arange(batch["input_ids"].shape[1]) % 3 == 0) & (batch["attention_mask"] == 1)
    return batch | {
        "labels": batch["input_ids"].masked_fill(~hidden, -100),
        "input_ids": batch["input_ids"].masked_fill(hidden, 0),
    }


def classified(rows):
    """One of two classes for each row."""
    batch = tiny.collate(rows)
    return batch | {"labels": (batch["input_ids"][:, 1] % 2).long()}


class ExampleMean(Trainer):
    """Averages over examples, however many label tokens they have."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        labels = inputs["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none"
        )
        loss = (losses.sum(1) / (labels != -100).sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


class Sharpened(Trainer):
    """Adds to the loss of each label token a term of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        is_label = inputs["labels"][:, 1:] != -100
        extra = outputs.logits[:, :-1].logsumexp(-1).square()[is_label].mean()
        loss = outputs.loss + 0.3 * extra
        return (loss, outputs) if return_outputs else loss


class Contrasting(Trainer):
    """A loss of pairs of examples."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        means = outputs.logits.mean((1, 2))
        loss = outputs.loss + 1e5 * (means[:, None] - means[None]).square().mean()
        return (loss, outputs) if return_outputs else loss


def focal_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
    """In place of a model's own loss function."""
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return (losses * (1 - (-losses).exp()) ** 2).sum() / count


def focal(**options):
    model = tiny.llama()
    model.loss_function = focal_loss
    return adapted(model)


def adalora():
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny.llama(), config)


def mixtral(**options):
    torch.manual_seed(0)
    sizes = BERT | {"num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**sizes, pad_token_id=0, **options))
    return adapted(model, target_modules=["q_proj", "v_proj"])


SITUATIONS = {
    "classes of positions": {
        "model": lambda: bert(BertForTokenClassification, num_labels=3),
        "data_collator": tagged,
    },
    "masked tokens": {"model": lambda: bert(BertForMaskedLM), "data_collator": masked},
    "a class of each row, encoder": {
        "model": lambda: bert(BertForSequenceClassification, num_labels=2),
        "data_collator": classified,
    },
    "a class of each row, decoder": {
        "model": lambda: adapted(
            LlamaForSequenceClassification(tiny.llama(num_labels=2).config), task_type="SEQ_CLS"
        ),
        "data_collator": classified,
    },
    "AdaLoRA's regularizer": {"model": adalora},
    "a replaced loss function": {"model": focal},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a mean over examples": {"trainer_class": ExampleMean},
    "a term that splits by label token": {"trainer_class": Sharpened},
    "compute_loss_func": {
        "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: focal_loss(
            outputs.logits, labels, num_items_in_batch=num_items_in_batch
        )
    },
    "drop_last with a part of a batch": {"dataloader_drop_last": True},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "a part of a batch": {},
    "a batch of all": {"per_device_eval_batch_size": 32},
    "single rows": {"per_device_eval_batch_size": 1},
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_estimate_at_the_switch_is_the_logged_loss(name, run_dir):
    options = {"eval_dataset": tiny.tokenize(tiny.sums(11, 9))} | SITUATIONS[name]
    if "model" in options:
        options["model"] = options["model"]()
    estimated, logged, cb = estimated_and_logged(tiny.plain_trainer, run_dir, **options)
    assert estimated == pytest.approx(logged, rel=1e-5)
    assert set(cb.report.warnings) <= {KEPT_ALL}


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    )
    return adapted(model, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")


class Seq2SeqCollator:
    """Source and target of different lengths."""

    def __call__(self, rows):
        sources = [
            {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows
        ]
        batch = tiny.collate([s | {"labels": s["input_ids"]} for s in sources])
        answers = [[t for t in row["labels"] if t != -100] for row in rows]
        length = max(map(len, answers))
        batch["labels"] = torch.tensor([a + [-100] * (length - len(a)) for a in answers])
        return batch


def seq2seq_trainer(directory, *callbacks, **options):
    names = ("eval_dataset", "model", "data_collator", "compute_metrics")
    own = {k: options.pop(k) for k in names if k in options}
    return Seq2SeqTrainer(
        **{
            "model": t5(),
            "args": Seq2SeqTrainingArguments(str(directory), **tiny.ARGUMENTS | options),
            "train_dataset": tiny.tokenize(tiny.tasks()),
            "eval_dataset": tiny.tokenize(tiny.sums(11, 9)),
            "data_collator": Seq2SeqCollator(),
            "callbacks": list(callbacks),
        }
        | own
    )


class TestEncoderDecoders:
    def test_seq2seq_trainer_weighs_a_part_of_a_batch_as_a_whole_one(self, run_dir):
        estimated, logged, _ = estimated_and_logged(seq2seq_trainer, run_dir)
        assert estimated == pytest.approx(logged, rel=1e-5)

    def test_what_is_trained_for_real_is_measured_as_it_is_logged(self, run_dir):
        cb = callback(verify=1)
        trainer = seq2seq_trainer(run_dir, cb, max_steps=6)
        trainer.train()
        assert cb.report.verification[0].measured == trainer.evaluate()["eval_loss"]

    def test_decoder_inputs_of_the_collator_are_taken(self):
        model = t5().eval()
        batch = Seq2SeqCollator()(list(tiny.tokenize(tiny.sums(4, 1))))
        given = batch | {"decoder_input_ids": torch.randint(2, 9, batch["labels"].shape)}
        for inputs in (batch, given):
            output = forward_label_logits(model, inputs)
            losses = SCALARS["loss"](output) * output.num_label_tokens
            mean = losses.sum() / output.num_label_tokens.sum()
            assert mean.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)

    def test_a_model_that_shifts_labels_itself(self):
        torch.manual_seed(0)
        sizes = {
            f"{part}_{what}": n
            for part in ("encoder", "decoder")
            for what, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()
        }
        config = WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            **sizes,
        )
        model = WhisperForConditionalGeneration(config).eval()
        labels = torch.tensor([[4, 5, 6, 1], [7, 1, -100, -100]])
        batch = {"input_features": torch.randn(2, 4, 16), "labels": labels}
        output = forward_label_logits(model, batch)
        losses = SCALARS["loss"](output) * output.num_label_tokens
        assert losses.sum().item() / 6 == pytest.approx(model(**batch).loss.item(), rel=1e-5)


class TestWhatDoesNotSplitByExample:
    def test_a_small_term_is_told(self, run_dir, caplog):
        """The router's auxiliary loss, of a batch."""
        estimated, logged, cb = estimated_and_logged(
            tiny.plain_trainer,
            run_dir,
            model=mixtral(output_router_logits=True, router_aux_loss_coef=0.02),
        )
        assert estimated != pytest.approx(logged, rel=1e-5)
        assert estimated == pytest.approx(logged, rel=0.05)
        (warning,) = cb.report.warnings
        assert "output_router_logits=True" in warning
        assert "does not split by example" in warning

    def test_one_that_is_zero_in_the_first_step_is_told(self, run_dir):
        """As a distance from the initial adapter is: it shows at the switch."""

        class Regularized(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
                bs = [p for n, p in model.named_parameters() if "lora_B" in n]
                loss = loss + 10 * sum(p.square().sum() for p in bs)
                return (loss, outputs) if return_outputs else loss

        estimated, logged, cb = estimated_and_logged(
            tiny.plain_trainer, run_dir, trainer_class=Regularized
        )
        assert logged > 1.005 * estimated
        (warning,) = cb.report.warnings
        assert "(Regularized.compute_loss?)" in warning
        assert f"gives {logged:.1f}"[:-1] in warning

    def test_a_large_one_is_refused_with_both_numbers(self, run_dir):
        with pytest.raises(
            UnsupportedLossError,
            match=r"evaluation loss of some rows is \d.*Contrasting.compute_loss",
        ):
            estimated_and_logged(tiny.plain_trainer, run_dir, trainer_class=Contrasting)


def left(rows):
    batch = tiny.collate(rows)
    shifts = [int((mask == 0).sum()) for mask in batch["attention_mask"]]
    return {
        name: torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)])
        for name, value in batch.items()
    }


class TestLeftPadding:
    uneven = Dataset.from_list(
        [{"prompt": "1+" * n + "2=", "completion": "3"} for n in (1, 4, 2, 6, 3, 5, 1, 2, 6, 4)]
    )

    def test_relative_positions_do_not_see_it(self, run_dir):
        estimated, logged, _ = estimated_and_logged(
            tiny.plain_trainer, run_dir, data_collator=left, eval_dataset=tiny.tokenize(self.uneven)
        )
        assert estimated == pytest.approx(logged, rel=1e-5)

    def test_absolute_positions_are_refused(self, run_dir):
        model = adapted(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
        with pytest.raises(UnsupportedLossError, match=r"padded on the left.*padding_side='right'"):
            estimated_and_logged(
                tiny.plain_trainer,
                run_dir,
                model=model,
                data_collator=left,
                eval_dataset=tiny.tokenize(self.uneven),
            )


class TestLabelsOfOtherShapes:
    def refuse(self, match, run_dir, model, labels):
        def collate(rows):
            return tiny.collate(rows) | {"labels": labels(len(rows))}

        with pytest.raises(UnsupportedLossError, match=match):
            estimated_and_logged(tiny.plain_trainer, run_dir, model=model, data_collator=collate)

    def test_regression(self, run_dir):
        model = bert(BertForSequenceClassification, num_labels=1)
        self.refuse(
            r"torch.float32 labels of shape \[.\]",
            run_dir,
            model,
            lambda n: torch.linspace(0, 1, n),
        )

    def test_regression_on_integers(self, run_dir):
        model = bert(BertForSequenceClassification, num_labels=1)
        self.refuse("num_labels=1 is a regression", run_dir, model, lambda n: torch.arange(n))

    def test_several_classes_at_once(self, run_dir):
        model = bert(
            BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"
        )
        self.refuse(r"labels of shape \[., 3\]", run_dir, model, lambda n: torch.ones(n, 3))


class TestCollators:
    def test_one_that_masks_at_random(self, run_dir):
        def random_mask(rows):
            batch = masked(rows)
            return batch | {"input_ids": torch.where(torch.rand(batch["labels"].shape) < 0.5, 0, 2)}

        with pytest.raises(UnsupportedLossError, match=r"other inputs or labels.*dataset.map"):
            estimated_and_logged(
                tiny.plain_trainer,
                run_dir,
                model=bert(BertForMaskedLM),
                data_collator=random_mask,
            )

    def test_rows_of_equal_length_leave_the_usual_mean(self, run_dir):
        """The mean over label tokens and that over examples are then the same in what is compared.

        Of the 12 rows only two, in the middle, have more label tokens.
        """
        rows = [{"prompt": "1+2=", "completion": "3"}] * 12
        rows[5:7] = [{"prompt": "1+2=", "completion": "33333"}] * 2
        estimated, logged, _ = estimated_and_logged(
            tiny.plain_trainer,
            run_dir,
            train_dataset=tiny.tokenize(
                concatenate_tasks({n: Dataset.from_list(rows[:5]) for n in "ab"})
            ),
            eval_dataset=tiny.tokenize(Dataset.from_list(rows)),
        )
        assert estimated == pytest.approx(logged, rel=1e-5)

    def test_a_target_that_is_dropped_with_the_last_batch(self, run_dir):
        with pytest.raises(ValueError, match=r"dataloader_drop_last=True leaves all 5 examples"):
            estimated_and_logged(
                tiny.plain_trainer,
                run_dir,
                eval_dataset=tiny.tokenize(tiny.sums(5, 9)),
                dataloader_drop_last=True,
            )


class TestOneAtATime:
    """A loss of the trainer's own: gradients are autograd's of that loss."""

    @pytest.mark.parametrize("name", ["a replaced loss function", "AdaLoRA's regularizer"])
    def test_gradients(self, name, tmp_path):
        model = SITUATIONS[name]["model"]().eval()
        rows = list(tiny.tokenize(tiny.sums(5, 1)))
        loss = ExampleLoss(of_batch=lambda batch: model(**batch).loss)
        store = capture_gradients(
            model,
            {"a": rows[:3], "b": rows[3:]},
            rows[:2],
            tiny.collate,
            directory=tmp_path,
            projection_dim=64,
            scalars=("loss",),
            loss=loss,
            progress=False,
        )
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        sketch = CountSketch(64, 0)
        for row, captured in zip(rows, store.gradients, strict=True):
            value = model(**tiny.collate([row])).loss
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            expected = sum(
                sketch.project(name, gradient.flatten()[None])[0]
                for name, gradient in zip(parameters, gradients, strict=True)
                if gradient is not None
            )
            assert captured == pytest.approx(expected.numpy(), abs=1e-5)
            assert np.abs(captured).max() > 1e-2
        assert store.losses[0] == pytest.approx(model(**tiny.collate(rows[:1])).loss.item())


class TestWithoutATrainer:
    def test_the_models_loss_tells_how_labels_are_matched(self, tmp_path):
        model = bert(BertForTokenClassification, num_labels=3).eval()
        rows = list(tiny.tokenize(tiny.sums(5, 1)))
        store = capture_gradients(
            model, {"a": rows[:4]}, rows[4:], tagged, directory=tmp_path, progress=False
        )
        expected = model(**tagged(rows[4:])).loss.item()
        assert store.target.losses[0] == pytest.approx(expected, rel=1e-5)

    def test_another_loss_is_named(self, tmp_path):
        rows = list(tiny.tokenize(tiny.sums(5, 1)))
        with pytest.raises(UnsupportedLossError, match=r"the model's own loss.*loss=ExampleLoss"):
            capture_gradients(
                focal(), {"a": rows[:4]}, rows[4:], tiny.collate, directory=tmp_path, progress=False
            )


def test_usual_losses_are_not_warned_of(run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_auxselect"):
        estimated_and_logged(tiny.sft_trainer, run_dir)
    assert not [record for record in caplog.records if record.name.startswith("hf_auxselect")]


class TestMetrics:
    """The target's metrics of ``compute_metrics``, at the switch and after training."""

    SETTINGS: ClassVar = EVALUATED | {"eval_steps": 2, "logging_steps": 1}

    @staticmethod
    def metrics(prediction):
        mean = float(np.mean(prediction.predictions))
        rows = np.int64(len(prediction.label_ids))
        return {"mean": mean, "rows": rows, "odd": float("nan"), "text": "a", "list": [1, 2]}

    def test_they_are_those_that_the_trainer_logs(self, run_dir):
        # The trainer evaluates at the switch, too, and must still do so.
        cb = callback(estimator=GradExLogistic())
        trainer = tiny.plain_trainer(run_dir, cb, compute_metrics=self.metrics, **self.SETTINGS)
        trainer.train()
        logged = {e["step"]: e for e in trainer.state.log_history if "eval_loss" in e}
        assert {2, 4} <= set(logged)
        before, after = cb.report.evaluations
        assert (before.step, after.step) == (4, 5)
        assert before.loss == pytest.approx(logged[4]["eval_loss"], abs=1e-6)
        assert before.metrics == {
            "mean": pytest.approx(logged[4]["eval_mean"], abs=1e-6),
            "rows": logged[4]["eval_rows"],
        }
        final = trainer.evaluate()
        assert after.loss == pytest.approx(final["eval_loss"], abs=1e-6)
        assert after.metrics["mean"] == pytest.approx(final["eval_mean"], abs=1e-6)
        assert before.metrics != after.metrics
        assert SelectionReport.load(run_dir / "_task_selection").evaluations == [before, after]

    def test_a_run_that_is_observed_stays_the_same(self, run_dir, tmp_path):
        runs = []
        observer = callback(after="observe", estimator=GradExLogistic())
        for directory, callbacks in ((tmp_path, []), (run_dir, [observer])):
            torch.manual_seed(3)
            trainer = tiny.plain_trainer(
                directory, *callbacks, compute_metrics=self.metrics, **self.SETTINGS
            )
            trainer.train()
            runs.append(trainer)
        assert tiny.same(*map(tiny.weights, runs))
        names = {"step", "loss", "eval_loss", "eval_mean"}
        plain, observed = (
            [
                {name: entry[name] for name in names & entry.keys()}
                for entry in trainer.state.log_history
                if {"loss", "eval_loss"} & entry.keys()
            ]
            for trainer in runs
        )
        assert plain == observed

    def test_those_of_a_trainer_that_generates(self, run_dir):
        lengths = []

        def compute(prediction):
            lengths.append(prediction.predictions.shape[1])
            return {"length": lengths[-1]}

        trainer = seq2seq_trainer(
            run_dir, predict_with_generate=True, generation_max_length=4, compute_metrics=compute
        )
        found = evaluation_metrics(trainer, None)
        assert found.metrics == {"length": lengths[0]}
        assert trainer.compute_metrics is compute
        assert trainer.state.log_history == []

    def test_without_compute_metrics_nothing_is_evaluated(self, run_dir):
        cb = callback()
        tiny.trained(tiny.plain_trainer, run_dir, cb)
        assert cb.report.evaluations == []
