import subprocess
import sys

import pytest
import tiny

from hf_auxselect import GradientStore, LinearizedTraining, TaskSelectionCallback
from hf_auxselect.cli import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    tiny.sft_trainer(run, TaskSelectionCallback(warmup=4, projection_dim=16)).train()
    return run / "_task_selection"


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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["report", "nowhere"], "no selection report in 'nowhere'"),
        (["what-if", "{}", "--tasks", "a,x"], "unknown task 'x'"),
        (["what-if", "{}", "--tasks", "a=1,b"], "'b' is not name=weight"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(arguments, reason, directory, capsys):
    assert main([argument.format(directory) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-auxselect: ")
    assert reason in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["dance"], ["what-if", "x"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["what-if", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "usage: hf-auxselect" in capsys.readouterr().out


def test_it_needs_neither_torch_nor_transformers(directory):
    code = (
        "import sys; from hf_auxselect.cli import main; "
        f"code = main(['what-if', {str(directory)!r}, '--tasks', 'a']); "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
