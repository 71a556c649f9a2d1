"""Runs of two processes: what reaches the model, and what both decide."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny

from hf_auxselect import TaskSelectionCallback
from hf_auxselect.trainer.batches import consumed_batches

TESTS = Path(__file__).parents[1]


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

    @pytest.mark.parametrize(
        ("kind", "workers"), [("Trainer", 0), ("Trainer", 2), ("SFTTrainer", 0)]
    )
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

    def test_a_head_whose_loss_the_trainer_multiplies_is_refused(self, two_processes):
        """Releases of Transformers differ in whether it does so with this head."""
        for run in two_processes:
            told = run["heads"]["True"]
            assert told == "none" or "average_tokens_across_devices=False" in told
            assert run["heads"]["False"] == "none"

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_the_exported_rows_are_those_of_both(self, two_processes, accumulation):
        name = f"SFTTrainer/0/{accumulation}"
        first = consumed_batches(4, 11, accumulation)
        seen = Counter(
            task for run in two_processes for task in "".join(run["leaks"][name][first:])
        )
        for run in two_processes:
            exported: Counter[str] = Counter()
            for line in map(json.loads, run["exported"][name].splitlines()):
                exported[line["task"]] += line["reads"]
            assert exported == seen

    def test_both_decide_the_same_as_one_process(self, two_processes, run_dir):
        one, other = (run["selection"] for run in two_processes)
        assert one == other
        callback = TaskSelectionCallback(warmup=4, projection_dim=16)
        tiny.sft_trainer(run_dir, callback, learning_rate=0).train()
        assert one["weights"] == callback.report.weights
        assert one["rows"] == pytest.approx(
            [row.loss for row in callback.report.rows], abs=tiny.ACROSS_PROCESSES
        )

    def test_losses_of_a_group_are_those_that_are_logged(self, two_processes):
        one, other = (run["selection"]["group"] for run in two_processes)
        assert one == other
        for run in two_processes:
            assert one[0] == pytest.approx(run["logged of the group"], rel=1e-5)

    def test_the_store_is_that_of_one_process(self, two_processes):
        for run in two_processes:
            assert run["largest_difference"] < 1e-6
            assert run["largest_difference_of_changes"] < 1e-6 < 1e-3 < run["largest_change"]

    def test_verification_measures_what_the_run_ends_with(self, two_processes):
        for run in two_processes:
            assert run["measured at the switch"] == run["measured at the end"]

    def test_both_see_the_same_race(self, two_processes):
        one, other = (run["race"] for run in two_processes)
        assert one == other
        assert sorted(map(len, one)) == [1, 1, 2, 2]

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    def test_estimate_at_the_switch_is_the_logged_loss(self, two_processes, kind):
        for run in two_processes:
            assert run["estimated"][kind] == pytest.approx(run["logged"][kind], rel=1e-5)

    def test_clusters_are_the_same_for_both(self, two_processes):
        one, other = (run["clusters"] for run in two_processes)
        assert one == other
        assert set(one["tasks"]) == {"cluster 1", "cluster 2", "cluster 3"}

    def test_layers_are_the_same_for_both(self, two_processes):
        one, other = (run["clusters"] for run in two_processes)
        assert one == other  # scores, and the weights after training one layer
        assert sorted(one["layers"]["rates"].values()) == [0, 1]
        for run in two_processes:
            assert run["largest_relative_difference_of_layers"] < 1e-6

    def test_weights_stay_in_step(self, two_processes):
        one, other = (run["weights"] for run in two_processes)
        assert one == other

    @pytest.mark.parametrize(
        "what", ["plan.json", "selection.json", "initial_adapter.safetensors", "rows.jsonl"]
    )
    def test_all_fail_where_the_main_process_cannot_write(self, two_processes, what):
        one, other = (run["errors"][what] for run in two_processes)
        assert one == other
        assert "No space left on device" in one
