"""``rows.jsonl`` says which rows a run reads after the selection, and how often."""

import json
from collections import Counter

import numpy as np
import pytest
import tiny
from datasets import Dataset, load_dataset

from hf_auxselect import FixedSelection, SelectionReport, concatenate_tasks
from hf_auxselect.report.exports.rows import row_lines
from hf_auxselect.selectors import AbstractSelector, Selection

SIZES = {"a": 11, "b": 6, "c": 9}


def distinct(num_rows, mark):
    """Rows that can be told from each other: a letter and a number."""
    return Dataset.from_list(
        [{"prompt": f"{mark}{i:02d}=", "completion": "abcdefgh"[i % 8]} for i in range(num_rows)]
    )


def train_set():
    joined = concatenate_tasks({name: distinct(count, name) for name, count in SIZES.items()})
    return joined.shuffle(seed=1)  # so that a task's rows are scattered


class Uneven(AbstractSelector):
    """A mixture that reads one task more often than the other."""

    def select(self, problem):
        shares = {"a": 0.3, "b": 0.7, "c": 0.0}
        weights = {name: shares[name] for name in problem.task_names}
        return Selection(weights=weights, estimate=problem.estimate([[*weights.values()]]))


def run(directory, selector, **options):
    """The report of a run, its directory, and how often each row was trained on after step 4."""
    data = train_set()
    after = options.pop("after", "continue")
    callback = tiny.callback(selector=selector, after=after)
    trainer = tiny.sft_trainer(directory, callback, train_dataset=data, **options)
    characters = {i: c for c, i in tiny.VOCABULARY.items()}
    seen = Counter()

    def look(module, args, kwargs):
        if module.training and trainer.state.global_step >= 4:
            for ids in kwargs["input_ids"][:, :4].tolist():
                seen["".join(characters[i] for i in ids)] += 1

    trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    index = {prompt: i for i, prompt in enumerate(data["prompt"])}
    return callback.report, directory / "_task_selection", {index[p]: n for p, n in seen.items()}


@pytest.mark.parametrize(
    ("selector", "options"),
    [
        (FixedSelection(["a", "c"], estimate=False), {}),
        (Uneven(), {}),
        # The last step of an epoch has fewer batches: 26 rows are 7 of them.
        (Uneven(), {"gradient_accumulation_steps": 2, "max_steps": 13}),
        (FixedSelection(["b"], estimate=False), {"after": "restart"}),
    ],
)
def test_it_holds_what_the_run_reads(selector, options, run_dir):
    report, directory, seen = run(run_dir, selector, **options)
    path = directory / "report" / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["index"]: line["reads"] for line in lines} == seen
    assert sum(seen.values()) == report.run["rows_to_read"]
    data = train_set()
    for line in lines:
        assert line.keys() == {"task", "row", "index", "reads"}
        of_task = [i for i, task in enumerate(data["task"]) if task == line["task"]]
        assert of_task[line["row"]] == line["index"]
    assert report.export("rows") == path.read_text()
    assert SelectionReport.load(directory).export("rows") == path.read_text()
    rows = load_dataset("json", data_files=str(path), split="train")
    assert set(rows["task"]) == set(report.selected)


def test_a_run_that_only_observes_writes_none(run_dir):
    """It reads what its own loader gives it."""
    selector = FixedSelection(["b"], estimate=False)
    _, directory, _ = run(run_dir, selector)
    assert (directory / "report" / "rows.jsonl").is_file()
    report, directory, _ = run(run_dir, selector, after="observe")
    assert not (directory / "report" / "rows.jsonl").exists()  # nor is that of the earlier run left
    with pytest.raises(ValueError, match=r"missing.*which after='observe' does not"):
        report.export("rows")
    assert "One epoch reads 6 rows:" in report.export("trl")


def test_large_ones_come_in_pieces():
    even, odd = np.arange(0, 50_000, 2), np.arange(1, 50_000, 2)
    reads = np.arange(50_000) % 3
    reads[even] = 0
    pieces = list(row_lines(["even", 'od"d\n'], [even, odd], reads))
    assert len(pieces) > 1
    assert max(len(piece) for piece in pieces) < 10_000 * 70
    lines = [json.loads(line) for line in b"".join(pieces).decode().splitlines()]
    assert {line["index"]: line["reads"] for line in lines} == {
        i: n for i, n in enumerate(reads.tolist()) if n
    }
    assert lines[0] == {"task": 'od"d\n', "row": 0, "index": 1, "reads": 1}
