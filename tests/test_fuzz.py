"""Damaged and hostile files: the loaders raise the errors that they document, and no others."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import random_store, report_of
from test_store import VECTORS, complete

from hf_auxselect import GradientStore, SelectionReport
from hf_auxselect.files import read_json
from hf_auxselect.plan import PlanRecord
from hf_auxselect.trainer.checkpoints import is_whole, load_decision

DECISION = {
    "selected": ["a"],
    "weights": {"a": 1.0, "b": 0.0},
    "estimated_loss": 1.5,
    "low": 1.0,
    "high": 2.0,
    "estimated_loss_all": None,
    "switch_step": 4,
    "after": "continue",
    "seed": 42,
    "estimator": {"name": "LinearizedTraining", "rank": 96},
    "selector": {"name": "ForwardSelection"},
}
PLAN = {
    "switch_step": 4,
    "seed": 42,
    "tasks": {"a": 10, "b": 3},
    "target": 7,
    "fingerprint": {"tasks": {"a": 10, "b": 3}, "training rows": "0123456789abcdef"},
    "versions": {"torch": "2.13.0"},
}

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
    if len(path) == 1 and new is Ellipsis:
        del copy[path[0]]
    else:
        copy[path[0]] = edited(copy[path[0]], path[1:], new)
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
def room(tmp_path_factory):
    """One of each file."""
    directory = tmp_path_factory.mktemp("room")
    complete(directory / "gradients", vectors=VECTORS)
    report_of(random_store(3)).save(directory / "report")
    (directory / "selection.json").write_text(json.dumps(DECISION))
    (directory / "plan.json").write_text(json.dumps(PLAN))
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
def test_a_store(room, data):
    directory = room / "gradients"
    store = fuzz(directory, lambda: GradientStore.load(directory), data, "*")
    if store is not None:  # whatever is believed is of one piece
        assert len(store.task_names) == len(store.task_sizes)
        assert len(store.gradients) == len(store.losses) == len(store.task_ids)


@settings(max_examples=200)
@given(data=st.data())
def test_a_report(room, data):
    directory = room / "report"
    report = fuzz(directory, lambda: SelectionReport.load(directory), data, "report.json")
    if report is not None:
        report.to_text()
        assert report.to_markdown().startswith("# Task selection")
        assert json.dumps(report.to_dict(), allow_nan=False)


@settings(max_examples=200)
@given(data=st.data())
def test_a_decision(room, data):
    decision = fuzz(
        room, lambda: load_decision(room / "selection.json", ["a", "b"]), data, "selection.json"
    )
    if decision is not None:
        assert set(decision["weights"]) == {"a", "b"}
        assert sum(decision["weights"].values()) == pytest.approx(1)


@settings(max_examples=200)
@given(data=st.data())
def test_a_plan(room, data):
    plan = fuzz(room, lambda: read_json(room / "plan.json", PlanRecord), data, "plan.json")
    assert plan is None or isinstance(plan["switch_step"], int)


@settings(max_examples=100)
@given(data=st.data())
def test_a_state(room, data):
    assert fuzz(room, lambda: is_whole(room), data, "trainer_state.json") in (True, False)
