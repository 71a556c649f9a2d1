"""What reaches the model before and after the switch, in one process and in two."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from reference import per_example_gradients

from hf_auxselect import FixedSelection, TaskSelectionCallback, concatenate_tasks
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import SCALARS, forward_label_logits
from hf_auxselect.trainer.access import find_trainer, total_steps
from hf_auxselect.trainer.batches import consumed_batches
from hf_auxselect.trainer.data import ModelRows, collate_function

TESTS = Path(__file__).parents[1]


def callback(**options):
    return TaskSelectionCallback(
        **{"warmup": 4, "selector": FixedSelection(["a", "c"]), "projection_dim": 16} | options
    )


@pytest.mark.parametrize("kind", tiny.TRAINERS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
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


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_steps_are_counted_as_the_run_counts_them(run_dir, max_steps):
    options = {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4, "max_steps": max_steps}
    trainer = tiny.plain_trainer(run_dir, **options)
    foreseen = total_steps(trainer, trainer.get_train_dataloader())
    trainer.train()
    assert foreseen == trainer.state.max_steps == (9 if max_steps == -1 else 5)


def test_evaluation_in_between_sees_the_whole_target(run_dir):
    trainer = tiny.sft_trainer(
        run_dir, callback(), eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5
    )
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 5  # the last after step 10
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-6)


def test_gradients_of_packed_rows_are_those_of_their_documents_alone(run_dir):
    from trl import pack_dataset

    documents = {
        name: tiny.tokenize(dataset).remove_columns("attention_mask")
        for name, dataset in {
            "a": tiny.sums(9, 1, mark="a"),
            "b": tiny.sums(6, 2, mark="b", letters=True),
            "c": tiny.sums(6, 3, mark="c", shuffled=True),
        }.items()
    }
    packed = concatenate_tasks({n: pack_dataset(d, 24, "bfd") for n, d in documents.items()})
    assert len(packed) == 7
    trainer = tiny.sft_trainer(
        run_dir, train_dataset=packed, packing=False, padding_free=True, max_length=None
    )
    model = tiny.randomized(trainer.model)
    rows = list(ModelRows(trainer, trainer.train_dataset))
    tasks = [packed["task"][int(i)] for i in ModelRows(trainer, packed).packed_rows]
    assert sorted((n, d["input_ids"], d["labels"]) for n, d in zip(tasks, rows, strict=True)) == (
        sorted((n, d["input_ids"], d["labels"]) for n, part in documents.items() for d in part)
    )

    captured = {}
    with evaluation_mode(model), GradientHooks(model, captured.__setitem__):
        batch = collate_function(trainer)(rows)
        SCALARS["margin"](forward_label_logits(model, batch)).sum().backward()
    alone = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    for i, reference in enumerate(per_example_gradients(model, alone, tiny.collate)):
        whole = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
        for name, gradient in reference.items():
            assert (captured[name][i] - gradient).norm() < 1e-9 * whole


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


def test_the_trainer_found_is_the_one_that_calls(run_dir):
    one, other = callback(), callback()
    first = tiny.sft_trainer(run_dir / "1", one)
    second = tiny.sft_trainer(run_dir / "2", other)
    assert one._trainer() is first
    assert other._trainer() is second
    assert find_trainer(one) is None  # nobody is calling


def test_trainers_get_their_methods_back(run_dir):
    trainer = tiny.sft_trainer(run_dir, callback())
    trainer.train()
    assert "get_batch_samples" not in vars(trainer)
    assert "_get_train_sampler" not in vars(trainer)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two gloo processes saw and decided; see ``distributed_run.py``."""
    output = tmp_path_factory.mktemp("distributed")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *command, str(TESTS / "distributed_run.py"), str(output)],
        check=True,
        timeout=600,
        env=None,
    )
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


class TestTwoProcesses:
    def test_there_were_two(self, two_processes):
        assert [run["world_size"] for run in two_processes] == [2, 2]

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_no_row_of_a_dropped_task_reaches_the_model(
        self, two_processes, kind, workers, accumulation
    ):
        name = f"{kind}/{workers}/{accumulation}"
        for run in two_processes:
            seen = run["leaks"][name]
            assert len(seen) == consumed_batches(10, 11, accumulation)
            assert set("".join(seen[4 * accumulation :])) == {"a", "c"}
        one, other = (run["leaks"][name][4 * accumulation :] for run in two_processes)
        assert one != other  # each reads its own share

    def test_both_decide_the_same_as_one_process(self, two_processes, run_dir):
        one, other = (run["selection"] for run in two_processes)
        assert one == other
        callback = TaskSelectionCallback(warmup=4, projection_dim=16)
        tiny.sft_trainer(run_dir, callback, learning_rate=0).train()
        assert one["weights"] == callback.report.weights
        assert one["rows"] == pytest.approx(
            [row.loss for row in callback.report.rows], abs=tiny.ACROSS_PROCESSES
        )

    def test_the_store_is_that_of_one_process(self, two_processes):
        for run in two_processes:
            assert run["largest_difference"] < 1e-6
            assert run["largest_difference_of_changes"] < 1e-6 < 1e-3 < run["largest_change"]

    def test_verification_measures_what_the_run_ends_with(self, two_processes):
        for run in two_processes:
            assert run["measured at the switch"] == run["measured at the end"]

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    def test_the_anchors_estimate_is_the_logged_loss(self, two_processes, kind):
        for run in two_processes:
            assert run["anchor"][kind] == pytest.approx(run["logged"][kind], rel=1e-5)

    def test_weights_stay_in_step(self, two_processes):
        one, other = (run["weights"] for run in two_processes)
        assert one == other
