"""How many finalists it takes: what ``confirm=n`` gains on mixtures that were all trained.

    python -m benchmarks.accuracy.finalists --families small,demo,arithmetic

The best estimated mixture, all tasks, then the next best estimated ones are the finalists. The best
measured one goes on. Everything is known: no run is made.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks import RESULTS
from benchmarks.accuracy.captured import gradients
from benchmarks.accuracy.measures import Truth, read_truth
from benchmarks.families import with_fixed_hashes
from hf_auxselect import LinearizedTraining
from hf_auxselect.files import to_json, write_atomically

NUMBERS = (1, 2, 3, 4, 6, 8)


def regrets(truth: Truth, estimated: np.ndarray) -> dict[str, Any]:
    """Measured loss of the winner above the best of all, as a share of their range.

    Means over the seeds. A race is decided by one seed and judged by it, as the run that goes on
    is; and, ``new seed``, judged by the mean of the others.
    """
    everything = (truth.weights > 0).all(1) & (np.ptp(truth.weights, axis=1) < 0.5)
    order = np.argsort(estimated, kind="stable").tolist()
    finalists = [order[0], *np.flatnonzero(everything)[:1].tolist(), *order[1:]]
    finalists = list(dict.fromkeys(finalists))
    line: dict[str, Any] = {
        "family": truth.family,
        "mixtures": len(estimated),
        "all tasks measured": bool(everything.any()),
    }
    for name in ("same seed", "new seed"):
        line[name] = {}
        for number in NUMBERS:
            found = []
            for seed, losses in enumerate(truth.losses):
                others = np.delete(truth.losses, seed, 0)
                if np.isnan(losses).any() or (name == "new seed" and not len(others)):
                    continue
                judged = losses if name == "same seed" else np.nanmean(others, 0)
                winner = min(finalists[:number], key=lambda m: losses[m])
                found.append((judged[winner] - judged.min()) / np.ptp(judged))
            line[name][str(number)] = round(float(np.mean(found)), 4) if found else None
    return line


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small", metavar="a,b")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    lines = []
    for family in options.families.split(","):
        truth = read_truth(family, "continue")
        fitted = LinearizedTraining().fit(gradients(family, "continue"))
        lines.append(regrets(truth, fitted.estimate(truth.weights).loss))
        print(lines[-1], flush=True)
    record = {"command": "python -m benchmarks.accuracy.finalists", "lines": lines}
    write_atomically(RESULTS / "finalists.json", to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
