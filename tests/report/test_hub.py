"""Pushes with the real client, over HTTP, to a server that stands in for the Hub."""

import io
import json
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from hub_server import TOKEN, forget_connections, hub_server, use
from huggingface_hub import ModelCard, constants
from reference import random_store

from hf_auxselect import ForwardSelection, GradExLogistic, SelectionReport
from hf_auxselect.cli import main
from hf_auxselect.report import card, strategy_record
from hf_auxselect.report.content import Evaluation, Measurement
from hf_auxselect.report.hub import RETRIES, PushError, Retries, push
from hf_auxselect.selectors import SelectionProblem

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "comment": f"{card.END} --> <!--",
    "yaml": "---\nbase_model: evil\n---",
    "quotes": "\"'`$(rm)`: [a, b]\n# heading\n| cell |",
    "right to left": "\u202eabc\u202c",
    "emoji": "🙂" * 300,
}
USERS_CARD = """---
# my own comment
license: "mit"   # quoted
language: no
tags:
  - mine
  - no
datasets: [me/data]
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: MMLU, type: mmlu}
    metrics: [{type: accuracy, value: 0.5}]
extra: {a: 1}
---
# My model

My own  text, with trailing spaces  
and `code`.
"""


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        use(monkeypatch, server)
        yield server


@pytest.fixture
def waits(monkeypatch):
    """The seconds that a push waits between its attempts; it does not wait for them."""
    waited = []
    monkeypatch.setattr(
        "hf_auxselect.report.hub.RETRIES", Retries(sleep=waited.append, seconds=20.0)
    )
    # The client waits by itself between attempts of some of its requests.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return waited


@pytest.fixture
def report():
    store = random_store(1)
    fitted = GradExLogistic().fit(store)
    problem = SelectionProblem(fitted.estimate, store.task_names, store.task_sizes)
    selection = ForwardSelection().select(problem)
    report = SelectionReport(
        weights=selection.weights,
        history=list(selection.history),
        estimator=strategy_record(GradExLogistic()),
        selector=strategy_record(ForwardSelection()),
        run={
            "model": "org/base",
            "adapter": True,
            "after": "continue",
            "seed": 0,
            "switch_step": 4,
        },
    )
    report.add_estimates(fitted, selection, store, seed=0)
    return report


def run(name, measured):
    weights = {"task0": 0.5, "task1": 0.5, "task2": 0.0}
    return Measurement(
        name=name, weights=weights, estimated=1.1, low=1.0, high=1.2, measured=measured, seconds=3.0
    )


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_command_pushes(hub, report, tmp_path, capsys):
    report.save(tmp_path / "report")
    assert main(["push", str(tmp_path), "me/model"]) == 0
    assert f"{hub.url}/me/model" in capsys.readouterr().out
    assert hub.card("me/model").count(card.BEGIN) == 1
    assert main(["push", str(tmp_path), "me/page", "--repo-type", "space"]) == 0
    assert hub.repos["space", "me/page"].files["index.html"].decode() == report.to_html()


class TestModelRepo:
    def test_one_commit_brings_card_data_and_figures(self, hub, report):
        url = report.push_to_hub("me/model", private=True)
        assert url == f"{hub.url}/me/model"
        repo = hub.repos["model", "me/model"]
        assert repo.private and len(repo.commits) == 2
        files = {
            f"task_selection/{name}" for name in ("report.json", "selection.json", "left_out.png")
        }
        assert files | {"README.md"} <= set(repo.files)
        saved = json.loads(repo.files["task_selection/report.json"])
        assert saved == json.loads(json.dumps(report.to_dict()))
        for name in ("index.html", "what_if.json", "left_out.svg", "similarity.png"):
            assert f"task_selection/{name}" in repo.files
        decision = json.loads(repo.files["task_selection/selection.json"])
        assert (decision["selected"], decision["weights"]) == (report.selected, report.weights)
        assert decision["estimated_loss"] == report.row("chosen").loss
        text = hub.card("me/model")
        assert text.count(card.BEGIN) == text.count(card.END) == 1
        assert "(task_selection/left_out.png)" in text
        assert "label token: " in text
        parsed = ModelCard(text).data
        assert parsed.base_model == "org/base" and parsed.base_model_relation == "adapter"
        assert {"hf-auxselect", "task-selection"} <= set(parsed.tags)

    def test_a_name_alone_is_that_of_the_user(self, hub, report):
        assert report.push_to_hub("model") == f"{hub.url}/ada/model"

    def test_pushing_again_changes_nothing(self, hub, report):
        report.push_to_hub("me/model")
        before = hub.card("me/model")
        report.push_to_hub("me/model")
        assert hub.card("me/model") == before
        assert len(hub.repos["model", "me/model"].commits) == 2

    def test_a_branch(self, hub, report, monkeypatch):
        repo = hub.repo("me/model")
        assert report.push_to_hub("me/model", revision="main").endswith("/tree/main")
        with pytest.raises(PushError, match=r"no such revision.*make the branch"):
            report.push_to_hub("me/model", revision="other")
        assert len(repo.commits) == 2

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    def test_the_users_card_stays_byte_for_byte(self, hub, report, newline, mark):
        before = mark + USERS_CARD.replace("\n", newline)
        hub.repo("me/model").commit({"README.md": before.encode()})
        report.verification = [run("chosen", 1.25)]
        report.push_to_hub("me/model")
        after = hub.repos["model", "me/model"].files["README.md"].decode()
        body = before.split(f"---{newline}", 2)[2]
        start = after.index(card.BEGIN)
        assert after[:start].endswith(body + newline)
        assert after[after.index(card.END) :] == card.END + newline
        for line in (
            "# my own comment",
            'license: "mit"   # quoted',
            "language: no",
            "extra: {a: 1}",
        ):
            assert line + newline in after
        assert "\n" not in after.replace("\r\n", "") or newline == "\n"
        parsed = ModelCard(after.removeprefix("\ufeff")).data
        assert parsed.tags == ["mine", "no", "hf-auxselect", "task-selection"]
        names = [result.dataset_name for result in parsed.eval_results]
        assert names == ["MMLU", "target"] and parsed.eval_results[1].metric_value == 1.25
        # Text around the section, too, and a changed section.
        around = after.replace(card.BEGIN, f"before  {newline}{card.BEGIN}") + f"after{newline}"
        hub.repos["model", "me/model"].commit({"README.md": around.encode()})
        report.warnings.append("something new")
        report.push_to_hub("me/model")
        again = hub.repos["model", "me/model"].files["README.md"].decode()
        assert again.partition(card.BEGIN)[0] == around.partition(card.BEGIN)[0]
        assert again.partition(card.END)[2] == around.partition(card.END)[2]
        assert "something new" in again

    def test_a_section_whose_end_was_deleted_takes_no_text_along(self, hub, report):
        text = f"---\n---\n# A\n{card.BEGIN}\nold\n\nmy text\n"
        hub.repo("me/model").commit({"README.md": text.encode()})
        report.push_to_hub("me/model")
        report.push_to_hub("me/model")
        after = hub.card("me/model")
        assert "my text" in after and after.count(card.END) == 1

    @pytest.mark.parametrize(
        "block",
        [
            "{license: mit, tags: [a]}",
            "  license: mit\n  tags: [a]",
            "tags: a\nlicense: mit",
            "tags: &x [a]\nlicense: mit\nother: *x",
            "# only a comment",
            "license: mit\ntags:\n- a\n# the last comment",
            "text: |\n  # no comment\n  - a\ntags:",
            "model-index:\n- name: mine\n  results: []\n- name: odd",
            "model-index: odd",
            "base: &b {tags: [a]}\n<<: *b",
        ],
    )
    def test_metadata_in_any_form_are_kept(self, hub, report, block):
        hub.repo("me/model").commit({"README.md": f"---\n{block}\n---\n# A\n".encode()})
        report.push_to_hub("me/model")
        before, after = yaml.safe_load(block) or {}, metadata(hub.card("me/model"))
        tags = before.pop("tags", None) or []
        assert after["tags"] == [*tags, "hf-auxselect", "task-selection"]
        assert {key: after[key] for key in before} == before
        for line in block.splitlines():
            assert not line.startswith("#") or line in hub.card("me/model")

    @pytest.mark.parametrize("block", ["a: [", "- a", "a: b: c", "date: 2026-99-99"])
    def test_metadata_that_cannot_be_read_are_not_touched(self, hub, report, block):
        repo = hub.repo("me/model")
        repo.commit({"README.md": f"---\n{block}\n---\n# A\n".encode()})
        with pytest.raises(
            PushError, match=r"README.md of the repo: its metadata are no .*correct it"
        ):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 2

    def test_a_base_model_that_the_user_names_stays(self, hub, report):
        text = "---\nbase_model: other/base\n---\n"
        hub.repo("me/model").commit({"README.md": text.encode()})
        report.push_to_hub("me/model")
        assert metadata(hub.card("me/model"))["base_model"] == "other/base"
        assert "base_model_relation" not in metadata(hub.card("me/model"))

    def test_an_empty_base_model_is_filled_in(self, report):
        """As Trainer writes it for a model that was made from a configuration."""
        text = card.edit_card("---\nbase_model: ''\n---\n", "", card.model_metadata(report, "me/m"))
        assert metadata(text)["base_model"] == "org/base"
        assert metadata(text)["base_model_relation"] == "adapter"

    def test_only_what_is_on_the_hub_is_named(self, hub, report, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "local" / "dir").mkdir(parents=True)
        paths = ["org/data", "local/dir", str(tmp_path)]
        report.sources = {f"task{i}": {"path": path} for i, path in enumerate(paths)}
        report.run["model"] = "SmolLM2-135M"  # of a directory: its last part
        report.push_to_hub("me/model")
        found = metadata(hub.card("me/model"))
        assert found["datasets"] == ["org/data"] and "base_model" not in found
        for name in (
            "json",
            "./data",
            "../a/b",
            "~/a",
            "a/b/c",
            "C:\\a",
            "data/train.jsonl",
            "a b/c",
        ):
            assert not card.is_hub_id(name)

    def test_a_restart_was_not_trained_on_what_it_dropped(self, report):
        report.sources = {name: {"path": f"org/{name}"} for name in report.weights}
        for after, named in (("continue", report.weights), ("restart", report.selected)):
            report.run["after"] = after
            lists = card.model_metadata(report, "me/model").lists
            assert lists["datasets"] == [f"org/{name}" for name in named]

    def test_the_loss_in_the_metadata_was_measured(self, hub, report):
        """Of the run, else of the ground-truth run on what the run was trained on; never estimated."""
        report.push_to_hub("me/model")
        assert "model-index" not in metadata(hub.card("me/model"))
        report.verification = [run("chosen", 1.25), run("all tasks", 1.5)]
        losses = []
        for change in ({}, {"after": "observe"}, {"final_loss": 1.125}):
            report.run |= change
            report.push_to_hub("me/model")
            ((result,),) = (m["results"] for m in metadata(hub.card("me/model"))["model-index"])
            losses.append(result["metrics"][0]["value"])
            told = "in a ground-truth run"
            assert (told in result["metrics"][0]["name"]) == ("final_loss" not in report.run)
            assert (told in hub.card("me/model")) == ("final_loss" not in report.run)
            assert result["source"]["url"].endswith("me/model/blob/main/task_selection/report.json")
        assert losses == [1.25, 1.5, 1.125]
        del report.run["final_loss"]
        report.verification = []
        report.push_to_hub("me/model")
        assert "model-index" not in metadata(hub.card("me/model"))

    def test_metrics_after_training_are_in_the_metadata(self, hub, report):
        at_switch = Evaluation(step=report.run["switch_step"], loss=2.0, metrics={"f1": 0.25})
        report.evaluations = [at_switch]
        report.push_to_hub("me/model")
        assert "model-index" not in metadata(hub.card("me/model"))
        report.evaluations += [replace(at_switch, step=99, loss=1.5, metrics={"f1": 0.5})]
        for _ in range(2):  # the second push replaces the first
            report.push_to_hub("me/model")
            ((result,),) = (m["results"] for m in metadata(hub.card("me/model"))["model-index"])
            assert [(m["type"], m["value"]) for m in result["metrics"]] == [
                ("loss", 1.5),
                ("f1", 0.5),
            ]
        assert "f1 0.5" in hub.card("me/model")

    @pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
    def test_hostile_names_are_text(self, hub, report, name, tmp_path):
        text = json.dumps(report.to_dict()).replace("task0", json.dumps(name)[1:-1])
        (tmp_path / "report.json").write_text(text)
        report = SelectionReport.load(tmp_path)
        report.warnings.append(name)
        report.sources = {name: {"path": name}}
        report.target = type(report.target)(**vars(report.target) | {"name": name})
        report.run["final_loss"] = 1.0
        report.push_to_hub("me/model")
        report.push_to_hub("me/model")
        text = hub.card("me/model")
        body = text.split("---\n", 2)[2]
        assert body.count(card.BEGIN) == body.count(card.END) == 1
        assert "<script>" not in body and "\u202e" not in text
        assert set(metadata(text)) == {"base_model", "base_model_relation", "tags", "model-index"}
        assert metadata(text)["base_model"] == "org/base"
        assert all(
            line.count("|") - line.count("\\|") == 4
            for line in text.splitlines()
            if line[:2] == "| "
        )


class TestOtherRepos:
    @pytest.mark.parametrize("lfs", [(), (".parquet", ".png")], ids=["regular", "lfs"])
    def test_a_dataset_shows_its_tables(self, hub, report, tmp_path, lfs):
        hub.lfs = lfs
        report.verification = [run("chosen", 1.25)]
        report.calibration = [run("all tasks", 1.5)]
        url = report.push_to_hub("me/data", repo_type="dataset")
        assert url == f"{hub.url}/datasets/me/data"
        repo = hub.repos["dataset", "me/data"]
        assert len(repo.commits) == 2
        configs = metadata(hub.card("me/data", "dataset"))["configs"]
        names = ["estimates", "tasks", "history", "ground_truth_runs"]
        assert [config["config_name"] for config in configs] == names
        assert [config.get("default") for config in configs] == [True, None, None, None]
        for name, content in repo.files.items():
            (tmp_path / "repo" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "repo" / name).write_bytes(content)
        tables = {
            name: load_dataset(
                str(tmp_path / "repo"), name, split="train", cache_dir=str(tmp_path / "cache")
            )
            for name in names
        }
        assert tables["estimates"]["loss"][:] == [row.loss for row in report.rows]
        assert tables["tasks"]["task"][:] == list(report.weights)
        assert tables["history"][0]["tasks"] == list(report.history[0].tasks)
        assert [r["purpose"] for r in tables["ground_truth_runs"]] == [
            "verification",
            "calibration",
        ]
        assert tables["ground_truth_runs"][0]["mixture"][0] == {"task": "task0", "share": 0.5}

    def test_a_dataset_without_estimates_has_no_empty_tables(self, hub):
        SelectionReport(weights={"a": 1.0, "b": 0.0}).push_to_hub("me/data", repo_type="dataset")
        files = hub.repos["dataset", "me/data"].files
        table = pq.read_table(io.BytesIO(files["task_selection/tasks.parquet"]))
        assert table.column("share").to_pylist() == [1.0, 0.0]
        assert "task_selection/history.parquet" not in files

    def test_subsets_of_the_user_stay(self, hub, report):
        text = "---\nconfigs:\n- config_name: mine\n  data_files: mine.csv\n---\n"
        hub.repo("me/data", "dataset").commit({"README.md": text.encode()})
        report.push_to_hub("me/data", repo_type="dataset")
        configs = metadata(hub.card("me/data", "dataset"))["configs"]
        assert [c["config_name"] for c in configs] == ["mine", "estimates", "tasks", "history"]
        assert not any(config.get("default") for config in configs)

    def test_a_space_shows_the_page(self, hub, report, monkeypatch):
        save = SelectionReport.save

        def save_with_page(self, directory):
            save(self, directory)
            (Path(directory) / "index.html").write_text("<p>page</p>")

        monkeypatch.setattr(SelectionReport, "save", save_with_page)
        assert report.push_to_hub("me/page", repo_type="space") == f"{hub.url}/spaces/me/page"
        files = hub.repos["space", "me/page"].files
        assert files["index.html"] == b"<p>page</p>" and "report.json" in files
        found = metadata(hub.card("me/page", "space"))
        assert found["sdk"] == "static" and "hf-auxselect" in found["tags"]

    def test_a_space_of_another_kind_is_not_overwritten(self, hub, report):
        repo = hub.repo("me/app", "space")
        repo.commit({"README.md": b"---\nsdk: gradio\n---\n"})
        with pytest.raises(
            PushError, match=r"sdk is 'gradio', but must be 'static'.*another repo_id"
        ):
            report.push_to_hub("me/app", repo_type="space")
        assert len(repo.commits) == 2

    def test_bad_arguments(self, hub, report):
        with pytest.raises(ValueError, match=r"repo_type must be one of .*got 'bucket'"):
            report.push_to_hub("me/model", repo_type="bucket")
        with pytest.raises(PushError, match="repo_id must be like 'user/name'"):
            report.push_to_hub("a/b/c")
        with pytest.raises(ValueError, match="token: got 22 characters") as raised:
            report.push_to_hub("me/model", token=f"{TOKEN}\n")
        assert TOKEN not in str(raised.value)
        assert not hub.requests


CREATE, STATE, CARD, COMMIT = (
    "POST /api/repos",
    "GET /api/models",
    "GET .*README",
    "POST .*/commit/",
)
CHECK, MODES = "POST /api/validate-yaml", "POST .*/preupload/"


class TestFailures:
    """Each with the request that it may happen in; nothing is committed, and the report stays."""

    @pytest.fixture
    def report(self):
        """One without estimates: figures take a while."""
        return SelectionReport(weights={"a": 1.0, "b": 0.0})

    @pytest.mark.parametrize(
        ("request_", "status", "message"),
        [
            (
                STATE,
                401,
                r"does not accept the token \(401\); log in with `hf auth login`, or pass",
            ),
            (COMMIT, 401, "hf auth login"),
            (COMMIT, 403, r"may not write there \(403\); use one with write permission"),
            (MODES, 403, "write permission"),
            (STATE, 404, r"no such repo or owner.*\(404\); check the name"),
            (CARD, 404, "check the name"),
            (COMMIT, 404, "check the name"),
            (COMMIT, 409, r"another change of the repo is under way \(409\); push again"),
            (COMMIT, 413, r"refused it \(413\)"),
        ],
    )
    def test_what_does_not_pass_is_not_tried_again(
        self, hub, report, waits, tmp_path, request_, status, message
    ):
        repo = hub.repo("me/model")
        repo.commit({"README.md": USERS_CARD.encode()})
        report.save(tmp_path)
        hub.fail(request_, status=status, times=99)
        with pytest.raises(PushError, match=message) as raised:
            report.push_to_hub("me/model")
        assert "\n" not in str(raised.value) and "told to fail" in str(raised.value)
        assert len(repo.commits) == 2 and repo.files == {"README.md": USERS_CARD.encode()}
        assert not waits and hub.asked(request_) == 1
        assert SelectionReport.load(tmp_path).to_dict() == report.to_dict()

    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (401, "log in with `hf auth login`"),
            (403, "use one with write permission"),
            (404, "check"),
        ],
    )
    def test_a_repo_that_may_not_be_made(self, hub, report, waits, status, message):
        hub.fail(CREATE, status=status)
        with pytest.raises(PushError, match=message):
            report.push_to_hub("others/model")
        assert not hub.repos and not waits

    def test_metadata_that_the_hub_refuses(self, hub, report, waits):
        repo = hub.repo("me/model")
        body = '{"errors": [{"message": "license is wrong"}], "warnings": []}'
        hub.fail(CHECK, status=400, body=body)
        with pytest.raises(PushError, match=r"Invalid metadata.*license is wrong"):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 1 and not waits

    @pytest.mark.parametrize("request_", [CREATE, STATE, CARD, CHECK, MODES, COMMIT])
    @pytest.mark.parametrize(
        "how",
        [{"status": 429}, {"status": 500}, {"status": 503, "body": "<html>"}, {"drop": True}],
        ids=["429", "500", "503", "dropped"],
    )
    def test_what_may_pass_is_tried_again(self, hub, report, waits, request_, how):
        repo = hub.repo("me/model")
        hub.fail(request_, times=2, **how)
        report.push_to_hub("me/model")
        assert len(repo.commits) == 2
        # Newer clients try again by themselves where they ask how to upload.
        assert waits == [1.0, 2.0] or (request_ == MODES and not waits)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"status": 429}, r"too many requests \(429\); push again later \(tried 5 times\)"),
            ({"status": 500}, r"has failed \(500\); push again later \(tried 5 times\)"),
            ({"drop": True}, "cannot be reached.*check the connection and HF_ENDPOINT"),
        ],
        ids=["429", "500", "dropped"],
    )
    def test_it_gives_up_in_the_end(self, hub, report, waits, how, message):
        repo = hub.repo("me/model")
        hub.fail(COMMIT, times=99, **how)
        with pytest.raises(PushError, match=message):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 1 and hub.asked(COMMIT) == 5
        assert waits == [1.0, 2.0, 4.0, 8.0]

    @pytest.mark.parametrize(
        ("headers", "wait"),
        [
            ({"Retry-After": "7"}, 7.0),
            ({"ratelimit": '"api";r=0;t=9'}, 9.0),
            ({"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}, 0.0),
            ({"Retry-After": "soon"}, 1.0),
        ],
        ids=["seconds", "rate limit", "date", "unknown"],
    )
    def test_it_waits_as_long_as_the_hub_asks(self, hub, report, waits, headers, wait):
        hub.fail(COMMIT, status=429, headers=headers)
        report.push_to_hub("me/model")
        assert waits == [wait]

    def test_it_does_not_wait_for_an_hour(self, hub, report, waits):
        hub.fail(COMMIT, status=429, headers={"Retry-After": "3600"})
        with pytest.raises(PushError, match="asks to wait 3600 seconds"):
            report.push_to_hub("me/model")
        assert not waits

    def test_an_answer_that_does_not_come(self, hub, report):
        repo = hub.repo("me/model")
        hub.fail(COMMIT, stall=1.0)
        waited = []
        push(report, "me/model", retries=Retries(seconds=0.5, sleep=waited.append))
        assert len(waited) == 1 and len(repo.commits) == 2
        hub.fail(STATE, stall=1.0, times=99)
        with pytest.raises(PushError, match=r"TimeoutError: no answer within 0\.2 seconds"):
            push(report, "me/model", retries=Retries(attempts=2, seconds=0.2, sleep=waited.append))

    def test_a_server_that_is_not_there(self, hub, report, waits, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(PushError, match="cannot be reached"):
            report.push_to_hub("me/model")

    def test_offline(self, hub, report, waits, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        forget_connections()
        with pytest.raises(PushError, match="unset HF_HUB_OFFLINE"):
            report.push_to_hub("me/model")
        assert not waits and not hub.requests

    def test_a_repo_that_moves_meanwhile_is_read_again(self, hub, report, waits):
        """412: somebody has changed the card after it was read."""
        repo = hub.repo("me/model")
        repo.commit({"README.md": b"# old\n"})
        hub.fail(CHECK, before=lambda: repo.commit({"README.md": b"# new\n"}), stall=0.01)
        report.push_to_hub("me/model")
        assert "# new" in hub.card("me/model") and card.BEGIN in hub.card("me/model")
        assert len(repo.commits) == 4 and len(waits) == 1

    def test_others_who_do_not_stop(self, hub, report, waits):
        repo = hub.repo("me/model")
        turns = iter(range(99))
        hub.fail(
            CHECK, times=99, stall=0.01, before=lambda: repo.commit({"other": b"%d" % next(turns)})
        )
        with pytest.raises(PushError, match=r"others kept committing to the repo \(412\)"):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 6 and card.FOLDER not in "".join(repo.files)

    def test_a_commit_whose_answer_is_lost_is_not_made_twice(self, hub, report, waits):
        repo = hub.repo("me/model")
        hub.fail(COMMIT, obey=True, drop=True)
        report.push_to_hub("me/model")
        assert len(repo.commits) == 2 and card.BEGIN in hub.card("me/model")

    def test_an_upload_of_a_large_file_that_fails(self, hub, report, waits):
        hub.lfs = (".json",)
        repo = hub.repo("me/model")
        hub.fail("PUT /large", status=403, times=99)
        with pytest.raises(PushError, match="403"):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 1

    def test_a_card_that_is_not_text(self, hub, report, waits):
        repo = hub.repo("me/model")
        repo.commit({"README.md": b"\xff\xfe"})
        with pytest.raises(PushError, match=r"README\.md of the repo is not UTF-8"):
            report.push_to_hub("me/model")
        assert len(repo.commits) == 2

    def test_errors_of_ours_are_not_taken_for_the_hubs(self, hub, report, monkeypatch):
        def fail(*args):
            raise TypeError("ours")

        monkeypatch.setattr(card, "edit_card", fail)
        with pytest.raises(TypeError, match="ours"):
            report.push_to_hub("me/model")

    def test_the_time_limits_are_below_that_of_process_groups(self):
        most = RETRIES.attempts * RETRIES.seconds + (RETRIES.attempts - 1) * RETRIES.longest_wait
        assert most < 600


class TestToken:
    @pytest.fixture
    def report(self):
        return SelectionReport(weights={"a": 1.0, "b": 0.0})

    @pytest.mark.parametrize("given", ["argument", "environment"])
    @pytest.mark.parametrize(
        "how",
        [{}, {"status": 403}, {"status": 500}, {"drop": True}],
        ids=["good", "403", "500", "dropped"],
    )
    def test_it_is_sent_and_never_told(
        self, hub, report, waits, monkeypatch, caplog, capfd, tmp_path, given, how
    ):
        if given == "argument":
            monkeypatch.delenv("HF_TOKEN")
        logger = logging.getLogger("huggingface_hub")
        monkeypatch.setattr(logger, "propagate", True)
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, "huggingface_hub")
        if how:
            echo = json.dumps({"error": f"{185 * 'x'} {TOKEN} is bad"})
            hub.fail(COMMIT, times=99, body=echo, **how)
        told = ""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                report.push_to_hub("me/model", token=TOKEN if given == "argument" else None)
            except PushError as error:
                told = f"{error!r} {error}"
                assert error.__suppress_context__ and error.__cause__ is None
        assert bool(told) == bool(how)
        for _, path, headers, _ in hub.requests:
            if "agent" not in path:
                assert (
                    headers.get("authorization", headers.get("Authorization")) == f"Bearer {TOKEN}"
                )
        report.save(tmp_path)
        content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        content += b"".join(b"".join(repo.files.values()) for repo in hub.repos.values())
        captured = capfd.readouterr()
        bodies = b"".join(body for _, _, _, body in hub.requests)
        told += captured.out + captured.err + caplog.text + str([str(w.message) for w in warned])
        assert "SECRET" not in told
        assert TOKEN.encode() not in content + bodies
