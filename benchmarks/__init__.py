"""Benchmarks: run one from the repository's root, as ``python -m benchmarks.accuracy.agreement``.

``accuracy`` compares estimates with ground-truth runs, ``cost`` measures time and memory, ``gpu``
both on a GPU, and ``robustness`` what training far from theta_0, or a kill, does to a run. Results
are in ``results``.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
