"""What the documents say is so: their code runs, their commands, links and figures exist."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from trl import SFTConfig, SFTTrainer

import hf_auxselect
from hf_auxselect import TaskSelectionCallback, cli, concatenate_tasks

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "recipes", "benchmarks", "model_cards")
    for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]


def named(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(path):
    """The lines of a page's shell blocks, and what else of a command stands in its text."""
    for block in blocks(path, "bash"):
        yield from (line.partition(" #")[0].strip() for line in block.splitlines())
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`((?:make|python|hf-auxselect) [^`]+)`", text)


COMMANDS = sorted({(named(path), line) for path in DOCUMENTS for line in commands(path) if line})


@pytest.mark.parametrize(
    "path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.stem
)
def test_the_code_of_a_page_runs_from_top_to_bottom(path, run_dir, capsys):
    def trainer(model, args, **options):
        return SFTTrainer(model, args, processing_class=tiny.tokenizer(), **options)

    arguments = tiny.ARGUMENTS | {"max_length": 32, "save_strategy": "steps", "save_steps": 1}
    examples = {name: tiny.rows_of([(5, 3), (7, 6), (6, 1)]) for name in ("sums", "facts")}
    names = {
        "SFTTrainer": trainer,
        "gsm": tiny.sums(12, 1),
        "alpaca": tiny.sums(12, 2, letters=True),
        "code": tiny.sums(12, 3, shuffled=True),
        "target": tiny.sums(8, 9),
        "other_target": tiny.sums(6, 8, letters=True),
        "model": tiny.llama(),
        "args": SFTConfig(str(run_dir), **arguments),
        "lora": tiny.lora(),
        # Without a trainer:
        "directory": run_dir / "store",
        "examples": examples,
        "target_examples": examples["sums"],
        "collate_fn": tiny.collate,
    }
    for block in blocks(path, "python"):
        exec(block, names)
    if "trainer" in names:
        report = names["callback"].report
        assert set(report.weights) == {"gsm", "alpaca", "code"}
        for call in re.findall(r"`(callback\.report\.estimate\(.*?\)\.loss)`", path.read_text()):
            assert eval(call, names)[0] > 0


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = concatenate_tasks(
        {"sums of two": tiny.sums(12, 1), "letters": tiny.sums(12, 2, letters=True)}
    )
    callback = TaskSelectionCallback()
    trainer = tiny.sft_trainer("outputs/demo/chosen-0", callback, train_dataset=train)
    trainer.train()
    lines = [line for line in commands(README) if line.startswith("hf-auxselect ")]
    assert lines
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0
        assert "letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", sorted({line for _, line in COMMANDS if line.startswith("hf-auxselect ")})
)
def test_commands_of_the_command_line_exist(line, capsys):
    words = shlex.split(line)
    with pytest.raises(SystemExit) as raised:
        cli.main([words[1], "--help"])
    assert raised.value.code == 0
    options = [word for word in words if word.startswith("--")]
    assert set(options) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    "line", sorted({line for _, line in COMMANDS if line.startswith("python ")})
)
def test_scripts_exist_with_their_options(line):
    words = shlex.split(line)
    name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    assert (ROOT / name).is_file()
    code = (ROOT / name).read_text()
    for option in words[2:]:
        assert not option.startswith("--") or option in code


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for _, line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), target


def check_tables(root):
    return subprocess.run(
        [sys.executable, root / "docs" / "tables.py", "--check"], capture_output=True, text=True
    )


def test_tables_are_those_of_the_results():
    done = check_tables(ROOT)
    assert done.returncode == 0, done.stdout


def test_a_table_that_is_out_of_date_is_named(tmp_path):
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = README.read_text()
    (tmp_path / "README.md").write_text(page)
    assert check_tables(tmp_path).returncode == 0
    (tmp_path / "README.md").write_text(page.replace("(sparse) |", "(small) |"))
    done = check_tables(tmp_path)
    assert done.returncode == 1 and "README.md" in done.stdout


def test_tables_of_options_name_arguments_and_defaults():
    arguments = inspect.signature(TaskSelectionCallback).parameters
    named_in = {}
    for path in (README, ROOT / "docs" / "options.md"):
        table = re.search(r"^\| option \|.*?\n\n", path.read_text(), re.DOTALL | re.MULTILINE)[0]
        rows = re.findall(r"^\| (`[^|]+) \| (.*) \|$", table, re.MULTILINE)
        options = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
        assert set(options) <= set(arguments)
        for name, text in options.items():
            stated = re.findall(r"default ([\d.]+|False)", text)
            assert all(eval(value) == arguments[name].default for value in stated), name
        named_in[path] = set(options)
    assert len(named_in[README]) >= 6
    assert named_in[ROOT / "docs" / "options.md"] == set(arguments)


def test_every_public_name_has_a_place_in_the_api():
    text = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: hf_auxselect\.(\w+)$", text, re.MULTILINE)) == sorted(
        hf_auxselect.__all__
    )


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_auxselect.__version__
    assert {"cff-version", "message", "title", "authors", "references"} <= set(citation)


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("CONTRIBUTING.md", 60)])
def test_short_documents_stay_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_and_paths_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    for name in re.findall(r"(?<![/\w])(?:recipes|benchmarks|tests|hf_auxselect)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
