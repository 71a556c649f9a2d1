"""Files and numbers of an earlier version: they read the same, and come out the same.

``recorded/record.py`` made them, with version 0.1.0 as of November 2026.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import record

from hf_auxselect import GradientStore, SelectionReport

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("name", record.RUNS)
class TestRecorded:
    def test_estimates_are_the_same(self, name):
        """Bitwise on one machine; other libraries of linear algebra round otherwise."""
        before = json.loads((RECORDED / "estimates.json").read_text())[name]
        now = record.estimates(name, RECORDED / name)
        assert now.keys() == before.keys()
        for estimator in now:
            for what, values in now[estimator].items():
                expected = before[estimator][what]
                np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-8, err_msg=what)

    def test_a_saved_report_is_read(self, name):
        report = SelectionReport.load(RECORDED / name)
        decision = json.loads((RECORDED / name / "selection.json").read_text())
        assert report.selected == decision["selected"]
        assert report.weights == decision["weights"]
        chosen = report.estimate(report.weights)
        # Estimators have changed since, by less than this.
        assert float(chosen.loss[0]) == pytest.approx(decision["estimated_loss"], rel=3e-4)

    def test_the_same_run_captures_and_decides_the_same(self, name, tmp_path):
        files = record.train(name, tmp_path)
        before, now = (
            GradientStore.load(directory / "gradients") for directory in (RECORDED / name, files)
        )
        assert now.scalars == before.scalars
        for one, other in ((before, now), (before.target, now.target)):
            for array in ("example_ids", "num_label_tokens", "losses", "example_weights"):
                np.testing.assert_allclose(
                    getattr(other, array), getattr(one, array), rtol=1e-4, err_msg=array
                )
            for scalar in before.scalars:
                np.testing.assert_allclose(
                    other.scalar(scalar)[1], one.scalar(scalar)[1], rtol=1e-3, atol=1e-4
                )
        decisions = [
            json.loads((directory / "selection.json").read_text())
            for directory in (RECORDED / name, files)
        ]
        assert decisions[0]["selected"] == decisions[1]["selected"]
        assert decisions[1]["estimated_loss"] == pytest.approx(
            decisions[0]["estimated_loss"], rel=1e-3
        )
