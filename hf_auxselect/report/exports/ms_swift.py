"""For ms-swift: its ``--dataset``, as a bash array."""

from __future__ import annotations

import re

from hf_auxselect.report.exports.mixture import Mixture, Part
from hf_auxselect.report.exports.syntax import bash_array, bash_word

_NOTES = (
    "#N reads N rows, drawn at random and repeated beyond the size of the data.",
    "    source THIS_FILE",
    '    swift sft "${mixture[@]}" ...',
)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def render(mixture: Mixture) -> str:
    """A bash file for ms-swift."""
    words = [bash_word(f"{_located(part)}#{part.count}") for part in mixture.parts]
    return mixture.header("ms-swift", _NOTES) + bash_array("mixture", ["--dataset", *words])


def _located(part: Part) -> str:
    """A task as ms-swift names it; without ``hf::`` it would look in ModelScope."""
    source, tool = part.source, "ms-swift"
    files, split = source.files(tool) or ([], source.split)
    if split != "train":
        raise source.refused(tool, "split")
    if len(files) == 1:
        return files[0]
    for key in ("data_dir", "data_files"):
        if getattr(source, key) is not None:
            raise source.refused(tool, key)
    if source.is_placeholder:
        return source.path
    hub = "hf::" if _HUB_ID.fullmatch(source.path) else ""
    subset = "" if source.name is None else f":{source.name}"
    return f"{hub}{source.path}{subset}"
