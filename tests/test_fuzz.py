"""Damaged and hostile files: the loaders raise the errors that they document, and no others."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_auxselect import GradientStore, SelectionReport
from hf_auxselect.files import read_json
from hf_auxselect.plan import PlanRecord
from hf_auxselect.trainer.checkpoints import is_whole, load_decision

RECORDED = Path(__file__).parent / "recorded" / "continue"

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -1, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "a", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def places(value, path=()):
    """Of every value inside of a JSON value."""
    yield path
    items = dict(enumerate(value)) if isinstance(value, list) else value
    for key, item in items.items() if isinstance(items, dict) else ():
        yield from places(item, (*path, key))


def edited(content, path, new):
    if not path:
        return new
    copy = content.copy()
    if len(path) > 1:
        copy[path[0]] = edited(copy[path[0]], path[1:], new)
    elif new is Ellipsis:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


@st.composite
def damaged_bytes(draw, content):
    """Some bytes changed, put in, or cut off."""
    if not content or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64) | st.just(b"[" * 5000))
    start = draw(st.integers(0, len(content) - 1))
    end = draw(st.integers(start, min(start + 16, len(content))) | st.just(len(content)))
    return content[:start] + draw(st.binary(max_size=16)) + content[end:]


@st.composite
def damaged_json(draw, content):
    """One value replaced or removed, or the text itself damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    tree = json.loads(content)
    path = draw(st.sampled_from(list(places(tree))))
    new = draw(json_values | (st.just(Ellipsis) if path else st.nothing()))
    return json.dumps(edited(tree, path, new)).encode()


def damaged(content, name):
    return damaged_json(content) if name.endswith(".json") else damaged_bytes(content)


def attempt(load, directory):
    """Load; a documented error is as good, if it names a file of the directory."""
    try:
        return load()
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error)
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The files of a run, and the state of a checkpoint."""
    directory = tmp_path_factory.mktemp("files") / "run"
    shutil.copytree(RECORDED, directory)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    return directory


def fuzz(directory: Path, load, data, pattern):
    """Damage one of the files that match, load, and put it back."""
    path = data.draw(st.sampled_from(sorted(directory.glob(pattern))), label="file")
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole, path.name), label="content"))
    try:
        return attempt(load, directory)
    finally:
        path.write_bytes(whole)


@settings(max_examples=200)
@given(data=st.data())
def test_a_store(run, data):
    directory = run / "gradients"
    store = fuzz(directory, lambda: GradientStore.load(directory), data, "*")
    if store is not None:  # what is read is of one piece
        assert len(store.task_names) == len(store.task_sizes)
        assert len(store.gradients) == len(store.losses) == len(store.task_ids)


@settings(max_examples=200)
@given(data=st.data())
def test_a_report(run, data):
    directory = run / "report"
    report = fuzz(directory, lambda: SelectionReport.load(directory), data, "report.json")
    if report is not None:
        report.to_text()
        assert report.to_markdown().startswith("# Task selection")
        assert json.dumps(report.to_dict(), allow_nan=False)


@settings(max_examples=200)
@given(data=st.data())
def test_a_decision(run, data):
    decision = fuzz(
        run,
        lambda: load_decision(run / "selection.json", ["a", "b", "c", "d"]),
        data,
        "selection.json",
    )
    if decision is not None:
        assert set(decision["weights"]) == {"a", "b", "c", "d"}
        assert sum(decision["weights"].values()) == pytest.approx(1)


@settings(max_examples=200)
@given(data=st.data())
def test_a_plan(run, data):
    plan = fuzz(run, lambda: read_json(run / "plan.json", PlanRecord), data, "plan.json")
    assert plan is None or isinstance(plan["switch_step"], int)


@settings(max_examples=100)
@given(data=st.data())
def test_a_state(run, data):
    assert fuzz(run, lambda: is_whole(run), data, "trainer_state.json") in (True, False)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("run", "seconds"), float("nan"), "it['run']['seconds'] is NaN, expected a finite number"),
        (("estimator", "rank"), -1e999, "it['estimator']['rank'] is -Infinity, expected a finite"),
        (("rows", 2, "loss"), "3.1", "it['rows'][2]['loss'] is \"3.1\", expected float"),
        (("tasks", 0, "rows"), 2**63, "['rows'] is 9223372036854775808, expected a finite number"),
        (("weights",), ..., "it has no 'weights'"),
        (("title",), "x", "it has the unknown field 'title'"),
    ],
)
def test_a_damaged_value_is_named_with_its_file(path, value, told, tmp_path):
    content = json.loads((RECORDED / "report" / "report.json").read_text())
    damaged = edited(content, path, value)
    (tmp_path / "report.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        SelectionReport.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'report.json'}: damaged (")
