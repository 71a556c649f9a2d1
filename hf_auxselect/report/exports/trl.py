"""For TRL: the ``datasets:`` of its command line and of ``trl.get_dataset``."""

from __future__ import annotations

from collections.abc import Sequence

from hf_auxselect.report.exports.mixture import Mixture, Part
from hf_auxselect.report.exports.syntax import yaml_entry

_WHOLE = ("Every entry is read as a whole: no entry needs a fraction.",)
_FRACTIONS = (
    "`fraction` needs TRL 1.8 or later, and no streaming. TRL reads the first rows of an entry:",
    "shuffle data that are sorted.",
)
_REPEATED = (
    "An entry that stands here several times is read several times; fractions cannot say that.",
    "A split such as train[:30] is its first rows, and needs a run without streaming: shuffle data",
    "that are sorted.",
)


def render(mixture: Mixture) -> str:
    """A YAML file for TRL."""
    parts = mixture.parts
    counts = [part.count for part in parts]
    notes: Sequence[str] = _WHOLE
    if all(part.is_whole for part in parts):
        entries = [yaml_entry(part.source.fields()) for part in parts]
    elif fractions := _fractions(parts):
        notes = _FRACTIONS
        entries = [
            yaml_entry({**part.source.fields(), "fraction": fraction})
            for part, fraction in zip(parts, fractions, strict=True)
        ]
    else:
        notes, pieces = _REPEATED, [_pieces(part) for part in parts]
        counts = [count for _, count in pieces]
        entries = [
            yaml_entry({**part.source.fields(), "split": split})
            for part, (splits, _) in zip(parts, pieces, strict=True)
            for split in splits
        ]
    return mixture.header("TRL", notes, counts) + "datasets:\n" + "".join(entries)


def _fractions(parts: Sequence[Part]) -> list[float]:
    """Fractions of which TRL makes the counts; empty if there are none.

    TRL's mixture is the largest in which no row is repeated: N = min rows / fraction rows, of which
    an entry gets round(fraction N), fractions summing to 1.
    """
    total = sum(part.count for part in parts)
    fractions = [part.count / total for part in parts]
    weights = [fraction / sum(fractions) for fraction in fractions]
    rows = min(part.examples / weight for part, weight in zip(parts, weights, strict=True))
    made = [round(weight * rows) for weight in weights]
    return fractions if made == [part.count for part in parts] else []


def _pieces(part: Part) -> tuple[list[str], int]:
    """The split of each entry of a task, and how many rows they have together."""
    times, rest = part.repeats
    split = part.source.split
    if not rest:
        return [split] * times, part.count
    first = part.source.first(rest)
    if first is None:  # whole entries only
        times = max(round(part.count / part.examples), 1)
        return [split] * times, times * part.examples
    return [*([split] * times), first], part.count
