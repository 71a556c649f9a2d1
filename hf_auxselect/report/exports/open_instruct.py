"""For open-instruct: its ``--mixer_list``, as a bash array."""

from __future__ import annotations

from hf_auxselect.report.exports.mixture import Mixture, Part
from hf_auxselect.report.exports.syntax import bash_array, bash_word

_NOTES = (
    "Amounts are numbers of rows, drawn at random and repeated beyond the size of the data. (An",
    'amount with a decimal point would be a share of the data: "1" is one row, "1.0" all.)',
    "    source THIS_FILE",
    '    torchrun ... open_instruct/olmo_core_finetune.py "${mixture[@]}" ...',
    "Older scripts call the options --dataset_mixer_list and --dataset_mixer_list_splits.",
)


def render(mixture: Mixture) -> str:
    """A bash file for open-instruct."""
    located = [_located(part) for part in mixture.parts]
    splits = [split for _, split in located]
    lines = ["--mixer_list"]
    lines += [
        f"{bash_word(path)} {part.count}"
        for (path, _), part in zip(located, mixture.parts, strict=True)
    ]
    # One split for all; else one for each element of mixer_list, paths and amounts alike.
    different = splits[:1] if len({*splits}) == 1 else [s for s in splits for _ in range(2)]
    lines.append(" ".join(["--mixer_list_splits", *(bash_word(split) for split in different)]))
    return mixture.header("open-instruct", _NOTES) + bash_array("mixture", lines)


def _located(part: Part) -> tuple[str, str]:
    """Path and split of a task."""
    source, tool = part.source, "open-instruct"
    if (located := source.files(tool)) is not None:
        files, split = located
        if len(files) > 1 or not files[0].endswith((".jsonl", ".parquet")):
            raise source.refused(tool, "data_files")
        if split != "train":
            raise source.refused(tool, "split")
        return files[0], split
    for key in ("name", "data_dir", "data_files"):
        if getattr(source, key) is not None:
            raise source.refused(tool, key)
    return source.path, source.split
