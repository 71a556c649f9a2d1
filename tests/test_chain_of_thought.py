"""The recipe for chains of thought: its data, its script, and its comparison, at a tiny size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from recipes import chain_of_thought, rationales
from recipes.comparison import ALL, CHOSEN
from recipes.metrics import answer_of

ROOT = Path(chain_of_thought.__file__).parent.parent
CONFIG = ROOT / "recipes" / "configs" / "chain_of_thought_cpu.yaml"
TINY = [
    *("--num_rows", "8", "--num_target", "6", "--num_held_out", "4", "--max_new_tokens", "2"),
    *("--warmup", "2", "--examples_per_task", "4", "--max_steps", "4"),
    *("--per_device_train_batch_size", "2", "--lora_r", "2", "--use_cpu", "--disable_tqdm", "true"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks; strategyqa and gsm8k have rows held out."""
    directory = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("strategyqa", "gsm8k", "letters")):
        rows = [
            {
                **row,
                "completion": f" {row['completion']}",
                "answer": row["completion"],
                "group": "1",
            }
            for row in tiny.sums(12, seed, letters=name == "letters")
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
        if name != "letters":
            (directory / f"{name}.heldout.jsonl").write_text(lines)
    return directory


@pytest.fixture
def run_script(folder, tiny_model, tmp_path, monkeypatch):
    def run(*arguments):
        own = ["--model_name_or_path", tiny_model, "--data_dir", str(folder)]
        own += ["--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(
            sys, "argv", ["script", "--config", str(CONFIG), *own, *TINY, *arguments]
        )
        chain_of_thought.main()
        return tmp_path / "run"

    return run


def test_it_trains_on_the_other_tasks_and_counts_answers(run_script, capsys):
    directory = run_script()
    shown = capsys.readouterr().out
    assert "gradient pass after step 2" in shown
    assert "target loss: " in shown
    assert "right answers: 0.0% of 4" in shown  # the tiny model has no word for "answer"
    decision = json.loads((directory / "_task_selection" / "selection.json").read_text())
    assert sorted(decision["weights"]) == ["gsm8k", "letters"]
    assert (directory / "adapter_model.safetensors").is_file()


def test_it_compares_mixtures_and_keeps_what_it_measured(run_script, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text('{"other": 1}')
    run_script("--compare_seeds", "1", "--results", str(results), "--target", "gsm8k")
    shown = capsys.readouterr().out
    found = json.loads(results.read_text())
    assert found["other"] == 1
    names = [run["name"] for run in found["gsm8k"]["runs"]]
    assert names[:2] == [CHOSEN, ALL] and len(names) == 4
    assert set(found["gsm8k"]["runs"][0]["weights"]) == {"strategyqa", "letters"}
    assert all(name in shown for name in names)
    assert "Measured on 4 rows of gsm8k" in shown
    assert found["gsm8k"]["settings"]["rows"] == {"letters": 8, "strategyqa": 8}


def test_rivals_train_on_the_clusters_of_the_run(run_script, tmp_path):
    results = tmp_path / "results.json"
    directory = run_script("--compare_seeds", "1", "--results", str(results), "--clusters", "3")
    runs = json.loads(results.read_text())["strategyqa clusters"]["runs"]
    names = {"cluster 1", "cluster 2", "cluster 3"}
    assert len(runs) == 4
    assert all(set(run["weights"]) == names for run in runs)
    counts = json.loads((directory / "chosen-0" / "_task_selection" / "clusters.json").read_text())[
        "cluster_of_row"
    ]
    of_all = next(run["weights"] for run in runs if run["name"] == ALL)
    assert of_all["cluster 1"] == pytest.approx(counts.count(1) / len(counts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sums"], "--target must be one of gsm8k, strategyqa; got 'sums'"),
        (["--target", "letters"], "--target must be one of gsm8k, strategyqa; got 'letters'"),
        (["--data_dir", "/nowhere"], "--data_dir /nowhere has no files TASK.jsonl"),
        (["--num_held_out", "7"], "strategyqa has 12 rows held out, but --num_target 6 and"),
        (["--num_rows", "0"], "--num_rows must be 1 or more, got 0"),
        (
            ["--compare_seeds", "1", "--max_steps", "2"],
            "--compare_seeds needs --max_steps above --warmup 2",
        ),
        (
            ["--results", "r.json"],
            "--results r.json keeps what --compare_seeds measures; add it",
        ),
        (["--after", "pause"], "after must be one of"),
    ],
)
def test_wrong_arguments_are_named_before_training(run_script, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_script(*arguments)


def test_a_wrong_row_is_named(tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "completion": " 2"}\n')
    (tmp_path / "target.heldout.jsonl").write_text("")
    (tmp_path / "sums.heldout.jsonl").write_text('{"prompt": "1+1=", "completion": " 2"}\n')
    with pytest.raises(ValueError, match=r"sums\.heldout\.jsonl, line 1: expected a JSON"):
        rationales.load("sums", data_dir=str(tmp_path), num_rows=1, num_target=1, num_held_out=1)


@pytest.mark.parametrize("include_target", [False, True])
def test_rows_of_the_target_are_apart(folder, include_target):
    data = rationales.load(
        "gsm8k",
        data_dir=str(folder),
        num_rows=5,
        num_target=3,
        num_held_out=4,
        include_target=include_target,
    )
    assert list(data.tasks) == ["gsm8k"] * include_target + ["letters", "strategyqa"]
    assert all(len(rows) == 5 for rows in data.tasks.values())
    assert (len(data.target), len(data.held_out)) == (3, 4)
    lines = (folder / "gsm8k.heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert [*data.target["prompt"], *data.held_out["prompt"]] == prompts[:7]


HUB_ROWS = {
    "gsm8k": {
        "question": "How many?",
        "answer": "2*3=<<2*3=6>>6 eggs.\nHe has 6+1=<<6+1=7>>7.\n#### 7",
    },
    "strategyqa": {"question": "Can it?", "facts": "It is small.", "answer": True},
    "svamp": {"question_concat": "How many?", "Equation": "( 3.0 + 4.0 )", "Answer": "7"},
    "aqua": {
        "question": "How many?",
        "options": ["A)6", "B)7"],
        "rationale": "3+4=7",
        "correct": "B",
    },
    "qasc": {
        "formatted_question": "What? (A) this (B) that",
        "fact1": "One.",
        "fact2": "Two",
        "combinedfact": "Three.",
        "answerKey": "B",
    },
    "ecqa": {
        "q_text": "Where?",
        "q_ans": "attic",
        "taskB": "It is\nold.",
        **{f"q_op{i}": name for i, name in enumerate(("attic", "sea", "sky", "bag", "zoo"), 1)},
    },
    "creak": {"sentence": "It is so.", "explanation": "It is not.", "label": "false"},
}
ANSWERS = {
    "gsm8k": "7",
    "strategyqa": "yes",
    "svamp": "7",
    "aqua": "b",
    "qasc": "b",
    "ecqa": "attic",
    "creak": "no",
}


def test_data_sets_of_the_hub_become_rationales(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        task = next(key for key, known in rationales.HUB.items() if known.path == path)
        return [HUB_ROWS[task]] * 2

    monkeypatch.setattr(rationales, "load_dataset", load_dataset)
    data = rationales.load(
        "gsm8k", data_dir=None, num_rows=2, num_target=1, num_held_out=1, include_target=True
    )
    assert (
        list(data.tasks) == list(rationales.HUB) == [*sorted(HUB_ROWS, key=list(data.tasks).index)]
    )
    assert asked[0] == ("openai/gsm8k", "main", "test[:2]")
    assert ("deepmind/aqua_rat", "raw", "train[:2]") in asked
    for name, rows in data.tasks.items():
        row = rows[0]
        assert row["prompt"].startswith("Q: ") and row["prompt"].endswith("\nA:")
        assert row["completion"].endswith(f" Therefore, the answer is {row['answer']}.")
        assert answer_of(row["completion"]) == ANSWERS[name]
    assert data.tasks["gsm8k"]["completion"][0].startswith(" 2*3=6 eggs. He has 6+1=7. Therefore")
    assert data.tasks["aqua"]["prompt"][0] == "Q: How many?\nOptions:\n(A)6\n(B)7\nA:"
    assert data.tasks["qasc"]["completion"][0].startswith(" One. Two. Three. Therefore")


def test_the_configuration_is_of_the_script():
    known = yaml.safe_load(CONFIG.read_text())
    assert known["max_steps"] > known["warmup"]


def test_results_of_a_recipe_become_tables(tmp_path):
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    runs = [
        {
            "seed": seed,
            "name": name,
            "weights": {"letters": 0.75, "sums": 0.25, "bits": 0.0},
            "measured": {"loss": loss, "answers": 0.5},
        }
        for seed, name, loss in [(0, CHOSEN, 1.5), (0, ALL, 1.25), (1, CHOSEN, 1.0), (1, ALL, 2.0)]
    ]
    results = {"a-b c": {"settings": {}, "runs": [*runs, runs[0] | {"name": "other"}]}}
    (tmp_path / "benchmarks/results/recipes").mkdir(exist_ok=True)
    (tmp_path / "benchmarks/results/recipes/mine.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text(
        "".join(
            f"<!-- table: {kind}_mine_a_b_c -->\n<!-- /table -->\n"
            for kind in ("recipe", "mixtures")
        )
    )
    subprocess.run([sys.executable, tmp_path / "docs" / "tables.py"], check=True)
    measured, mixtures = (tmp_path / "README.md").read_text().split("<!-- /table -->")[:2]
    assert f"| {CHOSEN} | 2 | 1.2500 ± 0.2500 | 50.0 ± 0.0% | +0.3750 ± 0.6250 |" in measured
    assert f"| {ALL} | 2 | 1.6250 ± 0.3750 | 50.0 ± 0.0% |  |" in measured
    assert "| other | 1 | 1.5000 | 50.0% | −0.2500 |" in measured
    assert "| letters | 75% | 75% |\n| sums | 25% | 25% |\n" in mixtures
    assert "bits" not in mixtures
