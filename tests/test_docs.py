"""What the documents say is so: their code runs, their commands and links exist."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import tiny
from trl import SFTConfig, SFTTrainer

from hf_auxselect import TaskSelectionCallback, cli, concatenate_tasks

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for folder in (".", "recipes", "benchmarks", "model_cards")
    for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def test_the_code_of_the_readme_runs(run_dir):
    (code,) = blocks("python")
    names = {
        "gsm": tiny.sums(12, 1),
        "alpaca": tiny.sums(12, 2, letters=True),
        "code": tiny.sums(12, 3, shuffled=True),
        "target": tiny.sums(8, 9),
        "model": tiny.llama(),
        "args": SFTConfig(str(run_dir), **tiny.ARGUMENTS | {"max_length": 32}),
        "lora": tiny.lora(),
    }

    def trainer(model, args, **options):
        return SFTTrainer(model, args, processing_class=tiny.tokenizer(), **options)

    exec(code, names | {"SFTTrainer": trainer}, names)
    report = names["callback"].report
    assert set(report.weights) == {"gsm", "alpaca", "code"}
    # The line about what-if estimates.
    (call,) = re.findall(r"`(callback\.report\.estimate\(.*?\)\.loss)`", README)
    assert eval(call, names)[0] > 0


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = concatenate_tasks(
        {"sums of two": tiny.sums(12, 1), "letters": tiny.sums(12, 2, letters=True)}
    )
    callback = TaskSelectionCallback()
    trainer = tiny.sft_trainer("outputs/demo/selected", callback, train_dataset=train)
    trainer.train()
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("hf-auxselect ")
    ]
    assert len(commands) == 2
    for _, *arguments in commands:
        assert cli.main(arguments) == 0
        assert "letters" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE))
    assert targets
    for target in {one or other for one, other in targets}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_of_options_names_arguments():
    arguments = inspect.signature(TaskSelectionCallback).parameters
    table = re.search(r"^\| option \|.*?\n\n", README, re.DOTALL | re.MULTILINE)[0]
    options = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert len(options) >= 5
    assert set(options) <= set(arguments)
    assert arguments["warmup"].default == 0.2 and "default 0.2" in table
    assert arguments["examples_per_task"].default == 256 and "default 256" in table


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    for name in re.findall(r"(?<![/\w])(?:recipes|benchmarks|tests|hf_auxselect)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
