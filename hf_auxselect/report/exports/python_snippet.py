"""For ``datasets``: Python code that makes the mixture."""

from __future__ import annotations

from hf_auxselect.report.exports.mixture import Mixture, Part

_NOTES = (
    "Rows are drawn at random, and each is read before any is repeated. (interleave_datasets with",
    "probabilities has these shares on average only, and is the way for streams.)",
)
_CODE = """
from datasets import concatenate_datasets, load_dataset

SEED = {seed}
# Task, arguments of load_dataset, columns (None: all), rows of an epoch.
PARTS = [
{parts}]


def draw(arguments, columns, number):
    data = load_dataset(**arguments)
    if columns is not None:
        data = data.select_columns(columns)
    times = -(-number // len(data))
    order = concatenate_datasets([data.shuffle(seed=SEED + i) for i in range(times)])
    return order.select(range(number))


mixture = concatenate_datasets([draw(*part) for _, *part in PARTS]).shuffle(seed=SEED)
"""


def render(mixture: Mixture) -> str:
    """A Python file; ``mixture`` in it is a ``datasets.Dataset``."""
    parts = "".join(f"    {_arguments(part)},\n" for part in mixture.parts)
    return mixture.header("datasets", _NOTES) + _CODE.format(seed=mixture.seed, parts=parts)


def _arguments(part: Part) -> str:
    arguments = {k: v for k, v in part.source.fields().items() if k != "columns"}
    return repr((part.task, arguments, part.source.columns, part.count))
