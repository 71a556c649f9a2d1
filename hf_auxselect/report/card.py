"""The card of a Hub repo: a section on the selection, and metadata; all else stays as it is.

The section stands between two HTML comments and is replaced as a whole. Of the metadata, only keys
that change are written anew: YAML that is read and dumped loses comments, quotes and ``no``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from hf_auxselect.report.content import Evaluation, ReportContent
from hf_auxselect.report.markdown import escape_markdown
from hf_auxselect.report.text import (
    agreement_sentence,
    comparison_sentence,
    confirmation_sentence,
    decision_sentence,
    evaluations_sentence,
    printable,
    shortened,
)

BEGIN = "<!-- hf-auxselect: begin (each push writes this section anew) -->"
END = "<!-- hf-auxselect: end -->"
FOLDER = "task_selection"
"""In the repo. Trainer leaves names that begin with an underscore out of its uploads."""
SOURCE = "hf-auxselect"
"""By this name of their source, our results are found again among others of a card."""
TAGS = ("hf-auxselect", "task-selection")

_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zip", ".zst")
_MOST_TASKS = 30
"""Tasks that the section names; the report has all. A convention."""
_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a push adds to the metadata of a card; what the user has set stays.

    Attributes:
        fixed: values that the card must not have otherwise.
        defaults: values of keys that the card does not have.
        lists: items by key, added to those of the card.
        configs: subsets of a dataset repo for the viewer; replace those of the same name.
        results: the target's measured loss and metrics. They replace those of an earlier push.
        model_name: heads the results, if the card has none yet.
    """

    fixed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, Collection[str]] = field(default_factory=dict)
    configs: Collection[Mapping[str, Any]] = ()
    results: Sequence[EvalResult] = ()
    model_name: str = "model"


def is_hub_id(name: str) -> bool:
    """Whether a name is an id ``user/name`` on the Hub rather than a path.

    Ids without a namespace look like local names, and are not taken for ids.
    """
    is_id = _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(_FILES)
    return is_id and not Path(name).exists()


def measured_loss(report: ReportContent) -> float | None:
    """The target's loss after training as it was measured, nats per label token; never an estimate.

    That of the run itself, or of the ground-truth run on the mixture that the run went on with.
    """
    if "final_loss" in report.run:
        return report.run["final_loss"]
    if (final := final_evaluation(report)) is not None:
        return final.loss
    trained_on = "all tasks" if report.run.get("after") == "observe" else "chosen"
    race = report.confirmation
    if race is not None and race.steps and race.steps[-1] == report.run.get("max_steps"):
        return race.measured("all tasks" if trained_on == "all tasks" else race.winner)
    return next((run.measured for run in report.verification if run.name == trained_on), None)


def _where(report: ReportContent) -> str:
    is_of_run = "final_loss" in report.run or final_evaluation(report) is not None
    return " after training" if is_of_run else " in a ground-truth run"


def model_metadata(report: ReportContent, repo_id: str, revision: str | None = None) -> Metadata:
    """The metadata of a model card.

    Args:
        report: on the run that trained the model.
        repo_id: of the model.
        revision: branch with the report, which the measured loss refers to.
    """
    defaults, base = {}, report.run.get("model", "")
    if is_hub_id(base):
        defaults["base_model"] = base
        if report.run.get("adapter"):
            defaults["base_model_relation"] = "adapter"
    # A restart leaves nothing of the tasks that were dropped; else the warm-up has read all.
    tasks = report.selected if report.run.get("after") == "restart" else report.weights
    paths = [str(report.sources.get(task, {}).get("path", "")) for task in tasks]
    lists = {"datasets": [path for path in dict.fromkeys(paths) if is_hub_id(path)], "tags": TAGS}
    target = report.target.name if report.target else "target"
    measured, loss = [], measured_loss(report)
    if loss is not None:
        measured.append(("loss", f"loss of the target{_where(report)}, nats per label token", loss))
    if (final := final_evaluation(report)) is not None:
        measured += [
            (printable(name), f"{printable(name)} of the target after training", value)
            for name, value in final.metrics.items()
        ]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="target",
            dataset_name=_shortened(printable(target)),
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
            source_name=SOURCE,
            source_url=f"{ENDPOINT}/{repo_id}/blob/{revision or 'main'}/{FOLDER}/report.json",
        )
        for kind, name, value in measured
    ]
    return Metadata(
        defaults=defaults, lists=lists, results=results, model_name=repo_id.rpartition("/")[2]
    )


def final_evaluation(report: ReportContent) -> Evaluation | None:
    """The evaluation of the target after training; None if there is none, or training goes on."""
    last = report.evaluations[-1] if report.evaluations else None
    return last if last and last.step > report.run.get("switch_step", last.step) else None


def edit_card(card: str, section: str, metadata: Metadata, title: str = "") -> str:
    """A card with the section and the metadata; the rest of its text stays, byte for byte.

    Args:
        card: the present text; empty if there is none.
        section: Markdown, without the markers.
        metadata: what to add.
        title: heading of a card that is made anew.

    Raises:
        ValueError: the present metadata are no YAML mapping, or have another fixed value.
    """
    mark, text = ("\ufeff", card[1:]) if card.startswith("\ufeff") else ("", card)
    newline = "\r\n" if "\r\n" in text else "\n"
    block = REGEX_YAML_BLOCK.match(text)
    if block is None:
        body = text or f"# {title}\n"
        head = "\n".join(["---", _merged("", metadata), "---", "", ""]).replace("\n", newline)
    else:
        opening, present, closing = block[1], block[2], block[3]
        body = text[block.end() :]
        head = opening + _merged(present, metadata, newline) + closing
    section = f"{BEGIN}\n{section.strip()}\n{END}".replace("\n", newline)
    if found := _SECTION.search(body):
        body = body[: found.start()] + section + body[found.end() :]
    else:
        if body and not body.endswith("\n"):
            body += newline
        body += newline + section + newline
    return mark + head + body


def section(report: ReportContent, files: Collection[str]) -> str:
    """The section of a card on a selection.

    Args:
        report: on the selection.
        files: paths in the repo that the section may link to.
    """
    run = report.run
    chosen = f"{len(report.selected)} of {len(report.weights)} auxiliary tasks"
    when = f" after step {run['switch_step']}" if "switch_step" in run else ""
    when += f" of {run['max_steps']}" if when and "max_steps" in run else ""
    when += f", on {escape_markdown(run['created'][:10])}" if "created" in run else ""
    if run.get("after") == "observe":
        told = (
            f"`TaskSelectionCallback` would have chosen {chosen}{when}; training went on with all."
        )
    else:
        went_on = "started again" if run.get("after") == "restart" else "went on"
        told = f"`TaskSelectionCallback` chose {chosen}{when}; training {went_on} with them."
    parts = ["## Task selection", told]
    loss = measured_loss(report)
    if loss is not None:
        sentence = f"Measured loss of the target{_where(report)}: {loss:.4f} nats per label token"
        if report.rows:
            row = report.row("all tasks" if run.get("after") == "observe" else "chosen")
            sentence += f" (estimated before: {row.loss:.4f} [{row.low:.4f}, {row.high:.4f}])"
        parts.append(escape_markdown(f"{sentence}."))
    sentences = (
        comparison_sentence(report),
        confirmation_sentence(report),
        agreement_sentence(report),
        evaluations_sentence(report),
    )
    parts += [escape_markdown(sentence) for sentence in sentences if sentence]
    parts += [f"> **Warning.** {escape_markdown(warning)}" for warning in report.warnings]
    parts.append(_table(report))
    if report.decisions:
        parts.append("Selections of this run, of which this is the last:")
        parts.append(
            "\n".join(f"- {escape_markdown(decision_sentence(line))}" for line in report.decisions)
        )
    dropped = [name for name, weight in report.weights.items() if weight == 0]
    if dropped:
        names = [escape_markdown(_shortened(name)) for name in dropped[:_MOST_TASKS]]
        names += [f"and {len(dropped) - _MOST_TASKS} more"] * (len(dropped) > _MOST_TASKS)
        parts.append(f"Dropped: {', '.join(names)}.")
    if picture := next((file for file in files if "left_out." in file), None):
        parts.append(f"![Estimated loss when each task is left out]({picture})")
    known = {"README.md": "tables", "index.html": "page", "report.json": "data"}
    links = [
        f"[{known[name]}]({file})"
        for file in files
        if (name := file.rpartition("/")[2]) in known and file != "README.md"
    ]
    if links:
        parts.append(f"The whole report: {', '.join(links)}.")
    return "\n\n".join(parts)


def _table(report: ReportContent) -> str:
    lines = ["| task | share of the examples | dataset |", "| --- | --- | --- |"]
    for name in report.selected[:_MOST_TASKS]:
        path = str(report.sources.get(name, {}).get("path", ""))
        link = f"[{escape_markdown(path)}]({ENDPOINT}/datasets/{path})" if is_hub_id(path) else ""
        lines.append(
            f"| {escape_markdown(_shortened(name))} | {report.weights[name]:.4f} | {link} |"
        )
    if (more := len(report.selected) - _MOST_TASKS) > 0:
        lines.append(f"| and {more} more | | |")
    return "\n".join(lines)


def _shortened(name: str) -> str:
    return shortened(name, _LONGEST_NAME)


def _merged(block: str, metadata: Metadata, newline: str = "\n") -> str:
    """A YAML block with the metadata; lines of keys that stay are left as they are."""
    try:
        node = yaml.compose(block, Loader=yaml.SafeLoader)
        values = yaml.safe_load(block) or {}
        texts = yaml.load(block, Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date such as 2026-99-99
        raise ValueError(f"its metadata are no valid YAML ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError("its metadata are no YAML mapping of keys to values")
    changed = _changes(values, texts, metadata)
    expected = {k: v for k, v in (values | changed).items() if k not in changed or v is not None}
    pieces = _pieces(block + newline if block else "", node)
    if pieces is None:
        return _dumped(expected, newline)
    for key, value in changed.items():
        lines = "" if value is None else _dumped({key: value}, newline) + newline
        at = [i for i, (name, _, _) in enumerate(pieces) if name == key]
        if at:
            pieces[at[-1]] = (key, lines, pieces[at[-1]][2])
        else:
            pieces.append((key, lines, ""))
    merged = "".join(lines + after for _, lines, after in pieces).removesuffix(newline)
    try:
        is_as_expected = yaml.safe_load(merged) == expected
    except yaml.YAMLError:  # another key refers to an anchor in one that was replaced
        is_as_expected = False
    return merged if is_as_expected else _dumped(expected, newline)


def _pieces(block: str, node: yaml.Node | None) -> list[tuple[str, str, str]] | None:
    """Key, its lines, and comments and empty lines after them; None if keys do not start lines."""
    if node is None:
        return [("", "", block)]
    assert isinstance(node, yaml.MappingNode)
    if node.flow_style or any(key.start_mark.column for key, _ in node.value):
        return None
    starts = [key.start_mark.index for key, _ in node.value]
    pieces = [("", "", block[: starts[0]])]
    for (key, _), start, end in zip(node.value, starts, [*starts[1:], len(block)], strict=True):
        lines = re.split(r"(?<=\n)", block[start:end])
        last = len(lines)
        while last > 1 and (not lines[last - 1].strip() or lines[last - 1].startswith("#")):
            last -= 1
        pieces.append((str(key.value), "".join(lines[:last]), "".join(lines[last:])))
    return pieces


def _changes(values: Mapping[str, Any], texts: Mapping[str, Any], ours: Metadata) -> dict[str, Any]:
    """The keys that change, with their new values; None removes a key.

    Args:
        values: present metadata as YAML has them.
        texts: the same with all scalars as text: YAML takes the tag ``no`` for False.
        ours: what to add.
    """
    changed: dict[str, Any] = {}
    for key, value in ours.fixed.items():
        if values.get(key) not in (None, value):
            raise ValueError(f"its {key} is {values[key]!r}, but must be {value!r}")
    defaults = {**ours.defaults, **ours.fixed}
    if values.get("base_model") and values["base_model"] != defaults.get("base_model"):
        defaults.pop("base_model_relation", None)  # the user names another one
    changed |= {key: value for key, value in defaults.items() if not values.get(key)}
    for key, items in ours.lists.items():
        present = texts.get(key) or values.get(key) or []
        present = present if isinstance(present, list) else [present]
        if new := [item for item in items if item not in present]:
            changed[key] = [*present, *new]
    if ours.configs:
        names = [config["config_name"] for config in ours.configs]
        present = values.get("configs") or []
        others = [
            c for c in present if not isinstance(c, dict) or c.get("config_name") not in names
        ]
        configs = [*others, *map(dict, ours.configs)]
        if not others:
            configs[0]["default"] = True
        if configs != present:
            changed["configs"] = configs
    index = values.get("model-index") or []
    if isinstance(index, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("results", []), list) for entry in index
    ):
        new_index = _with_results(index, ours, str(values.get("pipeline_tag") or ""))
        if new_index != index:
            changed["model-index"] = new_index or None
    return changed


def _with_results(present: list[dict[str, Any]], ours: Metadata, kind: str) -> list[dict[str, Any]]:
    """A model index with our results instead of those of an earlier push."""
    index = copy.deepcopy(present)
    for entry in index:
        others = [result for result in entry.get("results", []) if not _is_ours(result)]
        if others != entry.get("results", []):
            entry["results"] = others
    if not ours.results:  # an entry that held nothing but ours goes with it
        before = [bool(entry.get("results")) for entry in present]
        return [e for e, had in zip(index, before, strict=True) if e.get("results") or not had]
    (made,) = eval_results_to_model_index(ours.model_name, [*ours.results])
    if kind:
        made["results"][0]["task"]["type"] = kind
    if not index:
        return [made]
    index[0]["results"] = [*index[0].get("results", []), *made["results"]]
    return index


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE


def _dumped(values: Mapping[str, Any], newline: str) -> str:
    return str(yaml_dump(dict(values), sort_keys=False)).rstrip("\n").replace("\n", newline)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
