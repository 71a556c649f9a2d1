"""Each row of docs/limits.md names a test that exists and a verdict."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (ROOT / "docs" / "limits.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| situation")
]


def names_of(node, *path):
    """The tests and classes below a node, as pytest spells them."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name.lower().startswith(
            "test"
        ):
            yield "::".join([*path, child.name])
            if isinstance(child, ast.ClassDef):
                yield from names_of(child, *path, child.name)


def test_there_are_rows():
    assert len(ROWS) >= 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_row_is_held_by_a_test(row):
    _, verdict, _, tests = row
    assert re.split(", ", verdict)[0] in ("supported", "warned", "refused")
    for test in tests.split(", "):
        file, _, name = test.strip("`").partition("::")
        assert name in names_of(ast.parse((ROOT / file).read_text()))
