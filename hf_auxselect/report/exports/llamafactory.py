"""For LLaMA-Factory: names of data sets, and their entries in ``dataset_info.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hf_auxselect.report.exports.mixture import Mixture, Part
from hf_auxselect.report.exports.syntax import quoted

_NOTES = (
    "Put the lines that begin with #| into dataset_info.json of your dataset_dir:",
    "    sed -n 's/^#| //p' THIS_FILE > data/dataset_info.json",
    "and add `formatting`, `columns` and `tags` of your data. Names of files are relative to",
    "dataset_dir. num_samples rows are drawn at random, and repeated beyond the size of the data;",
    "not with streaming, where mix_strategy and interleave_probs would set the shares.",
)


def render(mixture: Mixture) -> str:
    """A YAML file for LLaMA-Factory, with the other file in its comments."""
    names = _names(mixture.parts)
    entries = [
        f"#|  {json.dumps(name)}: {json.dumps(_entry(part))}"
        for name, part in zip(names, mixture.parts, strict=True)
    ]
    info = "\n".join(["#| {", ",\n".join(entries), "#| }"])
    info = info.replace("\x7f", "\\u007f")  # the one that JSON leaves, and YAML refuses
    top = mixture.header("LLaMA-Factory", _NOTES)
    return f"{top}dataset: {quoted(','.join(names))}\nmix_strategy: concat\n\n{info}\n"


def _names(parts: Sequence[Part]) -> list[str]:
    """A name for each task without commas or blanks, at which LLaMA-Factory splits."""
    names: list[str] = []
    for part in parts:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", part.task).strip("_")[:60] or "task"
        number = 1
        name = plain
        while name in names:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return names


def _entry(part: Part) -> dict[str, Any]:
    source, tool = part.source, "LLaMA-Factory"
    located = source.files(tool)
    if located is None:
        if source.data_files is not None:
            raise source.refused(tool, "data_files")
        split = source.split
        entry = {"hf_hub_url": source.path, "subset": source.name, "folder": source.data_dir}
    else:
        files, split = located
        if len(files) > 1:
            raise source.refused(tool, "data_files")
        entry = {"file_name": files[0]}
    entry = {key: value for key, value in entry.items() if value is not None}
    return {**entry, "split": split, "num_samples": part.count}
