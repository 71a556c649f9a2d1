"""Reliability checks: which diagnostics of an estimator make a warning, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ReliabilityCheck(NamedTuple):
    """A diagnostic of an estimator above whose limit the report warns."""

    diagnostic: str
    limit: float
    text: str
    """What it means and what to do; the value goes where the braces are."""


# The limits shape no estimate, only warnings. They were measured on the families of benchmarks/: on
# all eight, so that none is held out, and on variants of the family small that were made to fail.
# Where estimates agree with ground-truth runs, the second to fifth diagnostic are at most 0.22,
# 0.10, 0.67 and 0.29. A warm-up of 3 steps instead of 60 has 0.33, 0.06, 2.0 and 1.1 of them;
# learning rates 30 times as high have 5.0, 2.8, 0.9 and 12. Together they
# tell bad estimates from good ones in all of these cases (``benchmarks/robustness/gate.py``), but
# for a LoRA rank of 32, where estimates of a small model rank with 0.75 and none of them tells.
RELIABILITY_CHECKS = (
    # Where 8 to 64 of a task's examples were captured, estimates rank with a Spearman of 0.47 on
    # average above this limit, and of 0.83 below. It is 0 where all examples were captured.
    ReliabilityCheck(
        "sampling_error_over_spread",
        0.5,
        "estimates depend on which examples of the tasks were captured: others would move them by "
        "{:.1f} times what mixtures differ by. Raise examples_per_task.",
    ),
    ReliabilityCheck(
        "terms_over_loss",
        1 / 3,
        "training is expected to change the target's loss by terms of {:.0%} of it, farther than "
        "the model behind the estimates is accurate: warm up longer, lower the learning rate, or "
        "check the choice with verify=4.",
    ),
    # Derived: above 1, the steps do not converge.
    ReliabilityCheck(
        "largest_curvature_over_stable",
        1.0,
        "steps overshoot: the steepest curvature is {:.1f} times what these learning rates "
        "converge in, and where such training goes is not estimated. Lower the learning rate.",
    ),
    ReliabilityCheck(
        "linearization_residual",
        1.0,
        "the curvature behind the estimates misses the measured change of the tasks' gradients "
        "during training by {:.1f} times that change: warm up longer, lower the learning rate, "
        "or check the choice with verify=4.",
    ),
    ReliabilityCheck(
        "target_residual",
        1 / 3,
        "at the predicted endpoints of training, the model behind the estimates misses the "
        "target's measured loss by {:.0%} of it: warm up longer, lower the learning rate, or check "
        "the choice with verify=4.",
    ),
)

RESTART_WARNING = (
    "training starts again, far from where the gradients were taken: estimates tell which mixture "
    "is better, but hardly by how much, and their intervals are wide for it. Use "
    'after="continue", or let ground-truth runs set the scale with calibrate=8.'
)
"""Measured by the agreement benchmark in its restart mode."""


def reliability_warnings(diagnostics: Mapping[str, float], *, restarts: bool) -> list[str]:
    """A text for each diagnostic above its limit, and for a restart."""
    values = [(check, diagnostics.get(check.diagnostic, 0.0)) for check in RELIABILITY_CHECKS]
    texts = [check.text.format(value) for check, value in values if value > check.limit]
    return [*texts, RESTART_WARNING] if restarts else texts
