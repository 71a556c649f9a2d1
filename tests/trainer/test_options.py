"""Options of Trainer that meet the switch: each works, is refused, or is warned about."""

import json
import logging

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import callback, trained
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_auxselect import FixedSelection

STEPS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}

WORKS = {
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "drop last": {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
    "accumulation": {"gradient_accumulation_steps": 3},
    "tokens of each device": {"average_tokens_across_devices": False},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the default since 5.0
    },
    "evaluation at start": {"eval_on_start": True, **EVALUATED},
    "few checkpoints": {"save_total_limit": 1},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "no clipping": {"max_grad_norm": 0.0},
    "skipped data": {"ignore_data_skip": True},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "best model": {"load_best_model_at_end": True, **EVALUATED},
    "no unused columns": {"remove_unused_columns": False},
}


def two_tasks():
    return callback(selector=FixedSelection(["a", "c"]))


class StopAfter(tiny.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def collate(rows):
    return tiny.collate([{k: v for k, v in row.items() if k != "task"} for row in rows])


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name, run_dir, tmp_path):
    """The warm-up is that of the run without the callback, nothing leaks, and it resumes."""
    options = STEPS | WORKS[name]
    own = {"data_collator": collate} if name == "no unused columns" else {}
    torch.manual_seed(3)
    trainer = tiny.plain_trainer(run_dir, two_tasks(), **options, **own)
    seen = tiny.spy(trainer)
    trainer.train()
    rows = "".join(seen)
    first = 4 * options.get("gradient_accumulation_steps", 1) * trainer.args.train_batch_size
    assert len(rows) == 2 * first
    assert set(rows[first:]) == {"a", "c"}

    torch.manual_seed(3)
    plain = tiny.plain_trainer(tmp_path / "plain", StopAfter(2), **options, **own)
    plain.train()
    if name != "few checkpoints":
        name_of = "checkpoint-2/adapter_model.safetensors"
        assert tiny.same(load_file(run_dir / name_of), load_file(tmp_path / "plain" / name_of))

    again = trained(
        tiny.plain_trainer,
        run_dir,
        two_tasks(),
        str(run_dir / ("checkpoint-8" if name == "few checkpoints" else "checkpoint-6")),
        **options,
        **own,
    )
    assert tiny.same(tiny.weights(trainer), tiny.weights(again))


def test_batches_that_the_first_process_reads_for_all_are_refused(run_dir):
    trainer = tiny.plain_trainer(
        run_dir, two_tasks(), accelerator_config={"dispatch_batches": True}
    )
    with pytest.raises(ValueError, match="dispatch_batches=True"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_sampling_strategies_rule_the_warm_up_alone(strategy, run_dir, caplog):
    options = {"train_sampling_strategy": strategy}
    if not hasattr(TrainingArguments, "train_sampling_strategy"):
        if strategy == "sequential":
            pytest.skip("Transformers has had train_sampling_strategy='sequential' since 5.2")
        options = {strategy: True}
    torch.manual_seed(3)
    trainer = tiny.plain_trainer(run_dir, two_tasks(), **options)
    seen = tiny.spy(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert set("".join(seen[4:])) == {"a", "c"}
    assert f"train_sampling_strategy='{strategy}' is used in the warm-up" in caplog.text
    if strategy == "sequential":
        assert set("".join(seen[:4])) == {"a"}


def test_early_stopping(run_dir):
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)
    options = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    trainer = tiny.plain_trainer(run_dir, two_tasks(), stopping, **STEPS, **EVALUATED, **options)
    trainer.train()
    assert trainer.state.global_step == 4
    # What was selected at the step that ended the run is on disk for a run to resume.
    decision = json.loads((run_dir / "checkpoint-4" / "task_selection.json").read_text())
    assert decision["selected"] == ["a", "c"]


def test_a_batch_size_that_is_found(run_dir):
    """The first try runs out of memory after the switch; the second starts over."""

    class Small(Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 2 and self.state.global_step == 5:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(model, inputs, *args)

    trainer = tiny.plain_trainer(
        run_dir, two_tasks(), auto_find_batch_size=True, trainer_class=Small
    )
    seen = tiny.spy(trainer)
    trainer.train()
    second = seen[-10:]
    assert max(len(batch) for batch in second) < 4
    assert set("".join(second[4:])) == {"a", "c"}
    assert set("".join(second[:4])) > {"a", "c"}


def test_hyperparameter_search_is_refused(run_dir):
    trainer = tiny.plain_trainer(run_dir, two_tasks())
    trainer.hp_search_backend = "optuna"
    with pytest.raises(ValueError, match=r"hyperparameter_search makes a model.*best values"):
        trainer.train()


class Watch(tiny.TrainerCallback):
    """A user's callback that acts on its own."""

    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)
        control.should_log = control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(round(metrics["eval_loss"], 3))


def test_callbacks_of_the_user_before_and_after(run_dir):
    before, after = Watch(), Watch()
    selecting = two_tasks()
    trainer = trained(
        lambda *args, **options: tiny.plain_trainer(args[0], before, selecting, after, **options),
        run_dir,
        selecting,
    )
    assert before.events == after.events
    assert len(before.events) == 20
    assert trainer.state.global_step == 10
    assert selecting.report is not None


def test_a_subclass_that_draws_batches_itself(run_dir):
    drawn = []

    class Counting(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            drawn.append(self.state.global_step)
            return super().get_batch_samples(*args, **kwargs)

    trainer = tiny.plain_trainer(run_dir, two_tasks(), trainer_class=Counting)
    seen = tiny.spy(trainer)
    trainer.train()
    assert drawn == list(range(10))
    assert set("".join(seen[4:])) == {"a", "c"}


def test_a_small_term_that_a_subclass_adds_is_warned_of(run_dir, caplog):
    class Regularized(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    with caplog.at_level(logging.WARNING):
        trained(tiny.plain_trainer, run_dir, two_tasks(), trainer_class=Regularized)
    assert "(Regularized.compute_loss); the difference does not split by example" in caplog.text


@pytest.mark.parametrize("kind", tiny.TRAINERS)
def test_usual_settings_are_not_warned_of(kind, run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_auxselect"):
        trained(tiny.TRAINERS[kind], run_dir, two_tasks())
    assert not [record for record in caplog.records if record.name.startswith("hf_auxselect")]
