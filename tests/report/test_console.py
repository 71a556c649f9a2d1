"""The report in a terminal, and as tables of plain values."""

import io
import re
import sys
from dataclasses import replace

import pytest

from hf_auxselect import SelectionReport
from hf_auxselect.report import Measurement
from hf_auxselect.report.console import for_stream
from hf_auxselect.report.content import Finalist, Race, Row, TaskSummary
from hf_auxselect.report.table_rows import table_rows

HOSTILE = "[bold red]x[/] :warning: \x1b[31m\n\u202e" + "long " * 60


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def report():
    return SelectionReport(
        weights={"sums": 0.75, HOSTILE: 0.25, "letters": 0.0},
        rows=[
            Row(name="chosen", loss=1.25, low=1.2, high=1.3),
            Row(name="all tasks", loss=1.5, low=1.4, high=1.6),
            Row(name="all without letters", left_out="letters", loss=1.41234567, low=1.3, high=1.5),
        ],
        difference=Row(name="difference", loss=-0.25, low=-0.3, high=-0.2),
        verification=[
            Measurement(
                name="chosen",
                weights={},
                estimated=1.25,
                low=1.2,
                high=1.3,
                measured=1.28,
                seconds=3.0,
            )
        ],
        warnings=["few examples."],
    )


@pytest.fixture(autouse=True)
def _a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_file_and_a_terminal_without_rich_get_plain_text(report, monkeypatch):
    assert for_stream(report, io.StringIO()) == report.to_text()
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert for_stream(report, Terminal()) == report.to_text()


def test_a_terminal_gets_tables_with_chosen_tasks_in_bold(report):
    pytest.importorskip("rich", reason="rich is not installed")
    shown = for_stream(report, Terminal())
    assert "\x1b[1msums" in shown
    assert "\x1b[2mletters" in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "\x1b" not in plain  # nor do names bring escape sequences
    assert re.search(r"letters +0\.0% +1\.4123 +\[1\.3000, 1\.5000\]", plain)
    assert re.search(r"chosen +1\.2800 +1\.2500 +\[1\.2000, 1\.3000\]", plain)
    assert report.compared_with_all_tasks() in " ".join(plain.split())
    assert "Warning: few examples." in plain
    assert r"[bold red]x[/] :warning: \x1b[31m\n\u202e" in plain
    assert max(map(len, plain.splitlines())) <= 100


def test_no_colour_if_the_user_wants_none(report, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("NO_COLOR", "1")
    colours = re.findall(r"\x1b\[[\d;]*3\dm", for_stream(report, Terminal()))
    assert not colours


def test_without_estimates_there_are_shares_alone():
    pytest.importorskip("rich", reason="rich is not installed")
    fixed = SelectionReport(weights={"a": 1.0, "b": 0.0})
    shown = for_stream(fixed, Terminal())
    assert "Selected 1 of 2 tasks" in shown
    assert "loss" not in shown
    assert table_rows(fixed) == {
        "tasks": [
            {"task": "a", "share": 1.0, "chosen": True},
            {"task": "b", "share": 0.0, "chosen": False},
        ]
    }


def test_tables_hold_what_the_report_shows(report):
    found = table_rows(report)
    assert list(found) == ["estimates", "tasks", "ground_truth_runs"]
    assert found["estimates"][0] == {"trained on": "chosen", "loss": 1.25, "low": 1.2, "high": 1.3}
    assert found["tasks"][1]["task"] == HOSTILE
    assert found["tasks"][2] == {
        "task": "letters",
        "share": 0.0,
        "chosen": False,
        "loss without it": 1.4123,
        "low": 1.3,
        "high": 1.5,
    }
    assert found["ground_truth_runs"][0]["measured"] == 1.28


def test_a_terminal_shows_what_the_text_has(report):
    pytest.importorskip("rich", reason="rich is not installed")
    losses = {"before": {"safety": 2.125}, "all": {"safety": 2.25}, "chosen": {"safety": 2.375}}
    chosen, everything, without = report.rows
    report.rows = [
        Row(name="no further training", loss=2, low=1, high=3, group_losses=losses["before"]),
        replace(chosen, group_losses=losses["chosen"]),
        replace(everything, group_losses=losses["all"]),
        without,
        Row(name="chosen and letters", added="letters", loss=1.875, low=1, high=2),
    ]
    report.groups = [TaskSummary(name="safety", rows=9, captured=9, label_tokens=9, loss=2.125)]
    report.shadow_prices = {"safety": 0.125}
    report.layers = {
        "selection": {"method": "snr", "names": [], "training": "freeze"},
        "scores": {"model.layers.0": 1.0, "model.layers.1": 0.5},
        "rates": {"model.layers.0": 1.0, "model.layers.1": 0.0},
    }
    report.calibration = [replace(report.verification[0], name="spread", measured=1.375)]
    text = report.to_text()
    shown = " ".join(re.sub(r"\x1b\[[\d;]*m", "", for_stream(report, Terminal())).split())
    for one in (text, shown):
        for number in ("2.1250", "2.2500", "2.3750", "0.125", "1.3750", "[1.3000, 1.5000]"):
            assert number in one, number
        for told in ("safety", "spread", "1 of 2 layers are kept by snr", "before calibration"):
            assert told in one, told
        assert "1.8750" not in one and "chosen and letters" not in one


def test_a_loss_that_is_not_finite_is_no_missing_one(report):
    finalists = [
        Finalist(name=name, weights={}, losses=losses, seconds=1.0)
        for name, losses in [
            ("good", [1.5, 1.25]),
            ("diverged", [1.5, None]),
            ("all tasks", [1.75]),
        ]
    ]
    report.confirmation = Race(
        finalists=finalists, steps=[4, 8], winner="good", choice="good", asked=3, share=1.0
    )
    rows = table_rows(report)["finalists"]
    assert [row["step 8"] for row in rows] == [1.25, "not finite", ""]
    assert "not finite" in report.to_text()
