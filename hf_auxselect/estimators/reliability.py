"""What an estimator's diagnostics say against its estimates, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Doubt(NamedTuple):
    """A diagnostic of the estimator above whose limit the report warns."""

    diagnostic: str
    limit: float
    text: str
    """What it means and what to do; the value goes where the braces are."""


DOUBTS = (
    Doubt(
        "sampling_error_over_spread",
        0.5,
        "estimates depend on which rows of the tasks were captured: others would move them by "
        "{:.1f} times what mixtures differ by. Raise examples_per_task.",
    ),
    Doubt(
        "terms_over_loss",
        1 / 3,
        "training is expected to change the target's loss by terms of {:.0%} of it, farther than "
        "the model behind the estimates reaches: warm up longer, lower the learning rate, or check "
        "the choice with verify=4.",
    ),
    Doubt(
        "largest_curvature_over_stable",
        1.0,
        "steps overshoot: the steepest curvature is {:.1f} times what these learning rates "
        "converge in, and where such training goes is not estimated. Lower the learning rate.",
    ),
    Doubt(
        "linearization_residual",
        1.0,
        "where training is about to lead, gradients are off by {:.1f} times what they change by "
        "on the way, in the model behind the estimates: warm up longer, lower the learning rate, "
        "or check the choice with verify=4.",
    ),
    Doubt(
        "target_residual",
        1 / 3,
        "where training may end, the model behind the estimates misses the target's loss by {:.0%} "
        "of it: warm up longer, lower the learning rate, or check the choice with verify=4.",
    ),
    Doubt(
        "rank_correlation_with_step_norm",
        0.6,
        "the estimates follow the length of the training step (rank correlation {:.2f}), and say "
        "little more than that: raise examples_per_task, or check the choice with verify=4.",
    ),
)
"""Measured in benchmarks/agreement.py and drift.py, in the order of the above. The first is 0 where
all rows were captured. Where 8 to 64 of each task's were, estimates rank with 0.47 on average where
it is above a half, with 0.83 where it is below. Where estimates agree with real fine-tunes, the
next four are at most 0.22, 0.10, 0.67 and 0.29. Of the families made to fail, a warm-up of 3 steps
instead of 60 has 0.33, 0.06, 2.0 and 1.1 of them; learning rates 30 times as high have 5.0, 2.8,
0.9 and 12. With few rows captured after 16 steps (sparse, where losses are 7% off), the first is
0.92 and the fifth 0.62. None tells of a LoRA rank of 32, where estimates of a small model rank with
0.75; the step norm tells of none of these. Nor does the drift of the kernel of the tasks' gradients
(``kernel_drift``): it is 0.75 where all is well, and 0.07 with rank 32.
"""

OF_A_RESTART = (
    "training starts again, far from where the gradients were taken: estimates tell which mixture "
    "is better, but hardly by how much, and their intervals are wide for it. Use "
    'after="continue", or let real runs set the scale with calibrate=8.'
)
"""Measured in benchmarks/agreement.py --modes restart."""


def doubts_about(diagnostics: Mapping[str, float], *, restarts: bool) -> list[str]:
    """A text for each of ``DOUBTS`` whose diagnostic is above its limit, and of a restart."""
    values = [(doubt, diagnostics.get(doubt.diagnostic, 0.0)) for doubt in DOUBTS]
    texts = [doubt.text.format(value) for doubt, value in values if value > doubt.limit]
    return [*texts, OF_A_RESTART] if restarts else texts
