"""``hf-auxselect select``, and runs that follow what it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from hf_auxselect import (
    BackwardElimination,
    BeamSearch,
    FixedSelection,
    ForwardSelection,
    GradientCoreset,
    RandomEnsemble,
    SelectionReport,
    TaskSelectionCallback,
)
from hf_auxselect.cli import main
from hf_auxselect.selectors import selection_problem

RECORDED = Path(__file__).parent.parent / "recorded"


@pytest.fixture
def directory(tmp_path):
    """Of a recorded run with the tasks a, b, c and d."""
    directory = tmp_path / "_task_selection"
    shutil.copytree(RECORDED / "continue", directory)
    return directory


def select(directory, capsys, *arguments):
    assert main(["select", str(directory), *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def chosen_by(selector, directory, keep=()):
    report = SelectionReport.load(directory)
    fitted = report.fitted()
    problem = selection_problem(fitted, report.gradients(), keep=keep)
    return selector.select(problem), fitted


@pytest.mark.parametrize(
    ("arguments", "selector"),
    [
        (["ForwardSelection"], ForwardSelection()),
        (["ForwardSelection", "--option", "max_tasks=1"], ForwardSelection(max_tasks=1)),
        (["BackwardElimination", "--option", "min_tasks=3"], BackwardElimination(min_tasks=3)),
        (
            ["RandomEnsemble", "--option", "num_subsets=20", "--option", "top_k=2"],
            RandomEnsemble(num_subsets=20, top_k=2),
        ),
        (
            ["RandomEnsemble", "--option", "num_subsets=none", "--option", "threshold=2"],
            RandomEnsemble(num_subsets=None, threshold=2.0),
        ),
        (
            ["RandomEnsemble", "--option", "threshold=cross-validation"],
            RandomEnsemble(threshold="cross-validation"),
        ),
        (["BeamSearch", "--option", "width=2"], BeamSearch(width=2)),
        (["BackwardElimination", "--option", "lazy=true"], BackwardElimination(lazy=True)),
        (["GradientCoreset", "--option", "size=2"], GradientCoreset(size=2)),
        (["FixedSelection", "--option", "tasks=a,c"], FixedSelection(["a", "c"])),
        (["FixedSelection", "--option", "tasks=a=1,c=3"], FixedSelection({"a": 1, "c": 3})),
        (
            ["FixedSelection", "--option", 'tasks=["d"]', "--option", "estimate=false"],
            FixedSelection(["d"], estimate=False),
        ),
    ],
)
def test_it_chooses_as_the_selector_does(arguments, selector, directory, capsys):
    selection, fitted = chosen_by(selector, directory)
    told = select(directory, capsys, "--selector", *arguments)
    weights = np.array([[*told["weights"].values()]])
    assert told["weights"] == selection.weights
    assert told["selected"] == selection.selected
    assert told["estimated_loss"] == fitted.estimate(weights).loss[0]
    difference = fitted.difference(weights, np.ones(4, bool))
    assert told["difference"] == {
        "loss": difference.loss[0],
        "low": difference.low[0],
        "high": difference.high[0],
    }
    assert told["selector"]["name"] == arguments[0]


def test_it_uses_the_calibration_of_the_run(directory, capsys):
    before = select(directory, capsys, "--selector", "ForwardSelection")
    path = directory / "report" / "report.json"
    report = json.loads(path.read_text())
    run = {"name": "x", "estimated": 1.0, "low": 0.5, "high": 1.5, "measured": 2.0, "seconds": 1.0}
    report["calibration"] = [
        run | {"weights": dict(zip("abcd", weights, strict=True))} for weights in np.eye(4).tolist()
    ]
    path.write_text(json.dumps(report))
    after = select(directory, capsys, "--selector", "FixedSelection", "--option", "tasks=a,b")
    estimate = SelectionReport.load(directory).estimate(after["weights"])
    assert after["estimated_loss"] == estimate.loss[0]
    assert after["estimated_loss_all"] != before["estimated_loss_all"]


def test_keep_is_that_of_the_run_unless_it_is_given(directory, capsys):
    path = directory / "report" / "report.json"
    report = json.loads(path.read_text())
    report["run"]["keep"] = ["d"]
    path.write_text(json.dumps(report))
    one = ["--selector", "ForwardSelection", "--option", "max_tasks=1"]
    assert select(directory, capsys, *one)["selected"] == ["d"]
    assert select(directory, capsys, *one, "--keep", "b")["selected"] == ["b"]


def test_in_words(directory, capsys):
    assert (
        main(["select", str(directory), "--selector", "FixedSelection", "--option", "tasks=a"]) == 0
    )
    told = capsys.readouterr().out
    assert "selects 1 of 4 tasks:\n  a  100.0%\n" in told
    assert "Estimated target loss: " in told and "Chosen mixture minus all tasks: " in told
    assert f"FixedSelection.from_file('{directory}/selection.FixedSelection.json')" in told


class TestFiles:
    def test_the_runs_own_files_stay(self, directory, capsys):
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        told = select(directory, capsys, "--selector", "ForwardSelection")
        output = directory / "selection.ForwardSelection.json"
        assert told["output"] == str(output)
        assert {path for path in directory.rglob("*") if path.is_file()} == {*before, output}
        assert all(path.read_bytes() == content for path, content in before.items())

    def test_another_file_of_this_command_is_replaced(self, directory, capsys, tmp_path):
        output = ["--output", str(tmp_path / "mine.json")]
        for tasks in ("tasks=a", "tasks=b"):
            select(directory, capsys, "--selector", "FixedSelection", "--option", tasks, *output)
        assert FixedSelection.from_file(output[1]).tasks == {"b": 1}

    @pytest.mark.parametrize("name", ["selection.json", "report/README.md"])
    def test_no_other_file_is_replaced(self, name, directory, capsys):
        before = (directory / name).read_bytes()
        command = ["select", str(directory), "--selector", "ForwardSelection", "--output"]
        assert main([*command, str(directory / name)]) == 1
        assert "was not written by this command" in capsys.readouterr().err
        assert (directory / name).read_bytes() == before

    def test_hostile_names_come_back(self, directory, capsys):
        hostile = ['"; rm -rf', "<script>\n- x: 1", "\u202eright to left", "🙂" * 75]
        names = dict(zip("abcd", hostile, strict=True))
        for path in (directory / "report" / "report.json", directory / "gradients" / "index.json"):
            path.write_text(json.dumps(_renamed(json.loads(path.read_text()), names)))
        tasks = "tasks=" + json.dumps(hostile)
        told = select(directory, capsys, "--selector", "FixedSelection", "--option", tasks)
        assert [*FixedSelection.from_file(told["output"]).tasks] == told["selected"] == hostile


class TestARunThatFollows:
    def test_it_trains_on_the_mixture(self, directory, run_dir, capsys):
        told = select(
            directory, capsys, "--selector", "FixedSelection", "--option", "tasks=a=1,c=3"
        )
        selector = FixedSelection.from_file(told["output"], estimate=False)
        callback = tiny.callback(selector=selector)
        tiny.sft_trainer(run_dir, callback, max_steps=5).train()
        assert callback.report.weights == {"a": 0.25, "b": 0, "c": 0.75, "d": 0}

    def test_an_unknown_task_is_told_before_the_first_step(self, run_dir, tmp_path):
        path = tmp_path / "decision.json"
        path.write_text('{"weights": {"a": 0.5, "gsm": 0.5}}')
        callback = TaskSelectionCallback(selector=FixedSelection.from_file(path))
        trainer = tiny.sft_trainer(run_dir, callback)
        with pytest.raises(ValueError, match="unknown task 'gsm'; known are"):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["Forward"], 2, "--selector 'Forward' is unknown; known are ForwardSelection, "),
        (["ForwardSelection", "--option", "max=1"], 2, "--option max: unknown option. ForwardSelection has the options max_tasks: integer or none; min_improvement: number; lazy: true or false."),
        (["ForwardSelection", "--option", "max_tasks=1.5"], 2, "--option max_tasks=1.5: expected integer or none."),
        (["ForwardSelection", "--option", "max_tasks"], 2, "--option 'max_tasks': give an option as name=value."),
        (["ForwardSelection", "--option", "max_tasks=0"], 2, "--option: max_tasks must be an int of at least 1, or None; got 0."),
        (["ExhaustiveSearch", "--option", "x=1"], 2, "ExhaustiveSearch has no options."),
        (["FixedSelection"], 2, "--option tasks=...: this option has no default; give it."),
        (["FixedSelection", "--option", "tasks=e"], 1, "names the unknown task 'e'"),
        (["RandomEnsemble", "--option", "subset_size=9"], 1, "subset_size is 9, but there are 4 tasks"),
        (["ForwardSelection", "--keep", "e"], 1, "keep names the unknown task 'e'"),
    ],
)  # fmt: skip
def test_errors_name_what_was_typed(arguments, code, reason, directory, capsys):
    assert main(["select", str(directory), "--selector", *arguments]) == code
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
    assert not list(directory.glob("selection.*.json"))


def _renamed(value, names):
    if isinstance(value, dict):
        return {names.get(k, k): _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_a_cap_uses_the_rows_that_the_run_goes_on_to_read(directory, capsys):
    options = ["--selector", "MixtureOptimization", "--option", "shrinkage=0"]
    choice = select(directory, capsys, *options, "--option", "max_repetitions=1.5")
    report = SelectionReport.load(directory)
    rows = {task.name: task.rows for task in report.tasks}
    read = sum(report.run["reads_per_row"][name] * rows[name] for name in rows)
    reads = [read * weight / rows[name] for name, weight in choice["weights"].items()]
    assert max(reads) <= 1.5 + 0.01
    assert choice["shadow_prices"] == {} and choice["notes"] == []
