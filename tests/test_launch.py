"""The configurations of recipes/accelerate, under ``accelerate launch``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.commands.config.config_args import load_config_from_file
from tiny import callback

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "recipes" / "accelerate"


def launch(config, output):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    return subprocess.run(
        [*command, str(CONFIGS / config), str(TESTS / "launched_run.py"), str(output)],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The selection of one process that nobody launched."""
    cb = callback()
    tiny.sft_trainer(tmp_path_factory.mktemp("alone"), cb, learning_rate=0.0).train()
    return cb.report


@pytest.mark.parametrize(
    ("config", "is_sharded"), [("two_cpu_processes.yaml", False), ("fsdp2.yaml", True)]
)
def test_they_run_on_a_cpu(config, is_sharded, run_dir, alone):
    done = launch(config, run_dir)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(path.read_text()) for path in sorted(run_dir.glob("rank*.json"))]
    assert [run["world_size"] for run in runs] == [2, 2]
    for run in runs:
        assert run["is_sharded"] == is_sharded
        assert run["weights"] == alone.weights
        assert run["losses"] == pytest.approx(
            [row.loss for row in alone.rows], abs=tiny.ACROSS_PROCESSES
        )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_them(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.distributed_type
