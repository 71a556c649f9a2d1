"""Each situation of docs/limits.md has a verdict and a test, and each warning is explained there."""

import ast
import re
from pathlib import Path

import pytest

from hf_auxselect.estimators.reliability import RELIABILITY_CHECKS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "limits.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TEXT.partition("## All situations")[2].splitlines()
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


def test_no_situation_is_lost():
    assert len(ROWS) >= 106


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_row_is_held_by_a_test(row):
    _, verdict, _, tests = row
    assert re.split(", ", verdict)[0] in ("supported", "warned", "refused")
    for test in tests.split(", "):
        file, _, name = test.strip("`").partition("::")
        assert name in names_of(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize("check", RELIABILITY_CHECKS, ids=lambda check: check.diagnostic)
def test_a_warning_of_the_report_is_explained_with_its_limit(check):
    stated = re.search(rf"^\| `{check.diagnostic}` \| ([\d./]+) \|", TEXT, re.MULTILINE)
    assert stated, f"docs/limits.md does not explain {check.diagnostic}"
    above, _, below = stated[1].partition("/")
    assert float(above) / float(below or 1) == pytest.approx(check.limit)


def test_the_table_of_diagnostics_has_the_limits_of_the_package():
    text = (ROOT / "docs" / "accuracy.md").read_text()
    (header,) = re.findall(r"^\|.*Spearman.*`terms_over_loss`.*$", text, re.MULTILINE)
    (last,) = re.findall(r"^\| \*limit\* .*$", text, re.MULTILINE)
    limits = {check.diagnostic: check.limit for check in RELIABILITY_CHECKS}
    for name, stated in zip(
        re.findall(r"`(\w+)`", header), re.findall(r"\*([\d%]+)\*", last), strict=True
    ):
        unit = 100 if stated.endswith("%") else 1
        assert float(stated.rstrip("%")) / unit == pytest.approx(limits[name], abs=0.005)
