"""The notebook runs from top to bottom, and is kept without outputs."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

PATH = Path(__file__).parent.parent / "recipes" / "notebook.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_runs(notebook, tiny_model, tmp_path, monkeypatch):
    """As Jupyter runs it, with other parameters in a cell behind those of the notebook."""
    (at,) = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    parameters = f"MODEL = {tiny_model!r}; OUTPUT_DIR = 'out'; NUM_ROWS = 8; MAX_STEPS = 5"
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(parameters))
    root = str(PATH.parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()

    shown = {
        cell.id: "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "gradient pass after step 2" in shown["preview"]
    assert "target loss:" in shown["train"]
    assert "all tasks" in shown["estimates"]
    assert "shuffled answers" in shown["shares"]
    assert "IFrame" in shown["page"]
    assert (tmp_path / "out" / "_task_selection" / "report" / "index.html").is_file()
    loss = float(shown["what-if"].split()[0])
    assert 0 < loss < 10
