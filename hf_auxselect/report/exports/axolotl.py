"""For axolotl: ``datasets:`` with slices. It knows no weights, and drops ``weight:`` silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_auxselect.report.exports.mixture import Mixture, Part
from hf_auxselect.report.exports.sources import Source
from hf_auxselect.report.exports.syntax import yaml_entry

_NOTES = (
    "Add `type:` to each entry (chat_template, alpaca, completion, ...).",
    "axolotl has no weights; an entry that stands here several times is read several times, unless",
    "dataset_exact_deduplication is on. A split such as train[:30] is its first rows: shuffle data",
    "that are sorted, or take a random n-th of them (shards: n). Data of `save_to_disk` ignore it.",
)


def render(mixture: Mixture) -> str:
    """A YAML file for axolotl."""
    entries, counts = [], []
    for part in mixture.parts:
        pieces, count = _pieces(part)
        entries += [yaml_entry(fields) for fields in pieces]
        counts.append(count)
    top = mixture.header("axolotl", _NOTES, counts)
    return f"{top}datasets:\n{''.join(entries)}shuffle_merged_datasets: true\n"


def _pieces(part: Part) -> tuple[list[dict[str, Any]], int]:
    """The entries of a task, and how many rows they have together."""
    times, rest = part.repeats
    source, fields = _located(part.source)
    pieces = [fields] * times
    if not rest:
        return pieces, part.count
    split = source.first(rest)
    if split is not None:
        return [*pieces, {**fields, "split": split}], part.count
    shards = round(part.examples / rest)
    if shards < 2:
        return [*pieces, fields], (times + 1) * part.examples
    shard = -(-part.examples // shards)  # the first shards get what is left over
    return [*pieces, {**fields, "shards": shards}], times * part.examples + shard


def _located(source: Source) -> tuple[Source, dict[str, Any]]:
    """The source as axolotl finds it, and its entry."""
    fields: dict[str, Any] = {key: v for key, v in source.fields().items() if key != "columns"}
    if source.data_dir is not None:
        raise source.refused("axolotl", "data_dir")
    if (located := source.files("axolotl")) is not None:
        files, split = located
        # A directory that exists, and files: axolotl then reads these, wherever they are.
        several = {"path": ".", "data_files": files}
        fields |= {"ds_type": source.path, "split": split, "data_files": None}
        fields |= {"path": files[0]} if len(files) == 1 else several
        source = Source(task=source.task, path=source.path, split=split)
    elif isinstance(source.data_files, Mapping):
        raise source.refused("axolotl", "data_files")
    return source, fields
