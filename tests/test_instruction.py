"""The recipe of instruction tuning, at a tiny size: tasks from a folder, a YAML file, a column."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from recipes import instruction

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
SIZE = {
    "target_rows": 6,
    "test_rows": 6,
    "warmup": 2,
    "max_steps": 4,
    "examples_per_task": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "lora_r": 2,
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Three tasks and the target's own training rows, which are no task."""
    for seed, name in enumerate(["sums", "letters", "shuffled", "target"]):
        rows = tiny.sums(8, seed, letters=name == "letters", shuffled=name == "shuffled")
        write(tmp_path / f"{name}.jsonl", [dict(row, answer="") for row in rows])
    write(tmp_path / "target.heldout.jsonl", list(tiny.sums(12, 9)))
    return tmp_path


@pytest.fixture
def config(tmp_path):
    """The configuration for CPUs, without its data sets: all files of the folder are tasks."""
    settings = yaml.safe_load((CONFIGS / "instruction_cpu.yaml").read_text())
    del settings["datasets"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


def run(monkeypatch, config, model, output, **options):
    given = {**SIZE, "model_name_or_path": model, "output_dir": output} | options
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["instruction.py", "--config", str(config), *flags])
    instruction.main()


def test_it_selects_and_checks_the_choice(folder, config, tiny_model, run_dir, monkeypatch, capsys):
    given = {"data_dir": folder, "target": "target", "results": run_dir / "results.json"}
    run(monkeypatch, config, tiny_model, run_dir, compare_seeds=2, **given)
    shown = capsys.readouterr().out
    assert "target, 6 rows that no run has seen" in shown
    runs = json.loads((run_dir / "results.json").read_text())["target"]["runs"]
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    for name in ("all tasks", "weights in random order", "chosen by hf-auxselect", "exact match"):
        assert name in shown
    assert "The choice" in shown
    assert "Rank correlation of the estimated loss with the measured loss" in shown
    record = json.loads((run_dir / "measured-1.json").read_text())
    assert set(record["runs"][0]["weights"]) == {"sums", "letters", "shuffled"}
    report = json.loads(
        (run_dir / "chosen-0" / "_task_selection" / "report" / "report.json").read_text()
    )
    assert [one["step"] for one in report["evaluations"]] == [2, 4]
    assert list(report["evaluations"][0]["metrics"]) == ["exact_match"]


def test_without_a_check_it_trains_and_saves(folder, config, tiny_model, run_dir, monkeypatch):
    options = {"data_dir": folder, "target": "target", "compare_seeds": 0}
    run(monkeypatch, config, tiny_model, run_dir, **options)
    assert (run_dir / "adapter_model.safetensors").is_file()


def test_tasks_are_the_entries_of_datasets(
    folder, config, tiny_model, run_dir, monkeypatch, tmp_path
):
    """As on the Hub: a data set each, with the columns of Super-NaturalInstructions."""
    for name in ("sums", "letters", "target"):
        (tmp_path / "hub" / name).mkdir(parents=True)
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        split = "test" if name == "target" else "train"
        write(
            tmp_path / "hub" / name / f"{split}.jsonl",
            [
                {"input": r["prompt"], "output": r["completion"], "id": i}
                for i, r in enumerate(rows)
            ],
        )
    paths = [str(tmp_path / "hub" / name) for name in ("sums", "letters")]
    settings = yaml.safe_load(config.read_text()) | {"datasets": [{"path": p} for p in paths]}
    config.write_text(yaml.safe_dump(settings))
    target = str(tmp_path / "hub" / "target")
    run(monkeypatch, config, tiny_model, run_dir, target=target, compare_seeds=0)
    report = json.loads((run_dir / "_task_selection" / "selection.json").read_text())
    assert set(report["weights"]) == set(paths)


def test_a_folder_takes_the_place_of_the_hub(folder):
    entries = [{"path": "me/sums"}, {"path": "me/target"}]
    mixture = instruction.DatasetMixtureConfig(datasets=entries)
    data = instruction.DataArguments(target="me/target", data_dir=folder)
    train = instruction.load_tasks(instruction.ScriptArguments(), mixture, data)
    assert set(train["task"]) == {"sums"}
    mixture.datasets[0].path = "me/sum"
    with pytest.raises(ValueError, match=r"--data_dir: there is no .*sum.jsonl.*'sums.jsonl'"):
        instruction.load_tasks(instruction.ScriptArguments(), mixture, data)


def test_tasks_are_the_values_of_a_column(tmp_path):
    rows = [dict(row, source=f"s{i % 3}") for i, row in enumerate(tiny.sums(12, 1))]
    write(tmp_path / "train.jsonl", rows)
    script = instruction.ScriptArguments(dataset_name=str(tmp_path))
    data = instruction.DataArguments(target="t", task_column="source", rows_per_task=3)
    train = instruction.load_tasks(script, instruction.DatasetMixtureConfig(), data)
    assert [train["task"].count(f"s{i}") for i in range(3)] == [3, 3, 3]
    assert set(train.column_names) == {"prompt", "completion", "task"}


def test_without_tasks_it_says_what_to_give():
    data = instruction.DataArguments(target="t")
    with pytest.raises(ValueError, match="give --data_dir, or datasets:"):
        instruction.load_tasks(
            instruction.ScriptArguments(), instruction.DatasetMixtureConfig(), data
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data_dir": "empty"}, "--data_dir: there are no tasks"),
        ({"target": "taget"}, r"--target: there is no .*taget.heldout.jsonl.*'target.heldout"),
        ({"target_rows": 12}, "--target_rows 12: the target has 12 rows"),
        (
            {"warmup": 0.5, "compare_seeds": 1},
            "--compare_seeds: --warmup must be a number of steps",
        ),
    ],
)
def test_wrong_arguments_are_named(
    folder, config, tiny_model, run_dir, monkeypatch, options, told, tmp_path
):
    (tmp_path / "empty").mkdir()
    given = {"target": "me/target", "compare_seeds": 0} | options
    given["data_dir"] = folder / options.get("data_dir", "")
    with pytest.raises(ValueError, match=told):
        run(monkeypatch, config, tiny_model, run_dir, **given)


def test_the_configuration_for_the_hub_is_read(monkeypatch):
    parser = instruction.TrlParser(
        (
            instruction.ScriptArguments,
            instruction.DatasetMixtureConfig,
            instruction.DataArguments,
            instruction.SelectionArguments,
            instruction.SFTConfig,
            instruction.ModelConfig,
        )
    )
    arguments = ["--config", str(CONFIGS / "instruction.yaml"), "--use_cpu", "--bf16", "false"]
    _, mixture, data, selection, _, model = parser.parse_args_and_config(arguments)
    assert len(mixture.datasets) == 10
    assert data.target.startswith("Lots-of-LoRAs/")
    assert selection.warmup == 0.2
    assert model.use_peft
