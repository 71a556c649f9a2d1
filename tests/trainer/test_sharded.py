"""Runs whose state FSDP2 or DeepSpeed shards over processes: they select what others do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_run

TESTS = Path(__file__).parents[1]

TOLERANCE = 1e-5
"""Largest difference to a run with whole parameters, relative to the largest number of an array.
Measured: with two processes and LoRA on linear layers exactly 0 under FSDP2, else up to 6e-6."""

OF_PARAMETERS = {"FSDP2": TOLERANCE, "DeepSpeed": 3e-5}
"""Likewise of the parameters that training ends with. Measured: up to 1.1e-5 under ZeRO-3."""

PADDING = {"FSDP2": 1e-6, "DeepSpeed": 0.02}
"""By how much the shares of all processes may exceed 1: ZeRO's masters end in padding."""

IN_BFLOAT16 = 0.02
"""Likewise of losses at the switch, if parameters are rounded, which autocast does not do."""

CASES = {
    (kind, number): [name for name in cases if ("few tasks" in name) == (number == 3)]
    for kind, cases in (("FSDP2", sharded_run.CASES), ("DeepSpeed", sharded_run.ZERO_CASES))
    for number in (2, 3)
}


def launches(kind):
    """The kind as a parameter of a test."""
    if kind == "FSDP2":
        return pytest.param(kind)
    missing = importlib.util.find_spec("deepspeed") is None
    skipped = pytest.mark.skipif(missing, reason="pip install -e '.[deepspeed]'")
    return pytest.param(kind, marks=[pytest.mark.deepspeed, skipped])


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """How the cases of a kind and a number of processes ended, and where their results are.

    Of three processes the second fails at last.
    """
    ended = {}

    def of(kind, num_processes):
        if (kind, num_processes) not in ended:
            directory = tmp_path_factory.mktemp("sharded")
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            script = [str(TESTS / "sharded_run.py"), str(directory), *CASES[kind, num_processes]]
            done = subprocess.run(
                [sys.executable, *command, str(num_processes), *script]
                + ["failure"] * (num_processes == 3),
                env=os.environ
                | {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=900,
            )
            ended[kind, num_processes] = done, directory
        return ended[kind, num_processes]

    return of


@pytest.mark.parametrize(
    ("kind", "num_processes", "name"),
    [
        pytest.param(kind, number, name, marks=launches(kind).marks)
        for (kind, number), names in CASES.items()
        for name in names
    ],
)
def test_they_are_those_with_whole_parameters(kind, num_processes, name, launched):
    """Gradients, estimates, choice and the weights that training ends with."""
    done, directory = launched(kind, num_processes)
    paths = [directory / f"rank{rank}.json" for rank in range(num_processes)]
    assert all(path.is_file() for path in paths), done.stderr
    runs = [json.loads(path.read_text())[name] for path in paths]
    assert [run["world_size"] for run in runs] == [num_processes] * num_processes
    assert sum(run["share"] for run in runs) == pytest.approx(1, abs=PADDING[kind])
    assert max(run["share"] for run in runs) < 0.6
    for run in runs:
        assert run["differences"] == runs[0]["differences"]
        if "bfloat16" in name:
            assert run["differences"]["outputs of loss"] < IN_BFLOAT16
            continue
        for array, difference in run["differences"].items():
            is_parameter = array.startswith("parameter ")
            assert difference < (OF_PARAMETERS[kind] if is_parameter else TOLERANCE)


@pytest.mark.parametrize("kind", [launches("FSDP2"), launches("DeepSpeed")])
def test_an_error_of_one_process_ends_all(kind, launched):
    done, directory = launched(kind, 3)
    assert done.returncode != 0
    assert "RuntimeError: the second process fails" in done.stderr
    assert not (directory / "failure" / "_task_selection" / "selection.json").exists()
