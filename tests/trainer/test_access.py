"""Finding a running trainer, and counting its steps."""

from pathlib import Path

import pytest
import tiny

from hf_auxselect import FixedSelection, TaskSelectionCallback
from hf_auxselect.trainer.access import find_trainer, total_steps

TESTS = Path(__file__).parents[1]


def callback(**options):
    return TaskSelectionCallback(
        **{"warmup": 4, "selector": FixedSelection(["a", "c"]), "projection_dim": 16} | options
    )


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_steps_are_counted_as_the_run_counts_them(run_dir, max_steps):
    options = {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4, "max_steps": max_steps}
    trainer = tiny.plain_trainer(run_dir, **options)
    foreseen = total_steps(trainer, trainer.get_train_dataloader())
    trainer.train()
    assert foreseen == trainer.state.max_steps == (9 if max_steps == -1 else 5)


def test_the_trainer_found_is_the_one_that_calls(run_dir):
    one, other = callback(), callback()
    first = tiny.sft_trainer(run_dir / "1", one)
    second = tiny.sft_trainer(run_dir / "2", other)
    assert one._trainer() is first
    assert other._trainer() is second
    assert find_trainer(one) is None  # nobody is calling


@pytest.mark.parametrize("make", tiny.TRAINERS.values(), ids=tiny.TRAINERS)
def test_the_log_that_is_due_at_the_switch_takes_place(make, run_dir):
    trainer = make(run_dir, callback(), logging_steps=1)
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == list(range(1, 11))
