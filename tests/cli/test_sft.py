"""``hf-auxselect sft``: TRL's flags and YAML, each data set a task. Real runs of a tiny model."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import trl
import yaml
from trl import DatasetMixtureConfig, get_dataset

from hf_auxselect import FixedSelection, GaussNewton, SelectionReport, TaskSelectionCallback
from hf_auxselect.cli import main
from hf_auxselect.cli.options import UsageError
from hf_auxselect.cli.sft_arguments import SelectionArguments
from hf_auxselect.cli.sources import TaskMixture, target_entry

MODEL = {
    "model_name_or_path": "model",
    "dtype": "float32",
    "use_peft": True,
    "lora_r": 2,
    "lora_target_modules": "all-linear",
}
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "max_length": 32,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
SELECTION = {
    "warmup": 3,
    "projection_dim": 16,
    "estimator": "GaussNewton",
    "selector": "ForwardSelection",
}
LISTS = {
    "estimator_options": ["rank=3", "damping=0.1"],
    "selector_options": ["max_tasks=1"],
    "keep": ["letters"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the model, and two tasks as folders of JSON lines."""
    folder = tmp_path_factory.mktemp("sft")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    parts = {
        "sums/train": tiny.sums(24, 1),
        "sums/test": tiny.sums(16, 9),
        "letters/train": tiny.sums(12, 2, letters=True),
    }
    for name, dataset in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        dataset.to_json(folder / f"{name}.jsonl")
    labelled = tiny.tasks(12).rename_column("task", "source")
    (folder / "labelled").mkdir()
    labelled.to_json(folder / "labelled" / "train.jsonl")
    tiny.sums(16, 9).to_json(folder / "labelled" / "test.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(files / "cache"))


def flags(**options):
    return [
        word
        for name, value in (MODEL | TRAINING | options).items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def write_yaml(path, **options):
    path.write_text(yaml.safe_dump(MODEL | TRAINING | options))
    return ["sft", "--config", str(path)]


def decision(output):
    return json.loads((output / "_task_selection" / "selection.json").read_text())


class TestARun:
    def test_flags_and_yaml_are_the_same_run(self, tmp_path, capsys):
        one, two = tmp_path / "one", tmp_path / "two"
        tasks = ["--datasets", "sums", "letters", "--target", "sums:test"]
        assert main(["sft", *flags(output_dir=one, **SELECTION, **LISTS), *tasks, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        report = SelectionReport.load(one / "_task_selection")
        assert told["selected"] == report.selected == ["letters"]
        assert report.sources == {
            "sums": {"path": "sums", "split": "train"},
            "letters": {"path": "letters", "split": "train"},
        }
        assert report.target.rows == 16 and report.run["switch_step"] == 3
        assert report.estimator["rank"] == 3 and report.selector["max_tasks"] == 1
        assert (one / "adapter_model.safetensors").is_file()
        command = write_yaml(
            tmp_path / "run.yaml",
            output_dir=str(two),
            datasets=[{"path": "sums"}, {"path": "letters", "split": "train"}],
            target={"path": "sums", "split": "test"},
            **SELECTION,
            keep=["letters"],
            estimator_options={"rank": 3, "damping": 0.1},
            selector_options={"max_tasks": 1},
        )
        assert main(command) == 0
        assert decision(two) == decision(one)

    def test_tasks_may_be_a_column(self, tmp_path):
        options = {"dataset_name": "labelled", "task_column": "source", "output_dir": tmp_path}
        assert main(["sft", *flags(**options, **SELECTION)]) == 0
        report = SelectionReport.load(tmp_path / "_task_selection")
        assert set(report.weights) == {"a", "b", "c", "d"}
        assert report.target.rows == 16 and report.sources == {}

    def test_rows_that_are_held_out_may_be_the_target(self, tmp_path):
        options = {"datasets": ["sums", "letters"], "test_split_size": 0.25}
        assert main(["sft", *flags(output_dir=tmp_path, **options, **SELECTION)]) == 0
        report = SelectionReport.load(tmp_path / "_task_selection")
        assert report.target.rows == 9 and sum(task.rows for task in report.tasks) == 27

    @pytest.mark.slow
    def test_under_torchrun(self, tmp_path):
        command = write_yaml(
            tmp_path / "run.yaml",
            output_dir=str(tmp_path),
            datasets=[{"path": "sums"}, {"path": "letters"}],
            target="sums:test",
            **SELECTION,
        )
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, tiny\nfrom hf_auxselect.cli import main\ntiny.leave(main(sys.argv[1:]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(script), *command, "--json"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)  # of one process
        assert report["run"]["switch_step"] == 3 and len(report["sources"]) == 2
        # 2 processes x 4 rows x 5 steps after the switch
        rows = {task["name"]: task["rows"] for task in report["tasks"]}
        reads = report["run"]["reads_per_row"]
        assert sum(reads[name] * rows[name] for name in rows) == pytest.approx(40, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learning_rat": 1}, "Unknown arguments from config file: ['--learning_rat', '1']"),
        ({"datasets": [{"path": "sums", "weight": 2}]}, "unexpected keyword argument 'weight'"),
        ({"model_name_or_path": None}, "there is no model: give --model_name_or_path"),
        ({"datasets": []}, "there is nothing to train on"),
        ({"target": None}, "there is no target: give --target path[:split]"),
        ({"target": {"path": "sums", "splits": "test"}}, "target: DatasetConfig.__init__() got"),
        ({"streaming": True}, "--streaming: tasks must have a length"),
        ({"datasets": [{"path": "sums", "task": "a"}, {"path": "letters", "task": "a"}]}, "`task: a` is there more than once"),
        ({"warmup": 2.5}, "--warmup must be a share in (0, 1) or a whole number of steps, got 2.5"),
        ({"warmup": -1}, "--warmup must be a share of the run"),
        ({"after": "stop"}, "--after must be one of"),
        ({"selector": "Forward"}, "--selector 'Forward' is unknown; known are ForwardSelection"),
        ({"estimator_options": {"rank": 3}}, "--estimator None is unknown"),
        ({"selector": "ForwardSelection", "selector_options": {"max_tasks": "two"}}, "--selector_options max_tasks=two: expected integer or none"),
    ],
)  # fmt: skip
def test_wrong_options_are_told_before_training(options, reason, tmp_path, capsys):
    given = {"datasets": [{"path": "sums"}], "target": "sums:test", "output_dir": str(tmp_path)}
    assert main(write_yaml(tmp_path / "run.yaml", **given | options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-auxselect: ") and reason in error


def test_an_unknown_flag_is_an_error(capsys):
    assert main(["sft", *flags(learning_speed=1)]) == 2
    assert "--learning_speed" in capsys.readouterr().err


def test_what_is_no_yaml(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("datasets: [")
    assert main(["sft", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml" in capsys.readouterr().err


def test_what_is_missing_is_one_line(tmp_path, capsys):
    options = {"output_dir": tmp_path, "datasets": "nowhere", "target": "sums:test"}
    assert main(["sft", *flags(**options)]) == 1
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


def test_without_trl_it_says_what_to_install(capsys, monkeypatch):
    for name in ("hf_auxselect.cli.sft", "hf_auxselect.cli.sources"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("hf_auxselect.cli.sft", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["sft", "--help"]) == 1
    assert "pip install 'hf-auxselect[trl]'" in capsys.readouterr().err


class TestArguments:
    def test_every_option_of_the_callback_is_a_flag(self):
        ours = set(inspect.signature(TaskSelectionCallback).parameters)
        fields = {f.name: f.default for f in dataclasses.fields(SelectionArguments)}
        # The trainer's own, and other evaluation sets, of which the script has none.
        assert ours - set(fields) == {"output_dir", "seed", "sources", "groups"}
        callback, default = SelectionArguments().callback({}), TaskSelectionCallback()
        for name in ours:
            assert getattr(callback, name) == getattr(default, name), name

    def test_the_yaml_of_the_documentation_has_keys_that_exist(self):
        page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
        (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        given = yaml.safe_load(text)
        kinds = (
            trl.ScriptArguments,
            trl.SFTConfig,
            trl.ModelConfig,
            TaskMixture,
            SelectionArguments,
        )
        assert set(given) <= {f.name for kind in kinds for f in dataclasses.fields(kind)}
        assert TaskMixture(datasets=given["datasets"]).names == ["gsm", "code"]
        names = [f.name for f in dataclasses.fields(SelectionArguments) if f.name in given]
        assert SelectionArguments(**{name: given[name] for name in names}).callback({}).keep == (
            "gsm",
        )

    def test_a_decision_may_be_followed(self, tmp_path):
        path = tmp_path / "decision.json"
        path.write_text('{"weights": {"sums": 1}}')
        callback = SelectionArguments(selector=str(path)).callback({})
        assert callback.selector == FixedSelection({"sums": 1})
        with pytest.raises(UsageError, match="has no options"):
            SelectionArguments(selector=str(path), selector_options=["a=1"]).callback({})

    def test_strategies_are_read(self):
        arguments = SelectionArguments(
            estimator="GaussNewton", estimator_options=["curvature=empirical"], warmup=0.5
        )
        callback = arguments.callback({})
        assert callback.estimator == GaussNewton(curvature="empirical")
        assert callback.warmup == 0.5


class TestMixture:
    @pytest.mark.parametrize(
        ("entries", "names"),
        [
            ([{"path": "me/a"}, {"path": "me/b", "name": "main"}], ["me/a", "me/b/main"]),
            ([{"path": "me/a", "task": "gsm"}, {"path": "me/b"}], ["gsm", "me/b"]),
            ([{"path": "me/a"}, {"path": "me/a", "split": "extra"}], ["me/a", "me/a:extra"]),
            ([{"path": "me/a"}, {"path": "me/a"}], ["me/a", "me/a (2)"]),
            ([{"path": "me/a"}, {"path": "me/b", "task": "me/a"}], ["me/a (2)", "me/a"]),
            ([{"path": "json", "data_files": "x/a.jsonl"}, {"path": "json", "data_files": ["b.json"]}], ["x/a", "b"]),
            ([{"path": "me/a", "data_files": {"train": "a.json"}}], ["me/a/a"]),
            ([{"path": "csv", "data_dir": "tables/"}], ["tables"]),
            ([{"path": "sums/train.jsonl"}], ["sums/train"]),
        ],
    )  # fmt: skip
    def test_every_entry_has_a_name_of_its_own(self, entries, names):
        assert TaskMixture(datasets=entries).names == names

    def test_the_entries_that_were_given_stay(self):
        entries = [{"path": "me/a", "task": "gsm"}]
        TaskMixture(datasets=entries)
        assert entries == [{"path": "me/a", "task": "gsm"}]

    def test_sources_are_entries_that_trl_takes(self):
        mixture = TaskMixture(
            datasets=[{"path": "sums/train.jsonl"}, {"path": "letters", "task": "x"}]
        )
        again = DatasetMixtureConfig(datasets=[*mixture.sources.values()])
        assert again.datasets[0].data_files == "sums/train.jsonl"
        prompts = [p for rows in mixture.load().values() for p in rows["prompt"]]
        assert prompts == get_dataset(again)["train"]["prompt"][:]

    def test_fractions_take_the_rows_that_trl_takes(self):
        if "fraction" not in DatasetMixtureConfig.__doc__:
            pytest.skip("this release of TRL has no fractions")
        entries = [{"path": "sums", "fraction": 1}, {"path": "letters", "fraction": 3}]
        tasks = TaskMixture(datasets=entries).load()
        assert [len(rows) for rows in tasks.values()] == [4, 12]
        of_trl = get_dataset(DatasetMixtureConfig(datasets=[dict(e) for e in entries]))
        prompts = [p for rows in tasks.values() for p in rows["prompt"]]
        assert prompts == of_trl["train"]["prompt"][:]
        del entries[0]["fraction"]
        with pytest.raises(UsageError, match="each entry a positive `fraction`, or none"):
            TaskMixture(datasets=entries).load()


class TestTarget:
    @pytest.mark.parametrize(
        ("target", "path", "split"),
        [
            ("sums", "sums", "test"),
            ("sums:train", "sums", "train"),
            ("sums:train[:50%]", "sums", "train[:50%]"),
            ("sums:train+test", "sums", "train+test"),
            ("first", "letters", "train"),  # the task by its name; its data have one split
            ("sums/test.jsonl", "json", "train"),
            ({"path": "json", "data_files": "sums/test.jsonl"}, "json", "train"),
            ({"path": "sums"}, "sums", "test"),
            ("hf://datasets/me/a:test", "hf://datasets/me/a", "test"),
            ("me/a:test", "me/a", "test"),
        ],
    )
    def test_path_and_split(self, target, path, split):
        mixture = TaskMixture(datasets=[{"path": "letters", "task": "first"}, {"path": "sums"}])
        entry = target_entry(target, mixture, config=None, split="test")
        assert (entry.path, entry.split) == (path, split)

    def test_configuration_and_columns_are_those_of_the_task(self):
        mixture = TaskMixture(datasets=[{"path": "me/a", "name": "main", "columns": ["text"]}])
        entry = target_entry("me/a:test", mixture, config=None, split="test")
        assert (entry.name, entry.columns) == ("main", ["text"])
        assert target_entry("me/a:test", mixture, config="b", split="test").name == "b"

    def test_a_split_that_is_not_there(self):
        with pytest.raises(UsageError, match=r"has no split 'dev', but \['train', 'test'\]; give"):
            target_entry("sums", TaskMixture(), config=None, split="dev")
