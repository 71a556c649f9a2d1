import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_auxselect import GradientStore, LinearizedTraining, SelectionReport
from hf_auxselect._version import __version__
from hf_auxselect.cli import main
from hf_auxselect.files import to_json

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of a recorded run, so that nothing is trained here."""
    directory = tmp_path_factory.mktemp("run") / "_task_selection"
    shutil.copytree(TESTS / "recorded" / "restart", directory)
    return directory


def test_report(directory, capsys):
    page = directory / "report" / "README.md"
    page.unlink()
    assert main(["report", str(directory)]) == 0
    assert page.is_file()
    assert capsys.readouterr().out.startswith("Selected")


def test_what_if(directory, capsys):
    assert main(["what-if", str(directory), "--tasks", "a,c", "--tasks", "a=1,b=3"]) == 0
    fitted = LinearizedTraining().fit(GradientStore.load(directory / "gradients"))
    subset, mixture = capsys.readouterr().out.splitlines()
    assert subset.split()[:2] == [
        "a,c",
        f"{fitted.estimate([[True, False, True, False]]).loss[0]:.4f}",
    ]
    assert mixture.split()[:2] == ["a=1,b=3", f"{fitted.estimate([[1, 3, 0, 0]]).loss[0]:.4f}"]


def test_json_for_scripts(directory, capsys):
    assert main(["report", str(directory), "--json"]) == 0
    report = SelectionReport.load(directory)
    assert json.loads(capsys.readouterr().out) == json.loads(to_json(report.to_dict()))
    assert main(["what-if", str(directory), "--tasks", "a,c", "--tasks", "a=1,b=3", "--json"]) == 0
    subset, mixture = json.loads(capsys.readouterr().out)
    assert subset["tasks"] == ["a", "c"]
    assert mixture["tasks"] == {"a": 1, "b": 3}
    for told in (subset, mixture):
        estimate = report.estimate(told["tasks"])
        assert [told["loss"], told["low"], told["high"]] == [
            estimate.loss[0],
            estimate.low[0],
            estimate.high[0],
        ]


class TestUnusualNames:
    """With commas, equality signs and spaces: the tasks are "a,b", "x=1", "x" and "sums of two"."""

    @pytest.fixture
    def renamed(self, directory, tmp_path):
        copy = tmp_path / "renamed"
        shutil.copytree(directory, copy)
        names = dict(zip("abcd", ["a,b", "x=1", "x", "sums of two"], strict=True))
        for path in (copy / "report" / "report.json", copy / "gradients" / "index.json"):
            content = json.loads(path.read_text())

            def rename(value):
                if isinstance(value, dict):
                    return {names.get(k, k): rename(v) for k, v in value.items()}
                if isinstance(value, list):
                    return [rename(v) for v in value]
                return names.get(value, value) if isinstance(value, str) else value

            path.write_text(json.dumps(rename(content)))
        return copy

    @pytest.mark.parametrize(
        ("arguments", "weights"),
        [
            (["--task", "a,b"], [True, False, False, False]),
            (["--task", "a,b", "--task", "sums of two"], [True, False, False, True]),
            (["--task", "x=1", "--task", "x"], [False, True, True, False]),
            (["--task", "x=1=3", "--task", "x=2"], [0, 3, 2, 0]),
            (["--task", "a,b=1", "--task", "sums of two=3"], [1, 0, 0, 3]),
            (["--tasks", "x=1,sums of two"], [False, True, False, True]),
            (["--tasks", "x, sums of two"], [False, False, True, True]),
        ],
    )
    def test_each_is_given_by_itself(self, arguments, weights, renamed, directory, capsys):
        assert main(["what-if", str(renamed), *arguments]) == 0
        fitted = LinearizedTraining().fit(GradientStore.load(directory / "gradients"))
        expected = fitted.estimate([weights]).loss[0]
        assert f"  {expected:.4f}  [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["report", "nowhere"], "no selection report in 'nowhere'"),
        (["what-if", "{}", "--tasks", "a,x"], "unknown task 'x'"),
        (["what-if", "{}", "--tasks", "a=1,b"], "'b' is not name=weight"),
        (["what-if", "{}", "--task", "a,c"], "unknown task 'a,c'"),
        (["what-if", "{}", "--task", "a", "--task", "c=2"], "--task: 'a' is not name=weight"),
        (["what-if", "{}", "--task", "a", "--task", "a"], "--task names the task 'a' more than"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(arguments, reason, directory, capsys):
    assert main([argument.format(directory) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-auxselect: ")
    assert reason in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["what-if", "x"],
        ["verify", "x", "--num", "0", "y.py"],
        ["select", "x"],
        ["export", "x", "--format", "mosaic"],
        ["push", "x"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    "command", ["", "report", "what-if", "select", "verify", "export", "push", "sft"]
)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: hf-auxselect {command}".strip() in told
    assert f"example: hf-auxselect {command}".strip() in told
    assert not command or "--json" in told


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"hf-auxselect {__version__}\n"


def modules_after(*arguments, environment=None):
    """What a command has imported at its end."""
    code = (
        "import sys\n"
        "from hf_auxselect.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as exit_:\n"
        "    code = exit_.code\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        ["what-if", "--tasks", "a"],
        ["select", "--selector", "ForwardSelection", "--option", "max_tasks=2"],
        ["export", "--format", "trl"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_stored_run_needs_neither_torch_nor_transformers(arguments, directory):
    loaded = modules_after(arguments[0], str(directory), *arguments[1:])
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "huggingface_hub"}


def test_help_needs_not_even_numpy():
    assert "numpy" not in modules_after("what-if", "--help")


def test_a_reader_that_has_seen_enough_gets_no_error(directory):
    command = [sys.executable, "-m", "hf_auxselect.cli", "report", str(directory), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


class TestExport:
    """The command; what it writes is tested with the report."""

    @pytest.fixture
    def asked(self, monkeypatch):
        asked = []

        def export(self, format, *, sources=None):
            asked.append((self.selected, format, sources))
            return "datasets:\n- path: x\n"

        monkeypatch.setattr(SelectionReport, "export", export, raising=False)
        return asked

    def test_it_is_printed(self, asked, directory, capsys):
        assert main(["export", str(directory), "--format", "trl"]) == 0
        assert capsys.readouterr().out == "datasets:\n- path: x\n"
        assert asked == [(SelectionReport.load(directory).selected, "trl", None)]

    def test_it_is_written(self, asked, directory, tmp_path, capsys):
        sources, output = tmp_path / "sources.json", tmp_path / "mixture.yaml"
        sources.write_text('{"a": {"path": "my/a", "split": "train"}}')
        command = ["export", str(directory), "--format", "axolotl", "--output", str(output)]
        assert main([*command, "--sources", str(sources), "--json"]) == 0
        assert output.read_text() == "datasets:\n- path: x\n"
        assert json.loads(capsys.readouterr().out) == {
            "format": "axolotl",
            "output": str(output),
            "content": None,
        }
        assert asked[0][2] == {"a": {"path": "my/a", "split": "train"}}

    @pytest.mark.parametrize("sources", ["[]", '{"a": "my/a"}', "{", '{"a": {"fraction": NaN}}'])
    def test_damaged_sources(self, sources, asked, directory, tmp_path, capsys):
        path = tmp_path / "sources.json"
        path.write_text(sources)
        command = ["export", str(directory), "--format", "trl", "--sources", str(path)]
        assert main(command) == 1
        assert f"{path}: damaged" in capsys.readouterr().err
        assert not asked


class TestPush:
    """The command; what it uploads is tested with the report."""

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            ([], {"repo_type": "model", "private": None, "revision": None}),
            (
                ["--repo-type", "dataset", "--private", "--revision", "v1"],
                {"repo_type": "dataset", "private": True, "revision": "v1"},
            ),
            (["--no-private"], {"repo_type": "model", "private": False, "revision": None}),
        ],
    )
    def test_it_prints_where_the_report_is(
        self, arguments, options, directory, capsys, monkeypatch
    ):
        def push_to_hub(self, repo_id, **given):
            assert (repo_id, given) == ("me/model", options)  # no token: that of the environment
            return "https://huggingface.co/me/model"

        monkeypatch.setattr(SelectionReport, "push_to_hub", push_to_hub, raising=False)
        command = ["push", str(directory), "me/model", *arguments]
        assert main(command) == 0
        assert capsys.readouterr().out == "https://huggingface.co/me/model\n"
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["url"] == "https://huggingface.co/me/model"

    def test_a_token_is_refused_and_not_repeated(self, directory, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(["push", str(directory), "me/model", "--token", "hf_secret"])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert "set HF_TOKEN" in error and "hf_secret" not in error

    def test_what_the_hub_refuses_is_one_line(self, directory, capsys, monkeypatch):
        def push_to_hub(self, repo_id, **options):
            raise OSError("403: no right to write to 'me/model';\nlog in by hf auth login.")

        monkeypatch.setattr(SelectionReport, "push_to_hub", push_to_hub, raising=False)
        assert main(["push", str(directory), "me/model"]) == 1
        error = capsys.readouterr().err
        assert (
            error
            == "hf-auxselect: 403: no right to write to 'me/model'; log in by hf auth login.\n"
        )


class TestCompletion:
    def completed(self, line, tmp_path, directory):
        answer = tmp_path / "answer"
        line = line.format(directory)
        environment = {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_SHELL": "fish",  # which quotes nothing
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        subprocess.run(
            [sys.executable, "-m", "hf_auxselect.cli"],
            env=os.environ | environment,
            timeout=60,
            check=False,
            stderr=subprocess.DEVNULL,
        )
        return [word.split("\t")[0].strip() for word in answer.read_text().splitlines()]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("hf-auxselect wh", ["what-if"]),
            ("hf-auxselect export {} --format ll", ["llamafactory"]),
            ("hf-auxselect what-if {} --task ", ["a", "b", "c", "d"]),
            ("hf-auxselect what-if {} --tasks a,c,", ["a,c,b", "a,c,d"]),
            ("hf-auxselect select {} --selector Ran", ["RandomEnsemble"]),
            ("hf-auxselect what-if nowhere --task ", []),
        ],
    )
    def test_of_commands_options_and_tasks(self, line, words, tmp_path, directory):
        pytest.importorskip("argcomplete", reason="an optional package, of the extra cli")
        assert self.completed(line, tmp_path, directory) == words

    def test_without_argcomplete_nothing_happens(self, monkeypatch, capsys):
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        monkeypatch.setitem(sys.modules, "argcomplete", None)
        with pytest.raises(SystemExit):
            main(["--version"])
        assert __version__ in capsys.readouterr().out


class TestVerify:
    """With a script that is run again from the checkpoint at the switch."""

    SCRIPT = """
import sys
import tiny
from hf_auxselect import TaskSelectionCallback

tiny.sft_trainer(sys.argv[1] + "/other", max_steps=1).train()  # another trainer is left alone
callback = TaskSelectionCallback(warmup=4, projection_dim=16)
trainer = tiny.sft_trainer(sys.argv[1], callback, save_strategy="steps", save_steps=4)
trainer.train()
print("ended with", trainer.evaluate()["eval_loss"])
"""

    @pytest.fixture
    def script(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(TESTS))
        path = tmp_path / "train.py"
        path.write_text(self.SCRIPT)
        return path

    def test_it_measures_what_the_run_ended_with(self, script, run_dir, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [str(script), str(run_dir)])
        runpy.run_path(str(script), run_name="__main__")
        ended = float(capsys.readouterr().out.split("ended with ")[1].split()[0])
        before = sorted(path.name for path in run_dir.iterdir())
        directory = run_dir / "_task_selection"
        for num in (1, 3):  # a second time, too
            command = ["verify", str(directory), "--num", str(num), str(script), str(run_dir)]
            assert main(command) == 0
            output = capsys.readouterr().out
            assert "Ground-truth runs: measured loss" in output
            assert "ended with" not in output
            report = SelectionReport.load(directory)
            assert len(report.verification) == num
            assert report.verification[0].measured == ended
        assert sorted(path.name for path in run_dir.iterdir()) == before

    def test_what_fails_leaves_the_earlier_result(self, script, run_dir, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", [str(script), str(run_dir)])
        runpy.run_path(str(script), run_name="__main__")
        directory = run_dir / "_task_selection"
        command = ["verify", str(directory), "--num", "1", str(script), str(run_dir)]
        assert main(command) == 0
        before = (directory / "report" / "report.json").read_bytes()
        monkeypatch.setattr(
            "hf_auxselect.trainer.trial_runs.TrialRun.train_to",
            lambda self, step, progress: (_ for _ in ()).throw(OSError("disk full")),
        )
        command[3] = "2"  # the first run is known
        assert main(command) == 1
        text = script.read_text()
        script.write_text(text.replace("warmup=4,", "warmup=4, estimator=GradExLogistic(),"))
        script.write_text("from hf_auxselect import GradExLogistic\n" + script.read_text())
        capsys.readouterr()
        assert main(command) == 1
        reason = capsys.readouterr().err
        assert "the script's options differ from those of the selection: estimator (" in reason
        assert "'GradExLogistic'" in reason
        assert (directory / "report" / "report.json").read_bytes() == before

    def test_a_callback_with_a_directory_of_its_own(self, script, run_dir, tmp_path, monkeypatch):
        """The checkpoints are the trainer's."""
        own = tmp_path / "own"
        script.write_text(
            script.read_text().replace("warmup=4,", f"warmup=4, output_dir={str(own)!r},")
        )
        monkeypatch.setattr(sys, "argv", [str(script), str(run_dir)])
        runpy.run_path(str(script), run_name="__main__")
        directory = own / "_task_selection"
        assert main(["verify", str(directory), "--num", "1", str(script), str(run_dir)]) == 0
        assert len(SelectionReport.load(directory).verification) == 1

    def test_what_cannot_be_verified(self, script, directory, tmp_path, capsys):
        run = str(directory.parent)
        for command, reason in [
            (["verify", str(directory), "nothing.py"], "no such script: 'nothing.py'"),
            (["verify", str(tmp_path), str(script)], "is not the _task_selection directory"),
            (["verify", str(directory), str(script), run], "Keep it (save_steps=4)"),
        ]:
            assert main(command) == 1
            assert reason in capsys.readouterr().err

    def test_a_script_of_another_run(self, directory, tmp_path, capsys):
        script = tmp_path / "nothing.py"
        script.write_text("")
        assert main(["verify", str(directory), str(script)]) == 1
        assert "ended without training" in capsys.readouterr().err
