"""Packing: every row holds documents of one task, whatever was done to the training set before."""

import copy
import pickle
import shutil

import datasets
import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets, load_from_disk
from tiny import callback, trained
from torch.utils.data import DataLoader
from trl import pack_dataset

from hf_auxselect import FixedSelection, GradExLogistic, GradientStore, concatenate_tasks
from hf_auxselect.packing import TaskDataset
from hf_auxselect.trainer.data import ModelRows, read_tasks

STRATEGIES = ["bfd", "bfd_split", "wrapped"]


def rows_of_task(k, num_rows, seed=0):
    """Documents of 1 to 8 tokens, all of which lie between 100 k and 100 k + 99."""
    lengths = np.random.default_rng([seed, k]).integers(1, 9, num_rows)
    ids = [[100 * k + (i + j) % 100 for j in range(n)] for i, n in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def three_tasks(*sizes):
    return concatenate_tasks(
        {f"t{k}": rows_of_task(k, size) for k, size in enumerate(sizes or (9, 4, 6))}
    )


def packed_as_the_trainer_does(dataset, strategy="bfd", seed=None):
    dataset = dataset.select_columns(["input_ids", "labels"])
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    dataset = pack_dataset(dataset, 12, strategy, {"num_proc": None, "desc": "Packing"})
    return dataset if seed is None else dataset.shuffle(seed=seed)


def tasks_by_tokens(packed):
    return [{f"t{token // 100}" for token in row} for row in packed["input_ids"]]


def tokens(dataset):
    return sorted(token for row in dataset["input_ids"] for token in row)


class TestPackDataset:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_it_is_what_packing_each_task_by_itself_gives(self, strategy):
        packed = packed_as_the_trainer_does(three_tasks(), strategy)
        alone = [
            pack_dataset(rows_of_task(k, size), 12, strategy) for k, size in enumerate((9, 4, 6))
        ]
        names = [f"t{k}" for k, part in enumerate(alone) for _ in range(len(part))]
        expected = concatenate_datasets(alone).add_column("task", names)
        assert packed[:] == expected[:]
        assert packed.features == expected.features
        assert isinstance(packed, TaskDataset)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_shuffled_rows_keep_their_task(self, strategy):
        packed = packed_as_the_trainer_does(three_tasks(), strategy, seed=3)
        assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]
        assert tokens(packed) == tokens(three_tasks())
        assert packed["task"][:] != sorted(packed["task"])

    def test_shuffling_without_a_seed(self):
        narrow = three_tasks().select_columns(["input_ids", "labels"]).shuffle()
        packed = pack_dataset(narrow, 12)
        assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_of_more_rows_than_a_batch(self, strategy):
        joined = three_tasks(1300, 1100, 30)
        packed = packed_as_the_trainer_does(joined, strategy)
        assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]
        assert tokens(packed) == tokens(joined)

    def test_with_several_processes(self):
        narrow = three_tasks().select_columns(["input_ids", "labels"])
        packed = pack_dataset(narrow, 12, "bfd", {"num_proc": 2})
        assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]
        assert tokens(packed) == tokens(three_tasks())

    def test_with_the_task_column_still_there(self):
        packed = pack_dataset(three_tasks(), 12)
        assert packed[:] == packed_as_the_trainer_does(three_tasks())[:]

    def test_rows_that_were_interleaved(self):
        joined = three_tasks().shuffle(seed=1).flatten_indices()
        packed = packed_as_the_trainer_does(joined)
        assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]

    def test_from_files_and_their_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        tasks = {}
        for k, size in enumerate((9, 4)):
            rows_of_task(k, size).to_parquet(tmp_path / f"{k}.parquet")
            path = str(tmp_path / f"{k}.parquet")
            tasks[f"t{k}"] = Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
        for _ in range(2):  # the second time from the cache
            packed = packed_as_the_trainer_does(concatenate_tasks(tasks))
            assert tasks_by_tokens(packed) == [{name} for name in packed["task"]]
            assert tokens(packed) == tokens(three_tasks(9, 4))

    @pytest.mark.parametrize("option", ["cache_file_name", "new_fingerprint"])
    def test_one_cache_for_all_tasks_is_refused(self, option, tmp_path):
        with pytest.raises(ValueError, match=f"map_kwargs: {option} would name"):
            pack_dataset(three_tasks(), 12, "bfd", {option: str(tmp_path / "x")})

    def test_another_task_column_renamed_and_encoded(self):
        joined = three_tasks().rename_column("task", "source").rename_columns({"source": "of"})
        packed = packed_as_the_trainer_does(joined.class_encode_column("of"))
        assert packed.features["of"] == ClassLabel(names=["t0", "t1", "t2"])
        assert tasks_by_tokens(packed) == [{f"t{label}"} for label in packed["of"]]

    def test_rows_without_their_task_are_packed_together(self):
        plain = three_tasks().remove_columns("task")
        packed = packed_as_the_trainer_does(plain)
        assert type(plain) is Dataset
        assert max(len(names) for names in tasks_by_tokens(packed)) > 1
        assert packed.column_names == ["input_ids", "labels", "seq_lengths"]


def twice(batch):
    return {name: [v for value in values for v in (value, value)] for name, values in batch.items()}


METHODS = {
    "map": lambda d: d.map(lambda row: {"labels": row["labels"]}),
    "map of batches": lambda d: d.map(twice, batched=True, batch_size=7),
    "map in processes": lambda d: d.map(lambda row: {"n": len(row["labels"])}, num_proc=2),
    "filter": lambda d: d.filter(lambda row: len(row["labels"]) > 3),
    "filter by position": lambda d: d.filter(lambda row, i: i % 3 > 0, with_indices=True),
    "select": lambda d: d.select([7, 1, 12, 3]),
    "select a range": lambda d: d.select(range(5, 15)),
    "shuffle": lambda d: d.shuffle(seed=2),
    "sort": lambda d: d.sort("task", reverse=True),
    "take": lambda d: d.take(12),
    "skip": lambda d: d.skip(5),
    "shard": lambda d: d.shard(2, 1),
    "repeat": lambda d: d.repeat(2),
    "train_test_split": lambda d: d.train_test_split(0.3, seed=1)["train"],
    "dict of splits": lambda d: d.train_test_split(0.3, seed=1).filter(lambda r: r["labels"])[
        "test"
    ],
    "add_column": lambda d: d.add_column("x", list(range(len(d)))),
    "add_item": lambda d: d.add_item({"input_ids": [7], "labels": [7], "task": "t0"}),
    "rename": lambda d: d.rename_column("labels", "y").rename_columns({"y": "labels"}),
    "cast": lambda d: d.cast_column("task", Value("large_string")),
    "set_format": lambda d: d.with_format("torch", columns=["input_ids"]).with_format(None),
    "flatten": lambda d: d.flatten().flatten_indices(),
    "select all columns": lambda d: d.select_columns(["task", "labels", "input_ids"]),
    "copy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_an_ordinary_dataset_whose_tasks_stay_apart(name):
    joined = three_tasks()
    plain = concatenate_datasets([joined])
    result, expected = METHODS[name](joined), METHODS[name](plain)
    assert type(expected) is Dataset
    assert result.features == expected.features
    assert result[:] == expected[:]
    assert result.format == expected.format
    assert isinstance(result, TaskDataset)
    packed = packed_as_the_trainer_does(result)
    assert tasks_by_tokens(packed) == [{label} for label in packed["task"]]
    assert tokens(packed) == tokens(result)


class TestAPlainDataset:
    """What has forgotten its tasks is a dataset like any other."""

    def test_columns_selected_and_rows_changed(self):
        narrow = three_tasks().select_columns(["input_ids", "labels"])
        assert narrow.column_names == ["input_ids", "labels"]
        assert type(narrow.filter(lambda row: len(row["labels"]) > 3)) is Dataset
        assert type(narrow.map(lambda row: row)) is Dataset
        assert type(narrow.remove_columns("labels")) is Dataset

    def test_columns_selected_and_rows_selected(self):
        narrow = three_tasks().select_columns(["input_ids"]).with_format("numpy")
        chosen = narrow.select([15, 3, 8])
        assert chosen.format == narrow.format
        assert [ids[0] // 100 for ids in chosen["input_ids"]] == [2, 0, 0]
        packed = pack_dataset(chosen, 12, "wrapped")
        assert packed.format["type"] == "numpy"
        assert packed.with_format(None)["task"][:] == ["t2", "t0"]

    def test_saved_loaded_joined_and_interleaved(self, tmp_path):
        joined = three_tasks()
        joined.save_to_disk(tmp_path / "saved")
        loaded = load_from_disk(tmp_path / "saved")
        assert type(loaded) is Dataset
        assert loaded[:] == joined[:]
        assert type(concatenate_datasets([joined, joined])) is Dataset
        assert joined.to_iterable_dataset().column_names == joined.column_names

    def test_an_ordinary_map_may_see_rows_of_two_tasks(self):
        seen = []
        three_tasks().map(lambda batch: seen.append(set(batch["task"])), batched=True)
        assert seen[-1] == {"t0", "t1", "t2"}

    def test_workers_of_a_loader(self):
        joined = three_tasks().with_format("torch", columns=["input_ids"])
        loader = DataLoader(joined, batch_size=1, num_workers=1, multiprocessing_context="fork")
        assert sum(len(batch["input_ids"][0]) for batch in loader) == len(tokens(three_tasks()))

    def test_caches_are_those_of_any_dataset(self):
        joined = three_tasks()
        plain = concatenate_datasets([joined])
        plain._fingerprint = joined._fingerprint
        for name in ("filter", "select", "shuffle", "cast"):
            assert METHODS[name](joined)._fingerprint == METHODS[name](plain)._fingerprint


TASKS = {"a": (24, "a"), "b": (12, "b"), "c": (20, "c")}
PACKED = {"packing": True, "max_length": 24}


def documents():
    """By name: tasks whose documents all begin with the task's name."""
    return {name: tiny.sums(n, i, mark=mark) for i, (name, (n, mark)) in enumerate(TASKS.items())}


def spy(trainer):
    """The documents of each training batch that reaches the model, by their first character."""
    seen = []
    characters = {i: c for c, i in tiny.VOCABULARY.items()}

    def look(module, args, kwargs):
        if module.training:
            ids, positions = kwargs["input_ids"].flatten(), kwargs["position_ids"].flatten()
            seen.append("".join(characters[int(i)] for i in ids[positions == 0]))

    trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_row_of_the_trainer_holds_one_task(strategy, shuffled, run_dir):
    trainer = tiny.sft_trainer(
        run_dir,
        train_dataset=concatenate_tasks(documents()),
        packing_strategy=strategy,
        shuffle_dataset=shuffled,
        **PACKED,
    )
    characters = {i: c for c, i in tiny.VOCABULARY.items()}
    names = trainer.train_dataset["task"][:]
    rows = ["".join(characters[i] for i in ids) for ids in trainer.train_dataset["input_ids"]]
    assert len(rows) < sum(n for n, _ in TASKS.values()) / 2
    assert [
        {c for c in row if c in TASKS} - {name} for row, name in zip(rows, names, strict=True)
    ] == ([set()] * len(rows))
    assert (names != sorted(names)) == shuffled


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_a_packed_run_captures_documents_and_goes_on_with_the_chosen_rows(strategy, run_dir):
    cb = callback(selector=FixedSelection(["a", "c"], estimate=True))
    trainer = tiny.sft_trainer(
        run_dir,
        cb,
        train_dataset=concatenate_tasks(documents()),
        packing_strategy=strategy,
        learning_rate=0,
        **PACKED,
    )
    seen = spy(trainer)
    trainer.train()
    assert set("".join(seen[:4])) == set("abc")
    assert set("".join(seen[4:])) == set("ac")
    assert min(len(batch) for batch in seen[:-1]) > 4  # several documents in each of four rows
    store = GradientStore.load(run_dir / "_task_selection" / "gradients")
    names = trainer.train_dataset["task"][:]
    assert store.task_sizes.tolist() == [names.count(name) for name in TASKS]
    assert store.examples_per_row == pytest.approx(
        [n / names.count(name) for name, (n, _) in TASKS.items()], rel=1e-12
    )
    trainer.model.eval()
    for k, dataset in enumerate(documents().values()):
        with torch.no_grad():
            alone = [
                trainer.model(**tiny.collate([row])).loss.item() for row in tiny.tokenize(dataset)
            ]
        captured = store.losses[store.task_ids == k]
        assert sorted(captured) == pytest.approx(sorted(alone), rel=1e-5)


def test_a_wrapped_row_is_one_example(run_dir):
    trainer = trained(
        tiny.sft_trainer,
        run_dir,
        callback(after="observe"),
        train_dataset=concatenate_tasks(documents()),
        packing_strategy="wrapped",
        learning_rate=0,
        **PACKED,
    )
    store = GradientStore.load(run_dir / "_task_selection" / "gradients")
    assert store.examples_per_row.tolist() == [1, 1, 1]
    trainer.model.eval()
    rows = [row | {"attention_mask": [1] * len(row["labels"])} for row in trainer.train_dataset]
    with torch.no_grad():
        alone = [trainer.model(**tiny.collate([row])).loss.item() for row in rows]
    by_id = store.losses[np.argsort(store.example_ids)]
    assert by_id == pytest.approx(alone, rel=1e-5)


EVALUATIONS = {
    "as training": {},
    "unpacked": {"eval_packing": False},
    "packed": {"eval_packing": True},
    "packed alone": {"eval_packing": True, "packing": False},
}
"""In the last, packed documents attend to each other: TRL keeps them apart under packing=True."""


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_estimate_starts_at_the_logged_loss(name, strategy, run_dir):
    # Documents of many lengths and few label tokens, so that another weighting is another loss.
    target = concatenate_datasets([tiny.sums(9, 9), tiny.sums(7, 8, mark="+7-0="), tiny.sums(3, 7)])
    trainer = trained(
        tiny.sft_trainer,
        run_dir,
        cb := callback(warmup=2, estimator=GradExLogistic(), after="observe"),
        model=tiny.llama(attn_implementation="eager" if name == "packed" else "sdpa"),
        eval_dataset=target,
        train_dataset=concatenate_tasks(documents()),
        packing_strategy=strategy,
        learning_rate=0.1,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=3,
        **PACKED | EVALUATIONS[name],
    )
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert cb.report.row("no further training").loss == pytest.approx(logged[0], rel=1e-6)
    rows = ModelRows(trainer, trainer.eval_dataset)
    is_apart = name != "packed alone" and strategy != "wrapped"
    assert len(rows) == (19 if is_apart or name == "unpacked" else len(trainer.eval_dataset))


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_a_packed_run_is_resumed_as_if_it_had_not_been_stopped(strategy, run_dir, tmp_path):
    options = {
        **PACKED,
        "packing_strategy": strategy,
        "shuffle_dataset": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 6,
    }

    def run(directory, resume=None):
        cb = callback(warmup=3, estimator=GradExLogistic())
        data = concatenate_tasks(documents()).map(lambda row: {"completion": row["completion"]})
        return trained(tiny.sft_trainer, directory, cb, resume, train_dataset=data, **options)

    whole = run(run_dir)
    for step in (2, 3, 4):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(run_dir, resumed)
        for later in range(step + 1, 7):
            shutil.rmtree(resumed / f"checkpoint-{later}")
        assert tiny.same(tiny.weights(whole), tiny.weights(run(resumed, True))), step


def test_a_packed_mixture_that_is_fine_tuned_for_real_is_the_run(run_dir):
    cb = callback(verify=1, selector=FixedSelection(["a", "c"]), estimator=GradExLogistic())
    trainer = tiny.sft_trainer(run_dir, cb, train_dataset=concatenate_tasks(documents()), **PACKED)
    trainer.train()
    (chosen,) = cb.report.verification
    assert chosen.measured == trainer.evaluate()["eval_loss"]


def test_a_task_column_that_was_not_selected_is_remembered(run_dir):
    """As SFTTrainer of TRL 1.2 selects columns under use_liger_kernel."""
    data = tiny.tokenize(concatenate_tasks(documents()))
    narrow = data.select_columns(["input_ids", "attention_mask", "labels"]).shuffle(seed=1)
    trainer = tiny.plain_trainer(run_dir, train_dataset=narrow)
    tasks = read_tasks(trainer, "task")
    first = [tiny.CHARACTERS[row["input_ids"][0] - 2] for row in trainer.train_dataset]
    assert [tasks.names[k] for k in tasks.ids] == first


def test_tasks_of_a_plain_dataset_are_refused(run_dir):
    joined = concatenate_tasks(documents())
    plain = concatenate_datasets([joined, joined])
    trainer = tiny.sft_trainer(run_dir, callback(), train_dataset=plain, **PACKED)
    with pytest.raises(ValueError, match=r"packing=True has packed.*Make train_dataset with conc"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_documents_keep_the_masks_of_older_versions_of_trl(run_dir):
    trainer = tiny.sft_trainer(run_dir, train_dataset=concatenate_tasks(documents()), **PACKED)
    packed = Dataset.from_dict(
        {"input_ids": [[1, 2, 3]], "completion_mask": [[0, 1, 1]], "seq_lengths": [[2, 1]]}
    )
    trainer._signature_columns = list(packed.column_names)
    assert list(ModelRows(trainer, packed)) == [
        {"input_ids": [1, 2], "completion_mask": [0, 1]},
        {"input_ids": [3], "completion_mask": [1]},
    ]


class TestStreams:
    def run(self, directory, resume=None, first=0, packing=False):
        def stream(name, dataset):
            return dataset.skip(first).to_iterable_dataset().shuffle(seed=5, buffer_size=9)

        data = concatenate_tasks({n: stream(n, d) for n, d in documents().items()}, take=10)
        cb = callback(warmup=2, estimator=GradExLogistic())
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "packing": packing}
        return trained(tiny.sft_trainer, directory, cb, resume, train_dataset=data, **options)

    @pytest.mark.parametrize("packing", [False, True])
    def test_a_run_is_resumed_with_the_same_rows(self, packing, run_dir):
        whole = self.run(run_dir, packing=packing)
        checkpoint = str(run_dir / "checkpoint-3")
        again = self.run(run_dir, checkpoint, packing=packing)
        assert tiny.same(tiny.weights(whole), tiny.weights(again))

    def test_other_rows_are_noticed(self, run_dir):
        self.run(run_dir)
        with pytest.raises(ValueError, match=r"cannot resume.*training rows"):
            self.run(run_dir, str(run_dir / "checkpoint-3"), first=1)
