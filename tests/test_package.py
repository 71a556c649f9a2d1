"""The package as a whole: imports, layout, public names."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points, files
from pathlib import Path

import pytest

import hf_auxselect

PACKAGE = Path(hf_auxselect.__file__).parent

# Modules and packages; each may import those below it. Data flows one way: trainer -> gradients ->
# store -> estimates -> selection -> mixture -> trainer, and everything -> report.
LAYERS = [
    "cli",
    "script",
    "callback",
    "switch",
    "run",
    "decision",
    "confirmation",
    "publication",
    "run_directory",
    "gradient_pass",
    "verification",
    "ground_truth",
    "leaked_target",
    "plan",
    "dry_run",
    "report",
    "options",
    "reselection",
    "selectors",
    "estimators",
    "trainer",
    "capture",
    "clusters",
    "layers",
    "store",
    "sampler",
    "tasks",
    "packing",
    "fingerprint",
    "seeds",
    "sharding",
    "zero",
    "distributed",
    "files",
    "checks",
    "__init__",  # its names are imported when they are used
    "_version",
]


def module_of(path):
    """A package's files count as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Dotted names within the package of what a file imports when it is run."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in typing_only:
            package, _, module = node.module.partition(".")
            if package == "hf_auxselect":
                for alias in node.names:
                    name = f"{module}.{alias.name}".strip(".")
                    path = PACKAGE / name.replace(".", "/")
                    is_module = path.with_suffix(".py").exists() or path.is_dir()
                    found.add(name if is_module else module or "__init__")
    return found


def test_imports_go_down_the_layers():
    found = {module_of(path) for path in PACKAGE.rglob("*.py")}
    assert found == set(LAYERS)
    for path in PACKAGE.rglob("*.py"):
        own = LAYERS.index(module_of(path))
        for name in imports_of(path):
            assert LAYERS.index(name.split(".")[0]) >= own, f"{path.name} imports {name}"


def test_no_modules_import_each_other():
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports_of(path)
        for path in PACKAGE.rglob("*.py")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {error.args[1]}")


def test_only_these_modules_know_transformers():
    knowing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if module_of(path) != "trainer"
        and any(
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert knowing == {
        "callback.py",
        "capture/memory.py",  # for GradientCheckpointingLayer alone
        "capture/module_gradients.py",  # for Conv1D alone
        "cli/sft.py",  # as TRL's script
        "gradient_pass.py",
        "plan.py",
        "publication.py",
        "run.py",
        "script.py",
        "switch.py",
    }


def test_importing_is_silent_and_imports_nothing_heavy():
    code = (
        "import sys, hf_auxselect; "
        "heavy = {'torch', 'numpy', 'transformers', 'trl', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", hf_auxselect.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(hf_auxselect, name)
    assert value.__doc__
    assert name in dir(hf_auxselect)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen - {"annotations", "TYPE_CHECKING", "Any", "__version__"} == set(
        hf_auxselect.__all__
    )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = hf_auxselect.Nothing


def test_what_the_wheel_brings():
    assert (PACKAGE / "py.typed").is_file()
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "hf-auxselect"]
    assert script.load() is importlib.import_module("hf_auxselect.cli").main
    assert files("hf-auxselect")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_is_unpickled(path):
    text = path.read_text()
    assert "pickle" not in text
    assert "torch.load(" not in text
