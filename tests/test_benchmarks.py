"""The benchmarks can be started; what they measure takes hours and is no test."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from hf_auxselect.capture.scalars import SCALARS, add_scalar

ROOT = Path(benchmarks.__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if not m.ispkg]


@pytest.mark.parametrize("name", MODULES)
def test_its_imports_are_there(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "sklearn":  # of the extra "bench"
            raise
        pytest.skip("needs scikit-learn")
    assert module.__doc__


def test_they_start_from_a_checkout():
    command = [sys.executable, "-m", "benchmarks.cost.large_store", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--num_examples" in done.stdout


def test_a_scalar_of_ones_own_keeps_its_name(monkeypatch):
    from benchmarks.accuracy.ablations import signed_token_margins

    monkeypatch.delitem(SCALARS, "token_margins", raising=False)
    for _ in range(2):
        add_scalar("token_margins", signed_token_margins)
    with pytest.raises(ValueError, match="'loss' is that of another scalar"):
        add_scalar("loss", signed_token_margins)
