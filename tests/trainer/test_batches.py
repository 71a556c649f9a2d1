"""What reaches the model before and after the switch, in one process."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from hf_auxselect import FixedSelection, TaskSelectionCallback
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.batches import BatchSource, consumed_batches

TESTS = Path(__file__).parents[1]


def callback(**options):
    return TaskSelectionCallback(
        **{"warmup": 4, "selector": FixedSelection(["a", "c"]), "projection_dim": 16} | options
    )


@pytest.mark.parametrize(
    ("kind", "workers", "accumulation"),
    [("SFTTrainer", 0, 1), ("SFTTrainer", 2, 3), ("Trainer", 0, 3), ("Trainer", 2, 1)],
)
class TestNoRowOfADroppedTaskReachesTheModel:
    def test_in_a_run_of_steps(self, kind, workers, accumulation, run_dir):
        trainer = tiny.TRAINERS[kind](
            run_dir,
            callback(),
            gradient_accumulation_steps=accumulation,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )
        seen = tiny.spy(trainer)
        trainer.train()
        before, after = seen[: 4 * accumulation], seen[4 * accumulation :]
        assert len(after) == 6 * accumulation
        assert set("".join(after)) == {"a", "c"}
        assert set("".join(before)) == {"a", "b", "c", "d"}

    def test_over_epochs_with_a_remainder(self, kind, workers, accumulation, run_dir):
        trainer = tiny.TRAINERS[kind](
            run_dir,
            callback(warmup=3),
            max_steps=-1,
            num_train_epochs=2,
            per_device_train_batch_size=8,  # 81 rows: 11 batches, and 11 mod 3 = 2
            gradient_accumulation_steps=accumulation,
            dataloader_num_workers=workers,
        )
        seen = tiny.spy(trainer)
        trainer.train()
        assert len(seen) == 22
        assert set("".join(seen[3 * accumulation :])) == {"a", "c"}
        assert trainer.state.global_step == 2 * -(-11 // accumulation)
        assert trainer.state.epoch == 2


def test_the_mixture_has_its_shares(run_dir):
    selector = FixedSelection({"a": 3, "d": 1})
    trainer = tiny.sft_trainer(run_dir, callback(selector=selector), max_steps=24)
    seen = tiny.spy(trainer)
    trainer.train()
    rows = "".join(seen[4:])
    assert rows.count("a") + rows.count("d") == 80
    # Blocks hold 45 rows; within one, the count is hypergeometric.
    assert abs(rows.count("a") - 60) <= 4 * np.sqrt(80 * 0.75 * 0.25)


@pytest.mark.parametrize("kind", tiny.TRAINERS)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3}, {"dataloader_num_workers": 2}]
)
def test_the_warm_up_and_an_observed_run_are_those_without_the_callback(kind, options, run_dir):
    make = tiny.TRAINERS[kind]
    torch.manual_seed(5)
    plain = make(run_dir / "plain", **options)
    plain_rows = tiny.spy(plain)
    plain.train()
    torch.manual_seed(5)
    observed = make(run_dir / "observed", callback(after="observe"), **options)
    observed_rows = tiny.spy(observed)
    observed.train()
    assert tiny.same(tiny.weights(plain), tiny.weights(observed))
    assert plain_rows == observed_rows
    torch.manual_seed(5)
    switched = make(run_dir / "switched", callback(), **options)
    switched_rows = tiny.spy(switched)
    switched.train()
    warm_up = 4 * options.get("gradient_accumulation_steps", 1)
    assert switched_rows[:warm_up] == plain_rows[:warm_up]
    assert not tiny.same(tiny.weights(plain), tiny.weights(switched))


def test_evaluation_in_between_sees_the_whole_target(run_dir):
    trainer = tiny.sft_trainer(
        run_dir, callback(), eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5
    )
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 5  # the last after step 10
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-6)


class TestConsumedBatches:
    @pytest.mark.parametrize(
        ("step", "per_epoch", "accumulation", "expected"),
        [
            (0, 10, 1, 0),
            (7, 10, 1, 7),
            (12, 10, 1, 12),
            (3, 11, 3, 9),
            (4, 11, 3, 11),
            (9, 11, 3, 25),
        ],
    )
    def test_closed_form(self, step, per_epoch, accumulation, expected):
        assert consumed_batches(step, per_epoch, accumulation) == expected

    def test_it_counts_what_the_training_loop_draws(self, run_dir):
        trainer = tiny.sft_trainer(
            run_dir,
            max_steps=-1,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=3,
        )
        seen = tiny.spy(trainer)
        drawn = []
        trainer.add_callback(_StepSpy(lambda: drawn.append(len(seen))))
        trainer.train()
        assert drawn == [consumed_batches(step, 11, 3) for step in range(1, 9)]


class _StepSpy(tiny.TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


def test_trainers_get_their_methods_back_after_an_error(run_dir, monkeypatch):
    trainer = tiny.plain_trainer(run_dir)
    source = BatchSource(trainer)
    tasks = TaskRows(("a", "b"), np.repeat([0, 1], [1, 1_000_001]))
    with pytest.raises(ValueError, match="the share of task 'a' is below"):
        source.require_own_sampler(tasks, 0)
    assert "get_batch_samples" not in vars(trainer)

    def fail():
        raise OSError("no such file")

    source = BatchSource(trainer)
    monkeypatch.setattr(trainer, "get_train_dataloader", fail)
    with pytest.raises(OSError, match="no such file"):
        source.require_own_sampler(TaskRows(("a", "b"), np.array([0, 1])), 0)
    assert "get_batch_samples" not in vars(trainer)


def test_trainers_get_their_methods_back(run_dir):
    trainer = tiny.sft_trainer(run_dir, callback())
    trainer.train()
    assert "get_batch_samples" not in vars(trainer)
    assert "_get_train_sampler" not in vars(trainer)
