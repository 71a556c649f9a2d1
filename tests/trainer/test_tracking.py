"""What experiment trackers show of a selection."""

import random
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_auxselect import TaskSelectionCallback
from hf_auxselect.trainer import tracking

MARKDOWN = "# Task selection\n\n![Left out](left_out.png)\n\nkept \\!\\[not a picture\\]\n"
TABLES = {"estimates": [{"trained on": "a|b", "loss": 1.5}, {"trained on": "<b>", "loss": 2.0}]}


def integration(kind, **attributes):
    """One that its package need not be installed for."""
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def show(directory, *callbacks, is_main=True, tables=TABLES):
    (directory / "left_out.png").write_bytes(b"not read")
    trainer = SimpleNamespace(
        is_world_process_zero=lambda: is_main,
        state=SimpleNamespace(global_step=4),
        callback_handler=SimpleNamespace(callbacks=callbacks),
    )
    tracking.show(
        trainer,
        tables=tables,
        summary=["Selected 1 of 2 tasks: a.", "Warning: few examples."],
        markdown=MARKDOWN,
        directory=directory,
    )


@pytest.fixture
def tracker(monkeypatch):
    """A module with what trackio and W&B document; ``logged`` is what a run gets."""
    logged = []
    module = SimpleNamespace(
        Table=lambda columns, data: ("table", columns, data),
        Image=lambda path: ("image", path),
        Markdown=lambda text: ("markdown", text),
        Html=lambda file, inject: ("html", file.read(), inject),
        log=logged.append,
        run=SimpleNamespace(log=logged.append),
        logged=logged,
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


SHOWN_BY_BOTH = {
    "train/global_step": 4,
    "auxselect/estimates": ("table", ["trained on", "loss"], [["a|b", 1.5], ["<b>", 2.0]]),
}


def test_trackio_shows_tables_pictures_and_a_summary(tmp_path, tracker):
    show(tmp_path, integration(TrackioCallback))
    summary = "- Selected 1 of 2 tasks: a.\n- Warning: few examples."
    assert tracker.logged == [
        SHOWN_BY_BOTH
        | {
            "auxselect/left_out": ("image", str(tmp_path / "left_out.png")),
            "auxselect/report": ("markdown", summary),
        }
    ]


def test_wandb_shows_tables_pictures_and_the_page_where_there_is_one(tmp_path, tracker):
    show(tmp_path, integration(WandbCallback))
    expected = SHOWN_BY_BOTH | {"auxselect/left_out": ("image", str(tmp_path / "left_out.png"))}
    assert tracker.logged == [expected]
    (tmp_path / "index.html").write_text("<p>é", encoding="utf-8")
    show(tmp_path, integration(WandbCallback))
    assert tracker.logged[1] == expected | {"auxselect/report": ("html", "<p>é", False)}


def test_the_picture_of_an_earlier_run_is_not_shown(tmp_path, tracker):
    show(tmp_path, integration(WandbCallback), tables={"tasks": [{"task": "a", "share": 1.0}]})
    assert list(tracker.logged[0]) == ["train/global_step", "auxselect/tasks"]


def test_no_run_is_opened(tmp_path, tracker, caplog):
    tracker.run = None
    show(tmp_path, integration(WandbCallback), integration(TensorBoardCallback, tb_writer=None))
    show(tmp_path, TaskSelectionCallback())
    show(tmp_path, integration(TrackioCallback), is_main=False)
    assert not tracker.logged
    assert not caplog.records


def test_a_tracker_that_fails_is_warned_of_and_changes_nothing(tmp_path, tracker, caplog):
    def fail(things):
        random.random()
        torch.rand(1)
        raise ConnectionError("no route")

    tracker.log = fail
    before = random.getstate(), torch.get_rng_state()
    show(tmp_path, integration(TrackioCallback), integration(WandbCallback))
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())
    assert len(tracker.logged) == 1  # of the other one
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Trackio" in record.message
    assert "ConnectionError: no route" in record.message
    assert str(tmp_path) in record.message


def test_tensorboard_shows_the_report_and_its_picture(run_dir, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(run_dir / "events"))
    callback = TaskSelectionCallback(warmup=4, projection_dim=16)
    tiny.sft_trainer(run_dir, callback, report_to="tensorboard").train()
    events = EventAccumulator(str(run_dir / "events"), size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("auxselect/report/text_summary")
    page = text.tensor_proto.string_val[0].decode()
    assert (text.step, page.count("![")) == (4, 0)
    for row in callback.report.rows:
        assert f"| {row.name} | {row.loss:.4f} |" in page
    (picture,) = events.Images("auxselect/left_out")
    assert picture.width > picture.height > 100
