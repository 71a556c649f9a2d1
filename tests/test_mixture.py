import enum
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
)
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect import concatenate_tasks
from hf_auxselect.mixture import MixtureSampler, TaskRows


def texts(*values):
    return Dataset.from_dict({"text": list(values)})


class TestConcatenateTasks:
    def test_rows_keep_their_order_and_learn_their_task(self):
        joined = concatenate_tasks({"b": texts("3", "1"), "a": texts("2")})
        assert joined.column_names == ["text", "task"]
        assert joined[:] == {"text": ["3", "1", "2"], "task": ["b", "b", "a"]}

    def test_columns_may_come_in_another_order(self):
        first = Dataset.from_dict({"x": [1], "y": ["a"]})
        second = Dataset.from_dict({"y": ["b"], "x": [2]})
        assert concatenate_tasks({"p": first, "q": second})[1] == {"x": 2, "y": "b", "task": "q"}

    def test_the_column_may_have_another_name(self):
        assert "source" in concatenate_tasks({"a": texts("1")}, task_column="source").column_names

    @pytest.mark.parametrize("order", ["ab", "ba"])
    @pytest.mark.parametrize("lacking", [{}, {"level": [None]}], ids=["missing", "of type null"])
    def test_columns_without_values_are_filled_and_said(self, lacking, order, caplog):
        """As ``datasets.concatenate_datasets`` does."""
        tasks = {
            "a": Dataset.from_dict({"text": ["1"]} | lacking),
            "b": Dataset.from_dict({"text": ["2", "3"], "level": [3, 4]}),
        }
        tasks = {name: tasks[name] for name in order}
        joined = concatenate_tasks(tasks)
        assert joined.remove_columns("task")[:] == concatenate_datasets([*tasks.values()])[:]
        assert joined.column_names == ["text", "level", "task"]
        assert joined["task"][:] == sorted("abb", reverse=order == "ba")
        assert "fills the column 'level' with None" in caplog.text
        assert "no value in it: 'a'." in caplog.text

    def test_lists_that_are_empty_everywhere_take_the_type_of_the_others(self):
        one, other = (Dataset.from_dict({"tools": [tools]}) for tools in ([], ["add"]))
        joined = concatenate_tasks({"a": one, "b": other})
        assert joined["tools"][:] == [[], ["add"]]

    def test_a_column_that_no_task_has_values_in_is_not_said(self, caplog):
        empty = Dataset.from_dict({"text": ["1"], "note": [None]})
        assert concatenate_tasks({"a": empty, "b": empty})["note"][:] == [None, None]
        assert not caplog.records

    def test_types_that_datasets_does_not_join_are_named_with_both_tasks(self):
        features = [Features({"text": Value("string"), "x": Value(t)}) for t in ("int32", "int64")]
        row = {"text": ["1"], "x": [1]}
        one, other = (Dataset.from_dict(row, features=f) for f in features)
        empty = Dataset.from_dict({"text": ["1"], "x": [None]})
        with pytest.raises(
            ValueError, match=r"'a' and 'b' differ.*'x' is .*int32.*'a'.*int64.*'b'"
        ):
            concatenate_tasks({"none": empty, "a": one, "b": other})

    def test_differing_types_are_named(self):
        number = Dataset.from_dict({"text": [1]}, features=Features({"text": Value("int64")}))
        with pytest.raises(ValueError, match=r"'text' is Value\('string'\).*Value\('int64'\)"):
            concatenate_tasks({"a": texts("1"), "b": number})

    @pytest.mark.parametrize(
        ("tasks", "error", "message"),
        [
            ({}, ValueError, "tasks is empty"),
            ({"a": texts()}, ValueError, r"tasks\['a'\] has no rows"),
            ([("a", texts("1")), ("a", texts("2"))], ValueError, "'a' is used twice"),
            ({" ": texts("1")}, ValueError, "is empty"),
            ({1: texts("1")}, TypeError, "names must be strings"),
            ({"a": ["1"]}, TypeError, r"tasks\['a'\] must be a datasets.Dataset, got list"),
            ({"a": texts("1").to_iterable_dataset()}, TypeError, "Materialise"),
            (
                {"a": DatasetDict(train=texts("1"), test=texts("2"))},
                TypeError,
                r"tasks\['a'\] is a DatasetDict with the splits \['train', 'test'\]; pass one of "
                r"its datasets, such as tasks\['a'\]\['train'\]",
            ),
            (
                {"a": IterableDatasetDict(test=texts("1").to_iterable_dataset())},
                TypeError,
                r"IterableDatasetDict with the splits \['test'\].*tasks\['a'\]\['test'\]",
            ),
            ({"a": {"x": texts("1")}}, TypeError, r"a dict with the keys \['x'\]"),
            ([texts("1"), texts("2")], TypeError, "got a list of Dataset"),
            (texts("1"), TypeError, "got a Dataset of dict"),
            (
                {"a": texts("1").add_column("task", ["x"])},
                ValueError,
                r"tasks\['a'\] already has a column 'task'",
            ),
        ],
    )
    def test_bad_input(self, tasks, error, message):
        with pytest.raises(error, match=message):
            concatenate_tasks(tasks)


counts = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def sampler(counts, shares, **options):
    labels = [f"t{k}" for k, count in enumerate(counts) for _ in range(count)]
    return MixtureSampler(TaskRows.from_labels(labels), np.asarray(shares, float), 7, **options)


class TestMixtureSampler:
    @given(counts, st.integers(0, 200), st.integers(0, 200), st.data())
    def test_it_can_be_entered_anywhere(self, counts, start, length, data):
        raw = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=5)))
        shares = raw[: len(counts)] / raw[: len(counts)].sum()
        whole = list(sampler(counts, shares, length=start + length))
        assert list(sampler(counts, shares, start=start, length=length)) == whole[start:]

    @given(counts)
    def test_shares_in_proportion_to_rows_give_shuffled_epochs(self, counts):
        total = sum(counts)
        drawn = list(sampler(counts, np.array(counts) / total, length=3 * total))
        for epoch in range(3):
            assert sorted(drawn[epoch * total : (epoch + 1) * total]) == list(range(total))

    @given(counts, st.data())
    def test_within_a_task_rows_repeat_only_when_all_are_used(self, counts, data):
        raw = np.array(
            data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=len(counts)))
        )
        drawn = np.array(list(sampler(counts, raw / raw.sum(), length=300)))
        ends = np.cumsum(counts)
        for end, count in zip(ends, counts, strict=True):
            own = drawn[(drawn >= end - count) & (drawn < end)]
            for first in range(0, len(own), count):
                one_pass = own[first : first + count]
                assert len(set(one_pass)) == len(one_pass)

    def test_shares_are_exact_over_blocks_and_fair_within(self):
        shares = [0.5, 0.3, 0.2, 0.0]
        drawn = np.array(list(sampler([10, 400, 90, 50], shares, length=5000)))
        edges = [0, 10, 410, 500, 550]
        for k, share in enumerate(shares):
            own = (drawn >= edges[k]) & (drawn < edges[k + 1])
            assert own.sum() == 5000 * share  # 5,000 draws are whole blocks of 500
            part = own[:1000].sum()
            assert abs(part - 1000 * share) <= 4 * np.sqrt(1000 * share * (1 - share))

    def test_a_tiny_share_is_served_in_time(self):
        drawn = Counter(list(sampler([1, 5], [0.001, 0.999], length=10_000)))
        assert drawn[0] == 10

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ([0.5, 0.6], "sum to 1"),
            ([1.0], "one number per task"),
            ([1 - 1e-9, 1e-9], "share of task 't1' is below 1e-06"),
            ([1.5, -0.5], "share of task 't1' is below"),
        ],
    )
    def test_bad_shares(self, shares, message):
        with pytest.raises(ValueError, match=message):
            sampler([3, 3], shares)

    def test_another_seed_gives_another_order(self):
        tasks = TaskRows.from_labels(["a"] * 20)
        one, other = (list(MixtureSampler(tasks, np.ones(1), s, length=20)) for s in (1, 2))
        assert one != other
        assert sorted(one) == sorted(other)


class Language(str, enum.Enum):  # noqa: UP042 -- as many scripts have it
    PYTHON = "python"


class TestTaskNames:
    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            (["x", np.str_("y"), Language.PYTHON], ("x", "y", "python")),
            ([7, 0], ("7", "0")),
            ([np.int8(7), np.array(3), torch.tensor(5)], ("7", "3", "5")),
        ],
    )
    def test_strings_and_integers(self, labels, names):
        assert TaskRows.from_labels(labels).names == names

    def test_classes_have_their_names(self):
        tasks = TaskRows.from_labels([1, torch.tensor(0), 1], class_names=["gsm", "code"])
        assert tasks.names == ("code", "gsm")
        assert tasks.ids.tolist() == [0, 1, 0]

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            (None, r"got None \(NoneType\).*leave the rows without one out"),
            ("", "got '' .*leave the rows"),
            (1.0, r"got 1.0 \(float\)\. Let each row have its task's name"),
            (np.float32(1), "got "),
            (torch.tensor(1.0), "got "),
            (True, "got True"),
            (np.bool_(True), "got "),
            (["t", "a", "s", "k"], r"got \['t', 'a', .*group_texts.*each task by itself"),
            (torch.tensor([1, 2]), "got "),
            ({"name": "x"}, "got {'name'"),
            (b"x", "got b'x'"),
        ],
    )
    def test_others_are_refused_with_their_row(self, label, message):
        with pytest.raises(ValueError, match=f"row 1 of train_dataset names no task.*{message}"):
            TaskRows.from_labels(["a", label])

    @pytest.mark.parametrize("label", [-1, 2])
    def test_so_are_classes_that_there_are_not(self, label):
        with pytest.raises(ValueError, match="row 0 of train_dataset names no task"):
            TaskRows.from_labels([label], class_names=["a", "b"])


def test_tasks_are_numbered_in_order_of_appearance():
    tasks = TaskRows.from_labels(["x", "a", "x", "m"])
    assert tasks.names == ("x", "a", "m")
    assert tasks.ids.tolist() == [0, 1, 0, 2]
    assert tasks.counts.tolist() == [2, 1, 1]
    assert [rows.tolist() for rows in tasks.rows] == [[0, 2], [1], [3]]
