"""Each recipe under a launcher; torchrun and the Slurm script with the recipe to copy."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from torch.distributed.run import get_args_parser

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SCRIPT = str(TESTS / "launched_recipe.py")
SLURM = ROOT / "recipes" / "slurm" / "multi_node.sh"
COPY = "recipes.arithmetic"

# What each is started with, at a tiny size. {model} and {output} are directories; {data} has JSON
# lines for any recipe: three tasks, and target.heldout.jsonl.
RECIPES = {
    COPY: "--model {model} --output_dir {output} --max_steps 3",
    "recipes.noisy_groups": "--output_dir {output} --seeds 1 --max_steps 4",
    "recipes.instruction": "--model_name_or_path {model} --output_dir {output} --data_dir {data}"
    " --target target --target_rows 6 --test_rows 6 --warmup 2 --max_steps 4 --examples_per_task 4"
    " --per_device_train_batch_size 2 --use_peft --bf16 false --report_to none",
    "recipes.chain_of_thought": "--model_name_or_path {model} --output_dir {output}"
    " --data_dir {data} --target target --num_target 6 --num_held_out 4 --max_new_tokens 2"
    " --warmup 2 --max_steps 4 --examples_per_task 4 --per_device_train_batch_size 2 --use_peft"
    " --bf16 false --report_to none",
    "recipes.classification": "--output_dir {output} --data_dir {data} --target target"
    " --warmup 0.5 --max_steps 4 --per_device_train_batch_size 4",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {
        "sums": tiny.sums(8, 1),
        "letters": tiny.sums(8, 2, letters=True),
        "shuffled": tiny.sums(8, 3, shuffled=True),
        "target.heldout": tiny.sums(12, 9),
    }.items():
        labelled = [
            row | {"answer": row["completion"], "text": row["prompt"], "label": i % 2}
            for i, row in enumerate(rows)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in labelled)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def command(tiny_model, data, tmp_path_factory):
    """The words of recipes' command lines, with what records their selections before them."""

    def words(directory, *modules):
        paths = {"model": tiny_model, "output": directory / "output", "data": data}
        lines = [f"{module} {RECIPES[module].format(**paths)}" for module in modules]
        return [SCRIPT, str(directory), *" + ".join(lines).split()]

    return words


def run(command, **environment):
    paths = os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    # Two processes on a CPU; a process alone is on a CPU where there is no GPU.
    environment = {"ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def check_selections(directory, module, num_processes):
    """Every process selected, in a run of all of them, and the same."""
    files = sorted(directory.glob("rank*.json"))
    assert [file.name for file in files] == [f"rank{i}.json" for i in range(num_processes)]
    runs = [json.loads(file.read_text())[module] for file in files]
    for selections in runs:
        assert selections == runs[0] and selections
        for selection in selections:
            assert selection["world_size"] == num_processes
            assert sum(selection["weights"].values()) == pytest.approx(1)


@pytest.fixture(
    scope="class",
    params=[("one_process.yaml", 1), ("two_cpu_processes.yaml", 2)],
    ids=lambda param: param[0],
)
def launched(request, command, tmp_path_factory):
    """What one launch of all recipes wrote, and its number of processes."""
    config, num_processes = request.param
    directory = tmp_path_factory.mktemp("launched")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    path = ROOT / "recipes" / "accelerate" / config
    run(
        [*launcher, "--config_file", str(path), *command(directory, *RECIPES)],
        HF_DATASETS_CACHE=str(directory / "cache"),
    )
    return directory, num_processes


@pytest.mark.parametrize("module", RECIPES)
class TestAccelerateLaunch:
    def test_all_processes_select_the_same(self, module, launched):
        directory, num_processes = launched
        check_selections(directory, module, num_processes)


def test_the_line_for_torchrun():
    """The script for Slurm, below, runs torchrun."""
    page = (ROOT / "docs" / "launching.md").read_text()
    (line,) = re.findall(r"^ACCELERATE_USE_CPU=true (torchrun .*)$", page, re.MULTILINE)
    *launcher, option, module = shlex.split(line)
    assert (launcher[0], option, module) == ("torchrun", "-m", COPY)
    options = get_args_parser().parse_args([*launcher[1:], option, module])
    assert (options.nproc_per_node, options.standalone, options.module) == ("2", True, True)


FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
FAKE_SCONTROL = """#!/bin/bash
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo localhost; done
"""


def job_with_a_free_port():
    """The script adds the last four digits of the job's number to 20000."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("localhost", 20000 + job % 10000))
            return job
    raise AssertionError("no free port")


class TestSlurm:
    def test_the_script(self, command, run_dir, tmp_path):
        """Two nodes of one process, both of which are this machine."""
        run_dir.mkdir()
        commands = tmp_path / "bin"
        commands.mkdir()
        for name, text in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        run(
            ["bash", str(SLURM), *command(run_dir, COPY)],
            PATH=os.pathsep.join(
                [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            SLURM_JOB_ID=str(job_with_a_free_port()),
            SLURM_JOB_NODELIST="node[0-1]",
            SLURM_JOB_NUM_NODES="2",
            PROCESSES_PER_NODE="1",
        )
        check_selections(run_dir, COPY, 2)

    def test_it_says_what_is_missing_without_gpus(self):
        done = subprocess.run(["bash", SLURM], capture_output=True, text=True)
        assert done.returncode != 0
        assert "set PROCESSES_PER_NODE" in done.stderr

    def test_its_syntax(self):
        assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
