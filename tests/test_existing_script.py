"""The patches of recipes/existing_script apply, and the patched scripts select and switch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import trl
import yaml

FOLDER = Path(__file__).parent.parent / "recipes" / "existing_script"
README = (FOLDER / "README.md").read_text()
FILES = ["sums.jsonl", "letters.jsonl", "wrong.jsonl"]
SMALL = ["--max_steps=6", "--per_device_train_batch_size=4", "--report_to=none", "--use_cpu"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model and the data of the README: prompts in .jsonl, texts in .json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.llama().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    Path("target").mkdir()
    for file, rows in {
        "sums.jsonl": tiny.sums(30, 1),
        "letters.jsonl": tiny.sums(30, 2, letters=True),
        "wrong.jsonl": tiny.sums(30, 3, shuffled=True),
        "target/test.jsonl": tiny.sums(12, 9),
    }.items():
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [{"text": row["prompt"] + row["completion"]} for row in rows]
        name = file.replace("target/test", "target").replace(".jsonl", ".json")
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def patched(script, patch):
    """A copy of a script in the working directory, patched as the README says."""
    copy = Path(shutil.copy(script, "."))
    done = subprocess.run(["patch", copy, FOLDER / patch], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "fuzz" not in done.stdout  # then it no longer is the diff of this release
    return copy


def run(script, *arguments):
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, *arguments, *SMALL],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def check_selection(output, tasks):
    """A selection was made, and the rows after it are drawn by its weights."""
    directory = Path(output) / "_task_selection"
    decision = json.loads((directory / "selection.json").read_text())
    sizes = json.loads((directory / "plan.json").read_text())["tasks"]
    weights = decision["weights"]
    assert list(sizes) == tasks and set(weights) <= set(tasks)
    shares = {task: size / sum(sizes.values()) for task, size in sizes.items()}
    assert max(abs(weights.get(task, 0.0) - share) for task, share in shares.items()) > 0.05
    lines = (directory / "report" / "rows.jsonl").read_text().splitlines()
    reads = Counter()
    for row in map(json.loads, lines):
        reads[row["task"]] += row["reads"]
    assert sum(reads.values()) == 4 * (6 - decision["switch_step"])
    expected = {task: weights.get(task, 0.0) * sum(reads.values()) for task in tasks}
    assert {task: reads[task] for task in tasks} == pytest.approx(expected, abs=2)


def test_the_readme_shows_the_patches():
    patches = [
        (FOLDER / name).read_text()
        for name in ("trl_sft.patch", "causal_lm.patch", "run_clm.patch")
    ]
    assert blocks("diff") == patches
    counts = [tuple(len(re.findall(rf"^\{s}(?!\{s}\{s})", p, re.M)) for s in "+-") for p in patches]
    assert re.findall(r"\| (\d+) added, (\d+) removed \|", README) == [
        (str(added), str(removed)) for added, removed in counts
    ]


def test_the_script_of_trl(folder):
    script = patched(Path(trl.__file__).parent / "scripts" / "sft.py", "trl_sft.patch")
    (settings,) = blocks("yaml")
    Path("sft.yaml").write_text(settings)
    run(script, "--config", "sft.yaml", "--model_name_or_path", "model", "--bf16", "false")
    check_selection(yaml.safe_load(settings)["output_dir"], [f"json {file}" for file in FILES])


TEXTS = [file.replace(".jsonl", ".json") for file in FILES]
BLOCKS = ["--model_name_or_path", "model", "--train_files", *TEXTS, "--validation_file"]
BLOCKS += ["target.json", "--block_size", "12", "--output_dir", "out"]


def test_a_script_that_cuts_texts_into_blocks(folder):
    run(patched(FOLDER / "causal_lm.py", "causal_lm.patch"), *BLOCKS)
    check_selection("out", TEXTS)


@pytest.mark.skipif(
    "RUN_CLM" not in os.environ, reason="run_clm.py is in no package: name yours in RUN_CLM"
)
def test_run_clm_itself(folder):
    script = patched(Path(os.environ["RUN_CLM"]), "run_clm.patch")
    files = [
        "--train_file",
        "sums.json",
        "--validation_file",
        "target.json",
        "--task_files",
        *TEXTS,
    ]
    options = ["--model_name_or_path", "model", "--block_size", "12", "--output_dir", "out"]
    run(script, *files, *options, "--do_train")
    check_selection("out", TEXTS)
