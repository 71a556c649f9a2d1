"""The package as a whole: imports, layout, public names."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import entry_points, files
from pathlib import Path

import pytest

import hf_auxselect

PACKAGE = Path(hf_auxselect.__file__).parent

# Modules of the package that each may import. Data flows one way: trainer -> gradients -> store ->
# estimates -> selection -> mixture -> trainer, and everything -> report.
LAYOUT = {
    "__init__": set(),  # names are imported when they are used
    "distributed": set(),
    "doubts": set(),
    "files": set(),
    "fingerprint": set(),
    "memory": set(),
    "packing": set(),
    "seeds": set(),
    "mixture": {"packing", "seeds"},
    "projection": {"seeds"},
    "scalars": {"memory"},
    "schedule": {"files"},
    "selectors": {"seeds"},
    "store": {"files"},
    "data": {"mixture", "scalars"},
    "estimators": {"files", "seeds", "store"},
    "optimizer_state": {"schedule"},
    "per_example": {"memory", "scalars"},
    "gradient_check": {"memory", "per_example", "scalars"},
    "report": {"doubts", "estimators", "files", "selectors", "store"},
    "switch": {"mixture", "optimizer_state", "schedule"},
    "checkpoints": {"files", "report", "switch"},
    "evaluation": {"data", "distributed", "memory", "scalars", "switch"},
    "gradients": {
        "distributed",
        "files",
        "fingerprint",
        "gradient_check",
        "memory",
        "optimizer_state",
        "per_example",
        "projection",
        "scalars",
        "schedule",
        "seeds",
        "store",
    },
    "look_ahead": {
        "distributed",
        "gradients",
        "memory",
        "optimizer_state",
        "per_example",
        "projection",
        "scalars",
        "schedule",
        "store",
    },
    "plan": {
        "__init__",
        "data",
        "estimators",
        "evaluation",
        "files",
        "fingerprint",
        "gradient_check",
        "gradients",
        "mixture",
        "per_example",
        "seeds",
        "selectors",
        "switch",
    },
    "verification": {
        "distributed",
        "estimators",
        "evaluation",
        "mixture",
        "optimizer_state",
        "report",
        "schedule",
        "selectors",
        "switch",
    },
    "gradient_pass": {
        "data",
        "distributed",
        "estimators",
        "evaluation",
        "gradient_check",
        "gradients",
        "look_ahead",
        "memory",
        "optimizer_state",
        "plan",
        "projection",
        "scalars",
        "store",
        "switch",
    },
    "callback": {
        "checkpoints",
        "data",
        "distributed",
        "estimators",
        "files",
        "gradient_pass",
        "mixture",
        "plan",
        "report",
        "selectors",
        "store",
        "switch",
        "verification",
    },
    "script": {"callback", "files", "plan", "report"},
    "cli": {"report", "script"},
}


def module_of(path):
    """A package's files count as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Modules of the package that a file imports when it is run."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = [
        child
        for node in tree.body
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            if node.module == "hf_auxselect":
                names = {alias.name for alias in node.names}
                found |= {
                    name if (PACKAGE / f"{name}.py").exists() else "__init__" for name in names
                }
            elif node.module and node.module.startswith("hf_auxselect."):
                found.add(node.module.split(".")[1])
    return found


def test_modules_import_only_what_the_layout_allows():
    modules: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        modules.setdefault(module_of(path), set()).update(imports_of(path) - {module_of(path)})
    assert set(modules) == set(LAYOUT)
    for module, imports in modules.items():
        assert imports <= LAYOUT[module], f"{module} imports {imports - LAYOUT[module]}"


def test_only_these_modules_know_transformers():
    knowing = {
        module_of(path)
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert knowing == {
        "callback",
        "checkpoints",
        "data",
        "evaluation",
        "gradient_pass",
        "memory",
        "plan",
        "script",
        "switch",
        "verification",
        "per_example",
    }  # memory for GradientCheckpointingLayer, per_example for Conv1D alone


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
    assert seen - {"annotations", "TYPE_CHECKING", "Any"} == set(hf_auxselect.__all__)


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
