"""Runs that push to a server that stands in for the Hub, with the real client and trainers."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
from hub_server import TOKEN, hub_server, use
from huggingface_hub import ModelCard

from hf_auxselect import FixedSelection, SelectionReport, TaskSelectionCallback
from hf_auxselect.report import card
from hf_auxselect.report.hub import Retries
from hf_auxselect.trainer.hub import final_loss

TESTS = Path(__file__).parents[1]
FAST = FixedSelection(["a", "c"], estimate=False)
PUSHING = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True}
SAVING = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


@pytest.fixture(scope="module")
def server():
    """One for all tests: Transformers keeps a client with its address."""
    with hub_server() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    server.forget()
    use(monkeypatch, server)
    monkeypatch.setattr("hf_auxselect.report.hub.RETRIES", Retries(sleep=lambda seconds: None))
    return server


def sections(text):
    assert text.count(card.BEGIN) == text.count(card.END)
    return text.count(card.BEGIN)


def logged(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hf_auxselect.publication"]


SCRIPT = """
import sys
import tiny
from hf_auxselect import TaskSelectionCallback

repo = sys.argv[1]
callback = TaskSelectionCallback(warmup=4, projection_dim=16, report_to_hub=repo == "own" or repo)
trainer = tiny.sft_trainer(
    "run", callback, push_to_hub=True, hub_model_id="me/model", hub_always_push=True,
    save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
)
trainer.train()
trainer.push_to_hub()
tiny.leave()
"""


def run_script(server, directory, *launcher, repo):
    """As a user's: the client reads its address and token from the environment."""
    (directory / "script.py").write_text(SCRIPT)
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(directory / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    }
    done = subprocess.run(
        [sys.executable, *launcher, "script.py", repo],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    commits = [repo.commits for repo in server.repos.values()]
    uploaded = [content for oids in commits for _, files in oids for content in files.values()]
    assert TOKEN.encode() not in b"".join(uploaded)
    return done.stderr


def test_a_script_whose_trainer_pushes(tmp_path):
    with hub_server() as server:
        run_script(server, tmp_path, repo="own")
        repo = server.repos["model", "me/model"]
        text = server.card("me/model")
    assert "adapter_model.safetensors" in repo.files
    assert {"task_selection/report.json", "task_selection/left_out.png"} <= set(repo.files)
    assert not any(name.startswith("_") for name in repo.files)
    assert sections(text) == 1 and "It has been trained using [TRL]" in text
    assert "(task_selection/left_out.png)" in text
    state = json.loads((tmp_path / "run" / "checkpoint-10" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    data = ModelCard(text).data
    assert [result.metric_value for result in data.eval_results] == [round(losses[-1], 4)]
    assert {"hf-auxselect", "task-selection", "trl", "sft"} <= set(data.tags)
    # The first checkpoint is saved after the selection: every card that was uploaded has it.
    cards = [files["README.md"].decode() for _, files in repo.commits if "README.md" in files]
    assert len(cards) >= 3 and all(sections(text) == 1 for text in cards)


def test_two_processes_end_although_the_report_is_refused(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with hub_server() as server:
        server.fail("me/report/preupload", status=403, times=99)
        told = run_script(server, tmp_path, *launcher, repo="me/report")
        assert server.asked("me/report/preupload") == 1
        assert server.repos["model", "me/report"].files == {}
        assert "adapter_model.safetensors" in server.repos["model", "me/model"].files
        assert sections(server.card("me/model")) == 0
    assert told.count("use one with write permission") == 1
    SelectionReport.load(tmp_path / "run" / "_task_selection")


@pytest.mark.parametrize("kind", tiny.TRAINERS)
def test_the_section_is_in_every_card_that_a_trainer_writes(hub, kind, run_dir):
    callback = tiny.callback(report_to_hub=True, selector=FAST)
    trainer = tiny.TRAINERS[kind](run_dir, callback, **PUSHING)
    trainer.create_model_card()
    assert sections((run_dir / "README.md").read_text()) == 0  # nothing is selected yet
    trainer.train()
    assert hub.repos["model", "me/model"].private
    assert sections(hub.card("me/model")) == 1
    loss = trainer.evaluate()["eval_loss"]
    trainer.push_to_hub()
    data = ModelCard(hub.card("me/model")).data
    assert sections(hub.card("me/model")) == 1
    assert [result.metric_value for result in data.eval_results] == [round(loss, 4)]
    assert {"hf-auxselect", "task-selection"} <= set(data.tags)
    trainer.train()  # once more: the card is edited once
    trainer.create_model_card()
    assert sections((run_dir / "README.md").read_text()) == 1


def test_the_measured_loss_is_that_of_the_pushed_model(run_dir):
    trainer = tiny.plain_trainer(run_dir, load_best_model_at_end=True, **SAVING)
    trainer.state.global_step = 10
    trainer.state.log_history = [
        {"step": 5, "eval_loss": 1.0},
        {"step": 10, "eval_loss": 2.0, "eval_a_loss": 3.0},
        {"step": 10, "train_loss": 4.0},
    ]
    assert final_loss(trainer, None) == 2.0
    assert final_loss(trainer, "a") == 3.0
    trainer.state.best_global_step = 5
    assert final_loss(trainer, None) == 1.0
    trainer.state.best_global_step, trainer.state.global_step = None, 9
    assert final_loss(trainer, None) is None
    for loss in (float("nan"), float("inf")):  # no report, whose JSON has neither, could be pushed
        trainer.state.log_history = [{"step": 9, "eval_loss": loss}]
        assert final_loss(trainer, None) is None


def test_a_repo_of_its_own_leaves_the_trainers_card_alone(hub, run_dir):
    callback = tiny.callback(report_to_hub="me/report", selector=FAST)
    trainer = tiny.sft_trainer(run_dir, callback, hub_private_repo=True)
    trainer.train()
    trainer.create_model_card()
    assert sections((run_dir / "README.md").read_text()) == 0
    repo = hub.repos["model", "me/report"]
    assert repo.private and sections(hub.card("me/report")) == 1
    assert json.loads(repo.files["task_selection/report.json"])["selected"] == ["a", "c"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 401}, "log in with `hf auth login`"),
        ({"status": 403}, "use one with write permission"),
        ({"status": 404}, "check the name"),
        ({"status": 409}, "push again when it is done"),
        ({"status": 429}, "too many requests"),
        ({"status": 503}, "has failed (503)"),
        ({"drop": True}, "cannot be reached"),
    ],
    ids=["401", "403", "404", "409", "429", "503", "dropped"],
)
def test_a_push_that_fails_does_not_end_the_run(hub, run_dir, caplog, how, message):
    hub.fail("POST .*/commit/", times=99, **how)
    callback = tiny.callback(report_to_hub="me/report", selector=FAST)
    trainer = tiny.sft_trainer(run_dir, callback, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5
    (warning,) = logged(caplog)
    assert message in warning and TOKEN not in caplog.text
    assert f"`hf-auxselect push {run_dir}/_task_selection me/report`" in warning
    assert hub.repos["model", "me/report"].files == {}
    assert SelectionReport.load(run_dir / "_task_selection").selected == ["a", "c"]


def test_an_error_of_ours_does_not_end_the_run_either(hub, run_dir, caplog, monkeypatch):
    def fail(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(card, "section", fail)
    callback = tiny.callback(report_to_hub="me/report", selector=FAST)
    tiny.sft_trainer(run_dir, callback, max_steps=5).train()
    assert "a bug" in logged(caplog)[0]


def test_a_card_that_cannot_be_read_stays(run_dir, caplog):
    callback = tiny.callback(report_to_hub=True, selector=FAST)
    trainer = tiny.sft_trainer(run_dir, callback, hub_model_id="me/model", max_steps=5)

    def write_card(*args, **kwargs):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "README.md").write_text("---\na: [\n---\n")

    trainer.create_model_card = write_card
    trainer.train()  # offline: the push fails
    trainer.create_model_card()
    assert "the model card stays as it is" in logged(caplog)[-1]
    assert (run_dir / "README.md").read_text() == "---\na: [\n---\n"


def test_other_processes_do_not_push(hub, run_dir):
    callback = tiny.callback(report_to_hub="me/report", selector=FAST)
    trainer = tiny.sft_trainer(run_dir, callback, max_steps=5)
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert callback.report is not None and not hub.repos


def test_a_trainer_without_a_repo_is_refused_before_the_first_step(run_dir):
    trainer = tiny.sft_trainer(run_dir, tiny.callback(report_to_hub=True))
    with pytest.raises(ValueError, match=r"report_to_hub=True .* hub_model_id='user/name'"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("value", [False, "", 1, ["me/model"]])
def test_values_that_mean_nothing(value):
    with pytest.raises(ValueError, match=r"report_to_hub must be None, True .*, got"):
        TaskSelectionCallback(report_to_hub=value)


def test_a_trainer_is_freed(run_dir):
    """At once, with its callback: neither waits for the next collection of cycles."""
    callback = tiny.callback(report_to_hub=True, selector=FAST)
    gc.collect()
    gc.disable()
    try:
        trainer = tiny.plain_trainer(run_dir, callback, hub_model_id="me/model", max_steps=5)
        trainer.train()  # offline: the push fails
        trainer.create_model_card()
        assert sections((run_dir / "README.md").read_text()) == 1
        freed = [weakref.ref(trainer), weakref.ref(callback)]
        del trainer, callback
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()
