"""The benchmarks can be started; what they measure takes hours and is no test."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

import benchmarks
from hf_auxselect.capture.scalars import SCALARS, add_scalar

ROOT = Path(benchmarks.__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if not m.ispkg]


@pytest.mark.parametrize("name", MODULES)
def test_its_imports_are_there(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "sklearn":  # of the extra "bench"
            raise
        pytest.skip("needs scikit-learn")
    assert module.__doc__


def test_they_start_from_a_checkout():
    command = [sys.executable, "-m", "benchmarks.cost.large_store", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--num_examples" in done.stdout


def test_a_scalar_of_ones_own_keeps_its_name(monkeypatch):
    from benchmarks.accuracy.ablations import signed_token_margins

    monkeypatch.delitem(SCALARS, "token_margins", raising=False)
    for _ in range(2):
        add_scalar("token_margins", signed_token_margins)
    with pytest.raises(ValueError, match="'loss' is that of another scalar"):
        add_scalar("loss", signed_token_margins)


def test_exact_match_is_what_greedy_decoding_gives(tmp_path):
    from benchmarks.accuracy.ground_truth import exact_match

    model = tiny.llama()
    rng = np.random.default_rng(0)
    rows = []
    for length in (3, 5, 4, 6):
        prompt = torch.from_numpy(rng.integers(4, 20, (1, length)))
        completion = model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=-1)
        completion = completion[0, length:].tolist()
        rows.append({"input_ids": [*prompt[0].tolist(), *completion], "length": length})
    rows[2]["input_ids"][-1] = (rows[2]["input_ids"][-1] + 1) % 20
    dataset = Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "attention_mask": [1] * len(row["input_ids"]),
                "labels": [-100] * row["length"] + row["input_ids"][row["length"] :],
            }
            for row in rows
        ]
    )
    trainer = tiny.plain_trainer(tmp_path, model=model, eval_dataset=dataset)
    assert exact_match(trainer) == 0.75


def test_exp3_draws_what_is_rewarded_more_often():
    from benchmarks.accuracy.rivals import Exp3Batches

    tasks = np.repeat(np.arange(4), 10)
    batches = Exp3Batches(tasks, batch_size=5, num_batches=400, seed=0)
    rows = iter(batches)
    drawn = []
    for _ in range(400):
        batch = [next(rows) for _ in range(5)]
        (task,) = {int(tasks[row]) for row in batch}
        assert len({*batch}) == 5
        drawn.append(task)
        batches.reward(2.0 if task == 2 else 0.1)
        probabilities = batches.probabilities()
        assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()
    assert probabilities.argmax() == 2 and probabilities[2] > 0.26
    assert len(batches) == 2000 and len({*drawn}) == 4


def test_the_script_for_a_gpu():
    """On a CPU, at a tiny size; compiling takes too long here."""
    from benchmarks.gpu import measure

    assert max(measure.compare_with_cpu("cpu").values()) == 0
    errors = measure.compare_with_autograd("cpu")
    assert max(errors[f"{kind}, float32"] for kind in ("eager", "sdpa")) < 1e-5
    assert measure.observe("cpu")["bitwise"]
    cost = measure.measure_cost(
        "tiny", "cpu", checkpointing=True, batch_size=4, length=24, repetitions=1
    )
    assert cost["time_ratio"]["training"] == 1
    assert set(cost["projection_share"]) == {"one scalar", "default"}
