"""Kill a run at random moments, resume it, and compare with the run that nobody killed.

The small family: a model of 3 million parameters, twelve tasks, and the steps of the demo: 40, of
which 16 warm up; a checkpoint every four. Each kill is a SIGKILL after a random time, seeded, of a
run of its own, which is then resumed with ``trainer.train(resume_from_checkpoint=True)``.

    python -m benchmarks.robustness.kills [--kills 40] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.ground_truth import make_trainer
from hf_auxselect import TaskSelectionCallback
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.trainer.access import trainable_state
from hf_auxselect.trainer.checkpoints import is_whole, saved_checkpoints

SWITCH_STEP = 16
PHASES = (
    "before the first step",
    "warm-up",
    "gradient pass",
    "between pass and decision",
    "between decision and checkpoint",
    "while a checkpoint was saved",
    "after the switch",
)


def train(directory: Path) -> None:
    """Train, or resume if there is a checkpoint; in a process of its own."""
    os.dup2(os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)
    callback = TaskSelectionCallback(warmup=SWITCH_STEP, examples_per_task=16)
    trainer = make_trainer(
        "small", directory, [callback], max_steps=40, save_strategy="steps", save_steps=4
    )
    can_resume = directory.is_dir() and get_last_checkpoint(str(directory)) is not None
    trainer.train(resume_from_checkpoint=can_resume)
    save_file(trainable_state(trainer.model), directory / "final.safetensors")


def phase(directory: Path) -> str:
    """Where a run was when it was killed, as far as its files tell."""
    files = directory / "_task_selection"
    checkpoints = saved_checkpoints(directory)
    if not (files / "plan.json").is_file():
        return "before the first step"
    if checkpoints and not is_whole(checkpoints[-1]):
        return "while a checkpoint was saved"
    index = files / "gradients" / "index.json"
    if not index.is_file():
        return "warm-up"
    if not json.loads(index.read_text())["complete"]:
        return "gradient pass"
    if not (files / "selection.json").is_file():
        return "between pass and decision"
    if directory / f"checkpoint-{SWITCH_STEP}" not in checkpoints:
        return "between decision and checkpoint"
    return "after the switch"


def main() -> None:
    """Kill, resume, compare; print a line a phase, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.robustness.kills"])
    forkserver.ensure_running()

    def run(directory: Path, kill_after: float | None = None) -> int | None:
        process = context.Process(target=train, args=(directory,))
        process.start()
        process.join(kill_after)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("warm", "whole"):  # the first makes what is cached, and imports
            start = time.perf_counter()
            assert run(root / name) == 0, (root / f"{name}.log").read_text()
        seconds = time.perf_counter() - start
        whole = load_file(root / "whole" / "final.safetensors")
        killed: Counter[str] = Counter()
        resumed: Counter[str] = Counter()
        equal: Counter[str] = Counter()
        number = 0
        while killed.total() < options.kills:
            directory = root / str(number)
            number += 1
            if run(directory, seconds * rng.random()) != -signal.SIGKILL:
                continue  # it was through already
            where = phase(directory)
            killed[where] += 1
            resumed[where] += run(directory) == 0
            final = directory / "final.safetensors"
            if final.is_file():
                weights = load_file(final)
                equal[where] += all(torch.equal(weights[name], whole[name]) for name in whole)
            print(f"{killed.total()}: {where}", flush=True)
    print(f"\n{'killed':<34}{'times':>6}{'resumed':>9}{'bitwise equal':>15}")
    for where in (*PHASES, "in all"):
        counts = [c.total() if where == "in all" else c[where] for c in (killed, resumed, equal)]
        print(f"{where:<34}{counts[0]:>6}{counts[1]:>9}{counts[2]:>15}")
    record = {
        "command": "python -m benchmarks.robustness.kills "
        f"--kills {options.kills} --seed {options.seed}",
        "seconds_of_a_run": round(seconds, 1),
        "killed": dict(killed),
        "resumed": dict(resumed),
        "bitwise_equal": dict(equal),
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    write_atomically(RESULTS / "chaos.json", to_json(record))


if __name__ == "__main__":
    main()
