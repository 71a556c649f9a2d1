"""Joining tasks to a training set, and their names."""

import enum
import logging

import numpy as np
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
)

from hf_auxselect import concatenate_tasks
from hf_auxselect.tasks import TaskRows, joined_tasks


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
            ({"a": texts("1").to_iterable_dataset()}, TypeError, r"'a'\] is a stream.*take=n"),
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


def stream_of(rows):
    """A stream whose features are not known."""
    return IterableDataset.from_generator(lambda: iter(rows))


class TestStreams:
    def test_the_first_rows_are_taken(self, caplog):
        tasks = {
            "a": texts("1", "2", "3").to_iterable_dataset(),
            "b": stream_of([{"text": "4"}, {"text": "5"}]),
            "c": texts("6", "7", "8"),
        }
        with caplog.at_level(logging.INFO, "hf_auxselect"):
            joined = concatenate_tasks(tasks, take=2)
        expected = [("1", "a"), ("2", "a"), ("4", "b"), ("5", "b"), ("6", "c"), ("7", "c")]
        assert list(zip(joined["text"], joined["task"], strict=True)) == expected
        assert caplog.text.count("took the first 2 rows") == 3
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert joined_tasks(joined) == ["a", "b", "c"]

    def test_each_task_may_have_its_own_number(self):
        tasks = {"a": texts("1", "2", "3").to_iterable_dataset(), "b": texts("4", "5", "6")}
        assert concatenate_tasks(tasks, take={"a": 1})["text"][:] == ["1", "4", "5", "6"]

    def test_a_stream_that_ends_early_is_said(self, caplog):
        tasks = {"a": texts("1", "2").to_iterable_dataset(), "b": texts("3")}
        with caplog.at_level(logging.WARNING, "hf_auxselect"):
            assert len(concatenate_tasks(tasks, take=5)) == 3
        assert [r.getMessage() for r in caplog.records] == [
            "tasks['a']: the stream ended after 2 rows; take asks for 5."
        ]

    def test_no_more_rows_are_read_than_are_taken(self):
        read = []

        def rows():
            for i in range(100):
                read.append(i)
                yield {"text": str(i)}

        concatenate_tasks({"a": IterableDataset.from_generator(rows), "b": texts("x")}, take=3)
        assert len(read) <= 4

    @pytest.mark.parametrize("form", [None, "torch", "numpy"])
    def test_types_are_those_of_the_stream(self, form):
        features = Features(
            {
                "label": ClassLabel(names=["no", "yes"]),
                "n": Value("int32"),
                "messages": [{"role": Value("string")}],
            }
        )
        rows = {"label": [0, 1], "n": [3, None], "messages": [[{"role": "user"}], []]}
        stored = Dataset.from_dict(rows, features=features)
        stream = stored.with_format(form).to_iterable_dataset()
        joined = concatenate_tasks({"a": stream, "b": stored}, take=9)
        assert joined.features == Features({**features, "task": Value("string")})
        assert joined[:2] == joined[2:] | {"task": ["a", "a"]} == {**rows, "task": ["a", "a"]}

    def test_types_are_inferred_where_the_stream_has_none(self):
        stream = stream_of([{"x": 1}, {"x": None, "y": "later"}])
        joined = concatenate_tasks({"a": stream}, take=2)
        assert joined[:] == {"x": [1, None], "y": [None, "later"], "task": ["a", "a"]}

    def test_images_stay_the_bytes_that_they_are(self):
        png = bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d7"
            "63f8ffff3f0005fe02fea135812f0000000049454e44ae426082"
        )
        features = Features({"image": Image()})
        stored = Dataset.from_dict({"image": [{"bytes": png, "path": None}]}, features=features)
        joined = concatenate_tasks({"a": stored.to_iterable_dataset()}, take=1)
        assert joined.features["image"] == Image()
        undecoded = joined.cast_column("image", Image(decode=False))
        assert undecoded[0]["image"]["bytes"] == png

    @pytest.mark.parametrize(
        ("take", "error", "message"),
        [
            (None, TypeError, r"tasks\['a'\] is a stream.*Pass take=n"),
            ({"b": 1}, TypeError, r"tasks\['a'\] is a stream.*Pass take=n"),
            ({"a": 1, "z": 1}, ValueError, r"take names \['z'\], which are not among"),
            (0, ValueError, "take must be a number of rows, 1 or more; got 0"),
            (1.5, ValueError, "take must be a number of rows, 1 or more; got 1.5"),
            (True, ValueError, "take must be a number of rows, 1 or more; got True"),
            ({"a": -1}, ValueError, r"take\['a'\] must be a number of rows, 1 or more; got -1"),
        ],
    )
    def test_bad_input(self, take, error, message):
        tasks = {"a": texts("1").to_iterable_dataset(), "b": texts("2")}
        with pytest.raises(error, match=message):
            concatenate_tasks(tasks, take=take)

    def test_an_empty_stream(self):
        with pytest.raises(ValueError, match=r"tasks\['a'\] has no rows"):
            concatenate_tasks({"a": stream_of([])}, take=2)


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
