"""The recipe with an encoder and a classification head, at a tiny size."""

import json
import random
import sys

import numpy as np
import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction

from hf_auxselect import SelectionReport, TaskSelectionCallback
from recipes import classification
from recipes.domains import DataArguments, load
from recipes.metrics import F1, Accuracy

WORDS = {1: ["good", "great", "fine"], 0: ["bad", "poor", "dull"]}
TINY = [
    "--warmup",
    "0.5",
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--disable_tqdm",
    "true",
]


def rows(num_rows, *, seed, thing, wrong=False):
    """Short reviews of a thing; with the other label if they are wrong."""
    rng = random.Random(seed)
    found = []
    for _ in range(num_rows):
        label = rng.randrange(2)
        text = f"the {thing} is {rng.choice(WORDS[label])} , item {rng.randrange(90)}"
        found.append({"text": text, "label": 1 - label if wrong else label})
    return found


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "domains"
    directory.mkdir()
    for seed, thing in enumerate(["camera", "film", "phone"]):
        write(directory / f"{thing}.jsonl", rows(12, seed=seed, thing=thing))
    write(directory / "noise.jsonl", rows(12, seed=5, thing="lamp", wrong=True))
    write(directory / "phone.heldout.jsonl", rows(8, seed=9, thing="phone"))
    write(directory / "film.heldout.jsonl", rows(4, seed=8, thing="film"))
    return directory


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        options = ["--use_cpu", "true", "--output_dir", str(tmp_path / "out"), *TINY, *arguments]
        monkeypatch.setattr(sys, "argv", ["classification.py", *map(str, options)])
        classification.main()
        return capsys.readouterr().out

    return run


def arguments(folder, **options):
    return DataArguments(**{"target": "phone", "data_dir": str(folder)} | options)


class TestScript:
    def test_it_trains_and_measures(self, run_main, folder, tmp_path):
        shown = run_main("--data_dir", folder, "--target", "phone", "--confirm", 2)
        assert "gradient pass after step 2" in shown
        assert "target: loss" in shown
        selection = json.loads((tmp_path / "out" / "_task_selection/selection.json").read_text())
        assert set(selection["weights"]) == {"camera", "film", "noise"}
        report = SelectionReport.load(tmp_path / "out" / "_task_selection")
        assert report.confirmation is not None
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_seeds_check_the_choice_by_training(self, run_main, folder, tmp_path):
        shown = run_main("--data_dir", folder, "--target", "phone", "--compare_seeds", 1)
        for line in (
            "chosen by hf-auxselect",
            "all tasks",
            "weights in random order",
            "most similar",
        ):
            assert f"  {line}" in shown
        assert "of which the first 2 are shared" in shown
        assert "The choice " in shown
        assert "Rank correlation of the estimated loss with the measured loss" in shown
        runs = json.loads((tmp_path / "out" / "measured-0.json").read_text())["runs"]
        assert len(runs) == 4
        for run in runs:
            assert set(run["measured"]) == {"loss", "accuracy"}
        steps = json.loads(
            (tmp_path / "out" / "all-tasks-0" / "checkpoint-4" / "trainer_state.json").read_text()
        )
        assert steps["global_step"] == 4

    def test_a_pretrained_encoder_gets_lora_and_a_head(self, run_main, folder, tmp_path):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        domains = load(arguments(folder))
        directory = tmp_path / "encoder"
        BertForSequenceClassification(config).save_pretrained(directory)
        classification.words(domains.training_texts()).save_pretrained(directory)
        run_main("--data_dir", folder, "--target", "phone", "--model", directory)
        saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert "classifier" in saved["modules_to_save"]
        assert any(name.endswith("query") for name in saved["target_modules"])

    def test_several_processes_and_a_comparison_exclude_each_other(self, run_main, folder):
        with pytest.raises(
            ValueError, match=r"--compare_seeds 2 .* got 1 process.* --max_steps -1"
        ):
            run_main(
                "--data_dir", folder, "--target", "phone", "--compare_seeds", 2, "--max_steps", -1
            )


class TestData:
    def test_rows_of_the_target_that_are_not_trained_on_are_split(self, folder):
        domains = load(arguments(folder))
        assert list(domains.tasks) == ["camera", "film", "noise"]
        assert len(domains.target) == len(domains.measured) == 10
        assert domains.num_labels == 2

    def test_the_target_may_be_a_task(self, folder):
        domains = load(arguments(folder, train_on_target=True, max_rows=7))
        assert [len(task) for task in domains.tasks.values()] == [7, 7, 7, 7]
        assert list(domains.tasks) == ["camera", "film", "noise", "phone"]
        found = {row["text"] for half in (domains.target, domains.measured) for row in half}
        assert found == {row["text"] for row in rows(8, seed=9, thing="phone")}

    def test_domains_of_a_data_set_with_a_column_for_them(self, tmp_path):
        pairs = [
            {
                "genre": f"g{i % 3}",
                "premise": f"p{i}",
                "hypothesis": f"h{i}",
                "label": i % 3 - (i == 6),
            }
            for i in range(30)
        ]
        write(tmp_path / "train.jsonl", pairs[:24])
        write(tmp_path / "validation.jsonl", pairs[15:])
        options = {"dataset_name": str(tmp_path), "heldout_split": "validation", "target": "g1"}
        domains = load(arguments(None, data_dir=None, **options))
        assert {name: len(task) for name, task in domains.tasks.items()} == {"g0": 7, "g2": 8}
        assert domains.tasks["g2"].column_names == ["text", "text_pair", "label"]
        assert {text[1:] for text in domains.tasks["g2"]["text"]} == set(map(str, range(2, 24, 3)))
        assert len(domains.target) + len(domains.measured) == 13
        assert "h2" in set(domains.training_texts())
        with pytest.raises(ValueError, match=r"--heldout_split test: .* splits train, validation"):
            load(arguments(None, data_dir=None, **options | {"heldout_split": "test"}))
        with pytest.raises(ValueError, match=r"has no column domain; it has genre, "):
            load(arguments(None, data_dir=None, **options, task_column="domain"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data_dir": "nowhere"}, r"--data_dir nowhere is no folder of files TASK.jsonl"),
            ({"target": "shoe"}, r"--target shoe: .* held-out rows of it, only of film, phone"),
            ({"target": "camera"}, r"--target camera: .* only of film, phone\."),
        ],
    )
    def test_arguments_that_are_wrong(self, folder, options, message):
        with pytest.raises(ValueError, match=message):
            load(arguments(folder, **options))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "a", "label": 0.5}', r"task film, row 1: got the label 0.5 .*Regression"),
            ('{"text": "a", "label": "good"}', r"row 1: got the label 'good'"),
            ('{"text": 3, "label": 1}', r"got the label 1 and int; expected"),
            ('{"label": 1}', r"line 1 of film.jsonl is no row like .* \(KeyError: 'text'\)"),
            ("text", r"line 1 of film.jsonl is no row like"),
        ],
    )
    def test_rows_that_are_wrong(self, folder, line, message):
        (folder / "film.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            load(arguments(folder))

    def test_too_few_tasks(self, folder):
        for name in ("film", "noise"):
            (folder / f"{name}.jsonl").unlink()
        with pytest.raises(ValueError, match=r"leaves 1 task\(s\) \(camera\) and 20 row\(s\)"):
            load(arguments(folder))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no files TASK.jsonl"):
            load(arguments(tmp_path))


def test_the_vocabulary_is_that_of_frequent_words():
    tokenizer = classification.words(["Good phone , a phone", "good film"])
    assert tokenizer.get_vocab() == {
        **{token: i for i, token in enumerate(classification.SPECIAL_TOKENS.values())},
        "good": 4,
        "phone": 5,
    }
    ids = tokenizer("GOOD phone!")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "good", "phone", "[UNK]", "[SEP]"]
    pair = tokenizer("good", "phone")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair) == ["[CLS]", "good", "[SEP]", "phone", "[SEP]"]


def test_a_seed_draws_the_encoder_and_hooks_split_it_by_example(folder, tmp_path, caplog):
    domains = load(arguments(folder))
    tokenizer = classification.words(domains.training_texts())
    domains = classification.tokenized(domains, tokenizer, 16)

    def weights(seed):
        args = classification.Arguments(
            str(tmp_path), max_steps=3, seed=seed, use_cpu=True, disable_tqdm=True
        )
        callback = TaskSelectionCallback(after="observe", projection_dim=16)
        trainer = classification.build(domains, tokenizer, callback, args)
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, trainer

    (one, trainer), (again, _), (other, _) = weights(0), weights(0), weights(1)
    assert tiny.same(one, again)
    assert not tiny.same(one, other)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.train()
    assert "alone" not in caplog.text


class TestMetrics:
    def test_accuracy_and_f1(self):
        logits = np.array([[2.0, 1], [0, 1], [0, 3], [1, 0], [0, 1]])
        labels = np.array([0, 1, 0, 1, 1])
        for predictions in (logits, (logits, "hidden states")):
            found = classification.compute_metrics(
                EvalPrediction(predictions=predictions, label_ids=labels)
            )
            assert found == {
                "accuracy": pytest.approx(3 / 5),
                "f1": pytest.approx((1 / 2 + 2 / 3) / 2),
            }

    def test_f1_of_a_class(self):
        given = {"predictions": [0, 1, 1, 0, 1], "references": [0, 1, 0, 1, 1]}
        assert F1().compute(**given) == {"f1": pytest.approx(2 / 3)}
        assert F1().compute(**given, pos_label=0) == {"f1": pytest.approx(1 / 2)}
        assert F1().compute(**given, pos_label=2) == {"f1": 0.0}
        with pytest.raises(ValueError, match=r"average='micro': expected 'binary' or 'macro'"):
            F1().compute(**given, average="micro")

    def test_accuracy_of_classes(self):
        result = Accuracy().compute(predictions=[0, 2, 1], references=[0, 2, 2])
        assert result == {"accuracy": pytest.approx(2 / 3)}
