"""Data sets as people hand them over: formats, transforms, wrappers, labels, collators, leaks."""

import logging
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from peft import LoraConfig
from reference import per_example_gradients
from tiny import callback, trained
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from transformers import BatchEncoding, BatchFeature, DataCollatorWithFlattening

from hf_auxselect import (
    FixedSelection,
    concatenate_tasks,
    leaked_target,
    plan,
)
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import SCALARS, forward_label_logits
from hf_auxselect.fingerprint import digest
from hf_auxselect.seeds import random_permutation
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.data import ModelRows, collate_function, read_tasks

NAMES = ("a", "b", "c", "d")


def test_a_task_whose_share_is_below_the_least_of_a_mixture():
    labels = ["rare"] + ["common"] * 1_000_000
    trainer = SimpleNamespace(
        train_dataset=Dataset.from_dict({"task": labels}), args=SimpleNamespace()
    )
    with pytest.raises(ValueError, match="the task 'rare' has 1 of the 1000001 rows of train_data"):
        read_tasks(trainer, "task")


def planned(trainer, cb=None):
    """The plan of a trainer's run."""
    cb = cb or callback()
    cb.attach(trainer)
    return cb._make_plan(trainer, 10)


def said(trainer, caplog, cb=None):
    """What is said of the target before the run."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        leaked_target.warn_of_leaked_target(planned(trainer, cb), "task")
    return caplog.text


class Rows(torch.utils.data.Dataset):
    """A map-style dataset of PyTorch."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TestDigest:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([1, 2], (1.0, 2.0)),
            ([1, 2], np.array([1, 2], np.int8)),
            ([1, 2], torch.tensor([1, 2], dtype=torch.bfloat16)),
            ([[1, 2], [3, 4]], [torch.tensor([1, 2]), np.array([3, 4])]),
            ([[1], [1, 2]], np.array([np.array([1]), np.array([1, 2])], object)),
            ([0.1, 2], np.array([0.1, 2], np.float32)),
            ([0.1, 2], torch.tensor([0.1, 2], dtype=torch.float64)),
            ([True, False], [1, 0]),
            ([], torch.tensor([])),
            (["a", "bc"], np.array(["a", "bc"])),
            (3, torch.tensor(3)),
            ({"x": 1, "y": "z"}, BatchEncoding({"y": "z", "x": np.int64(1)})),
            ({"bytes": b"1", "path": "here"}, {"bytes": b"1", "path": "there"}),
            ({1, 2}, {2, 1}),
        ],
    )
    def test_what_holds_the_values_does_not_matter(self, one, other):
        assert digest(one) == digest(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([1, 2], [2, 1]),
            ([1, 2], [1.5, 2]),
            ([[1, 2]], [1, 2]),
            ([[1], [1, 2]], [[1, 1], [2]]),
            ("1", 1),
            ("1", b"1"),
            (["ab", "c"], ["a", "bc"]),
            (None, 0),
            (None, []),
            ({"x": 1}, {"y": 1}),
            ({"x": {"y": [1]}}, {"x": {"y": [2]}}),
            (2**70, 2**71),
            ([2**63, -1], [2**63 + 1, -1]),
            (np.array([2**63], np.uint64), np.array([2**63 + 1], np.uint64)),
            (np.array([1j]), np.array([2j])),
            (np.array(["2020-01-01"], "M8[D]"), np.array(["2020-01-02"], "M8[D]")),
        ],
    )
    def test_values_do(self, one, other):
        assert digest(one) != digest(other)

    @pytest.mark.parametrize("make", [np.arange, torch.arange, lambda n: list(range(n))])
    def test_one_number_in_the_middle_of_many(self, make):
        one, other = make(5000), make(5000)
        other[2500] = 0
        assert digest(one) == digest(make(5000)) != digest(other)

    def test_objects_are_what_they_hold_and_not_where_they_are(self):
        class Clip:
            def __init__(self, samples):
                self.samples = samples
                self.itself = self

        assert digest(Clip([1, 2])) == digest(Clip([1, 2])) != digest(Clip([1, 3]))

    def test_images_are_their_pixels(self):
        from PIL import Image as Pictures

        def picture(value, mode="RGB"):
            return Pictures.fromarray(np.full((4, 4, 3), value, np.uint8)).convert(mode)

        assert digest(picture(3)) == digest(picture(3)) != digest(picture(4))
        assert digest(picture(3)) == digest(np.full((4, 4, 3), 3))
        assert digest(picture(3, "P")) != digest(picture(255, "P"))

    def test_every_process_says_the_same(self):
        code = (
            "from hf_auxselect.fingerprint import digest; import torch; "
            "print(digest({'b', 'a'}, {'x': torch.arange(9), 'y': object()}).hex())"
        )
        seen = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(plan.__file__).parents[1])},
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(seen) == 1


class TestALeakedTarget:
    FORMATS = (None, "torch", "numpy")

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    @pytest.mark.parametrize("train_format", FORMATS)
    @pytest.mark.parametrize("target_format", FORMATS)
    def test_a_whole_task_in_any_format(self, kind, train_format, target_format, run_dir, caplog):
        trainer = tiny.TRAINERS[kind](run_dir)
        data = trainer.train_dataset
        own = data.filter(lambda row: row["task"] == "a")
        trainer.train_dataset = data.with_format(train_format)
        trainer.eval_dataset = own.with_format(target_format)
        assert "the target equals the training task 'a' row for row" in said(trainer, caplog)

    def test_another_set_as_large_as_a_task_in_torch_format_is_none(self, run_dir, caplog):
        trainer = tiny.plain_trainer(run_dir)
        trainer.train_dataset = trainer.train_dataset.with_format("torch")
        trainer.eval_dataset = tiny.tokenize(tiny.sums(24, 9)).with_format("torch")
        assert said(trainer, caplog) == ""

    @pytest.mark.parametrize("format_", FORMATS)
    def test_parts_of_several_tasks_are_counted(self, format_, run_dir, caplog):
        """Against comparing each row with each."""
        trainer = tiny.plain_trainer(run_dir)
        data = trainer.train_dataset
        target = concatenate_datasets(
            [data.select([0, 1, 2, 30]).remove_columns("task"), tiny.tokenize(tiny.sums(5, 9))]
        )
        trainer.eval_dataset = target.shuffle(seed=1).with_format(format_)
        text = said(trainer, caplog)
        ids = [row["input_ids"] for row in target]
        counts = {
            name: sum(i in [r["input_ids"] for r in data if r["task"] == name] for i in ids)
            for name in NAMES
        }
        assert counts["a"] >= 3
        assert "4 of the target's 9 rows are also rows of training tasks" in text
        for name, count in counts.items():
            assert (f"{count} of task {name!r}" in text) == (count > 0)

    def test_types_and_containers_of_the_columns_do_not_matter(self, run_dir, caplog):
        trainer = tiny.plain_trainer(run_dir)
        rows = [
            {
                "labels": torch.tensor(row["labels"]),
                "input_ids": np.array(row["input_ids"], np.int32),
                "attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.bool),
                "id": i,
            }
            for i, row in enumerate(trainer.train_dataset.select(range(3)))
        ]
        trainer.eval_dataset = Rows(rows)
        assert "3 of the target's 3 rows" in said(trainer, caplog)

    @pytest.mark.parametrize("removes", [True, False])
    def test_columns_that_the_model_does_not_read_do_not_matter(self, removes, run_dir, caplog):
        def with_ids(dataset, first):
            return dataset.add_column("id", range(first, first + len(dataset)))

        trainer = tiny.plain_trainer(run_dir, remove_unused_columns=removes)
        data = trainer.train_dataset
        trainer.train_dataset = with_ids(data, 0)
        trainer.eval_dataset = with_ids(data.select([0, 5]).remove_columns("task"), 1000)
        assert "2 of the target's 2 rows" in said(trainer, caplog)

    def test_equal_labels_alone_are_no_leak(self, run_dir):
        trainer = tiny.plain_trainer(run_dir)
        rows = ModelRows(trainer, trainer.train_dataset)
        assert rows.input_columns({"labels", "task"}, "task") == []
        assert rows.input_columns({"labels", "task", "text"}, "task") == ["labels", "text"]
        assert rows.input_columns({"labels", "id", "input_ids"}, "task") == ["input_ids", "labels"]

    def test_documents_of_packed_rows_are_found(self, run_dir, caplog):
        from trl import pack_dataset

        parts = {"a": tiny.sums(20, 1), "b": tiny.sums(9, 2, letters=True)}
        tokenized = {n: tiny.tokenize(d).remove_columns("attention_mask") for n, d in parts.items()}
        packed = concatenate_tasks({n: pack_dataset(d, 24, "bfd") for n, d in tokenized.items()})
        trainer = tiny.sft_trainer(
            run_dir,
            train_dataset=packed,
            eval_dataset=tokenized["b"].select([3, 8]),
            padding_free=True,
            max_length=None,
        )
        assert "2 of the target's 2 rows are also" in said(trainer, caplog)
        assert "2 of task 'b'" in caplog.text

    def test_of_a_huge_training_set_a_part_is_read(self, run_dir, caplog, monkeypatch):
        monkeypatch.setattr(leaked_target, "SECONDS_TO_COMPARE", -1.0)
        trainer = tiny.plain_trainer(run_dir)
        monkeypatch.setattr(leaked_target, "_CHUNK", 10)
        seed = planned(trainer).seed
        chunk = random_permutation(9, seed, "rows compared with the target")[0]
        trainer.eval_dataset = trainer.train_dataset.select(range(chunk * 10, chunk * 10 + 2))
        text = said(trainer, caplog)
        assert "of whose 81 rows 1 were looked at" in text

    def test_rows_are_read_as_they_are_stored(self, run_dir):
        """Pictures are not decoded, and the format does not matter."""
        trainer = tiny.plain_trainer(run_dir, remove_unused_columns=False)
        rows = ModelRows(trainer, pictures().with_format("torch"))
        (row,) = rows.stored(range(1, 2), ["image", "input_ids"])
        assert row["image"]["bytes"].startswith(b"\x89PNG")
        assert row["input_ids"].tolist() == [1, 2, 3]


def pictures(value=3, num_rows=6):
    """Rows with a picture each, of two tasks."""
    array = np.full((4, 4, 3), value, np.uint8)
    features = Features(
        {"image": Image(), "input_ids": List(Value("int64")), "task": Value("string")}
    )
    rows = [{"image": array, "input_ids": [1, 2, 3], "task": "ab"[i % 2]} for i in range(num_rows)]
    return Dataset.from_list(rows, features=features)


class TestTheFingerprint:
    """A run can be resumed if its rows are what they were, and not if one number has changed."""

    @staticmethod
    def of(trainer):
        return planned(trainer).fingerprint["training rows"]

    @staticmethod
    def of_rows(run_dir, dataset):
        trainer = tiny.plain_trainer(run_dir, remove_unused_columns=False)
        tasks = TaskRows.from_labels(["a", "b"] * (len(dataset) // 2))
        return plan._digest_of_rows(ModelRows(trainer, dataset), tasks)

    def test_images(self, run_dir):
        one = self.of_rows(run_dir, pictures())
        assert self.of_rows(run_dir, pictures()) == one
        assert self.of_rows(run_dir, pictures(4)) != one
        decoded = [pictures()[i] for i in range(6)]  # objects of PIL, at other addresses
        assert self.of_rows(run_dir, Rows(decoded)) == one

    def test_a_number_in_a_long_tensor(self, run_dir):
        def rows(change):
            values = torch.arange(4000.0)
            values[2000] += change
            return Rows([{"pixel_values": values, "task": t} for t in "ab"])

        one = self.of_rows(run_dir, rows(0))
        assert self.of_rows(run_dir, rows(0)) == one
        assert self.of_rows(run_dir, rows(1)) != one

    def test_sounds(self, run_dir):
        def rows(last):
            audio = {"array": np.append(np.zeros(2000), last), "path": None, "sampling_rate": 16}
            return Rows([{"audio": audio, "task": t} for t in "ab"])

        assert self.of_rows(run_dir, rows(0.5)) == self.of_rows(run_dir, rows(0.5))
        assert self.of_rows(run_dir, rows(0.5)) != self.of_rows(run_dir, rows(0.25))

    def test_the_format_does_not_matter(self, run_dir):
        trainer = tiny.plain_trainer(run_dir)
        one = self.of(trainer)
        for format_ in ("torch", "numpy"):
            trainer.train_dataset = trainer.train_dataset.with_format(format_)
            assert self.of(trainer) == one

    def test_rows_that_are_augmented_at_random(self, run_dir):
        class Noisy(Rows):
            def __getitem__(self, index):
                row = self.rows[index]
                return row | {"x": torch.randn(3), "y": np.random.rand(), "z": random.random()}

        class Unseeded(Noisy):
            generator = np.random.default_rng()

            def __getitem__(self, index):
                return self.rows[index] | {"x": self.generator.random()}

        plain = [{"x": 0, "task": t} for t in "ab"]
        for kind in (Noisy, Unseeded):
            fingerprints = set()
            rows = ModelRows(tiny.plain_trainer(run_dir), kind(plain))
            for seed in (1, 2):
                torch.manual_seed(seed)
                random.seed(seed)
                before = torch.get_rng_state()
                fingerprints.add(plan._digest_of_rows(rows))
                assert torch.equal(before, torch.get_rng_state())
            assert len(fingerprints) == 1


class TestTasksLeftOutOnPurpose:
    """What is no more in the training set when the trainer is made is no part of the run."""

    LEFT_OUT: ClassVar = {
        "filter": lambda d: d.filter(lambda row: row["task"] != "b"),
        "select": lambda d: d.select([i for i, t in enumerate(d["task"]) if t != "b"]),
        "first rows": lambda d: d.select(range(30)),
        "shuffled": lambda d: d.filter(lambda row: row["task"] != "b").shuffle(seed=1),
        "split": lambda d: d.filter(lambda row: row["task"] != "b").train_test_split(0.2, seed=1)[
            "train"
        ],
        "renamed": lambda d: d.map(lambda row: {"task": row["task"].replace("b", "letters")}),
        "cast": lambda d: d.filter(lambda row: row["task"] != "b").class_encode_column("task"),
    }

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    @pytest.mark.parametrize("how", LEFT_OUT)
    def test_the_run_goes_on_without_them(self, kind, how, run_dir, caplog):
        tokenize = tiny.tokenize if kind == "Trainer" else lambda dataset: dataset
        data = self.LEFT_OUT[how](tokenize(tiny.tasks()))
        trainer = tiny.TRAINERS[kind](run_dir, train_dataset=data)
        with caplog.at_level(logging.INFO, "hf_auxselect"):
            names = planned(trainer).tasks.names
        expected = {
            "first rows": {"a", "b"},
            "renamed": {"a", "letters", "c", "d"},
        }.get(how, {"a", "c", "d"})
        assert set(names) == expected
        gone = set(NAMES) - expected
        assert "no row of the tasks" in caplog.text
        assert not [r for r in caplog.records if r.levelno > logging.INFO]
        with pytest.raises(ValueError, match="keep names the unknown task"):
            planned(trainer, callback(keep=[min(gone)]))

    def test_a_task_column_with_another_name_and_type(self, run_dir):
        data = tiny.tokenize(tiny.tasks()).rename_column("task", "source")
        data = data.cast_column("source", ClassLabel(names=[*NAMES, "e"]))
        trainer = tiny.plain_trainer(run_dir, train_dataset=data)
        assert planned(trainer, callback(task_column="source")).tasks.names == NAMES

    @pytest.mark.parametrize("max_length", [16, None])
    def test_lost_to_truncation_or_left_out(self, max_length, run_dir):
        """Of tasks filtered out and tasks that the trainer drops, the latter are refused."""
        long = Dataset.from_list([{"prompt": "1+" * 40, "completion": "2"}] * 5)
        data = concatenate_tasks(
            {"a": tiny.sums(20, 1), "long": long, "b": tiny.sums(20, 2), "out": tiny.sums(9, 3)}
        )
        data = data.filter(lambda row: row["task"] != "out")
        trainer = tiny.sft_trainer(run_dir, train_dataset=data, max_length=max_length)
        if max_length is None:
            assert planned(trainer).tasks.names == ("a", "long", "b")
        else:
            with pytest.raises(ValueError, match=r"the task 'long' has lost all its rows .*16"):
                planned(trainer)

    def test_it_is_known_without_concatenate_tasks_too(self, run_dir):
        long = Dataset.from_list([{"prompt": "1+" * 40, "completion": "2"}] * 5)
        parts = {"a": tiny.sums(20, 1), "long": long, "b": tiny.sums(20, 2), "longer": long}
        data = concatenate_datasets(
            [d.add_column("task", [name] * len(d)) for name, d in parts.items()]
        )
        trainer = tiny.sft_trainer(run_dir, train_dataset=data, max_length=16)
        with pytest.raises(ValueError, match="the tasks 'long', 'longer' have lost all their rows"):
            planned(trainer)

    def test_a_trainer_with_a_preparation_of_its_own_is_warned_of(self, run_dir, caplog):
        class Own(tiny.Trainer):
            def __init__(self, *args, train_dataset, **kwargs):
                short = train_dataset.filter(lambda row: row["task"] != "b")
                super().__init__(*args, train_dataset=short, **kwargs)

        trainer = tiny.plain_trainer(run_dir, trainer_class=Own)
        with caplog.at_level(logging.WARNING):
            assert planned(trainer).tasks.names == ("a", "c", "d")
        assert "no row of the tasks ['b'] is in train_dataset" in caplog.text


class TestTaskLabels:
    @pytest.mark.parametrize("format_", [None, "torch", "numpy"])
    def test_class_labels_have_names(self, format_, run_dir):
        data = tiny.tokenize(tiny.tasks())
        data = data.cast_column("task", ClassLabel(names=["d", "c", "b", "a"]))
        cb = callback(selector=FixedSelection({"b": 1, "d": 3}, estimate=False), keep=["b"])
        trained(tiny.plain_trainer, run_dir, cb, train_dataset=data.with_format(format_))
        assert cb.report.weights == {"a": 0, "b": 0.25, "c": 0, "d": 0.75}

    @pytest.mark.parametrize("format_", [None, "torch", "numpy"])
    def test_integers_are_named_by_their_digits(self, format_, run_dir):
        data = tiny.tokenize(tiny.tasks())
        numbers = [10 + NAMES.index(name) for name in data["task"]]
        data = data.remove_columns("task").add_column("task", numbers)
        trainer = tiny.plain_trainer(run_dir, train_dataset=data.with_format(format_))
        assert planned(trainer).tasks.names == ("10", "11", "12", "13")

    def test_labels_that_a_map_over_batches_has_chained(self, run_dir):
        def group(batch, size=8):
            joined = {name: list(chain(*column)) for name, column in batch.items()}
            ends = range(0, len(joined["input_ids"]) // size * size, size)
            return {name: [c[i : i + size] for i in ends] for name, c in joined.items()}

        data = tiny.tokenize(tiny.tasks())
        trainer = tiny.plain_trainer(run_dir, train_dataset=data.map(group, batched=True))
        with pytest.raises(ValueError, match=r"row 0 .*\['a', 'a', .*group_texts.*of each task by"):
            planned(trainer)

    def test_single_characters_of_the_tasks_names(self, run_dir):
        parts = {"task1": tiny.sums(9, 1), "task2": tiny.sums(9, 2)}
        data = tiny.tokenize(concatenate_tasks(parts))
        data = data.map(lambda row, i: {"task": "task1"[i % 5]}, with_indices=True)
        trainer = tiny.plain_trainer(run_dir, train_dataset=data)
        with pytest.raises(ValueError, match=r"single characters .*'t'.*\['task1', 'task2'\]"):
            planned(trainer)

    def test_a_row_without_a_task(self, run_dir):
        data = tiny.tokenize(tiny.tasks())
        data = data.map(lambda row, i: {"task": row["task"] if i - 5 else None}, with_indices=True)
        trainer = tiny.plain_trainer(run_dir, train_dataset=data)
        with pytest.raises(ValueError, match=r"row 5 of train_dataset names no task .*got None"):
            planned(trainer)

    @pytest.mark.parametrize("wrapped", ["rows", "subset", "concatenated", "encodings", "list"])
    def test_datasets_of_pytorch(self, wrapped, run_dir):
        data = tiny.tokenize(tiny.tasks()).cast_column("task", ClassLabel(names=list("dcba")))
        names = [row | {"task": "dcba"[row["task"]]} for row in data]
        dataset = {
            "rows": lambda: Rows(names),
            "subset": lambda: Subset(data, np.arange(10, 60)),
            "concatenated": lambda: ConcatDataset([data, Subset(data, range(20))]),
            "encodings": lambda: Rows(map(BatchEncoding, names)),
            "list": lambda: names,
        }[wrapped]()
        cb = callback(selector=FixedSelection(["a", "c"], estimate=False))
        trainer = trained(tiny.plain_trainer, run_dir, cb, train_dataset=dataset)
        tasks = read_tasks(trainer, "task")
        expected = ["dcba"[r["task"]] for r in data]
        expected = {
            "subset": expected[10:60],
            "concatenated": expected + expected[:20],
        }.get(wrapped, expected)
        assert [tasks.names[i] for i in tasks.ids] == expected
        assert cb.report.selected == ["a", "c"]

    def test_rows_that_are_no_dicts(self, run_dir):
        data = TensorDataset(torch.arange(8), torch.arange(8))
        trainer = tiny.plain_trainer(run_dir, train_dataset=data)
        with pytest.raises(ValueError, match=r"\(TensorDataset\) name no task: row 0 is a tuple"):
            planned(trainer)

    def test_a_row_that_lacks_the_column(self, run_dir):
        rows = [*tiny.tokenize(tiny.tasks())]
        del rows[4]["task"]
        trainer = tiny.plain_trainer(run_dir, train_dataset=Rows(rows))
        with pytest.raises(ValueError, match="row 4 of train_dataset has no column 'task'"):
            planned(trainer)

    def test_parts_that_name_their_classes_differently(self, run_dir):
        data = tiny.tokenize(tiny.tasks())
        parts = [data.cast_column("task", ClassLabel(names=list(n))) for n in ("abcd", "dcba")]
        trainer = tiny.plain_trainer(run_dir, train_dataset=ConcatDataset(parts))
        with pytest.raises(ValueError, match="the parts of train_dataset name the classes"):
            planned(trainer)


class TestColumnsAndTransforms:
    """Each run is that of the plain rows: the same weights, and the same estimates."""

    @pytest.fixture(scope="class")
    def plain(self, tmp_path_factory):
        cb = callback(selector=FixedSelection(["a", "c"]))
        trainer = trained(tiny.plain_trainer, tmp_path_factory.mktemp("plain"), cb)
        return tiny.weights(trainer), cb.report.to_dict()["rows"]

    def same_run(self, plain, run_dir, **options):
        cb = callback(selector=FixedSelection(["a", "c"]))
        trainer = trained(tiny.plain_trainer, run_dir, cb, **options)
        assert tiny.same(tiny.weights(trainer), plain[0])
        losses = [[row["loss"] for row in rows] for rows in (cb.report.to_dict()["rows"], plain[1])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_a_transform_without_the_task(self, plain, run_dir):
        text, target = tiny.tasks(), tiny.sums(16, 9)
        encoded = {
            (row["prompt"], row["completion"]): tokens
            for rows in (text, target)
            for row, tokens in zip(rows, tiny.tokenize(rows), strict=True)
        }

        def encode(batch):
            rows = [encoded[key] for key in zip(batch["prompt"], batch["completion"], strict=True)]
            names = ("input_ids", "attention_mask", "labels")
            return {name: [row[name] for row in rows] for name in names}

        self.same_run(
            plain,
            run_dir,
            train_dataset=text.with_transform(encode),
            eval_dataset=target.with_transform(encode),
            remove_unused_columns=False,
        )

    def test_a_format_without_the_task_column(self, plain, run_dir):
        columns = ["input_ids", "attention_mask", "labels"]
        data = tiny.tokenize(tiny.tasks()).with_format("numpy", columns=columns)
        self.same_run(plain, run_dir, train_dataset=data)

    def test_a_column_that_the_target_lacks(self, plain, run_dir):
        """``collate`` would fail if a batch held rows of both."""

        def collate(rows):
            assert len({tuple(sorted(row)) for row in rows}) == 1
            if "weight" in rows[0]:
                assert all(row["weight"] == 2.0 for row in rows)
            return tiny.collate(rows)

        data = tiny.tokenize(tiny.tasks())
        self.same_run(
            plain,
            run_dir,
            train_dataset=data.add_column("weight", [2.0] * len(data)),
            data_collator=collate,
            remove_unused_columns=False,
        )

    def test_a_transform_whose_columns_are_removed(self, run_dir):
        data = tiny.tokenize(tiny.tasks()).add_column("text", ["1"] * 81)

        def with_text(batch):
            return {name: batch[name] for name in ("input_ids", "labels")} | {"n": batch["text"]}

        trainer = tiny.plain_trainer(run_dir, train_dataset=data.with_transform(with_text))
        with pytest.raises(
            ValueError, match=r"reads 'text', but remove_unused_columns=True removes .*=False"
        ):
            planned(trainer)

    @pytest.mark.parametrize("batch_class", [BatchEncoding, BatchFeature, SimpleNamespace])
    def test_collators_that_return_other_classes(self, batch_class, plain, run_dir):
        if batch_class is SimpleNamespace:
            trainer = tiny.plain_trainer(
                run_dir, callback(), data_collator=lambda rows: SimpleNamespace(labels=rows)
            )
            with pytest.raises(ValueError, match="data_collator returns a SimpleNamespace; a dict"):
                trainer.train()
        else:
            self.same_run(
                plain, run_dir, data_collator=lambda rows: batch_class(tiny.collate(rows))
            )


class TestFlattenedBatches:
    def test_examples_are_captured_as_if_they_were_padded(self, run_dir):
        flat, padded = (callback(after="observe", warmup=1) for _ in range(2))
        options = {"learning_rate": 0.0, "max_steps": 3, "per_device_eval_batch_size": 1}
        options |= {"eval_strategy": "steps", "eval_steps": 1}
        trainer = trained(
            tiny.plain_trainer,
            run_dir / "flat",
            flat,
            data_collator=DataCollatorWithFlattening(),
            **options,
        )
        trained(tiny.plain_trainer, run_dir / "padded", padded, **options)
        rows = [cb.report.to_dict()["rows"] for cb in (flat, padded)]
        for one, other in zip(*rows, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        assert flat.report.row("no further training").loss == pytest.approx(logged[0], rel=1e-5)

    def test_collators_of_one_s_own_that_flatten_are_refused(self, run_dir):
        def flatten(rows):
            return {
                name: torch.tensor([list(chain(*(row[name] for row in rows)))])
                for name in ("input_ids", "labels")
            }

        trainer = tiny.plain_trainer(run_dir, callback(), data_collator=flatten)
        with pytest.raises(ValueError, match=r"labels of 1 rows for 4 examples.*one that pads"):
            trainer.train()
        assert trainer.state.global_step == 0


class TestADictOfOneTarget:
    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    def test_its_key_is_the_target(self, kind, run_dir):
        target = tiny.sums(16, 9)
        sets = {"sums": tiny.tokenize(target) if kind == "Trainer" else target}
        cb = callback(verify=1)
        trainer = trained(tiny.TRAINERS[kind], run_dir, cb, eval_dataset=sets)
        assert cb.report.target.name == "sums"
        page = run_dir / "_task_selection" / "report" / "README.md"
        assert "| sums (target) |" in page.read_text()
        (measured,) = cb.report.verification
        assert measured.measured == pytest.approx(trainer.evaluate()["eval_sums_loss"], rel=1e-5)


def test_a_fixed_subset_pools_rows_whether_it_is_estimated_or_not(run_dir):
    weights = []
    for estimate in (True, False):
        cb = callback(selector=FixedSelection(["a", "b"], estimate=estimate))
        trained(tiny.plain_trainer, run_dir / str(estimate), cb)
        weights.append(cb.report.weights)
    assert weights[0] == pytest.approx({"a": 2 / 3, "b": 1 / 3, "c": 0, "d": 0})
    assert weights[1] == pytest.approx(weights[0], rel=1e-12)


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def vision_trainer(directory, modules, *callbacks):
    """SFTTrainer of a tiny LLaVA; every other row has two images instead of one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "<eos>", "<unk>", "<image>", "user", "assistant", "red", "blue"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    marks = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, **marks, additional_special_tokens=["<image>"]
    )
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    width |= {"num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **width),
            text_config=transformers.LlamaConfig(vocab_size=8, pad_token_id=0, **width),
            image_token_index=3,
        )
    )

    def rows(num_rows, seed):
        rng = np.random.default_rng(seed)
        turn = [{"role": Value("string"), "content": Value("string")}]
        return Dataset.from_list(
            [
                {
                    "images": [
                        rng.integers(0, 255, (8, 8, 3)).astype(np.uint8) for _ in range(1 + i % 2)
                    ],
                    "prompt": [{"role": "user", "content": "red"}],
                    "completion": [{"role": "assistant", "content": "blue " * (1 + i % 3)}],
                }
                for i in range(num_rows)
            ],
            features=Features({"images": List(Image()), "prompt": turn, "completion": turn}),
        )

    options = {"max_steps": 2, "max_length": None, "eval_strategy": "steps", "eval_steps": 1}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(directory), **tiny.ARGUMENTS | options),
        train_dataset=concatenate_tasks({"a": rows(4, 1), "b": rows(4, 2)}),
        eval_dataset=rows(4, 3),
        processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=modules),
        callbacks=[*callbacks],
    )


class TestSeveralImagesInARow:
    @pytest.mark.parametrize(
        "modules",
        [
            r".*language_model.*(q_proj|v_proj)",
            r".*vision_tower.*layers\.0.*(q_proj|v_proj)",
        ],
        ids=["the language model", "the vision tower"],
    )
    def test_an_adapter_is_captured(self, modules, run_dir):
        """That of the vision tower one example at a time: a batch has more images than rows."""
        cb = callback(warmup=1, after="observe")
        trainer = vision_trainer(run_dir, modules, cb)
        trainer.train()
        logged = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
        assert cb.report.row("no further training").loss == pytest.approx(logged, rel=1e-5)


def test_gradients_of_packed_rows_are_those_of_their_documents_alone(run_dir):
    from trl import pack_dataset

    documents = {
        name: tiny.tokenize(dataset).remove_columns("attention_mask")
        for name, dataset in {
            "a": tiny.sums(9, 1, mark="a"),
            "b": tiny.sums(6, 2, mark="b", letters=True),
            "c": tiny.sums(6, 3, mark="c", shuffled=True),
        }.items()
    }
    packed = concatenate_tasks({n: pack_dataset(d, 24, "bfd") for n, d in documents.items()})
    assert len(packed) == 7
    trainer = tiny.sft_trainer(
        run_dir, train_dataset=packed, packing=False, padding_free=True, max_length=None
    )
    model = tiny.randomized(trainer.model)
    rows = list(ModelRows(trainer, trainer.train_dataset))
    tasks = [packed["task"][int(i)] for i in ModelRows(trainer, packed).packed_rows]
    assert sorted((n, d["input_ids"], d["labels"]) for n, d in zip(tasks, rows, strict=True)) == (
        sorted((n, d["input_ids"], d["labels"]) for n, part in documents.items() for d in part)
    )

    captured = {}
    with evaluation_mode(model), GradientHooks(model, captured.__setitem__):
        batch = collate_function(trainer)(rows)
        SCALARS["margin"](forward_label_logits(model, batch)).sum().backward()
    alone = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    for i, reference in enumerate(per_example_gradients(model, alone, tiny.collate)):
        whole = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
        for name, gradient in reference.items():
            assert (captured[name][i] - gradient).norm() < 1e-9 * whole
